"""Facts about a start of a run, kept in train_state.json for people: nothing reads them back."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ross_mcore
from ross_mcore.checked import without_secrets
from ross_mcore.config import Config
from ross_mcore.data.sources import MixtureDataset
from ross_mcore.parallel.layout import Layout

PACKAGES = ("torch", "megatron-core", "transformers", "tokenizers", "diffusers", "numpy", "transformer-engine")
SOURCE = Path(ross_mcore.__file__).parents[1]
GIT_SECONDS = 10


def facts(layout: dict[str, Any], dataset: MixtureDataset, held_out: MixtureDataset | None) -> dict[str, Any]:
    """The command, the layout, the data and its fingerprints, the commit of this package, and versions."""
    return {
        "command": [without_secrets(argument) for argument in sys.argv],
        "layout": layout,
        "data": _described(dataset),
        "valid_data": None if held_out is None else _described(held_out),
        "commit": commit(),
        "versions": versions(),
    }


def layout_of(layout: Layout, config: Config) -> dict[str, Any]:
    """The layout stored in a checkpoint, for information: the checkpoint loads at any layout."""
    return {
        "world_size": layout.tensor_parallel * layout.pipeline_parallel * layout.data_parallel,
        "tensor_model_parallel_size": layout.tensor_parallel,
        "pipeline_model_parallel_size": layout.pipeline_parallel,
        "data_parallel_size": layout.data_parallel,
        "layers_per_chunk": list(layout.layers_per_chunk),
        "sequence_parallel": config.parallel.sequence_parallel,
        "use_distributed_optimizer": config.use_distributed_optimizer,
        "transformer_impl": config.execution.transformer_impl,
        "dtype": "bfloat16" if config.execution.bf16 else "float32",
    }


def _described(dataset: MixtureDataset) -> list[dict[str, Any]]:
    sources = zip(dataset.names, dataset.parts, dataset.sizes, strict=True)
    return [
        {
            "name": name,
            "path": without_secrets(str(part.reader.folder)),
            "samples": size,
            "fingerprint": part.reader.fingerprint,
        }
        for name, part, size in sources
    ]


def commit() -> str | None:
    """The commit of a git checkout that this package runs from, with `-dirty` after changes; else None."""
    if not (SOURCE / ".git").exists():
        return None
    command = ["git", "-C", str(SOURCE), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def versions() -> dict[str, str]:
    """Versions of Python, this package, and the packages that a run depends on, where they are installed."""
    found = {"python": sys.version.split()[0], "ross_mcore": ross_mcore.__version__}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
