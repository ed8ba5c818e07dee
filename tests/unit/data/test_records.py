"""Records of every form become LLaVA's, what is not read is named, and LLaVA's own are not touched."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ross_mcore.data.placeholders import PLACEHOLDERS
from ross_mcore.data.records import (
    CAPTION_KEYS,
    NOT_READ,
    OTHER_PICTURE_KEYS,
    PICTURE_KEYS,
    READ,
    ROUND_KEYS,
    SYSTEM_KEYS,
    TURNS_KEYS,
    normalise,
    picture_names,
)
from ross_mcore.errors import ConversationError

ASKED = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A car."}]
TEXT = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
SYSTEM = {"from": "system", "value": "Be brief."}
ROLES = [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A car."}]
LISTED = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A car."}]},
]
PNG = {"bytes": b"\x89PNG", "path": "a.png"}


def one(turns: Any = ASKED, image: Any = "a.png", **others: Any) -> dict[str, Any]:
    return {"image": image, "conversations": turns, **others}


def parts(*content: Any, answer: str = "A car.") -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}, {"role": "assistant", "content": answer}]


def asked(question: str, answer: str = "A car.") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


LLAVA: dict[str, Any] = {
    "one picture": one(id=7),
    "several pictures": one(asked("<image><image> Same?"), ["a.png", "b.png"]),
    "a picture that is not shown": one(TEXT),
    "text alone": {"conversations": TEXT},
    "null for a picture": one(TEXT, None),
    "no pictures": one(TEXT, []),
    "a system turn": one([SYSTEM, *ASKED]),
    "an answer first": one([{"from": "gpt", "value": "Hello."}, *ASKED]),
    "keys without a value": one(images=[], system="", video=None, tools="[]"),
    "other keys": one(source="x", messages=[1], image_path="elsewhere.png"),
    "HTML in the text": {"conversations": asked("How does the <video> tag of HTML work? And <img>, <audio>?")},
}
EXPECTED: dict[str, tuple[Any, list[Any], list[dict[str, str]]]] = {
    # form: (record, pictures, turns)
    "messages": ({"messages": ROLES, "images": ["a.png"]}, ["a.png"], ASKED),
    "messages with image": ({"messages": ROLES, "image": "a.png"}, ["a.png"], ASKED),
    "parts without names": ({"messages": LISTED, "images": ["a.png"]}, ["a.png"], ASKED),
    "a part with a name": ({"messages": parts({"type": "image", "image": "a.png"}, "What?")}, ["a.png"], ASKED),
    "a part with a URL": (
        {"messages": parts({"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "What?"})},
        ["a.png"],
        ASKED,
    ),
    "a part with a text for URL": (
        {"messages": parts({"type": "image_url", "image_url": "a.png"}, "What?")},
        ["a.png"],
        ASKED,
    ),
    "parts without types": ({"messages": parts({"image": "a.png"}, {"text": "What?"})}, ["a.png"], ASKED),
    "parts of a table": (
        {
            "messages": parts(
                {"type": "image", "text": None, "index": 0}, {"type": "text", "text": "What?", "index": None}
            ),
            "images": [PNG],
        },
        [PNG],
        ASKED,
    ),
    "parts in order": (
        {"messages": parts({"image": "a.png"}, "Is ", {"image": "b.png"}, " the same?")},
        ["a.png", "b.png"],
        asked("<image>\nIs <image> the same?"),
    ),
    "parts and keys name the same": (
        {"messages": parts({"image": "a.png"}, "What?"), "images": ["a.png"]},
        ["a.png"],
        ASKED,
    ),
    "ShareGPT": ({"conversations": ASKED, "images": ["a.png"]}, ["a.png"], ASKED),
    "image and images": (one(images=["a.png"]), ["a.png"], ASKED),
    "user and assistant": (
        one([{"from": "user", "value": "<image>\nWhat?"}, {"from": "Assistant", "value": "A car."}]),
        ["a.png"],
        ASKED,
    ),
    "role and value": (
        one([{"role": "human", "value": "<image>\nWhat?"}, {"role": "bot", "value": "A car."}]),
        ["a.png"],
        ASKED,
    ),
    "typed parts as value": (one([{"from": "human", "value": LISTED[0]["content"]}, ASKED[1]]), ["a.png"], ASKED),
    "image_path": ({"conversations": ASKED, "image_path": "a.png"}, ["a.png"], ASKED),
    "image_paths": ({"conversations": ASKED, "image_paths": ["a.png"]}, ["a.png"], ASKED),
    "a struct with a path": (one(image={"bytes": None, "path": "a.png"}), ["a.png"], ASKED),
    "an embedded picture": (one(image=PNG), [PNG], ASKED),
    "parts with base64": (
        {"messages": parts({"type": "image", "base64": "AAAA"}, "What?")},
        ["data:;base64,AAAA"],
        ASKED,
    ),
    "parts with a source": (
        {"messages": parts({"type": "image", "source": {"type": "base64", "data": "AAAA"}}, "What?")},
        ["data:;base64,AAAA"],
        ASKED,
    ),
    "names by placeholder": (
        one([{"role": "user", "content": "<image_00>\nWhat?"}, ROLES[1]], {"<image_00>": "a.png"}),
        ["a.png"],
        ASKED,
    ),
    "names in the turns": (
        {"messages": [{"role": "<|User|>", "content": "<image>\nWhat?", "images": ["a.png"]}, ROLES[1]]},
        ["a.png"],
        ASKED,
    ),
    "names in LLaVA's turns": ({"conversations": [{**ASKED[0], "image": "a.png"}, ASKED[1]]}, ["a.png"], ASKED),
    "embedded pictures": ({"messages": ROLES, "images": [PNG]}, [PNG], ASKED),
    "bytes": (one(image=b"\x89PNG"), [{"bytes": b"\x89PNG", "path": None}], ASKED),
    "a list as JSON": (one(image='["a.png"]'), ["a.png"], ASKED),
    "a name in brackets": (one(image="[1].png", system="", images="[1].png"), ["[1].png"], ASKED),
    "blank pictures": (one(TEXT, ["", None]), [], TEXT),
    "a blank picture": (one(TEXT, ""), [], TEXT),
    "not a number": (one(TEXT, float("nan")), [], TEXT),
    "a system key": (one(system="Be brief."), ["a.png"], [SYSTEM, *ASKED]),
    "a system role": (one([{"role": "system", "content": "Be brief."}, *ROLES]), ["a.png"], [SYSTEM, *ASKED]),
    "a system key and turn": (one([SYSTEM, *ASKED], system="Be brief."), ["a.png"], [SYSTEM, *ASKED]),
    "an empty system turn": (one([{"role": "system", "content": ""}, *ROLES]), ["a.png"], ASKED),
    "conversations as JSON": (one(json.dumps(ASKED)), ["a.png"], ASKED),
    "messages as JSON": ({"messages": json.dumps(ROLES), "image": "a.png"}, ["a.png"], ASKED),
    "a number of turns": ({"messages": ROLES, "turns": 1, "dialogue": "x", "image": "a.png"}, ["a.png"], ASKED),
    "the same under two keys": ({"conversations": ROLES, "messages": ROLES, "image": "a.png"}, ["a.png"], ASKED),
    "a question without a loss": (
        one([{"from": "user", "value": "<image>\nWhat?", "loss": False}, ASKED[1]]),
        ["a.png"],
        ASKED,
    ),
    "turns alone": (TEXT, [], TEXT),
    "roles alone": ([{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}], [], TEXT),
    "rounds": (one([{"user": "<image>\nWhat?", "assistant": "A car.", "source": "x"}]), ["a.png"], ASKED),
    "rounds as texts": ({"images": [PNG], "texts": [{"user": "What?", "assistant": "A car."}]}, [PNG], asked("What?")),
    "rounds of question and answer": (
        {"image": "a.png", "conversations": [{"question": "<image>\nWhat?", "answer": "A car."}]},
        ["a.png"],
        ASKED,
    ),
    "rounds of input and output": (
        {"image": "a.png", "conversation": [{"system": "Be brief.", "input": "<image>\nWhat?", "output": "A car."}]},
        ["a.png"],
        [SYSTEM, *ASKED],
    ),
    "query and response": ({"query": "<image>\nWhat?", "response": "A car.", "images": ["a.png"]}, ["a.png"], ASKED),
    "query, response and history": (
        {"query": "<image>\nWhat?", "response": "A car.", "history": [["Why?", "So."]], "image": "a.png"},
        ["a.png"],
        [*TEXT, *ASKED],
    ),
    "prompt and completion": ({"prompt": "<image>\nWhat?", "completion": "A car.", "image": "a.png"}, ["a.png"], ASKED),
    "prompt and completion as turns": (
        {"prompt": LISTED[:1], "completion": LISTED[1:], "images": ["a.png"]},
        ["a.png"],
        ASKED,
    ),
    "a caption": ({"image": "a.png", "caption": " A car.\n"}, ["a.png"], asked("<image>")),
    "a caption as text": ({"image": "a.png", "text": "A car."}, ["a.png"], asked("<image>")),
    "columns of WebDataset": ({"jpg": PNG, "txt": "A car."}, [PNG], asked("<image>")),
    "captions": (
        {"images": ["a.png", "b.png"], "captions": ["A car.", "A dog."], "prompts": []},
        ["a.png", "b.png"],
        [*asked("<image>"), *asked("<image>", "A dog.")],
    ),
    "prompts and captions": (
        {"images": ["a.png", "b.png"], "prompts": ["What?", "And?"], "captions": ["A car.", "A dog."]},
        ["a.png", "b.png"],
        [*ASKED, *asked("<image>\nAnd?", "A dog.")],
    ),
    "prompts and captions in rounds": (
        {"images": ["a.png"], "prompts": [["What?", "Why?"]], "captions": [["A car.", "So."]]},
        ["a.png"],
        [*ASKED, *TEXT],
    ),
    "texts and names": ({"texts": ROLES, "media": "image", "name": ["0_a.jpg"]}, ["0_a.jpg"], ASKED),
}
REFUSED: dict[str, tuple[Any, str]] = {
    "a number": (7, "not a JSON object"),
    "a list of numbers": ([1], "not a JSON object"),
    "no conversation": ({"image": "a.png", "label": 3}, "has the keys image, label; docs/data.md"),
    "a number as text": (
        one([ASKED[0], {"from": "gpt", "value": 3}]),
        "a turn has no text: turn 2 is the number 3, wr",
    ),
    "null as text": (one([ASKED[0], {"from": "gpt", "value": None}]), "a turn has no text: turn 2 is None"),
    "Python's repr": (one("[{'from': 'human', 'value': 'x'}]"), "it is Python's repr, not JSON"),
    "an unknown role": (one([{"from": "narrator", "value": "x"}, *ASKED]), "turn 1 is by 'narrator'"),
    "no role": (one([{"said": "x"}]), "turn 1 has the keys said"),
    "a system turn later": (one([*ASKED, SYSTEM, *TEXT]), "a system turn is not the first: it is turn 3"),
    "two systems": (one([SYSTEM, *ASKED], system="Be long."), "the system text comes twice"),
    "two conversations": ({"messages": ROLES, "texts": ROLES[:1]}, "under messages and texts"),
    "two names": (one(images=["b.png"]), "image and images differ"),
    "parts and keys differ": ({"messages": parts({"image": "a.png"}, "x"), "images": ["b.png"]}, "named in two places"),
    "parts without pictures": (
        {"messages": parts({"type": "image"}, {"type": "image"}), "images": ["b"]},
        "have 2 and 1",
    ),
    "a part of another type": ({"messages": parts({"type": "file", "file": "a"})}, "turn 1 has 'file'"),
    "an answer not to be learned": (one([*ASKED[:1], {"from": "assistant", "value": "x", "loss": False}]), "not to be"),
    "a tool's turn": (one([*ASKED, {"from": "observation", "value": "x"}]), "looks like tool calls: turn 3"),
    "a call of a tool": ({"messages": [ROLES[0], {"role": "assistant", "tool_calls": [{"a": 1}]}]}, "looks like tool"),
    "nested too deeply": (json.loads('{"messages": ' + "[" * 900 + "]" * 900 + "}"), "nested too deeply"),
    "no history": ({"query": "x", "response": "y", "history": -1}, "history is not a list of rounds: it is -1"),
    "history of texts": ({"query": "x", "response": "y", "history": ["z"]}, "round 1 is 'z'"),
    "captions of one picture": ({"image": "a.png", "caption": ["A", "B"]}, "2 captions and 0 prompts for 1 pictures"),
    "video": ({"conversations": asked("<video>\nWhat?"), "video": "a.mp4"}, "looks like video"),
    "a video as image": (one(image="a.MP4"), "looks like video"),
    "audio": ({"messages": ROLES, "audios": ["a.wav"]}, "looks like audio"),
    "preferences": ({"prompt": "x", "chosen": "a", "rejected": "b"}, "looks like preference data"),
    "preferences beside messages": ({"messages": ROLES, "rejected_response": "b"}, "looks like preference data"),
    "tools": ({"messages": ROLES, "tools": "[{}]", "image": "a.png"}, "looks like tool calls"),
    "Alpaca": ({"instruction": "x", "input": "", "output": "y", "image": "a.png"}, "looks like Alpaca"),
    "Alpaca of other keys": ({"instruction": "x", "outputs": "y", "image_base64_str": ["z"]}, "looks like Alpaca"),
    "a template's text": (
        {"image": "a.png", "text": "USER: x ASSISTANT: y"},
        "looks like a conversation in a template",
    ),
    "VQA": ({"image": "a.png", "question": "x", "answers": ["y"]}, "looks like VQA"),
    "questions to answer": ({"question_id": 1, "image": "a.png", "text": "x"}, "looks like VQA"),
    "COCO captions": ({"image_id": 1, "caption": "x", "id": 2}, "looks like COCO"),
    "COCO boxes": ({"image_id": 1, "bbox": [1], "category_id": 3}, "looks like COCO"),
    "interleaved": ({"texts": ["x", None], "images": [None, "a.png"]}, "looks like an interleaved document"),
    "a caption without a picture": ({"caption": "x", "url": "http://a"}, "looks like a caption without a picture"),
    "plain text": ({"text": "Once upon a time"}, "looks like plain text"),
    "no picture": ({"conversations": ASKED}, "a placeholder without a picture: <image> in turn 1"),
    "a blank picture": (one(image=""), "a placeholder without a picture: <image> in turn 1"),
}
FOREIGN = {
    # as others write it: (number of pictures, as we do)
    "<|vision_start|><|image_pad|><|image_pad|><|vision_end|>What?": (1, "<image>What?"),
    "<|image_pad|>What?": (1, "<image>What?"),
    "<|begin_of_image|><|image|><|end_of_image|>What?": (1, "<image>What?"),
    "<|image|>What?": (1, "<image>What?"),
    "<|image_1|>\n<|image_2|>\nSame?": (2, "<image>\n<image>\nSame?"),
    "<image 1> or <image 2>?": (2, "<image> or <image>?"),
    "<Img><ImageHere></Img> What?": (1, "<image> What?"),
    "<ImageHere>What?": (1, "<image>What?"),
    "<img><IMG_CONTEXT><IMG_CONTEXT></img>\nWhat?": (1, "<image>\nWhat?"),
    "<IMG_CONTEXT>\nWhat?": (1, "<image>\nWhat?"),
    "<img></img>What?": (1, "<image>What?"),
    "(<image>./</image>)\nWhat?": (1, "<image>\nWhat?"),
    "<image></image>What?": (1, "<image>What?"),
    "<fake_token_around_image><image><fake_token_around_image>What?": (1, "<image>What?"),
    "<image_placeholder>\nWhat?": (1, "<image>\nWhat?"),
    "<start_of_image>What?": (1, "<image>What?"),
    "Is [IMG] like [IMG] here?": (2, "Is <image> like <image> here?"),
    "<IMAGE>\nWhat?": (1, "<image>\nWhat?"),
}
UNREADABLE = {
    "Picture 1: <img>a.png</img>\nWhat?": "name the picture under image",
    "<im_start><im_patch><im_end>": "write <image> for each",
    "<video>\nWhat?": "'<video>' in turn 1",
    "What?\n<video>": "'<video>' in turn 1",
    "<|vision_start|><|video_pad|><|vision_end|>What?": "video_pad",
    "<audio><audio>What?": "'<audio>' in turn 1",
    "<|AUDIO|>What?": "AUDIO",
    "Where is <ref-object>?": "grounding data",
}


@pytest.mark.parametrize("name", LLAVA)
def test_a_llava_record_is_not_touched(name: str) -> None:
    record = LLAVA[name]
    before = copy.deepcopy(record)
    assert normalise(record) is record and record == before


@pytest.mark.parametrize("name", EXPECTED)
def test_a_record_of_another_form_becomes_llava_s(name: str) -> None:
    record, pictures, turns = EXPECTED[name]
    before = copy.deepcopy(record)
    found = normalise(record)
    assert found["conversations"] == turns and picture_names(found) == pictures and record == before
    assert normalise(found)["conversations"] == turns
    if pictures:
        assert normalise(record, len(pictures)) == found


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_named(name: str) -> None:
    record, reason = REFUSED[name]
    with pytest.raises(ConversationError) as error:
        normalise(record)
    assert reason in str(error.value)


def test_every_row_of_the_tables_is_tested() -> None:
    records = [record for record, *_ in EXPECTED.values() if isinstance(record, dict)]
    assert {next(form.name for form in READ if form.fits(record)) for record in records} == {form.name for form in READ}
    said = [reason for _, reason in REFUSED.values()]
    for form in NOT_READ:
        assert any(reason in f"looks like {form.name}" for reason in said if "looks like" in reason), form.name


@pytest.mark.parametrize("text", FOREIGN)
def test_placeholders_of_other_trainers_are_pictures(text: str) -> None:
    number, ours = FOREIGN[text]
    assert normalise({"conversations": asked(text)}, number)["conversations"] == asked(ours)
    with pytest.raises(ConversationError, match="a placeholder without a picture"):
        normalise({"conversations": asked(f"{text}" if number == 1 else text.removeprefix("Is "))})


@pytest.mark.parametrize("text", UNREADABLE)
@pytest.mark.parametrize("number", [0, 1])
def test_placeholders_of_what_is_not_read_are_refused(text: str, number: int) -> None:
    with pytest.raises(ConversationError, match="a placeholder that is not read") as error:
        normalise({"conversations": asked(text)}, number)
    assert UNREADABLE[text] in str(error.value)


def test_numbered_placeholders_are_in_the_pictures_order() -> None:
    for text in ("<image 2> and <image 1>", "<image 1> and <image 1>", "<|image_2|>"):
        with pytest.raises(ConversationError, match="not in the order of the pictures"):
            normalise({"conversations": asked(text)}, 2)


def test_every_placeholder_is_tested() -> None:
    import re

    texts = [*FOREIGN, *UNREADABLE]
    for placeholder in PLACEHOLDERS:
        assert any(re.search(placeholder.pattern, text) for text in texts), placeholder.pattern


def test_keys_of_other_forms_are_not_stored() -> None:
    record = {"id": 3, "messages": ROLES, "images": ["a.png"], "system": "Be brief.", "source": "web"}
    assert normalise(record) == {"id": 3, "source": "web", "image": ["a.png"], "conversations": [SYSTEM, *ASKED]}


def test_the_number_of_pictures_in_a_shard_counts() -> None:
    assert normalise({"caption": "A car.", "url": "http://a"}, 1)["conversations"] == asked("<image>")
    assert normalise({"messages": LISTED}, 1)["conversations"] == ASKED
    with pytest.raises(ConversationError, match="names 1 pictures and the shard has 2"):
        normalise(one(), 2)


TEXTS = st.sampled_from(
    ["", "x", "a.jpg", "<image>", "<image 1>", "<video>", "[]", '["a"]', "[{'a': 1}]", "\ud800", "image"]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.binary(max_size=2) | TEXTS
ROLE = st.sampled_from(["human", "gpt", "user", "assistant", "system", "tool", "x"])
PARTS = st.dictionaries(
    st.sampled_from(["type", "text", "image", "image_url", "url", "bytes", "path"]), LEAVES, max_size=3
)
CONTENT = LEAVES | st.lists(PARTS | TEXTS, max_size=3)
TURN = st.fixed_dictionaries({"from": ROLE, "value": CONTENT}) | st.fixed_dictionaries(
    {"role": ROLE, "content": CONTENT}
)
VALUES = CONTENT | st.lists(TURN, max_size=3) | st.lists(st.fixed_dictionaries({"user": CONTENT, "assistant": CONTENT}))
ALL_KEYS = (*TURNS_KEYS, *SYSTEM_KEYS, *PICTURE_KEYS, *OTHER_PICTURE_KEYS[:3], *CAPTION_KEYS, *sum(ROUND_KEYS, ()))
KEYS = st.sampled_from(
    [*ALL_KEYS, "captions", "prompts", "history", "media", "name", "video", "tools", "instruction", "id"]
)


@settings(max_examples=250, deadline=None)
@given(st.dictionaries(KEYS, VALUES, max_size=5) | VALUES, st.sampled_from([None, None, 0, 1, 2]))
def test_any_value_is_a_record_or_has_a_reason(value: Any, num_images: int | None) -> None:
    try:
        record = normalise(value, num_images)
    except ConversationError as error:
        assert len(str(error)) < 500 and "\n" not in str(error)
        return
    roles = [turn["from"] for turn in record["conversations"]]
    assert roles and set(roles) <= {"human", "gpt", "system"} and "system" not in roles[1:]
    assert all(isinstance(turn["value"], str) for turn in record["conversations"])
    assert normalise(record, num_images) == record or record != record  # NaN is not equal to itself
