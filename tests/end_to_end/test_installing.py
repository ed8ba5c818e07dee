"""`pip install .` provides the command `ross` and the recipes, without the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from ross_mcore.commands import COMMANDS
from ross_mcore.flags import recipes
from tests.distributed.conftest import write_shards
from tests.recorded import recorded_checkpoint

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "tests" / "published"


@dataclass(frozen=True)
class Installed:
    """The package in a separate folder; calling the object runs `ross` outside the repository."""

    site: Path

    def __call__(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return self.run([self.site / "bin" / "ross", *map(str, arguments)], self.site)

    def run(self, command: list[str | Path], folder: Path) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(self.site), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


@pytest.fixture(scope="module")
def ross(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("installed")
    source, site = folder / "source", folder / "site"
    shutil.copytree(ROOT / "ross_mcore", source / "ross_mcore", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", site, source], check=True, env={**os.environ, "PYTHONPATH": ""})
    shutil.rmtree(source)

    return Installed(site)


def test_help_lists_the_commands(ross: Installed) -> None:
    shown = ross("--help")
    assert shown.returncode == 0 and shown.stderr == ""
    for name, command in COMMANDS.items():
        assert f"  {name} " in shown.stdout and command.summary in shown.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_names_no_script(name: str, ross: Installed) -> None:
    shown = ross(name, "--help")
    assert shown.returncode == 0 and f"ross {name}" in shown.stdout
    assert "tools/" not in shown.stdout and "pretrain_ross.py" not in shown.stdout


def test_wrong_commands_and_arguments_exit_with_2(ross: Installed) -> None:
    assert ross("trane").returncode == ross().returncode == 2
    refused = ross("train", "--seq-lenght", "5")
    assert refused.returncode == 2 and refused.stderr.startswith("ross train: error: ")
    assert "--seq-length" in refused.stderr
    missing = ross("check", "nowhere")
    assert missing.returncode == 2 and missing.stderr.startswith("ross check: ")


def test_pages_are_installed(ross: Installed) -> None:
    def names(root: Path) -> set[str]:
        return {str(path.relative_to(root)) for path in root.rglob("*") if path.suffix in (".html", ".css", ".js")}

    assert names(ross.site / "ross_mcore") == names(ROOT / "ross_mcore") != set()


def test_recipes_are_installed(ross: Installed) -> None:
    assert len(list((ross.site / "ross_mcore" / "recipes").rglob("*.yaml"))) == len(recipes())
    parts = "--language-model qwen2-7b-instruct --vision-model siglip-so400m-patch14-384 --pixel-decoder flux.1-dev-vae"
    words = [word if word.startswith("--") else PUBLISHED / word for word in parts.split()]
    planned = ross("plan", "--world-size", 8, *words, "--config", "train_ross/finetune_siglip_qwen2")
    assert planned.returncode == 0, planned.stderr
    assert "tensor 2 x pipeline 1 x data 4" in planned.stdout


def test_the_package_runs_as_a_module(ross: Installed) -> None:
    done = ross.run([sys.executable, "-m", "ross_mcore", "train", "--help"], ross.site)
    assert done.returncode == 0 and done.stdout == ross("train", "--help").stdout


def test_torchrun_trains_with_an_installed_recipe(ross: Installed, tmp_path: Path) -> None:
    recorded_checkpoint("qwen2_siglip", tmp_path / "base")
    write_shards(tmp_path / "shards", "captions")
    command = f"-m torch.distributed.run --nproc-per-node 2 --no-python {ross.site}/bin/ross train"
    options = "--config train_ross/finetune_siglip_qwen2 --num-workers 0 "
    options += "--load base --data-path shards --save run --global-batch-size 2 --micro-batch-size 1 --train-iters 1"
    done = ross.run([sys.executable, *command.split(), *options.split()], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished 1 iterations, 32 samples" in done.stdout  # in two rows
    assert (tmp_path / "run" / "iter_0000001").is_dir()
