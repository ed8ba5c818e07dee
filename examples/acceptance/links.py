"""All-reduce rates between the ranks of this machine, as bus bandwidth; torchrun starts it on every rank."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from examples.acceptance.probe import note
from ross_mcore import platform

REPEATS = 10


def main() -> None:
    platform.initialize_process_group(5)
    size, device = dist.get_world_size(), platform.device()
    for megabytes in (1, 64, 512) if platform.has_gpu() else (1, 16):
        tensor = torch.ones(megabytes << 19, dtype=torch.bfloat16, device=device)
        for repeat in range(REPEATS + 2):
            if repeat == 2:  # after the first ones, in which libraries connect
                platform.synchronize()
                began = time.perf_counter()
            dist.all_reduce(tensor)
        platform.synchronize()
        seconds = (time.perf_counter() - began) / REPEATS
        if dist.get_rank() == 0:  # a ring sends and receives 2 (n - 1) / n of the tensor on every rank
            rate = 2 * (size - 1) / size * tensor.nbytes / seconds / 1e9
            note(f"all-reduce of {megabytes} MiB over {size} ranks: {rate:.1f} GB/s, {1e6 * seconds:.0f} us")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
