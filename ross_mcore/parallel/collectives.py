"""Collectives for small Python values: gather, agree, and run an action that succeeds on all ranks or fails on all.

All ranks (or all ranks of the group) must call each function, in the same order. Collectives for tensors of the model
are in split.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from ross_mcore import platform
from ross_mcore.errors import RankError, UserError

E = TypeVar("E", bound=Exception)
T = TypeVar("T")


def gather(value: T, group: ProcessGroup | None = None) -> list[T]:
    """`value` of every rank, or of every rank of a group, in rank order."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def gather_on_first_rank(value: T) -> list[T]:
    """`value` of every rank in rank order on the first rank; an empty list on the others."""
    values: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(value, values or None, dst=0)
    return values


def gather_integers(values: list[int], device: torch.device) -> Tensor:
    """N integers of every rank -> int64 [ranks, N]. One collective without pickling, fast enough for every step."""
    found = torch.empty(dist.get_world_size(), len(values), dtype=torch.int64, device=device)
    dist.all_gather_into_tensor(found, platform.upload(torch.tensor([values], dtype=torch.int64), device))
    return found


def sum_over_ranks(values: list[float], device: torch.device) -> list[float]:
    """Sum of each value over all ranks, in float64."""
    tensor = platform.upload(torch.tensor(values, dtype=torch.float64), device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def agree(value: int, group: ProcessGroup, device: torch.device) -> bool:
    """Whether all ranks of a group have the same 64-bit integer."""
    extremes = torch.tensor([value, ~value], device=device)
    dist.all_reduce(extremes, dist.ReduceOp.MAX, group=group)
    found: list[int] = extremes.tolist()
    highest, lowest_inverted = found
    return highest == ~lowest_inverted


def any_rank(value: bool, device: torch.device) -> bool:
    """Whether `value` holds on any rank."""
    found = torch.tensor(int(value), device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return bool(found)


def same_on_all_ranks(value: object) -> bool:
    """Whether all ranks have equal values."""
    return all(other == value for other in gather(value))


def all_or_none(action: Callable[[], T], as_error: type[Exception] | None = None) -> T:
    """Runs `action` on every rank; when it fails on any rank, raises on all, after all have finished.

    Without `as_error` a rank that failed raises its own error, and the others RankError with the message of the first
    rank that failed. With it, all ranks raise the same `as_error` with the messages of all ranks that failed. An action
    that communicates may fail only after its last collective.
    """
    problem: Exception | None = None
    try:
        result = action()
    except Exception as error:
        problem = error
    messages = gather(None if problem is None else _message(problem))
    first_rank = {text: rank for rank, text in reversed(list(enumerate(messages))) if text is not None}
    failed = [f"{text} (rank {rank})" for text, rank in sorted(first_rank.items(), key=lambda item: item[1])]
    if failed and as_error is not None:
        raise on_all_ranks(as_error("; ".join(failed)))
    if failed:
        raise on_all_ranks(problem or RankError(failed[0]))
    return result


def _message(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def from_first_rank(action: Callable[[], T]) -> T:
    """Runs `action` on the first rank only, and returns its result on all. Raises as `all_or_none` does."""
    return cast(T, gather(all_or_none(lambda: action() if dist.get_rank() == 0 else None))[0])


def on_all_ranks(error: E) -> E:
    """Marks `error` as raised by all ranks, after which they can still communicate, and returns it."""
    vars(error)["on_all_ranks"] = True
    return error


def is_on_all_ranks(error: Exception) -> bool:
    """Whether ranks can still communicate after an error; when only one rank fails, others wait in a collective."""
    return getattr(error, "on_all_ranks", False) or dist.get_world_size() == 1
