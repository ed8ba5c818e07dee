"""Speed of one worker process, compared with plain `webdataset` on the same tars and with PIL alone.

    python benchmarks/data.py

Pictures are drawn like photographs (smooth colours and noise, 640 x 480 JPEG of about 60 kB) and go through
SigLIP-384's preprocessing, padded to a square. Four methods, each in one worker process that returns 8 samples at a
time, interleaved and repeated; medians are compared:

- ours: StepLoader, from tar to tokens, labels and pictures as 8-bit levels, which the model normalises on its device
  (0.3 ms a picture on a core); in shuffled order;
- webdataset: the library's own pipeline over the same tars, front to back: decode with PIL, the same preprocessing to
  normalised float32, no tokens;
- PIL, prepared: the same pictures read from files in order, decoded and preprocessed: the minimum work for this tower;
- PIL, decoded: only decoded to RGB.

`ours / PIL, prepared` is the ratio of samples per second. A short training on the demo's parts then shows the share of
a step that waits for data, by number of worker processes.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ross_mcore.architecture import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from ross_mcore.data.image import ImagePreprocessing, decode_image
from ross_mcore.data.lengths import length_source
from ross_mcore.data.loader import StepLoader, StepPlan
from ross_mcore.data.order import BlockOrder
from ross_mcore.data.sample import ShardDataset
from ross_mcore.data.shard_reader import ShardReader
from ross_mcore.data.spec import SampleSpec
from ross_mcore.data.tokenizer import load_tokenizer
from ross_mcore.shards.llava import convert_records
from ross_mcore.shards.measure import Measure
from ross_mcore.shards.writer import ShardWriter

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "examples" / "demo"
ROWS = 8
"""Samples that a worker returns at a time."""
PREFETCHED = 2
WORDS = "the a red blue house tree stands beside road under sky and two people walk along water with boat".split()


def draw_picture(rng: np.random.Generator) -> Image.Image:
    """A smooth picture with noise, which JPEG compresses about as well as a photograph."""
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    coarse = coarse.resize((640, 480), Image.Resampling.BICUBIC)
    noisy = np.asarray(coarse, np.int16) + rng.integers(-12, 13, (480, 640, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def make_shards(folder: Path, count: int) -> tuple[Path, Path]:
    """(shards, pictures): `count` chats of two rounds, each about a picture."""
    rng = np.random.default_rng(0)
    pictures = folder / "pictures"
    pictures.mkdir()
    records = []
    for number in range(count):
        draw_picture(rng).save(pictures / f"{number}.jpg", quality=85)
        said = [" ".join(rng.choice(WORDS, 40)) for _ in range(4)]
        turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(said)]
        turns[0]["value"] = "<image>\n" + turns[0]["value"]
        records.append({"image": f"{number}.jpg", "conversations": turns})
    tokenizer = load_tokenizer(DEMO / "weights" / "tokenizer")
    spec = SampleSpec("qwen_2")
    with ShardWriter(folder / "shards", max_samples=count // 4, length_source=length_source(tokenizer, spec)) as writer:
        convert_records(records, pictures, writer, Measure(tokenizer, spec))
    return folder / "shards", pictures


def full_size_model() -> ModelConfig:
    """SigLIP-SO400M's input; the other values are not used."""
    tower = {"model_type": "siglip_vision_model", "image_size": 384, "patch_size": 14}
    vision = VisionConfig(tower | {"hidden_size": 8, "num_hidden_layers": 2}, (0.5,) * 3, (0.5,) * 3)
    language = LanguageConfig("qwen2", 8, 8, 1, 1, 1, 8, 512, 64, 1e-6, 1e4, True, True)
    return ModelConfig(language, vision, ProjectorConfig(), None, None)


class PictureFiles(Dataset[Any]):
    """Pictures by number, decoded and, with `prepare`, made a tower's input."""

    def __init__(self, folder: Path, prepare: ImagePreprocessing | None) -> None:
        self.folder, self.prepare = folder, prepare

    def __len__(self) -> int:
        return len(list(self.folder.iterdir()))

    def __getitem__(self, number: int) -> Any:
        picture = decode_image((self.folder / f"{number}.jpg").read_bytes()).picture
        return torch.from_numpy(self.prepare(picture)) if self.prepare else picture.size


class PlainWebDataset(IterableDataset[Any]):
    """The library's pipeline: tars front to back, members decoded with PIL, pictures made a tower's input."""

    def __init__(self, shards: Path, prepare: ImagePreprocessing) -> None:
        self.urls = [str(path) for path in sorted(shards.glob("*.tar"))]
        self.prepare = prepare

    def __iter__(self) -> Iterator[Any]:
        import webdataset

        pipeline = webdataset.WebDataset(self.urls, shardshuffle=False, empty_check=False).decode("pilrgb")
        for sample in pipeline:
            yield torch.from_numpy(self.prepare(sample["jpg"])), sample["json"]["conversations"]


def seconds_of(batches: Iterator[Any], count: int) -> float:
    """Seconds of `count` batches, after those produced during the worker's start."""
    for _ in range(PREFETCHED + 1):
        next(batches)
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    return time.perf_counter() - start


def compare(shards: Path, pictures: Path, count: int, repeats: int) -> dict[str, float]:
    """Median samples per second of each method."""
    tokenizer, spec = load_tokenizer(DEMO / "weights" / "tokenizer"), SampleSpec("qwen_2", "pad", seq_length=4096)
    dataset = ShardDataset(ShardReader(shards), tokenizer, full_size_model(), spec)
    one_worker: dict[str, Any] = {
        "batch_size": ROWS,
        "num_workers": 1,
        "prefetch_factor": PREFETCHED,
        "collate_fn": list,
    }

    def ours() -> float:
        order = BlockOrder(len(dataset), seed=0)
        with StepLoader(dataset, order, StepPlan(ROWS, ROWS), num_workers=1) as loader:
            return seconds_of(loader, count // ROWS)

    def through(data: Dataset[Any]) -> Callable[[], float]:
        return lambda: seconds_of(iter(DataLoader(data, **one_worker)), count // ROWS)

    ways = {
        "ours": ours,
        "webdataset": through(PlainWebDataset(shards, dataset.preprocessing)),
        "PIL, prepared": through(PictureFiles(pictures, dataset.preprocessing)),
        "PIL, decoded": through(PictureFiles(pictures, None)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            seconds[name].append(run())
    return {name: count / statistics.median(values) for name, values in seconds.items()}


def share_waiting(folder: Path, shards: Path, workers: int, iterations: int) -> float:
    """Share of the steps' time, without the first steps, that a training of the demo's model waits for data."""
    run = folder / f"run_{workers}"
    flags = {
        "--config": DEMO / "finetune.yaml",
        "--load": folder / "base",
        "--data-path": shards,
        "--save": run,
        "--tensor-model-parallel-size": 1,
        "--pipeline-model-parallel-size": 1,
        "--seq-length": 512,
        "--train-iters": iterations,
        "--num-workers": workers,
    }
    words = [str(word) for pair in flags.items() for word in pair]
    _run("pretrain_ross.py", *words)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][5:]
    return sum(line["data_seconds"] for line in lines) / sum(line["step_seconds"] for line in lines)


def _run(program: str, *words: str) -> None:
    done = subprocess.run([sys.executable, program, *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{program}: {done.stderr.strip() or done.stdout.strip()}")


def convert_demo(folder: Path) -> None:
    parts = {"--language-model": "language_model", "--vision-model": "vision_model", "--pixel-decoder": "pixel_decoder"}
    words = [str(word) for flag, part in parts.items() for word in (flag, DEMO / "weights" / part)]
    words += ["--tokenizer", str(DEMO / "weights" / "tokenizer"), "--denoiser-width", "64", "--save", str(folder)]
    _run("tools/convert_hf_to_mcore.py", *words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=160, help="of a repetition [%(default)s]")
    parser.add_argument("--repeats", type=int, default=5, help="[%(default)s]")
    parser.add_argument("--iterations", type=int, default=25, help="of the training [%(default)s]")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards, pictures = make_shards(folder, options.samples + (PREFETCHED + 2) * ROWS)
        picture = io.BytesIO((pictures / "0.jpg").read_bytes())
        print(f"pictures of {picture.getbuffer().nbytes / 1e3:.0f} kB; samples a second of one worker process:")
        rates = compare(shards, pictures, options.samples, options.repeats)
        for way, rate in rates.items():
            print(f"  {way:<14} {rate:7.1f}")
        print(f"ours / PIL, prepared  {rates['ours'] / rates['PIL, prepared']:.2f}")
        print(f"ours / webdataset     {rates['ours'] / rates['webdataset']:.2f}")
        print(f"ours / PIL, decoded   {rates['ours'] / rates['PIL, decoded']:.2f}")
        convert_demo(folder / "base")
        for workers in (0, 1, 2):
            share = share_waiting(folder, shards, workers, options.iterations)
            print(f"waiting for data, {workers} workers: {share:.1%} of a step")


if __name__ == "__main__":
    main()
