"""Records that people bring, in the forms and files of other trainers: read as LLaVA's, or named with the remedy."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from ross_mcore.commands import index_shards, make_shards
from ross_mcore.data.image import decode_image
from ross_mcore.data.records import picture_names
from ross_mcore.data.sample import ShardDataset
from ross_mcore.data.shard_reader import ShardReader
from ross_mcore.data.spec import SampleSpec
from tests.cases.case import TOKENIZER
from tests.cases.test_tars import BASE_WIDTH, picture
from tests.unit.data.conftest import golden_data, model_config, tokenizer  # noqa: F401  fixtures

Turns = list[tuple[str, str]]
SEEN: Turns = [("human", "<image>\nWhat is this?"), ("gpt", "A car.")]
TEXT: Turns = [("human", "Why?"), ("gpt", "So.")]
SYSTEM = ("system", "Be brief.")
NAMES = {"human": "user", "gpt": "assistant", "system": "system"}
CAR, DOG = {"bytes": picture(1), "path": "car.jpg"}, {"bytes": picture(2, "PNG"), "path": None}


def llava(turns: Turns = SEEN, image: Any = "a.jpg", **others: Any) -> dict[str, Any]:
    record = {**others, "conversations": [{"from": who, "value": text} for who, text in turns]}
    return record if image is None else {"image": image, **record}


def roles(turns: Turns = SEEN) -> list[dict[str, Any]]:
    return [{"role": NAMES[who], "content": text} for who, text in turns]


def typed(*content: Any, answer: str = "A car.") -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}, {"role": "assistant", "content": answer}]


def words(text: str = "What is this?") -> dict[str, Any]:
    return {"type": "text", "text": text}


@dataclass(frozen=True)
class Records:
    """A file or folder of records and what must come of it.

    The image folder has a.jpg, b.png, Upper.JPG and sub/c.jpg. `write` writes the records and returns --data; a list is
    data.json. `samples`: numbers of the pictures and turns of every sample; `bad`: number of the record -> part of the
    reason.
    """

    name: str
    write: Callable[[Path], Path] | list[Any]
    samples: Sequence[tuple[list[int], Turns]] = ()
    bad: dict[int, str] = field(default_factory=dict)
    has_folder: bool = True
    flags: Sequence[str] = ()
    source: str = ""


def one(name: str, record: Any, pictures: Sequence[int] = (1,), turns: Turns = SEEN, **more: Any) -> Records:
    return Records(name, [record] if not callable(record) else record, [([*pictures], turns)], **more)


def parquet(name: str, rows: list[Any], **columns: Any) -> Callable[[Path], Path]:
    """A writer of a parquet file of rows; the first column names its folder where `name` has one."""

    def write(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path, **columns)
        return folder / Path(name).parts[0]

    return write


def saved(rows: list[Any]) -> Callable[[Path], Path]:
    """As `save_to_disk` of Hugging Face's datasets."""

    def write(folder: Path) -> Path:
        out = folder / "saved" / "train"
        out.mkdir(parents=True)
        table = pa.Table.from_pylist(rows)
        with (
            pa.OSFile(str(out / "data-00000-of-00001.arrow"), "wb") as sink,
            pa.ipc.new_stream(sink, table.schema) as w,
        ):
            w.write_table(table)
        (out / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
        (out / "dataset_info.json").write_text("{}")
        (folder / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
        return folder / "saved"

    return write


def text(name: str, content: str | bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder / name

    return write


def in_folder(name: str) -> Callable[[Path], Path]:
    """A record that names a picture by its place on this machine."""

    def write(folder: Path) -> Path:
        (folder / "data.json").write_text(json.dumps([llava(image=name.format(folder / "images"))]))
        return folder / "data.json"

    return write


ONEVISION = "LLaVA-OneVision-1.5, tools/data_preprocess"
SWIFT = "ms-swift, docs/source_en/Customization/Custom-dataset.md"
TRL = "TRL, docs/source/dataset_formats.md"
URL = "data:image/jpeg;base64," + base64.b64encode(picture(7)).decode()
NO_PICTURE = "a placeholder without a picture: <image> in turn 1"
SETS = (
    # pictures under other keys
    one("images", {**llava(image=None), "images": ["a.jpg"]}, source="LlamaFactory#9450"),
    one("image_path", {**llava(image=None), "image_path": "a.jpg"}, source="mlx-vlm#284"),
    one("image_paths", {**llava(image=None), "image_paths": ["a.jpg", "b.png"]}, [1, 2]),
    Records(
        "no_picture_or_no_key",
        [
            llava(),
            llava(image=None),
            llava(image=""),
            llava(image=None, photo="a.jpg"),
            llava([("human", "<video>\nWhat?"), ("gpt", "x")], None, video="a.mp4"),
            llava([("human", "<video>\nWhat?"), ("gpt", "x")], None),
            llava([("human", "<|vision_start|><|image_pad|><|vision_end|>What?"), ("gpt", "x")], None),
            llava(TEXT, None, photo="a.jpg"),
        ],
        [([1], SEEN)],
        {
            **dict.fromkeys((1, 2), NO_PICTURE),
            **dict.fromkeys((3, 7), "a picture under another key: photo is 'a.jpg'; name it under image"),
            4: "looks like video",
            5: "a placeholder that is not read: '<video>'",
            6: "a placeholder without a picture: '<|vision_start|><|image_pad|>",
        },
        source="mlx-vlm#284",
    ),
    Records(
        "blank_values", [llava(TEXT, ""), llava(TEXT, [""]), {"image": None, **llava(TEXT, None)}], [([], TEXT)] * 3
    ),
    Records(
        "conversations",
        [
            llava([*SEEN, *TEXT, *TEXT]),
            llava([("human", "Look at <image> now."), ("gpt", "A car.")]),
            llava([*TEXT, *SEEN]),
            llava([("gpt", "Hello."), *SEEN]),
            llava(TEXT),
            llava([("human", "<image>\nSame?"), ("gpt", "No.")], ["a.jpg", "b.png"]),
            llava([("human", "<image>\n这是什么？ ما هذا؟ 🚀"), ("gpt", "宇航员。 👩‍🚀")]),
            llava([*SEEN, *SEEN]),
            llava([SEEN[0], *SEEN]),
            llava([*SEEN, SYSTEM]),
        ],
        [
            ([1], [*SEEN, *TEXT, *TEXT]),
            ([1], [("human", "Look at <image> now."), ("gpt", "A car.")]),
            ([1], [*TEXT, *SEEN]),
            ([1], [("gpt", "Hello."), *SEEN]),
            ([1], TEXT),
            ([1, 2], [("human", "<image>\nSame?"), ("gpt", "No.")]),
            ([1], [("human", "<image>\n这是什么？ ما هذا؟ 🚀"), ("gpt", "宇航员。 👩‍🚀")]),
        ],
        {
            7: "2 <image> in the text, 1 pictures",
            8: "two of human in a row, the second '<image>\\nWhat is this?'; join them",
            9: "a system turn is not the first: it is turn 3",
        },
    ),
    # turns of other trainers
    one("messages", {"image": "a.jpg", "messages": roles([SYSTEM, *SEEN])}, turns=[SYSTEM, *SEEN], source=SWIFT),
    one("messages_and_images", {"messages": roles(), "images": ["a.jpg"]}, source="LlamaFactory#5503"),
    one("user_and_assistant", llava([("user", SEEN[0][1]), ("assistant", "A car.")])),
    one("system_turn", llava([SYSTEM, *SEEN]), turns=[SYSTEM, *SEEN]),
    one("system_key", llava(system="Be brief."), turns=[SYSTEM, *SEEN]),
    one("roles_in_conversations", {"image": "a.jpg", "conversations": roles()}),
    one("openai", {"messages": typed({"type": "image_url", "image_url": {"url": "a.jpg"}}, words())}),
    one("qwen", {"messages": typed({"type": "image", "image": "a.jpg"}, words())}),
    one("trl", {"messages": typed({"type": "image"}, words()), "images": ["a.jpg"]}, source=TRL),
    one("trl_prompt", {"prompt": roles()[:1], "completion": roles()[1:], "images": ["a.jpg"]}, source=TRL),
    one(
        "parts_in_order",
        {"messages": typed({"image": "b.png"}, words("Is "), {"image": "a.jpg"}, words(" the same?"), answer="No.")},
        [2, 1],
        [("human", "<image>\nIs <image> the same?"), ("gpt", "No.")],
    ),
    one(
        "data_url",
        {"messages": typed({"type": "image_url", "image_url": {"url": URL}}, words())},
        [7],
        has_folder=False,
    ),
    one("as_json", {"image": "a.jpg", "conversations": json.dumps(llava()["conversations"])}),
    one("turns_alone", llava(TEXT)["conversations"], [], TEXT, has_folder=False),
    one("swift", {"query": SEEN[0][1], "response": "A car.", "images": ["a.jpg"]}, source=SWIFT),
    one(
        "swift_history",
        {"system": "Be brief.", "query": "Why?", "response": "So.", "history": [["<image>\nWhat is this?", "A car."]]}
        | {"images": ["a.jpg"]},
        turns=[SYSTEM, *SEEN, *TEXT],
        source=SWIFT,
    ),
    one("caption", {"image": "a.jpg", "caption": "a car"}, turns=[("human", "<image>"), ("gpt", "a car")]),
    one("onevision_texts", {"texts": roles(), "media": "image", "name": ["a.jpg"]}, source=ONEVISION),
    one(
        "onevision_captions",
        {"images": ["a.jpg", "b.png"], "prompts": ["What?", ""], "captions": ["a car", "a dog"]},
        [1, 2],
        [("human", "<image>\nWhat?"), ("gpt", "a car"), ("human", "<image>"), ("gpt", "a dog")],
        source=ONEVISION,
    ),
    one("qwen_placeholder", llava([("human", "<|vision_start|><|image_pad|><|vision_end|>\nWhat is this?"), SEEN[1]])),
    # files
    one("lines", text("a.jsonl", json.dumps(llava()))),
    Records("lines_called_json", text("a.json", "\n".join([json.dumps(llava())] * 2)), [([1], SEEN)] * 2),
    one("list_called_jsonl", text("a.jsonl", json.dumps([llava()], indent=1))),
    one("bom", text("a.json", "\ufeff" + json.dumps([llava()]))),
    one("in_an_object", text("a.json", json.dumps({"data": [llava()]}))),
    one("parquet", parquet("a.parquet", [llava(image=CAR, id=1)]), has_folder=False, source="LLaVA-OneVision-Data"),
    one(
        "parquet_of_messages",
        parquet(
            "a.parquet",
            [
                {
                    "images": [CAR],
                    "messages": [
                        {"role": "user", "content": [{"type": "image", "text": None}, words()]},
                        {"role": "assistant", "content": [words("A car.")]},
                    ],
                }
            ],
        ),
        has_folder=False,
        source="HuggingFaceH4/llava-instruct-mix-vsft",
    ),
    one(
        "parquet_of_rounds",
        parquet("a.parquet", [{"images": [CAR, DOG], "texts": [{"user": "Same?", "assistant": "No.", "source": "x"}]}]),
        [1, 2],
        [("human", "Same?"), ("gpt", "No.")],
        has_folder=False,
        source="HuggingFaceM4/the_cauldron",
    ),
    one("parquet_of_names", parquet("a.parquet", [llava()])),
    one("hub", parquet("hub/data/train-00000-of-00001.parquet", [llava(image=DOG)]), [2], has_folder=False),
    one("save_to_disk", saved([llava(image=CAR)]), has_folder=False),
    # names of pictures
    one("absolute", in_folder("{}/a.jpg"), source="LlamaFactory#3700"),
    one("file_url", in_folder("file://{}/sub/c.jpg"), [4]),
    one("back_slashes", llava(image="sub\\c.jpg"), [4]),
    one("dot", llava(image="./a.jpg")),
    Records(
        "other_names",
        [
            llava(),
            llava(image="upper.jpg"),
            llava(image="a.png"),
            llava(image="images/sub/c.jpg"),
            llava(image="/data/images/a.jpg"),
            llava(image="https://example.com/a.jpg"),
            llava(image="nothing.jpg"),
        ],
        [([1], SEEN)],
        {
            1: "did you mean Upper.JPG?",
            2: "did you mean a.jpg?",
            3: "give that folder as --image-folder",
            4: "leaves the image folder: write it relative to that folder, as a.jpg",
            5: "https:// is not fetched",
            6: "No such file",
        },
    ),
    Records("names_and_no_folder", [llava(TEXT, None), llava()], [([], TEXT)], {1: "give --image-folder"}, False),
    # forms that are not read
    Records(
        "not_read",
        [
            llava(),
            {"instruction": "What?", "input": "", "output": "x", "image": "a.jpg"},
            {"conversations": roles(), "chosen": "x", "rejected": "y"},
            {"image": "a.jpg", "question": "What?", "answer": "x"},
            {"messages": roles(), "image": "a.jpg", "tools": "[{}]"},
            {"messages": [*roles(), {"role": "tool", "content": "3"}], "image": "a.jpg"},
            {"image_id": 3, "caption": "a car"},
            llava([("human", "What?"), ("gpt", 3)]),  # type: ignore[list-item]  # what people write
            "just text",
            None,
        ],
        [([1], SEEN)],
        {
            1: "looks like Alpaca",
            2: "looks like preference data",
            3: "looks like VQA",
            4: "looks like tool calls",
            5: "looks like tool calls: turn 3",
            6: "looks like COCO",
            7: "a turn has no text: turn 2 is the number 3, write it in quotes",
            **dict.fromkeys((8, 9), "not a JSON object"),
        },
    ),
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where cases find their pictures: a place with `images`."""
    folder = tmp_path_factory.mktemp("place")
    for number, (name, form) in enumerate(
        {"a.jpg": "JPEG", "b.png": "PNG", "Upper.JPG": "JPEG", "sub/c.jpg": "JPEG"}.items(), start=1
    ):
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "images" / name).write_bytes(picture(number, form))
    return folder


def run(command: Any, *arguments: object) -> int:
    """The exit status of a command, in this process."""
    try:
        return int(command.main([*map(str, arguments)]))
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.mark.parametrize("case", SETS, ids=lambda case: case.name)
def test_records(
    case: Records,
    images: Path,
    tmp_path: Path,
    tokenizer: Any,  # noqa: F811
    model_config: Any,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "images").symlink_to(images / "images")
    data = case.write(tmp_path) if callable(case.write) else text("data.json", json.dumps(case.write))(tmp_path)
    folder = ("--image-folder", tmp_path / "images") if case.has_folder else ()
    measured = ("--tokenizer", TOKENIZER, "--template", "qwen_2", "--max-bad-fraction", 1)
    out = tmp_path / "out"
    status = run(make_shards, "--data", data, *folder, "--out", out, "--num-workers", 1, *measured, *case.flags)
    assert status == 0, capsys.readouterr().err

    lines = map(json.loads, (out / "skipped.jsonl").read_text().splitlines())
    bad = {line["record"]: line["reason"] for line in lines}
    assert bad.keys() == case.bad.keys(), bad
    for number, reason in case.bad.items():
        assert reason in bad[number]

    reader = ShardReader(out)
    dataset = ShardDataset(reader, tokenizer, model_config, SampleSpec("qwen_2", seq_length=256))
    found = []
    for number in range(len(reader)):
        count = int(reader.samples[number]["num_images"])
        stored = json.loads(reader.record_bytes(number))
        names = picture_names(stored)
        assert len(names) == count and all(isinstance(name, str) and len(name) < 200 for name in names)
        widths = [decode_image(reader.image_bytes(number, place)).picture.width - BASE_WIDTH for place in range(count)]
        found.append((widths, [(turn["from"], turn["value"]) for turn in stored["conversations"]]))
        sample = dataset.get(number, 0)
        assert sample.problem is None and len(sample.image_starts) == count and sample.label_tokens > 0
    assert found == [*case.samples]

    made = reader.fingerprint, reader.samples.tolist()
    assert run(index_shards, "--data-path", out, "--num-workers", 0, *measured) == 0
    again = ShardReader(out)
    assert made == (again.fingerprint, again.samples.tolist())


FILES: tuple[tuple[str, str, bytes, Sequence[str]], ...] = (
    ("csv", "a.csv", b"id,image\n1,a.jpg\n", ["a.csv is CSV", "JSON lines"]),
    ("utf16", "a.json", json.dumps([llava()]).encode("utf-16"), ["a.json is UTF-16", "save it as UTF-8"]),
    ("several_lists", "a.json", json.dumps({"train": [llava()], "test": [llava()]}).encode(), ["several lists"]),
    ("coco", "a.json", json.dumps({"images": [{}], "annotations": [{}]}).encode(), ["looks like COCO annotations"]),
    ("empty_object", "a.json", b'{"train": []}', ["expected a list of records"]),
    ("empty_list", "a.json", b"[]", ["no usable sample", "no record"]),
)


@pytest.mark.parametrize(("name", "content", "says"), [case[1:] for case in FILES], ids=[case[0] for case in FILES])
def test_files_that_are_not_read_are_named(
    name: str, content: bytes, says: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert run(make_shards, "--data", tmp_path / name, "--out", tmp_path / "out") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert all(said in error for said in says), error
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]
