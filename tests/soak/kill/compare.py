"""Compares the files of a killed and resumed run with those of an uninterrupted one."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ross_mcore.checkpoint.folder import require_checkpoint
from ross_mcore.checkpoint.safe_load import read_common, read_metadata, read_tensor, tensor_shapes

CLOCKS = ("step_seconds", "data_seconds", "seconds", "peak_memory_bytes", "mfu")
"""Values of the clock, which always differ."""
LOGS = ("metrics.jsonl", "validation.jsonl", "quarantine.jsonl", "incidents.jsonl")
LEFT_OVER = ("*.partial", ".*.partial", "*.deleting", ".*.deleting", "*.replaced", "*.new")


@dataclass
class Difference:
    """The largest absolute difference of weights and moments, and all other differences as `problems`."""

    weights: float = 0.0
    problems: list[str] = field(default_factory=list)


def compare(run: Path, expected: Path) -> Difference:
    """Final weights, moments, counters and logs of two finished runs, bit by bit."""
    found = Difference()
    ours, theirs = require_checkpoint(run), require_checkpoint(expected)
    if ours.iteration != theirs.iteration:
        found.problems.append(f"ended at iteration {ours.iteration}, expected {theirs.iteration}")
        return found
    _compare_tensors(ours.path, theirs.path, found)
    if not same(read_common(ours.path), read_common(theirs.path)):
        found.problems.append("the optimizer's own state differs (common.pt)")
    mine, other = ({**checkpoint.train_state(), "facts": None} for checkpoint in (ours, theirs))
    if mine != other:
        found.problems.append(f"train_state.json: {mine}, expected {other}")
    for name in LOGS:
        found.problems += _compare_logs(run / name, expected / name)
    found.problems += _compare_boards(run / "tensorboard", expected / "tensorboard")
    found.problems += [f"left behind: {path.name}" for pattern in LEFT_OVER for path in run.glob(pattern)]
    return found


def _compare_tensors(ours: Path, theirs: Path, found: Difference) -> None:
    mine, other = read_metadata(ours), read_metadata(theirs)
    shapes, expected = tensor_shapes(mine), tensor_shapes(other)
    if shapes != expected:
        found.problems.append(f"other tensors are in the checkpoint: {sorted(shapes.items() ^ expected.items())[:3]}")
    different = []
    for name in (name for name in expected if shapes.get(name) == expected[name]):
        a, b = read_tensor(ours, mine, name), read_tensor(theirs, other, name)
        if not torch.equal(a, b):
            different.append(name)
            found.weights = max(found.weights, float((a.double() - b.double()).abs().max()))
    if different:
        found.problems.append(f"{len(different)} tensors differ by up to {found.weights:.1e}, first {different[0]}")


def same(a: Any, b: Any) -> bool:
    """Whether two nests of dicts, lists, tensors and plain values are equal."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)


def _compare_logs(ours: Path, theirs: Path) -> list[str]:
    if not theirs.exists():
        return [f"{ours.name} is there, which the other run has not"] if ours.exists() else []
    if not ours.exists():
        return [f"{ours.name} is missing"]
    mine, other = (path.read_text().splitlines() for path in (ours, theirs))
    try:
        lines = [_without_clocks(line) for line in mine]
    except ValueError as error:
        return [f"{ours.name} has a line that is not JSON: {error}"]
    expected = [_without_clocks(line) for line in other]
    if lines == expected:
        return []
    iterations = [line.get("iteration") for line in lines]
    return [
        f"{ours.name} differs: {len(lines)} lines of iterations {iterations}, expected {len(expected)}; first "
        f"{next((pair for pair in zip(lines, expected) if pair[0] != pair[1]), 'at its end')}"
    ]


def _without_clocks(line: str) -> dict[str, Any]:
    return {key: value for key, value in json.loads(line).items() if key not in CLOCKS}


def _compare_boards(ours: Path, theirs: Path) -> list[str]:
    """Each iteration once on every curve, as TensorBoard itself reads the folder.

    A validation may be there twice: it is done again when a rank was killed before its line in validation.jsonl.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # it logs every purge, which a resumed run causes
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    mine, other = (EventAccumulator(str(folder)).Reload() for folder in (ours, theirs))
    problems = []
    for tag in sorted({*mine.Tags()["scalars"], *other.Tags()["scalars"]}):
        steps, expected = (
            Counter(event.step for event in board.Scalars(tag)) if tag in board.Tags()["scalars"] else Counter()
            for board in (mine, other)
        )
        if (set(steps) != set(expected)) if tag.startswith("validation/") else (steps != expected):
            problems.append(f"TensorBoard's {tag} has iterations {sorted(steps.elements())}")
    return problems[:1]
