"""Chooses kernels, precision and overlap where the options leave them open, by what is installed on this machine."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ross_mcore.config import Config
from ross_mcore.platform import Libraries


@dataclass(frozen=True)
class Choice:
    """config: the options with no kernel, precision or overlap left open; why: of its --transformer-impl."""

    config: Config
    why: str


def choose(config: Config, libraries: Libraries) -> Choice:
    """Pure function; options that were given stay as they are, and a second call changes nothing."""
    execution, parallel = config.execution, config.parallel
    impl, why = execution.transformer_impl, "as given"
    if impl == "auto":
        obstacle = _obstacle(config, libraries)
        impl = "local" if obstacle else "transformer_engine"
        why = obstacle or "installed, and the device is a GPU"
    precision: Literal["fp32", "tf32"] = "tf32" if libraries.tf32 else "fp32"
    fuses = libraries.gpu if impl == "transformer_engine" else libraries.gradient_fusion
    reduces = libraries.gpu and config.use_distributed_optimizer
    overlap_grad_reduce = _or(parallel.overlap_grad_reduce, reduces)
    return Choice(
        replace(
            config,
            execution=replace(
                execution,
                transformer_impl=impl,
                denoiser_precision=execution.denoiser_precision or precision,
                vae_precision=execution.vae_precision or precision,
                gradient_accumulation_fusion=_or(execution.gradient_accumulation_fusion, fuses),
            ),
            parallel=replace(
                parallel,
                overlap_grad_reduce=overlap_grad_reduce,
                overlap_param_gather=_or(parallel.overlap_param_gather, reduces and overlap_grad_reduce),
            ),
        ),
        why,
    )


def _or(given: bool | None, default: bool) -> bool:
    return default if given is None else given


def _obstacle(config: Config, libraries: Libraries) -> str | None:
    """Why --transformer-impl auto does not take Transformer Engine; None if it does."""
    if not libraries.gpu:
        return "this machine has no GPU"
    if not libraries.transformer_engine:
        return "Transformer Engine is not installed: pip install '.[gpu]' in this repository"
    if not config.execution.bf16:
        return "the fused attention of Transformer Engine computes in 16 bits: --bf16"
    return None
