"""What a request must show before any of it is read: whose page sent it, where it was sent, and the key.

A server on localhost is reached by every page that its user opens elsewhere. Such a page can send requests to it
(Origin and Sec-Fetch-Site say so), or lead its own name to 127.0.0.1 (DNS rebinding: Host says so).
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any, TypeAlias

from ross_mcore.checked import shown
from ross_mcore.serving.protocol import ApiError

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
App: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = ("/health", "/", "/page.css", "/page.js")
"""Read without a key; the page asks for it."""
MOST_DRAINED_BYTES, DRAIN_SECONDS = 256 << 20, 10
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


class Gate:
    """An ASGI application in front of another one: refuses requests, and adds HEADERS to every answer."""

    def __init__(self, app: App, hosts: Collection[str], api_key: str | None) -> None:
        """`hosts`: names by which this machine is known, beside localhost and any address in digits."""
        self.app, self.hosts, self.api_key = app, {"localhost", *map(str.lower, hosts)}, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", ()), *added]
            await send(message)

        try:
            self.require(scope["method"], scope["path"], _headers(scope))
        except ApiError as error:
            await drain(receive)
            await refuse(error, with_headers)
        else:
            await self.app(scope, receive, with_headers)

    def require(self, method: str, path: str, headers: dict[str, str]) -> None:
        """Raises ApiError for a request of another site's page, for another host, or without the key."""
        host = headers.get("host", "")
        if not self._is_own(host):
            raise ApiError(
                f"Host {shown(host)} is not a name of this server; open it by its address, or allow the name with "
                "--allow-host",
                403,
                code="foreign_host",
            )
        site, origin = headers.get("sec-fetch-site", "none"), headers.get("origin")
        is_foreign = origin is not None and origin.partition("://")[2].lower() != host.lower()
        is_link = method == "GET" and path == "/" and headers.get("sec-fetch-mode") == "navigate"
        if is_foreign or (site not in ("none", "same-origin") and not is_link):
            raise ApiError(
                f"a request of another site's page ({shown(origin or site)}) is refused; use the page that this server "
                "shows, or a program",
                403,
                code="foreign_origin",
            )
        if self.api_key is not None and path not in OPEN_PATHS:
            given = headers.get("authorization", "").removeprefix("Bearer ").strip()
            if not hmac.compare_digest(given.encode(), self.api_key.encode()):
                raise ApiError(
                    "the key is wrong or missing; send `Authorization: Bearer KEY` with the server's --api-key",
                    401,
                    code="invalid_api_key",
                )

    def _is_own(self, host: str) -> bool:
        """Whether a Host header is a name of this server, or an address, which no foreign name can be led to."""
        name = host[: host.rfind("]") + 1] if host.startswith("[") else host.partition(":")[0]
        if name.lower().rstrip(".") in self.hosts:
            return True
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return False
        return True


async def drain(receive: Receive) -> None:
    """Reads what is left of a body and forgets it, within bounds: a client that still sends would miss the answer."""
    size = 0

    async def read() -> None:
        nonlocal size
        while size < MOST_DRAINED_BYTES:
            message = await receive()
            size += len(message.get("body", b""))
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                return

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(read(), DRAIN_SECONDS)


async def refuse(error: ApiError, send: Send) -> None:
    """Answers with an error and ends the connection."""
    content = json.dumps(error.body).encode()
    headers = {"content-type": "application/json", "content-length": str(len(content)), "connection": "close"}
    pairs = [(name.lower().encode(), value.encode()) for name, value in (headers | error.headers).items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": content})


def _headers(scope: Scope) -> dict[str, str]:
    """Names in lower case -> values; of a name that comes twice, both, which then fit nothing."""
    found: dict[str, str] = {}
    for name, value in scope["headers"]:
        key, text = name.decode("latin-1").lower(), value.decode("latin-1")
        found[key] = f"{found[key]},{text}" if key in found else text
    return found
