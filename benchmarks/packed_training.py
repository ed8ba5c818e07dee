"""Samples per second of real training, packed and padded, on the lengths of instruction data.

    python benchmarks/packed_training.py

The demo's model trains on drawn conversations whose lengths are those of benchmarks/packing.py ("instructions", an
eighth of their tokens, for rows of 512), with the same number of rows per micro-batch and four micro-batches a step.
Packed, a row is full of samples; apart (--no-pack), it has one, rows of similar length share a micro-batch and are as
long as its longest. One process, one thread; the two run in turn. Compared are samples per second over all steps except
the first; fill is the share of the computed tokens that are not padding.
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
from data import DEMO, ROOT, WORDS, convert_demo
from packing import instruction_lengths
from PIL import Image

from ross_mcore.data.lengths import length_source
from ross_mcore.data.spec import SampleSpec
from ross_mcore.data.tokenizer import encode, load_tokenizer
from ross_mcore.shards.llava import convert_records
from ross_mcore.shards.measure import Measure
from ross_mcore.shards.writer import ShardWriter

SCALE = 8
ROW_TOKENS = 4096 // SCALE
MICRO_BATCHES = 4


def make_shards(folder: Path, count: int) -> Path:
    """`count` conversations of one round with about the drawn lengths, and with a picture if the drawn one has it."""
    rng = np.random.default_rng(0)
    tokenizer = load_tokenizer(DEMO / "weights" / "tokenizer")
    tokens_a_word = len(encode(" ".join(WORDS), tokenizer)) / len(WORDS)
    pictures = folder / "pictures"
    pictures.mkdir()
    Image.new("RGB", (64, 64), (90, 120, 200)).save(pictures / "0.png")
    records = []
    for number, tokens in enumerate(instruction_lengths(rng, count, 576) // SCALE):
        with_picture = number % 16 != 0
        words = max(1, int((min(tokens, ROW_TOKENS) - 72 * with_picture - 45) / tokens_a_word))
        turns = [{"from": "human", "value": "<image>" * with_picture}, {"from": "gpt", "value": ""}]
        turns[0]["value"] += " What is this?"
        turns[1]["value"] = " ".join(rng.choice(WORDS, words))
        records.append({"conversations": turns} | ({"image": "0.png"} if with_picture else {}))
    spec = SampleSpec("qwen_2")
    with ShardWriter(folder / "shards", length_source=length_source(tokenizer, spec)) as writer:
        convert_records(records, pictures, writer, Measure(tokenizer, spec))
    return folder / "shards"


def trained(
    folder: Path, shards: Path, rows: int, pack: bool, iterations: int, turn: int
) -> tuple[float, float, float]:
    """(samples a second, samples a row, fill)."""
    run = folder / f"run_{rows}_{pack}_{turn}"
    words = ["--config", str(DEMO / "finetune.yaml"), "--load", str(folder / "base"), "--data-path", str(shards)]
    words += ["--save", str(run), "--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1"]
    words += ["--seq-length", str(ROW_TOKENS), "--train-iters", str(iterations), "--num-workers", "1"]
    words += ["--micro-batch-size", str(rows), "--global-batch-size", str(MICRO_BATCHES * rows)]
    words += ["--pack" if pack else "--no-pack"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "pretrain_ross.py", *words], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    if done.returncode:
        raise SystemExit(f"pretrain_ross.py: {done.stderr.strip() or done.stdout.strip()}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    samples = lines[-1]["consumed_samples"] - lines[0]["consumed_samples"]
    seconds, steps = sum(line["step_seconds"] for line in lines[1:]), len(lines) - 1
    return samples / seconds, samples / steps / MICRO_BATCHES / rows, sum(line["fill"] for line in lines[1:]) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32], help="of a micro-batch [8 32]")
    parser.add_argument("--iterations", type=int, default=4, help="steps of every run [%(default)s]")
    parser.add_argument("--repeats", type=int, default=2, help="[%(default)s]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        convert_demo(folder / "base")
        shards = make_shards(folder, 4000)
        for rows in options.rows:
            rates: dict[bool, list[tuple[float, float, float]]] = {True: [], False: []}
            for turn in range(options.repeats):
                for pack, found in rates.items():
                    found.append(trained(folder, shards, rows, pack, options.iterations, turn))
            packed, apart = (max(rate for rate, *_ in rates[pack]) for pack in (True, False))
            (_, held, fill), (_, _, fill_apart) = rates[True][0], rates[False][0]
            print(
                f"micro-batches of {rows} rows of {ROW_TOKENS} tokens: packed {packed:.1f}, apart {apart:.1f} "
                f"samples a second: {packed / apart:.2f}x; fill {fill:.1%} and {fill_apart:.1%}; a packed row holds "
                f"{held:.1f} samples"
            )


if __name__ == "__main__":
    main()
