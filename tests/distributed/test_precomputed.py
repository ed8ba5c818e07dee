"""Training on precomputed parts equals training on the pictures: same losses and gradients, complete checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ross_mcore.checkpoint.safe_load import StoredTensors
from ross_mcore.data.shard_reader import ShardReader
from ross_mcore.shards.llava import convert_records
from ross_mcore.shards.measure import Measure
from ross_mcore.shards.precompute import Precomputation, load_picture_parts
from ross_mcore.shards.writer import ShardWriter
from tests.distributed.cases import Case, layout
from tests.distributed.conftest import Finished, records
from tests.distributed.harness import run_ranks
from tests.distributed.test_layouts import assert_same, gradients
from tests.recorded import GOLDEN

KINDS = ("latents", "features")


def precompute(base: Path, shards: Path, out: Path, kinds: list[str], aspect_ratio: str, drop_images: bool) -> None:
    """Runs on each rank."""
    import os

    from ross_mcore import platform

    platform.initialize_process_group(timeout_minutes=1)
    parts = load_picture_parts(base, kinds, aspect_ratio, "fp32")  # type: ignore[arg-type]
    Precomputation(ShardReader(shards), out, parts, drop_images).run(
        int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    )


@pytest.fixture(scope="module")
def precomputed(workplace: Path, base: Callable[[str], Path], shards: Callable[[str], Path]) -> Callable[..., Path]:
    def get(data: str, *kinds: str, aspect_ratio: str = "pad", drop_images: bool = False) -> Path:
        out = workplace / f"precomputed_{data}_{'_'.join(kinds)}_{aspect_ratio}_{drop_images}"
        if not out.exists():
            arguments = (list(kinds), aspect_ratio, drop_images)
            source = even_shards(workplace) if data == "even" else shards(data)
            run_ranks(precompute, 2, base("qwen2_siglip"), source, out, *arguments)
        return out

    return get


def even_shards(workplace: Path) -> Path:
    """Sixteen captions in two shards, so that no picture is computed alone."""
    folder = workplace / "shards_even"
    if not folder.exists():
        with ShardWriter(folder, max_samples=8) as writer:
            convert_records(records("captions"), GOLDEN / "data" / "images", writer, Measure())
    return folder


def weights(run: Finished, iteration: int = 3) -> StoredTensors:
    return StoredTensors(run.folder / f"iter_{iteration:07d}")


@pytest.mark.parametrize("kinds", [KINDS, ("latents",), ("features",)], ids="+".join)
def test_one_process_is_exact(
    kinds: tuple[str, ...], start: Callable[..., Finished], precomputed: Callable[..., Path], workplace: Path
) -> None:
    """Equal bits. Every row has a picture, so that VAE and tower get two at a time: a convolution of a single one sums
    in another order. Without pictures in the shards, none can have been decoded."""
    case = Case("tp1", 1, stage="pretrain")
    drop_images = kinds == KINDS
    data = precomputed("even", *kinds, aspect_ratio="square", drop_images=drop_images)
    expected = start(case, "precomputed_reference", data_path=str(even_shards(workplace)))
    run = start(case, f"precomputed_exact_{len(kinds)}_{kinds[0]}", data_path=str(data))
    for ours, theirs in zip(run.metrics, expected.metrics, strict=True):
        for name in ("lm_loss", "vm_loss", "grad_norm", "sample_digest"):
            assert ours[name] == theirs[name], name
    theirs_by_name = gradients(expected)
    for name, gradient in gradients(run).items():
        assert torch.equal(gradient, theirs_by_name[name]), name
    ours_stored, theirs_stored = weights(run), weights(expected)
    assert set(ours_stored.names()) == set(theirs_stored.names())
    for name in theirs_stored.names():
        assert torch.equal(ours_stored.read(name), theirs_stored.read(name)), name


CASES = [
    Case("tp2xpp2", 4, layout(2, 2)),
    Case("blank samples tp2xpp2", 4, layout(2, 2), common=(("vm_loss_rows", "all"),)),
    Case("packed tp2xpp2+sp", 4, layout(2, 2, sequence_parallel=True), common=(("pack", True), ("seq_length", 256))),
    Case("sparse tp2", 2, layout(2), data="sparse"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layouts_read_their_share(
    case: Case,
    start: Callable[..., Finished],
    reference: Callable[[Case], Finished],
    precomputed: Callable[..., Path],
) -> None:
    """Compared with one process that computes everything from the pictures."""
    data = precomputed(case.data, *KINDS, drop_images=True)
    run = start(case, "precomputed_" + case.name.replace(" ", "_"), data_path=str(data), num_workers=1)
    assert_same(run, reference(case), 1e-6)


def test_a_run_resumes_without_precomputed_parts(
    start: Callable[..., Finished], reference: Callable[[Case], Finished], precomputed: Callable[..., Path]
) -> None:
    """A run on precomputed parts resumes from the pictures at another layout: its checkpoints are complete."""
    case = Case("tp2", 2, layout(2))
    start(case, "precomputed_then_not", data_path=str(precomputed("mixed", *KINDS)), exit_duration_in_mins=1e-6)
    run = start(Case("pp2", 2, layout(1, 2)), "precomputed_then_not", precomputed=False)
    assert [entry["iteration"] for entry in run.metrics] == [1, 2, 3]
    assert_same(run, reference(case), 1e-6)


def test_reconstructions_need_only_the_vae(start: Callable[..., Finished], precomputed: Callable[..., Path]) -> None:
    data = precomputed("mixed", *KINDS, drop_images=True)
    case = Case("pp2", 2, layout(1, 2))
    run = start(case, "precomputed_pictures", data_path=str(data), eval_interval=3, eval_images=2, eval_answers=0)
    assert list((run.folder / "tensorboard").iterdir()) and len(run.metrics) == 3
