"""Nothing is taken over: a folder in use is refused, and what a run starts from is said."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from ross_mcore.checkpoint import folder
from ross_mcore.commands import convert, index_shards, make_shards
from tests.cases.case import TOKENIZER, Case, Place, command_of_rank, conversation, picture_bytes
from tests.distributed.harness import end_of_ranks
from tests.recorded import GOLDEN

ROSS = GOLDEN / "model_qwen2_siglip" / "hf_checkpoint"


def conversion(save: Path, *more: object) -> Sequence[object]:
    return ["--ross-model", ROSS, "--tokenizer", TOKENIZER, "--save", save, *more]


def training(place: Place, *more: object) -> Sequence[object]:
    """Arguments of a run of one step on four records."""
    place.picture()
    data = place.write("data.json", [{"image": "a.jpg", "conversations": conversation()} for _ in range(4)])
    shards = place.folder / "shards"
    made = ["--data", data, "--image-folder", data.parent / "images", "--out", shards, "--tokenizer", TOKENIZER]
    assert make_shards.main([*map(str, made), "--template", "qwen_2"]) == 0
    return [
        *("--load", place.base, "--data-path", shards, "--save", place.folder / "run", "--template", "qwen_2"),
        *("--training-stage", "finetune", "--train-iters", 1, "--num-workers", 0, "--seq-length", 128, *more),
    ]


def converted(place: Place, name: str = "there") -> Path:
    return shutil.copytree(place.base, place.folder / name)


def trained(place: Place, name: str = "there", iteration: int = 3) -> Path:
    """A run with one checkpoint, which began from the converted model."""
    base, root = folder.require_checkpoint(place.base), place.folder / name
    shutil.copytree(base.path, folder.begin(root, iteration), dirs_exist_ok=True)
    (folder.partial_folder(root, iteration) / folder.MARKER).unlink()
    folder.publish(root, iteration, base.model_config(), {"iteration": iteration, "training_stage": "finetune"})
    return root


def newest(root: Path) -> tuple[int, bool]:
    """The iteration of the newest checkpoint, and whether it is a run's."""
    checkpoint = folder.require_checkpoint(root)
    return checkpoint.iteration, checkpoint.is_trained


def still(iteration: int, is_run: bool) -> Callable[[Place], None]:
    def holds(place: Place) -> None:
        assert newest(place.folder / "there") == (iteration, is_run)

    return holds


def replaced_by_a_base(place: Place) -> None:
    assert newest(place.folder / "there") == (0, False)
    assert newest(place.folder / "there.replaced") == (3, True)


def export_of(place: Place) -> Path:
    return shutil.copytree(ROSS, place.folder / "there")


def half_written(place: Place) -> Path:
    """The folder that a killed conversion leaves."""
    (folder.begin(place.folder / "there", 0) / "__0_0.distcp").write_bytes(b"half")
    return place.folder / "there"


def shards(place: Place, name: str) -> Path:
    """Two samples in a tar."""
    tar = place.folder / name / "shard-0.tar"
    tar.parent.mkdir()
    with tarfile.open(tar, "w") as stream:
        for key in ("a", "b"):
            for suffix, content in (("jpg", picture_bytes()), ("txt", b"A car.")):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                stream.addfile(member, io.BytesIO(content))
    return tar


def index_of_others(place: Place) -> Sequence[object]:
    """Arguments that index the shards of one folder where the index of another one is."""
    other = shards(place, "other")
    assert (
        index_shards.main(["--data-path", str(other), "--out", str(place.folder / "there"), "--num-workers", "0"]) == 0
    )
    return ["--data-path", shards(place, "mine"), "--out", place.folder / "there", "--num-workers", 0]


def index_is_of(name: str) -> Callable[[Place], None]:
    def holds(place: Place) -> None:
        index = json.loads((place.folder / "there" / "index.json").read_text())
        assert [shard["name"] for shard in index["shards"]] == [str(place.folder / name / "shard-0.tar")]

    return holds


CASES = [
    Case(
        "indexing where the index of others is",
        "index-shards",
        index_of_others,
        2,
        ["there/index.json is the index of other shards", "--overwrite"],
        holds=index_is_of("other"),
    ),
    Case(
        "indexing where the index of others is, with --overwrite",
        "index-shards",
        lambda place: [*index_of_others(place), "--overwrite"],
        0,
        holds=index_is_of("mine"),
    ),
    Case(
        "converting into a run",
        "convert",
        lambda place: conversion(trained(place)),
        2,
        ["holds a training run (iter_0000003)", "another --save", "--overwrite"],
        holds=still(3, True),
    ),
    Case(
        "converting into a run with --overwrite",
        "convert",
        lambda place: conversion(trained(place), "--overwrite"),
        0,
        ["held a training run, which is now", "there.replaced", "wrote"],
        holds=replaced_by_a_base,
    ),
    Case(
        "converting twice",
        "convert",
        lambda place: conversion(converted(place)),
        2,
        ["holds a converted model", "--overwrite, which replaces it"],
        holds=still(0, False),
    ),
    Case(
        "converting twice with --overwrite",
        "convert",
        lambda place: conversion(converted(place), "--overwrite"),
        0,
        ["was replaced", "wrote"],
        holds=still(0, False),
    ),
    Case(
        "converting into an exported model",
        "convert",
        lambda place: conversion(export_of(place), "--overwrite"),
        2,
        ["is not empty (it has config.json)"],
    ),
    Case(
        "converting again after a kill",
        "convert",
        lambda place: conversion(half_written(place)),
        0,
        ["which a dead process did not finish", "wrote"],
        holds=still(0, False),
    ),
    Case(
        "exporting into a run",
        "export",
        lambda place: ["--load", place.base, "--save", trained(place)],
        2,
        ["there exists already"],
        holds=still(3, True),
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case, place: Place) -> None:
    case.run(place)


def without_renames(arguments: list[str], where: Path) -> None:
    """Runs `ross` where a folder with content cannot be renamed, as on a mounted bucket."""
    rename = os.rename

    def of_files_only(source: Path, target: Path) -> None:
        if Path(source).is_dir() and any(Path(source).iterdir()):
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(source))
        rename(source, target)

    os.rename = of_files_only  # type: ignore[assignment]
    command_of_rank(arguments, where)


def test_a_mounted_bucket_is_found_before_training(place: Place) -> None:
    """Case of gcsfuse#324 and mountpoint-s3#506, at two ranks: both end with the reason, and nothing is left."""
    arguments = ["train", *map(str, training(place, "--tensor-model-parallel-size", 2))]
    assert end_of_ranks(without_renames, 2, arguments, place.folder) == [2, 2]
    output = (place.folder / "output.0").read_text()
    assert "cannot be renamed there (Function not implemented)" in output and "gcsfuse" in output
    assert not (place.folder / "run").exists()


@pytest.mark.parametrize("command", ["convert", "export", "make-shards"])
def test_tools_find_a_mounted_bucket_first(command: str, place: Place) -> None:
    save = place.folder / "result"
    arguments: Sequence[object] = conversion(save)
    if command == "export":
        arguments = ["--load", place.base, "--save", save]
    elif command == "make-shards":
        place.picture()
        data = place.write("data.json", [{"image": "a.jpg", "conversations": conversation()}])
        arguments = ["--data", data, "--image-folder", place.folder / "images", "--out", save]
    assert end_of_ranks(without_renames, 1, [command, *map(str, arguments)], place.folder) == [2]
    assert "cannot be renamed there" in (place.folder / "output.0").read_text()
    assert not save.exists()


def test_load_is_never_ignored_in_silence(place: Place) -> None:
    """A first try from the wrong model leaves a checkpoint; the same command resumes, another --load is refused."""
    other = place.folder / "other"
    assert convert.main([*map(str, conversion(other, "--dtype", "bfloat16"))]) == 0
    first = list(training(place, "--save-interval", 1))
    right = [other if part == place.base else part for part in first]
    longer = [2 if part == 1 else part for part in first]
    run = place.folder / "run"
    for name, arguments, status, says in (
        (
            "first try",
            first,
            0,
            [f"starts from the weights of {place.base}", "layers: local (this machine has no GPU)"],
        ),
        ("the same again", longer, 0, ["continues from iteration 1", f"--load {place.base} is not read"]),
        ("another model", right, 2, [f"started from {place.base}, and --load {other}", "another --save"]),
        ("a base as --save", [*first, "--save", other], 2, ["holds a converted model, not a run"]),
        ("older", [*first, "--load", run / "iter_0000001"], 2, ["To go back, move the newer checkpoints"]),
    ):
        Case(name, "train", lambda _, given=arguments: given, status, says).run(place)
