"""Adam as mcore needs it: Transformer Engine's or Apex's FusedAdam, or for machines that have neither, torch's.

mcore's distributed optimizer saves checkpoints that it can reload only in the FusedAdam contract: `step` lives in the
parameter groups (empty groups count too), the state of a parameter is exp_avg and exp_avg_sq alone
(optimizer/distrib_optimizer.py:641 and :940 read the step so). The arithmetic of PlainAdam is
torch's own functional Adam.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
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
            taken = group["step"]
            group["step"] = taken + 1  # also where this rank owns no parameter: one rank writes the step for all
            params = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not params:
                continue
            decay = group["weight_decay"]
            if self.adam_w_mode and decay:
                for parameter in params:
                    parameter.mul_(1 - group["lr"] * decay)
                decay = 0.0
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
                [torch.tensor(float(taken)) for _ in params],
                amsgrad=False,
                maximize=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=decay,
                eps=group["eps"],
            )


def counting(fused: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """A FusedAdam of Transformer Engine or Apex that counts the steps of empty groups too.

    They skip groups without parameters, such as those of another pipeline stage's modules. mcore's plain optimizer
    saves the groups of rank 0 for all ranks, so a resumed run would begin such a group's bias correction anew.
    """

    def step(self: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        result = fused.step(self, *args, **kwargs)
        for group in self.param_groups:
            if not group["params"]:
                group["step"] = group.get("step", 0) + 1
        return result

    return type(fused.__name__, (fused,), {"step": step, "__module__": fused.__module__})


def give_to_mcore() -> None:
    """Makes mcore take its FusedAdam code paths: with Transformer Engine's or Apex's where installed, or PlainAdam."""
    import megatron.core.optimizer as optimizers
    from megatron.core.optimizer import distrib_optimizer

    if optimizers.USING_PYTORCH_OPTIMIZER:
        optimizers.Adam = distrib_optimizer.Adam = PlainAdam
        optimizers.USING_PYTORCH_OPTIMIZER = False
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
    elif optimizers.Adam is not PlainAdam and optimizers.Adam is distrib_optimizer.Adam:
        optimizers.Adam = counting(distrib_optimizer.Adam)
