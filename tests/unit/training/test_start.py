"""The checkpoint a run starts from, the rows of its steps, and the samples it leaves out."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ross_mcore.checkpoint.folder import Checkpoint
from ross_mcore.config import Config
from ross_mcore.costs import Data
from ross_mcore.errors import ConfigError
from ross_mcore.parallel.layout import Layout
from ross_mcore.training import start
from ross_mcore.training.start import about_balance, mean_sample, plan_steps, skipped_samples, starting_point

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


class Lengths:
    """Samples of these lengths, in rows of 1,024 tokens."""

    seq_length, passes_once = 1024, True

    def __init__(self, *lengths: int) -> None:
        self._lengths = np.array(lengths)
        self.parts, self.sizes = [self], [len(lengths)]

    def __len__(self) -> int:
        return self._lengths.size

    def row_lengths(self, numbers: Any) -> Any:
        return self._lengths[numbers]


@pytest.mark.parametrize(
    ("samples", "micro_batch_size", "chunks", "pack", "rows"),
    [
        (128, 1, 1, True, 32),  # four samples of 256 tokens fill a row
        (128, 3, 1, True, 30),  # the multiple of 6 nearest to 32
        (128, 1, 2, True, 32),
        (100, 1, 2, True, 24),  # interleaved: of 2 x 2 stages x 2 ranks; 25 rows are wanted
        (1, 1, 1, True, 2),
        (128, 1, 1, False, 128),
    ],
)
def test_rows_are_chosen_for_samples(samples: int, micro_batch_size: int, chunks: int, pack: bool, rows: int) -> None:
    flags = {"global_batch_samples": samples, "micro_batch_size": micro_batch_size, "pack": pack, "train_epochs": 2}
    layout, dataset = Layout(1, chunks, 2, (1,) * chunks**2), Lengths(*[256] * 1000)
    steps = plan_steps(Config.from_flat(**flags), dataset, layout)  # type: ignore[arg-type]
    assert steps.rows == rows and steps.iterations == math.ceil(2 * (250 if pack else 1000) / rows)
    assert steps.remarks[0].startswith(f"--global-batch-samples {samples}: a step has {rows} rows, on average ")


def test_a_resumed_run_keeps_its_rows_and_a_given_batch_size_is_said_nothing_of() -> None:
    dataset: Any = Lengths(*[256] * 1000)
    config = Config.from_flat(global_batch_samples=128, train_epochs=1)
    assert plan_steps(config, dataset, Layout(1, 1, 4, (1,)), kept_rows=36).iterations == 7  # 250 rows in steps of 36
    given = plan_steps(Config.from_flat(global_batch_size=8, train_iters=5), dataset, Layout(1, 1, 4, (1,)))
    assert (given.rows, given.iterations, given.remarks) == (8, 5, [])


def test_the_mean_sample_of_a_mixture() -> None:
    def part(lengths: list[int], images: int, labels: int) -> Any:
        fields = [("text_tokens", "<i4"), ("label_tokens", "<i4"), ("image_spans", "<u2")]
        samples = np.array([(length, labels, images) for length in lengths], fields)
        return SimpleNamespace(reader=SimpleNamespace(samples=samples), row_lengths=np.array(lengths).__getitem__)

    # an epoch has the first data set twice
    parts, counts = [part([100, 300], 1, 10), part([400, 5000], 0, 100)], [4, 2]
    dataset: Any = SimpleNamespace(parts=parts, counts=counts, seq_length=600)
    found = mean_sample(dataset)
    tokens = (2 * 400 + 400 + 600) / 6
    squares = (2 * (100**2 + 300**2) + 400**2 + 600**2) / 6
    assert found == Data(tokens, squares / tokens, images=4 / 6, labels=(4 * 10 + 2 * 100) / 6)
    parts[1].reader.samples["text_tokens"][0] = -1
    assert mean_sample(dataset) is None, "an index without lengths"


def test_what_balances_the_stages_is_said() -> None:
    piped = Config.from_flat(pipeline_model_parallel_size=2)
    assert about_balance(piped, None, "NVIDIA H200") == [
        "--pipeline-layout auto: layers are placed by their estimated time on H200, for typical samples"
    ]
    (line,) = about_balance(piped, Data(990.6, 1060, 0.94, 255), "Some GPU")
    assert "on H100, because the speed of Some GPU is not known, for samples of 991 tokens and 0.94 images" in line
    assert about_balance(Config.from_flat(), None, "cpu") == []
