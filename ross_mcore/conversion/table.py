"""Entries of conversion tables: how one of our tensors is made from theirs and back; planning and converting by them.

A table (mapping.py) is a sequence of entries. In both directions all names are matched first, then tensors are read and
converted one entry at a time. A name without an entry, a missing tensor, and a shape other than the architecture's are
errors that name the tensor.
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
from ross_mcore.checked import printable
from ross_mcore.errors import ConversionError
from ross_mcore.shapes import Shapes, differences


class Tensors(Protocol):
    """Named tensors, each read when asked for: a folder of safetensors, one of our checkpoints, or a test's dict."""

    def names(self) -> Iterable[str]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> Tensor: ...


class Entry(ABC):
    """One kind of tensor. `ours` and `theirs` are patterns of names; our tensor is made from all of theirs."""

    def __init__(self, ours: str, *theirs: str) -> None:
        self.ours, self.theirs = ours, theirs

    @abstractmethod
    def their_shapes(self, ours: tuple[int, ...], language: LanguageConfig) -> list[tuple[int, ...]]:
        """Shapes of their tensors, from the shape of ours."""

    @abstractmethod
    def to_ours(self, theirs: Sequence[Tensor], language: LanguageConfig) -> Tensor: ...

    @abstractmethod
    def to_theirs(self, ours: Tensor, language: LanguageConfig) -> Sequence[Tensor]: ...


class Same(Entry):
    """The same tensor under another name."""

    def their_shapes(self, ours: tuple[int, ...], language: LanguageConfig) -> list[tuple[int, ...]]:
        return [ours]

    def to_ours(self, theirs: Sequence[Tensor], language: LanguageConfig) -> Tensor:
        return theirs[0]

    def to_theirs(self, ours: Tensor, language: LanguageConfig) -> Sequence[Tensor]:
        return [ours]


class QKV(Entry):
    """Query [heads * d, ...], key and value [groups * d, ...] <-> mcore's linear_qkv [(heads + 2 groups) * d, ...].

    mcore stores one query group after another: its queries, its key, its value (mcore attention.py,
    SelfAttention.get_query_key_value_tensors). The same for weight and bias.
    """

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


class GatedMLP(Entry):
    """gate_proj and up_proj [F, D] <-> linear_fc1 [2F, D], gate first (mcore mlp.py, apply_swiglu_sharded_factory)."""

    def their_shapes(self, ours: tuple[int, ...], language: LanguageConfig) -> list[tuple[int, ...]]:
        return [(ours[0] // 2, *ours[1:])] * 2

    def to_ours(self, theirs: Sequence[Tensor], language: LanguageConfig) -> Tensor:
        return torch.cat(list(theirs))

    def to_theirs(self, ours: Tensor, language: LanguageConfig) -> Sequence[Tensor]:
        return ours.chunk(2)


class Vocabulary(Entry):
    """[vocab_size, D] <-> [padded_vocab_size, D], padded with zeros, which `to_theirs` drops."""

    def their_shapes(self, ours: tuple[int, ...], language: LanguageConfig) -> list[tuple[int, ...]]:
        return [(language.vocab_size, *ours[1:])]

    def to_ours(self, theirs: Sequence[Tensor], language: LanguageConfig) -> Tensor:
        missing_rows = language.padded_vocab_size - language.vocab_size
        return torch.nn.functional.pad(theirs[0], (0, 0, 0, missing_rows)) if missing_rows else theirs[0]

    def to_theirs(self, ours: Tensor, language: LanguageConfig) -> Sequence[Tensor]:
        return [ours[: language.vocab_size]]


@dataclass(frozen=True)
class Ignored:
    """Tensors of the source that are not converted, and the reason."""

    name: str
    reason: str


@dataclass(frozen=True)
class Equal:
    """A tensor that must equal another one bit for bit; checked, and not converted."""

    name: str
    other: str


AnyEntry = Entry | Ignored | Equal


@dataclass(frozen=True)
class Step:
    """One of our tensors and their tensors that it is made from, by full name."""

    entry: Entry
    ours: str
    theirs: tuple[str, ...]


def match(pattern: str, name: str) -> dict[str, str] | None:
    """The values of a pattern's placeholders in `name`, None when it does not match.

    >>> match("model.layers.{layer}.{name}", "model.layers.3.mlp.weight")
    {'layer': '3', 'name': 'mlp.weight'}
    """
    expression = re.escape(pattern).replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{name\}", r"(?P<name>.+)")
    found = re.fullmatch(expression, name)
    return found.groupdict() if found else None


def _first_entry(table: Sequence[AnyEntry], name: str) -> tuple[AnyEntry, dict[str, str]]:
    """The first entry that matches their tensor `name`, and the values of its placeholders."""
    for entry in table:
        for pattern in entry.theirs if isinstance(entry, Entry) else (entry.name,):
            values = match(pattern, name)
            if values is not None:
                return entry, values
    raise ConversionError(f"tensor {printable(name)} is not known to this conversion")


def plan(table: Sequence[AnyEntry], source: Tensors, shapes: Shapes, language: LanguageConfig) -> list[Step]:
    """The steps that make our tensors `shapes` from `source`; reads only the tensors of Equal entries.

    Raises ConversionError naming the first tensor that matches no entry, that this architecture does not have, that is
    missing, or whose shape differs from the architecture's (with both shapes).
    """
    available = set(source.names())
    steps: dict[str, Step] = {}
    made: dict[str, str] = {}
    for name in sorted(available):
        entry, values = _first_entry(table, name)
        if isinstance(entry, Equal):
            if entry.other not in available or not torch.equal(source.read(name), source.read(entry.other)):
                raise ConversionError(
                    f"{name} must equal {entry.other}, because config.json has tie_word_embeddings true, and does not"
                )
        elif isinstance(entry, Entry):
            made[name] = ours = entry.ours.format(**values)
            step = Step(entry, ours, tuple(pattern.format(**values) for pattern in entry.theirs))
            if steps.setdefault(ours, step).theirs != step.theirs:
                raise ConversionError(f"{ours} would be made from {steps[ours].theirs[0]} and again from {name}")
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
            untied = " (tie_word_embeddings is false or missing in config.json)" * name.endswith("output_layer.weight")
            raise ConversionError(f"the source has nothing for {name}{untied}, shape {list(difference.expected)}")
        is_part = f"; it is a part of {made[name]}" if difference.found is None else ""
        raise ConversionError(difference.in_words("the architecture") + is_part)
    return [steps[ours] for ours in shapes]


def convert_in(steps: Iterable[Step], source: Tensors, language: LanguageConfig) -> Iterator[tuple[str, Tensor]]:
    """Our tensors, one after the other."""
    for step in steps:
        yield step.ours, step.entry.to_ours([source.read(name) for name in step.theirs], language)


def plan_out(table: Sequence[AnyEntry], names: Iterable[str]) -> list[Step]:
    """The steps that make their tensors from ours. Raises ConversionError naming a tensor that matches no entry."""
    entries = [entry for entry in table if isinstance(entry, Entry)]
    steps = []
    for name in names:
        found = next(((entry, values) for entry in entries if (values := match(entry.ours, name)) is not None), None)
        if found is None:
            raise ConversionError(f"tensor {printable(name)} is not known to this conversion")
        entry, values = found
        steps.append(Step(entry, name, tuple(pattern.format(**values) for pattern in entry.theirs)))
    return steps


def convert_out(
    table: Sequence[AnyEntry], source: Tensors, language: LanguageConfig, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Their tensors made from all of ours, one entry after the other, in `dtype` (None: unchanged).

    Raises ConversionError naming a tensor that matches no entry, or one with a value too large for float16.
    """
    yield from convert_steps(plan_out(table, source.names()), source, language, dtype)


def convert_steps(
    steps: Iterable[Step], source: Tensors, language: LanguageConfig, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """`convert_out` with the steps of `plan_out`."""
    for step in steps:
        for name, tensor in zip(step.theirs, step.entry.to_theirs(source.read(step.ours), language)):
            converted = tensor if dtype is None else tensor.to(dtype)
            if dtype == torch.float16 and tensor.isfinite().all() and not converted.isfinite().all():
                raise ConversionError(f"{name} has {tensor.abs().max():.3g}, too large for float16; take bfloat16")
            yield name, converted.contiguous()
