"""Scores of hand-made predictions, worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from ross_mcore.evaluation.items import Item, Judged, Prediction
from ross_mcore.evaluation.table import BENCHMARKS


def judged(name: str, *rows: tuple[str, str | None, str, str]) -> list[Judged]:
    """Rows of (right answer, text or None for a bad picture, category, group)."""
    options = tuple(zip("ABCD", ("one", "two", "three", "four"), strict=True))
    items = [Item(str(n), (("human", "?"),), (), (row[0],), options, row[2], row[3]) for n, row in enumerate(rows)]
    predictions: dict[str, Prediction] = {
        item.id: {"id": item.id, "bad": "damaged"} if row[1] is None else {"id": item.id, "text": row[1]}
        for item, row in zip(items, rows, strict=True)
    }
    return BENCHMARKS[name].judge(items, predictions)


def plain(name: str, pairs: Sequence[tuple[str, str | None]]) -> dict[str, float]:
    return BENCHMARKS[name].score(judged(name, *((right, text, "", "") for right, text in pairs)))


def test_pope() -> None:
    """3 true yes, 1 false yes, 2 true no, 2 false no: accuracy 5/8, precision 3/4, recall 3/5, F1 2/3."""
    said = [("yes", "Yes")] * 3 + [("no", "Yes, there is.")] + [("no", "No")] * 2 + [("yes", "There is not")] * 2
    expected = {"accuracy": 62.5, "precision": 75, "recall": 60, "F1": 100 * 2 / 3, "yes ratio": 50}
    assert plain("pope", said) == pytest.approx(expected)
    with_bad = plain("pope", [*said, ("no", None), ("yes", None)])
    assert with_bad == pytest.approx({"accuracy": 50, "precision": 75, "recall": 50, "F1": 60, "yes ratio": 40})
    assert plain("pope", [("no", "no")])["F1"] == 0


def test_answers_that_are_neither_yes_nor_no_are_wrong() -> None:
    scores = plain("yes-no", [("yes", "yes"), ("no", "perhaps"), ("no", "no"), ("yes", "both yes and no")])
    assert scores["accuracy"] == 50 and scores["recall"] == 50 and scores["yes ratio"] == 25


def test_mmvp_counts_pairs() -> None:
    """Of three pairs one is right as a whole; four of six answers are right."""
    rows = [("a", "(a)"), ("b", "B"), ("a", "a"), ("b", "a"), ("b", "b."), ("a", None)]
    score = BENCHMARKS["mmvp"].score(judged("mmvp", *((r, t, "", str(n // 2)) for n, (r, t) in enumerate(rows))))
    assert score == pytest.approx({"pair accuracy": 100 / 3, "accuracy": 100 * 4 / 6})


def test_mmbench_counts_questions_that_are_right_in_every_order() -> None:
    rows = [("A", "A", "q1"), ("B", "B", "q1"), ("A", "A", "q2"), ("B", "A", "q2"), ("C", "three", "q3")]
    found = judged("mmbench", *((right, text, "", group) for right, text, group in rows))
    assert BENCHMARKS["mmbench"].score(found) == pytest.approx({"circular accuracy": 100 * 2 / 3, "accuracy": 80})


def test_mme_adds_accuracy_and_pairs_of_every_subtask() -> None:
    """count: 3 of 4 answers and 1 of 2 pictures; text_translation: 1 of 2 answers and no picture."""
    rows = [("yes", "Yes", "count", "1"), ("no", "No", "count", "1"), ("yes", "Yes", "count", "2")]
    rows += [("no", "Yes", "count", "2"), ("yes", "Yes", "text_translation", "3")]
    found = judged("mme", *rows, ("no", None, "text_translation", "3"))
    score = BENCHMARKS["mme"].score(found)
    assert score == pytest.approx(
        {"accuracy": 100 * 4 / 6, "accuracy+": 100 / 3, "score": 175, "perception": 125, "cognition": 50}
    )


def test_short_answers_and_choices() -> None:
    assert plain("short-answer", [("two", "Two."), ("red", "blue"), ("red", None)]) == {"accuracy": 100 / 3}
    assert plain("multiple-choice", [("A", "A"), ("B", "(B)"), ("C", "D"), ("D", "none")]) == {"accuracy": 50}


def test_captions() -> None:
    """Equal captions have 100; BLEU-4 of `a b c d` for `a b c d e` is its brevity penalty, exp(1 - 5/4)."""
    same = plain("caption", [("two red circles on white", "two red circles on white")])
    assert same == pytest.approx({"BLEU-4": 100, "chrF": 100, "exact": 100})
    shorter = plain("caption", [("a b c d e", "a b c d")])
    assert shorter["BLEU-4"] == pytest.approx(77.8800783) and shorter["exact"] == 0
    items = [Item("1", answers=("a b c d e", "v w x y z")), Item("2", answers=("one two three four",))]
    texts = {"1": {"id": "1", "text": "v w x y z"}, "2": {"id": "2", "text": "one two three four"}}
    several = BENCHMARKS["caption"].score(BENCHMARKS["caption"].judge(items, texts))
    assert several["BLEU-4"] == pytest.approx(100) and several["exact"] == 100


def test_bad_pictures_are_left_out_of_reconstructions() -> None:
    items = [Item("1"), Item("2"), Item("3")]
    made: list[Prediction] = [{"id": "1", "psnr": 20.0, "ssim": 0.5}, {"id": "2", "bad": "damaged"}]
    made.append({"id": "3", "psnr": 24.0, "ssim": 0.7})
    row = BENCHMARKS["reconstruction"]
    assert row.score(row.judge(items, {each["id"]: each for each in made})) == {"PSNR": 22, "SSIM": pytest.approx(0.6)}
