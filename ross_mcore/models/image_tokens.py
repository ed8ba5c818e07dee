"""Images in the token sequence: splices image features in, gathers hidden states at images.

Legend: T positions of a micro-batch, D width, I images, N tokens per image. Hidden states are [T, 1, D], sequence first
as in Megatron-Core; an image has the N positions from its start.
"""

from __future__ import annotations

import torch
from torch import Tensor


def image_indices(image_starts: Tensor, image_tokens: int) -> Tensor:
    """image_starts [I] -> [I * N] positions."""
    offsets = torch.arange(image_tokens, device=image_starts.device)
    return (image_starts[:, None] + offsets).reshape(-1)


def splice(embeddings: Tensor, features: Tensor, image_starts: Tensor) -> Tensor:
    """embeddings [T, 1, D], features [I, N, D] -> [T, 1, D] with each image's features at its positions.

    Out of place and differentiable in both; gradients of replaced embeddings are zero. Empty features of no images stay
    in the autograd graph. Raises ValueError when the numbers of images or the widths differ, and IndexError (on CPU)
    for an image that ends after the sequence. Source: reference ross_arch.py:215-419, which splices row by row.
    """
    if len(features) != image_starts.numel():
        raise ValueError(f"features of {len(features)} images, but {image_starts.numel()} images in the batch")
    width = embeddings.shape[-1]
    if features.shape[2] != width:
        raise ValueError(f"features are {features.shape[2]} wide, but embeddings {width}")
    indices = image_indices(image_starts, features.shape[1])
    replacement = features.reshape(-1, 1, width).to(embeddings.dtype)
    return embeddings.index_copy(0, indices, replacement)


def gather(hidden: Tensor, image_starts: Tensor, image_tokens: int) -> Tensor:
    """hidden [T, 1, D] -> [I, N, D], the hidden states at each image's positions; differentiable.

    Raises IndexError (on CPU) for an image that ends after the sequence.
    """
    indices = image_indices(image_starts, image_tokens)
    return hidden.index_select(0, indices).view(image_starts.numel(), image_tokens, hidden.shape[-1])
