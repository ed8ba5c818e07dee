"""Reads the folder of a run: its log files line by line, its TensorBoard files, the state of its newest checkpoint."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ross_mcore import checked
from ross_mcore.checkpoint.folder import find_checkpoint, is_iteration
from ross_mcore.errors import CheckpointError, LogError
from ross_mcore.logs import ANSWERS_FILE, INCIDENTS_FILE, METRICS_FILE, QUARANTINE_FILE, VALIDATION_FILE
from ross_mcore.run_report.events import Events, read_events
from ross_mcore.run_report.series import LARGEST, Series
from ross_mcore.run_report.settings import settings_of

LOG_FILES = (METRICS_FILE, VALIDATION_FILE, INCIDENTS_FILE, QUARANTINE_FILE, ANSWERS_FILE)
TENSORBOARD = "tensorboard"

MOST_SERIES = 120
MOST_ITERATION = 2**53
MOST_DEPTH = 3
MOST_EXAMPLES = 3
MOST_KINDS = 100
MOST_INCIDENTS = 100
MOST_ANSWERS = 200
FROM_TENSORBOARD = {
    "tokens_per_second": ("tokens_per_second", 1.0),
    "mfu": ("mfu", 1.0),
    "mfu_percent": ("mfu", 0.01),
    "hardware_mfu": ("hardware_mfu", 1.0),
    "hardware_mfu_percent": ("hardware_mfu", 0.01),
}
"""Figures that are not in metrics.jsonl, or not in all versions: last part of their tag -> name, factor."""

NOT_FIGURES = ("iteration", "consumed_samples", "peak_memory_bytes", "data_seconds")
"""Keys of metrics.jsonl that are drawn as another figure, or are none."""


@dataclass
class RunRecord:
    """What a run left in its folder.

    series: figures of metrics.jsonl, by name, those in objects as `object/name`; validation: `data set/lm_loss` and
    such; left_out: figures more than MOST_SERIES; seconds: of all steps together; incidents: the last ones, of
    `incident_kinds` all; quarantine: replaced samples by the kind of their reason, with examples; answers: the last
    ones; settings: option -> value; state: train_state.json; damaged: file -> lines that could not be read.
    """

    name: str
    path: Path
    series: dict[str, Series] = field(default_factory=dict)
    validation: dict[str, Series] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)
    last: dict[str, Any] = field(default_factory=dict)
    last_validation: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    timed_samples: int = 0
    incidents: list[dict[str, Any]] = field(default_factory=list)
    incident_kinds: Counter[str] = field(default_factory=Counter)
    quarantine: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    answer_count: int = 0
    events: Events = field(default_factory=Events)
    state: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    damaged: Counter[str] = field(default_factory=Counter)

    @property
    def iteration(self) -> int:
        return int(self.last.get("iteration", 0))

    def add(self, group: dict[str, Series], name: str, iteration: int, value: float) -> None:
        if name not in group:
            if len(group) >= MOST_SERIES:
                if len(self.left_out) < MOST_SERIES:
                    self.left_out.add(name)
                return
            group[name] = Series()
        group[name].add(iteration, value)


def run_bytes(path: Path) -> int:
    """Size of what `read_run` reads, for a progress bar. Raises LogError for a path that is not the folder of a run."""
    metrics = path / METRICS_FILE
    if not path.is_dir():
        problem = "it is a file" if path.exists() else "there is no such folder"
        raise LogError(f"{path} is not a run: {problem}; give the folder of --save")
    if not metrics.is_file():
        where = f"give {path.parent}" if is_iteration(path) else "give the folder of --save of a training"
        raise LogError(f"{path} is not the folder of a run: it has no {METRICS_FILE}; {where}")
    files = [path / name for name in LOG_FILES] + list((path / TENSORBOARD).glob("events.out.tfevents.*"))
    return sum(file.stat().st_size for file in files if file.is_file())


def read_run(path: Path, name: str, advance: Callable[[int], None] = lambda size: None) -> RunRecord:
    """Reads a run, also one that is being trained. advance: called with the number of bytes read.

    Raises LogError for a run that logged nothing, or files that cannot be read.
    """
    run_bytes(path)
    run = RunRecord(name, path)
    try:
        for file, take in _TAKERS.items():
            for entry in _entries(run, file, advance):
                take(run, entry)
        if not run.last:
            raise LogError(f"{path / METRICS_FILE} has no iteration yet, nothing to draw; wait for the first")
        run.events = read_events(path / TENSORBOARD, lambda tag: _tail(tag) in FROM_TENSORBOARD, advance)
    except (OSError, ValueError) as error:
        if isinstance(error, LogError):
            raise
        raise LogError(f"{path} cannot be read: {checked.reason(error)}; give a copy of the run") from None
    for tag, values in run.events.scalars.items():
        figure, factor = FROM_TENSORBOARD[_tail(tag)]
        if figure not in run.series:
            for iteration, value in sorted(values.items()):
                run.add(run.series, figure, iteration, value * factor)
    if not any(series.count for series in run.series.values()):
        raise LogError(f"{path / METRICS_FILE} has no number that can be drawn; leave this run out, or wait for one")
    _read_checkpoint(run)
    run.settings = settings_of(run.state, run.events.options, run.model)
    return run


def _tail(tag: str) -> str:
    return tag.rpartition("/")[2]


def _entries(run: RunRecord, file: str, advance: Callable[[int], None]) -> Iterator[dict[str, Any]]:
    """The objects of a file that have an iteration; other lines are counted, but not a last one that is cut off."""
    path = run.path / file
    if not path.exists():
        return
    for line in checked.read_lines(path):
        advance(len(line or b""))
        try:
            entry = json.loads(line or b"")
        except (ValueError, RecursionError):
            run.damaged[file] += line is None or line.endswith(b"\n")
            continue
        iteration = entry.get("iteration") if isinstance(entry, dict) else None
        if type(iteration) is int and 0 <= iteration <= MOST_ITERATION:
            yield entry
        else:
            run.damaged[file] += 1


def _numbers(entry: dict[str, Any], prefix: str = "", depth: int = 1) -> Iterator[tuple[str, float]]:
    """The numbers of an object and of the objects in it, those as `outer/inner`, up to LARGEST."""
    for key, value in entry.items():
        if type(value) in (int, float) and -LARGEST <= value <= LARGEST:  # also false for NaN
            yield prefix + key, value
        elif isinstance(value, dict) and depth < MOST_DEPTH:
            yield from _numbers(value, f"{prefix}{key}/", depth + 1)


def _take_metrics(run: RunRecord, entry: dict[str, Any]) -> None:
    iteration, numbers = entry["iteration"], dict(_numbers(entry))
    before, samples = run.last.get("consumed_samples", 0), numbers.get("consumed_samples")
    is_next = iteration == run.iteration + 1
    if (seconds := numbers.get("step_seconds", 0.0)) > 0:
        run.seconds += seconds
        if is_next and samples is not None:
            run.timed_samples += int(samples) - before
            numbers["samples_per_second"] = (samples - before) / seconds
        if "data_seconds" in numbers:
            numbers["data_share"] = numbers["data_seconds"] / seconds
    if "peak_memory_bytes" in numbers:
        numbers["peak_gib"] = numbers["peak_memory_bytes"] / 2**30
    for name, value in numbers.items():
        if name not in NOT_FIGURES:
            run.add(run.series, name, iteration, value)
    run.last = {"iteration": iteration, "consumed_samples": int(samples or before)}


def _take_validation(run: RunRecord, entry: dict[str, Any]) -> None:
    datasets = entry.get("datasets")
    for name, value in _numbers(datasets if isinstance(datasets, dict) else {}):
        if "loss" in _tail(name):
            run.add(run.validation, name, entry["iteration"], value)
            if name in run.validation:
                run.last_validation[name] = value


def _take_incident(run: RunRecord, entry: dict[str, Any]) -> None:
    kind = checked.printable(str(entry.get("kind")))[:40]
    run.incident_kinds[kind if kind in run.incident_kinds or len(run.incident_kinds) < MOST_KINDS else "other"] += 1
    run.incidents.append(entry)
    del run.incidents[:-MOST_INCIDENTS]


def _take_quarantine(run: RunRecord, entry: dict[str, Any]) -> None:
    kind = str(entry.get("reason")).partition(":")[0][:200]
    if kind not in run.quarantine and len(run.quarantine) >= MOST_KINDS:
        kind = "other"
    run.quarantine[kind] += 1
    examples = run.examples.setdefault(kind, [])
    if len(examples) < MOST_EXAMPLES:
        examples.append(entry)


def _take_answer(run: RunRecord, entry: dict[str, Any]) -> None:
    run.answer_count += 1
    run.answers.append(entry)
    del run.answers[:-MOST_ANSWERS]


_TAKERS: dict[str, Callable[[RunRecord, dict[str, Any]], None]] = {
    METRICS_FILE: _take_metrics,
    VALIDATION_FILE: _take_validation,
    INCIDENTS_FILE: _take_incident,
    QUARANTINE_FILE: _take_quarantine,
    ANSWERS_FILE: _take_answer,
}


def _read_checkpoint(run: RunRecord) -> None:
    """The state and the model of the newest complete checkpoint; a run without one has neither."""
    try:
        checkpoint = find_checkpoint(run.path)
        if checkpoint is None:
            return
        run.state = checked.mapping(checkpoint.train_state(), "train_state.json")
        run.model = checked.mapping(checked.read_json(checkpoint.path / "config.json"), "config.json")
    except (CheckpointError, ValueError, OSError) as error:
        raise LogError(f"{run.path}: {error}; give a copy of the run without this checkpoint") from None
