"""Table of the tools, the files they read, and the files they may leave when they refuse them."""

from __future__ import annotations

from dataclasses import dataclass

CHECKPOINT = ("*.json", "*.pt", ".metadata", "*.distcp", "tokenizer/*")
TRAIN = "--config in/run.yaml --train-iters 1 --save out/run --tensorboard-dir out/run/board"
RUN_FILES = ("metrics", "validation", "quarantine", "incidents")
RUN = ("run", "run/.lock", "run/board", "run/board/*", *(f"run/{name}.jsonl" for name in RUN_FILES))
"""Files that a run leaves when it ends on bad data: logs, never a complete checkpoint."""
TRAINED = ("run/iter_*/complete.json", "run/metrics.jsonl")
SAVED = ("base/iter_0000000/complete.json",)


@dataclass(frozen=True)
class Target:
    """A tool and its files.

    inputs: names of valid files, copied to in/, or to out/ where they begin with `out/`. hostile: patterns, below the
    case's folder, of those that are damaged. may_leave: patterns, below out/, of what may be there, or have changed,
    after a refusal. makes: patterns, below out/, of what is there when it says that it worked. plants: names that it
    writes to in a folder that it was handed, where links out of the folder may wait. findings: exit statuses beside 0
    and 2, of a tool that looks for faults; names_findings: it says in which file. holds_options: the damaged file is
    one of flags, and an error may name the flag. chooses_paths: the damaged file says what is read, wherever it lies.
    """

    name: str
    script: str
    arguments: str
    inputs: tuple[str, ...]
    hostile: tuple[str, ...]
    may_leave: tuple[str, ...] = ()
    makes: tuple[str, ...] = ()
    plants: tuple[str, ...] = ()
    findings: tuple[int, ...] = ()
    names_findings: bool = False
    holds_options: bool = False
    chooses_paths: bool = False


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

RUN_PLANTS = (
    *(f"out/run/{name}.{suffix}" for name in RUN_FILES for suffix in ("jsonl", "partial")),
    *("out/run/latest_checkpointed_iteration.txt", "out/run/latest_checkpointed_iteration.txt.new"),
    *("out/run/.iter_0000002.partial", "out/run/iter_0000002", "out/run/.lock"),
)
MADE = ("shards/index.json", "shards/shard-00000.tar")
LEFT_OUT = ("shards.skipped.jsonl",)
INDEX_PLANTS = (
    *(f"out/shards/{name}" for name in ("index.json", "samples.npy", "images.npy", "keys.txt", "quarantine.jsonl")),
    "out/shards/index.parts",
)
PRECOMPUTED = (
    *("latents", "latents/precompute.json", "latents/*.tar", "latents/index.parts", "latents/index.parts/*"),
)
RECORDED = ("*.safetensors", "data/*.json", "data/*.safetensors", "data/images/*", "data/*/*.json", "components/*/*")

TARGETS = (
    Target(
        "train: YAML",
        "pretrain_ross.py",
        f"{TRAIN} --load in/base --data-path in/shards",
        ("run.yaml", "base", "shards"),
        ("in/run.yaml",),
        RUN,
        holds_options=True,
        chooses_paths=True,
    ),
    Target(
        "train: mixture",
        "pretrain_ross.py",
        f"{TRAIN} --load in/base --data-path in/mixture.yaml",
        ("run.yaml", "base", "shards", "more", "mixture.yaml"),
        ("in/mixture.yaml",),
        RUN,
        makes=TRAINED,
        chooses_paths=True,
    ),
    Target(
        "train: shards",
        "pretrain_ross.py",
        f"{TRAIN} --load in/base --data-path in/shards",
        ("run.yaml", "base", "shards"),
        _below("in/shards", INDEX),
        RUN,
        makes=TRAINED,
    ),
    Target(
        "train: held out",
        "pretrain_ross.py",
        f"{TRAIN} --load in/base --data-path in/shards --valid-data-path in/held.yaml --valid-samples 3",
        ("run.yaml", "base", "shards", "more", "held.yaml"),
        ("in/held.yaml", *_below("in/more", INDEX)),
        (*RUN, "run/iter_*", "run/iter_*/*", "run/latest_checkpointed_iteration.txt"),
        makes=(*TRAINED, "run/validation.jsonl"),
        chooses_paths=True,
    ),
    Target(
        "train: precomputed",
        "pretrain_ross.py",
        f"{TRAIN} --load in/base --data-path in/latents",
        ("run.yaml", "base", "latents"),
        _below("in/latents", (*INDEX, "*.safetensors")),
        RUN,
        makes=TRAINED,
    ),
    Target(
        "train: cache",
        "pretrain_ross.py",
        f"{TRAIN} --load in/base --data-path in/remote --data-cache-dir out/cache",
        ("run.yaml", "base", "remote", "out/cache"),
        ("in/remote/index.json", "out/cache/*.tar", "out/cache/*.tar", "out/cache/*.lock"),
        (*RUN, "cache", "cache/*"),
        makes=TRAINED,
    ),
    Target(
        "train: checkpoint",
        "pretrain_ross.py",
        f"{TRAIN} --load in/base --data-path in/shards",
        ("run.yaml", "base", "shards"),
        _below("in/base/iter_*", CHECKPOINT),
        RUN,
        makes=TRAINED,
    ),
    Target(
        "train: resume",
        "pretrain_ross.py",
        f"{TRAIN} --train-iters 2 --load in/base --data-path in/shards --valid-data-path in/shards --valid-samples 2",
        ("run.yaml", "base", "shards", "out/run"),
        ("out/run/*.jsonl", "out/run/*.txt", *_below("out/run/iter_*", ("train_state.json", *CHECKPOINT))),
        (*RUN, "run/latest_checkpointed_iteration.txt"),
        makes=("run/iter_0000002/complete.json", "run/metrics.jsonl"),
        plants=RUN_PLANTS,
    ),
    Target(
        "make_shards",
        "tools/make_shards.py",
        "--data in/records.json --image-folder in/images --out out/shards --tokenizer in/tokenizer --template qwen_2 "
        "--num-workers 1 --max-bad-fraction 1",
        ("records.json", "images", "tokenizer"),
        ("in/records.json", "in/records.json", "in/images/*", "in/tokenizer/*"),
        may_leave=LEFT_OUT,
        makes=MADE,
    ),
    Target(
        "make_shards: lines, again",
        "tools/make_shards.py",
        "--data in/records.jsonl --image-folder in/images --out out/shards --overwrite --num-workers 1 "
        "--truncated-images fill",
        ("records.jsonl", "images", "out/shards"),
        ("in/records.jsonl", "in/records.jsonl", "in/images/*", "out/shards/index.json"),
        may_leave=LEFT_OUT,
        makes=MADE,
        plants=("out/shards", "out/shards/index.json", "out/shards/shard-00000.tar", "out/shards.skipped.jsonl"),
    ),
    Target(
        "make_shards: forms",
        "tools/make_shards.py",
        "--data in/forms.json --image-folder in/pictures --out out/shards --tokenizer in/tokenizer "
        "--template in/chat.yaml --max-bad-fraction 0.5 --num-workers 1",
        ("forms.json", "pictures", "tokenizer", "chat.yaml"),
        ("in/forms.json", "in/pictures/*", "in/chat.yaml"),
        may_leave=LEFT_OUT,
        makes=MADE,
    ),
    Target(
        "make_shards: parquet",
        "tools/make_shards.py",
        "--data in/forms.parquet --out out/shards --max-bad-fraction 0.5 --num-workers 1",
        ("forms.parquet",),
        ("in/forms.parquet",),
        may_leave=LEFT_OUT,
        makes=MADE,
    ),
    Target(
        "index_shards: editions",
        "tools/index_shards.py",
        "--data-path in/editions --out out/shards --tokenizer in/tokenizer --template qwen_2 --max-bad-fraction 0.9 "
        "--num-workers 0",
        ("editions", "tokenizer"),
        ("in/editions/*.tar",),
        ("shards", "shards/quarantine.jsonl", "shards/index.parts", "shards/index.parts/*"),
        makes=("shards/index.json", "shards/samples.npy"),
    ),
    Target(
        "index_shards",
        "tools/index_shards.py",
        "--data-path out/shards --tokenizer in/tokenizer --template qwen_2 --num-workers 0",
        ("out/shards", "tokenizer"),
        (*_below("out/shards", (*INDEX, "*.tar", "index.parts/*.npz")), "in/tokenizer/*"),
        ("shards/quarantine.jsonl", "shards/index.parts", "shards/index.parts/*"),
        makes=("shards/index.json", "shards/samples.npy"),
        plants=INDEX_PLANTS,
    ),
    Target(
        "inspect_shards",
        "tools/inspect_shards.py",
        "--data-path in/shards --seq-length 128 --image-tokens 16 --sample 000000001 --tokenizer in/tokenizer "
        "--template qwen_2 --contact-sheet out/sheet.png",
        ("shards", "tokenizer"),
        (*_below("in/shards", INDEX), "in/tokenizer/*"),
        makes=("sheet.png",),
    ),
    Target(
        "precompute_latents",
        "tools/precompute_latents.py",
        "--load in/base --data-path in/shards --out out/latents --image-aspect-ratio pad --latents --features "
        "--num-workers 1",
        ("base", "shards"),
        (*_below("in/shards", INDEX), *_below("in/base/iter_*", CHECKPOINT)),
        PRECOMPUTED,
        makes=("latents/index.json", "latents/shard-00000.tar"),
    ),
    Target(
        "precompute_latents: resumes",
        "tools/precompute_latents.py",
        "--load in/base --data-path in/shards --out out/latents --image-aspect-ratio pad --latents --features "
        "--num-workers 1",
        ("base", "shards", "out/latents"),
        _below("out/latents", ("precompute.json", "*.tar", "index.parts/*", "*.safetensors", "index.json", "*.npy")),
        (*PRECOMPUTED, "latents/*.safetensors"),
        makes=("latents/index.json", "latents/shard-00000.tar"),
        plants=tuple(
            f"out/latents/{name}" for name in ("precompute.json", "shard-00000.tar", "index.json", "keys.txt")
        ),
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
            *("in/parts/*.bin", "in/parts/*.bin"),
            "in/parts/language_model/tokenizer*",
        ),
        makes=SAVED,
    ),
    Target(
        "convert_hf_to_mcore: torch.save",
        "tools/convert_hf_to_mcore.py",
        PARTS.replace("in/parts", "in/torch"),
        ("torch",),
        tuple(f"in/torch/{part}/*.bin*" for part in ("language_model", "siglip_vision_tower", "pixel_decoder")),
        makes=SAVED,
    ),
    Target(
        "convert_hf_to_mcore: ROSS",
        "tools/convert_hf_to_mcore.py",
        "--ross-model in/ross --tokenizer in/tokenizer --vision-model in/tower --pixel-decoder in/vae --save out/base",
        ("ross", "tower", "vae", "tokenizer"),
        (*_below("in/ross", HUGGING_FACE), *_below("in/tower", HUGGING_FACE), "in/vae/*", "in/tokenizer/*"),
        makes=SAVED,
    ),
    Target(
        "convert_hf_to_mcore: shards",
        "tools/convert_hf_to_mcore.py",
        "--ross-model in/siglip-ross-qwen2 --save out/base",
        ("siglip-ross-qwen2",),
        (
            *_below("in/siglip-ross-qwen2", ("*.index.json", "*.index.json", "*.safetensors", "*.safetensors")),
            *_below("in/siglip-ross-qwen2", ("config.json", "tokenizer*", "*/config.json", "*/*.safetensors")),
        ),
        makes=SAVED,
    ),
    Target(
        "convert_mcore_to_hf: ross",
        "tools/convert_mcore_to_hf.py",
        "--load in/base --save out/siglip-ross-qwen2 --format ross --max-shard-size 300KB",
        ("base",),
        _below("in/base/iter_*", CHECKPOINT),
        makes=("siglip-ross-qwen2/config.json", "siglip-ross-qwen2/*.safetensors"),
    ),
    Target(
        "convert_mcore_to_hf: stage1",
        "tools/convert_mcore_to_hf.py",
        "--load in/run --save out/stage1 --format stage1",
        ("run",),
        _below("in/run/iter_*", ("train_state.json", *CHECKPOINT)),
        makes=("stage1/config.json", "stage1/mm_projector.bin"),
    ),
    Target(
        "convert_mcore_to_hf: hf",
        "tools/convert_mcore_to_hf.py",
        "--load in/base --save out/parts --format hf",
        ("base",),
        _below("in/base/iter_*", CHECKPOINT),
        makes=("parts/language_model/config.json",),
    ),
    Target(
        "reconstruct",
        "tools/reconstruct.py",
        "--load in/run --image in/images/img0.png in/images/img1.png --output out/grid.png --steps 2",
        ("run", "images"),
        ("in/images/img[01].png", *_below("in/run/iter_*", ("train_state.json", *CHECKPOINT))),
        makes=("grid.png",),
        plants=("out/grid.png.partial",),
    ),
    Target(
        "check_checkpoint",
        "tools/check_checkpoint.py",
        "in/run --all",
        ("run",),
        ("in/run/*.txt", *_below("in/run/iter_*", ("train_state.json", *CHECKPOINT, "*.json"))),
        findings=(1,),
        names_findings=True,
    ),
    Target(
        "plan_layout: checkpoint",
        "tools/plan_layout.py",
        "--world-size 2 --load in/base --config in/run.yaml",
        ("run.yaml", "base"),
        _below("in/base/iter_*", ("*.json", "config.json")),
    ),
    Target(
        "plan_layout: parts",
        "tools/plan_layout.py",
        "--world-size 2 --language-model in/parts/language_model --vision-model in/parts/siglip_vision_tower "
        "--pixel-decoder in/parts/pixel_decoder --config in/run.yaml",
        ("run.yaml", "parts"),
        _below("in/parts", ("language_model/config.json", "siglip_vision_tower/*.json", "pixel_decoder/config.json")),
    ),
    Target(
        "check_parity: parts",
        "tools/check_parity.py",
        "--golden in/recorded --failures-only",
        ("recorded",),
        _below("in/recorded", RECORDED),
        findings=(1,),
    ),
    Target(
        "check_parity: model",
        "tools/check_parity.py",
        "--golden in/model --failures-only",
        ("model",),
        (
            *_below("in/model/model_*", ("oracle.json", "oracle.safetensors", "hf_checkpoint/*", "*.json")),
            "in/model/components/*/*",
        ),
        findings=(1,),
    ),
)
