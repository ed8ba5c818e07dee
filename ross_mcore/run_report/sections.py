"""The parts of the page below its curves: what was run, the summary, settings, incidents, replaced samples, answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

from ross_mcore.parts import DENOISER
from ross_mcore.run_report.charts import short
from ross_mcore.run_report.html import Row, folded, named, section, table, text
from ross_mcore.run_report.reading import MOST_ANSWERS, MOST_INCIDENTS, RunRecord
from ross_mcore.run_report.series import smoothed
from ross_mcore.run_report.settings import compare

NOTHING = "–"
MOST_SHOWN_SAMPLES = 3


def heads(runs: Sequence[RunRecord]) -> list[str]:
    return [named(number, run.name) for number, run in enumerate(runs)]


def _rows(runs: Sequence[RunRecord], facts: dict[str, Callable[[RunRecord], object]]) -> list[Row]:
    """A row for each fact that a run has; `show` returns text of the run, which is escaped here."""
    found = []
    for name, show in facts.items():
        values = [show(run) for run in runs]
        if any(value not in (None, "") for value in values):
            found.append(Row(name, [NOTHING if value in (None, "") else text(value) for value in values]))
    return found


def what_was_run(runs: Sequence[RunRecord]) -> str:
    facts: dict[str, Callable[[RunRecord], object]] = {
        "folder": lambda run: run.path,
        "stage": lambda run: run.settings.get("training_stage"),
        "model": _model,
        "training data": lambda run: _data(run, "data") or run.settings.get("data_path"),
        "held-out data": lambda run: _data(run, "valid_data") or _unless_none(run.settings.get("valid_data_path")),
        "started from": _started_from,
        "layout": _layout,
        "batch": _batch,
        "starts": _starts,
        "last command": lambda run: " ".join(map(str, _listed(_fact(run, "command"))))[:4000],
        "commit": lambda run: _fact(run, "commit"),
        "versions": lambda run: _pairs(_fact(run, "versions")),
    }
    return section("What was run", table("run", heads(runs), _rows(runs, facts)))


def _unless_none(value: str | None) -> str | None:
    return None if value == "None" else value


def _fact(run: RunRecord, name: str) -> Any:
    """A fact of the run's last start in train_state.json; None in runs of older versions."""
    facts = run.state.get("facts")
    return facts.get(name) if isinstance(facts, dict) else None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _pairs(value: Any) -> str:
    return ", ".join(f"{key} {inner}" for key, inner in value.items()) if isinstance(value, dict) else ""


def _data(run: RunRecord, name: str) -> str:
    sets = [one for one in _listed(_fact(run, name)) if isinstance(one, dict)]
    return "; ".join(f"{one.get('path')} ({one.get('samples')} samples)" for one in sets)


def _model(run: RunRecord) -> str:
    get = run.settings.get
    language = f"{get('model.language.model_type')}, {get('model.language.num_hidden_layers')} layers"
    parts = [f"{language} of {get('model.language.hidden_size')}"] if "language" in run.model else []
    for name in ("model.vision.huggingface.model_type", "model.projector.projector_type"):
        parts += [get(name, "")] if name in run.settings else []
    if run.model.get(DENOISER.prefix):
        denoiser = f"model.{DENOISER.prefix}"
        parts.append(f"denoiser of {get(f'{denoiser}.depth')} layers of {get(f'{denoiser}.width')}")
    return "; ".join(parts)


def _started_from(run: RunRecord) -> object:
    source = run.state.get("started_from")
    saved = source.get("path") if isinstance(source, dict) else None
    return _unless_none(run.settings.get("load")) or saved


def _layout(run: RunRecord) -> str:
    if layout := _pairs(_fact(run, "layout")):
        return layout.replace("_model_parallel_size", "").replace("_parallel_size", "")
    found = {name: run.settings.get(f"{name}_model_parallel_size") for name in ("tensor", "pipeline")}
    return ", ".join(f"{name} {degree}" for name, degree in found.items() if degree)


def _batch(run: RunRecord) -> str:
    found = {"global": "global_batch_size", "micro": "micro_batch_size", "tokens a row": "seq_length"}
    return ", ".join(f"{name} {run.settings[key]}" for name, key in found.items() if key in run.settings)


def _starts(run: RunRecord) -> str:
    def when(seconds: float) -> str:
        if not 0 <= seconds < 2**35:
            return ""
        return f" ({datetime.fromtimestamp(seconds, timezone.utc):%Y-%m-%d %H:%M} UTC)"

    shown = [f"iteration {start.iteration}{when(start.seconds)}" for start in run.events.starts]
    more = len(shown) - 10
    return ", ".join(shown[:10]) + (f" and {more} more" if more > 0 else "")


def summary(runs: Sequence[RunRecord]) -> str:
    facts: dict[str, Callable[[RunRecord], object]] = {"iterations": _iterations}
    facts["samples"] = lambda run: f"{run.last['consumed_samples']:,}"
    facts["time of all steps"] = lambda run: timedelta(seconds=round(run.seconds)) if run.seconds else None
    for loss in ("lm_loss", "vm_loss", "loss"):
        facts[f"{loss}, last"] = _last(loss)
        facts[f"{loss}, lowest"] = _lowest(loss)
    for name in dict.fromkeys(name for run in runs for name in run.validation):
        dataset, _, loss = name.rpartition("/")
        facts[f"held-out {loss} on {dataset}, last"] = _last_validation(name)
        facts[f"held-out {loss} on {dataset}, lowest"] = _lowest_validation(name)
    facts["samples a second, mean"] = lambda run: short(run.timed_samples / run.seconds) if run.seconds else None
    for title, name, scale, unit in (
        ("tokens a second, mean", "tokens_per_second", 1, ""),
        ("MFU, mean", "mfu", 100, " %"),
        ("fill, mean", "fill", 100, " %"),
        ("waiting for data, mean", "data_share", 100, " %"),
    ):
        facts[title] = _mean(name, scale, unit)
    facts["peak memory"] = _peak
    facts["incidents"] = lambda run: _counted(run.incident_kinds)
    facts["replaced samples"] = lambda run: f"{run.quarantine.total():,}" if run.quarantine else None
    facts["times resumed"] = lambda run: max(0, len(run.events.starts) - 1)
    facts["damaged lines, left out"] = lambda run: _counted(run.damaged)
    facts["damaged TensorBoard files, read in part"] = lambda run: ", ".join(run.events.damaged)
    note = '<p class="faint">Last losses are smoothed; lowest ones are of a single iteration.</p>'
    return section("Summary", table("run", heads(runs), _rows(runs, facts)), note)


def _counted(found: dict[str, int]) -> str:
    return ", ".join(f"{count:,} x {name}" for name, count in found.items() if count)


def _iterations(run: RunRecord) -> str:
    planned = run.settings.get("train_iters", "")
    return f"{run.iteration:,}" + (f" of {int(planned):,}" if planned.isdecimal() else "")


def _last(name: str) -> Callable[[RunRecord], object]:
    def show(run: RunRecord) -> object:
        points = run.series[name].points() if name in run.series else []
        return short(smoothed(points)[-1]) if points else None

    return show


def _lowest_of(found: tuple[float, int] | None) -> object:
    return None if found is None else f"{short(found[0])} (iteration {found[1]:,})"


def _lowest(name: str) -> Callable[[RunRecord], object]:
    return lambda run: _lowest_of(run.series[name].lowest) if name in run.series else None


def _lowest_validation(name: str) -> Callable[[RunRecord], object]:
    return lambda run: _lowest_of(run.validation[name].lowest) if name in run.validation else None


def _last_validation(name: str) -> Callable[[RunRecord], object]:
    return lambda run: short(run.last_validation[name]) if name in run.last_validation else None


def _peak(run: RunRecord) -> object:
    points = run.series["peak_gib"].points() if "peak_gib" in run.series else []
    return f"{short(max(point.most for point in points))} GiB" if points else None


def _mean(name: str, scale: float, unit: str) -> Callable[[RunRecord], object]:
    def show(run: RunRecord) -> object:
        series = run.series.get(name)
        return f"{short(series.mean * scale)}{unit}" if series is not None and series.count else None

    return show


def settings(runs: Sequence[RunRecord]) -> str:
    compared = compare([run.settings for run in runs])
    rows = [
        Row(s.name, [NOTHING if value is None else text(value) for value in s.values], s.differs and len(runs) > 1)
        for s in compared
    ]
    differing, equal = [row for row in rows if row.differs], [row for row in rows if not row.differs]
    shown = table(f"{len(differing)} that differ", heads(runs), differing) if differing else ""
    rest = folded(f"{len(equal)} settings that are equal", table("setting", heads(runs), equal)) if equal else ""
    if len(runs) == 1:
        rest = folded(f"{len(equal)} settings", table("setting", heads(runs), equal)) if equal else ""
    elif not differing and equal:
        shown = "<p>All settings are equal.</p>"
    return section("Settings", shown, rest)


def incidents(runs: Sequence[RunRecord]) -> str:
    def of(number: int, run: RunRecord) -> str:
        if not run.incidents:
            return ""
        rows = [
            Row(str(one["iteration"]), [text(one.get("kind")), text(one.get("reason")), _samples(one.get("samples"))])
            for one in reversed(run.incidents)
        ]
        total = run.incident_kinds.total()
        left = f"; the last {MOST_INCIDENTS} are listed" if total > MOST_INCIDENTS else ""
        shown = table("iteration", ["kind", "reason", "samples with the largest losses"], rows)
        head = f"<h3>{named(number, run.name)}: {text(_counted(run.incident_kinds))}{left}</h3>"
        return head + (shown if len(rows) <= 10 else folded("list", shown))

    return section("Incidents", *(of(number, run) for number, run in enumerate(runs)))


def _samples(found: Any) -> str:
    samples = [s for s in found if isinstance(s, dict)] if isinstance(found, list) else []
    names = [f"{s.get('key')} of {s.get('shard')}" for s in samples[:MOST_SHOWN_SAMPLES]]
    more = len(samples) - len(names)
    return text(", ".join(names) + (f" and {more} more" if more > 0 else "")) or NOTHING


def quarantine(runs: Sequence[RunRecord]) -> str:
    def of(number: int, run: RunRecord) -> str:
        if not run.quarantine:
            return ""
        rows = [
            Row(f"{count:,} x {kind}", ["<br>".join(_example(one) for one in run.examples[kind])])
            for kind, count in run.quarantine.most_common()
        ]
        head = f"<h3>{named(number, run.name)}: {run.quarantine.total():,} samples</h3>"
        return head + table("reason", ["examples"], rows)

    return section("Replaced samples", *(of(number, run) for number, run in enumerate(runs)))


def _example(one: dict[str, Any]) -> str:
    return text(f"iteration {one['iteration']}: {one.get('key')} of {one.get('shard')}: {one.get('reason')}", 500)


def answers(runs: Sequence[RunRecord]) -> str:
    """The answers to each question of a picture, newest first."""

    def of(number: int, run: RunRecord) -> str:
        asked: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for one in run.answers:
            sample = f"{one.get('sample')} of {one.get('dataset')}"
            asked.setdefault((sample, str(one.get("question"))), []).append(one)
        rows = [
            Row(f"{key}: {question}"[:500], [_expected(found), _said(found[-1]), _before(found[-2::-1])])
            for (key, question), found in asked.items()
        ]
        left = run.answer_count - MOST_ANSWERS
        note = f"; the last {MOST_ANSWERS} of {run.answer_count:,}" if left > 0 else ""
        columns = ["expected", "last answer", "before"]
        return f"<h3>{named(number, run.name)}{note}</h3>{table('question', columns, rows)}" if rows else ""

    return section("Sample answers", *(of(number, run) for number, run in enumerate(runs)))


def _expected(found: Sequence[dict[str, Any]]) -> str:
    expected = found[-1].get("expected")
    return NOTHING if expected is None else text(expected)


def _said(one: dict[str, Any]) -> str:
    return f"{text(one.get('answer'))} <span class=faint>({one['iteration']})</span>"


def _before(earlier: Sequence[dict[str, Any]]) -> str:
    if not earlier:
        return NOTHING
    return folded(f"{len(earlier)} earlier", "<br>".join(_said(one) for one in earlier))
