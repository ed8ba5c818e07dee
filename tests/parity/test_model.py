"""The whole model in one process against the reference: hidden states, both losses, and every gradient.

The reference averages vm_loss over all rows, text-only ones included (their condition is zero and their picture the
mean colour); here it is averaged over images. Where a recorded batch has text-only rows, the test adds what those rows
contribute, so that the recorded gradients can be compared whole.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from ross_mcore import platform

platform.prepare()

from ross_mcore.batch import Batch, Sample, collate  # noqa: E402
from ross_mcore.checkpoint import mapping  # noqa: E402
from ross_mcore.checkpoint.convert import convert_out  # noqa: E402
from ross_mcore.checkpoint.sharded import load_model_weights, sharding_metadata  # noqa: E402
from ross_mcore.data.conversation import expand_images  # noqa: E402
from ross_mcore.models import diffusion  # noqa: E402
from ross_mcore.models.diffusion import Draws  # noqa: E402
from ross_mcore.models.language import Execution  # noqa: E402
from ross_mcore.models.ross import RossModel  # noqa: E402
from ross_mcore.parallel import groups  # noqa: E402
from ross_mcore.parallel.layout import make_layout  # noqa: E402
from ross_mcore.training.optimizer import set_trainable  # noqa: E402
from tests.recorded import FAMILIES, GOLDEN, read_json, recorded_checkpoint, recorded_tensors  # noqa: E402

RELATIVE = 1e-5
"""fp32 sums in another order (SDPA against eager attention, grouped against separate projections): measured 2e-7 on
losses and 2e-6 of a tensor's largest gradient; the timestep embedder has a reason of its own, see test_denoiser.py."""


class Dictionary(dict):
    """A dict of tensors as a source of conversion."""

    def names(self) -> list[str]:
        return list(self)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self[name].shape)

    def read(self, name: str) -> Tensor:
        return self[name]


@pytest.fixture(scope="module", params=FAMILIES)
def recorded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    family = request.param
    checkpoint = recorded_checkpoint(family, Path(tmp_path_factory.mktemp(family)))
    config = checkpoint.model_config()
    platform.initialize_process_group(timeout_minutes=1)
    layout = make_layout(config, world_size=1, tensor_parallel=1, pipeline_parallel=1)
    model = RossModel(config, groups.initialize(layout, 1, 1), Execution())
    model.load_state_dict(load_model_weights(checkpoint, model.sharded_state_dict(metadata=sharding_metadata())))
    return model, recorded_tensors(family), read_json(GOLDEN / f"model_{family}" / "oracle.json")


def make_batch(model: RossModel, tensors: dict[str, Tensor], prefix: str) -> tuple[Batch, list[int], int]:
    """A recorded batch -> (ours, the rows that have a picture, number of rows)."""
    samples, pictured = [], []
    pixels = tensors.get(f"{prefix}images")
    for row, (ids, labels, mask) in enumerate(
        zip(*(tensors[prefix + name] for name in ("input_ids", "labels", "attention_mask")))
    ):
        kept = mask.bool()
        tokens, targets, starts = expand_images(
            ids[kept].tolist(), labels[kept].tolist(), model.model.vision.image_tokens
        )
        pictures = [] if not starts or pixels is None else [pixels[row]]
        pictured += [row] if starts else []
        samples.append(Sample(str(row), row, torch.from_numpy(tokens), torch.from_numpy(targets), starts, pictures))
    length = max(sample.tokens.numel() for sample in samples)
    return collate(samples, length, model.model.vision.image_size), pictured, len(samples)


def draws_of(tensors: dict[str, Tensor], prefix: str, rows: list[int]) -> Draws:
    """The recorded tape of some rows; the reference tiles its batch four times, draw after draw."""
    count = len(tensors[f"{prefix}tape.posterior_noise"])

    def by_image(tape: Tensor) -> Tensor:
        return tape.unflatten(0, (4, count)).transpose(0, 1)[rows]

    return Draws(
        tensors[f"{prefix}tape.posterior_noise"][rows],
        by_image(tensors[f"{prefix}tape.t"]),
        by_image(tensors[f"{prefix}tape.noise"]),
    )


def losses(
    model: RossModel, tensors: dict[str, Tensor], prefix: str, tape: str, longest: int | None = None
) -> tuple[Tensor, Tensor]:
    """(lm_loss, vm_loss) as the reference defines them: means over labels and over all rows, cut to `longest`."""
    batch, pictured, rows = make_batch(model, tensors, prefix)
    if longest is not None and longest < batch.tokens.shape[1]:
        batch.tokens, batch.labels = batch.tokens[:, :longest], batch.labels[:, :longest].clone()
        batch.labels[:, -1] = -100  # nothing follows the last token of a row that was cut
    lm_sum, vm_sum = model(batch, draws=draws_of(tensors, tape, pictured))
    blank_rows = [row for row in range(rows) if row not in pictured]
    if pictured and blank_rows:
        side, tokens = model.model.vision.image_size, model.model.vision.image_tokens
        draws = draws_of(tensors, tape, blank_rows)
        latents = model.pixel_decoder.encode(torch.zeros(len(blank_rows), 3, side, side), draws.posterior_noise)
        condition = torch.zeros(len(blank_rows), tokens, model.model.language.hidden_size)
        vm_sum = (
            vm_sum + diffusion.reconstruction_losses(model.denoiser, model.schedule, condition, latents, draws).sum()
        )
    labels = (batch.labels != -100).sum().clamp(min=1)
    return lm_sum / labels, vm_sum / rows


def gradients(model: RossModel) -> dict[str, Tensor]:
    """Gradients under the reference's names."""
    config = model.model
    named = model.sharded_state_dict(metadata=sharding_metadata())  # our checkpoint names
    table = (*mapping.ROSS, *mapping.PROJECTOR[config.projector.depth == 1])
    table += tuple(mapping.OUTPUT_MATRIX[config.language.tie_word_embeddings])
    ours = Dictionary()
    parameters = dict(model.named_parameters())
    for name, entry in named.items():
        if name in parameters and parameters[name].grad is not None:
            ours[getattr(entry, "key", name)] = parameters[name].grad
    return dict(convert_out(table, ours, config.language))


def test_hidden_states(recorded) -> None:
    model, tensors, _ = recorded
    batch, _, _ = make_batch(model, tensors, "in.")
    hidden = model(batch, output="hidden").transpose(0, 1)
    real = tensors["expanded_attention_mask"].bool()
    expected = tensors["last_hidden"][real]
    assert (hidden[real] - expected).abs().max() <= RELATIVE * expected.abs().max()


@pytest.mark.parametrize("stage", [1, 2])
def test_losses_and_every_gradient(recorded, stage: int) -> None:
    model, tensors, oracle = recorded
    set_trainable(model, "pretrain" if stage == 1 else "finetune", train_vision=False)
    model.zero_grad()
    lm_loss, vm_loss = losses(model, tensors, "in.", "")
    assert lm_loss.item() == pytest.approx(oracle["losses"]["lm"], rel=RELATIVE)
    assert vm_loss.item() == pytest.approx(oracle["losses"]["vm"], rel=RELATIVE)
    (lm_loss + vm_loss).backward()
    ours = gradients(model)
    assert set(ours) == set(oracle[f"trainable_stage{stage}"])
    for name, norm in oracle[f"grad_norms_stage{stage}"].items():
        tolerance = 1e-4 if "t_embedder.mlp.0" in name else RELATIVE
        assert float(ours[name].norm()) == pytest.approx(norm, rel=tolerance, abs=1e-9), name
    whole = [name for name in tensors if name.startswith(f"grad{stage}.")]
    assert whole
    for name in whole:
        expected = tensors[name]
        assert (ours[name.split(".", 1)[1]] - expected).abs().max() <= RELATIVE * expected.abs().max(), name


def test_each_loss_alone(recorded) -> None:
    model, tensors, oracle = recorded
    set_trainable(model, "finetune", train_vision=False)
    for which, key in ((0, "grad_norms_lm_only"), (1, "grad_norms_vm_loss")):
        model.zero_grad()
        losses(model, tensors, "in.", "")[which].backward()
        ours = gradients(model)
        for name, norm in oracle[key].items():
            tolerance = 1e-4 if "t_embedder.mlp.0" in name else RELATIVE
            assert float(ours[name].norm()) == pytest.approx(norm or 0.0, rel=tolerance, abs=1e-9), (key, name)


@pytest.mark.parametrize("case", ["image_only_batch", "text_only_batch", "truncated_text"])
def test_edge_cases(recorded, case: str) -> None:
    model, tensors, oracle = recorded
    expected = oracle["edge_cases"][case]
    set_trainable(model, "finetune", train_vision=False)
    model.zero_grad()
    lm_loss, vm_loss = losses(model, tensors, f"case.{case}.", f"case.{case}.", expected["seq"][1])
    assert lm_loss.item() == pytest.approx(expected["lm"], rel=RELATIVE)
    assert vm_loss.item() == pytest.approx(expected["vm"], rel=RELATIVE)
    (lm_loss + vm_loss).backward()
    ours = gradients(model)
    norm = torch.stack([gradient.norm() for gradient in ours.values()]).norm()
    assert norm.item() == pytest.approx(expected["grad_total"], rel=RELATIVE)


def test_nothing_supervised_is_zero_and_not_nan(recorded) -> None:
    """The reference's lm_loss is NaN here; ours is 0 with zero gradient, and vm_loss is unaffected."""
    model, tensors, oracle = recorded
    lm_loss, vm_loss = losses(model, tensors, "case.all_labels_ignored.", "case.all_labels_ignored.")
    assert lm_loss.item() == 0
    assert vm_loss.item() == pytest.approx(oracle["edge_cases"]["all_labels_ignored"]["vm"], rel=RELATIVE)
