from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from ross_mcore.errors import LogError
from ross_mcore.run_report.events import read_picture
from ross_mcore.run_report.reading import read_run
from ross_mcore.run_report.series import MOST_POINTS, Series, fewer, smoothed
from ross_mcore.run_report.settings import compare
from tests.unit.run_report.made import image, lines, make_run, metrics, picture, scalar, start, write_events


def test_a_long_series_keeps_its_extremes_and_its_mean_in_few_points() -> None:
    values = [random.Random(0).gauss(0, 1) for _ in range(1500)]
    values[234], values[1321] = 100.0, -50.0
    series = Series()
    for iteration, value in enumerate(values, start=1):
        series.add(iteration, value)
    series.add(17, float("nan"))
    series.add(17, 1e300)
    points = series.points()
    assert MOST_POINTS // 2 < len(points) <= MOST_POINTS
    for kept in (points, fewer(points, 50)):
        assert sum(point.count for point in kept) == series.count == 1500
        assert max(point.most for point in kept) == 100.0 and min(point.least for point in kept) == -50.0
        assert sum(point.mean * point.count for point in kept) == pytest.approx(sum(values))
        assert [point.iteration for point in kept] == sorted({point.iteration for point in kept})
        assert kept[-1].iteration == 1500
    assert len(fewer(points, 50)) <= 50
    assert series.lowest == (-50.0, 1322)


def test_a_short_series_keeps_every_value_and_smoothing_a_constant_changes_nothing() -> None:
    series = Series()
    for iteration in (3, 1, 2):
        series.add(iteration, 4.0)
    assert [(p.iteration, p.count, p.mean) for p in series.points()] == [(1, 1, 4.0), (2, 1, 4.0), (3, 1, 4.0)]
    assert smoothed(series.points()) == [4.0, 4.0, 4.0]


def test_figures_of_a_run(tmp_path: Path) -> None:
    parts = {"projector": 0.1}
    folder = make_run(tmp_path / "run")
    (folder / "metrics.jsonl").write_text(lines([metrics(n, grad_norms=parts, applied=True) for n in range(1, 31)]))
    run = read_run(folder, "run")
    assert run.iteration == 30 and run.seconds == 15.0 and run.timed_samples == 240
    assert {"lm_loss", "grad_norm", "samples_per_second", "grad_norms/projector"} < set(run.series)
    assert not {"vm_loss", "applied", "iteration"} & set(run.series)
    assert run.series["samples_per_second"].mean == 16.0 and run.series["peak_gib"].mean == 1.0
    assert run.series["data_share"].mean == pytest.approx(0.1)
    assert run.last_validation == {"plain/lm_loss": 0.7, "plain/vm_loss": 0.2}
    assert run.quarantine == {"plain": 4, "empty": 1} and len(run.examples["plain"]) == 3
    assert run.incident_kinds == {"plain": 1} and run.answer_count == 2
    assert run.settings == {"lr": "0.1", "seed": "1", "data_path": "plain"}
    assert not run.damaged.total() and [s.iteration for s in run.events.starts] == [1]


def test_damaged_lines_are_counted_and_a_cut_last_line_is_not(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    damaged = ["not JSON", "[1]", '{"iteration": "5"}', '{"iteration": -1}', '{"a":' * 10_000, "\x00\xff"]
    whole = [json.dumps(metrics(n)) for n in (1, 2, 3)]
    (folder / "metrics.jsonl").write_text("\n".join([whole[0], *damaged, *whole[1:], '{"iteration": 4, "lm_l']))
    run = read_run(folder, "run")
    assert run.iteration == 3 and run.series["lm_loss"].count == 3
    assert run.damaged == {"metrics.jsonl": len(damaged)}


def test_what_an_abandoned_branch_drew_is_left_out(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    boards = folder / "tensorboard"
    write_events(
        boards / "events.out.tfevents.1.host.1",
        *(start(1), image(10, picture(1)), image(20, picture(2)), scalar(10, "throughput/mfu", 0.25)),
        *(scalar(20, "throughput/mfu", 0.5), scalar(20, "other", 0.5)),
    )
    write_events(boards / "events.out.tfevents.2.host.1", start(15), image(18, picture(3)))
    with (boards / "events.out.tfevents.2.host.1").open("ab") as stream:
        stream.write(b"\x10\x00\x00\x00\x00\x00\x00\x00....cut")  # being written
    (boards / "events.out.tfevents.3.host.1").write_bytes(b"\xff" * 40)
    run = read_run(folder, "run")
    places = run.events.pictures["reconstruction"]
    assert sorted(places) == [10, 18]
    assert read_picture(places[18], "reconstruction") == picture(3)
    assert run.series["mfu"].mean == 0.25 and "other" not in run.series
    assert run.events.damaged == ["events.out.tfevents.3.host.1"]


def test_settings_that_differ_come_first() -> None:
    found = compare([{"lr": "1", "seed": "7"}, {"lr": "1", "seed": "8", "new": "x"}])
    assert [(s.name, s.values, s.differs) for s in found] == [
        ("seed", ("7", "8"), True),
        ("new", (None, "x"), True),
        ("lr", ("1", "1"), False),
    ]


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (None, "there is no such folder; give the folder of --save"),
        ({}, "has no metrics.jsonl; give the folder of --save"),
        ({"metrics.jsonl": ""}, "has no iteration yet"),
        ({"metrics.jsonl": "\n{}\n"}, "has no iteration yet"),
        ({"metrics.jsonl": '{"iteration": 1, "step_seconds": Infinity}\n'}, "run/metrics.jsonl has no number"),
        ({"metrics.jsonl": '{"iteration": 1, "lm_loss": null, "vm_loss": 1' + 400 * "0" + "}\n"}, "has no number"),
    ],
)
def test_folders_without_a_run(made: dict[str, str] | None, says: str, tmp_path: Path) -> None:
    if made is not None:
        (tmp_path / "run").mkdir()
        for name, content in made.items():
            (tmp_path / "run" / name).write_text(content)
    with pytest.raises(LogError, match=says):
        read_run(tmp_path / "run", "run")


def test_a_checkpoint_of_a_run_names_its_run(tmp_path: Path) -> None:
    (tmp_path / "run" / "iter_0000010").mkdir(parents=True)
    with pytest.raises(LogError, match=f"give {tmp_path / 'run'}"):
        read_run(tmp_path / "run" / "iter_0000010", "run")
