"""How an answer is read, as the public scorers do without a judge model: text -> what was recognised, or None.

Sources: haotian-liu/LLaVA llava/eval/eval_pope.py; Haochen-Wang409/ross evaluation/MMVP/mmvp_test.py; and for the rest
open-compass/VLMEvalKit with `--judge exact_matching`: vlmeval/dataset/utils/yorn.py, vlmeval/utils/matching_util.py.
"""

from __future__ import annotations

import re

from ross_mcore.evaluation.items import Item

YES, NO = "yes", "no"
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
AROUND_LETTERS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
LAST_WORDS = 5
"""An option's letter is the answer when it is among the last words."""
NAMED_LETTER = re.compile(r"(?i)(?:correct\s+)?answer\s+is\s+\**([ABCD])\**")
ANSWER_MARKS = ("answer is", "answer is:", "answer:")


def first_sentence_yes_no(text: str, item: Item) -> str:
    """`no` when the first sentence has the word No, no or not, else `yes` (LLaVA's POPE scorer)."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return NO if {"No", "not", "no"} & set(words) else YES


def yes_or_no(text: str, item: Item) -> str | None:
    """The one of yes and no that is a word of the answer; None for neither or both (VLMEvalKit's YOrN_Extraction)."""
    words = _without_punctuation(text.lower()).split()
    found = [word for word in (YES, NO) if word in words]
    return found[0] if len(found) == 1 else None


def _without_punctuation(text: str) -> str:
    has_number = re.search(r"\d,\d", text) is not None
    out = text
    for mark in PUNCTUATION:
        out = out.replace(mark, "" if has_number or f"{mark} " in text or f" {mark}" in text else " ")
    return re.sub(r"\.(?!\d)", "", out)


def option_letter(text: str, item: Item) -> str | None:
    """The letter of the chosen option: a word of its own near the end, or else the only option whose text is in the
    answer (VLMEvalKit's can_infer)."""
    words = text.translate(AROUND_LETTERS).split()
    found = [letter for letter, _ in item.options if letter in words]
    if len(found) == 1 and words.index(found[0]) > len(words) - LAST_WORDS:
        return found[0]
    if not found and "Z" in words:  # VLMEvalKit's letter for no option
        return None
    named = NAMED_LETTER.search(text)
    if named is not None and named[1].upper() in dict(item.options):
        return named[1].upper()
    if len(text) > 2 * sum(len(option) for _, option in item.options):
        return None
    inside = [letter for letter, option in item.options if option.lower() in text.lower()]
    return inside[0] if len(inside) == 1 else None


def mmvp_answer(text: str, item: Item) -> str:
    """What follows `answer is` in lower case, without brackets and final marks (ROSS's MMVP scorer).

    It is right when it is the letter or the whole text of the right option.
    """
    read = text.lower().strip()
    for mark in ANSWER_MARKS:
        read = read.split(mark)[-1]
    return read.strip().rstrip(".:,").lstrip("(").rstrip(")")


def short_answer(text: str, item: Item | None = None) -> str:
    """Lower case, single spaces, without a final full stop; compared whole."""
    return " ".join(text.lower().split()).removesuffix(".")


def as_written(text: str, item: Item) -> str:
    return text.strip()
