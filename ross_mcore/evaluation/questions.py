"""Reads the questions of benchmarks: the public files of POPE and MMVP, tables, and records of conversations.

A table is TSV, CSV or any file of records that make-shards reads. Its rows have `question` (or text), `answer` (or
label), `image` (a name or base64), and optionally index (or id, question_id), hint, A, B, C ... and a category.
All functions raise RecordsError naming the file, the row and the remedy.
"""

from __future__ import annotations

import ast
import csv
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from ross_mcore import checked
from ross_mcore.data.conversation import IMAGE_PLACEHOLDER
from ross_mcore.data.records import PICTURE_SUFFIXES, has_turns, normalise, picture_names
from ross_mcore.data.shard_reader import MAX_IMAGE_BYTES
from ross_mcore.errors import ConversationError, RecordsError, SampleError
from ross_mcore.evaluation.answers import NO, YES, short_answer
from ross_mcore.evaluation.items import Item
from ross_mcore.shards.files import read_records

MOST_TABLE_BYTES = 4 << 30
MOST_ITEMS = 1_000_000
BLANK = ("", "nan", "none")
"""Cells without a value (LLaVA's model_vqa_mmbench.py:is_none)."""
CHINESE = re.compile("[\u4e00-\u9fff]")
ID_KEYS, QUESTION_KEYS, ANSWER_KEYS = ("index", "id", "question_id"), ("question", "text"), ("answer", "label")
PICTURE_KEYS = ("image", "image_path")
ROTATED = 1_000_000
"""MMBench numbers the same question with another order of options index + 1,000,000, + 2,000,000 ..."""
MMVP_QUESTIONS, MMVP_PICTURES = "Questions.csv", "MMVP Images"

Row = dict[str, Any]


@dataclass(frozen=True)
class Asking:
    """How rows become questions."""

    suffix: str = ""
    """A last line of every question."""
    chinese_suffix: str = ""
    """Takes its place for questions in Chinese."""
    category_key: str = "category"

    def turn(self, question: str, has_picture: bool) -> tuple[str, str]:
        """The human's turn, with the picture before the question, as in LLaVA."""
        suffix = self.chinese_suffix if self.chinese_suffix and CHINESE.search(question) else self.suffix
        text = question if not suffix or question.endswith(suffix) else f"{question}\n{suffix}"
        return "human", f"{IMAGE_PLACEHOLDER}\n{text}" if has_picture else text


# -------------------------------------------------------------------------------------------------------------- files


def read_rows(path: Path) -> list[Row]:
    """The rows of a table, at most MOST_ITEMS."""
    is_table = path.suffix.lower() in (".tsv", ".csv")
    rows: list[Row] = []
    for number, row in enumerate(_table(path) if is_table else read_records(path)[1], 1):
        if isinstance(row, SampleError) or not isinstance(row, dict):
            raise _wrong(path, number, f"{row if isinstance(row, SampleError) else 'it is not an object'}")
        if number > MOST_ITEMS:
            raise RecordsError(f"{path} has over {MOST_ITEMS} rows; split it")
        rows.append(row)
    if not rows:
        raise RecordsError(f"{path} has no rows; give a file with questions")
    return rows


def _table(path: Path) -> Iterator[Row]:
    """The rows of a TSV or CSV file with a header."""
    csv.field_size_limit(MAX_IMAGE_BYTES * 4 // 3 + 4)  # of this process; csv's own limit is below a picture
    try:
        checked.require_regular(path, MOST_TABLE_BYTES)
        with path.open(encoding="utf-8-sig", newline="") as stream:
            for number, row in enumerate(csv.DictReader(stream, delimiter=_delimiter(path)), 1):
                if None in row:
                    raise _wrong(path, number, "it has more cells than the header")
                yield row
    except FileNotFoundError:
        raise RecordsError(f"{path} does not exist; give the benchmark's file (nothing is downloaded)") from None
    except RecordsError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise RecordsError(f"{path} cannot be read: {checked.reason(error)}; download it again") from None


def _delimiter(path: Path) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else ","


def _wrong(path: Path, number: int, problem: str) -> RecordsError:
    return RecordsError(f"{path}, row {number}: {problem}; mend or remove this row")


def _cell(row: Row, keys: Sequence[str]) -> str | None:
    """The first of the cells with a value, as text."""
    for key in keys:
        value = row.get(key)
        if isinstance(value, (str, int, float)) and str(value).strip().lower() not in BLANK:
            return str(value)
    return None


def _items(path: Path, rows: Sequence[Row], make: Callable[[Row, str], list[Item]]) -> list[Item]:
    """The items of rows, with ids that occur once."""
    items: list[Item] = []
    for number, row in enumerate(rows, 1):
        try:
            items += make(row, _cell(row, ID_KEYS) or str(number))
        except (ValueError, ConversationError) as error:
            raise _wrong(path, number, str(error)) from None
    seen: set[str] = set()
    for item in items:
        if item.id in seen:
            raise RecordsError(f"{path} has the id {checked.shown(item.id)} twice; number its rows")
        seen.add(item.id)
    return items


def _pictures(row: Row) -> tuple[Any, ...]:
    for key in PICTURE_KEYS:
        value = row.get(key)
        if isinstance(value, dict) or (isinstance(value, str) and value.strip().lower() not in BLANK):
            return (value,)
        if isinstance(value, list):
            raise ValueError(f"{key} is a list of pictures; questions about one picture are asked")
    return ()


def _question(row: Row) -> str:
    question = _cell(row, QUESTION_KEYS)
    if question is None:
        raise ValueError("it has no question")
    return question.replace(IMAGE_PLACEHOLDER, "").strip()


def _answer(row: Row) -> str:
    answer = _cell(row, ANSWER_KEYS)
    if answer is None:
        raise ValueError("it has no answer")
    return answer.strip()


def _yes_or_no(row: Row) -> str:
    answer = _answer(row).lower()
    if answer not in (YES, NO):
        raise ValueError(f"its answer is {checked.shown(answer)}, expected yes or no")
    return answer


def _with_referred_pictures(rows: list[Row]) -> list[Row]:
    """Rows whose image is the index of another row get that row's image, as in MMBench's files."""
    images = {str(row.get("index")): row.get("image") for row in rows if row.get("index") is not None}
    return [{**row, "image": images.get(str(row.get("image")), row.get("image"))} for row in rows]


# --------------------------------------------------------------------------------------------------------- benchmarks


def pope(path: Path, asking: Asking) -> list[Item]:
    """POPE's coco_pope_random.json, _popular, _adversarial, or the folder with them: a category for each file."""
    files = sorted(path.glob("*_pope_*.json")) if path.is_dir() else [path]
    if not files:
        raise RecordsError(f"{path} has no file like coco_pope_random.json; give the folder that has them")
    items: list[Item] = []
    for file in files:
        category = file.stem.rpartition("_pope_")[2]

        def make(row: Row, name: str, category: str = category) -> list[Item]:
            pictures = _pictures(row)
            turn = asking.turn(_question(row), bool(pictures))
            return [Item(f"{category}/{name}", (turn,), pictures, (_yes_or_no(row),), category=category)]

        items += _items(file, read_rows(file), make)
    return items


def mmvp(path: Path, asking: Asking) -> list[Item]:
    """MMVP's folder, with Questions.csv; two rows are a pair. Asked as in ROSS's evaluation/MMVP/mmvp_eval.py."""
    file = path / MMVP_QUESTIONS
    rows = [list(row.values()) for row in read_rows(file)]

    def make(cells: Row, name: str) -> list[Item]:
        number, question, options, answer = (str(cells["cells"][place] or "") for place in range(4))
        texts = [part.partition(")")[2].strip() for part in options.split("(")[1:]]
        letter = answer.strip().lower()[1:2]
        if not number.isdigit() or letter not in ("a", "b") or len(texts) != 2:
            raise ValueError(f"{checked.shown(answer)} of {checked.shown(options)} is not (a) or (b) of two options")
        asked = f"{question} Options:\nA. {texts[0]}\nB. {texts[1]}"
        answers = (letter, texts[ord(letter) - ord("a")].lower())
        pair = str((int(number) - 1) // 2)
        picture = f"{MMVP_PICTURES}/{number}.jpg"
        return [Item(number, (asking.turn(asked, True),), (picture,), answers, group=pair)]

    if len(rows[0]) < 4:
        raise RecordsError(f"{file} has {len(rows[0])} columns, expected the number, Question, Options, Correct Answer")
    return _items(file, [{"cells": cells, "id": cells[0]} for cells in rows], make)


def yes_no_rows(path: Path, asking: Asking) -> list[Item]:
    """A table whose answers are yes or no."""
    return [replace(item, group="") for item in _yes_no_by_picture(path, asking)]


def _yes_no_by_picture(path: Path, asking: Asking) -> list[Item]:
    """The questions about one picture are a group."""

    def make(row: Row, name: str) -> list[Item]:
        pictures, category = _pictures(row), _cell(row, [asking.category_key]) or ""
        turn = asking.turn(_question(row), bool(pictures))
        group = f"{category}/{_cell(row, ['image_path', 'image'])}"
        return [Item(name, (turn,), pictures, (_yes_or_no(row),), category=category, group=group)]

    return _items(path, _with_referred_pictures(read_rows(path)), make)


def mme_rows(path: Path, asking: Asking) -> list[Item]:
    """MME's table: two yes/no questions about every picture."""
    items = _yes_no_by_picture(path, asking)
    counts: dict[str, int] = {}
    for item in items:
        counts[item.group] = counts.get(item.group, 0) + 1
    if odd := next((group for group, count in counts.items() if count != 2), None):
        raise RecordsError(f"{path} has {counts[odd]} questions about {checked.shown(odd)}, and MME has 2 a picture")
    return items


def choice_rows(path: Path, asking: Asking) -> list[Item]:
    """A table of multiple choices (MMBench and others), asked as in ROSS's copy of VLMEvalKit (vlm/ross.py).

    The same question with its options in another order is of its group, see ROTATED.
    """

    def make(row: Row, name: str) -> list[Item]:
        pictures, question, hint = _pictures(row), _question(row), _cell(row, ["hint"])
        options = tuple(_options(row))
        answer = _answer(row)
        letter = answer if answer in dict(options) else {text: letter for letter, text in options}.get(answer)
        if letter is None:
            raise ValueError(f"its answer is {checked.shown(answer)}, which is none of its {len(options)} options")
        lines = [*([hint] if hint else []), question, *(f"{letter}. {text}" for letter, text in options)]
        group = str(int(name) % ROTATED) if name.isdigit() else name
        category = _cell(row, [asking.category_key]) or ""
        turn = asking.turn("\n".join(lines), bool(pictures))
        return [Item(name, (turn,), pictures, (letter,), options, category, group)]

    return _items(path, _with_referred_pictures(read_rows(path)), make)


def _options(row: Row) -> Iterator[tuple[str, str]]:
    """(letter, text) of the options, up to the first without text."""
    given = row.get("options")
    texts = given if isinstance(given, list) else [row.get(letter) for letter in ascii_uppercase]
    for letter, text in zip(ascii_uppercase, texts):
        if (cell := _cell({"": text}, [""])) is None:
            return
        yield letter, cell.strip()


def text_rows(path: Path, asking: Asking) -> list[Item]:
    """A table of questions with one right answer, or a list of them; or conversations, of which every round is asked
    after the rounds before it."""

    def make(row: Row, name: str) -> list[Item]:
        category = _cell(row, [asking.category_key]) or ""
        if has_turns(row):
            return list(_rounds(normalise(row), name, category, asking))
        pictures, given = _pictures(row), row.get("answer", row.get("answers"))
        answers = [str(each).strip() for each in given] if isinstance(given, list) else _listed(_answer(row))
        if not answers:
            raise ValueError("it has no answer")
        turn = asking.turn(_question(row), bool(pictures))
        return [Item(name, (turn,), pictures, tuple(answers), category=category)]

    return _items(path, _with_referred_pictures(read_rows(path)), make)


def short_answer_rows(path: Path, asking: Asking) -> list[Item]:
    """`text_rows` with answers in the form in which answers are read."""
    return [
        Item(item.id, item.turns, item.pictures, tuple(map(short_answer, item.answers)), category=item.category)
        for item in text_rows(path, asking)
    ]


def _listed(answer: str) -> list[str]:
    """The answers in a cell: one, or several in a list as Python or JSON writes it (VLMEvalKit's COCO_VAL.tsv)."""
    if not answer.startswith("["):
        return [answer]
    try:
        found = ast.literal_eval(answer)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return [answer]
    return [str(each).strip() for each in found] if isinstance(found, list) else [answer]


def _rounds(record: Row, name: str, category: str, asking: Asking) -> Iterator[Item]:
    pictures = tuple(picture_names(record))
    turns = [(turn["from"], turn["value"]) for turn in record["conversations"]]
    are_placed = any(IMAGE_PLACEHOLDER in text for _, text in turns)
    roles = [role for role, _ in turns]
    ends = [place for place in range(1, len(roles)) if roles[place - 1 : place + 1] == ["human", "gpt"]]
    if not ends:
        raise ValueError("it has no question with an answer")
    for number, end in enumerate(ends):
        question = turns[end - 1][1]
        asked = question if not asking.suffix or question.endswith(asking.suffix) else f"{question}\n{asking.suffix}"
        before = (*turns[: end - 1], ("human", asked))
        shown = sum(text.count(IMAGE_PLACEHOLDER) for _, text in before)
        identity = name if len(ends) == 1 else f"{name}/{number + 1}"
        seen = pictures[:shown] if are_placed else pictures
        yield Item(identity, before, seen, (turns[end][1].strip(),), category=category)


def pictures(path: Path, asking: Asking) -> list[Item]:
    """The pictures of a folder, or those that a table names, each once."""
    if path.is_dir():
        names = [str(file.relative_to(path)) for file in sorted(path.rglob("*")) if _is_picture(file)]
        found: list[tuple[Any, ...]] = [(name,) for name in names]
    else:
        rows = _with_referred_pictures(read_rows(path))
        found = list(dict.fromkeys(each for row in rows if isinstance((each := _pictures(row) or ("",))[0], str)))
        found = [each for each in found if each[0]]
    if not found:
        raise RecordsError(f"{path} has no pictures; give a folder of pictures, or a table with a column image")
    return [Item(each[0] if len(each[0]) < 200 else str(number), pictures=each) for number, each in enumerate(found, 1)]


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in PICTURE_SUFFIXES and path.is_file()
