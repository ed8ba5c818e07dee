"""Damages a file: mostly its content, by its format, sometimes by replacing it with something else."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.soak.fuzz import mutate, stand_ins, tensors
from tests.soak.fuzz.archives import mutate_tar
from tests.soak.fuzz.images import mutate_image
from tests.soak.fuzz.stand_ins import Damage
from tests.soak.fuzz.tables import mutate_npy

Mutator = Callable[[bytes, random.Random], tuple[bytes, str]]

SUFFIXES: dict[str, Mutator] = {
    ".json": mutate.mutate_json,
    ".jsonl": mutate.mutate_lines,
    ".yaml": mutate.mutate_yaml,
    ".safetensors": tensors.mutate_safetensors,
    ".png": mutate_image,
    ".tar": lambda data, rng: mutate_tar(data, rng, by_suffix),
    ".npy": mutate_npy,
    ".npz": tensors.mutate_zip,
    ".pt": tensors.mutate_zip,
    ".bin": tensors.mutate_zip,
    ".metadata": tensors.mutate_metadata,
}


def by_suffix(name: str) -> Mutator:
    """The mutation for a file's format; in a fifth of the cases, one that ignores the format."""
    path = Path(name)
    known = SUFFIXES.get(path.suffix or path.name, mutate.mutate_bytes)

    def mutator(data: bytes, rng: random.Random) -> tuple[bytes, str]:
        try:
            return (mutate.mutate_bytes if rng.random() < 0.15 else known)(data, rng)
        except Exception:  # the first damage left it unreadable, or the format cannot hold the change
            return mutate.mutate_bytes(data, rng)

    return mutator


def damage(path: Path, folder: Path, rng: random.Random) -> Damage:
    """Damages one file of `folder`, a case's own."""
    if rng.random() < 0.2:
        return stand_ins.replace(path, folder, rng)
    name = path.relative_to(folder).as_posix()
    if path.suffix == ".distcp" and rng.random() < 0.7:
        with suppress(Exception):  # as above
            return Damage(name, tensors.mutate_piece(path, rng), (name.rpartition("/")[0] + "/.metadata",))
    changed, what = by_suffix(path.name)(path.read_bytes(), rng)
    path.unlink()
    path.write_bytes(changed)
    return Damage(name, what)
