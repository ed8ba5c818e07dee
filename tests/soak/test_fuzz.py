"""Sixty cases of fuzz_inputs.py, in a process of one thread that has everything imported."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from tests.distributed import harness
from tests.soak.fuzz.targets import TARGETS
from tests.soak.fuzz_inputs import describe, fuzz

assert harness  # sets what the fork server imports
CASES, SEED = 60, 0


pytestmark = pytest.mark.slow


def _session(work: str, keep: str) -> None:
    first = len(TARGETS)  # earlier ones damage nothing
    results = fuzz(range(first, first + CASES), SEED, Path(work), Path(keep))
    failed = [describe(result, SEED) for result in results if result.problems]
    report = "\n".join(failed) or f"{len(results)} cases"
    (Path(keep) / "report.txt").write_text(report, "utf-8", "backslashreplace")


@pytest.mark.timeout(300)
def test_damaged_files_are_refused_in_words(tmp_path: Path) -> None:
    keep = tmp_path / "kept"
    keep.mkdir()
    process = multiprocessing.get_context("forkserver").Process(target=_session, args=(str(tmp_path), str(keep)))
    process.start()
    process.join()
    report = keep / "report.txt"
    assert process.exitcode == 0 and report.exists(), "the fuzzer itself failed"
    assert report.read_text() == f"{CASES} cases", report.read_text()
