"""Adapts megatron.core to this machine while it is imported, so that callers need no preparation of their own.

`ross_mcore/__init__.py` runs before every module of the package and installs the hook. The hook acts when megatron.core
is imported for the first time, by whatever module. On a CPU it then runs the patches of cpu_megatron.py, each as soon
as the mcore module that it changes is loaded. With a GPU it patches nothing.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

PACKAGE = "megatron.core"


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

    platform.hide_warnings_of_megatron()
    if platform.has_gpu():
        platform.order_kernels()
        return {}
    from ross_mcore import cpu_megatron

    return cpu_megatron.PATCHES


def install() -> None:
    """Installs the hook; modules of megatron.core that are already loaded are patched at once."""
    if any(isinstance(finder, Hook) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, Hook())
    if PACKAGE in sys.modules:
        for name, patches in prepared().items():
            for patch in patches if name in sys.modules else ():
                patch(sys.modules[name])
