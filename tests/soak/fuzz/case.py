"""One case: copy valid files, damage one, run the tool on them, and judge what it did."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import random
import re
import shutil
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ross_mcore.checkpoint.manifest import MARKER, CheckpointError, read_manifest, record_of
from tests.soak.fuzz import child
from tests.soak.fuzz.formats import damage
from tests.soak.fuzz.targets import TARGETS, Target

CANARY = "nobody may change this\n"
RAW = re.compile(
    r"\b[A-Z]\w*(Error|Exception|Interrupt)\b|NoneType|Traceback|object at 0x|<class |__init__|unexpected keyword"
    r"|invalid literal|has no attribute|unsupported operand|not subscriptable"
)
"""What belongs to the program's inside and says nothing to who handed over a file."""
ERROR = re.compile(r"^[a-z_]+(\.py)?: \S")
MOST_ERROR_CHARACTERS = 1600


@dataclass(frozen=True)
class Result:
    """A judged case: `problems` is empty for one that worked or was refused as it should be."""

    number: int
    target: str
    what: str
    status: int | None
    message: str
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_bytes: int = 0


def target_of(number: int) -> tuple[Target, int]:
    """The target of a case, and the how manieth case of it this is: the first one damages nothing."""
    ordinal, which = divmod(number, len(TARGETS))
    return TARGETS[which], ordinal


def run_case(number: int, seed: int, valid: Path, folder: Path) -> Result:
    """Makes `folder` the case's own, runs and judges it. The log lies beside it, as `folder`.out and .err."""
    target, ordinal = target_of(number)
    rng = random.Random(f"{seed} {target.name} {ordinal}")
    prepare(target, valid, folder)
    what = damage_files(target, folder, rng) if ordinal else "nothing is damaged"
    before = listing(folder)
    outcome = child.run(target.script, target.arguments.split(), folder, folder)
    message = error_message(outcome.stderr)
    problems = judge(target, outcome, before, listing(folder), damaged=what.split(":")[0].split(" is ")[0])
    if not ordinal and outcome.status != 0:
        problems.append("valid files were refused")
    return Result(number, target.name, what, outcome.status, message, problems, outcome.seconds, outcome.peak_bytes)


def prepare(target: Target, valid: Path, folder: Path) -> None:
    """in/ with the target's inputs, out/, tmp/ and a canary that nobody has any business with."""
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("in", "out", "tmp", "canary"):
        (folder / name).mkdir(parents=True)
    (folder / "canary" / "secret.txt").write_text(CANARY)
    for name in target.inputs:
        source = valid / name.removeprefix("out/")
        goal = folder / (name if name.startswith("out/") else f"in/{name}")
        if source.is_dir():
            shutil.copytree(source, goal)
        else:
            shutil.copyfile(source, goal)


def damage_files(target: Target, folder: Path, rng: random.Random) -> str:
    """Damages a file, sometimes a second time; often makes the sizes that others state of it true again."""
    by_pattern = [sorted(filter(Path.is_file, folder.glob(pattern))) for pattern in target.hostile]
    path = rng.choice(rng.choice([files for files in by_pattern if files]))
    what = damage(path, folder, rng)
    if rng.random() < 0.15 and path.is_file() and not path.is_symlink():
        what += " and " + damage(path, folder, rng)
    if rng.random() < 0.75 and path.is_file():
        with suppress(ValueError, TypeError, AttributeError, KeyError, RecursionError, CheckpointError):
            state_truly(path)
    return what


def state_truly(path: Path) -> None:
    """Makes the marker of a checkpoint, or the index of shards, agree with a file again, to get to what lies deeper."""
    for folder in path.parents[:2]:
        marker, index = folder / MARKER, folder / "index.json"
        if path == marker:
            facts = json.loads(path.read_bytes())
            facts.pop("crc32", None)
            facts["crc32"] = f"{zlib.crc32(json.dumps(facts, sort_keys=True).encode()):08x}"
            path.write_text(json.dumps(facts))
        elif marker.is_file():
            manifest = read_manifest(folder)
            manifest.files[path.relative_to(folder).as_posix()] = record_of(path)
            marker.write_text(manifest.text())
        elif index.is_file() and path.suffix == ".tar":
            facts = json.loads(index.read_bytes())
            for shard in facts["shards"]:
                if shard["name"] == path.name:
                    shard["bytes"] = path.stat().st_size
            index.write_text(json.dumps(facts))


def listing(folder: Path) -> dict[str, str]:
    """Every path below a folder, and what is there."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            kind = f"link to {path.readlink()}"
        elif path.is_dir():
            kind = "folder"
        else:
            kind = hashlib.sha256(path.read_bytes()).hexdigest()
        found[path.relative_to(folder).as_posix()] = kind
    return found


def error_message(stderr: str) -> str:
    """The error that a tool ends with: its last line."""
    lines = stderr.rstrip("\n").split("\n")
    return lines[-1]


def judge(
    target: Target, outcome: child.Outcome, before: dict[str, str], after: dict[str, str], damaged: str
) -> list[str]:
    """Everything that is wrong with how a run ended."""
    problems = []
    if outcome.status is None:
        problems.append(f"it hung: stopped after {child.WALL_SECONDS} s")
    elif outcome.status not in (0, 2):
        problems.append(f"it ended with {outcome.status}")
    if "Traceback (most recent call last)" in outcome.stderr + outcome.stdout:
        problems.append("a traceback was printed")
    if "\x1b" in outcome.stderr + outcome.stdout:
        problems.append("a control character of the input went to the terminal")
    if outcome.peak_bytes > child.PEAK_BYTES:
        problems.append(f"it took {outcome.peak_bytes >> 20} MiB more than its imports")
    if outcome.status == 2:
        problems += judge_message(error_message(outcome.stderr), damaged)
    return problems + judge_files(target, outcome.status, before, after)


def judge_message(message: str, damaged: str) -> list[str]:
    """What is wrong with an error: it should be one paragraph that names the file and says what to do."""
    problems = []
    if not ERROR.match(message):
        problems.append("the last line is no error of the tool")
    if found := RAW.search(message):
        problems.append(f"the error speaks of the program's inside: {found[0]}")
    if len(message) > MOST_ERROR_CHARACTERS:
        problems.append(f"the error is {len(message)} characters long")
    if not any(name in message for name in names_of(damaged)):
        problems.append(f"the error does not name {damaged}")
    return problems


def names_of(damaged: str) -> list[str]:
    """What names a file well enough: its own name, or a folder or file around it."""
    parts = damaged.split("/")
    return [parts[-1], *("/".join(parts[:count]) for count in range(2, len(parts)))]


def judge_files(target: Target, status: int | None, before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Nothing but out/ may change; after a refusal, nothing there but what the target may leave."""
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    outside = [path for path in changed if not path.startswith("out/")]
    problems = [f"outside of out/ was written: {', '.join(outside[:5])}"] if outside else []
    inside = [path.removeprefix("out/") for path in changed if path.startswith("out/")]
    if status != 0:
        left = [path for path in inside if not any(fnmatch.fnmatch(path, pattern) for pattern in target.may_leave)]
        problems += [f"left behind in out/: {', '.join(left[:5])}"] if left else []
    partial = [path for path in inside if re.search(r"\.(partial|new|tmp)$", path) and f"out/{path}" in after]
    if partial:
        problems.append(f"half-written files are left: {', '.join(partial[:5])}")
    return problems
