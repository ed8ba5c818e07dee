"""Exports of the demo's model in vLLM and lmms-eval, which have an environment of their own: `make test-serving`."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ENVIRONMENT = ROOT / ".venv-serving"
DEMO = ROOT / "runs" / "demo"
QUESTIONS, TOKENS = 10, 16

if not (ENVIRONMENT / "bin" / "python").exists():
    collect_ignore_glob = ["test_*.py"]


@dataclass(frozen=True)
class Serving:
    """The environment; calling it runs one of its programs to its end and returns what it printed."""

    folder: Path

    def variables(self) -> dict[str, str]:
        own = {"PYTHONPATH": str(Path(__file__).parent / "environment"), "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        own |= {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        return {**os.environ, **own, "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}

    def __call__(self, *words: object, cwd: Path, given: str = "") -> str:
        command = [str(ENVIRONMENT / "bin" / "python"), *map(str, words)]
        done = subprocess.run(command, cwd=cwd, env=self.variables(), input=given, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout + done.stderr


@pytest.fixture(scope="session")
def serving() -> Serving:
    found = Serving(ENVIRONMENT)
    done = subprocess.run(
        [ENVIRONMENT / "bin" / "python", "-c", "import vllm"], env=found.variables(), capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"vLLM does not run here: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return found


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's second stage as transformers' LlavaForConditionalGeneration."""
    from ross_mcore.commands import export

    folder = tmp_path_factory.mktemp("exports") / "llava"
    assert not export.main(["--load", str(DEMO / "finetune"), "--format", "llava", "--save", str(folder)])
    return folder


@dataclass(frozen=True)
class Asked:
    """A question, its picture, and the answer of this package: its text and token ids."""

    question: str
    picture: Path
    text: str
    tokens: tuple[int, ...]

    def conversation(self) -> list[dict[str, Any]]:
        """The question as a client of OpenAI's API writes it."""
        url = "data:image/png;base64," + base64.b64encode(self.picture.read_bytes()).decode()
        parts = [{"type": "text", "text": self.question}, {"type": "image_url", "image_url": {"url": url}}]
        return [{"role": "user", "content": parts}]


@pytest.fixture(scope="session")
def asked() -> list[Asked]:
    """Questions about held-out pictures, and our greedy answers."""
    import ross_mcore

    records = json.loads((DEMO / "data" / "heldout.json").read_text(encoding="utf-8"))[:: 400 // QUESTIONS][:QUESTIONS]
    questions = [record["conversations"][0]["value"] for record in records]
    pictures = [DEMO / "data" / record["image"] for record in records]
    found = ross_mcore.generate(
        ross_mcore.load_model(DEMO / "finetune"),
        [ross_mcore.Question(question, [picture]) for question, picture in zip(questions, pictures, strict=True)],
        ross_mcore.Sampling(max_new_tokens=TOKENS),
    )
    return [
        Asked(question.removeprefix("<image>\n"), picture, answer.text, answer.tokens)
        for question, picture, answer in zip(questions, pictures, found, strict=True)
    ]
