"""Conversations -> token ids and labels: templates and the token-by-token label masking of the reference.

Behaviour: reference train.py:620-893 (LLaVA's preprocessing), confirmed token by token against recorded values.
Ids hold one IMAGE_TOKEN_INDEX per image until `expand_images` gives every image its place in the row.

The reference knows samples of one picture, which it moves to the start of its turn; theirs is its arithmetic, id by id.
Several pictures stay where their `<image>` stand, in any turn, and are meant in the order in which they stand. Those
that the text does not show come first, each on a line of its own at the start of the human's first turn; a text that
shows more than there are has no row (`require_pictures`).
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


class NothingLeft(ConversationError):
    """A good sample of which the options (template, row length, bounds) leave nothing to train on."""


@dataclass(frozen=True)
class Tokenized:
    """input_ids [L] with one IMAGE_TOKEN_INDEX per image, labels [L], unshifted.

    `mismatch`: the answers could not be located among the tokens, so that every label is IGNORE_INDEX; `text_tokens`:
    ids without the images', before any cut.
    """

    input_ids: list[int]
    labels: list[int]
    mismatch: bool
    text_tokens: int

    @property
    def image_spans(self) -> int:
        return self.input_ids.count(IMAGE_TOKEN_INDEX)

    @property
    def label_tokens(self) -> int:
        """Labels that a loss can use: none for the first token, which nothing predicts, nor for an image."""
        return sum(label not in (IGNORE_INDEX, IMAGE_TOKEN_INDEX) for label in self.labels[1:])


@dataclass(frozen=True)
class SampleBounds:
    """The most pictures, and tokens of text with its template (pictures not counted), that a sample may have."""

    images: int | None = None
    tokens: int | None = None

    @property
    def reasons(self) -> tuple[str, str]:
        """Why a sample is left out: its pictures, its tokens."""
        return f"it has over {self.images} pictures", f"its text is over {self.tokens} tokens"

    def require(self, num_images: int, text_tokens: int = 0) -> None:
        """Raises NothingLeft for a sample that has more."""
        for limit, number, reason in zip((self.images, self.tokens), (num_images, text_tokens), self.reasons):
            if limit is not None and number > limit:
                raise NothingLeft(reason)


UNBOUNDED = SampleBounds()


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
    num_images: int
    tokenizer: PreTrainedTokenizerBase
    style: Template
    max_length: int
    supervise_final_eos: bool

    def rounds(self) -> list[tuple[list[int], list[int]]]:
        """(ids of the round, ids of the round up to the answer), as far as rounds are well-formed."""
        found = []
        texts, shows = self.text.split(self.style.round_end), self.num_images > 0
        cut_out = self._rounds_cut_out()
        for number, text in enumerate(texts):
            parts = text.split(self.style.answer_start)
            if len(parts) != 2:
                break
            whole = cut_out[number] if len(cut_out) == len(texts) else _encode(text, shows, self.tokenizer)
            found.append((whole, _encode(parts[0] + self.style.answer_start, shows, self.tokenizer)))
        return found

    def _rounds_cut_out(self) -> list[list[int]]:
        """The ids of the rounds out of those of the row, which saves tokenizing them again; none where that may differ.

        It does not where no token opens a text and a special token, which splits text before anything else does, ends
        every round.
        """
        is_whole = self.num_images > 0 or len(self.ids) < self.max_length
        end = _special_end(self.style.round_end, self.tokenizer) if is_whole else None
        if end is None:
            return []
        rounds: list[list[int]] = [[]]
        for token in self.ids:
            if token == end:
                rounds.append([])
            else:
                rounds[-1].append(token)
        return rounds

    def require_shown(self) -> None:
        if self.num_images and IMAGE_PLACEHOLDER not in self.text:
            raise ConversationError("a picture but no <image> in the text")

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
    prompt.require_shown()
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
    `later_rounds`: tokens that rounds after the first have fewer in the row than alone. No piece merges with a picture
    that begins an answer; the reference, which has only one picture, does not see to that.
    """
    labels, start = list(prompt.ids), first_token
    labels[:start] = [IGNORE_INDEX] * len(labels[:start])
    for number, (whole, instruction) in enumerate(prompt.rounds()):
        shorter = later_rounds if number else 0
        alone = before_answer and prompt.num_images > 1 and whole[len(instruction) :][:1] == [IMAGE_TOKEN_INDEX]
        answer = start + len(instruction) - before_answer - shorter + bool(alone)
        labels[start:answer] = [IGNORE_INDEX] * len(labels[start:answer])
        start += len(whole) - shorter
    labels[start:] = [IGNORE_INDEX] * len(labels[start:])
    if start < prompt.max_length and start != prompt.present():
        return [IGNORE_INDEX] * len(labels), True
    return labels, False


def _mask_caption(prompt: _Prompt) -> tuple[list[int], bool]:
    """Labels for `plain`: everything after BOS and an image at the start.

    Raises ConversationError when no text shows the picture.
    """
    prompt.require_shown()
    before = IMAGE_PLACEHOLDER if prompt.text.startswith(IMAGE_PLACEHOLDER) else ""
    start = len(encode_with_images(before, prompt.tokenizer))
    return [IGNORE_INDEX] * start + prompt.ids[start:], False


def _write_caption(turns: list[Turn], style: Template) -> str:
    """The pictures of the instruction, which keeps nothing else, and the caption, or text that may show pictures too.

    What a caption is generated from shows a picture in any case.
    """
    pictures = IMAGE_PLACEHOLDER * (turns[0][1] or "").count(IMAGE_PLACEHOLDER)
    if turns[-1][1] is None:
        return pictures or IMAGE_PLACEHOLDER
    if len(turns) != 2:
        raise ConversationError("plain takes two turns, an instruction and a caption")
    return f"{pictures}{turns[1][1]}{style.round_end}"


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
    num_images: int,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    max_length: int,
    supervise_final_eos: bool = True,
    mm_use_im_start_end: bool = False,
) -> Tokenized:
    """Ids and labels of a LLaVA conversation, a list of {"from": "human" | "gpt", "value": text}.

    `num_images` (not the text) says whether `<image>` means a picture. As in the reference, only rows without a picture
    are cut to `max_length` here. `supervise_final_eos=False` gives the reference's labels for `qwen_2`.
    `mm_use_im_start_end` as in `write_prompt`.
    Raises ConversationError for a malformed conversation, KeyError for an unknown template.
    """
    style = TEMPLATES[template]
    text = write_prompt(conversations, num_images, template, mm_use_im_start_end=mm_use_im_start_end)
    shows_image = _shows_image(text, num_images, template)
    ids = _encode(text if style.tokenized else text.replace(style.round_end, ""), shows_image, tokenizer)
    text_tokens = len(ids) - ids.count(IMAGE_TOKEN_INDEX)
    if not shows_image:
        ids = ids[:max_length]
    prompt = _Prompt(text, ids, num_images, tokenizer, style, max_length, supervise_final_eos)
    labels, mismatch = style.mask(prompt)
    return Tokenized(ids, labels, mismatch, text_tokens)


def tokenize_prompt(
    conversations: Any,
    num_images: int,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    mm_use_im_start_end: bool = False,
) -> list[int]:
    """Ids to generate from: a conversation whose last turn is the human's, with the answer's role written after it.

    `plain` gives the images alone. In later rounds of `llama3` the reference leaves `<|eot_conversation|>` as text in
    what it generates from, though not in what it trains on; so does this. Raises as `write_prompt`.
    """
    text = write_prompt(conversations, num_images, template, True, mm_use_im_start_end)
    return _encode(text, _shows_image(text, num_images, template), tokenizer)


def write_prompt(
    conversations: Any,
    num_images: int,
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
    if num_images == 1:
        checked = [(role, _normalise_images(text)) for role, text in checked]
    elif num_images > 1:
        checked = _with_missing_images(checked, num_images)
    if num_images and mm_use_im_start_end:
        checked = [(role, text.replace(IMAGE_PLACEHOLDER, IMAGE_PLACEHOLDER_IN_TEXT)) for role, text in checked]
    turns: list[Turn] = [*checked]
    if generation:
        if turns[-1][0] != "human":
            raise ConversationError("nothing to answer: the last turn is not the human's")
        turns.append(("gpt", None))
    return style.write(turns, style)


def require_pictures(image_spans: int, num_images: int) -> None:
    """Raises ConversationError unless a text shows the sample's pictures, or, as the reference takes it, not its one.

    A picture that is not shown is not trained on.
    """
    if image_spans != num_images and (image_spans or num_images > 1):
        raise ConversationError(f"{image_spans} <image> in the text, {num_images} pictures")


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
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[int]]:
    """An expanded row's first `max_length` tokens and labels, and its images; the cut never goes through one.

    It ends before an image that it would cut. Raises NothingLeft when it loses images and leaves no image or no
    label: of one image, which the reference does not cut either, the loss is always too much.
    """
    kept = [start for start in starts if start + image_tokens <= max_length]
    if len(kept) == len(starts):
        return tokens[:max_length], labels[:max_length], starts
    end = min(max_length, starts[len(kept)])
    if not kept or not np.any(labels[1:end] != IGNORE_INDEX):
        raise NothingLeft(f"the cut at {max_length} tokens would go through a picture")
    return tokens[:end], labels[:end], kept


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
def _special_end(text: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that `text` is, in a tokenizer that adds none of its own."""
    ids = encode(text, tokenizer)
    return ids[0] if len(ids) == 1 and ids[0] in tokenizer.all_special_ids and not encode("", tokenizer) else None


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
        who = turn.get("from")
        if not isinstance(who, str) or (roles is not None and who not in roles):
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


def _with_missing_images(turns: list[tuple[str, str]], num_images: int) -> list[tuple[str, str]]:
    """Puts those of `num_images` pictures that no turn shows on lines of their own before the human's first text."""
    missing = num_images - sum(text.count(IMAGE_PLACEHOLDER) for _, text in turns)
    first = next((place for place, (role, _) in enumerate(turns) if role == "human"), None)
    if missing <= 0 or first is None:
        return turns
    role, text = turns[first]
    return [*turns[:first], (role, f"{IMAGE_PLACEHOLDER}\n" * missing + text), *turns[first + 1 :]]


def _shows_image(text: str, num_images: int, template: str) -> bool:
    """Whether `<image>` in a written conversation is a picture; in a caption it always is."""
    return num_images > 0 or (template == "plain" and IMAGE_PLACEHOLDER in text)
