"""Types that data/ and models/ share: samples, rows of samples, and the micro-batch made of rows.

Legend: B rows of S tokens each, T = B * S tokens of the micro-batch, L labels in it, I images in it, J images whose
pixels this tensor-parallel rank holds, K samples without a picture, H W pixels, k draws of an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ross_mcore import platform

IGNORE_INDEX = -100


@dataclass
class Sample:
    """One sample, ready to become a row.

    tokens [L] int64, with `image_tokens` zeros in place of every image; labels [L] int64, labels[i] belongs to
    tokens[i] (not shifted), IGNORE_INDEX where nothing is supervised; image_starts: index of the first image token of
    every image; pixels: one [3, H, W] per image (see Batch), of size 0 if this rank needs only its precomputed parts,
    None if it needs nothing of it; parts: precomputed parts of the same images by kind, see Batch. `key` names the
    sample in its data set; `position` is its number in the training stream, the key of its random draws. `problem` is
    the reason a sample is skipped, which makes it an empty row with no weight; `is_bad`: the reason is its data, not
    the options. `source` is the number of its data set.
    """

    key: str
    position: int
    tokens: Tensor
    labels: Tensor
    image_starts: list[int] = field(default_factory=list)
    pixels: list[Tensor | None] = field(default_factory=list)
    parts: dict[str, list[Tensor | None]] = field(default_factory=dict)
    problem: str | None = None
    is_bad: bool = False
    source: int = 0

    @property
    def label_tokens(self) -> int:
        """Number of labels in the loss; the first token has none, because nothing predicts it."""
        return int((self.labels[1:] != IGNORE_INDEX).sum())


Row = list[Sample]
"""The samples of one row, one after the other; each has its own attention, positions and losses."""
Slots = list[int]
"""Number of tokens that a row reserves for each of its samples."""


@dataclass(frozen=True)
class Draws:
    """The random numbers in the reconstruction loss of I images, as a value, so that recorded ones can be used again.

    posterior_noise [I, C, h, w] of the VAE's posterior; timesteps [I, k] int64; noise [I, k, 4C, g, g].
    """

    posterior_noise: Tensor
    timesteps: Tensor
    noise: Tensor

    def __getitem__(self, images: slice | Sequence[int]) -> Draws:
        """The draws of some of the images."""
        return Draws(*(value[images] for value in vars(self).values()))


ON_HOST = ("labels", "sample_starts", "image_positions", "image_ordinals", "blank_positions")
"""Fields of a Batch that only the host reads."""


@dataclass
class Batch:
    """One micro-batch, its rows one after the other. Tensor-parallel ranks differ in pixels, parts and draws only.

    tokens [T] int64, zero at image positions and padding; labels [T] int64, *shifted*: labels[t] is the token that
    follows position t; label_positions [L] int64: where there is a label, label_targets [L] int64: the labels,
    label_samples [L] int64: their samples, label_weights [L] float32: 1; a batch without labels has one label of weight
    0, so that all parameters stay in the autograd graph and all ranks take part in the same collectives; sample_starts
    [N] int64: first token of each of the N samples; image_starts [I] int64: first token of each image; image_samples
    [I] int64: index of its sample among the N; image_positions [I] int64: stream position of that sample, and
    image_ordinals [I] int64: number of the image in it, together the key of its random draws; blank_samples [K] and
    blank_positions [K] int64: the same for the samples without a picture that the reconstruction loss covers (see
    collate); pixels [J, 3, H, W]: this rank's share of the I images, in order, uint8 levels or float32 in the tower's
    normalisation (see normalised_pixels); parts: precomputed parts of that share, "latents" [J, 2, C, h, w] (posteriors
    of the VAE) and "features" [J, N, D] (of the tower), no key if J is 0; draws: of the images and blank samples that
    this rank denoises (RossModel.draws), None where nothing is denoised; turn: number of the micro-batch in its step,
    see layout.share_of.
    """

    tokens: Tensor
    labels: Tensor
    label_positions: Tensor
    label_targets: Tensor
    label_samples: Tensor
    label_weights: Tensor
    sample_starts: Tensor
    image_starts: Tensor
    image_samples: Tensor
    image_positions: Tensor
    image_ordinals: Tensor
    blank_samples: Tensor
    blank_positions: Tensor
    pixels: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)
    draws: Draws | None = None
    turn: int = 0

    @property
    def num_images(self) -> int:
        return int(self.image_starts.numel())

    @property
    def num_samples(self) -> int:
        return int(self.sample_starts.numel())

    @property
    def tensors(self) -> list[Tensor]:
        """All of its tensors, those of parts and draws too."""
        draws = [] if self.draws is None else vars(self.draws).values()
        return [value for value in (*vars(self).values(), *self.parts.values(), *draws) if isinstance(value, Tensor)]

    def to(self, device: torch.device) -> Batch:
        """The batch on `device`, but for the fields that only the host reads; copies overlap with computation."""
        return self._each(partial(platform.upload, device=device))

    def pinned(self) -> Batch:
        """The batch in pinned memory, so that `to` has only to start copies."""
        return self._each(platform.pinned)

    def _each(self, move: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with `move` applied to the tensors that a device holds."""
        moved: dict[str, Any] = {
            name: move(value) for name, value in vars(self).items() if isinstance(value, Tensor) and name not in ON_HOST
        }
        parts = {kind: move(part) for kind, part in self.parts.items()}
        draws = None if self.draws is None else Draws(*map(move, vars(self.draws).values()))
        return replace(self, **moved, parts=parts, draws=draws)


def pixel_table(mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """The 256 levels of each channel in the normalisation of a tower, [3, 256] float32.

    mean, std: of the three channels, for levels scaled to [0, 1]. Bit for bit the values of Hugging Face's processors,
    which scale in float64.
    """
    levels = (torch.arange(256, dtype=torch.float64) * (1 / 255)).float().expand(3, 256)
    return (levels - torch.tensor(mean)[:, None]) / torch.tensor(std)[:, None]


def normalised_pixels(pixels: Tensor, table: Tensor) -> Tensor:
    """uint8 levels [..., 3, H, W] -> float32, by the table of a tower (pixel_table) on the same device.

    Floating-point pixels are returned as they are.
    """
    if pixels.is_floating_point():
        return pixels
    channels = zip(table, pixels.unbind(-3), strict=True)
    return torch.stack([values[channel.int()] for values, channel in channels], dim=-3)


def is_blank(sample: Sample) -> bool:
    """Whether a sample has text but no picture."""
    return not sample.image_starts and sample.problem is None


def segments(rows: Sequence[Slots], seq_length: int) -> list[int]:
    """Lengths of the segments of a micro-batch, within which tokens attend to each other; their sum is T.

    The last slot of a row extends to the row's end: padding is behind all tokens of its sample.
    """
    lengths: list[int] = []
    for slots in rows:
        used = [length for length in slots if length]
        lengths += used[:-1] + [seq_length - sum(used[:-1])]
    return lengths


def collate(
    rows: Sequence[Row],
    seq_length: int,
    image_size: int,
    slots: Sequence[Slots] | None = None,
    with_blank_samples: bool = False,
    turn: int = 0,
) -> Batch:
    """Lays rows of `seq_length` tokens one after the other and stacks the pixels that are present.

    `slots` are the tokens reserved for every sample, by default its length. `with_blank_samples` fills
    `Batch.blank_samples` and `blank_positions`, for `--vm-loss-rows all`. Raises ValueError when a sample is longer
    than its slot, slots are longer than a row, or tokens and labels differ in length.
    """
    slots = [[sample.tokens.numel() for sample in row] for row in rows] if slots is None else slots
    tokens = torch.zeros(len(rows) * seq_length, dtype=torch.int64)
    labels = torch.full((len(rows) * seq_length,), IGNORE_INDEX, dtype=torch.int64)
    begins: list[int] = []
    starts, owners, positions, ordinals = [], [], [], []
    pixels: list[Tensor] = []
    parts: dict[str, list[Tensor]] = {}
    for number, (row, reserved) in enumerate(zip(rows, slots, strict=True)):
        if sum(reserved) > seq_length:
            raise ValueError(f"samples of {sum(reserved)} tokens in a row of {seq_length} tokens")
        begin = number * seq_length
        for sample, room in zip(row, reserved, strict=True):
            length = sample.tokens.numel()
            if length > room or sample.labels.numel() != length:
                raise ValueError(
                    f"sample {sample.key}: {length} tokens, {sample.labels.numel()} labels, room for {room} tokens"
                )
            tokens[begin : begin + length] = sample.tokens
            if length:
                labels[begin : begin + length - 1] = sample.labels[1:]
            for ordinal, start in enumerate(sample.image_starts):
                starts.append(begin + start)
                owners.append(len(begins))
                positions.append(sample.position)
                ordinals.append(ordinal)
            pixels.extend(picture for picture in sample.pixels if picture is not None)
            for kind, held in sample.parts.items():
                here = (part for part, pixels_too in zip(held, sample.pixels) if pixels_too is not None)
                parts.setdefault(kind, []).extend(part for part in here if part is not None)
            begins.append(begin)
            begin += room

    def integers(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64)

    def on_labels(value: Tensor) -> Tensor:
        return value if has_labels else value.new_zeros(1)

    sample_starts, label_positions = integers(begins), (labels != IGNORE_INDEX).nonzero().squeeze(1)
    has_labels = bool(label_positions.numel())
    label_positions = on_labels(label_positions)
    samples = [sample for row in rows for sample in row]
    blanks = [place for place, sample in enumerate(samples) if with_blank_samples and is_blank(sample)]
    return Batch(
        tokens,
        labels,
        label_positions=label_positions,
        label_targets=on_labels(labels[label_positions]),
        # of samples that start at the same position, all but the last are empty
        label_samples=torch.searchsorted(sample_starts, label_positions, right=True) - 1,
        label_weights=on_labels(torch.ones(label_positions.numel())),
        sample_starts=sample_starts,
        image_starts=integers(starts),
        image_samples=integers(owners),
        image_positions=integers(positions),
        image_ordinals=integers(ordinals),
        blank_samples=integers(blanks),
        blank_positions=integers([samples[place].position for place in blanks]),
        pixels=torch.stack(pixels) if pixels else torch.zeros(0, 3, image_size, image_size, dtype=torch.uint8),
        parts={kind: torch.stack(held) for kind, held in parts.items() if held},
        turn=turn,
    )
