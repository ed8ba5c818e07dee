"""Answers to the questions of a file, one line of JSON each, so that an interruption loses nothing that is written.

A question is a record of LLaVA's question files, {"question_id", "image", "text"}, or of any form that data/records.py
reads, whose last turn is then asked; an answer that it has is kept as "reference". An answer has the keys of LLaVA's
answer files: {"question_id", "prompt", "text", "model_id", "metadata"}; a question that cannot be asked has "error".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ross_mcore import checked
from ross_mcore.data.conversation import IMAGE_PLACEHOLDER, check_turns
from ross_mcore.data.image import decode_image
from ross_mcore.data.records import has_turns, normalise, picture_names
from ross_mcore.errors import ConfigError, ConversationError, ImageError, SampleError
from ross_mcore.generation import Generated, Sampling, generate_each
from ross_mcore.logs import append, replace_file
from ross_mcore.shards.pictures import PictureFolder
from ross_mcore.trained import Question, TrainedModel

QUESTION_KEYS = ("text", "question", "prompt")
ID_KEYS = ("question_id", "id")
LINE_START = b'{"question_id": '
Row = dict[str, Any]


@dataclass(frozen=True)
class Asked:
    """A question of a file. number: of its record, on which its draws depend."""

    number: int
    id: str | int
    turns: list[dict[str, str]]
    pictures: list[Any]
    reference: str | None = None

    @classmethod
    def of(cls, record: Any, number: int) -> Asked:
        """Raises SampleError, ConversationError."""
        if isinstance(record, SampleError):
            raise record
        key = id_of(record, number)
        text = next((record[name] for name in QUESTION_KEYS if isinstance(record.get(name), str)), None)
        if text is not None and not has_turns(record):
            pictures = picture_names(record)
            missing = max(0, len(pictures) - text.count(IMAGE_PLACEHOLDER))
            return cls(number, key, [{"from": "human", "value": f"{IMAGE_PLACEHOLDER}\n" * missing + text}], pictures)
        record = normalise(record)
        turns = list(record["conversations"])
        check_turns(turns)
        reference = turns.pop()["value"] if turns[-1]["from"] == "gpt" else None
        return cls(number, key, turns, picture_names(record), reference)


@dataclass(frozen=True)
class Answering:
    """How the questions of a file are answered. name: of the model, in the answers."""

    trained: TrainedModel
    name: str
    sampling: Sampling
    template: str | None
    folder: PictureFolder
    batch_size: int
    system: str | None = None

    @property
    def settings(self) -> Row:
        """What answers depend on beside the question; those of one file have the same."""
        template = self.template or self.trained.template
        return {"model_id": self.name, **asdict(self.sampling), "template": template, "system": self.system}

    def answer(self, records: Iterable[Any], output: Path, report: Callable[[int], None]) -> tuple[int, int]:
        """Appends answers to `output`, except to questions that have one there; returns numbers of answers and errors.

        `report` gets the number of finished records. Raises ConfigError for a file of other answers, OSError.
        """
        done = reopen(output, self.settings)
        taken: set[str | int] = set()
        counts = [0, 0]
        numbered = iter(enumerate(records))
        while some := list(islice(numbered, self.batch_size)):
            rows = list(self._rows(some, done, taken))
            append(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
            bad = sum("error" in row for row in rows)
            counts = [counts[0] + len(rows) - bad, counts[1] + bad]
            report(len(some))
        return counts[0], counts[1]

    def _rows(self, records: Sequence[tuple[int, Any]], done: set[str | int], taken: set[str | int]) -> Iterator[Row]:
        good: list[tuple[Asked, Question]] = []
        for number, record in records:
            key = id_of(record, number)
            if key in taken:
                yield {"question_id": f"{key} (record {number})", "error": "another record has this id"}
                continue
            taken.add(key)
            if key in done:
                continue
            try:
                asked = Asked.of(record, number)
                good.append((asked, self._question(asked)))
            except (SampleError, ConversationError, ImageError) as error:
                yield {"question_id": key, "error": str(error)}
        yield from self._answered(good)

    def _question(self, asked: Asked) -> Question:
        """Raises SampleError, ImageError."""
        truncated = self.trained.spec.truncated_images
        pictures = [decode_image(self.folder.read(name), truncated).picture for name in asked.pictures]
        system = [{"from": "system", "value": self.system}] if self.system is not None else []
        return Question([*system, *asked.turns], pictures)

    def _answered(self, asked: Sequence[tuple[Asked, Question]]) -> Iterator[Row]:
        answers = generate_each(
            self.trained,
            [question for _, question in asked],
            self.sampling,
            template=self.template,
            batch_size=self.batch_size,
            numbers=[one.number for one, _ in asked],
        )
        for (one, _), answer in zip(asked, answers, strict=True):
            if isinstance(answer, ConversationError):
                yield {"question_id": one.id, "error": str(answer)}
            else:
                yield self._row(one, answer)

    def _row(self, asked: Asked, answer: Generated) -> Row:
        reference = {} if asked.reference is None else {"reference": asked.reference}
        settings = {name: value for name, value in self.settings.items() if name != "model_id"}
        length = {"finish_reason": answer.finish_reason, "prompt_tokens": answer.prompt_tokens}
        return {
            "question_id": asked.id,
            "prompt": asked.turns[-1]["value"],
            "text": answer.text,
            **reference,
            "model_id": self.name,
            "metadata": {**length, "new_tokens": len(answer.tokens), **settings},
        }


def id_of(record: Any, number: int) -> str | int:
    """The id that a record gives itself, or its number."""
    if isinstance(record, dict):
        for name in ID_KEYS:
            found = record.get(name)
            if isinstance(found, (str, int)) and not isinstance(found, bool):
                return found
    return number


def reopen(output: Path, settings: Row) -> set[str | int]:
    """The ids that have an answer in a file. Its other lines are removed: errors, and a last one that a crash cut.

    Raises ConfigError when it is not a file of answers with these settings, OSError. It is then left as it is.
    """
    if not output.exists():
        return set()
    kept: list[bytes] = []
    done: set[str | int] = set()
    place = ""
    try:
        for number, line in enumerate(checked.read_lines(output), 1):
            place = f" (line {number})"
            if (row := _answer_in(line)) is not None:
                _require_same(row, settings)
                kept.append((line or b"").rstrip(b"\n") + b"\n")
                done.add(row["question_id"])
    except ValueError as error:
        raise ConfigError(f"--output {output}{place} cannot be continued: {error}; give another file") from None
    replace_file(output, b"".join(kept))
    return done


def _answer_in(line: bytes | None) -> Row | None:
    """The answer in a line, None for an error and for what a crash cut. Raises ValueError for any other line."""
    try:
        row = json.loads(line or b"")
    except (ValueError, RecursionError):
        if line and not line.endswith(b"\n") and line[: len(LINE_START)] == LINE_START[: len(line)]:
            return None
        row = None
    if isinstance(row, dict) and isinstance(row.get("question_id"), (str, int)):
        if isinstance(row.get("metadata"), dict):
            return row
        if set(row) == {"question_id", "error"}:
            return None
    raise ValueError("it is not an answer that this command wrote")


def _require_same(row: Row, settings: Row) -> None:
    """Raises ValueError."""
    found = {"model_id": row.get("model_id"), **row["metadata"]}
    for name, value in json.loads(json.dumps(settings)).items():
        if found.get(name) != value:
            raise ValueError(
                f"it has answers with {name} {checked.shown(found.get(name))}, and now it is {checked.shown(value)}"
            )
