"""Answers of a trained model: greedy or sampled, in batches or as a stream of text.

    model = ross_mcore.load_model("runs/finetune")
    asked = [ross_mcore.Question("<image>\\nWhat is it?", ["cat.jpg"])]
    ross_mcore.generate(model, asked, ross_mcore.Sampling(temperature=0.7, top_p=0.9, seed=1))[0].text
    for piece in ross_mcore.stream(model, asked[0]):
        print(piece, end="", flush=True)

Legend: n rows of a batch, V padded vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from ross_mcore import platform
from ross_mcore.batch import Sample
from ross_mcore.data.spec import SampleSpec
from ross_mcore.data.templates import TEMPLATES, answer_end, end_of_answer, with_template
from ross_mcore.errors import ConfigError, ConversationError
from ross_mcore.models import diffusion
from ross_mcore.models.cache import KeyValueCache
from ross_mcore.models.decoding import Decoder
from ross_mcore.trained import Question, TrainedModel, prompt_of, require_model, run, turns_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are chosen, and where it ends.

    temperature: 0 takes the most likely token (greedy), others divide the logits by it; top_p: tokens are drawn from
    the most likely ones whose probabilities reach this sum; stop: texts that end an answer and are not part of it. The
    draws of an answer depend on `seed` and on the number of its question only.
    Raises ConfigError for a value out of range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            raise ConfigError(f"stop is {self.stop!r}, expected a list of texts that are not empty")
        for name, good, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("seed", -(2**63) <= self.seed < 2**63, "64 bits"),
        ):
            if not good:
                raise ConfigError(f"{name} is {getattr(self, name)}, expected {expected}")


GREEDY = Sampling()
SMALLEST_TEMPERATURE = 1e-30
"""Lower ones compute as this one, which is greedy too: divided by less, float32 logits overflow to NaN."""


@dataclass(frozen=True)
class Generated:
    """An answer: its text without white space around it, and its token ids.

    tokens: without the one that ends an answer, but with those of a stop text; finish_reason: "stop" where the model or
    a stop text ended the answer, "length" where max_new_tokens did; prompt_tokens: with those of the pictures.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int


def generate(
    trained: TrainedModel,
    questions: Sequence[Question],
    sampling: Sampling = GREEDY,
    *,
    template: str | None = None,
    batch_size: int = 32,
    numbers: Sequence[int] | None = None,
) -> list[Generated]:
    """Answers to questions, in order, `batch_size` at a time.

    An answer ends at EOS, at the template's end of an answer, before a stop text or after max_new_tokens. `template` is
    a value of --template, by default that of the checkpoint's training. `numbers` of the questions, on which their
    draws depend, by default 0, 1, ...
    Raises ConversationError for a malformed question, one with too few pictures or one too long for the model, and
    ImageError for an unusable picture, all with the question's number; TokenizerError for a template that is unknown or
    does not fit; ConfigError for a batch_size below 1; OSError for an unreadable file.
    """
    require_model(trained)
    if isinstance(questions, (Question, str)):
        raise TypeError(f"questions is one {type(questions).__name__}, expected a list of Question")
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}, expected at least 1")
    spec = prompt_spec(trained, template)
    for number, question in enumerate(questions):  # checks all questions before the first answer
        turns_of(question, f"questions[{number}]")
    keys = range(len(questions)) if numbers is None else numbers
    done: list[Generated] = []
    for start in range(0, len(questions), batch_size):
        places = range(start, min(start + batch_size, len(questions)))
        prompts = [_prompt(trained, questions[place], spec, sampling, f"questions[{place}]") for place in places]
        answers = [_Answer(trained.tokenizer, spec, sampling) for _ in prompts]
        for _ in _run(trained, prompts, answers, sampling, [keys[place] for place in places]):
            pass
        done += [answer.generated(prompt) for answer, prompt in zip(answers, prompts, strict=True)]
    return done


def generate_each(
    trained: TrainedModel,
    questions: Sequence[Question],
    sampling: Sampling = GREEDY,
    *,
    template: str | None = None,
    batch_size: int = 32,
    numbers: Sequence[int] | None = None,
) -> list[Generated | ConversationError]:
    """As `generate`, with an error in the place of each question that the model cannot be asked."""
    keys = range(len(questions)) if numbers is None else numbers
    try:
        return [*generate(trained, questions, sampling, template=template, batch_size=batch_size, numbers=keys)]
    except ConversationError as error:  # which of the questions it is decides each alone
        if len(questions) == 1:
            return [ConversationError(str(error).removeprefix("questions[0]: "))]
    found: list[Generated | ConversationError] = []
    for question, key in zip(questions, keys, strict=True):
        found += generate_each(trained, [question], sampling, template=template, numbers=[key])
    return found


def stream(
    trained: TrainedModel, question: Question, sampling: Sampling = GREEDY, *, template: str | None = None
) -> Generator[str, None, Generated]:
    """The answer to one question as pieces of text, as they come; together they are the `text` of `generate`.

    There is one for every token: whole characters, never the start of what may become a stop text, or nothing yet. The
    generator's return value (the value of its StopIteration, or of `yield from`) is the Generated; closing it ends the
    work. Raises as `generate`, when called and not at the first piece.
    """
    require_model(trained)
    spec = prompt_spec(trained, template)
    prompt = _prompt(trained, question, spec, sampling, "question")
    return _stream(trained, prompt, _Answer(trained.tokenizer, spec, sampling), sampling)


def answer(
    trained: TrainedModel,
    questions: Sequence[Question],
    template: str | None = None,
    *,
    max_new_tokens: int = 16,
    batch_size: int = 32,
    stop: Sequence[str] = (),
) -> list[str]:
    """The texts of greedy answers, in order: `generate` with max_new_tokens and stop texts; raises as it does."""
    sampling = Sampling(max_new_tokens, stop=stop)
    return [one.text for one in generate(trained, questions, sampling, template=template, batch_size=batch_size)]


def _stream(
    trained: TrainedModel, prompt: Sample, answer: _Answer, sampling: Sampling
) -> Generator[str, None, Generated]:
    for _, piece in _run(trained, [prompt], [answer], sampling, [0]):
        yield piece
    return answer.generated(prompt)


def prompt_spec(trained: TrainedModel, template: str | None) -> SampleSpec:
    """The sample spec of the checkpoint's training, with another template where one is given. Raises TokenizerError."""
    if template is None:
        return trained.spec
    if template in TEMPLATES:
        return replace(trained.spec, template=template)
    return with_template(trained.spec, template, trained.tokenizer)


def _prompt(trained: TrainedModel, question: Question, spec: SampleSpec, sampling: Sampling, name: str) -> Sample:
    """Raises ConversationError where prompt and answer have more tokens than the model has positions."""
    prompt = prompt_of(trained, question, spec, name)
    tokens, positions = prompt.tokens.numel(), trained.config.language.max_position_embeddings
    if tokens + sampling.max_new_tokens > positions:
        raise ConversationError(
            f"{name}: a prompt of {tokens} tokens and max_new_tokens {sampling.max_new_tokens} are more than the "
            f"model's {positions} positions; shorten the conversation or lower max_new_tokens"
        )
    return prompt


class _Answer:
    """The tokens of one answer as they are chosen, and their text as far as it is certain."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, spec: SampleSpec, sampling: Sampling) -> None:
        self.tokenizer, self.limit = tokenizer, sampling.max_new_tokens
        added = tokenizer.get_added_vocab()
        self.ends = {tokenizer.eos_token_id, *(added[text] for text in sampling.stop if text in added)}
        end = end_of_answer(spec, tokenizer)
        self.stops = list(sampling.stop)
        if end is not None:
            self.ends.add(end)
        elif text := answer_end(spec, tokenizer):
            self.stops.append(text)
        self.tokens: list[int] = []
        self.decoded = self.window = 0
        self.text, self.sent = "", 0
        self.finish_reason: Literal["stop", "length"] | None = None

    def add(self, token: int) -> str:
        """Takes the next token; returns the text that has become certain, all of the rest when the answer ends."""
        if token in self.ends:
            self.finish_reason = "stop"
            return self._certain()
        self.tokens.append(token)
        if len(self.tokens) == self.limit:
            self.finish_reason = "length"
        return self._certain()

    def _certain(self) -> str:
        self.text += self._decode()
        found = [place for stop in self.stops if (place := self.text.find(stop, self.sent)) >= 0]
        if found:
            self.finish_reason, self.text = "stop", self.text[: min(found)]
        unsent = self.text[self.sent :]
        if self.finish_reason is None:
            held = max((_overlap(unsent, stop) for stop in self.stops), default=0)
            unsent = unsent[: len(unsent) - held]
        unsent = unsent.rstrip()  # sent before what follows, if anything does
        first, self.sent = self.sent == 0, self.sent + len(unsent)
        return unsent.lstrip() if first else unsent

    def _decode(self) -> str:
        """The text of the tokens behind those decoded before, "" while its last character is not whole.

        Some tokenizers write a token in another way at the start of a text, so tokens before it are decoded too.
        """
        known = self._text_of(self.tokens[self.window : self.decoded])
        text = self._text_of(self.tokens[self.window :])
        is_whole = not text.endswith("\N{REPLACEMENT CHARACTER}") or self.finish_reason is not None
        if not is_whole or len(text) <= len(known):
            return ""
        self.window, self.decoded = self.decoded, len(self.tokens)
        return text[len(known) :]

    def _text_of(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def generated(self, prompt: Sample) -> Generated:
        text, reason = self.text.strip(), self.finish_reason or "length"
        return Generated(text, tuple(self.tokens), reason, prompt.tokens.numel())


def _overlap(text: str, stop: str) -> int:
    """Number of characters at the end of `text` that are the start of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)


@torch.inference_mode()
def _run(
    trained: TrainedModel, prompts: list[Sample], answers: list[_Answer], sampling: Sampling, numbers: list[int]
) -> Iterator[tuple[int, str]]:
    """Adds tokens to the answers until all are finished; yields (number of an answer, what it says) for each token.

    The prompts run once; then each step runs the newest token of every row that is not finished. It waits for the
    device once, to read the tokens.
    """
    language, draws = trained.model.language_model, _uniform(sampling, numbers)
    lengths = [prompt.tokens.numel() for prompt in prompts]
    cache = KeyValueCache(lengths, sampling.max_new_tokens - 1)
    batch, hidden = run(trained, prompts, cache)
    decode = Decoder(language, cache)
    states = hidden[platform.upload(batch.sample_starts + torch.tensor(lengths) - 1, hidden.device), 0]
    rows = list(range(len(prompts)))
    for step in range(sampling.max_new_tokens):
        tokens = _choose(language.logits(states), sampling, None if draws is None else draws[:, step])
        for row, token in zip(rows, tokens.tolist(), strict=True):
            yield row, answers[row].add(token)
        unfinished = [place for place, row in enumerate(rows) if answers[row].finish_reason is None]
        if not unfinished:
            return
        if len(unfinished) < len(rows):
            order = cache.keep(unfinished)
            rows, tokens = [rows[place] for place in order], tokens[order]
            draws = None if draws is None else draws[order]
        states = decode(tokens)


def _uniform(sampling: Sampling, numbers: list[int]) -> Tensor | None:
    """Draws from [0, 1) for every new token of every row, [n, max_new_tokens] float32; None where none are needed."""
    if sampling.temperature == 0:
        return None
    generators = [torch.Generator().manual_seed(diffusion.draw_seed(sampling.seed, number, 0)) for number in numbers]
    draws = torch.stack([torch.rand(sampling.max_new_tokens, generator=generator) for generator in generators])
    return platform.upload(draws, platform.device())


def _choose(logits: Tensor, sampling: Sampling, draws: Tensor | None) -> Tensor:
    """logits [n, V], draws [n] -> the next token of every row [n], without waiting for the device."""
    if draws is None:
        return logits.argmax(-1)
    probabilities = (logits.float() / max(sampling.temperature, SMALLEST_TEMPERATURE)).softmax(-1)
    if sampling.top_p == 1:
        sums = probabilities.cumsum(-1)
        total = sums[:, -1:]
        return torch.searchsorted(sums, draws[:, None] * total, right=True).clamp(max=sums.shape[-1] - 1).squeeze(1)
    probabilities, order = probabilities.sort(-1, descending=True)
    sums = probabilities.cumsum(-1)
    last = (sums - probabilities < sampling.top_p).sum(-1, keepdim=True) - 1
    place = torch.searchsorted(sums, draws[:, None] * sums.gather(-1, last), right=True).minimum(last)
    return order.gather(-1, place).squeeze(1)
