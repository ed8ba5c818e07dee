"""Prints a run's pipeline stages, their time and memory, and the time and MFU of a step, without starting the run.

  python tools/plan_layout.py --world-size 64 --load base --config recipe.yaml --tensor-model-parallel-size 2
  python tools/plan_layout.py --world-size 8 --language-model Qwen2-7B-Instruct --pixel-decoder FLUX.1-dev/vae \\
      --vision-model siglip-so400m-patch14-384 --config train_ross/finetune_siglip_qwen2

All other options are those of pretrain_ross.py. Weights, gradients and optimizer state are counted. Activations are
estimated from shapes; times from operations, bytes and the assumed speed of --gpu (ross_mcore/machines.py): measure
them in a run. Samples are typical ones (ross_mcore/costs.py). Exit status 2: the layout or the batch size is not
possible. Options of precision and kernels are checked only when a run starts.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ross_mcore.commands import build_parser, refuse
from ross_mcore.machines import MACHINES

if TYPE_CHECKING:
    from ross_mcore.architecture import ModelConfig
    from ross_mcore.config import Config
    from ross_mcore.costs import Data
    from ross_mcore.parallel.layout import Layout, Placement

SCRIPT = "plan_layout.py"

GB = 1e9


def parse_arguments(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> tuple[argparse.Namespace, list[str]]:
    """Options of this command, and the remaining arguments, which are those of pretrain_ross.py."""
    parser = build_parser(prog, __doc__)
    parser.allow_abbrev = False  # the trainer's options pass through
    parser.add_argument("--world-size", type=int, required=True, metavar="N", help="total number of GPUs")
    parser.add_argument("--gpu", choices=sorted(MACHINES), default="H100", help="GPU to plan for [%(default)s]")
    parser.add_argument("--tokens", type=int, metavar="N", help="slots of a row [--seq-length]")
    parser.add_argument(
        "--samples-a-row",
        type=float,
        metavar="X",
        help="samples of a packed row of this data; default: of typical samples",
    )
    parser.add_argument(
        "--parts-read", nargs="+", default=[], choices=["features", "latents"], help="precomputed parts of the shards"
    )
    parser.add_argument("--language-model", type=Path, metavar="DIR", help="instead of --load: its config.json is read")
    parser.add_argument("--vision-model", type=Path, metavar="DIR", help="tower for --language-model")
    parser.add_argument("--pixel-decoder", type=Path, metavar="DIR", help="VAE; without it, a plain LLaVA model")
    parser.add_argument("--denoiser-type", default="denoiser_vit3x", metavar="T", help="of the denoiser [%(default)s]")
    options, rest = parser.parse_known_args(arguments)
    if (options.language_model is None) != (options.vision_model is None):
        parser.error("--language-model and --vision-model need each other")
    if options.samples_a_row is not None and not 0 < options.samples_a_row < math.inf:
        parser.error(f"--samples-a-row must be a positive number, got {options.samples_a_row}")
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


def print_plan(config: Config, model: ModelConfig, layout: Layout, placement: Placement, data: Data) -> None:
    from rich.console import Console
    from rich.table import Table

    from ross_mcore.models.inventory import inventory
    from ross_mcore.parallel.memory import stage_memory
    from ross_mcore.parallel.timing import step_time

    plan, machine = placement.plan, placement.machine
    rows, shapes = rows_of_step(config, layout, placement, data), inventory(model)
    micro_batches = rows // (layout.data_parallel * plan.rows)
    stages = [layout.stage(index) for index in range(layout.pipeline_parallel)]
    memory = [stage_memory(model, shapes, layout, stage, plan, data, micro_batches) for stage in stages]
    trained = [each.gradients / 4 for each in memory]
    time = step_time(model, layout, plan, data, machine, micro_batches=micro_batches, trained=trained)

    table = Table("stage", "layers", "ms", "weights", "gradients", "optimizer", "activations", "GB a rank", box=None)
    for stage, seconds, own in zip(stages, time.stages, memory):
        parts = own.weights, own.gradients, own.optimizer, own.activations, own.total
        table.add_row(
            str(stage.index),
            str(len(stage.layers)),
            f"{1000 * seconds:.0f}",
            *(f"{part / GB:.1f}" for part in parts),
        )
    console = Console(width=120)

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    say(
        f"tensor {layout.tensor_parallel} x pipeline {layout.pipeline_parallel} x data {layout.data_parallel}, "
        f"{layout.virtual_stages} chunks a stage; {rows} rows a step in {micro_batches} micro-batches of "
        f"{plan.rows} a rank, rows of {plan.tokens} tokens"
    )
    console.print(table, highlight=False)
    useful, done = time.utilization(machine, plan.bf16)
    samples = micro_batches * layout.data_parallel * plan.samples(data)
    say(
        f"step: {time.seconds:.2f} s for {samples:.0f} samples: passes {time.passes:.2f} s ({time.idle:.1%} bubble and "
        f"imbalance), {time.communication:.2f} s of communication, {time.between:.2f} s between steps"
    )
    say(f"MFU: {useful:.1%} useful, {done:.1%} of the hardware ({done - useful:.1%} padding and recomputation)")
    say(
        f"assumed: {machine.name}, ms of a micro-batch; samples of {data.tokens:.0f} tokens, {data.images:.2f} images "
        f"and {data.labels:.0f} labels"
    )


def rows_of_step(config: Config, layout: Layout, placement: Placement, data: Data) -> int:
    """Rows of a step, of --global-batch-samples from the mean sample."""
    plan, training = placement.plan, config.training
    if training.global_batch_samples is None:
        return training.global_batch_size or layout.data_parallel * plan.rows
    return layout.rows_for(training.global_batch_samples * plan.rows / plan.samples(data), plan.rows)


def main(arguments: Sequence[str] | None = None, prog: str = SCRIPT) -> int:
    options, rest = parse_arguments(arguments, prog)
    from ross_mcore import flags
    from ross_mcore.architecture import Precomputed
    from ross_mcore.config import check
    from ross_mcore.costs import PACKED_FILL, typical_data
    from ross_mcore.errors import UserError
    from ross_mcore.parallel.layout import make_layout

    config = flags.parse(rest, complete=False, prog=prog)
    try:
        model = read_model(options, config.checkpoint.load)
        data = typical_data(model, config.llm_trains)
        if options.samples_a_row is not None:
            tokens = PACKED_FILL * config.data.seq_length / options.samples_a_row
            data = replace(data, tokens=tokens, attended=tokens)
        read = Precomputed(features="features" in options.parts_read, latents="latents" in options.parts_read)
        plan = replace(config.plan, precomputed=read)
        placement = replace(config.placement, plan=plan, data=data, machine=MACHINES[options.gpu])
        layout = make_layout(model, placement, world_size=options.world_size, precomputed=read)
        check(config, data_parallel_size=layout.data_parallel, virtual_stages=layout.virtual_stages)
    except UserError as error:
        return refuse(prog, f"{error}; see --help")
    plan = replace(plan, tokens=options.tokens or config.data.seq_length)
    print_plan(config, model, layout, replace(placement, plan=plan), data)
    return 0
