"""Which device this process uses: with cpu_megatron.py the only file that names cuda, nccl or gloo."""

from __future__ import annotations

import datetime
import functools
import importlib.util
import json
import os
import resource
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ross_mcore.errors import PlatformError

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


def order_kernels() -> None:
    """Asks CUDA for one queue of kernels (see Libraries.ordered_kernels); too late once the GPU is in use."""
    if not torch.cuda.is_initialized():
        os.environ.setdefault(CONNECTIONS, "1")


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
