"""The account of a data set: its sums are exact, and it survives JSON and merging."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ross_mcore.data.shard_reader import UNKNOWN_LENGTH
from ross_mcore.shards.account import MOST_KEYS, MOST_REASONS, OTHER_REASONS, Account, Findings, Notes, kind

REASONS = st.sampled_from(["a", "b: detail", "c\x1b[31m", *(f"reason {number}" for number in range(3))])
KEPT = st.tuples(
    st.integers(0, 3), st.integers(0, 3), st.integers(UNKNOWN_LENGTH, 2), REASONS, st.lists(st.none() | REASONS)
)
EVENTS = st.lists(KEPT | st.tuples(REASONS, st.booleans()), max_size=30)


def counted(events: list[Any], first: int = 0) -> Account:
    account = Account(lost_bytes=len(events))
    for number, event in enumerate(events, start=first):
        if len(event) == 2:
            account.leave_out(str(number), *event)
        else:
            pictures, shown, labels, why, colours = event
            columns = {"num_images": pictures, "image_spans": min(shown, pictures), "label_tokens": labels}
            account.keep(str(number), columns, Notes(why, colours))
    return account


@given(EVENTS, EVENTS)
def test_every_record_is_counted_once_and_shards_add_up(first: list[Any], second: list[Any]) -> None:
    account = counted(first + second)
    assert account.records == len(first + second) == account.trained + account.skipped.total + account.bad.total
    assert account.samples == sum(len(event) == 5 for event in first + second)
    assert Account.total([counted(first), counted(second, len(first))]) == account
    assert Account.from_json(json.loads(json.dumps(account.as_json()))) == account
    said = "\n".join(f"{name} {text}" for name, text, _ in account.lines())
    assert f"trained on {account.trained:,}" in said and "\x1b" not in said


def test_a_sample_without_label_trains_on_its_picture_or_is_skipped() -> None:
    account = counted(
        [(1, 1, 0, "why", [None]), (0, 0, 0, "why", []), (1, 0, 0, "why", ["black"]), (1, 1, 5, "", [None])]
    )
    assert (account.trained, account.skipped.total, account.without_labels.counts["why"]) == (2, 2, 3)
    assert account.pictures_alone == 1 and account.never_shown == 1 and account.text_only == 1
    assert account.one_colour.first == {"black": ["2"]} and account.decoded == 3


def test_findings_are_bounded() -> None:
    found = Findings()
    for number in range(10 * MOST_REASONS):
        found.add(kind(f"reason {number % (2 * MOST_REASONS)}" * 100), [str(number)] * 9)
    assert found.total == 10 * MOST_REASONS and len(found.counts) == MOST_REASONS + 1
    assert found.counts[OTHER_REASONS] == 5 * MOST_REASONS
    assert all(len(keys) == MOST_KEYS for keys in found.first.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"records": 7}, "7 records, which are not the 1 trained on, 0 skipped and 1 bad"),
        ({"pictures": -1}, "pictures is -1"),
        ({"bad": [1]}, "bad is \\[1\\]"),
        ({"bad": {"a": {"count": 1, "first": [3]}}}, "in place of the first keys"),
        ({"bad": {"a": {"count": 0, "first": []}}}, "count is 0"),
        ({"one_colour": None}, "one_colour is None"),
    ],
)
def test_a_damaged_account_is_refused(change: dict[str, Any], message: str) -> None:
    good = counted([("a", True), (1, 1, 1, "", [])]).as_json()
    with pytest.raises(ValueError, match=message):
        Account.from_json(good | change)
