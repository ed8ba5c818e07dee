"""Configurations that contradict themselves or ask for what is not implemented are refused; others give transformers'
logits."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ross_mcore import trained as models
from ross_mcore.architecture import LanguageConfig
from ross_mcore.batch import Sample
from ross_mcore.commands import convert
from ross_mcore.conversion.huggingface import read_pixel_decoder_config, read_vision_config
from ross_mcore.errors import ArchitectureError
from tests.cases.case import TOKENIZER, Case, Place
from tests.recorded import GOLDEN

TOWER, VAE = GOLDEN / "components" / "tiny_siglip", GOLDEN / "components" / "tiny_vae"
SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PLAIN = {"rope_type": "default", "rope_theta": 5e5}


def language_model(folder: Path, family: str = "llama", **edits: Any) -> Path:
    """A small model that transformers saves; `edits` change its config.json, None removes a key."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    shape = {**SHAPE, "num_key_value_heads": 2, "vocab_size": 512, "max_position_embeddings": 512}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape), dtype=torch.float32)
    with torch.no_grad():
        for weight in model.parameters():  # attention that depends on positions, norms that are not 1
            weight.mul_(4.0) if weight.dim() > 1 else weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(folder)
    edit(folder / "config.json", **edits)
    return folder


def edit(path: Path, **edits: Any) -> None:
    config = json.loads(path.read_text()) | edits
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def flags(place: Place, *more: object, **edits: Any) -> Sequence[object]:
    """Arguments of a conversion of a language model with an edited config.json."""
    folder = language_model(place.folder / "language", **edits)
    parts = ("--language-model", folder, "--vision-model", TOWER, "--tokenizer", TOKENIZER)
    return [*parts, "--save", place.folder / "base", *more]


def pickled(place: Place, content: object = None) -> Sequence[object]:
    """Arguments of a conversion where tower and language model are only in pytorch_model.bin."""
    arguments = [*flags(place, "--vision-model", shutil.copytree(TOWER, place.folder / "tower"))]
    for name in ("language", "tower"):
        weights = place.folder / name / "model.safetensors"
        torch.save(content or load_file(weights), weights.with_name("pytorch_model.bin"))
        weights.unlink()
    return arguments


class Code:
    """Pickled, it would run when it is read."""

    def __reduce__(self) -> tuple[object, ...]:
        return print, ("code of the pickle has run",)


def vae_with(place: Place, **edits: Any) -> Path:
    path = place.write("vae/config.json", (VAE / "config.json").read_bytes())
    edit(path, **edits)
    return path.parent


def nothing_written(place: Place) -> None:
    assert not (place.folder / "base").exists()


CASES = [
    Case(
        "rope_theta twice",
        "convert",
        lambda place: flags(place, rope_theta=123456.0, rope_parameters=PLAIN),
        2,
        ["config.json", "rope_theta=123456 and rope_parameters.rope_theta=500000"],
        holds=nothing_written,
    ),
    Case(
        "rope_scaling beside rope_parameters",
        "convert",
        lambda place: flags(
            place, rope_scaling={"rope_type": "default"}, rope_parameters={**LLAMA3, "rope_type": "llama3"}
        ),
        2,
        ["rope_parameters is", "rope_scaling", "remove the key"],
        holds=nothing_written,
    ),
    Case(
        "latents_mean",
        "convert",
        lambda place: flags(place, "--pixel-decoder", vae_with(place, latents_mean=[0.1] * 16, latents_std=[2.0] * 16)),
        2,
        ["vae/config.json", "latents_mean=["],
        holds=nothing_written,
    ),
    Case(
        "pytorch_model.bin",
        "convert",
        pickled,
        0,
        ["wrote"],
        source="openai/clip-vit-large-patch14-336 and lmsys/vicuna-13b-v1.5 on the hub",
    ),
    Case(
        "pytorch_model.bin with code",
        "convert",
        lambda place: pickled(place, {"model.norm.weight": Code()}),
        2,
        ["pytorch_model.bin was refused", "more than tensors"],
        never=["has run"],
        holds=nothing_written,
    ),
    Case(
        "ignored keys",
        "convert",
        lambda place: flags(place, attention_dropout=0.1, some_scale=3.0),
        0,
        ["attention_dropout=0.1 is ignored", "not used: some_scale", "wrote"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case, place: Place) -> None:
    case.run(place)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, "rope_scaling: rope scaling of type 'llama3'"),
    ("llama", {"rope_scaling": {"type": "llama3", **LLAMA3}}, "'llama3'"),
    ("llama", {"rope_scaling": LLAMA3}, "rope_scaling has factor and no rope_type"),
    ("llama", {"rope_scaling": {"type": "linear", "rope_type": "yarn"}}, "rope_type='yarn' and type='linear'"),
    ("llama", {"rope_scaling": {"type": ["linear"]}}, "type is ['linear']"),
    ("llama", {"rope_parameters": "default"}, "rope_parameters is 'default', expected a mapping"),
    ("llama", {"rope_parameters": {"full_attention": PLAIN}}, "differs by kind of layer"),
    ("llama", {"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
    ("qwen2", {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}, "'mrope'"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ("llama", {"attention_bias": True}, "attention_bias=True"),
    ("llama", {"mlp_bias": True}, "mlp_bias=True"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu'"),
    ("llama", {"sliding_window": 32}, "sliding_window=32"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 32}, "use_sliding_window=True"),
    ("llama", {"rope_theta": 1e6, "rope_parameters": PLAIN}, "rope_theta=1e+06 and rope_parameters.rope_theta=500000"),
    # transformers 5 reads rope_scaling alone, whose base is then the default
    ("llama", {"rope_scaling": {"type": "default"}, "rope_parameters": PLAIN}, "rope_scaling.rope_theta=10000"),
    ("llama", {"rope_theta": None}, "rope_theta is missing"),
    ("llama", {"rope_theta": "10000"}, "rope_theta is '10000'"),
    ("llama", {"hidden_act": None}, "hidden_act is null"),
    ("llama", {"text_config": {"hidden_size": 64}}, "text_config"),
    ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
    ("qwen2", {"layer_types": ["full_attention"]}, "layer_types"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("llama", {"logits_scaling": 8.0}, "logits_scaling=8.0"),
    ("llama", {"num_local_experts": 8}, "num_local_experts=8"),
    ("qwen2", {"is_causal": False}, "is_causal=False"),
    ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config"),
    ("llama", {"head_dim": 15}, "head_dim=15 is odd"),
    ("llama", {"num_attention_heads": 3, "head_dim": None}, "not a multiple of num_attention_heads 3"),
    ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
    *((kind, {}, f"model_type '{kind}'") for kind in ("mistral", "qwen3", "qwen2_moe", "gemma2", "llava_llama")),
]


@pytest.mark.parametrize(("family", "edits", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused_with_the_key(family: str, edits: dict[str, Any], message: str) -> None:
    config = {**SHAPE, "num_key_value_heads": 1, "vocab_size": 512, "model_type": family, **edits}
    with pytest.raises(ArchitectureError) as refusal:
        LanguageConfig.from_huggingface(config)
    assert message in str(refusal.value)


ACCEPTED: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_parameters": None, "rope_theta": 5e5}),
    ("llama", {"rope_parameters": None}),
    ("llama", {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": {"type": "default"}}),
    ("llama", {"rope_theta": 5e5, "rope_parameters": PLAIN, "rope_scaling": PLAIN}),
    ("llama", {"hidden_act": "swish", "pretraining_tp": 2, "attention_dropout": 0.1, "partial_rotary_factor": 1.0}),
    ("qwen2", {"sliding_window": 32, "use_sliding_window": False, "max_window_layers": 1, "head_dim": 16}),
]


@pytest.mark.parametrize(("family", "edits"), ACCEPTED, ids=str)
def test_accepted_with_the_logits_of_transformers(family: str, edits: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = language_model(tmp_path / "language", family, **edits)
    arguments = ["--language-model", folder, "--vision-model", TOWER, "--tokenizer", TOKENIZER]
    assert convert.main([*map(str, arguments), "--save", str(tmp_path / "base")]) == 0
    ids = torch.randint(3, 500, (200,), generator=torch.Generator().manual_seed(1))
    trained = models.load_model(tmp_path / "base")
    sample = Sample("", 0, ids, torch.full_like(ids, -100), [], [])
    _, hidden = models.run(trained, [sample])
    language: Any = trained.model.language_model
    with torch.no_grad():
        ours = language.logits(hidden[:, 0])[:, :512]
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids[None]).logits[0]
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


TOWERS: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "siglip2_vision_model"}, "siglip2_vision_model"),
    ({"hidden_act": "no_such"}, "no_such"),
    ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
    ({"model_type": "clip", "vision_config": {"model_type": "siglip_vision_model"}}, "model_type is 'clip'"),
    (
        {"model_type": "clip", "vision_config": {"hidden_size": 8}, "vision_config_dict": {"hidden_size": 16}},
        "vision_config has hidden_size=8 and vision_config_dict 16",
    ),
    (
        {"model_type": "clip", "vision_config": {"image_size": 336}, "vision_config_dict": {"hidden_size": 16}},
        "vision_config has image_size=336 and vision_config_dict 224",
    ),
]


@pytest.mark.parametrize(("edits", "message"), TOWERS, ids=lambda value: str(value)[:60])
def test_towers(edits: dict[str, Any], message: str, tmp_path: Path) -> None:
    from ross_mcore.models.vision import VisionModel

    for name in ("config.json", "preprocessor_config.json"):
        (tmp_path / name).write_bytes((TOWER / name).read_bytes())
    edit(tmp_path / "config.json", **edits)
    with pytest.raises(ArchitectureError) as refusal:
        VisionModel(read_vision_config(tmp_path))
    assert message in str(refusal.value)


VAES: list[tuple[dict[str, Any], str]] = [
    ({"latents_std": [2.0] * 16}, "latents_std"),
    ({"down_block_types": ["DownEncoderBlock2D"]}, "down_block_types has 1 blocks, expected the"),
    ({"_class_name": "AutoencoderTiny"}, "AutoencoderTiny"),
]


@pytest.mark.parametrize(("edits", "message"), VAES, ids=lambda value: str(value)[:60])
def test_vaes(edits: dict[str, Any], message: str, place: Place) -> None:
    with pytest.raises(ArchitectureError) as refusal:
        read_pixel_decoder_config(vae_with(place, **edits))
    assert message in str(refusal.value)


def test_a_vae_without_a_scale_is_refused(place: Place) -> None:
    folder = vae_with(place)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "scaling_factor": None, "shift_factor": None}))
    with pytest.raises(ArchitectureError, match="scaling_factor is null"):
        read_pixel_decoder_config(folder)


def test_what_a_library_does_not_build_is_refused_at_conversion(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    vae = vae_with(place, act_fn="~")
    assert convert.main([*map(str, flags(place, "--pixel-decoder", vae))]) == 2
    error = capsys.readouterr().err
    assert f"{vae / 'config.json'}: diffusers builds no AutoencoderKL" in error and "give a" in error
