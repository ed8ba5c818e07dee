"""Forward floating-point operations of every part of a model, for stage balance and MFU. Pure functions.

One multiply-add counts as two operations. Norms, activations and rotary embeddings are not counted (under 1%).
"""

from __future__ import annotations

from dataclasses import dataclass

from ross_mcore.architecture import NOTHING_PRECOMPUTED, LanguageConfig, ModelConfig, Precomputed

TRAINED, PASSED_THROUGH, BEFORE_GRADIENT = 3, 2, 1
"""Cost of a part's step in forward passes: one forward, and in backward two if it trains, one if it is frozen and
passes the gradient on, none if no gradient reaches it (frozen tower, VAE)."""


@dataclass(frozen=True)
class ForwardFlops:
    """Forward operations of one sample, by part."""

    vision_model: float
    vision_projection: float
    layer: float
    output_layer: float
    pixel_decoder: float
    denoiser: float


def forward_flops(
    model: ModelConfig,
    tokens: float,
    labelled_tokens: float,
    images: float = 1.0,
    precomputed: Precomputed = NOTHING_PRECOMPUTED,
) -> ForwardFlops:
    """Operations of one sample of `tokens` tokens (image tokens included) and `images` images.

    Precomputed parts cost nothing. Causal attention counts half of the score matrix, as a causal kernel computes it.
    The output layer runs at `labelled_tokens` positions only.
    """
    language, vision = model.language, model.vision
    width = language.hidden_size
    patches, inner = vision.image_tokens, vision.hidden_size
    tower_layer = 2 * patches * inner * (4 * inner + 2 * vision.intermediate_size)
    tower_layer += 4 * patches**2 * inner
    layers_run = vision.num_layers + 1 + vision.select_layer
    patch_pixels = 3 * int(vision.huggingface["patch_size"]) ** 2
    tower = layers_run * tower_layer + 2 * patches * patch_pixels * inner
    projector = 2 * patches * width * (inner + (model.projector.depth - 1) * width)

    return ForwardFlops(
        vision_model=0.0 if precomputed.features else images * tower,
        vision_projection=images * projector,
        layer=sum(layer_flops(language, tokens, tokens)),
        output_layer=2 * labelled_tokens * width * language.padded_vocab_size,
        pixel_decoder=images * _encoder_flops(model) if model.pixel_decoder and not precomputed.latents else 0.0,
        denoiser=images * _denoiser_flops(model) if model.denoiser else 0.0,
    )


def layer_flops(language: LanguageConfig, tokens: float, attended: float) -> tuple[float, float]:
    """Operations of the products and of the attention of a decoder layer for `tokens` tokens.

    attended: length of the sample that a token is in, on average over the tokens.
    """
    query, key = (heads * language.head_dim for heads in (language.num_attention_heads, language.num_key_value_heads))
    products = 2 * tokens * language.hidden_size * (2 * query + 2 * key + 3 * language.intermediate_size)
    return products, 2 * tokens * attended * query


def step_flops(parts: ForwardFlops, num_layers: int, llm_trains: bool, vision_trains: bool) -> float:
    """Operations of one sample's step, without recomputation, from its forward operations."""
    first, layer, last = stage_flops(parts, llm_trains, vision_trains)
    return first + num_layers * layer + last


def stage_flops(parts: ForwardFlops, llm_trains: bool, vision_trains: bool) -> tuple[float, float, float]:
    """Operations of one sample's step: first stage without decoder layers, one layer, last stage without layers."""
    language = TRAINED if llm_trains else PASSED_THROUGH
    first = parts.vision_model * (TRAINED if vision_trains else BEFORE_GRADIENT) + TRAINED * parts.vision_projection
    last = language * parts.output_layer + BEFORE_GRADIENT * parts.pixel_decoder + TRAINED * parts.denoiser
    return first, language * parts.layer, last


def _denoiser_flops(model: ModelConfig) -> float:
    """Forward operations of the denoiser for one image: all draws; the condition is embedded once."""
    denoiser, pixels = model.denoiser, model.pixel_decoder
    if denoiser is None or pixels is None:
        raise ValueError("the model has no denoiser")
    width, tokens = denoiser.width, model.vision.image_tokens
    # matrices of width x width per token: qkv and projection 4, MLP of ratio 4 8, modulation with six vectors 6
    block = 2 * tokens * width * width * 18 + 4 * tokens**2 * width
    ends = 2 * tokens * width * (2 * pixels.token_channels + 2 * width)
    return denoiser.draws * (denoiser.depth * block + ends) + 2 * tokens * model.language.hidden_size * width


def encoder_values(model: ModelConfig) -> float:
    """Values that the pointwise work of the VAE encoder reads and writes for one image.

    A residual block passes over its values fifteen times: twice a norm, an activation and the ends of a convolution,
    and once a sum.
    """
    if model.pixel_decoder is None:
        return 0.0
    config, side = model.pixel_decoder.diffusers, float(model.decode_image_size)
    blocks, channels = int(config.get("layers_per_block", 1)), [int(c) for c in config["block_out_channels"]]
    values = [width * (side / 2.0**level) ** 2 for level, width in enumerate(channels)]
    return 15 * (blocks * sum(values) + 2 * values[-1])


def _encoder_flops(model: ModelConfig) -> float:
    """Forward operations of the VAE encoder for one image (diffusers AutoencoderKL, convolutions and mid attention)."""
    if model.pixel_decoder is None:
        raise ValueError("the model has no pixel decoder")
    config = model.pixel_decoder.diffusers
    channels = [int(c) for c in config["block_out_channels"]]
    side = float(model.decode_image_size)
    total = 2 * side**2 * 9 * 3 * channels[0]
    previous = channels[0]
    for index, width in enumerate(channels):
        for _ in range(int(config.get("layers_per_block", 1))):
            total += 2 * side**2 * 9 * (previous * width + width * width) + (previous != width) * 2 * side**2 * (
                previous * width
            )
            previous = width
        if index < len(channels) - 1:
            side /= 2
            total += 2 * side**2 * 9 * width * width
    middle = 2 * side**2 * (4 * 9 * previous**2)
    if config.get("mid_block_add_attention", True):
        middle += 2 * side**2 * 4 * previous**2 + 4 * side**4 * previous
    return total + middle + 2 * side**2 * 9 * previous * 2 * int(config["latent_channels"])
