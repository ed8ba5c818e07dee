"""Conversations -> token ids and labels: templates and the token-by-token label masking of the reference.

Behaviour: reference train.py:620-893 (LLaVA's preprocessing), confirmed token by token against recorded values.
Ids hold one IMAGE_TOKEN_INDEX per image until `expand_images` gives every image its place in the row.
Legend: L tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ross_mcore.batch import IGNORE_INDEX
from ross_mcore.data.tokenizer import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE_TOKEN_INDEX = -200
IMAGE_PLACEHOLDER = "<image>"
ROLES = {"human": "USER", "gpt": "ASSISTANT"}
ANSWER_START = " ASSISTANT: "


class ConversationError(ValueError):
    """A conversation that cannot become a row; the message is a short reason, meant to be counted."""


@dataclass(frozen=True)
class Tokenized:
    """input_ids [L] with one IMAGE_TOKEN_INDEX per image, labels [L], unshifted.

    `mismatch`: the answers could not be located among the tokens, so that every label is IGNORE_INDEX.
    """

    input_ids: list[int]
    labels: list[int]
    mismatch: bool = False

    @property
    def image_spans(self) -> int:
        return self.input_ids.count(IMAGE_TOKEN_INDEX)


@dataclass(frozen=True)
class Template:
    """How turns are written out, and which function finds the answers among the tokens.

    `system` opens the prompt and `round_end` closes every answer; `mask` returns the labels of one conversation.
    """

    system: str
    round_end: str
    mask: Callable[[_Prompt], tuple[list[int], bool]]


@dataclass(frozen=True)
class _Prompt:
    """One written-out conversation, its ids (cut to `max_length` only without images) and what masking it needs."""

    text: str
    ids: list[int]
    has_image: bool
    tokenizer: PreTrainedTokenizerBase
    round_end: str
    max_length: int
    supervise_final_eos: bool

    def encode(self, text: str) -> list[int]:
        return encode_with_images(text, self.tokenizer) if self.has_image else encode(text, self.tokenizer)

    def rounds(self) -> list[tuple[list[int], list[int]]]:
        """(ids of the round, ids of the round up to the answer), as far as rounds are well-formed."""
        found = []
        for text in self.text.split(self.round_end):
            parts = text.split(ANSWER_START)
            if len(parts) != 2:
                break
            found.append((self.encode(text), self.encode(parts[0] + ANSWER_START)))
        return found

    def present(self) -> int:
        """Ids that are not padding: a padding token in the text shortens the row (and so is a mismatch), as ever."""
        return len(self.ids) - self.ids.count(self.tokenizer.pad_token_id)


def _mask_byte_pairs(prompt: _Prompt) -> tuple[list[int], bool]:
    """Labels for a tokenizer without BOS whose end-of-turn is one token (reference: preprocess_qwen_2).

    An answer starts where the tokens of its round leave those of its instruction. The reference supervises the
    end-of-turn between rounds but never the last one, so that a single-turn model does not learn to stop:
    `supervise_final_eos` adds that label.
    """
    ids, labels, start = prompt.ids, list(prompt.ids), 0
    for whole, instruction in prompt.rounds():
        differ = (place for place, (a, b) in enumerate(zip(whole, instruction, strict=False)) if a != b)
        answer = start + next(differ, min(len(whole), len(instruction)))
        labels[start:answer] = [IGNORE_INDEX] * len(labels[start:answer])
        start += len(whole) + 1
    end = max(0, start - 1)
    complete = end == prompt.present() - 1
    if end < prompt.max_length and not complete:
        return [IGNORE_INDEX] * len(ids), True
    keep = end + (complete and prompt.supervise_final_eos)
    labels[keep:] = [IGNORE_INDEX] * len(labels[keep:])
    return labels, False


def _mask_sentencepiece(prompt: _Prompt) -> tuple[list[int], bool]:
    """Labels for a Llama tokenizer: BOS, and `</s>` inside the round's tokens (reference: preprocess_v1).

    The constants of the reference count pieces: an instruction tokenised alone ends in one piece that the answer
    merges with and starts with BOS (-2); after `</s>` a non-legacy tokenizer writes USER as one piece fewer (-1).
    """
    ids, labels, start = prompt.ids, list(prompt.ids), 1
    labels[:1] = [IGNORE_INDEX] * min(1, len(ids))
    for number, (whole, instruction) in enumerate(prompt.rounds()):
        shorter = int(number > 0 and not getattr(prompt.tokenizer, "legacy", False))
        answer = start + len(instruction) - 2 - shorter
        labels[start:answer] = [IGNORE_INDEX] * len(labels[start:answer])
        start += len(whole) - shorter
    labels[start:] = [IGNORE_INDEX] * len(labels[start:])
    if start < prompt.max_length and start != prompt.present():
        return [IGNORE_INDEX] * len(ids), True
    return labels, False


def _mask_caption(prompt: _Prompt) -> tuple[list[int], bool]:
    """Labels for `plain`: everything after BOS and the image."""
    start = len(encode_with_images(IMAGE_PLACEHOLDER, prompt.tokenizer))
    return [IGNORE_INDEX] * start + prompt.ids[start:], False


def _system(human: str) -> str:
    return (
        f"A chat between a curious {human} and an artificial intelligence assistant. "
        f"The assistant gives helpful, detailed, and polite answers to the {human}'s questions. "
    )


TEMPLATES = {
    "plain": Template("", "\n", _mask_caption),
    "qwen_2": Template(_system("human"), "<|im_end|>", _mask_byte_pairs),
    "v1": Template(_system("user"), "</s>", _mask_sentencepiece),
}
"""Reference conversation.py:264-520. llama3 (header tokens) and v1_qwen2 belong here when they are implemented."""


def tokenize_conversation(
    conversations: Any,
    has_image: bool,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_length: int,
    supervise_final_eos: bool = True,
) -> Tokenized:
    """Ids and labels of a LLaVA conversation, a list of {"from": "human" | "gpt", "value": text}.

    `has_image` (not the text) says whether `<image>` means a picture. As in the reference, only rows without a picture
    are cut to `max_length` here. `supervise_final_eos=False` gives the reference's labels for `qwen_2`.
    Raises ConversationError for a malformed conversation, KeyError for an unknown template.
    """
    style = TEMPLATES[template]
    turns = _checked_turns(conversations)
    if has_image:
        turns = [(role, _normalise_images(text)) for role, text in turns]
    if template == "plain":
        text = _write_caption(turns)
    else:
        text = _write_dialogue(turns, style)
        if has_image and template == "v1" and IMAGE_PLACEHOLDER not in text:
            raise ConversationError("a picture but no <image> in the text")
    if has_image or template == "plain":
        ids = encode_with_images(text, tokenizer)
    else:
        ids = encode(text, tokenizer)[:max_length]
    prompt = _Prompt(text, ids, has_image, tokenizer, style.round_end, max_length, supervise_final_eos)
    labels, mismatch = style.mask(prompt)
    return Tokenized(ids, labels, mismatch)


def tokenize_prompt(
    conversations: Any, has_image: bool, tokenizer: PreTrainedTokenizerBase, template: str
) -> list[int]:
    """Ids to generate from: a conversation whose last turn is the human's, with the answer's role written after it.

    `plain` takes one turn and gives the image alone. Raises ConversationError and KeyError as `tokenize_conversation`.
    """
    style = TEMPLATES[template]
    turns = _checked_turns(conversations)
    if has_image:
        turns = [(role, _normalise_images(text)) for role, text in turns]
    if template == "plain":
        return encode_with_images(IMAGE_PLACEHOLDER, tokenizer)
    if turns[-1][0] != "human":
        raise ConversationError("nothing to answer: the last turn is not the human's")
    text = _write_dialogue([*turns, ("gpt", "")], style)
    return encode_with_images(text, tokenizer) if has_image else encode(text, tokenizer)


def expand_images(
    input_ids: list[int], labels: list[int], image_tokens: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[int]]:
    """Gives every image `image_tokens` zeros without labels: (tokens [L], labels [L], first token of every image)."""
    tokens_out: list[int] = []
    labels_out: list[int] = []
    starts = []
    for token, label in zip(input_ids, labels, strict=True):
        if token == IMAGE_TOKEN_INDEX:
            starts.append(len(tokens_out))
            tokens_out.extend([0] * image_tokens)
            labels_out.extend([IGNORE_INDEX] * image_tokens)
        else:
            tokens_out.append(token)
            labels_out.append(label)
    return np.array(tokens_out, np.int64), np.array(labels_out, np.int64), starts


def encode_with_images(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenises the text between `<image>` placeholders piece by piece, keeping the first BOS only (mm_utils:192)."""
    pieces = [encode(piece, tokenizer) for piece in text.split(IMAGE_PLACEHOLDER)]
    skip = int(bool(pieces[0]) and pieces[0][0] == tokenizer.bos_token_id)
    ids = list(pieces[0])
    for piece in pieces[1:]:
        ids.append(IMAGE_TOKEN_INDEX)
        ids.extend(piece[skip:])
    return ids


def _checked_turns(conversations: Any) -> list[tuple[str, str]]:
    """(role, text) of every turn. Raises ConversationError when the value is not a list of well-formed turns."""
    if not isinstance(conversations, list) or not conversations:
        raise ConversationError("conversations is not a list of turns")
    turns = []
    for turn in conversations:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise ConversationError("a turn has no text")
        if turn.get("from") not in ("human", "gpt"):
            raise ConversationError("a turn is neither the human's nor the gpt's")
        try:
            turn["value"].encode("utf-8")
        except UnicodeEncodeError:
            raise ConversationError("a turn is not valid Unicode") from None
        turns.append((turn["from"], turn["value"]))
    return turns


def _normalise_images(text: str) -> str:
    """A turn shows its picture once, on a line of its own at the start (reference: preprocess_multimodal)."""
    if IMAGE_PLACEHOLDER not in text:
        return text
    return f"{IMAGE_PLACEHOLDER}\n{text.replace(IMAGE_PLACEHOLDER, '').strip()}".strip()


def _write_caption(turns: list[tuple[str, str]]) -> str:
    if len(turns) != 2 or IMAGE_PLACEHOLDER not in turns[0][1]:
        raise ConversationError("plain takes two turns, the first with <image>")
    return f"{IMAGE_PLACEHOLDER}{turns[1][1]}\n"


def _write_dialogue(turns: list[tuple[str, str]], style: Template) -> str:
    """`<system> USER: q ASSISTANT: a<round_end>USER: ...`; a turn without text is its role and a colon alone."""
    turns = turns[1:] if turns[0][0] != "human" else turns
    if any(role != ("human", "gpt")[place % 2] for place, (role, _) in enumerate(turns)):
        raise ConversationError("the turns do not alternate between human and gpt")
    written = [style.system]
    for place, (role, text) in enumerate(turns):
        end = (" ", style.round_end)[place % 2]
        written.append(f"{ROLES[role]}: {text}{end}" if text else f"{ROLES[role]}:")
    return "".join(written)
