"""Runs on Transformer Engine's Python layer with stand-in kernels (standin.py).

Only where its wheel is installed, in a separate environment: `make test-te`.
"""

from __future__ import annotations

import importlib.util
import multiprocessing

if importlib.util.find_spec("transformer_engine") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    from tests.te import standin

    standin.install()

    import tests.distributed.harness  # noqa: F401
    from tests.distributed.conftest import base, reference, shards, start, workplace  # noqa: F401

    multiprocessing.set_forkserver_preload(["tests.te.preload"])
