"""Requests of OpenAI's clients: what is read, what is refused and how, and the form of answers."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from ross_mcore.serving import protocol
from ross_mcore.serving.protocol import ApiError, Chat, Limits, Reply, parse_chat, parse_reconstruct, read_body

LIMITS = Limits(pictures=2, messages=3, new_tokens=100)
URL = "data:image/png;base64," + base64.b64encode(b"one").decode()
OTHER = "data:image/jpeg;base64," + base64.b64encode(b"two").decode()


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def image(url: Any = URL) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def asked(content: Any = "What is it?", **fields: Any) -> dict[str, Any]:
    return {"model": "run", "messages": [{"role": "user", "content": content}], **fields}


def test_a_request_of_few_words_is_greedy() -> None:
    turns = [{"from": "human", "value": "What is it?"}]
    assert parse_chat(asked(), LIMITS) == Chat("run", turns, [], max_new_tokens=100)
    assert parse_chat(asked(), Limits()).max_new_tokens == 256


@pytest.mark.parametrize(
    ("content", "value", "pictures"),
    [
        ([image(), text("What?")], "<image>\nWhat?", [b"one"]),
        ([text("What?"), image()], "What?\n<image>", [b"one"]),  # as_dialogue moves a single one to the start
        ([text("See"), image(), text("and"), image(OTHER)], "See\n<image>\nand\n<image>", [b"one", b"two"]),
        ([text("Is <image> like <image>?"), image(), image(OTHER)], "Is <image> like <image>?", [b"one", b"two"]),
    ],
)
def test_pictures_have_a_place_in_the_text(content: Any, value: str, pictures: list[bytes]) -> None:
    chat = parse_chat(asked(content), LIMITS)
    assert (chat.turns, chat.pictures) == ([{"from": "human", "value": value}], pictures)


def test_every_field_is_read() -> None:
    chat = parse_chat(
        {
            "model": "run",
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "assistant", "content": [text("Yes?")], "refusal": None},
                {"role": "user", "content": "Why?", "name": "someone"},
            ],
            **{"temperature": 1, "top_p": 0.5, "max_completion_tokens": 7, "seed": -3, "stop": ["a", "b"]},
            **{"stream": True, "stream_options": {"include_usage": True}, "n": 1, "tools": [], "user": "me"},
            **{"logprobs": False, "response_format": {"type": "text"}, "max_tokens": None},
        },
        LIMITS,
    )
    turns = [("system", "Be brief."), ("gpt", "Yes?"), ("human", "Why?")]
    assert chat.turns == [{"from": role, "value": value} for role, value in turns]
    assert (chat.temperature, chat.top_p, chat.max_new_tokens, chat.seed, chat.stop) == (1.0, 0.5, 7, -3, ("a", "b"))
    assert chat.stream and chat.include_usage
    assert parse_chat(asked(stop="\n", max_tokens=5), LIMITS).stop == ("\n",)
    seeds = {parse_chat(asked(temperature=1), LIMITS).seed for _ in range(3)}
    assert len(seeds) == 3  # without a seed, every sampled answer is another


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"n": 2}, "n", "n 2 is not supported; leave it out"),
        ({"tools": [{"type": "function"}]}, "tools", "is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "is not supported"),
        ({"top_k": 5}, "top_k", "'top_k' is not supported"),
        ({"temperature": 3}, "temperature", "3, expected 0 to 2"),
        ({"temperature": float("nan")}, "temperature", "expected a number"),
        ({"top_p": 0}, "top_p", "expected 1e-06 to 1"),
        ({"max_tokens": 101}, "max_tokens", "101, expected a whole number from 1 to 100"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens", "give one of them"),
        ({"stop": ["x"] * 5}, "stop", "5 texts, at most 4"),
        ({"stop": ""}, "stop", "1 to 256 characters"),
        ({"seed": 2**63}, "seed", "64 bits"),
        ({"stream": 1}, "stream", "expected true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "with stream true"),
        ({"model": None}, "model", "expected text"),
        ({"messages": []}, "messages", "not a list of messages"),
        ({"messages": [{"role": "user", "content": "?"}] * 4}, "messages", "4 messages, at most 3"),
        ({"messages": [{"role": "tool", "content": "?"}]}, "messages[0].role", "one of system, developer, user"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0]", "content is None"),
        ({"messages": [{"role": "assistant", "content": "Yes."}]}, "messages", "nothing to answer"),
        ({"messages": [{"role": "assistant", "content": [image()]}]}, "messages[0]", "only the user's messages"),
        ({"messages": [{"role": "user", "content": "x" * 200_001}]}, "messages", "over 200000 characters"),
        ({"messages": [{"role": "user", "content": "<image>?"}]}, "messages", "1 <image> in the text, 0 pictures"),
    ],
)
def test_what_cannot_be_done_is_refused(fields: dict[str, Any], param: str, says: str) -> None:
    with pytest.raises(ApiError) as refused:
        parse_chat(asked() | fields, LIMITS)
    assert refused.value.param == param and says in str(refused.value) and refused.value.status == 400
    assert refused.value.body["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (image("https://example.com/cat.png"), "this server fetches no URLs"),
        (image("data:image/png;base64,@@@"), "not valid base64"),
        (image("data:image/png;base64,"), "an empty picture"),
        (image("data:text/html;base64,aGk="), "expected data:image/"),
        (image(None), "is not supported; expected"),
        ({"type": "input_audio", "input_audio": {}}, "is not supported; expected"),
        ("text", "is not supported; expected"),
    ],
)
def test_a_part_that_is_no_text_and_no_picture(part: Any, says: str) -> None:
    with pytest.raises(ApiError, match=r"messages\[0\]\.content\[0\]") as refused:
        parse_chat(asked([part]), LIMITS)
    assert says in str(refused.value)


@pytest.mark.parametrize("body", [b"[" * 100_000, b"", b"\xff", b"[]", b"1" * 5000, b'{"a": NaN'])
def test_a_body_that_is_no_json(body: bytes) -> None:
    with pytest.raises(ApiError, match="^the body is"):
        read_body(body)


def test_too_many_pictures() -> None:
    with pytest.raises(ApiError, match="3 pictures, at most 2"):
        parse_chat(asked([image()] * 3), LIMITS)


def test_reconstructions() -> None:
    asks = {"model": "run", "picture": URL}
    found = parse_reconstruct(asks)
    assert (found.picture, found.steps, found.seed, found.start_timestep) == (b"one", 25, 0, None)
    assert parse_reconstruct(asks | {"start_timestep": 0, "steps": 1}).start_timestep == 0
    for wrong in ({"steps": 0}, {"steps": 251}, {"start_timestep": 1000}, {"seed": "1"}, {"picture": None}, {"x": 1}):
        with pytest.raises(ApiError) as refused:
            parse_reconstruct(asks | wrong)
        assert refused.value.param == next(iter(wrong))


def test_a_stream_ends_with_its_reason_its_usage_and_done() -> None:
    reply = Reply(Chat("run", [], [], include_usage=True))
    usage = protocol.usage(5, 2)
    lines = (reply.first() + reply.piece("a\n\nb") + reply.last("stop", usage)).decode().split("\n\n")
    assert lines.pop() == "" and lines.pop() == "data: [DONE]"
    first, piece, last, used = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert piece["choices"][0] | {"logprobs": None} == {
        **{"index": 0, "delta": {"content": "a\n\nb"}, "finish_reason": None, "logprobs": None}
    }
    assert last["choices"][0]["delta"] == {} and last["choices"][0]["finish_reason"] == "stop"
    assert used["choices"] == [] and used["usage"]["total_tokens"] == 7
    assert len({chunk["id"] for chunk in (first, piece, last, used)}) == 1
