"""The peak memory of this process."""

from __future__ import annotations

import multiprocessing

from ross_mcore import platform

MIB = 1 << 20


def allocate_and_free(results: multiprocessing.connection.Connection) -> None:
    before = platform.peak_memory_bytes()
    held = b"1" * (256 * MIB)  # without threads, which a forked process does not have
    risen = platform.peak_memory_bytes()
    del held
    results.send((before, risen, platform.peak_memory_bytes()))


def test_the_peak_of_memory_rises_with_allocations_and_never_falls() -> None:
    """In a separate process, whose peak no other test has raised. Linux keeps up to 4 MiB of the count per thread."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=allocate_and_free, args=(theirs,))
    process.start()
    before, risen, after = ours.recv()
    process.join()
    assert risen >= before and risen >= 256 * MIB
    assert after >= risen - 4 * MIB
