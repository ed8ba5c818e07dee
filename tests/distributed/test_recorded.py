"""Recorded values of whole models at a layout. Training curves are left out: other tests compare them in one process,
and every layout with one process; `tools/check_parity.py` under torchrun compares them at any layout."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

from tests.distributed.harness import run_ranks
from tests.recorded import GOLDEN, one_key_value_head_source


def compare_on_one_rank(folder: str) -> None:
    """Runs on each rank."""
    from parity.report import all_rows
    from parity.trial import Layout

    from ross_mcore import platform
    from ross_mcore.parallel import groups

    platform.initialize_process_group(timeout_minutes=1)
    rows = list(all_rows(Path(folder), Layout(tensor_parallel=2, pipeline_parallel=2, sequence_parallel=True)))
    groups.destroy()
    failed = [str(row) for row in rows if row.status == "FAIL"]
    assert not failed, "\n".join(failed)
    assert Counter(row.status for row in rows) == {"ok": 752, "instead": 10}


def test_recorded_models_at_tp2_pp2_sp(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN, tmp_path / "golden", ignore=shutil.ignore_patterns("train20*", "*.bin"))
    run_ranks(compare_on_one_rank, 4, str(tmp_path / "golden"))


def check_on_one_rank(folder: str, status: int, stream: str, expected: list[str]) -> None:
    """Runs tools/check_parity.py at tensor 2; rank 0 must print all `expected` texts."""
    from check_parity import main

    sys.argv = ["check_parity.py", "--golden", folder, "--tensor-model-parallel-size", "2"]
    printed = {"stdout": io.StringIO(), "stderr": io.StringIO()}
    with contextlib.redirect_stdout(printed["stdout"]), contextlib.redirect_stderr(printed["stderr"]):
        ended = main()
    assert ended == status, printed["stdout"].getvalue()[-3000:] + printed["stderr"].getvalue()
    if os.environ["RANK"] == "0":
        text = printed[stream].getvalue()
        assert not [missing for missing in expected if missing not in text], text[-3000:]


REASON = "tensor-model-parallel-size 2 does not divide the model's 1 key-value heads"


def test_a_model_that_does_not_fit_the_layout_is_not_comparable_and_the_others_are_compared(tmp_path: Path) -> None:
    golden = tmp_path / "golden"
    shutil.copytree(GOLDEN, golden, ignore=shutil.ignore_patterns("train20*", "*.bin", "hf_checkpoint", "data"))
    one_key_value_head_source(golden / "model_qwen2_siglip" / "hf_checkpoint")
    shutil.copytree(GOLDEN / "model_llama_clip" / "hf_checkpoint", golden / "model_llama_clip" / "hf_checkpoint")
    row = f"{'model':<16} {'model_qwen2_siglip':<90} not comparable: {REASON}"
    summary = ["355 rows compared: 355 ok, 0 failed", "Models that do not fit this layout and were not compared: 1."]
    run_ranks(check_on_one_rank, 2, str(golden), 0, "stdout", [row, *summary])

    shutil.rmtree(golden / "model_llama_clip")
    reason = f"holds nothing to compare at this layout; model_qwen2_siglip: {REASON}"
    run_ranks(check_on_one_rank, 2, str(golden), 2, "stderr", [reason])
