"""Recorded models as base checkpoints, small data sets, and cached runs to compare with."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from ross_mcore.checkpoint.safe_load import read_metadata, read_tensor, tensor_shapes
from ross_mcore.checkpoint.torch_dist import MASTER_PREFIX
from ross_mcore.config import Config
from ross_mcore.data.lengths import length_source
from ross_mcore.data.spec import SampleSpec
from ross_mcore.data.tokenizer import load_tokenizer
from ross_mcore.shards.llava import convert_records
from ross_mcore.shards.measure import Measure
from ross_mcore.shards.writer import ShardWriter
from tests.distributed.cases import Case
from tests.distributed.harness import run_ranks
from tests.recorded import CHANGED, GOLDEN, changed_checkpoint, recorded_checkpoint

ITERATIONS = 3


def train_one_rank(flags: dict[str, Any], stop_after: int | None = None) -> None:
    """Trains on each rank; with `stop_after`, the logging rank gets SIGTERM and the run ends after that iteration."""
    from ross_mcore.commands.train import train_status
    from ross_mcore.reporting.files import MetricsFile
    from ross_mcore.reporting.metrics import StepMetrics

    write = MetricsFile.step

    def write_and_stop(log: MetricsFile, metrics: StepMetrics) -> None:
        write(log, metrics)
        if metrics.iteration == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)

    MetricsFile.step = write_and_stop
    try:
        status = train_status(Config.from_flat(**flags))
    finally:
        MetricsFile.step = write
    if status:
        raise SystemExit(status)


def records(kind: str) -> list[dict[str, Any]]:
    """Sixteen conversations; every third of `mixed` and all but every sixth of `sparse` are text only.

    Those of `several` have none to three pictures, in questions and in answers, side by side and not shown at all.
    """
    if kind == "several":
        return [_several(number) for number in range(16)]
    found = []
    for number in range(16):
        picture = {"mixed": number % 3 != 2, "sparse": number % 6 == 0, "text_only": False, "captions": True}[kind]
        question = f"<image>\nWhat is in picture {number}?" if picture else f"How much is {number} and one?"
        turns = [
            {"from": "human", "value": question},
            {"from": "gpt", "value": f"I see {number * 7} lines" * (1 + number % 3)},
        ]
        if kind == "mixed" and number % 2:
            turns += [{"from": "human", "value": "And then?"}, {"from": "gpt", "value": "Nothing more"}]
        record: dict[str, Any] = {"id": f"{kind}-{number}", "conversations": turns}
        if picture:
            record["image"] = f"img{number % 3}.png"
        found.append(record)
    return found


def _several(number: int) -> dict[str, Any]:
    texts: list[tuple[str, ...]] = [
        ("How much is two and one?", "Three."),
        ("<image><image>\nCompare them.", "The first has lines.", "And <image> ?", "More lines"),
        ("What is <image> here?", "It is like <image> is.", "Nothing more?", "No"),
        ("Describe them.", "I see many lines."),
    ]
    turns = [
        {"from": ("human", "gpt")[place % 2], "value": text.replace("lines", f"{number} lines")}
        for place, text in enumerate(texts[number % 4])
    ]
    pictures = [f"img{(number + ordinal) % 3}.png" for ordinal in range((0, 3, 2, 2)[number % 4])]
    return {"id": f"several-{number}", "image": pictures, "conversations": turns}


def stored(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    metadata = read_metadata(folder)
    for name in tensor_shapes(metadata):
        yield name, read_tensor(folder, metadata, name)


def moved(before: Path, after: Path) -> float:
    """The largest difference between two checkpoints' weights and moments, in fp32 where both have it.

    A weight with a master must be that master, rounded to the type of the weight. fp32 runs without the distributed
    optimizer store no masters; frozen weights have none either, and are rounded when a run resumes in bf16.
    """
    theirs, ours = dict(stored(before)), dict(stored(after))
    for tensors in (theirs, ours):
        for name in [name for name in tensors if name.startswith(MASTER_PREFIX)]:
            master, weight = tensors.pop(name), name.removeprefix(MASTER_PREFIX)
            assert torch.equal(master.to(tensors[weight].dtype), tensors[weight]), name
            tensors[weight] = master
    assert ours.keys() == theirs.keys()
    theirs = {name: tensor.to(ours[name].dtype) for name, tensor in theirs.items()}
    return max(float((ours[name].float() - theirs[name].float()).abs().max()) for name in ours if ours[name].numel())


@dataclass
class Finished:
    """A finished run: its folder and the objects of its metrics file."""

    folder: Path
    metrics: list[dict[str, Any]]


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tmp_path_factory.mktemp("distributed"))


@pytest.fixture(scope="session")
def base(workplace: Path) -> Callable[[str], Path]:
    def get(family: str) -> Path:
        root = workplace / f"base_{family}"
        if not root.exists():
            changed_checkpoint(family, root) if family in CHANGED else recorded_checkpoint(family, root)
        return root

    return get


@pytest.fixture(scope="session")
def shards(workplace: Path) -> Callable[[str], Path]:
    def get(kind: str) -> Path:
        if kind == "mixture":
            return mixture(get("mixed"), get("captions"))
        folder = workplace / f"shards_{kind}"
        if not folder.exists():
            write_shards(folder, kind)
        return folder

    return get


def write_shards(folder: Path, kind: str) -> None:
    """The conversations of `records(kind)` as shards of five."""
    tokenizer = load_tokenizer(GOLDEN / "data" / "tok_qwen2")
    spec = SampleSpec("qwen_2")
    with ShardWriter(folder, max_samples=5, length_source=length_source(tokenizer, spec)) as writer:
        convert_records(records(kind), GOLDEN / "data" / "images", writer, Measure(tokenizer, spec))


def mixture(first: Path, second: Path) -> Path:
    """A YAML file of two data sets: three samples of the first to one of the second, whose aspect ratio is square."""
    path = first.parent / "mixture.yaml"
    path.write_text(
        f"- {{path: {first.name}, weight: 3, name: first}}\n"
        f"- {{path: {second.name}, weight: 1, image_aspect_ratio: square, name: second}}\n"
    )
    return path


def run_options(
    case: Case, folder: Path, base: Callable[[str], Path], shards: Callable[[str], Path], **flags: Any
) -> dict[str, Any]:
    """The options of a case that is saved in `folder`."""
    return {
        "load": str(base(case.family)),
        "data_path": str(shards("captions" if case.stage == "pretrain" else case.data)),
        "save": str(folder),
        "training_stage": case.stage,
        "seq_length": 256,
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "train_iters": ITERATIONS,
        "lr": 1e-3,
        "lr_warmup_iters": 0,
        "denoiser_lr": 2e-3,
        "num_workers": 0,
        "pack": False,
        "save_interval": 1,
        "distributed_timeout_minutes": 1,
        **dict(case.common),
        **case.flags,
        **flags,
    }


@pytest.fixture(scope="session")
def start(workplace: Path, base: Callable[[str], Path], shards: Callable[[str], Path]) -> Callable[..., Finished]:
    """Starts or resumes a case in the folder of `name`; `rank` is the function that each rank runs."""

    def run(
        case: Case,
        name: str,
        stop_after: int | None = None,
        rank: Callable[[dict[str, Any], int | None], None] = train_one_rank,
        **flags: Any,
    ) -> Finished:
        folder = workplace / "runs" / name
        options = run_options(case, folder, base, shards, **flags)
        run_ranks(rank, case.world, options, stop_after)
        return Finished(folder, [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()])

    return run


@pytest.fixture(scope="session")
def reference(start: Callable[..., Finished]) -> Callable[[Case], Finished]:
    """The one-process run that a case is compared with; cached by stage, data and family."""
    made: dict[str, Finished] = {}

    def get(case: Case) -> Finished:
        key = f"reference {case.stage} {case.data} {case.family} {case.common}"
        if key not in made:
            made[key] = start(case.reference, key)
        return made[key]

    return get
