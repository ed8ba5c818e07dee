"""Warnings at start, and refusals that need no model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ross_mcore.config import Config
from ross_mcore.data.order import BlockOrder
from ross_mcore.data.spec import SampleSpec
from ross_mcore.data.survey import Found, Survey
from ross_mcore.errors import ConfigError
from ross_mcore.training import learning
from ross_mcore.training.learning import about_held_out, check_data, check_schedule


class Part:
    """Ten samples with a picture each; a picture has 16 tokens, a row 64."""

    spec = SampleSpec("qwen_2", seq_length=64)
    image_tokens = 16
    tokenizer = SimpleNamespace(name_or_path="tokenizer")
    reader: Any = SimpleNamespace(num_images=10, folder="shards")

    def __len__(self) -> int:
        return 10

    def keys(self, numbers: list[int]) -> list[str]:
        return [f"s{number}" for number in numbers]

    def row_lengths(self, numbers: Any) -> Any:
        return np.full(len(numbers), 32)


def warnings_of(monkeypatch: pytest.MonkeyPatch, positions: int = 128, denoiser: Any = "denoiser", **found: Any) -> str:
    """The warnings about a data set with this survey."""
    usual = {"lengths": np.full(10, 40), "labelled": Found(10), "pictured": Found(10)}
    whole = Survey(10, by_index=True, **{**usual, **found})
    monkeypatch.setattr(learning, "survey", lambda part: whole)
    monkeypatch.setattr(learning, "why_unlabelled", lambda part, number: "why")
    monkeypatch.setattr(learning, "fitting_templates", lambda part, numbers: ["v1"])
    model: Any = SimpleNamespace(denoiser=denoiser, language=SimpleNamespace(max_position_embeddings=positions))
    return "\n".join(check_data(Config(), model, SimpleNamespace(names=["a"], parts=[Part()])))  # type: ignore[arg-type]


def test_a_sound_data_set_has_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not warnings_of(monkeypatch)


def test_samples_without_labels_are_warned_of_and_most_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    few = warnings_of(monkeypatch, labelled=Found(8), unlabelled=Found(2, [3, 4]))
    assert few.startswith("warning: 20.0% of the samples have no label (2 by the index)") and "s3, s4 (why)" in few
    with pytest.raises(ConfigError, match="60.0% .* Look at one .* s3.* pass --allow-missing-labels"):
        warnings_of(monkeypatch, labelled=Found(4), unlabelled=Found(6, [3]))
    with pytest.raises(ConfigError, match="behind the cut at --seq-length 64: raise it .*at most 40 tokens"):
        warnings_of(monkeypatch, labelled=Found(4), cut_unlabelled=Found(6, [3]))
    with pytest.raises(ConfigError, match="100.0% .*: --template v1 gives labels.* no denoiser"):
        warnings_of(monkeypatch, denoiser=None, labelled=Found(), unlabelled=Found(10, [3]))


def test_samples_that_are_skipped_or_cut_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "the cut at 64 tokens would go through a picture"
    some = warnings_of(monkeypatch, labelled=Found(7), nothing={reason: Found(3, [1])})
    assert f"30.0% of the samples are left out: 3 of 10 samples: {reason} (s1); raise --seq-length" in some
    with pytest.raises(
        ConfigError, match=r"shards leaves nothing to train on: 10 of 10 samples: it has over 64 pict.*"
    ):
        warnings_of(monkeypatch, labelled=Found(), nothing={"it has over 64 pictures": Found(10, [1])})
    nothing = Survey(10, True, nothing={reason: Found(10, [1])}, lengths=np.full(10, 40))
    monkeypatch.setattr(learning, "survey", lambda part: nothing)
    held_out: Any = SimpleNamespace(names=["a"], parts=[Part()])
    model: Any = SimpleNamespace(language=SimpleNamespace(max_position_embeddings=128))
    with pytest.raises(ConfigError, match=r"shards leaves nothing to validate on: 10 of 10 samples: the cut at 64"):
        about_held_out(model, held_out, in_training=True)
    (warning,) = about_held_out(model, held_out, in_training=False)
    assert warning.startswith("validation on a: warning: 100.0% of the samples are left out")
    with pytest.raises(ConfigError, match="none of the 10 pictures of shards would be trained on: 3 of 10 samp"):
        warnings_of(monkeypatch, labelled=Found(7), pictured=Found(), nothing={reason: Found(3, [1])})
    long = warnings_of(monkeypatch, lengths=np.array([40] * 7 + [100] * 3), positions=50)
    assert "30.0% of the samples (3) are longer than --seq-length 64 (half" in long and "the longest 100)" in long
    assert "3 of 10 samples have more tokens than the 50 positions" in long and "up to 64" in long
    assert "positions" not in warnings_of(monkeypatch, lengths=np.full(10, 50), positions=50)


def test_a_row_shorter_than_a_picture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Part, "image_tokens", 65)
    monkeypatch.setattr(Part.reader, "samples", {"num_images": np.ones(10)}, raising=False)
    with pytest.raises(ConfigError, match="--seq-length 64 is shorter than one picture of this model, which has 65"):
        warnings_of(monkeypatch)


@pytest.mark.parametrize(
    ("options", "rows", "iterations", "says"),
    [
        ({}, 4, 100, ""),
        ({"lr_warmup_iters": 500}, 4, 100, "500 is longer than the run of 100 iterations: .* ends at 1.98e-04"),
        ({}, 4, 1, "learning rate 0, so no weight changes: the warm-up begins at 0 and has 1, the run 1 iterations"),
        ({"lr": 0.0}, 4, 100, "learning rate 0, so no weight changes: --lr 0"),
        ({"pack": False}, 20, 100, r"a step has 20 rows and an epoch about 10 \(10 samples\), .* 2.0 times"),
        ({}, 20, 100, r"a step has 20 rows and an epoch about 5 \(10 samples\), .* 4.0 times"),
        ({"train_epochs": 0.5}, 4, 2, "--train-epochs 0.5 is less than one step: a step of 4 rows is 0.80 epochs"),
    ],
)
def test_schedules_that_do_less_than_they_say(options: dict[str, Any], rows: int, iterations: int, says: str) -> None:
    config = Config.from_flat(**options)
    dataset: Any = SimpleNamespace(parts=[Part()], counts=(10,), seq_length=64)
    warnings = check_schedule(config, BlockOrder(10, seed=0), dataset, rows, iterations)
    assert len(warnings) == bool(says)
    for warning in warnings:
        with pytest.raises(ConfigError, match=says):
            raise ConfigError(warning)
