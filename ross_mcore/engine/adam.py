"""Adam for mcore, and norms: of Transformer Engine or Apex, or our own on machines that have neither.

mcore's distributed optimizer can reload its checkpoints only if the optimizer is like FusedAdam: `step` is in the
parameter groups, empty groups included, and the state of a parameter is exp_avg and exp_avg_sq only
(optimizer/distrib_optimizer.py:641 and :940). PlainAdam computes with torch's fused Adam, which passes over all weights
once: in a few kernels on a GPU, and vectorised on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam


class PlainAdam(torch.optim.Optimizer):
    """Adam (`adam_w_mode=False`) or AdamW. Bias correction is always on."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "step": 0})
        self.adam_w_mode = adam_w_mode

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # a closure is refused
        if closure is not None:
            raise ValueError("PlainAdam takes no closure")
        for group in self.param_groups:
            step = group["step"]
            group["step"] = step + 1  # in empty groups too, because one rank saves the step of all ranks
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not params:
                continue
            for parameter in params:
                if not self.state[parameter]:
                    moments = {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
                    self.state[parameter].update(moments)
            adam(
                params,
                [parameter.grad for parameter in params],
                [self.state[parameter]["exp_avg"] for parameter in params],
                [self.state[parameter]["exp_avg_sq"] for parameter in params],
                [],
                list(torch.full((len(params),), float(step), device=params[0].device)),
                fused=True,
                decoupled_weight_decay=self.adam_w_mode,
                amsgrad=False,
                maximize=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
            )


def counting_empty_groups(fused: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """A subclass of FusedAdam that counts the steps of groups without parameters too.

    FusedAdam skips empty groups, such as those of another pipeline stage's modules. mcore's plain optimizer saves the
    groups of rank 0 for all ranks, so a resumed run would restart the bias correction of such a group.
    """

    def step(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        result = fused.step(self, *args, **kwargs)
        for group in self.param_groups:
            if not group["params"]:
                group["step"] = group.get("step", 0) + 1
        return result

    return type(fused.__name__, (fused,), {"step": step, "__module__": fused.__module__})


def norm(_: int, __: Tensor, tensors: Sequence[Sequence[Tensor]], ___: bool) -> tuple[Tensor, Tensor]:
    """The L2 norm [1] of N tensors of one type and that of each [N], like multi_tensor_l2norm.

    mcore's own copies every norm to the host.
    """
    each = torch.stack(torch._foreach_norm(list(tensors[0])))
    return each.norm().view(1), each


def scale(_: int, __: Tensor, tensors: Sequence[Sequence[Tensor]], factor: float) -> None:
    """Scales tensors in place, like multi_tensor_scale with sources that are its results."""
    if tensors[0]:
        torch._foreach_mul_(list(tensors[0]), factor)


def install() -> None:
    """Makes mcore use its code for FusedAdam, with PlainAdam when neither Transformer Engine nor Apex is installed.

    Then the norm and the clipping of gradients are a few kernels, too, where mcore's fallbacks are several a weight.
    """
    import megatron.core.optimizer as optimizers
    from megatron.core.optimizer import clip_grads, distrib_optimizer

    if optimizers.USING_PYTORCH_OPTIMIZER:
        clip_grads.l2_norm_impl, clip_grads.multi_tensor_scale_impl = norm, scale
        optimizers.Adam = distrib_optimizer.Adam = PlainAdam
        optimizers.USING_PYTORCH_OPTIMIZER = False
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
    elif optimizers.Adam is not PlainAdam and optimizers.Adam is distrib_optimizer.Adam:
        optimizers.Adam = counting_empty_groups(distrib_optimizer.Adam)
