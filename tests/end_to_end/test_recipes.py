"""ross_mcore/recipes against the reference's scripts, and the published models built at full size on the meta device.

Every recipe is placed on a simulated world of eight ranks: torch's fake process groups place each rank without the
other seven, and the meta device builds tensors without memory.
"""

from __future__ import annotations

import math
import multiprocessing
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ross_mcore import config as options
from ross_mcore import flags
from ross_mcore.architecture import DenoiserConfig, ModelConfig, ProjectorConfig
from ross_mcore.commands import convert, make_shards
from ross_mcore.config import Config
from ross_mcore.costs import typical_data
from ross_mcore.parallel.layout import Layout, make_layout

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "tests" / "published"

WORLD = 8
LANGUAGE = {"qwen2": "qwen2-7b-instruct", "vicuna": "vicuna-13b-v1.5"}
VISION = {"clip": "clip-vit-large-patch14-336", "siglip": "siglip-so400m-patch14-384"}
PARAMETERS = {
    "qwen2": 7_615_616_512,
    "vicuna": 13_015_864_320,
    "clip": 303_507_456,
    "siglip": 428_225_600,
    "pixel_decoder": 83_819_683,
}
"""Published sizes: Qwen2-7B 7.62B, Vicuna-13B 13.0B, CLIP-L/336's tower 303.5M, SigLIP-SO400M's 428.2M, FLUX VAE
83.8M."""
DENOISER_PARAMETERS = {
    ("clip", "qwen2"): 64_474_176,
    ("clip", "vicuna"): 66_047_040,
    ("siglip", "qwen2"): 64_630_848,
    ("siglip", "vicuna"): 66_203_712,
}
"""The reference's denoiser: 64.63M with SigLIP and Qwen2, 66.05M with CLIP and Vicuna."""

ALIKE = {
    "pack": True,
    "micro_batch_size": 1,
    "use_distributed_optimizer": True,
    "overlap_grad_reduce": True,
    "overlap_param_gather": True,
    "bf16": True,
    "num_workers": 4,
    "train_epochs": 1.0,
    "seed": 42,
    "lr_decay_style": "cosine",
    "lr_warmup_fraction": 0.03,
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_eps": 1e-8,
    "clip_grad": 0.0,
    "keep_last": 1,
    "log_interval": 1,
}
STAGES: dict[str, dict[str, Any]] = {
    "pretrain": {"image_aspect_ratio": "square", "global_batch_samples": 256, "lr": 1e-3},
    "finetune": {"image_aspect_ratio": "pad", "global_batch_samples": 128, "lr": 2e-5},
}


@dataclass(frozen=True)
class Recipe:
    """One script of the reference: its path, its differences from similar scripts, and the layout chosen for it."""

    folder: str
    name: str
    seq_length: int
    template: str
    save_interval: int
    tensor: int
    pipeline: int
    denoiser_lr: float | None = None

    def __str__(self) -> str:
        return f"{self.folder}/{self.name}"

    @property
    def path(self) -> Path:
        return flags.RECIPES / self.folder / f"{self.name}.yaml"

    @property
    def parts(self) -> list[str]:
        """Training stage, vision tower, language model."""
        return self.name.split("_")

    def options(self) -> dict[str, Any]:
        """All options of the file."""
        own = {
            "training_stage": self.parts[0],
            "tensor_model_parallel_size": self.tensor,
            "pipeline_model_parallel_size": self.pipeline,
            "seq_length": self.seq_length,
            "template": self.template,
            "save_interval": self.save_interval,
        }
        rate = {} if self.denoiser_lr is None else {"denoiser_lr": self.denoiser_lr}
        split = {"sequence_parallel": True} if self.tensor > 1 else {}
        return {**ALIKE, **STAGES[self.parts[0]], **own, **rate, **split}


TABLE = (
    Recipe("train_ross", "pretrain_clip_qwen2", 8192, "plain", 24000, 2, 1),
    Recipe("train_ross", "pretrain_clip_vicuna", 8192, "plain", 24000, 2, 1),
    Recipe("train_ross", "pretrain_siglip_qwen2", 8192, "plain", 24000, 1, 1, denoiser_lr=1e-4),
    Recipe("train_ross", "pretrain_siglip_vicuna", 8192, "plain", 24000, 2, 1, denoiser_lr=1e-4),
    Recipe("train_ross", "finetune_clip_qwen2", 4096, "qwen_2", 24000, 2, 1),
    Recipe("train_ross", "finetune_clip_vicuna", 4096, "v1", 24000, 2, 2),
    Recipe("train_ross", "finetune_siglip_qwen2", 4096, "qwen_2", 100, 2, 1),
    Recipe("train_ross", "finetune_siglip_vicuna", 4096, "v1", 100, 2, 2),
    Recipe("train_llava", "pretrain_clip_qwen2", 8192, "plain", 24000, 2, 1),
    Recipe("train_llava", "pretrain_siglip_qwen2", 8192, "plain", 24000, 1, 1),
    Recipe("train_llava", "finetune_clip_qwen2", 4096, "qwen_2", 24000, 2, 1),
    Recipe("train_llava", "finetune_siglip_qwen2", 4096, "qwen_2", 24000, 2, 1),
)

every_recipe = pytest.mark.parametrize("recipe", TABLE, ids=str)


def read_config(recipe: Recipe, *more: str) -> Config:
    return flags.parse(["--config", str(recipe.path), *more], complete=False)


def read_model(recipe: Recipe) -> ModelConfig:
    """The model that the header's conversion describes, from its parts' published config.json."""
    from ross_mcore.conversion import huggingface

    _, vision, language = recipe.parts
    ross = recipe.folder == "train_ross"
    return ModelConfig(
        language=huggingface.read_language_config(PUBLISHED / LANGUAGE[language]),
        vision=huggingface.read_vision_config(PUBLISHED / VISION[vision]),
        projector=ProjectorConfig("mlp2x_gelu"),
        denoiser=DenoiserConfig.from_type("denoiser_vit3x") if ross else None,
        pixel_decoder=huggingface.read_pixel_decoder_config(PUBLISHED / "flux.1-dev-vae") if ross else None,
    )


def place(recipe: Recipe, config: Config, model: ModelConfig) -> Layout:
    return make_layout(model, config.placement, world_size=WORLD)


def test_there_is_one_recipe_for_every_script() -> None:
    assert {path.relative_to(flags.RECIPES).with_suffix("").as_posix() for path in flags.RECIPES.glob("*/*.yaml")} == {
        str(recipe) for recipe in TABLE
    }


@every_recipe
def test_options(recipe: Recipe) -> None:
    assert flags.read_yaml(str(recipe.path), flags.build_parser()) == recipe.options()
    config, model = read_config(recipe), read_model(recipe)
    layout = place(recipe, config, model)
    options.check(config, data_parallel_size=layout.data_parallel)
    assert config.data.template == recipe.template


def test_reference_mode() -> None:
    for recipe in TABLE:
        sampler = ["--sampler", "modality_length"] if recipe.parts[0] == "finetune" else []
        config = read_config(recipe, "--config", "reference_mode", *sampler)
        assert config.training.loss_normalization == "microbatch"
        assert config.training.vm_loss_rows == "all"
        assert config.data.supervise_final_eos is False
        assert config.data.truncated_images == "fill"
        assert config.data.sampler == ("modality_length" if sampler else "shuffle")


def header(recipe: Recipe) -> str:
    lines = recipe.path.read_text(encoding="utf-8").splitlines()
    return "\n".join(line.removeprefix("#") for line in lines if line.startswith("#"))


def commands(recipe: Recipe) -> Iterator[list[str]]:
    """The header's indented commands, as a shell would split them."""
    for command in re.findall(r"^   (?:torchrun|python) (?:.*\\\n)*.*$", header(recipe), re.MULTILINE):
        yield shlex.split(command.replace("\\\n", " "))


@every_recipe
def test_the_commands_in_the_header_are_accepted(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, vision, language = recipe.parts
    assert f"scripts/{recipe}.sh" in header(recipe)
    monkeypatch.chdir(tmp_path)
    for pictures in ("LLaVA-Pretrain/images", "Cambrian-10M"):
        (tmp_path / pictures).mkdir(parents=True)
    train, *tools = commands(recipe)

    assert train[:4] == ["torchrun", "--nproc-per-node", str(WORLD), "pretrain_ross.py"]
    config = flags.parse(train[4:])
    assert config == read_config(recipe, *train[-6:])
    assert config.checkpoint.save == f"runs/{recipe.folder.removeprefix('train_')}/{recipe.name}"
    if stage == "pretrain":
        converted = convert.parse_arguments(tools.pop(0)[2:])
        assert str(converted.save) == config.checkpoint.load
        assert (converted.pixel_decoder is not None) == (recipe.folder == "train_ross")
        assert (str(converted.language_model).lower(), str(converted.vision_model)) == (
            LANGUAGE[language],
            VISION[vision],
        )
    else:
        before = next(other for other in TABLE if str(other) == f"{recipe.folder}/pretrain_{vision}_{language}")
        assert flags.parse(next(commands(before))[4:]).checkpoint.save == config.checkpoint.load
    (shards,) = tools
    made = make_shards.parse_arguments(shards[2:])
    assert str(made.out) == config.data.data_path and made.template == recipe.template


@dataclass(frozen=True)
class Rank:
    """The model built by one rank of the simulated world."""

    number: int
    pipeline_rank: int
    shards: dict[str, tuple[tuple[int, ...], int]]
    """Name in the checkpoint -> global shape, and the number of its elements that this rank writes."""
    weight_bytes: int
    trained: int
    """Parameters that train."""


def build_worlds(recipes: tuple[Recipe, ...]) -> dict[str, list[Rank]]:
    """For each recipe, the ranks of the first data-parallel copy: the other copies are equal.

    Call it in a separate process, because it fakes the process groups.
    """
    import torch
    import torch.distributed as dist
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from ross_mcore.checkpoint.torch_dist import sharding_metadata
    from ross_mcore.engine.optimizer import set_trainable
    from ross_mcore.models.language import Execution
    from ross_mcore.models.ross import RossModel
    from ross_mcore.parallel import groups

    torch.set_num_threads(1)
    new_group = dist.new_group
    # mcore creates additional gloo groups by name; they would wait for the other ranks
    dist.new_group = lambda *args, **options: new_group(*args, **{**options, "backend": "fake"})

    def build(recipe: Recipe, config: Config, rank: int) -> Rank | None:
        model = read_model(recipe)
        dist.init_process_group("fake", rank=rank, world_size=WORLD, store=FakeStore())
        try:
            here = groups.initialize(place(recipe, config, model), seed=0, timeout_minutes=1)
            if here.data_rank > 0:
                return None
            execution = Execution(dtype=torch.bfloat16, sequence_parallel=recipe.tensor > 1)
            with torch.device("meta"):
                ross = RossModel(model, here, execution, here.stage.chunks[0])
                set_trainable(ross, config.training.training_stage, train_vision=False)
                state = ross.sharded_state_dict(metadata=sharding_metadata())
                apply_factories(state)
        finally:
            groups.destroy()
        assert {parameter.device.type for parameter in ross.parameters()} == {"meta"}
        written: Counter[str] = Counter()
        shapes: dict[str, tuple[int, ...]] = {}
        for part in nested_values(state):
            if isinstance(part, ShardedTensor):
                shapes[part.key] = tuple(part.global_shape)
                written[part.key] += math.prod(part.local_shape) if not any(part.replica_id) else 0
        return Rank(
            rank,
            here.pipeline_rank,
            {key: (shape, written[key]) for key, shape in shapes.items()},
            sum(parameter.numel() * parameter.element_size() for parameter in ross.parameters()),
            sum(parameter.numel() for parameter in ross.parameters() if parameter.requires_grad),
        )

    worlds = {}
    for recipe in recipes:
        config = read_config(recipe)
        built = [build(recipe, config, rank) for rank in range(WORLD)]
        worlds[str(recipe)] = [rank for rank in built if rank is not None]
    return worlds


@pytest.fixture(scope="module")
def worlds() -> dict[str, list[Rank]]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(build_worlds, (TABLE,))


def within(shapes: dict[str, tuple[int, ...]], prefix: str) -> int:
    return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefix))


@every_recipe
def test_eight_ranks_hold_the_published_model(recipe: Recipe, worlds: dict[str, list[Rank]]) -> None:
    from ross_mcore.models.inventory import inventory

    model = read_model(recipe)
    shapes = {name: shape for rank in worlds[str(recipe)] for name, (shape, _) in rank.shards.items()}
    assert shapes == inventory(model)
    written: Counter[str] = Counter()
    for rank in worlds[str(recipe)]:
        written.update({name: count for name, (_, count) in rank.shards.items()})
    assert written == {name: math.prod(shape) for name, shape in shapes.items()}, "each element is written once"

    _, vision, language = recipe.parts
    assert within(shapes, "language_model.") == PARAMETERS[language]
    assert within(shapes, "vision_model.") == PARAMETERS[vision]
    ross = recipe.folder == "train_ross"
    assert within(shapes, "pixel_decoder.") == (PARAMETERS["pixel_decoder"] if ross else 0)
    assert within(shapes, "denoiser.") == (DENOISER_PARAMETERS[vision, language] if ross else 0)


@every_recipe
def test_stages_have_the_layers_of_the_layout(recipe: Recipe, worlds: dict[str, list[Rank]]) -> None:
    layout = place(recipe, read_config(recipe), read_model(recipe))
    assert len(worlds[str(recipe)]) == recipe.tensor * recipe.pipeline
    ross = recipe.folder == "train_ross"
    for rank in worlds[str(recipe)]:
        stage = layout.stage(rank.pipeline_rank)
        layers = {int(found[1]) for name in rank.shards if (found := re.search(r"decoder\.layers\.(\d+)\.", name))}
        assert layers == set(stage.layers)
        hosts = {name.split(".")[1 if name.startswith("language_model.") else 0] for name in rank.shards}
        expected = {"decoder"}
        if stage.is_first:
            expected |= {"vision_model", "vision_projection", "embedding"}
        if stage.is_last:
            expected |= {"output_layer"} | ({"denoiser", "pixel_decoder"} if ross else set())
        assert hosts == expected
        print(
            f"{recipe} rank {rank.number}: stage {stage.index}, {len(layers)} layers, {rank.weight_bytes / 1e9:.2f} GB"
        )


@every_recipe
def test_the_plan_in_the_header(recipe: Recipe, worlds: dict[str, list[Rank]]) -> None:
    """Layout and steps; weights, gradients and optimizer state of the fullest stage as built, in GB; activations as
    planned."""
    from ross_mcore.models.inventory import inventory
    from ross_mcore.parallel.memory import stage_memory

    config, model = read_config(recipe), read_model(recipe)
    layout, text = place(recipe, config, model), " ".join(header(recipe).split())
    data, plan = typical_data(model, config.llm_trains), config.plan
    samples = config.training.global_batch_samples
    assert samples is not None
    micro_batches = layout.rows_for(samples / plan.samples(data), 1) // layout.data_parallel
    layers = f", {' + '.join(map(str, layout.layers_per_chunk))} decoder layers" if recipe.pipeline > 1 else ""
    assert (
        f"Layout: tensor {recipe.tensor} x pipeline {recipe.pipeline} x data {layout.data_parallel}{layers}; a step is "
        f"{micro_batches} micro-batches of one packed row of {recipe.seq_length:,} tokens, "
        f"{plan.samples(data):.1f} samples on average." in text
    )
    found = re.search(
        r"weights ([\d.]+), gradients ([\d.]+), optimizer ([\d.]+) GB; activations, without recomputation, (\d+) GB, "
        r"in total (\d+) GB",
        text,
    )
    assert found
    shapes, planned = inventory(model), {}
    for rank in worlds[str(recipe)]:
        memory = stage_memory(model, shapes, layout, layout.stage(rank.pipeline_rank), plan, data, micro_batches)
        assert (memory.weights, memory.gradients) == (rank.weight_bytes, 4 * rank.trained)
        assert memory.optimizer == 12 * rank.trained / layout.data_parallel
        planned[memory.total] = memory
    fullest = planned[max(planned)]
    parts = fullest.weights, fullest.gradients, fullest.optimizer, fullest.activations, fullest.total
    assert list(found.groups()) == [
        *(f"{part / 1e9:.1f}" for part in parts[:3]),
        *(f"{part / 1e9:.0f}" for part in parts[3:]),
    ]
    assert fullest.total < 72e9, "8 of 80 GB are left for what is not counted"
