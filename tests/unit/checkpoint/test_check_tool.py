"""tools/check_checkpoint.py: its report and exit status for intact and damaged checkpoints."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ross_mcore.checkpoint import folder
from ross_mcore.checkpoint.safe_load import StoredTensors
from ross_mcore.commands import check as tool
from ross_mcore.conversion.stream import TensorWriter
from ross_mcore.models.inventory import inventory
from tests.resealed import change_state, reseal

MOMENTS = ("exp_avg", "exp_avg_sq")
TRAINED = "vision_projection.0.weight"
LAYOUT = {"world_size": 4, "tensor_model_parallel_size": 2, "dtype": "float32"}


@pytest.fixture(scope="module")
def finished_run(converted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model, and the checkpoint of a run that trains one matrix of it."""
    root = shutil.copytree(converted, tmp_path_factory.mktemp("finished") / "run")
    base = folder.require_checkpoint(root)
    stored = StoredTensors(base.path)
    partial = folder.begin(root, 7)
    with TensorWriter(partial) as writer:
        for name in stored.names():
            writer.add(name, stored.read(name))
        for moment in MOMENTS:
            writer.add(f"optimizer.state.{moment}.{TRAINED}", torch.zeros(stored.shape(TRAINED)))
    state = {"training_stage": "pretrain", "data": {"consumed_samples": 28}}
    folder.publish(root, 7, base.model_config(), state, base.path, records=writer.records, layout=LAYOUT)
    return root


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A copy of `finished_run`."""
    return shutil.copytree(finished_run, tmp_path / "run")


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def called(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["check_checkpoint.py", *map(str, arguments)])
        return tool.main()

    return called


def test_intact_checkpoint(run: Path, check: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert check(run, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    (found,) = printed["checkpoints"]
    checkpoint = folder.require_checkpoint(run)
    shapes = inventory(checkpoint.model_config())
    assert printed["intact"] and found["iteration"] == 7 and found["consumed_samples"] == 28 and found["verified"]
    assert found["layout"] == LAYOUT
    assert list(found["parts"]) == ["vision tower", "projector", "language model", "denoiser", "VAE"]
    total = sum(part["parameters"] for part in found["parts"].values())
    assert total == sum(torch.Size(shape).numel() for shape in shapes.values())
    assert found["parts"]["projector"]["trained_parameters"] == torch.Size(shapes[TRAINED]).numel()
    assert found["optimizer"]["state"] == ["exp_avg", "exp_avg_sq"]
    assert found["bytes"] == sum(p.stat().st_size for p in checkpoint.path.rglob("*") if p.is_file()) - (
        (checkpoint.path / folder.MARKER).stat().st_size
    )
    assert check(run, "--all") == 0
    text = capsys.readouterr().out
    for words in (
        "iteration 7: pretrain, 28 samples",
        "iteration 0: a model",
        "tensor_model_parallel_size 2",
        "intact",
    ):
        assert words in text


def test_damage_is_named(run: Path, check: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    path = folder.require_checkpoint(run).path
    content = bytearray((path / "__0_0.distcp").read_bytes())
    content[3000] ^= 1
    (path / "__0_0.distcp").write_bytes(content)
    assert check(run, "--no-verify") == 0
    capsys.readouterr()
    assert check(run) == 1
    assert "__0_0.distcp is damaged" in capsys.readouterr().out.replace("\n", "")
    assert check(run / "iter_0000000") == 0
    (path / ".metadata").unlink()
    assert check(path) == check(run) == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": [1]}, "data is [1], expected a mapping"),
        ({"data": None}, "data is None, expected a mapping"),
        ({"data": {}}, "consumed_samples is missing"),
        ({"data": {"consumed_samples": "abc"}}, "consumed_samples is 'abc', expected a whole number"),
        ({"data": {"consumed_samples": [1]}}, "consumed_samples is [1], expected a whole number"),
        ({"training_stage": [1]}, "training_stage is [1], expected text"),
    ],
)
def test_values_of_another_kind_are_named(
    run: Path, check: Callable[..., int], capsys: pytest.CaptureFixture[str], changes: dict[str, Any], says: str
) -> None:
    checkpoint = folder.require_checkpoint(run)
    change_state(checkpoint, **changes)
    assert check(run, "--json") == 1
    (problem,) = json.loads(capsys.readouterr().out)["checkpoints"][0]["problems"]
    assert problem.startswith(f"{checkpoint.path / folder.TRAIN_STATE} is malformed: {says}")


def test_values_from_a_file_are_printed_without_markup(
    run: Path, check: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = folder.require_checkpoint(run)
    change_state(checkpoint, training_stage="[/x] :smile: \x1b[31m")
    reseal(checkpoint, layout={"[/a]": "[/b]"})
    (checkpoint.path / "[red]stray").touch()
    (run / "iter_0000009").mkdir()
    (run / "iter_0000009" / folder.MARKER).touch()
    moved = run.rename(run.with_name("q[lr=3]"))
    assert check(moved) == 1
    said = capsys.readouterr().out.replace("\n", "")
    for part in ("[/x] :smile: ?[31m, 28", "saved at: [/a] [/b]", "[red]stray does not", "q[lr=3]/iter_0000009/"):
        assert part in said


def test_tensors_unknown_to_the_architecture_are_named(
    run: Path, check: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    base = folder.require_checkpoint(run / "iter_0000000")
    partial = folder.begin(run, 9)
    with TensorWriter(partial) as writer:
        writer.add(TRAINED, torch.zeros(2))
        writer.add("language_model.extra", torch.zeros(2))
    folder.publish(run, 9, base.model_config())
    assert check(run, "--json") == 1
    problems = json.loads(capsys.readouterr().out)["checkpoints"][0]["problems"]
    assert "config.json knows no tensor language_model.extra" in problems
    assert any(line.startswith(f"tensor {TRAINED} has shape [2], config.json says") for line in problems)
    assert "tensor language_model.embedding.word_embeddings.weight is missing" in problems


def test_no_checkpoint(tmp_path: Path, check: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert check(tmp_path) == check(tmp_path / "absent") == 2
    assert "has no iter_* folder" in capsys.readouterr().err
