"""What travels from the data room to the model: samples of one row each, and the micro-batch made of them.

Legend: B rows, S tokens a row, I images in the micro-batch, J images that this tensor-parallel rank holds pixels of,
K blank rows, H W pixels. Only torch is imported here, so that data and models can share the types without knowing each
other.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

IGNORE_INDEX = -100


@dataclass
class Sample:
    """One sample, ready to become a row.

    tokens [L] int64, with `image_tokens` zeros in place of every image; labels [L] int64, labels[i] belongs to
    tokens[i] (not shifted), IGNORE_INDEX where nothing is supervised; image_starts: index of the first image token of
    every image; pixels: one [3, H, W] float32 per image in the tower's normalisation, or None where this rank does not
    need it. `key` names the sample in its data set; `position` is its number in the training stream, the key of its
    random draws. `problem` says why a sample was skipped: such a sample is an empty row and weighs nothing.
    """

    key: str
    position: int
    tokens: Tensor
    labels: Tensor
    image_starts: list[int] = field(default_factory=list)
    pixels: list[Tensor | None] = field(default_factory=list)
    problem: str | None = None

    @property
    def label_tokens(self) -> int:
        """Labels that a loss is over; none is for the first token, which nothing predicts."""
        return int((self.labels[1:] != IGNORE_INDEX).sum())


@dataclass
class Batch:
    """One micro-batch. Every tensor-parallel rank of a stage holds the same batch, but for `pixels`.

    tokens [B, S] int64, zero at image positions and padding; labels [B, S] int64, *shifted*: labels[b, s] is what
    position s must predict; image_rows [I], image_starts [I] int64: where each image's tokens begin;
    image_positions [I] int64: stream position of the image's sample, and image_ordinals [I]: which of its images, the
    two of them the key of its random draws; blank_positions [K] int64: stream positions of the rows without a picture
    that the reconstruction loss is to cover as well (none unless asked for, see collate); pixels [J, 3, H, W] float32:
    this rank's share of the I images, in order.
    """

    tokens: Tensor
    labels: Tensor
    image_rows: Tensor
    image_starts: Tensor
    image_positions: Tensor
    image_ordinals: Tensor
    blank_positions: Tensor
    pixels: Tensor

    @property
    def num_images(self) -> int:
        return int(self.image_rows.numel())

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`; the keys of the random draws stay on the CPU, where draws are made."""
        kept = ("image_positions", "image_ordinals", "blank_positions")
        moved = {n: v if n in kept else v.to(device, non_blocking=True) for n, v in vars(self).items()}
        return Batch(**moved)


def blank_rows(samples: list[Sample]) -> list[Sample]:
    """The samples that have text but no picture."""
    return [sample for sample in samples if not sample.image_starts and sample.problem is None]


def collate(samples: list[Sample], seq_length: int, image_size: int, with_blank_rows: bool = False) -> Batch:
    """Pads samples to `seq_length` tokens and stacks the pixels that are present.

    `with_blank_rows` fills `Batch.blank_positions`, as `--vm-loss-rows all` wants it. Raises ValueError when a sample
    is longer than `seq_length`, or when tokens and labels differ in length.
    """
    tokens = torch.zeros(len(samples), seq_length, dtype=torch.int64)
    labels = torch.full((len(samples), seq_length), IGNORE_INDEX, dtype=torch.int64)
    rows, starts, positions, ordinals, pixels = [], [], [], [], []
    for row, sample in enumerate(samples):
        length = sample.tokens.numel()
        if length > seq_length or sample.labels.numel() != length:
            raise ValueError(
                f"sample {sample.key}: {length} tokens, {sample.labels.numel()} labels, row of {seq_length} tokens"
            )
        tokens[row, :length] = sample.tokens
        if length:
            labels[row, : length - 1] = sample.labels[1:]
        for ordinal, start in enumerate(sample.image_starts):
            rows.append(row)
            starts.append(start)
            positions.append(sample.position)
            ordinals.append(ordinal)
        pixels.extend(picture for picture in sample.pixels if picture is not None)

    def integers(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64)

    return Batch(
        tokens,
        labels,
        image_rows=integers(rows),
        image_starts=integers(starts),
        image_positions=integers(positions),
        image_ordinals=integers(ordinals),
        blank_positions=integers([sample.position for sample in blank_rows(samples)] if with_blank_rows else []),
        pixels=torch.stack(pixels) if pixels else torch.zeros(0, 3, image_size, image_size),
    )
