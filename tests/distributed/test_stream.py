"""The stream of samples does not depend on the layout, on where a run was stopped, or on which rank finds a bad sample.

The data set is damaged after it was indexed: the text of two samples is not JSON, and the picture of two others, which
only one tensor-parallel rank reads, is zeros.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ross_mcore.checkpoint.folder import find_checkpoint
from ross_mcore.data.shard_reader import ShardReader
from tests.distributed.cases import Case, layout
from tests.distributed.conftest import Finished
from tests.distributed.harness import run_ranks

BAD_TEXT, BAD_PICTURE = (5, 11), (3, 13)
PACKED = {"pack": True, "seq_length": 256, "global_batch_size": 2, "micro_batch_size": 1}
"""Two rows a step, of about three samples each: 30 steps are more than 11 epochs of the 16 samples."""
ALLOWING_BAD = {"max_bad_fraction": 1.0}


@pytest.fixture(scope="session")
def damaged(shards: Callable[[str], Path], workplace: Path) -> Path:
    folder = workplace / "shards_overwritten"
    if not folder.exists():
        overwrite(shards("mixed"), folder)
    return folder


def overwrite(whole: Path, folder: Path) -> None:
    """A copy of a data set in which the samples BAD_TEXT and BAD_PICTURE are bad."""
    folder.mkdir()
    for path in whole.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    reader = ShardReader(folder)
    for number in BAD_TEXT:
        damage(reader, number, int(reader.samples[number]["text_offset"]), int(reader.samples[number]["text_size"]))
    for number in BAD_PICTURE:
        image = reader.images[int(reader.samples[number]["first_image"])]
        damage(reader, number, int(image["offset"]), int(image["size"]))


def damage(reader: ShardReader, number: int, offset: int, size: int) -> None:
    """Overwrites a member with zeros, in place."""
    with (reader.folder / reader.index["shards"][int(reader.samples[number]["shard"])]["name"]).open("r+b") as stream:
        stream.seek(offset)
        stream.write(bytes(size))


def assert_same(run: Finished, expected: Finished) -> None:
    """The same samples and figures, line by line, and the same bad samples."""
    for ours, theirs in zip(run.metrics, expected.metrics, strict=True):
        for name in ("iteration", "sample_digest", "num_tokens", "num_images", "consumed_samples", "bad_samples"):
            assert ours[name] == theirs[name], (name, ours["iteration"])
        for name in ("lm_loss", "vm_loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), (name, ours["iteration"])
    assert quarantine(run) == quarantine(expected)


def quarantine(run: Finished) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.folder / "quarantine.jsonl").read_text().splitlines()]


def difference(run: Finished, expected: Finished) -> float:
    """The largest relative difference of a figure."""
    return max(
        abs(ours[name] - theirs[name]) / abs(theirs[name])
        for ours, theirs in zip(run.metrics, expected.metrics, strict=True)
        for name in ("lm_loss", "vm_loss", "grad_norm")
    )


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param({"train_iters": 8}, id="a sample a row", marks=pytest.mark.slow),
        pytest.param({"train_iters": 8, **PACKED}, id="packed"),
    ],
)
def test_bad_samples_are_replaced_alike_at_every_layout(
    rows: dict[str, Any], start: Callable[..., Finished], damaged: Path
) -> None:
    flags = {**rows, **ALLOWING_BAD, "data_path": str(damaged), "save_interval": None}
    name = f"bad_{'packed' if 'pack' in rows else 'apart'}_"
    expected = start(Case("", 1), f"{name}1", **flags)
    found = quarantine(expected)
    keys = {f"{number:09d}" for number in BAD_TEXT + BAD_PICTURE}
    assert {line["key"] for line in found} == keys
    assert not keys & {line["replaced_by"] for line in found} and None not in {line["replaced_by"] for line in found}
    assert {line["reason"].partition(":")[0] for line in found} == {"the record is not JSON", "undecodable"}
    assert [line["position"] for line in found] == sorted(line["position"] for line in found) or "pack" in rows
    assert sum(entry["bad_samples"] for entry in expected.metrics) == len(found)
    for case in (
        Case("", 2, layout(2)),
        Case("", 4, layout(2, 2, sequence_parallel=True, num_workers=1)),
        Case("", 3, layout(1, 3)),
        Case("", 2, {"micro_batch_size": 1}),
    ):
        run = start(case, f"{name}{case.world}_{len(case.flags)}", **{**flags, **case.flags})
        assert_same(run, expected)


def test_a_run_that_is_stopped_and_continued_elsewhere_trains_the_same(
    start: Callable[..., Finished], damaged: Path
) -> None:
    """Thirty iterations at tensor 2 x pipeline 2; and the same, stopped after 11 and 23, resumed at other layouts.

    The two rows of a step, of about five samples together, are chosen at the first start.
    """
    rows = {**PACKED, "global_batch_size": None, "global_batch_samples": 5}
    flags = {**rows, **ALLOWING_BAD, "train_iters": 30, "data_path": str(damaged), "save_interval": None}
    expected = start(Case("", 4, layout(2, 2)), "stream_whole", **flags)
    assert [entry["iteration"] for entry in expected.metrics] == list(range(1, 31))
    for case, until in (
        (Case("", 4, layout(2, 2)), 11),
        (Case("", 2, {"num_workers": 1}), 23),
        (Case("", 4, layout(1, 2, num_workers=2)), None),
    ):
        run = start(case, "stream_in_parts", until, **{**flags, **case.flags})
        found = find_checkpoint(run.folder)
        assert found is not None and found.iteration == (until or 30)
        assert found.train_state()["bad_samples"] == len(quarantine(run))
        assert found.train_state()["global_batch_size"] == 2
    assert_same(run, expected)
    assert len(quarantine(run)) > 10
    print(f"largest relative difference of a loss or norm: {difference(run, expected):.1e}")


@pytest.fixture
def flags(base: Callable[[str], Path], damaged: Path, tmp_path: Path) -> dict[str, Any]:
    """Thirty steps at tensor 2 x pipeline 2, with a save after each."""
    return {
        "load": str(base("qwen2_siglip")),
        "data_path": str(damaged),
        "save": str(tmp_path / "run"),
        "training_stage": "finetune",
        "train_iters": 30,
        "num_workers": 1,
        "save_interval": 1,
        "distributed_timeout_minutes": 1,
        **PACKED,
        **layout(2, 2),
    }


def train_and_expect(flags: dict[str, Any], message: str, fault: str = "") -> None:
    """Every rank must return 2 and the first must print `message`; fault: what fails on rank 1 in its fifth step."""
    from ross_mcore.commands.train import train_status
    from ross_mcore.config import Config
    from ross_mcore.data import shard_reader as shards
    from ross_mcore.data.loader import StepLoader

    first, victim = os.environ["RANK"] == "0", fault and os.environ["RANK"] == "1"
    if victim and fault == "file system":
        shards.READ_PAUSES_SECONDS = (0.0, 0.0)
        pread, calls = os.pread, []

        def failing(*arguments: int) -> bytes:
            calls.append(arguments)
            if len(calls) > 20:
                raise OSError(5, "Input/output error")
            return pread(*arguments)

        os.pread = failing
    elif victim and fault == "worker":
        read, steps = StepLoader._read, []

        def killing(loader: Any) -> Any:
            steps.append(loader)
            if len(steps) == 5:
                for worker in loader._stream._stream._workers:
                    os.kill(worker.pid, signal.SIGKILL)
            return read(loader)

        StepLoader._read = killing
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        status = train_status(Config.from_flat(**flags))
    assert status == 2 and (message in errors.getvalue()) == first, errors.getvalue()


def test_too_many_bad_samples_end_the_run_on_all_ranks(flags: dict[str, Any]) -> None:
    """Four of sixteen are bad: the eleventh bad one ends the run, in the second or third epoch, before its step."""
    run_ranks(train_and_expect, 4, flags, "--max-bad-fraction 0.001; the last one is 0000000")
    found = find_checkpoint(Path(flags["save"]))
    bad = [json.loads(line) for line in (Path(flags["save"]) / "quarantine.jsonl").read_text().splitlines()]
    assert found is not None and found.iteration + 1 == bad[-1]["iteration"]
    assert found.train_state()["bad_samples"] <= 10 < len(bad)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("file system", "Input/output error, 3 times in a row (rank 1)"),
        ("worker", "SIGKILL"),
    ],
)
def test_a_rank_that_cannot_read_ends_the_run_on_all_ranks(flags: dict[str, Any], fault: str, message: str) -> None:
    run_ranks(train_and_expect, 4, {**flags, **ALLOWING_BAD}, message, fault)
    found = find_checkpoint(Path(flags["save"]))
    assert found is not None and 1 <= found.iteration < 30
