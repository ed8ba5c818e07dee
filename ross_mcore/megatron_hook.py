"""An import hook that adapts megatron.core to this machine when it is first imported.

`ross_mcore/__init__.py`, which runs before every module of the package, installs the hook. On a CPU the hook applies
the patches of cpu_megatron.py, each right after the mcore module that it changes is loaded. With a GPU it patches
nothing.
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
    # on import, about optional libraries; engine/precision.py checks them when an option needs them
    (UserWarning, r"(Transformer Engine and )?Apex (are|is) not installed\. Falling back to ", ""),
    # from mcore's own default of an option (transformer_config.py)
    (UserWarning, r"full scope is deprecated\. Use empty cuda_graph_scope", ""),
    # layers.py, even without a GPU; with one see platform.Libraries.ordered_kernels
    (UserWarning, r"When using .* it is recommended to set the environment variable CUDA_DEVICE_MAX_CONNECTIONS", ""),
    # optimizer.py reads gradients that its distributed optimizer does not have
    (
        UserWarning,
        r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed",
        r"megatron\.core\.optimizer",
    ),
    # mcore uses names of collectives that are deprecated in newer torch
    (FutureWarning, r"`torch\.distributed\.\w+` is deprecated\. Please use `torch\.distributed\.", ""),
)
"""Category, text and module of warnings that mcore 0.16.1 causes in every run and that users cannot fix."""


class Hook:
    """A finder for `sys.meta_path` that patches modules of megatron.core."""

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

        spec.loader.exec_module = execute  # type: ignore[method-assign]  # this loader loads one module
        return spec


@functools.cache
def prepared() -> Mapping[str, Sequence[Callable[[Any], None]]]:
    """Prepares the process for the import of megatron.core; returns the patches for this machine, by module."""
    from ross_mcore import platform

    hide_warnings()
    if platform.has_gpu():
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
