"""A model with random weights, data of chosen lengths, and a training run of them: for counts and benchmarks.

Everything goes the way of a real run: Hugging Face folders are converted, records become shards, `open_run` opens the
run and its engine computes the steps.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ross_mcore.architecture import DenoiserConfig
from ross_mcore.commands import convert
from ross_mcore.config import Config
from ross_mcore.data.lengths import length_source
from ross_mcore.data.spec import SampleSpec
from ross_mcore.data.tokenizer import encode, load_tokenizer
from ross_mcore.engine.run import Run
from ross_mcore.models.denoiser import Denoiser
from ross_mcore.shards.llava import convert_records
from ross_mcore.shards.measure import Measure
from ross_mcore.shards.writer import ShardWriter
from ross_mcore.training.opening import open_run

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "examples" / "demo" / "weights" / "tokenizer"
WORDS = "the a red blue house tree stands beside road under sky and two people walk along water with boat".split()
TEMPLATE = "qwen_2"
FRAME_TOKENS = 27
"""Text tokens of a conversation of one round beside question and answer: system message, marks of turns."""


@dataclass(frozen=True)
class Sizes:
    """hidden, ffn, layers, heads, kv_heads, vocabulary: of Qwen2; tower_*: of SigLIP; vae: channels of its levels."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tower_hidden: int
    tower_layers: int
    image_size: int
    denoiser_width: int
    vae: tuple[int, ...]
    patch_size: int = 14

    @property
    def image_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2


SMALL = Sizes(64, 160, 4, 4, 2, 512, 32, 3, 56, 64, (8, 8))
"""For counts: 16 image tokens."""
STEP = Sizes(512, 1408, 8, 8, 2, 8192, 256, 6, 224, 256, (32, 64, 128, 128))
"""For times: 256 image tokens, 31 million parameters in the language model."""


def write_checkpoint(folder: Path, sizes: Sizes) -> Path:
    """Random weights as Hugging Face folders in `folder`/parts, and converted in `folder`/base, which is returned.

    The denoiser's zero weights are drawn too, as after some training.
    """
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(1)
    parts, levels = folder / "parts", len(sizes.vae)
    language = Qwen2Config(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.ffn,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        vocab_size=sizes.vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    tower = SiglipVisionConfig(
        hidden_size=sizes.tower_hidden,
        intermediate_size=4 * sizes.tower_hidden,
        num_hidden_layers=sizes.tower_layers,
        num_attention_heads=max(2, sizes.tower_hidden // 64),
        image_size=sizes.image_size,
        patch_size=sizes.patch_size,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=sizes.vae,
        latent_channels=16,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
    Qwen2ForCausalLM(language).save_pretrained(parts / "language_model")
    SiglipVisionModel(tower).save_pretrained(parts / "vision_model")
    vae.save_pretrained(parts / "pixel_decoder")
    processor = {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": sizes.image_size, "width": sizes.image_size},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (parts / "vision_model" / "preprocessor_config.json").write_text(json.dumps(processor))
    words = ["--language-model", parts / "language_model", "--vision-model", parts / "vision_model"]
    words += ["--pixel-decoder", parts / "pixel_decoder", "--tokenizer", TOKENIZER, "--save", folder / "base"]
    words += ["--denoiser-width", sizes.denoiser_width, "--mm-inv-projector", _denoiser(parts, sizes)]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        if convert.main(list(map(str, words))):
            raise SystemExit(said.getvalue())
    return folder / "base"


def _denoiser(parts: Path, sizes: Sizes) -> Path:
    """A file of a denoiser without zero weights, as stage 1 leaves it."""
    grid = sizes.image_size // sizes.patch_size
    denoiser = Denoiser(DenoiserConfig(width=sizes.denoiser_width), 64, sizes.hidden, grid)
    tensors = {name: weight.detach() for name, weight in denoiser.named_parameters()}
    tensors |= {name: torch.randn(weight.shape) * 0.02 for name, weight in tensors.items() if not weight.any()}
    path = parts / "mm_inv_projector.bin"
    torch.save({f"model.mm_inv_projector.net.{name}": tensor for name, tensor in tensors.items()}, path)
    return path


@dataclass(frozen=True)
class Wanted:
    """A conversation to make: text tokens, of which about `labels` are answers, with a picture or without."""

    text: int
    labels: int
    picture: bool = True


def write_shards(folder: Path, sizes: Sizes, samples: Sequence[Wanted]) -> Path:
    """Conversations of about these lengths in `folder`/shards, which is returned; pictures fit the tower."""
    rng = np.random.default_rng(0)
    tokenizer, spec = load_tokenizer(TOKENIZER), SampleSpec(TEMPLATE)
    pictures, records = folder / "pictures", []
    pictures.mkdir(parents=True)

    def said(tokens: int) -> str:
        words: list[str] = []
        while not words or len(encode(" ".join(words), tokenizer)) < tokens:
            words.append(str(rng.choice(WORDS)))
        return " ".join(words)

    for number, wanted in enumerate(samples):
        turns = [
            {"from": "human", "value": said(wanted.text - wanted.labels - FRAME_TOKENS)},
            {"from": "gpt", "value": said(wanted.labels - 1)},
        ]
        record: dict[str, Any] = {"id": str(number), "conversations": turns}
        if wanted.picture:
            size = sizes.image_size
            pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(pictures / f"{number}.png", compress_level=1)
            record["image"] = f"{number}.png"
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
        records.append(record)
    with ShardWriter(folder / "shards", length_source=length_source(tokenizer, spec)) as writer:
        convert_records(records, pictures, writer, Measure(tokenizer, spec))
    return folder / "shards"


def write_small(folder: Path) -> tuple[Path, Path]:
    """A checkpoint of the SMALL model and 24 samples of several lengths."""
    samples = [Wanted(64 + 7 * number % 40, 20) for number in range(24)]
    return write_checkpoint(folder, SMALL), write_shards(folder, SMALL, samples)


@contextmanager
def opened(base: Path, shards: Path, save: Path, **flags: Any) -> Iterator[Run]:
    """A run of `base` on `shards`, on this rank (environment: torchrun's, or none for one process). Collective."""
    options = {
        "load": base,
        "data_path": shards,
        "save": save,
        "training_stage": "finetune",
        "template": TEMPLATE,
        "train_iters": 1000,
        "seq_length": 2048,
        "num_workers": 0,
        "pack": False,
        "allow_missing_labels": True,
        **flags,
    }
    with ExitStack() as closing:
        yield open_run(Config.from_flat(**options), closing)[0]
