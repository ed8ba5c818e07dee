"""The folder of one benchmark: what it was made with, and the predictions, which an interruption does not lose.

```
out/NAME/
  settings.json               benchmark, data, model and options; predictions made with others are refused
  predictions.rank0.jsonl     while the benchmark runs: what each process has answered
  predictions.jsonl           when it is complete: all predictions in order, with what was read and whether it is right
  scores.json
```
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ross_mcore import checked
from ross_mcore.errors import ConfigError
from ross_mcore.evaluation.items import Judged, Prediction
from ross_mcore.logs import append, finite, replace_file

SETTINGS, PREDICTIONS, PARTS = "settings.json", "predictions.jsonl", "predictions.rank*.jsonl"

Settings = dict[str, str]


def open_folder(folder: Path, settings: Settings) -> dict[str, Prediction]:
    """Makes the folder, or checks that it has the same settings; returns the predictions that it has, by id.

    Those of bad pictures and questions are left out, because they are asked again. Predictions of several files, left
    by an interruption, are put into one. Raises ConfigError naming both values, OSError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / SETTINGS
    if file.exists():
        _require_same(file, settings)
    found = read_predictions(folder)
    if not file.exists():
        if found:
            raise ConfigError(f"{folder} has predictions and no {SETTINGS}; give another --out, or remove this folder")
        replace_file(file, (json.dumps(settings, indent=1) + "\n").encode())
    parts = list(folder.glob(PARTS))
    if parts:
        replace_file(folder / PREDICTIONS, _lines(found.values()))
        for part in parts:
            part.unlink()
    return {name: prediction for name, prediction in found.items() if "bad" not in prediction}


def _require_same(file: Path, settings: Settings) -> None:
    try:
        before = checked.mapping(checked.read_json(file, checked.MOST_YAML_BYTES), SETTINGS)
    except ValueError as error:
        raise ConfigError(f"{file} cannot be read: {error}; give another --out, or remove {file.parent}") from None
    for name in {**settings, **before}:
        if before.get(name) != settings.get(name):
            raise ConfigError(
                f"{file.parent} has predictions with {name} {checked.printable(str(before.get(name)))}, and now it is "
                f"{settings.get(name)}; give another --out, or remove this folder to start again"
            )


def read_predictions(folder: Path) -> dict[str, Prediction]:
    """All predictions of a folder by id; lines that a crash cut are skipped. Raises ConfigError, OSError."""
    found: dict[str, Prediction] = {}
    for file in sorted(folder.glob("predictions*.jsonl")):
        try:
            for line in checked.read_lines(file):
                try:
                    prediction = json.loads(line or b"")
                except (ValueError, RecursionError):
                    continue
                if isinstance(prediction, dict) and isinstance(prediction.get("id"), str):
                    found[prediction["id"]] = prediction
        except ValueError as error:
            raise ConfigError(f"{file} cannot be read: {error}; remove it to answer again") from None
    return found


def add_predictions(folder: Path, rank: int, predictions: Iterable[Prediction]) -> None:
    """Appends the predictions of one process: all of them, or none where the disk is full. Raises OSError."""
    append(folder / f"predictions.rank{rank}.jsonl", _lines(predictions))


def write_judged(folder: Path, judged: Sequence[Judged]) -> None:
    """Writes predictions.jsonl for people, in the order of the questions, and removes the files of the processes."""
    replace_file(folder / PREDICTIONS, _lines(map(_line, judged)))
    for part in folder.glob(PARTS):
        part.unlink()


def _line(judged: Judged) -> dict[str, Any]:
    item = judged.item
    about = {"question": item.turns[-1][1], "answers": item.answers} if item.turns else {}
    outcome = {"read": judged.read, "right": judged.is_right} if item.turns else {}
    return {**judged.prediction, **about, **outcome, **({"category": item.category} if item.category else {})}


def _lines(values: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(finite(value), ensure_ascii=False) + "\n" for value in values).encode()
