"""Greedy answers of the model in training to questions of held-out samples, through its pipeline at any layout.

Every new token computes all rows again, as a step without a gradient: at most MOST_NEW_TOKENS passes over the
--eval-answers rows at each --eval-interval.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ross_mcore.batch import IGNORE_INDEX, Sample
from ross_mcore.data.sources import MixtureDataset
from ross_mcore.data.templates import end_of_answer
from ross_mcore.data.workers import Interrupted
from ross_mcore.engine.engine import Engine
from ross_mcore.engine.progress import at
from ross_mcore.engine.step import AgreedStep, samples_of
from ross_mcore.parallel.collectives import any_rank, gather
from ross_mcore.reporting.metrics import SampleAnswer
from ross_mcore.training.reconstruction import SEARCHED_SAMPLES, read_samples

MOST_NEW_TOKENS = 24
MOST_CHARACTERS = 1000
"""Of a question in the report."""


@dataclass
class _Question:
    """A sample whose tokens are cut before its first answer, and what was answered. ends: tokens that end an answer."""

    sample: Sample
    text: str
    expected: str
    ends: set[int | None]
    new: list[int] = field(default_factory=list)
    is_answered: bool = False


@torch.no_grad()
def sample_answers(
    engine: Engine, dataset: MixtureDataset, iteration: int, is_stopping: Callable[[], bool] = lambda: False
) -> list[SampleAnswer]:
    """Answers to the first questions about a picture, on ranks of the last stage; [] on others. Collective.

    Asks the first --eval-answers samples from the first picture on, in the order of the shards; those whose first
    answer comes before a picture are left out. Raises Interrupted on every rank when `is_stopping` on any.
    """
    at("answers", is_long=True)
    first = dataset.first_picture(SEARCHED_SAMPLES)
    if first is None:
        return []
    count = engine.config.logging.eval_answers
    step = read_samples(engine, dataset, first, count, is_stopping)
    if step.size.interrupted:
        raise Interrupted
    samples = samples_of(step.loaded.micro_batches or [])
    asked = {
        number: question
        for number, sample in enumerate(samples[:count])
        if (question := _question(sample, dataset, engine.model_config.vision.image_tokens)) is not None
    }
    engine.model.eval()
    try:
        for _ in range(MOST_NEW_TOKENS):
            at("answers", is_long=True)
            if any_rank(is_stopping(), engine.device):
                raise Interrupted
            step = replace(step, size=engine.agree(step.loaded).size)
            tokens = _next_tokens(engine, step, asked)
            for number, token in tokens.items():
                if number in asked:
                    _add(asked[number], token)
            if not any_rank(any(not question.is_answered for question in asked.values()), engine.device):
                break
    finally:
        engine.model.train()
    return [_described(question, dataset, iteration) for question in asked.values()]


def _question(sample: Sample, dataset: MixtureDataset, image_tokens: int) -> _Question | None:
    """Cuts a sample before its first answer; None when it has none, or no picture, or a picture after it."""
    labels = sample.labels.tolist()
    begin = next((place for place, label in enumerate(labels) if label != IGNORE_INDEX), 0)
    if sample.problem is not None or not begin or not sample.image_starts or max(sample.image_starts) >= begin:
        return None
    end = next((place for place in range(begin, len(labels)) if labels[place] == IGNORE_INDEX), len(labels))
    part = dataset.parts[sample.source]
    is_text = torch.ones(begin, dtype=torch.bool)
    for start in sample.image_starts:
        is_text[start : start + image_tokens] = False
    question, expected = (
        str(part.tokenizer.decode(ids, skip_special_tokens=True)).strip()
        for ids in (sample.tokens[:begin][is_text].tolist(), labels[begin:end])
    )
    sample.tokens, sample.labels = sample.tokens[:begin], torch.full((begin,), IGNORE_INDEX)
    ends = {part.tokenizer.eos_token_id, end_of_answer(part.spec, part.tokenizer)}
    return _Question(sample, question[:MOST_CHARACTERS], expected[:MOST_CHARACTERS], ends)


def _next_tokens(engine: Engine, step: AgreedStep, asked: dict[int, _Question]) -> dict[int, int]:
    """The most likely next token of every question, by its number, on all ranks."""
    hidden, groups = engine.hidden(step), engine.groups
    best: dict[int, tuple[float, int]] = {}
    for number, states in enumerate(hidden):
        length, rows = step.size.seq_lengths[number], step.size.rows
        mine = [place for place in range(rows) if number * rows + place in asked]
        if not mine:
            continue
        questions = [number * rows + place for place in mine]
        last = [place * length + asked[q].sample.tokens.numel() - 1 for place, q in zip(mine, questions, strict=True)]
        logits: Tensor = engine.model.last.language_model.logits(states[last, 0]).float()
        values, tokens = logits.max(-1)
        first = groups.tensor_rank * logits.shape[-1]
        best |= {
            question: (value, -(first + token))
            for question, value, token in zip(questions, values.tolist(), tokens.tolist(), strict=True)
        }
    everyone = gather(best if groups.data_rank == 0 else {})
    merged: dict[int, tuple[float, int]] = {}
    for found in everyone:  # each has the columns of the vocabulary of one tensor-parallel rank
        merged |= {question: max(pair, merged.get(question, pair)) for question, pair in found.items()}
    return {question: -negative for question, (_, negative) in merged.items()}


def _add(question: _Question, token: int) -> None:
    if question.is_answered or token in question.ends:
        question.is_answered = True
        return
    question.new.append(token)
    sample = question.sample
    sample.tokens = torch.cat([sample.tokens, torch.tensor([token])])
    sample.labels = torch.full_like(sample.tokens, IGNORE_INDEX)


def _described(question: _Question, dataset: MixtureDataset, iteration: int) -> SampleAnswer:
    source = question.sample.source
    answer = str(dataset.parts[source].tokenizer.decode(question.new, skip_special_tokens=True)).strip()
    key = question.sample.key
    return SampleAnswer(iteration, dataset.names[source], key, question.text, question.expected, answer)
