"""What a benchmark asks, what a model answered, and what was read from the answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeAlias

Prediction: TypeAlias = dict[str, Any]
"""One line of predictions.jsonl: {"id", "text", "finish_reason"}, {"id", "psnr", "ssim"}, or {"id", "bad": reason}."""

Scores: TypeAlias = dict[str, float]
"""Name of a score -> its value: shares in percent, PSNR in dB, SSIM up to 1."""


@dataclass(frozen=True)
class Item:
    """A question of a benchmark; without turns, a picture to reconstruct."""

    id: str
    turns: tuple[tuple[str, str], ...] = ()
    """(role, text) of a conversation in LLaVA's form that ends with the human's question."""
    pictures: tuple[Any, ...] = ()
    """Names in the folder of pictures, base64, or {"bytes"}, in the order of `<image>` in the turns."""
    answers: tuple[str, ...] = ()
    """Right answers, in the form in which answers are read."""
    options: tuple[tuple[str, str], ...] = ()
    """(letter, text) of a multiple choice."""
    category: str = ""
    """Scores are also given for each category."""
    group: str = ""
    """Items of a group are right only together, in benchmarks that count groups."""


@dataclass(frozen=True)
class Judged:
    """A prediction beside its item. `read` is None for an answer in which nothing was recognised, and a bad picture."""

    item: Item
    prediction: Prediction
    read: str | None = None

    @property
    def is_right(self) -> bool:
        return self.read is not None and self.read in self.item.answers

    @property
    def is_bad(self) -> bool:
        return "bad" in self.prediction


def percent(part: float, whole: float) -> float:
    """A share in percent; 0 of nothing, as VLMEvalKit counts precision without any yes."""
    return 100.0 * part / whole if whole else 0.0


def by_category(judged: Sequence[Judged]) -> dict[str, list[Judged]]:
    """The items of each category that has a name, sorted by it."""
    found: dict[str, list[Judged]] = {}
    for each in judged:
        if each.item.category:
            found.setdefault(each.item.category, []).append(each)
    return dict(sorted(found.items()))


def first_groups(items: Sequence[Item], least: int) -> list[Item]:
    """The items of the first whole groups, in order: at least so many, where there are."""
    sizes = Counter(item.group or item.id for item in items)  # in the order in which the groups begin
    before = dict(zip(sizes, accumulate(sizes.values(), initial=0)))
    return [item for item in items if before[item.group or item.id] < least]


def groups_of(judged: Sequence[Judged]) -> list[list[Judged]]:
    """The items of each group, in order."""
    found: dict[str, list[Judged]] = {}
    for each in judged:
        found.setdefault(each.item.group or each.item.id, []).append(each)
    return list(found.values())
