"""Collectives: every rank gets every value, and an action that fails on one rank fails on all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ross_mcore import platform
from ross_mcore.errors import CheckpointError, ConfigError, RankError
from tests.distributed.harness import run_ranks


def values() -> None:
    platform.initialize_process_group(1)
    import torch.distributed as dist

    from ross_mcore.parallel import collectives

    rank, device = dist.get_rank(), platform.device()
    assert collectives.gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    assert collectives.gather_on_first_rank(rank) == ([0, 1] if rank == 0 else [])
    assert collectives.gather_integers([rank, 7], device).equal(torch.tensor([[0, 7], [1, 7]], device=device))
    assert collectives.sum_over_ranks([1.5, rank], device) == [3.0, 1.0]
    for value in (5, -1, 2**63 - 1, -(2**63)):
        assert collectives.agree(value, dist.group.WORLD, device)
    assert not collectives.agree(rank, dist.group.WORLD, device)
    assert collectives.same_on_all_ranks("a") and not collectives.same_on_all_ranks(rank)
    assert collectives.from_first_rank(lambda: f"made by rank {rank}") == "made by rank 0"
    assert collectives.all_or_none(lambda: rank) == rank


def failures() -> None:
    platform.initialize_process_group(1)
    import torch.distributed as dist

    from ross_mcore.parallel.collectives import all_or_none, from_first_rank, is_on_all_ranks

    rank = dist.get_rank()

    def raise_own(*errors: Exception | None) -> None:
        if (error := errors[rank]) is not None:
            raise error

    for error, message in ((ConfigError("--lr is 0"), "--lr is 0"), (KeyError("lr"), "KeyError: 'lr'")):
        with pytest.raises((ConfigError, KeyError, RankError)) as caught:
            all_or_none(lambda error=error: raise_own(None, error))
        assert is_on_all_ranks(caught.value)
        assert caught.value is error if rank == 1 else str(caught.value) == f"{message} (rank 1)"
        with pytest.raises(CheckpointError) as caught:
            all_or_none(lambda error=error: raise_own(ConfigError("disk full"), error), CheckpointError)
        assert str(caught.value) == f"disk full (rank 0); {message} (rank 1)"
        assert is_on_all_ranks(caught.value)
    with pytest.raises(CheckpointError, match=r"^disk full \(rank 0\)$"):  # the same message only once
        all_or_none(lambda: raise_own(*[ConfigError("disk full")] * 2), CheckpointError)
    with pytest.raises(ConfigError if rank == 0 else RankError, match="not here"):
        from_first_rank(lambda: raise_own(ConfigError("not here"), None))
    assert not is_on_all_ranks(ConfigError("alone"))


@pytest.mark.parametrize("function", [values, failures])
def test_collectives(function: Callable[[], None]) -> None:
    run_ranks(function, 2)
