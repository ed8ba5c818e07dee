"""The Jinja of an export writes what training wrote; tokenizer files for slow tokenizers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ross_mcore.conversion.chat_template import as_jinja
from ross_mcore.conversion.tokenizer_files import has_chat_template, set_chat_template, write_tokenizer
from ross_mcore.data.chat_templates import TurnTemplate
from ross_mcore.data.records import normalise
from ross_mcore.data.spec import SampleSpec
from ross_mcore.data.templates import TEMPLATES, with_template, write_prompt
from ross_mcore.data.tokenizer import load_tokenizer
from ross_mcore.serving.protocol import Limits, parse_chat
from tests.recorded import GOLDEN

TOKENIZER = GOLDEN / "data" / "tok_qwen2"
OWN = TurnTemplate('Q "{text}" USER\n', "A: ", "<|im_end|>", system="S\\{text};", default_system="", separator="\n")
NO_SYSTEM = TurnTemplate("{text} ", "= ", "<|im_end|>")
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
NAMES = {"human": "user", "gpt": "assistant", "system": "system"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    found = load_tokenizer(TOKENIZER)
    found.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }} {{ date_string }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant {{ date_string }}\n{% endif %}"
    )
    return found


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


DIALOGUES: dict[str, tuple[int, list[tuple[str, str]], list[tuple[str, Any]]]] = {
    # pictures, turns of a record, the same as messages (None: the turns' texts)
    "no picture": (0, [("human", "Is it?"), ("gpt", " Yes. "), ("human", "Why?")], []),
    "system": (1, [("system", "Be brief."), ("human", "<image>\nWhat?")], []),
    "blank system": (0, [("system", " "), ("human", "What?")], []),
    "text first": (1, [("human", " What is\n<image>")], [("human", [text(" What is"), PICTURE])]),
    "picture alone": (1, [("human", "<image>")], [("human", [PICTURE])]),
    "later picture": (1, [("human", "Hi"), ("gpt", "Hi"), ("human", "<image> b")], []),
    "text around": (
        1,
        [("system", "Be\nbrief."), ("human", "Look.\n<image>\nWhat is it?")],
        [("system", [text("Be"), text("brief.")]), ("human", [text("Look."), PICTURE, text("What is it?")])],
    ),
    "two pictures": (
        2,
        [("human", "A\n<image>\nB <image>"), ("gpt", "Both"), ("human", "Why\nso?")],
        [
            ("human", [text("A"), PICTURE, text("B "), PICTURE]),
            ("gpt", [text("Both")]),
            ("human", [text("Why"), text("so?")]),
        ],
    ),
    "places in parts": (
        2,
        [("human", "Is <image> as <image>?\nSay.")],
        [("human", [PICTURE, PICTURE, text("Is <image> as <image>?"), text("Say.")])],
    ),
    "pictures in the text": (2, [("human", "Is <image> as <image>?")], []),
    "answer first": (0, [("gpt", "Hello"), ("human", "What?")], []),
}


@pytest.mark.parametrize("template", ["qwen_2", "v1", "llama3", "chatml", "own.yaml", "no_system.yaml", "tokenizer"])
@pytest.mark.parametrize("markers", [False, True])
def test_rendered_prompts_are_those_of_training(
    template: str, markers: bool, tokenizer: PreTrainedTokenizerBase
) -> None:
    own = {"own.yaml": OWN.as_text(), "no_system.yaml": NO_SYSTEM.as_text()}
    spec = SampleSpec(template, mm_use_im_start_end=markers, own_templates=own)
    if template == "tokenizer":
        spec = with_template(spec, template, tokenizer)
    jinja = as_jinja(spec, tokenizer)
    assert jinja is not None
    for name, (pictures, turns, given) in DIALOGUES.items():
        messages = [{"role": NAMES[role], "content": content} for role, content in given or turns]
        variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
        has_system = template != "no_system.yaml" or turns[0][0] != "system"
        if not has_system:
            with pytest.raises(Exception, match="without system texts"):
                render_jinja_template([messages], chat_template=jinja, **variables)
            continue
        (found,), _ = render_jinja_template([messages], chat_template=jinja, add_generation_prompt=True, **variables)
        conversation = [{"from": role, "value": value} for role, value in turns]
        expected = write_prompt(conversation, pictures, spec, generation=True, tokenizer=tokenizer)
        if template == "llama3":  # not a token: training has removed it
            expected = expected.replace(TEMPLATES["llama3"].round_end, "")
        if template == "tokenizer":
            expected, found = expected.rstrip(" "), found.rstrip(" ")
        assert found == expected, name


@pytest.mark.parametrize("name", [name for name, (_, _, given) in DIALOGUES.items() if given])
def test_parts_are_the_same_turns_in_training_and_in_the_server(name: str) -> None:
    """With the test above: an export's prompt is the server's."""
    pictures, turns, given = DIALOGUES[name]
    messages = [{"role": NAMES[role], "content": content} for role, content in given]
    expected = [{"from": role, "value": value} for role, value in turns]
    asked = parse_chat({"model": "m", "messages": messages}, Limits())
    assert (asked.turns, len(asked.pictures)) == (expected, pictures)
    if name != "places in parts":  # a record has either
        assert normalise({"messages": messages})["conversations"] == expected


@pytest.mark.parametrize(
    ("roles", "message"), [(("user", "user"), "must take turns"), (("user", "tool"), "a message of tool")]
)
def test_what_training_never_had_is_refused(
    roles: tuple[str, ...], message: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    messages = [{"role": role, "content": "a"} for role in roles]
    with pytest.raises(Exception, match=message):
        render_jinja_template([messages], chat_template=as_jinja(SampleSpec("qwen_2"), tokenizer))


def test_slow_files_are_those_that_the_old_library_wrote(tmp_path: Path) -> None:
    """From tokenizer.json alone, as transformers 5 saves it: merges as pairs, tokens named in another way."""
    source = tmp_path / "source"
    source.mkdir()
    content = json.loads((TOKENIZER / "tokenizer.json").read_text())
    content["model"]["merges"] = [m if isinstance(m, list) else m.split(" ") for m in content["model"]["merges"]]
    (source / "tokenizer.json").write_text(json.dumps(content))
    old = json.loads((TOKENIZER / "tokenizer_config.json").read_text())
    new = {key: value for key, value in old.items() if key not in ("added_tokens_decoder", "additional_special_tokens")}
    new |= {"extra_special_tokens": old["additional_special_tokens"], "backend": "tokenizers"}
    (source / "tokenizer_config.json").write_text(json.dumps(new))
    write_tokenizer(source, tmp_path / "out")
    for name in ("vocab.json", "tokenizer_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((TOKENIZER / name).read_text()), name
    assert (tmp_path / "out" / "merges.txt").read_text() == (TOKENIZER / "merges.txt").read_text()
    merges = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["merges"]
    assert all(isinstance(merge, str) for merge in merges)


def test_a_chat_template_replaces_all_of_the_former_one(tmp_path: Path) -> None:
    shutil.copytree(TOKENIZER, tmp_path / "t")
    (tmp_path / "t" / "chat_template.jinja").write_text("former")
    set_chat_template(tmp_path / "t", "{{ 'new' }}")
    assert json.loads((tmp_path / "t" / "tokenizer_config.json").read_text())["chat_template"] == "{{ 'new' }}"
    assert not (tmp_path / "t" / "chat_template.jinja").exists() and has_chat_template(tmp_path / "t")
    set_chat_template(tmp_path / "t", None)
    assert not has_chat_template(tmp_path / "t")
