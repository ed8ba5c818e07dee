"""Requests of other sites' pages, under foreign names, or without the key."""

from __future__ import annotations

import pytest

from ross_mcore.commands import names_of
from ross_mcore.serving.gate import Gate
from ross_mcore.serving.protocol import ApiError

CHAT = "/v1/chat/completions"


async def app(scope: object, receive: object, send: object) -> None: ...


def status(gate: Gate, path: str = CHAT, method: str = "POST", **headers: str) -> int:
    given = {name.replace("_", "-"): value for name, value in {"host": "127.0.0.1:8000", **headers}.items()}
    try:
        gate.require(method, path, given)
    except ApiError as error:
        return error.status
    return 200


@pytest.mark.parametrize(
    ("host", "allowed"),
    [
        *(("127.0.0.1:8000", True), ("localhost:9", True), ("LocalHost.", True), ("[::1]:8000", True)),
        *(
            ("10.1.2.3", True),
            ("gpu1.lab", True),
            ("evil.example", False),
            ("", False),
            ("localhost.evil.example", False),
        ),
        *(("127.0.0.1.evil.example", False), ("evil.example,127.0.0.1", False)),
    ],
)
def test_a_foreign_name_is_refused(host: str, allowed: bool) -> None:
    """A name that its owner leads to this address (DNS rebinding) is not one of this server's."""
    assert status(Gate(app, ["gpu1.lab"], None), host=host) == (200 if allowed else 403)


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, 200),  # a program
        ({"origin": "http://127.0.0.1:8000", "sec_fetch_site": "same-origin"}, 200),
        ({"sec_fetch_site": "none"}, 200),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "http://127.0.0.1:3000", "sec_fetch_site": "same-site"}, 403),  # another server of this machine
        ({"origin": "null"}, 403),
        ({"sec_fetch_site": "cross-site"}, 403),
    ],
)
def test_a_page_of_another_site_is_refused(headers: dict[str, str], expected: int) -> None:
    assert status(Gate(app, [], None), **headers) == expected


def test_a_link_elsewhere_opens_the_page_and_nothing_else() -> None:
    link = {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}
    assert status(Gate(app, [], None), "/", "GET", **link) == 200
    assert status(Gate(app, [], None), "/v1/models", "GET", **link) == 403


def test_the_key_opens_all_and_the_page_asks_for_it() -> None:
    gate = Gate(app, [], "secret")
    assert [status(gate, path, "GET") for path in ("/", "/page.js", "/health", "/v1/models")] == [200, 200, 200, 401]
    assert status(gate, authorization="Bearer wrong") == 401 and status(gate, authorization="Bearer secret") == 200
    assert status(gate, authorization="Bearer \xe9") == 401


def test_models_have_the_shortest_names_that_differ(tmp_path) -> None:
    def names(*folders: str) -> list[str]:
        return names_of([tmp_path / folder for folder in folders])

    assert names("finetune") == ["finetune"]
    assert names("a/finetune", "a/base") == ["finetune", "base"]
    assert names("a/finetune", "b/finetune") == ["a/finetune", "b/finetune"]
    assert names("a/iter_0000500") == ["a/iter_0000500"]
