"""Options of precision and kernels: their requirements, and the model's Execution. docs/gpu.md has the table."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence

import torch

from ross_mcore import platform
from ross_mcore.architecture import LanguageConfig
from ross_mcore.checked import shown
from ross_mcore.config import Config
from ross_mcore.engine.kernels import choose
from ross_mcore.errors import ConfigError
from ross_mcore.models.language import Execution, Fp8
from ross_mcore.options import ExecutionOptions, flag_of
from ross_mcore.platform import Libraries

FP8_ONLY = (
    "fp8_recipe",
    "fp8_margin",
    "fp8_amax_history_len",
    "fp8_amax_compute_algo",
    "fp8_param_gather",
    "first_last_layers_bf16",
)
DELAYED_ONLY = ("fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo")
ATTENTION_VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")
ATTENTION_VALUES = {"flash": "100", "fused": "010", "unfused": "001", "auto": "111"}
"""mcore sets the variables to these values and refuses others (language_module.py:104)."""
BF16_LAYERS = ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")


def execution_of(config: Config) -> Execution:
    """Builds the model's Execution from the options; those left open are chosen for this machine."""
    config = choose(config, platform.libraries()).config
    options = config.execution
    fp8 = None
    if options.fp8_format is not None:
        fp8 = Fp8(
            options.fp8_format,
            options.fp8_recipe,
            options.fp8_margin,
            options.fp8_amax_history_len,
            options.fp8_amax_compute_algo,
            options.fp8_param_gather,
            (options.num_layers_at_start_in_bf16, options.num_layers_at_end_in_bf16)
            if options.first_last_layers_bf16
            else None,
        )
    return Execution(
        transformer_impl="transformer_engine" if options.transformer_impl == "transformer_engine" else "local",
        dtype=torch.bfloat16 if options.bf16 else torch.float32,
        sequence_parallel=config.parallel.sequence_parallel,
        attention_backend=options.attention_backend,
        fp8=fp8,
        gradient_accumulation_fusion=bool(options.gradient_accumulation_fusion),
        tp_comm_overlap=options.tp_comm_overlap,
        recompute=config.recompute,
        denoiser_precision=options.denoiser_precision or "fp32",
        vae_precision=options.vae_precision or "fp32",
        overlap_p2p_communication=config.parallel.overlap_p2p_communication,
    )


def kernels_in_words(config: Config, libraries: Libraries) -> str:
    """The layers that compute the language model, why, and with what kind of attention and optimizer."""
    choice = choose(config, libraries)
    options, parallel = choice.config.execution, choice.config.parallel
    line = f"decoder layers: {options.transformer_impl} ({choice.why})"
    if options.transformer_impl == "transformer_engine" and options.attention_backend == "auto":
        refusal = platform.flash_attention_refusal()
        line += f"; attention: {f'without flash-attn, because {refusal}' if refusal else 'flash-attn or cuDNN'}"
    switches = {
        "weight gradients are added inside matrix products": options.gradient_accumulation_fusion,
        "gradients are reduced during the backward pass": parallel.overlap_grad_reduce,
        "weights are gathered during the forward pass": parallel.overlap_param_gather,
    }
    return "; ".join([line, *(name for name, is_on in switches.items() if is_on)])


def row_multiple(config: Config) -> int:
    """Rows are padded to a multiple of this many tokens.

    8 fills the tiles of 16-bit matrix products. FP8 products need multiples of 16, or of a block of scales, per rank.
    """
    multiple = 8
    if config.execution.fp8_format is not None:
        multiple = {"mxfp8": 32, "blockwise": 128}.get(config.execution.fp8_recipe, 16)
    multiple *= config.parallel.tensor_model_parallel_size if config.parallel.sequence_parallel else 1
    if config.execution.tp_comm_overlap:  # its buffers have one length
        multiple *= -(-config.data.seq_length // multiple)
    return multiple


def check_execution(
    config: Config, language: LanguageConfig, libraries: Libraries, layers_per_chunk: Sequence[int] = ()
) -> None:
    """Raises ConfigError, before anything is built, with the reason and the remedy.

    layers_per_chunk: decoder layers of each pipeline stage, or of each of its chunks.
    """
    given, choice = config.execution.transformer_impl, choose(config, libraries)
    config = choice.config
    if config.execution.transformer_impl == "local":
        for flag in _changed(config.execution, ("fp8_format", "attention_backend", "tp_comm_overlap")):
            remedy = "; add it" if given == "local" else f", and auto takes local layers here ({choice.why})"
            raise ConfigError(f"{flag} needs --transformer-impl transformer_engine{remedy}; or remove {flag}")
    for message in (
        *_engine(config, libraries),
        *_parts(config.execution, libraries),
        *_fp8(config, language),
        *_recompute(config.execution, layers_per_chunk),
        *_overlap(config, libraries),
    ):
        raise ConfigError(message)
    if config.execution.fp8_format is not None:
        reason = platform.fp8_refusal(config.execution.fp8_recipe)
        if reason is not None:
            raise ConfigError(
                f"--fp8-format {config.execution.fp8_format} --fp8-recipe {config.execution.fp8_recipe}: {reason}; "
                "take another recipe, or remove --fp8-format to train in bf16"
            )


def _changed(options: ExecutionOptions, names: tuple[str, ...]) -> Iterator[str]:
    """The flags among `names` whose values differ from their defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(options)}
    return (flag_of(name) for name in names if getattr(options, name) != defaults[name])


def _engine(config: Config, libraries: Libraries) -> Iterator[str]:
    """Checks Transformer Engine and its attention."""
    options, backend = config.execution, config.execution.attention_backend
    if options.transformer_impl != "transformer_engine":
        return
    if not libraries.transformer_engine:
        yield (
            "--transformer-impl transformer_engine: Transformer Engine is not installed; install it with "
            "pip install '.[gpu]' in this repository on a machine with a CUDA GPU, or use --transformer-impl local"
        )
    if not options.bf16 and backend in ("flash", "fused"):
        yield f"--attention-backend {backend} computes in 16 bits; add --bf16, or use --attention-backend unfused"
    if config.data.pack and (not options.bf16 or backend == "unfused"):
        yield (
            "--pack with --transformer-impl transformer_engine: packed rows need its flash or fused attention, which "
            "computes in 16 bits; add --bf16 and --attention-backend auto, or use --no-pack"
        )
    for name, value in zip(ATTENTION_VARIABLES, ATTENTION_VALUES[backend]):
        given = os.environ.get(name, value)
        if given != value:
            yield (
                f"{name}={given} is set in the environment, and --attention-backend {backend} means {value}; unset it, "
                "and choose by --attention-backend alone"
            )
    if backend == "flash" and not libraries.flash_attention:
        yield (
            "--attention-backend flash: flash-attn is not installed; install it with pip install '.[gpu]' in this "
            "repository, or use auto"
        )
    elif backend == "flash" and libraries.transformer_engine and (refusal := platform.flash_attention_refusal()):
        yield f"--attention-backend flash: {refusal}; install such a version, or use auto"


def _fp8(config: Config, language: LanguageConfig) -> Iterator[str]:
    """Checks FP8 options and the sizes of matrices."""
    options, parallel = config.execution, config.parallel
    if options.fp8_format is None:
        for flag in _changed(options, (*FP8_ONLY, *BF16_LAYERS)):
            yield f"{flag} has no effect without --fp8-format; add --fp8-format hybrid, or remove it"
        return
    if not options.bf16:
        yield f"--fp8-format {options.fp8_format} needs --bf16, in which all other operations are computed"
    if options.fp8_recipe != "delayed":
        for flag in _changed(options, DELAYED_ONLY):
            yield f"{flag} belongs to --fp8-recipe delayed; remove it"
    elif options.first_last_layers_bf16:
        yield "--first-last-layers-bf16 does not work with --fp8-recipe delayed; use --fp8-recipe tensorwise"
    stage_layers = language.num_hidden_layers // parallel.pipeline_model_parallel_size
    for name in BF16_LAYERS:
        flag = flag_of(name)
        if not options.first_last_layers_bf16 and flag in _changed(options, BF16_LAYERS):
            yield f"{flag} has no effect without --first-last-layers-bf16; add it"
        elif options.first_last_layers_bf16 and getattr(options, name) > stage_layers:
            yield f"{flag} {getattr(options, name)} is more than the {stage_layers} layers of a stage; lower it"
    yield from _matrices(config, language)


def _parts(options: ExecutionOptions, libraries: Libraries) -> Iterator[str]:
    """Checks the precision of denoiser and VAE."""
    for name in ("denoiser_precision", "vae_precision"):
        if getattr(options, name) == "tf32" and not libraries.tf32:
            why, remedy = f"{platform.TF32_OVERRIDE}=0 in the environment turns it off", "unset it, or use"
            if os.environ.get(platform.TF32_OVERRIDE) != "0":
                why, remedy = "TF32 needs a GPU, Ampere or newer, and this process has none", "use"
            yield f"{flag_of(name)} tf32: {why}; {remedy} {flag_of(name)} fp32, or leave the choice to the program"


RECOMPUTED = ("core_attn", "mlp")
"""mcore's names for what can be recomputed of a layer of this model. Its others are of experts and latent attention,
and layernorm: Transformer Engine's norms are inside its linear layers, and for others mcore 0.16.1 calls it too."""


def _recompute(options: ExecutionOptions, layers_per_chunk: Sequence[int]) -> Iterator[str]:
    """mcore's requirements (transformer_config.py, "activation recomputation"; transformer_block.py), and its silence.

    It takes flags that have no effect, and fails in the first step where groups do not divide the layers.
    """
    full = ("recompute_method", "recompute_num_layers")
    granularity = options.recompute_granularity
    for kind, names in (("full", full), ("selective", ("recompute_modules",))):
        for flag in _changed(options, names) if granularity != kind else ():
            yield f"{flag} has no effect without --recompute-granularity {kind}; add it, or remove {flag}"
    number = options.recompute_num_layers
    if options.recompute_method == "block" and number is None:
        yield "--recompute-method block needs --recompute-num-layers, the number of layers of a stage to recompute"
    if granularity == "full" and options.recompute_method != "block" and number is not None:
        for layers in layers_per_chunk:
            if layers % number:
                yield (
                    f"--recompute-num-layers {number} does not divide the {layers} layers of a pipeline stage, which "
                    "--recompute-method uniform needs; use a divisor of each stage's layers "
                    f"({', '.join(map(str, layers_per_chunk))}), or --recompute-method block"
                )
    if options.recompute_modules is not None:
        named = options.recompute_modules.split(",")
        if wrong := [name for name in named if name not in RECOMPUTED]:
            yield (
                f"--recompute-modules {shown(options.recompute_modules)}: {shown(wrong[0])} is nothing that a layer of "
                f"this model recomputes; give one or several of {', '.join(RECOMPUTED)}, separated by commas"
            )


def _matrices(config: Config, language: LanguageConfig) -> Iterator[str]:
    """Both dimensions of every weight, on a tensor-parallel rank, must be multiples of the block of an FP8 product."""
    block = 32 if config.execution.fp8_recipe == "mxfp8" else 16
    ranks = config.parallel.tensor_model_parallel_size
    heads = language.num_attention_heads * language.head_dim
    sides = {
        "hidden_size": language.hidden_size,
        "intermediate_size / tensor-parallel size": language.intermediate_size // ranks,
        "attention heads x head_dim / tensor-parallel size": heads // ranks,
        "key and value heads x head_dim / tensor-parallel size": language.num_key_value_heads
        * language.head_dim
        // ranks,
    }
    for name, size in sides.items():
        if size % block:
            yield (
                f"--fp8-format with --fp8-recipe {config.execution.fp8_recipe}: {name} is {size}, and FP8 matrix "
                f"products take multiples of {block}; lower --tensor-model-parallel-size, or remove --fp8-format"
            )


def _overlap(config: Config, libraries: Libraries) -> Iterator[str]:
    """Checks overlap and fusion."""
    options, parallel = config.execution, config.parallel
    if parallel.overlap_param_gather and not (config.use_distributed_optimizer and parallel.overlap_grad_reduce):
        yield (
            "--overlap-param-gather gathers the weights that the distributed optimizer updates; add "
            "--use-distributed-optimizer and --overlap-grad-reduce"
        )
    if options.fp8_param_gather and not config.use_distributed_optimizer:
        yield "--fp8-param-gather gathers the weights of the distributed optimizer; add --use-distributed-optimizer"
    if options.fp8_param_gather and config.training.training_stage == "pretrain":
        yield (
            "--fp8-param-gather gathers the language model's updated weights, and --training-stage pretrain updates "
            "none; remove it"
        )
    if options.fp8_param_gather and options.fp8_recipe == "mxfp8":
        yield (
            "--fp8-param-gather does not work with --fp8-recipe mxfp8: Transformer Engine has no cast of masters into "
            "its blocks; use another recipe, or remove --fp8-param-gather"
        )
    if options.tp_comm_overlap and not parallel.sequence_parallel:
        yield "--tp-comm-overlap overlaps the communication of --sequence-parallel; add it"
    if options.tp_comm_overlap and not libraries.gpu:
        yield "--tp-comm-overlap: Transformer Engine's buffers for it need CUDA GPUs; remove it"
    if options.tp_comm_overlap and not options.bf16:
        yield "--tp-comm-overlap: its buffers hold 16 bits or FP8; add --bf16"
    if options.tp_comm_overlap and options.fp8_recipe == "blockwise":
        yield "--tp-comm-overlap does not know --fp8-recipe blockwise; use another recipe, or remove --tp-comm-overlap"
    if parallel.tensor_model_parallel_size > 1 and not libraries.ordered_kernels:
        yield (
            "CUDA_DEVICE_MAX_CONNECTIONS is not 1: tensor-parallel communication overlaps with matrix products only "
            "if kernels start in the order they are issued, which GPUs before Blackwell do with that value; unset it "
            "(the program then sets it to 1), or set it to 1 before the program starts"
        )
    if not libraries.compiler:
        yield (
            "torch.compile, which fuses functions of the decoder on a GPU, needs a C compiler and the headers of this "
            "Python, and finds no compiler or no Python.h; install gcc and python3-dev, or set "
            f"{platform.COMPILE_DISABLE}=1 to compute these functions unfused"
        )
    fuses = libraries.gradient_fusion or options.transformer_impl == "transformer_engine"
    if options.gradient_accumulation_fusion and not fuses:
        yield (
            "--gradient-accumulation-fusion: local layers need Apex's extension fused_weight_gradient_mlp_cuda, which "
            "is not installed; build Apex with --cpp_ext and --cuda_ext (docs/gpu.md), use --transformer-impl "
            "transformer_engine, whose layers need none, or remove it"
        )
