"""Numbers that are not finite, and loss spikes: they are found on any rank, named, and can be skipped."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ross_mcore.checkpoint.pieces import Slice
from ross_mcore.checkpoint.safe_load import read_common, read_metadata
from ross_mcore.data.shard_reader import ShardReader
from tests.distributed.cases import INTERLEAVED, PACKED, Case, layout
from tests.distributed.conftest import Finished, moved, run_options, train_one_rank
from tests.distributed.harness import run_ranks

SPOILT = {
    3: ("language_model.decoder.layers.2.mlp.linear_fc1.weight", "decoder layer 2"),
    5: ("vision_model", "vision tower"),
    7: ("language_model.embedding.word_embeddings.weight", "embedding"),
}
"""Iteration -> a weight with an infinity in it, on one rank, and what it belongs to."""


def train_with_broken_weights(flags: dict[str, Any], stop_after: int | None) -> None:
    """A rank that has a weight of SPOILT breaks it before that iteration and restores it before the next."""
    from ross_mcore.training import loop

    read_step, broken = loop.read_step, []

    def take(run: Any, state: Any, *others: Any) -> Any:
        while broken:
            place, value = broken.pop()
            place.copy_(value)
        begin = SPOILT.get(state.iteration + 1, ("nothing",))[0]
        own = [
            w for name, w in run.engine.model.named_weights() if name.startswith(begin) and run.groups.tensor_rank == 0
        ]
        for weight in own[:1]:
            place = weight.data.view(-1)[weight.numel() // 2 : weight.numel() // 2 + 1]
            broken.append((place, place.clone()))
            place.fill_(torch.inf)
        return read_step(run, state, *others)

    loop.read_step = take
    try:
        train_one_rank(flags, stop_after)
    finally:
        loop.read_step = read_step


def incidents(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "incidents.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "case",
    [Case("tp2xpp2", 4, layout(2, 2, sequence_parallel=True)), Case("interleaved", 2, layout(1, 2, **INTERLEAVED))],
    ids=lambda case: case.name,
)
def test_a_broken_weight_is_found_before_it_does_harm(case: Case, start: Callable[..., Finished]) -> None:
    """It is named, on whichever rank it is and even if no loss shows it; the run continues when it is restored."""
    run = start(case, f"broken_{case.name}", rank=train_with_broken_weights, train_iters=8, save_interval=None)
    assert [entry["iteration"] for entry in run.metrics if not entry["applied"]] == list(SPOILT)
    found = incidents(run.folder)
    assert [(entry["iteration"], entry["kind"]) for entry in found] == [(number, "not finite") for number in SPOILT]
    for entry, (name, family) in zip(found, SPOILT.values(), strict=True):
        assert f"weights are not finite from the {family} ({name}" in entry["reason"]
        assert entry["samples"] and all(sample["shard"].startswith("shard-") for sample in entry["samples"])
    assert "lm_loss nan" in found[0]["reason"] and "gradients are not from the denoiser (" in found[0]["reason"]
    if case.name == "tp2xpp2":  # the broken row belongs to a token that does not occur
        assert run.metrics[6]["lm_loss"] > 0 and run.metrics[6]["grad_norm"] > 0, "losses show nothing"


def start_from(flags: dict[str, Any]) -> None:
    from ross_mcore.commands.train import train_status
    from ross_mcore.config import Config

    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        status = train_status(Config.from_flat(**flags))
    expected = "weights are not finite from the projector (vision_projection.0.bias) on"
    if status != 2 or expected not in errors.getvalue():
        raise SystemExit(f"status {status}: {errors.getvalue()}")


def test_no_run_starts_from_weights_that_are_not_finite(
    base: Callable[[str], Path], shards: Callable[[str], Path], tmp_path: Path
) -> None:
    shutil.copytree(base("qwen2_siglip"), tmp_path / "base")
    folder = next((tmp_path / "base").glob("iter_*"))
    metadata = read_metadata(folder)
    (place,) = (at for index, at in metadata.storage_data.items() if index.fqn == "vision_projection.0.bias")
    with (folder / place.relative_path).open("r+b") as stream:
        begin = torch._C.PyTorchFileReader(Slice(stream, place.offset, place.length)).get_record_offset("data/0")
        stream.seek(place.offset + begin)
        stream.write(struct.pack("<f", float("nan")))
    flags = run_options(Case("", 1), tmp_path / "run", base, shards, load=str(tmp_path / "base"), verify=False)
    run_ranks(start_from, 1, flags)


def train_with_odd_samples(flags: dict[str, Any], stop_after: int | None) -> None:
    """The last sample of a micro-batch has an infinite loss in iteration 22, and ten times its loss in iteration 24."""
    from ross_mcore.models import ross
    from ross_mcore.training import loop

    read_step, plain, factor = loop.read_step, ross.RossModel._lm_sums, [1.0]

    def take(run: Any, state: Any, *others: Any) -> Any:
        factor[0] = {22: torch.inf, 24: 10.0}.get(state.iteration + 1, 1.0)
        return read_step(run, state, *others)

    def odd(model: Any, hidden: Any, batch: Any) -> Any:
        sums = plain(model, hidden, batch)
        return sums * sums.new_tensor([1.0] * (sums.numel() - 1) + factor)

    loop.read_step, ross.RossModel._lm_sums = take, odd
    try:
        train_one_rank(flags, stop_after)
    finally:
        loop.read_step, ross.RossModel._lm_sums = read_step, plain


@pytest.mark.parametrize(
    "case",
    [Case("dp2", 2, {"micro_batch_size": 1}), Case("pp2_packed", 2, layout(1, 2), common=PACKED)],
    ids=lambda case: case.name,
)
def test_samples_with_extreme_losses_are_named_and_can_be_skipped(
    case: Case, start: Callable[..., Finished], shards: Callable[[str], Path]
) -> None:
    """A loss that is not finite and one that is ten times as large; then a run without these iterations and samples.

    Without a learning rate, losses do not change, so only these two are reported.
    """
    options: dict[str, Any] = {"lr": 0.0, "denoiser_lr": 0.0, "train_iters": 25, "save_interval": None}
    options |= {"loss_spike_factor": 1.8}
    run = start(case, f"odd_{case.name}", rank=train_with_odd_samples, **options)
    found = {entry["iteration"]: entry for entry in incidents(run.folder)}
    assert {number: entry["kind"] for number, entry in found.items()} == {22: "not finite", 24: "spike"}
    assert [entry["applied"] for entry in run.metrics] == [number != 22 for number in range(1, 26)]
    assert "all weights are finite, gradients are not from the denoiser" not in found[22]["reason"]
    assert "all weights are finite, gradients are not from the output layer (" in found[22]["reason"]
    assert f"lm_loss {run.metrics[23]['lm_loss']:.4g} is " in found[24]["reason"]
    assert "of 22 steps" in found[24]["reason"], "the one that was not applied does not count"
    broken, large = found[22]["samples"], found[24]["samples"]
    assert broken and all(sample["lm_loss"] is None for sample in broken)
    assert len(large) >= 4 and large[0]["lm_loss"] > 5 * run.metrics[0]["lm_loss"]
    reader = ShardReader(shards("mixed"))
    known = dict(zip(reader.keys(range(16)), map(reader.shard_name, reader.samples["shard"].tolist())))
    assert all(known[sample["key"]] == sample["shard"] for entry in found.values() for sample in entry["samples"])

    named = {sample["key"] for sample in large[:2]}
    skips = {"skip_iterations": "22,24", "skip_samples": ",".join(named)}
    again = start(case, f"skipping_{case.name}", **skips, **options)
    assert [(entry["iteration"], entry["kind"]) for entry in incidents(again.folder)] == [
        (22, "skipped"),
        (24, "skipped"),
    ]
    listed = [json.loads(line) for line in (again.folder / "quarantine.jsonl").read_text().splitlines()]
    assert {entry["key"] for entry in listed} == named and not {entry["replaced_by"] for entry in listed} & named
    touched = {entry["iteration"] for entry in listed}
    for ours, theirs in zip(again.metrics, run.metrics, strict=True):
        assert ours["consumed_samples"] == theirs["consumed_samples"] and ours["bad_samples"] == 0
        assert ours["applied"] == (ours["iteration"] not in (22, 24))
        if ours["applied"]:
            assert (ours["lm_loss"] == theirs["lm_loss"]) == (ours["iteration"] not in touched)


@pytest.mark.parametrize(
    "case",
    [
        Case("fp32", 1),
        pytest.param(
            Case("bf16, masters on every rank", 1, {"bf16": True, "use_distributed_optimizer": False}),
            marks=pytest.mark.slow,
        ),
        pytest.param(Case("bf16", 1, {"bf16": True}), marks=pytest.mark.slow),
        pytest.param(
            Case("tp2, frozen LLM, sharded", 2, layout(2, use_distributed_optimizer=True), stage="pretrain"),
            marks=pytest.mark.slow,
        ),
        Case("dp2 distributed optimizer", 2, {"use_distributed_optimizer": True}),
    ],
    ids=lambda case: case.name,
)
def test_a_checkpoint_before_the_first_update_is_resumed_exactly(case: Case, start: Callable[..., Finished]) -> None:
    """A stop after two skipped steps: the same bits and the same step counts as without the stop."""
    skips = {"skip_iterations": "1-2", "train_iters": 4}
    name = case.name.replace(" ", "_")
    straight = start(case, f"{name}_late", save_interval=None, **skips)
    run = start(case, f"{name}_late_and_stopped", exit_interval=2, **skips)
    assert [entry["applied"] for entry in run.metrics] == [False] * 2 and (run.folder / "iter_0000001").is_dir()
    run = start(case, f"{name}_late_and_stopped", save_interval=None, **skips)
    assert [entry["applied"] for entry in run.metrics] == [False] * 2 + [True] * 2
    before, last, expected = (
        run.folder / "iter_0000002",
        run.folder / "iter_0000004",
        straight.folder / "iter_0000004",
    )
    assert moved(expected, last) == 0.0
    assert steps_of(before) == {0} and steps_of(last) == steps_of(expected) == {2}


def steps_of(folder: Path) -> set[int]:
    """Adam's step counts in a checkpoint."""
    optimizer = read_common(folder)["optimizer"]
    return {group["step"] for group in optimizer.get("optimizer", optimizer)["param_groups"]}
