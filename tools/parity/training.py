"""Rows of training: learning rates, optimizer settings of every parameter, training curves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from parity.golden import Golden
from parity.rows import Row, compare, compare_exactly, compare_sets
from parity.trial import STAGES, Layout, Trial, prepare, recorded_rows, replayed
from ross_mcore.checkpoint.folder import Checkpoint
from ross_mcore.engine.optimizer import (
    learning_rate,
    set_hyperparameters,
    warmup_iterations,
)
from ross_mcore.options import OptimizerOptions
from ross_mcore.parallel.collectives import gather

CURVE_TOLERANCE = 1e-4
"""Twenty steps of Adam, whose update is only the gradient's sign where gradients are as small as their rounding."""
SCHEDULE_TOLERANCE = 1e-12
"""The same cosine in float64, in another order of operations."""
ADAM_SHARE = 1e-2
"""Allowed difference of a final weight, relative to the largest movement under Adam (rate x steps); same reason."""
KEY_BIASES = ("attn.qkv.bias", "k_proj.bias")
"""A key's bias adds an equal amount to all scores of a query, except for rotation, so its gradient is mostly rounding,
from which Adam makes full steps: ten times that share."""


def schedule_rows(golden: Golden) -> Iterator[Row]:
    """The learning rate of every step of the recorded schedules, for both recorded groups."""
    if not golden.has("data/lr_schedule.json"):
        return
    for case in golden.json("data/lr_schedule.json", list):
        steps = case["total_steps"]
        options = OptimizerOptions(lr=case["base"])
        yield compare_exactly(
            "learning rate",
            f"{steps} steps: warm-up",
            [warmup_iterations(options, steps)],
            [case["warmup"]],
            "iterations",
        )
        for column, peak in enumerate((case["base"], case["second_group"])):
            recorded = [rates[column] for rates in case["lr_used_at_step"]]
            ours = [learning_rate(step, steps, options, peak) for step in range(len(recorded))]
            title = f"{steps} steps: rates with peak {peak:g}"
            yield compare("learning rate", title, ours, recorded, SCHEDULE_TOLERANCE)


def optimizer_rows(golden: Golden, name: str, checkpoint: Checkpoint, layout: Layout) -> Iterator[Row]:
    """Every parameter's learning rate, weight decay, betas and eps, in each recorded setting of the model's family."""
    if not golden.has("data/optimizer_groups.json"):
        return
    family = checkpoint.model_config().language.model_type
    for case, groups in golden.json("data/optimizer_groups.json").items():
        kind, stage, *options = case.split("|")
        if kind != family:
            continue
        settings = dict(option.split("=") for option in options)
        denoiser_lr = None if settings.get("inv_lr", "None") == "None" else float(settings["inv_lr"])
        theirs = {
            (key, group["lr"], group["wd"], *group["betas"], group["eps"]) for group in groups for key in group["names"]
        }
        peak = max(group["lr"] for group in groups)
        trial = prepare(
            checkpoint,
            STAGES[int(stage.removeprefix("stage"))],
            layout,
            lr=peak,
            denoiser_lr=denoiser_lr,
            weight_decay=max(group["wd"] for group in groups),
            decay_norm_weights=family == "qwen2",
        )
        set_hyperparameters(trial.engine.optimizer, 0, 1, trial.engine.config.optimizer)
        yield compare_sets("optimizer groups", f"{name} {case}", _optimizer_settings(trial), theirs, "parameters")


def _optimizer_settings(trial: Trial) -> set[tuple[Any, ...]]:
    """(their name, rate, decay, betas, eps) of every trained parameter of all stages. Collective."""
    group_of = {id(p): group for group in trial.engine.optimizer.param_groups for p in group["params"]}
    marked, settings = {}, []
    for key, parameter in trial.model.first.named_parameters():
        if parameter.requires_grad:
            group = group_of[id(parameter)]
            settings.append((group["lr"], group["weight_decay"], *group["betas"], group["eps"]))
            marked[key] = torch.full_like(parameter, float(len(settings) - 1))
    # settings are encoded as numbers in tensors, which are split and renamed like the parameters
    table = sorted({setting for own in gather(settings) for setting in own})
    coded = {key: value.fill_(float(table.index(settings[int(value.flatten()[0])]))) for key, value in marked.items()}
    found = trial.by_their_names(coded)
    return {(key, *table[int(value.flatten()[0])]) for key, value in found.items()}


def curve_rows(golden: Golden, name: str, checkpoint: Checkpoint, stage: int, layout: Layout) -> Iterator[Row]:
    """Twenty training steps on the recorded batches and draws."""
    curve = golden.json(f"{name}/train20_stage{stage}.json")
    tensors, _ = golden.tensors(f"{name}/train20.safetensors")
    train_iters = len(curve["batch_index"])
    trial = prepare(checkpoint, STAGES[stage], layout, train_iters=train_iters, lr=curve["lr"])
    for step, number in enumerate(curve["batch_index"]):
        rows = recorded_rows(tensors, f"batch{number}.", trial.model_config.vision)
        done = trial.train(rows, replayed(tensors, f"step{step:02d}.", rows), step)
        losses = done.losses
        ours = {"lm": losses.lm_loss or 0.0, "vm": losses.vm_loss or 0.0, "total": losses.loss}  # over nothing: 0
        ours["grad_norm"] = done.grad_norm
        for key, value in ours.items():
            title = f"{name} stage {stage} step {step + 1}: {key}"
            yield compare("curves", title, value, curve[key][step], CURVE_TOLERANCE)
    final, floor = trial.parameters(), ADAM_SHARE * curve["lr"] * train_iters
    for key, norm in curve.get("final_param_norms", {}).items():
        allowed = floor * (10 if key.endswith(KEY_BIASES) else 1)
        title = f"{name} stage {stage} after the last step: norm of {key}"
        own_norm = final[key].norm().item() if key in final else math.nan
        yield compare("trained weights", title, own_norm, norm, CURVE_TOLERANCE, allowed)
    for key, weight in tensors.items():
        if key.startswith("final.") and stage == 2:
            key = key.removeprefix("final.")
            own = final.get(key, math.nan * weight)
            yield compare("trained weights", f"{name} after the last step: {key}", own, weight, CURVE_TOLERANCE, floor)
