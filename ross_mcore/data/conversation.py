"""Conversations -> token ids and labels: templates and the token-by-token label masking of the reference.

Behaviour: reference train.py:620-893 (LLaVA's preprocessing), confirmed token by token against recorded values.
Ids hold one IMAGE_TOKEN_INDEX per image until `expand_images` gives every image its place in the row.
Legend: L tokens of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ross_mcore.batch import IGNORE_INDEX
from ross_mcore.data.tokenizer import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE_TOKEN_INDEX = -200
IMAGE_PLACEHOLDER = "<image>"
IMAGE_PLACEHOLDER_IN_TEXT = "<im_start><image><im_end>"
ROLES = {"human": "USER", "gpt": "ASSISTANT"}
HEADERS = {
    "human": "<|start_header_id|>user<|end_header_id|>\n\n",
    "gpt": "<|start_header_id|>assistant<|end_header_id|>\n\n",
}
END_OF_TURN = "<|eot_id|>"

Turn = tuple[str, str | None]
"""(role, text) of a turn; the text is None where an answer is to be generated."""


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

    @property
    def label_tokens(self) -> int:
        """Labels that a loss can use: none for the first token, which nothing predicts, nor for an image."""
        return sum(label not in (IGNORE_INDEX, IMAGE_TOKEN_INDEX) for label in self.labels[1:])


@dataclass(frozen=True)
class Template:
    """How turns are written out, and which function finds the answers among the tokens.

    `system` opens the prompt, `answer_start` stands before and `round_end` after every answer. `write` gives the text
    of a conversation, `mask` its labels and whether they are a mismatch. A `round_end` that is not `tokenized` marks
    where rounds end and is taken out of a conversation before that becomes tokens.
    """

    system: str
    answer_start: str
    round_end: str
    write: Callable[[list[Turn], Template], str]
    mask: Callable[[_Prompt], tuple[list[int], bool]]
    tokenized: bool = True


@dataclass(frozen=True)
class _Prompt:
    """One written-out conversation, its ids (cut to `max_length` only without images) and what masking it needs."""

    text: str
    ids: list[int]
    has_image: bool
    tokenizer: PreTrainedTokenizerBase
    style: Template
    max_length: int
    supervise_final_eos: bool

    def rounds(self) -> list[tuple[list[int], list[int]]]:
        """(ids of the round, ids of the round up to the answer), as far as rounds are well-formed."""
        found = []
        for text in self.text.split(self.style.round_end):
            parts = text.split(self.style.answer_start)
            if len(parts) != 2:
                break
            instruction = parts[0] + self.style.answer_start
            found.append(
                (_encode(text, self.has_image, self.tokenizer), _encode(instruction, self.has_image, self.tokenizer))
            )
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
    With another tokenizer they fit a single round only (v1_qwen2). Raises ConversationError when no text shows the
    picture.
    """
    if prompt.has_image and IMAGE_PLACEHOLDER not in prompt.text:
        raise ConversationError("a picture but no <image> in the text")
    shorter = int(not getattr(prompt.tokenizer, "legacy", False))
    return _mask_by_count(prompt, first_token=1, before_answer=2, later_rounds=shorter)


def _mask_headers(prompt: _Prompt) -> tuple[list[int], bool]:
    """Labels for a Llama 3 tokenizer: a round tokenised alone gets a BOS, of which the row has the first only."""
    return _mask_by_count(prompt, first_token=0, before_answer=0, later_rounds=1)


def _mask_by_count(
    prompt: _Prompt, *, first_token: int, before_answer: int, later_rounds: int
) -> tuple[list[int], bool]:
    """Labels from the number of tokens that a round, and its part before the answer, have when tokenised alone.

    `first_token`: where the first round starts; `before_answer`: tokens to take off the part before an answer;
    `later_rounds`: tokens that rounds after the first have fewer in the row than alone.
    """
    labels, start = list(prompt.ids), first_token
    labels[:start] = [IGNORE_INDEX] * len(labels[:start])
    for number, (whole, instruction) in enumerate(prompt.rounds()):
        shorter = later_rounds if number else 0
        answer = start + len(instruction) - before_answer - shorter
        labels[start:answer] = [IGNORE_INDEX] * len(labels[start:answer])
        start += len(whole) - shorter
    labels[start:] = [IGNORE_INDEX] * len(labels[start:])
    if start < prompt.max_length and start != prompt.present():
        return [IGNORE_INDEX] * len(labels), True
    return labels, False


def _mask_caption(prompt: _Prompt) -> tuple[list[int], bool]:
    """Labels for `plain`: everything after BOS and the image."""
    start = len(encode_with_images(IMAGE_PLACEHOLDER, prompt.tokenizer))
    return [IGNORE_INDEX] * start + prompt.ids[start:], False


def _write_caption(turns: list[Turn], style: Template) -> str:
    """`<image>` and the caption, of which the instruction keeps nothing else."""
    if turns[-1][1] is None:
        return IMAGE_PLACEHOLDER
    if len(turns) != 2 or IMAGE_PLACEHOLDER not in (turns[0][1] or ""):
        raise ConversationError("plain takes two turns, the first with <image>")
    return f"{IMAGE_PLACEHOLDER}{turns[1][1]}{style.round_end}"


def _write_dialogue(turns: list[Turn], style: Template) -> str:
    """`<system> USER: q ASSISTANT: a<round_end>USER: ...`; a turn without text is its role and a colon alone."""
    ends = {"human": " ", "gpt": style.round_end}
    written = [f"{ROLES[role]}: {text}{ends[role]}" if text else f"{ROLES[role]}:" for role, text in _dialogue(turns)]
    return style.system + "".join(written)


def _write_headers(turns: list[Turn], style: Template) -> str:
    """A header, the text and `<|eot_id|>` for every turn; only an answer to be generated is its header alone."""
    ends = {"human": END_OF_TURN, "gpt": END_OF_TURN + style.round_end}
    return style.system + "".join(
        HEADERS[role] if text is None else f"{HEADERS[role]}{text}{ends[role]}" for role, text in _dialogue(turns)
    )


def _dialogue(turns: list[Turn]) -> list[Turn]:
    """The turns from the human's first on. Raises ConversationError unless they alternate."""
    turns = turns[1:] if turns[0][0] != "human" else turns
    if any(role != ("human", "gpt")[place % 2] for place, (role, _) in enumerate(turns)):
        raise ConversationError("the turns do not alternate between human and gpt")
    return turns


def _system(human: str) -> str:
    return (
        f"A chat between a curious {human} and an artificial intelligence assistant. "
        f"The assistant gives helpful, detailed, and polite answers to the {human}'s questions. "
    )


TEMPLATES = {
    "plain": Template("", "", "\n", _write_caption, _mask_caption),
    "qwen_2": Template(_system("human"), " ASSISTANT: ", "<|im_end|>", _write_dialogue, _mask_byte_pairs),
    "v1": Template(_system("user"), " ASSISTANT: ", "</s>", _write_dialogue, _mask_sentencepiece),
    "llama3": Template("", HEADERS["gpt"], "<|eot_conversation|>", _write_headers, _mask_headers, tokenized=False),
    "v1_qwen2": Template(_system("human"), " ASSISTANT: ", "<|im_end|>", _write_dialogue, _mask_sentencepiece),
}
"""Reference conversation.py:264-520 and the dispatch of train.py:881-893."""

TRAINING_TEMPLATES = tuple(name for name in TEMPLATES if name != "v1_qwen2")
"""What to train with. The labels of v1_qwen2 are all ignored beyond one round; its prompts are those of qwen_2."""


def tokenize_conversation(
    conversations: Any,
    has_image: bool,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_length: int,
    supervise_final_eos: bool = True,
    mm_use_im_start_end: bool = False,
) -> Tokenized:
    """Ids and labels of a LLaVA conversation, a list of {"from": "human" | "gpt", "value": text}.

    `has_image` (not the text) says whether `<image>` means a picture. As in the reference, only rows without a picture
    are cut to `max_length` here. `supervise_final_eos=False` gives the reference's labels for `qwen_2`.
    `mm_use_im_start_end` as in `write_prompt`.
    Raises ConversationError for a malformed conversation, KeyError for an unknown template.
    """
    style = TEMPLATES[template]
    text = write_prompt(conversations, has_image, template, mm_use_im_start_end=mm_use_im_start_end)
    shows_image = has_image or template == "plain"
    ids = _encode(text if style.tokenized else text.replace(style.round_end, ""), shows_image, tokenizer)
    if not shows_image:
        ids = ids[:max_length]
    prompt = _Prompt(text, ids, has_image, tokenizer, style, max_length, supervise_final_eos)
    labels, mismatch = style.mask(prompt)
    return Tokenized(ids, labels, mismatch)


def tokenize_prompt(
    conversations: Any,
    has_image: bool,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    mm_use_im_start_end: bool = False,
) -> list[int]:
    """Ids to generate from: a conversation whose last turn is the human's, with the answer's role written after it.

    `plain` gives the image alone. In later rounds of `llama3` the reference leaves `<|eot_conversation|>` as text in
    what it generates from, though not in what it trains on; so does this. Raises as `write_prompt`.
    """
    text = write_prompt(conversations, has_image, template, True, mm_use_im_start_end)
    return _encode(text, has_image or template == "plain", tokenizer)


def write_prompt(
    conversations: Any,
    has_image: bool,
    template: str,
    generation: bool = False,
    mm_use_im_start_end: bool = False,
) -> str:
    """The text of a conversation, one `<image>` a picture; with `generation`, up to where the next answer begins.

    `mm_use_im_start_end` puts the plain text `<im_start>` and `<im_end>` around every `<image>`.
    Raises ConversationError for a malformed conversation, KeyError for an unknown template.
    """
    style = TEMPLATES[template]
    checked = check_turns(conversations)
    if has_image:
        placeholder = IMAGE_PLACEHOLDER_IN_TEXT if mm_use_im_start_end else IMAGE_PLACEHOLDER
        checked = [(role, _normalise_images(text, placeholder)) for role, text in checked]
    turns: list[Turn] = [*checked]
    if generation:
        if turns[-1][0] != "human":
            raise ConversationError("nothing to answer: the last turn is not the human's")
        turns.append(("gpt", None))
    return style.write(turns, style)


def count_words(conversations: Any) -> int:
    """Words of all turns, split at white space: the length by which the reference's sampler groups samples.

    Turns that have no text count nothing, so that any record has a length.
    """
    turns = conversations if isinstance(conversations, list) else []
    texts = [turn.get("value") for turn in turns if isinstance(turn, dict)]
    return sum(len(text.split()) for text in texts if isinstance(text, str))


def expand_images(
    input_ids: list[int], labels: list[int], image_tokens: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[int]]:
    """Gives every image `image_tokens` zeros without labels: (tokens [L], labels [L], first token of every image)."""
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
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """An expanded row's first `max_length` tokens and labels. Raises ConversationError when that cuts a picture."""
    if starts and starts[-1] + image_tokens > max_length:
        raise ConversationError(f"the cut at {max_length} tokens would go through a picture")
    return tokens[:max_length], labels[:max_length]


def _encode(text: str, has_image: bool, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return encode_with_images(text, tokenizer) if has_image else encode(text, tokenizer)


def encode_with_images(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokenises the text between `<image>` placeholders piece by piece, keeping the first BOS only (mm_utils:192)."""
    opening, *pieces = text.split(IMAGE_PLACEHOLDER)
    ids = list(_encode_opening(opening, tokenizer) if pieces else encode(opening, tokenizer))
    skip = int(bool(ids) and ids[0] == tokenizer.bos_token_id)
    for piece in pieces:
        ids.append(IMAGE_TOKEN_INDEX)
        ids.extend(encode(piece, tokenizer)[skip:])
    return ids


@lru_cache(maxsize=16)
def _encode_opening(text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What stands before the first picture: in most conversations the system text, the same every time."""
    return tuple(encode(text, tokenizer))


def check_turns(conversations: Any, roles: tuple[str, ...] | None = ("human", "gpt")) -> list[tuple[str, str]]:
    """(role, text) of every turn; `roles` None lets every role pass.

    Raises ConversationError when the value is not a list of well-formed turns.
    """
    if not isinstance(conversations, list) or not conversations:
        raise ConversationError("conversations is not a list of turns")
    turns = []
    for turn in conversations:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise ConversationError("a turn has no text")
        if roles is not None and turn.get("from") not in roles:
            raise ConversationError("a turn is neither the human's nor the gpt's")
        try:
            turn["value"].encode("utf-8")
        except UnicodeEncodeError:
            raise ConversationError("a turn is not valid Unicode") from None
        turns.append((turn["from"], turn["value"]))
    return turns


def _normalise_images(text: str, placeholder: str) -> str:
    """A turn shows its picture once, on a line of its own at the start (reference: preprocess_multimodal)."""
    if IMAGE_PLACEHOLDER not in text:
        return text
    return f"{IMAGE_PLACEHOLDER}\n{text.replace(IMAGE_PLACEHOLDER, '').strip()}".strip().replace(
        IMAGE_PLACEHOLDER, placeholder
    )
