"""Waiting of pipeline stages and useful MFU, estimated by the cost model of ross_mcore/costs.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from counting import Row
from ross_mcore.commands.plan import parse_arguments, read_model
from ross_mcore.config import Config
from ross_mcore.costs import Recompute, typical_data
from ross_mcore.flags import parse
from ross_mcore.machines import CPU, H100
from ross_mcore.models.inventory import inventory
from ross_mcore.parallel.layout import make_layout
from ross_mcore.parallel.memory import stage_memory
from ross_mcore.parallel.timing import StepTime, step_time

PUBLISHED = Path(__file__).parents[2] / "tests" / "published"
FILES = {
    "--language-model": "qwen2-7b-instruct",
    "--vision-model": "siglip-so400m-patch14-384",
    "--pixel-decoder": "flux.1-dev-vae",
}
RECIPE = "train_ross/finetune_siglip_qwen2"


def estimate(config: Config, ranks: int, by_operations: bool = False) -> StepTime:
    """A step on `ranks` H100. by_operations: layers placed as if an operation took as long in every precision."""
    files = [word for flag, name in FILES.items() for word in (flag, str(PUBLISHED / name))]
    model = read_model(parse_arguments(["--world-size", str(ranks), *files])[0], None)
    data, plan, shapes = typical_data(model, config.llm_trains), config.plan, inventory(model)
    placement = replace(config.placement, data=data)
    if by_operations:
        placement = replace(placement, machine=CPU, plan=replace(plan, recompute=Recompute()))
    layout = make_layout(model, placement, world_size=ranks)
    rows = layout.rows_for((config.training.global_batch_samples or 0) / plan.samples(data), plan.rows)
    count = rows // layout.data_parallel
    stages = [layout.stage(index) for index in range(layout.pipeline_parallel)]
    memory = [stage_memory(model, shapes, layout, stage, plan, data, count) for stage in stages]
    trained = [each.gradients / 4 for each in memory]
    return step_time(model, layout, plan, data, H100, micro_batches=count, trained=trained)


def imbalance(time: StepTime) -> float:
    """The share of a micro-batch that the average stage waits for the slowest."""
    return 1 - sum(time.stages) / len(time.stages) / max(time.stages)


def rows() -> list[Row]:
    found = []
    for flags in ("--denoiser-precision fp32", "--denoiser-precision tf32", "--recompute-granularity full"):
        config = parse(["--config", RECIPE, "--pipeline-model-parallel-size", "2", *flags.split()], complete=False)
        before, now = (imbalance(estimate(config, 8, by_operations)) for by_operations in (True, False))
        note = f"{before:.1%} if balanced by operations; a layer is 7% of a stage"
        found.append(Row(f"waiting of a stage, pipeline 2, {flags[2:]}", f"{now:.1%}", "3.5%", note))
    config = parse(["--config", RECIPE], complete=False)
    for ranks, aim in ((8, "40%"), (16, ""), (32, ""), (64, "38%")):
        useful, hardware = estimate(config, ranks).utilization(H100, bf16=True)
        found.append(Row(f"useful MFU of the recipe on {ranks} H100", f"{useful:.1%}", aim, f"hardware {hardware:.1%}"))
    return found
