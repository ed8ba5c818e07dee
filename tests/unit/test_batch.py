"""Rows of several samples: every sample is in its slot."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ross_mcore.batch import IGNORE_INDEX, Sample, collate, normalised_pixels, pixel_table, segments


def sample(position: int, tokens: list[int], image_at: int | None = None) -> Sample:
    ids = torch.tensor(tokens, dtype=torch.int64)
    pixels = [] if image_at is None else [torch.full((3, 2, 2), float(position))]
    return Sample(str(position), position, ids, ids.clone(), [] if image_at is None else [image_at], list(pixels))


def test_samples_share_a_row_and_predict_only_their_own_tokens() -> None:
    rows = [[sample(7, [1, 2, 3], 1), sample(8, [4, 5])], [sample(9, [6, 7], 0)]]
    batch = collate(rows, 6, 2, with_blank_samples=True)
    assert batch.tokens.tolist() == [1, 2, 3, 4, 5, 0, 6, 7, 0, 0, 0, 0]
    nothing = IGNORE_INDEX
    assert batch.labels.tolist() == [2, 3, nothing, 5, nothing, nothing, 7, *[nothing] * 5]
    assert batch.label_positions.tolist() == [0, 1, 3, 6] and batch.label_weights.tolist() == [1, 1, 1, 1]
    assert batch.label_targets.tolist() == [2, 3, 5, 7] and batch.label_samples.tolist() == [0, 0, 1, 2]
    assert batch.sample_starts.tolist() == [0, 3, 6]
    assert batch.image_starts.tolist() == [1, 6]
    assert batch.image_positions.tolist() == [7, 9] and batch.image_ordinals.tolist() == [0, 0]
    assert batch.image_samples.tolist() == [0, 2]
    assert batch.blank_positions.tolist() == [8] and batch.blank_samples.tolist() == [1]
    assert batch.pixels[:, 0, 0, 0].tolist() == [7.0, 9.0]


def test_a_slot_keeps_its_size_when_its_sample_is_shorter() -> None:
    batch = collate([[sample(1, [1]), sample(2, [2, 3])]], 8, 2, slots=[[4, 3]])
    assert batch.tokens.tolist() == [1, 0, 0, 0, 2, 3, 0, 0]
    assert batch.sample_starts.tolist() == [0, 4]


def test_a_batch_without_labels_has_one_label_of_weight_zero() -> None:
    batch = collate([[sample(1, [1]), sample(2, [2])]], 4, 2)
    found = (batch.label_positions, batch.label_targets, batch.label_samples, batch.label_weights)
    assert [value.tolist() for value in found] == [[0], [0], [0], [0.0]] and found[3].dtype == torch.float32


def test_a_label_belongs_to_the_last_sample_that_starts_before_it() -> None:
    batch = collate([[sample(1, [1, 2]), sample(2, []), sample(3, [3, 4])], [sample(4, []), sample(5, [5, 6])]], 5, 2)
    assert batch.label_positions.tolist() == [0, 2, 5] and batch.label_samples.tolist() == [0, 2, 4]


@pytest.mark.parametrize(
    ("slots", "lengths"),
    [
        ([[4, 3], [8]], [4, 4, 8]),
        ([[2, 2, 2]], [2, 2, 4]),
        ([[3, 0, 2, 0]], [3, 5]),
        ([[0], []], [8, 8]),
    ],
)
def test_segments_fill_their_rows(slots: list[list[int]], lengths: list[int]) -> None:
    assert segments(slots, 8) == lengths


@pytest.mark.parametrize(
    ("slots", "message"), [([[2, 2]], "sample 1: 3 tokens, 3 labels, room for 2"), ([[4, 5]], "samples of 9 tokens")]
)
def test_a_sample_that_does_not_fit_is_an_error(slots: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collate([[sample(1, [1, 2, 3]), sample(2, [4])]], 8, 2, slots)


def test_normalised_levels_equal_the_librarys_bits() -> None:
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    levels = torch.arange(256, dtype=torch.uint8).expand(2, 3, 256).reshape(2, 3, 16, 16)
    scaled = (levels.numpy() * np.float64(1 / 255)).astype(np.float32)  # transformers' rescale, then its normalize
    wanted = (scaled - np.float32(mean)[:, None, None]) / np.float32(std)[:, None, None]
    normalised = normalised_pixels(levels, pixel_table(mean, std))
    assert normalised.dtype == torch.float32 and np.array_equal(normalised.numpy(), wanted)
    assert normalised_pixels(normalised, pixel_table(mean, std)) is normalised
