"""The table of parts: needs, commands and conditions of each. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

NEEDS = ("gpu", "transformer_engine", "fp8")


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
    """A run, in one life or in several that resume each other. flags: flags of all its lives."""

    name: str
    lives: tuple[Life, ...]
    flags: str = ""
    needs: tuple[str, ...] = ()
    model: str = "small"

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

    commands: as typed in the repository, `{out}` is the folder of the report; each must exit with status 0. trainings:
    each must finish with finite losses, and those of the small model must fall. `against`: the name of a training whose
    losses they must match step by step, within `tolerance`.
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


ITERATIONS = 12
SAMPLES = 64
COMMON = {
    "small": "--training-stage finetune --seq-length 256 --no-pack --global-batch-size 8 --micro-batch-size 2 "
    f"--lr 1e-3 --train-iters {ITERATIONS} --image-aspect-ratio square --num-workers 0 --log-interval 1",
    "medium": "--training-stage finetune --seq-length 2048 --global-batch-size 16 --micro-batch-size 1 --lr 1e-4 "
    f"--train-iters {ITERATIONS} --image-aspect-ratio square --num-workers 4 --log-interval 1 --bf16",
}
"""Flags of each training of a model, besides --load, --data-path and --save."""

TENSOR = "--tensor-model-parallel-size 2 --sequence-parallel"
PIPELINE = "--pipeline-model-parallel-size 2"
INTERLEAVED = f"{PIPELINE} --num-layers-per-virtual-pipeline-stage"
LOCAL, TE = "--transformer-impl local", "--transformer-impl transformer_engine"
FP8 = f"--bf16 {TE} --fp8-format hybrid"

ONE = Training("one process", (Life(1),))
BF16 = Training("bf16", (Life(1),), f"--bf16 {LOCAL}")
BF16_TE = Training("bf16, Transformer Engine", (Life(1),), f"--bf16 {TE}", ("transformer_engine",))
REFERENCES = (ONE, BF16, BF16_TE)
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
MEDIUM = (
    "python -m examples.acceptance.models --size medium --out {out}/models/medium",
    "python tools/convert_hf_to_mcore.py --language-model {out}/models/medium/language_model "
    f"--tokenizer {TOKENIZER} --vision-model {{out}}/models/medium/vision_model "
    "--pixel-decoder {out}/models/medium/pixel_decoder --dtype bfloat16 --save {out}/checkpoints/medium",
)


def measured(name: str, ranks: int, flags: str, *needs: str) -> Training:
    """A run of the medium model."""
    return Training(name, (Life(ranks, flags),), needs=needs, model="medium")


PARTS = (
    Part("environment", "hardware and versions", ("python -m examples.acceptance.machine",)),
    Part("prepare", "drawn pictures, shards, a small model of random weights", SHARDS + SMALL),
    Part(
        "parity",
        "recorded values of the reference implementation, in fp32",
        ("python tools/check_parity.py --golden tests/golden --failures-only",),
        limit_seconds=600,
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
        needs=("transformer_engine",),
    ),
    Part(
        "bf16",
        "bf16 trains like fp32, up to its rounding",
        trainings=(BF16, Training("bf16, tensor 2", (Life(2, TENSOR),), f"--bf16 {LOCAL}"), BF16_TE),
        against="one process",
        tolerance=Tolerance(
            2e-2, 2e-2, "a bf16 number has 8 bits (5e-3 on a CPU), and kernels round elsewhere on a GPU"
        ),
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
    ),
    Part(
        "throughput",
        "0.7 billion parameters, SigLIP-SO400M's and the FLUX VAE's shapes, bf16, rows of 2,048 tokens",
        MEDIUM,
        trainings=(
            measured("0.7B, local", 1, LOCAL),
            measured("0.7B, Transformer Engine", 1, TE, "transformer_engine"),
            measured("0.7B, FP8", 1, f"{TE} --fp8-format hybrid", "transformer_engine", "fp8"),
            measured("0.7B, data 2", 2, "--overlap-grad-reduce"),
            measured("0.7B, tensor 2", 2, TENSOR),
            measured("0.7B, pipeline 2", 2, PIPELINE),
            measured("0.7B, pipeline 2, interleaved", 2, f"{INTERLEAVED} 4"),
            measured("0.7B, tensor 2 x pipeline 2", 4, f"{TENSOR} {PIPELINE}"),
            measured("0.7B, data 4", 4, "--overlap-grad-reduce"),
            measured("0.7B, tensor 2 x pipeline 2 x data 2", 8, f"{TENSOR} {PIPELINE} --overlap-grad-reduce"),
            measured("0.7B, data 8", 8, "--overlap-grad-reduce"),
        ),
        needs=("gpu",),
        limit_seconds=240,
    ),
)


def with_references(part: Part) -> tuple[Training, ...]:
    """The part's trainings, preceded by the one that they are compared with if it is not among them."""
    own = [training.name for training in part.trainings]
    return tuple(r for r in REFERENCES if r.name == part.against and r.name not in own) + part.trainings
