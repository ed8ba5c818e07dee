"""Model-parallel training of ROSS on Megatron-Core: encoder -> LLM -> denoiser.

The public names, usable in a script, a plain Python session or a notebook:

    import ross_mcore

    config = ross_mcore.Config.from_flat(load="base", data_path="shards", save="runs/pretrain", train_iters=1000)
    ross_mcore.train(config)  # in this process, or in all processes that torchrun starts with this script

    model = ross_mcore.load_model("runs/pretrain", dtype="bfloat16")
    asked = [ross_mcore.Question("<image>\\nWhat is it?", ["cat.jpg"])]
    ross_mcore.answer(model, asked)
    ross_mcore.generate(model, asked, ross_mcore.Sampling(temperature=0.7, top_p=0.9, stop=["\\n"]))[0].finish_reason
    originals, reconstructions = ross_mcore.reconstruct(model, ["cat.jpg", "dog.png"])

The options are those of `ross train --help`; read_recipe returns those of a YAML file or an installed recipe.
Errors in options, checkpoints, data or pictures raise a UserError with the remedy in its message; its subclasses are in
ross_mcore.errors. Importing ross_mcore loads neither torch nor numpy; a name loads its modules when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ross_mcore import environment, megatron_hook

if TYPE_CHECKING:
    from ross_mcore.api import read_recipe, train
    from ross_mcore.config import Config
    from ross_mcore.errors import (
        ArchitectureError,
        CheckpointError,
        ConfigError,
        ConversationError,
        ImageError,
        TrainingError,
        UserError,
    )
    from ross_mcore.generation import Generated, Sampling, answer, generate, stream
    from ross_mcore.inference import reconstruct
    from ross_mcore.trained import Question, TrainedModel, load_model, read_picture

__version__ = "0.2.0"
__all__ = [
    "ArchitectureError",
    "CheckpointError",
    "Config",
    "ConfigError",
    "ConversationError",
    "Generated",
    "ImageError",
    "Question",
    "Sampling",
    "TrainedModel",
    "TrainingError",
    "UserError",
    "__version__",
    "answer",
    "generate",
    "load_model",
    "read_picture",
    "read_recipe",
    "reconstruct",
    "stream",
    "train",
]

_MODULES = {
    "api": ("read_recipe", "train"),
    "config": ("Config",),
    "errors": (
        *("ArchitectureError", "CheckpointError", "ConfigError", "ConversationError", "ImageError", "TrainingError"),
        "UserError",
    ),
    "generation": ("Generated", "Sampling", "answer", "generate", "stream"),
    "inference": ("reconstruct",),
    "trained": ("Question", "TrainedModel", "load_model", "read_picture"),
}
"""Module -> the public names that it defines."""

environment.prepare()
megatron_hook.install()


def __getattr__(name: str) -> object:
    """Imports a public name when it is first used (PEP 562)."""
    for module, names in _MODULES.items():
        if name in names:
            value: object = getattr(import_module(f"ross_mcore.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'ross_mcore' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
