"""What is read from an answer. The expected values are those of the public scorers, whose files answers.py names."""

from __future__ import annotations

import pytest

from ross_mcore.evaluation import answers
from ross_mcore.evaluation.items import Item

NOTHING = Item("1")
ANIMALS = Item("1", options=(("A", "A cat"), ("B", "A dog"), ("C", "Two birds"), ("D", "None of them")))


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("Yes", "yes"),
        ("No", "no"),
        ("no, there is none", "no"),
        ("There is not, I think", "no"),
        ("Yes. No doubt", "yes"),  # the first sentence only
        ("NO", "yes"),  # three words mean no, and this is none of them
        ("None", "yes"),
        ("No!", "yes"),
        ("No\n", "yes"),
        ("", "yes"),
    ],
)
def test_pope_reads_the_first_sentence(text: str, read: str) -> None:
    assert answers.first_sentence_yes_no(text, NOTHING) == read


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("Yes.", "yes"),
        ("NO!", "no"),
        ("No, it is not", "no"),
        ("yes and no", None),
        ("maybe", None),
        ("Yes-it is", "yes"),
        ("Yes,it is 1,000", None),  # beside a number a mark is dropped, and words grow together
        ("", None),
    ],
)
def test_yes_or_no_is_a_word(text: str, read: str | None) -> None:
    assert answers.yes_or_no(text, NOTHING) == read


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("B", "B"),
        ("(B) A dog.", "B"),
        ("b", None),
        ("C. Two birds", "C"),
        ("a dog", "B"),
        ("The answer is **D**, because it shows none of all these animals", "D"),
        ("B or C", None),
        ("A dog and two birds", None),
        ("A dog, I think", "A"),  # the article is taken for a letter
        ("a dog and two birds", None),
        ("E", None),
        ("Z", None),
        ("I see a dog here, and it sits on a long bench in a park, with a ball and a bowl of water beside it", None),
        ("", None),
    ],
)
def test_an_option_is_a_letter_or_a_text(text: str, read: str | None) -> None:
    assert answers.option_letter(text, ANIMALS) == read


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("(a)", "a"),
        ("A.", "a"),
        ("The answer is (B).", "b"),
        ("The answer is: (B).", ": (b"),  # as the reference reads it
        ("Answer: B", "b"),
        ("Open", "open"),
        ("A. Open", "a. open"),
    ],
)
def test_mmvp_compares_a_letter_or_an_option(text: str, read: str) -> None:
    assert answers.mmvp_answer(text, NOTHING) == read


def test_short_answers_differ_in_words_only() -> None:
    assert answers.short_answer(" Two  Red\ncircles. ") == "two red circles"
