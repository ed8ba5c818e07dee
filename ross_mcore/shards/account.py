"""The account of a data set: each record is trained on, skipped with a reason, or bad with a reason.

make_shards and index_shards count with the same code. Each part of an index keeps the account of its shard and
index.json their sum, so that the sum stays right when one shard is indexed again. The tools print `Account.lines`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ross_mcore import checked
from ross_mcore.data.placeholders import placeholder_of
from ross_mcore.data.sample import NOTHING_TO_LEARN
from ross_mcore.data.shard_reader import MAX_SAMPLES, UNKNOWN_LENGTH, ShardReader
from ross_mcore.errors import ShardError

MAX_BAD_FRACTION = 0.001
"""Default of --max-bad-fraction of make_shards and index_shards."""
MOST_REASONS = 50
MOST_KEYS = 5
MOST_REASON_CHARACTERS = 160
MOST_KEY_CHARACTERS = 80
OTHER_REASONS = "other reasons"
OVER_BOUNDS = ("it has over ", "its text is over ")
"""How the reasons of SampleBounds begin."""
DAMAGED = "a shard is empty or partly damaged"
SKIPPED_LIST = "skipped.jsonl"
"""The list of the records that make_shards left out, beside the shards."""


def kind(reason: str) -> str:
    """A reason without its details, which follow the first colon, or are the members of a sample of a tar."""
    return _bounded(reason.partition("; its members")[0].partition(":")[0])


def _bounded(reason: str) -> str:
    return checked.printable(reason)[:MOST_REASON_CHARACTERS]


def allowing(bad_fraction: float) -> str:
    """A value of --max-bad-fraction that allows this share of bad records."""
    return f"{math.ceil(bad_fraction * 1000) / 1000:g}"


@dataclass
class Findings:
    """How often each reason was found, and the keys of the first samples with it.

    At most MOST_REASONS reasons, the others are counted as OTHER_REASONS, and MOST_KEYS keys for each.
    """

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[str]] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.counts.total()

    def add(self, reason: str, keys: Sequence[str], count: int = 1) -> None:
        if reason not in self.counts and len(self.counts) >= MOST_REASONS:
            reason = OTHER_REASONS
        self.counts[reason] += count
        first = self.first.setdefault(reason, [])
        first += [key[:MOST_KEY_CHARACTERS] for key in keys[: MOST_KEYS - len(first)]]

    def merge(self, other: Findings) -> None:
        for reason, count in other.counts.items():
            self.add(reason, other.first[reason], count)

    def as_json(self) -> dict[str, Any]:
        return {reason: {"count": count, "first": self.first[reason]} for reason, count in self.counts.most_common()}

    @classmethod
    def from_json(cls, value: Any, name: str) -> Findings:
        """Raises ValueError when it is not what `as_json` returns."""
        found = cls()
        for reason, about in checked.mapping(value, name).items():
            keys = checked.mapping(about, f"{name} of {checked.shown(reason)}").get("first")
            if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
                raise ValueError(f"{name} has {checked.shown(keys)} in place of the first keys")
            found.add(
                _bounded(reason), list(map(checked.printable, keys)), checked.count(about, "count", most=MAX_SAMPLES)
            )
        return found


class Notes(NamedTuple):
    """What the row of a sample in the index does not say.

    without_labels: why it has no label, "" if it has one; colours: for every picture that was decoded, the description
    of its only colour, None for a picture of several colours; filled: how many of them are cut off and were filled.
    """

    without_labels: str = ""
    colours: Sequence[str | None] = ()
    filled: int = 0


NO_NOTES = Notes()


class Line(NamedTuple):
    """A line of a printed account; `is_wrong`: it names something to mend."""

    name: str
    text: str
    is_wrong: bool = False


COUNTS = (
    *("records", "trained", "text_only", "several_pictures", "measured"),
    *("pictures", "never_shown", "decoded", "filled", "lost_bytes"),
)
FINDINGS = ("skipped", "bad", "placeholders", "without_labels", "one_colour", "damage")


@dataclass
class Account:
    """Counts of a data set, or of one shard: records == trained + skipped.total + bad.total.

    skipped: records over the bounds, and those of which training makes an empty row (NOTHING_TO_LEARN);
    placeholders: bad records whose text names a picture, video or audio that the record does not have, by placeholder.
    Of the samples in the index: text_only, several_pictures: samples with no picture, with more than one; pictures;
    never_shown: pictures that no text shows; measured: samples whose labels were counted; without_labels: those with
    none; decoded: pictures that were decoded; filled: those that are cut off; one_colour: those of a single colour.
    damage: why shards are not whole, a reason for each, without keys; lost_bytes: damaged bytes.
    """

    records: int = 0
    trained: int = 0
    skipped: Findings = field(default_factory=Findings)
    bad: Findings = field(default_factory=Findings)
    placeholders: Findings = field(default_factory=Findings)
    text_only: int = 0
    several_pictures: int = 0
    pictures: int = 0
    never_shown: int = 0
    measured: int = 0
    without_labels: Findings = field(default_factory=Findings)
    decoded: int = 0
    filled: int = 0
    one_colour: Findings = field(default_factory=Findings)
    damage: Findings = field(default_factory=Findings)
    lost_bytes: int = 0

    @property
    def samples(self) -> int:
        """Samples in the index: those trained on, and those of which training makes an empty row."""
        return self.trained + self.skipped.counts[kind(NOTHING_TO_LEARN)]

    @property
    def bad_fraction(self) -> float:
        """Share of bad records, without those over the bounds."""
        return self.bad.total / max(1, self.samples + self.bad.total)

    @property
    def pictures_alone(self) -> int:
        """Samples that train on their pictures alone, because they have no label."""
        return self.without_labels.total - self.skipped.counts[kind(NOTHING_TO_LEARN)]

    @classmethod
    def of_shard(cls, damage: Sequence[str], lost_bytes: int) -> Account:
        """The account of a shard before its samples; `damage`: why it is not whole."""
        account = cls(lost_bytes=lost_bytes)
        if damage:
            known = damage[0].partition(": ")[2]
            account.damage.add(_bounded(f"a shard is no tar: {known}" if known else DAMAGED), [])
        return account

    def keep(self, key: str, columns: Mapping[str, int], notes: Notes) -> None:
        """Counts a sample of the index; `columns` of its SAMPLE_ROW."""
        pictures, shown, labels = columns["num_images"], columns["image_spans"], columns["label_tokens"]
        self.records += 1
        self.text_only += pictures == 0
        self.several_pictures += pictures > 1
        self.pictures += pictures
        self.never_shown += pictures - shown
        self.decoded += len(notes.colours)
        self.filled += notes.filled
        for colour in filter(None, notes.colours):
            self.one_colour.add(kind(colour), [key])
        self.measured += labels != UNKNOWN_LENGTH
        if labels == 0:
            self.without_labels.add(kind(notes.without_labels), [key])
        if labels == 0 and not shown:
            self.skipped.add(kind(NOTHING_TO_LEARN), [key])
        else:
            self.trained += 1

    def leave_out(self, key: str, reason: str, is_bad: bool) -> None:
        """Counts a record that is not in the index."""
        self.records += 1
        (self.bad if is_bad else self.skipped).add(kind(reason), [key])
        if placeholder := placeholder_of(reason):
            self.placeholders.add(kind(placeholder), [key])

    def leave_out_listed(self, path: Path) -> int:
        """Counts the records in a skipped.jsonl and returns their number. Raises ShardError for a damaged list."""
        number = 0
        try:
            for number, text in enumerate(checked.read_lines(path), start=1):  # noqa: B007  used in errors
                line = json.loads(text or b"")
                is_bad = not line["reason"].startswith(OVER_BOUNDS)  # lists of older versions have no outcome
                is_bad = line.get("outcome", "bad" if is_bad else "skipped") == "bad"
                self.leave_out(f"{line['record']:09d}", line["reason"], is_bad)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            where = f"line {number}: {checked.reason(error)}" if number else checked.reason(error)
            raise ShardError(f"{path} cannot be read: {where}; make the shards again, or remove the list") from None
        return number

    def merge(self, other: Account) -> None:
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in FINDINGS:
            getattr(self, name).merge(getattr(other, name))

    @classmethod
    def of(cls, reader: ShardReader) -> Account | None:
        """The account in an index, None if its samples were not counted. Raises ShardError for a damaged one."""
        if reader.index.get("account") is None:
            return None
        try:
            return cls.from_json(reader.index["account"])
        except ValueError as error:
            raise ShardError(f"{reader.folder / 'index.json'}: {error}; index the shards again") from None

    @classmethod
    def total(cls, accounts: Iterable[Account]) -> Account:
        total = cls()
        for account in accounts:
            total.merge(account)
        return total

    def as_json(self) -> dict[str, Any]:
        """The counts, as JSON types."""
        counts = {name: getattr(self, name) for name in COUNTS}
        return counts | {name: getattr(self, name).as_json() for name in FINDINGS}

    @classmethod
    def from_json(cls, value: Any) -> Account:
        """The account that `as_json` returned. Raises ValueError for another value, and for sums that are not equal."""
        data = checked.mapping(value, "account")
        found = cls()
        for name in COUNTS:
            setattr(found, name, checked.count(data, name, least=0, most=2**62))
        for name in FINDINGS:
            setattr(found, name, Findings.from_json(data.get(name), name))
        if found.records != found.trained + found.skipped.total + found.bad.total:
            raise ValueError(
                f"account has {found.records} records, which are not the {found.trained} trained on, "
                f"{found.skipped.total} skipped and {found.bad.total} bad ones"
            )
        return found

    @property
    def refused(self) -> Counter[str]:
        """The reasons for which a set is refused: of bad records, also of skipped ones if no sample is left."""
        return self.bad.counts if self.samples else self.bad.counts + self.skipped.counts

    def reasons(self) -> str:
        """The most frequent of these reasons with their counts, for an error."""
        found = [f"{count:,} x {reason}" for reason, count in self.refused.most_common(5)]
        found += [f"{count:,} x {reason}" for reason, count in self.damage.counts.most_common(2)]
        return "; ".join(found)

    def lines(self) -> list[Line]:
        """The account for people."""
        shown = [
            Line("records", f"{self.records:,}"),
            Line("trained on", f"{self.trained:,} ({_share(self.trained, self.records)})", not self.trained),
            *_findings("skipped", self.skipped, self.records, "", is_wrong=False),
            *_findings("bad", self.bad, self.records, ""),
            *_findings("placeholders", self.placeholders, self.records, " without a picture"),
            Line(
                "pictures",
                f"{self.pictures:,} (samples of text only: {self.text_only:,}, of several: {self.several_pictures:,})",
            ),
            Line("never shown", f"{self.never_shown:,} pictures", self.never_shown > 0),
        ]
        if self.measured:
            alone = f", {self.pictures_alone:,} of them train on their pictures alone" if self.pictures_alone else ""
            shown += _findings("without labels", self.without_labels, self.samples, f" samples{alone}")
        else:
            shown.append(Line("without labels", "not counted: that needs --tokenizer and --template"))
        if self.decoded or not self.pictures:
            shown += _findings("one colour", self.one_colour, self.decoded, f" of {self.decoded:,} pictures")
        else:
            shown.append(Line("one colour", "not counted: no picture was decoded (--verify-images)"))
        if self.filled:
            shown.append(
                Line("filled", f"{self.filled:,} pictures are cut off; what is missing is grey or black", True)
            )
        if self.damage.total:
            shown.append(Line("damaged", f"{self.damage.total:,} shards, {self.lost_bytes:,} bytes lost", True))
            shown += _reasons(self.damage, is_wrong=True)
        return shown


def _share(part: int, whole: int) -> str:
    return f"{part / max(1, whole):.2%}"


def _findings(name: str, found: Findings, whole: int, what: str, is_wrong: bool = True) -> list[Line]:
    """A line with the number of findings, and one for each reason."""
    share = f" ({_share(found.total, whole)})" if found.total else ""
    return [Line(name, f"{found.total:,}{what}{share}", is_wrong and found.total > 0), *_reasons(found, is_wrong)]


def _reasons(found: Findings, is_wrong: bool) -> list[Line]:
    lines = []
    for reason, count in found.counts.most_common():
        more = ", ..." if count > len(found.first[reason]) else ""
        keys = f" ({', '.join(found.first[reason])}{more})" if found.first[reason] else ""
        lines.append(Line("", f"{count:,} x {reason}{keys}", is_wrong))
    return lines
