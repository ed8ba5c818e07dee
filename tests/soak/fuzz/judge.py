"""Judges how a run ended: its status, its error, its acts, and the files it left."""

from __future__ import annotations

import fnmatch
import hashlib
import io
import json
import re
import stat
import tarfile
import zipfile
from pathlib import Path

from tests.soak.fuzz.child import LIMITS, Limits, Outcome
from tests.soak.fuzz.stand_ins import Damage
from tests.soak.fuzz.targets import Target

RAW = re.compile(
    r"\b[A-Z]\w*(Error|Exception|Interrupt)\b|NoneType|Traceback|object at 0x|<class |__init__|unexpected keyword"
    r"|invalid literal|has no attribute|unsupported operand|not subscriptable"
)
"""Internals of the program, which mean nothing to the owner of a file."""
TRACEBACK = re.compile(r"Traceback \(most recent call last\)|^Exception ignored in|^terminate called", re.MULTILINE)
REMEDY = re.compile(
    r"\b(copy|save|saved|make|made|give|index|train|mend|move|remove|delete|choose|say|use|expected|did you mean|see"
    r"|start|convert|lower|raise|put|take|set|reads?|is read|are read|must|needs?|only|at most|implemented|argument)\b"
    r"|--help",
    re.IGNORECASE,
)
"""Words of a remedy, or of what was expected."""
MOST_ERROR_CHARACTERS = 1600
MOST_READ_BYTES = 64 << 20
LARGE = "a large file"


def judge(
    target: Target,
    outcome: Outcome,
    before: dict[str, str],
    folder: Path,
    damage: Damage | None,
    limits: Limits = LIMITS,
) -> list[str]:
    """All problems. `before`: the `listing` of the case's `folder` before the run; damage: None for valid files."""
    problems = []
    if outcome.status is None:
        problems.append(f"it hung: {outcome.hung}")
    elif outcome.status not in (0, 2, *target.findings):
        problems.append(f"it ended with {outcome.status}")
    said = outcome.stderr + outcome.stdout
    if found := TRACEBACK.search(said):
        problems.append(f"a traceback was printed: {found[0]}")
    if re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", said):
        problems.append("a control character of the input went to the terminal")
    if outcome.peak_bytes > limits.peak_bytes:
        problems.append(f"it took {outcome.peak_bytes >> 20} MiB more than its imports")
    if outcome.left:
        problems.append(f"{outcome.left} of its processes were left")
    problems += [f"it {act}" for act in outcome.acts if not (target.chooses_paths and act.startswith("read "))]
    if damage is None and outcome.status != 0:
        problems.append("valid files were refused")
    elif outcome.status == 2:
        problems += judge_message(outcome.stderr, damage, target)
    elif outcome.status in target.findings and target.names_findings and damage and not is_named(damage, said):
        problems.append(f"what it found does not name {damage.name}")
    return problems + judge_files(target, outcome.status, before, listing(folder), folder)


def is_error(line: str, target: Target) -> bool:
    """Whether a line begins like an error of a tool."""
    return re.match(rf"({Path(target.script).stem}|pretrain_ross)(\.py)?: \S", line) is not None  # who parses flags


def error_message(stderr: str, target: Target) -> str:
    """The final error of a tool: from the last line that begins with its name to the end."""
    lines = stderr.rstrip("\n").split("\n")
    starts = [number for number, line in enumerate(lines) if is_error(line, target)]
    return "\n".join(lines[starts[-1] :] if starts else lines[-1:])


def judge_message(stderr: str, damage: Damage | None, target: Target) -> list[str]:
    """Problems of an error, which must be one paragraph with the file and a remedy."""
    message, problems = error_message(stderr, target), []
    if not is_error(message, target):
        problems.append("the last line is no error of the tool")
    if "\n" in message:
        problems.append(f"the error is {message.count(chr(10)) + 1} lines and not one paragraph")
    if sum(is_error(line, target) for line in stderr.split("\n")) > 1:
        problems.append("there is more than one error")
    if found := RAW.search(message):
        problems.append(f"the error speaks of the program's inside: {found[0]}")
    if len(message) > MOST_ERROR_CHARACTERS:
        problems.append(f"the error is {len(message)} characters long")
    if not REMEDY.search(message):
        problems.append("the error does not say what to do")
    names_flag = target.holds_options and re.search(r"--[a-z][a-z-]+", message)  # a flag is a key of that file
    if damage is not None and not names_flag and not is_named(damage, message):
        problems.append(f"the error does not name {damage.name}")
    return problems


def is_named(damage: Damage, text: str) -> bool:
    """Whether a text names a damaged file: by its own name, that of its link's target, or its folder."""
    names = []
    for path in (damage.name, *damage.also):
        folder, _, name = path.rpartition("/")
        names += [name, repr(name)[1:-1]] + ([folder] if folder not in ("in", "out", "") else [])
        names += re.findall(r"^.*/iter_\d+", folder)  # of a checkpoint that is whole, and another one
    return any(name in text for name in names if name)


def listing(folder: Path) -> dict[str, str]:
    """Every path below a folder with its content. Only regular files are opened."""
    found = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        if stat.S_ISLNK(status.st_mode):
            kind = f"link to {path.readlink()}"
        elif stat.S_ISDIR(status.st_mode):
            kind = "folder"
        elif not stat.S_ISREG(status.st_mode):
            kind = f"of kind {stat.S_IFMT(status.st_mode):o}"
        elif status.st_size > MOST_READ_BYTES:
            kind = f"{LARGE} of {status.st_size} bytes, {status.st_mtime_ns}"
        else:
            kind = hashlib.sha256(path.read_bytes()).hexdigest()
        found[path.relative_to(folder).as_posix()] = kind
    return found


def judge_files(
    target: Target, status: int | None, before: dict[str, str], after: dict[str, str], folder: Path
) -> list[str]:
    """Only out/ may change; after a refusal, only the files that the target may leave."""
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    outside = [path for path in changed if not path.startswith("out/")]
    problems = [f"outside of out/ was written: {', '.join(outside[:5])!r}"] if outside else []
    inside = [path.removeprefix("out/") for path in changed if path.startswith("out/")]
    if status != 0:
        left = [path for path in inside if not any(fnmatch.fnmatch(path, pattern) for pattern in target.may_leave)]
        problems += [f"left behind in out/: {', '.join(left[:5])}"] if left else []
    elif missing := [name for name in target.makes if not any(fnmatch.fnmatch(path, f"out/{name}") for path in after)]:
        problems.append(f"it says that it worked, and did not make {missing[0]}")
    partial = [path for path in inside if re.search(r"\.(partial|new|tmp|old)$", path) and f"out/{path}" in after]
    if partial:
        problems.append(f"half-written files are left: {', '.join(partial[:5])}")
    for path in inside:
        kind = after.get(f"out/{path}", "folder")
        is_copy = kind in before.values()
        is_read = kind != "folder" and not is_copy and not kind.startswith(("link", "of kind", LARGE))
        if is_read and (why := not_whole(folder / "out" / path)) is not None:
            problems.append(f"out/{path} is half-written: {why}")
    return problems


def not_whole(path: Path) -> str | None:
    """Why a file does not have the format of its name, None if it does."""
    data, suffix = path.read_bytes(), path.suffix
    try:
        if suffix == ".json":
            json.loads(data)
        elif suffix == ".jsonl":
            if data and not data.endswith(b"\n"):
                return "its last line has no end"
            for line in data.splitlines():
                json.loads(line)
        elif suffix == ".tar":
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                end = max((member.offset_data + member.size for member in tar), default=0)
            if len(data) < end + 1024 or data[end:].strip(b"\0"):
                return "it does not end as a tar does"
        elif suffix in (".npz", ".pt"):
            if (bad := zipfile.ZipFile(io.BytesIO(data)).testzip()) is not None:
                return f"{bad} is damaged"
        elif suffix == ".npy":
            import numpy as np

            np.load(io.BytesIO(data), allow_pickle=False)
        elif suffix == ".safetensors":
            from safetensors.torch import load

            load(data)
        elif suffix == ".png":
            from PIL import Image

            Image.open(io.BytesIO(data)).load()
        elif not data and suffix in (".distcp", ".bin", ".metadata"):
            return "it is empty"
    except Exception as error:  # parsers raise any type
        return f"{type(error).__name__}: {error}"[:200]
    return None
