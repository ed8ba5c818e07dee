"""Labels: where the answers of a written-out conversation are among its tokens, as the reference finds them.

Behaviour: reference train.py:620-893 (LLaVA's preprocessing), confirmed token by token against recorded values.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from ross_mcore.batch import IGNORE_INDEX
from ross_mcore.data.conversation import IMAGE_PLACEHOLDER, IMAGE_TOKEN_INDEX, encode_text, encode_with_images
from ross_mcore.data.spec import SampleSpec
from ross_mcore.data.tokenizer import encode
from ross_mcore.errors import ConversationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """One written-out conversation, its ids (cut to `spec.seq_length` only without images) and what masking needs."""

    text: str
    ids: list[int]
    num_images: int
    tokenizer: PreTrainedTokenizerBase
    answer_start: str
    round_end: str
    spec: SampleSpec

    def rounds(self) -> list[tuple[list[int], list[int]]]:
        """(ids of the round, ids of the round up to the answer), as far as rounds are well-formed."""
        found = []
        texts, shows = self.text.split(self.round_end), self.num_images > 0
        cut_out = self._rounds_cut_out()
        for number, text in enumerate(texts):
            parts = text.split(self.answer_start)
            if len(parts) != 2:
                break
            whole = cut_out[number] if len(cut_out) == len(texts) else encode_text(text, shows, self.tokenizer)
            found.append((whole, encode_text(parts[0] + self.answer_start, shows, self.tokenizer)))
        return found

    def _rounds_cut_out(self) -> list[list[int]]:
        """The ids of the rounds out of those of the row, which saves tokenizing them again; none where that may differ.

        It does not where no token opens a text and a special token, which splits text before anything else does, ends
        every round.
        """
        is_whole = self.num_images > 0 or len(self.ids) < self.spec.seq_length
        end = _special_end(self.round_end, self.tokenizer) if is_whole else None
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
        """Raises ConversationError when no text shows the picture."""
        if self.num_images and IMAGE_PLACEHOLDER not in self.text:
            raise ConversationError("a picture but no <image> in the text")

    def present(self) -> int:
        """Ids that are not padding: a padding token in the text shortens the row (and so is a mismatch), as ever."""
        return len(self.ids) - self.ids.count(self.tokenizer.pad_token_id)


@lru_cache(maxsize=16)
def _special_end(text: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that `text` is, in a tokenizer that adds none of its own."""
    ids = encode(text, tokenizer)
    return ids[0] if len(ids) == 1 and ids[0] in tokenizer.all_special_ids and not encode("", tokenizer) else None


def mask_byte_pairs(prompt: Prompt) -> tuple[list[int], bool]:
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
    if end < prompt.spec.seq_length and not complete:
        return [IGNORE_INDEX] * len(ids), True
    keep = end + (complete and prompt.spec.supervise_final_eos)
    labels[keep:] = [IGNORE_INDEX] * len(labels[keep:])
    return labels, False


def mask_sentencepiece(prompt: Prompt) -> tuple[list[int], bool]:
    """Labels for a Llama tokenizer: BOS, and `</s>` inside the round's tokens (reference: preprocess_v1).

    The constants of the reference count pieces: an instruction tokenised alone ends in one piece that the answer
    merges with and starts with BOS (-2); after `</s>` a non-legacy tokenizer writes USER as one piece fewer (-1).
    With another tokenizer they fit a single round only (v1_qwen2). Raises ConversationError when no text shows the
    picture.
    """
    prompt.require_shown()
    shorter = int(not getattr(prompt.tokenizer, "legacy", False))
    return _mask_by_count(prompt, first_token=1, before_answer=2, later_rounds=shorter)


def mask_headers(prompt: Prompt) -> tuple[list[int], bool]:
    """Labels for a Llama 3 tokenizer: a round tokenised alone gets a BOS, of which the row has the first only."""
    return _mask_by_count(prompt, first_token=0, before_answer=0, later_rounds=1)


def _mask_by_count(
    prompt: Prompt, *, first_token: int, before_answer: int, later_rounds: int
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
    if start < prompt.spec.seq_length and start != prompt.present():
        return [IGNORE_INDEX] * len(labels), True
    return labels, False


def mask_caption(prompt: Prompt) -> tuple[list[int], bool]:
    """Labels for `plain`: everything after BOS and an image at the start.

    Raises ConversationError when no text shows the picture.
    """
    prompt.require_shown()
    before = IMAGE_PLACEHOLDER if prompt.text.startswith(IMAGE_PLACEHOLDER) else ""
    start = len(encode_with_images(before, prompt.tokenizer))
    return [IGNORE_INDEX] * start + prompt.ids[start:], False
