"""The towers with recorded weights, beyond the recorded values (those are in test_recorded.py)."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from ross_mcore import platform
from ross_mcore.architecture import VisionConfig
from ross_mcore.models.vision import VisionModel, attention_of
from ross_mcore.platform import Libraries


@pytest.fixture(scope="module", params=[("model_qwen2_siglip", "tiny_siglip"), ("model_llama_clip", "tiny_clip")])
def case(request, recorded, recorded_json, golden):
    name, tower_name = request.param
    model = recorded_json(f"{name}/hf_checkpoint/config.json")
    config = VisionConfig(
        recorded_json(f"components/{tower_name}/config.json"),
        model["image_mean"],
        model["image_std"],
        model["mm_vision_select_layer"],
    )
    weights = load_file(golden / f"components/{tower_name}/model.safetensors")
    checkpoint = {k: v.float() for k, v in load_file(golden / f"{name}/hf_checkpoint/model.safetensors").items()}
    return config, weights, checkpoint, model, recorded(f"{name}/oracle.safetensors")[0]


def test_training_a_tower_changes_no_feature(case):
    config, weights, _, _, oracle = case
    features = []
    for trainable in (False, True):
        tower = VisionModel(config, trainable)
        tower.tower.load_state_dict({name.removeprefix("vision_model."): weight for name, weight in weights.items()})
        features.append(tower(oracle["in.images"]))
    assert [f.requires_grad for f in features] == [False, True] and torch.equal(*features)


def test_trainable_tower(case):
    """Only layers that run train, all of them get gradients, and an empty batch gives zero gradients, not None."""
    config, _, _, _, oracle = case
    tower = VisionModel(config, trainable=True).train()
    trained = [name for name, parameter in tower.named_parameters() if parameter.requires_grad]
    assert any("layers.1." in name for name in trained)
    assert not any(part in name for name in trained for part in ("layers.2.", "post_layernorm", "head"))
    for images in (oracle["in.images"], oracle["in.images"][:0]):
        tower.zero_grad(set_to_none=True)
        tower(images).square().sum().backward()
        for name in trained:
            gradient = tower.get_parameter(name).grad
            assert gradient is not None and gradient.isfinite().all(), name
            assert bool(len(images)) or not gradient.any(), name


def test_frozen_tower(case):
    config, _, _, _, oracle = case
    tower = VisionModel(config)
    parent = torch.nn.ModuleList([tower]).train()
    assert parent.training and not any(module.training for module in tower.modules())
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    empty = tower.to(torch.bfloat16)(oracle["in.images"][:0])
    assert empty.shape == (0, config.image_tokens, config.hidden_size) and empty.dtype == torch.bfloat16
    assert tower(oracle["in.images"]).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="the tower reads"):
        tower(torch.zeros(1, 3, config.image_size + 1, config.image_size))


def test_attention_of_the_tower(case):
    """flash-attn if it is installed and works, on a GPU in 16 bits; otherwise torch's SDPA."""
    everything = Libraries(True, True, True, True, True)
    assert attention_of(torch.bfloat16, everything) == "flash_attention_2"
    assert attention_of(torch.float32, everything) == "sdpa"
    assert attention_of(torch.bfloat16, replace(everything, gpu=False)) == "sdpa"
    assert attention_of(torch.bfloat16, replace(everything, flash_attention=False)) == "sdpa"
    for dtype in (torch.float32, torch.bfloat16):
        tower = VisionModel(case[0], dtype=dtype)
        assert {parameter.dtype for parameter in tower.parameters()} == {dtype}
        layer = tower.tower.encoder.layers[0].self_attn
        assert layer.config._attn_implementation == attention_of(dtype, platform.libraries())
