"""Which precomputed parts a run reads, and which it refuses."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from ross_mcore import platform
from ross_mcore.architecture import Precomputed
from ross_mcore.checkpoint.folder import Checkpoint
from ross_mcore.config import Config
from ross_mcore.data.sample import ShardDataset
from ross_mcore.data.shard_reader import ShardReader
from ross_mcore.data.spec import SampleSpec
from ross_mcore.data.tokenizer import load_tokenizer
from ross_mcore.errors import ConfigError
from ross_mcore.parallel.layout import Chunk, Stage
from ross_mcore.shards.precompute import Precomputation, load_picture_parts
from ross_mcore.shards.writer import ShardWriter
from ross_mcore.training.precomputed import choose_precomputed, read_pictures_as, unused_parts
from tests.recorded import GOLDEN, recorded_checkpoint
from tests.unit.data.loading import decoded

BOTH = ("latents", "features")
RECORD = {"conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It."}]}


@pytest.fixture(scope="module")
def bases(recorded_qwen: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    platform.initialize_process_group(timeout_minutes=1)
    llama = recorded_checkpoint("llama_clip", tmp_path_factory.mktemp("llama_clip"))
    return {"qwen2_siglip": recorded_qwen, "llama_clip": llama}


@pytest.fixture(scope="module")
def shards(bases: dict[str, Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """shards(kinds) -> three pictures with these parts, cached; shards() -> without any."""
    root = tmp_path_factory.mktemp("shards")
    with ShardWriter(root / "plain") as writer:
        for number in range(3):
            picture = GOLDEN / "data" / "images" / f"img{number}.png"
            writer.write(f"key{number}", json.dumps(RECORD).encode(), [("png", picture.read_bytes())])

    load = functools.cache(load_picture_parts)

    @functools.cache
    def get(*kinds: str, aspect_ratio: Any = "pad", drop_images: bool = False) -> Path:
        if not kinds:
            return root / "plain"
        out = root / f"{'_'.join(kinds)}_{aspect_ratio}_{drop_images}"
        parts = load(bases["qwen2_siglip"].path, kinds, aspect_ratio, "fp32")
        Precomputation(ShardReader(root / "plain"), out, parts, drop_images).run()
        return out

    return get


def opened(folder: Path, base: Checkpoint) -> ShardDataset:
    tokenizer = load_tokenizer(base.tokenizer)
    return ShardDataset(ShardReader(folder), tokenizer, base.model_config(), SampleSpec("plain", "pad", 64))


def choose(folders: list[Path], base: Checkpoint, **flags: Any) -> Precomputed:
    datasets = [opened(folder, base) for folder in folders]
    return choose_precomputed(Config.from_flat(**flags), base.model_config(), base, datasets)


def test_available_parts_are_read(shards: Any, bases: dict[str, Checkpoint]) -> None:
    base = bases["qwen2_siglip"]
    both, plain = shards(*BOTH), shards()
    assert choose([both], base) == Precomputed(features=True, latents=True)
    assert choose([both], base, precomputed=False) == choose([plain], base) == Precomputed()
    assert choose([shards("latents")], base) == Precomputed(latents=True)
    assert choose([both], base, vision_lr=1e-4) == Precomputed(latents=True)  # the tower trains, so its features change
    with pytest.raises(ConfigError, match="plain has no precomputed features and other data sets have"):
        choose([both, plain], base)


def test_parts_that_this_run_would_not_compute_are_refused(shards: Any, bases: dict[str, Checkpoint]) -> None:
    square = shards("latents", aspect_ratio="square")
    with pytest.raises(ConfigError, match=r"preprocessing .*'square'\)\" against .*'pad'\)\".*--no-precomputed"):
        choose([square], bases["qwen2_siglip"])
    with pytest.raises(ConfigError, match="the features in .*: weights '[0-9a-f]{16}' against '[0-9a-f]{16}'"):
        choose([shards("features")], bases["llama_clip"])


@pytest.mark.parametrize(
    ("kinds", "flags", "read"),
    [(("latents",), {}, "latents"), (BOTH, {"precomputed": False}, "none"), (BOTH, {"vision_lr": 1.0}, "latents")],
)
def test_missing_pictures_are_refused_when_they_are_needed(
    kinds: tuple[str, ...], flags: dict[str, Any], read: str, shards: Any, bases: dict[str, Checkpoint]
) -> None:
    with pytest.raises(ConfigError, match=f"without pictures .--drop-images.*it can use: {read}"):
        choose([shards(*kinds, drop_images=True)], bases["qwen2_siglip"], **flags)


def test_a_stage_reads_only_what_it_needs(shards: Any, bases: dict[str, Checkpoint]) -> None:
    base = bases["qwen2_siglip"]
    first, last = Stage(0, (Chunk(0, range(2), True, False),)), Stage(1, (Chunk(0, range(2, 4), False, True),))
    dataset = opened(shards(*BOTH, drop_images=True), base)
    for stage, kind, shape in ((first, "features", (16, 32)), (last, "latents", (2, 16, 8, 8))):
        read_pictures_as([dataset], Precomputed(True, True), stage, base.model_config())
        sample = decoded(dataset, 0, 0)
        assert {held: [tuple(part.shape) for part in parts] for held, parts in sample.parts.items()} == {kind: [shape]}
        assert sample.pixels[0].numel() == 0
    read_pictures_as([opened(shards(), base)], Precomputed(), first, base.model_config())


def test_the_vae_is_kept_for_reconstructions() -> None:
    everything = Precomputed(features=True, latents=True)
    assert unused_parts(Config(), everything) == ["vision_model", "pixel_decoder"]
    assert unused_parts(Config.from_flat(eval_interval=5), everything) == ["vision_model"]
    assert unused_parts(Config(), Precomputed()) == []
