"""Answers to the questions of a file, with answers that are made up: forms, errors, resuming, other settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ross_mcore import ConfigError, ConversationError, Generated, Question, Sampling, generation
from ross_mcore.chat.batch import Answering
from ross_mcore.commands.chat import require_another_file
from ross_mcore.shards.files import read_records
from ross_mcore.shards.pictures import PictureFolder
from tests.recorded import GOLDEN

PICTURES = GOLDEN / "data" / "images"
TURNS = [{"from": "human", "value": "<image>\nWho?"}, {"from": "gpt", "value": "He."}]
RECORDS: list[Any] = [
    {"question_id": 7, "image": "img0.png", "text": "What?"},
    {"id": "b", "image": "img0.png", "conversations": TURNS},
    {"messages": [{"role": "user", "content": "Why?"}]},
    {"question_id": 8, "image": "none.png", "text": "What?"},
    {"question_id": 7, "text": "Again?"},
    {"question_id": 9, "text": "too long"},
    {"question_id": 10, "question": "Is <image> it?", "image": ["img0.png", "img1.png"]},
]
ERRORS = {8: "No such file 'none.png'", "7 (record 4)": "another record has this id", 9: "is too long", 7: ""}


class Model:
    """Answers with the texts and numbers of questions; `stops_at`: the question at which a signal comes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, stops_at: str = "never") -> None:
        self.asked: list[tuple[int, Question]] = []
        self.stops_at = stops_at
        monkeypatch.setattr(generation, "generate", self.generate)

    def generate(
        self, trained: Any, questions: Sequence[Question], sampling: Sampling, *, numbers: Sequence[int], **options: Any
    ) -> list[Generated]:
        for place, question in enumerate(questions):
            if "too long" in str(question.conversations):
                raise ConversationError(f"questions[{place}]: it is too long")
            if self.stops_at in str(question.conversations):
                raise KeyboardInterrupt
        self.asked += zip(numbers, questions, strict=True)
        return [Generated(f"ü{number}", (number,), "stop", 5) for number in numbers]


def answering(temperature: float = 0.0, batch_size: int = 2) -> Answering:
    trained: Any = SimpleNamespace(template="qwen_2", spec=SimpleNamespace(truncated_images="refuse"))
    return Answering(
        trained, "run", Sampling(temperature=temperature), None, PictureFolder(PICTURES), batch_size, "Short."
    )


def answers(tmp_path: Path, made: Answering | None = None) -> tuple[tuple[int, int], list[dict[str, Any]]]:
    questions, output = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    questions.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    counts = (made or answering()).answer(read_records(questions)[1], output, lambda number: None)
    return counts, [json.loads(line) for line in output.read_text().splitlines()]


def test_every_record_gets_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(monkeypatch)
    counts, rows = answers(tmp_path)
    assert counts == (4, 3) and len(rows) == len(RECORDS)
    said = {row["question_id"]: row["text"] for row in rows if "text" in row}
    assert said == {7: "ü0", "b": "ü1", 2: "ü2", 10: "ü6"}
    assert all(ERRORS[row["question_id"]] in row["error"] for row in rows if "error" in row)
    assert next(row for row in rows if row["question_id"] == "b")["reference"] == "He."
    turns = {number: [turn["value"] for turn in question.conversations] for number, question in model.asked}  # type: ignore[index]
    assert turns[0] == ["Short.", "<image>\nWhat?"] and turns[1] == ["Short.", "<image>\nWho?"]
    assert turns[6] == ["Short.", "<image>\nIs <image> it?"]


def test_an_interrupted_file_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Model(monkeypatch, stops_at="Is <image>")
    with pytest.raises(KeyboardInterrupt):
        answers(tmp_path)
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"question_id": 10, "te')  # cut by a crash
    model = Model(monkeypatch)
    counts, rows = answers(tmp_path)
    assert [number for number, _ in model.asked] == [6] and counts == (1, 3)
    assert sorted(str(row["question_id"]) for row in rows) == ["10", "2", "7", "7 (record 4)", "8", "9", "b"]


@pytest.mark.parametrize(
    "content",
    [
        '{"question_id": 1, "text": "A", "metadata": 3}\n',
        "[1]\n",
        '{"a": 1}\n',
        '{"error": "of another program"}\n',
        "notes\n",
        "notes",
        "\n",
        '{"question_id": 8, "error": "no file"}\n{"question_id": 9, "te\n',
    ],
)
def test_a_file_of_something_else_is_left_alone(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Model(monkeypatch)
    (tmp_path / "answers.jsonl").write_text(content)
    with pytest.raises(
        ConfigError, match=r"--output .*answers.jsonl \(line \d\) cannot be continued: .*; give another file"
    ):
        answers(tmp_path)
    assert (tmp_path / "answers.jsonl").read_text() == content


def test_the_file_of_questions_is_not_written_to(tmp_path: Path) -> None:
    questions = tmp_path / "q.jsonl"
    questions.write_text("[]")
    (tmp_path / "link").symlink_to(questions)
    require_another_file(questions, tmp_path / "new")
    with pytest.raises(ConfigError, match=r"--output .*/link is the file of --input; give another file"):
        require_another_file(questions, tmp_path / "link")


def test_answers_of_other_settings_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Model(monkeypatch)
    answers(tmp_path)
    with pytest.raises(ConfigError, match=r"it has answers with temperature 0.0, and now it is 0.5"):
        answers(tmp_path, answering(temperature=0.5))
