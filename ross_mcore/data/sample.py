"""From a record in a shard to a `Sample`: tokens, labels, image spans, pixels.

Bad data raises nothing here: bad text makes an empty row that says so (`Sample.is_bad`), a bad picture a blank one and
a reason. The loader replaces such samples once all ranks know of them, because only the rank that decodes a picture
sees that it is bad. A good sample that the options leave nothing of is an empty row too, and stays one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ross_mcore.architecture import ModelConfig
from ross_mcore.batch import Sample
from ross_mcore.data.conversation import cut_row, expand_images, require_pictures
from ross_mcore.data.image import ImagePreprocessing, decode_image
from ross_mcore.data.lengths import length_source, stale_lengths
from ross_mcore.data.precomputed import PrecomputedParts
from ross_mcore.data.replacement import Bad
from ross_mcore.data.shard_reader import UNKNOWN_LENGTH, LengthSource, ShardReader
from ross_mcore.data.spec import SampleSpec
from ross_mcore.data.templates import TRAINING_TEMPLATES, tokenize_conversation
from ross_mcore.errors import ConversationError, ImageError, NothingLeft, ShardError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOTHING_TO_LEARN = "no picture and no label: nothing to learn"
PROBED_SAMPLES = 512
"""How many samples are tokenized to see whether a template fits, where the index does not say."""


@dataclass(frozen=True)
class IgnoredLabels:
    """How many samples, of `looked_at`, have no label at all, and the keys of the first few.

    `from_index`: counted when the shards were made, over all samples; otherwise tokenized now, spread over the data.
    """

    looked_at: int
    ignored: int
    keys: list[str]
    from_index: bool

    @property
    def share(self) -> float:
        return self.ignored / self.looked_at


class ShardDataset:
    """The samples of a data set folder, as rows of at most `spec.seq_length` tokens.

    Raises KeyError or ValueError for a template or aspect ratio that cannot be trained with; reading a sample never
    raises for bad data.
    """

    def __init__(
        self,
        reader: ShardReader,
        tokenizer: PreTrainedTokenizerBase,
        model_config: ModelConfig,
        spec: SampleSpec,
        image_processor: dict[str, Any] | None = None,
    ) -> None:
        if spec.template not in TRAINING_TEMPLATES:
            raise KeyError(f"template {spec.template!r} is not one of {', '.join(TRAINING_TEMPLATES)}")
        vision = model_config.vision
        self.reader, self.tokenizer, self.spec = reader, tokenizer, spec
        self.image_tokens = vision.image_tokens
        self.preprocessing = ImagePreprocessing.for_tower(vision, spec.image_aspect_ratio, image_processor)
        self.stored: PrecomputedParts | None = None
        self._wanted: frozenset[str] = frozenset({"pixels"})
        self._blank_parts: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.reader)

    @property
    def seq_length(self) -> int:
        return self.spec.seq_length

    def read_as(self, wanted: frozenset[str]) -> None:
        """What `decode` is to give of a picture: any of "pixels", "features" and "latents". Raises ShardError.

        To be called before workers start. The data set must have the parts that are wanted.
        """
        kinds = sorted(wanted - {"pixels"})
        self.stored = PrecomputedParts(self.reader) if kinds and self.reader.num_images else None
        stored = self.stored
        self._blank_parts = {kind: stored.blank(kind) for kind in kinds} if stored is not None else {}
        self._wanted = wanted

    def keys(self, sample_numbers: Sequence[int] | NDArray[np.int64]) -> list[str]:
        """The samples' keys, from the index alone."""
        return self.reader.keys(sample_numbers)

    def shard(self, sample_number: int) -> str:
        """The name of the shard that a sample is in."""
        return self.reader.shard_name(int(self.reader.samples[sample_number]["shard"]))

    def peers(self, _: int) -> range:
        """The samples that one may stand in for: all of them."""
        return range(len(self))

    def get(self, sample_number: int, position: int) -> Sample:
        """The sample at stream position `position`; its pixels are all None."""
        key = self.reader.keys([sample_number])[0]
        try:
            record = _parse(self.reader.record_bytes(sample_number))
            return self._text(key, position, record, int(self.reader.samples[sample_number]["num_images"]))
        except NothingLeft as error:
            return skipped_sample(key, position, str(error))
        except (ShardError, ConversationError) as error:
            return skipped_sample(key, position, str(error), is_bad=True)

    def row_lengths(self, sample_numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Tokens [P] that samples [P] take in a row, images included and cut to `spec.seq_length`; from the index.

        A length that the index does not know is 1, which only rows of one sample may be planned with, and so is that of
        a sample over the bounds. One that is cut before a picture takes a row for itself, as the index does not know
        where the picture stands.
        """
        rows = self.reader.samples[sample_numbers]
        text = rows["text_tokens"].astype(np.int64)
        whole = text + rows["image_spans"].astype(np.int64) * self.image_tokens
        takes_none = text == UNKNOWN_LENGTH
        bounds = self.spec.bounds
        if bounds.images is not None:
            takes_none |= rows["num_images"] > bounds.images
        if bounds.tokens is not None:
            takes_none |= text > bounds.tokens
        return np.where(takes_none, 1, np.clip(whole, 1, self.spec.seq_length))

    def require_lengths(self) -> None:
        """Raises ShardError unless the index has the samples' lengths under this tokenizer and template."""
        problem = stale_lengths(self.reader, self._length_source, self.tokenizer.name_or_path)
        if problem is not None:
            raise ShardError(f"samples cannot be packed into rows: {problem}; or train with --no-pack")

    @property
    def _length_source(self) -> LengthSource:
        return length_source(self.tokenizer, self.spec)

    def modality_lengths(self) -> NDArray[np.int64]:
        """Words of every sample [N], negative without a picture (the reference's modality_lengths); from the index.

        A sample without a word, which the reference refuses, counts as one word.
        """
        words = np.maximum(self.reader.samples["text_words"].astype(np.int64), 1)
        return np.where(self.reader.samples["num_images"] > 0, words, -words)

    def ignored_labels(self) -> IgnoredLabels:
        """How many samples have no label: a template that does not fit the tokenizer or the data shows here.

        From the index where it was made with this tokenizer and this template, else from PROBED_SAMPLES samples.
        """
        from_index = self.reader.length_source == self._length_source
        if from_index:
            looked_at = len(self)
            ignored = np.flatnonzero(self.reader.samples["label_tokens"] == 0).tolist()
        else:
            numbers = np.unique(np.linspace(0, len(self) - 1, min(len(self), PROBED_SAMPLES)).round().astype(np.int64))
            looked_at, ignored = len(numbers), [number for number in numbers.tolist() if self._is_ignored(number)]
        return IgnoredLabels(looked_at, len(ignored), self.keys(ignored[:5]), from_index)

    def _is_ignored(self, sample_number: int) -> bool:
        sample = self.get(sample_number, position=0)
        return sample.problem == NOTHING_TO_LEARN or (sample.problem is None and not sample.label_tokens)

    def decode(self, sample: Sample, sample_number: int, ordinals: Iterable[int]) -> list[Bad]:
        """Fills in `sample.pixels` at `ordinals`; returns what is wrong with those that had to be left blank.

        A tensor of `pixel_shape` that already stands there is written to instead of a new one.
        """
        bad = []
        for ordinal in ordinals:
            room = sample.pixels[ordinal]
            pixels = torch.empty(self.pixel_shape, dtype=torch.uint8) if room is None else room
            try:
                parts = self._picture(sample_number, ordinal, pixels)
            except (ShardError, ImageError) as error:
                parts = self._blank_parts
                self._write_blank(pixels)
                bad.append(Bad(sample.position, ordinal, str(error)))
            sample.pixels[ordinal] = pixels
            for kind, part in parts.items():
                sample.parts.setdefault(kind, [None] * len(sample.pixels))[ordinal] = part
        return bad

    def _picture(self, sample_number: int, ordinal: int, pixels: Tensor) -> dict[str, Tensor]:
        """Writes a picture to `pixels`, where they are wanted, and returns its parts. Raises ShardError, ImageError."""
        stored, kinds = self.stored, self._blank_parts
        parts = {} if stored is None else {kind: stored.read(kind, sample_number, ordinal) for kind in kinds}
        if pixels.numel():
            picture, _ = decode_image(self.reader.image_bytes(sample_number, ordinal))
            self.preprocessing.write_levels(picture, pixels.numpy())
        return parts

    def _write_blank(self, pixels: Tensor) -> None:
        if pixels.numel():
            self.preprocessing.write_background(pixels.numpy())

    @property
    def pixel_shape(self) -> tuple[int, ...]:
        """(3, H, W), or nothing where pixels are not wanted."""
        size = self.preprocessing.image_size
        return (3, size, size) if "pixels" in self._wanted else (0,)

    def _text(self, key: str, position: int, record: dict[str, Any], num_images: int) -> Sample:
        """Raises ConversationError when the record has no usable row, NothingLeft where the options are why."""
        self.spec.bounds.require(num_images)
        tokenized = tokenize_conversation(record.get("conversations"), num_images, self.tokenizer, self.spec)
        self.spec.bounds.require(num_images, tokenized.text_tokens)
        require_pictures(tokenized.image_spans, num_images)
        whole = expand_images(tokenized.input_ids, tokenized.labels, self.image_tokens)
        tokens, labels, starts = cut_row(*whole, self.image_tokens, self.spec.seq_length)
        pixels: list[Tensor | None] = [None] * len(starts)
        sample = Sample(key, position, torch.from_numpy(tokens), torch.from_numpy(labels), starts, pixels)
        if not starts and not sample.label_tokens:
            raise NothingLeft(NOTHING_TO_LEARN)
        return sample


def skipped_sample(key: str, position: int, problem: str, is_bad: bool = False) -> Sample:
    """An empty row that weighs nothing and says why."""
    empty = torch.zeros(0, dtype=torch.int64)
    return Sample(key, position, empty, empty.clone(), problem=problem, is_bad=is_bad)


def _parse(data: bytes) -> dict[str, Any]:
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConversationError(f"the record is not JSON: {type(error).__name__}") from None
    if not isinstance(record, dict):
        raise ConversationError("the record is not a JSON object")
    return record
