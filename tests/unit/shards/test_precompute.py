"""New shards with the VAE's posteriors and the tower's features: their content, and continuing after a stop."""

from __future__ import annotations

import json
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ross_mcore import platform
from ross_mcore.checkpoint.folder import Checkpoint
from ross_mcore.data.image import decode_image
from ross_mcore.data.precomputed import PrecomputedParts, pack_part
from ross_mcore.data.shard_reader import PART_SUFFIXES, ShardReader
from ross_mcore.errors import ShardError
from ross_mcore.shards.indexer import Settings, find_shards, index_shards
from ross_mcore.shards.precompute import PictureParts, Precomputation, load_picture_parts
from ross_mcore.shards.writer import ShardWriter
from tests.recorded import GOLDEN

PICTURES = sorted((GOLDEN / "data" / "images").glob("*.png"))[:3]


@pytest.fixture(scope="module")
def base(recorded_qwen: Checkpoint) -> Path:
    platform.initialize_process_group(timeout_minutes=1)
    return recorded_qwen.path


@pytest.fixture(scope="module")
def parts(base: Path) -> PictureParts:
    return load_picture_parts(base, ["latents", "features"], "pad", "fp32")


def record(pictures: int) -> bytes:
    turns = [{"from": "human", "value": "<image>\n" * pictures + "What?"}, {"from": "gpt", "value": "It."}]
    return json.dumps({"conversations": turns}).encode()


@pytest.fixture
def shards(tmp_path: Path) -> ShardReader:
    """Three shards: samples with one picture, without any, and with two."""
    with ShardWriter(tmp_path / "shards", max_samples=2) as writer:
        for number, count in enumerate((1, 0, 2, 1, 1)):
            images = [("png", PICTURES[(number + place) % 3].read_bytes()) for place in range(count)]
            writer.write(f"key-{number}", record(count), images)
    return ShardReader(tmp_path / "shards")


def test_parts_are_those_of_the_pictures(shards: ShardReader, parts: PictureParts, tmp_path: Path) -> None:
    done = Precomputation(shards, tmp_path / "new", parts, batch_size=2).run()
    assert (done.pictures, done.shards, done.kept, done.bad) == (5, 3, 0, [])
    new = ShardReader(tmp_path / "new")
    stored = PrecomputedParts(new)
    assert stored.sources == parts.sources
    assert new.index["account"] == shards.index["account"] and new.index["account"]["pictures"] == 5
    assert new.fingerprint == shards.fingerprint and new.samples.tobytes() != shards.samples.tobytes()
    for number in range(5):
        assert new.record_bytes(number) == shards.record_bytes(number)
        for ordinal in range(new.samples[number]["num_images"]):
            data = new.image_bytes(number, ordinal)
            assert data == shards.image_bytes(number, ordinal)
            pixels = torch.from_numpy(parts.preprocessing(decode_image(data).picture))[None]
            for kind, expected in parts(pixels).items():
                torch.testing.assert_close(stored.read(kind, number, ordinal), expected[0], rtol=1e-5, atol=1e-5)
    for kind, expected in parts(torch.zeros(1, 3, 56, 56)).items():
        assert torch.equal(stored.blank(kind), expected[0])
    assert not torch.equal(stored.read("latents", 2, 0), stored.read("latents", 2, 1))


def test_finished_shards_are_kept(shards: ShardReader, parts: PictureParts, tmp_path: Path) -> None:
    out = tmp_path / "new"
    Precomputation(shards, out, parts).run()
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    (out / "shard-00001.tar").unlink()  # as if it had stopped there
    (out / "index.json").unlink()
    done = Precomputation(shards, out, parts).run()
    assert (done.pictures, done.shards, done.kept) == (3, 3, 2)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before
    assert not list(out.glob(".*partial"))


def test_ranks_share_the_shards(shards: ShardReader, parts: PictureParts, tmp_path: Path) -> None:
    work = Precomputation(shards, tmp_path / "new", parts)
    with pytest.raises(ShardError, match="shard-00001.tar was not finished"):
        work.run(rank=0, world_size=2)  # the other rank is missing
    assert sorted(path.name for path in (tmp_path / "new").glob("*.tar")) == ["shard-00000.tar", "shard-00002.tar"]


def test_other_settings_and_folders_are_refused(shards: ShardReader, parts: PictureParts, tmp_path: Path) -> None:
    Precomputation(shards, tmp_path / "new", parts).run()
    with pytest.raises(ShardError, match="begun with other settings"):
        Precomputation(shards, tmp_path / "new", parts, drop_images=True).run()
    with pytest.raises(ShardError, match="is the folder of --data-path"):
        Precomputation(shards, tmp_path / "shards", parts).run()
    with pytest.raises(ShardError, match="not empty"):
        Precomputation(shards, tmp_path, parts).run()


def test_indexed_again_without_pictures(shards: ShardReader, parts: PictureParts, tmp_path: Path) -> None:
    """index_shards finds in the tars what was written: parts, their sources, and the number of pictures."""
    out = tmp_path / "new"
    Precomputation(shards, out, parts, drop_images=True).run()
    with tarfile.open(out / "shard-00001.tar") as tar:
        suffixes = {name.partition(".")[2] for name in tar.getnames()}
    assert suffixes == {"json", *PART_SUFFIXES}
    before = ShardReader(out)
    rows, places, index = before.parts.tobytes(), before.samples["num_images"].tolist(), before.index
    done = index_shards(find_shards([str(out)], out), out, Settings())
    assert (done.samples, done.account.pictures, done.others.total(), done.bad) == (5, 5, 0, 0)
    after = ShardReader(out)
    assert after.parts.tobytes() == rows and after.samples["num_images"].tolist() == places
    assert after.precomputed == index["precomputed"] and after.fingerprint == shards.fingerprint
    with pytest.raises(ShardError, match="left out"):
        after.image_bytes(0, 0)
    assert PrecomputedParts(after).read("features", 0, 0).shape == (16, 32)


def test_a_bad_picture_is_left_out(parts: PictureParts, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "shards") as writer:
        writer.write("good", record(1), [("png", PICTURES[0].read_bytes())])
        writer.write("bad", record(1), [("png", PICTURES[0].read_bytes()[:99])])
    done = Precomputation(ShardReader(tmp_path / "shards"), tmp_path / "new", parts).run()
    assert [key for key, _ in done.bad] == ["bad"] and "truncated" in done.bad[0][1]
    new = ShardReader(tmp_path / "new")
    assert new.keys([0]) == ["good"] and len(new) == 1 and new.quarantined == 1 and new.index["account"] is None
    assert json.loads((tmp_path / "new" / "quarantine.jsonl").read_text())["key"] == "bad"


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision(dtype: str, base: Path, shards: ShardReader, tmp_path: Path) -> None:
    half = load_picture_parts(base, ["latents"], "square", dtype)
    Precomputation(shards, tmp_path / "new", half).run()
    stored = PrecomputedParts(ShardReader(tmp_path / "new")).read("latents", 0, 0)
    assert stored.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    pixels = torch.from_numpy(half.preprocessing(decode_image(shards.image_bytes(0, 0)).picture))[None]
    torch.testing.assert_close(stored.float(), half(pixels)["latents"][0], rtol=1e-2, atol=1e-3)


def test_values_that_are_not_finite_in_the_dtype_are_refused(parts: PictureParts) -> None:
    source = replace(parts.sources["features"], dtype="fp16")
    with pytest.raises(ShardError, match="features that are not finite as fp16; give another --dtype"):
        pack_part("features", torch.full((1, 16, 32), 1e5), source, [7])


def test_incomplete_or_mixed_parts_are_no_source(shards: ShardReader, parts: PictureParts, tmp_path: Path) -> None:
    out = tmp_path / "new"
    Precomputation(shards, out, parts).run()
    index = json.loads((out / "index.json").read_text())
    index["precomputed"]["latents"]["samples"] = 3
    (out / "index.json").write_text(json.dumps(index))
    with pytest.raises(ShardError, match="3 of 4 samples with pictures have latents.*--no-precomputed"):
        PrecomputedParts(ShardReader(out))
