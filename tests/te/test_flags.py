"""Each option of precision and kernels is checked at its destination: the built modules, recipes and optimizers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ross_mcore.config import Config
from ross_mcore.engine.precision import ATTENTION_VALUES, ATTENTION_VARIABLES
from tests.distributed.cases import GATHERED, layout
from tests.distributed.harness import run_ranks

ENGINE: dict[str, Any] = {"transformer_impl": "transformer_engine", "training_stage": "finetune"}
BF16 = {**ENGINE, "bf16": True}
FP8 = {**BF16, "fp8_format": "hybrid"}
FUSED_ADAM = "transformer_engine.pytorch.optimizers.fused_adam.FusedAdam"

ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "local": (
        {**ENGINE, "transformer_impl": "local"},
        {"linears": ["ColumnParallelLinear", "RowParallelLinear"], "attention": "SDPACoreAttention"},
    ),
    "transformer engine": (
        ENGINE,
        {
            "linears": ["TELayerNormColumnParallelLinear", "TERowParallelLinear"],
            "attention": "CoreAttention",
            "weights": ["Parameter", "float32"],
            "optimizer": [FUSED_ADAM],
            "accumulates": [False],
            "config.apply_rope_fusion": True,
            "config.bf16": False,
        },
    ),
    "bf16": (
        BF16,
        {
            "weights": ["Parameter", "bfloat16"],
            "config.bf16": True,
            "config.params_dtype": "torch.bfloat16",
            "config.pipeline_dtype": "torch.bfloat16",
            "optimizer": [FUSED_ADAM],
            "masters": ["torch.float32"],
            "ddp.use_distributed_optimizer": True,
            "recipe": None,
        },
    ),
    **{
        f"attention {backend}": (
            {**BF16, "attention_backend": backend},
            {"backends": values, "config.attention_backend": backend},
        )
        for backend, values in ATTENTION_VALUES.items()
    },
    "fp8 delayed": (
        {**FP8, "fp8_margin": 2, "fp8_amax_history_len": 16, "fp8_amax_compute_algo": "max"},
        {
            "recipe": "TEDelayedScaling",
            "recipe.fp8_format": "Format.HYBRID",
            "recipe.margin": 2,
            "recipe.amax_history_len": 16,
            "recipe.amax_compute_algo": "max",
            "fp8_layers": [1, 2, 3, 4],
            "weights": ["Parameter", "bfloat16"],
        },
    ),
    "fp8 e4m3": (
        {**FP8, "fp8_format": "e4m3"},
        {
            "recipe.fp8_format": "Format.E4M3",
            "recipe.margin": 0,
            "recipe.amax_history_len": 1,
            "recipe.amax_compute_algo": "most_recent",
        },
    ),
    "fp8 tensorwise, bf16 at the ends": (
        {
            **FP8,
            "fp8_recipe": "tensorwise",
            "first_last_layers_bf16": True,
            "num_layers_at_start_in_bf16": 2,
            "num_layers_at_end_in_bf16": 1,
        },
        {"recipe": "Float8CurrentScaling", "recipe.fp8_format": "Format.HYBRID", "fp8_layers": [3]},
    ),
    "fp8 mxfp8": (
        {**FP8, "fp8_recipe": "mxfp8"},
        {"recipe": "MXFP8BlockScaling", "recipe.fp8_format": "Format.HYBRID", "fp8_layers": [1, 2, 3, 4]},
    ),
    "fp8 blockwise": (
        {**FP8, "fp8_recipe": "blockwise", "fp8_format": "e4m3"},
        {"recipe": "Float8BlockScaling", "recipe.fp8_format": "Format.E4M3", "fp8_layers": [1, 2, 3, 4]},
    ),
    "fp8 parameters, delayed": (
        {**FP8, "fp8_param_gather": True},
        {"weights": ["Float8Tensor", "bfloat16"], "quantizers": ["Float8Quantizer"], "ddp.fp8_param_gather": True},
    ),
    "fp8 parameters, tensorwise": (
        {**FP8, "fp8_param_gather": True, "fp8_recipe": "tensorwise", "first_last_layers_bf16": True},
        {"weights": ["Float8Tensor", "Parameter", "bfloat16"], "quantizers": ["Float8CurrentScalingQuantizer"]},
    ),
    "parameter gather overlaps": (
        {**BF16, **GATHERED},
        {
            "ddp.overlap_param_gather": True,
            "ddp.overlap_grad_reduce": True,
            "ddp.align_param_gather": False,
            "hooks": True,
        },
    ),
    "recompute full": (
        {**BF16, "recompute_granularity": "full"},
        {
            "config.recompute_granularity": "full",
            "config.recompute_method": "uniform",
            "config.recompute_num_layers": 1,
        },
    ),
    "recompute blocks": (
        {**BF16, "recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 3},
        {"config.recompute_method": "block", "config.recompute_num_layers": 3},
    ),
    "recompute selective": (
        {**BF16, "recompute_granularity": "selective", "recompute_modules": "mlp"},
        {"config.recompute_granularity": "selective", "config.recompute_modules": ["mlp"]},
    ),
    "gradient accumulation fusion": (
        {**BF16, "gradient_accumulation_fusion": True},
        {"accumulates": [True], "config.gradient_accumulation_fusion": True},
    ),
}
"""Options and their expected effect. mcore's configuration turns on fused gradients in its own output layer, too, which
needs Apex's extension."""

OVERLAP = {**FP8, **layout(2, sequence_parallel=True), "tp_comm_overlap": True, "fp8_recipe": "tensorwise"}
OVERLAP |= {"seq_length": 250, "micro_batch_size": 2, "first_last_layers_bf16": True}


def read_rows(rows: dict[str, dict[str, Any]], base: str, folder: str) -> None:
    """Runs on each rank: builds every row and writes the observed effects to `seen_<rank>.json`."""
    import os

    from ross_mcore import platform

    platform.initialize_process_group(1)
    seen = {}
    for name, flags in rows.items():
        for variable in ATTENTION_VARIABLES:  # mcore sets them, and refuses other values
            os.environ.pop(variable, None)
        seen[name] = _read(Config.from_flat(**flags), base)
    Path(folder, f"seen_{os.environ['RANK']}.json").write_text(json.dumps(seen, default=str))


def _read(config: Config, base: str) -> dict[str, Any]:
    import os

    import torch
    from megatron.core.fp8_utils import get_fp8_recipe, is_first_last_bf16_layer
    from transformer_engine.pytorch.module import base as engine

    from ross_mcore.checkpoint.folder import require_checkpoint
    from ross_mcore.engine.setup import Span, build_engine
    from ross_mcore.parallel import groups
    from ross_mcore.parallel.layout import Placement, make_layout

    checkpoint = require_checkpoint(Path(base))
    model_config = checkpoint.model_config()
    tensor = config.parallel.tensor_model_parallel_size
    layout = make_layout(model_config, Placement(tensor_parallel=tensor), world_size=torch.distributed.get_world_size())
    here = groups.initialize(layout, 1, 1)
    buffers: list[dict[str, Any]] = []
    plain = engine.initialize_ub
    engine.initialize_ub = lambda **given: buffers.append(given)  # the extension's own buffers need GPUs
    try:
        built = build_engine(config, model_config, here, checkpoint, Span(1))
    finally:
        engine.initialize_ub = plain
    model, optimizer = built.model, built.optimizer
    mcore, layers = model.first.config, model.first.decoder.layers
    linears = [m for layer in layers for name, m in layer.named_modules() if name.split(".")[-1].startswith("linear_")]
    weights = [linear.weight for linear in linears]
    parts = [part.optimizer for part in optimizer.chained_optimizers if part.optimizer is not None]
    recipe = get_fp8_recipe(mcore) if mcore.fp8 else None
    return {
        **{f"config.{name}": value for name, value in vars(mcore).items()},
        "config.attention_backend": mcore.attention_backend.name,
        **{f"ddp.{name}": value for name, value in vars(model[0].ddp_config).items()},
        **({f"recipe.{name}": value for name, value in vars(recipe).items()} if recipe else {}),
        "recipe": recipe and type(recipe).__name__,
        "recipe.fp8_format": recipe and str(recipe.fp8_format),
        "fp8_layers": [n + 1 for n in range(mcore.num_layers) if not is_first_last_bf16_layer(mcore, n)],
        "linears": sorted({type(linear).__name__ for linear in linears}),
        "accumulates": sorted({getattr(linear, "fuse_wgrad_accumulation", False) for linear in linears}),
        "attention": type(layers[0].self_attention.core_attention).__name__,
        "weights": sorted({type(w).__name__ for w in weights} | {str(w.dtype).removeprefix("torch.") for w in weights}),
        "quantizers": sorted({type(w._quantizer).__name__ for w in weights if hasattr(w, "_quantizer")}),
        "optimizer": sorted({f"{type(part).__module__}.{type(part).__name__}" for part in parts}),
        "masters": sorted({str(p.dtype) for part in parts for group in part.param_groups for p in group["params"]}),
        "backends": "".join(os.environ.get(variable, "-") for variable in ATTENTION_VARIABLES),
        "hooks": bool(getattr(model[0], "remove_forward_pre_hook_handles", {})),
        "buffers": buffers,
        "overlapping": {
            linear.ub_name: sorted(name for name, on in vars(linear).items() if name.startswith("ub_") and on is True)
            for linear in linears
            if getattr(linear, "ub_name", None)
        },
    }


@pytest.fixture(scope="module")
def seen(base: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("flags")
    rows = {name: flags for name, (flags, _) in ROWS.items()}
    run_ranks(read_rows, 1, rows, str(base("qwen2_siglip")), str(folder))
    return json.loads((folder / "seen_0.json").read_text())


@pytest.mark.parametrize("name", ROWS)
def test_an_option_has_its_effect(name: str, seen: dict[str, dict[str, Any]]) -> None:
    expected = ROWS[name][1]
    assert {key: seen[name].get(key, "missing") for key in expected} == expected


def test_tensor_parallel_overlap_has_its_effect(base: Callable[[str], Path], tmp_path: Path) -> None:
    """Buffers are made once, before the layers, for micro-batches of one length, in each requested precision, and the
    linears use them. Nothing is computed: that needs GPUs."""
    run_ranks(read_rows, 2, {"overlap": OVERLAP}, str(base("qwen2_siglip")), str(tmp_path))
    for rank in range(2):
        looked = json.loads((tmp_path / f"seen_{rank}.json").read_text())["overlap"]
        assert looked["config.tp_comm_overlap"] is True
        modes = ["UserBufferQuantizationMode.FP8", "UserBufferQuantizationMode.NONE"]
        (buffers,) = looked["buffers"]
        assert buffers["shape"] == [2 * 256, 64] and buffers["tp_size"] == 2
        assert buffers["quantization_modes"] == modes and buffers["dtype"] == "torch.bfloat16"
        assert looked["overlapping"] == {
            "qkv": ["ub_bulk_dgrad", "ub_bulk_wgrad", "ub_overlap_ag_fprop"],
            "proj": ["ub_overlap_ag_dgrad", "ub_overlap_rs_fprop"],
            "fc1": ["ub_bulk_dgrad", "ub_bulk_wgrad", "ub_overlap_ag_fprop"],
            "fc2": ["ub_overlap_ag_dgrad", "ub_overlap_rs_fprop"],
        }
