"""The architecture of a ROSS model: frozen dataclasses, stored as a checkpoint's `config.json`.

Imports no torch, so that `--help` and checks of options are fast. Vision tower and VAE keep their library's
configuration dictionary unchanged; the language model keeps Hugging Face's field names.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ross_mcore import checked, library_configs
from ross_mcore.errors import ArchitectureError
from ross_mcore.library_configs import MOST_LAYERS

FORMAT = "ross_mcore"
FORMAT_VERSION = 1
VOCAB_MULTIPLE = 128
"""The vocabulary is padded once, at conversion, so that a checkpoint fits every tensor-parallel degree that divides it.
"""

LONGEST = {"qwen2": 32768, "llama": 2048}
"""transformers' default of `max_position_embeddings`, by family."""

DENOISER_WIDTHS = {8: 1280, 12: 1536}
"""Width of `denoiser_vit{N}x` by depth N, 1024 otherwise (reference multimodal_projector/builder.py:47-66)."""


@contextmanager
def _malformed(what: str) -> Iterator[None]:
    """Turns a ValueError of the body into an ArchitectureError about `what`."""
    try:
        yield
    except ArchitectureError:
        raise
    except ValueError as error:
        raise ArchitectureError(f"{what}: {error}") from None


@dataclass(frozen=True)
class LanguageConfig:
    """A Qwen2 or Llama decoder, in the field names of its Hugging Face `config.json`."""

    model_type: Literal["qwen2", "llama"]
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    qkv_bias: bool

    def __post_init__(self) -> None:
        with _malformed("the language model"):
            fields = vars(self)
            for name in (field.name for field in dataclasses.fields(self) if field.type == "int"):
                checked.count(fields, name, most=MOST_LAYERS if name == "num_hidden_layers" else checked.MOST_COUNT)
            checked.real(fields, "rms_norm_eps", above=0)
            checked.real(fields, "rope_theta", above=0)
        if self.head_dim % 2:
            raise ArchitectureError(f"head_dim={self.head_dim} is odd; rotary embeddings turn pairs of numbers")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ArchitectureError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and output matrices: `vocab_size` rounded up to `VOCAB_MULTIPLE`."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @classmethod
    def from_huggingface(cls, config: dict[str, Any]) -> LanguageConfig:
        """Reads the dictionary of an HF `config.json` (transformers 4.x and 5.x spellings of rope).

        Raises ArchitectureError for a family or a feature (rope scaling, sliding window, attention bias on the output
        projection) that is not implemented, for keys that contradict each other, and for a missing or malformed value.
        """
        family = str(config.get("model_type", "")).removeprefix("ross_")
        if family not in ("qwen2", "llama"):
            raise ArchitectureError(
                f"model_type {checked.shown(config.get('model_type'))}: only qwen2 and llama are implemented; give the "
                "folder of such a language model"
            )
        with _malformed("the language model"):
            library_configs.check_language(config, family)
            heads, hidden = checked.count(config, "num_attention_heads"), checked.count(config, "hidden_size")
            if config.get("head_dim") is None and hidden % heads:
                raise ArchitectureError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
            return cls(
                model_type=family,  # type: ignore[arg-type]  # one of two, see above
                hidden_size=hidden,
                intermediate_size=checked.count(config, "intermediate_size"),
                num_hidden_layers=checked.count(config, "num_hidden_layers", most=MOST_LAYERS),
                num_attention_heads=heads,
                num_key_value_heads=checked.count(config, "num_key_value_heads", heads),
                head_dim=checked.count(config, "head_dim", max(1, hidden // heads)),
                vocab_size=checked.count(config, "vocab_size"),
                max_position_embeddings=checked.count(config, "max_position_embeddings", LONGEST[family]),
                rms_norm_eps=checked.real(config, "rms_norm_eps", 1e-6, above=0),
                rope_theta=library_configs.rope_theta(config),
                tie_word_embeddings=checked.switch(config, "tie_word_embeddings", False),
                qkv_bias=family == "qwen2",
            )


@dataclass(frozen=True)
class VisionConfig:
    """A SigLIP or CLIP vision tower: its unchanged HF configuration, and how ROSS uses it."""

    huggingface: dict[str, Any]
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]
    select_layer: int = -2

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_mean", tuple(self.image_mean))
        object.__setattr__(self, "image_std", tuple(self.image_std))
        if self.model_type not in ("siglip_vision_model", "clip_vision_model"):
            kind = checked.shown(self.huggingface.get("model_type"))
            raise ArchitectureError(f"vision model_type {kind}: only SigLIP and CLIP are implemented")
        with _malformed("the vision tower"):
            library_configs.check_vision(self.huggingface)
            for name, above in (("image_mean", -checked.MOST_COUNT), ("image_std", 0.0)):
                if len(values := getattr(self, name)) != 3:
                    raise ValueError(f"{name} has {len(values)} numbers, expected one for each of 3 colours")
                for channel in values:
                    checked.real({name: channel}, name, above=above)
        if not -self.num_layers - 1 <= self.select_layer <= -1:
            raise ArchitectureError(f"select_layer={self.select_layer} with {self.num_layers} vision layers")

    @property
    def model_type(self) -> str:
        return str(self.huggingface.get("model_type"))

    @property
    def num_layers(self) -> int:
        return int(self.huggingface["num_hidden_layers"])

    @property
    def hidden_size(self) -> int:
        return int(self.huggingface["hidden_size"])

    @property
    def intermediate_size(self) -> int:
        """Width of the layers' MLP; the default is transformers' for both towers."""
        return int(self.huggingface.get("intermediate_size", 3072))

    @property
    def image_size(self) -> int:
        return int(self.huggingface["image_size"])

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // int(self.huggingface["patch_size"])

    @property
    def image_tokens(self) -> int:
        """Tokens per image in the language model's sequence (`image_embed_len`): 576 or 729 at full size."""
        return self.grid**2


@dataclass(frozen=True)
class ProjectorConfig:
    """The MLP between tower and language model; `projector_type` is `linear` or `mlp{N}x_gelu`."""

    projector_type: str = "mlp2x_gelu"

    def __post_init__(self) -> None:
        if self.projector_type != "linear" and not re.fullmatch(r"mlp[1-9]\d*x_gelu", self.projector_type):
            raise ArchitectureError(
                f"projector_type {checked.shown(self.projector_type)}: expected linear or mlp<N>x_gelu"
            )
        if self.depth > MOST_LAYERS:
            raise ArchitectureError(f"projector_type {checked.shown(self.projector_type)}: over {MOST_LAYERS} layers")

    @property
    def depth(self) -> int:
        """Number of Linear layers."""
        return 1 if self.projector_type == "linear" else int(self.projector_type[3 : self.projector_type.index("x")])


@dataclass(frozen=True)
class DenoiserConfig:
    """The DiT that denoises latents, conditioned on the language model's hidden states (reference denoiser_dit.py)."""

    depth: int = 3
    width: int = 1024
    num_heads: int = 16
    draws: int = 4
    """(timestep, noise) draws per image and step; the reference tiles its batch four times."""

    def __post_init__(self) -> None:
        with _malformed("the denoiser"):
            for name in vars(self):
                checked.count(vars(self), name, most=checked.MOST_COUNT if name == "width" else MOST_LAYERS)
        if self.width % self.num_heads or self.width % 4:
            raise ArchitectureError(f"denoiser width {self.width} is not a multiple of {self.num_heads} heads and of 4")

    @classmethod
    def from_type(cls, denoiser_type: str, width: int | None = None) -> DenoiserConfig:
        """`denoiser_vit3x` -> depth 3, width 1024; `width` overrides the reference's table (small models)."""
        match = re.fullmatch(r"denoiser_vit([1-9]\d*)x", denoiser_type)
        if not match:
            raise ArchitectureError(f"denoiser type {checked.shown(denoiser_type)}: expected denoiser_vit<depth>x")
        depth = int(match[1][:9])
        return cls(depth=depth, width=width or DENOISER_WIDTHS.get(depth, 1024))


@dataclass(frozen=True)
class PixelDecoderConfig:
    """The frozen diffusers `AutoencoderKL`: its unchanged configuration."""

    diffusers: dict[str, Any]

    def __post_init__(self) -> None:
        with _malformed("the VAE"):
            library_configs.check_autoencoder(self.diffusers)

    @property
    def latent_channels(self) -> int:
        return int(self.diffusers["latent_channels"])

    @property
    def downsampling(self) -> int:
        """Image pixels per latent pixel along one side (8 for FLUX)."""
        return int(2 ** (len(self.diffusers["block_out_channels"]) - 1))

    @property
    def token_channels(self) -> int:
        """Channels of a latent token, a group of 2x2 latent pixels (`mm_inv_hidden_size`, 64 for FLUX)."""
        return 4 * self.latent_channels

    @property
    def scaling_factor(self) -> float:
        """Factor that gives latents unit variance, applied after the shift; the default is diffusers'."""
        return float(self.diffusers.get("scaling_factor", 0.18215))

    @property
    def shift_factor(self) -> float:
        """Subtracted from latents before they are scaled."""
        return float(self.diffusers.get("shift_factor") or 0.0)


@dataclass(frozen=True)
class Precomputed:
    """Outputs of frozen parts that a run reads from its shards instead of computing them at every step."""

    features: bool = False
    """Features of the vision tower, which is then not built."""
    latents: bool = False
    """Mean and log-variance of the VAE's posterior; the VAE does not run."""


NOTHING_PRECOMPUTED = Precomputed()


@dataclass(frozen=True)
class ModelConfig:
    """A model. Without `denoiser` and `pixel_decoder` it is a plain LLaVA model, trained on lm_loss only."""

    language: LanguageConfig
    vision: VisionConfig
    projector: ProjectorConfig
    denoiser: DenoiserConfig | None
    pixel_decoder: PixelDecoderConfig | None

    def __post_init__(self) -> None:
        if (self.denoiser is None) != (self.pixel_decoder is None):
            raise ArchitectureError("a model needs both denoiser and pixel_decoder, or neither; one is missing")

    @property
    def decode_image_size(self) -> int:
        """Side in pixels of images for the VAE, such that there is one latent token per image token.

        Raises ArchitectureError for a model without a pixel decoder. Source: reference ross_arch.py:95.
        """
        if self.pixel_decoder is None:
            raise ArchitectureError("this model has no pixel decoder, so it cannot encode or reconstruct pictures")
        return self.vision.grid * self.pixel_decoder.downsampling * 2

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one picture's latents: 2x2 latent pixels per image token. Raises ArchitectureError."""
        if self.pixel_decoder is None:
            raise ArchitectureError("this model has no pixel decoder, so its pictures have no latents")
        return self.pixel_decoder.latent_channels, 2 * self.vision.grid, 2 * self.vision.grid

    @property
    def feature_shape(self) -> tuple[int, int]:
        """(N, D) of the vision tower's features of one picture."""
        return self.vision.image_tokens, self.vision.hidden_size

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": FORMAT_VERSION, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, data: Any, source: str = "config.json") -> ModelConfig:
        """Rebuilds the configuration; `source` names the file in errors."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ArchitectureError(
                f"{source} is not a {FORMAT} model description; convert the model with tools/convert_hf_to_mcore.py"
            )
        if data.get("version") != FORMAT_VERSION:
            raise ArchitectureError(
                f"{source} has format version {checked.shown(data.get('version'))}; this code reads 1"
            )
        built: dict[str, Any] = {}
        try:
            for name, hint in typing.get_type_hints(cls).items():
                part, *optional = typing.get_args(hint) or (hint,)
                missing = optional and data.get(name) is None
                built[name] = None if missing else checked.build(part, data.get(name), f"section {name!r}")
            return cls(**built)
        except ValueError as error:
            raise ArchitectureError(f"{source}: {error}; copy the file again, or convert the model again") from None


def read_model_config(checkpoint: Path) -> ModelConfig:
    """Reads `checkpoint/config.json`. Raises ArchitectureError naming the file when it is missing or malformed."""
    path = Path(checkpoint) / "config.json"
    try:
        data = checked.read_json(path)
    except FileNotFoundError:
        raise ArchitectureError(f"{path} does not exist: {checkpoint} is not a checkpoint of this trainer") from None
    except ValueError as error:
        raise ArchitectureError(f"{path} cannot be read: {error}; copy the file again") from None
    return ModelConfig.from_dict(data, str(path))
