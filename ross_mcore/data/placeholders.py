"""Placeholders: other trainers' marks of a picture in a text -> `<image>`. PLACEHOLDERS is the table."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ross_mcore.checked import shown
from ross_mcore.data.conversation import IMAGE_PLACEHOLDER as IMAGE
from ross_mcore.errors import ConversationError


@dataclass(frozen=True)
class Placeholder:
    """Another trainer's mark of a picture, or of what is not read: `becomes` is empty for the latter.

    A group of `pattern` is the picture's number; the marks must be in the order of the pictures. `alone`: also ordinary
    text (HTML), so that it counts only at the start or the end of what the human says, unless the record has pictures
    and no `<image>`.
    """

    pattern: str
    becomes: str = IMAGE
    alone: bool = False
    remedy: str = "leave the record out"


PLACEHOLDERS = (
    Placeholder(r"<\|vision_start\|>(?:<image>|(?:<\|image_pad\|>)+)<\|vision_end\|>"),  # Qwen-VL
    Placeholder(r"<\|image_pad\|>"),
    Placeholder(r"<\|begin_of_image\|>(?:<image>|(?:<\|image\|>)+)<\|end_of_image\|>"),  # GLM
    Placeholder(r"<\|image\|>"),  # Llama 3.2
    Placeholder(r"<\|image_(\d{1,5})\|>"),  # Phi
    Placeholder(r"<[Ii]mage[ _-]?(\d{1,5})>"),  # MMMU
    Placeholder(r"<[Ii]mg>(?:<image>|<ImageHere>)</[Ii]mg>"),  # MiniGPT-4
    Placeholder(r"<ImageHere>"),  # InternLM-XComposer
    Placeholder(r"<img>(?:<IMG_CONTEXT>)+</img>"),  # InternVL
    Placeholder(r"<IMG_CONTEXT>"),
    Placeholder(r"<img></img>"),
    Placeholder(
        r"<img>[^<>\n]{1,1000}</img>", "", remedy="name the picture under image and write <image> in the text"
    ),  # Qwen-VL, first version
    Placeholder(r"\(<image>\./</image>\)|<image>\./</image>"),  # MiniCPM-V
    Placeholder(r"<image></image>|<image ?/>"),
    Placeholder(r"<fake_token_around_image><image><fake_token_around_image>"),  # Idefics
    Placeholder(r"<image_placeholder>|<IMAGE_PLACEHOLDER>|<image_token>|<image_here>"),  # DeepSeek-VL
    Placeholder(r"<start_of_image>|<image_soft_token>|<\|media_pad\|>"),  # Gemma, Kimi-VL
    Placeholder(r"\[IMG\](?!\s*https?:)", alone=True),  # Pixtral
    Placeholder(r"<IMAGE>|<Image>|<IMG>|<Img>|<img>", alone=True),
    Placeholder(r"<im_patch>", "", remedy="write <image> for each picture"),
    Placeholder(r"<video>|<VIDEO>|<Video>", "", alone=True),
    Placeholder(r"<\|video_pad\|>|<\|video\|>|<VideoHere>|<video_placeholder>", ""),
    Placeholder(r"<audio>|<AUDIO>|<Audio>", "", alone=True),
    Placeholder(r"<\|audio\|>|<\|AUDIO\|>|<\|audio_pad\|>|<\|audio_bos\|>|<AudioHere>", ""),
    Placeholder(r"<bbox>|<ref-object>", "", remedy="write the objects of ms-swift's grounding data in the text"),
)
"""Replaced from top to bottom: what holds another placeholder comes before it."""
_PATTERNS = [re.compile(placeholder.pattern) for placeholder in PLACEHOLDERS]
_ANY = re.compile("|".join(placeholder.pattern for placeholder in PLACEHOLDERS))


def with_our_placeholders(record: dict[str, Any], num_images: int) -> dict[str, Any]:
    """The record with every placeholder as `<image>`. Raises ConversationError, see `normalise`."""
    turns = record["conversations"]
    texts = [turn["value"] for turn in turns]
    if any(map(_ANY.search, texts)):
        for placeholder, pattern in zip(PLACEHOLDERS, _PATTERNS, strict=True):
            texts = _replaced(texts, [turn["from"] for turn in turns], placeholder, pattern, num_images)
    if not num_images:
        for number, text in enumerate(texts, start=1):
            if IMAGE in text:
                raise ConversationError(f"a placeholder without a picture: {IMAGE} in turn {number}")
    if texts == [turn["value"] for turn in turns]:
        return record
    turns = [{**turn, "value": text} for turn, text in zip(turns, texts, strict=True)]
    return {**record, "conversations": turns}


def _replaced(
    texts: list[str], roles: list[str], placeholder: Placeholder, pattern: re.Pattern[str], num_images: int
) -> list[str]:
    """The texts of all turns with one kind of placeholder replaced."""
    anywhere = not placeholder.alone or bool(num_images and placeholder.becomes and not any(IMAGE in t for t in texts))
    numbers: list[int] = []
    done = []
    for turn, (text, role) in enumerate(zip(texts, roles, strict=True), start=1):
        pieces, end = [], 0
        for match in pattern.finditer(text):
            if not anywhere and (role != "human" or not _at_an_end(match)):
                continue
            mark = f"{shown(match[0])} in turn {turn}"
            if not placeholder.becomes:
                raise ConversationError(f"a placeholder that is not read: {mark}; {placeholder.remedy}")
            if not num_images:
                raise ConversationError(f"a placeholder without a picture: {mark}")
            numbers += [int(number) for number in match.groups()]
            pieces += [text[end : match.start()], placeholder.becomes]
            end = match.end()
        done.append("".join([*pieces, text[end:]]))
    if numbers and (numbers[0] > 1 or numbers != list(range(numbers[0], numbers[0] + len(numbers)))):
        raise ConversationError(
            f"placeholders are not in the order of the pictures: {shown(numbers)}; name the pictures in the order of "
            "the text and write <image> for each"
        )
    return done


_WITHOUT_PICTURE = re.compile(r"a placeholder (?:that is not read|without a picture): ['\"]?(.+?)['\"]? in turn \d+")
_TOO_MANY = re.compile(r"(\d+) <image> in the text, (\d+) pictures")
"""The reason of conversation.require_pictures."""


def placeholder_of(reason: str) -> str | None:
    """The placeholder that has no picture, from the reason of a ConversationError; None for another reason."""
    if match := _WITHOUT_PICTURE.match(reason):
        return match[1]
    match = _TOO_MANY.match(reason)
    return IMAGE if match and int(match[1]) > int(match[2]) else None


def _at_an_end(match: re.Match[str]) -> bool:
    """Whether nothing but equal placeholders is before or after a match."""
    around = match.string[: match.start()], match.string[match.end() :]
    return any(not match.re.sub("", text).strip() for text in around)
