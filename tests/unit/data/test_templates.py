"""Templates: what becomes of system turns, of pictures without `<image>`, and where labels are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ross_mcore.batch import IGNORE_INDEX
from ross_mcore.data.spec import SampleSpec
from ross_mcore.data.templates import Tokenized, tokenize_conversation, why_without_labels, write_prompt
from ross_mcore.data.tokenizer import load_tokenizer
from ross_mcore.errors import ConversationError

TOKENIZERS = {"qwen_2": "tok_qwen2", "v1": "tok_llama_legacyF", "llama3": "tok_llama3", "plain": "tok_qwen2"}
SYSTEM = {"from": "system", "value": "Be brief."}


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]


@pytest.fixture(scope="module")
def tokenizers(golden_data: Path) -> dict[str, Any]:
    return {template: load_tokenizer(golden_data / name) for template, name in TOKENIZERS.items()}


def tokenize(
    conversation: Any, num_images: int, template: str, tokenizers: dict[str, Any], **options: Any
) -> Tokenized:
    spec = SampleSpec(template, **options)
    return tokenize_conversation(conversation, num_images, tokenizers[template], spec)


def learned(row: Tokenized, tokenizer: Any) -> str:
    """The text of the tokens with a label."""
    return str(tokenizer.decode([i for i, label in zip(row.input_ids, row.labels) if label != IGNORE_INDEX]))


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("qwen_2", "Be brief. USER: <image>\nWhat? ASSISTANT: A car.<|im_end|>"),
        ("v1", "Be brief. USER: <image>\nWhat? ASSISTANT: A car.</s>"),
        (
            "llama3",
            "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat?<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\nA car.<|eot_id|><|eot_conversation|>",
        ),
        ("plain", "<image>A car.\n"),
    ],
)
def test_a_system_turn_replaces_the_template_s_own(template: str, text: str, tokenizers: dict[str, Any]) -> None:
    conversation = turns("<image>\nWhat?", "A car.", "And?", "A dog.")[: 2 if template == "plain" else 4]
    assert write_prompt([SYSTEM, *conversation[:2]], 1, SampleSpec(template)) == text
    row, without = (tokenize(c, 1, template, tokenizers) for c in ([SYSTEM, *conversation], conversation))
    assert not row.mismatch and learned(row, tokenizers[template]) == learned(without, tokenizers[template])
    blank = write_prompt([{"from": "system", "value": " "}, *conversation[:2]], 1, SampleSpec(template))
    assert "Be brief" not in blank and "curious" not in blank and text.endswith(blank)


def test_a_system_turn_in_another_place_is_refused() -> None:
    for conversation in ([*turns("Q", "A"), SYSTEM], [SYSTEM, SYSTEM, *turns("Q", "A")]):
        with pytest.raises(ConversationError, match="a system turn is not the first turn"):
            write_prompt(conversation, 0, SampleSpec("qwen_2"))
    with pytest.raises(ConversationError, match="no turn is the human's"):
        write_prompt([SYSTEM], 0, SampleSpec("qwen_2"))


@pytest.mark.parametrize("template", TOKENIZERS)
@pytest.mark.parametrize("before", [[], [SYSTEM], [{"from": "gpt", "value": "<image> Hello."}]])
def test_a_picture_without_a_placeholder_comes_first(
    template: str, before: list[dict[str, str]], tokenizers: dict[str, Any]
) -> None:
    """Also where the placeholder is in a first turn of the gpt's, which is dropped."""
    row = tokenize([*before, *turns("What?", "A car.")], 1, template, tokenizers)
    start = [SYSTEM] if before == [SYSTEM] else []
    assert row == tokenize([*start, *turns("<image>\nWhat?", "A car.")], 1, template, tokenizers)
    assert row.image_spans == 1 and row.label_tokens and not row.mismatch


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        (turns("Q", "A"), None),
        (turns("Q"), "it has no answer"),
        (turns("Q", "A", "Q"), "the last turn is the human's"),
        (turns("Q", ""), "every answer is empty"),
        (turns("Q", "A", "Q", ""), "an answer is empty"),
        (turns("Q", "say ASSISTANT: x"), "a turn contains the template's own ASSISTANT:"),
        (turns("Q </s> </s>", "A"), "a turn contains the template's own </s>"),
        ([{"from": "system", "value": "</s>"}, *turns("Q", "A")], "a turn contains the template's own </s>"),
        (turns("Q", "A <unk>"), "a turn contains the padding token <unk>"),
        (turns("Q", "A" * 300), None),
        (turns("Q " * 300, "A"), "its answers are beyond --seq-length"),
        (turns("Q", "A", "Q")[1:], "it has no answer"),
        ([SYSTEM], "nothing to answer: no turn is the human's"),
    ],
)
def test_a_conversation_without_labels_has_a_reason(
    conversation: Any, reason: str | None, tokenizers: dict[str, Any]
) -> None:
    spec = SampleSpec("v1", seq_length=200)
    assert why_without_labels(conversation, 0, tokenizers["v1"], spec) == reason
    if reason is None or "nothing" not in reason:
        assert (tokenize(conversation, 0, "v1", tokenizers, seq_length=200).label_tokens > 0) == (reason is None)
    fits = why_without_labels(turns("Q", "A"), 0, tokenizers["llama3"], spec)
    assert fits == "the answers are not found among the tokens: tokenizer and template do not fit"


def test_a_cut_before_the_answer_is_the_reason(tokenizers: dict[str, Any]) -> None:
    spec = SampleSpec("qwen_2", seq_length=100)
    for image_tokens, reason in ((9, None), (52, "its answers are beyond --seq-length"), (99, "the cut at 100 tokens")):
        found = why_without_labels(turns("<image>\nQ", "A"), 1, tokenizers["qwen_2"], spec, image_tokens)
        assert (found or "").startswith(reason or "") and (found is None) == (reason is None)
