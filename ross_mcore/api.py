"""What a Python session calls to train: the options of a recipe, and a run in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ross_mcore import flags
from ross_mcore.config import Config, require_complete


def read_recipe(recipe: Path | str) -> dict[str, Any]:
    """The options of a YAML file, or of an installed recipe by its name, as `Config.from_flat` takes them.

    Raises ConfigError.
    """
    return flags.read_yaml(str(recipe), flags.build_parser())


def train(config: Config) -> None:
    """Trains in this process, or as one of the processes that torchrun started; returns when the run is finished.

    It also returns when the run is stopped on request (Ctrl-C, SIGTERM, `exit_interval`), after a last checkpoint;
    the same call continues it. Raises UserError for bad input and for a run that cannot continue.
    """
    if not isinstance(config, Config):
        raise TypeError(
            f"train takes a Config, got {type(config).__name__}; build one with Config.from_flat(load=..., save=..., "
            "data_path=..., ...), from read_recipe(name) where there is a YAML file"
        )
    require_complete(config)
    from ross_mcore.training import loop

    loop.train(config)
