"""--format llava: transformers' own LlavaForConditionalGeneration computes what the trained model computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import ross_mcore
from ross_mcore import trained as python_api
from ross_mcore.checkpoint import folder
from ross_mcore.checkpoint.safe_load import StoredTensors
from ross_mcore.commands import export
from ross_mcore.conversion.assembly import import_ross
from ross_mcore.conversion.stream import TensorWriter
from tests.recorded import GOLDEN
from tests.sources import Source, write_source

SYSTEM = {"role": "system", "content": "Be brief."}
MESSAGES: dict[str, list[dict[str, Any]]] = {
    "picture first": [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}],
    "text first, system": [
        SYSTEM,
        {"role": "user", "content": [{"type": "text", "text": " What is it? "}, {"type": "image"}]},
    ],
    "rounds": [
        {"role": "user", "content": "<image>\nIs it 12?"},
        {"role": "assistant", "content": [{"type": "text", "text": "It's so."}]},
        {"role": "user", "content": "Why?"},
    ],
}


def as_question(messages: list[dict[str, Any]], picture: Image.Image) -> ross_mcore.Question:
    """The same conversation as a LLaVA record, its picture where the text has it."""
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    turns = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = "".join(part.get("text", "<image>") for part in parts)
        turns.append({"from": names[message["role"]], "value": text})
    return ross_mcore.Question(turns, [picture])


def trained(root: Path, source: Source, state: dict[str, Any], tokenizer: Path | None = None) -> Path:
    """A checkpoint with small random weights, saved as by a training with `state`."""
    made = import_ross(root / "converted", write_source(root / "source", source), tokenizer or source.tokenizer)
    stored = StoredTensors(made.path)
    partial = folder.begin(root / "run", 0)
    with TensorWriter(partial) as writer:
        for name in stored.names():
            tensor = stored.read(name)
            writer.add(name, tensor * 0.2 if tensor.dim() > 1 else tensor)
    folder.publish(root / "run", 0, made.model_config(), {"training_stage": "finetune", **state}, assets=made.path)
    return root / "run"


def exported(run: Path, save: Path, *flags: str) -> tuple[Any, Any]:
    """(processor, model) of an export, as anyone loads them."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    options = ["--load", str(run), "--save", str(save), "--format", "llava", *flags]
    export.export(export.parse_arguments(options))
    model, info = AutoModelForImageTextToText.from_pretrained(save, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    return AutoProcessor.from_pretrained(save), model.eval()


def our_prompt(model: ross_mcore.TrainedModel, question: ross_mcore.Question) -> tuple[list[int], Tensor, Tensor]:
    """(ids with 0 for pictures' tokens, pixels [K, 3, H, W], logits [V] of the next token)"""
    sample = python_api.prompt_of(model, question, model.spec)
    batch, hidden = python_api.run(model, [sample])
    logits = model.model.language_model.logits(hidden[[sample.tokens.numel() - 1], 0])[0]
    return sample.tokens.tolist(), torch.stack(list(sample.pixels)), logits[: model.config.language.vocab_size]


CASES = {
    "qwen2 siglip pad": (Source("qwen2", "siglip"), {"template": "qwen_2", "image_aspect_ratio": "pad"}, None),
    "llama clip square": (Source("llama", "clip"), {"template": "v1", "image_aspect_ratio": "square"}, None),
    "qwen2 clip pad tied": (
        Source("qwen2", "clip", tied=True),
        {"template": "chatml", "image_aspect_ratio": "pad"},
        None,
    ),
    "llama siglip square": (
        Source("llama", "siglip"),
        {"template": "v1", "image_aspect_ratio": "square"},
        GOLDEN / "data" / "tok_llama_legacyT",
    ),
    "llama3": (
        Source("llama", "siglip"),
        {"template": "llama3", "image_aspect_ratio": "pad"},
        GOLDEN / "data" / "tok_llama3",
    ),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_transformers_own_class_computes_the_same(case: str, tmp_path: Path) -> None:
    source, state, tokenizer = CASES[case]
    run = trained(tmp_path, source, state, tokenizer)
    processor, model = exported(run, tmp_path / "llava")
    ours = ross_mcore.load_model(run)
    picture = Image.fromarray(torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8).numpy())
    for name, messages in MESSAGES.items():
        if case == "llama3" and name == "rounds":
            continue  # the reference's prompts of later rounds have <|eot_conversation|> as text, its training has not
        question = as_question(messages, picture)
        ids, pixels, logits = our_prompt(ours, question)
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(text=text, images=picture, return_tensors="pt")
        image = model.config.image_token_id
        assert [0 if token == image else token for token in inputs.input_ids[0].tolist()] == ids
        alone = processor.tokenizer(text, add_special_tokens=False).input_ids  # as vLLM reads a chat
        place = alone.index(image)
        assert (
            alone[:place] + [image] * model.config.image_seq_length + alone[place + 1 :] == inputs.input_ids[0].tolist()
        )
        assert torch.equal(inputs.pixel_values, pixels)
        found = model(**inputs).logits[0, -1, : len(logits)]
        torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5 * float(logits.abs().max()))
        (answer,) = ross_mcore.generate(ours, [question], ross_mcore.Sampling(max_new_tokens=12))
        tokens = model.generate(**inputs, max_new_tokens=12)[0, inputs.input_ids.shape[1] :].tolist()
        assert tokens[: len(answer.tokens)] == list(answer.tokens)
        assert len(tokens) - len(answer.tokens) == (answer.finish_reason == "stop")  # the token that ends it
