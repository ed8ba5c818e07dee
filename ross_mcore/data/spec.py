"""SampleSpec: the options that a sample's tokens, labels and pixels depend on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ross_mcore import checked
from ross_mcore.data.conversation import SampleBounds

UNCUT = 2**31 - 1


@dataclass(frozen=True)
class SampleSpec:
    """How samples are read: fields of options.py:DataOptions with the same names, defaults filled in.

    Built by training/start.py, saved in train_state.json, compared whole when a run resumes. `template` is "" if texts
    are not tokenized, else a name (data/templates.py:with_template); `own_templates` has the content of those that come
    from a YAML file. `seq_length` is UNCUT if rows are not cut.
    """

    template: str = ""
    image_aspect_ratio: str = "square"
    seq_length: int = UNCUT
    mm_use_im_start_end: bool = False
    max_images_per_sample: int | None = 64
    max_tokens_per_sample: int | None = None
    supervise_final_eos: bool = True
    truncated_images: str = "refuse"
    own_templates: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_state(cls, saved: Mapping[str, Any]) -> SampleSpec:
        """The spec in a train_state.json; a key that is missing has its default. Raises ValueError for another type."""
        names = {item.name for item in fields(cls)}
        return checked.build(cls, {name: value for name, value in saved.items() if name in names}, "it")

    @property
    def bounds(self) -> SampleBounds:
        """Limits above which a sample is skipped."""
        return SampleBounds(self.max_images_per_sample, self.max_tokens_per_sample)

    @property
    def measured(self) -> SampleSpec:
        """The spec for the lengths in an index, which depend on template and image markers. Rows are not cut."""
        return SampleSpec(self.template, mm_use_im_start_end=self.mm_use_im_start_end, own_templates=self.own_templates)


def merged(specs: Sequence[SampleSpec]) -> SampleSpec:
    """One spec for all data sets of a run; different templates or aspect ratios are joined with commas."""
    return replace(
        specs[0],
        template=_one_or_all([spec.template for spec in specs]),
        image_aspect_ratio=_one_or_all([spec.image_aspect_ratio for spec in specs]),
        own_templates={name: text for spec in specs for name, text in spec.own_templates.items()},
    )


def _one_or_all(values: Sequence[str]) -> str:
    return values[0] if len(set(values)) == 1 else ", ".join(values)
