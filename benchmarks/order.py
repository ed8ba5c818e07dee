"""Shuffling in blocks: savings in reading, loss of randomness, and the cost to start, resume and hold an order.

    python benchmarks/order.py

The index is simulated: 737,000 samples in shards of 10,000, like Cambrian-737k. Shards: distinct shards among 1,000
consecutive samples. Switches: changes of shard over those 1,000, read in order. Seeks: jumps to a sample that is not
the next of the last one, per 1,000 samples, when the samples of a window are read in the order of the shards (of 16,384
samples for the full shuffle). Noise: standard deviation of the mean sample number over a batch of 256, relative to the
full shuffle: the cost of the block-wise order if the shards are fully sorted by position; it is 1 for shards written in
random order.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc

import numpy as np
from numpy.typing import NDArray

from ross_mcore.data.order import BlockOrder, Order, SampleOrder
from ross_mcore.data.rows import RowStream

NUM_SAMPLES, SHARD_SAMPLES, WINDOW_SAMPLES, BATCH = 737_000, 10_000, 16_384, 256


def reading(order: Order, window_samples: int) -> tuple[float, float, float, float]:
    """(shards of 1,000 samples, switches of 1,000, seeks of 1,000, deviation of batch means) over an epoch."""
    numbers = np.concatenate(
        [order.sample_at(np.arange(start, min(start + 2**16, NUM_SAMPLES))) for start in range(0, NUM_SAMPLES, 2**16)]
    )
    thousands = (numbers[: NUM_SAMPLES // 1000 * 1000] // SHARD_SAMPLES).reshape(-1, 1000)
    shards = float(np.mean([np.unique(part).size for part in thousands]))
    switches = float((np.diff(thousands, axis=1) != 0).sum(1).mean())
    starts = np.arange(0, NUM_SAMPLES // window_samples * window_samples, window_samples)[1:]
    seeks = sum(1 + np.count_nonzero(np.diff(np.sort(window)) != 1) for window in np.split(numbers, starts))
    batches = numbers[: NUM_SAMPLES // BATCH * BATCH].reshape(-1, BATCH)
    return shards, switches, 1000 * seeks / NUM_SAMPLES, float(batches.mean(1).std())


def simulated_lengths(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """Token counts of the samples of an index too large to write."""
    return 600 + numbers * 7919 % 700


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    print("order                   window   shards  switches     seeks   noise")
    full = reading(SampleOrder(NUM_SAMPLES, 0), WINDOW_SAMPLES)
    print(f"full shuffle           {'all':>7s} {full[0]:8.1f} {full[1]:9.0f} {full[2]:9.2f} {1:7.2f}")
    for block, blocks in ((2048, 8), (1024, 16), (512, 32), (256, 64), (64, 256), (512, 128)):
        order = BlockOrder(NUM_SAMPLES, 0, block, blocks)
        found = reading(order, order.window_samples)
        print(
            f"{blocks:4d} blocks of {block:5d}   {order.window_samples:7d} {found[0]:8.1f} {found[1]:9.0f} "
            f"{found[2]:9.2f} {found[3] / full[3]:7.2f}"
        )
    order = BlockOrder(10**9, 0)
    began = time.perf_counter()
    order.sample_at(np.arange(10**8, 10**8 + BATCH))
    print(f"one batch at position 10^8 of 10^9: {(time.perf_counter() - began) * 1e3:.1f} ms")
    window = 10**8 // order.window_samples
    for name, cursor in (
        ("start-up", None),
        ("resume", {"consumed_rows": 0, "consumed_samples": window * order.window_samples, "window": window}),
    ):
        tracemalloc.start()
        traced = RowStream(order, simulated_lengths, 4096, True, order.window_samples)
        steps(traced, cursor)
        held, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        began = time.perf_counter()
        steps(RowStream(order, simulated_lengths, 4096, True, order.window_samples), cursor)
        print(
            f"{name}, to the first {BATCH} packed rows: {(time.perf_counter() - began) * 1e3:.0f} ms; held "
            f"{held / order.window_samples:.1f} bytes a sample of the window, while it is planned "
            f"{peak / order.window_samples:.0f}"
        )


def steps(stream: RowStream, cursor: dict[str, int] | None) -> None:
    """Opens a stream at a cursor and takes a step's rows."""
    if cursor:
        stream.load_state_dict({**cursor, "first_row": 0})
    stream.take(BATCH)


if __name__ == "__main__":
    main()
