"""Importing the package has no effects."""

from __future__ import annotations

import subprocess
import sys

from tests.unit.test_architecture import FILES, LIGHT, ROOT


def test_importing_has_no_effects_and_help_needs_no_torch() -> None:
    """Import every module in one process: no output, no file, no process group; flags without torch.

    The modules of LIGHT come first and must not load a heavy library.
    """
    modules = [".".join(p.relative_to(ROOT).with_suffix("").parts) for p in FILES if p.name != "__init__.py"]
    code = (
        "import sys\n"
        "import ross_mcore.flags\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules, 'flags import torch'\n"
        "import importlib, os, torch\n"
        f"for name in {LIGHT!r}: importlib.import_module('ross_mcore.models.' + name)\n"
        "for heavy in ('megatron', 'transformers', 'diffusers', 'torchvision'):\n"
        "    assert heavy not in sys.modules, heavy\n"
        "before = set(os.listdir('.'))\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "assert 'torch._inductor.compile_fx' not in sys.modules, 'mcore is compiled'\n"
        "assert set(os.listdir('.')) == before\n"
        "assert not torch.distributed.is_initialized()\n"
        "for heavy in ('transformers.models.qwen2', 'diffusers.models', 'webdataset'):\n"
        "    assert heavy not in sys.modules, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
