"""The README's demo command, shortened: all steps run, with too few iterations to learn."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(600)
def test_the_demo_runs_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    command = [sys.executable, "examples/demo/run_demo.py", "--short", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

    summary = json.loads((out / "summary.json").read_text())
    assert len(summary["checks"]) == 2 and all(summary["checks"].values())
    assert 0 < summary["resume"]["stopped_after_iteration"] < summary["resume"]["iterations"]
    for stage in ("pretrain", "finetune"):
        entries = [json.loads(line) for line in (out / stage / "metrics.jsonl").read_text().splitlines()]
        assert [entry["iteration"] for entry in entries] == list(range(1, 13))
        assert entries[-1]["lm_loss"] < entries[0]["lm_loss"]
        assert list((out / stage / "tensorboard").glob("events.*"))
    assert (out / "shards" / "finetune" / "index.json").exists() and (out / "base" / "iter_0000000").is_dir()
    with Image.open(out / "reconstruction.png") as grid:
        assert grid.width > grid.height > 64
    with Image.open(out / "denoising.png") as steps:
        assert steps.size == (9 * 66 + 2, 4 * 66 + 2 + 14)  # a picture and eight steps, four rows, names above
    assert (out / "demo_curves.svg").read_text().count("<polyline") == 4

    picture = next((out / "data" / "images" / "heldout").iterdir())
    command = [sys.executable, "tools/reconstruct.py", "--load", str(out / "finetune"), "--image", str(picture)]
    done = subprocess.run(
        [*command, "--steps", "5", "--output", str(tmp_path / "one.png")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "one.png") as grid:
        assert grid.mode == "RGB"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--load", "nowhere", "--save", "x", "--data-path", "y", "--train-iters", "1"], "nowhere"),
        (["--save", "x"], "--load is missing"),
    ],
)
def test_bad_input_is_one_paragraph(tmp_path: Path, arguments: list[str], says: str) -> None:
    command = [sys.executable, str(ROOT / "pretrain_ross.py"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert says in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
