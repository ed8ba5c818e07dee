"""The documentation: widths, links, and its commands.

The blocks of README.md, docs/quickstart.md and then of the other pages run as written, shortened, one after the other
(slow), except those whose first line is a comment `# needs ...`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ross_mcore.commands import COMMANDS

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
QUICK_START = ROOT / "docs" / "quickstart.md"
OTHERS = [page for page in sorted((ROOT / "docs").glob("*.md")) if page != QUICK_START]
PAGES = [README, QUICK_START, *OTHERS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
MOST_LINES, MOST_COLUMNS = 130, 110
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
SCRIPTS = {command.script: name for name, command in COMMANDS.items()}


def blocks(page: Path, language: str = "") -> list[str]:
    return [text for kind, text in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


COMMAND = re.compile(r"(?:[A-Z_]+=\S+ )*(?:ross|python|torchrun|make)\b")
"""The beginning of a command; other lines of a block are comments or output."""


def lines(block: str) -> list[str]:
    return block.replace("\\\n", " ").splitlines()


def commands(block: str) -> Iterator[list[str]]:
    """The words of each command of this package in a block, without those of torchrun."""
    for line in filter(COMMAND.match, lines(block)):
        words = shlex.split(line, comments=True)
        for place, word in enumerate(words):
            if word == "ross" and set(words[place + 1 : place + 2]) & set(COMMANDS):
                yield words[place + 1 :]
                break
            if word in SCRIPTS:
                yield [SCRIPTS[word], *words[place + 1 :]]
                break


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_short_and_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    long = [line for line in text.splitlines() if len(line) > MOST_COLUMNS and not line.startswith("|")]
    assert not long
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / link).exists(), link


def test_the_readme_is_short() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) < MOST_LINES and max(map(len, lines)) <= MOST_COLUMNS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_of_commands_exist(page: Path) -> None:
    shown = [words for block in blocks(page) for words in commands(block)]
    for name, *words in shown:
        known = options_of(name) | (options_of("train") if name == "plan" else set())
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= known, (name, given - known)


def options_of(name: str, found: dict[str, set[str]] = {}) -> set[str]:  # noqa: B006  a cache
    """The options that a command's help lists."""
    if name not in found:
        command = [sys.executable, "-m", "ross_mcore", name, "--help"]
        text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        found[name] = set(re.findall(r"--[a-z][a-z0-9-]*", text))
    return found[name]


SHORTER = {
    r"^make demo$": "python examples/demo/run_demo.py --short --out runs/demo",
    r"^make (?!demo).*": "",  # what CI runs
    r".*check_parity.py .*": "",  # tests/parity runs it
    r".*ablation.py .*": "",  # test_demo_ablation.py runs it
    r"--train-iters \d+": "--train-iters 4",
    r"--(eval|log)-interval \d+": r"--\1-interval 2",
}
"""Commands of the pages -> what runs here."""


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which the commands of all pages have run."""
    folder = tmp_path_factory.mktemp("walked")
    for name in ("examples", "tools", "tests", "pretrain_ross.py", "ross_mcore"):
        (folder / name).symlink_to(ROOT / name)
    write_own_pictures(folder / "mine")
    for page in (README, QUICK_START, *OTHERS):
        for block in blocks(page):
            if not block.startswith("# needs "):
                for line in filter(COMMAND.match, lines(block)):
                    run(line, folder)
        if page == QUICK_START:
            for block in blocks(page, "python"):
                run(shlex.join(["python", "-c", block]), folder)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_commands_run_as_written(walked: Path) -> None:
    for file in ("demo/report.html", "own/finetune/metrics.jsonl", "mine/sheet.png", "mine/llava/config.json"):
        assert (walked / "runs" / file).exists()
    with Image.open(walked / "runs" / "mine" / "reconstruction.png") as grid:
        assert grid.mode == "RGB" and grid.width > 64


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_runs_end_to_end(walked: Path) -> None:
    out = walked / "runs" / "demo"
    summary = json.loads((out / "summary.json").read_text())
    assert len(summary["checks"]) == 2 and all(summary["checks"].values())
    assert 0 < summary["resume"]["stopped_after_iteration"] < summary["resume"]["iterations"]
    for stage in ("pretrain", "finetune"):
        entries = [json.loads(line) for line in (out / stage / "metrics.jsonl").read_text().splitlines()]
        assert [entry["iteration"] for entry in entries] == list(range(1, 13))
        assert entries[-1]["lm_loss"] < entries[0]["lm_loss"]
        assert list((out / stage / "tensorboard").glob("events.*"))
    with Image.open(out / "reconstruction.png") as grid:
        assert grid.width > grid.height > 64
    with Image.open(out / "denoising.png") as steps:
        assert steps.size == (9 * 66 + 2, 4 * 66 + 2 + 14)  # a picture and eight steps, four rows, names above
    assert (out / "demo_curves.svg").read_text().count("<polyline") == 4


def run(line: str, folder: Path) -> None:
    """Runs a command of a page in `folder`; a server is ended when it listens."""
    for pattern, shorter in SHORTER.items():
        line = re.sub(pattern, shorter, line)
    if not line:
        return
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    settings: dict[str, Any] = {"cwd": folder, "env": environment, "text": True}
    with subprocess.Popen(
        shlex.split(line, comments=True),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        **settings,
    ) as process:
        output = ""
        for printed in process.stdout or ():
            output += printed
            if line.startswith("ross serve") and (address := re.search(r"http://\S+", printed)):
                wait_for(f"{address.group()}/health")
                process.send_signal(signal.SIGINT)
    assert process.returncode == 0, f"{line}\n{output[-4000:]}"


def wait_for(url: str) -> None:
    """Returns when a server answers."""
    for _ in range(100):
        try:
            urllib.request.urlopen(url, timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return


def write_own_pictures(folder: Path) -> None:
    """Thirty pictures and their records, as docs/quickstart.md asks for."""
    folder.mkdir()
    records = []
    for number, name in enumerate(["cat.jpg", "dog.png", *(f"{number}.jpg" for number in range(28))]):
        Image.new("RGB", (80, 60), (8 * number, 250 - 8 * number, 90)).save(folder / name)
        records.append({"image": name, "caption": f"picture number {number}"})
    (folder / "mine.json").write_text(json.dumps(records), encoding="utf-8")
