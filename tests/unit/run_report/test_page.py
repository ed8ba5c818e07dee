from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ross_mcore.commands import names_of
from ross_mcore.commands.report import main
from ross_mcore.run_report.charts import Axis, Chart, curve, draw, linear_ticks, log_ticks
from ross_mcore.run_report.pictures import MOST_BYTES, encoded, spread
from ross_mcore.run_report.reading import RunRecord
from ross_mcore.run_report.sections import what_was_run
from ross_mcore.run_report.series import Series
from ross_mcore.run_report.settings import settings_of
from tests.unit.run_report.made import HOSTILE, image, make_run, picture, write_events


class Tags(HTMLParser):
    """The tags and attributes of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def report(tmp_path: Path, *runs: Path, more: tuple[str, ...] = ()) -> str:
    output = tmp_path / "report.html"
    assert main([*map(str, runs), "--output", str(output), *more]) == 0
    assert not list(tmp_path.glob("*.partial"))
    return output.read_text(encoding="utf-8")


def test_text_of_files_is_never_markup(tmp_path: Path) -> None:
    page = report(tmp_path, make_run(tmp_path / "run", text=HOSTILE), make_run(tmp_path / "other", text=HOSTILE))
    assert page.count("<script") == page.count("</script>") == 2
    tags = Tags(page).found
    assert all(re.fullmatch("data:image/png;base64,[A-Za-z0-9+/=]+", a["src"] or "") for t, a in tags if t == "img")
    assert not [a for _, a in tags if any(name.startswith("on") or name == "href" for name in a)]
    assert "onerror=alert(1)&gt;" in page and "\x1b" not in page


def test_a_page_loads_nothing_and_says_so(tmp_path: Path) -> None:
    page = report(tmp_path, make_run(tmp_path / "run"))
    policy = next(a["content"] for t, a in Tags(page).found if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:; ")
    assert not re.search(r"https?://|url\(|@import|<link", page)


def test_pictures_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    pictures = [image(n, picture(n)) for n in range(1, 30)] + [image(30, b"\x89PNG damaged")]
    write_events(folder / "tensorboard" / "events.out.tfevents.1.host.1", *pictures)
    page = report(tmp_path, folder, more=("--pictures", "4"))
    assert page.count("<img ") == 3 and "26 of 30 left out" in page
    other = make_run(tmp_path / "other")
    assert report(tmp_path, other).count("<img ") == 3
    assert report(tmp_path, other, more=("--pictures", "1")).count("<img ") == 1
    assert "<img " not in report(tmp_path, folder, more=("--pictures", "0"))
    assert spread(range(100, 200), 3) == [100, 150, 199] and spread([5], 3) == [5]


def test_a_large_picture_becomes_smaller() -> None:
    kind, data, width = encoded(picture(7, (2560, 100)) + b"\0" * MOST_BYTES)
    assert (kind, width) == ("jpeg", 1280) and len(data) < 10_000


def test_differing_settings_are_shown_and_equal_ones_folded(tmp_path: Path) -> None:
    other = make_run(tmp_path / "b", options="    lr: 0.2\n    seed: 1")
    page = report(tmp_path, make_run(tmp_path / "a"), other)
    shown, folded = page.split("<h2>Settings</h2>")[1].split("<details>")
    assert "0.1" in shown and "0.2" in shown and "seed" not in shown and ">seed<" in folded


def test_data_of_the_charts_is_in_their_order(tmp_path: Path) -> None:
    page = report(tmp_path, make_run(tmp_path / "a"), make_run(tmp_path / "b", iterations=10))
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert data["runs"] == ["a", "b"] and (data["first"], data["last"]) == (1, 30)
    assert len(data["charts"]) == page.count('<figure class="chart">')
    first = data["charts"][0]["curves"]
    assert [len(one["points"]) for one in first] == [30, 10] and first[0]["points"][0][::2] == [1, 1.0]


@pytest.mark.parametrize("values", [[0.0, 0.0], [-3.0], [1e-30, 1e30], [5.0, 5.0 + 1e-15], [-1.0, 0.0, 2.0]])
def test_any_values_can_be_drawn(values: list[float]) -> None:
    series, chart = Series(), Chart("x", "x", log=True, marks=True)
    for iteration, value in enumerate(values, start=1):
        series.add(iteration, value)
    drawn = draw(chart, [curve(0, "run", series, chart, 400)], Axis(0, len(values)))
    assert 'class="smooth"' in drawn and "nan" not in drawn and "inf" not in drawn


def test_ticks_are_round() -> None:
    assert linear_ticks(0, 120) == [0, 25, 50, 75, 100]
    assert log_ticks(0.015, 1.2) == pytest.approx([0.02, 0.05, 0.1, 0.2, 0.5, 1.0])
    assert log_ticks(1e-3, 1e3) == pytest.approx([1e-3, 1e-1, 1e1, 1e3], rel=1e-9) or len(log_ticks(1e-3, 1e3)) <= 6


def test_runs_have_the_shortest_names_that_differ() -> None:
    assert names_of([Path("a/x"), Path("b/y")]) == ["x", "y"]
    assert names_of([Path("a/run"), Path("b/run")]) == ["a/run", "b/run"]
    assert names_of([Path("run"), Path("run")]) == ["run 1", "run 2"]


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "report.html"
    output.write_text("before")
    assert main([str(make_run(tmp_path / "run")), str(tmp_path), "--output", str(output)]) == 2
    assert "is not the folder of a run: it has no metrics.jsonl" in capsys.readouterr().err
    assert output.read_text() == "before"


def test_facts_of_a_run_are_shown_where_a_checkpoint_has_them() -> None:
    facts = {
        "command": ["pretrain_ross.py", "--lr", "1"],
        "layout": {"world_size": 4, "tensor_model_parallel_size": 2},
        "data": [{"name": "a", "path": "shards/a", "samples": 12}, "damaged"],
        "versions": {"torch": "2.9"},
    }
    run = RunRecord("run", Path("run"), last={"iteration": 1}, state={"facts": facts})
    run.settings = settings_of(run.state, {}, {})
    page = what_was_run([run])
    for shown in ("pretrain_ross.py --lr 1", "world_size 4, tensor 2", "shards/a (12 samples)", "torch 2.9"):
        assert f"<td>{shown}</td>" in page
    assert run.settings["versions.torch"] == "2.9"
    assert "pretrain" not in what_was_run([RunRecord("old", Path("old"), state={"facts": "damaged"})])
