"""Rows of whole models, at any layout: features, states, losses, gradients, edge cases, generation, training.

All ranks make all rows, from gathered values; the tool prints those of rank 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parity.components import SINUSOID_PARAMETER, SINUSOID_TOLERANCE
from parity.golden import Golden, GoldenError, NotRecorded, Tensors, where_recorded
from parity.rows import TOLERANCE, Row, compare, compare_exactly, compare_sets, instead, not_comparable
from parity.training import curve_rows, optimizer_rows
from parity.trial import (
    STAGES,
    Layout,
    Trial,
    configuration,
    import_model,
    prepare,
    recorded_rows,
    replayed,
    shared_folder,
)
from ross_mcore.batch import Draws, Sample
from ross_mcore.checkpoint.folder import Checkpoint
from ross_mcore.checkpoint.safe_load import StoredTensors
from ross_mcore.conversion.mapping import ross_table
from ross_mcore.conversion.table import Entry, convert_out, match
from ross_mcore.data.conversation import expand_images
from ross_mcore.engine.losses import Losses
from ross_mcore.errors import ConversationError, LayoutError
from ross_mcore.training.start import place

ROUNDING = 1e-7
"""Relative to the largest norm of the same step: a smaller gradient is rounding (eps is 1.2e-7)."""


def model_rows(golden: Golden, layout: Layout) -> Iterator[Row]:
    """Rows of each recorded model. A model that the layout cannot host gives one row with the reason. Collective."""
    for name in golden.models:
        with shared_folder() as folder:
            if dist.get_rank() == 0:
                import_model(golden, name, folder)
            dist.barrier()
            checkpoint = Checkpoint(folder / "iter_0000000", 0)
            try:
                place(configuration(layout, STAGES[1]), checkpoint.model_config())
            except LayoutError as error:
                yield not_comparable("model", name, str(error))
                continue
            yield from _oracle_rows(golden, name, checkpoint, layout)
            yield from optimizer_rows(golden, name, checkpoint, layout)
            for stage in STAGES:
                if golden.has(f"{name}/train20_stage{stage}.json"):
                    curve = curve_rows(golden, name, checkpoint, stage, layout)
                    yield from where_recorded("curves", f"{name} stage {stage}", curve)


def _oracle_rows(golden: Golden, name: str, checkpoint: Checkpoint, layout: Layout) -> Iterator[Row]:
    for file in ("oracle.json", "oracle.safetensors"):
        if not golden.has(f"{name}/{file}"):
            raise GoldenError(
                f"{golden.folder / name} has no {file}, so this model has no recorded values; record it, or remove "
                "the model"
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
            tolerance = _gradient_tolerance(parameter)
            ours = gradients.get(parameter, math.nan * whole)
            yield compare("model", f"{title}: whole gradient of {parameter}", ours, whole, tolerance)


def _single_loss_rows(name: str, trial: Trial, tensors: Tensors, oracle: dict[str, Any]) -> Iterator[Row]:
    """Gradients of each of the two losses alone."""
    for scales, key in (((1.0, 0.0), "grad_norms_lm_only"), ((0.0, 1.0), "grad_norms_vm_loss")):
        trial.losses(*_recorded_batch(trial, tensors), scales)
        loss = key.removeprefix("grad_norms_").removesuffix("_only")
        yield from _gradient_rows(f"{name} {loss} alone", trial.gradients(), oracle[key])


def _loss_rows(family: str, title: str, losses: Losses, recorded: dict[str, float]) -> Iterator[Row]:
    ours = {"lm": losses.lm_loss or 0.0, "vm": losses.vm_loss or 0.0, "total": losses.loss}  # over nothing: 0
    for key, value in ours.items():
        if math.isnan(recorded[key]):
            yield instead(family, f"{title}: {key} loss", f"{value:.8g}", "NaN")
        else:
            yield compare(family, f"{title}: {key} loss", value, recorded[key])


def _gradient_rows(title: str, gradients: Tensors, norms: dict[str, float | None]) -> Iterator[Row]:
    largest = max((norm or 0.0 for norm in norms.values()), default=0.0)
    for parameter, norm in norms.items():
        tolerance = _gradient_tolerance(parameter)
        ours = gradients[parameter].norm().item() if parameter in gradients else math.nan
        yield compare("gradient norms", f"{title}: {parameter}", ours, norm or 0.0, tolerance, ROUNDING * largest)


def _gradient_tolerance(parameter: str) -> float:
    return SINUSOID_TOLERANCE if SINUSOID_PARAMETER in parameter else TOLERANCE


def _checkpoint_rows(name: str, checkpoint: Checkpoint, oracle: dict[str, Any]) -> Iterator[Row]:
    """Every recorded key comes back from import and export under its name and shape.

    Exceptions: constants, and the output matrix of a tied model, which repeats the embedding and is not saved.
    """
    model_config = checkpoint.model_config()
    table = ross_table(model_config)
    left = [entry.name for entry in table if not isinstance(entry, Entry)]
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
            features = module.vision_model(tensors["in.images"].to(trial.engine.device))
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
    """Text only, pictures only, cut rows, nothing supervised; and cases that the reference cannot run.

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
        yield compare("edge cases", f"{title}: lm loss", losses.lm_loss or 0.0, recorded["lm_loss"])
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
