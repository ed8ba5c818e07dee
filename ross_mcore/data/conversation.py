"""Conversations: turns, the pictures that they show, and the places of the pictures in a row of token ids.

Ids contain one IMAGE_TOKEN_INDEX per image until `expand_images` inserts the tokens of every image.

The reference has at most one picture in a sample and moves it to the start of its turn; so do we, with equal ids.
Several pictures stay at their `<image>`, in any turn, in text order. Pictures that the text does not show are put
first, each on its own line at the start of the human's first turn; a text that shows more pictures than the sample has
is an error (`require_pictures`). A first turn of the gpt's is dropped, as in the reference. templates.py turns
conversations into text.
Legend: L tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ross_mcore.batch import IGNORE_INDEX
from ross_mcore.data.tokenizer import encode
from ross_mcore.errors import ConversationError, NothingLeft

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE_TOKEN_INDEX = -200
IMAGE_PLACEHOLDER = "<image>"


@dataclass(frozen=True)
class SampleBounds:
    """Maximum numbers of pictures and of text tokens (template included, pictures not) in a sample; None: no limit."""

    images: int | None = None
    tokens: int | None = None

    @property
    def reasons(self) -> tuple[str, str]:
        """Reasons for skipping a sample: too many pictures, too many tokens."""
        return f"it has over {self.images} pictures", f"its text is over {self.tokens} tokens"

    def require(self, num_images: int, text_tokens: int = 0) -> None:
        """Raises NothingLeft for a sample above a limit."""
        for limit, number, reason in zip((self.images, self.tokens), (num_images, text_tokens), self.reasons):
            if limit is not None and number > limit:
                raise NothingLeft(reason)


class Dialogue(NamedTuple):
    """The system text, None where the conversation has none, and (role, text) of every other turn."""

    system: str | None
    turns: list[tuple[str, str]]


def check_turns(conversations: Any, roles: tuple[str, ...] | None = ("human", "gpt")) -> list[tuple[str, str]]:
    """(role, text) of every turn; `roles` None allows every role, others allow `system` too, in the first place.

    Raises ConversationError when the value is not a list of well-formed turns.
    """
    if not isinstance(conversations, list) or not conversations:
        raise ConversationError("conversations is not a list of turns")
    turns: list[tuple[str, str]] = []
    for turn in conversations:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise ConversationError("a turn has no text")
        who = turn.get("from")
        if who == "system" and turns and roles is not None:
            raise ConversationError("a system turn is not the first turn")
        if not isinstance(who, str) or (roles is not None and who not in (*roles, "system")):
            raise ConversationError("a turn is neither the human's nor the gpt's")
        try:
            turn["value"].encode("utf-8")
        except UnicodeEncodeError:
            raise ConversationError("a turn is not valid Unicode") from None
        turns.append((turn["from"], turn["value"]))
    return turns


def count_words(conversations: Any) -> int:
    """Number of words of all turns, split at white space: the length by which the reference's sampler groups samples.

    Turns without text count as 0 words, so that any record has a length.
    """
    turns = conversations if isinstance(conversations, list) else []
    texts = [turn.get("value") for turn in turns if isinstance(turn, dict)]
    return sum(len(text.split()) for text in texts if isinstance(text, str))


def normalise_images(text: str) -> str:
    """Moves a turn's `<image>` to a line of its own at the start (reference: preprocess_multimodal)."""
    if IMAGE_PLACEHOLDER not in text:
        return text
    return f"{IMAGE_PLACEHOLDER}\n{text.replace(IMAGE_PLACEHOLDER, '').strip()}".strip()


def as_dialogue(conversations: Any, num_images: int) -> Dialogue:
    """A conversation as it is trained on: it begins with the human and shows its pictures.

    Raises ConversationError when it is not a list of well-formed turns, or has no turn of the human.
    """
    turns = check_turns(conversations)
    system = turns.pop(0)[1] if turns[0][0] == "system" else None
    if turns and turns[0][0] != "human":
        turns = turns[1:]
    if not turns:
        raise ConversationError("nothing to answer: no turn is the human's")
    turns = with_missing_images(turns, num_images)
    if num_images == 1:
        turns = [(role, normalise_images(text)) for role, text in turns]
    return Dialogue(system, turns)


def with_missing_images(turns: list[tuple[str, str]], num_images: int) -> list[tuple[str, str]]:
    """Puts an `<image>` line before the human's first text for each of `num_images` pictures that no turn shows."""
    missing = num_images - sum(text.count(IMAGE_PLACEHOLDER) for _, text in turns)
    first = next((place for place, (role, _) in enumerate(turns) if role == "human"), None)
    if missing <= 0 or first is None:
        return turns
    role, text = turns[first]
    return [*turns[:first], (role, f"{IMAGE_PLACEHOLDER}\n" * missing + text), *turns[first + 1 :]]


def require_pictures(image_spans: int, num_images: int) -> None:
    """Raises ConversationError unless a text shows all of the sample's pictures."""
    if image_spans != num_images:
        raise ConversationError(f"{image_spans} <image> in the text, {num_images} pictures")


def encode_text(text: str, has_image: bool, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a text; `<image>` is a picture if `has_image`, else ordinary text.

    The texts between pictures are tokenized separately, and only the first BOS is kept (reference: mm_utils.py:192).
    """
    if not has_image:
        return encode(text, tokenizer)
    opening, *pieces = text.split(IMAGE_PLACEHOLDER)
    ids = list(_encode_opening(opening, tokenizer) if pieces else encode(opening, tokenizer))
    skip = int(bool(ids) and ids[0] == tokenizer.bos_token_id)
    for piece in pieces:
        ids.append(IMAGE_TOKEN_INDEX)
        ids.extend(encode(piece, tokenizer)[skip:])
    return ids


@lru_cache(maxsize=16)
def _encode_opening(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids of the text before the first picture: in most conversations the system text, always the same."""
    return tuple(encode(text, tokenizer))


def expand_images(
    input_ids: list[int], labels: list[int], image_tokens: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[int]]:
    """Replaces every image by `image_tokens` zeros without labels: (tokens [L], labels [L], starts of the images)."""
    if len(input_ids) != len(labels):
        raise ValueError(f"{len(input_ids)} tokens, but {len(labels)} labels")
    ids = np.array(input_ids, np.int64)
    is_image = ids == IMAGE_TOKEN_INDEX
    repeats = np.where(is_image, image_tokens, 1)
    starts = (np.cumsum(repeats) - repeats)[is_image].tolist()
    tokens = np.repeat(np.where(is_image, 0, ids), repeats)
    return tokens, np.repeat(np.where(is_image, IGNORE_INDEX, np.array(labels, np.int64)), repeats), starts


def cut_row(
    tokens: NDArray[np.int64], labels: NDArray[np.int64], starts: list[int], image_tokens: int, max_length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[int]]:
    """The first `max_length` tokens and labels of an expanded row, and its images; the row ends before a cut image.

    Raises NothingLeft when images are lost and no image or no label remains.
    """
    kept = [start for start in starts if start + image_tokens <= max_length]
    if len(kept) == len(starts):
        return tokens[:max_length], labels[:max_length], starts
    end = min(max_length, starts[len(kept)])
    if not kept or not np.any(labels[1:end] != IGNORE_INDEX):
        raise NothingLeft(f"the cut at {max_length} tokens would go through a picture")
    return tokens[:end], labels[:end], kept
