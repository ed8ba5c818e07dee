"""The device of this process. Only this file and cpu_megatron.py name cuda, nccl or gloo."""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
import resource
import shutil
import sysconfig
import time
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ross_mcore.environment import CONNECTIONS
from ross_mcore.errors import PlatformError
from ross_mcore.launcher import RENDEZVOUS

T = TypeVar("T")

RECORDED_COLLECTIVES = 64
"""Length of torch's flight recorder, of which the last entry is read; with its default length reading is slow."""

AMPERE, BLACKWELL = (8, 0), (10, 0)
"""Compute capabilities."""

COMPILE_DISABLE = "TORCH_COMPILE_DISABLE"
"""1 turns torch.compile off: functions compute as they are written."""

TF32_OVERRIDE = "NVIDIA_TF32_OVERRIDE"
"""0 turns TF32 off inside NVIDIA's libraries, whatever a program sets."""


@functools.cache
def has_gpu() -> bool:
    """Whether this process computes on a GPU."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The GPU of this process, or the CPU; under `with torch.device("meta")` the meta device, for shapes only."""
    if torch.get_default_device().type == "meta":
        return torch.device("meta")
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else torch.device("cpu")


@functools.cache
def is_ampere() -> bool:
    """Whether this process computes on a GPU of Ampere or newer, which has TF32, and which flash attention needs."""
    return has_gpu() and torch.cuda.get_device_capability() >= AMPERE


def device_name() -> str:
    """torch's name of the GPU, or `cpu`."""
    return torch.cuda.get_device_name() if has_gpu() else "cpu"


def backend() -> str:
    """torch's name of the collective library for the device."""
    return "nccl" if has_gpu() else "gloo"


@dataclass(frozen=True)
class Libraries:
    """Optional libraries that are installed, and properties of the device."""

    gpu: bool
    transformer_engine: bool
    flash_attention: bool
    gradient_fusion: bool
    """Apex's fused_weight_gradient_mlp_cuda, or its replacement on a CPU."""
    ordered_kernels: bool
    """Whether kernels start in the order of their launch, which overlap of tensor-parallel communication needs (mcore's
    tensor_parallel/layers.py:526); before Blackwell only with CUDA_DEVICE_MAX_CONNECTIONS=1."""
    tf32: bool = False
    """Whether fp32 products can be computed in TF32: on GPUs from Ampere, unless NVIDIA_TF32_OVERRIDE is 0."""
    compiler: bool = True
    """Whether torch.compile, which fuses mcore's functions on a GPU, finds what it needs, or is turned off."""


def libraries() -> Libraries:
    def installed(name: str) -> bool:
        return importlib.util.find_spec(name) is not None

    return Libraries(
        gpu=has_gpu(),
        transformer_engine=installed("transformer_engine"),
        flash_attention=installed("flash_attn"),
        gradient_fusion=not has_gpu() or installed("fused_weight_gradient_mlp_cuda"),
        ordered_kernels=not has_gpu()
        or os.environ.get(CONNECTIONS) == "1"
        or torch.cuda.get_device_capability() >= BLACKWELL,
        tf32=is_ampere() and os.environ.get(TF32_OVERRIDE) != "0",
        compiler=not has_gpu() or os.environ.get(COMPILE_DISABLE) == "1" or has_compiler(),
    )


def has_compiler() -> bool:
    """Whether triton can build its module in C, as its runtime/build.py looks for a compiler and Python.h."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return bool(compiler) and Path(sysconfig.get_paths("posix_prefix")["include"], "Python.h").exists()


def fp8_refusal(recipe: str) -> str | None:
    """The reason why Transformer Engine cannot compute this FP8 recipe on this device; None if it can."""
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    asked = {
        "mxfp8": FP8GlobalStateManager.is_mxfp8_available,
        "blockwise": FP8GlobalStateManager.is_fp8_block_scaling_available,
    }
    works, reason = asked.get(recipe, FP8GlobalStateManager.is_fp8_available)()
    return None if works else reason.rstrip(".")


def flash_attention_refusal() -> str | None:
    """The reason why Transformer Engine does not use the installed flash-attn; None if it does.

    It takes a range of versions, which it compares when its attention is imported, and otherwise computes without.
    """
    from transformer_engine.pytorch.attention.dot_product_attention.backends import fa_utils

    if fa_utils.is_installed or fa_utils.v3_is_installed:
        return None
    is_blackwell = has_gpu() and torch.cuda.get_device_capability() >= BLACKWELL
    lowest = fa_utils.version_required_blackwell if is_blackwell else fa_utils.version_required
    found = f"{fa_utils.version} is" if importlib.util.find_spec("flash_attn") else "none is"
    engine = importlib.metadata.version("transformer_engine")
    return f"Transformer Engine {engine} takes flash-attn {lowest} to {fa_utils.max_version}, and {found} installed"


def peak_memory_bytes() -> int:
    """Peak memory of this process so far: allocated by torch on its GPU, or resident in RAM without a GPU."""
    if has_gpu():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # Linux; getrusage's peak includes that of the parent process before exec
        return 1024 * int(status.read_text().partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def compute_fp32_exactly() -> None:
    """Turns off TF32 in this process, in every part of the model. For comparisons with values computed in fp32.

    Also in Transformer Engine, whose fp32 products are TF32 otherwise. Call before the first computation.
    """
    os.environ[TF32_OVERRIDE] = "0"
    set_tf32(False)


def set_tf32(on: bool) -> None:
    """Sets whether GPUs round the factors of fp32 products and convolutions to TF32, which has 10 bits of mantissa.

    torch's defaults are TF32 for convolutions, and for matrix products where TORCH_ALLOW_TF32_CUBLAS_OVERRIDE is 1. Its
    older names are set, because these set the newer ones (`fp32_precision`) too, and torch raises where the two differ.
    """
    torch.backends.cuda.matmul.allow_tf32 = on
    torch.backends.cudnn.allow_tf32 = on


@contextlib.contextmanager
def tf32(on: bool) -> Iterator[None]:
    """`set_tf32` inside the block, fp32 behind it. For the launch of kernels: a backward pass is outside the block."""
    set_tf32(on)
    try:
        yield
    finally:
        set_tf32(False)


def use_device(device: torch.device) -> None:
    """Makes this thread use a GPU: torch has a current device for each thread, at first GPU 0. No effect on a CPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the host in memory that a GPU can read by itself; without a GPU, the tensor itself."""
    return tensor.pin_memory() if has_gpu() else tensor


def upload(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on `device`. The host does not wait: the copy is from pinned memory, in stream order."""
    return tensor if device.type == "cpu" else pinned(tensor).to(device, non_blocking=True)


class SideStream:
    """A second queue of kernels of the GPU, for work that does not depend on the first one's; on a CPU, there is none.

    There is one such queue a process: torch keeps the memory that was freed in a queue for that queue.
    """

    def __init__(self) -> None:
        """Its work begins after that which the main queue has been given so far."""
        self._stream = _side_stream() if has_gpu() else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())

    def start(self, work: Callable[[], T]) -> Started[T]:
        """Runs `work` with its kernels in the second queue; its inputs are on the host, or older than this object."""
        if self._stream is None:
            return Started(work(), None)
        with torch.cuda.stream(self._stream):
            return Started(work(), self._stream.record_event())


@dataclass(frozen=True)
class Started(Generic[T]):
    """The value of work in a side stream, which may not be computed yet."""

    value: T
    _end: torch.cuda.Event | None

    def finish(self, tensors: Iterable[torch.Tensor]) -> T:
        """The value for use in the main queue, which waits for it; `tensors`: all those in it."""
        if self._end is not None:
            main = torch.cuda.current_stream()
            main.wait_event(self._end)
            for tensor in tensors:
                if tensor.is_cuda:
                    tensor.record_stream(main)  # so that the side stream does not use its memory again too early
        return self.value


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def synchronize() -> None:
    """Waits until the device has finished, so that a time measured afterwards includes its work."""
    if has_gpu():
        torch.cuda.synchronize()


def gpu_is_in_use() -> bool:
    """Whether this process has made a GPU call that fixed its environment."""
    return bool(torch.cuda.is_initialized())


def pin(memory: Tensor) -> str | None:
    """Locks the pages of host memory while `memory` lives, so that a GPU copies to it at the full speed of the bus.

    Returns the reason if the driver refuses. torch's own pinned memory is rounded up to a power of two. No effect
    without a GPU.
    """
    if not has_gpu() or not memory.nbytes:
        return None
    driver, portable = torch.cuda.cudart(), 1
    failed = int(driver.cudaHostRegister(memory.data_ptr(), memory.nbytes, portable))
    if failed:
        with contextlib.suppress(RuntimeError):  # CUDA would report this error again, at the next kernel
            torch.zeros(1, device=device())
        return f"CUDA error {failed}; see the limit of locked memory, ulimit -l"
    weakref.finalize(memory, driver.cudaHostUnregister, memory.data_ptr()).atexit = False
    return None


def initialize_process_group(timeout_minutes: float) -> None:
    """Creates the process group of all processes that torchrun started, or of this process without torchrun.

    Raises PlatformError when a machine has more processes than GPUs, or when processes do not find each other in time.
    """
    set_tf32(False)  # fp32 is fp32, but where a part of the model asks for TF32
    if torch.distributed.is_initialized():
        return
    gpu = None
    if has_gpu():
        local_rank, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local_rank >= count:
            raise PlatformError(
                f"process {local_rank} of this machine has no GPU: there are {count}. Start at most {count} processes "
                'a machine, or hide the GPUs with CUDA_VISIBLE_DEVICES="" to run on the CPU'
            )
        gpu = torch.device("cuda", local_rank)
        use_device(gpu)
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", str(RECORDED_COLLECTIVES))
    timeout = datetime.timedelta(minutes=timeout_minutes)
    store, rank, world_size = torch.distributed.HashStore(), 0, 1
    try:
        if "RANK" in os.environ:
            shared, rank, world_size = next(torch.distributed.rendezvous("env://", timeout=timeout))
            store = _store_of_this_start(shared, rank, world_size, timeout)
        # with a device NCCL connects here, and not in the first collective, and groups are made from this one's links
        torch.distributed.init_process_group(
            backend(), store=store, rank=rank, world_size=world_size, timeout=timeout, device_id=gpu
        )
    except (torch.distributed.DistError, TimeoutError, ValueError) as error:
        given = ", ".join(f"{name}={os.environ.get(name)}" for name in RENDEZVOUS)
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise PlatformError(
            f"the processes of this run did not find each other within {timeout_minutes:g} minutes ({given}): "
            f"{reason}. All must be started, with the same address and port of the first machine, which the others "
            "can reach; --distributed-timeout-minutes sets the limit"
        ) from None


def _store_of_this_start(shared: Any, rank: int, world_size: int, timeout: datetime.timedelta) -> Any:
    """The launcher's store under a prefix of this start, without keys of earlier starts.

    torchrun keeps its store when it restarts ranks, with the addresses of ended processes in it, and its count of
    restarts differs between machines. So rank 0 draws a random prefix for this start. Every other rank sends a request
    with a random id, gets the prefix under this id, and confirms that it arrived. Requests of ended processes are
    answered too. Raises TimeoutError or DistStoreError.
    """
    name = uuid.uuid4().hex
    if rank:
        shared.set(f"start/request/{rank}", name)
        start = shared.get(f"start/reply/{name}").decode()
        shared.set(f"start/confirmed/{start}/{rank}", "")
        return torch.distributed.PrefixStore(f"start/{start}", shared)
    waiting, deadline = set(range(1, world_size)), time.monotonic() + timeout.total_seconds()
    while waiting:
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank {', '.join(map(str, sorted(waiting)))} did not answer")
        for other in list(waiting):
            if shared.check([f"start/request/{other}"]):
                shared.set(f"start/reply/{shared.get(f'start/request/{other}').decode()}", name)
            if shared.check([f"start/confirmed/{name}/{other}"]):
                waiting.remove(other)
        time.sleep(0.01)
    return torch.distributed.PrefixStore(f"start/{name}", shared)


def flight_recorder() -> dict[str, Any]:
    """torch's record of this process's latest collectives; {} if this version of torch has none."""
    library = torch._C._distributed_c10d
    dump = getattr(library, "_dump_nccl_trace_json" if has_gpu() else "_dump_fr_trace_json", None)
    return {} if dump is None else json.loads(dump(True, False))


def is_collective_failure(error: BaseException | None) -> bool:
    """Whether an error, or one of its causes, is a failed communication with other ranks."""
    while error is not None:
        if isinstance(error, torch.distributed.DistError):
            return True
        if isinstance(error, RuntimeError) and ("/gloo/" in str(error) or "gloo::" in str(error)):
            return True  # gloo raises plain RuntimeErrors that name its source file
        error = error.__cause__ or error.__context__
    return False
