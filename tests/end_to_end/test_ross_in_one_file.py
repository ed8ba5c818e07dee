"""examples/ross_in_one_file.py and the trainer: the same weights, samples and draws, ten steps of each stage.

Legend: B rows of L tokens, I images of N tokens each.
"""

from __future__ import annotations

import ast
import itertools
import json
import math
import shutil
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from parity.golden import Golden
from parity.trial import Layout, Trial, prepare, recorded_rows
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from examples import ross_in_one_file as one_file
from examples.demo.scenes import caption_records, chat_records, draw_scene, sample_training_scenes
from ross_mcore.batch import Draws, Sample, normalised_pixels, pixel_table
from ross_mcore.checkpoint.folder import Checkpoint, require_checkpoint
from ross_mcore.commands import convert, export
from ross_mcore.data.sample import ShardDataset
from ross_mcore.data.shard_reader import ShardReader
from ross_mcore.data.spec import SampleSpec
from ross_mcore.data.tokenizer import load_tokenizer
from ross_mcore.models.diffusion import Schedule
from ross_mcore.shards.llava import convert_records
from ross_mcore.shards.measure import Measure
from ross_mcore.shards.writer import ShardWriter
from tests.recorded import FAMILIES, GOLDEN, recorded_checkpoint

FILE = Path(one_file.__file__)
DEMO_WEIGHTS = FILE.parent / "demo" / "weights"
DEMO_TEMPLATES = {"pretrain": "plain", "finetune": "qwen_2"}
STEPS, WARMUP_STEPS, BATCHES, BATCH_SIZE, WEIGHT_DECAY = 10, 2, 3, 3, 0.1

TOLERANCE = 1e-5
"""For losses, relative; for the difference of a weight (L2 norm), relative to its movement in training."""
STORED = 2**-24 * math.sqrt(STEPS)
"""Relative rounding of float32, the dtype of a weight after every step; the steps add up as independent errors."""
KEY_BIAS_TOLERANCE = 1e-4
"""For a key's bias, relative to its largest movement under Adam (rate x steps). It adds an equal amount to all scores
of a query, except for rotation, so its gradient is mostly rounding."""
ADAM_EPSILON = 1e-6
"""On both sides, instead of 1e-8: above the rounding of gradients. Adam makes full steps from a gradient that is only
rounding, for example that of the embedding of a word with almost no effect on the losses."""
PREFIXES = {
    "language_model.": "",
    "tower.": "model.vision_tower.vision_tower.vision_model.",
    "vae.": "model.pixel_decoder.pixel_decoder.",
    "projector.": "model.mm_projector.",
    "denoiser.": "model.mm_inv_projector.net.",
}
"""Names of weights in the file -> in a ROSS checkpoint."""


@dataclass(frozen=True)
class Model:
    """One model in two forms: the trainer's checkpoint, and the folder that the file's `Ross` reads."""

    name: str
    checkpoint: Checkpoint
    parts: Path

    def ross(self) -> one_file.Ross:
        """The file's model with the checkpoint's projector and denoiser."""
        state = {}
        for adapter in ("mm_projector.bin", "mm_inv_projector.bin"):
            state |= torch.load(self.parts / adapter, weights_only=True)
        ross = one_file.Ross(self.parts, state["model.mm_inv_projector.net.pos_embed"].shape[2])
        for name in ("projector", "denoiser"):
            prefix = PREFIXES[f"{name}."]
            part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            getattr(ross, name).load_state_dict(part)
        return ross


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the demo's records and pictures."""
    folder = tmp_path_factory.mktemp("scenes")
    drawn = sample_training_scenes(BATCHES * BATCH_SIZE, "one file")
    records = {"pretrain": caption_records(drawn, "train"), "finetune": chat_records(drawn, "train", "one file", 4)}
    for stage, made in records.items():
        (folder / f"{stage}.json").write_text(json.dumps(made), encoding="utf-8")
    (folder / "images" / "train").mkdir(parents=True)
    for scene, record in zip(drawn, records["pretrain"], strict=True):
        draw_scene(scene).save(folder / record["image"])
    return folder


@pytest.fixture(scope="module", params=["demo", *FAMILIES])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The demo's model and the recorded ones, converted and exported by the project's tools."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "demo":
        parts = ("language_model", "vision_model", "pixel_decoder", "tokenizer")
        given = [word for part in parts for word in (f"--{part.replace('_', '-')}", str(DEMO_WEIGHTS / part))]
        assert convert.main([*given, "--denoiser-width", "96", "--save", str(folder / "checkpoint")]) == 0
    else:
        recorded_checkpoint(request.param, folder / "checkpoint")
    out = folder / "parts"
    assert export.main(["--load", str(folder / "checkpoint"), "--save", str(out), "--format", "hf"]) == 0
    next(out.glob("*_vision_tower")).rename(out / "vision_model")
    shutil.copytree(out / "language_model", out / "tokenizer")
    return Model(request.param, require_checkpoint(folder / "checkpoint"), out)


def scene_samples(model: Model, scenes: Path, stage: str, shards: Path) -> list[Sample]:
    """The demo's records as the trainer reads them from shards."""
    tokenizer, spec = load_tokenizer(model.checkpoint.tokenizer), SampleSpec(DEMO_TEMPLATES[stage], "square", 256)
    with ShardWriter(shards) as writer:
        convert_records(json.loads((scenes / f"{stage}.json").read_text()), scenes, writer, Measure(tokenizer, spec))
    data = ShardDataset(ShardReader(shards), tokenizer, model.checkpoint.model_config(), spec)
    samples = [data.get(number, position=number) for number in range(len(data))]
    assert not any(data.decode(sample, sample.position, range(1)) for sample in samples)
    return samples


def with_images(sample: Sample, image_tokens: int) -> Tensor:
    """The sample's tokens [L] with the file's IMAGE at the places of its pictures."""
    tokens = sample.tokens.clone()
    for start in sample.image_starts:
        tokens[start : start + image_tokens] = one_file.IMAGE
    return tokens


def as_arguments(rows: list[Sample], draws: Draws, trial: Trial) -> tuple[Tensor, ...]:
    """A batch as `Ross.forward` takes it."""
    vision = trial.model_config.vision
    columns = [with_images(row, vision.image_tokens) for row in rows], [row.labels for row in rows]
    text = [pad_sequence(column, batch_first=True, padding_value=one_file.IGNORE) for column in columns]
    levels = torch.stack([picture for row in rows for picture in row.pixels if picture is not None])
    pixels = normalised_pixels(levels, pixel_table(vision.image_mean, vision.image_std))
    return *text, pixels, draws.posterior_noise, draws.timesteps, draws.noise


def draw(rows: list[Sample], trial: Trial, generator: torch.Generator) -> Draws:
    """Random draws for the rows' images."""
    images = sum(len(row.image_starts) for row in rows)
    channels, side, _ = trial.model_config.latent_shape
    grid = side // 2
    posterior_noise = torch.randn(images, channels, side, side, generator=generator)
    timesteps = torch.randint(one_file.TIMESTEPS, (images, one_file.DRAWS), generator=generator)
    noise = torch.randn(images, one_file.DRAWS, 4 * channels, grid, grid, generator=generator)
    return Draws(posterior_noise, timesteps, noise)


def weights_of(ross: one_file.Ross) -> dict[str, Tensor]:
    """Copies of the file's weights by their names in a ROSS checkpoint."""
    found = {}
    for name, weight in ross.state_dict().items():
        prefix = next(prefix for prefix in PREFIXES if name.startswith(prefix))
        found[PREFIXES[prefix] + name.removeprefix(prefix)] = weight.clone()
    return found


def in_pieces(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights, with separate biases of the denoiser's queries, keys and values."""
    pieces = {}
    for name, weight in weights.items():
        if name.endswith("attn.qkv.bias"):
            pieces |= {name.replace("qkv", f"{kind}_proj"): bias for kind, bias in zip("qkv", weight.chunk(3))}
        else:
            pieces[name] = weight
    return pieces


@pytest.mark.parametrize("stage", one_file.STAGES)
def test_trains_as_the_trainer_does(
    model: Model, stage: str, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process_group: None
) -> None:
    _, _, rates = one_file.STAGES[stage]
    monkeypatch.setitem(one_file.STAGES, stage, (STEPS, WARMUP_STEPS, rates))
    monkeypatch.setattr(torch.optim, "AdamW", partial(torch.optim.AdamW, eps=ADAM_EPSILON))
    ross = model.ross()
    trial = prepare(
        model.checkpoint,
        stage,
        Layout(),
        train_iters=STEPS,
        loss_normalization="global",
        vm_loss_rows="images",
        lr=rates.get("language_model", 0.0),
        projector_lr=rates["projector"],
        denoiser_lr=rates["denoiser"],
        lr_decay_style="cosine",
        lr_warmup_iters=WARMUP_STEPS,
        adam_beta2=0.95,
        adam_eps=ADAM_EPSILON,
        clip_grad=1.0,
        weight_decay=WEIGHT_DECAY,
    )
    if model.name == "demo":
        samples = scene_samples(model, scenes, stage, tmp_path / "shards")
        batches = [samples[start : start + BATCH_SIZE] for start in range(0, len(samples), BATCH_SIZE)]
    else:  # some rows have no picture
        tensors, _ = Golden(GOLDEN).tensors(f"model_{model.name}/train20.safetensors")
        batches = [recorded_rows(tensors, f"batch{n}.", trial.model_config.vision) for n in range(BATCHES)]
    generator = torch.Generator().manual_seed(1)
    rows_of_steps = itertools.islice(itertools.cycle(batches), STEPS)
    steps = [(rows, draw(rows, trial, generator)) for rows in rows_of_steps]

    before = weights_of(ross)
    theirs = trial.parameters()
    assert all(torch.equal(before[name], theirs[name]) for name in before)

    trained = [trial.train(*step, iteration).losses for iteration, step in enumerate(steps)]
    found = list(one_file.train(ross, stage, [as_arguments(*step, trial) for step in steps], WEIGHT_DECAY))
    expected = torch.tensor([(losses.lm_loss, losses.vm_loss) for losses in trained])
    torch.testing.assert_close(torch.tensor(found), expected, rtol=TOLERANCE, atol=0)

    start, ours, theirs = in_pieces(before), in_pieces(weights_of(ross)), in_pieces(trial.parameters())
    moved = {name for name in start if not torch.equal(start[name], theirs[name])}
    assert moved == {name for name in start if not torch.equal(start[name], ours[name])}
    for name in moved:
        difference, change = ours[name] - theirs[name], theirs[name] - start[name]
        if name.endswith("k_proj.bias"):
            assert difference.abs().max() <= KEY_BIAS_TOLERANCE * max(rates.values()) * STEPS, name
        else:
            assert difference.norm() <= TOLERANCE * change.norm() + STORED * theirs[name].norm(), name


@pytest.mark.parametrize("stage", one_file.STAGES)
@pytest.mark.parametrize("model", ["demo"], indirect=True)
def test_reads_what_the_trainer_reads(model: Model, stage: str, scenes: Path, tmp_path: Path) -> None:
    vision = model.checkpoint.model_config().vision
    ross = one_file.Ross(DEMO_WEIGHTS, denoiser_width=96)
    records = json.loads((scenes / f"{stage}.json").read_text())
    for record, sample in zip(records, scene_samples(model, scenes, stage, tmp_path), strict=True):
        tokens, labels, pixels = one_file.read(record, scenes, stage, ross)
        assert torch.equal(tokens, with_images(sample, vision.image_tokens))
        assert torch.equal(labels, sample.labels) and sample.label_tokens > 0
        assert sample.pixels[0] is not None
        expected = normalised_pixels(sample.pixels[0], pixel_table(vision.image_mean, vision.image_std))
        torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("model", ["demo"], indirect=True)
def test_a_new_denoiser_is_like_the_trainers(model: Model) -> None:
    """Equal noise schedule and table of positions, weights with the same standard deviation."""
    new, converted = one_file.Ross(model.parts, denoiser_width=96), model.ross().denoiser.state_dict()
    torch.testing.assert_close(new.signal, Schedule.cosine().alphas_cumprod, rtol=1e-9, atol=0)
    fresh = new.denoiser.state_dict()
    torch.testing.assert_close(fresh["pos_embed"], converted["pos_embed"], rtol=0, atol=1e-6)
    for name, weight in converted.items():
        torch.testing.assert_close(fresh[name].std(), weight.std(), rtol=0.1, atol=0)


def test_main_prints_losses(scenes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for stage, (_, _, rates) in list(one_file.STAGES.items()):
        monkeypatch.setitem(one_file.STAGES, stage, (2, 1, rates))
    monkeypatch.setattr(sys, "argv", [FILE.name, "--data", str(scenes)])
    one_file.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["pretrain   1 of 2", "finetune   1 of 2"]
    assert all("lm_loss" in line and "vm_loss" in line for line in lines)


def test_it_is_short_and_self_contained() -> None:
    text = FILE.read_text(encoding="utf-8")
    assert len(text.splitlines()) < 200
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert imported - set(sys.stdlib_module_names) == {"torch", "transformers", "diffusers", "PIL"}
