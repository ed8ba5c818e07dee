"""The table of parts: needs, commands and conditions of each. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

NEEDS = ("gpu", "transformer_engine", "fp8", "room")
"""room: GPUs of 75 GB and 260 GB of disk, for the model of full size."""
MINUTES = (10, 60)
"""Of the whole script, with one process and with several."""


@dataclass(frozen=True)
class Machine:
    """The machine's limits. ranks: the maximum number of processes; lacks: each need that it cannot meet -> the
    reason."""

    gpu: bool
    ranks: int
    lacks: Mapping[str, str] = field(default_factory=dict)

    def refusal(self, needs: tuple[str, ...], ranks: int = 1) -> str | None:
        """The reason why it cannot run here; None if it can."""
        for need in needs:
            if need in self.lacks:
                return self.lacks[need]
        if ranks > self.ranks:
            return f"needs {ranks} {'GPUs' if self.gpu else 'ranks'}, there are {self.ranks}"
        return None


@dataclass(frozen=True)
class Life:
    """One start of a training: its processes and additional flags."""

    ranks: int
    flags: str = ""


@dataclass(frozen=True)
class Training:
    """A run, in one life or in several that resume each other.

    flags: of all its lives; falls: whether its losses must; planned: whether the report has the memory that
    tools/plan_layout.py plans beside the peak.
    """

    name: str
    lives: tuple[Life, ...]
    flags: str = ""
    needs: tuple[str, ...] = ()
    model: str = "small"
    iterations: int = 12
    falls: bool = True
    planned: bool = False

    @property
    def ranks(self) -> int:
        return max((life.ranks for life in self.lives), default=1)


@dataclass(frozen=True)
class Tolerance:
    """The largest relative difference allowed for a step's lm_loss or vm_loss. why: its origin."""

    cpu: float
    gpu: float
    why: str


@dataclass(frozen=True)
class Part:
    """Commands and trainings that are judged together.

    commands: as typed in the repository, `{out}` is the folder of the report and `{ranks}` the number of processes;
    each must exit with status 0, and its lines that begin with "note: " are in the report. trainings: each must finish
    with finite losses, which must fall. `against`: the name of a training whose losses they must match step by step,
    within `tolerance`. minutes: its share of the time, with one process and with several; what does not fit is cut.
    With 0 it is skipped unless --parts names it.
    """

    name: str
    title: str
    commands: tuple[str, ...] = ()
    trainings: tuple[Training, ...] = ()
    against: str | None = None
    tolerance: Tolerance | None = None
    needs: tuple[str, ...] = ()
    ranks: int = 1
    limit_seconds: int = 300
    minutes: tuple[float, float] = (1, 1)


SAMPLES = 64
COMMON = {
    "small": "--training-stage finetune --seq-length 256 --no-pack --global-batch-size 8 --micro-batch-size 2 "
    "--lr 1e-3 --image-aspect-ratio square --num-workers 0 --log-interval 1",
    "medium": "--training-stage finetune --seq-length 2048 --global-batch-size 16 --micro-batch-size 1 --lr 1e-4 "
    "--image-aspect-ratio square --num-workers 4 --log-interval 1 --bf16",
    "full": "--training-stage finetune --seq-length 4096 --global-batch-size 32 --micro-batch-size 1 --lr 1e-5 "
    "--image-aspect-ratio square --num-workers 4 --log-interval 1 --bf16 --keep-last 1",
}
"""Flags of each training of a model, besides --load, --data-path, --save and --train-iters."""

TENSOR = "--tensor-model-parallel-size 2 --sequence-parallel"
PIPELINE = "--pipeline-model-parallel-size 2"
INTERLEAVED = f"{PIPELINE} --num-layers-per-virtual-pipeline-stage"
LOCAL, TE = "--transformer-impl local", "--transformer-impl transformer_engine"
FP8 = f"--bf16 {TE} --fp8-format hybrid"

ONE = Training("one process", (Life(1),))
BF16 = Training("bf16", (Life(1),), f"--bf16 {LOCAL}")
BF16_TE = Training("bf16, Transformer Engine", (Life(1),), f"--bf16 {TE}", ("transformer_engine",))
ROWS = "--pack --seq-length 512 --global-batch-size 4 --micro-batch-size 1"
"""Packed rows of the small model's samples."""
PACKED = Training("packed", (Life(1),), f"--bf16 {LOCAL} {ROWS}", iterations=20)
FROZEN = "--training-stage pretrain --template qwen_2"
FROZEN_TE = Training(
    "bf16, frozen language model", (Life(1),), f"--bf16 {TE} {FROZEN}", ("transformer_engine",), falls=False
)
PACKED_TE = f"--bf16 {TE} {ROWS}"
EIGHT_ROWS = f"{PACKED_TE} --global-batch-size 8"
SPLIT = f"{TENSOR} {PIPELINE} --use-distributed-optimizer"
PACKED_SPLIT = Training(
    "packed, tensor 2 x pipeline 2 x data 2", (Life(8, SPLIT),), EIGHT_ROWS, ("transformer_engine",), iterations=20
)
REFERENCES = (ONE, BF16, BF16_TE, PACKED, PACKED_SPLIT, FROZEN_TE)
"""Trainings that others are compared with; a part that needs one runs it unless another part has run it."""

TOKENIZER = "examples/demo/weights/tokenizer"
SHARDS = (
    f"python examples/demo/scenes.py --out {{out}}/data --count {SAMPLES}",
    "python tools/make_shards.py --data {out}/data/finetune.json --image-folder {out}/data --out {out}/shards "
    f"--tokenizer {TOKENIZER} --template qwen_2",
)
SMALL = (
    "python -m examples.acceptance.models --size small --out {out}/models/small",
    "python tools/convert_hf_to_mcore.py --language-model {out}/models/small/language_model "
    f"--tokenizer {TOKENIZER} --vision-model examples/demo/weights/vision_model "
    "--pixel-decoder examples/demo/weights/pixel_decoder --denoiser-width 96 --save {out}/checkpoints/small",
)


def _sized(size: str) -> tuple[str, ...]:
    """Commands that write and convert a model with tower and VAE of published shapes."""
    return (
        f"python -m examples.acceptance.models --size {size} --out {{out}}/models/{size}",
        f"python tools/convert_hf_to_mcore.py --language-model {{out}}/models/{size}/language_model "
        f"--tokenizer {TOKENIZER} --vision-model {{out}}/models/{size}/vision_model "
        f"--pixel-decoder {{out}}/models/{size}/pixel_decoder --dtype bfloat16 --save {{out}}/checkpoints/{size}",
    )


def _probe(kind: str, name: str, flags: str, ranks: str = "1", model: str = "small") -> str:
    """A command of examples/acceptance/probe.py on a training's options; its result is `{out}/runs/<name>`."""
    return (
        f"torchrun --nproc-per-node {ranks} -m examples.acceptance.probe {kind} {{out}}/runs/{name} {COMMON[model]} "
        f"--load {{out}}/checkpoints/{model} --data-path {{out}}/shards --save {{out}}/runs/{kind}_{name} {flags}"
    )


def _compared(name: str, flags: str) -> tuple[str, str]:
    """Gradients of the packed rows' first step with these layers, against those of the local ones in bf16."""
    probe = _probe("gradients", name, f"--bf16 {ROWS} {flags} --train-iters 2 --no-use-distributed-optimizer")
    return probe, f"python -m examples.acceptance.probe compare {{out}}/runs/{name} {{out}}/runs/local 5e-2"


def measured(name: str, ranks: int, flags: str, *needs: str, model: str = "medium", iterations: int = 12) -> Training:
    """A run whose speed and memory are reported, of random weights whose losses need not fall."""
    lives = (Life(ranks, flags),)
    return Training(name, lives, needs=needs, model=model, iterations=iterations, falls=False, planned=True)


TE_NEEDS = ("transformer_engine",)
STOPPED = Life(8, f"{SPLIT} --exit-interval 10")

PARTS = (
    Part(
        "environment",
        "hardware, versions, TF32, attention backends",
        ("python -m examples.acceptance.machine",),
        minutes=(0.5, 1.5),
    ),
    Part("prepare", "drawn pictures, shards, a small model of random weights", SHARDS + SMALL, minutes=(1, 1)),
    Part(
        "links",
        "all-reduce rates",
        ("torchrun --nproc-per-node {ranks} -m examples.acceptance.links",),
        ranks=2,
        minutes=(0, 1),
    ),
    Part(
        "packed",
        "packed rows in bf16 train with Transformer Engine, flash and fused, as with local layers",
        (_probe("gradients", "local", f"--bf16 {LOCAL} {ROWS} --train-iters 2 --no-use-distributed-optimizer"),),
        trainings=(
            Training("packed, Transformer Engine", (Life(1),), PACKED_TE, TE_NEEDS, iterations=20),
            Training(
                "packed, Transformer Engine, cuDNN",
                (Life(1),),
                f"{PACKED_TE} --attention-backend fused",
                TE_NEEDS,
                iterations=20,
            ),
            Training("packed, data 2", (Life(2),), f"--bf16 {LOCAL} {ROWS}", iterations=20),
        ),
        against="packed",
        tolerance=Tolerance(2e-2, 2e-2, "a bf16 number has 8 bits, and kernels round elsewhere on a GPU"),
        minutes=(2, 5),
    ),
    Part(
        "packed_gradients",
        "the gradients of packed rows, by part of the model, with Transformer Engine's flash and fused attention",
        (*_compared("engine", TE), *_compared("engine_fused", f"{TE} --attention-backend fused")),
        needs=TE_NEEDS,
        minutes=(1, 3),
    ),
    Part(
        "resume",
        "a stopped run resumes, at its layout and at others, like an uninterrupted one",
        trainings=(
            Training(
                "tensor 2, stopped, tensor 2, stopped, pipeline 2",
                (
                    Life(2, f"{TENSOR} --exit-interval 4"),
                    Life(2, f"{TENSOR} --exit-interval 8"),
                    Life(2, PIPELINE),
                ),
            ),
            Training(
                "tensor 2 x pipeline 2, stopped, data 4 with the distributed optimizer",
                (
                    Life(4, f"{TENSOR} {PIPELINE} --exit-interval 6"),
                    Life(4, "--use-distributed-optimizer"),
                ),
                needs=("gpu",),
            ),
        ),
        against="one process",
        tolerance=Tolerance(1e-5, 1e-4, "as for layouts"),
        minutes=(0, 1.5),
    ),
    Part(
        "resume_engine",
        "Transformer Engine at tensor 2 x pipeline 2 x data 2 in bf16 is saved and resumes at other layouts",
        trainings=(
            Training(
                "packed, tensor 2 x pipeline 2 x data 2, stopped, tensor 2 x data 4",
                (STOPPED, Life(8, f"{TENSOR} --use-distributed-optimizer")),
                EIGHT_ROWS,
                TE_NEEDS,
                iterations=20,
            ),
            Training(
                "packed, tensor 2 x pipeline 2 x data 2, stopped, data 8",
                (STOPPED, Life(8, "--use-distributed-optimizer")),
                EIGHT_ROWS,
                TE_NEEDS,
                iterations=20,
            ),
        ),
        against="packed, tensor 2 x pipeline 2 x data 2",
        tolerance=Tolerance(2e-2, 2e-2, "bf16 sums in another order"),
        needs=TE_NEEDS,
        ranks=8,
        minutes=(0, 3.5),
    ),
    Part(
        "full_size",
        "random weights of Qwen2-7B's shapes, packed rows of 4,096 tokens: speed, memory beside plan, a save",
        _sized("full"),
        trainings=(
            measured(
                "7B, tensor 2 x data 4",
                8,
                f"{TENSOR} --save-interval 20 --async-save",
                "room",
                model="full",
                iterations=34,
            ),
            measured(
                "7B, tensor 2 x pipeline 2 x data 2", 8, f"{TENSOR} {PIPELINE}", "room", model="full", iterations=34
            ),
            measured(
                "7B, tensor 4 x data 2",
                8,
                "--tensor-model-parallel-size 4 --sequence-parallel",
                "room",
                model="full",
                iterations=34,
            ),
        ),
        needs=("gpu", "room"),
        ranks=8,
        limit_seconds=420,
        minutes=(0, 20),
    ),
    Part(
        "profile",
        "two steps of one rank a stage: kernels by kind, waits of the host, attention kernels",
        (
            *_sized("medium"),
            _probe("profile", "profile", "--train-iters 9", model="medium"),
        ),
        needs=("gpu",),
        minutes=(2, 4),
    ),
    Part(
        "profile_split",
        "the same at tensor 2 x pipeline 2",
        (_probe("profile", "profile_split", f"{TENSOR} {PIPELINE} --train-iters 9", "4", "medium"),),
        needs=("gpu",),
        ranks=4,
        minutes=(0, 3),
    ),
    Part(
        "killed",
        "one rank is killed: the others notice and end",
        (
            "python -m examples.acceptance.killed {ranks} 90 "
            f"{COMMON['small']} --load {{out}}/checkpoints/small --data-path {{out}}/shards --save {{out}}/runs/killed "
            "--train-iters 100000 --micro-batch-size 1",
        ),
        ranks=2,
        minutes=(0, 4),
    ),
    Part(
        "fp8",
        "FP8 linear layers train like bf16 ones, up to their rounding",
        trainings=(
            Training("FP8, delayed scaling", (Life(1),), f"{FP8} --fp8-recipe delayed --fp8-amax-history-len 16"),
            Training("FP8, tensorwise scaling", (Life(1),), f"{FP8} --fp8-recipe tensorwise"),
            Training("FP8, tensorwise scaling, tensor 2", (Life(2, TENSOR),), f"{FP8} --fp8-recipe tensorwise"),
        ),
        against="bf16, Transformer Engine",
        tolerance=Tolerance(1e-1, 1e-1, "an e4m3 number has 4 bits; a guess"),
        needs=("transformer_engine", "fp8"),
        minutes=(1, 3.5),
    ),
    Part(
        "frozen",
        "stage 1, whose language model is frozen, with Transformer Engine and in FP8",
        trainings=(
            Training(
                "FP8, frozen language model",
                (Life(1),),
                f"{FP8} --fp8-recipe tensorwise {FROZEN}",
                ("fp8",),
                falls=False,
            ),
            Training(
                "bf16, frozen language model, tensor 2",
                (Life(2, TENSOR),),
                f"--bf16 {TE} {FROZEN}",
                TE_NEEDS,
                falls=False,
            ),
        ),
        against="bf16, frozen language model",
        tolerance=Tolerance(1e-1, 1e-1, "as for FP8"),
        needs=TE_NEEDS,
        minutes=(0.5, 2.5),
    ),
    Part(
        "infinity",
        "an infinite weight: the step is not applied, and the weight is named",
        (_probe("infinity", "infinity", "--train-iters 3"),),
        minutes=(0.5, 0.5),
    ),
    Part(
        "long_row",
        "a packed row of 32,768 tokens, 0.7 billion parameters",
        trainings=(measured("0.7B, a row of 32,768", 1, "--seq-length 32768 --global-batch-size 1", iterations=3),),
        needs=("gpu",),
        minutes=(0.5, 1),
    ),
    Part(
        "layouts",
        "every layout trains like one process, in fp32",
        trainings=(
            Training("data 2", (Life(2),)),
            Training("tensor 2", (Life(2, TENSOR),)),
            Training("pipeline 2", (Life(2, PIPELINE),)),
            Training("pipeline 2, interleaved", (Life(2, f"{INTERLEAVED} 1"),)),
            Training("tensor 2 x pipeline 2", (Life(4, f"{TENSOR} {PIPELINE}"),)),
            Training(
                "tensor 2 x pipeline 2 x data 2, distributed optimizer",
                (Life(8, f"{TENSOR} {PIPELINE} --use-distributed-optimizer --overlap-grad-reduce"),),
            ),
        ),
        against="one process",
        tolerance=Tolerance(
            1e-5,
            1e-4,
            "fp32 sums in another order, carried through twelve steps of Adam (1e-7 on a CPU); TF32 is off. On a GPU "
            "other shapes use other kernels, and this figure is a guess",
        ),
        minutes=(0, 2.5),
    ),
    Part(
        "parity",
        "recorded values of the reference implementation, in fp32",
        ("python tools/check_parity.py --golden tests/golden --failures-only",),
        limit_seconds=600,
        minutes=(1, 1.5),
    ),
    Part(
        "parity_split",
        "the same at tensor 2 x pipeline 2",
        (
            "torchrun --nproc-per-node 4 tools/check_parity.py --golden tests/golden --failures-only "
            "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2",
        ),
        needs=("gpu",),
        ranks=4,
        limit_seconds=600,
        minutes=(0, 0),
    ),
    Part(
        "engines",
        "Transformer Engine's layers compute what the local ones do, in fp32",
        trainings=(
            Training("Transformer Engine, fp32", (Life(1),), f"{TE} --attention-backend unfused"),
            Training("Transformer Engine, fp32, tensor 2", (Life(2, f"{TENSOR} {TE} --attention-backend unfused"),)),
        ),
        against="one process",
        tolerance=Tolerance(1e-4, 1e-4, "other kernels sum in another order; TF32 is off; a guess"),
        needs=TE_NEEDS,
        minutes=(0, 0),
    ),
    Part(
        "bf16",
        "bf16 trains like fp32, up to its rounding",
        trainings=(BF16, Training("bf16, tensor 2", (Life(2, TENSOR),), f"--bf16 {LOCAL}"), BF16_TE),
        against="one process",
        tolerance=Tolerance(
            2e-2, 2e-2, "a bf16 number has 8 bits (5e-3 on a CPU), and kernels round elsewhere on a GPU"
        ),
        minutes=(0, 0),
    ),
    Part(
        "throughput",
        "0.7 billion parameters, SigLIP-SO400M's and the FLUX VAE's shapes, bf16, rows of 2,048 tokens",
        trainings=(
            measured("0.7B, local", 1, LOCAL),
            measured("0.7B, Transformer Engine", 1, TE, "transformer_engine"),
            measured("0.7B, FP8", 1, f"{TE} --fp8-format hybrid", "transformer_engine", "fp8"),
            measured("0.7B, data 2", 2, ""),
            measured("0.7B, tensor 2", 2, TENSOR),
            measured("0.7B, pipeline 2", 2, PIPELINE),
            measured("0.7B, pipeline 2, interleaved", 2, f"{INTERLEAVED} 4"),
        ),
        needs=("gpu",),
        limit_seconds=240,
        minutes=(0, 0),
    ),
)
"""In the order in which they run: first what tells most. Those that use the medium model come after `profile`, which
writes it."""


def with_references(part: Part) -> tuple[Training, ...]:
    """The part's trainings, preceded by the one that they are compared with if it is not among them."""
    own = [training.name for training in part.trainings]
    return tuple(r for r in REFERENCES if r.name == part.against and r.name not in own) + part.trainings
