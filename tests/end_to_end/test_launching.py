"""docs/gpu.md, "Launching": its plans equal the tool's output, and its commands are accepted."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import counting.plans
import pytest

from ross_mcore import flags
from ross_mcore.commands import plan

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```\n(.*?)^```$", (ROOT / "docs" / "gpu.md").read_text(), re.MULTILINE | re.DOTALL)
PLANS = [block.partition("\n\n") for block in BLOCKS if block.startswith("python tools/plan_layout.py")]
JOBS = [job for block in BLOCKS if (job := block.removeprefix("# needs GPUs and Slurm\n")).startswith("sbatch ")]


def words(command: str) -> list[str]:
    return shlex.split(command.replace("\\\n", " "))


@pytest.mark.parametrize(("command", "_", "printed"), PLANS, ids=range(len(PLANS)))
def test_plans_equal_the_output_of_the_tool(
    command: str, _: str, printed: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", words(command)[1:])
    assert plan.main() == 0
    shown = printed.replace(",\n    ", ", ")  # long lines are broken in the page
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == shown.splitlines()


ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "performance.md").read_text().splitlines()
    if line.startswith(("| qwen2 |", "| vicuna |"))
]


def test_the_table_of_layouts_equals_the_output_of_the_tool(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    language = {"qwen2": "qwen2-7b-instruct", "vicuna": "vicuna-13b-v1.5"}
    assert [row[1] for row in ROWS if row[0] == "qwen2" and not row[2]] == ["8", "16", "32", "64"]
    for model, gpus, more, layout, samples, seconds, useful, hardware, memory in ROWS:
        parts = ["--language-model", f"tests/published/{language[model]}", "--pixel-decoder"]
        parts += ["tests/published/flux.1-dev-vae", "--vision-model", "tests/published/siglip-so400m-patch14-384"]
        recipe = ["--config", f"train_ross/finetune_siglip_{model}"]
        assert plan.main(["--world-size", gpus, *parts, *recipe, *words(more.strip("`"))]) == 0
        printed = capsys.readouterr().out
        assert f"tensor {layout[0]} x pipeline {layout[4]} x data {layout[8:].partition(',')[0]}," in printed
        assert f"step: {seconds} s for {samples} samples:" in printed
        assert f"MFU: {useful} useful, {hardware} of the hardware" in printed
        stages = re.findall(r"^ *\d+ +(\d+) +\d+ .* ([\d.]+) *$", printed, re.MULTILINE)
        assert max(float(total) for _, total in stages) == float(memory)
        assert len(stages) == 1 or f"{' + '.join(layers for layers, _ in stages)} layers" in layout


def test_samples_of_a_row_may_be_given(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    assert plan.main([*words(PLANS[0][0])[2:], "--samples-a-row", "8"]) == 0
    printed = capsys.readouterr().out
    assert "16 rows a step" in printed and f"samples of {0.97 * 4096 / 8:.0f} tokens" in printed


def test_stages_wait_less_than_half_a_layer() -> None:
    """A layer is 7% of a stage. Balanced by operations they would wait 19%, 8% and 5%."""
    waits = [row for row in counting.plans.rows() if row.name.startswith("waiting")]
    assert len(waits) == 3 and all(float(row.count.rstrip("%")) <= 3.5 for row in waits)


def test_there_are_plans_for_both_sizes() -> None:
    sizes = [words(command)[words(command).index("--world-size") + 1] for command, _, _ in PLANS]
    assert sizes == ["8", "64", "64", "64"]


@pytest.mark.parametrize("command", JOBS, ids=range(len(JOBS)))
def test_jobs_have_flags_of_the_trainer(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    job = words(command)
    script = job.index("examples/slurm/train.sbatch")
    assert job[:script] == ["sbatch", "--nodes", "8"]
    assert flags.parse(job[script + 1 :]).checkpoint.save


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--load", "nowhere"], "nowhere"),
        (["--load", "x", "--samples-a-row", "0"], "must be a positive number, got 0.0"),
        (["--language-model", str(ROOT / "tests/published/qwen2-7b-instruct")], "need each other"),
        (["--load", "x", "--micro-batch", "1"], "unrecognized argument --micro-batch"),
    ],
)
def test_plans_that_cannot_work_are_refused(
    arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["plan_layout.py", "--world-size", "8", *arguments])
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(plan.main())
    assert ended.value.code == 2 and says in capsys.readouterr().err
