"""The options of a training run, section by section: frozen dataclasses that validate themselves.

One field is one flag, and the text under a field is the flag's help (see flags.py). Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ross_mcore.checked import shown
from ross_mcore.errors import ConfigError

MOST_WORKERS = 128
MOST_ROWS = 1 << 20
"""Of a batch: every rank plans all rows of a step before it begins."""
MOST_TIMEOUT_MINUTES = 365 * 24 * 60
MOST_DIGITS = 15
"""Of an iteration to skip."""


def _positive(section: object, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be positive, got {value}")


def _not_negative(section: object, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and value < 0:
            raise ConfigError(f"--{name.replace('_', '-')} must not be negative, got {value}")


def _at_most(section: object, most: int, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and value > most:
            raise ConfigError(f"--{name.replace('_', '-')} must be at most {most}, got {shown(value)}")


def _ranges(flag: str, text: str | None) -> list[range]:
    """`7,12-15` as ranges of numbers."""
    found = []
    for part in [] if text is None else text.split(","):
        first, dash, last = (number.strip() for number in part.partition("-"))
        numbers = [first, last] if dash else [first]
        fits = all(number.isdecimal() and len(number) <= MOST_DIGITS for number in numbers)
        if not fits or int(numbers[-1]) < int(first):
            raise ConfigError(
                f"{flag} {shown(text)}: {shown(part.strip())} is no number and no range; give them as 7,12-15, of at "
                f"most {MOST_DIGITS} digits"
            )
        found.append(range(int(first), int(numbers[-1]) + 1))
    return found


@dataclass(frozen=True)
class ParallelOptions:
    """Parallel layout"""

    tensor_model_parallel_size: int = 1
    """Ranks that share every decoder layer (T). Must divide the attention and key-value heads."""
    pipeline_model_parallel_size: int = 1
    """Pipeline stages (P). The vision tower is on the first, denoiser and VAE on the last."""
    pipeline_layout: str = "auto"
    """Decoder layers of every stage: auto balances vision tower, VAE and denoiser against layers, even ignores them, or
    give them as 8,8,8,4."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Interleaved schedule (virtual pipeline): every rank holds several chunks, of about this many layers each, and the
    pipeline's bubble shrinks by their number. --pipeline-layout with a multiple of P chunks, in the order of the model,
    says the same layer by layer."""
    overlap_p2p_communication: bool = True
    """Interleaved schedule: send and receive between stages while they compute. Two stages need it."""
    sequence_parallel: bool = False
    """Split norms and residuals over the sequence within a tensor-parallel group."""
    use_distributed_optimizer: bool | None = None
    """Shard optimizer state over data-parallel ranks. Default: with --bf16."""
    overlap_grad_reduce: bool = False
    """Reduce gradients over data-parallel ranks while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated weights over data-parallel ranks while the next forward pass already runs. Needs
    --use-distributed-optimizer and --overlap-grad-reduce."""
    distributed_timeout_minutes: float = 10.0
    """A collective that waits longer than this ends the run."""

    def __post_init__(self) -> None:
        _positive(
            self,
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "num_layers_per_virtual_pipeline_stage",
            "distributed_timeout_minutes",
        )
        _at_most(self, MOST_TIMEOUT_MINUTES, "distributed_timeout_minutes")


@dataclass(frozen=True)
class ExecutionOptions:
    """Precision and kernels"""

    bf16: bool = False
    """Weights in bfloat16 with fp32 masters; vision tower and language model compute in it, denoiser and VAE stay fp32.
    """
    transformer_impl: Literal["local", "transformer_engine"] = "local"
    """local: SDPA attention, runs anywhere. transformer_engine: NVIDIA's fused kernels."""
    attention_backend: Literal["auto", "flash", "fused", "unfused"] = "auto"
    """Transformer Engine's attention: flash-attn (flash), cuDNN (fused), torch (unfused, not for packed rows), or
    whichever it prefers (auto)."""
    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """FP8 linear layers in the language model: e4m3 everywhere, or e5m2 for gradients (hybrid). Needs --bf16 and
    --transformer-impl transformer_engine."""
    fp8_recipe: Literal["delayed", "tensorwise", "mxfp8", "blockwise"] = "delayed"
    """Where FP8 scales come from: a history of maxima (delayed), the tensor itself (tensorwise), or its blocks of 32
    (mxfp8, Blackwell or newer) or 128 (blockwise, Hopper or newer); mxfp8 and blockwise are untried on hardware."""
    fp8_margin: int = 0
    """Of --fp8-recipe delayed: scales leave 2^N of room above the largest number seen."""
    fp8_amax_history_len: int = 1
    """Of --fp8-recipe delayed: how many steps of maxima are kept."""
    fp8_amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    """Of --fp8-recipe delayed: which of the kept maxima makes the scale."""
    fp8_param_gather: bool = False
    """Keep the language model's matrices in FP8 and gather them so over data-parallel ranks; not with mxfp8. Exact
    weights are then the optimizer's masters alone."""
    first_last_layers_bf16: bool = False
    """Leave the first and the last decoder layers in bf16; not with --fp8-recipe delayed."""
    num_layers_at_start_in_bf16: int = 1
    """How many first layers that is."""
    num_layers_at_end_in_bf16: int = 1
    """How many last layers that is."""
    gradient_accumulation_fusion: bool = False
    """Add weight gradients to the gradient buffer inside the matrix product. Needs Apex's extension. Untried on
    hardware."""
    tp_comm_overlap: bool = False
    """Overlap the communication of --sequence-parallel with the matrix products it feeds, in Transformer Engine's
    buffers. Rows are then all of --seq-length. Untried on hardware."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute activations in backward: full layers, or selective (core attention only)."""

    def __post_init__(self) -> None:
        _positive(self, "fp8_amax_history_len")
        _not_negative(self, "fp8_margin", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")


@dataclass(frozen=True)
class DataOptions:
    """Data"""

    data_path: str | None = None
    """Folder of tar shards with an index, as `ross make-shards` and `ross index-shards` write, or a YAML file that
    lists several data sets: path, weight or epochs, and as needed template, image_aspect_ratio, name."""
    valid_data_path: str | None = None
    """Held-out data, a folder or a YAML file as above (weights and epochs do not matter): lm_loss and vm_loss of every
    data set go to SAVE/validation.jsonl."""
    seq_length: int = 2048
    """Longest row in tokens, image tokens included. What is longer is cut, before a picture that the cut would go
    through; a sample that would be left without a picture, or without a label, is skipped."""
    template: Literal["plain", "qwen_2", "v1", "llama3"] | None = None
    """Conversation template. Default: plain for --training-stage pretrain, qwen_2 (Qwen2) or v1 (Llama) for finetune.
    llama3 fits the tokenizer of Llama 3."""
    mm_use_im_start_end: bool = False
    """Write <im_start> and <im_end>, as plain text, around every picture (of template plain: inside captions)."""
    max_images_per_sample: int = 64
    """Skip and count a sample of more pictures."""
    max_tokens_per_sample: int | None = None
    """Skip and count a sample of more tokens of text, pictures not counted. Default: any number, cut to --seq-length.
    """
    pack: bool = True
    """Put several samples into a row of --seq-length tokens, each with attention, positions and losses of its own.
    Needs lengths in the index (--tokenizer and --template of make_shards.py or index_shards.py)."""
    image_aspect_ratio: Literal["square", "pad"] | None = None
    """square: the image processor alone. pad: centre on a square first. Default: square for pretrain, pad for finetune.
    """
    sampler: Literal["shuffle", "modality_length"] = "shuffle"
    """shuffle: every epoch in random order. modality_length: the reference's group_by_modality_length; the samples of a
    step all have a picture or all have none, and are of like length."""
    supervise_final_eos: bool = True
    """Template qwen_2: supervise the last <|im_end|> too. The reference does not (--no-supervise-final-eos)."""
    data_cache_dir: str | None = None
    """Where shards behind URLs (s3://, gs://, https://) are kept while they are read; the ranks of a node share it."""
    data_cache_bytes: int = 64 << 30
    """Most bytes of it; room for the shards of an order's window (32) keeps them from being fetched again."""
    max_bad_fraction: float = 0.001
    """End the run when more than this share of the samples so far were bad (unreadable pictures or text, an index that
    does not fit), once there are more than ten; 0 bears none. Each is replaced and listed in SAVE/quarantine.jsonl."""
    skip_samples: str | None = None
    """Leave samples out: their ids, as SAVE/incidents.jsonl names them, with commas between, or a file of one a line.
    Others that fit take their places; SAVE/quarantine.jsonl tells which."""
    precomputed: bool = True
    """Read what `ross precompute` computed of the pictures, where the shards have it, and build neither the
    VAE nor the frozen vision tower. --no-precomputed computes it from the pictures."""
    num_workers: int = 2
    """Worker processes that read, decode and tokenize on every rank that needs data; 0 does it in the training process.
    """

    def __post_init__(self) -> None:
        _positive(self, "seq_length", "max_images_per_sample", "max_tokens_per_sample", "data_cache_bytes")
        _not_negative(self, "num_workers", "max_bad_fraction")
        _at_most(self, MOST_WORKERS, "num_workers")


@dataclass(frozen=True)
class TrainingOptions:
    """Training"""

    training_stage: Literal["pretrain", "finetune"] = "pretrain"
    """pretrain: projector and denoiser train, the language model is frozen. finetune: the language model trains as
    well."""
    micro_batch_size: int = 1
    """Rows a pipeline stage computes at once."""
    global_batch_size: int | None = None
    """Rows of one optimizer step over all ranks. Default: micro-batch size x data-parallel size."""
    override_global_batch_size: bool = False
    """Let a run go on with another --global-batch-size than before: its data goes on where it stopped, its iterations
    count on."""
    train_iters: int | None = None
    """Optimizer steps of the whole run; or give --train-epochs."""
    train_epochs: float | None = None
    """Passes over the data; or give --train-iters."""
    loss_normalization: Literal["global", "microbatch"] = "global"
    """global: each loss is a mean over all labels, or images, of the step, however it is split. microbatch: the
    reference's mean over micro-batches of each one's own mean, which weighs a label more where there are few."""
    vm_loss_rows: Literal["images", "all"] = "images"
    """images: vm_loss is over the pictures. all: as in the reference, rows without a picture are denoised too, from the
    mean colour under a zero condition, unless no row has a picture."""
    seed: int = 42
    """Data order, timesteps, diffusion and posterior noise all follow from it, in every layout."""
    max_bad_steps: int = 10
    """End the run after this many steps in a row whose loss, gradient or weights were not finite (each is skipped)."""
    loss_spike_factor: float = 3.0
    """Tell of steps whose lm_loss or vm_loss is above X times the median of the last 100, with the samples that make
    most of it, on the console and in SAVE/incidents.jsonl; 0 tells of none."""
    skip_iterations: str | None = None
    """Pass over the data of these iterations without training on it, as 7 or 7,12-15."""
    exit_duration_in_mins: float | None = None
    """Save and exit 0 after this many minutes."""
    exit_interval: int | None = None
    """Save and exit 0 after an iteration that is a multiple of N."""
    self_check: bool = True
    """At every start, before the first step and after it, check that weights which several ranks hold are the same bits
    on all of them (over tensor and data parallelism, and tied embeddings), and after it that frozen ones are unchanged.
    """
    check_replicas_interval: int | None = None
    """Check the same every N iterations and after the last one. What fails ends the run before anything is saved.
    Default: at the start alone."""

    def __post_init__(self) -> None:
        _positive(self, "micro_batch_size", "global_batch_size", "train_iters", "train_epochs", "max_bad_steps")
        _positive(self, "exit_duration_in_mins", "exit_interval", "check_replicas_interval")
        _not_negative(self, "loss_spike_factor")
        _at_most(self, MOST_ROWS, "micro_batch_size", "global_batch_size")
        if self.train_iters is not None and self.train_epochs is not None:
            raise ConfigError("--train-iters and --train-epochs exclude each other; give one")
        _ranges("--skip-iterations", self.skip_iterations)

    def skips(self, iteration: int) -> bool:
        """Whether --skip-iterations names this one."""
        return any(iteration in named for named in _ranges("--skip-iterations", self.skip_iterations))


@dataclass(frozen=True)
class OptimizerOptions:
    """Optimizer and schedule"""

    lr: float = 1e-3
    """Peak learning rate (AdamW)."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls after the warm-up, to the end of the run."""
    lr_warmup_fraction: float | None = None
    """Share of the run that warms up linearly from zero (0.03 if neither this nor --lr-warmup-iters is given)."""
    lr_warmup_iters: int | None = None
    """Warm-up in iterations; or give --lr-warmup-fraction."""
    projector_lr: float | None = None
    """Peak rate of the projector. Default: --lr."""
    denoiser_lr: float | None = None
    """Peak rate of the denoiser. Default: --lr."""
    vision_lr: float | None = None
    """Train the vision tower as well, at this peak rate. Default: the tower is frozen."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; biases and norms have none."""
    decay_norm_weights: bool = False
    """Decay the norms' weights in the language model too, as the reference does for Qwen2 (but not for Llama)."""
    adam_beta1: float = 0.9
    """Decay of the first moment."""
    adam_beta2: float = 0.999
    """Decay of the second moment."""
    adam_eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Clip the global gradient norm; 0 turns clipping off, as in the reference."""

    def __post_init__(self) -> None:
        _not_negative(self, "lr", "min_lr", "lr_warmup_fraction", "lr_warmup_iters", "projector_lr", "denoiser_lr")
        _not_negative(self, "weight_decay", "clip_grad")
        _positive(self, "adam_eps", "vision_lr")
        if self.lr_warmup_fraction is not None and self.lr_warmup_iters is not None:
            raise ConfigError("--lr-warmup-fraction and --lr-warmup-iters exclude each other; give one")
        if (self.lr_warmup_fraction or 0) >= 1:
            raise ConfigError(f"--lr-warmup-fraction must be below 1, got {self.lr_warmup_fraction}")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be in [0, 1), got {getattr(self, name)}")
        if self.min_lr > self.lr:
            raise ConfigError(f"--min-lr {self.min_lr} is above --lr {self.lr}")


@dataclass(frozen=True)
class CheckpointOptions:
    """Checkpoints"""

    load: str | None = None
    """Where to start from: a converted model, or a run. A run of the same training stage is continued exactly; weights
    of another stage start a new run."""
    save: str | None = None
    """Folder of this run: checkpoints, metrics.jsonl, TensorBoard. If it already holds a checkpoint, the run continues
    from there."""
    finetune: bool = False
    """Take only the weights of --load and start at iteration 0, even if it is a run of the same stage. A run that
    --save already holds goes on all the same."""
    save_interval: int | None = None
    """Save every N iterations; the end of the run, SIGTERM, SIGINT, SIGUSR1 (which does not end the run),
    --exit-duration-in-mins and --exit-interval save as well."""
    save_retain_interval: int | None = None
    """Keep every checkpoint whose iteration is a multiple of N, whatever --keep-last says."""
    keep_last: int | None = None
    """Keep the newest N checkpoints. Default: all."""
    async_save: bool = True
    """Write checkpoints while training goes on, from a copy in host memory as large as what a rank writes."""
    verify: bool = True
    """Compare the checksums of all files of a checkpoint before loading it; if a damaged one is the newest of a run,
    the one before is taken. --no-verify looks at the sizes alone."""

    def __post_init__(self) -> None:
        _positive(self, "save_interval", "save_retain_interval", "keep_last")


@dataclass(frozen=True)
class LoggingOptions:
    """Logging and evaluation"""

    log_interval: int = 10
    """Console line and TensorBoard scalars every N iterations; metrics.jsonl has every iteration."""
    eval_interval: int | None = None
    """Every N iterations, reconstruct some training pictures from the model's image states into TensorBoard."""
    eval_images: int = 6
    """How many pictures that is."""
    valid_interval: int | None = None
    """Measure --valid-data-path every N iterations and after the last one. Default: after the last one only. (This is
    Megatron's --eval-interval; here that name was taken by pictures.)"""
    valid_samples: int | None = None
    """Measure the first N samples of every data set, the same every time. Default: all."""
    tensorboard_dir: str | None = None
    """Default: SAVE/tensorboard."""

    def __post_init__(self) -> None:
        _positive(self, "log_interval", "eval_interval", "eval_images", "valid_interval", "valid_samples")
