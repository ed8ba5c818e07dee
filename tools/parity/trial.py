"""A recorded model built for training at any layout, and recorded batches as its input. Collective throughout."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from parity.golden import Golden, Tensors
from ross_mcore.architecture import ModelConfig, VisionConfig
from ross_mcore.batch import Draws, Sample
from ross_mcore.checkpoint.folder import Checkpoint
from ross_mcore.checkpoint.safe_load import StoredTensors
from ross_mcore.checkpoint.sharded import save_checkpoint
from ross_mcore.checkpoint.torch_dist import sharding_metadata
from ross_mcore.config import Config
from ross_mcore.conversion.assembly import import_ross
from ross_mcore.conversion.mapping import ross_table
from ross_mcore.conversion.table import convert_out
from ross_mcore.data.conversation import cut_row, expand_images
from ross_mcore.data.loader import Step
from ross_mcore.engine.chunks import ModelChunks
from ross_mcore.engine.engine import Engine, Randomness, Trained
from ross_mcore.engine.losses import Losses
from ross_mcore.engine.setup import Span, build_engine
from ross_mcore.engine.step import AgreedStep
from ross_mcore.parallel import groups as process_groups
from ross_mcore.parallel.collectives import from_first_rank, gather
from ross_mcore.parallel.groups import Groups
from ross_mcore.parallel.layout import share_of
from ross_mcore.training.start import place

T = TypeVar("T")
REFERENCE = {
    "loss_normalization": "microbatch",
    "vm_loss_rows": "all",
    "lr_decay_style": "constant",
    "lr_warmup_iters": 0,
    "clip_grad": 0.0,
    "weight_decay": 0.0,
    "denoiser_precision": "fp32",
    "vae_precision": "fp32",
}
"""Options of this trainer that give the reference's arithmetic."""
STAGES = {1: "pretrain", 2: "finetune"}
"""Training stages of the reference, by the names of this trainer."""


@dataclass(frozen=True)
class Layout:
    """The layout given by the flags of the tool."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    sequence_parallel: bool = False


@dataclass(frozen=True)
class Trial:
    """One recorded model in one training stage at one layout."""

    engine: Engine

    @property
    def model_config(self) -> ModelConfig:
        return self.engine.model_config

    @property
    def groups(self) -> Groups:
        return self.engine.groups

    @property
    def model(self) -> ModelChunks:
        return self.engine.model

    def step(self, rows: list[Sample]) -> AgreedStep:
        """One micro-batch whose rows are one sample each."""
        shares = share_of_pixels(rows, self.groups)
        return self.engine.agree(Step([], None, [[[sample] for sample in shares]], [], {}))

    def losses(self, rows: list[Sample], draws: Draws, scales: tuple[float, float] = (1.0, 1.0)) -> Losses:
        """Forward and backward with replayed draws; reduced gradients are left in the model."""
        objective = replace(self.engine.objective, lm_scale=scales[0], vm_scale=scales[1])
        return self.engine.gradients(self.step(rows), objective, Randomness([draws])).losses

    def train(self, rows: list[Sample], draws: Draws, iteration: int) -> Trained:
        """One optimizer step with replayed draws."""
        return self.engine.train(self.step(rows), iteration, Randomness([draws]))

    def hidden(self, rows: list[Sample]) -> Tensor | None:
        """States after the final norm [B, S, D] on the ranks of the last stage, None elsewhere."""
        found = self.engine.hidden(self.step(rows))
        return found[0].view(len(rows), -1, found[0].shape[-1]) if self.groups.stage.is_last else None

    def logits(self, states: Tensor | None) -> Tensor | None:
        """States [N, D] -> logits [N, vocabulary]; None on ranks that have no states."""
        if states is None:
            return None
        with torch.no_grad():
            columns = self.model.last.language_model.logits(states)
            whole = tensor_parallel.gather_from_tensor_model_parallel_region(columns)
        return whole[:, : self.model_config.language.vocab_size]

    def everywhere(self, value: T | None) -> T:
        """The value of the first rank where it is not None, on every rank. Collective."""
        return next(found for found in gather(value) if found is not None)

    def by_their_names(self, tensors: dict[str, Tensor]) -> Tensors:
        """This rank's pieces by parameter name -> whole tensors under the reference's names. Collective.

        They go through a checkpoint: saved in pieces, read whole, converted out.
        """
        state = self.model.first.sharded_state_dict(metadata=sharding_metadata())
        for name in list(state):
            if name in tensors:
                state[name].data = tensors[name]
            else:
                del state[name]
        with shared_folder() as folder:
            checkpoint = save_checkpoint(folder, 0, {"model": state}, self.model_config)
            found = dict(
                convert_out(ross_table(self.model_config), StoredTensors(checkpoint.path), self.model_config.language)
            )
            dist.barrier()
        return found

    def gradients(self) -> Tensors:
        """Reduced gradients of every trained parameter, whole. Collective."""
        named = self.model.first.named_parameters()
        return self.by_their_names({name: p.main_grad.clone() for name, p in named if p.requires_grad})

    def parameters(self) -> Tensors:
        return self.by_their_names({name: p.detach().clone() for name, p in self.model.first.named_parameters()})


class shared_folder:
    """A temporary folder that rank 0 makes and removes, and all ranks use. Collective."""

    def __enter__(self) -> Path:
        self._path = Path(from_first_rank(tempfile.mkdtemp))
        return self._path

    def __exit__(self, *_: object) -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(self._path, ignore_errors=True)


def share_of_pixels(rows: list[Sample], groups: Groups, turn: int = 0) -> list[Sample]:
    """The rows with only this tensor-parallel rank's share of the pictures' pixels, as the loader gives them."""
    pictures = [(row, place) for row, sample in enumerate(rows) for place in range(len(sample.pixels))]
    share = share_of(len(pictures), groups.tensor_rank, groups.tensor.size(), turn)
    mine = {pictures[index] for index in share}
    return [
        replace(sample, pixels=[p if (row, place) in mine else None for place, p in enumerate(sample.pixels)])
        for row, sample in enumerate(rows)
    ]


def import_model(golden: Golden, name: str, root: Path) -> Checkpoint:
    """Converts the recorded checkpoint. Its tokenizer is neither recorded nor used: one of a single word serves."""
    source = golden.folder / name / "hf_checkpoint"
    with tempfile.TemporaryDirectory() as tokenizer:
        Tokenizer(WordLevel({"<unk>": 0}, "<unk>")).save(f"{tokenizer}/tokenizer.json")
        (Path(tokenizer) / "tokenizer_config.json").write_text('{"unk_token": "<unk>"}', encoding="utf-8")
        return import_ross(root, source, tokenizer=Path(tokenizer), base=golden.folder)


def configuration(layout: Layout, stage: str, **flags: Any) -> Config:
    """The reference's arithmetic at the layout, for a training stage."""
    return Config.from_flat(
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        sequence_parallel=layout.sequence_parallel,
        training_stage=stage,
        **(REFERENCE | flags),
    )


def prepare(checkpoint: Checkpoint, stage: str, layout: Layout, *, train_iters: int = 1, **flags: Any) -> Trial:
    """Builds the model at the layout for a training stage. Collective. Raises LayoutError where it does not fit."""
    config = configuration(layout, stage, **flags)
    model_config = checkpoint.model_config()
    groups = process_groups.initialize(place(config, model_config), config.training.seed, timeout_minutes=10)
    engine = build_engine(config, model_config, groups, checkpoint, Span(train_iters))
    # recorded states have no padding beyond the longest row
    multiple = layout.tensor_parallel if layout.sequence_parallel else 1
    return Trial(replace(engine, row_multiple=multiple))


def recorded_rows(tensors: Tensors, prefix: str, vision: VisionConfig, max_length: int | None = None) -> list[Sample]:
    """A recorded batch as samples, cut to `max_length` tokens; pictures that are not recorded are zero.

    Raises ConversationError where the cut goes through a picture.
    """
    samples = []
    blank = torch.zeros(3, vision.image_size, vision.image_size)
    batch = zip(*(tensors[prefix + name] for name in ("input_ids", "labels", "attention_mask")))
    for row, (ids, labels, mask) in enumerate(batch):
        kept = mask.bool()
        tokens, targets, starts = expand_images(ids[kept].tolist(), labels[kept].tolist(), vision.image_tokens)
        if max_length is not None:
            tokens, targets, starts = cut_row(tokens, targets, starts, vision.image_tokens, max_length)
        picture = tensors[f"{prefix}images"][row] if f"{prefix}images" in tensors else blank
        pictures: list[Tensor | None] = [picture for _ in starts]
        samples.append(Sample(str(row), row, torch.from_numpy(tokens), torch.from_numpy(targets), starts, pictures))
    return samples


def replayed(tensors: Tensors, prefix: str, rows: list[Sample]) -> Draws:
    """The recorded draws of a batch, rows with pictures first. The reference stores them draw after draw."""
    noise = tensors[f"{prefix}posterior_noise"]
    order = sorted(range(len(rows)), key=lambda row: not rows[row].image_starts)

    def by_row(tape: Tensor) -> Tensor:
        return tape.unflatten(0, (len(tape) // len(noise), len(noise))).transpose(0, 1)[order]

    return Draws(noise[order], by_row(tensors[f"{prefix}t"]), by_row(tensors[f"{prefix}noise"]))
