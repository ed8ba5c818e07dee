"""Savings of computing logits only at labelled positions: time and memory of the vocabulary projection.

    python benchmarks/labelled_logits.py

Image positions never carry a label. The rows are those of a SigLIP-384 sample with 729 image and 300 text tokens of
which 100 are answers; width and vocabulary are scaled down to run on a CPU. Prints ratios of medians over
interleaved repetitions.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    positions, labelled = 729 + 300, 100
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(positions, options.hidden, generator=generator, requires_grad=True)
    weight = torch.randn(options.vocabulary, options.hidden, generator=generator, requires_grad=True)
    labels = torch.full((positions,), -100)
    labels[-labelled:] = torch.randint(0, options.vocabulary, (labelled,), generator=generator)

    def everywhere() -> torch.Tensor:
        return F.cross_entropy(hidden @ weight.T, labels, reduction="sum")

    def where_labelled() -> torch.Tensor:
        kept = labels != -100
        return F.cross_entropy(hidden[kept] @ weight.T, labels[kept], reduction="sum")

    assert torch.allclose(everywhere(), where_labelled(), rtol=1e-5)
    times: dict[Callable[[], torch.Tensor], list[float]] = {everywhere: [], where_labelled: []}
    for _ in range(options.repeats):
        for step, taken in times.items():
            hidden.grad = weight.grad = None
            began = time.perf_counter()
            step().backward()
            taken.append(time.perf_counter() - began)
    slow, fast = (statistics.median(taken) for taken in times.values())
    print(
        f"forward and backward: {slow * 1e3:.1f} ms everywhere, {fast * 1e3:.1f} ms where labelled: {slow / fast:.1f}x"
    )
    print(f"logits held: {positions / labelled:.1f}x fewer bytes ({labelled} of {positions} positions)")


if __name__ == "__main__":
    main()
