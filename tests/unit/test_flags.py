"""Flags: the frozen list, YAML, errors that name the remedy."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from ross_mcore.config import SECTIONS, Config, check
from ross_mcore.errors import ConfigError
from ross_mcore.flags import build_parser, field_help, parse, recipes
from ross_mcore.options import flag_of

FLAGS = """
--tensor-model-parallel-size --pipeline-model-parallel-size --pipeline-layout --num-layers-per-virtual-pipeline-stage
--overlap-p2p-communication
--sequence-parallel --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
--distributed-timeout-minutes
--bf16 --denoiser-precision --vae-precision
--transformer-impl --attention-backend --gradient-accumulation-fusion --tp-comm-overlap
--recompute-granularity --recompute-method --recompute-num-layers --recompute-modules --recompute-denoiser
--fp8-format --fp8-recipe --fp8-margin --fp8-amax-history-len --fp8-amax-compute-algo --fp8-param-gather
--first-last-layers-bf16 --num-layers-at-start-in-bf16 --num-layers-at-end-in-bf16
--data-path --valid-data-path --seq-length --pack --template --mm-use-im-start-end --image-aspect-ratio --sampler
--truncated-images --supervise-final-eos --max-images-per-sample --max-tokens-per-sample --max-bad-fraction
--allow-missing-labels
--num-workers --precomputed --skip-samples
--data-cache-dir --data-cache-bytes
--training-stage --micro-batch-size --global-batch-size --global-batch-samples
--override-global-batch-size --train-iters --train-epochs
--loss-normalization --vm-loss-rows --seed --max-bad-steps --exit-duration-in-mins --exit-interval
--loss-spike-factor --skip-iterations
--self-check --check-replicas-interval
--lr --min-lr --lr-decay-style --lr-warmup-fraction --lr-warmup-iters --projector-lr --denoiser-lr --vision-lr
--weight-decay --decay-norm-weights --adam-beta1 --adam-beta2 --adam-eps --clip-grad
--load --save --finetune --save-interval --save-retain-interval --keep-last --async-save --verify
--log-interval --eval-interval --eval-images --valid-interval --valid-samples --tensorboard-dir
--eval-answers --tracker --tracker-project
""".split()
"""Users' scripts use these names."""

COMPLETE = ["--load", "base", "--save", "run", "--data-path", "shards", "--train-iters", "10"]


def refusal(arguments: list[str], data_parallel_size: int = 1, virtual_stages: int = 1) -> str:
    with pytest.raises(ConfigError) as error:
        check(parse([*COMPLETE, *arguments]), data_parallel_size=data_parallel_size, virtual_stages=virtual_stages)
    return str(error.value)


@pytest.mark.parametrize("name", ["interval", "samples"])
def test_validation_needs_data(name: str) -> None:
    assert refusal([f"--valid-{name}", "5"]) == f"--valid-{name} needs --valid-data-path: what to measure"


def test_the_list_of_flags_is_frozen() -> None:
    names = [flag_of(f.name) for section in SECTIONS.values() for f in dataclasses.fields(section)]
    assert sorted(names) == sorted(FLAGS)


def test_every_flag_has_help() -> None:
    for section in SECTIONS.values():
        assert field_help(section).keys() == {f.name for f in dataclasses.fields(section)}
    assert "global gradient norm" in build_parser().format_help()


def test_help_marks_untried_flags() -> None:
    """Flags whose code has run only in part, or not at all, on the stand-ins of tests/te."""
    texts = {name: text for section in SECTIONS.values() for name, text in field_help(section).items()}
    untried = {name for name, text in texts.items() if "untried on hardware" in text.lower()}
    assert untried == {"fp8_recipe", "tp_comm_overlap", "gradient_accumulation_fusion"}


def test_config_round_trips_through_its_flat_form() -> None:
    config = parse([*COMPLETE, "--bf16", "--lr", "3e-4"])
    assert Config.from_flat(**config.flat()) == config
    assert config.execution.bf16 and config.optimizer.lr == 3e-4


def test_a_recipe_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = "train_ross/finetune_siglip_qwen2"
    assert parse(["--config", name], complete=False) == parse(["--config", str(recipes()[name])], complete=False)
    (tmp_path / "reference_mode").write_text("seed: 7")  # a file wins over a recipe of the same name
    assert parse(["--config", "reference_mode"], complete=False).training.seed == 7


def test_an_unknown_recipe_gets_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--config", "finetune_siglip_qwen2"])
    message = capsys.readouterr().err
    assert "no such file" in message and all(name in message for name in recipes()) and len(recipes()) == 13


def test_flags_win_over_yaml_and_later_files_over_earlier(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("lr: 1e-3\nmicro-batch-size: 2\nbf16: true\nsave: null\n")
    second.write_text("lr: 2e-3\n")
    config = parse(
        ["--config", str(first), "--config", str(second), "--micro-batch-size", "4", "--no-bf16"], complete=False
    )
    assert config.optimizer.lr == 2e-3
    assert config.training.micro_batch_size == 4
    assert not config.execution.bf16


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("seq-lenght: 3", "did you mean --seq-length"),
        ("lr: [1, 2]", "must be a single value"),
        (
            "template: alpaca",
            "--template must be plain, qwen_2, v1, llama3, chatml, tokenizer or a YAML file of your own",
        ),
        ("- lr", "expected a mapping"),
        ("lr: {", "cannot be read"),
        ("micro-batch-size: 0", "must be positive"),
        ("lr: .nan", "--lr must be a finite number of at most 1e+18, got nan"),
        ("clip-grad: .inf", "--clip-grad must be a finite number of at most 1e+18, got inf"),
        ("seed: " + "9" * 5000, "too many digits"),
        ("save: 2001-13-01", "a date that does not exist"),
    ],
)
def test_bad_yaml_is_one_paragraph_naming_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, says: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit) as exit_:
        parse(["--config", str(path)])
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert says in message and "Traceback" not in message
    assert "must be" in message or str(path) in message


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--train-iters", "3", "--train-epochs", "1"], "exclude each other"),
        (["--global-batch-size", "8", "--global-batch-samples", "8"], "exclude each other"),
        (["--lr-warmup-iters", "3", "--lr-warmup-fraction", "0.1"], "exclude each other"),
        (["--adam-beta2", "1"], r"in \[0, 1\)"),
        (["--min-lr", "1"], "above --lr"),
        (["--keep-last", "0"], "must be positive"),
        (["--skip-iterations", "5-9,x"], "'x' is neither a number nor a range; write them as 7,12-15"),
        (["--skip-iterations", "9-5"], "'9-5' is neither a number"),
        (["--skip-iterations", "1-" + "9" * 5000], "write them as 7,12-15, with at most 15 digits"),
        (["--seed", "1" + "0" * 30], "--seed must be a finite number of at most 1e+18, got 1000000"),
        (["--seed", "-1" + "0" * 30], "--seed must be a finite number of at most 1e+18, got -100000"),
        (["--global-batch-size", "1" + "0" * 18], "--global-batch-size must be at most 1048576, got 10000"),
        (["--micro-batch-size", "1" + "0" * 18], "--micro-batch-size must be at most 1048576, got 10000"),
        (["--distributed-timeout-minutes", "1e7"], "--distributed-timeout-minutes must be at most 525600"),
    ],
)
def test_sections_validate_themselves(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    with pytest.raises(SystemExit):
        parse(arguments)
    assert says.replace("\\", "") in capsys.readouterr().err


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e300"])
@pytest.mark.parametrize(
    "name", [flag_of(f.name) for section in SECTIONS.values() for f in dataclasses.fields(section) if "float" in f.type]
)
def test_every_number_has_a_bound(capsys: pytest.CaptureFixture[str], name: str, value: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse([f"{name}={value}"], complete=False)
    message = capsys.readouterr().err
    assert exit_.value.code == 2 and message.count("\n") == 1 and f"{name} " in message


def test_iterations_to_skip_are_numbers_and_ranges() -> None:
    options = parse([*COMPLETE, "--skip-iterations", "7, 12-15"]).training
    assert [n for n in range(20) if options.skips(n)] == [7, 12, 13, 14, 15]
    assert not parse(COMPLETE).training.skips(7)


def test_impossible_layouts_are_refused_with_the_remedy() -> None:
    two_stages = ["--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1"]
    assert "remove the flag" in refusal([*two_stages, "--no-overlap-p2p-communication"], virtual_stages=2)
    assert "multiple of 8" in refusal([*two_stages, "--global-batch-size", "12"], 4, virtual_stages=2)
    assert "--tensor-model-parallel-size 2" in refusal(["--sequence-parallel"])
    assert "a multiple of 4" in refusal(["--global-batch-size", "6", "--micro-batch-size", "2"], data_parallel_size=2)


@pytest.mark.parametrize("missing", ["--load", "--save", "--data-path", "--train-iters"])
def test_a_missing_flag_is_named(capsys: pytest.CaptureFixture[str], missing: str) -> None:
    at = COMPLETE.index(missing)
    with pytest.raises(SystemExit) as exit_:
        parse(COMPLETE[:at] + COMPLETE[at + 2 :])
    assert exit_.value.code == 2 and f"{missing} " in capsys.readouterr().err


def test_a_mistyped_flag_gets_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([*COMPLETE, "--seq-lenght", "3"])
    assert "did you mean --seq-length?" in capsys.readouterr().err


def test_a_flag_replaces_its_alternative_in_yaml(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("train-iters: 100\nlr-warmup-fraction: 0.1\n")
    config = parse(["--config", str(recipe), "--train-epochs", "2", "--lr-warmup-iters", "5"], complete=False)
    assert config.training.train_iters is None and config.training.train_epochs == 2
    assert config.optimizer.lr_warmup_fraction is None and config.optimizer.lr_warmup_iters == 5
