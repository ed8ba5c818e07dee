"""From options to inputs: the checkpoint to start from, the layout, the data sets and their order."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ross_mcore import checked, platform
from ross_mcore import config as options
from ross_mcore.architecture import NOTHING_PRECOMPUTED, ModelConfig, Precomputed
from ross_mcore.checkpoint.folder import Checkpoint, nothing_at
from ross_mcore.checkpoint.verification import find_intact
from ross_mcore.config import Config
from ross_mcore.costs import Data
from ross_mcore.data.mixture import MixtureOrder
from ross_mcore.data.order import BlockOrder, ModalityLengthOrder, Order, keys
from ross_mcore.data.rows import RowStream
from ross_mcore.data.sample import ShardDataset
from ross_mcore.data.shard_reader import ShardReader
from ross_mcore.data.sources import MixtureDataset, Source
from ross_mcore.data.spec import SampleSpec
from ross_mcore.data.templates import TRAINING_TEMPLATES, default_template, with_template
from ross_mcore.data.tokenizer import load_tokenizer, require_vocabulary
from ross_mcore.engine.kernels import choose
from ross_mcore.engine.precision import check_execution
from ross_mcore.errors import ConfigError
from ross_mcore.machines import H100, machine_of
from ross_mcore.parallel.collectives import all_or_none
from ross_mcore.parallel.layout import Layout, make_layout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_COUNTED_IN = 1_000_000
"""Maximum number of samples whose rows are planned at start, for rows a step and steps an epoch: about two seconds."""

SAMPLES_AVERAGED = 100_000
"""Samples of each index whose mean balances the pipeline stages."""

_logger = logging.getLogger(__name__)


def starting_point(config: Config) -> tuple[Checkpoint, bool]:
    """The checkpoint to start from, and whether to resume its run (True) or load only its weights (False).

    Collective. A run in --save comes before --load. Raises ConfigError for a run of another stage, CheckpointError
    when there is no intact checkpoint or ranks see different ones.
    """
    checkpoint, stage = config.checkpoint, config.training.training_stage
    own = None if checkpoint.save is None else find_intact(Path(checkpoint.save), checkpoint.verify)
    if own is not None:
        saved_stage = all_or_none(lambda: own.train_state().get("training_stage"))
        if saved_stage is None:
            raise ConfigError(
                f"--save {checkpoint.save} holds a converted model, not a run; give --load {checkpoint.save} and "
                "another --save folder"
            )
        if saved_stage != stage:
            raise ConfigError(
                f"--save {checkpoint.save} holds a run of training stage {saved_stage!r}; give another folder"
            )
        if checkpoint.finetune and torch.distributed.get_rank() == 0:
            _logger.warning("--finetune is ignored: %s already holds a run, which is resumed", checkpoint.save)
        return own, True
    load = Path(checkpoint.load or "")
    found = find_intact(load, checkpoint.verify)
    if found is None:
        raise nothing_at(load, [])
    same_stage = all_or_none(lambda: found.train_state().get("training_stage")) == stage
    return found, same_stage and not checkpoint.finetune


def mean_sample(dataset: MixtureDataset) -> Data | None:
    """The mean sample of an epoch, from the first SAMPLES_AVERAGED of each index; None if an index has no lengths."""
    sums = np.zeros(4)
    for part, count in zip(dataset.parts, dataset.counts):
        rows = part.reader.samples[:SAMPLES_AVERAGED]
        if not len(rows) or (rows["text_tokens"] < 0).any():
            return None
        tokens = np.minimum(part.row_lengths(np.arange(len(rows))), dataset.seq_length).astype(np.float64)
        facts = tokens, tokens**2, rows["image_spans"], np.maximum(rows["label_tokens"], 0)
        sums += count / len(rows) * np.array([fact.sum(dtype=np.float64) for fact in facts])
    tokens, squares, images, labels = (sums / sum(dataset.counts)).tolist()
    return Data(tokens, squares / tokens, images, labels) if tokens else None


def about_balance(config: Config, data: Data | None, device_name: str) -> list[str]:
    """What --pipeline-layout auto assumed, if it chose the layers of the stages."""
    if not config.placement.is_balanced:
        return []
    machine = machine_of(device_name)
    gpu = f"{H100.name}, because the speed of {device_name} is not known" if machine is None else machine.name
    samples = "typical samples" if data is None else f"samples of {data.tokens:.0f} tokens and {data.images:.2f} images"
    return [f"--pipeline-layout auto: layers are placed by their estimated time on {gpu}, for {samples}"]


def place(
    config: Config,
    model_config: ModelConfig,
    precomputed: Precomputed = NOTHING_PRECOMPUTED,
    data: Data | None = None,
    device_name: str = "",
) -> Layout:
    """The layout of this run, after all checks that do not need the model. Raises ConfigError, LayoutError.

    data: the mean sample, of all ranks; device_name: torch's name of the GPU to balance stages for. Every rank must get
    the same, because the layout follows from them.
    """
    world_size = torch.distributed.get_world_size()
    chosen = choose(config, platform.libraries()).config
    placement = replace(chosen.placement, data=data, machine=machine_of(device_name) or H100)
    layout = make_layout(model_config, placement, world_size=world_size, precomputed=precomputed)
    options.check(
        config,
        data_parallel_size=layout.data_parallel,
        virtual_stages=layout.virtual_stages,
    )
    check_execution(config, model_config.language, platform.libraries(), layout.layers_per_chunk)
    return layout


def chosen_template(config: Config, model_config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """--template, or the default of stage, model and tokenizer. Raises ConfigError when there is none."""
    model_type = model_config.language.model_type
    chosen = config.data.template or default_template(config.training.training_stage, model_type, tokenizer)
    if chosen is None:
        raise ConfigError(
            f"no template is the default of the tokenizer {tokenizer.name_or_path} with a model of type {model_type}; "
            f"give --template: {', '.join(TRAINING_TEMPLATES)}, tokenizer (its own chat template) or a YAML file "
            "(docs/data.md, Templates)"
        )
    return chosen


def open_dataset(config: Config, model_config: ModelConfig, start: Checkpoint, path: str) -> MixtureDataset:
    """The data sets of `path`, a folder or a YAML file, which may override template and aspect ratio.

    Raises ConfigError and TokenizerError for a template that does not fit the tokenizer.
    """
    tokenizer, image_processor = load_tokenizer(start.tokenizer), start.image_processor()
    require_vocabulary(tokenizer, model_config.language.vocab_size, str(start.tokenizer))
    data = config.data
    cache = None if data.data_cache_dir is None else Path(data.data_cache_dir)
    same = {item.name for item in fields(SampleSpec)} & vars(data).keys() - {"template", "image_aspect_ratio"}
    common = SampleSpec(**{name: getattr(data, name) for name in same})

    def open_part(source: Source) -> ShardDataset:
        reader = ShardReader(source.path, cache, data.data_cache_bytes)
        spec = replace(common, image_aspect_ratio=source.image_aspect_ratio or config.image_aspect_ratio)
        template = source.template or chosen_template(config, model_config, tokenizer)
        spec = with_template(spec, template, tokenizer)
        return ShardDataset(reader, tokenizer, model_config, spec, image_processor)

    dataset = MixtureDataset.open(Path(path), open_part)
    if config.data.pack:
        dataset.require_lengths()
    return dataset


def skipped_samples(config: Config, dataset: MixtureDataset) -> set[int]:
    """The numbers of the samples of --skip-samples. Raises ConfigError for an unknown id."""
    named = config.data.skip_samples
    if named is None:
        return set()
    try:
        # os.path: a long list of ids is no name that pathlib would ask the system about without an error
        given = checked.read_text(Path(named)).splitlines() if os.path.isfile(named) else named.split(",")  # noqa: PTH113
    except ValueError as error:
        raise ConfigError(f"--skip-samples {named} cannot be read: {error}") from None
    keys_given = [key.strip() for key in given if key.strip()]
    if not keys_given:
        raise ConfigError(
            f"--skip-samples {checked.shown(named)} names no sample; give ids as SAVE/incidents.jsonl names them, or "
            "remove the flag"
        )
    found = dataset.find(keys_given)
    if missing := [key for key, numbers in found.items() if not numbers]:
        raise ConfigError(
            f"--skip-samples {checked.shown(named)}: no sample of {config.data.data_path} has the id "
            f"{checked.shown(missing[0])} ({len(missing)} of {len(found)} are not found); give ids as "
            "SAVE/incidents.jsonl names them"
        )
    skipped = {number for numbers in found.values() for number in numbers}
    if len(skipped) == len(dataset):
        raise ConfigError(f"--skip-samples names all {len(dataset)} samples of {config.data.data_path}; leave some")
    return skipped


@dataclass(frozen=True)
class Steps:
    """The steps of a run. rows: of a step, over all ranks; iterations: of the run; remarks: for its start."""

    order: Order
    rows: int
    iterations: int
    remarks: Sequence[str] = ()


def plan_steps(config: Config, dataset: MixtureDataset, layout: Layout, kept_rows: int | None = None) -> Steps:
    """The order of samples, the rows of a step and the iterations of the run.

    kept_rows: of a resumed run with --global-batch-samples; a new one chooses them from the index. Raises ConfigError.
    """
    options, samples = config.training, config.training.global_batch_samples
    rows = options.global_batch_size or options.micro_batch_size * layout.data_parallel
    order = sample_order(config, dataset, samples or rows)
    counts = samples is not None or options.train_iters is None
    density = rows_per_sample(order, dataset, config.data.pack) if counts else 1.0
    remarks = []
    if samples is not None:
        rows = kept_rows or layout.rows_for(samples * density, options.micro_batch_size)
        remarks.append(
            f"--global-batch-samples {samples}: a step has {rows} rows, on average {rows / density:.1f} samples "
            f"({1 / density:.2f} a row)"
        )
    epochs = options.train_epochs or 0
    iterations = options.train_iters or math.ceil(epochs * order.num_samples * density / rows)
    return Steps(order, rows, iterations, remarks)


def sample_order(config: Config, dataset: MixtureDataset, step_samples: int) -> Order:
    """The order of --sampler; step_samples: samples of a step, for an order that groups them.

    Raises ConfigError when that order cannot keep the data sets' shares.
    """
    seed = config.training.seed
    if config.data.sampler == "modality_length":
        if not dataset.passes_once:
            raise ConfigError(
                f"--sampler modality_length makes one pass over all samples, but {config.data.data_path} asks for "
                f"{', '.join(f'{c} of {n} samples of {name!r}' for name, c, n in dataset.shares)} per epoch; remove "
                "weight and epochs there, or use --sampler shuffle"
            )
        return ModalityLengthOrder(dataset.modality_lengths(), step_samples, seed)
    if len(dataset.parts) == 1 and dataset.passes_once:
        return BlockOrder(len(dataset), seed)
    orders = tuple(BlockOrder(size, int(keys(seed, which)[0])) for which, size in enumerate(dataset.sizes))
    return MixtureOrder(orders, dataset.counts, seed)


def rows_per_sample(order: Order, dataset: MixtureDataset, packed: bool) -> float:
    """1, or of packed rows the mean over the first windows of the first epoch, up to ROWS_COUNTED_IN samples."""
    if not packed:
        return 1.0
    stream = RowStream(order, dataset.row_lengths, dataset.seq_length, True, order.window_samples)
    samples = rows = 0
    while samples < min(order.num_samples, ROWS_COUNTED_IN):
        rows += stream.rows_of_window(stream.cursor.window)
        stream.skip(stream.rows_of_window(stream.cursor.window))
        samples = stream.cursor.consumed_samples
    return rows / samples
