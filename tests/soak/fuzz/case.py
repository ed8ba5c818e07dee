"""One case: copies valid files, damages one, runs the tool on them, and judges the outcome."""

from __future__ import annotations

import json
import random
import shutil
import zlib
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ross_mcore.checkpoint.manifest import MARKER, read_manifest, record_of
from ross_mcore.errors import CheckpointError
from tests.soak.fuzz import child, stand_ins
from tests.soak.fuzz.formats import damage
from tests.soak.fuzz.judge import error_message, judge, listing
from tests.soak.fuzz.stand_ins import Damage
from tests.soak.fuzz.targets import TARGETS, Target

CANARY = "nobody may change this\n"


@dataclass(frozen=True)
class Result:
    """A judged case: `problems` is empty if it worked or was refused correctly."""

    number: int
    target: str
    what: str
    status: int | None
    message: str
    problems: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_bytes: int = 0


def target_of(number: int) -> tuple[Target, int]:
    """The target of a case, and the number of the case among those of the target; number 0 damages nothing."""
    ordinal, which = divmod(number, len(TARGETS))
    return TARGETS[which], ordinal


def run_case(number: int, seed: int, valid: Path, folder: Path) -> Result:
    """Prepares `folder`, runs the case in it and judges it. The log is in `folder`.out, .err and .acts."""
    target, ordinal = target_of(number)
    rng = random.Random(f"{seed} {target.name} {ordinal}")
    prepare(target, valid, folder)
    done = damage_files(target, folder, rng) if ordinal else None
    before = listing(folder)
    outcome = child.run(target.script, target.arguments.split(), folder, folder)
    problems = judge(target, outcome, before, folder, done)
    what = "nothing is damaged" if done is None else str(done)
    message = error_message(outcome.stderr, target) if outcome.status else ""
    return Result(number, target.name, what, outcome.status, message, problems, outcome.seconds, outcome.peak_bytes)


def prepare(target: Target, valid: Path, folder: Path) -> None:
    """Makes in/ with the target's inputs, out/, tmp/ and a canary file that no tool may touch."""
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


def damage_files(target: Target, folder: Path, rng: random.Random) -> Damage:
    """Damages a file, sometimes twice; often corrects the sizes that other files state of it."""
    if target.plants and rng.random() < 0.15:
        return stand_ins.plant(folder / rng.choice(target.plants), folder, rng)
    by_pattern = [sorted(filter(Path.is_file, folder.glob(pattern))) for pattern in target.hostile]
    path = rng.choice(rng.choice([files for files in by_pattern if files]))
    done = damage(path, folder, rng)
    if rng.random() < 0.15 and path.is_file() and not path.is_symlink() and path.stat().st_size < 64 << 20:
        again = damage(path, folder, rng)
        done = Damage(done.name, f"{done.what} and {again.what}", (again.name, *done.also, *again.also))
    if rng.random() < 0.75:
        for changed in dict.fromkeys(folder / name for name in (done.name, *done.also)):
            errors = (ValueError, TypeError, AttributeError, KeyError, RecursionError, CheckpointError, OSError)
            with suppress(*errors):
                if changed.is_file():
                    state_truly(changed)
    return done


def state_truly(path: Path) -> None:
    """Makes the marker of a checkpoint, or the index of shards, fit a file again, so that deeper checks are reached."""
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
