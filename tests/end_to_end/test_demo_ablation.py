"""The ablation's command with two iterations a stage: every step runs, and a second call trains nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_ablation_runs_and_keeps_finished_runs(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "examples/demo/ablation.py", "--quick", "--seeds", "5", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    metrics = sorted(out.glob("*-seed5/finetune/metrics.jsonl"))
    plain, ross = ([json.loads(line) for line in file.read_text().splitlines()] for file in reversed(metrics))
    assert [entry["sample_digest"] for entry in plain] == [entry["sample_digest"] for entry in ross]
    assert plain[0]["vm_loss"] is None and ross[0]["vm_loss"] > 0

    before = [file.stat().st_mtime_ns for file in metrics]
    command += ["--picture", str(tmp_path / "picture.svg")]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == 0
    assert [file.stat().st_mtime_ns for file in metrics] == before
    assert (tmp_path / "picture.svg").read_text().startswith("<svg")
    assert set(json.loads((out / "summary.json").read_text())["right"]) == {"lm_loss", "lm_loss + vm_loss"}

    other = [argument for argument in command if argument != "--quick"]
    refused = subprocess.run(other, cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 1 and "another size" in refused.stderr
