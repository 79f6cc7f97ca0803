"""By which names a server answers: no site can reach a local server by pointing its own name to this machine."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from stand_ins.http_server import Served, serving

from nemodiff.serving.http.hosts import AllowedHosts

PATHS = ("/", "/app.js", "/metrics", "/health", "/openapi.json", "/v1/models", "/nothing")
POSTED = ("/v1/chat/completions", "/v1/completions", "/v1/fim/completions", "/events")
FOREIGN = ("evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil.example", "127.0.0.1@evil", "0")


@pytest.fixture(scope="module")
def server(tiny_engine: Path) -> Iterator[Served]:
    with serving(tiny_engine, "--allowed-host", "Models.Example", "--allowed-host", "*.inner.example") as served:
        yield served


@pytest.mark.parametrize(
    ("bound", "further", "allowed", "refused"),
    [
        (
            "127.0.0.1",
            [],
            ["127.0.0.1", "127.0.0.1:8000", "localhost", "LOCALHOST:1", "localhost.", "[::1]:8000", "127.0.0.2", ""],
            [*FOREIGN, "192.168.1.5", "[fe80::1]", "[::1", "[localhost]evil", ":80", "a b", "*", "*.example"],
        ),
        ("::1", [], ["[::1]:8000", "localhost:8000", "127.0.0.1"], [*FOREIGN, "[2001:db8::1]"]),
        ("localhost", [], ["localhost:8000", "127.0.0.1:8000"], [*FOREIGN, "10.0.0.1"]),
        ("0.0.0.0", [], ["10.0.0.1:80", "localhost", "[2001:db8::1]:80", "0.0.0.0"], FOREIGN),
        ("::", [], ["10.0.0.1:80", "localhost", "[2001:db8::1]:80"], FOREIGN),
        ("192.168.1.5", [], ["192.168.1.5:8000", "203.0.113.9", "localhost"], FOREIGN),
        ("box.example", [], ["box.example:8000", "BOX.example."], FOREIGN),
        ("127.0.0.1", ["a.example:80", "*.b.example"], ["A.example", "x.b.example:1"], ["b.example", "xb.example"]),
        ("127.0.0.1", ["*"], [*FOREIGN, "10.0.0.1"], []),
    ],
)  # fmt: skip
def test_names_are_foreign_and_addresses_are_not(
    bound: str, further: list[str], allowed: list[str], refused: list[str]
) -> None:
    hosts = AllowedHosts(bound, further)
    assert [host for host in allowed if not hosts.allows(host)] == []
    assert [host for host in refused if hosts.allows(host)] == []


@pytest.mark.parametrize("path", [*PATHS, *POSTED])
def test_no_route_answers_a_foreign_host(server: Served, path: str) -> None:
    status, headers, content = server.send(path, {} if path in POSTED else None, Host="evil.example:8000")
    assert (status, headers["content-type"]) == (421, "application/json")
    message = json.loads(content)["error"]["message"]
    assert "'evil.example:8000'" in message
    assert message.endswith("--allowed-host NAME")


def test_own_and_allowed_names_are_answered(server: Served) -> None:
    for host in ("127.0.0.1", "localhost:1234", "models.example", "a.inner.example:80"):
        assert server.send("/v1/models", Host=host)[0] == 200
    assert server.send("/v1/models", Host="inner.example")[0] == 421
    assert server.metrics()['nemodiff_refused_requests_total{status="421"}'] >= 1
    with socket.create_connection((server.host, server.port), 20) as old:  # before HTTP/1.1 nobody sent a host
        old.sendall(b"GET /health HTTP/1.0\r\n\r\n")
        assert old.makefile("rb").readline().split()[1] == b"200"
