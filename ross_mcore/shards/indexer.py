"""Indexes many shards: finds them, reads changed ones in worker processes, writes the index.

OUT/index.parts/ has one file per shard, which is made again only when the shard's size, its modification time (or the
store's tag) or the source of lengths has changed.
"""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ross_mcore import checked
from ross_mcore.data.remote import DEFAULT_CACHE_BYTES, ShardCache, identify, is_remote, list_shards
from ross_mcore.data.shard_reader import FORMAT_VERSION, LengthSource
from ross_mcore.data.spec import SampleSpec
from ross_mcore.errors import RemoteError, ShardError, TooManyBad
from ross_mcore.shards.account import MAX_BAD_FRACTION, SKIPPED_LIST, Account, allowing
from ross_mcore.shards.grouping import WHAT_IS_READ
from ross_mcore.shards.index_parts import (
    PARTS,
    IndexedShard,
    ShardIndex,
    make_folder,
    part_facts,
    quarantine_lines,
    replacing,
    write_index,
)
from ross_mcore.shards.measure import Measure, index_tar

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized


READING = 2
"""Raised when shards are read in another way, so that their parts are made again when they are indexed again."""
MAX_LISTED = 10_000
ARCHIVES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".tar.lz4", ".zip")


@dataclass(frozen=True)
class Settings:
    """How shards are indexed; the part of a shard is valid for one tokenizer, spec and verify_images."""

    tokenizer: Path | None = None
    spec: SampleSpec = SampleSpec()
    verify_images: bool = True
    cache_folder: Path | None = None
    cache_bytes: int = DEFAULT_CACHE_BYTES

    def measure(self) -> Measure:
        """Raises TokenizerError."""
        return Measure(spec=self.spec) if self.tokenizer is None else Measure.with_tokenizer(self.tokenizer, self.spec)


@dataclass(frozen=True)
class Shard:
    """A shard to index: its name in the index, its path or URL, its size in bytes and an identifier of its version."""

    name: str
    location: str
    size: int
    version: str
    tag: str | None = None


@dataclass
class Indexing:
    """The outcome: the account of the shards, counts of samples, shards, shards read again.

    `bad`: samples left out, without those over the bounds, plus those lost by damage: the damaged bytes divided by the
    mean size of a sample, and for a shard that is no tar at least the mean number of samples of a shard.
    `others`: members that no sample uses, by suffix. `first_names`: names of the first members. `lists`: files
    that list the samples left out.
    """

    account: Account = field(default_factory=Account)
    samples: int = 0
    shards: int = 0
    reread: int = 0
    bad: int = 0
    others: Counter[str] = field(default_factory=Counter)
    first_names: list[str] = field(default_factory=list)
    lists: list[Path] = field(default_factory=list)

    @property
    def bad_fraction(self) -> float:
        return self.bad / max(1, self.samples + self.bad)

    @property
    def unused_members(self) -> str:
        """How many members no sample uses, by suffix; empty if there are none."""
        named = ", ".join(
            f"{count} x {f'.{suffix}' if suffix else 'no suffix'}" for suffix, count in self.others.most_common(6)
        )
        return f"{self.others.total()} members of the tars are not used: {named}" if self.others else ""


def find_shards(places: Sequence[str], out: Path) -> list[Shard]:
    """The tars of folders, files, `*` patterns, `{0..9}` ranges and URLs, in this order, each once.

    A folder means its *.tar, sorted, and the shards outside of it that its index.json lists.
    Raises ShardError for a place, or a file of a range, without a tar, RemoteError for a URL that cannot be read.
    """
    import braceexpand  # of webdataset, whose patterns these are

    locations: list[str] = []
    for place in places:
        for pattern in braceexpand.braceexpand(place):
            before = len(locations)
            if is_remote(pattern):
                locations += list_shards(pattern)
            elif Path(pattern).is_dir():
                locations += sorted(map(str, Path(pattern).glob("*.tar"))) + _named_elsewhere(Path(pattern))
            elif _is_glob(pattern):
                anchor = Path(Path(pattern).anchor)
                locations += sorted(map(str, anchor.glob(str(Path(pattern).relative_to(anchor)))))
            elif Path(pattern).is_file():
                locations.append(pattern)
            if len(locations) == before:
                known = "" if is_remote(pattern) or _is_glob(pattern) else _what_is_there(Path(pattern))
                raise ShardError(
                    f"{pattern} names no tar: {known}give a folder of *.tar files, files, patterns or URLs"
                )
    return [_describe(location, out) for location in dict.fromkeys(map(_absolute, locations))]


def _is_glob(pattern: str) -> bool:
    return any(character in pattern for character in "*?[")


def compressed_shards(places: Sequence[str]) -> list[str]:
    """Paths of compressed tars in folders of `places` that are not there unpacked as well; they are not read."""
    found = [path for place in places if not is_remote(place) for path in _files(Path(place))]
    stems = {_unpacked(path): path for path in found if path.name.lower().endswith(ARCHIVES)}
    return [str(path) for unpacked, path in sorted(stems.items()) if not unpacked.exists()]


def _unpacked(archive: Path) -> Path:
    """The path of the tar that unpacking makes."""
    suffix = next(suffix for suffix in ARCHIVES if archive.name.lower().endswith(suffix))
    return archive.with_name(f"{archive.name[: -len(suffix)]}.tar")


def _files(folder: Path) -> list[Path]:
    """The first entries of a folder, none if it is no folder."""
    try:
        with os.scandir(folder) as entries:
            return [Path(entry.path) for entry in itertools.islice(entries, MAX_LISTED)]
    except OSError:
        return []


def _what_is_there(place: Path) -> str:
    """What a place without a tar has, and the remedy, for a message; empty if nothing is known."""
    if not place.is_dir():
        return "it does not exist; "
    entries, compressed = _files(place), compressed_shards([str(place)])
    below = {path.parent.relative_to(place) for pattern in ("*/*.tar", "*/*/*.tar") for path in place.glob(pattern)}
    if compressed:
        names = ", ".join(Path(path).name for path in compressed[:3])
        return (
            f"it has {len(compressed)} compressed archives ({names}): unpack them (gunzip, unzstd, unzip), because "
            "training reads members at their places; "
        )
    if below:
        return f"the tars are in its folders {', '.join(map(str, sorted(below)[:5]))}: give those; "
    kinds = Counter("a folder" if path.is_dir() else path.suffix or "no suffix" for path in entries)
    return f"it has {', '.join(f'{count} x {kind}' for kind, count in kinds.most_common(5)) or 'no files'}; "


def _absolute(location: str) -> str:
    return location if is_remote(location) else str(Path(location).absolute())


def _named_elsewhere(folder: Path) -> list[str]:
    """The absolute paths and URLs in a folder's index.json; an index made with --out has only these."""
    try:
        index = checked.read_json(folder / "index.json")
        names = [shard["name"] for shard in index["shards"] if "\0" not in shard["name"]]
        return [name for name in names if is_remote(name) or Path(name).is_absolute()]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def require_own_index(shards: Sequence[Shard], out: Path) -> None:
    """Raises ShardError when `out` holds the index of other shards only, which still exist: it would be replaced."""
    try:
        names = [str(shard["name"]) for shard in checked.read_json(out / "index.json")["shards"]]
        others = [name for name in names if is_remote(name) or (out / name).exists()]
    except (OSError, ValueError, KeyError, TypeError):  # none, or none that could be read
        return
    if others and not set(names) & {shard.name for shard in shards}:
        raise ShardError(
            f"{out / 'index.json'} is the index of other shards ({checked.shown(others[0])} ...); give another "
            "--out, or add --overwrite"
        )


def _describe(location: str, out: Path) -> Shard:
    if is_remote(location):
        size, tag = identify(location)
        return Shard(location, location, size, str(tag), tag)
    try:
        path = Path(location)
        checked.require_regular(path)
        status = path.stat()
    except (OSError, ValueError) as error:
        raise ShardError(
            f"{checked.shown(location)} cannot be indexed: {checked.reason(error)}; remove it, or put the shard there"
        ) from None
    name = path.name if checked.real_path(path.parent) == checked.real_path(out) else location
    return Shard(name, location, status.st_size, str(status.st_mtime_ns))


def index_shards(
    shards: Sequence[Shard],
    out: Path,
    settings: Settings,
    *,
    max_bad_fraction: float = MAX_BAD_FRACTION,
    num_workers: int = 0,
    progress: Callable[[int, int], None] = lambda done_bytes, all_bytes: None,
) -> Indexing:
    """Indexes `shards` into `out`. quarantine.jsonl is always written, the index unless too many samples are bad.

    `num_workers=0` works in this process. Raises ShardError, TooManyBad, RemoteError and TokenizerError.
    """
    source = settings.measure().source
    left_out, lists = _left_out(shards)
    parts = out / PARTS
    make_folder(parts)
    paths = [parts / f"{hashlib.sha256(shard.location.encode()).hexdigest()[:24]}.npz" for shard in shards]
    tasks = [
        (shard, path, about)
        for shard, path in zip(shards, paths, strict=True)
        for about in [_about(shard, settings, source)]
        if not _is_current(path, about)
    ]
    with tempfile.TemporaryDirectory(dir=out, prefix=".index.", suffix=".partial") as scratch:
        if settings.cache_folder is None and any(is_remote(shard.location) for shard, *_ in tasks):
            settings = replace(settings, cache_folder=Path(scratch))
        _run(tasks, settings, num_workers, progress)
    entries = [
        IndexedShard(shard.name, shard.size, partial(ShardIndex.load, path), shard.tag)
        for shard, path in zip(shards, paths, strict=True)
    ]
    done = _summary(entries)
    done.reread = len(tasks)
    for old in set(filter(Path.is_file, parts.glob("*.npz"))) - set(paths):
        old.unlink()
    if done.bad_fraction > max_bad_fraction or not done.samples:
        with replacing(out / "quarantine.jsonl") as quarantine:
            for entry in entries:
                quarantine.writelines(quarantine_lines(entry.name, entry.part()))
        if not done.samples:
            raise ShardError(_nothing_usable(out, done, entries))
        raise TooManyBad(
            f"{done.bad} of {done.samples + done.bad} samples are bad, over --max-bad-fraction {max_bad_fraction}, so "
            f"no index was written; see {out / 'quarantine.jsonl'}: {done.account.reasons()}; "
            f"{_first_left_out(entries)}. "
            f"Mend them, or allow them with --max-bad-fraction {allowing(done.bad_fraction)}"
        )
    has_more = done.account.samples < done.account.records or done.account.damage.total
    done.lists = [out / "quarantine.jsonl"] * bool(has_more) + lists
    done.account.merge(left_out)
    write_index(out, entries, source, done.account, settings.spec.truncated_images)
    return done


def _left_out(shards: Sequence[Shard]) -> tuple[Account, list[Path]]:
    """The account of the records that make_shards left out of these shards, and its lists of them.

    A list counts if all tars of its folder are among `shards`. Raises ShardError for a damaged list.
    """
    account, lists = Account(), []
    local = {Path(shard.location) for shard in shards if not is_remote(shard.location)}
    for folder in sorted({path.parent for path in local}):
        path = folder / SKIPPED_LIST
        if path.is_file() and local.issuperset(folder.glob("*.tar")) and account.leave_out_listed(path):
            lists.append(path)
    return account, lists


def _about(shard: Shard, settings: Settings, source: LengthSource | None) -> dict[str, Any]:
    """The values that a part depends on, as JSON types, to be compared with those in its file."""
    return {
        "format": FORMAT_VERSION,
        "reading": READING,
        "location": shard.location,
        "bytes": shard.size,
        "version": shard.version,
        "lengths": None if source is None else asdict(source),
        "bounds": asdict(settings.spec.bounds),
        "verified": settings.verify_images,
        **({"truncated_images": "fill"} if settings.spec.truncated_images == "fill" else {}),
    }


def _is_current(path: Path, about: dict[str, Any]) -> bool:
    """Whether a part was made with these values, and counted; verified pictures are always current."""
    found = part_facts(path)
    return found is not None and bool(found.get("account")) and found["about"] in (about, {**about, "verified": True})


def _summary(entries: Sequence[IndexedShard]) -> Indexing:
    done = Indexing(shards=len(entries))
    account, held_bytes = done.account, 0
    damaged: list[tuple[int, int]] = []
    with_records = 0
    for entry in entries:
        part = entry.part()
        assert part.account is not None, "a part without an account is made again"
        account.merge(part.account)
        done.samples += len(part.samples)
        done.others.update(part.others)
        done.first_names += part.first_names if len(done.first_names) < 3 else []
        held_bytes += entry.bytes - part.lost_bytes
        with_records += part.account.records > 0
        if part.lost_bytes or not entry.bytes:
            damaged.append((part.lost_bytes, part.account.records))
    sample_bytes = max(1.0, held_bytes / max(1, account.records))
    shard_samples = account.records / max(1, with_records)
    lost = sum(max(size / sample_bytes, 0 if records else shard_samples) for size, records in damaged)
    done.bad = account.bad.total + round(lost)
    return done


def _nothing_usable(out: Path, done: Indexing, entries: Sequence[IndexedShard]) -> str:
    """What is in the shards, with the first reason in full, and what would be read."""
    found = [reasons] if (reasons := done.account.reasons()) else []
    found += [first] if (first := _first_left_out(entries)) else []
    found += [done.unused_members] if done.others else []
    found += [f"the first members are {', '.join(done.first_names[:3])}"] if done.first_names else []
    found += [WHAT_IS_READ] if done.first_names else []
    return f"no usable sample, so no index was written to {out}; see quarantine.jsonl there: {'; '.join(found)}"


def _first_left_out(entries: Sequence[IndexedShard]) -> str:
    """The first sample left out, or the first damaged shard."""
    for entry in entries:
        for key, reason in entry.part().quarantine[:1]:
            sample = "" if key is None else f"{checked.shown(key)} of "
            return f"the first is {sample}{entry.name}: {reason}"
    return ""


Task = tuple[Shard, Path, dict[str, Any]]
_worker: tuple[Settings, Measure, Any] | None = None
"""Settings, measure and shared counter of a worker process."""


def _run(tasks: Sequence[Task], settings: Settings, num_workers: int, progress: Callable[[int, int], None]) -> None:
    """Makes the parts of shards, largest first, so that a small one finishes last."""
    total = sum(shard.size for shard, *_ in tasks)
    tasks = sorted(tasks, key=lambda task: -task[0].size)
    if not tasks:
        return
    progress(0, total)
    if num_workers < 1:
        measure, done = settings.measure(), 0

        def count(size: int) -> None:
            nonlocal done
            done += size
            progress(done, total)

        for task in tasks:
            _make_part(task, settings, measure, count)
        progress(total, total)
        return
    # The parent has threads (progress, tokenizer), so workers are forked from a server without threads, which imports
    # the slow modules once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *(["transformers.models.auto"] if settings.tokenizer else [])])
    passed = context.Value("Q", 0)
    pool = ProcessPoolExecutor(min(num_workers, len(tasks)), context, _start_worker, (settings, passed))
    try:
        waiting = {pool.submit(_work, task) for task in tasks}
        while waiting:
            finished, waiting = wait(waiting, timeout=0.25)
            for future in finished:
                future.result()
            progress(min(passed.value, total), total)
    except BrokenProcessPool:
        raise ShardError(
            "a worker process died (out of memory, or a decoder crashed); finished shards are kept: run again with "
            "fewer --num-workers, or with --num-workers 0 to see where it happens"
        ) from None
    except BaseException:  # a shard takes minutes, and nobody waits for its result
        for child in multiprocessing.active_children():
            child.terminate()
        pool.shutdown(cancel_futures=True)
        names = {path.name for _, path, _ in tasks}
        for half_written in tasks[0][1].parent.glob(".*.npz.*.partial"):
            if f"{half_written.name[1:].partition('.npz')[0]}.npz" in names:
                half_written.unlink(missing_ok=True)
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    progress(total, total)


def _start_worker(settings: Settings, passed: Synchronized[int]) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is one process per core
    _worker = settings, settings.measure(), passed


def _work(task: Task) -> None:
    assert _worker is not None
    settings, measure, passed = _worker

    def count(size: int) -> None:
        with passed.get_lock():
            passed.value += size

    _make_part(task, settings, measure, count)


def _make_part(task: Task, settings: Settings, measure: Measure, progress: Callable[[int], None]) -> None:
    shard, path, about = task
    try:
        if is_remote(shard.location):
            assert settings.cache_folder is not None
            cache = ShardCache(settings.cache_folder, max(settings.cache_bytes, shard.size))
            with cache.open(shard.location, shard.size, shard.tag) as descriptor:
                part = index_tar(descriptor, measure, settings.verify_images, progress)
        else:
            with Path(shard.location).open("rb") as tar:
                part = index_tar(tar.fileno(), measure, settings.verify_images, progress)
    except RemoteError:
        raise
    except OSError as error:
        raise ShardError(f"{shard.location}: {error.strerror or error}") from None
    part.save(path, about)
