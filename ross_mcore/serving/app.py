"""The HTTP interface: OpenAI's chat completions and models, reconstructions, the page. Computes nothing itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from ross_mcore.checked import shown
from ross_mcore.serving import protocol
from ross_mcore.serving.gate import drain
from ross_mcore.serving.model import ServedModel
from ross_mcore.serving.protocol import ApiError, Chat, Limits, Reply
from ross_mcore.serving.worker import INTERNAL, Job, Result, Worker

T = TypeVar("T")

PAGE = Path(__file__).parent / "page"
PAGE_FILES = {"/": "index.html", "/page.css": "page.css", "/page.js": "page.js"}
BODY_SECONDS = 60
"""In which a request's body must have arrived."""
CLIENT_CLOSED = 499


class EventStream(StreamingResponse):
    """A stream of server-sent events from a job, which ends with the stream."""

    def __init__(self, content: AsyncIterator[bytes], job: Job) -> None:
        super().__init__(content, media_type="text/event-stream")
        self.job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.end()


class Service:
    """The handlers, with what they need."""

    def __init__(self, models: Mapping[str, ServedModel], worker: Worker, limits: Limits) -> None:
        self.models, self.worker, self.limits = models, worker, limits
        self.decoder = ThreadPoolExecutor(1, "pictures")  # one at a time, so that large pictures do not add up

    async def health(self) -> dict[str, str]:
        return {"status": "ok"}

    async def list_models(self) -> dict[str, Any]:
        return {"object": "list", "data": [_listed(model) for model in self.models.values()]}

    async def get_model(self, name: str) -> dict[str, Any]:
        return _listed(self._model(name))

    async def describe(self) -> dict[str, Any]:
        limits = {
            "body_bytes": self.limits.body_bytes,
            "new_tokens": self.limits.new_tokens,
            "steps": protocol.MOST_STEPS,
        }
        return {"models": [model.description for model in self.models.values()], "limits": limits}

    async def chat(self, request: Request) -> Response:
        body = await _read(request, self.limits)
        chat = await self._decoded(lambda: protocol.parse_chat(protocol.read_body(body), self.limits))
        model = self._model(chat.model)
        pixels = [
            await self._decoded(partial(model.pixels, picture, f"picture {number}"))
            for number, picture in enumerate(chat.pictures, 1)
        ]
        job = self.worker.submit(model.name, lambda: model.answer(chat, pixels))
        try:
            await _unless_gone(request, job.next())  # it starts: errors of the conversation are known
            if chat.stream:
                return EventStream(_events(job, Reply(chat)), job)
            return JSONResponse(await _unless_gone(request, _collected(job, chat)))
        except BaseException:
            job.end()
            raise

    async def reconstruct(self, request: Request) -> Response:
        body = await _read(request, self.limits)
        asked = await self._decoded(lambda: protocol.parse_reconstruct(protocol.read_body(body)))
        model = self._model(asked.model)
        if not model.description["reconstructs"]:
            raise ApiError(f"{model.name} has no denoiser, so it reconstructs no pictures", code="no_denoiser")
        pixels = await self._decoded(partial(model.pixels, asked.picture, "picture"))
        job = self.worker.submit(model.name, lambda: model.reconstruct(asked, pixels))
        try:
            return JSONResponse(await _unless_gone(request, _result(job)))
        finally:
            job.end()

    def _model(self, name: str) -> ServedModel:
        if name not in self.models:
            known = ", ".join(self.models)
            raise ApiError(
                f"no model {shown(name)}; this server has {known}",
                404,
                param="model",
                code="model_not_found",
            )
        return self.models[name]

    async def _decoded(self, work: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.decoder, work)


def create_app(service: Service) -> FastAPI:
    app = FastAPI(title="ross_mcore", docs_url=None, redoc_url=None, openapi_url=None)
    app.get("/health")(service.health)
    app.get("/v1/models")(service.list_models)
    app.get("/v1/models/{name:path}")(service.get_model)
    app.post("/v1/chat/completions")(service.chat)
    app.get("/api/models")(service.describe)
    app.post("/api/reconstruct")(service.reconstruct)
    for path, file in PAGE_FILES.items():
        app.get(path)(partial(_file, PAGE / file))
    app.add_exception_handler(ApiError, _refused)
    app.add_exception_handler(HTTPException, _unknown)
    app.add_exception_handler(ClientDisconnect, _gone)
    app.add_exception_handler(Exception, _failed)
    return app


async def _file(path: Path) -> FileResponse:
    return FileResponse(path)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    content = json.dumps(error.body)  # in ASCII, as what it shows of the request need not be valid Unicode
    return Response(content, error.status, {"connection": "close", **error.headers}, "application/json")


async def _unknown(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {shown(request.url.path)} is not offered; see docs/serving.md"
    return await _refused(request, ApiError(what, error.status_code))


async def _failed(request: Request, error: Exception) -> Response:
    return await _refused(request, INTERNAL)  # uvicorn's log has the error


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED)  # nobody reads it


def _listed(model: ServedModel) -> dict[str, Any]:
    return {"id": model.name, "object": "model", "created": model.description["created"], "owned_by": "ross_mcore"}


async def _read(request: Request, limits: Limits) -> bytes:
    """The body, bounded before it is read. Raises ApiError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(f"Content-Type {shown(kind)}, expected application/json", 415)
    too_large = ApiError(f"the body is over {limits.body_bytes >> 20} MiB; send smaller pictures", 413)
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > limits.body_bytes:
        await drain(request.receive)
        raise too_large

    async def read() -> bytes:
        parts, size = list[bytes](), 0
        async for part in request.stream():
            size += len(part)
            if size > limits.body_bytes:
                parts.clear()
                await drain(request.receive)
                raise too_large
            parts.append(part)
        return b"".join(parts)

    try:
        return await asyncio.wait_for(read(), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise ApiError(f"the body did not arrive in {BODY_SECONDS} seconds", 408) from None


async def _unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. Raises ClientDisconnect when the client closes the connection first."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()


async def _result(job: Job) -> Any:
    while not isinstance(item := await job.next(), Result):
        pass
    return item.value


async def _collected(job: Job, chat: Chat) -> dict[str, Any]:
    answer = await _result(job)
    return Reply(chat).whole(answer.text, answer.finish_reason, _usage(answer))


async def _events(job: Job, reply: Reply) -> AsyncIterator[bytes]:
    """The chunks of an answer as they come. An error that occurs on the way is the last event."""
    yield reply.first()
    try:
        while not isinstance(item := await job.next(), Result):
            if item:
                yield reply.piece(item)
        yield reply.last(item.value.finish_reason, _usage(item.value))
    except ApiError as error:
        yield protocol.event(error.body)


def _usage(answer: Any) -> dict[str, int]:
    return protocol.usage(answer.prompt_tokens, len(answer.tokens))
