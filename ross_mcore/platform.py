"""The one file that names cuda, nccl or gloo: which device this process uses, and mcore's adaptation to machines
without a GPU.

megatron-core 0.16.1 names CUDA in places that no argument reaches (`device="cuda"` literals, `torch.cuda` calls, tensor
type names). `prepare()` maps each of them to the CPU when there is no GPU, and does nothing when there is one.
"""

from __future__ import annotations

import datetime
import functools
import importlib.util
import json
import logging
import os
import resource
import sys
import time
import uuid
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ross_mcore.errors import PlatformError

_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "zeros_like", "ones_like", "empty_like")


RECORDED_COLLECTIVES = 64
"""How many torch's flight recorder keeps, from which the last is read; its own default makes reading it slow."""


CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"

BLACKWELL = (10, 0)
"""Its compute capability."""


@functools.cache
def has_gpu() -> bool:
    """Whether this process computes on a GPU."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device of this process: its own GPU, or the CPU; under `with torch.device("meta")` none, for shapes alone."""
    if torch.get_default_device().type == "meta":
        return torch.device("meta")
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else torch.device("cpu")


def backend() -> str:
    """The collective library for that device."""
    return "nccl" if has_gpu() else "gloo"


@dataclass(frozen=True)
class Libraries:
    """What is installed beside this package's requirements, and whether there is a GPU for it."""

    gpu: bool
    transformer_engine: bool
    flash_attention: bool
    gradient_fusion: bool
    """Apex's fused_weight_gradient_mlp_cuda."""
    ordered_kernels: bool
    """Kernels start in the order they are issued, which overlap of tensor-parallel communication relies on (mcore's
    tensor_parallel/layers.py:526): before Blackwell only with CUDA_DEVICE_MAX_CONNECTIONS=1."""


def libraries() -> Libraries:
    def installed(name: str) -> bool:
        return importlib.util.find_spec(name) is not None

    return Libraries(
        gpu=has_gpu(),
        transformer_engine=installed("transformer_engine"),
        flash_attention=installed("flash_attn"),
        gradient_fusion=installed("fused_weight_gradient_mlp_cuda"),
        ordered_kernels=not has_gpu()
        or os.environ.get(CONNECTIONS) == "1"
        or torch.cuda.get_device_capability() >= BLACKWELL,
    )


def fp8_refusal(recipe: str) -> str | None:
    """Why Transformer Engine, which is installed, cannot compute this FP8 recipe here; None where it can."""
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    asked = {
        "mxfp8": FP8GlobalStateManager.is_mxfp8_available,
        "blockwise": FP8GlobalStateManager.is_fp8_block_scaling_available,
    }
    works, reason = asked.get(recipe, FP8GlobalStateManager.is_fp8_available)()
    return None if works else reason.rstrip(".")


def peak_memory_bytes() -> int:
    """The most memory this process has held so far: on its GPU, as torch allocated it, or in RAM where it has none."""
    if has_gpu():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # Linux; getrusage's figure starts with that of the process which started this one
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def compute_fp32_exactly() -> None:
    """Turns TensorFloat-32 off, which rounds the factors of fp32 products to 10 bits; without a GPU there is none.

    For comparisons with values that were computed in fp32. torch has it on for convolutions, and for matrix products
    where TORCH_ALLOW_TF32_CUBLAS_OVERRIDE is 1, against which only the libraries' own variable helps: call this before
    anything computes.
    """
    os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def synchronize() -> None:
    """Waits for the device, so that a clock read afterwards is true."""
    if has_gpu():
        torch.cuda.synchronize()


@functools.cache
def prepare() -> None:
    """Makes megatron-core usable on this machine. Call once, before anything imports megatron.core."""
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core\..*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"megatron\.core\..*")
    # mcore 0.16.1 calls collectives by names that newer torch calls deprecated
    warnings.filterwarnings("ignore", message=".*is deprecated. Please use `torch.distributed", category=FutureWarning)
    if has_gpu():
        os.environ.setdefault(CONNECTIONS, "1")  # read when the device is first used, see Libraries.ordered_kernels
    else:
        _stand_in_for_cuda()


def initialize_process_group(timeout_minutes: float) -> None:
    """Joins the processes that torchrun started, or makes a group of one when started by hand."""
    if torch.distributed.is_initialized():
        return
    if has_gpu():
        local_rank, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local_rank >= count:
            raise PlatformError(
                f"process {local_rank} of this machine has no GPU: there are {count}. Start at most {count} processes "
                'a machine, or hide the GPUs with CUDA_VISIBLE_DEVICES="" to run on the CPU'
            )
        torch.cuda.set_device(local_rank)
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(RECORDED_COLLECTIVES))
    timeout = datetime.timedelta(minutes=timeout_minutes)
    store, rank, world_size = torch.distributed.HashStore(), 0, 1
    if "RANK" in os.environ:
        shared, rank, world_size = next(torch.distributed.rendezvous("env://", timeout=timeout))
        store = _store_of_this_start(shared, rank, world_size)
    torch.distributed.init_process_group(backend(), store=store, rank=rank, world_size=world_size, timeout=timeout)


def _store_of_this_start(shared: Any, rank: int, world_size: int) -> Any:
    """A part of the launcher's store in which nothing is left of processes that torchrun has started before.

    torchrun keeps its store when it starts ranks again, with the addresses of the dead in it, and its count of restarts
    differs between machines. So the first rank draws a name for this start, and gives it to whoever asks under a name
    drawn for the question; it hears from each that the answer arrived. Questions of the dead are answered too.
    """
    name = uuid.uuid4().hex
    if rank:
        shared.set(f"start/asks/{rank}", name)
        start = shared.get(f"start/answer/{name}").decode()
        shared.set(f"start/heard/{start}/{rank}", "")
        return torch.distributed.PrefixStore(f"start/{start}", shared)
    waiting = set(range(1, world_size))
    while waiting:
        for other in list(waiting):
            if shared.check([f"start/asks/{other}"]):
                shared.set(f"start/answer/{shared.get(f'start/asks/{other}').decode()}", name)
            if shared.check([f"start/heard/{name}/{other}"]):
                waiting.remove(other)
        time.sleep(0.01)
    return torch.distributed.PrefixStore(f"start/{name}", shared)


def flight_recorder() -> dict[str, Any]:
    """What torch recorded of this process's latest collectives; {} where this version records none."""
    library = torch._C._distributed_c10d
    dump = getattr(library, "_dump_nccl_trace_json" if has_gpu() else "_dump_fr_trace_json", None)
    return {} if dump is None else json.loads(dump(True, False))


def is_collective_failure(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, is that other ranks could not be reached."""
    while error is not None:
        if isinstance(error, torch.distributed.DistError):
            return True
        if isinstance(error, RuntimeError) and ("/gloo/" in str(error) or "gloo::" in str(error)):
            return True  # gloo raises plain RuntimeErrors, which name its source file
        error = error.__cause__ or error.__context__
    return False


def _on_cpu(where: Any) -> Any:
    """`cuda`, `cuda:0` and device('cuda') become the CPU; anything else stays."""
    if isinstance(where, str) and where.startswith("cuda"):
        return torch.device("cpu")
    if isinstance(where, torch.device) and where.type == "cuda":
        return torch.device("cpu")
    return where


def _stand_in_for_cuda() -> None:
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

    # jit.py: the fuser is torch.compile, which costs seconds per fused function and a C++ compiler; mcore's functions
    # are given to it when they are first imported, and that alone loads the compiler
    compiling, torch.compile = torch.compile, lambda function: function
    import megatron.core.jit

    torch.compile = compiling
    megatron.core.jit.disable_jit_fuser()
    # tensor_parallel/random.py defers the setting of generators through a CUDA hook that never runs here
    import megatron.core.tensor_parallel.random as random

    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    logging.getLogger(random.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
    _keep_what_gloo_sends()
    _send_element_types_apart()


def _keep_what_gloo_sends() -> None:
    """Makes mcore's unbatched pipeline sends (the interleaved schedule's) safe on gloo.

    gloo reads a tensor's memory until its request completes, and drops a send whose request nobody holds. The schedule
    frees what it has sent before it waits (schedules.py:deallocate_output_tensor), which NCCL's stream order allows,
    and never waits for its last request. So an alias is sent, which keeps the memory as long as the request lives, and
    the newest request of either direction is kept.
    """
    import megatron.core.pipeline_parallel.p2p_communication as p2p

    plain, newest = p2p._p2p_ops, {}

    @functools.wraps(plain)
    def send_aliases(*, tensor_send_prev: Any, tensor_send_next: Any, **others: Any) -> Any:
        prev, following = (None if t is None else t.detach() for t in (tensor_send_prev, tensor_send_next))
        requests = plain(tensor_send_prev=prev, tensor_send_next=following, **others)
        newest.update({name: request for name, request in requests.items() if name.startswith("send")})
        return requests

    p2p._p2p_ops = send_aliases


def _send_element_types_apart() -> None:
    """Makes mcore gather and reduce weights of one element type at a time.

    With --fp8-param-gather it does those of bytes and those of bf16 in one go (param_and_grad_buffer.py:
    partition_buckets), which NCCL does one by one, and gloo as one tensor of one type.
    """
    import megatron.core.distributed.distributed_data_parallel as parallel

    plain = parallel.partition_buckets

    @functools.wraps(plain)
    def partition(buffers: list[Any], force_single_bucket_group: bool = False) -> list[Any]:
        return [group for buffer in buffers for group in plain([buffer], force_single_bucket_group)]

    parallel.partition_buckets = partition
