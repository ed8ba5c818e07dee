"""A run besides training: signals, numbers that are not finite, reconstructions, validation, refusals at resume."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ross_mcore.checkpoint.folder import find_checkpoint
from ross_mcore.data.shard_reader import ShardReader
from ross_mcore.logs import read_entries
from tests.distributed.cases import INTERLEAVED, Case, layout
from tests.distributed.conftest import Finished
from tests.distributed.harness import run_ranks
from tests.resealed import change_state


def train_until_signal(flags: dict[str, Any]) -> None:
    """Rank 1 gets SIGTERM after three logged steps; all ranks must then save and return 0."""
    from ross_mcore.commands.train import train_status
    from ross_mcore.config import Config

    metrics = Path(flags["save"]) / "metrics.jsonl"

    def watch() -> None:
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < 3:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    if os.environ["RANK"] == "1":
        threading.Thread(target=watch, daemon=True).start()
    if train_status(Config.from_flat(**flags)):
        raise SystemExit(1)


def train_and_expect(flags: dict[str, Any], status: int) -> None:
    from ross_mcore.commands.train import train_status
    from ross_mcore.config import Config

    if train_status(Config.from_flat(**flags)) != status:
        raise SystemExit(f"expected status {status}")


@pytest.fixture
def flags(base: Callable[[str], Path], shards: Callable[[str], Path], tmp_path: Path) -> dict[str, Any]:
    return {
        "load": str(base("qwen2_siglip")),
        "data_path": str(shards("mixed")),
        "save": str(tmp_path / "run"),
        "training_stage": "finetune",
        "global_batch_size": 4,
        "micro_batch_size": 2,
        "train_iters": 1000,
        "num_workers": 0,
        "distributed_timeout_minutes": 1,
        **layout(2, 2),
    }


def test_a_signal_to_any_rank_saves_everywhere_and_exits_zero(flags: dict[str, Any]) -> None:
    run_ranks(train_until_signal, 4, flags)
    found = find_checkpoint(Path(flags["save"]))
    lines = (Path(flags["save"]) / "metrics.jsonl").read_text().splitlines()
    assert found is not None and 3 <= found.iteration < 1000
    assert json.loads(lines[-1])["iteration"] == found.iteration == found.train_state()["iteration"]


def test_numbers_that_are_not_finite_are_skipped_and_then_end_the_run(flags: dict[str, Any]) -> None:
    """A learning rate that makes every weight infinite at the second step: later steps are not applied, and the third
    in a row ends the run. The checkpoint of the first step is intact."""
    broken = {**flags, "lr": 1e18, "lr_warmup_iters": 1, "max_bad_steps": 3, "save_interval": 1, "train_iters": 50}
    run_ranks(train_and_expect, 4, broken, 2)
    entries = [json.loads(line) for line in (Path(flags["save"]) / "metrics.jsonl").read_text().splitlines()]
    assert [entry["applied"] for entry in entries[-3:]] == [False] * 3
    assert entries[0]["applied"]
    found = find_checkpoint(Path(flags["save"]))
    assert found is not None and found.iteration < len(entries)


def test_reconstructions_are_the_same_at_every_layout(start: Callable[..., Finished], workplace: Path) -> None:
    """TensorBoard's grid and answers.jsonl after two steps, in one process, tensor 2 x pipeline 2, and interleaved."""
    from tensorboard.backend.event_processing.event_accumulator import IMAGES, EventAccumulator

    grids, answers = [], []
    interleaved = Case("", 2, layout(1, 2, **INTERLEAVED))
    for case in (Case("", 1), Case("", 4, layout(2, 2, sequence_parallel=True)), interleaved):
        run = start(
            case,
            f"pictures_{case.world}",
            eval_interval=2,
            eval_images=5,
            eval_answers=3,
            train_iters=2,
            save_interval=None,
        )
        events = EventAccumulator(str(run.folder / "tensorboard"), size_guidance={IMAGES: 0}).Reload()
        assert {"loss/lm_loss", "loss/vm_loss"} <= set(events.Tags()["scalars"])
        (picture,) = events.Images("reconstruction")
        assert picture.step == 2
        grids.append(decode(picture.encoded_image_string))
        answers.append([{**one, "dataset": ""} for one in read_entries(run.folder / "answers.jsonl")])
    assert len(answers[0]) >= 2 and answers[0] == answers[1] == answers[2]
    assert all("What is in picture" in one["question"] and one["expected"].startswith("I see") for one in answers[0])
    assert all(one["answer"] and one["iteration"] == 2 for one in answers[0])
    assert grids[0].shape == grids[1].shape == grids[2].shape
    for grid in grids[1:]:  # 50 sampling steps amplify fp32 differences: measured at most 1 of 255 levels
        assert (grids[0] - grid).abs().max() <= 3
    assert grids[0].std() > 10


def decode(data: bytes) -> torch.Tensor:

    import numpy as np
    from PIL import Image

    return torch.from_numpy(np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), dtype=np.float32))


def test_samples_over_a_bound_are_counted_and_the_others_train(start: Callable[..., Finished]) -> None:
    """An epoch of sixteen packed samples, four of them with three pictures, at tensor 2 x pipeline 2."""
    case = Case("", 4, layout(2, 2, sequence_parallel=True), data="several")
    epoch = {"pack": True, "train_iters": None, "train_epochs": 1, "global_batch_size": 1, "micro_batch_size": 1}
    run = start(case, "bounded", **epoch, max_images_per_sample=2, save_interval=None)
    total = {name: sum(entry[name] for entry in run.metrics) for name in ("skipped_samples", "num_images")}
    assert total == {"skipped_samples": 4, "num_images": 16}
    assert run.metrics[-1]["consumed_samples"] == 16
    assert all(entry["applied"] for entry in run.metrics)


def ask(run: Path) -> None:
    """Questions about 0, 1 and 2 pictures, alone and in one batch: the same answers, which depend on all pictures."""
    from ross_mcore.errors import ConversationError
    from ross_mcore.generation import answer
    from ross_mcore.trained import Question, load_model, prompt_of
    from ross_mcore.trained import run as run_model

    trained = load_model(run)
    size = trained.config.vision.image_size
    first, second = (torch.full((3, size, size), value) for value in (-0.5, 0.9))
    compare = [{"from": "human", "value": "Is <image> like <image> ?"}]
    questions = [
        Question([{"from": "human", "value": "What is one and two?"}]),
        Question([{"from": "human", "value": "<image>\nWhat is it?"}], [first]),
        Question(compare, [first, second]),
        Question(compare, [second, first]),
        Question([{"from": "human", "value": "Compare them."}], [first, second]),
    ]
    alone = [answer(trained, [question], "qwen_2", max_new_tokens=3)[0] for question in questions]
    assert answer(trained, questions, "qwen_2", max_new_tokens=3) == alone
    spec = replace(trained.spec, template="qwen_2")
    states = [run_model(trained, [prompt_of(trained, question, spec)])[1][-1] for question in questions]
    assert not torch.allclose(states[2], states[3], rtol=1e-4)  # the order of the pictures counts
    with pytest.raises(ConversationError, match="3 <image> in the text, 2 pictures"):
        answer(trained, [Question([{"from": "human", "value": "<image> " * 3}], [first, second])], "qwen_2")


def test_questions_may_be_about_several_pictures(base: Callable[[str], Path]) -> None:
    run_ranks(ask, 1, base("qwen2_siglip"))


VALIDATED = {
    "one process": Case("", 1, {"micro_batch_size": 4, "num_workers": 1}),
    "tp2xpp2+sp, packed": Case("", 4, layout(2, 2, sequence_parallel=True, pack=True, micro_batch_size=1)),
    "dp2, other rows": Case("", 2, {"global_batch_size": 6, "micro_batch_size": 1}),
    "interleaved": Case("", 2, layout(1, 2, **INTERLEAVED)),
}


def test_validation_is_the_same_every_time_and_everywhere(
    start: Callable[..., Finished], shards: Callable[[str], Path]
) -> None:
    """Eleven samples do not fill a step of these layouts, and two of a data set are bad. Without a learning rate,
    weights do not change."""
    listed = shards("mixture").with_name("held_out.yaml")
    damage(shards("captions"), listed.with_name("shards_damaged"))
    listed.write_text(shards("mixture").read_text() + "- {path: shards_damaged, weight: 1, name: damaged}")
    found: dict[str, list[dict[str, Any]]] = {}
    for name, case in VALIDATED.items():
        options = {"valid_data_path": str(listed), "valid_interval": 2, "valid_samples": 11}
        run = start(case, f"validated_{name}".replace(" ", "_"), lr=0.0, denoiser_lr=0.0, seed=case.world, **options)
        found[name] = validations(run.folder)
        assert [line["iteration"] for line in found[name]] == [2, 3]
        assert found[name][0]["datasets"] == found[name][1]["datasets"]
    expected = found["one process"][0]["datasets"]
    assert list(expected) == ["first", "second", "damaged"]
    assert expected["first"]["samples"] == expected["second"]["samples"] == expected["second"]["images"] == 11
    assert expected["first"]["images"] == 8 and expected["first"]["labels"] > 0
    assert expected["damaged"]["samples"] == expected["damaged"]["images"] == 11 - 2
    for lines in found.values():
        for name, own in expected.items():
            assert lines[0]["datasets"][name] == pytest.approx(own, rel=1e-6)


def damage(folder: Path, copy: Path) -> None:
    """A copy of a data set in which a picture and the text of another sample are overwritten."""
    shutil.copytree(folder, copy)
    reader = ShardReader(copy)
    for number, is_picture in ((1, True), (4, False)):
        row = reader.samples[number]
        image = reader.images[int(row["first_image"])]
        offset, size = (image["offset"], image["size"]) if is_picture else (row["text_offset"], row["text_size"])
        with (copy / reader.index["shards"][int(row["shard"])]["name"]).open("r+b") as stream:
            stream.seek(int(offset))
            stream.write(b"x" * int(size))


def validations(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    assert all(line.keys() == {"iteration", "datasets", "seconds"} for line in lines)
    return lines


def test_validation_does_not_change_training(
    start: Callable[..., Finished], shards: Callable[[str], Path], workplace: Path
) -> None:
    """With validation after every step, with two interruptions or none: same losses, same lines."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    case, every = Case("", 2, layout(1, 2)), {"valid_data_path": str(shards("mixed")), "valid_interval": 1}
    plain = start(case, "not_validated")
    run = start(case, "validated", exit_duration_in_mins=1e-6, **every)
    assert len(run.metrics) == len(validations(run.folder)) == 1
    run = start(case, "validated", **every)
    for ours, expected in zip(run.metrics, plain.metrics, strict=True):
        assert ours["lm_loss"] == expected["lm_loss"] and ours["vm_loss"] == expected["vm_loss"]
    lines = validations(run.folder)
    assert [line["iteration"] for line in lines] == [1, 2, 3]
    losses = [line["datasets"]["shards_mixed"]["lm_loss"] for line in lines]
    assert losses[0] > losses[1] > losses[2]
    events = EventAccumulator(str(run.folder / "tensorboard")).Reload()
    last = events.Scalars("validation/lm_loss/shards_mixed")[-1]
    assert last.step == 3 and last.value == pytest.approx(losses[2])


def train_and_expect_refusal(flags: dict[str, Any], message: str) -> None:
    """Bad input ends the run with status 2 and the message."""
    from ross_mcore.commands.train import train_status
    from ross_mcore.config import Config

    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        status = train_status(Config.from_flat(**flags))
    if status != 2 or not re.search(message, errors.getvalue()):
        raise SystemExit(f"status {status}: {errors.getvalue()}")


def resume_with_changes(
    first: dict[str, Any], refusals: list[tuple[dict[str, Any], str]], batch: dict[str, Any]
) -> None:
    """A run of one step is resumed with every change of `refusals`, then with those of `batch`."""
    train_and_expect(first, 0)
    for changes, message in refusals:
        train_and_expect_refusal({**first, "train_iters": 2, **changes}, message)
    train_and_expect({**first, "train_iters": 2, **batch}, 0)
    train_and_expect({**first, "train_iters": 3, **batch, "save": first["save"] + " small batches"}, 0)


def test_options_that_must_not_change_at_resume(
    flags: dict[str, Any], base: Callable[[str], Path], shards: Callable[[str], Path]
) -> None:
    """Each is refused with both values; another batch size continues the same stream when it is allowed."""
    text = shards("mixture").read_text()
    changed = shards("mixture").with_name("changed.yaml")
    changed.write_text(text.replace("weight: 3", "weight: 2"))
    assert changed.read_text() != text
    one = {**flags, **layout(), "train_iters": 1, "seq_length": 256, "data_path": str(shards("mixture"))}
    refusals = [
        (
            {"data_path": str(changed)},
            "data_fingerprint '[0-9a-f]{16}' and this run has '[0-9a-f]{16}' .--data-path.*--finetune",
        ),
        ({"load": str(base("llama_clip"))}, "another model .*language.model_type 'qwen2' and 'llama'.*--load"),
        ({"global_batch_size": 2}, "global_batch_size 4 and this run has 2 .*--override-global-batch-size"),
        ({"seed": 7}, "seed 42 and this run has 7 .--seed."),
        ({"vision_lr": 1e-4}, "vision_trains False and this run has True .--vision-lr."),
        ({"supervise_final_eos": False}, "supervise_final_eos True and this run has False"),
    ]
    run_ranks(resume_with_changes, 1, one, refusals, {"global_batch_size": 2, "override_global_batch_size": True})
    ours, small = (
        [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        for folder in (one["save"], one["save"] + " small batches")
    )
    assert [line["consumed_samples"] for line in ours] == [line["consumed_samples"] for line in small[1:]]
    assert ours[1]["sample_digest"] == small[2]["sample_digest"] != small[1]["sample_digest"]


def resume_without_place(first: dict[str, Any]) -> None:
    """A run of one step is resumed from a checkpoint without the place in the data."""
    train_and_expect(first, 0)
    found = find_checkpoint(Path(first["save"]))
    assert found is not None
    change_state(found, data={})
    train_and_expect_refusal({**first, "train_iters": 2}, "iter_0000001/train_state.json: consumed_rows=None .* copy")


def test_a_run_does_not_resume_without_its_place_in_the_data(flags: dict[str, Any]) -> None:
    run_ranks(resume_without_place, 1, {**flags, **layout(), "train_iters": 1})


def test_an_order_of_whole_passes_refuses_weights(flags: dict[str, Any], shards: Callable[[str], Path]) -> None:
    """The order by modality covers all samples, so it needs one pass over every data set."""
    one = {**flags, **layout(), "train_iters": 1, "seq_length": 256, "sampler": "modality_length"}
    refused = "modality_length makes one pass over all samples, but .*mixture.yaml asks for 24 of 16 samples of 'first'"
    run_ranks(train_and_expect_refusal, 1, {**one, "data_path": str(shards("mixture"))}, refused)
    once = shards("mixture").with_name("once.yaml")
    once.write_text(re.sub("weight: .,", "", shards("mixture").read_text()))
    run_ranks(train_and_expect, 1, {**one, "data_path": str(once)}, 0)
