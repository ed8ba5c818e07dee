"""Describes this machine as one JSON object: rows of the report's table, and the needs it cannot meet with reasons.

It runs as a separate process, because importing a library that does not fit the GPU may end the process.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform as python_platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = (
    *("torch", "megatron-core", "transformer-engine", "flash-attn", "apex", "triton", "numpy"),
    *("transformers", "diffusers", "ross-mcore"),
)
ROOM_GB, ROOM_DISK_GB = 75, 260
"""For Qwen2-7B's shapes: two checkpoints of 107 GB with optimizer, and its weights twice."""
SETTINGS = ("CUDA_", "NCCL_", "NVTE_", "TORCH_", "PYTORCH_", "OMP_", "NVIDIA_TF32")


def output_of(*command: str) -> str:
    """Output of a command; empty if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, cwd=ROOT)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def lacking() -> dict[str, str]:
    """Each need of parts.py that this machine cannot meet -> the reason."""
    from ross_mcore import platform

    libraries = platform.libraries()
    if not libraries.gpu:
        why = "needs a CUDA GPU"
        te = f"{why}; `make test-te` runs Transformer Engine's Python layer on stand-ins for its kernels"
        return {"gpu": why, "room": why, "transformer_engine": te, "fp8": te}
    return _no_room() | _no_engine(libraries.transformer_engine)


def _no_room() -> dict[str, str]:
    import torch

    memory, disk = torch.cuda.get_device_properties(0).total_memory / 1e9, shutil.disk_usage(ROOT).free / 1e9
    if memory >= ROOM_GB and disk >= ROOM_DISK_GB:
        return {}
    return {
        "room": f"needs GPUs of {ROOM_GB} GB and {ROOM_DISK_GB} GB of free disk, there are {memory:.0f} and {disk:.0f}"
    }


def _no_engine(is_installed: bool) -> dict[str, str]:
    from ross_mcore import platform

    if not is_installed:
        why = "needs Transformer Engine, which is not installed"
        return {"transformer_engine": why, "fp8": why}
    try:
        refusal = platform.fp8_refusal("delayed")
    except Exception as error:  # an extension built for another system may raise any error
        why = f"Transformer Engine does not import: {type(error).__name__}: {error}"
        return {"transformer_engine": why, "fp8": why}
    return {} if refusal is None else {"fp8": refusal}


def rows() -> dict[str, str]:
    """Rows of the environment table."""
    import torch

    commit = output_of("git", "rev-parse", "HEAD") or "not a git checkout"
    settings = sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith(SETTINGS))
    found = {
        "commit": commit + (" with changes" if output_of("git", "status", "--porcelain") else ""),
        "system": f"{python_platform.system()} {python_platform.release()}, {os.cpu_count()} CPUs",
        "Python": sys.version.split()[0],
    }
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            gpu = torch.cuda.get_device_properties(number)
            found[f"GPU {number}"] = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}"
        drivers = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
        found["driver"] = ", ".join(sorted(set(drivers))) or "not known: nvidia-smi does not answer"
        found["CUDA, cuDNN of torch"] = f"{torch.version.cuda}, {torch.backends.cudnn.version()}"
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    else:
        found["GPU"] = "none: gloo and fp32 kernels of the CPU"
    found |= {package: version(package) for package in PACKAGES}
    return found | kernels() | {"environment": " ".join(settings) or "-"}


def kernels() -> dict[str, str]:
    """The settings of TF32 and attention: torch's own on this machine, and those of a run in bf16."""
    import torch
    from torch.nn.attention import SDPBackend

    from ross_mcore import platform
    from ross_mcore.config import Config
    from ross_mcore.engine.kernels import choose
    from ross_mcore.engine.precision import kernels_in_words

    libraries, config = platform.libraries(), Config.from_flat(bf16=True)
    names = ("flash", "cudnn", "mem_efficient", "math")
    enabled = [name for name in names if getattr(torch.backends.cuda, f"{name}_sdp_enabled")()]
    order = [SDPBackend(number).name.lower() for number in torch._C._get_sdp_priority_order()]
    chosen = choose(config, libraries).config.execution
    try:
        words = kernels_in_words(config, libraries)
    except Exception as error:  # of an extension built for another system
        words = f"{type(error).__name__}: {error}"
    return {
        "TF32 by torch": f"products {torch.backends.cuda.matmul.allow_tf32}, "
        f"convolutions {torch.backends.cudnn.allow_tf32}",
        "precision of a run": f"denoiser {chosen.denoiser_precision}, VAE {chosen.vae_precision}",
        "attention by torch": f"{', '.join(enabled)}; in this order: {', '.join(order)}",
        "kernels of a run": words,
    }


def main() -> None:
    import torch

    found = {"rows": rows(), "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0}
    print(json.dumps({**found, "lacks": lacking()}, indent=1))


if __name__ == "__main__":
    main()
