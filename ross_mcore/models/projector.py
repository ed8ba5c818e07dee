"""The MLP that projects vision features into the language model's embedding space."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ross_mcore.architecture import ProjectorConfig
from ross_mcore.shapes import Shapes, linear


class VisionProjection(nn.Sequential):
    """A Linear, then (depth - 1) pairs of exact GELU and Linear, all with bias.

    State-dict keys are those of the reference's `mm_projector`: `0.weight`, `0.bias`, `2.weight`, ... Source: reference
    multimodal_projector/builder.py:20-38.
    """

    def __init__(self, config: ProjectorConfig, in_size: int, out_size: int) -> None:
        layers: list[nn.Module] = [nn.Linear(in_size, out_size)]
        for _ in range(config.depth - 1):
            layers += [nn.GELU(), nn.Linear(out_size, out_size)]
        super().__init__(*layers)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws PyTorch's default initialisation of a Linear, U(-b, b) with b = in_features^-0.5, from `generator`.

        Numbers are drawn in float32 on the generator's device (default: the CPU's default generator), so they do not
        depend on device and dtype of the parameters.
        """
        generator = generator or torch.default_generator
        for layer in self:
            if isinstance(layer, nn.Linear):
                bound = layer.in_features**-0.5
                for parameter in (layer.weight, layer.bias):
                    value = torch.empty(parameter.shape, device=generator.device)
                    parameter.copy_(value.uniform_(-bound, bound, generator=generator))

    def forward(self, features: Tensor) -> Tensor:
        """features [J, N, in_size] in any dtype -> [J, N, out_size] in the dtype of the weights."""
        return super().forward(features.to(next(self.parameters()).dtype))


def weight_shapes(config: ProjectorConfig, in_size: int, out_size: int) -> Shapes:
    """Shapes of the weights of a VisionProjection."""
    shapes = linear("0", out_size, in_size)
    for index in range(1, config.depth):
        shapes |= linear(str(2 * index), out_size, out_size)
    return shapes
