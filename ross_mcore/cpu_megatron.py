"""What megatron-core 0.16.1 needs on a machine without a GPU: PATCHES, which megatron_hook.py applies.

mcore names CUDA in places that no argument reaches: `device="cuda"`, `torch.cuda.current_device()`, `tensor.cuda()`,
`tensor.type() == "torch.cuda.FloatTensor"`. A patch changes the code of the mcore functions that run here, and nothing
outside megatron.core: `torch` stays as it is. What fails without each patch: tests/end_to_end/test_cpu_megatron.py.
"""

from __future__ import annotations

import functools
import inspect
import logging
import operator
import sys
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch

Patch = Callable[[Any], None]
"""Changes an mcore module that has just been loaded."""


def function_of(module: Any, name: str) -> Any:
    """The plain function behind `name`, such as `Class.method`: without decorators and binding."""
    function = inspect.unwrap(operator.attrgetter(name)(module))
    return getattr(function, "__func__", function)


def without_cuda(code: CodeType, name: str) -> CodeType:
    """The same code with the attribute `cuda` read as `name`, "cuda" as `name`, and CUDA tensor types as the CPU's."""

    def constant(value: Any) -> Any:
        if isinstance(value, CodeType):
            return without_cuda(value, name)
        if isinstance(value, tuple):
            return tuple(constant(one) for one in value)
        if isinstance(value, str):
            return name if value == "cuda" else value.replace("torch.cuda.", "torch.")
        return value

    names = tuple(name if one == "cuda" else one for one in code.co_names)
    return code.replace(co_names=names, co_consts=tuple(constant(one) for one in code.co_consts))


class OnCpu:
    """A patch: in these functions `cuda` reads `cpu` (or `name`); torch.cpu has what they ask of torch.cuda."""

    def __init__(self, *functions: str, name: str = "cpu") -> None:
        self.functions = functions
        self.name = name

    def __call__(self, module: Any) -> None:
        for name in self.functions:
            function = function_of(module, name)
            function.__code__ = without_cuda(function.__code__, self.name)


def never_compile(jit: Any) -> None:
    """The fuser is torch.compile, which costs seconds per fused function and needs a C++ compiler.

    Where megatron.core is loaded before this package, its compiled functions are replaced by their originals.
    """
    jit.disable_jit_fuser()
    modules = [module for name, module in sys.modules.items() if name.startswith("megatron.core")]
    for owner in [*modules, *(value for m in modules for value in list(vars(m).values()) if isinstance(value, type))]:
        for name, value in list(vars(owner).items()):
            if hasattr(value, "_torchdynamo_orig_callable"):
                setattr(owner, name, value._torchdynamo_orig_callable)


def use_the_only_generator(random: Any) -> None:
    """mcore reads and sets the GPU's generator through C++ names and hooks of CUDA. A CPU has one generator, so that
    mcore's warning that it changed within a region of the tracker is always given, and hidden here."""
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def keep_what_gloo_sends(p2p: Any) -> None:
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


def send_element_types_apart(parallel: Any) -> None:
    """Makes mcore gather and reduce weights of one element type at a time.

    With --fp8-param-gather it does those of bytes and those of bf16 in one go (param_and_grad_buffer.py:
    partition_buckets), which NCCL does one by one, and gloo as one tensor of one type.
    """
    plain = parallel.partition_buckets

    @functools.wraps(plain)
    def partition(buffers: list[Any], force_single_bucket_group: bool = False) -> list[Any]:
        return [group for buffer in buffers for group in plain([buffer], force_single_bucket_group)]

    parallel.partition_buckets = partition


PATCHES: dict[str, tuple[Patch, ...]] = {
    "megatron.core.jit": (never_compile,),
    "megatron.core.utils": (
        # buffers that sequence parallelism gathers into; the norm of gradients
        OnCpu("GlobalMemoryBuffer.get_tensor", "local_multi_tensor_l2_norm"),
    ),
    "megatron.core.tensor_parallel.random": (
        use_the_only_generator,
        # torch.cuda.manual_seed does nothing here and says nothing; torch.random has the same functions for the CPU
        OnCpu("CudaRNGStatesTracker.add", "model_parallel_cuda_manual_seed", name="random"),
    ),
    "megatron.core.tensor_parallel.mappings": (
        # results of collectives
        OnCpu("_gather_along_last_dim", "_gather_along_first_dim", "_reduce_scatter_along_first_dim"),
    ),
    "megatron.core.tensor_parallel.layers": (
        # the input's gradient under sequence parallelism
        OnCpu("LinearWithGradAccumulationAndAsyncCommunication.backward"),
    ),
    "megatron.core.models.common.embeddings.rotary_pos_embedding": (
        # moves the frequencies, which are made on the CPU, to the GPU
        OnCpu("RotaryEmbedding.get_emb"),
    ),
    "megatron.core.models.common.language_module.language_module": (
        # moves a tied output layer to the GPU before it is summed over the first and the last stage
        OnCpu("LanguageModule.setup_embeddings_and_output_layer"),
    ),
    "megatron.core.pipeline_parallel.schedules": (
        # the count of tokens
        OnCpu(
            "forward_backward_no_pipelining",
            "forward_backward_pipelining_without_interleaving",
            "forward_backward_pipelining_with_interleaving",
        ),
    ),
    "megatron.core.pipeline_parallel.p2p_communication": (
        # what is received, and a wait for the device
        OnCpu("P2PCommunicator._communicate"),
        keep_what_gloo_sends,
    ),
    "megatron.core.distributed.param_and_grad_buffer": (
        # the buffers of weights and gradients
        OnCpu("_ParamAndGradBuffer.__init__"),
    ),
    "megatron.core.distributed.distributed_data_parallel": (send_element_types_apart,),
    "megatron.core.optimizer.optimizer": (
        # scales and flags; element types are compared by their CUDA names
        OnCpu(
            "FP32Optimizer.__init__",
            "MixedPrecisionOptimizer.__init__",
            "Float16OptimizerWithFloat16Params.__init__",
        ),
    ),
    "megatron.core.optimizer.distrib_optimizer": (
        # element types; buffers for the states that are loaded or gathered
        OnCpu(
            "DistributedOptimizer.__init__",
            "DistributedOptimizer._build_model_and_main_param_groups",
            "DistributedOptimizer.load_state_dict",
            "DistributedOptimizer.get_parameter_state_dp_zero",
        ),
    ),
    "megatron.core.optimizer.clip_grads": (
        # flags of overflow, norms, an element type
        OnCpu("get_grad_norm_fp32", "clip_grad_by_total_norm_fp32"),
    ),
}
"""Module of mcore -> the patches that are applied to it once it is loaded."""
