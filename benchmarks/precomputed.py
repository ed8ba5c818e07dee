"""Savings of precomputing: time of a training step with pictures, with latents, and with latents and features.

    python benchmarks/precomputed.py

The demo's model trains on drawn pictures, in one process and one thread. The methods run in turn; the fastest step of
each is compared, because a busy machine affects it least. Nothing is run at full size: the share of tower and VAE in a
step's operations is counted for Qwen2-7B, SigLIP-SO400M at 384 pixels and the FLUX VAE, with 300 text tokens per
picture.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from data import DEMO, ROOT, WORDS, convert_demo, draw_picture

from ross_mcore.architecture import (
    DenoiserConfig,
    LanguageConfig,
    ModelConfig,
    PixelDecoderConfig,
    Precomputed,
    ProjectorConfig,
    VisionConfig,
)
from ross_mcore.flops import forward_flops, step_flops
from ross_mcore.shards.llava import convert_records
from ross_mcore.shards.measure import Measure
from ross_mcore.shards.writer import ShardWriter

WAYS = {"pictures": [], "latents": ["--latents"], "latents and features": ["--latents", "--features"]}
SKIPPED_STEPS = 2


def full_size_model() -> ModelConfig:
    tower = {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304, "patch_size": 14}
    tower |= {"num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 384}
    vae = {"latent_channels": 16, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}
    vae |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    return ModelConfig(
        LanguageConfig("qwen2", 3584, 18944, 28, 28, 4, 128, 152064, 32768, 1e-6, 1e6, False, True),
        VisionConfig(tower, (0.5,) * 3, (0.5,) * 3),
        ProjectorConfig(),
        DenoiserConfig.from_type("denoiser_vit3x"),
        PixelDecoderConfig(vae),
    )


def saved_share(llm_trains: bool, precomputed: Precomputed) -> float:
    """Share of a step's operations that precomputing saves."""
    model = full_size_model()

    def step(given: Precomputed) -> float:
        parts = forward_flops(model, tokens=729 + 300, labelled_tokens=300, precomputed=given)
        return step_flops(parts, model.language.num_hidden_layers, llm_trains, vision_trains=False)

    return 1 - step(precomputed) / step(Precomputed())


def run(arguments: list[str]) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{arguments[0]}: {done.stderr.strip() or done.stdout.strip()}")


def make_shards(folder: Path, count: int) -> Path:
    rng = np.random.default_rng(0)
    pictures, records = folder / "pictures", []
    pictures.mkdir()
    for number in range(count):
        draw_picture(rng).save(pictures / f"{number}.jpg", quality=85)
        turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": " ".join(WORDS[:8])}]
        records.append({"image": f"{number}.jpg", "conversations": turns})
    with ShardWriter(folder / "shards") as writer:
        convert_records(records, pictures, writer, Measure())
    return folder / "shards"


def step_seconds(folder: Path, shards: Path, name: str, iterations: int) -> list[float]:
    flags = ["--config", str(DEMO / "finetune.yaml"), "--load", str(folder / "base"), "--data-path", str(shards)]
    flags += ["--save", str(folder / name), "--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1"]
    run(["pretrain_ross.py", *flags, "--train-iters", str(iterations)])
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [line["step_seconds"] for line in lines[SKIPPED_STEPS:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=64, help="samples of the data set [%(default)s]")
    parser.add_argument("--iterations", type=int, default=8, help="steps of every run [%(default)s]")
    parser.add_argument("--repeats", type=int, default=2, help="turns of each method [%(default)s]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        convert_demo(folder / "base")
        places = {"pictures": make_shards(folder, options.samples)}
        for way, kinds in list(WAYS.items())[1:]:
            places[way] = folder / way.replace(" ", "_")
            where = ["--load", str(folder / "base"), "--data-path", str(places["pictures"]), "--out", str(places[way])]
            run(["tools/precompute_latents.py", *where, *kinds, "--image-aspect-ratio", "square"])
        taken: dict[str, list[float]] = {way: [] for way in WAYS}
        for turn in range(options.repeats):
            for way, shards in places.items():
                taken[way] += step_seconds(folder, shards, f"run_{way}_{turn}".replace(" ", "_"), options.iterations)
        fastest = {way: min(seconds) for way, seconds in taken.items()}
    print("the demo's model, a step of 8 samples:")
    for way, seconds in fastest.items():
        print(f"  {way:<21} {seconds * 1e3:6.0f} ms   {fastest['pictures'] / seconds:.2f}x")
    print("full size, operations of a step saved:")
    for stage, llm_trains in (("pretrain", False), ("finetune", True)):
        shares = saved_share(llm_trains, Precomputed(latents=True)), saved_share(llm_trains, Precomputed(True, True))
        print(f"  {stage:<21} latents {shares[0]:.1%}, and features {shares[1]:.1%}")


if __name__ == "__main__":
    main()
