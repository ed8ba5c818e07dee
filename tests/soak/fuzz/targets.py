"""TABLE: which tool reads which files, and what it may leave behind when it refuses them."""

from __future__ import annotations

from dataclasses import dataclass

CHECKPOINT = ("*.json", "*.pt", ".metadata", "*.distcp", "tokenizer/*")
TRAIN = "--config in/run.yaml --train-iters 1 --save out/run --tensorboard-dir out/run/board"
RUN = ("run", "run/board", "run/board/*", "run/metrics.jsonl", "run/quarantine.jsonl")
"""What a run that ends on bad data leaves: figures, never a checkpoint that looks complete."""


@dataclass(frozen=True)
class Target:
    """A tool, and the files that it is given.

    inputs: names of valid files, copied to in/, or to out/ where they begin with `out/`. hostile: patterns, below the
    case's folder, of those that are damaged. may_leave: patterns, below out/, of what may be there, or have changed,
    after a refusal.
    """

    name: str
    script: str
    arguments: str
    inputs: tuple[str, ...]
    hostile: tuple[str, ...]
    may_leave: tuple[str, ...] = ()


def _below(folder: str, patterns: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{folder}/{pattern}" for pattern in patterns)


HUGGING_FACE = ("config.json", "*.safetensors", "preprocessor_config.json", "generation_config.json")
PARTS = (
    "--language-model in/parts/language_model --vision-model in/parts/siglip_vision_tower "
    "--pixel-decoder in/parts/pixel_decoder --mm-projector in/parts/mm_projector.bin "
    "--mm-inv-projector in/parts/mm_inv_projector.bin --denoiser-type denoiser_vit3x --denoiser-width 32 "
    "--save out/base"
)
INDEX = ("index.json", "*.npy", "keys.txt", "quarantine.jsonl", "*.tar")

TARGETS = (
    Target(
        "train: YAML",
        "pretrain_ross.py",
        f"{TRAIN} --load in/base --data-path in/shards",
        ("run.yaml", "base", "shards"),
        ("in/run.yaml",),
        RUN,
    ),
    Target(
        "train: mixture",
        "pretrain_ross.py",
        f"{TRAIN} --load in/base --data-path in/mixture.yaml",
        ("run.yaml", "base", "shards", "more", "mixture.yaml"),
        ("in/mixture.yaml",),
        RUN,
    ),
    Target(
        "train: shards",
        "pretrain_ross.py",
        f"{TRAIN} --load in/base --data-path in/shards",
        ("run.yaml", "base", "shards"),
        _below("in/shards", INDEX),
        RUN,
    ),
    Target(
        "train: precomputed",
        "pretrain_ross.py",
        f"{TRAIN} --load in/base --data-path in/latents",
        ("run.yaml", "base", "latents"),
        _below("in/latents", (*INDEX, "*.safetensors")),
        RUN,
    ),
    Target(
        "train: checkpoint",
        "pretrain_ross.py",
        f"{TRAIN} --load in/base --data-path in/shards",
        ("run.yaml", "base", "shards"),
        _below("in/base/iter_*", CHECKPOINT),
        RUN,
    ),
    Target(
        "train: resume",
        "pretrain_ross.py",
        f"{TRAIN} --train-iters 2 --load in/base --data-path in/shards",
        ("run.yaml", "base", "shards", "out/run"),
        ("out/run/*.jsonl", *_below("out/run/iter_*", ("train_state.json", *CHECKPOINT))),
        RUN,
    ),
    Target(
        "make_shards",
        "tools/make_shards.py",
        "--data in/records.json --image-folder in/images --out out/shards --tokenizer in/tokenizer --template qwen_2 "
        "--num-workers 1",
        ("records.json", "images", "tokenizer"),
        ("in/records.json", "in/records.json", "in/images/*", "in/tokenizer/*"),
    ),
    Target(
        "index_shards",
        "tools/index_shards.py",
        "--data-path out/shards --tokenizer in/tokenizer --template qwen_2 --num-workers 0",
        ("out/shards", "tokenizer"),
        (*_below("out/shards", (*INDEX, "index.parts/*.npz")), "in/tokenizer/*"),
        ("shards/quarantine.jsonl", "shards/index.parts/*"),
    ),
    Target(
        "inspect_shards",
        "tools/inspect_shards.py",
        "--data-path in/shards --seq-length 128 --image-tokens 16 --sample 000000001 --tokenizer in/tokenizer "
        "--template qwen_2 --contact-sheet out/sheet.png",
        ("shards", "tokenizer"),
        (*_below("in/shards", INDEX), "in/tokenizer/*"),
    ),
    Target(
        "precompute_latents",
        "tools/precompute_latents.py",
        "--load in/base --data-path in/shards --out out/latents --image-aspect-ratio pad --latents --features "
        "--num-workers 1",
        ("base", "shards"),
        (*_below("in/shards", INDEX), *_below("in/base/iter_*", CHECKPOINT)),
        ("latents", "latents/precompute.json", "latents/*.tar", "latents/index.parts", "latents/index.parts/*"),
    ),
    Target(
        "convert_hf_to_mcore: parts",
        "tools/convert_hf_to_mcore.py",
        PARTS,
        ("parts",),
        (
            *(
                pattern
                for part in ("language_model", "siglip_vision_tower", "pixel_decoder")
                for pattern in _below(f"in/parts/{part}", HUGGING_FACE)
            ),
            "in/parts/*.bin",
            "in/parts/language_model/tokenizer*",
        ),
    ),
    Target(
        "convert_hf_to_mcore: ROSS",
        "tools/convert_hf_to_mcore.py",
        "--ross-model in/ross --tokenizer in/tokenizer --vision-model in/tower --pixel-decoder in/vae --save out/base",
        ("ross", "tower", "vae", "tokenizer"),
        (*_below("in/ross", HUGGING_FACE), *_below("in/tower", HUGGING_FACE), "in/vae/*", "in/tokenizer/*"),
    ),
    Target(
        "convert_mcore_to_hf: ross",
        "tools/convert_mcore_to_hf.py",
        "--load in/base --save out/siglip-ross-qwen2 --format ross --max-shard-size 300KB",
        ("base",),
        _below("in/base/iter_*", CHECKPOINT),
    ),
    Target(
        "convert_mcore_to_hf: stage1",
        "tools/convert_mcore_to_hf.py",
        "--load in/run --save out/stage1 --format stage1",
        ("run",),
        _below("in/run/iter_*", ("train_state.json", *CHECKPOINT)),
    ),
    Target(
        "reconstruct",
        "tools/reconstruct.py",
        "--load in/run --image in/images/img0.png in/images/img1.png --output out/grid.png --steps 2",
        ("run", "images"),
        ("in/images/*.png", *_below("in/run/iter_*", ("train_state.json", *CHECKPOINT))),
    ),
)
