"""vLLM on the CPU answers as this package does, from the exported folder as it is."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed.harness import free_port
from tests.serving.conftest import ENVIRONMENT, TOKENS, Asked, Serving

pytestmark = pytest.mark.timeout(600)


def test_answers_are_ours(serving: Serving, exported: Path, asked: list[Asked], tmp_path: Path) -> None:
    given = {"model": str(exported), "conversations": [one.conversation() for one in asked], "tokens": TOKENS}
    script = Path(__file__).with_name("ask_vllm.py")
    serving(script, tmp_path / "answers.json", cwd=tmp_path, given=json.dumps(given))
    answers = json.loads((tmp_path / "answers.json").read_text(encoding="utf-8"))
    for one, answer in zip(asked, answers, strict=True):
        assert answer["text"].strip() == one.text
        assert tuple(answer["answer"][: len(one.tokens)]) == one.tokens
    assert len({one.text for one in asked}) > 2


@pytest.fixture
def url(serving: Serving, exported: Path, tmp_path: Path) -> Iterator[str]:
    """The address of vLLM's OpenAI-compatible server."""
    port = free_port()
    command = [ENVIRONMENT / "bin" / "python", "-m", "vllm.entrypoints.openai.api_server", "--model", exported]
    command += ["--served-model-name", "demo", "--dtype", "float32", "--max-model-len", "512", "--enforce-eager"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with (
        (tmp_path / "server.log").open("w") as log,
        subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, env=serving.variables()) as process,
    ):
        address = f"http://127.0.0.1:{port}"
        try:
            while not ready(address):
                assert process.poll() is None, (tmp_path / "server.log").read_text()[-4000:]
                time.sleep(0.5)
            yield f"{address}/v1"
        finally:
            process.terminate()


def ready(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def test_its_server_answers_the_openai_client(url: str, asked: list[Asked]) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=url, api_key="none")
    for one in asked:
        answer = client.chat.completions.create(
            model="demo", messages=one.conversation(), temperature=0, max_tokens=TOKENS
        )
        assert answer.choices[0].message.content.strip() == one.text
    with_system = [{"role": "system", "content": "You name shapes."}, *asked[0].conversation()]
    assert client.chat.completions.create(model="demo", messages=with_system, max_tokens=4).choices
