"""The stamps example without its pictures: selection, drawing, records and errors."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path

import make_parts
import numpy as np
import pytest
import run_stamps
import stamps
from PIL import Image
from stamps import PICTURE_PIXELS, Stamp, StampsError

from ross_mcore.flags import parse


def write_stamp(folder: Path, path: str, text: str | None, size: tuple[int, int] = (20, 10)) -> None:
    picture = folder / path
    picture.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGBA", size, (200, 0, 0, 255)).save(picture)
    if text is not None:
        picture.with_suffix(".txt").write_text(text, encoding="utf-8")


def some_stamps(count: int) -> list[Stamp]:
    return [Stamp(f"animals/{number:03d}.png", f"Animal number {number}.") for number in range(count)]


def test_only_captioned_originals_are_found(tmp_path: Path) -> None:
    write_stamp(tmp_path, "food/apple.png", "A “Fuji” apple.\nde.utf8=Ein Apfel.\n")
    write_stamp(tmp_path, "animals/cat.png", " A cat. \n")
    write_stamp(tmp_path, "animals/empty.png", "")
    write_stamp(tmp_path, "animals/silent.png", None)
    write_stamp(tmp_path, "animals/cat_mirror.png", "A cat.")
    write_stamp(tmp_path, "animals/cat_flip.png", "A cat.")
    write_stamp(tmp_path, "symbols/a.png", "The letter A.")
    expected = [
        Stamp("animals/cat.png", "A cat."),
        Stamp("animals/empty.png", ""),
        Stamp("food/apple.png", "A “Fuji” apple."),
    ]
    assert stamps.find_stamps(tmp_path) == expected


def test_a_folder_without_stamps_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(StampsError, match="--stamps-dir"):
        stamps.find_stamps(tmp_path)


def test_selection_has_distinct_captions_of_fair_length() -> None:
    crowd = some_stamps(40)
    unfit = [
        Stamp("a/twin-1.png", "A twin."),
        Stamp("a/twin-2.png", "A twin."),
        Stamp("a/short.png", "Owl."),
        Stamp("a/long.png", "An animal that " + "eats and " * 5 + "sleeps."),
        Stamp("a/none.png", ""),
    ]
    chosen = stamps.select_stamps(crowd + unfit, 40)
    assert chosen == crowd
    with pytest.raises(StampsError, match=r"40 of 45 .* 41 are needed"):
        stamps.select_stamps(crowd + unfit, 41)


def test_selection_depends_on_the_paths_alone() -> None:
    crowd = some_stamps(60)
    chosen = stamps.select_stamps(crowd, 20)
    assert len(chosen) == 20
    assert [stamp.path for stamp in chosen] == sorted(stamp.path for stamp in chosen)
    shuffled = random.Random(0).sample(crowd, len(crowd))
    assert stamps.select_stamps(shuffled, 20) == chosen
    one_more = stamps.select_stamps([*crowd, Stamp("zoo/new.png", "A new animal.")], 20)
    assert len(set(chosen) & set(one_more)) >= 19


def test_a_stamp_is_centred_on_white_and_keeps_its_shape(tmp_path: Path) -> None:
    write_stamp(tmp_path, "wide.png", None, size=(256, 128))
    write_stamp(tmp_path, "small.png", None, size=(20, 10))
    wide = np.asarray(stamps.draw_stamp(tmp_path / "wide.png"))
    assert wide.shape == (PICTURE_PIXELS, PICTURE_PIXELS, 3)
    red = (wide == [200, 0, 0]).all(axis=2)
    assert red[16:48].all() and not red[:16].any() and not red[48:].any()
    assert (wide[:16] == 255).all()
    small = (np.asarray(stamps.draw_stamp(tmp_path / "small.png")) == [200, 0, 0]).all(axis=2)
    assert small.sum() == 20 * 10 and small[27:37, 22:42].all()


def test_records_show_one_picture_each_and_the_chat_asks() -> None:
    records = stamps.make_records([Stamp("food/fruit/apple.png", "A green apple.")])
    assert records["pretrain"] == [
        {
            "id": "food-fruit-apple",
            "image": "food-fruit-apple.png",
            "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A green apple."}],
        }
    ]
    turns = records["finetune"][0]["conversations"]
    assert turns[0]["value"] == "<image>\nWhat is in the picture?"
    assert turns[1] == {"from": "gpt", "value": "A green apple."}


def test_a_written_data_set_reads_back_and_repeats(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for number in range(12):
        write_stamp(source, f"a/b{number}.png", f"Picture “{number}”.\n")
    for out in ("one", "two"):
        chosen = stamps.write_dataset(source, tmp_path / out, 10)
    captions = stamps.read_captions(tmp_path / "one")
    assert captions == {stamp.image: stamp.caption for stamp in chosen}
    assert sorted(captions) == sorted(path.name for path in (tmp_path / "one" / "images").iterdir())
    for path in (tmp_path / "one").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
    assert len(json.loads((tmp_path / "one" / "pretrain.json").read_text(encoding="utf-8"))) == 10


def test_unpacked_pictures_are_not_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "unpacked" / stamps.INSIDE_PACKAGE).mkdir(parents=True)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a command was run"))
    assert stamps.fetch_stamps(tmp_path) == tmp_path / "unpacked" / stamps.INSIDE_PACKAGE


@pytest.mark.parametrize(
    ("program", "expected"),
    [("no-such-program", "this machine has no no-such-program"), ("false", "`false` failed: status 1")],
)
def test_a_failed_fetch_names_the_remedy(tmp_path: Path, program: str, expected: str) -> None:
    with pytest.raises(StampsError, match=f"{expected}.*apt-get update.*--stamps-dir DIR"):
        stamps._run([program], tmp_path)


def test_training_commands_follow_the_recipes(tmp_path: Path) -> None:
    command = [str(word) for word in run_stamps.training_command("finetune", tmp_path / "pretrain", tmp_path)]
    assert command[command.index("--nproc-per-node") + 1] == "4"
    assert command[command.index("--save") + 1] == str(tmp_path / "finetune")
    arguments = command[command.index("pretrain_ross.py") + 1 :]
    config = parse(arguments)
    layout = config.parallel.tensor_model_parallel_size, config.parallel.pipeline_model_parallel_size
    assert (config.training.training_stage, *layout) == ("finetune", 2, 2)
    assert config.training.train_iters == run_stamps.read_train_iters(run_stamps.HERE / "finetune.yaml")


def test_checks_fail_where_they_should() -> None:
    resume = {"stopped_after_iteration": 20, "iterations": 40, "iterations_logged": 40, "same_samples": True}
    loss = {"first": 5.0, "last": 0.1}
    summary = {
        "captions": 150,
        "captions_reproduced_exactly": 120,
        "losses": {"finetune lm_loss": loss, "finetune vm_loss": dict(loss)},
        "resume": resume,
    }
    assert list(run_stamps.checks(summary).values()) == [True, True, True, True]
    summary["captions_reproduced_exactly"] = 119
    assert list(run_stamps.checks(summary).values()) == [False, True, True, True]
    summary["losses"]["finetune vm_loss"]["last"] = 5.1
    assert list(run_stamps.checks(summary).values()) == [False, False, True, True]
    for wrong in ({"same_samples": False}, {"iterations_logged": 39}):
        summary["resume"] = resume | wrong
        assert list(run_stamps.checks(summary).values())[2:] == [True, False]
    summary["resume"] = resume | {"stopped_after_iteration": 40}
    assert list(run_stamps.checks(summary).values())[2:] == [False, True]


def test_parts_are_remade_when_pictures_or_settings_change(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for number in range(4):
        write_stamp(source, f"a/b{number}.png", f"Picture “{number}”.\n")
    stamps.write_dataset(source, tmp_path / "data", 4)
    arguments = make_parts.parse_arguments(["--data", str(tmp_path / "data"), "--out", str(tmp_path / "parts")])
    before = make_parts.fingerprint(arguments)
    assert make_parts.fingerprint(arguments) == before
    arguments.vae_steps += 1
    assert make_parts.fingerprint(arguments) != before
    arguments.vae_steps -= 1
    write_stamp(tmp_path, "data/images/a-b0.png", None)
    assert make_parts.fingerprint(arguments) != before
