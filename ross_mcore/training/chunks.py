"""A pipeline rank's part of the model: one chunk, or several under the interleaved schedule, as one thing."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, nn

from ross_mcore.checkpoint.torch_dist import sharding_metadata
from ross_mcore.models.ross import RossModel

_LAYER = re.compile(r"(?<=decoder\.layers\.)\d+(?=\.)")


class ModelChunks(nn.ModuleList):
    """The chunks in the order of their layers, each wrapped for data parallelism; mcore takes them as `list(chunks)`.

    The model's beginning is in `first`, on the first pipeline rank; its end in `last`, on the last one.
    """

    def __init__(self, chunks: Iterable[DistributedDataParallel]) -> None:
        super().__init__(chunks)

    @property
    def parts(self) -> list[RossModel]:
        return [chunk.module for chunk in self]  # type: ignore[misc]

    @property
    def first(self) -> RossModel:
        return self.parts[0]

    @property
    def last(self) -> RossModel:
        return self.parts[-1]

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters by their names in the whole model: decoder layers by their number in it, from 0."""
        for part in self.parts:
            yield from _named_weights(part)

    def zero_grad_buffer(self) -> None:
        for chunk in self:
            chunk.zero_grad_buffer()  # type: ignore[operator]

    def sharded_weights(self) -> dict[str, Any]:
        """The pieces of every chunk, by its number: layers of two chunks may have one local name."""
        return {str(n): part.sharded_state_dict(metadata=sharding_metadata()) for n, part in enumerate(self.parts)}

    def load_weights(self, loaded: dict[str, Any]) -> None:
        """Takes what was loaded for `sharded_weights`."""
        for number, part in enumerate(self.parts):
            part.load_state_dict(loaded[str(number)])

    def fp8_state(self) -> dict[str, Tensor]:
        """Scales and histories of FP8 layers, by the layer's number in the model (transformer_engine.fp8_state)."""
        return {name: tensor for part in self.parts for name, tensor in part.language_model.fp8_state().items()}


def _named_weights(part: RossModel) -> Iterator[tuple[str, nn.Parameter]]:
    def number(place: re.Match[str]) -> str:
        return str(part.decoder.layers[int(place[0])].layer_number - 1)  # type: ignore[index]

    return ((_LAYER.sub(number, name), parameter) for name, parameter in part.named_parameters())
