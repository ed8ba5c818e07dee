"""A save copies each byte once, from the rank that has it to the memory of the rank that writes it."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from counting.saves import Counts

from tests.distributed.cases import Case, layout
from tests.distributed.conftest import run_options
from tests.distributed.harness import run_ranks

BF16 = (("bf16", True),)  # with the distributed optimizer
CASES = [
    Case("dp4", 4, layout(micro_batch_size=1), common=BF16),
    pytest.param(Case("tp2xpp2xdp2", 8, layout(2, 2), common=BF16), marks=pytest.mark.slow),
]


def count_on_one_rank(flags: dict[str, Any], root: str) -> None:
    from counting.saves import counted

    from ross_mcore.config import Config
    from ross_mcore.training.opening import open_run

    with ExitStack() as closing:
        counts = counted(open_run(Config.from_flat(**flags), closing)[0], Path(root))
    (Path(root) / f"{os.environ['RANK']}.counts").write_bytes(pickle.dumps(counts))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_save_copies_each_byte_once(
    case: Case, base: Callable[[str], Path], shards: Callable[[str], Path], tmp_path: Path
) -> None:
    run_ranks(count_on_one_rank, case.world, run_options(case, tmp_path / "run", base, shards), str(tmp_path))
    for rank in range(case.world):
        counts: Counts = pickle.loads((tmp_path / f"{rank}.counts").read_bytes())
        assert counts.copied == counts.written and counts.gathered == 0
        assert counts.written <= counts.held <= 1.01 * counts.written
        assert counts.peak <= counts.held + 2**14  # no other memory
        assert counts.read <= 1.1 * counts.needed  # rows are read whole
