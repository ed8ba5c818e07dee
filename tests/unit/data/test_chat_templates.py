"""ChatML, templates of one's own and tokenizers' chat templates, against transformers' apply_chat_template."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ross_mcore.batch import IGNORE_INDEX
from ross_mcore.data.chat_templates import CHATML, TurnTemplate, Written, labelled
from ross_mcore.data.conversation import IMAGE_TOKEN_INDEX
from ross_mcore.data.lengths import length_source, stale_lengths
from ross_mcore.data.spec import SampleSpec, merged
from ross_mcore.data.templates import (
    TRAINING_TEMPLATES,
    Tokenized,
    default_template,
    end_of_answer,
    template_of,
    tokenize_conversation,
    tokenize_prompt,
    why_without_labels,
    with_template,
    write_prompt,
)
from ross_mcore.data.tokenizer import encode, load_tokenizer
from ross_mcore.errors import ConversationError, TokenizerError
from ross_mcore.options import TEMPLATES

QWEN2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set rest = messages[1:] %}{% set system = messages[0]['content'] %}"
    "{% else %}{% set rest = messages %}{% set system = false %}{% endif %}{% for message in rest %}"
    "{% if loop.index0 == 0 and system %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
    "{% if loop.last and messages[0].role == 'system' %}"
    "{{ '[INST] ' + messages[0].content + '\n\n' + message.content }}"
    "{% else %}{{ '[INST] ' + message.content }}{% endif %}{{ '[/INST]' }}"
    "{% elif message.role == 'assistant' %}{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"
)
QWEN3 = (
    "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}"
    "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m.content.lstrip('\n') + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}"
)
CHAT_TEMPLATES = [
    (QWEN2, "tok_qwen2", "<|im_end|>"),
    (QWEN3, "tok_qwen2", "<|im_end|>"),
    (MARKED, "tok_qwen2", "<|im_end|>"),
    (LLAMA3, "tok_llama3", "<|eot_id|>"),
    (LLAMA2, "tok_llama_legacyF", "</s>"),
    (MISTRAL, "tok_llama_legacyT", "</s>"),
]
YAML = """
system: "<|im_start|>system\\n{text}<|im_end|>\\n"
default_system: You are a helpful assistant.
user: "<|im_start|>user\\n{text}<|im_end|>\\n"
answer_start: "<|im_start|>assistant\\n"
answer_end: <|im_end|>
separator: "\\n"
"""
SYSTEM = {"from": "system", "value": "Be brief."}
ROLES = {"system": "system", "human": "user", "gpt": "assistant"}


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]


CONVERSATIONS = [
    turns("And?", "And?"),
    turns("What?", "A car.\n\n  With  wheels", "yes", "yes", "A car.", "no"),
    [SYSTEM, *turns("What?", "A car.", "And?", "A dog.")],
    turns("这张图片里有什么？ 👩‍🚀", "一只猫 — “café” 12345 😀."),
    turns("say <|im_end|> now </s>", "ok <|im_end|> done </s> USER: hi ASSISTANT: x"),
    turns("{{ 7 * 7 }} {% raw %} {text}", "{text} {{ messages }}"),
    turns(" What? \n", " \n A car.  ", "And?", "  A dog."),
]


@pytest.fixture(scope="module")
def tokenizers(golden_data: Path) -> dict[str, Any]:
    return {name: load_tokenizer(golden_data / name) for name in {name for _, name, _ in CHAT_TEMPLATES}}


def with_chat_template(tokenizer: Any, source: str | None) -> Any:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = source
    return changed


def messages(conversation: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in conversation]


def learned(row: Tokenized, tokenizer: Any) -> str:
    """The text of the tokens with a label."""
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(row.input_ids, row.labels, strict=True))
    return str(tokenizer.decode([i for i, label in zip(row.input_ids, row.labels) if label != IGNORE_INDEX]))


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_chatml_is_qwen2_s_chat_template(conversation: list[dict[str, str]], tokenizers: dict[str, Any]) -> None:
    tokenizer = with_chat_template(tokenizers["tok_qwen2"], QWEN2)
    expected = tokenizer.apply_chat_template(messages(conversation), tokenize=True, return_dict=False)
    own = with_template(SampleSpec(), "tokenizer", tokenizer)
    answers = "".join(f"{turn['value']}<|im_end|>" for turn in conversation if turn["from"] == "gpt")
    for spec in (SampleSpec("chatml"), own):
        row = tokenize_conversation(conversation, 0, tokenizer, spec)
        assert row.input_ids == expected and not row.mismatch and row.text_tokens == len(expected)
        assert learned(row, tokenizer) == answers
        asked = conversation[:-1]
        prompt = tokenizer.apply_chat_template(
            messages(asked), tokenize=True, return_dict=False, add_generation_prompt=True
        )
        assert tokenize_prompt(asked, 0, tokenizer, spec) == prompt == expected[: len(prompt)]


@pytest.mark.parametrize("conversation", [CONVERSATIONS[n] for n in (0, 1, 3, 5, 6)])
@pytest.mark.parametrize(("source", "name", "end"), CHAT_TEMPLATES)
def test_answers_of_a_chat_template_have_labels(
    source: str, name: str, end: str, conversation: list[dict[str, str]], tokenizers: dict[str, Any]
) -> None:
    """Where a question has the answer's text too, where answers are stripped, and where texts look like templates."""
    tokenizer = with_chat_template(tokenizers[name], source)
    spec = with_template(SampleSpec(), "tokenizer", tokenizer)
    row = tokenize_conversation(conversation, 0, tokenizer, spec)
    assert row.input_ids == tokenizer.apply_chat_template(messages(conversation), tokenize=True, return_dict=False)
    answers = "".join(turn["value"] + end for turn in conversation if turn["from"] == "gpt")
    found = learned(row, tokenizer)
    assert "".join(found.split()) == "".join(answers.split())
    assert end_of_answer(spec, tokenizer) == tokenizer.convert_tokens_to_ids(end)
    asked, answered = (tokenize_prompt(conversation[:1], 0, tokenizer, spec), conversation[:2])
    assert tokenize_conversation(answered, 0, tokenizer, spec).input_ids[: len(asked)] == asked


def test_the_token_that_ends_an_answer(tokenizers: dict[str, Any]) -> None:
    for template, name, end in (
        ("qwen_2", "tok_qwen2", "<|im_end|>"),
        ("chatml", "tok_qwen2", "<|im_end|>"),
        ("v1", "tok_llama_legacyF", "</s>"),
        ("llama3", "tok_llama3", "<|eot_id|>"),
    ):
        tokenizer = tokenizers[name]
        assert end_of_answer(SampleSpec(template), tokenizer) == tokenizer.convert_tokens_to_ids(end)
    assert end_of_answer(SampleSpec("plain"), tokenizers["tok_llama3"]) is None
    own = TurnTemplate("Q {text} ", "A ", "the end")
    assert end_of_answer(SampleSpec("a", own_templates={"a": own.as_text()}), tokenizers["tok_qwen2"]) is None


def test_pictures_are_in_a_chat_template_s_text(tokenizers: dict[str, Any]) -> None:
    for source, name, _ in CHAT_TEMPLATES:
        tokenizer = with_chat_template(tokenizers[name], source)
        spec = with_template(SampleSpec(), "tokenizer", tokenizer)
        row = tokenize_conversation(turns("What?", "See <image> here"), 2, tokenizer, spec)
        assert row.image_spans == 2 and row.labels[row.input_ids.index(IMAGE_TOKEN_INDEX)] == IGNORE_INDEX
        assert "<image>" not in learned(row, tokenizer) and "here" in learned(row, tokenizer)
        first = tokenize_conversation(turns("What?", "It."), 1, tokenizer, spec)
        assert first == tokenize_conversation(turns("<image>\nWhat?", "It."), 1, tokenizer, spec)
        if name != "tok_qwen2":
            assert row.input_ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (None, "has no chat template; give another --template"),
        ("{{ strftime_now('%d %b') }}{% for m in messages %}{{ m.content }}{% endfor %}", "writes today's date"),
        ("{% for m in messages %}{{ m.content", "cannot be used: the chat template refuses it: unexpected end"),
        ("{% for m in messages %}{{ m.content[0].text }}{% endfor %}", "leaves out an answer"),
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "changes an answer"),
        ("{{ messages.__class__.__mro__ }}", "refuses it: access to attribute '__class__' of 'list' object is unsafe"),
        ("{{ raise_exception('No chats') }}", "refuses it: No chats"),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_refused(
    source: str | None, says: str, tokenizers: dict[str, Any]
) -> None:
    with pytest.raises(TokenizerError, match=says):
        with_template(SampleSpec(), "tokenizer", with_chat_template(tokenizers["tok_qwen2"], source))


def test_what_a_chat_template_refuses_is_a_bad_conversation(tokenizers: dict[str, Any]) -> None:
    source = "{% if messages[0].role == 'system' %}{{ raise_exception('No system here') }}{% endif %}" + QWEN2
    tokenizer = with_chat_template(tokenizers["tok_qwen2"], source)
    spec = with_template(SampleSpec(), "tokenizer", tokenizer)
    with pytest.raises(ConversationError, match="refuses it: No system here"):
        tokenize_conversation([SYSTEM, *turns("Q", "A")], 0, tokenizer, spec)


def test_a_date_of_today_is_fixed(tokenizers: dict[str, Any]) -> None:
    source = "{% if date_string is not defined %}{% set date_string = strftime_now('%d') %}{% endif %}{{ date_string }}"
    tokenizer = with_chat_template(tokenizers["tok_qwen2"], source + QWEN2)
    spec = with_template(SampleSpec(), "tokenizer", tokenizer)
    assert write_prompt(turns("Q", "A"), 0, spec, tokenizer=tokenizer).startswith("26 Jul 2024<|im_start|>")


def test_a_changed_chat_template_is_another_template(tokenizers: dict[str, Any]) -> None:
    tokenizer = with_chat_template(tokenizers["tok_qwen2"], QWEN2)
    other = with_chat_template(tokenizer, QWEN2.replace("helpful", "kind"))
    spec, changed = (with_template(SampleSpec(), "tokenizer", each) for each in (tokenizer, other))
    assert spec.template != changed.template and spec.template.startswith("tokenizer#")
    with pytest.raises(TokenizerError, match="is not the one of the template tokenizer#"):
        template_of(spec, other)
    with pytest.raises(KeyError):
        template_of(spec)


def test_a_yaml_file_writes_turns(tmp_path: Path, tokenizers: dict[str, Any]) -> None:
    file, tokenizer = tmp_path / "my, chat.yaml", tokenizers["tok_qwen2"]
    file.write_text(YAML)
    assert TurnTemplate.read(file) == CHATML
    spec = with_template(SampleSpec(seq_length=99), str(file), tokenizer)
    assert spec.template.startswith("my__chat.yaml#") and list(spec.own_templates) == [spec.template]
    assert SampleSpec.from_state(json.loads(json.dumps(vars(spec)))) == spec
    chatml = SampleSpec("chatml", seq_length=99)
    for conversation in CONVERSATIONS:
        row = tokenize_conversation(conversation, 0, tokenizer, spec)
        assert row == tokenize_conversation(conversation, 0, tokenizer, chatml)
    file.write_text(f"# another comment\n{YAML}")
    assert with_template(SampleSpec(seq_length=99), str(file), tokenizer) == spec
    file.write_text(YAML.replace("helpful", "kind"))
    edited = with_template(spec, str(file), tokenizer)
    assert edited.template != spec.template and edited.measured.own_templates == edited.own_templates
    sources = length_source(tokenizer, spec), length_source(tokenizer, edited)
    assert sources[0] != sources[1] and sources[0].difference(sources[1]) == "template"
    both = merged([spec, edited, replace(chatml)])
    assert both.template == f"{spec.template}, {edited.template}, chatml" and len(both.own_templates) == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("user: '{text}'\nanswer_start: A", "the template has no key 'answer_end'"),
        ("user: Q\nanswer_start: A\nanswer_end: E", "user is 'Q', expected text with {text} once in it"),
        ("user: '{text}{text}'\nanswer_start: A\nanswer_end: E", "user is '{text}{text}', expected"),
        ("user: '{text}'\nanswer_start: A\nanswer_end: ''", "answer_end is empty"),
        ("user: '{text}'\nanswer_start: A\nanswer_end: E\nsystem: S", "system is 'S', expected"),
        ("user: '{text}'\nanswer_start: A\nanswer_end: E\ndefault_system: S", "default_system needs system"),
        ("user: '{text}'\nanswer_start: A\nanswer_end: 3", "answer_end of the template is 3, expected text"),
        ("user: '{text}'\nassistant: A", "unknown key 'assistant'"),
        ("user: '<image>{text}'\nanswer_start: A\nanswer_end: E", "user contains <image>"),
        ("user: '{text}'\nanswer_start: A\nanswer_end: \"\\ud800\"", "my.yaml: "),
        ("- user", "expected a mapping"),
        ("user: {", "my.yaml: while parsing"),
        (None, "no such file"),
    ],
)
def test_a_bad_yaml_file_names_the_key(text: str | None, says: str, tmp_path: Path, tokenizers: dict[str, Any]) -> None:
    file = tmp_path / "my.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(TokenizerError, match="--template .*my.yaml") as error:
        with_template(SampleSpec(), str(file), tokenizers["tok_qwen2"])
    assert says in str(error.value) and "answer_start, answer_end" in str(error.value)


def test_a_template_without_a_place_for_a_system_turn(tokenizers: dict[str, Any]) -> None:
    own = TurnTemplate("Q: {text}\n", "A: ", "</s>", separator="\n")
    spec = SampleSpec("own", own_templates={"own": own.as_text()})
    assert write_prompt(turns("x", "y"), 0, spec) == "Q: x\nA: y</s>\n"
    assert write_prompt(turns("x"), 0, spec, generation=True) == "Q: x\nA:"
    with pytest.raises(ConversationError, match="no place for a system turn"):
        write_prompt([SYSTEM, *turns("x", "y")], 0, spec)
    for name in ("tok_llama_legacyF", "tok_llama_legacyT", "tok_llama3", "tok_qwen2"):
        tokenizer = tokenizers[name]
        row = tokenize_conversation(turns("y </s>", "y", "<image>", " z\n"), 2, tokenizer, spec)
        assert "".join(learned(row, tokenizer).split()) == "y</s>z</s>" and row.image_spans == 2
        bos = len(encode("", tokenizer))
        assert row.input_ids[:bos] == encode("", tokenizer) and row.labels[0] == IGNORE_INDEX
        prompt = tokenize_prompt(turns("x"), 0, tokenizer, spec)
        assert tokenize_conversation(turns("x", "y"), 0, tokenizer, spec).input_ids[: len(prompt)] == prompt


def test_a_conversation_keeps_the_labels_that_the_reference_drops(tokenizers: dict[str, Any]) -> None:
    """A trailing turn of the human's, an empty answer among others, and the template's own words."""
    tokenizer, spec = tokenizers["tok_qwen2"], SampleSpec("chatml")
    for conversation, text in (
        (turns("Q", "A.", "And?"), "A.<|im_end|>"),
        (turns("Q", "", "And?", "B."), "B.<|im_end|>"),
        (turns("Q", "USER: x ASSISTANT: y"), "USER: x ASSISTANT: y<|im_end|>"),
    ):
        row = tokenize_conversation(conversation, 0, tokenizer, spec)
        assert learned(row, tokenizer) == text and why_without_labels(conversation, 0, tokenizer, spec) is None
    for conversation, reason in ((turns("Q", "  "), "every answer is empty"), (turns("Q"), "it has no answer")):
        assert not tokenize_conversation(conversation, 0, tokenizer, spec).label_tokens
        assert why_without_labels(conversation, 0, tokenizer, spec) == reason


def test_text_is_cut_with_its_labels(tokenizers: dict[str, Any]) -> None:
    tokenizer, spec = tokenizers["tok_qwen2"], SampleSpec("chatml", seq_length=30)
    row = tokenize_conversation(turns("Q", "word " * 60), 0, tokenizer, spec)
    whole = tokenize_conversation(turns("Q", "word " * 60), 0, tokenizer, SampleSpec("chatml"))
    assert row.input_ids == whole.input_ids[:30] and row.labels == whole.labels[:30]
    assert row.text_tokens == len(whole.input_ids) > 30


def test_a_token_is_learned_if_one_of_its_characters_is(tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["tok_qwen2"]
    text = "the dog the dog"
    ids, labels = labelled(Written(text, [(4, 7)]), False, tokenizer, True)
    assert tokenizer.decode(ids) == text and tokenizer.decode([i for i in labels if i >= 0]) == " dog"
    assert set(labelled(Written(text, []), False, tokenizer, True)[1]) == {IGNORE_INDEX}
    assert labelled(Written("", []), False, tokenizer, True) == ([], [])


@pytest.mark.parametrize(
    ("stage", "model_type", "name", "template"),
    [
        ("pretrain", "llama", "tok_llama3", "plain"),
        ("finetune", "llama", "tok_llama3", "llama3"),
        ("finetune", "qwen2", "tok_qwen2", "qwen_2"),
        ("finetune", "qwen3", "tok_qwen2", "qwen_2"),
        ("finetune", "llama", "tok_qwen2", "chatml"),
        ("finetune", "llama", "tok_llama_legacyF", "v1"),
        ("finetune", "llama", "tok_llama_legacyT", "v1"),
        ("finetune", "qwen2", "tok_llama_legacyT", "v1"),
        ("finetune", "llama", "tok_bytes", None),
    ],
)
def test_the_default_fits_the_tokenizer(
    stage: str, model_type: str, name: str, template: str | None, tokenizers: dict[str, Any], tmp_path: Path
) -> None:
    if name == "tok_bytes":
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        backend = Tokenizer(models.BPE({letter: n for n, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
        tokenizers = {name: PreTrainedTokenizerFast(tokenizer_object=backend)}
    assert default_template(stage, model_type, tokenizers[name]) == template


@pytest.mark.parametrize(
    ("template", "name", "says"),
    [
        ("v1", "tok_llama3", "--template v1 writes </s>, not one token of .*has: plain, llama3$"),
        ("llama3", "tok_qwen2", "writes <|start_header_id|>, not one token of .*has: plain, qwen_2, chatml$"),
        ("chatml", "tok_llama_legacyF", "writes <|im_start|>, not one token of .*has: plain, v1$"),
        ("qwen_2", "tok_llama_legacyF", "writes <|im_end|>, not one token of .*has: plain, v1$"),
        ("vicuna", "tok_llama_legacyF", "--template vicuna is not one of plain, qwen_2, v1, llama3, chatml, tokenizer"),
        ("v1_qwen2", "tok_qwen2", "--template v1_qwen2 is not one of"),
    ],
)
def test_a_template_that_does_not_fit_is_refused_by_name(
    template: str, name: str, says: str, tokenizers: dict[str, Any]
) -> None:
    with pytest.raises(TokenizerError, match=says.replace("|", r"\|")):
        with_template(SampleSpec(), template, tokenizers[name])


def test_a_tokenizer_without_bos_does_not_fit_v1(tokenizers: dict[str, Any]) -> None:
    """Its tokens are there, but the count of tokens is not: found by a conversation, not by a list of tokens."""
    tokenizer = copy.deepcopy(tokenizers["tok_qwen2"])
    tokenizer.add_tokens(["</s>"], special_tokens=True)
    with pytest.raises(TokenizerError, match="--template v1 does not fit .*: the answers are not found"):
        with_template(SampleSpec(), "v1", tokenizer)


def test_the_option_names_the_templates() -> None:
    assert (*TRAINING_TEMPLATES, "tokenizer") == TEMPLATES


def test_a_stale_index_names_the_template_without_its_digest(tokenizers: dict[str, Any]) -> None:
    class Reader:
        folder, length_source, truncated_images = Path("shards"), None, "refuse"

    tokenizer = with_chat_template(tokenizers["tok_qwen2"], QWEN2)
    source = length_source(tokenizer, with_template(SampleSpec(), "tokenizer", tokenizer))
    said = stale_lengths(Reader(), source, "tokenizer-folder")  # type: ignore[arg-type]
    assert said is not None and said.endswith("--template tokenizer")
