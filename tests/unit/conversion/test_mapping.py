"""The tables: bit-exact round trips, layouts against a direct computation, and every disagreement named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ross_mcore.architecture import LanguageConfig, ModelConfig
from ross_mcore.conversion import mapping
from ross_mcore.conversion.table import convert_in, convert_out, match, plan
from ross_mcore.errors import ConversionError
from ross_mcore.models.inventory import inventory
from ross_mcore.models.language_weights import weight_shapes

from .conftest import Held, huggingface_language_tensors, language_config


def language_table(config: LanguageConfig) -> tuple[Any, ...]:
    return (*mapping.LANGUAGE, *mapping.OUTPUT_MATRIX[config.tie_word_embeddings])


def language_shapes(config: LanguageConfig) -> dict[str, tuple[int, ...]]:
    return {f"language_model.{name}": shape for name, shape in weight_shapes(config).items()}


def convert_language(tensors: dict[str, Tensor], config: LanguageConfig) -> dict[str, Tensor]:
    source = Held(tensors)
    return dict(convert_in(plan(language_table(config), source, language_shapes(config), config), source, config))


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_language_round_trip_is_bit_exact(family: str, tied: bool, groups: int, dtype: torch.dtype) -> None:
    config = language_config(family, tied, groups)
    theirs = {name: tensor.to(dtype) for name, tensor in huggingface_language_tensors(config).items()}
    ours = convert_language(theirs, config)
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == language_shapes(config)
    back = dict(convert_out(language_table(config), Held(ours), config))
    assert back.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert back[name].dtype == dtype and torch.equal(back[name], tensor), name


@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_qkv_layout_is_one_query_group_after_another(kind: str) -> None:
    config = language_config(groups=2)
    theirs = huggingface_language_tensors(config)
    query, key, value = (theirs[f"model.layers.1.self_attn.{name}_proj.{kind}"] for name in "qkv")
    d, per_group = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    rows = []
    for group in range(config.num_key_value_heads):
        for head in range(per_group):
            start = (group * per_group + head) * d
            rows += [query[row] for row in range(start, start + d)]
        rows += [key[row] for row in range(group * d, (group + 1) * d)]
        rows += [value[row] for row in range(group * d, (group + 1) * d)]
    ours = convert_language(theirs, config)[f"language_model.decoder.layers.1.self_attention.linear_qkv.{kind}"]
    assert torch.equal(ours, torch.stack(rows))


def test_gate_comes_before_up() -> None:
    config = language_config()
    theirs = huggingface_language_tensors(config)
    fc1 = convert_language(theirs, config)["language_model.decoder.layers.0.mlp.linear_fc1.weight"]
    assert torch.equal(fc1[:24], theirs["model.layers.0.mlp.gate_proj.weight"])
    assert torch.equal(fc1[24:], theirs["model.layers.0.mlp.up_proj.weight"])


def test_vocabulary_is_padded_with_zeros_and_unpadded_to_the_bit() -> None:
    config = language_config()
    theirs = huggingface_language_tensors(config)
    ours = convert_language(theirs, config)
    for name in ("embedding.word_embeddings", "output_layer"):
        matrix = ours[f"language_model.{name}.weight"]
        assert matrix.shape[0] == 256 and not matrix[150:].any()
        matrix[150:] = 7.0  # training may change the padding
    back = dict(convert_out(language_table(config), Held(ours), config))
    assert torch.equal(back["lm_head.weight"], theirs["lm_head.weight"])
    assert torch.equal(back["model.embed_tokens.weight"], theirs["model.embed_tokens.weight"])


def test_tied_output_matrix_may_be_stored_twice_but_must_be_equal() -> None:
    config = language_config(tied=True)
    theirs = huggingface_language_tensors(config)
    theirs["lm_head.weight"] = theirs["model.embed_tokens.weight"].clone()
    assert "language_model.output_layer.weight" not in convert_language(theirs, config)
    theirs["lm_head.weight"][3, 3] += 1
    with pytest.raises(ConversionError, match=r"lm_head\.weight must equal model\.embed_tokens\.weight"):
        convert_language(theirs, config)


def test_unknown_source_tensor_is_named() -> None:
    config = language_config()
    theirs = huggingface_language_tensors(config) | {"model.layers.0.self_attn.sinks": torch.zeros(4)}
    with pytest.raises(ConversionError, match=r"model\.layers\.0\.self_attn\.sinks is not known"):
        convert_language(theirs, config)


def test_tensor_beyond_the_architecture_is_named() -> None:
    config = language_config()
    theirs = huggingface_language_tensors(config) | {"model.layers.9.mlp.down_proj.weight": torch.zeros(16, 24)}
    with pytest.raises(ConversionError, match=r"model\.layers\.9\.mlp\.down_proj\.weight has no place"):
        convert_language(theirs, config)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.self_attn.k_proj.weight", "lm_head.weight"])
def test_missing_source_tensor_is_named(name: str) -> None:
    config = language_config()
    theirs = huggingface_language_tensors(config)
    del theirs[name]
    wanted = {"model.norm.weight": "final_layernorm", "lm_head.weight": "output_layer"}.get(name, name)
    with pytest.raises(ConversionError, match=wanted):
        convert_language(theirs, config)


def test_wrong_shape_is_shown_with_the_right_one() -> None:
    config = language_config()
    theirs = huggingface_language_tensors(config)
    theirs["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(12, 16)
    with pytest.raises(ConversionError, match=r"k_proj\.weight has shape \[12, 16\], the architecture says \[8, 16\]"):
        convert_language(theirs, config)


def test_unknown_tensor_of_ours_is_named_on_the_way_out() -> None:
    config = language_config()
    with pytest.raises(ConversionError, match=r"language_model\.surprise"):
        list(convert_out(language_table(config), Held({"language_model.surprise": torch.zeros(1)}), config))


@pytest.mark.parametrize("prefix", ["", "vision_model."])
def test_both_layouts_of_a_vision_tower(prefix: str, model_config: ModelConfig) -> None:
    shapes = {name: shape for name, shape in inventory(model_config).items() if name.startswith("vision_model.")}
    theirs = {name.replace("vision_model.tower.", prefix): torch.randn(*shape) for name, shape in shapes.items()}
    beside = {
        "text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(2),
        "logit_scale": torch.zeros(()),
        f"{prefix}embeddings.position_ids": torch.zeros(1, 4, dtype=torch.int64),
    }
    source = Held(theirs | beside)
    ours = dict(convert_in(plan(mapping.VISION, source, shapes, model_config.language), source, model_config.language))
    assert ours.keys() == shapes.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name.replace("vision_model.tower.", prefix)])


@pytest.mark.parametrize("projector_type", ["linear", "mlp2x_gelu"])
def test_whole_ross_checkpoint_round_trip(projector_type: str, model_config: ModelConfig) -> None:
    from dataclasses import replace

    from ross_mcore.architecture import ProjectorConfig

    config = replace(model_config, projector=ProjectorConfig(projector_type))
    table = (*mapping.ROSS, *mapping.OUTPUT_MATRIX[False], *mapping.PROJECTOR[projector_type == "linear"])
    ours = {name: torch.randn(*shape) for name, shape in inventory(config).items()}
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        ours[f"language_model.{name}"][config.language.vocab_size :] = 0
    theirs = dict(convert_out(table, Held(ours), config.language))
    assert ("model.mm_projector.weight" in theirs) == (projector_type == "linear")
    assert "model.mm_inv_projector.net.blocks.1.attn.qkv.weight" in theirs
    assert "model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.weight" in theirs
    assert "model.pixel_decoder.pixel_decoder.decoder.conv_out.bias" in theirs
    source = Held(theirs)
    back = dict(convert_in(plan(table, source, inventory(config), config.language), source, config.language))
    assert back.keys() == ours.keys() and all(torch.equal(back[name], ours[name]) for name in ours)


def test_placeholders_of_patterns() -> None:
    assert match("a.{layer}.b", "a.12.b") == {"layer": "12"}
    assert match("a.{layer}.b", "a.x.b") is None
    assert match("x.{name}", "x.") is None
