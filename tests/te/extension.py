"""The module `transformer_engine_torch` that Transformer Engine imports: its names, and a count of calls for each
function.

Every name can be imported, used as a type and read as an enumeration; a name without a stand-in raises when called.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import types
from collections import Counter
from collections.abc import Callable, Iterable

import torch

CALLS: Counter = Counter()
"""Calls of each function; for attention also calls for each layout of its tensors (BSHD_BSHD_BSHD, ...)."""

around: Callable[[str], contextlib.AbstractContextManager] = contextlib.nullcontext
"""Entered during every call, with the function's name."""


def _enumeration(name, **members):
    return enum.IntEnum(name, members, module="transformer_engine_torch")


DType = _enumeration(
    "DType",
    kByte=0,
    kInt16=1,
    kInt32=2,
    kInt64=3,
    kFloat32=4,
    kFloat16=5,
    kBFloat16=6,
    kFloat8E4M3=7,
    kFloat8E5M2=8,
    kFloat8E8M0=9,
    kFloat4E2M1=10,
)
FP8FwdTensors = _enumeration(
    "FP8FwdTensors",
    **{f"GEMM{i}_{n}": 3 * (i - 1) + j for i in (1, 2, 3) for j, n in enumerate(("INPUT", "WEIGHT", "OUTPUT"))},
)
FP8BwdTensors = _enumeration(
    "FP8BwdTensors", **{f"GRAD_{n}{i}": 2 * (i - 1) + j for i in (1, 2, 3) for j, n in enumerate(("OUTPUT", "INPUT"))}
)
NVTE_Fused_Attn_Backend = _enumeration(
    "NVTE_Fused_Attn_Backend", NVTE_No_Backend=-1, NVTE_F16_max512_seqlen=0, NVTE_F16_arbitrary_seqlen=1, NVTE_FP8=2
)
ENUMS = (DType, FP8FwdTensors, FP8BwdTensors, NVTE_Fused_Attn_Backend)


class _Missing(type):
    """A name of the extension without a stand-in: can be imported, is a type and an enumeration, cannot be called."""

    def __getattr__(cls, name):
        if name.startswith("_"):
            raise AttributeError(name)
        member = object.__new__(cls)
        member.name = name
        setattr(cls, name, member)
        return member

    def __call__(cls, *args, **kwargs):
        raise NotImplementedError(f"tests/te has no stand-in for transformer_engine_torch.{cls.__name__}")


class Extension(types.ModuleType):
    """A module in which every name exists, see `_Missing`."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        missing = _Missing(name, (), {"__module__": "transformer_engine_torch", "__repr__": lambda self: self.name})
        setattr(self, name, missing)
        return missing


def extension(functions: Iterable[Callable]) -> Extension:
    """The module `transformer_engine_torch` with these stand-ins, whose calls are counted."""
    module = Extension("transformer_engine_torch")
    for function in functions:
        setattr(module, function.__name__, _counted(function))
    for enumeration in ENUMS:
        setattr(module, enumeration.__name__, enumeration)
    return module


def _counted(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        CALLS[function.__name__] += 1
        with torch.no_grad(), around(function.__name__):
            return function(*args, **kwargs)

    return call
