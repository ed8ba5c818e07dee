"""PATCHES that megatron-core 0.16.1 needs on a machine without a GPU; megatron_hook.py applies them.

mcore names CUDA in places that no argument can change: `device="cuda"`, `torch.cuda.current_device()`, `tensor.cuda()`,
`tensor.type() == "torch.cuda.FloatTensor"`. Patches change functions of mcore only, never `torch`.
tests/end_to_end/test_cpu_megatron.py shows what fails without each.
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
    """The function behind `name`, such as `Class.method`, without decorators and binding."""
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
    """A patch that replaces `cuda` by `cpu` (or `name`) in functions; torch.cpu has all they use of torch.cuda."""

    def __init__(self, *functions: str, name: str = "cpu") -> None:
        self.functions = functions
        self.name = name

    def __call__(self, module: Any) -> None:
        for name in self.functions:
            function = function_of(module, name)
            function.__code__ = without_cuda(function.__code__, self.name)


def never_compile(jit: Any) -> None:
    """Turns off mcore's fuser, torch.compile, which takes seconds per function and needs a C++ compiler.

    If megatron.core is loaded before this package, its compiled functions are replaced by their originals.
    """
    jit.disable_jit_fuser()
    modules = [module for name, module in sys.modules.items() if name.startswith("megatron.core")]
    for owner in [*modules, *(value for m in modules for value in list(vars(m).values()) if isinstance(value, type))]:
        for name, value in list(vars(owner).items()):
            if hasattr(value, "_torchdynamo_orig_callable"):
                setattr(owner, name, value._torchdynamo_orig_callable)


def few_passes_of_swiglu(fusions: Any) -> None:
    """Replaces SwiGLU's gradient, one pass over memory with the fuser and 11 without, by one of five passes."""

    def swiglu_back(grad: torch.Tensor, gate_and_up: torch.Tensor) -> torch.Tensor:
        """grad [T, F], gate_and_up [T, 2F] -> [T, 2F]."""
        (gate, up), found = gate_and_up.chunk(2, -1), torch.empty_like(gate_and_up)
        of_gate, of_up = found.chunk(2, -1)
        torch.mul(grad, up, out=of_gate)
        torch.ops.aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate)
        torch.mul(grad, torch.nn.functional.silu(gate), out=of_up)
        return found

    fusions.swiglu_back = swiglu_back


class ProductsThatAdd:
    """Apex's fused_weight_gradient_mlp_cuda for a CPU: adds a weight's gradient to `main_grad` in the matrix product.

    Without it every micro-batch writes a new gradient of every weight and then adds it: four passes over memory more.
    """

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: torch.Tensor, gradients: torch.Tensor, main_grad: torch.Tensor) -> None:
        """inputs [T, I], gradients [T, O] of the outputs, main_grad [O, I] float32."""
        if inputs.dtype == main_grad.dtype:
            main_grad.addmm_(gradients.t(), inputs)
        else:
            main_grad.add_(gradients.t() @ inputs)


def add_in_products(layers: Any) -> None:
    """Lets mcore's linear layers accumulate gradients by ProductsThatAdd."""
    layers.fused_weight_gradient_mlp_cuda, layers._grad_accum_fusion_available = ProductsThatAdd, True


def use_the_only_generator(random: Any) -> None:
    """Makes mcore read and set the CPU's generator where it uses CUDA's.

    A CPU has one generator only, so mcore's warning that it changed inside a region of the tracker is hidden.
    """
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def keep_what_gloo_sends(p2p: Any) -> None:
    """Makes mcore's unbatched pipeline sends (the interleaved schedule's) safe on gloo.

    gloo reads a tensor's memory until its request completes, and cancels a send when its request is deleted. The
    schedule frees a tensor before it waits for the send (schedules.py:deallocate_output_tensor), which NCCL's stream
    order allows, and never waits for its last request. So an alias is sent, which keeps the memory while the request
    exists, and the newest request of each direction is kept.
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
    """Makes mcore gather and reduce weights of different element types in separate calls.

    With --fp8-param-gather it puts bytes and bf16 into one call (param_and_grad_buffer.py:partition_buckets), which
    NCCL runs tensor by tensor, but gloo as one tensor of one type.
    """
    plain = parallel.partition_buckets

    @functools.wraps(plain)
    def partition(buffers: list[Any], force_single_bucket_group: bool = False) -> list[Any]:
        return [group for buffer in buffers for group in plain([buffer], force_single_bucket_group)]

    parallel.partition_buckets = partition


PATCHES: dict[str, tuple[Patch, ...]] = {
    "megatron.core.jit": (never_compile,),
    "megatron.core.fusions.fused_bias_swiglu": (few_passes_of_swiglu,),
    "megatron.core.utils": (
        # buffers that sequence parallelism gathers into
        OnCpu("GlobalMemoryBuffer.get_tensor"),
    ),
    "megatron.core.tensor_parallel.random": (
        use_the_only_generator,
        # torch.cuda.manual_seed silently does nothing without a GPU; torch.random has the functions of the CPU
        OnCpu("CudaRNGStatesTracker.add", "model_parallel_cuda_manual_seed", name="random"),
    ),
    "megatron.core.tensor_parallel.mappings": (
        # results of collectives
        OnCpu("_gather_along_last_dim", "_gather_along_first_dim", "_reduce_scatter_along_first_dim"),
    ),
    "megatron.core.tensor_parallel.layers": (
        add_in_products,
        # the input's gradient under sequence parallelism, and what autograd gets in place of a weight's
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
        # buffers to receive into, and a wait for the device
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
        # element types
        OnCpu("DistributedOptimizer.__init__", "DistributedOptimizer._build_model_and_main_param_groups"),
    ),
    "megatron.core.optimizer.clip_grads": (
        # a flag of overflow, an element type
        OnCpu("clip_grad_by_total_norm_fp32"),
    ),
}
"""Module of mcore -> the patches applied to it after it is loaded."""
