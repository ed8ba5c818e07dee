"""Makes valid files of every kind with the tools themselves, and imports the modules that the tools import."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.recorded import GOLDEN
from tests.soak.fuzz import child
from tests.soak.fuzz.brought import make_brought

TRAIN = """\
training-stage: finetune
template: qwen_2
image-aspect-ratio: pad
seq-length: 128
global-batch-size: 2
micro-batch-size: 1
lr: 1.0e-4
num-workers: 0
eval-images: 1
clip-grad: 1
save-interval: 5
log-interval: 1
"""
MIXTURE = """\
datasets:
  - {path: shards, weight: 2, name: first}
  - {path: more, weight: 1, image_aspect_ratio: square, name: second}
"""
HELD = """\
- {path: more, name: held}
- {path: shards, image_aspect_ratio: square, name: seen}
"""
MAKE_SHARDS = "--tokenizer tokenizer --template qwen_2 --num-workers 1"
STEPS: tuple[tuple[str, str], ...] = (
    (
        "tools/convert_hf_to_mcore.py",
        "--ross-model ross --tokenizer tokenizer --vision-model tower --pixel-decoder vae --save base",
    ),
    ("tools/make_shards.py", f"--data records.json --image-folder images --out shards --shard-size 4 {MAKE_SHARDS}"),
    ("tools/make_shards.py", f"--data records.jsonl --image-folder images --out more {MAKE_SHARDS}"),
    ("tools/index_shards.py", "--data-path shards --tokenizer tokenizer --template qwen_2 --num-workers 0"),
    (
        "tools/precompute_latents.py",
        "--load base --data-path shards --out latents --image-aspect-ratio pad --latents --features --num-workers 1",
    ),
    (
        "tools/index_shards.py",
        "--data-path file://{here}/shards/shard-00000.tar file://{here}/shards/shard-00001.tar --out remote "
        "--tokenizer tokenizer --template qwen_2 --num-workers 0 --data-cache-dir cache",
    ),
    (
        "pretrain_ross.py",
        "--config run.yaml --load base --data-path shards --valid-data-path shards --valid-samples 2 --save run "
        "--train-iters 1",
    ),
    ("tools/convert_mcore_to_hf.py", "--load base --save parts --format hf"),
    ("tools/convert_mcore_to_hf.py", "--load base --save siglip-ross-qwen2 --format ross --max-shard-size 300KB"),
)
"""Scripts and arguments, in order: each reads the output of earlier ones. `{here}`: the folder of all of them."""


class InputsError(RuntimeError):
    """A tool failed on valid files, so that there is nothing to fuzz."""


def make_inputs(folder: Path, log: Path) -> None:
    """Fills the new `folder` with valid inputs. Raises InputsError with a tool's message."""
    folder.mkdir(parents=True)
    (folder / "tmp").mkdir()
    recorded = GOLDEN / "model_qwen2_siglip" / "hf_checkpoint"
    for source, name in (
        (recorded, "ross"),
        (GOLDEN / "components" / "tiny_siglip", "tower"),
        (GOLDEN / "components" / "tiny_vae", "vae"),
        (GOLDEN / "data" / "tok_qwen2", "tokenizer"),
        (GOLDEN / "data" / "images", "images"),
    ):
        shutil.copytree(source, folder / name)
    (folder / "images" / "inner").mkdir()
    records = [_record(number) for number in range(8)]
    (folder / "records.json").write_text(json.dumps(records))
    (folder / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records[:5]))
    (folder / "run.yaml").write_text(TRAIN)
    (folder / "mixture.yaml").write_text(MIXTURE)
    (folder / "held.yaml").write_text(HELD)
    make_brought(folder)
    _record_parts(folder / "recorded")
    _record_model(folder / "model")
    for script, arguments in STEPS:
        require_works(script, arguments.format(here=folder).split(), folder, log)
    shutil.rmtree(folder / "tmp")
    _as_torch(folder / "parts", folder / "torch")
    bad = {"iteration": 1, "position": 0, "shard": "s", "key": "k", "reason": "a picture", "replaced_by": None}
    (folder / "run" / "quarantine.jsonl").write_text(json.dumps(bad) + "\n")


def _as_torch(parts: Path, target: Path) -> None:
    """A copy of exported parts with weights in pytorch_model.bin, the language model's in two files with an index."""
    shutil.copytree(parts, target)
    for path in target.glob("*/*.safetensors"):
        tensors, stem = load_file(path), {"model": "pytorch_model"}.get(path.stem, path.stem)
        path.unlink()
        if path.parent.name != "language_model":
            torch.save(tensors, path.with_name(f"{stem}.bin"))
            continue
        files = {name: f"{stem}-0000{1 + number % 2}-of-00002.bin" for number, name in enumerate(tensors)}
        for file in set(files.values()):
            torch.save({name: tensors[name] for name in tensors if files[name] == file}, path.with_name(file))
        path.with_name(f"{stem}.bin.index.json").write_text(json.dumps({"weight_map": files}))


def require_works(script: str, arguments: Sequence[str], folder: Path, log: Path) -> None:
    """Runs a script, then imports its modules here, so that the next one does not have to."""
    names = log.with_suffix(".modules")
    outcome = child.run(script, arguments, folder, log, names, writable=(".",))
    if outcome.status != 0:
        raise InputsError(f"{script} {' '.join(arguments)} ended with {outcome.status}: {outcome.stderr[-3000:]}")
    for name in names.read_text().split():
        if not name.startswith(("script_", "torch._dynamo", "torch._inductor")):
            try:
                importlib.import_module(name)
            except Exception:  # noqa: S112  a module that some other one made up
                continue


def _record_parts(folder: Path) -> None:
    """Recorded values without whole models, with few conversations."""
    shutil.copytree(GOLDEN / "components", folder / "components")
    shutil.copytree(GOLDEN / "data", folder / "data")
    for name in ("diffusion_schedule", "diffusion_toy", "denoiser_dit_small", "vae_target_siglip"):
        shutil.copyfile(GOLDEN / f"{name}.safetensors", folder / f"{name}.safetensors")
    path = folder / "data" / "conversations.json"
    conversations = json.loads(path.read_bytes())
    kept = {case: conversations["tokenized"][case] for case in ("qwen|qwen_2", "qwen|plain")}
    path.write_text(json.dumps(conversations | {"tokenized": kept}))


def _record_model(folder: Path) -> None:
    """One recorded model, without its training curves."""
    shutil.copytree(GOLDEN / "components", folder / "components")
    source = GOLDEN / "model_qwen2_siglip"
    for name in ("oracle.json", "oracle.safetensors"):
        (folder / source.name).mkdir(exist_ok=True)
        shutil.copyfile(source / name, folder / source.name / name)
    shutil.copytree(source / "hf_checkpoint", folder / source.name / "hf_checkpoint")


def _record(number: int) -> dict[str, object]:
    pictures = ("img0.png", "img1.png", "img2.png", "img_gray.png")
    turns = [{"from": "human", "value": f"What is {number}?"}, {"from": "gpt", "value": f"It is {number} lines."}]
    record: dict[str, object] = {"id": f"r{number}", "conversations": turns}
    if number % 3:
        turns[0]["value"] = "<image>\n" + turns[0]["value"]
        record["image"] = pictures[number % 4]
    return record
