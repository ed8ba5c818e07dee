"""Adapts megatron.core to this machine while it is imported, so that callers need no preparation of their own.

`ross_mcore/__init__.py` runs before every module of the package and installs the hook. The hook acts when megatron.core
is imported for the first time, by whatever module. On a CPU it then runs the patches of cpu_megatron.py, each as soon
as the mcore module that it changes is loaded. With a GPU it patches nothing.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

PACKAGE = "megatron.core"

HIDDEN_WARNINGS = (
    # on import: what is not installed, which engine/precision.py checks where an option needs it
    (UserWarning, r"(Transformer Engine and )?Apex (are|is) not installed\. Falling back to ", ""),
    # from mcore's own default of an option (transformer_config.py)
    (UserWarning, r"full scope is deprecated\. Use empty cuda_graph_scope", ""),
    # without a GPU too (layers.py); with one, see platform.Libraries.ordered_kernels
    (UserWarning, r"When using .* it is recommended to set the environment variable CUDA_DEVICE_MAX_CONNECTIONS", ""),
    # mcore looks for a gradient where its distributed optimizer has none (optimizer.py)
    (
        UserWarning,
        r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed",
        r"megatron\.core\.optimizer",
    ),
    # mcore calls collectives by names that newer torch calls deprecated
    (FutureWarning, r"`torch\.distributed\.\w+` is deprecated\. Please use `torch\.distributed\.", ""),
)
"""Category, text and module of the warnings that mcore 0.16.1 causes in every run and on which nobody can act."""


class Hook:
    """A finder of `sys.meta_path` for the modules of megatron.core."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if name != PACKAGE and not name.startswith(f"{PACKAGE}."):
            return None
        patches = prepared().get(name)
        spec = PathFinder.find_spec(name, path) if patches else None
        if spec is None or spec.loader is None:
            return None
        plain = spec.loader.exec_module

        def execute(module: Any) -> None:
            plain(module)
            for patch in patches or ():
                patch(module)

        spec.loader.exec_module = execute  # type: ignore[method-assign]  # the loader of this module alone
        return spec


@functools.cache
def prepared() -> Mapping[str, Sequence[Callable[[Any], None]]]:
    """Sets what megatron.core reads when it starts; returns the patches that this machine needs, by module."""
    from ross_mcore import platform

    hide_warnings()
    if platform.has_gpu():
        platform.order_kernels()
        return {}
    from ross_mcore import cpu_megatron

    return cpu_megatron.PATCHES


def hide_warnings() -> None:
    for category, message, module in HIDDEN_WARNINGS:
        warnings.filterwarnings("ignore", message, category, module)


def install() -> None:
    """Installs the hook; modules of megatron.core that are already loaded are patched at once."""
    if any(isinstance(finder, Hook) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, Hook())
    if PACKAGE in sys.modules:
        for name, patches in prepared().items():
            for patch in patches if name in sys.modules else ():
                patch(sys.modules[name])
