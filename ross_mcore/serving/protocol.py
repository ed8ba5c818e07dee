"""Requests and replies of the server as plain data: OpenAI's chat completions, and reconstructions. Loads no library.

What a request holds is checked and bounded here, before any picture is decoded; a field that this server would have
to ignore is refused, so that nobody takes an answer for what they asked; but those in WITHOUT_EFFECT, and a picture's
`detail`, change no answer and are accepted. Source: OpenAI's API reference, Chat.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ross_mcore import checked
from ross_mcore.data.typed_parts import joined

IMAGE_PLACEHOLDER = "<image>"
"""As in data/conversation.py."""
ROLES = {"system": "system", "developer": "system", "user": "human", "assistant": "gpt"}
MOST_STOPS = 4
MOST_TEXT_CHARACTERS = 200_000
MOST_STEPS = 250
DEFAULT_NEW_TOKENS = 256
DATA_URL = re.compile(r"data:image/[a-z0-9.+-]+(?:;[a-z0-9=-]+)*;base64,", re.IGNORECASE)

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
}
"""Fields that this server does not offer -> the values that ask for nothing; others are refused."""
WITHOUT_EFFECT = ("user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier", "parallel_tool_calls")
USED = (
    *("model", "messages", "temperature", "top_p", "max_tokens", "max_completion_tokens", "stop", "seed", "stream"),
    "stream_options",
)


@dataclass(frozen=True)
class Limits:
    """Bounds of a request, and of the requests that wait for a model."""

    body_bytes: int = 32 << 20
    pictures: int = 8
    messages: int = 64
    new_tokens: int = 1024
    waiting: int = 8


class ApiError(Exception):
    """A request that is refused: what is wrong and what to do, as OpenAI's clients read it."""

    def __init__(
        self,
        message: str,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after_seconds: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after_seconds = status, param, code, retry_after_seconds

    @property
    def kind(self) -> str:
        if self.status >= 500:
            return "server_error"
        return {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error"
        )

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_seconds is None else {"Retry-After": str(self.retry_after_seconds)}


@dataclass(frozen=True)
class Chat:
    """A request for an answer. `turns` are those of inference.Question, `pictures` the files' bytes in their order."""

    model: str
    turns: list[dict[str, str]]
    pictures: list[bytes] = field(repr=False)
    max_new_tokens: int = DEFAULT_NEW_TOKENS
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False


@dataclass(frozen=True)
class Reconstruct:
    """A request for a reconstruction; `start_timestep` None: from pure noise."""

    model: str
    picture: bytes = field(repr=False)
    steps: int = 25
    seed: int = 0
    start_timestep: int | None = None


def read_body(data: bytes) -> dict[str, Any]:
    """The JSON object of a request. Raises ApiError."""
    try:
        body = json.loads(data)
    except RecursionError:
        raise ApiError("the body is nested too deeply") from None
    except ValueError as error:
        raise ApiError(f"the body is not JSON: {checked.reason(error)}") from None
    if not isinstance(body, dict):
        raise ApiError("the body is not a JSON object")
    return body


def parse_chat(body: dict[str, Any], limits: Limits) -> Chat:
    """Raises ApiError naming the field, its value and the remedy."""
    _require_known(body)
    turns, pictures = _messages(body.get("messages"), limits)
    options = body.get("stream_options")
    stream = _take(checked.switch, body, "stream", False)
    if options is not None and not (stream and isinstance(options, dict)):
        raise ApiError("stream_options is for requests with stream true", param="stream_options")
    temperature = _number(body, "temperature", 0.0, 0, 2)
    return Chat(
        model=_take(checked.text, body, "model"),
        turns=turns,
        pictures=pictures,
        max_new_tokens=_new_tokens(body, limits),
        temperature=temperature,
        top_p=_number(body, "top_p", 1.0, 1e-6, 1),
        seed=_seed(body, default=0 if temperature == 0 else secrets.randbits(63)),
        stop=_stops(body.get("stop")),
        stream=stream,
        include_usage=_take(checked.switch, options or {}, "include_usage", False),
    )


def parse_reconstruct(body: dict[str, Any]) -> Reconstruct:
    """Raises ApiError naming the field, its value and the remedy."""
    for key in body:
        if key not in ("model", "picture", "steps", "seed", "start_timestep"):
            raise ApiError(f"{checked.shown(key)} is not a field of a reconstruction; leave it out", param=key[:64])
    picture = body.get("picture")
    if not isinstance(picture, str):
        raise ApiError("picture is missing; give a data: URL in base64", param="picture")
    start = body.get("start_timestep")
    return Reconstruct(
        model=_take(checked.text, body, "model"),
        picture=picture_bytes(picture, "picture"),
        steps=_take(checked.count, body, "steps", 25, 1, MOST_STEPS),
        seed=_seed(body, default=0),
        start_timestep=None if start is None else _take(checked.count, body, "start_timestep", None, 0, 999),
    )


def picture_bytes(url: str, param: str) -> bytes:
    """The bytes of a picture in a data: URL. Raises ApiError, also for any other URL: nothing is fetched."""
    matched = DATA_URL.match(url[:200])
    if matched is None:
        raise ApiError(
            f"{param} is {checked.shown(url[:200])}, expected data:image/...;base64,...: this server fetches no URLs; "
            "put the picture itself into the request",
            param=param,
        )
    try:
        data = base64.b64decode(url[matched.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(f"{param} is not valid base64; encode the file again", param=param) from None
    if not data:
        raise ApiError(f"{param} is an empty picture; encode the file again", param=param)
    return data


def _require_known(body: Mapping[str, Any]) -> None:
    for key, value in body.items():
        if value is None or key in USED or key in WITHOUT_EFFECT:
            continue
        if key not in NEUTRAL:
            raise ApiError(f"{checked.shown(key)} is not supported; leave it out", param=key[:64], code="unknown_field")
        if value not in NEUTRAL[key]:
            raise ApiError(
                f"{key} {checked.shown(value)} is not supported; leave it out", param=key, code="unsupported_value"
            )


def _take(check: Any, body: Mapping[str, Any], key: str, *bounds: Any) -> Any:
    """The value at `key`, by a function of checked.py. Raises ApiError."""
    try:
        return check(body, key, *bounds)
    except ValueError as error:
        raise ApiError(str(error), param=key) from None


def _number(body: Mapping[str, Any], key: str, default: float, least: float, most: float) -> float:
    value: float = _take(checked.real, body, key, default)
    if not least <= value <= most:
        raise ApiError(f"{key} is {value:g}, expected {least:g} to {most:g}", param=key)
    return value


def _seed(body: Mapping[str, Any], default: int) -> int:
    seed = default if body.get("seed") is None else body["seed"]
    if type(seed) is not int or not -(2**63) <= seed < 2**63:
        raise ApiError(f"seed is {checked.shown(seed)}, expected a whole number of 64 bits", param="seed")
    return seed


def _new_tokens(body: Mapping[str, Any], limits: Limits) -> int:
    """max_completion_tokens, or its older name max_tokens."""
    given = [key for key in ("max_completion_tokens", "max_tokens") if body.get(key) is not None]
    if len(given) == 2:
        raise ApiError("max_tokens is the old name of max_completion_tokens; give one of them", param="max_tokens")
    if not given:
        return min(DEFAULT_NEW_TOKENS, limits.new_tokens)
    tokens: int = _take(checked.count, body, given[0], None, 1, limits.new_tokens)
    return tokens


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) and 0 < len(stop) <= 256 for stop in stops):
        raise ApiError(
            f"stop is {checked.shown(value)}, expected texts of 1 to 256 characters, or one of them", param="stop"
        )
    if len(stops) > MOST_STOPS:
        raise ApiError(f"stop has {len(stops)} texts, at most {MOST_STOPS} are taken", param="stop")
    return tuple(stops)


def _messages(messages: Any, limits: Limits) -> tuple[list[dict[str, str]], list[bytes]]:
    """The turns of OpenAI's messages, and their pictures.

    Parts become a text as in data/records.py, so that a prompt is that of the training: `as_dialogue` moves a single
    picture to the start of its turn, several stay where they are. Texts that write `<image>` for every picture place
    them themselves.
    """
    if not isinstance(messages, list) or not messages:
        raise ApiError("messages is not a list of messages", param="messages")
    if len(messages) > limits.messages:
        raise ApiError(f"{len(messages)} messages, at most {limits.messages} are taken", param="messages")
    parts = [_parts(message, f"messages[{number}]") for number, message in enumerate(messages)]
    if messages[-1].get("role") != "user":
        raise ApiError("the last message is not the user's, so there is nothing to answer", param="messages")
    texts = [part for _, turn in parts for part in turn if isinstance(part, str)]
    if sum(map(len, texts)) > MOST_TEXT_CHARACTERS:
        raise ApiError(f"the messages have over {MOST_TEXT_CHARACTERS} characters; shorten them", param="messages")
    pictures = [part for _, turn in parts for part in turn if isinstance(part, bytes)]
    if len(pictures) > limits.pictures:
        raise ApiError(f"{len(pictures)} pictures, at most {limits.pictures} are taken", param="messages")
    placed = sum(text.count(IMAGE_PLACEHOLDER) for text in texts)
    if placed not in (0, len(pictures)):
        raise ApiError(
            f"{placed} {IMAGE_PLACEHOLDER} in the text, {len(pictures)} pictures; leave {IMAGE_PLACEHOLDER} out, or "
            "write one for each picture",
            param="messages",
        )
    mark = "" if placed else IMAGE_PLACEHOLDER
    turns = [
        {"from": role, "value": joined(part if isinstance(part, str) else mark for part in turn)}
        for role, turn in parts
    ]
    return turns, pictures


def _parts(message: Any, name: str) -> tuple[str, list[str | bytes]]:
    """The role of a message, and its parts in order: texts, and the bytes of pictures."""
    if not isinstance(message, dict):
        raise ApiError(f"{name} is {checked.shown(message)}, expected an object with role and content", param=name)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        expected = ", ".join(ROLES)
        raise ApiError(f"{name}.role is {checked.shown(role)}, expected one of {expected}", param=f"{name}.role")
    for key, value in message.items():
        if key not in ("role", "content", "name") and value not in (None, [], {}):
            raise ApiError(f"{name}.{key[:64]} is not supported; leave it out", param=name)
    if isinstance(content, str):
        return ROLES[role], [content]
    if not isinstance(content, list) or not content:
        raise ApiError(f"{name}.content is {checked.shown(content)}, expected text or a list of parts", param=name)
    parts = [_part(part, f"{name}.content[{number}]") for number, part in enumerate(content)]
    if role != "user" and any(isinstance(part, bytes) for part in parts):
        raise ApiError(f"{name} is the {role}'s; only the user's messages have pictures", param=name)
    return ROLES[role], parts


def _part(part: Any, name: str) -> str | bytes:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    url = part.get("image_url") if kind == "image_url" else None
    url = url.get("url") if isinstance(url, dict) else url
    if not isinstance(url, str):
        raise ApiError(
            f'{name} is not supported; expected {{"type": "text", "text": ...}} or {{"type": "image_url", '
            '"image_url": {"url": "data:image/...;base64,..."}}',
            param=name,
        )
    return picture_bytes(url, f"{name}.image_url.url")


class Reply:
    """An answer in OpenAI's form: as a whole, or as the chunks of a stream."""

    def __init__(self, chat: Chat) -> None:
        self.include_usage = chat.include_usage
        self.head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": chat.model}

    def whole(self, text: str, finish_reason: str, usage: Mapping[str, int]) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": None}
        return {**self.head, "object": "chat.completion", "choices": [choice], "usage": usage}

    def first(self) -> bytes:
        return self._chunk({"role": "assistant", "content": ""})

    def piece(self, text: str) -> bytes:
        return self._chunk({"content": text})

    def last(self, finish_reason: str, usage: Mapping[str, int]) -> bytes:
        """The last chunks: why the answer ended, its tokens if asked for, the end of the stream."""
        end = self._chunk({}, finish_reason)
        if self.include_usage:
            end += event({**self.head, "object": "chat.completion.chunk", "choices": [], "usage": usage})
        return end + b"data: [DONE]\n\n"

    def _chunk(self, delta: Mapping[str, str], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        chunk: dict[str, Any] = {**self.head, "object": "chat.completion.chunk", "choices": [choice]}
        return event(chunk | ({"usage": None} if self.include_usage else {}))


def event(data: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(data)}\n\n".encode()


def usage(prompt_tokens: int, new_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new_tokens,
        "total_tokens": prompt_tokens + new_tokens,
    }
