"""Several pictures in one sample, anywhere in any turn: text, labels, cuts, bounds, from records to a batch."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ross_mcore.batch import IGNORE_INDEX, Sample, collate
from ross_mcore.data.conversation import IMAGE_TOKEN_INDEX, SampleBounds, cut_row, expand_images, require_pictures
from ross_mcore.data.order import BlockOrder
from ross_mcore.data.sample import ShardDataset
from ross_mcore.data.shard_reader import LengthSource, ShardReader
from ross_mcore.data.spec import SampleSpec
from ross_mcore.data.templates import tokenize_conversation, tokenize_prompt, write_prompt
from ross_mcore.data.tokenizer import fingerprint_tokenizer, load_tokenizer
from ross_mcore.errors import ConversationError
from ross_mcore.shards.llava import convert_records
from ross_mcore.shards.measure import Measure
from ross_mcore.shards.writer import ShardWriter
from tests.unit.data.loading import open_loader

TEMPLATES = [
    ("tok_qwen2", "qwen_2", "<|im_end|>"),
    ("tok_llama_legacyF", "v1", "</s>"),
    ("tok_llama_legacyT", "v1", "</s>"),
    ("tok_llama3", "llama3", "<|eot_id|>"),
]

QWEN_2, PLAIN = SampleSpec("qwen_2"), SampleSpec("plain")


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]


PLACES = {
    "side by side": turns("<image><image>\nCompare them.", "They are the same."),
    "in the middle of a question": turns("Is <image> the dog of <image> or not?", "A red car."),
    "in the second turn": turns("Hello", "Hi there.", "<image> and <image> ?", "Two dogs."),
    "in the middle of an answer": turns("<image>\nShow.", "I see <image> here.", "And now?", "Nothing."),
    "an answer starts with one": turns("Show <image>", "<image> is it.", "And?", "<image>\nas well"),
    "an answer ends with one": turns("Show.", "It is <image>", "And?", "Also <image>", "Then?", "No more."),
    "an answer is one": turns("Show.", "<image>", "And?", "<image>", "Now?", "A car."),
    "one ends what the human says": turns("What is <image>", "A car.", "And what is <image>", "A dog."),
}


@pytest.fixture(scope="module")
def tokenizers(golden_data: Path) -> dict[str, Any]:
    return {name: load_tokenizer(golden_data / name) for name, *_ in TEMPLATES}


def shown(conversation: list[dict[str, str]]) -> int:
    return sum(turn["value"].count("<image>") for turn in conversation)


def text_of(ids: list[int], tokenizer: Any) -> str:
    """Ids as text without white space, pictures as <image>."""
    parts = []
    for is_image, group in groupby(ids, lambda token: token == IMAGE_TOKEN_INDEX):
        run = list(group)
        parts.append("<image>" * len(run) if is_image else tokenizer.decode(run, skip_special_tokens=False))
    return re.sub(r"\s", "", "".join(parts))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("name", "template", "end"), TEMPLATES)
def test_answers_are_supervised_and_nothing_else(
    place: str, name: str, template: str, end: str, tokenizers: dict[str, Any]
) -> None:
    conversation, tokenizer = PLACES[place], tokenizers[name]
    row = tokenize_conversation(conversation, shown(conversation), tokenizer, SampleSpec(template, seq_length=512))
    assert not row.mismatch and row.image_spans == shown(conversation)
    supervised = [token for token, label in zip(row.input_ids, row.labels, strict=True) if label != IGNORE_INDEX]
    answers = "".join(turn["value"] + end for turn in conversation if turn["from"] == "gpt")
    assert text_of(supervised, tokenizer) == re.sub(r"\s", "", answers)
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(row.input_ids, row.labels, strict=True))
    everything = "".join(turn["value"] for turn in conversation)
    assert text_of(row.input_ids, tokenizer).count("<image>") == everything.count("<image>")
    _, labels, starts = expand_images(row.input_ids, row.labels, 4)
    assert all((labels[start : start + 4] == IGNORE_INDEX).all() for start in starts)
    assert IMAGE_TOKEN_INDEX not in labels
    assert (labels[1:] != IGNORE_INDEX).sum() == row.label_tokens


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("name", "template", "end"), TEMPLATES)
def test_prompts_for_generation_are_those_of_training(
    place: str, name: str, template: str, end: str, tokenizers: dict[str, Any]
) -> None:
    conversation, tokenizer = PLACES[place], tokenizers[name]
    asked = conversation[:1]
    prompt = tokenize_prompt(asked, shown(asked), tokenizer, SampleSpec(template))
    if shown(asked) != 1:  # one picture alone is moved to the start of its turn
        row = tokenize_conversation(conversation, shown(conversation), tokenizer, SampleSpec(template, seq_length=512))
        assert prompt == row.input_ids[: len(prompt)]
    assert prompt.count(IMAGE_TOKEN_INDEX) == shown(asked)


@pytest.mark.parametrize(("name", "template", "end"), TEMPLATES)
def test_a_picture_that_begins_an_answer_leaves_the_label_of_the_space_before_it(
    name: str, template: str, end: str, tokenizers: dict[str, Any]
) -> None:
    """No token merges with a picture: the last token before it belongs to the instruction."""
    conversation = PLACES["an answer starts with one"]
    row = tokenize_conversation(conversation, 3, tokenizers[name], SampleSpec(template, seq_length=512))
    for place, token in enumerate(row.input_ids):
        if token == IMAGE_TOKEN_INDEX and row.labels[place] != IGNORE_INDEX:
            assert row.labels[place - 1] == IGNORE_INDEX
    one = [*turns("Show <image>", "<image> is it.")]
    reference = tokenize_conversation(one, 1, tokenizers[name], SampleSpec(template, seq_length=512))
    last = max(place for place, token in enumerate(reference.input_ids) if token == IMAGE_TOKEN_INDEX)
    assert (reference.labels[last - 1] != IGNORE_INDEX) == (template == "v1")  # its arithmetic, with one picture


def test_one_picture_is_moved_and_several_stay() -> None:
    conversation = turns("Is <image> a dog?", "See <image> there")
    assert "USER: <image>\nIs  a dog? ASSISTANT: <image>\nSee  there" in write_prompt(
        conversation, 1, SampleSpec("qwen_2")
    )
    assert "USER: Is <image> a dog? ASSISTANT: See <image> there" in write_prompt(conversation, 2, QWEN_2)
    wrapped = write_prompt(conversation, 2, SampleSpec("qwen_2", mm_use_im_start_end=True))
    assert "USER: Is <im_start><image><im_end> a dog? ASSISTANT: See <im_start><image><im_end> there" in wrapped
    assert "USER: Is <image> a dog? ASSISTANT: See <image> there" in write_prompt(conversation, 0, QWEN_2)


def test_pictures_that_the_text_does_not_show_come_first() -> None:
    conversation = turns("What?", "This: <image>", "More?", "No.")
    assert "USER: <image>\n<image>\nWhat? ASSISTANT: This: <image><|im_end|>" in write_prompt(
        conversation, 3, SampleSpec("qwen_2")
    )
    assert write_prompt(turns("", "a <image> b"), 2, PLAIN) == "<image>a <image> b\n"
    welcome = [{"from": "gpt", "value": "Welcome."}, *turns("What?", "So.")]
    assert "questions. USER: <image>\n<image>\nWhat? ASSISTANT: So." in write_prompt(welcome, 2, QWEN_2)


@pytest.mark.parametrize(("spans", "pictures", "fits"), [(0, 0, 1), (1, 0, 0), (0, 1, 0), (1, 1, 1), (2, 1, 0)])
def test_the_text_must_show_all_pictures(spans: int, pictures: int, fits: int) -> None:
    for more in (0, 2):
        if fits:
            require_pictures(spans + more, pictures + more)
        else:
            with pytest.raises(ConversationError, match=f"{spans + more} <image> in the text, {pictures + more} pic"):
                require_pictures(spans + more, pictures + more)


@pytest.mark.parametrize("name", ["tok_qwen2", "tok_llama_legacyF", "tok_llama3"])
def test_captions_of_several_pictures_and_text_around_them(name: str, tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers[name]
    bos = tokenizer("").input_ids
    for conversation, count, supervised, before in (
        (turns("<image>\n<image>\nDescribe.", "A car."), 2, "<image>Acar.", [*bos, IMAGE_TOKEN_INDEX]),
        (turns("", "A <image> car <image> here."), 2, "A<image>car<image>here.", bos),
        (turns("<image>", "A <image> car."), 2, "A<image>car.", [*bos, IMAGE_TOKEN_INDEX]),
        (turns("<image>", "A car."), 1, "Acar.", [*bos, IMAGE_TOKEN_INDEX]),
        (turns("Say.", "A car."), 0, "Acar.", bos),
        (turns("Say.", "A car."), 1, "Acar.", [*bos, IMAGE_TOKEN_INDEX]),
    ):
        row = tokenize_conversation(conversation, count, tokenizer, SampleSpec("plain", seq_length=512))
        assert row.image_spans == count and not row.mismatch
        assert row.input_ids[: len(before)] == before
        assert row.labels == [IGNORE_INDEX] * len(before) + row.input_ids[len(before) :]
        assert text_of(row.input_ids[len(before) :], tokenizer) == supervised
    assert tokenize_prompt(turns("<image> <image> x"), 2, tokenizer, PLAIN) == [*bos] + [IMAGE_TOKEN_INDEX] * 2


def test_text_of_plain_is_cut_like_any_other(tokenizers: dict[str, Any]) -> None:
    row = tokenize_conversation(
        turns("", "a dog and a cat"), 0, tokenizers["tok_qwen2"], SampleSpec("plain", seq_length=3)
    )
    assert len(row.input_ids) == len(row.labels) == 3 < row.text_tokens


@pytest.mark.parametrize(
    ("most", "end", "kept"),
    [(20, 14, 2), (14, 14, 2), (13, 10, 1), (11, 10, 1), (10, 10, 1), (9, 9, 1), (8, 8, 1), (7, None, 0), (3, None, 0)],
)
def test_a_row_is_cut_before_a_picture(most: int, end: int | None, kept: int) -> None:
    """A row with 4 tokens per picture: 2, picture, 4 of which the third is a label, picture."""
    tokens = np.arange(14)
    labels = np.full(14, IGNORE_INDEX)
    labels[7] = 7
    if end is None:
        with pytest.raises(ConversationError, match=f"the cut at {most} tokens would go through a picture"):
            cut_row(tokens, labels, [2, 10], 4, most)
        return
    found = cut_row(tokens, labels, [2, 10], 4, most)
    assert found[0].tolist() == list(range(end)) and found[1].tolist() == labels[:end].tolist()
    assert found[2] == [2, 10][:kept]


def test_bounds() -> None:
    bounds = SampleBounds(2, 10)
    bounds.require(2, 10)
    with pytest.raises(ConversationError, match="it has over 2 pictures"):
        bounds.require(3, 1)
    with pytest.raises(ConversationError, match="its text is over 10 tokens"):
        bounds.require(1, 11)


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, encoded: Any) -> Path:
    """Records with 0 to 4 pictures, each of a different colour, measured for qwen_2."""
    root = tmp_path_factory.mktemp("several")
    colours = [(40 * n + 20, 250 - 40 * n, 99) for n in range(5)]
    for number, colour in enumerate(colours):
        (root / f"{number}.png").write_bytes(encoded(12, 12, colour=colour))
    records = []
    for number in range(20):
        count = number % 5
        if count == 4:
            conversation = turns("Look.", "So " + "word " * 6 + "<image> mid <image> end", "And?", "<image> no.")
        else:
            conversation = turns(
                "<image>" * (count > 1) + "What?", f"A thing <image> of {number}." if count > 1 else "So"
            )
        if count == 1:
            conversation[0]["value"] = "<image>\nWhat?"
        names = [f"{(number + n) % 5}.png" for n in range(count)]
        records.append({"id": str(number), "conversations": conversation} | ({"image": names} if names else {}))
    source = LengthSource(fingerprint_tokenizer(tokenizer), "qwen_2")
    with ShardWriter(root / "shards", max_samples=7, length_source=source) as writer:
        done = convert_records(records, root, writer, Measure(tokenizer, SampleSpec("qwen_2")))
    assert (done.samples, done.pictures, done.records) == (20, 40, 20)
    return root / "shards"


def open_several(path: Path, tokenizer: Any, model_config: Any, seq_length: int, **settings: Any) -> ShardDataset:
    spec = SampleSpec("qwen_2", seq_length=seq_length, **settings)
    return ShardDataset(ShardReader(path), tokenizer, model_config, spec)


def bounded(bounds: SampleBounds) -> dict[str, int | None]:
    """The options that give these bounds."""
    return {"max_images_per_sample": bounds.images, "max_tokens_per_sample": bounds.tokens}


def read_all(dataset: ShardDataset, micro_batch_size: int = 1) -> tuple[list[Sample], list[Any]]:
    """Every sample of an epoch through the loader, packed, and the batches."""
    samples: dict[str, Sample] = {}
    batches = []
    with open_loader(
        dataset,
        BlockOrder(len(dataset), seed=3),
        global_batch_size=micro_batch_size,
        micro_batch_size=micro_batch_size,
        packed=True,
    ) as loader:
        while len(samples) < len(dataset):
            step = next(loader)
            assert step.micro_batches is not None and step.slots is not None and not step.bad
            for rows, slots in zip(step.micro_batches, step.slots, strict=True):
                batches.append((rows, collate(rows, dataset.seq_length, 12, slots)))
                for row in rows:
                    samples |= {sample.key: sample for sample in row}
    return [samples[key] for key in sorted(samples)], batches


def test_every_picture_reaches_the_batch_at_its_place(several: Path, tokenizer: Any, model_config: Any) -> None:
    dataset = open_several(several, tokenizer, model_config, 256)
    samples, batches = read_all(dataset)
    for number, sample in enumerate(samples):
        assert sample.problem is None and len(sample.image_starts) == len(sample.pixels) == number % 5
        assert sample.tokens.numel() == dataset.row_lengths(np.array([number]))[0]
        for ordinal, pixels in enumerate(sample.pixels):
            colour = (number + ordinal) % 5
            assert pixels is not None
            levels = pixels[:, 0, 0].tolist()
            assert levels == [40 * colour + 20, 250 - 40 * colour, 99]
    assert max(len(row) for rows, _ in batches for row in rows) > 1
    for rows, batch in batches:
        assert batch.num_images == batch.pixels.shape[0] == sum(len(s.image_starts) for row in rows for s in row)
        for start in batch.image_starts.tolist():
            assert (batch.tokens[start : start + 9] == 0).all()
            assert (batch.labels[max(0, start - 1) : start + 8] == IGNORE_INDEX).all()  # shifted: no labels
        keys = list(zip(batch.image_positions.tolist(), batch.image_ordinals.tolist(), strict=True))
        assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("seq_length", [90, 100, 110, 120])
def test_a_sample_cut_before_a_picture_is_read_as_planned(
    seq_length: int, several: Path, tokenizer: Any, model_config: Any
) -> None:
    whole, _ = read_all(open_several(several, tokenizer, model_config, 512))
    dataset = open_several(several, tokenizer, model_config, seq_length)
    samples, _ = read_all(dataset)
    outcomes = set()
    for number, (sample, full) in enumerate(zip(samples, whole, strict=True)):
        room = dataset.row_lengths(np.array([number]))[0]
        fits = [start for start in full.image_starts if start + 9 <= seq_length]
        if len(fits) == len(full.image_starts):
            assert sample.problem is None and sample.tokens.numel() == room
            continue
        end = min(seq_length, full.image_starts[len(fits)])
        trainable = bool(fits) and bool((full.labels[1:end] != IGNORE_INDEX).any())
        outcomes.add(trainable)
        if trainable:
            assert sample.problem is None and sample.image_starts == fits and room == seq_length
            assert torch.equal(sample.tokens, full.tokens[:end]) and torch.equal(sample.labels, full.labels[:end])
        else:
            assert sample.problem == f"the cut at {seq_length} tokens would go through a picture"
    assert outcomes


@pytest.mark.parametrize("bounds", [SampleBounds(images=2), SampleBounds(tokens=72), SampleBounds(3, 72)])
def test_samples_over_the_bounds_are_skipped_and_planned_for(
    bounds: SampleBounds, several: Path, tokenizer: Any, model_config: Any
) -> None:
    dataset = open_several(several, tokenizer, model_config, 256, **bounded(bounds))
    samples, _ = read_all(dataset)
    over = 0
    for number, (sample, row) in enumerate(zip(samples, dataset.reader.samples, strict=True)):
        room = dataset.row_lengths(np.array([number]))[0]
        if bounds.images is not None and row["num_images"] > bounds.images:
            assert sample.problem == f"it has over {bounds.images} pictures" and room == 1
        elif bounds.tokens is not None and row["text_tokens"] > bounds.tokens:
            assert sample.problem == f"its text is over {bounds.tokens} tokens" and room == 1
        else:
            assert sample.problem is None and sample.tokens.numel() == room
            continue
        over += 1
    assert 0 < over < len(samples)


def test_a_cut_text_is_still_over_the_bound(several: Path, tokenizer: Any, model_config: Any) -> None:
    dataset = open_several(several, tokenizer, model_config, 20, max_tokens_per_sample=30)
    assert dataset.get(0, 0).problem == "its text is over 30 tokens"


def test_records_over_the_bounds_are_not_stored(tmp_path: Path, tokenizer: Any, encoded: Any, several: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(4, 4))
    records = [
        {"image": ["a.png"] * 3, "conversations": turns("Compare.", "Same.")},
        {"image": ["missing.png"] * 4, "conversations": turns("Compare.", "Same.")},
        {"conversations": turns("Say.", "word " * 200)},
        {"image": ["a.png"] * 2, "conversations": turns("<image> <image> <image>", "Same.")},
    ]
    spec = SampleSpec("qwen_2", max_images_per_sample=3, max_tokens_per_sample=100)
    with ShardWriter(tmp_path / "out") as writer:
        done = convert_records(records, tmp_path, writer, Measure(tokenizer, spec), max_bad_fraction=1)
    reasons = {"it has over 3 pictures": 1, "its text is over 100 tokens": 1, "3 <image> in the text, 2 pictures": 1}
    assert done.samples == 1 and done.skipped.counts + done.bad.counts == reasons
    reader = ShardReader(tmp_path / "out")
    assert reader.samples["image_spans"].tolist() == [3] and reader.samples["num_images"].tolist() == [3]
    assert json.loads(reader.record_bytes(0))["image"] == ["a.png"] * 3


def test_a_caption_in_a_tar_places_its_pictures(tmp_path: Path, encoded: Callable[..., bytes]) -> None:
    import tarfile
    from io import BytesIO

    from ross_mcore.shards.indexer import Settings, find_shards, index_shards

    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key, caption, count in (("one", b"A car.", 1), ("in", b"A <image> car <image>", 2), ("b", b"x <image>", 3)):
            files = [(f"{key}.txt", caption)] + [(f"{key}.{n}.png", encoded(4, 4)) for n in range(count)]
            for name, data in files:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, BytesIO(data))

    def keys(bounds: SampleBounds) -> tuple[ShardReader, list[str]]:
        index_shards(
            find_shards([str(tmp_path)], tmp_path),
            tmp_path,
            Settings(spec=SampleSpec(**bounded(bounds))),
            max_bad_fraction=0,
        )
        reader = ShardReader(tmp_path)
        return reader, reader.keys(range(len(reader)))

    reader, found = keys(SampleBounds(3))
    assert found == ["one", "in", "b"]
    said = [[turn["value"] for turn in json.loads(reader.record_bytes(n))["conversations"]] for n in range(3)]
    assert said == [["<image>", "A car."], ["", "A <image> car <image>"], ["<image>\n<image>", "x <image>"]]
    assert keys(SampleBounds(2))[1] == ["one", "in"]
    assert "it has over 2 pictures" in (tmp_path / "quarantine.jsonl").read_text()
