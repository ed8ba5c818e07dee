"""lmms-eval runs the task of examples/evaluation on the exported folder, and scores it as `ross eval` does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ross_mcore.commands import eval as evaluation
from tests.serving.conftest import DEMO, ROOT, Serving

QUESTIONS = ROOT / "examples" / "evaluation" / "five_questions.json"


@pytest.mark.timeout(600)
def test_accuracy_is_ours(serving: Serving, exported: Path, tmp_path: Path) -> None:
    words = ["-m", "lmms_eval", "--model", "llava_hf", "--batch_size", "1", "--tasks", "shapes"]
    words += ["--model_args", f"pretrained={exported},device=cpu,device_map=cpu"]
    words += ["--include_path", ROOT / "examples" / "evaluation" / "lmms_eval", "--output_path", tmp_path / "theirs"]
    serving(*words, cwd=ROOT)
    results = next((tmp_path / "theirs").rglob("*results.json"))
    theirs = json.loads(results.read_text(encoding="utf-8"))["results"]["shapes"]["accuracy,none"]

    words = ["--load", str(DEMO / "finetune"), "--benchmark", "short-answer", "--suffix", "", "--data", str(QUESTIONS)]
    assert evaluation.main([*words, "--out", str(tmp_path / "ours")]) == 0
    (ours,) = json.loads((tmp_path / "ours" / "results.json").read_text(encoding="utf-8"))
    assert ours["questions"] == 5 and ours["scores"] == {"accuracy": pytest.approx(100 * theirs)}
    assert theirs > 0.5
