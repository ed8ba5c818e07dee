"""Generated tokens: those of transformers' `generate` with the same weights, and of the model without a cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import ross_mcore
from ross_mcore import Generated, Question, Sampling, TrainedModel
from ross_mcore.batch import collate
from ross_mcore.commands import chat
from ross_mcore.generation import _choose
from ross_mcore.trained import prompt_of, run
from tests.recorded import FAMILIES, GOLDEN, read_json, recorded_checkpoint

PICTURES = [GOLDEN / "data" / "images" / f"img{number}.png" for number in (0, 1)]
ASKED = [
    Question("<image>\nWhat is it?", PICTURES[:1]),
    Question("How many of them are there, and where do they stand, if one counts from the left?"),
    Question("Is <image> like <image> ?", PICTURES),
    Question("Why?"),
    Question(
        [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "He."}, {"from": "human", "value": "When?"}]
    ),
]
TEMPLATE, TOKENS = {"qwen2_siglip": "qwen_2", "llama_clip": "v1"}, 24
SAMPLED = Sampling(TOKENS, temperature=1.5, top_p=0.95, seed=5)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(family: str, process_group: None, tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    folder = tmp_path_factory.mktemp("generation")
    recorded_checkpoint(family, folder / "base")
    return ross_mcore.load_model(folder / "base")


@pytest.fixture(scope="module")
def greedy(model: TrainedModel, family: str) -> list[Generated]:
    return ross_mcore.generate(model, ASKED, Sampling(TOKENS), template=TEMPLATE[family])


def embeddings(model: TrainedModel, question: Question, template: str) -> Tensor:
    """What the decoder layers read of a prompt, [T, D]."""
    prompt = prompt_of(model, question, replace(model.spec, template=template))
    batch = collate([[prompt]], prompt.tokens.numel(), model.config.vision.image_size)
    model.model.add_parts([batch], "hidden")
    return model.model._embed(batch)[:, 0]


@torch.no_grad()
def test_tokens_are_those_of_transformers(model: TrainedModel, family: str, greedy: list[Generated]) -> None:
    """In one batch of prompts of five lengths, with no, one and two pictures."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    source = GOLDEN / f"model_{family}" / "hf_checkpoint"
    kinds: dict[str, tuple[Any, Any]] = {
        "qwen2_siglip": (Qwen2Config, Qwen2ForCausalLM),
        "llama_clip": (LlamaConfig, LlamaForCausalLM),
    }
    config, kind = kinds[family]
    theirs = kind(config.from_dict(read_json(source / "config.json") | {"model_type": config.model_type})).eval()
    weights = {name: weight.float() for name, weight in load_file(source / "model.safetensors").items()}
    theirs.load_state_dict({name: weights[name] for name in theirs.state_dict()})
    prompts = [embeddings(model, question, TEMPLATE[family]) for question in ASKED]
    lengths = [len(prompt) for prompt in prompts]
    assert [answer.prompt_tokens for answer in greedy] == lengths and len(set(lengths)) == len(lengths)
    padded = torch.zeros(len(prompts), max(lengths), prompts[0].shape[1])
    mask = torch.zeros(padded.shape[:2], dtype=torch.long)
    for row, prompt in enumerate(prompts):
        padded[row, -len(prompt) :], mask[row, -len(prompt) :] = prompt, 1
    settings = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, pad_token_id=0)
    tokens = theirs.generate(inputs_embeds=padded, attention_mask=mask, generation_config=settings).tolist()
    for row, answer in zip(tokens, greedy, strict=True):
        assert answer.tokens == tuple(row[: len(answer.tokens)])
        assert answer.finish_reason == ("length" if len(answer.tokens) == TOKENS else "stop")


@torch.no_grad()
def test_tokens_are_those_without_a_cache(model: TrainedModel, family: str, greedy: list[Generated]) -> None:
    for question, answer in zip(ASKED, greedy, strict=True):
        prompt = prompt_of(model, question, replace(model.spec, template=TEMPLATE[family]))
        begins, tokens = prompt.tokens.numel(), torch.tensor(answer.tokens)
        prompt.tokens = torch.cat([prompt.tokens, tokens])
        states = run(model, [prompt])[1][begins - 1 : -1, 0]
        assert model.model.language_model.logits(states).argmax(-1).tolist() == tokens.tolist()


def test_an_answer_does_not_depend_on_the_batch(model: TrainedModel, family: str, greedy: list[Generated]) -> None:
    """With answers that end at different steps, so that rows leave and others take their places."""
    assert ross_mcore.generate(model, ASKED, Sampling(TOKENS), template=TEMPLATE[family], batch_size=1) == greedy
    together = ross_mcore.generate(model, ASKED, SAMPLED, template=TEMPLATE[family])
    cut = [answer.text[3 * n + 2 : 3 * n + 6].strip() for n, answer in enumerate(together)]
    stopped = replace(SAMPLED, stop=[text for text in cut if text])
    answers = ross_mcore.generate(model, ASKED, stopped, template=TEMPLATE[family])
    assert len({len(answer.tokens) for answer in answers}) > 2
    assert answers == ross_mcore.generate(model, ASKED, stopped, template=TEMPLATE[family], batch_size=1)
    assert answers == ross_mcore.generate(model, ASKED, stopped, template=TEMPLATE[family], batch_size=2)
    for answer, whole in zip(answers, together, strict=True):
        assert answer.tokens == whole.tokens[: len(answer.tokens)] and whole.text.startswith(answer.text)
        assert not any(text in answer.text for text in stopped.stop)


def test_a_stream_is_the_answer_in_pieces(model: TrainedModel, family: str, greedy: list[Generated]) -> None:
    number = max(range(len(ASKED)), key=lambda n: len(greedy[n].tokens))
    pieces = ross_mcore.stream(model, ASKED[number], Sampling(TOKENS), template=TEMPLATE[family])
    said: list[str] = []
    with pytest.raises(StopIteration) as end:
        while True:
            said.append(next(pieces))
            assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert end.value.value == greedy[number] and "".join(said) == greedy[number].text and len(said) > 5


def test_the_command_prints_an_answer(
    model: TrainedModel, family: str, greedy: list[Generated], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--load", str(model.checkpoint.path), "--image", *map(str, PICTURES)]
    words += ["--question", "Is <image> like <image> ?"]
    assert chat.main([*words, "--template", TEMPLATE[family], "--max-new-tokens", str(TOKENS)]) == 0
    assert capsys.readouterr().out == f"{greedy[2].text}\n"


def test_draws_depend_on_the_seed(model: TrainedModel, family: str) -> None:
    def tokens(**edits: Any) -> list[tuple[int, ...]]:
        sampling = replace(SAMPLED, **edits)
        return [one.tokens for one in ross_mcore.generate(model, ASKED[:2], sampling, template=TEMPLATE[family])]

    assert tokens() == tokens() != tokens(seed=6)
    assert tokens(top_p=1e-6) == tokens(temperature=0)


def test_drawn_tokens_have_their_probabilities() -> None:
    """With top_p the least likely are left out: of 0.5, 0.3, 0.15 and 0.05 the first two reach 0.8."""
    logits = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().expand(4000, -1)
    draws = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    for top_p, expected in ((1.0, [0.15, 0.5, 0.05, 0.3]), (0.79, [0, 0.625, 0, 0.375]), (0.5, [0.0, 1.0, 0.0, 0.0])):
        tokens = _choose(logits, Sampling(temperature=1.0, top_p=top_p), draws)
        torch.testing.assert_close(tokens.bincount(minlength=4) / 4000, torch.tensor(expected), atol=0.03, rtol=0)
    sharp = _choose(logits, Sampling(temperature=0.5), draws).bincount(minlength=4) / 4000
    torch.testing.assert_close(sharp, logits[0].mul(2).softmax(0), atol=0.03, rtol=0)


def test_tokens_beyond_the_models_positions_are_refused(model: TrainedModel, family: str) -> None:
    says = r"questions\[1\]: a prompt of \d+ tokens and max_new_tokens 435 are more than the model's 512 positions"
    with pytest.raises(ross_mcore.ConversationError, match=says):
        ross_mcore.generate(model, [Question("A"), ASKED[1]], Sampling(435), template=TEMPLATE[family])
