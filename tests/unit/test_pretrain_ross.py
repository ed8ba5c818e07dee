"""Signals before training handles them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SLOW_IMPORTS = """
import os, signal
os.kill(os.getpid(), signal.SIGUSR1)
try:
    os.kill(os.getpid(), signal.{name})
except BaseException:  # as some libraries do around an import
    pass
"""


@pytest.mark.parametrize(
    ("name", "status", "line"),
    [
        ("SIGINT", 130, b"pretrain_ross.py: interrupted\n"),
        ("SIGTERM", 143, b"pretrain_ross.py: stopped by SIGTERM before training began; nothing is saved\n"),
    ],
)
def test_a_signal_during_imports_ends_with_a_line(tmp_path: Path, name: str, status: int, line: bytes) -> None:
    script = shutil.copy(ROOT / "pretrain_ross.py", tmp_path)
    shutil.copytree(ROOT / "ross_mcore" / "commands", tmp_path / "ross_mcore" / "commands")
    (tmp_path / "ross_mcore" / "__init__.py").touch()
    for module in ("arguments.py", "launcher.py", "errors.py"):
        shutil.copy(ROOT / "ross_mcore" / module, tmp_path / "ross_mcore")
    (tmp_path / "ross_mcore" / "flags.py").write_text(SLOW_IMPORTS.replace("{name}", name))
    for rank, errors in (("0", line), ("1", b"")):
        environment = {**os.environ, "RANK": rank}
        done = subprocess.run([sys.executable, script], capture_output=True, timeout=60, env=environment)
        assert (done.returncode, done.stdout, done.stderr) == (status, b"", errors)
