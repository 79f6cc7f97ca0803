"""Which pages of other origins may read the server's answers: none, unless somebody allows them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Refused
from stand_ins.http_server import Served, serving

APP = "https://app.example"
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
PREFLIGHT = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization, content-type"}


@pytest.fixture(scope="module")
def server(tiny_engine: Path) -> Iterator[Served]:
    flags = ("--allowed-origin", APP, "--allowed-origin", "http://localhost:3000", "--api-key", "key")
    with serving(tiny_engine, *flags) as served:
        yield served


def allowed(headers: dict[str, str]) -> str | None:
    return {name.lower(): value for name, value in headers.items()}.get("access-control-allow-origin")


@pytest.mark.parametrize("origin", [APP, "http://localhost:3000"])
def test_a_page_of_an_allowed_origin_may_ask(server: Served, origin: str) -> None:
    status, headers, _ = server.send("/v1/chat/completions", method="OPTIONS", Origin=origin, **PREFLIGHT)
    assert (status, allowed(headers)) == (200, origin)
    assert "POST" in headers["access-control-allow-methods"]
    assert "authorization" in headers["access-control-allow-headers"].lower()
    for body in (CHAT, {**CHAT, "stream": True}):
        status, headers, _ = server.send("/v1/chat/completions", body, Origin=origin, Authorization="Bearer key")
        assert (status, allowed(headers)) == (200, origin)
        assert "X-Request-Id" in headers["access-control-expose-headers"]
    status, headers, content = server.send("/v1/chat/completions", CHAT, Origin=origin)
    assert (status, allowed(headers)) == (401, origin)  # so that the page can tell why
    assert "no valid key" in json.loads(content)["error"]["message"]


@pytest.mark.parametrize("origin", ["https://evil.example", "http://app.example", f"{APP}.evil.example", "null"])
def test_a_page_of_another_origin_may_not(server: Served, origin: str) -> None:
    status, headers, _ = server.send("/v1/chat/completions", method="OPTIONS", Origin=origin, **PREFLIGHT)
    assert (status, allowed(headers)) == (400, None)
    _, headers, _ = server.send("/v1/models", Origin=origin, Authorization="Bearer key")
    assert allowed(headers) is None


def test_without_the_option_no_origin_is_allowed(tiny_engine: Path) -> None:
    with serving(tiny_engine) as served:
        status, headers, _ = served.send("/v1/chat/completions", method="OPTIONS", Origin=APP, **PREFLIGHT)
        assert (status, allowed(headers)) == (405, None)
        assert allowed(served.send("/v1/models", Origin=APP)[1]) is None


@pytest.mark.parametrize("origin", ["app.example", "https://app.example/", "https://app.example/page", "", "ftp://x"])
def test_what_no_browser_sends_is_refused(tiny_engine: Path, refused: Refused, origin: str) -> None:
    refused(["serve", str(tiny_engine), "--allowed-origin", origin], "allowed: http", "*", code=2)
