"""Samples: cut at the end, never through a picture; bad data is a problem with a reason, never an exception."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ross_mcore.batch import IGNORE_INDEX, collate
from ross_mcore.data.conversation import IMAGE_TOKEN_INDEX
from ross_mcore.data.lengths import length_source
from ross_mcore.data.sample import ShardDataset
from ross_mcore.data.shard_reader import LengthSource, ShardReader
from ross_mcore.data.spec import SampleSpec
from ross_mcore.data.survey import Survey, survey
from ross_mcore.data.templates import tokenize_conversation
from ross_mcore.shards.llava import convert_records
from ross_mcore.shards.measure import Measure
from ross_mcore.shards.writer import ShardWriter
from tests.unit.data.loading import decoded

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A red car."}]
TEXT = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A red car."}]


def test_tokens_labels_and_pictures_fit_together(open_dataset: Callable[..., ShardDataset]) -> None:
    dataset = open_dataset()
    for number in range(len(dataset)):
        sample = decoded(dataset, number, 100 + number)
        assert sample.problem is None and sample.position == 100 + number and sample.key == f"{number:09d}"
        assert sample.tokens.dtype == sample.labels.dtype == torch.int64
        assert len(sample.image_starts) == len(sample.pixels) == (number % 3 > 0)
        for start, pixels in zip(sample.image_starts, sample.pixels, strict=True):
            block = slice(start, start + 9)
            assert (sample.tokens[block] == 0).all() and (sample.labels[block] == IGNORE_INDEX).all()
            assert pixels is not None and pixels.shape == (3, 12, 12)
        supervised = sample.labels != IGNORE_INDEX
        assert supervised.any() and (sample.labels[supervised] == sample.tokens[supervised]).all()
        assert sample.labels[-1] == 511  # the end of the turn
        collate([[sample]], 128, 12)


def test_index_lengths_are_the_rows_lengths(open_dataset: Callable[..., ShardDataset]) -> None:
    dataset = open_dataset()
    for number in range(len(dataset)):
        row = dataset.reader.samples[number]
        assert dataset.get(number, 0).tokens.numel() == row["text_tokens"] + row["image_spans"] * 9


@pytest.fixture(scope="module")
def whole_rows(open_dataset: Callable[..., ShardDataset]) -> tuple[ShardDataset, list[Any]]:
    dataset = open_dataset()
    return dataset, [dataset.get(number, 0) for number in range(len(dataset))]


@settings(max_examples=60, deadline=None)
@given(seq_length=st.integers(1, 90), number=st.integers(0, 22))
def test_the_cut_never_goes_through_a_picture(
    whole_rows: tuple[ShardDataset, list[Any]], seq_length: int, number: int
) -> None:
    dataset, rows = whole_rows
    dataset.spec = replace(dataset.spec, seq_length=seq_length)
    whole, sample = rows[number], dataset.get(number, 0)
    last = max((start + 9 for start in whole.image_starts), default=0)
    if last > seq_length:
        assert sample.problem is not None and "picture" in sample.problem
        assert sample.tokens.numel() == sample.labels.numel() == 0 and not sample.image_starts and not sample.pixels
    elif sample.problem is None:
        assert torch.equal(sample.tokens, whole.tokens[:seq_length])
        assert torch.equal(sample.labels, whole.labels[:seq_length])
        assert sample.image_starts == whole.image_starts
    else:
        assert "nothing to learn" in sample.problem and (whole.labels[:seq_length] == IGNORE_INDEX).all()


BAD_RECORDS: list[tuple[Any, str]] = [
    (b"", "not JSON"),
    (b"\xff\xfe", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b"null", "not a JSON object"),
    (b"[]", "not a JSON object"),
    ({}, "list of turns"),
    ({"conversations": []}, "list of turns"),
    ({"conversations": "text"}, "list of turns"),
    ({"conversations": {"from": "human", "value": "x"}}, "list of turns"),
    ({"conversations": [1]}, "no text"),
    ({"conversations": [{"from": "human"}]}, "no text"),
    ({"conversations": [{"from": "human", "value": 3}]}, "no text"),
    ({"conversations": [{"from": "human", "value": None}]}, "no text"),
    ({"conversations": [{"value": "x"}]}, "neither"),
    ({"conversations": [{"from": ["human"], "value": "x"}]}, "neither"),
    ({"conversations": [*TEXT, {"from": "system", "value": "x"}]}, "a system turn is not the first"),
    ({"conversations": [TEXT[0], TEXT[0]]}, "alternate"),
    ({"conversations": TURNS}, "a placeholder without a picture"),
    ({"conversations": [{"from": "human", "value": "\ud800"}, TURNS[1]]}, "Unicode"),
    ({"conversations": [TEXT[0]]}, "nothing to learn"),
    ({"conversations": [{"from": "gpt", "value": "hello"}]}, "no turn is the human's"),
]


@pytest.mark.parametrize(("record", "reason"), BAD_RECORDS)
def test_a_bad_record_is_a_problem_with_a_reason(
    record: Any, reason: str, one_sample: Callable[..., Path], open_dataset: Callable[..., ShardDataset]
) -> None:
    sample = decoded(open_dataset(one_sample(record)), 0, 5)
    assert sample.problem is not None and reason in sample.problem
    assert sample.is_bad == ("nothing to learn" not in sample.problem)  # its data is whole
    assert sample.tokens.numel() == sample.labels.numel() == 0
    batch = collate([[sample]], 16, 12)
    assert batch.num_images == 0 and (batch.labels == IGNORE_INDEX).all()


def test_more_placeholders_than_pictures_is_a_problem(
    one_sample: Callable[..., Path], open_dataset: Callable[..., ShardDataset], encoded: Any
) -> None:
    turns = [*TURNS, *TURNS]
    sample = open_dataset(one_sample({"conversations": turns}, [("png", encoded(4, 4))])).get(0, 0)
    assert sample.problem is not None and "2 <image> in the text, 1 pictures" in sample.problem


def test_a_picture_that_the_text_does_not_show_comes_first(
    one_sample: Callable[..., Path], open_dataset: Callable[..., ShardDataset], encoded: Any
) -> None:
    turns = [{"from": "human", "value": "What?"}, TURNS[1]]
    dataset = open_dataset(one_sample({"conversations": turns}, [("png", encoded(4, 4))]))
    shown = [{"from": "human", "value": "<image>\nWhat?"}, TURNS[1]]
    row = tokenize_conversation(shown, 1, dataset.tokenizer, dataset.spec)
    sample = decoded(dataset, 0, 0)
    assert sample.problem is None and sample.image_starts == [row.input_ids.index(IMAGE_TOKEN_INDEX)]
    assert sample.tokens.numel() == len(row.input_ids) - 1 + dataset.image_tokens


def test_an_undecodable_picture_is_bad_and_blank_until_replaced(
    one_sample: Callable[..., Path], open_dataset: Callable[..., ShardDataset]
) -> None:
    dataset = open_dataset(one_sample({"conversations": TURNS}, [("png", b"\x89PNG broken")]))
    sample = dataset.get(0, 5)
    (bad,) = dataset.decode(sample, 0, [0])
    assert sample.problem is None and (bad.position, bad.ordinal) == (5, 0) and "undecodable" in bad.reason
    assert sample.pixels[0] is not None and sample.pixels[0].unique().tolist() == [127]  # the mean colour


def test_a_shard_that_shrinks_under_the_reader_is_a_problem(
    one_sample: Callable[..., Path], open_dataset: Callable[..., ShardDataset]
) -> None:
    folder = one_sample({"conversations": TURNS})
    dataset = open_dataset(folder)
    (folder / "shard-00000.tar").write_bytes(b"")
    sample = dataset.get(0, 0)
    assert sample.problem is not None and "truncated" in sample.problem


def test_an_unknown_template_is_refused(shards: Path, tokenizer: Any, model_config: Any) -> None:
    with pytest.raises(KeyError, match="v1_qwen2"):
        ShardDataset(ShardReader(shards), tokenizer, model_config, SampleSpec("v1_qwen2", seq_length=64))


def test_records_are_the_json_members(shards: Path) -> None:
    assert json.loads(ShardReader(shards).record_bytes(4))["id"] == "r4"


UNANSWERED = [TURNS[0], {"from": "gpt", "value": ""}]


@pytest.fixture
def half_unanswered(tmp_path: Path, encoded: Any, tokenizer: Any) -> Callable[..., Path]:
    """half_unanswered(count, source) -> `count` samples, all with a picture; every second has an empty answer."""

    def build(count: int, source: LengthSource | None = None) -> Path:
        (tmp_path / "a.png").write_bytes(encoded(4, 4))
        records = [{"image": "a.png", "conversations": UNANSWERED if n % 2 else TURNS} for n in range(count)]
        with ShardWriter(tmp_path / "half", length_source=source) as writer:
            convert_records(
                records, tmp_path, writer, Measure(tokenizer, SampleSpec("qwen_2")) if source else Measure()
            )
        return tmp_path / "half"

    return build


def test_a_sample_without_labels_is_trained_on_for_its_picture(
    half_unanswered: Callable[..., Path], open_dataset: Callable[..., ShardDataset]
) -> None:
    dataset = open_dataset(half_unanswered(2))
    answered, unanswered = dataset.get(0, 0), dataset.get(1, 1)
    assert answered.label_tokens > 0 == unanswered.label_tokens
    assert unanswered.problem is None and len(unanswered.image_starts) == 1


def labels_and_none(found: Survey) -> tuple[float, float, list[int]]:
    """Numbers of samples with and without labels, and the first without."""
    return found.labelled.count, found.without_labels.count, found.without_labels.numbers


def test_labels_are_counted_from_the_index_where_it_fits(
    half_unanswered: Callable[..., Path], open_dataset: Callable[..., ShardDataset], tokenizer: Any
) -> None:
    fitting = length_source(tokenizer, SampleSpec("qwen_2"))
    dataset = open_dataset(half_unanswered(13, fitting))
    for shard in dataset.reader.index["shards"]:
        (dataset.reader.folder / shard["name"]).write_bytes(b"")  # the index has to be enough
    found = survey(dataset)
    assert labels_and_none(found) == (7, 6, [1, 3, 5, 7, 9])
    assert found.by_index and not found.tokenized and not found.nothing and not found.cut_unlabelled.count
    dataset.spec = replace(dataset.spec, mm_use_im_start_end=True)
    assert not survey(dataset).by_index


@pytest.mark.parametrize("source", [None, LengthSource("another", "qwen_2"), LengthSource("another", "v1")])
def test_labels_are_found_by_tokenizing_otherwise(
    source: LengthSource | None,
    half_unanswered: Callable[..., Path],
    open_dataset: Callable[..., ShardDataset],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dataset = open_dataset(half_unanswered(13, source))
    assert labels_and_none(survey(dataset)) == (7, 6, [1, 3, 5, 7, 9]) and not survey(dataset).by_index
    monkeypatch.setattr("ross_mcore.data.survey.PROBED_SAMPLES", 5)
    found = survey(dataset)
    assert labels_and_none(found) == (pytest.approx(3 * 13 / 5), pytest.approx(2 * 13 / 5), [3, 9])
    assert found.tokenized == 5 and found.samples == 13


def test_samples_that_the_row_cuts_are_tokenized(
    half_unanswered: Callable[..., Path], open_dataset: Callable[..., ShardDataset], tokenizer: Any
) -> None:
    dataset = open_dataset(half_unanswered(6, length_source(tokenizer, SampleSpec("qwen_2"))))
    row = dataset.get(0, 0)
    answer = int((row.labels >= 0).nonzero()[0])
    dataset.spec = replace(dataset.spec, seq_length=answer)
    found = survey(dataset)
    assert labels_and_none(found) == (0, 6, [1, 3, 5, 0, 2]) and found.cut_unlabelled.numbers == [0, 2, 4]
    assert found.tokenized == 3 and found.lengths.max() == row.tokens.numel()
    dataset.spec = replace(dataset.spec, seq_length=row.image_starts[0] + 1)
    found = survey(dataset)
    assert labels_and_none(found) == (0, 0, []) and [x.count for x in found.nothing.values()] == [6]
    dataset.spec = replace(dataset.spec, max_images_per_sample=0)
    assert {reason: x.count for reason, x in survey(dataset).nothing.items()} == {"it has over 0 pictures": 6}


@pytest.mark.parametrize(("record", "lost"), [({"conversations": [{"from": "human", "value": "x"}]}, 1), (b"[]", 0)])
def test_text_without_labels_is_counted_and_bad_data_is_empty(
    record: Any, lost: int, one_sample: Callable[..., Path], open_dataset: Callable[..., ShardDataset]
) -> None:
    found = survey(open_dataset(one_sample(record)))
    assert (found.without_labels.count, found.empty) == (lost, 1 - lost)


def test_a_token_beyond_the_vocabulary_is_bad(
    one_sample: Callable[..., Path], open_dataset: Callable[..., ShardDataset], tokenizer: Any
) -> None:
    """Such a token is the last of the tokenizer's here, as if the model had one embedding fewer."""
    record = {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}
    dataset = open_dataset(one_sample(record))
    assert dataset.get(0, 0).problem is None
    dataset.vocab_size = largest = int(dataset.get(0, 0).tokens.max())
    token = tokenizer.convert_ids_to_tokens(largest)
    sample = dataset.get(0, 0)
    assert sample.is_bad
    assert sample.problem == f"a token is beyond the vocabulary of {largest}: {token!r} with id {largest}"


def test_modality_lengths_are_the_reference_s(
    golden_data: Path, tmp_path: Path, open_dataset: Callable[..., ShardDataset]
) -> None:
    records = json.loads((golden_data / "samples.json").read_text(encoding="utf-8"))
    recorded = json.loads((golden_data / "images.json").read_text(encoding="utf-8"))["modality_lengths"]
    with ShardWriter(tmp_path / "all") as writer:
        done = convert_records(records, golden_data / "images", writer, Measure(), max_bad_fraction=1)
    assert done.samples == len(recorded) - 1 == 21 and records[10]["id"] == "text_with_image_tag"
    assert open_dataset(tmp_path / "all").modality_lengths().tolist() == [*recorded[:10], *recorded[11:]]


def test_a_sample_without_words_has_a_length(
    one_sample: Callable[..., Path], open_dataset: Callable[..., ShardDataset]
) -> None:
    assert open_dataset(one_sample({"conversations": []})).modality_lengths().tolist() == [-1]
