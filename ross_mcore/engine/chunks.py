"""A pipeline rank's chunks of the model: one, or several under the interleaved schedule."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor, nn

from ross_mcore.checkpoint.torch_dist import sharding_metadata
from ross_mcore.models.ross import RossModel
from ross_mcore.parts import LANGUAGE_MODEL

_LAYER = re.compile(r"(?<=decoder\.layers\.)\d+(?=\.)")


class ModelChunks(nn.ModuleList):
    """The chunks in the order of their layers, each wrapped for data parallelism.

    On the first pipeline rank, `first` has the beginning of the model; on the last, `last` has its end.
    """

    def __init__(self, chunks: Iterable[DistributedDataParallel]) -> None:
        super().__init__(chunks)

    def __iter__(self) -> Iterator[DistributedDataParallel]:
        return super().__iter__()

    @property
    def parts(self) -> list[RossModel]:
        return [chunk.module for chunk in self]

    @property
    def first(self) -> RossModel:
        return self.parts[0]

    @property
    def last(self) -> RossModel:
        return self.parts[-1]

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters with their names in the whole model, in which decoder layers count from 0."""
        for part in self.parts:
            yield from _named_weights(part)

    def start_gathering(self) -> list[Callable[..., None]]:
        """A function per chunk that starts to gather its weights unless that has started; for `param_sync_func`."""

        def start(chunk: DistributedDataParallel, *_: Any) -> None:
            for group in chunk.bucket_groups:
                if not group.param_gather_dispatched:
                    group.start_param_sync()

        return [partial(start, chunk) for chunk in self]

    def gather_weights(self) -> None:
        """Waits until this rank has all weights as updated by the last step. Collective.

        Call before any use of the weights other than a step's forward pass. Does something only with
        --overlap-param-gather, and only once after a step.
        """
        for chunk in self:
            if chunk.ddp_config.overlap_param_gather:
                for group in chunk.bucket_groups:
                    group.finish_param_sync(skip_next_bucket_dispatch=True)

    def weights_changed(self) -> None:
        """Marks the weights as updated, each on one data-parallel rank.

        mcore marks them in the backward pass, so it would not gather again a weight gathered between that and the
        update.
        """
        for chunk in self:
            for group in chunk.bucket_groups:
                group.param_gather_dispatched = False

    def zero_grad_buffer(self) -> None:
        for chunk in self:
            chunk.zero_grad_buffer()

    def sharded_weights(self) -> dict[str, Any]:
        """The sharded weights of every chunk, by its number, as layers of two chunks may share a name. Collective."""
        self.gather_weights()
        return {str(n): part.sharded_state_dict(metadata=sharding_metadata()) for n, part in enumerate(self.parts)}

    def load_weights(self, loaded: dict[str, Any]) -> None:
        """Loads the weights that were read for `sharded_weights`."""
        for number, part in enumerate(self.parts):
            part.load_state_dict(loaded[str(number)])
            prefix = LANGUAGE_MODEL.weight("")
            own = {name.removeprefix(prefix): value for name, value in loaded[str(number)].items()}
            part.language_model.reset_fp8_weights(own)

    def copy_masters(self, optimizer: MegatronOptimizer) -> None:
        """Sets the weights from the optimizer's fp32 masters, as a step does. Collective."""
        for part in optimizer.chained_optimizers:
            if not getattr(part, "is_stub_optimizer", False):
                part._copy_main_params_to_model_params()
        for chunk in self:
            if chunk.ddp_config.use_distributed_optimizer and not chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync()
        self.weights_changed()

    def fp8_state(self) -> dict[str, Tensor]:
        """Scales and histories of FP8 layers, by the layer's number in the model (transformer_engine.fp8_state)."""
        return {name: tensor for part in self.parts for name, tensor in part.language_model.fp8_state().items()}


def _named_weights(part: RossModel) -> Iterator[tuple[str, nn.Parameter]]:
    def number(place: re.Match[str]) -> str:
        return str(part.decoder.layers[int(place[0])].layer_number - 1)

    return ((_LAYER.sub(number, name), parameter) for name, parameter in part.named_parameters())
