"""The few ways in which a tensor of ours differs from the same tensor elsewhere; the application of a table of them.

A table (mapping.py) is a sequence of entries. Both directions are lazy: first every name is matched, then tensors are
read and made one family at a time. A name that no entry takes, on either side, a tensor that is missing, and a shape
that is not the architecture's are errors that name it.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ross_mcore.architecture import LanguageConfig
from ross_mcore.errors import ConversionError
from ross_mcore.shapes import Shapes, differences


class Tensors(Protocol):
    """Named tensors that are read when asked for: a folder of safetensors, one of our checkpoints, or a test's dict."""

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class Entry(ABC):
    """One family of tensors. `ours` and `theirs` are name patterns; our tensor is made of all of theirs."""

    ours: str

    @property
    @abstractmethod
    def theirs(self) -> tuple[str, ...]: ...

    @abstractmethod
    def their_shapes(self, ours: tuple[int, ...], language: LanguageConfig) -> list[tuple[int, ...]]:
        """Shapes of their tensors, given that of ours."""

    @abstractmethod
    def to_ours(self, theirs: Sequence[Tensor], language: LanguageConfig) -> Tensor: ...

    @abstractmethod
    def to_theirs(self, ours: Tensor, language: LanguageConfig) -> Sequence[Tensor]: ...


@dataclass(frozen=True)
class Same(Entry):
    """The same tensor under another name."""

    name: str

    @property
    def theirs(self) -> tuple[str, ...]:
        return (self.name,)

    def their_shapes(self, ours: tuple[int, ...], language: LanguageConfig) -> list[tuple[int, ...]]:
        return [ours]

    def to_ours(self, theirs: Sequence[Tensor], language: LanguageConfig) -> Tensor:
        return theirs[0]

    def to_theirs(self, ours: Tensor, language: LanguageConfig) -> Sequence[Tensor]:
        return [ours]


@dataclass(frozen=True)
class QKV(Entry):
    """Query [heads * d, ...], key and value [groups * d, ...] <-> mcore's linear_qkv [(heads + 2 groups) * d, ...].

    mcore lays out one query group after another: its queries, its key, its value (mcore attention.py,
    SelfAttention.get_query_key_value_tensors). Weight and bias alike.
    """

    query: str
    key: str
    value: str

    @property
    def theirs(self) -> tuple[str, ...]:
        return (self.query, self.key, self.value)

    def their_shapes(self, ours: tuple[int, ...], language: LanguageConfig) -> list[tuple[int, ...]]:
        query = language.num_attention_heads * language.head_dim
        key = language.num_key_value_heads * language.head_dim
        return [(rows, *ours[1:]) for rows in (query, key, key)]

    def to_ours(self, theirs: Sequence[Tensor], language: LanguageConfig) -> Tensor:
        groups = [part.unflatten(0, (language.num_key_value_heads, -1)) for part in theirs]
        return torch.cat(groups, dim=1).flatten(0, 1)

    def to_theirs(self, ours: Tensor, language: LanguageConfig) -> Sequence[Tensor]:
        queries = language.num_attention_heads // language.num_key_value_heads * language.head_dim
        groups = ours.unflatten(0, (language.num_key_value_heads, -1))
        parts = groups.split([queries, language.head_dim, language.head_dim], dim=1)
        return [part.flatten(0, 1) for part in parts]


@dataclass(frozen=True)
class GatedMLP(Entry):
    """gate_proj and up_proj [F, D] <-> linear_fc1 [2F, D], gate first (mcore mlp.py, apply_swiglu_sharded_factory)."""

    gate: str
    up: str

    @property
    def theirs(self) -> tuple[str, ...]:
        return (self.gate, self.up)

    def their_shapes(self, ours: tuple[int, ...], language: LanguageConfig) -> list[tuple[int, ...]]:
        return [(ours[0] // 2, *ours[1:])] * 2

    def to_ours(self, theirs: Sequence[Tensor], language: LanguageConfig) -> Tensor:
        return torch.cat(list(theirs))

    def to_theirs(self, ours: Tensor, language: LanguageConfig) -> Sequence[Tensor]:
        return ours.chunk(2)


@dataclass(frozen=True)
class Vocabulary(Entry):
    """[vocab_size, D] <-> [padded_vocab_size, D], padded with zeros that the way out drops again."""

    name: str

    @property
    def theirs(self) -> tuple[str, ...]:
        return (self.name,)

    def their_shapes(self, ours: tuple[int, ...], language: LanguageConfig) -> list[tuple[int, ...]]:
        return [(language.vocab_size, *ours[1:])]

    def to_ours(self, theirs: Sequence[Tensor], language: LanguageConfig) -> Tensor:
        missing_rows = language.padded_vocab_size - language.vocab_size
        return torch.nn.functional.pad(theirs[0], (0, 0, 0, missing_rows)) if missing_rows else theirs[0]

    def to_theirs(self, ours: Tensor, language: LanguageConfig) -> Sequence[Tensor]:
        return [ours[: language.vocab_size]]


@dataclass(frozen=True)
class Ignored:
    """Tensors of the source that we leave behind, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Equal:
    """A tensor that repeats another one; left behind after a check that it does, bit for bit."""

    name: str
    other: str


AnyEntry = Entry | Ignored | Equal


@dataclass(frozen=True)
class Step:
    """One of our tensors and the tensors of theirs that it is made of, with names filled in."""

    entry: Entry
    ours: str
    theirs: tuple[str, ...]


def match(pattern: str, name: str) -> dict[str, str] | None:
    """The values of a pattern's places in `name`, None when it does not match.

    >>> match("model.layers.{layer}.{name}", "model.layers.3.mlp.weight")
    {'layer': '3', 'name': 'mlp.weight'}
    """
    expression = re.escape(pattern).replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{name\}", r"(?P<name>.+)")
    found = re.fullmatch(expression, name)
    return found.groupdict() if found else None


def _first_entry(table: Sequence[AnyEntry], name: str) -> tuple[AnyEntry, dict[str, str]]:
    """The entry that takes their tensor `name`, and the values of its pattern's places."""
    for entry in table:
        for pattern in entry.theirs if isinstance(entry, Entry) else (entry.name,):
            values = match(pattern, name)
            if values is not None:
                return entry, values
    raise ConversionError(f"tensor {name} is not known to this conversion")


def plan(table: Sequence[AnyEntry], source: Tensors, shapes: Shapes, language: LanguageConfig) -> list[Step]:
    """How to make every tensor of `shapes` (ours) from `source`; reads no tensor but those of Equal entries.

    Raises ConversionError naming the first tensor that no entry takes, that this architecture has no place for, that is
    missing, or whose shape differs from the architecture's (with both shapes).
    """
    available = set(source.names())
    steps: dict[str, Step] = {}
    made: dict[str, str] = {}
    for name in sorted(available):
        entry, values = _first_entry(table, name)
        if isinstance(entry, Equal):
            if entry.other not in available or not torch.equal(source.read(name), source.read(entry.other)):
                raise ConversionError(f"{name} must equal {entry.other} in a model with tied embeddings, and does not")
        elif isinstance(entry, Entry):
            made[name] = ours = entry.ours.format(**values)
            step = Step(entry, ours, tuple(pattern.format(**values) for pattern in entry.theirs))
            if steps.setdefault(ours, step).theirs != step.theirs:
                raise ConversionError(f"{ours} would be made of {steps[ours].theirs[0]} and again of {name}")
    expected: Shapes = {}
    for ours, shape in shapes.items():
        if ours in steps:
            expected |= zip(steps[ours].theirs, steps[ours].entry.their_shapes(shape, language), strict=True)
            made |= dict.fromkeys(steps[ours].theirs, ours)
        else:
            expected[ours] = shape
    for difference in differences(expected, {name: tuple(source.shape(name)) for name in made if name in available}):
        name = difference.name
        if difference.expected is None:
            raise ConversionError(f"tensor {name} has no place in this architecture (it would be {made[name]})")
        if name not in made:
            raise ConversionError(f"the source has nothing for {name}, shape {list(difference.expected)}")
        is_part = f"; it is a part of {made[name]}" if difference.found is None else ""
        raise ConversionError(difference.in_words("the architecture") + is_part)
    return [steps[ours] for ours in shapes]


def convert_in(steps: Iterable[Step], source: Tensors, language: LanguageConfig) -> Iterator[tuple[str, Tensor]]:
    """Our tensors, one after the other."""
    for step in steps:
        yield step.ours, step.entry.to_ours([source.read(name) for name in step.theirs], language)


def plan_out(table: Sequence[AnyEntry], names: Iterable[str]) -> list[Step]:
    """How to make their tensors from ours; reads nothing. Raises ConversionError naming one that no entry takes."""
    entries = [entry for entry in table if isinstance(entry, Entry)]
    steps = []
    for name in names:
        found = next(((entry, values) for entry in entries if (values := match(entry.ours, name)) is not None), None)
        if found is None:
            raise ConversionError(f"tensor {name} is not known to this conversion")
        entry, values = found
        steps.append(Step(entry, name, tuple(pattern.format(**values) for pattern in entry.theirs)))
    return steps


def convert_out(
    table: Sequence[AnyEntry], source: Tensors, language: LanguageConfig, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Their tensors made from all of ours, one family after the other, in `dtype` (None: as they are).

    Raises ConversionError naming a tensor of ours that no entry takes, or a value that float16 is too small for.
    """
    yield from convert_steps(plan_out(table, source.names()), source, language, dtype)


def convert_steps(
    steps: Iterable[Step], source: Tensors, language: LanguageConfig, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """`convert_out` of what `plan_out` has planned."""
    for step in steps:
        for name, tensor in zip(step.theirs, step.entry.to_theirs(source.read(step.ours), language)):
            converted = tensor if dtype is None else tensor.to(dtype)
            if dtype == torch.float16 and tensor.isfinite().all() and not converted.isfinite().all():
                raise ConversionError(f"{name} has {tensor.abs().max():.3g}, too large for float16; take bfloat16")
            yield name, converted.contiguous()
