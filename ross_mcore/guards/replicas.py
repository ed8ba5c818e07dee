"""Checks that copies of a weight are the same on all ranks, and that frozen weights do not change.

Ranks of a tensor-parallel group have copies of the norms, projector, vision tower, denoiser and VAE; ranks of a
data-parallel group have copies of all weights; the first and the last stage both have a tied embedding. Training itself
never compares copies, so a wrong bit would stay. Here every rank computes fingerprints in one pass over its memory, and
each group compares them in an all-reduce of two numbers.
"""

from __future__ import annotations

import functools
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.distributed import ProcessGroup

from ross_mcore.engine.engine import Engine
from ross_mcore.engine.optimizer import updates_weights
from ross_mcore.engine.progress import at
from ross_mcore.engine.run import Run, StepResult
from ross_mcore.engine.state import TrainState
from ross_mcore.errors import TrainingError
from ross_mcore.guards.guard import Guard
from ross_mcore.guards.incidents import Incident
from ross_mcore.parallel.collectives import agree, gather, sum_over_ranks
from ross_mcore.parallel.groups import Groups
from ross_mcore.parts import LANGUAGE_MODEL, label_of, trains

WORDS_AT_ONCE = 1 << 18
_BETWEEN_PIECES = 0x1E3779B97F4A7C15
"""Odd, so that multiplication by it is invertible in 64 bits."""


@functools.cache
def _factors(device: torch.device) -> Tensor:
    """Odd random numbers [WORDS_AT_ONCE], the same on every rank."""
    drawn = torch.randint(-(2**63), 2**63 - 1, (WORDS_AT_ONCE,), generator=torch.Generator().manual_seed(0))
    return drawn.to(device) | 1


def fingerprint(tensor: Tensor) -> Tensor:
    """int64 [] of the bits of a tensor of any shape and type: the sum of its words, each times a factor of its place.

    Integer arithmetic wraps, so signs of zero, NaNs and the order of elements count, and the order of summation does
    not. Words have at most 32 bits and factors are odd: tensors of one shape that differ in a single word always have
    different fingerprints; other different tensors have equal ones with a probability of about 2^-32. Tensors of
    Transformer Engine's FP8 types are compared by value.
    """
    if is_float8tensor(tensor):
        tensor = tensor.dequantize()
    words = tensor.detach().reshape(-1).view({1: torch.uint8, 2: torch.int16}.get(tensor.element_size(), torch.int32))
    factors = _factors(words.device)
    products = torch.empty(min(len(words), WORDS_AT_ONCE), dtype=torch.int64, device=words.device)
    total = torch.zeros((), dtype=torch.int64, device=words.device)
    for piece in words.split(WORDS_AT_ONCE):
        size = len(piece)
        total.mul_(_BETWEEN_PIECES).add_(torch.mul(piece, factors[:size], out=products[:size]).sum())
    return total


@dataclass(frozen=True)
class Held:
    """A tensor of this rank, equal on all ranks that hold one of this name.

    sharded: the other ranks of the tensor-parallel group hold other parts of the weight.
    """

    name: str
    tensor: Tensor
    sharded: bool
    frozen: bool = False


def held_by(engine: Engine) -> list[Held]:
    """This rank's weights and buffers in the order of the model, then the moments that every data-parallel rank has.

    The distributed optimizer's moments and masters have no copies. Gather the weights before the call.
    """
    found, config = [], engine.config
    for name, parameter in engine.model.named_weights():
        # by the options, so that a weight which trains by mistake is found; and weights that a trained tower never uses
        frozen = not trains(name, config.llm_trains, config.vision_trains) or not parameter.requires_grad
        sharded = getattr(parameter, "tensor_model_parallel", False)
        found.append(Held(f"{name}{_part_of(engine.groups)}" if sharded else name, parameter, sharded, frozen))
    # mcore's plain optimizer for bf16 updates masters, which it stores as an attribute of the weights
    weights = {getattr(held.tensor, "main_param", held.tensor): held for held in found}
    for part in engine.model.parts:
        found += [Held(name, buffer, sharded=False, frozen=True) for name, buffer in part.named_buffers()]
    for optimizer in engine.optimizer.chained_optimizers:
        if getattr(optimizer, "is_stub_optimizer", False) or isinstance(optimizer, DistributedOptimizer):
            continue
        for parameter, state in optimizer.optimizer.state.items():
            weight = weights[parameter]
            if parameter is not weight.tensor:
                found.append(Held(f"optimizer.state.param.{weight.name}", parameter, weight.sharded))
            for name in (name for name, value in state.items() if isinstance(value, Tensor)):
                found.append(Held(f"optimizer.state.{name}.{weight.name}", state[name], weight.sharded))
    return found


def _part_of(groups: Groups) -> str:
    size = groups.layout.tensor_parallel
    return f" (part {groups.tensor_rank + 1} of {size})" if size > 1 else ""


def fingerprints(held: Sequence[Held]) -> dict[str, int]:
    """Fingerprints by name, with one synchronisation of the device."""
    found = torch.stack([fingerprint(one.tensor) for one in held]).tolist() if held else []
    return {one.name: value for one, value in zip(held, found, strict=True)}


def steps_taken(optimizer: MegatronOptimizer) -> dict[str, int]:
    """The step count of Adam's bias correction in every parameter group."""
    groups = [] if getattr(optimizer, "is_stub_optimizer", False) else optimizer.param_groups
    return {f"the optimizer's step in parameter group {n}": int(g.get("step") or 0) for n, g in enumerate(groups)}


def different(copies: Mapping[str, int], group: ProcessGroup, device: torch.device) -> list[str]:
    """The names whose values differ between the ranks of a group. Collective in the group."""
    digest = hashlib.sha256(repr(list(copies.items())).encode()).digest()
    if agree(int.from_bytes(digest[:8], "big", signed=True), group, device):
        return []
    everyone = gather(copies, group)
    names = dict.fromkeys(name for theirs in everyone for name in theirs)
    return [name for name in names if len({theirs.get(name) for theirs in everyone}) > 1]


def deviating(values: Mapping[int, int]) -> list[int]:
    """The ranks whose value differs from that of the majority; [] when there is no majority."""
    ((most, count),) = Counter(values.values()).most_common(1)
    return [rank for rank, value in values.items() if value != most] if 2 * count > len(values) else []


class ReplicaCheck(Guard):
    """Compares copies at start (--self-check) and every --check-replicas-interval iterations.

    Trained weights need not change: with a rate of 0, or behind gates initialized to zero, the first step keeps them.
    """

    def __init__(self, run: Run, say: Callable[[str], None]) -> None:
        super().__init__(run, say)
        self._self_check = run.config.training.self_check
        self._interval = run.config.training.check_replicas_interval
        self._frozen: dict[str, int] = {}
        self._good_after: int | None = None

    def at_start(self, state: TrainState) -> None:
        """Compares copies, and stores the fingerprints of frozen weights."""
        if self._self_check or self._interval:
            before = f"self-check before iteration {state.iteration + 1}"
            self._check(state.iteration, before if self._self_check else "")

    def after_step(self, result: StepResult, incidents: Sequence[Incident]) -> None:
        """Compares copies when a check is due, and after the first step applied at a rate other than 0."""
        iteration = result.state.iteration
        is_first = self._self_check and result.applied
        is_first = is_first and updates_weights(iteration - 1, self.run.train_iters, self.run.config.optimizer)
        self._self_check = self._self_check and not is_first
        is_due = self._interval is not None and self.run.is_due(iteration, self._interval)
        if is_first or is_due:
            self._check(iteration, f"self-check after iteration {iteration}" if is_first else "")

    def _check(self, iteration: int, line: str) -> None:
        """line: start of the line printed when the check passes; "" prints none. Raises TrainingError."""
        at("comparing replicas")
        engine = self.run.engine
        began, groups, device = time.perf_counter(), engine.groups, engine.device
        engine.model.gather_weights()
        held = held_by(engine)
        own = fingerprints(held)
        frozen = {one.name: own[one.name] for one in held if one.frozen}
        self._frozen = self._frozen or frozen
        changed = [name for name, before in self._frozen.items() if frozen.get(name) != before]

        own |= steps_taken(engine.optimizer)
        sharded = {one.name for one in held if one.sharded}
        whole, tied = {name: value for name, value in own.items() if name not in sharded}, self._tied(held, own)
        differing: dict[str, str] = {}
        for kind, group, copies in (
            ("tensor-parallel", groups.tensor, whole),
            ("data-parallel", groups.data, own),
            ("embedding", groups.embedding, tied),
        ):
            if group is not None and copies:
                differing |= dict.fromkeys(different(copies, group, device), kind)
        problems, tensors = sum_over_ranks([len(changed) + len(differing), len(held)], device)
        if problems:
            raise TrainingError(self._problem(iteration, changed, differing, own | tied))
        self._good_after = iteration
        if line:
            ranks, seconds = dist.get_world_size(), time.perf_counter() - began
            where = f"{tensors:.0f} tensors on {ranks} {'rank' if ranks == 1 else 'ranks'}"
            self.say(f"{line}: {where}, copies equal and frozen ones unchanged, {seconds:.2f} s")

    def _tied(self, held: Sequence[Held], own: Mapping[str, int]) -> dict[str, int]:
        """The fingerprint of a tied embedding, on the two stages that hold it."""
        groups, model = self.run.groups, self.run.engine.model
        if groups.embedding is None or not model.first.share_embeddings_and_output_weights:
            return {}
        weight = (model.first if groups.stage.is_first else model.last).shared_embedding_or_output_weight()
        (name,) = (one.name for one in held if one.tensor is weight)
        return {f"{LANGUAGE_MODEL.weight('embedding')}, tied to the output layer{_part_of(groups)}": own[name]}

    def _problem(self, iteration: int, changed: list[str], differing: dict[str, str], found: dict[str, int]) -> str:
        """The error message; it names the first tensor that any rank found. Collective."""
        everyone = gather((changed, differing))
        changed = [name for theirs, _ in everyone for name in theirs]
        kinds: dict[str, str] = {}
        for _, theirs in everyone:
            kinds = {**theirs, **kinds}
        name = changed[0] if changed else next(iter(kinds))
        values = {rank: value for rank, value in enumerate(gather(found.get(name))) if value is not None}
        if changed:
            ranks = [rank for rank, (theirs, _) in enumerate(everyone) if name in theirs]
            what = f"is frozen and was changed since the start, on {_named(ranks)} of the {len(values)} that hold it"
        else:
            what = f"is not the same on all ranks of its {kinds[name]} group: {_deviation(values)}"
        others = len({*changed, *kinds}) - 1
        more = f" ({others} other tensors too)" if others else ""
        return f"iteration {iteration}: {name}, in the {label_of(name)}, {what}{more}. {self._remedy()}"

    def _remedy(self) -> str:
        cause = "a fault of memory or communication (look for ECC and link errors on the machines of these ranks)"
        if self._good_after is None:  # the check at the start
            return (
                f"All ranks loaded the same weights of {self.run.start.path}, so this is {cause} or of the file "
                "system. Start again; if it happens again, run tools/check_checkpoint.py on that checkpoint"
            )
        return (
            f"This is {cause}, or a bug. Nothing is saved from here on. Checkpoints up to iteration {self._good_after} "
            f"are from before it: remove later ones under {self.run.save_folder} and start again"
        )


def _named(ranks: Sequence[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"


def _deviation(values: Mapping[int, int]) -> str:
    odd = deviating(values)
    if not odd:
        return f"{_named(list(values))} do not agree, and it is unknown which is right"
    return f"{_named(odd)} deviates from {_named([rank for rank in values if rank not in odd])}"
