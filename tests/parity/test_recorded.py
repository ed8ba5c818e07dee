"""Every recorded value of the reference against this trainer, with the tool that users run."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from parity import components, data
from parity.golden import Golden, GoldenError, usable, where_recorded
from parity.report import PARTS, all_rows
from parity.rows import Row, compare, compare_exactly, compare_sets, summary
from parity.trial import Layout
from safetensors.torch import load_file, save_file

from ross_mcore import platform
from ross_mcore.errors import UserError
from tests.recorded import GOLDEN

COUNTS = {
    # family: (rows that must be ok, rows where the reference raised, gave NaN or lost a picture)
    "diffusion": (44, 0),
    "denoiser": (93, 0),
    "vae target": (16, 0),
    "conversations": (174, 54),
    "prompts": (17, 2),
    "images": (52, 0),
    "collated": (5, 0),
    "sampler": (9, 0),
    "learning rate": (6, 0),
    "checkpoint": (2, 2),
    "model": (54, 0),
    "gradient norms": (638, 0),
    "edge cases": (46, 8),
    "generation": (6, 0),
    "optimizer groups": (6, 0),
    "curves": (320, 0),
    "trained weights": (1318, 0),
}
"""Numbers of rows in tests/golden: a family with fewer rows has lost a comparison."""


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    platform.initialize_process_group(timeout_minutes=1)
    return list(all_rows(GOLDEN, Layout()))


@pytest.mark.parametrize("family", COUNTS)
def test_recorded_values(rows: list[Row], family: str) -> None:
    mine = [row for row in rows if row.family == family]
    assert not [str(row) for row in mine if row.status == "FAIL"]
    count = Counter(row.status for row in mine)
    assert (count["ok"], count["instead"]) == COUNTS[family]


def test_nothing_else_was_compared(rows: list[Row]) -> None:
    assert {row.family for row in rows} == set(COUNTS)


def test_unsupported_values_are_counted_separately(rows: list[Row]) -> None:
    """Templates outside plain, qwen_2, v1, llama3 and v1_qwen2; several crops of one picture."""
    unsupported = Counter(row.family for row in rows if row.status == "unsupported")
    assert unsupported.keys() == {"conversations", "prompts", "images"}
    text = summary(rows)
    assert "2806 rows compared: 2806 ok, 0 failed" in text and f"{unsupported.total()} not supported" in text


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the recorded values that are quick to compare, for damaging."""
    for name in ("components", "data", "denoiser_dit_small.safetensors", "vae_target_clip.safetensors"):
        source = GOLDEN / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, tmp_path / name)
    return tmp_path


def test_a_wrong_value_fails(copied: Path) -> None:
    """Changes one value of each kind a little, which a comparison of nothing would not notice."""
    file = copied / "vae_target_clip.safetensors"
    tensors = load_file(file)
    tensors["z_q_mode"][0, 0, 0, 0] += 1e-3
    save_file(tensors, file, {**Golden(GOLDEN).tensors(file.name)[1]})
    failed = [row.name for row in components.vae_rows(Golden(copied)) if row.status == "FAIL"]
    assert failed == ["vae_target_clip: z_q_mode"]

    file = copied / "data" / "conversations.json"
    recorded = json.loads(file.read_text())
    recorded["tokenized"]["qwen|qwen_2"]["samples"]["text_single"]["labels"][-3] = 7
    recorded["tokenized"]["qwen|qwen_2"]["samples"]["system_turn"] = {"input_ids": [1], "labels": [1]}
    file.write_text(json.dumps(recorded))
    failed = [row.name for row in data.conversation_rows(Golden(copied)) if row.status == "FAIL"]
    assert failed == ["qwen|qwen_2 text_single", "qwen|qwen_2 system_turn"]


@pytest.mark.parametrize(
    ("file", "key", "value", "rows"),
    [
        ("components/tiny_vae/config.json", "block_out_channels", False, components.vae_rows),
        ("data/proc_clip/preprocessor_config.json", "image_mean", [0.5, 0.5], data.image_rows),
    ],
)
def test_an_impossible_configuration_is_named_with_its_file(
    copied: Path, file: str, key: str, value: object, rows: Callable[[Golden], Iterator[Row]]
) -> None:
    path, golden = copied / file, Golden(copied)
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match=key) as error:
        list(usable(golden, "any", rows(golden)))
    assert str(path) in str(error.value)


def test_a_wrong_gradient_fails(monkeypatch: pytest.MonkeyPatch, copied: Path) -> None:
    """A denoiser with a scaled condition: the loss hardly changes, the gradients do."""
    from ross_mcore.models import denoiser

    right = denoiser.layer_norm
    monkeypatch.setattr(denoiser, "layer_norm", lambda *arguments: right(*arguments) * (1 + 1e-4))
    failed = [row.name for row in components.denoiser_rows(Golden(copied)) if row.status == "FAIL"]
    assert any("gradient of the condition" in name for name in failed)


@pytest.mark.parametrize(
    ("ours", "recorded", "status"),
    [
        (1.0, 1.0 + 5e-6, "ok"),
        (1.0, 1.0 + 2e-5, "FAIL"),
        (0.0, 0.0, "ok"),
        (1e-30, 0.0, "FAIL"),
        (float("nan"), 1.0, "FAIL"),
        (torch.ones(2), torch.ones(3), "FAIL"),
        (torch.ones(0), torch.ones(0), "FAIL"),
        (torch.tensor([1.0, float("nan")]), torch.ones(2), "FAIL"),
        (torch.tensor([1000.0, 1.001]), torch.tensor([1000.0, 1.0]), "ok"),
        (torch.tensor([1000.0, 1.1]), torch.tensor([1000.0, 1.0]), "FAIL"),
    ],
)
def test_comparing(ours: object, recorded: object, status: str) -> None:
    assert compare("", "", ours, recorded).status == status


def test_comparing_sequences_and_sets() -> None:
    assert compare_exactly("", "", "abc", "abd").absolute == 1
    assert compare_exactly("", "", [1, 2], [1, 2, 3]).status == "FAIL"
    assert compare_sets("", "", [1, 2], [2, 1]).status == "ok"
    assert compare_sets("", "", [1], [1, 2]).absolute == 1


def test_values_not_recorded_are_reported_and_do_not_fail(copied: Path) -> None:
    """Values, whole files, tokenizers and pictures that are missing in a folder."""
    file = copied / "vae_target_clip.safetensors"
    tensors, metadata = Golden(GOLDEN).tensors(file.name)
    del tensors["z_q_mode"]
    save_file(dict(tensors), file, dict(metadata))
    for name in ("samples.json", "images.json"):
        (copied / "data" / name).unlink()
    shutil.rmtree(copied / "data" / "images")
    rows = [row for part in PARTS for row in where_recorded(part, "all", PARTS[part](Golden(copied)))]
    left_out = [row for row in rows if row.status == "not recorded"]
    missing = {(row.family, row.ours) for row in left_out}
    assert ("vae target", "vae_target_clip.safetensors records no z_q_mode") in missing
    assert ("conversations", "there is no data/samples.json") in missing
    assert ("images", "data/images has no picture img0") in missing
    assert not [str(row) for row in rows if row.status == "FAIL"]
    assert f"{len(left_out)} comparisons could not be made" in summary(rows)


def check(*arguments: object) -> tuple[int, str]:
    """(exit status, the tool's stderr)"""
    tool = [sys.executable, "tools/check_parity.py", *map(str, arguments)]
    done = subprocess.run(tool, capture_output=True, text=True, cwd=GOLDEN.parents[1])
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr


@pytest.mark.slow
def test_a_damaged_folder_and_a_wrong_layout_are_one_line(tmp_path: Path) -> None:
    for name in ("components", "model_llama_clip"):
        shutil.copytree(GOLDEN / name, tmp_path / name, ignore=shutil.ignore_patterns("train20*"))
    oracle = tmp_path / "model_llama_clip" / "oracle.json"
    for text, said in ((None, "has no"), ("{", "cannot be read"), ("[]", "holds [], expected a mapping")):
        if text is None:
            oracle.unlink()
        else:
            oracle.write_text(text)
        status, message = check("--golden", tmp_path)
        assert status == 2 and said in message and "oracle.json" in message and message.count("\n") == 1
    status, message = check("--golden", GOLDEN, "--tensor-model-parallel-size", 3)
    assert status == 2 and "torchrun --nproc-per-node 3" in message and message.count("\n") == 1


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(GoldenError, match="holds no recorded values"):
        Golden(tmp_path)
    status, message = check("--golden", tmp_path)
    assert status == 2 and "holds no recorded values" in message
