"""Bad input to the script that trains, from elsewhere. (test_docs.py runs the demo.)"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--load", "nowhere", "--save", "x", "--data-path", "y", "--train-iters", "1"], "nowhere"),
        (["--save", "x"], "--load is missing"),
    ],
)
def test_bad_input_is_one_paragraph(tmp_path: Path, arguments: list[str], says: str) -> None:
    command = [sys.executable, str(ROOT / "pretrain_ross.py"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert says in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
