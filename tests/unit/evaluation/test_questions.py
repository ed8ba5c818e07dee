"""Files of benchmarks -> questions: prompts, right answers, groups; malformed files are named with the row."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ross_mcore.errors import ConfigError, RecordsError
from ross_mcore.evaluation.run import Task

BASE64 = "/9j/" + "A" * 200


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def table(path: Path, *rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = "\t" if path.suffix == ".tsv" else ","
    path.write_text("".join(mark.join(map(str, row)) + "\n" for row in rows), encoding="utf-8")
    return path


def test_pope_has_a_category_for_each_file(tmp_path: Path) -> None:
    row = {"question_id": 1, "image": "COCO_1.jpg", "text": "Is there a dog?", "label": "no"}
    for name in ("random", "popular"):
        lines(tmp_path / f"coco_pope_{name}.json", row, {**row, "question_id": 2, "label": "yes"})
    items = Task("pope", str(tmp_path)).items()
    assert [(item.id, item.category, item.answers) for item in items[1:3]] == [
        ("popular/2", "popular", ("yes",)),
        ("random/1", "random", ("no",)),
    ]
    asked = "<image>\nIs there a dog?\nAnswer the question using a single word or phrase."
    assert len(Task("pope", str(tmp_path), limit=3).items()) == 3
    assert items[0].turns == (("human", asked),) and items[0].pictures == ("COCO_1.jpg",)
    one = Task("pope", str(tmp_path / "coco_pope_random.json"), suffix="", limit=1).items()
    assert [item.turns[0][1] for item in one] == ["<image>\nIs there a dog?"]


def test_mmvp_is_asked_as_the_reference_asks(tmp_path: Path) -> None:
    header = ["lndex", "Question", "Options", "Correct Answer"]
    rows = [[n, "Are the wings open?", "(a) Open (b) Closed", f"({'ab'[n % 2]})"] for n in (1, 2, 3)]
    table(tmp_path / "Questions.csv", header, *rows)
    items = Task("mmvp", str(tmp_path)).items()
    assert items[0].turns[0][1] == (
        "<image>\nAre the wings open? Options:\nA. Open\nB. Closed\n"
        "Answer with the option's letter from the given choices directly."
    )
    assert [(item.pictures, item.answers, item.group) for item in items] == [
        (("MMVP Images/1.jpg",), ("b", "closed"), "0"),
        (("MMVP Images/2.jpg",), ("a", "open"), "0"),
        (("MMVP Images/3.jpg",), ("b", "closed"), "1"),
    ]


def test_choices_and_their_rotations(tmp_path: Path) -> None:
    header = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image"]
    first = [7, "What is it?", "Look.", "cat", "dog", "", "nan", "B", "animals", BASE64]
    second = [1000007, "这是什么", "", "dog", "cat", "", "", "dog", "animals", 7]
    one, two = Task("mmbench", str(table(tmp_path / "b.tsv", header, first, second))).items()
    assert one.turns[0][1] == (
        "<image>\nLook.\nWhat is it?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly."
    )
    assert two.turns[0][1].startswith("<image>\n这是什么\nA. dog\nB. cat\n请直接回答选项字母")
    assert (one.answers, two.answers, one.group, two.group) == (("B",), ("A",), "7", "7")
    assert one.pictures == two.pictures == (BASE64,) and one.options == (("A", "cat"), ("B", "dog"))


def test_mme_has_two_questions_a_picture(tmp_path: Path) -> None:
    rows = [["question", "answer", "image_path", "category"], ["Is it?", "Yes", "1.png", "count"]]
    file = table(tmp_path / "mme.csv", *rows, ["Is it not?", "No", "1.png", "count"])
    assert [item.group for item in Task("mme", str(file)).items()] == ["count/1.png"] * 2
    others = [["Is it?", "No", "2.png", "count"], ["Is it not?", "Yes", "2.png", "count"]]
    table(file, *rows, others[0], ["Is it not?", "No", "1.png", "count"], others[1])
    assert [item.id for item in Task("mme", str(file), limit=1).items()] == ["1", "3"]
    assert [item.id for item in Task("mme", str(file), limit=3).items()] == ["1", "2", "3", "4"]
    assert [item.id for item in Task("yes-no", str(file), limit=1).items()] == ["1"]
    table(file, *rows)
    with pytest.raises(RecordsError, match=r"has 1 questions about 'count/1.png'.*2 a picture"):
        Task("mme", str(file)).items()


def test_every_round_of_a_conversation_is_asked_after_the_rounds_before_it(tmp_path: Path) -> None:
    turns = ["<image>\nWhat colour?", "Red.", "How many?", "two"]
    record: dict[str, Any] = {"id": "r", "image": "1.png", "kind": "x"}
    record["conversations"] = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(turns)]
    first, second = Task("short-answer", str(lines(tmp_path / "r.jsonl", record)), suffix="Briefly.", by="kind").items()
    assert (first.id, first.turns, first.answers) == ("r/1", (("human", "<image>\nWhat colour?\nBriefly."),), ("red",))
    assert second.turns == (*zip(("human", "gpt"), turns, strict=False), ("human", "How many?\nBriefly."))
    assert (second.pictures, second.answers, second.category) == (("1.png",), ("two",), "x")


def test_captions_have_several_references(tmp_path: Path) -> None:
    rows = [{"question": "Describe.", "answer": "['a dog', 'one dog']"}, {"question": "?", "answer": ["x", "y"]}]
    assert [item.answers for item in Task("caption", str(lines(tmp_path / "c.jsonl", *rows))).items()] == [
        ("a dog", "one dog"),
        ("x", "y"),
    ]


def test_pictures_of_a_folder_and_of_a_table(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg", "notes.txt", "in/c.webp"):
        (tmp_path / "p" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "p" / name).touch()
    found = [item.id for item in Task("reconstruction", str(tmp_path / "p")).items()]
    assert found == ["a.jpg", "b.png", "in/c.webp"]
    file = table(tmp_path / "p.csv", ["image"], ["a.jpg"], ["a.jpg"], ["b.png"])
    assert [item.pictures for item in Task("reconstruction", str(file)).items()] == [("a.jpg",), ("b.png",)]


@pytest.mark.parametrize(
    ("benchmark", "write", "says"),
    [
        ("pope", lambda p: lines(p, {"text": "?", "image": "1"}), "row 1: it has no answer; mend or remove"),
        ("pope", lambda p: p.mkdir() or p, "has no file like coco_pope_random.json"),
        ("yes-no", lambda p: lines(p, {"text": "?", "label": "maybe"}), "answer is 'maybe', expected yes or no"),
        ("yes-no", lambda p: lines(p, {"label": "yes"}), "row 1: it has no question"),
        ("yes-no", lambda p: lines(p, *[{"id": 3, "text": "?", "label": "no"}] * 2), "has the id '3' twice"),
        ("multiple-choice", lambda p: lines(p, {"text": "?", "A": "x", "answer": "B"}), "'B', which is none of its 1"),
        ("multiple-choice", lambda p: lines(p, {"text": "?", "image": ["1"], "answer": "B"}), "is a list of pictures"),
        ("short-answer", lambda p: p, "does not exist"),
        ("reconstruction", lambda p: lines(p, {"text": "?"}), "has no pictures"),
        ("yes-no", lambda p: table(p.with_suffix(".csv"), ["question"], ["a", "b"]), "more cells than the header"),
        ("yes-no", lambda p: table(p.with_suffix(".csv"), ["question"]), "has no rows"),
        ("mmvp", lambda p: table(p / "Questions.csv", ["a", "b"], [1, 2]).parent, "has 2 columns"),
        ("mmvp", lambda p: table(p / "Questions.csv", list("abcd"), [1, "?", "(a) x", "(a)"]).parent, "of two options"),
    ],
)
def test_a_malformed_file_is_named(benchmark: str, write: Callable[[Path], Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(RecordsError, match=says):
        Task(benchmark, str(write(tmp_path / "data.jsonl"))).items()


def test_a_task_checks_its_options() -> None:
    with pytest.raises(ConfigError, match="--benchmark 'popee' is unknown; take one of pope, mmvp"):
        Task("popee", "x")
    with pytest.raises(ConfigError, match="--limit 0 is not between 1 and"):
        Task("pope", "x", limit=0)
