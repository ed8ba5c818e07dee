"""Requirements of precision and kernels, refused with reason and remedy; the length of rows."""

from __future__ import annotations

from dataclasses import replace
from operator import attrgetter

import pytest

from ross_mcore import platform
from ross_mcore.config import Config
from ross_mcore.engine.kernels import choose
from ross_mcore.engine.precision import check_execution, kernels_in_words, row_multiple
from ross_mcore.errors import ConfigError
from ross_mcore.platform import Libraries
from tests.recorded import recorded_config

NOTHING = Libraries(
    gpu=False, transformer_engine=False, flash_attention=False, gradient_fusion=False, ordered_kernels=True
)
EVERYTHING = Libraries(
    gpu=True, transformer_engine=True, flash_attention=True, gradient_fusion=True, ordered_kernels=True
)
ENGINE = {"transformer_impl": "transformer_engine"}
BF16 = {**ENGINE, "bf16": True, "pack": False}
FP8 = {**BF16, "fp8_format": "hybrid"}
OVERLAP = {**BF16, "tp_comm_overlap": True, "sequence_parallel": True, "tensor_model_parallel_size": 2}
FULL, SELECTED = {"recompute_granularity": "full"}, {"recompute_granularity": "selective"}
LANGUAGE = recorded_config("qwen2_siglip").language


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (ENGINE, "pip install"),
        ({"attention_backend": "flash", "transformer_impl": "local"}, "transformer_engine; add it"),
        ({"fp8_format": "hybrid"}, r"auto takes local layers here \(this machine has no GPU\); or remove --fp8-format"),
        ({"tp_comm_overlap": True}, "needs --transformer-impl transformer_engine"),
        ({"gradient_accumulation_fusion": True}, "build Apex"),
        ({"overlap_param_gather": True}, "add --use-distributed-optimizer and --overlap-grad-reduce"),
        ({"denoiser_precision": "tf32"}, "TF32 needs a GPU, Ampere or newer, .* use --denoiser-precision fp32"),
        ({"recompute_granularity": "full", "recompute_modules": "mlp"}, "--recompute-granularity selective; add it"),
        ({"recompute_num_layers": 2}, "--recompute-num-layers has no effect without --recompute-granularity full"),
        ({**SELECTED, "recompute_method": "block"}, "--recompute-method has no effect"),
        ({**SELECTED, "recompute_modules": "mlp,layernorm"}, ".layernorm. is nothing that a layer of this model"),
        ({**FULL, "recompute_method": "block"}, "--recompute-method block needs --recompute-num-layers"),
        ({**FULL, "recompute_num_layers": 3}, r"3 does not divide the 2 layers .* \(6, 2\), or .* block"),
    ],
)
def test_what_cannot_work_here_is_refused(flags: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_execution(Config.from_flat(**flags), LANGUAGE, NOTHING, (6, 2))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({**ENGINE, "pack": True}, "add --bf16"),
        ({**BF16, "pack": True, "attention_backend": "unfused"}, "--attention-backend auto"),
        ({**ENGINE, "pack": False, "attention_backend": "fused"}, "computes in 16 bits"),
        ({**FP8, "bf16": False}, "needs --bf16"),
        ({**BF16, "fp8_recipe": "tensorwise"}, "--fp8-recipe has no effect without --fp8-format"),
        ({**BF16, "fp8_param_gather": True}, "--fp8-param-gather has no effect without --fp8-format"),
        ({**BF16, "num_layers_at_end_in_bf16": 2}, "--num-layers-at-end-in-bf16 has no effect"),
        ({**FP8, "fp8_recipe": "tensorwise", "fp8_amax_history_len": 16}, "--fp8-amax-history-len belongs to"),
        ({**FP8, "first_last_layers_bf16": True}, "use --fp8-recipe tensorwise"),
        ({**FP8, "fp8_recipe": "tensorwise", "num_layers_at_start_in_bf16": 2}, "without --first-last-layers-bf16"),
        (
            {
                **FP8,
                "fp8_recipe": "tensorwise",
                "first_last_layers_bf16": True,
                "num_layers_at_end_in_bf16": 3,
                "pipeline_model_parallel_size": 2,
            },
            "--num-layers-at-end-in-bf16 3 is more than the 2 layers of a stage",
        ),
        ({**FP8, "tensor_model_parallel_size": 4}, "key and value heads .* is 8, .* multiples of 16"),
        ({**FP8, "fp8_param_gather": True, "use_distributed_optimizer": False}, "add --use-distributed-optimizer"),
        ({**FP8, "fp8_param_gather": True}, "--training-stage pretrain updates none"),
        (
            {**FP8, "fp8_param_gather": True, "fp8_recipe": "mxfp8", "training_stage": "finetune"},
            "--fp8-param-gather does not work with --fp8-recipe mxfp8",
        ),
        ({**BF16, "tp_comm_overlap": True}, "overlaps the communication of --sequence-parallel"),
        ({**OVERLAP, "bf16": False}, "add --bf16"),
        ({**OVERLAP, "fp8_format": "hybrid", "fp8_recipe": "blockwise"}, "does not know --fp8-recipe blockwise"),
    ],
)
def test_conflicting_options_are_refused(flags: dict, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        check_execution(Config.from_flat(**flags), LANGUAGE, EVERYTHING)


LOCAL, TE = "local", "transformer_engine"
KERNELS = ("execution.transformer_impl", "execution.gradient_accumulation_fusion")
OVERLAPS = ("parallel.overlap_grad_reduce", "parallel.overlap_param_gather")


@pytest.mark.parametrize(
    ("flags", "without", "chosen", "why"),
    [
        ({"bf16": True}, {}, (TE, True, True, True), "installed"),
        ({"bf16": True}, {"gradient_fusion": False}, (TE, True, True, True), "installed"),
        ({"bf16": True}, {"gpu": False}, (LOCAL, True, False, False), "no GPU"),
        ({"bf16": True}, {"transformer_engine": False}, (LOCAL, True, True, True), "pip install"),
        ({"bf16": True, "transformer_impl": LOCAL}, {"gradient_fusion": False}, (LOCAL, False, True, True), "as given"),
        ({}, {}, (LOCAL, True, False, False), "16 bits"),
        ({"bf16": True, "overlap_grad_reduce": False}, {}, (TE, True, False, False), "installed"),
        ({"bf16": True, "overlap_param_gather": False}, {}, (TE, True, True, False), "installed"),
        ({"bf16": True, "use_distributed_optimizer": False}, {}, (TE, True, False, False), "installed"),
    ],
)
def test_what_is_left_open_is_chosen_by_the_machine(flags: dict, without: dict, chosen: tuple, why: str) -> None:
    libraries = replace(EVERYTHING, **without)
    choice = choose(Config.from_flat(**flags), libraries)
    assert tuple(attrgetter(name)(choice.config) for name in (*KERNELS, *OVERLAPS)) == chosen
    assert why in choice.why and choose(choice.config, libraries).config == choice.config
    check_execution(Config.from_flat(**flags), LANGUAGE, libraries)


def test_each_requirement_of_hardware_and_libraries_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    overlap = Config.from_flat(**OVERLAP)
    check_execution(overlap, LANGUAGE, EVERYTHING)
    with pytest.raises(ConfigError, match="need CUDA GPUs"):
        check_execution(overlap, LANGUAGE, replace(EVERYTHING, gpu=False))
    with pytest.raises(ConfigError, match="CUDA_DEVICE_MAX_CONNECTIONS is not 1"):
        check_execution(overlap, LANGUAGE, replace(EVERYTHING, ordered_kernels=False))
    with pytest.raises(ConfigError, match="install gcc and python3-dev, or set TORCH_COMPILE_DISABLE=1"):
        check_execution(Config.from_flat(), LANGUAGE, replace(EVERYTHING, compiler=False))
    fusion = Config.from_flat(gradient_accumulation_fusion=True)
    check_execution(fusion, LANGUAGE, EVERYTHING)
    check_execution(Config.from_flat(), LANGUAGE, replace(EVERYTHING, ordered_kernels=False))
    flash = Config.from_flat(**BF16, attention_backend="flash")
    monkeypatch.setattr(platform, "flash_attention_refusal", lambda: None)
    check_execution(flash, LANGUAGE, EVERYTHING)
    with pytest.raises(ConfigError, match="flash-attn is not installed"):
        check_execution(flash, LANGUAGE, replace(EVERYTHING, flash_attention=False))
    monkeypatch.setattr(platform, "flash_attention_refusal", lambda: "versions")
    with pytest.raises(ConfigError, match="--attention-backend flash: versions; install such a version, or use auto"):
        check_execution(flash, LANGUAGE, EVERYTHING)
    assert "attention: without flash-attn, because versions" in kernels_in_words(
        Config.from_flat(bf16=True), EVERYTHING
    )


def test_attention_is_chosen_by_the_flag_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "flash_attention_refusal", lambda: None)
    monkeypatch.setenv("NVTE_FUSED_ATTN", "0")
    check_execution(Config.from_flat(**BF16, attention_backend="flash"), LANGUAGE, EVERYTHING)
    with pytest.raises(ConfigError, match="NVTE_FUSED_ATTN=0 is set in the environment"):
        check_execution(Config.from_flat(**BF16), LANGUAGE, EVERYTHING)


@pytest.mark.parametrize(
    ("flags", "multiple"),
    [
        ({}, 8),
        ({"tensor_model_parallel_size": 4}, 8),
        ({"tensor_model_parallel_size": 4, "sequence_parallel": True}, 32),
        ({"fp8_format": "hybrid"}, 16),
        ({"fp8_format": "hybrid", "fp8_recipe": "tensorwise", "tensor_model_parallel_size": 2}, 16),
        ({"fp8_format": "hybrid", "fp8_recipe": "mxfp8"}, 32),
        ({"fp8_format": "hybrid", "fp8_recipe": "blockwise"}, 128),
        ({"fp8_format": "e4m3", "tensor_model_parallel_size": 2, "sequence_parallel": True}, 32),
        (
            {"fp8_format": "e4m3", "fp8_recipe": "mxfp8", "tensor_model_parallel_size": 4, "sequence_parallel": True},
            128,
        ),
        (
            {"tp_comm_overlap": True, "seq_length": 1000, "tensor_model_parallel_size": 2, "sequence_parallel": True},
            1008,
        ),
    ],
)
def test_rows_are_padded_for_their_matrix_products(flags: dict, multiple: int) -> None:
    assert row_multiple(Config.from_flat(**flags)) == multiple


def test_precision_of_denoiser_and_vae_is_chosen_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    tf32 = replace(EVERYTHING, tf32=True)

    def chosen(libraries: Libraries, **flags: str) -> tuple[str | None, str | None]:
        execution = choose(Config.from_flat(**flags), libraries).config.execution
        return execution.denoiser_precision, execution.vae_precision

    assert chosen(NOTHING) == ("fp32", "fp32") and chosen(tf32) == ("tf32", "tf32")
    assert chosen(tf32, denoiser_precision="fp32", vae_precision="bf16") == ("fp32", "bf16")
    check_execution(Config.from_flat(vae_precision="tf32"), LANGUAGE, tf32)
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    with pytest.raises(ConfigError, match="NVIDIA_TF32_OVERRIDE=0 in the environment turns it off; unset it, or use"):
        check_execution(Config.from_flat(vae_precision="tf32"), LANGUAGE, EVERYTHING)


def test_blocks_may_be_longer_than_a_stage() -> None:
    config = Config.from_flat(**FULL, recompute_method="block", recompute_num_layers=4)
    check_execution(config, LANGUAGE, NOTHING, (6, 2))
