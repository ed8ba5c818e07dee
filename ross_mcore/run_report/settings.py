"""The settings of runs, and which of them differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MOST_SETTINGS = 1000
MOST_CHARACTERS = 300
PROGRESS = (
    *("iteration", "data", "bad_steps_in_a_row", "bad_samples", "recent_lm_losses", "recent_vm_losses"),
    *("started_from", "facts", "options", "format", "version"),
)
"""Keys of train_state.json and config.json that are not settings."""


@dataclass(frozen=True)
class Setting:
    """An option and its value in each run, None where a run does not have it."""

    name: str
    values: tuple[str | None, ...]

    @property
    def differs(self) -> bool:
        return len(set(self.values)) > 1


def settings_of(state: Mapping[str, Any], options: Mapping[str, str], model: Mapping[str, Any]) -> dict[str, str]:
    """Option -> value as text: train_state.json and its options, TensorBoard's text of all options, `model.*`."""
    saved, facts = (value if isinstance(value := state.get(key), dict) else {} for key in ("options", "facts"))
    found = _flat({name: value for name, value in state.items() if name not in PROGRESS}, "")
    found |= _flat({name: facts[name] for name in ("layout", "versions", "commit") if name in facts}, "")
    found |= _flat(saved, "")
    found |= {name: value[:MOST_CHARACTERS] for name, value in options.items()}
    found |= _flat({name: value for name, value in model.items() if name not in PROGRESS}, "model.")
    return dict(list(found.items())[:MOST_SETTINGS])


def _flat(values: Mapping[str, Any], prefix: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict) and value:
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = str(value)[:MOST_CHARACTERS]
    return found


def compare(runs: Sequence[Mapping[str, str]]) -> list[Setting]:
    """The settings of all runs, in the order in which runs have them; those that differ first."""
    names = dict.fromkeys(name for run in runs for name in run)
    found = [Setting(name, tuple(run.get(name) for run in runs)) for name in names]
    return sorted(found, key=lambda setting: not setting.differs)
