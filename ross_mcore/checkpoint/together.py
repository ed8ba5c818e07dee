"""Doing something to a checkpoint on all ranks, so that it fails on all of them or on none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed import ProcessGroup

from ross_mcore.errors import CheckpointError

T = TypeVar("T")


def exchange(value: T, group: ProcessGroup | None = None) -> list[T]:
    """`value` of every rank, or of every rank of a group, in rank order. Collective."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def to_first_rank(value: T) -> list[T]:
    """`value` of every rank on the first one, nothing on the others. Collective."""
    values: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(value, values or None, dst=0)
    return values


def together(action: Callable[[], T]) -> T:
    """Runs `action` on every rank; when it fails on any, raises CheckpointError on all, after all have tried.

    An action that communicates must fail only after its last collective call.
    """
    result: Any = None
    problem: str | None = None
    try:
        result = action()
    except CheckpointError as error:
        problem = str(error)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    problems = {text: rank for rank, text in reversed(list(enumerate(exchange(problem)))) if text is not None}
    if problems:
        raise CheckpointError("; ".join(f"{text} (rank {rank})" for text, rank in sorted(problems.items())))
    return result
