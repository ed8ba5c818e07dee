"""Groups the members of a tar into samples and chooses the text and the pictures of each.

As in WebDataset, the key of a sample is the name of a member up to the first dot of its last part, and the rest is the
suffix, in lower case. Where that rule splits names that have dots themselves, such as `a.b.jpg` and `a.b.json`, the key
is the text's name without its last suffix. A sample's pictures are the first of these that its record fits: `KEY.jpg`
and `KEY.0.jpg`, `KEY.1.jpg`, ...; those that the record names; `KEY.img0.jpg`, `KEY.image.jpg`, ...; all, as in
`KEY.left.png`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ross_mcore.data.shard_reader import (
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
    JSON_SUFFIX,
    MAX_IMAGE_BYTES,
    MAX_KEY_BYTES,
    MAX_PART_BYTES,
    MAX_RECORD_BYTES,
    MORE_IMAGE_SUFFIXES,
    PART_SUFFIXES,
)
from ross_mcore.errors import SampleError
from ross_mcore.shards.tars import Member, walk_tar

PICTURES = frozenset((*IMAGE_SUFFIXES, *MORE_IMAGE_SUFFIXES))
TEXTS = frozenset((JSON_SUFFIX, *CAPTION_SUFFIXES))
READ = PICTURES | TEXTS
NUMBER = re.compile(r"[0-9]{0,8}")
NUMBERED_NAME = re.compile(r"(?:(?:image|img|picture|pic|photo|frame)s?[_-]?)?[0-9]{0,8}")
MAX_LABEL = 24
WHAT_IS_READ = (
    f"a sample is KEY.json (a record, or its turns) or KEY.txt (a caption; also .{', .'.join(CAPTION_SUFFIXES[1:])}) "
    "with its pictures KEY.jpg, or KEY.0.jpg, KEY.1.jpg, ... in the same folder (docs/data.md lists all names and "
    "formats); pictures beside one JSON of all records are for make_shards.py"
)


@dataclass
class TarSample:
    """The members with the same key, by suffix.

    `text` and `pictures`, in order, are what is trained on: here the likeliest ones, measure.py decides by the record.
    """

    key: str
    members: dict[str, Member] = field(default_factory=dict)
    problem: str | None = None
    text: Member | None = None
    pictures: list[Member] = field(default_factory=list)

    @property
    def records(self) -> list[Member]:
        """The members that may be the record: `.json`; without `.json` and a caption every `.NAME.json`."""
        if not TEXTS.isdisjoint(self.members):
            return [self.members[JSON_SUFFIX]] if JSON_SUFFIX in self.members else []
        return [member for suffix, member in self.members.items() if suffix.endswith(f".{JSON_SUFFIX}")]

    @property
    def caption(self) -> Member | None:
        """The member with the caption: `.txt`, `.caption`, ..., or the only text, as `.NAME.txt`."""
        exact = next((self.members[suffix] for suffix in CAPTION_SUFFIXES if suffix in self.members), None)
        texts = [member for suffix, member in self.members.items() if suffix.rpartition(".")[2] in TEXTS]
        return exact or (texts[0] if len(texts) == 1 and not self.records else None)

    @property
    def parts(self) -> dict[str, Member]:
        """The precomputed parts of the pictures, by kind."""
        return {kind: self.members[suffix] for suffix, kind in PART_SUFFIXES.items() if suffix in self.members}

    @property
    def has_named_pictures(self) -> bool:
        """Whether a picture is not named as make_shards does."""
        return any(suffix.rpartition(".")[2] in PICTURES and not is_usual_picture(suffix) for suffix in self.members)

    def picture_choices(self, names: Sequence[str] = ()) -> list[list[Member]]:
        """The pictures that may be meant, the likeliest first, for a record that names `names`.

        Pictures without a name, or with a number, come first, so that those next to them, such as masks, do not change
        a sample.
        """
        found = {suffix: member for suffix, member in self.members.items() if suffix.rpartition(".")[2] in PICTURES}
        in_order = sorted(found, key=lambda suffix: (_natural(suffix.rpartition(".")[0]), found[suffix].offset))
        usual = [suffix for suffix in in_order if is_usual_picture(suffix)]
        numbered = [suffix for suffix in in_order if NUMBERED_NAME.fullmatch(suffix.rpartition(".")[0])]
        choices: list[list[str]] = []
        for choice in (usual, self._named(found, names), numbered, in_order):
            if choice and choice not in choices:
                choices.append(choice)
        return [[found[suffix] for suffix in choice] for choice in choices] or [[]]

    def _named(self, found: dict[str, Member], names: Sequence[str]) -> list[str]:
        """The suffixes of the pictures with these names, if all are there: suffixes, or whole names of members."""
        if not names:
            return []
        suffixes = {member.name.rpartition("/")[2].lower(): suffix for suffix, member in found.items()}
        suffixes |= {suffix: suffix for suffix in found}
        bases = [name.replace("\\", "/").rpartition("/")[2].lower() for name in names]
        return [suffixes[base] for base in bases] if all(base in suffixes for base in bases) else []

    def member_names(self) -> str:
        """The suffixes of the members, for a message."""
        listed = [f".{_label(suffix)}" for suffix in self.members]
        return ", ".join(listed[:6]) + (f" and {len(listed) - 6} more" if len(listed) > 6 else "")


def group_members(members: Iterable[Member]) -> tuple[list[TarSample], Counter[str]]:
    """(samples in the order of their first members, numbers of members of no sample by suffix).

    Members of a sample need not be neighbours. A repeated name begins a second sample with the same key.
    """
    members = list(members)
    dotted = _dotted_keys([member.name.removeprefix("./") for member in members])
    samples: list[TarSample] = []
    latest: dict[str, TarSample] = {}
    others: Counter[str] = Counter()
    for member in members:
        key, suffix = _split(member.name.removeprefix("./"), dotted)
        kind = suffix.rpartition(".")[2]
        usual = is_usual_picture(suffix) or suffix in ("json", "txt") or suffix in PART_SUFFIXES
        has_key = key and not key.endswith("/")
        if not usual and (not has_key or kind not in READ):
            others[_label(kind)] += 1
            continue
        sample = latest.get(key)
        if sample is not None and suffix in sample.members and not usual:
            others[_label(suffix)] += 1
            continue
        if sample is None or suffix in sample.members:
            again = "the key comes twice in its shard, the first one counts" if sample is not None else None
            sample = latest[key] = TarSample(key, problem=_key_problem(key) or again)
            samples.append(sample)
        sample.members[suffix] = member
    for sample in samples:
        sample.pictures = sample.picture_choices()[0]
        sample.text = next(iter(sample.records), sample.caption)
        if sample.problem is None and sample.text is None:
            sample.problem = next(
                (f"its .{suffix} {member.problem}" for suffix, member in sample.members.items() if member.problem),
                f"it has neither .json nor .txt: its members are {sample.member_names()}",
            )
    return samples, others


def is_usual_picture(suffix: str) -> bool:
    """Whether a suffix is that of a picture as make_shards writes it: `jpg`, or `0.jpg`."""
    number, _, kind = suffix.rpartition(".")
    return kind in IMAGE_SUFFIXES and NUMBER.fullmatch(number) is not None


def unused_members(sample: TarSample) -> list[str]:
    """The suffixes of the members that a usable sample does not use, beside `.json` and the captions."""
    used = {id(member) for member in (sample.text, *sample.pictures, *sample.parts.values())}
    unused = [suffix for suffix, member in sample.members.items() if id(member) not in used and suffix not in TEXTS]
    return [_label(suffix if suffix.replace(".", "").isalpha() else suffix.rpartition(".")[2]) for suffix in unused]


def require_usable(member: Member) -> None:
    """Raises SampleError for a member that cannot be read, is empty, or is over the limit of its kind."""
    suffix = member.name.rpartition("/")[2].partition(".")[2].lower()
    kind = suffix.rpartition(".")[2]
    limit = MAX_RECORD_BYTES if kind in TEXTS else MAX_IMAGE_BYTES if kind in PICTURES else MAX_PART_BYTES
    problem = member.problem or ("is empty" if member.size == 0 else None)
    problem = problem or (f"is over {limit} bytes" if member.size > limit else None)
    if problem is not None:
        raise SampleError(f"its .{_label(suffix)} {problem}")


def reportable(key: str) -> str:
    """A key as valid Unicode for a report."""
    return key.encode("utf-8", "backslashreplace").decode()


def read_samples(descriptor: int) -> list[TarSample]:
    """The samples of an open tar that this program wrote."""
    return group_members(member for member in walk_tar(descriptor) if isinstance(member, Member))[0]


def picture_members(pictures: Sequence[tuple[str, bytes]]) -> dict[str, bytes]:
    """(suffix, bytes) of a sample's pictures -> members by suffix: `jpg` for one, `0.jpg`, `1.png` ... for several."""
    if len(pictures) == 1:
        return dict(pictures)
    return {f"{number}.{suffix}": data for number, (suffix, data) in enumerate(pictures)}


def _split(name: str, dotted: set[str]) -> tuple[str, str]:
    """(key, suffix) of a member's name without a leading `./`; `dotted` are the keys with dots."""
    stem = name
    for _ in range(3 if dotted else 0):  # `KEY.0.jpg` and `KEY.latents.safetensors` have two dots after the key
        stem = stem.rpartition(".")[0]
        if stem in dotted:
            return stem, name[len(stem) + 1 :].lower()
    folder, slash, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}{slash}{stem}", suffix.lower()


def _dotted_keys(names: Sequence[str]) -> set[str]:
    """The keys that have dots: names of texts without their last suffix.

    They are keys where no text has the part before the first dot as its name, and a picture has the same name as one of
    the texts, or there are no pictures.
    """
    texts: dict[str, list[str]] = {}
    for name in names:
        stem, _, kind = name.rpartition(".")
        if kind.lower() in TEXTS and (group := _split(name, set())[0]) != stem and not f"/{group}".endswith("/"):
            beside, _, picture = stem.rpartition(".")  # `a.jpg.json` belongs to `a.jpg`
            texts.setdefault(group, []).append(beside if picture.lower() in PICTURES else stem)
    pictures: dict[str, set[str]] = {}
    for name in names if texts else ():
        stem, _, kind = name.rpartition(".")
        group = _split(name, set())[0]
        if group in texts and kind.lower() in TEXTS and group == stem:
            del texts[group]
        elif group in texts and kind.lower() in PICTURES:
            pictures.setdefault(group, set()).update((stem, stem.rpartition(".")[0]))
    return {
        stem
        for group, stems in texts.items()
        if group not in stems and (group not in pictures or not pictures[group].isdisjoint(stems))
        for stem in stems
    }


def _natural(name: str) -> list[tuple[str, int, str]]:
    """A key that sorts names with numbers by number, and no name as number 0."""
    parts = re.findall(r"([^0-9]*)([0-9]*)", name or "0")
    return [(text, len(digits.lstrip("0")), digits.lstrip("0")) for text, digits in parts]


def _label(suffix: str) -> str:
    """A suffix in a message."""
    short = suffix if len(suffix) <= MAX_LABEL else f"...{suffix[-MAX_LABEL:]}"
    return reportable(short) if short.isprintable() else "?"


def _key_problem(key: str) -> str | None:
    """Why a name is not a valid key: keys are in keys.txt, in reports and in file names of pictures of a run."""
    if not key or key.endswith("/"):
        return "it has no key"
    try:
        size = len(key.encode("utf-8"))
    except UnicodeEncodeError:
        return "its key is not UTF-8"
    if size > MAX_KEY_BYTES:
        return f"its key is over {MAX_KEY_BYTES} bytes"
    if not key.isprintable():
        return "its key has control characters"
    if key.startswith("/") or "\\" in key or ".." in key.split("/") or key[1:3] == ":/":
        return "its key leads out of a folder"
    return None
