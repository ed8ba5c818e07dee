"""`ross eval` of the recorded model: the same predictions on one rank, on two, and after an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ross_mcore.commands.eval import main
from ross_mcore.evaluation import run
from tests.distributed.harness import run_ranks
from tests.recorded import GOLDEN

PICTURES = GOLDEN / "data" / "images"
SUITE = f"""
answers: {{benchmark: short-answer, data: questions.jsonl, image_folder: {PICTURES}, max_new_tokens: 3}}
pictures: {{benchmark: reconstruction, data: questions.jsonl, image_folder: {PICTURES}, steps: 2}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A suite with questions about four pictures, one that is missing, none, and one that is too long."""
    names = [*sorted(path.name for path in PICTURES.glob("*.png")), "nowhere.png"]
    rows = [{"id": name, "image": name, "question": "What is it?", "answer": "x"} for name in names]
    rows += [{"id": "text", "question": "What?", "answer": "x"}, {"id": "long", "question": "a " * 5000, "answer": "x"}]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "suite.yaml").write_text(SUITE)
    return tmp_path


@contextmanager
def two_at_a_time(stop_after: int = 0) -> Iterator[None]:
    """Reconstructs two pictures at a time; a signal comes after `stop_after` batches of predictions."""
    add, written = run.add_predictions, []

    def add_and_stop(folder: Path, rank: int, predictions: list[run.Prediction]) -> None:
        add(folder, rank, predictions)
        written.append(len(predictions))
        if len(written) == stop_after:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "add_predictions", add_and_stop)
        patch.setattr(run, "PICTURES_AT_ONCE", 2)
        yield


def interrupted(base: Path, folder: Path) -> None:
    from ross_mcore.trained import load_model

    model = run.Evaluation(load_model(base), template="qwen_2", batch_size=2)
    data = {"data": str(folder / "questions.jsonl"), "image_folder": str(PICTURES)}
    totals: list[int] = []  # of every call

    def note(done: int, total: int) -> None:
        totals.append(total)

    for task in (run.Task("short-answer", **data, max_new_tokens=3), run.Task("reconstruction", **data, steps=2)):
        with pytest.raises(KeyboardInterrupt), two_at_a_time(stop_after=2):
            model.run(task, folder / "stopped" / task.benchmark, lambda done, total: None)
        with two_at_a_time():
            model.run(task, folder / "stopped" / task.benchmark, note)
            model.run(task, folder / "whole" / task.benchmark, lambda done, total: None)
        assert totals[-1] == (3 if task.benchmark == "short-answer" else 1)
        files = [folder / out / task.benchmark / "predictions.jsonl" for out in ("stopped", "whole")]
        assert files[0].read_text() == files[1].read_text()


def test_an_interruption_loses_no_answer(base: Callable[[str], Path], folder: Path) -> None:
    run_ranks(interrupted, 1, base("qwen2_siglip"), folder)


def evaluate(base: Path, folder: Path, out: str) -> None:
    words = ["--load", base, "--suite", folder / "suite.yaml", "--out", folder / out]
    with two_at_a_time():
        assert main([*map(str, words), "--template", "qwen_2", "--batch-size", "2"]) == 0


@pytest.mark.slow
def test_predictions_do_not_depend_on_the_number_of_ranks(base: Callable[[str], Path], folder: Path) -> None:
    for ranks in (1, 2):
        run_ranks(evaluate, ranks, base("qwen2_siglip"), folder, str(ranks))
    for name in ("answers", "pictures"):
        one, two = (folder / out / name / "predictions.jsonl" for out in "12")
        assert one.read_text() == two.read_text()
    found = {each["name"]: each for each in json.loads((folder / "2" / "results.json").read_text())}
    counts = {name: (each["questions"], each["bad"], each["bad_are"]) for name, each in found.items()}
    assert counts == {"answers": (7, 2, "wrong"), "pictures": (5, 1, "left out")}
