"""The page and its pictures, and the runner of its commands."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from examples.acceptance.curves import sparkline, svg
from examples.acceptance.judge import Speed
from examples.acceptance.parts import Machine, Part, Tolerance, Training
from examples.acceptance.report import Outcome, Report, Result, markdown, table
from examples.acceptance.runner import Runner

STEPS = [{"lm_loss": 2.0, "vm_loss": 1.0}, {"lm_loss": 1.0, "vm_loss": 0.5}]
COMPARED = Part("layouts", "all alike", against="one", tolerance=Tolerance(1e-5, 1e-4, "rounding"))


def test_the_page_says_what_passed_what_failed_and_why() -> None:
    results = [
        Result("one", "PASS", "", STEPS, speed=Speed(1234.0, 5.0, 0.25, 1.5), planned=1.25),
        Result("two", "FAIL", "tolerance 1e-05: too far", STEPS, 0.125),
        Result("three", "SKIP", "needs 8 GPUs, there are 4"),
    ]
    report = Report("gpu_acceptance.sh", "on 4 GPUs", {"torch": "2.13.0"})
    report.outcomes = [
        Outcome(COMPARED, "FAIL", "two", results, "Traceback", 12.3),
        Outcome(Part("fp8", "FP8"), "SKIP", "needs Hopper", notes=["attention by flash"]),
    ]
    page = markdown(report, ["lm_loss.svg"])
    assert report.failed
    for line in (
        "`gpu_acceptance.sh`, on 4 GPUs: 0 parts passed, 1 failed, 1 were skipped.",
        "| layouts | **FAIL** | all alike | two | 12 |",
        "| fp8 | **SKIP** | FP8 | needs Hopper | 0 |",
        "| torch | 2.13.0 |",
        "Compared with *one*, step by step; tolerance: rounding.",
        "| one | **PASS** | - | 2.0000 to 1.0000 | 1.0000 to 0.5000 |  |",
        "| two | **FAIL** | 1.2e-01 | 2.0000 to 1.0000 | 1.0000 to 0.5000 | tolerance 1e-05: too far |",
        "| three | **SKIP** | - | - | - | needs 8 GPUs, there are 4 |",
        "![lm_loss.svg](lm_loss.svg)",
        "| one | █▁ | 2.0000 1.0000 |",
        "| one | 1,234 | 5.0 | 0.250 | 1.50 | 1.2 | - |",
        "- attention by flash",
        "## Last lines of layouts",
    ):
        assert line in page.splitlines(), line


def test_cells_of_a_table_cannot_end_it() -> None:
    assert table(("a",), [("x | y\nz",)])[2] == "| x \\| y z |"


def test_curves() -> None:
    assert sparkline([0, 1, 2, 7]) == "▁▂▃█" and sparkline([3, 3]) == "▁▁" and sparkline([]) == ""
    picture = ElementTree.fromstring(svg("a < b", {"one & two": [2.0, 1.0], "three": [1.0, 1.5]}))
    lines = picture.findall("{http://www.w3.org/2000/svg}polyline")
    assert [line.attrib["points"] for line in lines] == ["44.0,44.0 596.0,256.0", "44.0,256.0 596.0,150.0"]


def test_a_part_that_compared_nothing_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that compared some rows of its table reports that; its reference does not count."""
    states = {"one": "PASS", "two": "SKIP", "three": "PASS"}
    monkeypatch.setattr(
        Runner, "_judged", lambda self, training, part: Result(training.name, states[training.name], "why")
    )
    runner = Runner(tmp_path, Machine(False, 1), {})
    for names, status, why in (
        (("one", "two"), "SKIP", "why"),
        (("one", "two", "three"), "PASS", "1 of 2 were skipped: why"),
    ):
        part = Part("layouts", "", trainings=tuple(Training(name, ()) for name in names), against="one")
        outcome = runner.run(part)
        assert (outcome.status, outcome.why) == (status, why)


def test_a_failed_command_ends_its_part_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "runs" / "old").mkdir(parents=True)
    runner = Runner(tmp_path, Machine(False, 1, {"gpu": "needs a CUDA GPU"}), {"WORD": "hello"})
    runner.clear()
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]
    fails = runner.run(Part("fails", "", ("python -c 'print(1); raise SystemExit(3)'", "python -c 'never'")))
    assert (fails.status, fails.why) == ("FAIL", "fails_1.log: ended with status 3")
    assert fails.last_lines.splitlines()[-1] == "1" and not (tmp_path / "logs" / "fails_2.log").exists()
    passes = runner.run(Part("passes", "", ("python -c 'import os; print(os.environ[\"WORD\"])'",)))
    assert passes.status == "PASS" and (tmp_path / "logs" / "passes.log").read_text().endswith("hello\n")
    assert runner.run(Part("skips", "", ("python -c 'never'",), needs=("gpu",))).why == "needs a CUDA GPU"


def test_a_training_is_made_once_and_judged_beside_its_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def train(_: Runner, training: Training, __: Part) -> Result:
        made.append(training.name)
        if training.name == "broken":
            raise OSError("no space left")
        loss = {"one process": 2.0, "near": 2.00001, "far": 2.1}[training.name]
        return Result(training.name, "PASS", "", [{"lm_loss": loss, "vm_loss": loss, "sample_digest": "0"}])

    monkeypatch.setattr(Runner, "_train", train)
    part = Part("a", "", against="one process", tolerance=Tolerance(1e-5, 1e-4, ""))
    runner = Runner(tmp_path, Machine(False, 1), {})
    near = runner.run(Part(**{**vars(part), "trainings": (Training("near", ()),)}))
    far = runner.run(Part(**{**vars(part), "trainings": (Training("far", ()),)}))
    broken = runner.run(Part(**{**vars(part), "trainings": (Training("broken", ()), Training("near", ()))}))
    assert [result.status for result in broken.results] == ["PASS", "FAIL", "PASS"]
    assert (broken.status, broken.results[1].why) == ("FAIL", "OSError: no space left")
    assert made == ["one process", "near", "far", "broken"]
    assert (near.status, far.status, far.why) == ("PASS", "FAIL", "far")
    assert far.results[-1].why == "tolerance 1e-05: too far"


@pytest.mark.slow
def test_what_has_no_time_is_cut_and_named(tmp_path: Path) -> None:
    """On GPUs. A part without a share runs where --parts names it, and then without an end."""
    runner = Runner(tmp_path, Machine(True, 1), {}, named=("extra",))
    runner.clear()
    quick, endless = ("python -c 'print(\"note: seen\")'",), ("python -c 'import time; time.sleep(60)'",)
    short = runner.run(Part("short", "", endless, minutes=(0.01, 9)))
    assert (short.status, short.why) == ("SKIP", "cut after 1 s, the rest of the part's share of the time")
    over = runner.run(Part("over", "", quick, minutes=(1e-9, 9)))
    assert over.why == "cut: the part's 1e-09 minutes were over before it"
    assert "no share of the 10 minutes; --parts none" in runner.run(Part("none", "", quick, minutes=(0, 9))).why
    extra = runner.run(Part("extra", "", quick, minutes=(0, 9)))
    assert (extra.status, extra.notes) == ("PASS", ["seen"])
