"""Counts the operations of torch that start a kernel. It imports no model."""

from __future__ import annotations

import contextlib
import importlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NOT_KERNELS = (
    "empty",
    "new_empty",
    "_unsafe_view",
    "detach",
    "lift_fresh",
    "alias",
    "_local_scalar_dense",
    "_record_function",
)
"""Beginnings of the names of operations that allocate, or look at a tensor differently, beside views."""
COMPILED = (
    ("megatron.core.fusions.fused_bias_swiglu", "swiglu"),
    ("megatron.core.fusions.fused_bias_swiglu", "swiglu_back"),
    ("megatron.core.fusions.fused_bias_dropout", "bias_dropout_add_fused_train"),
)
"""Functions of mcore that its fuser, torch.compile, turns into one kernel each on a GPU."""


class Operations(TorchDispatchMode):
    """Counts kernels by name, and values that the host reads, while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.reads = 0
        self.inside = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.reads += function.overloadpacket.__name__ == "_local_scalar_dense"
        if not self.inside and _is_kernel(function):
            self.found[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def with_lists(self) -> Iterator[None]:
        """Counts each call of `Tensor.tolist`, too, which is no operation on a CPU."""
        plain = Tensor.tolist

        def tolist(tensor: Tensor) -> Any:
            self.reads += 1
            return plain(tensor)

        with mock.patch.object(Tensor, "tolist", tolist):
            yield

    @contextlib.contextmanager
    def one(self, name: str) -> Iterator[None]:
        """Counts what runs inside as one kernel."""
        if self.inside:
            yield
            return
        self.found[name] += 1
        self.inside = True
        try:
            yield
        finally:
            self.inside = False

    @contextlib.contextmanager
    def compiled(self) -> Iterator[None]:
        """Counts each call of the COMPILED functions as one kernel."""

        def whole(function: Callable[..., Any], name: str) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                with self.one(name):
                    return function(*args)

            return call

        with contextlib.ExitStack() as stack:
            for module_name, name in COMPILED:
                module = importlib.import_module(module_name)
                stack.enter_context(mock.patch.object(module, name, whole(getattr(module, name), name)))
            yield


def _is_kernel(function: Any) -> bool:
    name = function.overloadpacket.__name__
    aliases = [value.alias_info for value in function._schema.returns]
    is_view = any(alias is not None and not alias.is_write for alias in aliases)
    return not is_view and not name.startswith(NOT_KERNELS)
