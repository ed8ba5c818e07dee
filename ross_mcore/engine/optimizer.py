"""The optimizer: which parameters train in which stage, and at which learning rate."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.optimizer import MegatronOptimizer, clip_grads, get_megatron_optimizer
from megatron.core.optimizer.optimizer_config import OptimizerConfig, ParamKey, ParamWithNamePredicate
from torch import Tensor

from ross_mcore import platform
from ross_mcore.config import Config
from ross_mcore.engine import adam
from ross_mcore.engine.chunks import ModelChunks
from ross_mcore.models.ross import RossModel
from ross_mcore.options import OptimizerOptions
from ross_mcore.parts import LANGUAGE_MODEL, PARTS, VISION_TOWER, Part, part_of, trains

DEFAULT_WARMUP_FRACTION = 0.03


def set_trainable(model: RossModel, training_stage: str, train_vision: bool) -> None:
    """Freezes all parameters that do not train (parts.trains). Layers that a trained tower never runs stay frozen."""
    for name, parameter in model.named_parameters():
        if not trains(name, training_stage == "finetune", train_vision):
            parameter.requires_grad_(False)
        elif part_of(name) is not VISION_TOWER:
            parameter.requires_grad_(True)


PART_TAGS = {part.prefix: part.optimizer_tag for part in PARTS if part.rate_option}
"""Part of the model -> the `lr_mult` of its parameter groups, 1 for the language model.

It is only a name: mcore matches the groups of a checkpoint with those of a run by `lr_mult` and `wd_mult`
(optimizer/optimizer.py:96), so `lr_mult` must not depend on the learning rate.
"""


def peak_rates(options: OptimizerOptions) -> dict[float, float]:
    """Tag of a part -> its peak learning rate."""
    own = {part.optimizer_tag: getattr(options, part.rate_option) for part in PARTS if part.rate_option}
    return {
        LANGUAGE_MODEL.optimizer_tag: options.lr,
        **{tag: options.lr if rate is None else rate for tag, rate in own.items()},
    }


def trained_parts(config: Config) -> list[Part]:
    """The parts of which any weight trains, in the order of the forward pass."""
    return [part for part in PARTS if trains(part.weight("any"), config.llm_trains, config.vision_trains)]


def _no_decay(decay_norm_weights: bool) -> ParamKey:
    """Parameters without weight decay: biases and other vectors; on request without the language model's norms."""

    def matches(parameter: Tensor, name: str) -> bool:
        norm = name.endswith(("norm.weight", "layer_norm_weight")) and part_of(name) is LANGUAGE_MODEL
        return parameter.dim() == 1 and not (norm and decay_norm_weights)

    return ParamKey(with_name_predicate=ParamWithNamePredicate(name="no weight decay", fn=matches))


def build_optimizer(model: ModelChunks, config: Config) -> MegatronOptimizer:
    """mcore's optimizer: AdamW, fp32 masters under bf16, sharded with the distributed optimizer, groups per part."""
    adam.install()
    options = config.optimizer
    mcore = OptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_eps=options.adam_eps,
        clip_grad=options.clip_grad,
        bf16=config.execution.bf16,
        use_distributed_optimizer=config.use_distributed_optimizer,
        overlap_param_gather=bool(config.parallel.overlap_param_gather),
    )
    overrides: dict[Any, Any] = {_no_decay(options.decay_norm_weights): {"wd_mult": 0.0}}
    for part, tag in PART_TAGS.items():
        overrides[ParamKey(name=f"*{part}.*")] = {"lr_mult": tag}
    optimizer = get_megatron_optimizer(mcore, list(model), config_overrides=overrides, use_gloo_process_groups=False)
    _initialize_state(optimizer)
    return optimizer


def _initialize_state(optimizer: MegatronOptimizer) -> None:
    """Creates the moments (zero) and the step (0), so that a run can be saved and resumed before its first update."""
    for part in optimizer.chained_optimizers:
        if getattr(part, "is_stub_optimizer", False):
            continue
        part.init_state_fn(part.optimizer, part.config)
        for group in part.optimizer.param_groups:
            group.setdefault("step", 0)


def warmup_iterations(options: OptimizerOptions, train_iters: int) -> int:
    if options.lr_warmup_iters is not None:
        return options.lr_warmup_iters
    fraction = DEFAULT_WARMUP_FRACTION if options.lr_warmup_fraction is None else options.lr_warmup_fraction
    return math.ceil(fraction * train_iters)


def learning_rate(iteration: int, train_iters: int, options: OptimizerOptions, peak: float | None = None) -> float:
    """The learning rate of the step after `iteration` finished steps; peak: default --lr. Pure function.

    Linear from 0 over the warm-up (the first step has rate 0, as in Hugging Face's schedules), then decay to `min_lr`.
    """
    peak = options.lr if peak is None else peak
    warmup = warmup_iterations(options, train_iters)
    if iteration < warmup:
        return peak * iteration / warmup
    progress = min(1.0, (iteration - warmup) / max(1, train_iters - warmup))
    remaining = {
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "linear": 1 - progress,
        "constant": 1.0,
    }[options.lr_decay_style]
    lowest = min(options.min_lr, peak)
    return lowest + (peak - lowest) * remaining


def updates_weights(iteration: int, train_iters: int, options: OptimizerOptions) -> bool:
    """Whether any part has a rate other than 0 in the step after `iteration` finished steps. Pure function."""
    return any(learning_rate(iteration, train_iters, options, peak) for peak in peak_rates(options).values())


def set_hyperparameters(
    optimizer: MegatronOptimizer, iteration: int, train_iters: int, options: OptimizerOptions
) -> None:
    """Sets every group from the options for this step; values loaded from a checkpoint are overwritten."""
    peaks = peak_rates(options)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(iteration, train_iters, options, peaks[group["lr_mult"]])
        group["weight_decay"] = options.weight_decay * group["wd_mult"]
        group["betas"] = (options.adam_beta1, options.adam_beta2)
        group["eps"] = options.adam_eps


@dataclass(frozen=True)
class GradientNorms:
    """L2 norms of the reduced gradients, the same on every rank: of all, and of each part by its `optimizer_tag`."""

    total: float
    parts: dict[float, float]


def gradient_norms(optimizer: MegatronOptimizer) -> GradientNorms:
    """The norms of the gradients, which are then prepared for `apply_gradients`. Collective.

    All in one reduction and one read; the total is that of mcore's get_grad_norm_fp32 (optimizer/clip_grads.py:51).
    """
    optimizer.prepare_grads()
    gradients, tags = list[Tensor](), list[float]()
    for one in optimizer.chained_optimizers:
        groups = one.param_groups
        tag_of = {id(weight.grad): group["lr_mult"] for group in groups for weight in group["params"]}
        found = one.get_main_grads_for_grad_norm()
        gradients += found
        tags += [tag_of[id(gradient)] for gradient in found]
    device = platform.device()
    sums = {part.optimizer_tag: torch.zeros((), device=device) for part in PARTS}
    total = torch.zeros(1, device=device)
    if gradients:
        overflow = torch.zeros(1, dtype=torch.int, device=device)
        norm, each = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, overflow, [gradients], True)
        total, start = norm**2.0, 0
        for tag, same in itertools.groupby(tags):
            end = start + len(list(same))
            sums[tag] = sums[tag] + each[start:end].square().sum()
            start = end
    squares = torch.cat([total, torch.stack(list(sums.values()))])
    dist.all_reduce(squares, group=optimizer.get_grad_stats_parallel_group())
    all_parts, *own = [square**0.5 for square in squares.tolist()]
    return GradientNorms(all_parts, dict(zip(sums, own, strict=True)))


def apply_gradients(optimizer: MegatronOptimizer, norm: float, clip_grad: float) -> None:
    """Clips by `norm`, which must be finite, and updates the weights."""
    if clip_grad > 0:
        for part in optimizer.chained_optimizers:
            parameters = [] if getattr(part, "is_stub_optimizer", False) else part.get_parameters()
            if parameters:
                clip_grads.clip_grad_by_total_norm_fp32(parameters, max_norm=clip_grad, total_norm=norm)
    optimizer.step_with_ready_grads()
