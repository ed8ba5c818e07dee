"""Training from Python: reads the options of a recipe, and trains in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ross_mcore import flags
from ross_mcore.config import Config, require_complete


def read_recipe(recipe: Path | str) -> dict[str, Any]:
    """The options of a YAML file, or of an installed recipe by its name, as arguments of `Config.from_flat`.

    Raises ConfigError for an unknown name, an unreadable file or an unknown option.
    """
    return flags.read_yaml(str(recipe), flags.build_parser())


def train(config: Config) -> None:
    """Trains in this process, or in all processes that torchrun started; returns when the run is finished.

    Also returns when the run is stopped on request (Ctrl-C, SIGTERM, `exit_interval`), after saving a checkpoint; the
    same call resumes it. Before training begins, Ctrl-C raises KeyboardInterrupt and SIGTERM SystemExit. Raises
    UserError for bad input and for a run that cannot continue.
    """
    if not isinstance(config, Config):
        raise TypeError(
            f"train takes a Config, got {type(config).__name__}; build one with Config.from_flat(load=..., save=..., "
            "data_path=..., ...), with **read_recipe(name) for a YAML file"
        )
    require_complete(config)
    from ross_mcore.training import loop

    loop.train(config)
