"""What this process says of its device."""

from __future__ import annotations

import multiprocessing

from ross_mcore import platform

MIB = 1 << 20


def hold_and_let_go(say: multiprocessing.connection.Connection) -> None:
    before = platform.peak_memory_bytes()
    held = b"1" * (256 * MIB)  # nothing that takes threads, of which a forked process has none
    risen = platform.peak_memory_bytes()
    del held
    say.send((before, risen, platform.peak_memory_bytes()))


def test_the_peak_of_memory_rises_with_what_is_held_and_stays() -> None:
    """In a process of its own, whose peak no other test has raised; Linux keeps up to 4 MiB of the count by thread."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=hold_and_let_go, args=(theirs,))
    process.start()
    before, risen, after = ours.recv()
    process.join()
    assert risen >= before and risen >= 256 * MIB
    assert after >= risen - 4 * MIB
