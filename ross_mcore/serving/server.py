"""Runs the application on a socket until a signal ends it."""

from __future__ import annotations

import socket
from types import FrameType

import uvicorn

from ross_mcore.errors import ConfigError
from ross_mcore.serving.gate import App
from ross_mcore.serving.worker import Worker

GRACE_SECONDS = 5
"""In which running answers end after a signal."""
MOST_CONNECTIONS = 64


def bind(host: str, port: int) -> socket.socket:
    """A socket at host and port that does not listen yet; port 0 is any free one. Raises ConfigError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"--host {host}: {error.strerror}; give an address of this machine") from None
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ConfigError(
            f"--host {host} --port {port}: {error.strerror}; give another --port, or 0 for a free one"
        ) from None
    return bound


class Server(uvicorn.Server):
    """uvicorn, except that a signal ends running answers and then the process with status 0."""

    def __init__(self, app: App, worker: Worker) -> None:
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            proxy_headers=False,
            limit_concurrency=MOST_CONNECTIONS,
            h11_max_incomplete_event_size=64 << 10,
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
        super().__init__(config)
        self._worker = worker

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self.should_exit  # a second signal does not wait for answers
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._worker.stop()
        await super().shutdown(sockets)
        self._worker.join(GRACE_SECONDS)
