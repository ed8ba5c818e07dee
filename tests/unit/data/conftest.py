"""A small data set written by this package, and its records and pictures."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from ross_mcore.architecture import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from ross_mcore.data.sample import ShardDataset
from ross_mcore.data.shard_reader import LengthSource, ShardReader
from ross_mcore.data.spec import SampleSpec
from ross_mcore.data.tokenizer import load_tokenizer
from ross_mcore.shards.llava import convert_records
from ross_mcore.shards.measure import Measure
from ross_mcore.shards.writer import ShardWriter

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedTokenizerBase


@pytest.fixture(scope="session")
def encoded() -> Callable[..., bytes]:
    """encoded(width, height, kind, colour) -> the bytes of a picture of one colour."""

    def encode(width: int, height: int, kind: str = "PNG", colour: tuple[int, int, int] = (200, 30, 60)) -> bytes:
        stream = io.BytesIO()
        Image.new("RGB", (width, height), colour).save(stream, kind)
        return stream.getvalue()

    return encode


@pytest.fixture(scope="session")
def golden_data() -> Path:
    """The folder of recorded conversations, pictures and tokenizers."""
    return Path(__file__).parents[2] / "golden" / "data"


@pytest.fixture(scope="session")
def tokenizer(golden_data: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(golden_data / "tok_qwen2")


@pytest.fixture(scope="session")
def model_config() -> ModelConfig:
    """A tower of 12 x 12 pixels and 3 x 3 patches; the other parts are arbitrary."""
    tower = {"model_type": "siglip_vision_model", "image_size": 12, "patch_size": 4}
    vision = VisionConfig(tower | {"hidden_size": 8, "num_hidden_layers": 2}, (0.5,) * 3, (0.5,) * 3)
    language = LanguageConfig("qwen2", 8, 8, 1, 1, 1, 8, 512, 64, 1e-6, 1e4, True, True)
    return ModelConfig(language, vision, ProjectorConfig(), None, None)


@pytest.fixture(scope="session")
def records() -> list[dict[str, Any]]:
    """23 records: every third has no picture, the others have one, each of a different colour."""
    made = []
    for number in range(23):
        turns = [{"from": "human", "value": f"What is {number}?"}, {"from": "gpt", "value": f"A thing, {number}."}]
        record: dict[str, Any] = {"id": f"r{number}", "conversations": turns}
        if number % 3:
            turns[0]["value"] = "<image>\n" + turns[0]["value"]
            record["image"] = f"p{number}.png"
        made.append(record)
    return made


@pytest.fixture(scope="session")
def image_folder(
    records: list[dict[str, Any]], encoded: Callable[..., bytes], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number, record in enumerate(records):
        if "image" in record:
            kind = ("PNG", "JPEG", "WEBP")[number % 3]
            (folder / record["image"]).write_bytes(encoded(9 + number, 14, kind, (number * 10, 40, 90)))
    return folder


@pytest.fixture(scope="session")
def shards(
    records: list[dict[str, Any]],
    image_folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    out = tmp_path_factory.mktemp("data") / "shards"
    with ShardWriter(out, max_samples=6, length_source=LengthSource("test", "qwen_2")) as writer:
        convert_records(records, image_folder, writer, Measure(tokenizer, SampleSpec("qwen_2")))
    return out


@pytest.fixture(scope="session")
def open_dataset(
    shards: Path, tokenizer: PreTrainedTokenizerBase, model_config: ModelConfig
) -> Callable[..., ShardDataset]:
    """open_dataset(path=..., seq_length=...) -> ShardDataset with the template qwen_2."""

    def build(path: Path | None = None, seq_length: int = 128) -> ShardDataset:
        spec = SampleSpec("qwen_2", seq_length=seq_length)
        return ShardDataset(ShardReader(path or shards), tokenizer, model_config, spec)

    return build


@pytest.fixture
def one_sample(tmp_path: Path) -> Callable[..., Path]:
    """one_sample(record, images) -> a data set of this one sample, not checked."""

    def build(record: Any, images: list[tuple[str, bytes]] | None = None) -> Path:
        data = record if isinstance(record, bytes) else json.dumps(record).encode()
        with ShardWriter(tmp_path / "one") as writer:
            writer.write("only", data, images or [])
        return tmp_path / "one"

    return build
