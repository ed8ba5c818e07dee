"""Records: the forms in which people write conversations about pictures -> LLaVA's form, the one that is trained on.

`normalise` returns a LLaVA record: {"image"?: name or names, "conversations": [{"from": "system" | "human" | "gpt",
"value": text}, ...], other keys}. READ is the table of forms that are read, NOT_READ of forms that are recognised and
refused with the remedy; placeholders.py has other trainers' marks of a picture. docs/data.md shows an example of each.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ross_mcore.checked import shown
from ross_mcore.data.conversation import IMAGE_PLACEHOLDER as IMAGE
from ross_mcore.data.placeholders import with_our_placeholders
from ross_mcore.data.typed_parts import joined
from ross_mcore.errors import ConversationError

Record = dict[str, Any]

ROLES = {
    "system": ("system", "developer"),
    "human": ("human", "user", "usr", "prompter", "question"),
    "gpt": ("gpt", "assistant", "bot", "model", "chatgpt", "bard", "bing", "ai", "chatbot", "answer"),
    "tool": ("tool", "tools", "function", "observation", "ipython", "tool_call", "tool_response", "tool_calls")
    + ("function_call", "function_response", "function-call", "function-response"),
}
_ROLE_OF = {name: role for role, names in ROLES.items() for name in names}
SPEAKER_KEYS = ("from", "role", "speaker")
TEXT_KEYS = ("value", "content", "text")
PAIR_KEYS = (
    ("human", "user", "input", "query", "prompt", "question", "instruction"),
    ("assistant", "gpt", "bot", "output", "response", "answer"),
)
"""Keys of one round: {"user": question, "assistant": answer}."""
TURNS_KEYS = ("conversations", "messages", "conversation", "texts", "dialogue", "dialog", "turns")
ROUND_KEYS = (("query", "response"), ("prompt", "completion"), ("prompt", "response"), ("input", "output"))
CAPTION_KEYS = ("caption", "text", "txt")
SYSTEM_KEYS = ("system", "system_prompt")
PICTURE_KEYS = ("image", "images")
OTHER_PICTURE_KEYS = (
    *("image_path", "image_paths", "image_file", "image_files", "image_name", "image_url", "image_urls"),
    *("img", "imgs", "img_path", "picture", "pictures", "file_name", "jpg", "jpeg", "png", "webp"),
)
"""Read only if none of PICTURE_KEYS names a picture: beside an embedded picture they say where it came from."""
PART_KEYS = ("image", "image_url", "url", "path", "bytes", "source")
REFERENCE_KEYS = ("path", "url", "image", "image_url", "file_name", "filename", "name")
PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".flv", ".wmv")


def normalise(record: Any, num_images: int | None = None) -> Record:
    """A record of any form in READ as a LLaVA record; one that is in this form already is returned itself.

    `num_images`: pictures in the shard, by default those that the record names. Placeholders of other trainers
    become `<image>`. Raises ConversationError that names the form or the turn and the remedy, also for a placeholder
    without a picture.
    """
    if isinstance(record, list) and record and all(isinstance(turn, dict) for turn in record):
        record = {"conversations": record}
    if not isinstance(record, dict):
        raise ConversationError("the record is not a JSON object")
    try:
        record = record if _is_llava(record) else _as_llava(record, num_images)
    except RecursionError:
        raise ConversationError("the record is nested too deeply") from None
    names = len(picture_names(record))
    if num_images is None:
        num_images = names
        if not names:
            _refuse_other_keys(record)
    elif names and names != num_images:
        raise ConversationError(f"the record names {names} pictures and the shard has {num_images}")
    return with_our_placeholders(record, num_images)


def has_turns(record: Any) -> bool:
    """Whether a value holds a conversation in some form, rather than facts about a picture alone."""
    return isinstance(record, dict) and ("conversations" in record or any(form.fits(record) for form in READ[:2]))


def picture_names(record: Record) -> list[Any]:
    """The pictures of a LLaVA record: names, or {"bytes", "path"} of embedded ones; blank values are no picture."""
    image = record.get("image")
    return [each for each in (image if isinstance(image, list) else [image]) if not _is_blank(each)]


def _is_llava(record: Record) -> bool:
    turns, image = record.get("conversations"), record.get("image")
    if not isinstance(turns, list) or not turns:
        return False
    for place, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            return False
        if turn.get("from") not in ("human", "gpt") and (place or turn.get("from") != "system"):
            return False
    if any(not _is_blank(record.get(key)) for key in _FOREIGN_KEYS):
        return False
    if image in (None, []):
        elsewhere = [record.get(key) for key in OTHER_PICTURE_KEYS]
        return _is_blank([*elsewhere, *(turn.get(key) for turn in turns for key in PICTURE_KEYS)])
    return all(map(_is_name, image if isinstance(image, list) else [image]))


def _is_name(image: Any) -> bool:
    """Whether a value is the name of a picture, rather than of a video, a list of names as JSON, or blank."""
    return isinstance(image, str) and not (
        _is_blank(image) or image.startswith('["') or image.lower().endswith(VIDEO_SUFFIXES)
    )


def _refuse_other_keys(record: Record) -> None:
    """Raises ConversationError for a record without a picture in which another key names one."""
    for key, value in record.items():
        is_name = isinstance(value, str) and value.lower().endswith(PICTURE_SUFFIXES) and "://" not in value
        if is_name and not key.lower().endswith("id"):
            raise ConversationError(f"a picture under another key: {key} is {shown(value)}; name it under image")


def _is_blank(value: Any) -> bool:
    """Whether a value stands for nothing: null, "", [], [""], or the NaN that tables have for a missing one."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_blank, value))
    if isinstance(value, dict):
        return all(map(_is_blank, value.values()))
    if isinstance(value, str):
        return value.strip() in ("", "[]")
    return value is None or value == b"" or (isinstance(value, float) and math.isnan(value))


def _has(record: Record, *keys: str) -> bool:
    return all(not _is_blank(record.get(key)) for key in keys)


def _first(mapping: Record, keys: Iterable[str]) -> str | None:
    """The first of the keys with a value."""
    return next((key for key in keys if not _is_blank(mapping.get(key))), None)


# ---------------------------------------------------------------------------------------------------------- pictures


@dataclass
class Pictures:
    """The pictures of a record while its turns are read: `listed` by its keys, `named` by the picture parts of turns.

    `number`: how many come with the record, None if only its names tell. `unnamed`: picture parts without a name.
    """

    number: int | None
    listed: list[Any] = field(default_factory=list)
    named: list[Any] = field(default_factory=list)
    unnamed: int = 0

    def names(self) -> list[Any]:
        """The names of all pictures. Raises ConversationError when turns and keys do not fit each other."""
        if self.named and (self.unnamed or self.listed not in ([], self.named)):
            raise ConversationError(
                f"pictures are named in two places: {len(self.named)} in the turns and {len(self.listed)} beside them, "
                f"and {self.unnamed} parts of turns have no name; name all in one place"
            )
        if self.unnamed > self.held:
            raise ConversationError(
                f"pictures are missing: the turns have {self.unnamed} and {self.held} come with the record"
            )
        return self.named or self.listed

    @property
    def held(self) -> int:
        return len(self.listed) if self.number is None else self.number


def _listed_pictures(record: Record) -> list[Any]:
    """The pictures named by the keys of a record, see PICTURE_KEYS."""
    found = {key: references for key in PICTURE_KEYS if (references := _references(record.get(key)))}
    one, several = found.get("image", []), found.get("images", [])
    if one and several and one != several and not (len(one) == 1 and one[0] in several):
        raise ConversationError("pictures are named twice: image and images differ; keep one of the keys")
    if record.get("media") == "image" and not found:
        return _references(record.get("name"))
    other = None if found else _first(record, OTHER_PICTURE_KEYS)
    return several or one or ([] if other is None else _references(record[other]))


def _references(value: Any) -> list[Any]:
    """Names of pictures, or embedded ones as {"bytes", "path"}, from a name, a struct, bytes, or a list of those."""
    if _is_blank(value):
        return []
    if isinstance(value, str) and value.lstrip().startswith('["'):
        value = _from_json(value, "image")
    if isinstance(value, (list, tuple)):
        return [reference for each in value for reference in _references(each)]
    if isinstance(value, (bytes, bytearray)):
        return [{"bytes": bytes(value), "path": None}]
    if isinstance(value, dict):
        if isinstance(data := value.get("bytes"), (bytes, bytearray)) and data:
            return [{"bytes": bytes(data), "path": value.get("path")}]
        if isinstance(data, str) and data:
            return [f"data:;base64,{data}"]
        if isinstance(data := value.get("base64") or value.get("data"), str) and data:
            return [data if data.startswith("data:") else f"data:;base64,{data}"]
        if all(isinstance(key, str) and re.fullmatch(r"<.*>", key) for key in value):  # placeholder -> name
            return [reference for key in sorted(value) for reference in _references(value[key])]
        key = _first(value, REFERENCE_KEYS)
        if key is None:
            raise ConversationError(f"a picture is {shown(value)}: expected its name")
        return _references(value[key])
    return [value]  # an image that is not a name is refused where pictures are read


# ------------------------------------------------------------------------------------------------------------- turns


def _turns(value: Any, pictures: Pictures) -> list[dict[str, str]]:
    """Turns of any spelling as LLaVA's. Raises ConversationError naming the turn."""
    if isinstance(value, str):
        value = _from_json(value, "conversations")
    if not isinstance(value, (list, tuple)) or not value:
        raise ConversationError("conversations is not a list of turns")
    return [found for number, turn in enumerate(value, start=1) for found in _turn(turn, number, pictures)]


def _turn(turn: Any, number: int, pictures: Pictures) -> Iterator[dict[str, str]]:
    if not isinstance(turn, dict):
        raise ConversationError(f"a turn has no text: turn {number} is {shown(turn)}, expected a role and its text")
    speaker = _first(turn, SPEAKER_KEYS)
    if speaker is None:
        pair = [_first(turn, keys) for keys in PAIR_KEYS]
        if None in pair:
            raise ConversationError(
                f"a turn is neither the human's nor the gpt's: turn {number} has the keys {_keys(turn)}, expected "
                "from and value, or role and content"
            )
        if _has(turn, "system"):
            yield _said("system", turn["system"], number, pictures)
        for said_by, pair_key in zip(("human", "gpt"), pair, strict=True):
            yield _said(said_by, turn[pair_key or ""], number, pictures)
        return
    role = _ROLE_OF.get(str(turn[speaker]).strip("<|> :\n").lower())
    if role == "tool" or _has(turn, "tool_calls") or _has(turn, "function_call"):
        raise ConversationError(f"looks like tool calls: turn {number} is one; leave out records with tools")
    if role is None:
        raise ConversationError(
            f"a turn is neither the human's nor the gpt's: turn {number} is by {shown(turn[speaker])}, expected human "
            "or gpt (user, assistant and system are read too)"
        )
    if role == "gpt" and (turn.get("weight") == 0 or turn.get("loss") == 0):
        raise ConversationError(f"a turn is marked as not to be learned: turn {number}; every answer is learned here")
    pictures.named += [reference for key in PICTURE_KEYS for reference in _references(turn.get(key))]
    text_key = next((key for key in TEXT_KEYS if key in turn), "value")
    yield _said(role, turn.get(text_key), number, pictures)


def _text(value: Any, number: int, pictures: Pictures) -> str:
    """The text of a turn: a text, or a list of typed parts, in which each picture becomes `<image>` at its place."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, (list, tuple)):
        kind = "the number " if isinstance(value, (int, float)) and not isinstance(value, bool) else ""
        remedy = "write it in quotes" if kind else "expected text"
        raise ConversationError(f"a turn has no text: turn {number} is {kind}{shown(value)}, {remedy}")
    return joined(_part(part, number, pictures) for part in value)


def _part(part: Any, number: int, pictures: Pictures) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise ConversationError(f"a turn has no text: turn {number} has the part {shown(part)}")
    kind = str(part.get("type") or _first(part, ("image", "image_url", "video", "audio")) or "text")
    if kind in ("image", "image_url", "input_image"):
        references = _references(part.get(_first(part, PART_KEYS) or ""))
        if not references and _has(part, "base64"):
            references = _references(part)
        pictures.named += references
        pictures.unnamed += not references
        return "\n".join([IMAGE] * max(1, len(references)))
    text = part.get("text") if part.get("text") is not None else part.get("content")
    if kind not in ("text", "input_text", "output_text"):
        raise ConversationError(f"a part is not read: turn {number} has {shown(kind)}; text and image are read")
    if not isinstance(text, str):
        raise ConversationError(f"a turn has no text: turn {number} has the text part {shown(text)}")
    return text


def _from_json(text: str, key: str) -> Any:
    """The value written as JSON in a text. Raises ConversationError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        what = "Python's repr, not JSON" if re.match(r"\s*[\[{]+\s*'", text) else "a text that is not JSON"
        remedy = "write it with json.dumps"
        if key == "conversations":
            raise ConversationError(f"conversations is not a list of turns: it is {what}; {remedy}") from None
        raise ConversationError(f"{key} is {what}: {remedy}") from None


def _keys(mapping: Record) -> str:
    return shown(", ".join(map(str, mapping)) or "none").strip("'\"")


# ------------------------------------------------------------------------------------------------------------- forms


@dataclass(frozen=True)
class Form:
    """How people write records: `fits` recognises one, `turns` returns its turns in LLaVA's form.

    `uses`: the keys that become turns, and are left out of the record that is stored.
    """

    name: str
    fits: Callable[[Record], bool]
    turns: Callable[[Record, Pictures], list[dict[str, str]]]
    uses: tuple[str, ...]


def _conversation_turns(record: Record, pictures: Pictures) -> list[dict[str, str]]:
    held = [key for key in TURNS_KEYS if _has(record, key)]
    keys = [key for key in held if isinstance(record[key], (list, tuple)) or str(record[key]).lstrip()[:1] == "["]
    if any(record[key] != record[keys[0]] for key in keys):
        raise ConversationError(f"conversations come twice: under {' and '.join(keys)}; keep one of the keys")
    return _turns(record[(keys or held)[0]], pictures)


def _round_turns(record: Record, pictures: Pictures) -> list[dict[str, str]]:
    """Of a question and its answer, texts or lists of turns; `history` has the rounds before, [question, answer]."""
    question, answer = next(keys for keys in ROUND_KEYS if _are_round(record, keys))
    turns: list[dict[str, str]] = []
    history = record.get("history")
    history = _from_json(history, "history") if isinstance(history, str) and history else history or []
    if not isinstance(history, (list, tuple)):
        raise ConversationError(f"history is not a list of rounds: it is {shown(history)}")
    for number, earlier in enumerate([*history, (record[question], record[answer])], start=1):
        if not isinstance(earlier, (list, tuple)) or len(earlier) != 2:
            raise ConversationError(f"history is not a list of rounds: round {number} is {shown(earlier)}")
        for role, said in zip(("human", "gpt"), earlier, strict=True):
            turns += _turns(said, pictures) if _are_turns(said) else [_said(role, said, number, pictures)]
    return turns


def _are_round(record: Record, keys: tuple[str, str]) -> bool:
    return _has(record, keys[0]) and record.get(keys[1]) is not None


def _are_turns(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(isinstance(t, dict) and _first(t, SPEAKER_KEYS) for t in value)


def _said(role: str, value: Any, number: int, pictures: Pictures) -> dict[str, str]:
    return {"from": role, "value": _text(value, number, pictures)}


def _caption_turns(record: Record, pictures: Pictures) -> list[dict[str, str]]:
    """Of a caption, as an answer to a turn with the pictures that the caption itself does not show."""
    caption = record[_first(record, CAPTION_KEYS) or ""]
    if isinstance(caption, list):
        return _captions_turns({"captions": caption}, pictures)
    text = _text(caption, 1, pictures).strip()
    shows = "\n".join([IMAGE] * (pictures.held - text.count(IMAGE)))
    return [{"from": "human", "value": shows}, {"from": "gpt", "value": text}]


def _captions_turns(record: Record, pictures: Pictures) -> list[dict[str, str]]:
    """Of a caption a picture: a round for each, whose question is the prompt of the same number, if there is one."""
    captions, prompts = record["captions"], record.get("prompts") or []
    captions = captions if isinstance(captions, list) else [captions]
    prompts = prompts if isinstance(prompts, list) else [prompts]
    number = pictures.held
    if len(captions) != number or (prompts and len(prompts) != number):
        raise ConversationError(
            f"captions do not fit the pictures: {len(captions)} captions and {len(prompts)} prompts for {number} "
            "pictures; write a record for each caption"
        )
    turns: list[dict[str, str]] = []
    for place, caption in enumerate(captions):
        prompt = prompts[place] if prompts else ""
        asked, said = ((each if isinstance(each, list) else [each]) for each in (prompt, caption))
        if len(asked) != len(said):
            raise ConversationError(f"captions do not fit the prompts: {len(said)} and {len(asked)} of one picture")
        for again, (question, answer) in enumerate(zip(asked, said, strict=True)):
            text = _text(question, place + 1, pictures)
            text = text if again or IMAGE in text else f"{IMAGE}\n{text}".rstrip()
            turns += [{"from": "human", "value": text}, _said("gpt", answer, place + 1, pictures)]
    return turns


READ = (
    Form("turns", lambda r: _first(r, TURNS_KEYS) is not None, _conversation_turns, TURNS_KEYS),
    Form(
        "question and answer",
        lambda r: any(_are_round(r, keys) for keys in ROUND_KEYS),
        _round_turns,
        ("query", "response", "prompt", "completion", "input", "output", "history"),
    ),
    Form("captions", lambda r: _has(r, "captions"), _captions_turns, ("captions", "prompts")),
    Form("caption", lambda r: _first(r, CAPTION_KEYS) is not None, _caption_turns, CAPTION_KEYS),
)
"""The forms that are read, the first that fits counts."""


@dataclass(frozen=True)
class Unread:
    """A form that is recognised and not read; `fits` is asked with the record and whether it has pictures."""

    name: str
    fits: Callable[[Record, bool], bool]
    remedy: str


IN_TEMPLATE = re.compile(r"<\|im_start\|>|<\|start_header_id\|>|<\|assistant\|>|\[/INST\]|\bASSISTANT:|### Response:")
LLAVA = 'write it as {"image": name, "conversations": [{"from": "human", "value": "<image>..."}, {"from": "gpt", ...}]}'

VIDEO = Unread(
    "video",
    lambda r, _: _first(r, ("video", "videos", "video_path", "video_paths")) is not None or r.get("media") == "video",
    "videos are not read; leave the record out or name pictures of its frames",
)
NOT_READ = (
    VIDEO,
    Unread(
        "audio",
        lambda r, _: _first(r, ("audio", "audios", "audio_path")) is not None,
        "audio is not read; leave the record out",
    ),
    Unread(
        "preference data (chosen/rejected)",
        lambda r, _: _first(r, ("rejected", "rejected_response", "rejected_messages")) is not None,
        f"only supervised training is offered; {LLAVA} with the chosen answer",
    ),
    Unread("tool calls", lambda r, _: _has(r, "tools"), "tools are not read; leave out records with tools"),
    Unread(
        "Alpaca (instruction/input/output)",
        lambda r, _: _has(r, "instruction") and _first(r, ("output", "outputs", "response", "answer")) is not None,
        f"{LLAVA} with instruction and input as the question and output as the answer",
    ),
    Unread(
        "VQA (question/answer)",
        lambda r, _: (
            _first(r, TURNS_KEYS) is None and _first(r, ("question", "questions", "question_id", "problem")) is not None
        ),
        f"{LLAVA} with the question and one answer",
    ),
    Unread(
        "COCO annotations",
        lambda r, _: not _is_blank(r.get("category_id")) or (_has(r, "image_id", "caption") and not _safe_pictures(r)),
        f"join image_id with file_name of the file's images, and {LLAVA}",
    ),
    Unread(
        "an interleaved document (texts and images)",
        lambda r, _: (
            isinstance(r.get("texts"), list)
            and all(isinstance(text, str) or text is None for text in r["texts"])
            and not _is_blank(r["texts"])
        ),
        LLAVA,
    ),
    Unread(
        "a conversation in a template",
        lambda r, _: any(isinstance(r.get(key), str) and IN_TEMPLATE.search(r[key]) for key in CAPTION_KEYS),
        "write its turns as conversations, without the template's words",
    ),
    Unread(
        "a caption without a picture",
        lambda r, has_pictures: _first(r, TURNS_KEYS) is None and _has(r, "caption") and not has_pictures,
        "name its picture under image, as a path in the image folder",
    ),
    Unread(
        "plain text",
        lambda r, has_pictures: not has_pictures and _has(r, "text") and not any(form.fits(r) for form in READ[:-1]),
        'write it as {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]}',
    ),
)
"""The forms that are not read, asked before READ."""

_FOREIGN_KEYS = (*SYSTEM_KEYS, "images", "video", "videos", "audio", "audios", "rejected", "rejected_response", "tools")
"""Keys that mean more than LLaVA's own; a record with one of them is not in LLaVA's form."""


def _safe_pictures(record: Record) -> list[Any]:
    try:
        return _listed_pictures(record)
    except ConversationError:
        return []


def _as_llava(record: Record, num_images: int | None) -> Record:
    """Raises ConversationError for a record of no form in READ."""
    has_pictures = bool(_safe_pictures(record) if num_images is None else num_images)
    for unread in NOT_READ:
        if unread.fits(record, has_pictures):
            raise ConversationError(f"looks like {unread.name}: {unread.remedy}")
    form = next((form for form in READ if form.fits(record)), None)
    if form is None:
        raise ConversationError(
            f"conversations is not a list of turns: the record has the keys {_keys(record)}; docs/data.md lists the "
            "forms that are read"
        )
    pictures = Pictures(num_images, _listed_pictures(record))
    turns = _with_system(record, form.turns(record, pictures))
    names = pictures.names()
    if any(isinstance(name, str) and name.lower().endswith(VIDEO_SUFFIXES) for name in names):
        raise ConversationError(f"looks like {VIDEO.name}: {VIDEO.remedy}")
    if not turns:
        raise ConversationError("conversations is not a list of turns: every turn is blank")
    left_out = {*form.uses, *SYSTEM_KEYS, *PICTURE_KEYS, "conversations"}
    left_out |= {key for key in OTHER_PICTURE_KEYS if _safe_references(record.get(key)) == names}
    left_out |= {"media", "name"} if record.get("media") == "image" else set()
    kept = {key: value for key, value in record.items() if key not in left_out}
    return {**kept, **({"image": names} if names else {}), "conversations": turns}


def _safe_references(value: Any) -> list[Any]:
    try:
        return _references(value)
    except ConversationError:
        return []


def _with_system(record: Record, turns: list[dict[str, str]]) -> list[dict[str, str]]:
    """The turns with at most one system turn, the first one; a blank one is left out. Raises ConversationError."""
    key = _first(record, SYSTEM_KEYS)
    texts = [] if key is None else [_text(record[key], 0, Pictures(None))]
    for number, turn in enumerate(turns, start=1):
        if turn["from"] == "system" and turn["value"].strip():
            if number > 1:
                raise ConversationError(f"a system turn is not the first: it is turn {number}; put it first")
            texts.append(turn["value"])
    if len(set(texts)) > 1:
        raise ConversationError(f"the system text comes twice: as the key {key} and as the first turn; keep one")
    system = [{"from": "system", "value": text} for text in texts[:1]]
    return system + [turn for turn in turns if turn["from"] != "system"]
