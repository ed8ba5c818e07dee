"""`local` and Transformer Engine layers load each other's checkpoints; FP8 runs resume exactly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ross_mcore.checkpoint.safe_load import read_metadata, read_tensor, tensor_shapes
from ross_mcore.checkpoint.torch_dist import FP8_PREFIX
from tests.distributed.cases import Case, layout
from tests.distributed.conftest import Finished, moved
from tests.distributed.harness import run_ranks
from tests.distributed.test_layouts import assert_same
from tests.te.test_fp8 import FP8

ENGINE = {"transformer_impl": "transformer_engine"}
HISTORY = {**FP8, "fp8_amax_history_len": 4, "fp8_amax_compute_algo": "max"}
SWITCHES = [
    ("local, then TE", Case("", 1), Case("", 2, {**ENGINE, **layout(2, sequence_parallel=True)})),
    ("TE, then local", Case("", 2, {**ENGINE, **layout(1, 2)}), Case("", 1)),
]


@pytest.mark.parametrize(("name", "before", "after"), SWITCHES, ids=[row[0] for row in SWITCHES])
def test_a_run_resumes_with_the_other_layers(
    name: str, before: Case, after: Case, start: Callable[..., Finished], reference: Callable[[Case], Finished]
) -> None:
    """One step with one kind, two with the other at another layout: equal to the uninterrupted local run."""
    folder = "switch_" + name.replace(" ", "_").replace(",", "")
    start(before, folder, exit_duration_in_mins=1e-6)
    run = start(after, folder)
    assert_same(run, reference(Case("", 1)), 1e-5)


@pytest.mark.parametrize("options", [{}, {"bf16": True}, FP8], ids=["fp32", "bf16", "FP8"])
def test_a_checkpoint_from_before_the_first_applied_step_resumes(
    options: dict[str, Any], start: Callable[..., Finished]
) -> None:
    """Transformer Engine's Adam has a step counter only after its first step."""
    case, name = Case("", 1, {**ENGINE, **options}), f"late_{'_'.join(options)}"
    straight = start(case, name, skip_iterations="1", save_interval=None)
    start(case, f"{name}_stopped", skip_iterations="1", exit_interval=1)
    run = start(case, f"{name}_stopped", skip_iterations="1", save_interval=None)
    assert run.metrics[1:] and moved(straight.folder / "iter_0000003", run.folder / "iter_0000003") == 0.0


def scales(folder: Path) -> dict[str, Any]:
    metadata = read_metadata(folder)
    names = [name for name in tensor_shapes(metadata) if name.startswith(FP8_PREFIX)]
    return {name.removeprefix(FP8_PREFIX): read_tensor(folder, metadata, name) for name in names}


def refuse_others(checkpoint: Path) -> None:
    """Missing values other than FP8 state are an error that names them."""
    import torch
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from ross_mcore import platform
    from ross_mcore.checkpoint.folder import find_checkpoint
    from ross_mcore.checkpoint.sharded import load_training_state
    from ross_mcore.errors import CheckpointError

    platform.initialize_process_group(1)
    found = find_checkpoint(checkpoint)
    assert found is not None
    piece = ShardedTensor.from_rank_offsets
    scale = piece(FP8_PREFIX + "layers.9.mlp.linear_fc1.scale_fwd", torch.ones(3))
    with pytest.raises(CheckpointError) as error:
        load_training_state(found, {"model": {"x": piece("language_model.x", torch.ones(3))}, "fp8": {"scale": scale}})
    assert "it lacks language_model.x" in str(error.value) and "scale" not in str(error.value)


def test_fp8_resumes_exactly(start: Callable[..., Finished]) -> None:
    """Scales and histories are saved and restored: all numbers of the stopped run equal those of the other, bit by bit.

    Tensor-parallel ranks agree on them, so they are stored once; the same run without them gives other numbers.
    """
    case = Case("", 2, {**HISTORY, **layout(2, sequence_parallel=True)})
    whole = start(case, "fp8_whole")
    start(case, "fp8_stopped", exit_duration_in_mins=1e-6)
    stopped = start(case, "fp8_stopped")
    for name in ("lm_loss", "vm_loss", "grad_norm"):
        assert [entry[name] for entry in stopped.metrics] == [entry[name] for entry in whole.metrics]
    last = "iter_0000003"
    ours, theirs = scales(stopped.folder / last), scales(whole.folder / last)
    assert len(ours) == 4 * 4 * 4 and ours.keys() == theirs.keys()
    assert all(bool((ours[name] == theirs[name]).all()) for name in ours)
    histories = [tensor for name, tensor in theirs.items() if "amax_history_fwd" in name]
    assert all(len(history) == 4 and history[-1].any() for history in histories)

    other = start(case, "fp8_stopped_other", exit_duration_in_mins=1e-6)
    other = start(case, "fp8_stopped_other", fp8_amax_history_len=2)  # no histories of this length: they start empty
    assert other.metrics[1]["lm_loss"] != whole.metrics[1]["lm_loss"]
    assert other.metrics[1]["lm_loss"] == pytest.approx(whole.metrics[1]["lm_loss"], rel=2e-2)
    bf16 = start(Case("", 1, {"bf16": True}), "fp8_stopped_other", train_iters=4)  # local layers do not use them
    assert len(bf16.metrics) == 4 and not scales(bf16.folder / "iter_0000004")
    run_ranks(refuse_others, 1, whole.folder)
