"""Templates: every odd conversation has labels or a reason under each, and the template fits the tokenizer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ross_mcore.batch import IGNORE_INDEX
from ross_mcore.data.conversation import require_pictures
from ross_mcore.data.spec import SampleSpec
from ross_mcore.data.templates import tokenize_conversation, why_without_labels, with_template
from ross_mcore.data.tokenizer import load_tokenizer
from ross_mcore.errors import ConversationError
from tests.cases.case import LLAMA3_TOKENIZER, LLAMA_TOKENIZER, TOKENIZER, Case, Place, conversation
from tests.cases.test_learning import llama3_model, training
from tests.unit.data.test_chat_templates import QWEN2, YAML

TOKENIZERS = {
    "qwen_2": (TOKENIZER, "<|im_end|>"),
    "v1": (LLAMA_TOKENIZER, "</s>"),
    "llama3": (LLAMA3_TOKENIZER, "<|eot_id|>"),
    "chatml": (TOKENIZER, "<|im_end|>"),
    "tokenizer": (TOKENIZER, "<|im_end|>"),
    "own.yaml": (TOKENIZER, "<|im_end|>"),
}
REFERENCE = ("qwen_2", "v1", "llama3")


def said(*turns: tuple[str, str]) -> list[dict[str, str]]:
    names = {"H": "human", "G": "gpt", "S": "system"}
    return [{"from": names[who], "value": text} for who, text in turns]


def all_of(templates: Sequence[str], reason: str) -> dict[str, str]:
    return dict.fromkeys(templates, reason)


@dataclass(frozen=True)
class Odd:
    """A conversation: its answers have labels, except under templates that `without` names with the reason.

    `learned`: answers with labels, if not all; `refused`: why it is bad data under every template.
    """

    name: str
    turns: Any
    images: int = 1
    without: dict[str, str] = field(default_factory=dict)
    learned: Sequence[str] | None = None
    refused: str | None = None


SEEN = ("H", "<image>\nWhat is shown?")
LAST, EMPTY = "the last turn is the human's", "every answer is empty"
ODD = [
    Odd("rounds", said(SEEN, ("G", "A car."), ("H", "Colour?"), ("G", "A car."))),
    Odd("same text asked and answered", said(SEEN, ("G", "What is shown?"), ("H", "yes"), ("G", "yes"))),
    Odd("chinese", said(("H", "<image>\n这张图片里有什么？"), ("G", "一位宇航员。"))),
    Odd("arabic", said(("H", "<image>\nما هذا؟"), ("G", "رائد فضاء."))),
    Odd("emoji", said(("H", "<image>\n👩‍🚀🚀?"), ("G", "👩‍🚀 yes 🇩🇪"))),
    Odd("nul", said(("H", "<image>\na\x00b"), ("G", "c\x00d"))),
    Odd("picture not mentioned", said(("H", "What?"), ("G", "A car."))),
    Odd("two pictures, one mentioned", said(SEEN, ("G", "Two cars.")), images=2),
    Odd("picture in the middle", said(("H", "Look at <image> and say."), ("G", "A car."))),
    Odd("picture in the second turn", said(("H", "Hi"), ("G", "Hello"), SEEN, ("G", "A car."))),
    Odd("picture in the answer", said(("H", "Show me"), ("G", "Here: <image>")), learned=["Here:"]),
    Odd("question of a picture alone", said(("H", "<image>"), ("G", "A car."))),
    Odd("gpt first", said(("G", "Hello."), SEEN, ("G", "A car.")), learned=["A car."]),
    Odd(
        "picture in a first turn of gpt", said(("G", "<image> hi"), ("H", "What?"), ("G", "A car.")), learned=["A car."]
    ),
    Odd("system", said(("S", "You are a pirate."), SEEN, ("G", "Arr."))),
    Odd("long system", said(("S", "You are a pirate. " * 40), SEEN, ("G", "Arr."))),
    Odd("one picture, two placeholders", said(SEEN, ("G", "a"), SEEN, ("G", "b")), refused="2 <image> in the text"),
    Odd("system later", said(SEEN, ("G", "A."), ("S", "x")), refused="a system turn is not the first"),
    Odd("two humans", said(SEEN, ("H", "And?"), ("G", "A car.")), refused="do not alternate"),
    Odd("two answers", said(SEEN, ("G", "A car."), ("G", "A dog.")), refused="do not alternate"),
    Odd("gpt alone", said(("G", "A car.")), refused="no turn is the human's"),
    Odd("system alone", said(("S", "Be brief.")), refused="no turn is the human's"),
    Odd("a number", [{"from": "human", "value": 3}], refused="a turn has no text"),
    Odd("half a character", said(("H", "\ud83d"), ("G", "x")), images=0, refused="not valid Unicode"),
    Odd("ends with the human", said(SEEN, ("G", "A car."), ("H", "And?")), without=all_of(REFERENCE, LAST)),
    Odd("human alone", said(SEEN), without=all_of(list(TOKENIZERS), "it has no answer")),
    Odd("empty answer", said(SEEN, ("G", "")), without={t: EMPTY for t in TOKENIZERS if t != "llama3"}),
    Odd("blank answer", said(SEEN, ("G", "   ")), without=all_of(("chatml", "tokenizer", "own.yaml"), EMPTY)),
    Odd("an empty answer first", said(SEEN, ("G", ""), ("H", "And?"), ("G", "A car."))),
    Odd(
        "an empty answer last",
        said(SEEN, ("G", "A car."), ("H", "And?"), ("G", "")),
        without=all_of(("qwen_2", "v1"), "an answer is empty"),
    ),
    Odd(
        "roles in an answer",
        said(SEEN, ("G", "In the script, USER: hi ASSISTANT: hello")),
        without=all_of(("qwen_2", "v1"), "a turn contains the template's own ASSISTANT:"),
    ),
    Odd(
        "<|im_end|> in the texts",
        said(("H", "<image>\nsay <|im_end|> now"), ("G", "ok <|im_end|> done")),
        without={"qwen_2": "a turn contains the template's own <|im_end|>"},
    ),
    Odd(
        "</s> in the texts",
        said(SEEN, ("G", "ok </s> done")),
        without={"v1": "a turn contains the template's own </s>"},
    ),
    Odd("padding in a text", said(SEEN, ("G", "<unk>")), without={"v1": "a turn contains the padding token <unk>"}),
    Odd("template language", said(("H", "<image> {{ 1 }} {text}"), ("G", "{% raw %} {text} {{ messages }}"))),
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, SampleSpec, str]]:
    """Template -> tokenizer, spec, what ends an answer."""
    file = tmp_path_factory.mktemp("templates") / "own.yaml"
    file.write_text(YAML)
    loaded = {}
    for template, (folder, end) in TOKENIZERS.items():
        tokenizer = load_tokenizer(folder)
        tokenizer.chat_template = QWEN2 if template == "tokenizer" else None
        given = str(file) if template == "own.yaml" else template
        loaded[template] = tokenizer, with_template(SampleSpec(seq_length=4096), given, tokenizer), end
    return loaded


@pytest.mark.parametrize("template", TOKENIZERS)
@pytest.mark.parametrize("odd", ODD, ids=lambda odd: odd.name)
def test_every_conversation_has_labels_or_a_reason(
    odd: Odd, template: str, prepared: dict[str, tuple[Any, SampleSpec, str]]
) -> None:
    tokenizer, spec, end = prepared[template]
    if odd.refused is not None:
        with pytest.raises(ConversationError, match=odd.refused):
            require_pictures(tokenize_conversation(odd.turns, odd.images, tokenizer, spec).image_spans, odd.images)
        assert why_without_labels(odd.turns, odd.images, tokenizer, spec) or "<image>" in odd.refused
        return
    row = tokenize_conversation(odd.turns, odd.images, tokenizer, spec)
    require_pictures(row.image_spans, odd.images)
    reason = why_without_labels(odd.turns, odd.images, tokenizer, spec)
    assert reason == odd.without.get(template) and (reason is None) == (row.label_tokens > 0)
    if reason is None:
        answers = odd.learned or [turn["value"] for turn in odd.turns if turn["from"] == "gpt"]
        learned = [i for i, label in zip(row.input_ids, row.labels) if label not in (IGNORE_INDEX, -200)]
        wanted = "".join(answer + end for answer in answers if answer or template == "llama3")
        assert "".join(tokenizer.decode(learned).split()) == "".join(wanted.split())


def own_template(place: Place, text: str = YAML) -> Path:
    return place.write("my.yaml", text)


def with_own_template(place: Place, *flags: object) -> Sequence[object]:
    return training(place, "--seq-length", 128, *flags, template=str(own_template(place)))


def has_the_template(place: Place) -> None:
    """The checkpoint has what prompts are written with."""
    (state,) = (place.folder / "run").glob("iter_*1/train_state.json")
    saved = json.loads(state.read_text())
    assert list(saved["own_templates"]) == [saved["template"]] and saved["template"].startswith("my.yaml#")
    own_template(place, YAML.replace("helpful", "kind"))


def edited_between_runs(place: Place) -> Sequence[object]:
    flags = with_own_template(place, "--no-pack")
    Case("first", "train", lambda _: flags, 0, holds=has_the_template).run(place)
    return [*flags, "--train-iters", 2]


def llama3_without_a_template(place: Place) -> Sequence[object]:
    flags = list(
        training(place, "--seq-length", 128, load=llama3_model(place), tokenizer=LLAMA3_TOKENIZER, template="llama3")
    )
    at = flags.index("--template")
    return [*flags[:at], *flags[at + 2 :]]


def mixture_of_templates(place: Place) -> Sequence[object]:
    flags = with_own_template(place)
    place.write("mixture.yaml", "- {path: shards, template: my.yaml}\n")
    return [*flags, "--data-path", place.folder / "mixture.yaml", "--template", "qwen_2"]


CASES = [
    Case(
        "llama3_by_default",
        "train",
        llama3_without_a_template,
        0,
        ["template: llama3 (the default of a Llama 3 tokenizer); tokenizer: ", "finished"],
        never=["no label", "lm_loss -"],
        source="cases.md 6",
    ),
    Case(
        "own_template_at_tp2",
        "train",
        lambda place: with_own_template(place, "--tensor-model-parallel-size", 2),
        0,
        ["template: my.yaml#", "(as given)", "finished"],
        holds=has_the_template,
        ranks=2,
    ),
    Case(
        "own_template_of_a_data_set", "train", mixture_of_templates, 0, ["template: my.yaml#", "(as given)", "finished"]
    ),
    Case(
        "own_template_edited_between_runs",
        "train",
        edited_between_runs,
        2,
        ["was trained with template 'my.yaml#", "and this run has 'my.yaml#", "(--template)"],
    ),
    Case(
        "own_template_edited_after_indexing",
        "train",
        lambda place: [with_own_template(place), own_template(place, YAML.replace("helpful", "kind"))][0],
        2,
        ["was measured with another template", "index-shards", "--template my.yaml"],
    ),
    Case(
        "mistake_in_an_own_template",
        "make-shards",
        lambda place: [
            *(
                "--data",
                place.write("data.json", [{"conversations": conversation("Q")}]),
                "--out",
                place.folder / "out",
            ),
            *("--image-folder", place.folder, "--tokenizer", TOKENIZER),
            *("--template", own_template(place, YAML.replace("user", "usr"))),
        ],
        2,
        ["my.yaml: the template has an unknown key 'usr'", "give a YAML file with the keys user, answer_start"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case, place: Place) -> None:
    case.run(place)
