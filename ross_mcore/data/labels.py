"""Labels: locates the answers of a conversation among its tokens, as the reference does.

Reference: train.py:620-893 (LLaVA's preprocessing); tests compare every token with recorded values.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from ross_mcore.batch import IGNORE_INDEX
from ross_mcore.data.conversation import IMAGE_PLACEHOLDER, IMAGE_TOKEN_INDEX, encode_text
from ross_mcore.data.spec import SampleSpec
from ross_mcore.data.tokenizer import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """A conversation as text and ids (cut to `spec.seq_length` only without images), with the inputs of masking."""

    text: str
    ids: list[int]
    num_images: int
    tokenizer: PreTrainedTokenizerBase
    answer_start: str
    round_end: str
    spec: SampleSpec

    def rounds(self) -> list[tuple[list[int], list[int]]]:
        """(ids of the round, ids of the round up to the answer) of every round before the first malformed one."""
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
        """Splits the row's ids into rounds, which saves tokenizing them again; empty if the ids could differ.

        They cannot differ if the tokenizer adds no token at the start of a text and every round ends with a special
        token, because special tokens split a text first.
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

    def present(self) -> int:
        """Number of ids that are not padding. As in the reference, a padding token in the text leads to a mismatch."""
        return len(self.ids) - self.ids.count(self.tokenizer.pad_token_id)


@lru_cache(maxsize=16)
def _special_end(text: str, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id of `text` if it is one special token and the tokenizer adds no tokens of its own."""
    ids = encode(text, tokenizer)
    return ids[0] if len(ids) == 1 and ids[0] in tokenizer.all_special_ids and not encode("", tokenizer) else None


def mask_byte_pairs(prompt: Prompt) -> tuple[list[int], bool]:
    """Labels for a tokenizer without BOS whose end-of-turn is one token (reference: preprocess_qwen_2).

    An answer starts at the first token where its round differs from its instruction. The reference supervises the
    end-of-turn between rounds but not the last one, so a model trained on single rounds does not learn to stop;
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

    The reference's constants count tokens: an instruction tokenised alone starts with BOS and ends with a token that
    merges with the answer (-2); after `</s>` a non-legacy tokenizer gives USER one token fewer (-1). With another
    tokenizer they fit a single round only (v1_qwen2).
    """
    shorter = int(not getattr(prompt.tokenizer, "legacy", False))
    return _mask_by_count(prompt, first_token=1, before_answer=2, later_rounds=shorter)


def mask_headers(prompt: Prompt) -> tuple[list[int], bool]:
    """Labels for a Llama 3 tokenizer: every round tokenised alone has a BOS, but the row has only the first."""
    return _mask_by_count(prompt, first_token=0, before_answer=0, later_rounds=1)


def _mask_by_count(
    prompt: Prompt, *, first_token: int, before_answer: int, later_rounds: int
) -> tuple[list[int], bool]:
    """Labels from the token counts of every round and of its instruction, each tokenised alone.

    `first_token`: start of the first round; `before_answer`: tokens to subtract from an instruction; `later_rounds`:
    tokens that later rounds have fewer in the row than alone. No token merges with a picture at the start of an answer;
    the reference, with one picture per sample, does not have this case.
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
    """Labels for `plain`: all tokens after BOS and an image at the start."""
    before = IMAGE_PLACEHOLDER if prompt.text.startswith(IMAGE_PLACEHOLDER) else ""
    start = len(encode_text(before, True, prompt.tokenizer))
    return [IGNORE_INDEX] * start + prompt.ids[start:], False
