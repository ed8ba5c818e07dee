"""Imported once by the fork server of tests/te: the stand-in first, then the modules that all ranks need."""

from tests.te import standin

standin.install()

import tests.distributed.preload  # noqa: E402, F401
