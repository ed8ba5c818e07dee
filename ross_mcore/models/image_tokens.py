"""Where images and labels lie in the sequence: splice image features in, gather hidden states out.

Legend: S positions of a row, B rows, D width, I images, N tokens an image takes, T supervised positions. Hidden states
are sequence first, [S, B, D], as in Megatron-Core; an image occupies the N positions from its start in its row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ross_mcore.batch import IGNORE_INDEX


def image_indices(image_rows: Tensor, image_starts: Tensor, image_tokens: int, num_rows: int) -> Tensor:
    """image_rows [I], image_starts [I] -> [I * N] indices into hidden states flattened to [S * B, D].

    Raises ValueError when there are not as many rows as starts.
    """
    if image_rows.shape != image_starts.shape:
        raise ValueError(f"{image_rows.numel()} image rows, but {image_starts.numel()} image starts")
    offsets = torch.arange(image_tokens, device=image_starts.device)
    return ((image_starts[:, None] + offsets) * num_rows + image_rows[:, None]).reshape(-1)


def splice(embeddings: Tensor, features: Tensor, image_rows: Tensor, image_starts: Tensor) -> Tensor:
    """embeddings [S, B, D], features [I, N, D] -> [S, B, D] with each image's features at its positions.

    Out of place and differentiable in both; gradients of the embeddings that were replaced are zero. Without images
    the features, however empty, stay in the graph. Raises ValueError when the number of images or the width of the
    features disagrees, and IndexError (on CPU) for an image that reaches past the sequence.
    Source: reference ross_arch.py:215-419, which splices one row after the other.
    """
    if len(features) != image_rows.numel():
        raise ValueError(f"features of {len(features)} images, but {image_rows.numel()} images in the batch")
    length, num_rows, width = embeddings.shape
    if features.shape[2] != width:
        raise ValueError(f"features are {features.shape[2]} wide, but embeddings {width}")
    indices = image_indices(image_rows, image_starts, features.shape[1], num_rows)
    flat = embeddings.reshape(length * num_rows, width)
    replacement = features.reshape(-1, width).to(embeddings.dtype)
    return flat.index_copy(0, indices, replacement).view(length, num_rows, width)


def gather(hidden: Tensor, image_rows: Tensor, image_starts: Tensor, image_tokens: int) -> Tensor:
    """hidden [S, B, D] -> [I, N, D], the hidden states at each image's positions; differentiable.

    Raises ValueError when there are not as many rows as starts, and IndexError (on CPU) for an image that reaches past
    the sequence.
    """
    length, num_rows, width = hidden.shape
    indices = image_indices(image_rows, image_starts, image_tokens, num_rows)
    flat = hidden.reshape(length * num_rows, width)
    return flat.index_select(0, indices).view(image_rows.numel(), image_tokens, width)


class SupervisedPositions(NamedTuple):
    """The T positions of a batch that carry a label, row after row.

    s_index [T], b_index [T]: position and row; targets [T] int64: the label; weights [T] float32: 1, or 0 for the one
    dummy position (with target 0) of a batch without labels.
    """

    s_index: Tensor
    b_index: Tensor
    targets: Tensor
    weights: Tensor

    def select(self, hidden: Tensor) -> Tensor:
        """hidden [S, B, D] -> [T, D]; differentiable."""
        length, num_rows, width = hidden.shape
        return hidden.reshape(length * num_rows, width).index_select(0, self.s_index * num_rows + self.b_index)


def supervised_positions(labels: Tensor) -> SupervisedPositions:
    """labels [B, S] -> the positions whose label is not IGNORE_INDEX.

    A batch without any gets position 0 of row 0 with weight 0, so that every parameter stays in the autograd graph and
    every rank takes part in the same communication.
    """
    b_index, s_index = torch.nonzero(labels != IGNORE_INDEX, as_tuple=True)
    if not b_index.numel():
        zero = torch.zeros(1, dtype=torch.int64, device=labels.device)
        return SupervisedPositions(zero, zero, zero, zero.float())
    weights = torch.ones(b_index.shape, dtype=torch.float32, device=labels.device)
    return SupervisedPositions(s_index, b_index, labels[b_index, s_index], weights)
