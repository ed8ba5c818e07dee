"""Matrix products in a chosen precision, in the forward and in the backward pass.

Legend: K inputs, O outputs of a linear layer.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ross_mcore import platform

Precision = Literal["fp32", "tf32", "bf16"]
"""The factors of a product have 24, 11 or 8 significant bits, and its sums are fp32. tf32 is how tensor cores read fp32
numbers: a setting of GPUs, without effect on a CPU."""


def factors(precision: Precision) -> torch.dtype:
    """The dtype in which the factors of a product are passed to its kernel."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


class _Product(torch.autograd.Function):
    """x [..., K], weight [O, K], bias [O] -> x weight^T + bias [..., O] in the dtype of the factors.

    An autograd function, because TF32 is a setting of the process: a `with` around the forward pass has ended when
    backward computes its two products. It keeps x as it was multiplied, and the weight as it is stored: no copy of it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, precision: Precision) -> Tensor:
        dtype = factors(precision)
        multiplied = x.to(dtype)
        ctx.save_for_backward(multiplied, weight)
        ctx.is_tf32, ctx.dtypes = precision == "tf32", (x.dtype, bias.dtype)
        with platform.tf32(ctx.is_tf32):
            return F.linear(multiplied, weight.to(dtype), bias.to(dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        multiplied, weight = ctx.saved_tensors
        of_x = of_weight = of_bias = None
        rows = gradient.flatten(0, -2)
        with platform.tf32(ctx.is_tf32):
            if ctx.needs_input_grad[0]:
                of_x = (gradient @ weight.to(gradient.dtype)).to(ctx.dtypes[0])
            if ctx.needs_input_grad[1]:
                of_weight = (rows.T @ multiplied.flatten(0, -2)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0, dtype=torch.float32).to(ctx.dtypes[1])
        return of_x, of_weight, of_bias, None


class PreciseLinear(nn.Linear):
    """A Linear that computes in `precision` for inputs and weights of any dtype; its output has the factors' dtype."""

    precision: Precision = "fp32"

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _Product.apply(x, self.weight, self.bias, self.precision)
        return product


class PointConvolution(nn.Conv2d):
    """A 1x1 convolution as a matrix product, in `precision`: x [M, C, g, g] -> [M, N, W], N = g * g in row-major order.

    So that it is computed as the other layers are: convolutions are cuDNN's, which has a precision of its own.
    """

    bias: nn.Parameter
    precision: Precision = "fp32"

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = _Product.apply(
            x.flatten(2).transpose(1, 2), self.weight.flatten(1), self.bias, self.precision
        )
        return product
