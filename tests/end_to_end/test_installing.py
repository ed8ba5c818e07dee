"""What `pip install .` brings: the command `ross`, and recipes, without the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ross_mcore.commands import COMMANDS
from ross_mcore.flags import recipes

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "tests" / "published"


@pytest.fixture(scope="module")
def ross(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """ross(*arguments): the installed command, outside of the repository."""
    folder = tmp_path_factory.mktemp("installed")
    source, site = folder / "source", folder / "site"
    shutil.copytree(ROOT / "ross_mcore", source / "ross_mcore", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--target", site, source], check=True, env={**os.environ, "PYTHONPATH": ""})
    shutil.rmtree(source)

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [site / "bin" / "ross", *map(str, arguments)]
        environment = {**os.environ, "PYTHONPATH": str(site)}
        return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)

    run.site = site  # type: ignore[attr-defined]
    return run


def test_help_lists_the_commands(ross: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    shown = ross("--help")
    assert shown.returncode == 0 and shown.stderr == ""
    for name, command in COMMANDS.items():
        assert f"  {name} " in shown.stdout and command.summary in shown.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_names_no_script(name: str, ross: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    shown = ross(name, "--help")
    assert shown.returncode == 0 and f"ross {name}" in shown.stdout
    assert "tools/" not in shown.stdout and "pretrain_ross.py" not in shown.stdout


def test_wrong_commands_and_arguments_exit_with_2(ross: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    assert ross("trane").returncode == ross().returncode == 2
    refused = ross("train", "--seq-lenght", "5")
    assert refused.returncode == 2 and refused.stderr.startswith("ross train: error: ")
    assert "--seq-length" in refused.stderr
    missing = ross("check", "nowhere")
    assert missing.returncode == 2 and missing.stderr.startswith("ross check: ")


def test_recipes_are_installed(ross: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    site: Path = ross.site  # type: ignore[attr-defined]
    assert len(list((site / "ross_mcore" / "recipes").rglob("*.yaml"))) == len(recipes())
    parts = "--language-model qwen2-7b-instruct --vision-model siglip-so400m-patch14-384 --pixel-decoder flux.1-dev-vae"
    words = [word if word.startswith("--") else PUBLISHED / word for word in parts.split()]
    planned = ross("plan", "--world-size", 8, *words, "--config", "train_ross/finetune_siglip_qwen2")
    assert planned.returncode == 0, planned.stderr
    assert "tensor 2 x pipeline 2 x data 2" in planned.stdout
