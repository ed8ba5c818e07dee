"""Speed and memory of GPUs: data-sheet peaks, and the shares of them that the cost model assumes are reached."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

Precision = Literal["fp32", "tf32", "bf16", "fp8"]

GPUS_PER_NODE = 8


@dataclass(frozen=True)
class Shares:
    """Shares of the peak that are reached. Assumed, not measured: in brackets the figures for an H100 behind them.

    products: matrix products by precision (bf16 600, TF32 200, fp32 45, fp8 1,000 TFLOP/s); small_products: those of
    the vision tower (250); attention: causal attention by torch's SDPA, fused_attention: by flash-attn or cuDNN
    (350 and 450); convolutions: of the VAE, channels last (TF32 110, bf16 220); memory: of pointwise kernels
    (2.6 TB/s); nvlink: of collectives within a node (280 GB/s); network: of collectives between nodes.
    """

    products: dict[Precision, float] = field(
        default_factory=lambda: {"bf16": 0.607, "tf32": 0.404, "fp32": 0.672, "fp8": 0.505}
    )
    small_products: float = 0.253
    attention: float = 0.354
    fused_attention: float = 0.455
    convolutions: float = 0.222
    memory: float = 0.776
    nvlink: float = 0.622
    network: float = 0.8


@dataclass(frozen=True)
class Machine:
    """A GPU and its links, by the vendor's data sheet; operations without sparsity.

    device_name: torch's name of the device; teraflops: by precision; a missing precision is computed in
    bf16; memory_bytes; memory_bytes_per_second; nvlink, network: bytes per second and direction of one GPU, within and
    between nodes; launch_seconds: of a kernel that Python starts; kernel_seconds: of a kernel with little work, on the
    device; latency_seconds: of a collective.
    """

    name: str
    device_name: str
    teraflops: dict[Precision, float]
    memory_bytes: float
    memory_bytes_per_second: float
    nvlink: float
    network: float
    launch_seconds: float = 10e-6
    kernel_seconds: float = 3e-6
    latency_seconds: float = 15e-6
    shares: Shares = Shares()

    def peak(self, precision: Precision) -> float:
        """Operations a second of matrix products in this precision."""
        return 1e12 * self.teraflops.get(precision, self.teraflops["bf16"])


H100 = Machine(
    # NVIDIA H100 Tensor Core GPU data sheet, SXM; DGX H100: one 400 Gb/s adapter for each GPU
    "H100",
    "NVIDIA H100 80GB HBM3",
    {"fp32": 66.9, "tf32": 494.7, "bf16": 989.4, "fp8": 1978.9},
    memory_bytes=80e9,
    memory_bytes_per_second=3.35e12,
    nvlink=450e9,
    network=50e9,
)
H200 = replace(  # NVIDIA H200 Tensor Core GPU data sheet, SXM
    H100, name="H200", device_name="NVIDIA H200", memory_bytes=141e9, memory_bytes_per_second=4.8e12
)
A100 = Machine(
    # NVIDIA A100 80 GB data sheet, SXM; DGX A100: one 200 Gb/s adapter for each GPU
    "A100",
    "NVIDIA A100-SXM4-80GB",
    {"fp32": 19.5, "tf32": 156.0, "bf16": 312.0},
    memory_bytes=80e9,
    memory_bytes_per_second=2.039e12,
    nvlink=300e9,
    network=25e9,
)
_WHOLE: dict[Precision, float] = {"fp32": 1.0, "tf32": 1.0, "bf16": 1.0, "fp8": 1.0}
CPU = Machine(
    # stands for processors of any kind: only the ratios matter, and all precisions compute alike
    "CPU",
    "cpu",
    dict.fromkeys(_WHOLE, 0.1),
    memory_bytes=0.0,
    memory_bytes_per_second=2e10,
    nvlink=2e9,
    network=2e9,
    launch_seconds=0.0,
    kernel_seconds=0.0,
    latency_seconds=0.0,
    shares=Shares(_WHOLE, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0),
)

MACHINES = {machine.name: machine for machine in (H100, H200, A100, CPU)}
"""By the names of --gpu."""


def machine_of(device_name: str) -> Machine | None:
    """The machine of a device by torch's name of it; None for one that the table lacks."""
    return next((machine for machine in MACHINES.values() if machine.device_name == device_name), None)
