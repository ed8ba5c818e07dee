"""Resume: options that must not change, options that may, and how changes are logged."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from ross_mcore.architecture import LanguageConfig, ModelConfig, ProjectorConfig, VisionConfig
from ross_mcore.checkpoint import folder
from ross_mcore.checkpoint.folder import Checkpoint
from ross_mcore.config import Config
from ross_mcore.data.spec import SampleSpec
from ross_mcore.engine.state import TrainState, changed_options
from ross_mcore.errors import CheckpointError, ConfigError
from ross_mcore.parallel.layout import Layout
from ross_mcore.training.resume import (
    IDENTITY,
    changeable_options,
    continued,
    refuse_other_model,
    rows_kept,
    started_from,
)

STARTED = TrainState(seed=1, data_fingerprint="a", global_batch_size=8, samples=SampleSpec("plain", seq_length=64))
LLAMA = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
CLIP = {"model_type": "clip_vision_model", "hidden_size": 8, "num_hidden_layers": 1, "image_size": 8, "patch_size": 4}


def saved(path: Path, state: dict[str, Any]) -> Checkpoint:
    (path / folder.TRAIN_STATE).write_text(json.dumps(state))
    return Checkpoint(path, state.get("iteration", 0))


def resumed(path: Path, started: TrainState, **flags: Any) -> TrainState:
    before = replace(STARTED, iteration=7, data={"consumed_samples": 56}, bad_samples=2)
    return continued(saved(path, before.to_dict()), started, Config.from_flat(**flags))


OPTIONS_OF_SAMPLES = [name for name in asdict(STARTED.samples) if name != "own_templates"]
"""The content of own templates is not an option: a template's name has a digest of it."""
FLAGS = IDENTITY | {name: f"--{name.replace('_', '-')}" for name in OPTIONS_OF_SAMPLES}


@pytest.mark.parametrize("name", FLAGS)
def test_another_run_is_refused_with_both_values(name: str, tmp_path: Path) -> None:
    before = STARTED.to_dict()[name]
    now = not before if isinstance(before, bool) else 7 if before is None else before * 2 or "other"
    with pytest.raises(ConfigError) as error:
        resumed(tmp_path, TrainState.from_dict(json.loads(json.dumps({**STARTED.to_dict(), name: now}))))
    for part in (str(tmp_path), f"{name} {before!r} and this run has {now!r}", FLAGS[name], "--finetune"):
        assert part in str(error.value)


def test_every_field_of_the_state_either_changes_or_must_match() -> None:
    changing = {"iteration", "data", "bad_steps_in_a_row", "bad_samples", "options", "training_stage"}
    changing |= {"recent_lm_losses", "recent_vm_losses", "started_from", "facts"}
    assert STARTED.to_dict().keys() == changing | FLAGS.keys() | {"own_templates"}


def test_the_options_that_samples_depend_on_are_flags() -> None:
    assert set(OPTIONS_OF_SAMPLES) <= asdict(Config().data).keys()


def test_a_state_saved_before_an_option_existed_has_its_default(tmp_path: Path) -> None:
    newer = (
        "mm_use_im_start_end",
        "max_images_per_sample",
        "max_tokens_per_sample",
        "supervise_final_eos",
        "own_templates",
    )
    state = {name: value for name, value in STARTED.to_dict().items() if name not in newer}
    assert continued(saved(tmp_path, state), STARTED, Config()).samples == STARTED.samples


def test_the_same_run_resumes_where_it_stopped(tmp_path: Path) -> None:
    state = resumed(tmp_path, replace(STARTED, options={"lr": 2.0}))
    assert (state.iteration, state.consumed_samples, state.bad_samples) == (7, 56, 2)
    assert state.options == {"lr": 2.0}


def test_another_batch_size_needs_its_flag(tmp_path: Path) -> None:
    larger, allowed = replace(STARTED, global_batch_size=16), {"override_global_batch_size": True}
    assert resumed(tmp_path, larger, train_iters=9, **allowed).global_batch_size == 16
    with pytest.raises(ConfigError, match="8 and this run has 16 .*allow the change with --override-global-batch-size"):
        resumed(tmp_path, larger, train_iters=9)
    with pytest.raises(ConfigError, match="--override-global-batch-size with --sampler modality_length"):
        resumed(tmp_path, larger, sampler="modality_length", **allowed)
    with pytest.raises(ConfigError, match="--override-global-batch-size with --train-epochs.*give --train-iters"):
        resumed(tmp_path, larger, train_epochs=2, **allowed)
    with pytest.raises(ConfigError, match="seed 1 and this run has 2"):
        resumed(tmp_path, replace(larger, seed=2), train_iters=9, **allowed)


def test_rows_chosen_for_samples_are_kept_at_another_data_parallel_size(tmp_path: Path) -> None:
    def kept(rows: int, data_parallel: int, samples: int = 128, **flags: Any) -> int | None:
        state = replace(STARTED, global_batch_size=rows, global_batch_samples=128)
        config = Config.from_flat(global_batch_samples=samples, micro_batch_size=2, train_iters=9, **flags)
        return rows_kept(saved(tmp_path, state.to_dict()), config, Layout(1, 1, data_parallel, (1,)))

    assert kept(rows=32, data_parallel=4) == kept(rows=32, data_parallel=8) == 32
    assert kept(rows=32, data_parallel=4, samples=256) is None  # `continued` refuses
    with pytest.raises(
        ConfigError, match="30 rows a step .* a multiple of 8: --micro-batch-size 2 x .*--override-glob"
    ):
        kept(rows=30, data_parallel=4)
    assert kept(rows=30, data_parallel=4, override_global_batch_size=True) is None


def test_changed_options_are_listed(tmp_path: Path) -> None:
    def options(iterations: int, **flags: Any) -> dict[str, Any]:
        return changeable_options(Config.from_flat(**flags), iterations)

    before = json.loads(json.dumps(replace(STARTED, options=options(10, lr=1e-3)).to_dict()))
    now = replace(STARTED, options=options(20, lr=5e-4, vision_lr=None), global_batch_size=16)
    assert changed_options(before, now) == [
        "--lr 0.001 -> 0.0005",
        "--train-iters 10 -> 20",
        "--global-batch-size 8 -> 16",
    ]
    assert changed_options(before, replace(STARTED, options=options(10, lr=1e-3))) == []


def test_a_state_of_another_version_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="train_state.json .* of another version .*'epoch'"):
        continued(saved(tmp_path, {"epoch": 1}), STARTED, Config())


def checkpoint(
    root: Path,
    tokenizer: str = "a b c",
    iteration: int = 1,
    state: dict[str, Any] | None = None,
    weights: str = "",
    **language: Any,
) -> Checkpoint:
    config = LanguageConfig.from_huggingface({**LLAMA, "num_attention_heads": 1, **language})
    model = ModelConfig(config, VisionConfig(CLIP, (0, 0, 0), (1, 1, 1)), ProjectorConfig(), None, None)
    assets = root / "assets"
    (assets / "tokenizer").mkdir(parents=True, exist_ok=True)
    (assets / "tokenizer" / "vocab.txt").write_text(tokenizer)
    (assets / "preprocessor_config.json").write_text("{}")
    (folder.begin(root, iteration) / "__0_0.distcp").write_text(weights)
    return folder.publish(root, iteration, model, state or {}, assets)


def test_another_model_beside_a_run_is_refused(tmp_path: Path) -> None:
    own = checkpoint(tmp_path / "run")
    refuse_other_model(own, checkpoint(tmp_path / "same").path.parent)
    refuse_other_model(own, own.path)
    refuse_other_model(own, tmp_path / "gone")
    with pytest.raises(ConfigError, match="language.num_hidden_layers 1 and 3. .*another --save folder"):
        refuse_other_model(own, checkpoint(tmp_path / "deeper", num_hidden_layers=3).path)
    with pytest.raises(ConfigError, match="tokenizer files [0-9a-f]{16} and [0-9a-f]{16}"):
        refuse_other_model(own, checkpoint(tmp_path / "renamed", "a c b").path)


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [("config.json", '"num_hidden_layers": 3', '"num_hidden_layers": 4'), ("tokenizer/vocab.txt", "a b c", "a b d")],
)
def test_a_damaged_load_is_ignored(tmp_path: Path, file: str, before: str, after: str) -> None:
    own, load = checkpoint(tmp_path / "run"), checkpoint(tmp_path / "load", num_hidden_layers=3)
    content = (load.path / file).read_text()
    (load.path / file).write_text(content.replace(before, after))
    refuse_other_model(own, load.path.parent)
    (load.path / file).write_text(content)
    with pytest.raises(ConfigError, match="another model"):
        refuse_other_model(own, load.path.parent)


def test_a_run_may_resume_from_an_older_checkpoint_of_its_folder(tmp_path: Path) -> None:
    own = checkpoint(tmp_path / "run")
    newer = checkpoint(tmp_path / "run", "a c b", iteration=2)
    (tmp_path / "link").symlink_to("run")
    for load in (tmp_path / "run", tmp_path / "link", own.path):
        refuse_other_model(own, load)
    with pytest.raises(ConfigError, match="another model"):
        refuse_other_model(own, newer.path)


def test_another_start_than_the_run_began_from_is_refused(tmp_path: Path) -> None:
    base = checkpoint(tmp_path / "base", weights="1")
    began = started_from(tmp_path / "base", base)
    own = checkpoint(tmp_path / "run", iteration=5, state={"started_from": began}, weights="2")
    refuse_other_model(own, tmp_path / "base")
    refuse_other_model(own, checkpoint(tmp_path / "copied", weights="1").path)
    other = checkpoint(tmp_path / "other", weights="3")
    with pytest.raises(ConfigError, match=r"started from .*base, and --load .*other.*another --save to start"):
        refuse_other_model(own, other.path.parent)
    # converted again with other weights under the same path
    checkpoint(tmp_path / "base", weights="4")
    with pytest.raises(ConfigError, match="has other weights"):
        refuse_other_model(own, tmp_path / "base")


def test_a_run_that_was_the_start_may_have_continued(tmp_path: Path) -> None:
    first = checkpoint(tmp_path / "first", weights="1", state={"iteration": 1})
    own = checkpoint(tmp_path / "run", state={"started_from": started_from(tmp_path / "first", first)}, weights="2")
    checkpoint(tmp_path / "first", iteration=9, weights="3", state={"iteration": 9})
    refuse_other_model(own, tmp_path / "first")
    shutil.rmtree(first.path)  # --keep-last
    refuse_other_model(own, tmp_path / "first")


def test_an_older_checkpoint_of_the_run_is_not_ignored(tmp_path: Path) -> None:
    older = checkpoint(tmp_path / "run")
    own = checkpoint(tmp_path / "run", iteration=2)
    with pytest.raises(ConfigError, match="To go back, move the newer checkpoints"):
        refuse_other_model(own, older.path)
