"""The trainer on stand-ins for Transformer Engine's kernels: `python -m tests.te.pretrain_ross`, with the same
flags."""

from __future__ import annotations

from pretrain_ross import main
from tests.te import standin

if __name__ == "__main__":
    standin.install()
    raise SystemExit(main())
