"""Kernels of a local decoder layer, of the loss and of the optimizer's step, counted on the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from counting.dispatch import Operations
from counting.ops import LANGUAGE, ONE_CALL, decoder, of_layer, of_optimizer
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

from ross_mcore.models.language import Execution


def test_a_local_layer_has_no_more_kernels_than(process_group: None) -> None:
    execution = Execution(dtype=torch.bfloat16)
    assert not decoder(1, execution).config.batch_p2p_sync  # mcore then waits for the device after every exchange
    found = of_layer(execution, ONE_CALL)
    assert found.forward.total() <= 50, found.forward
    assert found.backward.total() <= 69, found.backward


def test_the_loss_of_bf16_is_one_copy_of_the_logits(process_group: None) -> None:
    """The fused cross-entropy has the values and gradients of mcore's other one, and padding of the vocabulary none."""
    model = decoder(1, Execution(dtype=torch.bfloat16)).module.language_model
    states = torch.randn(9, LANGUAGE.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.arange(9) * 31
    weights = torch.linspace(0.5, 1.5, 9)
    with Operations() as operations:
        losses = model.token_losses(states, labels)
    (found,) = torch.autograd.grad(losses @ weights, states)
    real = model.output_layer(states)[0].float()[:, : LANGUAGE.vocab_size]
    other = vocab_parallel_cross_entropy(model.logits(states), labels)
    (expected,) = torch.autograd.grad(other @ weights, states)
    torch.testing.assert_close(losses, F.cross_entropy(real, labels, reduction="none"))
    assert torch.equal(losses, other) and torch.equal(found, expected)
    assert operations.found["_to_copy"] == 1 and operations.found["masked_fill"] == 0
    assert model.token_losses(states[:0], labels[:0]).shape == (0,)


def test_the_optimizers_step_does_not_grow_with_the_number_of_weights(process_group: None) -> None:
    """But for mcore's copies of bf16 weights from their masters. The host reads the norm, and whether all is finite."""
    for bf16, copies in ((False, 0), (True, 7)):
        one, two = (of_optimizer(layers, bf16) for layers in (1, 2))
        assert two.found.total() - one.found.total() == copies, two.found - one.found
        assert one.reads == two.reads == 2
