"""Texts of answers as their tokens come: stop texts, characters of several tokens, white space; wrong samplings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from ross_mcore import ConfigError, Sampling
from ross_mcore.data.spec import SampleSpec
from ross_mcore.data.tokenizer import load_tokenizer
from ross_mcore.generation import _Answer, _choose
from tests.recorded import GOLDEN

TEXT = "  One ü 猫😀, two\n\nthree. STOPPED  then STOP here "


@pytest.fixture(scope="module", params=["tok_qwen2", "tok_llama_legacyF"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return load_tokenizer(GOLDEN / "data" / request.param)


def said(tokenizer: Any, text: str, stop: Sequence[str] = (), cut: int = 0) -> tuple[list[str], _Answer]:
    """What is said at each token of a text, of which the last `cut` never come."""
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    tokens = tokens[: len(tokens) - cut]
    answer, pieces = _Answer(tokenizer, SampleSpec("qwen_2"), Sampling(len(tokens), stop=stop)), []
    while answer.finish_reason is None:
        pieces.append(answer.add(tokens[len(pieces)]))
    return pieces, answer


@pytest.mark.parametrize("stop", ["STOP ", "\n\nth", "猫", "😀,", "One", "e. S", "here", " ", "none of it"])
def test_nothing_is_said_that_a_stop_text_may_take_back(tokenizer: Any, stop: str) -> None:
    pieces, answer = said(tokenizer, TEXT, [stop, "never"])
    assert "".join(pieces) == answer.text.strip() == TEXT.partition(stop)[0].strip()
    assert answer.finish_reason == ("stop" if stop in TEXT else "length")


def test_a_piece_is_whole_characters(tokenizer: Any) -> None:
    pieces, _ = said(tokenizer, TEXT)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert sum(map(bool, pieces)) > 5, "most tokens are said at once"


def test_what_is_not_a_character_is_said_at_the_end(tokenizer: Any) -> None:
    pieces, answer = said(tokenizer, "猫", cut=1)
    assert answer.finish_reason == "length" and "".join(pieces).endswith("\N{REPLACEMENT CHARACTER}")
    assert not any(pieces[:-1])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected at least 1"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0}, "top_p is 0, expected above 0, at most 1"),
        ({"seed": 2**63}, "seed is .*64 bits"),
        ({"stop": "text"}, "stop is 'text', expected a list"),
        ({"stop": [""]}, "not empty"),
    ],
)
def test_a_wrong_sampling_is_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Sampling(**arguments)


@pytest.mark.parametrize("temperature", [5e-324, 1e-45, 1e-30])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_a_tiny_temperature_is_greedy(temperature: float, top_p: float) -> None:
    logits = torch.tensor([[-3.0, 40.0, 39.99], [1e-6, -1e4, 0.0]])
    for draw in (0.0, 0.999):
        chosen = _choose(logits, Sampling(temperature=temperature, top_p=top_p), torch.full((2,), draw))
        assert chosen.tolist() == [1, 0]
