"""Refuses a run that would learn nothing, before anything is built; warns of one that learns less than it seems."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ross_mcore.architecture import ModelConfig
from ross_mcore.config import Config
from ross_mcore.data.order import Order
from ross_mcore.data.sample import ShardDataset
from ross_mcore.data.sources import MixtureDataset
from ross_mcore.data.survey import Found, Survey, fitting_templates, survey, why_unlabelled
from ross_mcore.engine.optimizer import learning_rate, updates_weights, warmup_iterations
from ross_mcore.errors import ConfigError

SHARE_TO_WARN = 0.01
"""Of samples without labels, or that are skipped."""
CUT_SHARE_TO_WARN = 0.1
"""Of samples that are longer than a row."""


def check_data(config: Config, model_config: ModelConfig, dataset: MixtureDataset) -> list[str]:
    """Warnings about the samples of every data set.

    Raises ConfigError when a data set would leave nothing to learn: no picture fits in a row or is left, no sample
    leaves anything, or, without --allow-missing-labels, fewer than half of its samples have labels.
    """
    warnings = []
    for name, part in zip(dataset.names, dataset.parts, strict=True):
        _require_room_for_a_picture(part)
        found = survey(part)
        _require_samples(part, found)
        _require_labels(config, model_config, part, found)
        prefix = f"{name}: " if len(dataset.parts) > 1 else ""
        warnings += [f"{prefix}warning: {text}" for text in _remarks(model_config, part, found)]
    return warnings


def about_held_out(model_config: ModelConfig, held_out: MixtureDataset, *, in_training: bool) -> list[str]:
    """Warnings about data sets that are only validated on.

    Raises ConfigError when one of them leaves nothing `in_training`, where every validation would have no loss; a
    validation alone shows that at once.
    """
    warnings = []
    for name, part in zip(held_out.names, held_out.parts, strict=True):
        found = survey(part)
        if in_training:
            _require_any(part, found, "validate on")
        warnings += [f"validation on {name}: warning: {text}" for text in _remarks(model_config, part, found)]
    return warnings


def check_schedule(config: Config, order: Order, dataset: MixtureDataset, rows: int, train_iters: int) -> list[str]:
    """Warnings about the learning rate, and about steps that are larger than the data. rows: of a step."""
    return [f"warning: {text}" for text in _about_schedule(config, order, dataset, rows, train_iters)]


def _require_room_for_a_picture(part: ShardDataset) -> None:
    row, picture, reader = part.spec.seq_length, part.image_tokens, part.reader
    if reader.num_images and row < picture:
        pictured = np.count_nonzero(reader.samples["num_images"])
        raise ConfigError(
            f"--seq-length {row} is shorter than one picture of this model, which has {picture} tokens, so none of the "
            f"{reader.num_images} pictures of {reader.folder} would be learned (in {pictured} of {len(part)} samples); "
            f"give at least {picture} and the tokens of a conversation"
        )


def _require_any(part: ShardDataset, found: Survey, purpose: str) -> None:
    if not found.labelled.count and not found.without_labels.count:
        raise ConfigError(
            f"{part.reader.folder} leaves nothing to {purpose}: {_reasons(part, found)}; {_remedy(part, found)}"
        )


def _require_samples(part: ShardDataset, found: Survey) -> None:
    _require_any(part, found, "train on")
    if part.reader.num_images and not found.pictured.count and found.nothing:
        raise ConfigError(
            f"none of the {part.reader.num_images} pictures of {part.reader.folder} would be trained on: "
            f"{_reasons(part, found)}; {_remedy(part, found)}"
        )


def _require_labels(config: Config, model_config: ModelConfig, part: ShardDataset, found: Survey) -> None:
    lost = found.without_labels
    trained = found.labelled.count + lost.count
    if lost.count <= trained / 2:
        return
    folder, tokenizer = part.reader.folder, part.tokenizer.name_or_path
    how = "by the index" if found.by_index and not found.tokenized else f"{found.tokenized} of them tokenized"
    message = (
        f"{lost.count / trained:.1%} of the samples of {folder} have no label under --template {part.spec.template} "
        f"with the tokenizer {tokenizer} ({_number(lost.count)} of {_number(trained)}, {how}), so none of their text "
        f"would be learned; the first are {_keys_and_reasons(part, lost)}. {_remedy_for_labels(part, found)}"
    )
    if not found.labelled.count and model_config.denoiser is None:
        raise ConfigError(f"{message}. The model has no denoiser, so its pictures have no loss either")
    if not config.data.allow_missing_labels:
        raise ConfigError(f"{message}. To train on the pictures of such samples alone, pass --allow-missing-labels")


def _remedy_for_labels(part: ShardDataset, found: Survey) -> str:
    if found.cut_unlabelled.count > found.unlabelled.count:
        return f"Their answers are behind the cut at --seq-length {part.spec.seq_length}: raise it{_sizes(found)}"
    fitting = [] if found.labelled.count else fitting_templates(part, found.unlabelled.numbers)
    if fitting:
        return f"The template does not fit the tokenizer or the data: --template {' or '.join(fitting)} gives labels"
    return f"Look at one with tools/inspect_shards.py --sample {part.keys(found.unlabelled.numbers[:1])[0]}"


def _remarks(model_config: ModelConfig, part: ShardDataset, found: Survey) -> Iterator[str]:
    """Warnings about the samples of a data set."""
    row, positions, lost = part.spec.seq_length, model_config.language.max_position_embeddings, found.without_labels
    if lost.count > SHARE_TO_WARN * found.samples:
        how = "by the index" if found.by_index else f"of {found.tokenized} tokenized, spread over the data"
        yield (
            f"{lost.count / found.samples:.1%} of the samples have no label ({_number(lost.count)} {how}), so their "
            f"text has no loss; the first are {_keys_and_reasons(part, lost)}"
        )
    if found.empty > SHARE_TO_WARN * found.samples:
        yield (
            f"{found.empty / found.samples:.1%} of the samples are left out: {_reasons(part, found)}; "
            f"{_remedy(part, found)}"
        )
    cut = np.count_nonzero(found.lengths > row)
    if found.by_index and cut > CUT_SHARE_TO_WARN * found.samples:
        yield f"{cut / found.samples:.1%} of the samples ({cut}) are longer than --seq-length {row}{_sizes(found)}"
    beyond = np.count_nonzero(np.minimum(found.lengths, row) > positions)
    if beyond:
        longest = min(int(found.lengths.max()), row)
        yield (
            f"{beyond} of {found.lengths.size} samples have more tokens than the {positions} positions that the "
            f"language model was trained with (max_position_embeddings), up to {longest}: rotary embeddings compute "
            f"them, but the model has never seen such positions; give --seq-length {positions} to cut there"
        )


def _about_schedule(
    config: Config, order: Order, dataset: MixtureDataset, rows: int, train_iters: int
) -> Iterator[str]:
    options = config.optimizer
    warmup = warmup_iterations(options, train_iters)
    if not any(updates_weights(iteration, train_iters, options) for iteration in range(min(train_iters, 2))):
        why = f"the warm-up begins at 0 and has {warmup}, the run {train_iters} iterations" if options.lr else "--lr 0"
        yield f"every step has learning rate 0, so no weight changes: {why}"
    elif warmup > train_iters:
        last = learning_rate(train_iters - 1, train_iters, options)
        yield (
            f"--lr-warmup-iters {warmup} is longer than the run of {train_iters} iterations: the learning rate ends at "
            f"{last:.2e} and never reaches --lr {options.lr:.2e}"
        )
    epoch = _rows_of_an_epoch(config, order, dataset)
    epochs = config.training.train_epochs
    if rows > epoch:
        yield (
            f"a step has {rows} rows and an epoch about {_number(epoch)} ({order.num_samples} samples), so every step "
            f"trains about {rows / epoch:.1f} times on each sample; lower --global-batch-size or give more data"
        )
    elif epochs is not None and epochs * epoch < rows:
        yield (
            f"--train-epochs {epochs} is less than one step: a step of {rows} rows is {rows / epoch:.2f} epochs; "
            "lower --global-batch-size, or give --train-iters"
        )


def _rows_of_an_epoch(config: Config, order: Order, dataset: MixtureDataset) -> float:
    """Rows of an epoch: with --pack those that its tokens fill."""
    if not config.data.pack:
        return order.num_samples
    tokens = [
        part.row_lengths(np.arange(len(part))).mean() * count for part, count in zip(dataset.parts, dataset.counts)
    ]
    return max(1.0, float(sum(tokens)) / dataset.seq_length)


def _reasons(part: ShardDataset, found: Survey) -> str:
    largest = sorted(found.nothing.items(), key=lambda item: -item[1].count)[:3]
    return "; ".join(
        f"{_number(x.count)} of {found.samples} samples: {reason} ({_keys(part, x)})" for reason, x in largest
    )


def _remedy(part: ShardDataset, found: Survey) -> str:
    """What to change so that samples are not skipped, from the most frequent reason."""
    reason = max(found.nothing, key=lambda name: found.nothing[name].count)
    images, tokens = part.spec.bounds.reasons
    if reason == images:
        return "raise --max-images-per-sample"
    if reason == tokens:
        return "raise --max-tokens-per-sample"
    if reason.startswith("the cut at"):
        return f"raise --seq-length{_sizes(found)}"
    return "look at one with tools/inspect_shards.py --sample"


def _sizes(found: Survey) -> str:
    """The samples' lengths, where the index has them."""
    if not found.by_index:
        return ""
    return (
        f" (half of the samples have at most {np.median(found.lengths):.0f} tokens, the longest {found.lengths.max()})"
    )


def _keys(part: ShardDataset, found: Found) -> str:
    return ", ".join(part.keys(found.numbers))


def _keys_and_reasons(part: ShardDataset, found: Found) -> str:
    """`a, b (every answer is empty); c (it has no answer)`"""
    by_reason: dict[str, list[str]] = {}
    for key, number in zip(part.keys(found.numbers), found.numbers, strict=True):
        by_reason.setdefault(why_unlabelled(part, number), []).append(key)
    return "; ".join(f"{', '.join(keys)} ({reason})" for reason, keys in by_reason.items())


def _number(count: float) -> str:
    return f"{count:.0f}"
