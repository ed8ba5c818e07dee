"""Rows of the whole model, at any layout: features, states, losses, gradients, edge cases, generation, training curves.

Every rank runs everything; rows are made on all ranks from values that were brought together, and rank 0 prints them.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from ross_mcore import platform
from ross_mcore.architecture import ModelConfig, VisionConfig
from ross_mcore.batch import Sample
from ross_mcore.checkpoint.assembly import import_ross
from ross_mcore.checkpoint.convert import Row as TableRow
from ross_mcore.checkpoint.convert import convert_out, match
from ross_mcore.checkpoint.folder import Checkpoint
from ross_mcore.checkpoint.mapping import ross_table
from ross_mcore.checkpoint.safe_load import StoredTensors
from ross_mcore.checkpoint.sharded import save_checkpoint, sharding_metadata
from ross_mcore.config import Config, OptimizerOptions
from ross_mcore.data.conversation import ConversationError, cut_row, expand_images
from ross_mcore.data.loader import Step
from ross_mcore.models.diffusion import Draws
from ross_mcore.parallel import groups as process_groups
from ross_mcore.parallel.groups import Groups
from ross_mcore.parallel.layout import share_of
from ross_mcore.parity.components import SINUSOID_PARAMETER, SINUSOID_TOLERANCE
from ross_mcore.parity.golden import Golden, GoldenError, NotRecorded, Tensors, where_recorded
from ross_mcore.parity.rows import TOLERANCE, Row, compare, compare_exactly, compare_sets, instead
from ross_mcore.training.chunks import ModelChunks
from ross_mcore.training.optimizer import (
    apply_gradients,
    gradient_norm,
    learning_rate,
    set_hyperparameters,
    warmup_iterations,
)
from ross_mcore.training.start import build, place
from ross_mcore.training.step import Losses, StepSize, agree_on_step, combine_losses, run_schedule

T = TypeVar("T")
CURVE_TOLERANCE = 1e-4
"""Twenty steps of Adam: its update is the gradient's sign where gradients are as small as their rounding."""
SCHEDULE_TOLERANCE = 1e-12
"""The same cosine in float64, in another order of operations."""
ADAM_SHARE = 1e-2
"""A weight may end this share of the farthest that Adam can carry it (rate x steps) away, for the same reason."""
KEY_BIASES = ("attn.qkv.bias", "k_proj.bias")
"""A key's bias adds the same to all scores of a query, rotation aside, so its gradient is mostly rounding, of which
Adam makes full steps: ten times that share."""
ROUNDING = 1e-7
"""Of the largest norm beside it: a gradient this much smaller than its neighbours is their rounding (eps is 1.2e-7)."""
REFERENCE = {
    "loss_normalization": "microbatch",
    "vm_loss_rows": "all",
    "lr_decay_style": "constant",
    "lr_warmup_iters": 0,
    "clip_grad": 0.0,
    "weight_decay": 0.0,
}
"""The reference's arithmetic, in flags of this trainer."""


@dataclass(frozen=True)
class Layout:
    """What the flags of the tool say."""

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    sequence_parallel: bool = False


@dataclass
class Trial:
    """One recorded model, ready to train in one stage at one layout."""

    config: Config
    model_config: ModelConfig
    groups: Groups
    model: ModelChunks
    optimizer: MegatronOptimizer

    @property
    def device(self) -> torch.device:
        return platform.device()

    def size(self, rows: list[Sample]) -> StepSize:
        multiple = self.groups.layout.tensor_parallel if self.config.parallel.sequence_parallel else 1
        return agree_on_step(_as_step(rows), self.groups, multiple, self.device)

    def run(self, rows: list[Sample], **options: Any) -> list[Any]:
        """One micro-batch through mcore's schedule."""
        training = replace(self.config.training, micro_batch_size=len(rows), global_batch_size=len(rows))
        image_size = self.model_config.vision.image_size
        return run_schedule(
            self.model,
            _as_step(share_of_pixels(rows, self.groups)),
            self.size(rows),
            self.groups,
            training,
            image_size=image_size,
            device=self.device,
            **options,
        )

    def losses(self, rows: list[Sample], draws: Draws, scales: tuple[float, float] = (1.0, 1.0)) -> Losses:
        """Forward and backward with replayed draws; reduced gradients are left in the model."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        parts = self.run(rows, draws=[draws], scales=scales)
        return combine_losses(parts, self.groups, self.device)

    def hidden(self, rows: list[Sample]) -> Tensor | None:
        """States after the final norm [B, S, D] on the ranks of the last stage, None elsewhere."""
        with torch.no_grad():
            found = self.run(rows, output="hidden", forward_only=True)
        return found[0].view(len(rows), -1, found[0].shape[-1]) if self.groups.stage.is_last else None

    def logits(self, states: Tensor | None) -> Tensor | None:
        """States [N, D] -> logits [N, vocabulary] where they are, None elsewhere."""
        if states is None:
            return None
        with torch.no_grad():
            columns = self.model.last.language_model.logits(states)
            whole = tensor_parallel.gather_from_tensor_model_parallel_region(columns)
        return whole[:, : self.model_config.language.vocab_size]

    def everywhere(self, value: T | None) -> T:
        """What the first rank that has a value (not None) has, on every rank. Collective."""
        values: list[T | None] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
        return next(v for v in values if v is not None)

    def by_their_names(self, tensors: dict[str, Tensor]) -> Tensors:
        """Tensors of this rank, by parameter name -> whole ones of all ranks, under the reference's names. Collective.

        They take the way of a checkpoint: saved in pieces, read whole, converted out.
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


def _as_step(rows: list[Sample]) -> Step:
    """One micro-batch whose rows are one sample each."""
    return Step([], None, [[[sample] for sample in rows]], [], {})


class shared_folder:
    """A temporary folder that rank 0 makes and removes, and all ranks see. Collective."""

    def __enter__(self) -> Path:
        names = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(names, src=0)
        self._path = Path(str(names[0]))
        return self._path

    def __exit__(self, *_: object) -> None:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(self._path, ignore_errors=True)


def share_of_pixels(rows: list[Sample], groups: Groups) -> list[Sample]:
    """The rows with the pixels of this tensor-parallel rank's share of the pictures, as the loader gives them."""
    pictures = [(row, place) for row, sample in enumerate(rows) for place in range(len(sample.pixels))]
    mine = {pictures[index] for index in share_of(len(pictures), groups.tensor_rank, groups.tensor.size())}
    return [
        replace(sample, pixels=[p if (row, place) in mine else None for place, p in enumerate(sample.pixels)])
        for row, sample in enumerate(rows)
    ]


def import_model(golden: Golden, name: str, root: Path) -> Checkpoint:
    """The recorded checkpoint as ours. Its tokenizer is not recorded and not used: any of the folder's will do."""
    source = golden.folder / name / "hf_checkpoint"
    with tempfile.TemporaryDirectory() as none_recorded:
        (Path(none_recorded) / "tokenizer.json").write_text("{}", encoding="utf-8")
        tokenizers = [golden.folder / path for path in golden.names("data/tok_*")] + [Path(none_recorded)]
        return import_ross(root, source, tokenizer=tokenizers[0], base=golden.folder)


def prepare(checkpoint: Checkpoint, stage: str, layout: Layout, **flags: Any) -> Trial:
    """Builds the model at the layout for a training stage. Collective."""
    config = Config.from_flat(
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        sequence_parallel=layout.sequence_parallel,
        training_stage=stage,
        **(REFERENCE | flags),
    )
    model_config = checkpoint.model_config()
    groups = process_groups.initialize(place(config, model_config), config.training.seed, timeout_minutes=10)
    model, optimizer = build(config, model_config, groups, checkpoint)
    return Trial(config, model_config, groups, model, optimizer)


STAGES = {1: "pretrain", 2: "finetune"}


def recorded_rows(tensors: Tensors, prefix: str, vision: VisionConfig, max_length: int | None = None) -> list[Sample]:
    """A recorded batch as samples, cut to `max_length`; pictures that are not recorded are zero.

    Raises ConversationError when the cut goes through a picture.
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
    """The recorded tape of a batch, pictures first and then blank rows. The reference tiles it draw after draw."""
    noise = tensors[f"{prefix}posterior_noise"]
    order = sorted(range(len(rows)), key=lambda row: not rows[row].image_starts)

    def by_row(tape: Tensor) -> Tensor:
        return tape.unflatten(0, (len(tape) // len(noise), len(noise))).transpose(0, 1)[order]

    return Draws(noise[order], by_row(tensors[f"{prefix}t"]), by_row(tensors[f"{prefix}noise"]))


def model_rows(golden: Golden, layout: Layout) -> Iterator[Row]:
    """Every recorded model in turn. Collective."""
    for name in golden.models:
        with shared_folder() as folder:
            if dist.get_rank() == 0:
                import_model(golden, name, folder)
            dist.barrier()
            checkpoint = Checkpoint(folder / "iter_0000000", 0)
            yield from _oracle_rows(golden, name, checkpoint, layout)
            yield from _optimizer_rows(golden, name, checkpoint, layout)
            for stage in STAGES:
                if golden.has(f"{name}/train20_stage{stage}.json"):
                    curve = _curve_rows(golden, name, checkpoint, stage, layout)
                    yield from where_recorded("curves", f"{name} stage {stage}", curve)


def _oracle_rows(golden: Golden, name: str, checkpoint: Checkpoint, layout: Layout) -> Iterator[Row]:
    for file in ("oracle.json", "oracle.safetensors"):
        if not golden.has(f"{name}/{file}"):
            raise GoldenError(
                f"{golden.folder / name} has no {file}: there is nothing to compare this model with; record it, or "
                "remove the model"
            )
    tensors, _ = golden.tensors(f"{name}/oracle.safetensors")
    oracle = golden.json(f"{name}/oracle.json")
    yield from where_recorded("checkpoint", name, _checkpoint_rows(name, checkpoint, oracle))
    for stage in STAGES:
        trial = prepare(checkpoint, STAGES[stage], layout)
        title = f"{name} stage {stage}"
        yield from where_recorded("model", title, _stage_rows(title, trial, stage, tensors, oracle))
        if stage == 2:
            yield from where_recorded("gradient norms", name, _single_loss_rows(name, trial, tensors, oracle))
            yield from where_recorded("model", name, _state_rows(name, trial, tensors, oracle))
            for case in oracle.get("edge_cases", {}):
                title = f"{name} {case}"
                yield from where_recorded("edge cases", title, _edge_rows(title, case, trial, tensors, oracle))
            yield from where_recorded("generation", name, _generation_rows(name, trial, tensors))


def _recorded_batch(trial: Trial, tensors: Tensors) -> tuple[list[Sample], Draws]:
    rows = recorded_rows(tensors, "in.", trial.model_config.vision)
    return rows, replayed(tensors, "tape.", rows)


def _stage_rows(title: str, trial: Trial, stage: int, tensors: Tensors, oracle: dict[str, Any]) -> Iterator[Row]:
    """Losses, what trains, gradients of the recorded batch in one training stage."""
    losses = trial.losses(*_recorded_batch(trial, tensors))
    yield from _loss_rows("model", title, losses, oracle["losses" if stage == 2 else "losses_stage1"])
    gradients = trial.gradients()
    yield compare_sets("model", f"{title}: what trains", gradients, oracle[f"trainable_stage{stage}"], "parameters")
    yield from _gradient_rows(title, gradients, oracle[f"grad_norms_stage{stage}"])
    for key, whole in tensors.items():
        prefix, _, parameter = key.partition(".")
        if prefix == f"grad{stage}":
            tolerance = SINUSOID_TOLERANCE if SINUSOID_PARAMETER in parameter else TOLERANCE
            ours = gradients.get(parameter, math.nan * whole)
            yield compare("model", f"{title}: whole gradient of {parameter}", ours, whole, tolerance)


def _single_loss_rows(name: str, trial: Trial, tensors: Tensors, oracle: dict[str, Any]) -> Iterator[Row]:
    """Gradients of each of the two losses alone."""
    for scales, key in (((1.0, 0.0), "grad_norms_lm_only"), ((0.0, 1.0), "grad_norms_vm_loss")):
        trial.losses(*_recorded_batch(trial, tensors), scales)
        loss = key.removeprefix("grad_norms_").removesuffix("_only")
        yield from _gradient_rows(f"{name} {loss} alone", trial.gradients(), oracle[key])


def _loss_rows(family: str, title: str, losses: Losses, recorded: dict[str, float]) -> Iterator[Row]:
    for key, value in (("lm", losses.lm_loss), ("vm", losses.vm_loss), ("total", losses.loss)):
        if math.isnan(recorded[key]):
            yield instead(family, f"{title}: {key} loss", f"{value:.8g}", "NaN")
        else:
            yield compare(family, f"{title}: {key} loss", value, recorded[key])


def _gradient_rows(title: str, gradients: Tensors, norms: dict[str, float | None]) -> Iterator[Row]:
    largest = max((norm or 0.0 for norm in norms.values()), default=0.0)
    for parameter, norm in norms.items():
        tolerance = SINUSOID_TOLERANCE if SINUSOID_PARAMETER in parameter else TOLERANCE
        ours = gradients[parameter].norm().item() if parameter in gradients else math.nan
        yield compare("gradient norms", f"{title}: {parameter}", ours, norm or 0.0, tolerance, ROUNDING * largest)


def _checkpoint_rows(name: str, checkpoint: Checkpoint, oracle: dict[str, Any]) -> Iterator[Row]:
    """What the import kept: every recorded key, under its own name and shape again on the way out.

    But for constants, and for a tied model's output matrix, which repeats the embedding and is not saved.
    """
    model_config = checkpoint.model_config()
    table = ross_table(model_config)
    left = [row.name for row in table if not isinstance(row, TableRow)]
    recorded = {
        (key, tuple(shape))
        for key, shape in oracle["all_keys"].items()
        if not any(match(pattern, key) is not None for pattern in left)
    }
    exported = convert_out(table, StoredTensors(checkpoint.path), model_config.language)
    ours = {(key, tuple(tensor.shape)) for key, tensor in exported}
    yield compare_sets("checkpoint", f"{name}: names and shapes, in and out", ours, recorded, "tensors")
    lost = oracle.get("reload", {}).get("unexpected")
    if lost:
        text = f"keeps all {len(ours)} tensors"
        yield instead("checkpoint", f"{name}: loading a full checkpoint", text, f"drops {lost} tensors")


def _state_rows(name: str, trial: Trial, tensors: Tensors, oracle: dict[str, Any]) -> Iterator[Row]:
    """Features, expanded batch, hidden states, logits of the recorded batch."""
    rows, _ = _recorded_batch(trial, tensors)
    features = projected = None
    if trial.groups.stage.is_first:
        module = trial.model.first
        with torch.no_grad():
            features = module.vision_model(tensors["in.images"].to(trial.device))
            projected = module.vision_projection(features).cpu()
            features = features.cpu()
    yield compare("model", f"{name}: image features", trial.everywhere(features), tensors["image_features"])
    yield compare("model", f"{name}: projected features", trial.everywhere(projected), tensors["projected_features"])
    starts = [row.image_starts[0] if row.image_starts else None for row in rows]
    yield compare_exactly("model", f"{name}: where pictures begin", starts, oracle["boi_ids"], "rows")
    real = tensors["expanded_attention_mask"].bool()
    labels = torch.cat([row.labels for row in rows]).tolist()
    yield compare_exactly(
        "model", f"{name}: expanded labels", labels, tensors["expanded_labels"][real].tolist(), "labels"
    )
    states = trial.hidden(rows)
    if states is not None:
        states = states[:, : real.shape[1]][real.to(states.device)]
    logits = trial.logits(states)
    hidden = trial.everywhere(None if states is None else states.cpu())
    logits = trial.everywhere(None if logits is None else logits.cpu())
    yield compare("model", f"{name}: last hidden states", hidden, tensors["last_hidden"][real])
    first = int(real[0].sum())
    yield compare("model", f"{name}: logits of the first row", logits[:first], tensors["logits_sample0"][real[0]])
    best = logits.argmax(-1).tolist()
    yield compare_exactly("model", f"{name}: likeliest tokens", best, tensors["logits_argmax"][real].tolist(), "tokens")


def _edge_rows(title: str, case: str, trial: Trial, tensors: Tensors, oracle: dict[str, Any]) -> Iterator[Row]:
    """Text only, pictures only, cut rows, nothing supervised; and what the reference cannot do.

    A case without a batch of its own has the model's; where the reference raised, that is an example.
    """
    recorded, own = oracle["edge_cases"][case], f"case.{case}.input_ids" in tensors
    if not own and not {"error", "loss"} & recorded.keys():
        raise NotRecorded(f"oracle.safetensors records no case.{case}.input_ids")
    prefix, example = (f"case.{case}.", "") if own else ("in.", "on the model's first batch: ")
    try:
        limit = recorded.get("tokenizer_model_max_length")
        rows = recorded_rows(tensors, prefix, trial.model_config.vision, limit)
    except ConversationError as error:
        yield instead("edge cases", title, f"{example}the sample is skipped: {error}", recorded.get("error", "-"))
        return
    if "error" in recorded:
        longest = max(row.tokens.numel() for row in rows)
        yield instead("edge cases", title, f"{example}trains on {longest} tokens", recorded["error"])
        return
    losses = trial.losses(rows, replayed(tensors, prefix + "tape." if own else "tape.", rows))
    if "grad_total" not in recorded:
        yield compare("edge cases", f"{title}: lm loss", losses.lm_loss, recorded["lm_loss"])
        return
    yield from _loss_rows("edge cases", title, losses, recorded)
    gradients = trial.gradients()
    norms = {key: gradient.norm() for key, gradient in gradients.items()}
    total = torch.stack([*norms.values()]).norm()
    yield compare("edge cases", f"{title}: gradient norm", total, recorded["grad_total"])
    denoiser = torch.stack([norm for key, norm in norms.items() if ".mm_inv_projector." in key]).sum()
    yield compare(
        "edge cases", f"{title}: sum of the denoiser's gradient norms", denoiser, recorded["inv_grad_norm_sum"]
    )
    projector = next(norms[key] for key in sorted(norms) if ".mm_projector." in key and key.endswith("weight"))
    yield compare("edge cases", f"{title}: gradient norm of the projector", projector, recorded["proj_grad_norm"])


def _generation_rows(name: str, trial: Trial, tensors: Tensors) -> Iterator[Row]:
    """Greedy generation from a picture and from text."""
    for prefix in sorted({key.split(".")[0] for key in tensors if key.endswith(".prompt_ids")}):
        ids = tensors[f"{prefix}.prompt_ids"][0].tolist()
        tokens, labels, starts = expand_images(ids, [-100] * len(ids), trial.model_config.vision.image_tokens)
        pictures: list[Tensor | None] = [tensors[f"{prefix}.image"][0]] if starts else []
        row = Sample("", 0, torch.from_numpy(tokens), torch.from_numpy(labels), starts, pictures)
        wanted = tensors[f"{prefix}.tokens"][0].tolist()
        chosen, scores = [], []
        for _ in wanted:
            states = trial.hidden([row])
            found = trial.logits(None if states is None else states[:, row.tokens.numel() - 1])
            scores.append(trial.everywhere(None if found is None else found[0].cpu()))
            chosen.append(int(scores[-1].argmax()))
            grown = torch.cat([row.tokens, torch.tensor(chosen[-1:])])
            row = replace(row, tokens=grown, labels=torch.full_like(grown, -100))
        yield compare_exactly("generation", f"{name} {prefix}: tokens", chosen, wanted, "tokens")
        if f"{prefix}.scores" in tensors:
            yield compare("generation", f"{name} {prefix}: scores", torch.stack(scores), tensors[f"{prefix}.scores"][0])


def _optimizer_rows(golden: Golden, name: str, checkpoint: Checkpoint, layout: Layout) -> Iterator[Row]:
    """Every parameter's learning rate, weight decay, betas and eps, in each recorded setting of this family."""
    if not golden.has("data/optimizer_groups.json"):
        return
    family = checkpoint.model_config().language.model_type
    for case, groups in golden.json("data/optimizer_groups.json").items():
        kind, stage, *options = case.split("|")
        if kind != family:
            continue
        settings = dict(option.split("=") for option in options)
        denoiser_lr = None if settings.get("inv_lr", "None") == "None" else float(settings["inv_lr"])
        theirs = {
            (key, group["lr"], group["wd"], *group["betas"], group["eps"]) for group in groups for key in group["names"]
        }
        peak = max(group["lr"] for group in groups)
        trial = prepare(
            checkpoint,
            STAGES[int(stage.removeprefix("stage"))],
            layout,
            lr=peak,
            denoiser_lr=denoiser_lr,
            weight_decay=max(group["wd"] for group in groups),
            decay_norm_weights=family == "qwen2",
        )
        set_hyperparameters(trial.optimizer, 0, 1, trial.config.optimizer)
        yield compare_sets("optimizer groups", f"{name} {case}", _optimizer_settings(trial), theirs, "parameters")


def _optimizer_settings(trial: Trial) -> set[tuple[Any, ...]]:
    """(their name, rate, decay, betas, eps) of every trained parameter of all stages. Collective."""
    group_of = {id(p): group for group in trial.optimizer.param_groups for p in group["params"]}
    marked, settings = {}, []
    for key, parameter in trial.model.first.named_parameters():
        if parameter.requires_grad:
            group = group_of[id(parameter)]
            settings.append((group["lr"], group["weight_decay"], *group["betas"], group["eps"]))
            marked[key] = torch.full_like(parameter, float(len(settings) - 1))
    # the settings travel as numbers: the tensors that carry them are split and renamed as the parameters are
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, settings)
    table = sorted({setting for own in everyone for setting in own})
    coded = {key: value.fill_(float(table.index(settings[int(value.flatten()[0])]))) for key, value in marked.items()}
    found = trial.by_their_names(coded)
    return {(key, *table[int(value.flatten()[0])]) for key, value in found.items()}


def schedule_rows(golden: Golden) -> Iterator[Row]:
    """The learning rate of every step of the recorded schedules, for both recorded groups."""
    if not golden.has("data/lr_schedule.json"):
        return
    for case in golden.json("data/lr_schedule.json", list):
        steps = case["total_steps"]
        options = OptimizerOptions(lr=case["base"])
        yield compare_exactly(
            "learning rate",
            f"{steps} steps: warm-up",
            [warmup_iterations(options, steps)],
            [case["warmup"]],
            "iterations",
        )
        for column, peak in enumerate((case["base"], case["second_group"])):
            recorded = [rates[column] for rates in case["lr_used_at_step"]]
            ours = [learning_rate(step, steps, options, peak) for step in range(len(recorded))]
            title = f"{steps} steps: rates with peak {peak:g}"
            yield compare("learning rate", title, ours, recorded, SCHEDULE_TOLERANCE)


def _curve_rows(golden: Golden, name: str, checkpoint: Checkpoint, stage: int, layout: Layout) -> Iterator[Row]:
    """Twenty training steps of this trainer's own step on the recorded batches and draws."""
    curve = golden.json(f"{name}/train20_stage{stage}.json")
    tensors, _ = golden.tensors(f"{name}/train20.safetensors")
    trial = prepare(checkpoint, STAGES[stage], layout, lr=curve["lr"])
    for step, number in enumerate(curve["batch_index"]):
        rows = recorded_rows(tensors, f"batch{number}.", trial.model_config.vision)
        set_hyperparameters(trial.optimizer, step, len(curve["batch_index"]), trial.config.optimizer)
        losses = trial.losses(rows, replayed(tensors, f"step{step:02d}.", rows))
        norm = gradient_norm(trial.optimizer)
        apply_gradients(trial.optimizer, norm, trial.config.optimizer.clip_grad)
        ours = {"lm": losses.lm_loss, "vm": losses.vm_loss, "total": losses.loss, "grad_norm": norm}
        for key, value in ours.items():
            title = f"{name} stage {stage} step {step + 1}: {key}"
            yield compare("curves", title, value, curve[key][step], CURVE_TOLERANCE)
    final, floor = trial.parameters(), ADAM_SHARE * curve["lr"] * len(curve["batch_index"])
    for key, norm in curve.get("final_param_norms", {}).items():
        allowed = floor * (10 if key.endswith(KEY_BIASES) else 1)
        title = f"{name} stage {stage} after the last step: norm of {key}"
        ours = final[key].norm().item() if key in final else math.nan
        yield compare("trained weights", title, ours, norm, CURVE_TOLERANCE, allowed)
    for key, value in tensors.items():
        if key.startswith("final.") and stage == 2:
            key = key.removeprefix("final.")
            ours = final.get(key, math.nan * value)
            yield compare("trained weights", f"{name} after the last step: {key}", ours, value, CURVE_TOLERANCE, floor)
