"""The recorded values of whole models, at a layout. (The training curves are compared in one process, and every layout
with one process elsewhere; `tools/check_parity.py` under torchrun does the curves at any layout as well.)"""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

from tests.distributed.harness import run_ranks
from tests.recorded import GOLDEN


def compare_on_one_rank(folder: str) -> None:
    """What each rank runs."""
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
