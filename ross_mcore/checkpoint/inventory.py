"""PURE: every tensor of a model's checkpoint, name -> shape, from the architecture alone.

What a conversion must fill, no more and no less; also how many parameters a model has before anything is built.
Sources: mcore's GPT layers (names as stored, which are those of the Transformer Engine spec), transformers 5 SigLIP and
CLIP vision models, diffusers AutoencoderKL, and the denoiser of models/denoiser.py.
"""

from __future__ import annotations

from ross_mcore.architecture import (
    DenoiserConfig,
    LanguageConfig,
    ModelConfig,
    PixelDecoderConfig,
    ProjectorConfig,
    VisionConfig,
)
from ross_mcore.parts import DENOISER, LANGUAGE_MODEL, PROJECTOR, VAE, VISION_TOWER

Shapes = dict[str, tuple[int, ...]]

TIMESTEP_CHANNELS = 256
"""Sinusoids that the denoiser's timestep embedding reads."""


def inventory(model: ModelConfig) -> Shapes:
    """All tensors of a checkpoint's model part."""
    hidden = model.language.hidden_size
    shapes = _within(LANGUAGE_MODEL.weight(""), language_model(model.language))
    shapes |= _within(VISION_TOWER.weight("tower."), vision_tower(model.vision))
    shapes |= _within(PROJECTOR.weight(""), vision_projection(model.projector, model.vision.hidden_size, hidden))
    if model.denoiser and model.pixel_decoder:
        channels = model.pixel_decoder.token_channels
        shapes |= _within(DENOISER.weight(""), denoiser(model.denoiser, channels, hidden, model.vision.image_tokens))
        shapes |= _within(VAE.weight("autoencoder."), autoencoder(model.pixel_decoder))
    return shapes


def language_model(config: LanguageConfig) -> Shapes:
    """Qwen2 or Llama on mcore's GPTModel, the vocabulary padded."""
    hidden, width = config.hidden_size, config.num_attention_heads * config.head_dim
    qkv = width + 2 * config.num_key_value_heads * config.head_dim
    shapes: Shapes = {"embedding.word_embeddings.weight": (config.padded_vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        shapes |= _within(
            f"decoder.layers.{layer}.",
            {
                "self_attention.linear_qkv.layer_norm_weight": (hidden,),
                "self_attention.linear_qkv.weight": (qkv, hidden),
                **({"self_attention.linear_qkv.bias": (qkv,)} if config.qkv_bias else {}),
                "self_attention.linear_proj.weight": (hidden, width),
                "mlp.linear_fc1.layer_norm_weight": (hidden,),
                "mlp.linear_fc1.weight": (2 * config.intermediate_size, hidden),
                "mlp.linear_fc2.weight": (hidden, config.intermediate_size),
            },
        )
    shapes["decoder.final_layernorm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["output_layer.weight"] = (config.padded_vocab_size, hidden)
    return shapes


def vision_tower(config: VisionConfig) -> Shapes:
    """A whole tower, with the parts that ROSS never runs (last layers, post-norm, SigLIP's pooling head)."""
    tower = config.huggingface
    hidden, patch, channels = config.hidden_size, int(tower["patch_size"]), int(tower.get("num_channels", 3))
    intermediate = int(tower["intermediate_size"])
    is_clip = config.model_type == "clip_vision_model"
    shapes: Shapes = {"embeddings.patch_embedding.weight": (hidden, channels, patch, patch)}
    shapes["embeddings.position_embedding.weight"] = (config.image_tokens + is_clip, hidden)
    if is_clip:
        shapes["embeddings.class_embedding"] = (hidden,)
        shapes |= _norm("pre_layrnorm", hidden)
    else:
        shapes["embeddings.patch_embedding.bias"] = (hidden,)
    for layer in range(config.num_layers):
        block: Shapes = {}
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            block |= _linear(f"self_attn.{projection}", hidden, hidden)
        block |= _norm("layer_norm1", hidden) | _norm("layer_norm2", hidden)
        block |= _linear("mlp.fc1", intermediate, hidden) | _linear("mlp.fc2", hidden, intermediate)
        shapes |= _within(f"encoder.layers.{layer}.", block)
    shapes |= _norm("post_layernorm", hidden)
    if not is_clip and tower.get("vision_use_head", True):
        shapes |= {
            "head.probe": (1, 1, hidden),
            "head.attention.in_proj_weight": (3 * hidden, hidden),
            "head.attention.in_proj_bias": (3 * hidden,),
        }
        shapes |= _linear("head.attention.out_proj", hidden, hidden) | _norm("head.layernorm", hidden)
        shapes |= _linear("head.mlp.fc1", intermediate, hidden) | _linear("head.mlp.fc2", hidden, intermediate)
    return shapes


def vision_projection(config: ProjectorConfig, tower_hidden: int, language_hidden: int) -> Shapes:
    """Linear layers at 0, 2, 4 ..., as in the reference's `mm_projector`."""
    shapes = _linear("0", language_hidden, tower_hidden)
    for index in range(1, config.depth):
        shapes |= _linear(str(2 * index), language_hidden, language_hidden)
    return shapes


def denoiser(config: DenoiserConfig, channels: int, condition: int, tokens: int) -> Shapes:
    """The DiT (models/denoiser.py): latent tokens of `channels`, conditioned on hidden states of size `condition`."""
    width = config.width
    shapes: Shapes = {"pos_embed": (1, tokens, width)}
    shapes |= {"x_embedder.proj.weight": (width, channels, 1, 1), "x_embedder.proj.bias": (width,)}
    shapes |= _linear("t_embedder.mlp.0", width, TIMESTEP_CHANNELS) | _linear("t_embedder.mlp.2", width, width)
    shapes |= _linear("z_embedder.1", width, condition)
    for block in range(config.depth):
        shapes |= _within(
            f"blocks.{block}.",
            _linear("attn.qkv", 3 * width, width)
            | _linear("attn.proj", width, width)
            | _linear("mlp.fc1", 4 * width, width)
            | _linear("mlp.fc2", width, 4 * width)
            | _linear("adaLN_modulation.1", 6 * width, width),
        )
    return (
        shapes
        | _linear("final_layer.linear", channels, width)
        | _linear("final_layer.adaLN_modulation.1", 2 * width, width)
    )


def autoencoder(config: PixelDecoderConfig) -> Shapes:
    """diffusers AutoencoderKL of plain down and up blocks (FLUX, SDXL, SD)."""
    vae = config.diffusers
    blocks = [int(width) for width in vae["block_out_channels"]]
    layers, latent = int(vae.get("layers_per_block", 1)), config.latent_channels
    attention = bool(vae.get("mid_block_add_attention", True))
    last = len(blocks) - 1

    shapes = _within("encoder.", _conv("conv_in", blocks[0], int(vae.get("in_channels", 3)), 3))
    for index, width in enumerate(blocks):
        block = _resnets([blocks[max(index - 1, 0)]] + [width] * (layers - 1), width)
        block |= _conv("downsamplers.0.conv", width, width, 3) if index < last else {}
        shapes |= _within(f"encoder.down_blocks.{index}.", block)
    shapes |= _within("encoder.", _middle(blocks[-1], attention, 2 * latent, blocks[-1]))

    shapes |= _within("decoder.", _conv("conv_in", blocks[-1], latent, 3))
    upwards = blocks[::-1]
    for index, width in enumerate(upwards):
        block = _resnets([upwards[max(index - 1, 0)]] + [width] * layers, width)
        block |= _conv("upsamplers.0.conv", width, width, 3) if index < last else {}
        shapes |= _within(f"decoder.up_blocks.{index}.", block)
    shapes |= _within("decoder.", _middle(blocks[-1], attention, int(vae.get("out_channels", 3)), blocks[0]))

    shapes |= _conv("quant_conv", 2 * latent, 2 * latent, 1) if vae.get("use_quant_conv", True) else {}
    shapes |= _conv("post_quant_conv", latent, latent, 1) if vae.get("use_post_quant_conv", True) else {}
    return shapes


def _middle(width: int, attention: bool, out_channels: int, out_width: int) -> Shapes:
    """The middle block of encoder or decoder, and its last norm and convolution."""
    middle = _resnets([width, width], width)
    if attention:
        middle |= _norm("attentions.0.group_norm", width)
        for projection in ("to_q", "to_k", "to_v", "to_out.0"):
            middle |= _linear(f"attentions.0.{projection}", width, width)
    end = _norm("conv_norm_out", out_width) | _conv("conv_out", out_channels, out_width, 3)
    return _within("mid_block.", middle) | end


def _resnets(inputs: list[int], width: int) -> Shapes:
    """Residual blocks of one level, by the number of channels that each reads."""
    shapes: Shapes = {}
    for index, channels in enumerate(inputs):
        resnet = _norm("norm1", channels) | _conv("conv1", width, channels, 3)
        resnet |= _norm("norm2", width) | _conv("conv2", width, width, 3)
        resnet |= _conv("conv_shortcut", width, channels, 1) if channels != width else {}
        shapes |= _within(f"resnets.{index}.", resnet)
    return shapes


def _linear(name: str, out_features: int, in_features: int) -> Shapes:
    return {f"{name}.weight": (out_features, in_features), f"{name}.bias": (out_features,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _conv(name: str, out_channels: int, in_channels: int, kernel: int) -> Shapes:
    return {f"{name}.weight": (out_channels, in_channels, kernel, kernel), f"{name}.bias": (out_channels,)}


def _within(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}
