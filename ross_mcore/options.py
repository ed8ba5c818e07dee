"""The options of a training run, section by section: frozen dataclasses that validate themselves.

One field is one flag, and the text under a field is the flag's help (see flags.py). Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ross_mcore.checked import shown
from ross_mcore.errors import ConfigError

TEMPLATES = ("plain", "qwen_2", "v1", "llama3", "chatml", "tokenizer")
"""Values of --template, besides YAML files."""
TRACKERS = ("wandb", "trackio", "mlflow")
"""Values of --tracker, separated by commas."""
MOST_ANSWERS = 64
MOST_WORKERS = 128
MOST_ROWS = 1 << 20
"""Limit of the batch sizes: every rank plans all rows of a step in advance."""
MOST_TIMEOUT_MINUTES = 365 * 24 * 60
MOST_DIGITS = 15
"""Limit of a number in --skip-iterations."""


def flag_of(name: str) -> str:
    """The flag of an option: seq_length -> --seq-length."""
    return "--" + name.replace("_", "-")


def _positive(section: object, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and value <= 0:
            raise ConfigError(f"{flag_of(name)} must be positive, got {value}")


def _not_negative(section: object, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and value < 0:
            raise ConfigError(f"{flag_of(name)} must not be negative, got {value}")


def _at_most(section: object, most: int, *names: str) -> None:
    for name in names:
        value = getattr(section, name)
        if value is not None and value > most:
            raise ConfigError(f"{flag_of(name)} must be at most {most}, got {shown(value)}")


def _ranges(flag: str, text: str | None) -> list[range]:
    """`7,12-15` as ranges of numbers."""
    found = []
    for part in [] if text is None else text.split(","):
        first, dash, last = (number.strip() for number in part.partition("-"))
        numbers = [first, last] if dash else [first]
        fits = all(number.isdecimal() and len(number) <= MOST_DIGITS for number in numbers)
        if not fits or int(numbers[-1]) < int(first):
            raise ConfigError(
                f"{flag} {shown(text)}: {shown(part.strip())} is neither a number nor a range; write them as 7,12-15, "
                f"with at most {MOST_DIGITS} digits each"
            )
        found.append(range(int(first), int(numbers[-1]) + 1))
    return found


@dataclass(frozen=True)
class ParallelOptions:
    """Parallel layout"""

    tensor_model_parallel_size: int = 1
    """Number of ranks that share every decoder layer (T). Must divide the attention heads and the key-value heads."""
    pipeline_model_parallel_size: int = 1
    """Number of pipeline stages (P). The vision tower is on the first, denoiser and VAE are on the last."""
    pipeline_layout: str = "auto"
    """Decoder layers per stage. auto: balance layers against vision tower, VAE and denoiser, by their estimated time on
    the GPU for the mean sample of the index; even: ignore those three; or a list such as 8,8,8,4."""
    num_layers_per_virtual_pipeline_stage: int | None = None
    """Use the interleaved schedule (virtual pipeline): every rank holds several chunks of about this many layers, and
    the pipeline bubble is divided by their number. Alternative: list a multiple of P chunks, in the order of the model,
    in --pipeline-layout."""
    overlap_p2p_communication: bool = True
    """Interleaved schedule: send and receive between stages while they compute. Required with two stages."""
    sequence_parallel: bool = False
    """Split norms and residuals along the sequence within a tensor-parallel group."""
    use_distributed_optimizer: bool | None = None
    """Shard optimizer state over data-parallel ranks. Default: on with --bf16, off without."""
    overlap_grad_reduce: bool | None = None
    """Reduce gradients over data-parallel ranks during the backward pass. Default: on with the distributed optimizer on
    GPUs."""
    overlap_param_gather: bool | None = None
    """Gather updated weights over data-parallel ranks during the next forward pass. Needs --use-distributed-optimizer
    and --overlap-grad-reduce. Default: on with both on GPUs."""
    distributed_timeout_minutes: float = 10.0
    """End the run when a collective waits longer than this."""

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
    """Train in bfloat16: weights in bfloat16 with fp32 master weights; vision tower and language model compute in
    bfloat16, denoiser and VAE as --denoiser-precision and --vae-precision say."""
    denoiser_precision: Literal["fp32", "tf32", "bf16"] | None = None
    """Precision of the denoiser's matrix products; its norms, softmax, modulation and loss are in fp32. tf32: GPUs
    round the factors to 11 significant bits, as in the reference's training. bf16: to 8. Default: tf32 on GPUs that
    have it, fp32 elsewhere and where NVIDIA_TF32_OVERRIDE=0 is set."""
    vae_precision: Literal["fp32", "tf32", "bf16"] | None = None
    """Precision of the VAE's convolutions and matrix products, with the same values and default. `ross precompute`
    computes in fp32."""
    transformer_impl: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layers of the language model. local: torch's own operations, run anywhere. transformer_engine: NVIDIA's fused
    kernels. auto: transformer_engine with --bf16 on a GPU where it is installed, else local; the start says why."""
    attention_backend: Literal["auto", "flash", "fused", "unfused"] = "auto"
    """Attention kernels of Transformer Engine. flash: flash-attn; fused: cuDNN; unfused: torch, not for packed rows;
    auto: Transformer Engine chooses."""
    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Compute the language model's linear layers in FP8. e4m3: all tensors; hybrid: e5m2 for gradients, e4m3 for the
    others. Needs --bf16 and Transformer Engine."""
    fp8_recipe: Literal["delayed", "tensorwise", "mxfp8", "blockwise"] = "delayed"
    """How FP8 scales are computed. delayed: from the maxima of previous steps; tensorwise: from the tensor itself;
    mxfp8: from blocks of 32 (Blackwell or newer); blockwise: from blocks of 128 (Hopper or newer). mxfp8 and blockwise
    are untried on hardware."""
    fp8_margin: int = 0
    """With --fp8-recipe delayed: leave a factor of 2^N above the largest number seen."""
    fp8_amax_history_len: int = 1
    """With --fp8-recipe delayed: number of steps whose maxima are kept."""
    fp8_amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    """With --fp8-recipe delayed: which of the kept maxima sets the scale."""
    fp8_param_gather: bool = False
    """Keep the language model's matrices in FP8 and gather them in FP8 over data-parallel ranks. Only the optimizer's
    master weights are then exact. Not with mxfp8."""
    first_last_layers_bf16: bool = False
    """Compute the first and the last decoder layers in bf16. Not with --fp8-recipe delayed."""
    num_layers_at_start_in_bf16: int = 1
    """With --first-last-layers-bf16: number of first layers in bf16."""
    num_layers_at_end_in_bf16: int = 1
    """With --first-last-layers-bf16: number of last layers in bf16."""
    gradient_accumulation_fusion: bool | None = None
    """Add weight gradients to the gradient buffer inside the matrix product: in Transformer Engine's layers, and with
    Apex's extension in the local ones and the output layer; a CPU needs neither. Default: on where these run. Untried
    on hardware."""
    tp_comm_overlap: bool = False
    """Overlap the communication of --sequence-parallel with matrix products, in Transformer Engine's buffers. Every row
    is then padded to --seq-length. Untried on hardware."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute activations of the decoder layers in the backward pass. full: of whole layers; selective: of
    --recompute-modules. Default: none, all are kept."""
    recompute_method: Literal["uniform", "block"] | None = None
    """With full: uniform divides all layers of a stage into groups of --recompute-num-layers, of which the first input
    is kept; block recomputes the first --recompute-num-layers layers of a stage, each from its input, and keeps the
    activations of the others. Default: uniform."""
    recompute_num_layers: int | None = None
    """See --recompute-method; with several chunks a stage, layers of a chunk. Default: 1 with uniform."""
    recompute_modules: str | None = None
    """With selective: what is recomputed, core_attn (attention between queries, keys and values), mlp, or both:
    core_attn,mlp. Flash attention keeps as little without core_attn. Default: core_attn."""
    recompute_denoiser: bool = False
    """Recompute the blocks of the denoiser in the backward pass."""

    def __post_init__(self) -> None:
        _positive(self, "fp8_amax_history_len", "recompute_num_layers")
        _not_negative(self, "fp8_margin", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16")


@dataclass(frozen=True)
class DataOptions:
    """Data"""

    data_path: str | None = None
    """Folder of tar shards with an index, as `ross make-shards` and `ross index-shards` write it; or a YAML file with a
    list of data sets: path, weight or epochs, and optionally template, image_aspect_ratio and name."""
    valid_data_path: str | None = None
    """Held-out data: a folder, or a YAML file as for --data-path, whose weights and epochs are ignored. The lm_loss and
    vm_loss of every data set are written to SAVE/validation.jsonl."""
    seq_length: int = 2048
    """Maximum length of a row in tokens, image tokens included. A longer sample is cut, but never inside a picture; a
    sample that has no picture or no label left is skipped."""
    template: str | None = None
    """Conversation template: plain, qwen_2, v1, llama3, chatml (Qwen's own format), tokenizer (the tokenizer's own chat
    template), or a YAML file of your own. Default: plain for --training-stage pretrain; for finetune by the tokenizer,
    llama3 (Llama 3), qwen_2 (Qwen), v1 (Llama, Vicuna) or chatml (others with <|im_start|>)."""
    mm_use_im_start_end: bool = False
    """Write <im_start> and <im_end> as plain text around every picture (template plain: around those inside captions).
    """
    max_images_per_sample: int = 64
    """Skip samples with more pictures than this; skipped samples are counted."""
    max_tokens_per_sample: int | None = None
    """Skip samples with more text tokens than this; skipped samples are counted. Default: no limit, samples are cut to
    --seq-length."""
    pack: bool = True
    """Pack several samples into a row of --seq-length tokens; attention, positions and losses stay separate per sample.
    Needs lengths in the index (--tokenizer and --template of `ross make-shards` or `ross index-shards`)."""
    image_aspect_ratio: Literal["square", "pad"] | None = None
    """square: the image processor only. pad: first pad the picture to a square. Default: square for pretrain, pad for
    finetune."""
    truncated_images: Literal["refuse", "fill"] = "refuse"
    """refuse: a picture whose file is cut off is bad. fill: what is missing stays grey or black (reference)."""
    sampler: Literal["shuffle", "modality_length"] = "shuffle"
    """shuffle: random order in every epoch. modality_length: the reference's group_by_modality_length; the samples of a
    step all have a picture or all have none, and have similar lengths."""
    supervise_final_eos: bool = True
    """Template qwen_2: supervise the last <|im_end|> too. The reference does not (--no-supervise-final-eos)."""
    data_cache_dir: str | None = None
    """Folder for local copies of shards behind URLs (s3://, gs://, https://); shared by the ranks of a node."""
    data_cache_bytes: int = 64 << 30
    """Maximum size of --data-cache-dir in bytes. Room for 32 shards, the window of the shuffled order, avoids repeated
    downloads."""
    max_bad_fraction: float = 0.001
    """End the run when more than this share of the samples so far were bad (unreadable picture or text, an index that
    does not fit the shard) and more than ten were; 0 allows none. Every bad sample is replaced by another and listed in
    SAVE/quarantine.jsonl."""
    skip_samples: str | None = None
    """Leave these samples out: ids as in SAVE/incidents.jsonl, separated by commas, or a file with one id per line.
    Other samples replace them; SAVE/quarantine.jsonl lists which."""
    precomputed: bool = True
    """Read the output of `ross precompute` where the shards have it, and do not build the VAE and the frozen vision
    tower. --no-precomputed computes both from the pictures."""
    allow_missing_labels: bool = False
    """Train even when fewer than half of the samples of a data set have labels: the others train on their pictures
    alone."""
    num_workers: int = 2
    """Worker processes per rank that read, decode and tokenize; 0: the training process does it."""

    def __post_init__(self) -> None:
        _positive(self, "seq_length", "max_images_per_sample", "max_tokens_per_sample", "data_cache_bytes")
        _not_negative(self, "num_workers", "max_bad_fraction")
        _at_most(self, MOST_WORKERS, "num_workers")
        if self.template not in (None, *TEMPLATES) and not str(self.template).endswith((".yaml", ".yml")):
            raise ConfigError(
                f"--template must be {', '.join(TEMPLATES)} or a YAML file of your own (docs/data.md, Templates), got "
                f"{shown(self.template)}"
            )


@dataclass(frozen=True)
class TrainingOptions:
    """Training"""

    training_stage: Literal["pretrain", "finetune"] = "pretrain"
    """pretrain: train projector and denoiser, freeze the language model. finetune: train the language model too."""
    micro_batch_size: int = 1
    """Rows of one forward and backward pass of a pipeline stage."""
    global_batch_size: int | None = None
    """Rows of one optimizer step over all ranks. Default: micro-batch size x data-parallel size."""
    global_batch_samples: int | None = None
    """Instead of --global-batch-size: samples of one optimizer step over all ranks, on average. The rows of a step are
    chosen once, at the first start: N divided by the mean samples of a row, to the nearest multiple of micro-batch size
    x data-parallel size (x pipeline stages if interleaved). Checkpoints keep them."""
    override_global_batch_size: bool = False
    """Allow a run to resume with a different --global-batch-size or --global-batch-samples; data and iteration count
    continue where it stopped."""
    train_iters: int | None = None
    """Optimizer steps of the whole run. Give this or --train-epochs. 0: validate the checkpoint on --valid-data-path,
    print the losses and save nothing; --data-path and --save are not needed, and with --save the losses are also added
    to SAVE/validation.jsonl."""
    train_epochs: float | None = None
    """Passes over the data. Give this or --train-iters."""
    loss_normalization: Literal["global", "microbatch"] = "global"
    """global: each loss is the mean over all labels (or images) of the step, independent of its micro-batches.
    microbatch: the mean of the micro-batches' means, as in the reference; a label in a micro-batch with few labels then
    weighs more."""
    vm_loss_rows: Literal["images", "all"] = "images"
    """images: compute vm_loss over the pictures. all: as in the reference, also denoise a blank picture under a zero
    condition for every row without a picture, unless no row has one."""
    seed: int = 42
    """Seed of data order, timesteps, diffusion noise and posterior noise, the same in every layout."""
    max_bad_steps: int = 10
    """End the run after this many steps in a row whose loss, gradient or weights are not finite. Such steps are not
    applied."""
    loss_spike_factor: float = 3.0
    """Report steps whose lm_loss or vm_loss is above X times the median of the last 100, with the samples that have the
    largest losses, on the console and in SAVE/incidents.jsonl; 0 disables."""
    skip_iterations: str | None = None
    """Skip these iterations: read their data without training on it. Written as 7 or 7,12-15."""
    exit_duration_in_mins: float | None = None
    """Save and exit with status 0 after this many minutes."""
    exit_interval: int | None = None
    """Save and exit with status 0 after an iteration that is a multiple of N."""
    self_check: bool = True
    """Before and after the first step of every start, check that all ranks with a copy of a weight have the same bits
    (tensor-parallel and data-parallel copies, tied embeddings), and that frozen weights are unchanged."""
    check_replicas_interval: int | None = None
    """Repeat that check every N iterations and after the last one. A failed check ends the run before anything is
    saved. Default: at the start only."""

    def __post_init__(self) -> None:
        _positive(self, "micro_batch_size", "global_batch_size", "global_batch_samples")
        _positive(self, "train_epochs", "max_bad_steps")
        _positive(self, "exit_duration_in_mins", "exit_interval", "check_replicas_interval")
        _not_negative(self, "train_iters", "loss_spike_factor")
        _at_most(self, MOST_ROWS, "micro_batch_size", "global_batch_size", "global_batch_samples")
        if self.train_iters is not None and self.train_epochs is not None:
            raise ConfigError("--train-iters and --train-epochs exclude each other; give one")
        if self.global_batch_size is not None and self.global_batch_samples is not None:
            raise ConfigError("--global-batch-size and --global-batch-samples exclude each other; give one")
        _ranges("--skip-iterations", self.skip_iterations)

    def skips(self, iteration: int) -> bool:
        """Whether --skip-iterations names this iteration."""
        return any(iteration in named for named in _ranges("--skip-iterations", self.skip_iterations))


@dataclass(frozen=True)
class OptimizerOptions:
    """Optimizer and schedule"""

    lr: float = 1e-3
    """Peak learning rate (AdamW)."""
    min_lr: float = 0.0
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning-rate decay from the end of the warm-up to the end of the run."""
    lr_warmup_fraction: float | None = None
    """Share of the run with linear warm-up from zero. Default: 0.03 without --lr-warmup-iters."""
    lr_warmup_iters: int | None = None
    """Warm-up in iterations. Give this or --lr-warmup-fraction."""
    projector_lr: float | None = None
    """Peak learning rate of the projector. Default: --lr."""
    denoiser_lr: float | None = None
    """Peak learning rate of the denoiser. Default: --lr."""
    vision_lr: float | None = None
    """Train the vision tower too, at this peak learning rate. Default: the tower is frozen."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; not applied to biases and norms."""
    decay_norm_weights: bool = False
    """Apply weight decay to the language model's norms too, as the reference does for Qwen2 (not for Llama)."""
    adam_beta1: float = 0.9
    """Decay rate of Adam's first moment."""
    adam_beta2: float = 0.999
    """Decay rate of Adam's second moment."""
    adam_eps: float = 1e-8
    """Added to the square root of the second moment."""
    clip_grad: float = 1.0
    """Maximum global gradient norm; 0 disables clipping, as in the reference."""

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
                raise ConfigError(f"{flag_of(name)} must be in [0, 1), got {getattr(self, name)}")
        if self.min_lr > self.lr:
            raise ConfigError(f"--min-lr {self.min_lr} is above --lr {self.lr}")


@dataclass(frozen=True)
class CheckpointOptions:
    """Checkpoints"""

    load: str | None = None
    """Checkpoint to start from: a converted model, or the folder of a run. A run of the same training stage is resumed
    exactly; a run of another stage gives its weights to a new run."""
    save: str | None = None
    """Folder of this run: checkpoints, metrics.jsonl, TensorBoard. If it already holds a checkpoint, the run resumes
    from it."""
    finetune: bool = False
    """Load only the weights of --load and start at iteration 0, even from a run of the same stage. Ignored if --save
    already holds a run, which is then resumed."""
    save_interval: int | None = None
    """Save every N iterations. The end of the run, SIGTERM, SIGINT, SIGUSR1 (which does not end the run),
    --exit-duration-in-mins and --exit-interval also save."""
    save_retain_interval: int | None = None
    """Keep every checkpoint whose iteration is a multiple of N, regardless of --keep-last."""
    keep_last: int | None = None
    """Keep only the newest N checkpoints. Default: all."""
    async_save: bool = True
    """Write checkpoints in the background while training continues. Needs host memory for a copy of everything that a
    rank writes."""
    verify: bool = True
    """Check the checksums of all files of a checkpoint before loading it; if the newest checkpoint of a run is damaged,
    load the one before. --no-verify checks the file sizes only."""

    def __post_init__(self) -> None:
        _positive(self, "save_interval", "save_retain_interval", "keep_last")


@dataclass(frozen=True)
class LoggingOptions:
    """Logging and evaluation"""

    log_interval: int = 10
    """Write a console line and TensorBoard scalars every N iterations; metrics.jsonl has every iteration."""
    eval_interval: int | None = None
    """Every N iterations, reconstruct training pictures from the model's image states and write them to TensorBoard."""
    eval_images: int = 6
    """Number of pictures per --eval-interval."""
    valid_interval: int | None = None
    """Compute losses on --valid-data-path every N iterations and after the last one. Default: after the last one only.
    (Megatron calls this --eval-interval, which means pictures here.)"""
    valid_samples: int | None = None
    """Use the first N samples of every validation data set. Default: all."""
    eval_answers: int = 4
    """With every --eval-interval, answer the questions of N samples with pictures of --valid-data-path, without it of
    --data-path: greedily, at most 24 tokens, into TensorBoard and SAVE/answers.jsonl. 0: none."""
    tensorboard_dir: str | None = None
    """Folder of TensorBoard's files. Default: SAVE/tensorboard."""
    tracker: str | None = None
    """Also send figures, pictures and answers to wandb, trackio or mlflow, or to several: wandb,mlflow. Each needs its
    package: pip install 'ross_mcore[wandb]'. All keep their files in SAVE until their own variables name a server, such
    as WANDB_MODE=online or MLFLOW_TRACKING_URI (docs/training.md)."""
    tracker_project: str = "ross_mcore"
    """Project (MLflow: experiment) at the trackers. The run has the name of the folder of --save."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.trackers if name not in TRACKERS]
        if unknown:
            raise ConfigError(f"--tracker {shown(unknown[0])} is not known; give some of {', '.join(TRACKERS)}")
        _not_negative(self, "eval_answers")
        _at_most(self, MOST_ANSWERS, "eval_answers")
        _positive(self, "log_interval", "eval_interval", "eval_images", "valid_interval", "valid_samples")

    @property
    def trackers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name.strip() for name in self.tracker.split(","))) if self.tracker else ()
