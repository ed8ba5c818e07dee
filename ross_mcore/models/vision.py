"""The vision tower: a Hugging Face SigLIP or CLIP vision transformer up to the layer whose output ROSS uses.

Legend: J images, H W pixels, N patches of an image, D width of the tower.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ross_mcore import platform
from ross_mcore.architecture import VisionConfig
from ross_mcore.checked import reason, shown
from ross_mcore.errors import ArchitectureError
from ross_mcore.library_configs import VISION_KEYS
from ross_mcore.platform import Libraries
from ross_mcore.shapes import Shapes, linear, norm, within


class VisionModel(nn.Module):
    """Image -> patch features: `hidden_states[select_layer]` of the tower, without post-norm, CLS token dropped.

    Layers after the selected one, the post-norm and SigLIP's pooling head never run and never train; they exist so that
    an exported tower is complete. A frozen tower (`trainable=False`) stays in evaluation mode and runs without
    autograd. Weights are random until a state dict is loaded; names in `tower.*` are those of transformers 5.
    Source: reference multimodal_encoder/clip_encoder.py:42-74 and siglip_encoder.py.
    """

    def __init__(self, config: VisionConfig, trainable: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.trainable = trainable
        self.num_layers_run = config.num_layers + 1 + config.select_layer
        self.tower: Any = _build_tower(config, dtype)  # SigLIP and CLIP have different attributes
        self.requires_grad_(False)
        if trainable:
            for part in self._parts_run():
                part.requires_grad_(True)
        self.train(trainable)

    def _parts_run(self) -> list[nn.Module]:
        parts = [self.tower.embeddings, *self.tower.encoder.layers[: self.num_layers_run]]
        return parts + ([self.tower.pre_layrnorm] if self._has_class_token else [])

    @property
    def _has_class_token(self) -> bool:
        return self.config.model_type == "clip_vision_model"

    def train(self, mode: bool = True) -> VisionModel:
        """Like `nn.Module.train`, but a frozen tower stays in evaluation mode."""
        return super().train(mode and self.trainable)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [J, 3, H, W] in the tower's normalisation, any dtype -> features [J, N, D] in the tower's dtype.

        Without images a frozen tower computes nothing; a trainable tower runs one blank image and drops its features,
        so that gradients are zero and not missing. Raises ValueError when pixels do not have the tower's image size.
        """
        size = self.config.image_size
        if tuple(pixels.shape[1:]) != (3, size, size):
            raise ValueError(f"pixels of shape {list(pixels.shape)}; the tower reads [J, 3, {size}, {size}]")
        if not len(pixels):
            if self.trainable:
                return self(pixels.new_zeros(1, 3, size, size))[:0]
            dtype = self.tower.embeddings.patch_embedding.weight.dtype
            return pixels.new_zeros(0, self.config.image_tokens, self.config.hidden_size, dtype=dtype)
        with torch.set_grad_enabled(self.trainable and torch.is_grad_enabled()):
            hidden = self.tower.embeddings(pixels)
            if self._has_class_token:
                hidden = self.tower.pre_layrnorm(hidden)
            for layer in self.tower.encoder.layers[: self.num_layers_run]:
                hidden = layer(hidden, attention_mask=None)
            return hidden[:, 1:] if self._has_class_token else hidden


def attention_of(dtype: torch.dtype, libraries: Libraries) -> str:
    """transformers' name of the tower's attention: flash-attn on a GPU in 16 bits if installed, SDPA otherwise."""
    flash = libraries.gpu and libraries.flash_attention and dtype in (torch.bfloat16, torch.float16)
    return "flash_attention_2" if flash else "sdpa"


def _build_tower(config: VisionConfig, dtype: torch.dtype) -> nn.Module:
    """Builds HF's vision model; imports the modelling file of this model only."""
    configuration: Any
    model: Any
    if config.model_type == "clip_vision_model":
        from transformers.models.clip.configuration_clip import CLIPVisionConfig
        from transformers.models.clip.modeling_clip import CLIPVisionModel

        configuration, model = CLIPVisionConfig, CLIPVisionModel
    else:
        from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
        from transformers.models.siglip.modeling_siglip import SiglipVisionModel

        configuration, model = SiglipVisionConfig, SiglipVisionModel
    from transformers.utils import is_flash_attn_2_available

    fields = {name: value for name, value in config.huggingface.items() if name in VISION_KEYS}
    try:
        installed = platform.libraries()  # transformers also refuses a flash-attn that is too old or does not load
        usable = replace(installed, flash_attention=installed.flash_attention and is_flash_attn_2_available())
        attention = attention_of(dtype, usable)
        tower: nn.Module = model(configuration(**fields | {"attn_implementation": attention, "dtype": dtype}))
        return tower.to(dtype)
    except Exception as error:  # its checks raise exceptions of many kinds
        raise ArchitectureError(
            f"config.json: transformers builds no {config.model_type} of {shown(fields)}: {reason(error)}"
        ) from None


def weight_shapes(config: VisionConfig) -> Shapes:
    """Shapes of a whole tower by the names of transformers 5, including parts that never run."""
    tower = config.huggingface
    hidden, patch, channels = config.hidden_size, int(tower["patch_size"]), int(tower.get("num_channels", 3))
    intermediate = config.intermediate_size
    is_clip = config.model_type == "clip_vision_model"
    shapes: Shapes = {"embeddings.patch_embedding.weight": (hidden, channels, patch, patch)}
    shapes["embeddings.position_embedding.weight"] = (config.image_tokens + is_clip, hidden)
    if is_clip:
        shapes["embeddings.class_embedding"] = (hidden,)
        shapes |= norm("pre_layrnorm", hidden)
    else:
        shapes["embeddings.patch_embedding.bias"] = (hidden,)
    for layer in range(config.num_layers):
        block: Shapes = {}
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            block |= linear(f"self_attn.{projection}", hidden, hidden)
        block |= norm("layer_norm1", hidden) | norm("layer_norm2", hidden)
        block |= linear("mlp.fc1", intermediate, hidden) | linear("mlp.fc2", hidden, intermediate)
        shapes |= within(f"encoder.layers.{layer}.", block)
    shapes |= norm("post_layernorm", hidden)
    if not is_clip and tower.get("vision_use_head", True):
        shapes |= {
            "head.probe": (1, 1, hidden),
            "head.attention.in_proj_weight": (3 * hidden, hidden),
            "head.attention.in_proj_bias": (3 * hidden,),
        }
        shapes |= linear("head.attention.out_proj", hidden, hidden) | norm("head.layernorm", hidden)
        shapes |= linear("head.mlp.fc1", intermediate, hidden) | linear("head.mlp.fc2", hidden, intermediate)
    return shapes
