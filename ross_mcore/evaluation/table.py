"""The TABLE of benchmarks: how each is read, asked, answered and scored. Adding one adds a row and a test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ross_mcore.evaluation import answers, questions, scores
from ross_mcore.evaluation.items import Item, Judged, Prediction, Scores
from ross_mcore.evaluation.questions import Asking

WORD = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTER_CHINESE = "请直接回答选项字母。"  # noqa: RUF001  full-width punctuation


@dataclass(frozen=True)
class Benchmark:
    """One row of the table."""

    data: str
    """What --data is."""
    read_items: Callable[[Path, Asking], list[Item]]
    score: Callable[[Sequence[Judged]], Scores]
    """Scores of judged items; the first is the one that is usually quoted."""
    read_answer: Callable[[str, Item], str | None] = answers.as_written
    suffix: str = ""
    """A last line of every question, as the reference asks."""
    chinese_suffix: str = ""
    max_new_tokens: int = 128
    makes: Literal["answers", "reconstructions"] = "answers"
    needs: str | None = None
    """A package that the score needs, of the extra `eval`."""

    def judge(self, items: Sequence[Item], predictions: dict[str, Prediction]) -> list[Judged]:
        """What was read from every prediction."""
        judged = []
        for item in items:
            prediction = predictions[item.id]
            text = prediction.get("text")
            judged.append(Judged(item, prediction, None if text is None else self.read_answer(text, item)))
        return judged


BENCHMARKS = {
    "pope": Benchmark(
        data="a folder with coco_pope_random.json, _popular, _adversarial, or one of them",
        read_items=questions.pope,
        score=scores.yes_no,
        read_answer=answers.first_sentence_yes_no,
        suffix=WORD,
    ),
    "mmvp": Benchmark(
        data="the folder with Questions.csv and `MMVP Images`",
        read_items=questions.mmvp,
        score=scores.pairs,
        read_answer=answers.mmvp_answer,
        suffix=LETTER,
        max_new_tokens=16,
    ),
    "mme": Benchmark(
        data="MME.tsv: two yes/no questions about every picture",
        read_items=questions.mme_rows,
        score=scores.mme,
        read_answer=answers.yes_or_no,
        suffix=WORD,
    ),
    "mmbench": Benchmark(
        data="a TSV of MMBench with the rotations of every question",
        read_items=questions.choice_rows,
        score=scores.circular,
        read_answer=answers.option_letter,
        suffix=LETTER,
        chinese_suffix=LETTER_CHINESE,
    ),
    "multiple-choice": Benchmark(
        data="a table with question, A, B, C ..., answer",
        read_items=questions.choice_rows,
        score=scores.accuracy,
        read_answer=answers.option_letter,
        suffix=LETTER,
        chinese_suffix=LETTER_CHINESE,
    ),
    "yes-no": Benchmark(
        data="a table with question and answer, yes or no",
        read_items=questions.yes_no_rows,
        score=scores.yes_no,
        read_answer=answers.yes_or_no,
        suffix=WORD,
    ),
    "short-answer": Benchmark(
        data="a table with question and answer, or conversations",
        read_items=questions.short_answer_rows,
        score=scores.accuracy,
        read_answer=answers.short_answer,
    ),
    "caption": Benchmark(
        data="a table with question and answer (one caption or a list), or conversations",
        read_items=questions.text_rows,
        score=scores.captions,
        needs="sacrebleu",
    ),
    "reconstruction": Benchmark(
        data="a folder of pictures, or a table with a column image",
        read_items=questions.pictures,
        score=scores.fidelity,
        makes="reconstructions",
    ),
}
"""Name -> benchmark."""
