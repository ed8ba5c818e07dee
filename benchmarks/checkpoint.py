"""Cost of a checkpoint: stall of training, bytes on disk, throughput compared with plain torch, verification.

    python benchmarks/checkpoint.py

Every rank trains its own stack of matrices with Adam. Weights and both moments are saved, split as under tensor
parallelism. The methods run in turn; figures are medians over the turns.

Stall: additional time of a sequence of training steps with one save, for a save that training waits for (sync) and for
one that runs beside it (async), over all steps until the save is complete.

Writing: a whole synchronous save, compared with torch.save and fsync of the same tensors. Both compute a CRC-32 of all
bytes. `and read back` includes the reading back and comparing before a save is published. torch.save overwrites its
previous file; `beside the former` is torch.save and fsync to a new file that then replaces the previous one, as a
checkpoint does: the memory of the previous file's cache cannot be reused. `torch's own` is
torch.distributed.checkpoint, which syncs its files and computes no checksum.

Reading: from the disk if the file system can drop its cache. torch.load, which allocates new memory and verifies no
checksum, is compared with loading into the tensors of a model (a run with --no-verify), and with the same after
verifying every file's checksum (a run's default), which then reads from the cache. torch.distributed.checkpoint loads
into the same tensors.

Blocked: time that training waits for an asynchronous save of a model of 40 million parameters in bf16 with the
distributed optimizer, sharded over all ranks: each rank copies its own share, compared with gathering all shares on
every rank first, as mcore's format for all layouts does.

Index: time to read the index of INDEX_TENSORS tensors through the allow-list, compared with pickle.load.
"""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as processes
from isal.isal_zlib import crc32
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.optimizer import distrib_optimizer

from ross_mcore import platform
from ross_mcore.architecture import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from ross_mcore.checkpoint.folder import Checkpoint
from ross_mcore.checkpoint.manifest import checksum
from ross_mcore.checkpoint.safe_load import read_metadata
from ross_mcore.checkpoint.saving import Destination, HostCopies, RunningSave, begin_save
from ross_mcore.checkpoint.sharded import load_model_weights
from ross_mcore.checkpoint.torch_dist import INDEX_FILE, sharding_metadata
from ross_mcore.checkpoint.verification import shared_damage
from ross_mcore.conversion.stream import TensorWriter
from ross_mcore.cpu_megatron import OnCpu
from ross_mcore.engine.state import sharded_state

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

WIDTH = 1024
TOKENS = 48
INDEX_TENSORS = 3000
"""About the number in a 7B model with both moments and masters."""
LLAMA = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
CLIP = {"model_type": "clip_vision_model", "hidden_size": 8, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}


def any_model() -> ModelConfig:
    """An architecture for config.json; the saved tensors are not this model."""
    language = LanguageConfig.from_huggingface({**LLAMA, "num_attention_heads": 1})
    return ModelConfig(language, VisionConfig(CLIP, (0, 0, 0), (1, 1, 1)), ProjectorConfig(), None, None)


class Training:
    """A rank's matrices [WIDTH, WIDTH], trained on noise: a state that changes at every step."""

    def __init__(self, layers: int) -> None:
        torch.manual_seed(dist.get_rank())
        self.layers = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
        self.adam = torch.optim.Adam(self.layers.parameters(), lr=1e-5)
        self.step()

    def step(self) -> None:
        self.adam.zero_grad()
        self.layers(torch.randn(TOKENS, WIDTH)).square().mean().backward()
        self.adam.step()

    def tensors(self) -> dict[str, torch.Tensor]:
        own = {}
        for name, weight in self.layers.named_parameters():
            own[f"model.{name}"] = weight.detach()
            own |= {f"optimizer.{kind}.{name}": self.adam.state[weight][kind] for kind in ("exp_avg", "exp_avg_sq")}
        return own

    def state(self) -> dict[str, Any]:
        rank, size = dist.get_rank(), dist.get_world_size()
        pieces = {n: ShardedTensor.from_rank_offsets(n, t, (0, rank, size)) for n, t in self.tensors().items()}
        return {"model": pieces, "train_state": {"iteration": 1}}


def timed(action: Callable[[], object]) -> float:
    """Seconds until the slowest rank is done."""
    dist.barrier()
    began = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - began


def steps_with(training: Training, steps: int, start: Callable[[], RunningSave | None]) -> tuple[float, float]:
    """(seconds of a sequence of steps with one save, seconds that training was blocked)."""
    blocked = 0.0

    def run() -> None:
        nonlocal blocked
        running: RunningSave | None = None
        for number in range(steps):
            training.step()
            began = time.perf_counter()
            if number == 0:
                running = start()
            elif running is not None and running.poll() is not None:
                running = None
            blocked += time.perf_counter() - began
        began = time.perf_counter()
        if running is not None:
            running.finish()
        blocked += time.perf_counter() - began

    return timed(run), blocked


def forget(folder: Path) -> None:
    """Drops a folder's files from the system's cache."""
    for path in folder.rglob("*"):
        if path.is_file() and hasattr(os, "posix_fadvise"):
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def torch_save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    with path.open("wb") as stream:
        torch.save(tensors, stream)
        os.fsync(stream.fileno())


def torch_save_beside(tensors: dict[str, torch.Tensor], path: Path) -> None:
    new = path.with_suffix(".new")
    torch_save(tensors, new)
    new.replace(path)


def dcp_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state under names unique to this rank: torch.distributed.checkpoint stores a name once."""
    return {f"{dist.get_rank()}.{name}": tensor for name, tensor in tensors.items()}


def measure_index(root: Path, say: Callable[[str], None]) -> None:
    folder = root / "index"
    folder.mkdir()
    with TensorWriter(folder) as writer:
        for number in range(INDEX_TENSORS):
            writer.add(f"layer.{number}.weight", torch.zeros(1))
    path = folder / INDEX_FILE
    plain = statistics.median(elapsed(lambda: pickle.loads(path.read_bytes())) for _ in range(5))
    checked = statistics.median(elapsed(lambda: read_metadata(folder)) for _ in range(5))
    say(f"index of {INDEX_TENSORS} tensors, s: pickle   {plain:8.3f}")
    say(f"  through the allow-list          {checked:8.3f} = {checked / plain:.1f}x")


def elapsed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def measure_stall(training: Training, root: Path, turns: int, say: Callable[[str], None]) -> None:
    copies, model = HostCopies(), any_model()

    def begin(copies: HostCopies | None) -> RunningSave | None:
        running = begin_save(Destination(root, 1, model, keep_last=1), training.state(), copies)
        if copies is None:
            running.finish()
            return None
        return running

    begin(copies).finish()  # type: ignore[union-attr]  # the memory of the copy is allocated once per run
    step = statistics.median(timed(training.step) for _ in range(5))
    save = timed(lambda: begin(None))
    steps = max(10, round(4 * save / step))
    ways: dict[str, Callable[[], RunningSave | None]] = {
        "none": lambda: None,
        "sync": lambda: begin(None),
        "async": lambda: begin(copies),
    }
    found: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(turns):
        for way, start in ways.items():
            found[way].append(steps_with(training, steps, start))
    seconds = {way: statistics.median(total for total, _ in own) for way, own in found.items()}
    blocked = {way: statistics.median(still for _, still in own) for way, own in found.items()}
    sync, beside = (seconds[way] - seconds["none"] for way in ("sync", "async"))
    say(f"a step takes {step:.3f} s; {steps} steps: {seconds['none']:.2f} s, with a sync save {seconds['sync']:.2f} s,")
    say(f"  with an async save {seconds['async']:.2f} s; copy in host memory {copies.bytes / 2**20:.0f} MiB a rank")
    say(f"training is blocked for {blocked['async']:.3f} s async, {blocked['sync']:.3f} s sync:")
    say(f"  async stall / sync stall        {blocked['async'] / blocked['sync']:8.1%}   (aim: below 10%)")
    say(f"  the same with slower steps      {beside / sync:8.1%}   (the writer takes its share of the processors)")


def measure_blocked(base: Path, shards: Path, root: Path, turns: int, say: Callable[[str], None]) -> None:
    from counting.model import opened

    with opened(base, shards, root / "run", bf16=True, micro_batch_size=1) as run:
        engine, copies = run.engine, {"own": HostCopies(), "gathered": HostCopies()}
        OnCpu("DistributedOptimizer.get_parameter_state_dp_zero")(distrib_optimizer)
        for buffer in (buffer for chunk in engine.model for buffer in chunk.buffers):
            buffer.numel_unpadded = buffer.numel  # mcore counts the padding in offsets of parameters, not of buckets
            for bucket in buffer.buckets:
                bucket.numel_unpadded = bucket.grad_data.numel()

        def gathered() -> dict[str, Any]:
            weights = engine.model.sharded_weights()
            moments = engine.optimizer.sharded_state_dict(weights, metadata=sharding_metadata())
            return {"model": weights, "optimizer": moments}

        ways = {"own": lambda: sharded_state(engine, is_loading=False), "gathered": gathered}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(turns + 1):
            for way, state in ways.items():
                running: list[RunningSave] = []

                def begin(way: str = way, state: Any = state, running: list[RunningSave] = running) -> None:
                    destination = Destination(root / way, 1, run.model_config)
                    running.append(begin_save(destination, {**state(), "train_state": {}}, copies[way]))

                took = timed(begin)
                running[0].finish()
                if turn:  # the first one allocates the memory of the copies
                    seconds[way].append(took)
        own, others = (statistics.median(seconds[way]) for way in ways)
        say(f"training is blocked for {own:.3f} s where a rank copies its own {copies['own'].bytes >> 20} MiB,")
        say(f"  {others:.3f} s where all gather first; own / gathered {own / others:8.1%}")


def measure_throughput(training: Training, root: Path, turns: int, say: Callable[[str], None]) -> None:
    rank, model, tensors = dist.get_rank(), any_model(), training.tensors()
    plain, beside = root / f"plain_{rank}.pt", root / f"beside_{rank}.pt"
    state_bytes = dist.get_world_size() * sum(tensor.nbytes for tensor in tensors.values())
    own_tensors = {
        name: torch.ones_like(tensor) for name, tensor in tensors.items()
    }  # a model's tensors are not new memory

    def load(checkpoint: Checkpoint, verify: bool) -> None:
        if verify:
            assert not shared_damage(checkpoint)
        size = dist.get_world_size()
        wanted = {n: ShardedTensor.from_rank_offsets(n, t, (0, rank, size)) for n, t in own_tensors.items()}
        load_model_weights(checkpoint, wanted)

    seconds: dict[str, list[float]] = {}
    for _ in range(turns):

        def note(name: str, action: Callable[[], object]) -> None:
            seconds.setdefault(name, []).append(timed(action))

        saved: list[Any] = []
        note("torch.save", lambda: torch_save(tensors, plain))
        note("torch.save beside", lambda: torch_save_beside(tensors, beside))
        note(
            "dcp.save",
            lambda: dcp.save(dcp_names(tensors), storage_writer=dcp.FileSystemWriter(root / "dcp", overwrite=True)),
        )
        note(
            "save",
            lambda: saved.append(begin_save(Destination(root, 1, model, keep_last=1), training.state()).finish()),  # noqa: B023
        )
        checkpoint = saved[0].checkpoint
        own = checkpoint.path / f"__{rank}_0.distcp"
        note("read back", lambda: checksum(own, from_disk=True))  # noqa: B023
        forget(root)
        note("torch.load", lambda: torch.load(plain, weights_only=True))
        forget(root)
        note("dcp.load", lambda: dcp.load(dcp_names(own_tensors), checkpoint_id=root / "dcp"))
        forget(root)
        note("load", lambda: load(checkpoint, verify=False))  # noqa: B023
        forget(root)
        note("verify and load", lambda: load(checkpoint, verify=True))  # noqa: B023
        forget(root)
        note("verify", lambda: shared_damage(checkpoint))  # noqa: B023
    note("crc32", lambda: [crc32(tensor.numpy()) for tensor in tensors.values()])
    assert all(torch.equal(own_tensors[name], tensor) for name, tensor in tensors.items())
    on_disk = checkpoint.manifest().bytes
    rates = {name: state_bytes / 1e9 / statistics.median(own) for name, own in seconds.items()}
    written = state_bytes / 1e9 / statistics.median(a - b for a, b in zip(seconds["save"], seconds["read back"]))
    say(f"bytes on disk / bytes of state    {on_disk / state_bytes:8.3f}   (aim: within 2%)")
    say(f"write, GB/s: torch.save + fsync   {rates['torch.save']:8.2f}")
    say(f"  checkpoint                      {written:8.2f} = {written / rates['torch.save']:.2f}x   (aim: 0.8)")
    say(f"  and read back                   {rates['save']:8.2f} = {rates['save'] / rates['torch.save']:.2f}x")
    ratio = written / rates["torch.save beside"]
    say(f"  torch.save beside the former    {rates['torch.save beside']:8.2f}; checkpoint {ratio:.2f}x")
    ratio = written / rates["dcp.save"]
    say(f"  torch's own                     {rates['dcp.save']:8.2f}; checkpoint {ratio:.2f}x")
    say(f"read, GB/s: torch.load            {rates['torch.load']:8.2f}")
    for name, way in (("--no-verify", "load"), ("verified", "verify and load")):
        ratio = rates[way] / rates["torch.load"]
        own = rates[way] / rates["dcp.load"]
        say(
            f"  checkpoint, {name:<11}         {rates[way]:8.2f} = {ratio:.2f}x   (aim: 0.8); {own:.2f}x of torch's own"
        )
    say(f"  of which verifying              {rates['verify']:8.2f}   (crc32 in memory: {rates['crc32']:.2f})")


def run(rank: int, world: int, port: int, options: argparse.Namespace, root: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    platform.initialize_process_group(10)
    training = Training(max(1, round(options.mib * 2**20 / 12 / WIDTH**2 / world)))
    total = world * sum(tensor.nbytes for tensor in training.tensors().values())

    def say(text: str) -> None:
        if rank == 0:
            print(text, flush=True)

    say(f"{world} rank{'s' if world > 1 else ''}, {total / 2**20:.0f} MiB of state")
    if rank == 0:
        measure_index(root, say)
    measure_throughput(training, root, options.turns, say)
    measure_stall(training, root, options.turns, say)
    del training
    measure_blocked(root / "model" / "base", root / "model" / "shards", root, options.turns, say)
    dist.destroy_process_group()


def main() -> None:
    from counting.model import STEP, Wanted, write_checkpoint, write_shards

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=384, help="size of the state over all ranks [%(default)s]")
    parser.add_argument("--ranks", type=int, default=1, help="processes [%(default)s]")
    parser.add_argument("--turns", type=int, default=3, help="[%(default)s]")
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure [that of temporary files]")
    parser.add_argument("--port", type=int, default=29541, help="port of the rendezvous [%(default)s]")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        write_checkpoint(root / "model", STEP)
        write_shards(root / "model", STEP, [Wanted(64, 20)] * 16)
        processes.spawn(run, (options.ranks, options.port, options, root), nprocs=options.ranks)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
