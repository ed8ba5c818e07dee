"""Token ids and labels against those of the reference (transformers 4.43.1, slow tokenizers), token by token."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ross_mcore.data.conversation import expand_images
from ross_mcore.data.spec import SampleSpec
from ross_mcore.data.templates import (
    TRAINING_TEMPLATES,
    Tokenized,
    tokenize_conversation,
    tokenize_prompt,
    write_prompt,
)
from ross_mcore.data.tokenizer import load_tokenizer
from ross_mcore.errors import ConversationError

FOLDERS = {
    "qwen": "tok_qwen2",
    "llama_legacyF": "tok_llama_legacyF",
    "llama_legacyT": "tok_llama_legacyT",
    "llama3": "tok_llama3",
}
CASES = [
    "qwen|plain",
    "qwen|qwen_2",
    "qwen|qwen_2|maxlen100",
    "qwen|qwen_2|im_start_end",
    "qwen|v1_qwen2",
    "llama_legacyF|plain",
    "llama_legacyF|v1",
    "llama_legacyF|v1|maxlen100",
    "llama_legacyF|v1|im_start_end",
    "llama_legacyT|v1",
    "llama3|plain",
    "llama3|llama3",
]
"""tokenizer | template | settings: im_start_end, or a maximum length other than 256."""
DIFFERENT = ("image_key_but_no_tag", "system_turn")
"""Conversations that the reference refuses or trains on without their picture; here they are rows with all of it."""
DIFFERENT_IN_PLAIN = (*DIFFERENT, "text_single", "long_text_truncated", "gpt_first")
TURNS = [
    {"from": "human", "value": "<image>\nQ1?"},
    {"from": "gpt", "value": "A1."},
    {"from": "human", "value": "Q2?"},
    {"from": "gpt", "value": "A2."},
]
"""The conversation of the recorded prompts."""


@pytest.fixture(scope="module")
def tokenizers(golden: Path) -> dict[str, Any]:
    return {name: load_tokenizer(golden / "data" / folder) for name, folder in FOLDERS.items()}


@pytest.fixture(scope="module")
def conversations(recorded_json: Callable[[str], Any]) -> dict[str, Any]:
    return recorded_json("data/conversations.json")


def tokenize(sample: dict[str, Any], tokenizer: Any, case: str, supervise_final_eos: bool = False) -> Tokenized:
    _, template, *settings = case.split("|")
    return tokenize_conversation(
        sample["conversations"],
        int("image" in sample),
        tokenizer,
        SampleSpec(
            template,
            seq_length=100 if "maxlen100" in settings else 256,
            supervise_final_eos=supervise_final_eos,
            mm_use_im_start_end="im_start_end" in settings,
        ),
    )


@pytest.mark.parametrize("case", CASES)
def test_tokens_and_labels_are_the_reference_s(
    case: str, tokenizers: dict[str, Any], conversations: dict[str, Any], recorded_json: Callable[[str], Any]
) -> None:
    tokenizer = tokenizers[case.split("|")[0]]
    expected = conversations["tokenized"][case]["samples"]
    samples = {sample["id"]: sample for sample in recorded_json("data/samples.json")}
    assert len(samples) == 22 and len(expected) == (4 if "im_start_end" in case else 22)
    for sample in map(samples.__getitem__, expected):
        wanted = expected[sample["id"]]
        if sample["id"] in (DIFFERENT_IN_PLAIN if "plain" in case else DIFFERENT):
            found = tokenize(sample, tokenizer, case)
            assert found.image_spans == ("image" in sample) and found.label_tokens and not found.mismatch
            continue
        if "error" in wanted:
            with pytest.raises(ConversationError):
                tokenize(sample, tokenizer, case)
            continue
        found = tokenize(sample, tokenizer, case)
        assert found.input_ids == wanted["input_ids"], sample["id"]
        assert found.labels == wanted["labels"], sample["id"]
        assert found.mismatch == ("mismatch" in (wanted.get("printed") or "")), sample["id"]


def test_the_final_end_of_turn_is_the_only_difference(
    tokenizers: dict[str, Any], recorded_json: Callable[[str], Any]
) -> None:
    """`supervise_final_eos` adds exactly one label, of the last token, if a sample is complete and has labels."""
    added = 0
    for sample in recorded_json("data/samples.json"):
        try:
            with_it = tokenize(sample, tokenizers["qwen"], "qwen|qwen_2", True)
        except ConversationError:
            continue
        without = tokenize(sample, tokenizers["qwen"], "qwen|qwen_2", False)
        assert with_it.input_ids == without.input_ids
        differ = [place for place, pair in enumerate(zip(with_it.labels, without.labels)) if len(set(pair)) > 1]
        assert differ in ([], [len(without.labels) - 1])
        if differ:
            assert with_it.labels[-1] == tokenizers["qwen"].convert_tokens_to_ids("<|im_end|>")
            added += 1
        else:
            assert without.mismatch
    assert added == 18  # 22, less a malformed one and three mismatches


def test_nothing_is_supervised_past_the_last_answer_found(tokenizers: dict[str, Any]) -> None:
    """A row over the maximum length keeps its labels although its second turn has no answer; none is added."""
    turns = [{"from": who, "value": text} for who, text in (("human", "<image> Q"), ("gpt", "A1."), ("human", "B"))]
    found = tokenize_conversation(turns, 1, tokenizers["qwen"], SampleSpec("qwen_2", seq_length=20))
    end = found.input_ids.index(tokenizers["qwen"].convert_tokens_to_ids("<|im_end|>"))
    assert not found.mismatch and found.labels[end - 1] != -100 and set(found.labels[end:]) == {-100}


@pytest.mark.parametrize("case", ["qwen|qwen_2", "qwen|v1_qwen2", "llama_legacyF|v1", "llama3|llama3"])
def test_prompts_to_generate_from(case: str, tokenizers: dict[str, Any], conversations: dict[str, Any]) -> None:
    name, template = case.split("|")
    prompts = conversations["prompts"]
    assert write_prompt(TURNS, 1, SampleSpec(template)) == prompts[template]["full"]
    assert write_prompt(TURNS[:3], 1, SampleSpec(template), generation=True) == prompts[template]["generation"]
    assert tokenize_prompt(TURNS[:3], 1, tokenizers[name], SampleSpec(template)) == prompts["_generation_ids"][case]


def test_a_prompt_for_a_caption_is_the_image(tokenizers: dict[str, Any]) -> None:
    assert tokenize_prompt(TURNS[:1], 1, tokenizers["qwen"], SampleSpec("plain")) == [-200]
    assert tokenize_prompt(TURNS[:1], 1, tokenizers["llama3"], SampleSpec("plain")) == [507, -200]
    assert write_prompt(TURNS[:2], 1, SampleSpec("plain")) == "<image>A1.\n"


def test_there_is_nothing_to_generate_after_an_answer() -> None:
    with pytest.raises(ConversationError, match="nothing to answer"):
        write_prompt(TURNS, 1, SampleSpec("llama3"), generation=True)


def test_training_templates_have_labels_in_every_round(
    tokenizers: dict[str, Any], conversations: dict[str, Any]
) -> None:
    """The template that is not for training does not."""
    fitting = {"plain": "qwen", "qwen_2": "qwen", "v1": "llama_legacyF", "llama3": "llama3", "chatml": "qwen"}
    assert set(TRAINING_TEMPLATES) == set(fitting)
    for template, name in fitting.items():
        turns = TURNS[:2] if template == "plain" else TURNS
        assert tokenize_conversation(turns, 1, tokenizers[name], SampleSpec(template, seq_length=256)).label_tokens > 1
    assert tokenize_conversation(TURNS, 1, tokenizers["qwen"], SampleSpec("v1_qwen2", seq_length=256)).label_tokens == 0


def test_the_end_of_turn_of_llama3_is_not_padding(golden: Path, tmp_path: Path) -> None:
    """The chat models name `<|eot_id|>` their end of sequence; as padding it would make every row a mismatch."""
    folder = shutil.copytree(golden / "data" / FOLDERS["llama3"], tmp_path / "tokenizer")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|eot_id|>"}))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|eot_id|>", "<|end_of_text|>")
    assert not tokenize_conversation(TURNS, 1, tokenizer, SampleSpec("llama3", seq_length=256)).mismatch


def test_images_take_their_place() -> None:
    ids, labels, starts = expand_images([5, -200, 6, -200], [-100, -200, 6, -200], 3)
    assert ids.tolist() == [5, 0, 0, 0, 6, 0, 0, 0]
    assert labels.tolist() == [-100, -100, -100, -100, 6, -100, -100, -100]
    assert starts == [1, 5]


@pytest.mark.parametrize("legacy", [False, True])
def test_text_is_split_as_sentencepiece_splits_it(legacy: bool, tokenizers: dict[str, Any], golden: Path) -> None:
    """Random text against the rules of the slow Llama tokenizer of transformers 4.43, on SentencePiece itself.

    Left out is the one known difference: with legacy=False, text that starts with a space after a special token.
    """
    name = f"llama_legacy{'T' if legacy else 'F'}"
    slow = _slow_llama(golden / "data" / FOLDERS[name] / "tokenizer.model", legacy)
    words = [
        " ",
        "  ",
        "\n",
        "USER:",
        " ASSISTANT: ",
        "the dog",
        "a red car",
        "</s>",
        "é",
        "猫",
        "12",
        "SER",
        "<unk>",
        "x",
    ]
    draw = random.Random(0)
    compared = 0
    for _ in range(1500):
        text = "".join(draw.choices(words, k=draw.randint(0, 8)))
        if legacy or not re.search("(</s>|<unk>) ", text):
            assert tokenizers[name](text).input_ids == slow(text), repr(text)
            compared += 1
    assert compared > 1200


def _slow_llama(model_file: Path, legacy: bool) -> Callable[[str], list[int]]:
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    pieces = SentencePieceProcessor(model_file=str(model_file))
    if not legacy:
        proto = sentencepiece_model_pb2.ModelProto.FromString(pieces.serialized_model_proto())
        proto.normalizer_spec.add_dummy_prefix = False
        pieces.LoadFromSerializedProto(proto.SerializeToString())
    special = {"<unk>": 0, "<s>": 1, "</s>": 2}

    def segment(text: str) -> list[int]:
        if legacy or not text.startswith((" ", "▁")):
            return pieces.encode(text)
        return pieces.encode("<unk>" + text)[len(pieces.encode("<unk>")) :]

    def split(text: str) -> list[int]:
        text = text if legacy or not text else "▁" + text
        parts = [part for part in re.split("(<s>|</s>|<unk>)", text) if part]
        if not legacy and len(parts) > 1 and parts[0] == "▁":
            parts = parts[1:]
        return [1] + [token for part in parts for token in ([special[part]] if part in special else segment(part))]

    return split
