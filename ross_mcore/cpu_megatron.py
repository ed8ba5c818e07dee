"""What megatron-core 0.16.1 needs on a machine without a GPU.

It names CUDA in places that no argument reaches (`device="cuda"` literals, `torch.cuda` calls, tensor type names).
megatron_hook.py runs these patches while megatron.core is imported.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch

_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "zeros_like", "ones_like", "empty_like")


def _on_cpu(where: Any) -> Any:
    """`cuda`, `cuda:0` and device('cuda') become the CPU; anything else stays."""
    if isinstance(where, str) and where.startswith("cuda"):
        return torch.device("cpu")
    if isinstance(where, torch.device) and where.type == "cuda":
        return torch.device("cpu")
    return where


def _stand_in_for_cuda(_: Any) -> None:
    """The adaptation itself; each line names the mcore source that needs it."""
    cuda, cpu = torch.cuda, torch.device("cpu")

    # device=torch.cuda.current_device() is how most of mcore asks for "my device"
    cuda.current_device = lambda: cpu
    cuda.synchronize = lambda device=None: None
    # tensor_parallel/random.py: the generator of "the device" is the CPU's own
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device="cuda": torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device="cuda": torch.set_rng_state(state)
    cuda.manual_seed = cuda.random.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed)) and None

    # literal device="cuda": pipeline_parallel/schedules.py, optimizer/optimizer.py, optimizer/clip_grads.py
    def remapped(factory: Any) -> Any:
        @functools.wraps(factory)
        def call(*args: Any, **kwargs: Any) -> Any:
            if "device" in kwargs:
                kwargs["device"] = _on_cpu(kwargs["device"])
            kwargs.pop("pin_memory", None)
            return factory(*args, **kwargs)

        return call

    # `with torch.device("meta")` knows factories by identity, which it lists at its first use: before they are wrapped
    with cpu:
        torch.empty(0)
    for name in _FACTORIES:
        setattr(torch, name, remapped(getattr(torch, name)))
    # x.cuda(): models/common/language_module
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]

    # optimizer/ compares Tensor.type() with 'torch.cuda.FloatTensor'; only callers inside it see the alias
    plain_type = torch.Tensor.type

    def type_as_mcore_expects(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = plain_type(self, *args, **kwargs)
        asked_by = sys._getframe(1).f_globals.get("__name__", "")
        if not args and not kwargs and asked_by.startswith("megatron.core.optimizer"):
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    torch.Tensor.type = type_as_mcore_expects  # type: ignore[method-assign]


def _never_compile(jit: Any) -> None:
    """jit.py: the fuser is torch.compile, which costs seconds per fused function and a C++ compiler.

    Where megatron.core is loaded before this package, its compiled functions are replaced by their originals.
    """
    jit.disable_jit_fuser()
    modules = [module for name, module in sys.modules.items() if name.startswith("megatron.core")]
    for owner in [*modules, *(value for m in modules for value in list(vars(m).values()) if isinstance(value, type))]:
        for name, value in list(vars(owner).items()):
            if hasattr(value, "_torchdynamo_orig_callable"):
                setattr(owner, name, value._torchdynamo_orig_callable)


def _use_the_only_generator(random: Any) -> None:
    """tensor_parallel/random.py defers the setting of generators through a CUDA hook that never runs on a CPU."""
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _keep_what_gloo_sends(p2p: Any) -> None:
    """Makes mcore's unbatched pipeline sends (the interleaved schedule's) safe on gloo.

    gloo reads a tensor's memory until its request completes, and drops a send whose request nobody holds. The schedule
    frees what it has sent before it waits (schedules.py:deallocate_output_tensor), which NCCL's stream order allows,
    and never waits for its last request. So an alias is sent, which keeps the memory as long as the request lives, and
    the newest request of either direction is kept.
    """
    plain, newest = p2p._p2p_ops, {}

    @functools.wraps(plain)
    def send_aliases(*, tensor_send_prev: Any, tensor_send_next: Any, **others: Any) -> Any:
        prev, following = (None if t is None else t.detach() for t in (tensor_send_prev, tensor_send_next))
        requests = plain(tensor_send_prev=prev, tensor_send_next=following, **others)
        newest.update({name: request for name, request in requests.items() if name.startswith("send")})
        return requests

    p2p._p2p_ops = send_aliases


def _send_element_types_apart(parallel: Any) -> None:
    """Makes mcore gather and reduce weights of one element type at a time.

    With --fp8-param-gather it does those of bytes and those of bf16 in one go (param_and_grad_buffer.py:
    partition_buckets), which NCCL does one by one, and gloo as one tensor of one type.
    """
    plain = parallel.partition_buckets

    @functools.wraps(plain)
    def partition(buffers: list[Any], force_single_bucket_group: bool = False) -> list[Any]:
        return [group for buffer in buffers for group in plain([buffer], force_single_bucket_group)]

    parallel.partition_buckets = partition


PATCHES: dict[str, tuple[Callable[[Any], None], ...]] = {
    "megatron.core": (_stand_in_for_cuda,),
    "megatron.core.jit": (_never_compile,),
    "megatron.core.tensor_parallel.random": (_use_the_only_generator,),
    "megatron.core.pipeline_parallel.p2p_communication": (_keep_what_gloo_sends,),
    "megatron.core.distributed.distributed_data_parallel": (_send_element_types_apart,),
}
"""Module of mcore -> what is changed in it once it is loaded."""
