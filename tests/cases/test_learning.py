"""Runs that would learn nothing are refused at start, with the number that shows it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from safetensors.torch import load_file, save_file

from ross_mcore.conversion import assembly
from tests.cases.case import LLAMA3_TOKENIZER, TOKENIZER, Case, Place, conversation
from tests.recorded import GOLDEN

RECORD = {"image": "a.jpg", "conversations": conversation()}
TEXT = {"conversations": conversation(question="What?")}
UNANSWERED = {"image": "a.jpg", "conversations": conversation(answer="")}
TP2 = ("--tensor-model-parallel-size", 2)


def training(
    place: Place,
    *flags: object,
    records: Sequence[dict[str, Any]] = (RECORD,) * 4,
    load: Path | None = None,
    tokenizer: Path = TOKENIZER,
    template: str = "qwen_2",
) -> Sequence[object]:
    """Arguments of a short run on some records, by default four with one picture each."""
    place.picture()
    data = place.write("data.json", list(records))
    made = Case(
        "shards",
        "make-shards",
        lambda _: [
            *("--data", data, "--image-folder", place.folder / "images", "--out", place.folder / "shards"),
            *("--tokenizer", tokenizer, "--template", template),
        ],
        0,
    )
    made.run(place)
    return [
        *("--load", load or place.base, "--data-path", place.folder / "shards", "--save", place.folder / "run"),
        *("--template", template, "--training-stage", "finetune", "--train-iters", 1, "--num-workers", 0, *flags),
    ]


def enlarged_tokenizer(folder: Path, *tokens: str) -> Path:
    """The recorded tokenizer, whose 512 tokens the recorded models have, with more tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(folder)
    return folder


def unchecked_model(place: Place, *tokens: str) -> tuple[Path, Path]:
    """(checkpoint, tokenizer) as conversion wrote them before it compared tokenizer and vocabulary."""
    tokenizer = enlarged_tokenizer(place.folder / "larger", *tokens)
    source = GOLDEN / "model_qwen2_siglip" / "hf_checkpoint"
    with mock.patch.object(assembly, "require_vocabulary"):
        assembly.import_ross(place.folder / "base", source, tokenizer=tokenizer, base=GOLDEN)
    return place.folder / "base", tokenizer


def beyond_the_vocabulary(place: Place, *flags: object) -> Sequence[object]:
    """Sixty tokens are added and the last one is used."""
    load, tokenizer = unchecked_model(place, *(f"new{n}" for n in range(60)))
    record = {**RECORD, "conversations": conversation(answer="A new59.")}
    return training(place, *flags, "--seq-length", 128, records=[record] * 4, load=load, tokenizer=tokenizer)


def padding_in_the_text(place: Place, *flags: object) -> Sequence[object]:
    """A published kind: `<pad>` is the only token beyond the model. One of four captions contains it."""
    load, tokenizer = unchecked_model(place, "<pad>")
    bad = {**RECORD, "conversations": conversation(answer="A <pad> car.")}
    records = [RECORD, bad, RECORD, RECORD]
    return training(place, *flags, "--seq-length", 128, records=records, load=load, tokenizer=tokenizer)


def llama3_model(place: Place) -> Path:
    source = GOLDEN / "model_llama_clip" / "hf_checkpoint"
    assembly.import_ross(place.folder / "base", source, tokenizer=LLAMA3_TOKENIZER, base=GOLDEN)
    return place.folder / "base"


def converting(place: Place, tokenizer: Path, vocab_size: int = 512) -> Sequence[object]:
    """The recorded model with the first `vocab_size` of its 512 embeddings."""
    source = place.folder / "model"
    recorded = GOLDEN / "model_qwen2_siglip" / "hf_checkpoint"
    config, tensors = json.loads((recorded / "config.json").read_text()), load_file(recorded / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:vocab_size].clone()
    place.write("model/config.json", {**config, "vocab_size": vocab_size})
    save_file(tensors, source / "model.safetensors")
    towers = (
        "--vision-model",
        GOLDEN / config["mm_vision_tower"],
        "--pixel-decoder",
        GOLDEN / config["mm_pixel_decoder"],
    )
    return ["--ross-model", source, *towers, "--tokenizer", tokenizer, "--save", place.folder / "converted"]


def indexing(place: Place) -> Sequence[object]:
    """Shards, and a tokenizer beside the configuration of a model with fewer tokens."""
    training(place, tokenizer=(folder := enlarged_tokenizer(place.folder / "larger", "new0", "new1")))
    place.write("larger/config.json", {"model_type": "qwen2", "vocab_size": 512})
    return ["--data-path", place.folder / "shards", "--tokenizer", folder, "--template", "qwen_2"]


def validating(place: Place, *flags: object) -> Sequence[object]:
    """The checkpoint of --load on shards, with nothing to train."""
    training(place)
    data = ("--valid-data-path", place.folder / "shards", "--template", "qwen_2", "--num-workers", 0)
    return ["--load", place.base, *data, "--train-iters", 0, *flags]


def validated_only(place: Place) -> None:
    run = place.folder / "run"
    (line,) = map(json.loads, (run / "validation.jsonl").read_text().splitlines())
    assert line["iteration"] == 0 and line["datasets"]["shards"]["labels"] > 0
    assert sorted(path.name for path in run.iterdir() if path.name != ".lock") == ["validation.jsonl"]


def nothing_saved(name: str) -> Callable[[Place], None]:
    def check(place: Place) -> None:
        assert not list((place.folder / name).glob("iter_*"))

    return check


CASES = [
    Case("short_run", "train", lambda place: training(place, "--seq-length", 128), 0, ["finished", "lm_loss"]),
    Case(
        "row_shorter_than_a_picture",
        "train",
        lambda place: training(place, "--seq-length", 8),
        2,
        [
            "--seq-length 8 is shorter than one picture of this model, which has 16 tokens",
            "4 of 4 samples",
            "at least 16",
        ],
        holds=nothing_saved("run"),
        source="prime-rl#2064, trl#5927",
    ),
    Case(
        "row_too_short_for_any_sample",
        "train",
        lambda place: training(place, "--seq-length", 17),
        2,
        ["leaves nothing to train on: 4 of 4 samples: the cut at 17 tokens", "raise --seq-length (half of the samples"],
        holds=nothing_saved("run"),
    ),
    Case(
        "row_too_short_for_every_picture",
        "train",
        lambda place: training(place, "--seq-length", 60, records=[RECORD, TEXT, TEXT, TEXT]),
        2,
        ["none of the 1 pictures", "1 of 4 samples: the cut at 60 tokens", "raise --seq-length (half of the samples"],
    ),
    Case(
        "row_that_cuts_every_answer",
        "train",
        lambda place: training(place, "--seq-length", 70),
        2,
        [
            "100.0% of the samples",
            "(4 of 4, 4 of them tokenized)",
            "behind the cut at --seq-length 70: raise it (half",
        ],
    ),
    Case(
        "template_of_another_tokenizer",
        "train",
        lambda place: training(
            place,
            *("--template", "v1", "--seq-length", 128),
            load=llama3_model(place),
            tokenizer=LLAMA3_TOKENIZER,
            template="llama3",
        ),
        2,
        ["--template v1 writes </s>, not one token of the tokenizer", "templates whose tokens it has: plain, llama3"],
        holds=nothing_saved("run"),
    ),
    Case(
        "most_without_labels",
        "train",
        lambda place: training(place, "--seq-length", 128, records=[RECORD, UNANSWERED, UNANSWERED, UNANSWERED]),
        2,
        [
            "75.0% of the samples",
            "(3 of 4, by the index)",
            "000000001, 000000002, 000000003 (every answer is empty)",
            "inspect-shards",
        ],
    ),
    Case(
        "most_without_labels_allowed",
        "train",
        lambda place: training(place, "--allow-missing-labels", "--no-pack", records=[UNANSWERED] * 4),
        0,
        ["warning: 100.0% of the samples have no label", "| lm_loss - | vm_loss 2.", "finished"],
    ),
    Case(
        "every_step_skipped",
        "train",
        lambda place: training(place, "--skip-iterations", "1-2", "--train-iters", 2),
        2,
        ["nothing was learned in iterations 1 to 2: 2 named by --skip-iterations"],
        never=["finished"],
        holds=nothing_saved("run"),
    ),
    Case(
        "validation_alone",
        "train",
        lambda place: validating(place, *TP2, "--save", place.folder / "run"),
        0,
        ["iter_0000000, template qwen_2, on shards (4 samples)", "validation after iteration 0", "nothing was trained"],
        never=["finished", "saved iteration"],
        holds=validated_only,
        ranks=2,
    ),
    Case("validation_alone_prints_without_save", "train", validating, 0, ["4 samples, 16 labels, 4 images"], ["Error"]),
    Case(
        "validation_of_rows_without_room",
        "train",
        lambda place: validating(place, "--seq-length", 17),
        0,
        ["on shards: warning: 100.0% of the samples are left out", "lm_loss - | vm_loss - | 0 samples"],
    ),
    Case(
        "nothing_to_train_and_nothing_to_validate",
        "train",
        lambda place: ["--load", place.base, "--train-iters", 0],
        2,
        ["--train-iters 0 trains nothing; it validates --load: give the data with --valid-data-path"],
    ),
    Case(
        "tokens_beyond_the_vocabulary_at_start",
        "train",
        lambda place: beyond_the_vocabulary(place, *TP2),
        2,
        ["vocabulary of 512 tokens: 60 tokens are beyond it, the first is 'new0' with id 512"],
        holds=nothing_saved("run"),
        ranks=2,
        source="LLaVA#69, tokenizers#1609",
    ),
    Case(
        "tokens_beyond_the_vocabulary_at_conversion",
        "convert",
        lambda place: converting(place, enlarged_tokenizer(place.folder / "larger", "new0", "new1")),
        2,
        ["tokenizer", "larger does not fit", "2 tokens are beyond it, the first is 'new0' with id 512"],
        holds=nothing_saved("converted"),
    ),
    Case(
        "vocabulary_smaller_than_the_tokenizer",
        "convert",
        lambda place: converting(place, TOKENIZER, vocab_size=400),
        2,
        ["vocabulary of 400 tokens: 111 tokens are beyond it", "with id 400"],
        holds=nothing_saved("converted"),
    ),
    Case(
        "tokens_beyond_the_vocabulary_at_indexing",
        "index-shards",
        indexing,
        2,
        ["2 tokens are beyond it, the first is 'new0' with id 512"],
    ),
    Case(
        "padding_token_in_a_caption",
        "train",
        lambda place: padding_in_the_text(place, *TP2, "--train-iters", 4),
        0,
        ["000000001", "is bad: a token is beyond the vocabulary of 512: '<pad>' with id 512", "finished"],
        ranks=2,
        source="Llama-2 editions with <pad> 32000",
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case, place: Place) -> None:
    case.run(place)
