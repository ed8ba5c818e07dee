"""ShardDataset: a record in a shard -> a `Sample` with tokens, labels, image spans and pixels.

Bad data raises nothing here: bad text gives an empty row with `Sample.is_bad`, a bad picture gives a blank picture and
a reason. The loader replaces bad samples when all ranks know of them, because only the rank that decodes a picture
finds out that it is bad. A good sample of which the options leave nothing is an empty row and is not replaced.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ross_mcore import checked
from ross_mcore.architecture import ModelConfig
from ross_mcore.batch import Sample
from ross_mcore.data.conversation import cut_row, expand_images, require_pictures
from ross_mcore.data.image import ImagePreprocessing, decode_image
from ross_mcore.data.lengths import length_source, stale_lengths
from ross_mcore.data.precomputed import PrecomputedParts
from ross_mcore.data.records import normalise
from ross_mcore.data.replacement import Bad
from ross_mcore.data.shard_reader import UNKNOWN_LENGTH, ShardReader
from ross_mcore.data.spec import SampleSpec
from ross_mcore.data.templates import require_trainable, tokenize_conversation
from ross_mcore.data.tokenizer import require_ids
from ross_mcore.errors import ConversationError, ImageError, NothingLeft, ShardError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOTHING_TO_LEARN = "no picture and no label: nothing to learn"


class ShardDataset:
    """A SampleDataset: the samples of one data set folder, as rows of at most `spec.seq_length` tokens.

    Raises KeyError or ValueError for a template or aspect ratio that is not for training, ShardError for an index with
    cut-off pictures that `spec` refuses; reading a sample never raises for bad data.
    """

    def __init__(
        self,
        reader: ShardReader,
        tokenizer: PreTrainedTokenizerBase,
        model_config: ModelConfig,
        spec: SampleSpec,
        image_processor: dict[str, Any] | None = None,
    ) -> None:
        require_trainable(spec, tokenizer)
        if reader.truncated_images == "fill" and spec.truncated_images == "refuse":
            raise ShardError(
                f"{reader.folder} was indexed with --truncated-images fill, so it may hold pictures that are cut "
                "off, which this run would find bad; give --truncated-images fill here too, or index it again without"
            )
        vision = model_config.vision
        self.reader, self.tokenizer, self.spec = reader, tokenizer, spec
        self.image_tokens, self.vocab_size = vision.image_tokens, model_config.language.vocab_size
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
        """Sets what `decode` returns for a picture: any of "pixels", "features" and "latents".

        To be called before workers start. Raises ShardError if the data set does not have these parts.
        """
        kinds = sorted(wanted - {"pixels"})
        self.stored = stored = PrecomputedParts(self.reader) if kinds and self.reader.num_images else None
        self._blank_parts = {kind: stored.blank(kind) for kind in kinds} if stored is not None else {}
        self._wanted = wanted

    def keys(self, sample_numbers: Sequence[int] | NDArray[np.int64]) -> list[str]:
        return self.reader.keys(sample_numbers)

    def shard(self, sample_number: int) -> str:
        return self.reader.shard_name(int(self.reader.samples[sample_number]["shard"]))

    def peers(self, _: int) -> range:
        return range(len(self))

    def get(self, sample_number: int, position: int) -> Sample:
        key = self.reader.keys([sample_number])[0]
        try:
            return self._text(key, position, *self.record(sample_number))
        except NothingLeft as error:
            return skipped_sample(key, position, str(error))
        except (ShardError, ConversationError) as error:
            return skipped_sample(key, position, str(error), is_bad=True)

    def record(self, sample_number: int) -> tuple[dict[str, Any], int]:
        """(record, number of pictures) of a sample. Raises ShardError, ConversationError for one that is no record."""
        num_images = int(self.reader.samples[sample_number]["num_images"])
        return normalise(_parse(self.reader.record_bytes(sample_number)), num_images), num_images

    def row_lengths(self, sample_numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """As SampleDataset.row_lengths.

        A length is 1 if the index does not have it, which is allowed in rows of one sample only, or if the sample is
        over the bounds. A sample that is cut before a picture has the length of a whole row, because the index does not
        have the picture's position.
        """
        rows = self.reader.samples[sample_numbers]
        too_many_images, too_many_tokens = self.over_bounds(rows)
        takes_none = too_many_images | too_many_tokens | (rows["text_tokens"] == UNKNOWN_LENGTH)
        return np.where(takes_none, 1, np.clip(self.whole_lengths(rows), 1, self.spec.seq_length))

    def whole_lengths(self, rows: NDArray[np.void]) -> NDArray[np.int64]:
        """Tokens [P] of samples before any cut, images included, from their rows [P] in the index."""
        return rows["text_tokens"].astype(np.int64) + rows["image_spans"].astype(np.int64) * self.image_tokens

    def over_bounds(self, rows: NDArray[np.void]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Whether samples [P] are over the bounds of pictures and of text tokens, from their rows [P] in the index."""
        bounds = self.spec.bounds
        images = rows["num_images"] > (np.inf if bounds.images is None else bounds.images)
        return images, rows["text_tokens"] > (np.inf if bounds.tokens is None else bounds.tokens)

    def require_lengths(self) -> None:
        """Raises ShardError unless the index has the samples' lengths under this tokenizer and template."""
        source = length_source(self.tokenizer, self.spec)
        problem = stale_lengths(self.reader, source, self.tokenizer.name_or_path)
        if problem is not None:
            raise ShardError(f"samples cannot be packed into rows: {problem}; or train with --no-pack")

    def modality_lengths(self) -> NDArray[np.int64]:
        """Words of every sample [N], negative without a picture (the reference's modality_lengths); from the index.

        A sample without words, which the reference refuses, counts as one word.
        """
        words = np.maximum(self.reader.samples["text_words"].astype(np.int64), 1)
        return np.where(self.reader.samples["num_images"] > 0, words, -words)

    def decode(self, sample: Sample, sample_number: int, ordinals: Iterable[int]) -> list[Bad]:
        bad = []
        for ordinal in ordinals:
            room = sample.pixels[ordinal]
            pixels = torch.empty(self.pixel_shape, dtype=torch.uint8) if room is None else room
            try:
                parts = self._picture(sample_number, ordinal, pixels)
            except (ShardError, ImageError) as error:
                parts = self._blank_parts
                if pixels.numel():
                    self.preprocessing.write_background(pixels.numpy())
                bad.append(Bad(sample.position, ordinal, str(error)))
            sample.pixels[ordinal] = pixels
            for kind, part in parts.items():
                sample.parts.setdefault(kind, [None] * len(sample.pixels))[ordinal] = part
        return bad

    def _picture(self, sample_number: int, ordinal: int, pixels: Tensor) -> dict[str, Tensor]:
        """Writes a picture to `pixels`, if they have a size; returns its parts. Raises ShardError, ImageError."""
        stored, kinds = self.stored, self._blank_parts
        parts = {} if stored is None else {kind: stored.read(kind, sample_number, ordinal) for kind in kinds}
        if pixels.numel():
            data = self.reader.image_bytes(sample_number, ordinal)
            picture = decode_image(data, self.spec.truncated_images).picture
            self.preprocessing.write_levels(picture, pixels.numpy())
        return parts

    @property
    def pixel_shape(self) -> tuple[int, ...]:
        size = self.preprocessing.image_size
        return (3, size, size) if "pixels" in self._wanted else (0,)

    @property
    def picture_bytes(self) -> int:
        """Bytes of a picture as a worker sends it: its pixels and stored parts."""
        return math.prod(self.pixel_shape) + sum(part.nbytes for part in self._blank_parts.values())

    def _text(self, key: str, position: int, record: dict[str, Any], num_images: int) -> Sample:
        """Raises ConversationError when the record has no usable row, NothingLeft when the options leave nothing."""
        self.spec.bounds.require(num_images)
        tokenized = tokenize_conversation(record.get("conversations"), num_images, self.tokenizer, self.spec)
        self.spec.bounds.require(num_images, tokenized.text_tokens)
        require_pictures(tokenized.image_spans, num_images)
        whole = expand_images(tokenized.input_ids, tokenized.labels, self.image_tokens)
        tokens, labels, starts = cut_row(*whole, self.image_tokens, self.spec.seq_length)
        require_ids(tokens, self.vocab_size, self.tokenizer)
        pixels: list[Tensor | None] = [None] * len(starts)
        sample = Sample(key, position, torch.from_numpy(tokens), torch.from_numpy(labels), starts, pixels)
        if not starts and not sample.label_tokens:
            raise NothingLeft(NOTHING_TO_LEARN)
        return sample


def skipped_sample(key: str, position: int, problem: str, is_bad: bool = False) -> Sample:
    """An empty row with no weight, and the reason."""
    empty = torch.zeros(0, dtype=torch.int64)
    return Sample(key, position, empty, empty.clone(), problem=problem, is_bad=is_bad)


def _parse(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConversationError(f"the record is not JSON: {checked.reason(error)}") from None
