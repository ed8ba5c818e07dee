"""The peak memory of this process, its environment, its process groups, and its pinned memory."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ross_mcore import environment, platform
from ross_mcore.parallel import groups
from ross_mcore.parallel.layout import Layout

MIB = 1 << 20


def allocate_and_free(results: multiprocessing.connection.Connection) -> None:
    before = platform.peak_memory_bytes()
    held = b"1" * (64 * MIB)  # without threads, which a forked process does not have
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
    assert risen >= before and risen >= 64 * MIB
    assert after >= risen - 4 * MIB


def test_the_environment_is_set_before_torch_is_loaded() -> None:
    """Unless the user has set it, under either name of the allocator's settings."""
    names = (environment.CONNECTIONS, *environment.ALLOCATOR)
    code = f"import ross_mcore, os, sys; print('torch' in sys.modules, *(os.environ.get(n) for n in {names}))"
    unset = {name: value for name, value in os.environ.items() if name not in names}
    given = {environment.CONNECTIONS: "8", "PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}
    for more, printed in (
        ({}, "False 1 expandable_segments:True None"),
        (given, "False 8 None max_split_size_mb:64"),
    ):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env={**unset, **more}, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == printed


def test_the_environment_of_a_gpu_in_use_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(environment.CONNECTIONS, raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    environment.prepare()
    assert environment.CONNECTIONS not in os.environ


def test_nccl_connects_to_the_gpu_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """With recorded arguments in place of a GPU."""
    called: dict[str, Any] = {}
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(platform, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: called.update(current=gpu.index))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **more: called.update(more, b=backend))
    platform.initialize_process_group(1)
    assert called["b"] == "nccl" and called["current"] == 1 and called["device_id"] == torch.device("cuda", 1)


def test_every_group_uses_the_library_of_the_device(process_group: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """mcore can make a second group of gloo beside each group of data-parallel ranks."""
    backends = []
    plain = torch.distributed.new_group
    monkeypatch.setattr(
        torch.distributed, "new_group", lambda *given, **more: backends.append(more["backend"]) or plain(*given, **more)
    )
    groups.initialize(Layout(1, 1, 1, (1,)), 1, 1)
    assert len(backends) > 5 and set(backends) == {None}


@pytest.mark.parametrize("status", [0, 304])
def test_memory_is_pinned_while_it_lives_or_the_reason_is_given(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int]] = []

    def register(place: int, size: int, flags: int) -> int:
        calls.append(("pin", size))
        return status

    driver = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=lambda place: calls.append(("unpin", 0)))
    memory = torch.empty(100, dtype=torch.uint8)
    assert platform.pin(memory) is None  # no effect without a GPU
    monkeypatch.setattr(platform, "has_gpu", lambda: True)
    monkeypatch.setattr(platform, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    problem = platform.pin(memory)
    assert (problem is None) == (status == 0) and calls == [("pin", 100)]
    del memory
    assert calls[1:] == ([] if status else [("unpin", 0)])


def test_a_compiler_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    assert not platform.has_compiler()
    assert platform.libraries().compiler  # a CPU needs none
