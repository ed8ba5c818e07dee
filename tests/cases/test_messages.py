"""What people type for another trainer, misspell or forget is answered in one paragraph, once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ross_mcore.__main__ import main
from ross_mcore.arguments import NAMES_ELSEWHERE, NOT_OFFERED, Parser
from ross_mcore.commands import COMMANDS
from ross_mcore.flags import build_parser

ROOT = Path(__file__).parents[2]
TRAIN = ["train", "--load", "base", "--data-path", "shards", "--save", "run"]
TRAINER = "ross train: error: unrecognized argument"

SAID = [
    ([*TRAIN, "--learning-rate", "1e-4"], f"{TRAINER} --learning-rate; here it is --lr"),
    ([*TRAIN, "--learning_rate=1e-4"], f"{TRAINER} --learning_rate; here it is --lr"),
    ([*TRAIN, "--per-device-train-batch-size", "4"], "here it is --micro-batch-size"),
    ([*TRAIN, "--lora-rank", "8"], f"{TRAINER} --lora-rank, which is not offered: docs/features.md"),
    ([*TRAIN, "--wandb-project", "x"], "--wandb-project; here it is --tracker-project"),
    ([*TRAIN, "--seq-lenght", "8"], "did you mean --seq-length?"),
    ([*TRAIN, "--qqqq", "8"], f"{TRAINER} --qqqq; --help lists all options"),
    (["make-shards", "--dataa", "x"], "unrecognized argument --dataa; did you mean --data?"),
    (
        ["inspect-shards", "--data-path", "x", "--seq-len", "8"],
        "unrecognized argument --seq-len; did you mean --seq-length?",
    ),
    (["convert", "--language-model", "x", "--vision-towr", "y"], "--vision-towr"),
    (["export", "--load", "x", "--output-dir", "y"], "here it is --save"),
    (["shards"], "ross: error: shards is not a command; did you mean ross make-shards?"),
    (["finetune"], "finetune is not a command; the commands are make-shards"),
]
"""Words after `ross`, and a part of the answer."""


@pytest.mark.parametrize(("words", "says"), SAID, ids=[" ".join(words) for words, _ in SAID])
def test_unknown_words_are_answered(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and says in message and message.count("\n") == 1, message


MISSING = [
    ["make-shards", "--data", "no.json", "--image-folder", ".", "--out", "out"],
    ["index-shards", "--data-path", "no", "--out", "out"],
    ["inspect-shards", "--data-path", "no"],
    ["precompute", "--load", "no", "--data-path", "no", "--out", "out", "--image-aspect-ratio", "pad"],
    ["convert", "--language-model", "no", "--vision-model", "no", "--save", "out"],
    ["convert", "--ross-model", "no", "--save", "out"],
    ["plan", "--load", "no", "--world-size", "8"],
    ["check", "no"],
    ["reconstruct", "--load", "no", "--image", __file__, "--output", "out"],
    ["chat", "--load", "no", "--question", "x"],
    ["serve", "--load", "no", "--port", "0"],
    ["eval", "--load", "no", "--benchmark", "caption", "--data", "no.json", "--out", "out"],
    ["report", "no", "--output", "out"],
    ["export", "--load", "no", "--save", "out"],
]
"""Every command with a path that does not exist."""


@pytest.mark.parametrize("words", MISSING, ids=[words[0] for words in MISSING])
def test_a_missing_path_is_named(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        status = main(words)
    except SystemExit as stop:
        status = stop.code
    message = capsys.readouterr().err
    assert status == 2 and re.search(r"\bno\b", message), message
    assert "Errno" not in message and "Traceback" not in message, message
    assert not (tmp_path / "out").exists()


def test_the_required_arguments_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["make-shards", "--data", "x"])
    assert "required: --" in capsys.readouterr().err


def test_every_command_has_a_row() -> None:
    assert {words[0] for words in MISSING} == COMMANDS.keys() - {"train"}  # train: the test under torchrun


def test_names_of_other_trainers_are_not_ours_and_lead_to_ours() -> None:
    flags = build_parser().flags()
    for name, here in NAMES_ELSEWHERE.items():
        assert f"--{name}" not in flags
        first = re.match(r"--[a-z0-9-]+", here)
        assert first is None or first[0] in flags, f"{name}: {here}"
    text = (ROOT / "docs" / "features.md").read_text(encoding="utf-8").partition("## Not offered")[2]
    for pattern in NOT_OFFERED:
        assert not any(re.fullmatch(pattern.replace("*", ".*"), flag[2:]) for flag in flags), pattern
        assert f"`--{pattern}`" in text, pattern


@pytest.mark.parametrize(("local_rank", "printed"), [("0", 1), ("1", 0)])
def test_wrong_arguments_are_printed_once_a_machine(
    local_rank: str, printed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit):
        Parser(prog="ross").parse_args(["--no"])
    assert capsys.readouterr().err.count("unrecognized argument --no") == printed
    left = json.loads((tmp_path / "error.json").read_text())["message"]["message"]
    assert ("unrecognized argument --no" in left) == bool(printed) and "error" in left


def test_the_error_of_a_start_is_in_the_summary_of_torchrun(tmp_path: Path) -> None:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "pretrain_ross.py"]
    options = [*("--load", "nowhere", "--data-path", "x", "--save", tmp_path / "run"), "--train-iters", "1"]
    done = subprocess.run(
        [sys.executable, *command, *map(str, options)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    said, _, summary = done.stderr.partition("Root Cause")
    assert done.returncode and not (tmp_path / "run").exists()
    assert said.count("\npretrain_ross.py: error: nowhere") + said.startswith("pretrain_ross.py: error: nowhere") == 1
    assert "traceback : pretrain_ross.py: error: nowhere does not exist" in summary
