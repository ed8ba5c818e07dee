"""Every row of the table trains as one process does: same losses, same gradient norm, same gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from ross_mcore.checkpoint.safe_load import read_metadata, read_tensor, tensor_shapes
from ross_mcore.data.packing import pack
from ross_mcore.data.shard_reader import ShardReader
from tests.distributed.cases import CASES, GATHERED, Case, layout
from tests.distributed.conftest import Finished, moved, train_one_rank

FAMILIES = {
    "embedding": "language_model.embedding",
    "attention": "self_attention.linear_qkv.weight",
    "attention bias": "self_attention.linear_qkv.bias",
    "attention output": "self_attention.linear_proj",
    "mlp": "mlp.linear_fc",
    "norms": "norm",
    "output": "language_model.output_layer",
    "projector": "vision_projection",
    "vision tower": "vision_model",
    "denoiser": "denoiser",
}
FIRST_MOMENT = "optimizer.state.exp_avg."


def family_of(name: str) -> str:
    if "norm" in name and "language_model" in name:
        return "norms"
    return next(family for family, part in FAMILIES.items() if part in name)


def gradients(run: Finished, iteration: int = 1) -> dict[str, Tensor]:
    """Whole gradients of the first step, from its checkpoint: Adam's first moment is 0.1 times the (clipped) gradient.
    So the compared values have gone through the real reduction, sharding and saving."""
    folder = run.folder / f"iter_{iteration:07d}"
    metadata = read_metadata(folder)
    names = [name for name in tensor_shapes(metadata) if name.startswith(FIRST_MOMENT)]
    return {name.removeprefix(FIRST_MOMENT): read_tensor(folder, metadata, name) for name in names}


def compared_gradients(run: Finished, reference: Finished) -> tuple[dict[str, float], dict[str, float]]:
    """By family, the largest gradient of the reference's first step, and the largest difference to it."""
    ours, theirs = gradients(run), gradients(reference)
    assert ours.keys() == theirs.keys()
    largest: dict[str, float] = {}
    difference: dict[str, float] = {}
    for name, gradient in theirs.items():
        family = family_of(name)
        assert ours[name].shape == gradient.shape, name
        largest[family] = max(largest.get(family, 0.0), gradient.abs().max().item())
        difference[family] = max(difference.get(family, 0.0), (ours[name] - gradient).abs().max().item())
    return largest, difference


def assert_same(run: Finished, reference: Finished, relative: float, iterations: slice = slice(None)) -> None:
    for ours, expected in zip(run.metrics[iterations], reference.metrics[iterations], strict=True):
        for name in ("lm_loss", "vm_loss", "grad_norm"):  # a loss over nothing is None
            wanted = None if expected[name] is None else pytest.approx(expected[name], rel=relative)
            assert ours[name] == wanted, (name, ours["iteration"])
        for name in ("grad_norms", "learning_rates", "vm_loss_by_timestep"):
            assert _given(ours[name]) == pytest.approx(_given(expected[name]), rel=relative), (name, ours["iteration"])
        for name in ("sample_digest", "num_tokens", "num_images", "learning_rate", "consumed_samples"):
            assert ours[name] == expected[name], name
        assert ours.get("datasets", {}).keys() == expected.get("datasets", {}).keys()
        for name, dataset in ours.get("datasets", {}).items():
            assert dataset == pytest.approx(expected["datasets"][name], rel=relative), name
            assert dataset.keys() == {"samples", "labels", "images", "lm_loss", "vm_loss"}


def _given(values: dict[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_trains_like_one_process(
    case: Case, start: Callable[..., Finished], reference: Callable[[Case], Finished]
) -> None:
    expected = reference(case)
    run = start(case, case.name.replace(" ", "_"))
    assert_same(run, expected, case.relative)
    largest, difference = compared_gradients(run, expected)
    for family in largest:
        assert difference[family] <= case.relative * largest[family], (family, difference, largest)
    if case.data == "text_only":
        assert run.metrics[0]["num_images"] == 0 and run.metrics[0]["vm_loss"] is None
        assert largest["denoiser"] == largest["projector"] == 0
    elif case.data == "mixture":
        assert_adds_up(run)
    elif case.data == "sparse":
        assert 1 in [entry["num_images"] for entry in run.metrics]
    else:
        assert largest["denoiser"] > 0 and largest["projector"] > 0


def assert_adds_up(run: Finished) -> None:
    """The figures of the data sets add up to those of the step; both data sets occur."""
    consumed = 0
    for entry in run.metrics:
        own = list(entry["datasets"].values())
        assert sum(x["samples"] for x in own) == entry["consumed_samples"] - consumed
        consumed = entry["consumed_samples"]
        for loss, over, count in (("lm_loss", "labels", "num_tokens"), ("vm_loss", "images", "num_images")):
            assert sum(x[over] for x in own) == entry[count]
            total = (entry[loss] or 0) * entry[count]
            assert sum((x[loss] or 0) * x[over] for x in own) == pytest.approx(total, rel=1e-6)
    first, second = (sum(entry["datasets"][name]["samples"] for entry in run.metrics) for name in ("first", "second"))
    assert first > second > 0


@pytest.mark.parametrize(
    ("data", "layout_of_packed"),
    [
        ("mixed", {}),
        ("mixed", layout(2, 2, sequence_parallel=True)),
        ("several", layout(2, 2, sequence_parallel=True)),
    ],
    ids=["tp1", "tp2xpp2+sp", "several pictures tp2xpp2+sp"],
)
def test_packed_and_separate_samples_train_alike(
    data: str, layout_of_packed: dict, start: Callable[..., Finished], workplace: Path
) -> None:
    """One step over all sixteen samples, one per row and packed: same losses over all pictures.

    The draws of a picture depend on its sample's place in the stream, which is the same in both. Positions and
    attention restart with every sample, so only the order of sums differs.
    """
    separate = start(Case("", 1, data=data), f"samples_apart_{data}", **APART)
    world = 4 if layout_of_packed else 1
    flags = packed_flags(workplace / f"shards_{data}")
    packed = start(Case("", world, layout_of_packed, data=data), f"samples_packed_{data}_{world}", **flags)
    assert packed.metrics[0]["num_images"] == ShardReader(workplace / f"shards_{data}").num_images
    assert_same_step(packed, separate, 1e-5)
    theirs = gradients(separate)
    for name, gradient in gradients(packed).items():
        difference = (gradient - theirs[name]).abs().max()
        assert difference <= 1e-5 * theirs[name].abs().max() + 1e-9, name


APART: dict[str, Any] = {"train_iters": 1, "seq_length": 256, "global_batch_size": 16, "micro_batch_size": 4}
"""One step over all sixteen samples of a data set, each in a row of its own."""


def packed_flags(shards: Path) -> dict[str, Any]:
    """The same step with the samples of `shards` packed; the index gives the number of rows."""
    rows = packed_rows(shards, APART["seq_length"])
    assert 1 < rows < APART["global_batch_size"]
    return {**APART, "global_batch_size": rows, "micro_batch_size": 1, "pack": True}


def assert_same_step(packed: Finished, separate: Finished, relative: float, norm: float | None = None) -> None:
    """The same samples in another order. norm: relative difference of the gradient norm, if it is another."""
    (ours,), (theirs,) = packed.metrics, separate.metrics
    for name in ("num_tokens", "num_images", "consumed_samples"):
        assert ours[name] == theirs[name], name
    for name, allowed in (("lm_loss", relative), ("vm_loss", relative), ("grad_norm", norm or relative)):
        assert ours[name] == pytest.approx(theirs[name], rel=allowed), name


def packed_rows(shards: Path, seq_length: int) -> int:
    """The number of rows that the samples of `shards` fill, from the index."""
    samples = ShardReader(shards).samples
    lengths = samples["text_tokens"].astype(int) + 16 * samples["image_spans"].astype(int)
    return len(pack(lengths, seq_length, key=0))


def test_fp32_masters_go_from_optimizer_to_optimizer(start: Callable[..., Finished], workplace: Path) -> None:
    """Saved by one, loaded by the next at another layout and saved again untouched, the last of which trains in fp32.

    Longer sequences, and the training after them, are in test_layout_pairs.py.
    """
    bf16, plain = ("bf16", True), ("use_distributed_optimizer", False)
    first = start(Case("", 2, common=(bf16,)), "masters distributed", train_iters=1)
    cases = [Case("", 2, layout(2), common=(bf16, plain)), Case("", 2, layout(1, 2), common=(bf16,)), Case("", 2)]
    before = first.folder
    for number, case in enumerate(cases):
        after = workplace / "runs" / f"masters {number}"
        start(case, after.name, train_iters=1, load=str(before))
        assert moved(before / "iter_0000001", after / "iter_0000001") == 0
        before = after
    run = start(Case("", 2), "masters 2", train_iters=2, load=str(workplace / "runs" / "masters 1"))
    assert [entry["iteration"] for entry in run.metrics] == [2]


def train_in_small_buckets(flags: dict, stop_after: int | None = None) -> None:
    """Trains with every weight gathered separately, so that waiting for one module's does not gather another's."""
    from ross_mcore.engine import setup

    plain = setup.DistributedDataParallelConfig
    setup.DistributedDataParallelConfig = partial(plain, bucket_size=1)
    try:
        train_one_rank(flags, stop_after)
    finally:
        setup.DistributedDataParallelConfig = plain


@pytest.mark.parametrize(
    ("stage", "more"),
    [("finetune", {"vision_lr": 1e-4}), pytest.param("pretrain", {}, marks=pytest.mark.slow)],
    ids=["finetune", "pretrain"],
)
def test_weights_gathered_late_are_used_and_saved(
    stage: str, more: dict, start: Callable[..., Finished], reference: Callable[[Case], Finished]
) -> None:
    """A module waits for its own weights and a checkpoint for all; the checkpoint resumes like any other.

    Only the first and the last step are saved, because a save gathers weights for which no module has waited. Moments
    are saved under the right names, although buckets have padding between them.
    """
    case = Case("", 2, GATHERED, stage=stage, common=tuple(more.items()))
    name = f"gathered_late_{stage}"
    start(case, name, rank=train_in_small_buckets, save_interval=None, exit_interval=1)
    run = start(case, name, rank=train_in_small_buckets, save_interval=None)
    assert [entry["iteration"] for entry in run.metrics] == [1, 2, 3]
    assert_same(run, reference(case), 1e-5)
    largest, difference = compared_gradients(run, reference(case))
    for family in largest:
        assert difference[family] <= case.relative * largest[family], (family, difference, largest)
