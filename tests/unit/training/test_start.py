"""The checkpoint a run starts from, and the samples it leaves out."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from ross_mcore.checkpoint.folder import Checkpoint
from ross_mcore.config import Config
from ross_mcore.errors import ConfigError
from ross_mcore.training import start
from ross_mcore.training.start import skipped_samples, starting_point

pytestmark = pytest.mark.usefixtures("process_group")


@pytest.mark.parametrize("finetune", [True, False])
def test_an_ignored_finetune_is_logged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, finetune: bool
) -> None:
    own = Checkpoint(tmp_path, 7)
    (tmp_path / "train_state.json").write_text('{"training_stage": "pretrain"}')
    monkeypatch.setattr(start, "find_intact", lambda path, verify: own)
    with caplog.at_level(logging.WARNING):
        assert starting_point(Config.from_flat(save="run", load="base", finetune=finetune)) == (own, True)
    warning = "--finetune is ignored: run already holds a run, which is resumed"
    assert caplog.messages == ([warning] if finetune else [])


class Dataset:
    """Samples a and b, and others."""

    def __len__(self) -> int:
        return 5

    def find(self, keys: list[str]) -> dict[str, list[int]]:
        return {key: ["ab".index(key)] if key in ("a", "b") else [] for key in keys}


def skipped(named: str | None) -> set[int]:
    dataset: Any = Dataset()
    return skipped_samples(Config.from_flat(skip_samples=named, data_path="shards"), dataset)


def test_samples_to_skip_are_found_or_named(tmp_path: Path) -> None:
    (tmp_path / "ids").write_text("a\n\n b\n")
    assert skipped(None) == set() and skipped("b,") == {1} and skipped(str(tmp_path / "ids")) == {0, 1}
    with pytest.raises(ConfigError, match="no sample of shards has the id 'c' .1 of 2 are not found"):
        skipped("a,c")


@pytest.mark.parametrize("named", ["", ",,", " , "])
def test_a_flag_that_names_no_sample_is_refused(tmp_path: Path, named: str) -> None:
    (tmp_path / "ids").write_text(named.replace(",", "\n"))
    for given in (named, str(tmp_path / "ids")):
        with pytest.raises(ConfigError, match="--skip-samples .* names no sample; give ids .* or remove the flag"):
            skipped(given)
