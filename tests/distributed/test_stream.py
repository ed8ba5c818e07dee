"""The stream of samples does not depend on the layout, on where a run was stopped, or on which rank finds a bad sample.

The data set is damaged after it was indexed: two samples have a text that is no JSON, and the picture of two others,
which only the tensor-parallel rank whose share it is looks at, is zeros.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ross_mcore import platform

platform.prepare()

from ross_mcore.checkpoint.folder import find_checkpoint  # noqa: E402
from ross_mcore.data.shards import ShardReader  # noqa: E402
from tests.distributed.cases import Case, layout  # noqa: E402
from tests.distributed.conftest import Finished  # noqa: E402

BAD_TEXT, BAD_PICTURE = (5, 11), (3, 13)
PACKED = {"pack": True, "seq_length": 256, "global_batch_size": 2, "micro_batch_size": 1}
"""Two rows a step, of about three samples each: 30 steps are more than 11 epochs of the 16 samples."""
BEARING = {"max_bad_fraction": 1.0}


@pytest.fixture(scope="session")
def damaged(shards: Callable[[str], Path], workplace: Path) -> Path:
    folder = workplace / "shards_damaged"
    if not folder.exists():
        folder.mkdir()
        for path in shards("mixed").iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        reader = ShardReader(folder)
        for number in BAD_TEXT:
            damage(reader, number, int(reader.samples[number]["text_offset"]), int(reader.samples[number]["text_size"]))
        for number in BAD_PICTURE:
            image = reader.images[int(reader.samples[number]["first_image"])]
            damage(reader, number, int(image["offset"]), int(image["size"]))
    return folder


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


@pytest.mark.parametrize("rows", [{"train_iters": 8}, {"train_iters": 8, **PACKED}], ids=["a sample a row", "packed"])
def test_bad_samples_are_replaced_alike_at_every_layout(
    rows: dict[str, Any], start: Callable[..., Finished], damaged: Path
) -> None:
    flags = {**rows, **BEARING, "data_path": str(damaged), "save_interval": None}
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
    """Thirty iterations at tensor 2 x pipeline 2, and the same stopped after 11 and 23 and continued elsewhere."""
    flags = {**PACKED, **BEARING, "train_iters": 30, "data_path": str(damaged), "save_interval": None}
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
    assert_same(run, expected)
    assert len(quarantine(run)) > 10
    print(f"largest relative difference of a loss or norm: {difference(run, expected):.1e}")
