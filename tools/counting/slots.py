"""Fill of a step: the share of its slots that are real tokens, on realistic lengths of samples.

The lengths are those of benchmarks/packing.py. Legend: S steps, N samples of a step.
"""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from counting import Row
from ross_mcore.data.packing import pack
from ross_mcore.data.rows import PlannedRow, by_length, micro_batches
from ross_mcore.flags import parse, recipes

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "packing.py"
MIXES = {"pretrain": "captions", "finetune": "instructions"}
STEP, ROW_MULTIPLE = 128, 16
NOTHING = np.empty(0, np.int64)


def realistic(stage: str, image_tokens: int, count: int = 16384) -> NDArray[np.int64]:
    """Tokens [count] of samples as a stage trains on."""
    lengths: NDArray[np.int64] = runpy.run_path(str(BENCHMARK))["MIXES"][MIXES[stage]](
        np.random.default_rng(7), count, image_tokens
    )
    return lengths


def packed(lengths: NDArray[np.int64], row_tokens: int) -> float:
    """Fill of packed rows."""
    cut = np.minimum(lengths, row_tokens)
    return float(cut.sum() / (len(pack(cut, row_tokens, 0)) * row_tokens))


def padded_to_step(steps: NDArray[np.int64]) -> float:
    """Fill of rows [S, N] of one sample, each padded to the longest of its step."""
    return float(steps.sum() / sum(steps.shape[1] * _rounded(step.max()) for step in steps))


def padded_to_micro_batch(steps: NDArray[np.int64], rows: int, ranks: int) -> float:
    """Fill of rows [S, N] of one sample, dealt by length to micro-batches of `rows` rows on `ranks` ranks."""
    slots = 0
    for step in steps:
        order = by_length([PlannedRow(NOTHING, NOTHING, tokens) for tokens in step.tolist()])
        shares = [micro_batches(step[order].tolist(), rows, rank, ranks) for rank in range(ranks)]
        slots += sum(rows * ranks * _rounded(max(map(max, same))) for same in zip(*shares))
    return float(steps.sum() / slots)


def of_recipes() -> Iterator[tuple[str, int, int, float]]:
    """(stage, tokens of an image, of a row, fill) of every kind of recipe."""
    found = {}
    for name in set(recipes()) - {"reference_mode"}:
        config = parse(["--config", name], complete=False)
        found[config.training.training_stage, 576 if "clip" in name else 729, config.data.seq_length] = config.data.pack
    for stage, image_tokens, row_tokens in sorted(found):
        is_packed = found[stage, image_tokens, row_tokens]
        lengths = realistic(stage, image_tokens)
        fill = packed(lengths, row_tokens) if is_packed else padded_to_micro_batch(lengths.reshape(-1, STEP), 2, 2)
        yield stage, image_tokens, row_tokens, fill


def _rounded(tokens: int) -> int:
    return -(-tokens // ROW_MULTIPLE) * ROW_MULTIPLE


def rows() -> list[Row]:
    """The recipes' rows, and one sample a row."""
    found = [
        Row(f"recipes, {stage}, {image} tokens a picture, rows of {row:,}", f"{fill:.1%}", "95%", "packed")
        for stage, image, row, fill in of_recipes()
    ]
    steps = realistic("finetune", 729).reshape(-1, STEP)
    one = "one sample a row, 729 tokens a picture, steps of 128"
    found.append(Row(f"{one}, padded to the step's longest", f"{padded_to_step(steps):.1%}", "", "as it was"))
    for mine, ranks in ((1, 2), (2, 2), (2, 4)):
        fill = padded_to_micro_batch(steps, mine, ranks)
        found.append(Row(f"{one}, {mine} x {ranks} ranks, dealt by length", f"{fill:.1%}", "", "--no-pack"))
    return found
