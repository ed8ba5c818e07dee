"""`ross serve` over a socket: OpenAI's client, a browser, clients that leave, limits, signals."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import math
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from torch import Tensor

import ross_mcore
from ross_mcore import Question, Sampling, TrainedModel
from ross_mcore.__main__ import main
from ross_mcore.errors import ConversationError
from ross_mcore.generation import Generated
from ross_mcore.serving.app import Service, create_app
from ross_mcore.serving.gate import Gate
from ross_mcore.serving.model import ServedModel
from ross_mcore.serving.protocol import Limits, Reconstruct
from ross_mcore.serving.server import Server, bind
from ross_mcore.serving.worker import Worker
from tests.chromium import Page, needs_chromium
from tests.recorded import GOLDEN, recorded_checkpoint

ROOT = Path(__file__).parents[2]
PICTURE = GOLDEN / "data" / "images" / "img0.png"
URL = f"data:image/png;base64,{base64.b64encode(PICTURE.read_bytes()).decode()}"
ASKED = [
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": URL}}, {"type": "text", "text": "What?"}]}
]


class Scripted:
    """Stands for a model: says a word at a time, for as long as `most` allows."""

    def __init__(self, name: str = "slow", reconstructs: bool = True) -> None:
        self.name, self.description = name, {"name": name, "created": 0, "iteration": 7, "reconstructs": reconstructs}
        self.words, self.ended, self.most = 0, threading.Event(), 10_000

    def pixels(self, data: bytes, param: str) -> bytes:
        return data

    def answer(self, chat: Any, pixels: Any) -> Iterator[str]:
        if chat.turns[-1]["value"] == "too long":
            raise ConversationError("too long for the model; shorten it")
        return self._words(chat.turns[-1]["value"])

    def _words(self, text: str) -> Iterator[str]:
        try:
            for number in range(self.most):
                if text == "break":
                    raise ZeroDivisionError
                self.words += 1
                yield f"{number} "
                time.sleep(0.002)
        finally:
            self.ended.set()
        return Generated("", (1,) * self.most, "length", 3)


class Running:
    """A server in a thread of this process, at a free port."""

    def __init__(self, models: list[Any], limits: Limits = Limits(), api_key: str | None = None) -> None:  # noqa: B008
        self.socket = bind("127.0.0.1", 0)
        self.port = self.socket.getsockname()[1]
        self.worker = Worker([model.name for model in models], limits.waiting)
        app = create_app(Service({model.name: model for model in models}, self.worker, limits))
        self.server = Server(Gate(app, [], api_key), self.worker)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=60)

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any, Any]:
        """Status, headers and JSON of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        kind = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(method, path, body, kind | {name.replace("_", "-"): text for name, text in headers.items()})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        is_json = answer.headers["Content-Type"] == "application/json"
        return answer.status, answer.headers, json.loads(content) if is_json else content

    def post(self, path: str, **fields: Any) -> tuple[int, Any, Any]:
        return self.request("POST", path, json.dumps(fields).encode())


@contextlib.contextmanager
def running(*models: Any, **options: Any) -> Iterator[Running]:
    server = Running(list(models), **options)
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def trained(process_group: None, tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    folder = tmp_path_factory.mktemp("served") / "tiny"
    recorded_checkpoint("qwen2_siglip", folder)
    return ross_mcore.load_model(folder)


@pytest.fixture(scope="module")
def served(trained: TrainedModel) -> ServedModel:
    return ServedModel("tiny", trained, "qwen_2")


@pytest.fixture(scope="module")
def tiny(served: ServedModel) -> Iterator[Running]:
    with running(served, limits=Limits(new_tokens=20)) as server:
        yield server


def test_the_openai_client_gets_the_models_answer(tiny: Running, trained: TrainedModel) -> None:
    expected = ross_mcore.generate(trained, [Question("<image>\nWhat?", [PICTURE])], Sampling(6), template="qwen_2")[0]
    client = tiny.client()
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    whole = client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=6)
    assert whole.choices[0].message.content == expected.text
    assert whole.choices[0].finish_reason == expected.finish_reason
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (expected.prompt_tokens, len(expected.tokens))
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=6, stream=True, stream_options=options)
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == expected.text
    assert chunks[-2].choices[0].finish_reason == expected.finish_reason
    assert chunks[-1].usage == whole.usage and all(chunk.usage is None for chunk in chunks[:-1])


def test_the_example_of_the_documentation_runs(
    tiny: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    example = next(block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "import OpenAI" in block)
    example = example.replace(":8000", f":{tiny.port}").replace('"finetune"', '"tiny", max_tokens=2')
    (tmp_path / "cat.jpg").write_bytes(PICTURE.read_bytes())
    monkeypatch.chdir(tmp_path)
    exec(example, {})
    said = tiny.client().chat.completions.create(model="tiny", max_tokens=2, messages=[_asks("What is it?")])
    assert capsys.readouterr().out == said.choices[0].message.content


def _asks(question: str) -> Any:
    return {"role": "user", "content": [*ASKED[0]["content"][:1], {"type": "text", "text": question}]}


def test_refusals_reach_the_openai_client(tiny: Running) -> None:
    create = tiny.client().chat.completions.create
    with pytest.raises(openai.NotFoundError, match="no model 'other'; this server has tiny"):
        create(model="other", messages=ASKED)
    with pytest.raises(openai.BadRequestError, match="from 1 to 20") as refused:
        create(model="tiny", messages=ASKED, max_completion_tokens=21)
    assert refused.value.param == "max_completion_tokens"
    damaged = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}]
    with pytest.raises(openai.BadRequestError, match="picture 1: undecodable.*; send a whole PNG"):
        create(model="tiny", messages=[{"role": "user", "content": damaged}])
    with pytest.raises(openai.BadRequestError, match="a system turn is not the first turn"):
        create(model="tiny", messages=[*ASKED, {"role": "system", "content": "?"}, *ASKED])
    with pytest.raises(openai.BadRequestError, match="tools .* is not supported; leave it out"):
        tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
        create(model="tiny", messages=ASKED, tools=[tool])


def test_reconstructions_are_those_of_the_model(tiny: Running, served: ServedModel) -> None:
    status, _, found = tiny.post("/api/reconstruct", model="tiny", picture=URL, steps=2, seed=3, start_timestep=500)
    originals, images = ross_mcore.reconstruct(served.trained, [PICTURE], steps=2, seed=3, start_timestep=500)
    assert status == 200 and found["psnr"] == pytest.approx(
        -10 * math.log10(float((originals.clamp(0, 1) - images).square().mean())), abs=1e-3
    )
    assert torch.equal(_levels(found["reconstruction"]), (images[0] * 255).round())
    expected = ((originals[0].clamp(0, 1) - images[0]).abs() * found["difference_scale"]).clamp(0, 1)
    assert torch.equal(_levels(found["difference"]), (expected * 255).round())
    asked = Reconstruct("tiny", b"", steps=3)
    assert len(list(served.reconstruct(asked, served.pixels(PICTURE.read_bytes(), "picture")))) == 3  # others' turns


def _levels(url: str) -> Tensor:
    import io

    import numpy as np
    from PIL import Image

    picture = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float()


def test_a_client_that_leaves_ends_its_answer() -> None:
    """Streamed or not; the model then serves others."""
    model = Scripted()
    with running(model) as server:
        stream = server.client().chat.completions.create(model="slow", messages=[_says("go")], stream=True)
        assert next(iter(stream)).choices[0].delta.role == "assistant"
        stream.close()
        assert model.ended.wait(20) and model.words < 5_000
        model.words = 0
        model.ended.clear()
        with _send(server.port, "go"):
            _wait(lambda: model.words > 0)
        assert model.ended.wait(20) and model.words < 5_000
        model.most = 3
        answer = server.client().chat.completions.create(model="slow", messages=[_says("go")])
        assert answer.usage.completion_tokens == 3


def _wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def _says(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _send(port: int, text: str) -> socket.socket:
    """A connection that has asked for a whole answer."""
    body = json.dumps({"model": "slow", "messages": [_says(text)]})
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
    return connection


def test_one_answer_a_model_and_few_that_wait() -> None:
    """Two models answer side by side; the third question to one of them is refused with a time to come back."""
    models = [Scripted("slow"), Scripted("other")]
    with running(*models, limits=Limits(waiting=1)) as server:
        streams = [
            server.client().chat.completions.create(model=model.name, messages=[_says("go")], stream=True)
            for model in models
        ]
        waiting = server.worker._waiting
        with _send(server.port, "go"):
            _wait(lambda: len(waiting["slow"]) == 1)
            with pytest.raises(openai.RateLimitError, match="1 requests wait for slow") as refused:
                server.client().chat.completions.create(model="slow", messages=[_says("go")])
            assert refused.value.response.headers["Retry-After"] == "2"
            _wait(lambda: all(model.words > 5 for model in models))
        _wait(lambda: waiting["slow"][0].is_ended)  # its client has left
        with _send(server.port, "go"):
            _wait(lambda: any(not job.is_ended for job in list(waiting["slow"])))
            assert len(waiting["slow"]) == 1
        for stream in streams:
            stream.close()


def test_errors_of_the_work_are_answers() -> None:
    with running(Scripted()) as server:
        create = server.client().chat.completions.create
        with pytest.raises(openai.BadRequestError, match="too long for the model; shorten it"):
            create(model="slow", messages=[_says("too long")], stream=True)
        with pytest.raises(openai.InternalServerError, match="its log has the details"):
            create(model="slow", messages=[_says("break")])
        with pytest.raises(openai.APIError, match="its log has the details"):
            list(create(model="slow", messages=[_says("break")], stream=True))


def test_requests_are_bounded_and_from_here() -> None:
    limits = Limits(body_bytes=1 << 20)
    with running(Scripted(reconstructs=False), limits=limits, api_key="secret") as server:
        key = {"Authorization": "Bearer secret"}
        large = json.dumps({"model": "slow", "messages": [_says("x" * (2 << 20))]}).encode()
        status, _, body = server.request("POST", "/v1/chat/completions", large, **key)
        assert status == 413 and body["error"]["message"] == "the body is over 1 MiB; send smaller pictures"
        parts = iter([large[: 1 << 20], large[1 << 20 :]])
        assert server.request("POST", "/v1/chat/completions", parts, **key)[0] == 413  # type: ignore[arg-type]
        assert server.request("POST", "/v1/chat/completions", large)[0] == 401
        assert server.request("POST", "/v1/chat/completions", b"{}", **key, Origin="https://evil.example")[0] == 403
        assert server.request("GET", "/", Host="evil.example")[0] == 403
        plain = {"Content-Type": "text/plain"}
        assert server.request("POST", "/v1/chat/completions", None, **key, **plain)[0] == 415
        status, _, body = server.request("GET", "/v1/nothing", **key)
        assert status == 404 and body["error"]["message"].startswith("GET '/v1/nothing' is not offered")
        assert server.request("GET", "/v1/chat/completions", **key)[0] == 405
        asked = json.dumps({"model": "slow", "picture": URL}).encode()
        status, _, body = server.request("POST", "/api/reconstruct", asked, **key)
        assert status == 400 and body["error"]["code"] == "no_denoiser"
        status, headers, page = server.request("GET", "/")
        assert status == 200 and b"<title>ross serve</title>" in page
        assert "default-src 'none'" in headers["Content-Security-Policy"] and "nosniff" in str(headers)
        assert "Access-Control-Allow-Origin" not in headers
        assert server.client("secret").models.list().data[0].id == "slow"


def test_a_stopped_server_ends_its_answers() -> None:
    with running(Scripted()) as server:
        stream = iter(server.client().chat.completions.create(model="slow", messages=[_says("go")], stream=True))
        next(stream)
        began = time.monotonic()
        server.stop()
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(stream)
        assert time.monotonic() - began < 5


def test_a_port_in_use_and_a_missing_library_are_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        assert main(["serve", "--load", "run", "--port", port]) == 2
        said = capsys.readouterr().err
        assert said.startswith(
            f"ross serve: --host 127.0.0.1 --port {port}: Address already in use; give another --port"
        )
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", "--load", "run"]) == 2
    assert "pip install 'ross_mcore[serve]'" in capsys.readouterr().err


def columns(condition: str) -> str:
    """A condition of every model's part of the page."""
    return f"[...document.querySelectorAll('.model')].every((model) => {condition})"


@pytest.mark.slow
@needs_chromium
def test_the_page_asks_and_reconstructs(trained: TrainedModel, tmp_path: Path) -> None:
    """Two models, one of which has no denoiser; by keyboard, with nothing for the console to complain about."""
    silent = Scripted("silent", reconstructs=False)
    limits = Limits(new_tokens=64)
    models = ServedModel("tiny", trained, "qwen_2"), silent
    with running(*models, limits=limits, api_key="secret") as server, Page(tmp_path / "p") as page:
        page.go(f"http://127.0.0.1:{server.port}/")
        page.wait("!document.getElementById('key-field').hidden")
        page.run("document.getElementById('key').focus()")
        page.type("secret")
        page.key("Enter")
        page.wait("document.querySelectorAll('.model').length === 2")
        assert [error for error in page.errors if "401" not in error] == []
        page.errors.clear()
        assert page.run("document.querySelectorAll('.status')[1].textContent").startswith("This model has no denoiser")
        page.choose("#file", PICTURE)
        done = "document.querySelector('.pictures:not([hidden]):not(.stale)') !== null"
        page.wait(done)
        sizes = page.run("[...document.querySelectorAll('.model:first-child img')].map((i) => i.naturalWidth)")
        assert sizes == [trained.config.decode_image_size] * 3
        before = page.run("document.querySelector('.reconstruction').src")
        page.run("document.getElementById('seed').focus()")
        page.key("ArrowRight")
        page.wait(f"{done} && document.querySelector('.reconstruction').src !== {json.dumps(before)}")
        assert page.run("document.getElementById('seed-is').textContent") == "1"

        page.run("document.getElementById('question').focus()")
        page.type("What is it?")
        page.key("Enter")
        page.wait(columns("model.querySelector('.answer')"))
        page.wait("document.querySelectorAll('.answer')[1].textContent.includes('9 10')")  # while it is written
        assert page.run("document.querySelectorAll('.answer.waiting').length") >= 1
        page.wait("!document.querySelectorAll('.answer')[0].classList.contains('waiting')")
        page.key("Escape")
        page.wait("!document.getElementById('ask').disabled")
        assert silent.ended.wait(5)
        page.wait(done)
        ask = server.client("secret").chat.completions.create
        answer = ask(model="tiny", messages=[_asks("What is it?")], max_tokens=64)
        assert page.run("document.querySelector('.answer').textContent") == answer.choices[0].message.content
        for width, scheme in ((1280, "light"), (400, "dark")):
            page.resize(width, 900, scheme)
            assert page.run("document.documentElement.scrollWidth") <= width
            page.screenshot(tmp_path / f"{scheme}.png")
        assert page.errors == []


@pytest.mark.slow
def test_a_signal_ends_the_command(tmp_path: Path) -> None:
    recorded_checkpoint("qwen2_siglip", tmp_path / "one")
    recorded_checkpoint("llama_clip", tmp_path / "two")
    words = ["serve", "--load", "one", "two", "--port", "0", "--dtype", "bfloat16", "--template", "qwen_2"]
    command = [sys.executable, "-m", "ross_mcore", *words]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        line = next(line for line in process.stdout if " at http://" in line)
        url = line.split(" at ")[1].split()[0]
        assert line.startswith("one, two at http://127.0.0.1:")
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        stream = iter(client.chat.completions.create(model="two", messages=ASKED, stream=True, max_tokens=200))
        next(stream)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        _, said = process.communicate(timeout=60)
        assert (process.returncode, said) == (0, "") and time.monotonic() - began < 20
    finally:
        process.kill()
