"""SampleSpec: what the tokens, labels and pixels of a sample depend on, beside its record, tokenizer and tower."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ross_mcore import checked
from ross_mcore.data.conversation import SampleBounds

UNCUT = 2**31 - 1


@dataclass(frozen=True)
class SampleSpec:
    """How samples are read: options of options.py:DataOptions under the same names, with their defaults filled in.

    training/start.py builds it from the options. It is saved in train_state.json and compared whole when a run is
    resumed. `template` is "" where texts are not tokenized; `seq_length` is UNCUT where rows are not cut.
    """

    template: str = ""
    image_aspect_ratio: str = "square"
    seq_length: int = UNCUT
    mm_use_im_start_end: bool = False
    max_images_per_sample: int | None = 64
    max_tokens_per_sample: int | None = None
    supervise_final_eos: bool = True

    @classmethod
    def from_state(cls, saved: Mapping[str, Any]) -> SampleSpec:
        """The spec in a train_state.json; a key that is missing has its default. Raises ValueError for another type."""
        names = {field.name for field in fields(cls)}
        return checked.build(cls, {name: value for name, value in saved.items() if name in names}, "it")

    @property
    def bounds(self) -> SampleBounds:
        """A sample over these is skipped."""
        return SampleBounds(self.max_images_per_sample, self.max_tokens_per_sample)

    @property
    def measured(self) -> SampleSpec:
        """What the lengths in an index depend on: the template and the image markers. Rows are not cut."""
        return SampleSpec(self.template, mm_use_im_start_end=self.mm_use_im_start_end)


def merged(specs: Sequence[SampleSpec]) -> SampleSpec:
    """One value for the data sets of a run: different templates or aspect ratios stand in it with commas between."""
    return replace(
        specs[0],
        template=_one_or_all([spec.template for spec in specs]),
        image_aspect_ratio=_one_or_all([spec.image_aspect_ratio for spec in specs]),
    )


def _one_or_all(values: Sequence[str]) -> str:
    return values[0] if len(set(values)) == 1 else ", ".join(values)
