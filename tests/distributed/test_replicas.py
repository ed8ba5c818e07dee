"""Copies of weights that differ by one bit, and frozen weights that change, end a run on all ranks and are named."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ross_mcore.checkpoint.folder import find_checkpoint
from tests.distributed.cases import INTERLEAVED, Case, layout
from tests.distributed.conftest import run_options
from tests.distributed.harness import run_ranks


@dataclass(frozen=True)
class Fault:
    """After `iteration` steps, one bit of a weight of the last chunk, or of its Adam moment, is flipped on `ranks`.

    Without ranks, the part of the model named `weight` is not frozen although the options freeze it.
    """

    name: str
    case: Case
    weight: str
    ranks: tuple[int, ...]
    expected: str
    moment: str | None = None
    iteration: int = 1
    passed: int = 1
    """Number of checks before it that pass."""
    flags: dict[str, Any] = field(default_factory=dict)


TENSOR_AND_DATA = Case("", 4, layout(2))  # rank = tensor rank + 2 * data rank
SECOND_STEP = {"iteration": 2, "flags": {"check_replicas_interval": 1}}

FAULTS = [
    Fault(
        "denoiser on one of four",
        TENSOR_AND_DATA,
        "denoiser.blocks.1.mlp.fc2.bias",
        (1,),
        "iteration 2: denoiser.blocks.1.mlp.fc2.bias, in the denoiser, is not the same on all ranks of its "
        "tensor-parallel group: rank 1 deviates from ranks 0, 2, 3. .*Checkpoints up to iteration 1 are from before it",
        passed=2,
        **SECOND_STEP,
    ),
    Fault(
        "sharded linear",
        Case("", 4, layout(2, use_distributed_optimizer=True)),
        "language_model.decoder.layers.0.mlp.linear_fc1.weight",
        (2,),
        r"iteration 2: language_model.decoder.layers.0.mlp.linear_fc1.weight \(part 1 of 2\), in the decoder layer 0, "
        "is not the same on all ranks of its data-parallel group: ranks 0, 2 do not agree",
        passed=2,
        **SECOND_STEP,
    ),
    Fault(
        "tied embedding",
        Case("", 4, layout(2, 2, sequence_parallel=True), family="tied"),
        "language_model.output_layer.weight",
        (2,),
        r"language_model.embedding, tied to the output layer \(part 1 of 2\), in the embedding, is not the same "
        "on all ranks of its embedding group: ranks 0, 2 do not agree",
    ),
    Fault(
        "a frozen tower, on all",
        TENSOR_AND_DATA,
        "vision_model.tower.encoder.layers.1.mlp.fc1.weight",
        (0, 1, 2, 3),
        "vision_model.tower.encoder.layers.1.mlp.fc1.weight, in the vision tower, is frozen and was changed since the "
        "start, on ranks 0, 1, 2, 3 of the 4 that hold it",
    ),
    Fault(
        "a moment, interleaved",
        Case("", 4, layout(1, 2, **INTERLEAVED)),
        "language_model.decoder.layers.0.self_attention.linear_qkv.bias",
        (3,),
        "optimizer.state.exp_avg.language_model.decoder.layers.3.self_attention.linear_qkv.bias, in the decoder "
        "layer 3, is not the same on all ranks of its data-parallel group: ranks 2, 3 do not agree",
        moment="exp_avg",
    ),
    Fault(
        "trains by mistake",
        Case("", 4, layout(2), stage="pretrain"),
        "language_model",
        (),
        "iteration 2: language_model.* is frozen and was changed since the start, on ranks 0, 2 of the 2 that hold it",
        iteration=2,
        flags={"lr_warmup_iters": 1},
    ),
    Fault(
        "what was loaded",
        TENSOR_AND_DATA,
        "language_model.decoder.layers.2.pre_mlp_layernorm.weight",
        (3,),
        "iteration 0: language_model.decoder.layers.2.pre_mlp_layernorm.weight, .* rank 3 deviates from ranks 0, 1, 2. "
        "All ranks loaded the same weights of .*iter_0000000, .*check_checkpoint.py",
        iteration=0,
        passed=0,
    ),
]

SOUND = Case("tied", 4, layout(2, 2, sequence_parallel=True, **INTERLEAVED), family="tied")


def flip_a_bit(tensor: torch.Tensor) -> None:
    tensor.detach().view(-1).view(torch.int32)[-1] ^= 1


def train_with(fault: Fault | None, flags: dict[str, Any]) -> tuple[int, str, int]:
    """Exit status, standard error, and the number of passed checks."""
    from ross_mcore.commands.train import train_status
    from ross_mcore.config import Config
    from ross_mcore.engine import setup
    from ross_mcore.guards.replicas import ReplicaCheck

    set_trainable = setup.set_trainable

    def freeze_too_little(model: Any, *options: Any) -> None:
        set_trainable(model, *options)
        if fault is not None and not fault.ranks:
            getattr(model, fault.weight).requires_grad_(True)

    setup.set_trainable = freeze_too_little
    before, after, check = ReplicaCheck.at_start, ReplicaCheck.after_step, ReplicaCheck._check
    passed = []

    def strike(self: ReplicaCheck, iteration: int) -> None:
        if fault is None or iteration != fault.iteration or int(os.environ["RANK"]) not in fault.ranks:
            return
        weight = dict(self.run.engine.model.last.named_parameters())[fault.weight]
        (state,) = (part.optimizer.state for part in self.run.engine.optimizer.chained_optimizers)
        flip_a_bit(state[weight][fault.moment] if fault.moment else weight)

    def at_start(self: ReplicaCheck, state: Any) -> None:
        strike(self, state.iteration)
        before(self, state)

    def after_step(self: ReplicaCheck, result: Any, incidents: Any) -> None:
        strike(self, result.state.iteration)
        after(self, result, incidents)

    def counted(self: ReplicaCheck, *arguments: Any) -> None:
        check(self, *arguments)
        passed.append(1)

    ReplicaCheck.at_start, ReplicaCheck.after_step, ReplicaCheck._check = at_start, after_step, counted
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        status = train_status(Config.from_flat(**flags))
    ReplicaCheck.at_start, ReplicaCheck.after_step, ReplicaCheck._check = before, after, check
    setup.set_trainable = set_trainable
    return status, errors.getvalue(), len(passed)


def train_one_after_another(jobs: list[tuple[Fault | None, dict[str, Any]]], out: str) -> None:
    """Runs all jobs on each rank and writes their results to the rank's file in `out`. The jobs share the rendezvous,
    which a run leaves when it ends without an error: only the last one does."""
    Path(out, os.environ["RANK"]).write_text(json.dumps([train_with(fault, flags) for fault, flags in jobs]))


def test_a_wrong_bit_ends_the_run_on_all_ranks_and_is_named(
    base: Callable[[str], Path], shards: Callable[[str], Path], tmp_path: Path
) -> None:
    """All runs in the same four processes. Runs with a fault end before anything is saved, although a save was due; all
    checks before the fault, and those of the last run, pass."""

    def options(case: Case, name: str, **flags: Any) -> dict[str, Any]:
        return run_options(case, tmp_path / name, base, shards, train_iters=2, **flags)

    jobs = [
        (fault, options(fault.case, fault.name, save_interval=fault.iteration or 1, **fault.flags)) for fault in FAULTS
    ]
    jobs.append((None, options(SOUND, "sound", save_interval=None, check_replicas_interval=1)))
    run_ranks(train_one_after_another, 4, jobs, str(tmp_path), limit_seconds=240)
    ends = [json.loads((tmp_path / str(rank)).read_text()) for rank in range(4)]
    for number, fault in enumerate(FAULTS):
        assert [end[number][::2] for end in ends] == [[2, fault.passed]] * 4, (fault.name, ends)
        errors = ends[0][number][1]
        assert re.search(fault.expected, errors) and "Traceback" not in errors, (fault.name, errors)
        assert find_checkpoint(tmp_path / fault.name) is None, fault.name
    assert [end[-1] for end in ends] == [[0, "", 3]] * 4
    assert find_checkpoint(tmp_path / "sound") is not None
