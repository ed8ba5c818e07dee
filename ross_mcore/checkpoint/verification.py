"""Finds the newest intact checkpoint of a run, agreed on by all ranks."""

from __future__ import annotations

import logging
from pathlib import Path

import torch.distributed as dist

from ross_mcore.checkpoint.folder import REMEDY, Checkpoint, is_iteration, nothing_at, scan
from ross_mcore.checkpoint.manifest import Manifest, damages
from ross_mcore.errors import CheckpointError
from ross_mcore.parallel.collectives import all_or_none, gather, same_on_all_ranks

_logger = logging.getLogger(__name__)


def find_intact(path: Path, verify: bool = True) -> Checkpoint | None:
    """The newest intact checkpoint of a run's root, or the one in an iteration's folder; None where there is none.

    Collective: every rank reads its share of the files. Damaged checkpoints are logged and skipped. verify: False
    compares only sizes.
    Raises CheckpointError on every rank when there are checkpoints but none is intact (a new run would overwrite
    them), when `path` is a damaged one, or when ranks see different files.
    """
    path = Path(path)
    found, problems = all_or_none(lambda: scan(path), CheckpointError)
    if not same_on_all_ranks([str(checkpoint.path) for checkpoint in found]):
        raise CheckpointError(f"ranks see different checkpoints in {path}: it must be on a file system that all share")
    first = dist.get_rank() == 0
    for checkpoint in found:
        damaged = shared_damage(checkpoint) if verify else []
        if not damaged:
            for problem in problems if first else ():
                _logger.warning("not used: %s. Going back to %s", problem, checkpoint.path)
            return checkpoint
        problems.append("; ".join(damaged))
    if is_iteration(path) and problems:
        raise CheckpointError(f"{problems[0]}; {REMEDY}")
    if problems:
        raise nothing_at(path, problems)
    return None


def shared_damage(checkpoint: Checkpoint) -> list[str]:
    """One message for each damaged file of a checkpoint, the same on every rank. Collective: each reads its share."""
    rank, size = dist.get_rank(), dist.get_world_size()
    try:
        manifest = checkpoint.manifest()
        own = damages(checkpoint.path, manifest, share_of_files(manifest, rank, size))
        if not manifest.has_checksums and rank == 0:
            _logger.warning("%s has no checksums: only the sizes of its files were compared", checkpoint.path)
    except CheckpointError as error:  # the marker was removed since it was listed
        own = [str(error)]
    return [problem for problems in gather(own) for problem in problems]


def share_of_files(manifest: Manifest, rank: int, size: int) -> list[str]:
    """The files that one of `size` ranks reads: the largest first, each to the rank with the fewest bytes so far."""
    shares: list[list[str]] = [[] for _ in range(size)]
    loads = [0] * size
    for name, record in sorted(manifest.files.items(), key=lambda item: (-item[1].bytes, item[0])):
        least = loads.index(min(loads))
        shares[least].append(name)
        loads[least] += record.bytes
    return shares[rank]
