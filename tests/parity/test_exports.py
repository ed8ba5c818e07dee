"""Exports in other programs: transformers' own LlavaForConditionalGeneration computes what the trained model computes,
and the reference's loader finds what it asks for."""

from __future__ import annotations

import json
from collections.abc import Callable
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
from tests.recorded import GOLDEN, read_json
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
    ross = write_source(root / "source", source)
    config = root / "source" / f"{source.tower}_tower" / "config.json"
    config.write_text(json.dumps(read_json(config) | {"dtype": "float16"}))  # as transformers 5 saves one
    made = import_ross(root / "converted", ross, tokenizer or source.tokenizer)
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


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in list(CASES)[2:]]


@pytest.mark.parametrize("case", [*list(CASES)[:2], *SLOW])
@torch.no_grad()
def test_transformers_own_class_computes_the_same(case: str, tmp_path: Path) -> None:
    source, state, tokenizer = CASES[case]
    run = trained(tmp_path, source, state, tokenizer)
    processor, model = exported(run, tmp_path / "llava")
    ours = ross_mcore.load_model(run)
    torch.manual_seed(3)
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


@pytest.mark.slow
def test_the_pipeline_of_transformers_answers_the_same(tmp_path: Path) -> None:
    """From sharded bfloat16 weights too: a shard is written at a time."""
    from transformers import pipeline

    run = trained(tmp_path, *CASES["qwen2 siglip pad"][:2])
    flags = ["--load", str(run), "--save", str(tmp_path / "llava"), "--format", "llava", "--max-shard-size", "60KB"]
    notes = export.export(export.parse_arguments([*flags, "--dtype", "bfloat16"]))
    assert notes == ["denoiser and VAE are left out; transformers has no place for them"]
    assert len(list((tmp_path / "llava").glob("*.safetensors"))) > 1
    picture = Image.new("RGB", (30, 20), (200, 40, 10))
    messages = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]}]
    asked = pipeline("image-text-to-text", model=str(tmp_path / "llava"))
    (found,) = asked(text=messages, max_new_tokens=3, return_full_text=False)
    ours = ross_mcore.load_model(run, dtype="bfloat16")
    assert (
        found["generated_text"].strip()
        == ross_mcore.answer(ours, [ross_mcore.Question("<image>\nWhat?", [picture])], max_new_tokens=3)[0]
    )


def test_a_projector_without_a_place_is_refused(tmp_path: Path) -> None:
    source = Source("qwen2", "clip", projector_type="linear")
    run = trained(tmp_path, source, {"template": "qwen_2"})
    flags = ["--load", str(run), "--save", str(tmp_path / "llava"), "--format", "llava"]
    with pytest.raises(ross_mcore.UserError, match="has the projector mlp2x_gelu, and this model's is linear"):
        export.export(export.parse_arguments(flags))
    assert not (tmp_path / "llava").exists()


LOADER_RULES: dict[str, Callable[[Path, dict[str, Any]], object]] = {
    # ross/model/builder.py:48 chooses the class by the name of the folder
    "name": lambda folder, config: "qwen2" in folder.name.lower() and config["model_type"] == "ross_qwen2",
    # builder.py:50, AutoTokenizer(use_fast=False): the slow class, which reads these files
    "tokenizer class": lambda folder, config: settings(folder)["tokenizer_class"] == "Qwen2Tokenizer",
    "vocab.json": lambda folder, config: len(read_json(folder / "vocab.json")) + 3 == 473,
    "merges.txt": lambda folder, config: (folder / "merges.txt").read_text().startswith("#version: 0.2\n"),
    "added tokens": lambda folder, config: set(settings(folder)["added_tokens_decoder"]) == {"470", "471", "472"},
    "special tokens": lambda folder, config: "<|im_start|>" in settings(folder)["additional_special_tokens"],
    # tokenizers 0.19 reads tokenizer.json beside them, and no merges that are pairs
    "merges": lambda folder, config: all(
        isinstance(merge, str) for merge in read_json(folder / "tokenizer.json")["model"]["merges"]
    ),
    # builder.py:69-76 resizes the embeddings to len(tokenizer), and adds tokens where these are true
    "no new tokens": lambda folder, config: not config["mm_use_im_patch_token"] and not config["mm_use_im_start_end"],
    # multimodal_encoder/builder.py:8 chooses the tower's class by its path, from_pretrained finds it from the folder
    "tower": lambda folder, config: "siglip" in config["mm_vision_tower"] and "clip" not in config["mm_vision_tower"],
    "paths": lambda folder, config: all(
        (folder / config[key] / "config.json").is_file() for key in ("mm_vision_tower", "mm_pixel_decoder")
    ),
    "one dtype": lambda folder, config: {"dtype", "torch_dtype"} & read_json(tower(folder)).keys() == {"torch_dtype"},
    # ross_arch.py cuts prompts at this length; mm_utils.py:process_images pads where it says pad
    "length": lambda folder, config: config["tokenizer_model_max_length"] == config["max_position_embeddings"] == 256,
    "pictures": lambda folder, config: config["image_aspect_ratio"] == "pad",
    # Qwen2's own chat template would not be the one of the training
    "chat template": lambda folder, config: "USER:" in settings(folder)["chat_template"],
}
"""What the reference's load_pretrained_model and the library versions that it pins (transformers 4.43.1, tokenizers
0.19) ask of a folder."""


def settings(folder: Path) -> dict[str, Any]:
    return read_json(folder / "tokenizer_config.json")


def tower(folder: Path) -> Path:
    return folder / "siglip_vision_tower" / "config.json"


def test_an_export_follows_the_rules_of_the_reference(tmp_path: Path) -> None:
    """With a tokenizer as transformers 5 saves one: the demo's."""
    demo = Path(__file__).parents[2] / "examples" / "demo" / "weights" / "tokenizer"
    state = {"template": "qwen_2", "image_aspect_ratio": "pad", "seq_length": 100}
    run = trained(tmp_path, Source("qwen2", "siglip"), state, demo)
    save = tmp_path / "ross-Qwen2"
    assert export.export(export.parse_arguments(["--load", str(run), "--save", str(save), "--relative-paths"])) == []
    config = read_json(save / "config.json")
    assert [name for name, holds in LOADER_RULES.items() if not holds(save, config)] == []


def test_how_a_model_was_trained_elsewhere_is_kept(tmp_path: Path) -> None:
    ross = write_source(tmp_path / "source", Source("qwen2", "siglip"))
    facts = {"image_aspect_ratio": "pad", "tokenizer_model_max_length": 99, "mm_use_im_start_end": True}
    (ross / "config.json").write_text(json.dumps(read_json(ross / "config.json") | facts))
    import_ross(tmp_path / "in", ross, Source("qwen2", "siglip").tokenizer)
    save = tmp_path / "ross-qwen2"
    (note,) = export.export(export.parse_arguments(["--load", str(tmp_path / "in"), "--save", str(save)]))
    assert "trained with <im_start> and <im_end> as text" in note
    assert facts.items() <= read_json(save / "config.json").items()
    model = ross_mcore.load_model(tmp_path / "in")
    assert model.preprocessing().aspect_ratio == "pad" and model.spec.mm_use_im_start_end
