"""Splice and gather: inverse to each other, differentiable, counts are checked."""

from __future__ import annotations

import pytest
import torch

from ross_mcore.models.image_tokens import gather, splice

LENGTH, WIDTH, TOKENS = 27, 2, 3
IMAGE_STARTS = torch.tensor([19, 6, 23])


def test_gather_is_the_inverse_of_splice():
    embeddings = torch.randn(LENGTH, 1, WIDTH)
    before = embeddings.clone()
    features = torch.randn(3, TOKENS, WIDTH)
    spliced = splice(embeddings, features, IMAGE_STARTS)
    assert torch.equal(embeddings, before)
    expected = before.clone()
    for image, start in enumerate(IMAGE_STARTS.tolist()):
        expected[start : start + TOKENS, 0] = features[image]
    assert torch.equal(spliced, expected)
    assert torch.equal(gather(spliced, IMAGE_STARTS, TOKENS), features)


def test_gradients():
    embeddings = torch.randn(LENGTH, 1, WIDTH, dtype=torch.float64, requires_grad=True)
    features = torch.randn(3, TOKENS, WIDTH, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda e, f: splice(e, f, IMAGE_STARTS), (embeddings, features))
    assert torch.autograd.gradcheck(lambda e: gather(e, IMAGE_STARTS, TOKENS), (embeddings,))


def test_hidden_states_that_are_not_contiguous():
    hidden = torch.randn(WIDTH, LENGTH, 1).permute(1, 2, 0)
    taken = gather(hidden, IMAGE_STARTS, TOKENS)
    assert torch.equal(taken[1], hidden[6:9, 0])
    assert torch.equal(splice(hidden, taken, IMAGE_STARTS), hidden)


def test_no_images_keep_the_graph():
    none = torch.zeros(0, dtype=torch.int64)
    weight = torch.randn(4, WIDTH, requires_grad=True)
    embeddings = torch.randn(LENGTH, 1, WIDTH, requires_grad=True)
    spliced = splice(embeddings, torch.zeros(0, TOKENS, 4) @ weight, none)
    assert torch.equal(spliced, embeddings)
    taken = gather(spliced, none, TOKENS)
    assert taken.shape == (0, TOKENS, WIDTH)
    (spliced.sum() + taken.sum()).backward()
    assert weight.grad is not None and not weight.grad.any()
    assert torch.equal(embeddings.grad, torch.ones_like(embeddings))


def test_features_take_the_dtype_of_the_embeddings():
    spliced = splice(torch.zeros(LENGTH, 1, WIDTH).bfloat16(), torch.ones(3, TOKENS, WIDTH), IMAGE_STARTS)
    assert spliced.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ((2, TOKENS, WIDTH), "features of 2 images, but 3 images"),
        ((3, TOKENS, WIDTH + 1), "3 wide, but embeddings 2"),
    ],
)
def test_counts_that_disagree(features, message):
    with pytest.raises(ValueError, match=message):
        splice(torch.zeros(LENGTH, 1, WIDTH), torch.zeros(features), IMAGE_STARTS)


def test_an_image_past_the_sequence_is_an_error():
    with pytest.raises(IndexError):
        gather(torch.zeros(LENGTH, 1, WIDTH), IMAGE_STARTS + 4, TOKENS)
    with pytest.raises(IndexError):
        splice(torch.zeros(LENGTH, 1, WIDTH), torch.zeros(3, TOKENS, WIDTH), IMAGE_STARTS + 4)
