"""Prints a run's pipeline stages, their balance, the bubble and the memory of a rank, without starting the run.

  python tools/plan_layout.py --world-size 64 --load base --config recipe.yaml --tensor-model-parallel-size 2
  python tools/plan_layout.py --world-size 8 --language-model Qwen2-7B-Instruct --pixel-decoder FLUX.1-dev/vae \\
      --vision-model siglip-so400m-patch14-384 --config train_ross/finetune_siglip_qwen2

All other options are those of pretrain_ross.py. Weights, gradients and optimizer state are counted. Activations are
estimated from shapes, load and bubble from operations; measure them in a run. Exit status 2: the layout or the batch
size is not possible. Options of precision and kernels are checked only when a run starts.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ross_mcore.commands import build_parser, refuse

if TYPE_CHECKING:
    from ross_mcore.architecture import ModelConfig
    from ross_mcore.config import Config
    from ross_mcore.parallel.layout import Layout

SCRIPT = "plan_layout.py"

GB = 1e9


def parse_arguments(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> tuple[argparse.Namespace, list[str]]:
    """Options of this command, and the remaining arguments, which are those of pretrain_ross.py."""
    parser = build_parser(prog, __doc__)
    parser.allow_abbrev = False  # the trainer's options pass through
    parser.add_argument("--world-size", type=int, required=True, metavar="N", help="total number of GPUs")
    parser.add_argument("--tokens", type=int, metavar="N", help="tokens of the longest row of a step [--seq-length]")
    parser.add_argument(
        "--samples-a-row",
        type=float,
        metavar="X",
        help="with --global-batch-samples: as tools/inspect_shards.py prints",
    )
    parser.add_argument("--language-model", type=Path, metavar="DIR", help="instead of --load: its config.json is read")
    parser.add_argument("--vision-model", type=Path, metavar="DIR", help="tower for --language-model")
    parser.add_argument("--pixel-decoder", type=Path, metavar="DIR", help="VAE; without it, a plain LLaVA model")
    parser.add_argument("--denoiser-type", default="denoiser_vit3x", metavar="T", help="of the denoiser [%(default)s]")
    options, rest = parser.parse_known_args(arguments)
    if (options.language_model is None) != (options.vision_model is None):
        parser.error("--language-model and --vision-model need each other")
    return options, rest


def read_model(options: argparse.Namespace, load: str | None) -> ModelConfig:
    from ross_mcore.architecture import DenoiserConfig, ModelConfig, ProjectorConfig
    from ross_mcore.checkpoint.folder import require_checkpoint
    from ross_mcore.conversion import huggingface

    if options.language_model is None:
        return require_checkpoint(Path(load or "")).model_config()
    decoder = options.pixel_decoder
    return ModelConfig(
        language=huggingface.read_language_config(options.language_model),
        vision=huggingface.read_vision_config(options.vision_model),
        projector=ProjectorConfig("mlp2x_gelu"),
        denoiser=DenoiserConfig.from_type(options.denoiser_type) if decoder else None,
        pixel_decoder=huggingface.read_pixel_decoder_config(decoder) if decoder else None,
    )


def rows_of_a_step(config: Config, layout: Layout, samples_a_row: float | None) -> int:
    """Rows of a step over all ranks. Raises ConfigError where they follow from data and are not given."""
    from ross_mcore.errors import ConfigError

    training = config.training
    if training.global_batch_samples is None:
        return training.global_batch_size or layout.data_parallel * training.micro_batch_size
    if config.data.pack and not samples_a_row:
        raise ConfigError(
            f"with --global-batch-samples {training.global_batch_samples} the rows of a step follow from the data: "
            "give the samples of a packed row with --samples-a-row (tools/inspect_shards.py --seq-length prints them)"
        )
    return layout.rows_for(training.global_batch_samples / (samples_a_row or 1), training.micro_batch_size)


def print_plan(config: Config, model: ModelConfig, layout: Layout, tokens: int, batch: int) -> None:
    from rich.console import Console
    from rich.table import Table

    from ross_mcore.models.inventory import inventory
    from ross_mcore.parallel.layout import stage_extra_costs
    from ross_mcore.parallel.memory import Plan, bubble, stage_memory

    llm_trains, vision_trains = config.llm_trains, config.vision_trains
    rows = layout.data_parallel * config.training.micro_batch_size
    plan = Plan(
        config.training.micro_batch_size,
        tokens,
        batch // rows,
        llm_trains,
        vision_trains,
        config.execution.bf16,
        config.use_distributed_optimizer,
        config.parallel.sequence_parallel,
        config.execution.recompute_granularity,
    )
    shapes, last = inventory(model), layout.pipeline_parallel - 1
    extras = dict.fromkeys((0, last), 0.0)
    for index, extra in zip((0, last), stage_extra_costs(model, llm_trains, vision_trains, tokens)):
        extras[index] += extra
    loads = [len(layout.stage(index).layers) + extras.get(index, 0.0) for index in range(layout.pipeline_parallel)]
    table = Table("stage", "layers", "load", "weights", "gradients", "optimizer", "activations", "GB a rank", box=None)
    for index, load in enumerate(loads):
        memory = stage_memory(model, shapes, layout, layout.stage(index), plan)
        parts = memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.total
        count = len(layout.stage(index).layers)
        table.add_row(str(index), str(count), f"{load / max(loads):.2f}", *(f"{part / GB:.1f}" for part in parts))
    console = Console(width=120)
    console.print(
        f"tensor {layout.tensor_parallel} x pipeline {layout.pipeline_parallel} x data {layout.data_parallel}, "
        f"{layout.virtual_stages} chunks a stage; {batch} rows a step in {plan.micro_batches} micro-batches of "
        f"{plan.rows} a rank, rows of {tokens} tokens",
        highlight=False,
    )
    console.print(table, highlight=False)
    idle = 1 - sum(loads) / len(loads) / max(loads)
    console.print(f"waiting: {bubble(layout, plan.micro_batches):.1%} bubble, {idle:.1%} imbalance", highlight=False)


def main(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> int:
    options, rest = parse_arguments(arguments, prog)
    from ross_mcore import flags
    from ross_mcore.config import check
    from ross_mcore.errors import UserError
    from ross_mcore.parallel.layout import make_layout

    config = flags.parse(rest, complete=False, prog=prog)
    try:
        model = read_model(options, config.checkpoint.load)
        layout = make_layout(model, config.placement, world_size=options.world_size)
        check(config, data_parallel_size=layout.data_parallel, virtual_stages=layout.virtual_stages)
        batch = rows_of_a_step(config, layout, options.samples_a_row)
    except UserError as error:
        return refuse(prog, f"{error}; see --help")
    print_plan(config, model, layout, options.tokens or config.data.seq_length, batch)
    return 0
