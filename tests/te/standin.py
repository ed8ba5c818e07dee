"""Transformer Engine's own Python layer on a machine without a GPU.

Call `install()` before transformer_engine or megatron.core is imported. It does two things, both visible only inside
`transformer_engine.*`:

1. `transformer_engine_torch`, the compiled extension, becomes a module (extension.py) of plain torch functions
   (kernels.py, attention.py).
2. An import hook replaces the device in Transformer Engine's sources while they load (RULES, seven patterns of one
line), because they name "cuda", assert `.is_cuda` and query torch.cuda for the architecture.

So classes, parameter names, recipes, autocast, caches and extra state are Transformer Engine's; numbers, speed, memory
and the shapes that a kernel refuses are not. It needs the pure Python wheel (`pip install --no-deps
transformer-engine`) with einops and pydantic. With that wheel installed, importing megatron.core fails unless
`install()` was called; so it has a separate environment (`make test-te`).
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import os
import re
import sys
import types
from collections import defaultdict
from typing import Any

import torch

from tests.te.extension import Extension, extension
from tests.te.kernels import FUNCTIONS

ARCHITECTURE = (9, 0)
"""The GPU reported to Transformer Engine: Hopper, whose FP8 matrix products take only row-major copies."""

RULES = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r'torch\.device\("cuda", torch\.cuda\.current_device\(\)\)', 'torch.device("cpu")'),
        (r"\btorch\.cuda\.(?=\w)", "_cuda."),
        (r'"cuda"', '"cpu"'),
        (r"\.is_cuda\b", ".is_cpu"),
        (r"\.cuda\(\)", ".cpu()"),
        (r"^from torch\.cuda import _lazy_call, _lazy_init", "from tests.te.standin import _lazy_call, _lazy_init"),
        (r'^load_framework_extension\("torch"\)', "pass"),
    )
]


def _lazy_init() -> None:
    pass


def _lazy_call(function: Any, **_: Any) -> None:
    function()


def _nothing(*_: Any) -> None:
    pass


def _no_context(*_: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


class _Cuda:
    """Replaces `torch.cuda` inside Transformer Engine. Other names come from the real torch.cuda."""

    _properties = types.SimpleNamespace(
        major=ARCHITECTURE[0], minor=ARCHITECTURE[1], multi_processor_count=132, name="CPU stand-in"
    )
    nvtx = types.SimpleNamespace(range=_no_context, range_push=_nothing, range_pop=_nothing)
    default_generators: defaultdict = defaultdict(lambda: torch.default_generator)
    CUDAGraph = object
    Stream = type("Stream", (), {"wait_stream": _nothing, "synchronize": _nothing})
    current_stream = staticmethod(lambda device=None: _Cuda.Stream())
    is_available = staticmethod(lambda: True)
    current_device = staticmethod(lambda: torch.device("cpu"))
    get_device_properties = staticmethod(lambda device=None: _Cuda._properties)
    get_device_capability = staticmethod(lambda device=None: ARCHITECTURE)
    device = stream = staticmethod(_no_context)
    synchronize = empty_cache = staticmethod(_nothing)
    is_current_stream_capturing = staticmethod(lambda: False)
    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: torch.set_rng_state(state))
    manual_seed = staticmethod(lambda seed: torch.manual_seed(seed))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a module of Transformer Engine from its source with the RULES applied; never from a .pyc."""

    def get_code(self, fullname: str) -> types.CodeType:
        text = self.get_source(fullname) or ""
        lines = text.split("\n")
        for pattern, replacement in RULES:
            lines = [pattern.sub(replacement, line) for line in lines]
        return compile("\n".join(lines), self.path, "exec", dont_inherit=True)

    def exec_module(self, module: types.ModuleType) -> None:
        module._cuda = _Cuda()  # type: ignore[attr-defined]
        super().exec_module(module)


class _StubLoader(importlib.abc.Loader):
    """Submodules replaced entirely: Triton kernels and the ONNX export table, whose libraries are not needed here."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return Extension(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.startswith(("transformer_engine.pytorch.triton", "transformer_engine.pytorch.onnx_extensions")):
            return importlib.machinery.ModuleSpec(name, _StubLoader(), is_package=True)
        if not name.startswith("transformer_engine.pytorch"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(name, spec.loader.path)
        return spec


def install() -> None:
    """Makes Transformer Engine importable here. Does nothing on a machine with a GPU, or when called again."""
    if torch.cuda.is_available() or "transformer_engine_torch" in sys.modules:
        return
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # transformer_engine/common: do not load CUDA libraries
    os.environ["NVTE_UNFUSED_FP8_UPDATE"] = "1"  # delayed scaling: the Python update of the amax histories
    os.environ["NVTE_TORCH_COMPILE"] = "0"  # transformer_engine/pytorch/jit.py: no torch.compile of small functions
    os.environ["NVTE_MASKED_SOFTMAX_FUSION"] = "0"  # UnfusedDotProductAttention: torch's softmax
    sys.modules["transformer_engine_torch"] = extension(FUNCTIONS)
    sys.meta_path.insert(0, _Finder())
    # here, because transformer_engine/__init__.py hides an ImportError of it
    import transformer_engine.pytorch  # noqa: F401
