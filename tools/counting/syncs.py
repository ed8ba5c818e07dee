"""Places of a training step where the host waits for the device: values read back, copies from pageable memory.

There is no device here. Tensors that a GPU would hold are known by their storage: the model's and the optimizer's, what
`platform.upload` returns, what is made with a `device=` argument, and the results of operations on any of these.
"""

from __future__ import annotations

import os
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from counting import Row
from counting.ranks import on_ranks
from ross_mcore import platform
from ross_mcore.engine.engine import Engine

READS = {
    *("_local_scalar_dense", "is_nonzero", "equal", "allclose"),
    *("nonzero", "argwhere", "masked_select", "bincount", "histc"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive"),
}
"""Operations whose result is a number on the host, or has a shape that the host must read."""
MASKS = (torch.bool, torch.uint8)
MASKABLE = {"index", "index_put", "index_put_", "_index_put_impl_"}
FROM_HOST = {"tensor", "as_tensor", "asarray", "from_numpy", "new_tensor", "scalar_tensor"}
"""Functions that copy a value of Python to their device."""

STAND_INS = ("te/attention.py", "te/extension.py", "te/kernels.py")
"""Files of the tests whose functions stand in for kernels."""

Place = tuple[str, str]
"""What waits, and the line of this package, of mcore or of Transformer Engine where it does."""


class SyncCount(TorchDispatchMode):
    """`found` counts the waits of the thread in which this mode is active; `mark` names tensors that a GPU would hold.

    A host tensor of one dimension or more in an operation on the device's tensors is counted too: torch copies it (an
    index) or raises.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[Place] = Counter()
        self.uploads = 0
        self._held: dict[int, StorageWeakRef] = {}  # a weak reference keeps its address from being used again
        self._to_device = False  # the call of torch that runs has a device= argument
        self._near_device = True  # or tensors of the device, or is a backward pass
        self._functions = _Functions(self)

    def mark(self, value: Any) -> None:
        """Every tensor in a structure is the device's from here on."""
        for tensor in tree_leaves(value):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._held:
                    self._held[storage._cdata] = StorageWeakRef(storage)

    def holds(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._held

    def count(self, kind: str) -> None:
        place = _caller()
        if place not in STAND_INS:
            self.found[kind, place] += 1

    @contextmanager
    def counting(self) -> Iterator[SyncCount]:
        """Counts in this thread; also waits that are no operations: `synchronize`, collectives of Python objects."""
        upload, to_tensor = platform.upload, dist.distributed_c10d._object_to_tensor

        def start_copy(tensor: Tensor, device: torch.device) -> Tensor:
            copied = upload(tensor, device).clone()
            self.uploads += 1
            self.mark(copied)
            return copied

        def pickled(*arguments: Any) -> Any:
            self.count("objects through a collective")
            return to_tensor(*arguments)

        def wait(*_: Any) -> None:
            self.count("synchronize")

        finish = dist.Work.wait

        def finished(*arguments: Any) -> Any:
            with torch.utils._python_dispatch._disable_current_modes():  # gloo copies here what NCCL writes itself
                return finish(*arguments)

        with ExitStack() as stack:
            for owner, name, instead in (
                (platform, "upload", start_copy),
                (platform, "synchronize", wait),
                (torch.cpu, "synchronize", wait),  # of mcore: megatron_hook puts it in the place of torch.cuda's
                (dist.Work, "wait", finished),
                (dist.distributed_c10d, "_object_to_tensor", pickled),
            ):
                stack.enter_context(mock.patch.object(owner, name, instead))
            stack.enter_context(self)
            stack.enter_context(self._functions)
            yield self

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        namespace, _, name = function._schema.name.partition("::")
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        here = [tensor for tensor in given if self.holds(tensor)]
        if here and namespace != "c10d":
            self._look(name, args, kwargs, given)
        result = function(*args, **kwargs)
        if here or self._to_device or (not given and self._near_device):
            self.mark(given if namespace == "c10d" else result)
        return result

    def _look(self, name: str, args: Any, kwargs: Any, given: list[Tensor]) -> None:
        if name in READS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.count(f"{name} reads")
        elif name in MASKABLE and any(index is not None and index.dtype in MASKS for index in args[1]):
            if name == "index" or args[2].numel() != 1 or (len(args) > 3 and args[3]):  # else torch fills by the mask
                self.count("a mask as an index")
        elif name == "copy_" and self.holds(args[0]) != self.holds(args[1]):
            self.count("copy to the device" if self.holds(args[0]) else "copy to the host")
        elif name != "copy_" and any(tensor.dim() and not self.holds(tensor) for tensor in given):
            self.count(f"a tensor of the host in {name}")


class _Functions(TorchFunctionMode):
    """What torch's dispatcher does not see where host and device are one: `tolist`, copies, `device=` arguments."""

    def __init__(self, count: SyncCount) -> None:
        super().__init__()
        self.sync = count

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, sync = kwargs or {}, self.sync
        name = getattr(function, "__name__", "")
        own = args[0] if args and isinstance(args[0], Tensor) else None
        if own is not None and name in ("tolist", "numpy", "__array__", "cpu", "to", "cuda"):
            return self._moved(function, name, own, args, kwargs)
        device = kwargs.get("device")
        on_device = device is not None and not (device == "cpu" and _is_own(_caller()))
        if name in FROM_HOST and own is None:  # torch reads tensors in a list one by one, past its dispatcher
            for value in tree_leaves(args):
                if isinstance(value, Tensor) and sync.holds(value):
                    sync.count("a list of tensors reads")
        if name in FROM_HOST and (on_device or (name == "new_tensor" and own is not None and sync.holds(own))):
            sync.count("copy to the device")
            result = function(*args, **kwargs)
            sync.mark(result)
            return result
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        before = sync._to_device, sync._near_device
        sync._to_device, sync._near_device = sync._to_device or on_device, any(map(sync.holds, given))
        try:
            return function(*args, **kwargs)
        finally:
            sync._to_device, sync._near_device = before

    def _moved(self, function: Any, name: str, own: Tensor, args: Any, kwargs: Any) -> Any:
        """Of a tensor's method that moves it. mcore's and Transformer Engine's "cuda" is "cpu" here."""
        sync, held = self.sync, self.sync.holds(own)
        if name in ("tolist", "numpy", "__array__"):
            if held:
                sync.count(f"{name} reads")
            with torch.utils._python_dispatch._disable_current_modes():
                return function(*args, **kwargs)
        targets = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, (str, torch.device))]
        if name == "to" and not targets:
            return function(*args, **kwargs)
        to_host = _is_own(_caller()) and (name == "cpu" or "cpu" in targets)
        result = function(*args, **kwargs)
        if held == (not to_host):
            return result
        sync.count("copy to the host" if held else "copy to the device")
        result = result.clone()
        storage = result.untyped_storage()._cdata
        if held:
            sync._held.pop(storage, None)
        else:
            sync.mark(result)
        return result


def _caller() -> str:
    """The innermost line of this package, of mcore or of Transformer Engine on the stack; else of any file."""
    for frame in reversed(traceback.extract_stack()):
        parts = Path(frame.filename).parts
        if "/".join(parts[-2:]) in STAND_INS:
            return "/".join(parts[-2:])
        for package in ("ross_mcore", "megatron", "transformer_engine"):
            if package in parts[:-1]:
                return f"{'/'.join(parts[parts.index(package) :])}:{frame.lineno}"
    return ""


def _is_own(place: str) -> bool:
    return not place.startswith(("megatron", "transformer_engine"))


def mark_engine(sync: SyncCount, engine: Engine) -> None:
    """Marks what the device holds between steps: weights, gradients, tables, the optimizer's state."""
    for module in engine.model.modules():
        sync.mark(vars(module))
    for chunk in engine.model:
        for buffer in chunk.buffers:
            sync.mark([vars(buffer), [vars(bucket) for bucket in buffer.buckets]])
        if hasattr(chunk.module, "schedule"):
            sync.mark(chunk.module.schedule._values)
    for parameter in engine.model.parameters():
        sync.mark([getattr(parameter, "main_grad", None), getattr(parameter, "main_param", None)])
    for part in getattr(engine.optimizer, "chained_optimizers", [engine.optimizer]):
        sync.mark(vars(part))
        if getattr(part, "optimizer", None) is not None:
            sync.mark([list(part.optimizer.state.values()), [group["params"] for group in part.optimizer.param_groups]])


@dataclass(frozen=True)
class Syncs:
    """A step of one rank. schedule: waits in forward and backward of all its micro-batches; step: all; uploads: copies
    that do not wait; micro_batches: of the rank."""

    schedule: Counter[Place]
    step: Counter[Place]
    uploads: int
    micro_batches: int


def count_step(run: Any, steps_done: int) -> Syncs:
    """Trains on the run's next step."""
    engine, sync = run.engine, SyncCount()
    mark_engine(sync, engine)
    schedule: Counter[Place] = Counter()
    plain = Engine._schedule

    def watched(*args: Any, **kwargs: Any) -> Any:
        before = sync.found.copy()
        found = plain(*args, **kwargs)
        schedule.update(sync.found - before)
        return found

    with mock.patch.object(Engine, "_schedule", watched), sync.counting():
        step = engine.read(run.loader)
        engine.train(step, steps_done)
    return Syncs(schedule, sync.found, sync.uploads, step.size.micro_batches)


PACKED = {"pack": True, "seq_length": 256, "global_batch_size": 4, "micro_batch_size": 1}
ROWS = {"pack": False, "seq_length": 256, "global_batch_size": 8, "micro_batch_size": 2}
FOUR = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "sequence_parallel": True}
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "stage 2, packed": (1, PACKED),
    "stage 1, a sample a row": (1, {**ROWS, "training_stage": "pretrain"}),
    "stage 2, packed, TP2 x PP2": (4, {**PACKED, **FOUR}),
    "stage 1, packed, TP2 x PP2": (4, {**PACKED, **FOUR, "training_stage": "pretrain"}),
    "stage 2, a sample a row, TP2 x PP2": (4, {**ROWS, **FOUR, "use_distributed_optimizer": True}),
}
"""Name -> ranks and flags."""


def count_cases(base: Path, shards: Path, save: Path, names: Iterable[str], **flags: Any) -> dict[str, Syncs]:
    """The second step of each case, on this one of several ranks; a case of fewer ranks leaves the last out."""
    from counting.model import opened

    world, rank, found = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]), {}
    for name in names:
        ranks, own = CASES[name]
        if rank >= ranks:
            continue
        os.environ["WORLD_SIZE"] = str(ranks)
        with opened(base, shards, save / name, **own, **flags) as run:
            run.engine.train(run.engine.read(run.loader), 0)
            found[name] = count_step(run, 1)
        os.environ["WORLD_SIZE"] = str(world)
    return found


def rows() -> list[Row]:
    from counting.model import write_small

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, shards = write_small(folder)
        ranks = on_ranks(count_cases, 4, base, shards, folder / "runs", list(CASES))
    found = []
    for case in CASES:
        counts = [rank[case] for rank in ranks if case in rank]
        schedule, step = (max(getattr(c, kind).total() for c in counts) for kind in ("schedule", "step"))
        found.append(Row(f"waits in forward and backward, {case}", str(schedule), "0", "of the rank with most"))
        found.append(Row(f"waits in the whole step, {case}", str(step), "<= 6", "losses, norm, finite, agreement"))
    return found
