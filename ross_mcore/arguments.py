"""The argument parser of all commands: no abbreviations, and an answer to flags that it does not know."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from ross_mcore.launcher import is_first_of_machine, record_failure

NAMES_ELSEWHERE = {
    # Hugging Face's Trainer and LLaVA
    "learning-rate": "--lr",
    "per-device-train-batch-size": "--micro-batch-size",
    "train-batch-size": "--global-batch-size",
    "batch-size": "--global-batch-size",
    "gradient-accumulation-steps": "--global-batch-size (rows of a step over all ranks)",
    "num-train-epochs": "--train-epochs",
    "num-epochs": "--train-epochs",
    "epochs": "--train-epochs",
    "max-steps": "--train-iters",
    "output-dir": "--save",
    "out-dir": "--save",
    "save-dir": "--save",
    "model-name-or-path": "--load (a checkpoint of `ross convert`)",
    "model": "--load (a checkpoint of `ross convert`)",
    "pretrained-checkpoint": "--load",
    "resume-from-checkpoint": "--load (the same command again resumes the run in --save)",
    "model-max-length": "--seq-length",
    "max-seq-length": "--seq-length",
    "max-length": "--seq-length",
    "cutoff-len": "--seq-length",
    "warmup-ratio": "--lr-warmup-fraction",
    "warmup-steps": "--lr-warmup-iters",
    "num-warmup-steps": "--lr-warmup-iters",
    "lr-scheduler-type": "--lr-decay-style",
    "lr-scheduler": "--lr-decay-style",
    "adam-epsilon": "--adam-eps",
    "max-grad-norm": "--clip-grad",
    "gradient-clipping": "--clip-grad",
    "save-steps": "--save-interval",
    "save-total-limit": "--keep-last",
    "logging-steps": "--log-interval",
    "logging-dir": "--tensorboard-dir",
    "eval-steps": "--valid-interval",
    "eval-data-path": "--valid-data-path",
    "dataloader-num-workers": "--num-workers",
    "gradient-checkpointing": "--recompute-granularity full",
    "tf32": "--denoiser-precision tf32 and --vae-precision tf32, the defaults on GPUs",
    "group-by-modality-length": "--sampler modality_length",
    "group-by-length": "--sampler modality_length",
    "mm-projector-lr": "--projector-lr",
    "mm-vision-tower-lr": "--vision-lr",
    "version": "--template",
    "chat-template": "--template",
    "tune-mm-mlp-adapter": "--training-stage pretrain",
    "stage": "--training-stage",
    "vision-tower": "an option of `ross convert`: --vision-model",
    "mm-projector-type": "an option of `ross convert`",
    "pretrain-mm-mlp-adapter": "--load (the folder of the pretraining run)",
    "image-folder": "an option of `ross make-shards`; training reads its shards with --data-path",
    "dataset": "--data-path (shards of `ross make-shards`)",
    "dataset-dir": "--data-path (shards of `ross make-shards`)",
    "train-file": "--data-path (shards of `ross make-shards`)",
    "packing": "--pack",
    "tokenizer-name-or-path": "an option of `ross convert`; training uses the tokenizer of --load",
    "tokenizer-model": "an option of `ross convert`; training uses the tokenizer of --load",
    "use-flash-attn": "--transformer-impl transformer_engine --attention-backend flash",
    "flash-attn": "--transformer-impl transformer_engine --attention-backend flash",
    "attn-implementation": "--attention-backend",
    # Megatron-LM, NeMo, vLLM
    "tensor-parallel-size": "--tensor-model-parallel-size",
    "tp-size": "--tensor-model-parallel-size",
    "tp": "--tensor-model-parallel-size",
    "pipeline-parallel-size": "--pipeline-model-parallel-size",
    "pp-size": "--pipeline-model-parallel-size",
    "pp": "--pipeline-model-parallel-size",
    "dp": "nothing: ranks that --tensor-model-parallel-size and --pipeline-model-parallel-size leave share the data",
    "data-parallel-size": "nothing: ranks that the two --...-model-parallel-size leave share the data",
    "micro-bs": "--micro-batch-size",
    "global-bs": "--global-batch-size",
    "train-samples": "--train-iters or --train-epochs",
    "train-data-path": "--data-path",
    "eval-iters": "--valid-samples",
    "recompute-activations": "--recompute-granularity selective",
    "no-save-optim": "`ross export`, which writes the weights alone",
    "no-load-optim": "--finetune",
    "exit-signal-handler": "nothing: SIGTERM always saves and ends the run",
    "use-checkpoint-args": "nothing: the architecture is read from --load",
    "num-layers": "an attribute of the model in --load",
    "hidden-size": "an attribute of the model in --load",
    "fp8": "--fp8-format",
    "report-to": "--tracker",
    "use-wandb": "--tracker wandb",
    "wandb-project": "--tracker-project",
    "mlflow-experiment-name": "--tracker-project",
    "run-name": "the name of the folder of --save",
    "deepspeed": "--use-distributed-optimizer (optimizer state over data-parallel ranks, as ZeRO 1)",
    "zero-stage": "--use-distributed-optimizer (optimizer state over data-parallel ranks, as ZeRO 1)",
}
"""Flag of another trainer -> what it is here."""

NOT_OFFERED = (
    "*lora*",
    "*qlora*",
    "peft*",
    "finetuning-type",
    "load-in-*bit",
    "bits",
    "quant*",
    "double-quant",
    "wandb*",
    "mlflow*",
    "swanlab*",
    "comet*",
    "fsdp*",
    "fp16",
    "torch-compile*",
    "optim",
    "optimizer",
    "neftune*",
    "dpo*",
    "rlhf*",
    "ema*",
    "context-parallel*",
    "cp-size",
    "ulysses*",
    "expert-*",
    "num-experts",
    "moe*",
    "rampup-batch-size",
    "push-to-hub*",
    "hub-*",
    "trust-remote-code",
    "freeze-*",
    "unfreeze-*",
    "video*",
)
"""Patterns of flags of other trainers whose feature is in docs/features.md under "Not offered"."""


LISTED = "; --help lists all options"


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes no abbreviations and keeps the line breaks of its help.

    An error is one paragraph, printed once per machine; the program ends with status 2.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings)

    def parse_args(self, args: Sequence[str] | None = None) -> argparse.Namespace:  # type: ignore[override]  # no command passes a namespace
        words, flags = list(sys.argv[1:] if args is None else args), self.flags()
        for word in words:  # before argparse finds that another argument is missing
            if word.startswith("--") and word.split("=")[0] not in flags:
                self.error(unrecognized(word, flags))
        known, unknown = self.parse_known_args(words)
        if unknown:
            self.error(unrecognized(unknown[0], flags))
        return known

    def flags(self) -> list[str]:
        """`--seq-length`, ..."""
        return [text for action in self._actions for text in action.option_strings if text.startswith("--")]

    def error(self, message: str) -> NoReturn:
        self.refuse(message if "; " in message else message + LISTED)

    def refuse(self, message: str) -> NoReturn:
        """Prints `message` once per machine, leaves it for torchrun, and exits with status 2."""
        text = f"{self.prog}: error: {message}"
        record_failure(text if is_first_of_machine() else "the same error as that of local rank 0")
        self.exit(2, f"{text}\n" if is_first_of_machine() else None)


def unrecognized(argument: str, flags: Iterable[str]) -> str:
    """The answer to an argument that is not one of `flags`, ours or another trainer's."""
    return f"unrecognized argument {argument.split('=')[0]}{answer(argument, flags)}"


def answer(argument: str, flags: Iterable[str]) -> str:
    """`; did you mean --seq-length?`, or what another trainer's flag is here; "" when nothing is close."""
    name = argument.split("=")[0].lstrip("-").replace("_", "-").lower()
    known = list(flags)
    if not name:
        return ""
    if name in NAMES_ELSEWHERE:
        return f"; here it is {NAMES_ELSEWHERE[name]}"
    if any(re.fullmatch(pattern.replace("*", ".*"), name) for pattern in NOT_OFFERED):
        return ", which is not offered: docs/features.md lists what is"
    close = difflib.get_close_matches(name, [flag.lstrip("-") for flag in known], n=1)
    return f"; did you mean --{close[0]}?" if close else ""
