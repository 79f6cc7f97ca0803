"""Clients that connect and do not do their part, over real sockets: they are closed, and never keep others out."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import resource
import select
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from conftest import Refused, eventually
from stand_ins.http_server import Served, serving

from nemodiff.serving.http.app import Limits, Reports, Server
from nemodiff.serving.http.server import _DrainingServer, bind, serve

MOST = 20  # connections
PATIENCE = 1.0  # seconds that a client has
SLOWNESS = 120.0  # seconds until a test says that something hangs
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def server(tiny_engine: Path) -> Iterator[Served]:
    with serving(tiny_engine, "--max-connections", str(MOST), "--client-timeout", str(PATIENCE)) as served:
        yield served
        served.process.terminate()
        assert served.process.wait(60) == 0
        assert served.process.stderr is not None
        assert served.process.stderr.read() == ""  # nothing that clients do is worth a line


@contextlib.contextmanager
def connected(server: Served, count: int, sent: bytes) -> Iterator[list[socket.socket]]:
    """Connections that have sent so much."""
    with contextlib.ExitStack() as stack:
        sockets = []
        for _ in range(count):
            sockets.append(stack.enter_context(socket.create_connection((server.host, server.port), SLOWNESS)))
            sockets[-1].sendall(sent)
        yield sockets


def open_files(server: Served) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))


def read_all(client: socket.socket) -> bytes:
    """What comes until the server closes the connection, or drops it."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while part := client.recv(65536):
            received += part
    return received


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", None),
        (b"G", 408),
        (GET, 408),
        (POST + b"Content-Length: 100\r\n\r\n", 408),
        (POST + b"Content-Length: 100\r\n\r\n{", 408),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n", 408),
        (GET + b"Content-Length: 9\r\n\r\n", 200),  # is answered before its body has come
        (POST + b"Content-Length: 99999999\r\n\r\n{", 413),
        (GET + b"\r\n" + GET, 200),
    ],
)
def test_what_is_not_sent_in_full_is_closed(server: Served, sent: bytes, status: int | None) -> None:
    with connected(server, 1, sent) as (client,):
        received = read_all(client)
    if status is None:
        assert received == b""
        return
    assert int(received.split()[1]) == status
    if status == 408:
        message = json.loads(received.partition(b"\r\n\r\n")[2])["error"]["message"]
        assert message == "the request has not arrived in full in 1 s; send it again"


def test_small_pieces_are_sent_at_once() -> None:
    """Without TCP_NODELAY a piece waits until the client's system acknowledges the one before, often after 40 ms."""

    async def option() -> int:
        sent = asyncio.get_running_loop().create_future()

        class Connected(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                taken = transport.get_extra_info("socket")
                sent.set_result(taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
                cast(asyncio.Transport, transport).abort()

        with bind("127.0.0.1", 0) as listening:
            async with await asyncio.get_running_loop().create_server(Connected, sock=listening):
                with socket.create_connection(listening.getsockname(), SLOWNESS):
                    return await asyncio.wait_for(sent, SLOWNESS)

    assert asyncio.run(option())


def test_a_trickle_does_not_keep_a_connection_open(server: Served) -> None:
    for first, further in ((GET, b"A: b\r\n"), (POST + b"Content-Length: 5000\r\n\r\n", b" "), (GET + b"\r\nG", b"E")):
        with connected(server, 1, first) as (client,):
            deadline = time.monotonic() + SLOWNESS
            with contextlib.suppress(ConnectionError):
                while time.monotonic() < deadline:
                    client.sendall(further)
                    if select.select([client], [], [], 0.1)[0] and not client.recv(65536):
                        break
            assert time.monotonic() < deadline


def test_a_kept_connection_may_be_idle_for_longer(server: Served) -> None:
    with contextlib.closing(server.connect()) as connection:
        for _ in range(2):
            connection.request("GET", "/health")
            assert connection.getresponse().read() == b'{"status":"ok"}'
            time.sleep(1.5 * PATIENCE)
        connection.request("GET", "/health")
        assert connection.getresponse().status == 200


def test_who_closes_the_sending_side_alone_counts_as_gone(server: Served) -> None:
    """Until something is sent one that has gone looks the same, and an answer may take minutes."""
    body = json.dumps({"prompt": "x", "max_tokens": 20_000, "mode": "ar", "ignore_eos": True}).encode()
    cancelled = 'nemodiff_requests_total{end="cancelled"}'
    before = server.settled()[cancelled]
    with connected(server, 1, POST + b"Content-Length: %d\r\n\r\n" % len(body) + body) as (client,):
        eventually(lambda: server.metrics()["nemodiff_requests_running"] == 1)
        client.shutdown(socket.SHUT_WR)
        assert read_all(client) == b""
        assert server.settled()[cancelled] == before + 1


@pytest.mark.parametrize("sent", [b"", GET, POST + b"Content-Length: 100\r\n\r\n{"])
def test_half_open_connections_keep_nobody_out(server: Served, sent: bytes) -> None:
    with connected(server, 4 * MOST, sent) as clients:
        for _ in range(5):
            assert server.ask("/v1/completions", {"prompt": "x", "max_tokens": 2})["usage"]["completion_tokens"] == 2
        for client in clients:
            read_all(client)


def test_a_client_that_does_not_read_is_closed(server: Served) -> None:
    before = open_files(server)
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect((server.host, server.port))
    with client:
        client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)
        deadline = time.monotonic() + SLOWNESS
        while open_files(server) == before:
            assert time.monotonic() < deadline
        while open_files(server) > before:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    with connected(server, 1, (GET + b"\r\n") * 2000) as (client,):  # while one that reads slowly gets all
        received = b""
        while received.count(b"HTTP/1.1 200 OK") < 2000:
            received += client.recv(8192)


def test_room_is_made_by_clients_that_are_waited_for_alone(tiny_engine: Path) -> None:
    body = json.dumps(
        {"prompt": "Once", "max_tokens": 20_000, "min_tokens": 20_000, "mode": "ar", "stream": True}
    ).encode()
    post = POST + b"Content-Length: %d\r\n\r\n" % len(body) + body
    with serving(tiny_engine, "--max-connections", "2") as served:
        with connected(served, 2, post) as busy:
            assert all(client.recv(1) for client in busy)
            status, headers, content = served.send("/health")
            assert (status, headers["retry-after"]) == (503, "1")
            assert "2 connections are open and none is idle" in json.loads(content)["error"]["message"]
            for client in busy:
                assert client.recv(1)
        with connected(served, 2, b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000):
            deadline = time.monotonic() + SLOWNESS
            while served.send("/health")[0] != 200:  # until nothing more can be written to one that does not read
                assert time.monotonic() < deadline


def test_what_is_not_http_gets_one_sentence(server: Served) -> None:
    for sent in (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"NONSENSE\r\n\r\n"):
        with connected(server, 1, sent) as (client,):
            head, _, body = read_all(client).partition(b"\r\n\r\n")
        assert head.split()[1] == b"400"
        assert "HTTP/1.1" in json.loads(body)["error"]["message"]
    garbage = POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"500000\r\n" + b" " * 0x500000 + b"\r\nnonsense\r\n"
    with connected(server, 1, b"") as (client,), contextlib.suppress(ConnectionError):
        client.sendall(garbage)
        assert read_all(client).split()[1] == b"413"


def test_being_out_of_descriptors_is_one_line_and_passes(tiny_engine: Path) -> None:
    with serving(tiny_engine) as served:
        limits = resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE, (open_files(served), limits[1]))
        with connected(served, 5, GET):
            assert served.process.stderr is not None
            line = served.process.stderr.readline()
            time.sleep(1.5)  # asyncio tries again every second
        resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE, limits)
        assert served.ask("/health") == {"status": "ok"}
        served.process.terminate()
        assert served.process.wait(60) == 0
        assert served.process.stderr.read() == ""
    assert "no connection can be taken (Too many open files); lower --max-connections" in line


@pytest.mark.parametrize(
    ("highest", "remedy"),
    [
        (64, ", allowed: 64; raise the"),
        (400, ", allowed: 400; give --max-connections 16 or less, or raise the"),
        (resource.RLIM_INFINITY, ", which the system refuses; give fewer, or raise the"),
    ],
)
def test_few_open_files_are_refused_with_what_helps(
    tiny_engine: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused, highest: int, remedy: str
) -> None:
    def refuse(kind: int, limits: tuple[int, int]) -> None:
        assert limits == (896, highest)
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda kind: (64, highest))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    refused(["serve", str(tiny_engine)], f"needs 896 open files{remedy} limit: ulimit -n 896")


def test_more_connections_than_files_are_refused(tiny_engine: Path, refused: Refused) -> None:
    most = 1 << 40
    refused(["serve", str(tiny_engine), "--max-connections", str(most)], f"--max-connections {most} needs", "ulimit -n")


@pytest.mark.parametrize(
    ("target", "host", "status"),
    [
        ("http://localhost/health", "nobody.example", 200),  # the host of the target counts alone
        ("HTTPS://LOCALHOST:8000/v1/models?x=http://y/", "localhost", 200),
        ("http://localhost", "localhost", 200),
        ("http://localhost/%2e%2e", "localhost", 404),
        ("http://nobody.example/health", "localhost", 421),
        ("http:///health", "localhost", 404),
        ("ftp://localhost/health", "localhost", 404),
    ],
)
def test_a_target_in_absolute_form_is_its_path_on_its_host(server: Served, target: str, host: str, status: int) -> None:
    sent = f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    with connected(server, 1, sent.encode()) as (client,):
        assert int(read_all(client).split()[1]) == status


@pytest.mark.parametrize(
    ("head", "status", "said"),
    [
        (b"NONSENSE\r\n", 400, "no HTTP/1.1 request"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"y" * 100_000, 431, "send fewer or shorter headers"),
        (GET + b"Transfer-Encoding: gzip, chunked\r\n", 501, "allowed: chunked"),
        (POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n", 400, "Transfer-Encoding are both sent"),
    ],
)
def test_what_cannot_be_read_says_why(server: Served, head: bytes, status: int, said: str) -> None:
    with connected(server, 1, b"") as (client,), contextlib.suppress(ConnectionError):
        client.sendall(head + b"\r\n")
        first, _, body = read_all(client).partition(b"\r\n\r\n")
        assert int(first.split()[1]) == status
        assert said in json.loads(body)["error"]["message"]


def test_refusals_before_a_request_was_read_are_counted_and_logged(tiny_engine: Path) -> None:
    options = ("--max-connections", "1", "--client-timeout", "0.5", "--log-format", "json")
    stream = {"prompt": "Once", "max_tokens": 20_000, "min_tokens": 20_000, "mode": "ar", "stream": True}
    with serving(tiny_engine, *options) as served:
        for sent in (b"NONSENSE\r\n\r\n", b"G", GET + b"\r\nNONSENSE\r\n\r\n"):
            with connected(served, 1, sent) as (client,):
                read_all(client)
        with connected(served, 1, b"".join(post_of("/v1/completions", stream))) as (busy,):
            assert busy.recv(1)
            assert served.send("/v1/models")[0] == 503
        eventually(lambda: served.send("/health")[0] == 200)
        metrics = served.settled()
        served.process.terminate()
        assert served.process.stderr is not None
        lines = [json.loads(line) for line in served.process.stderr]
    refused = {status: metrics[f'nemodiff_refused_requests_total{{status="{status}"}}'] for status in (400, 408, 503)}
    assert refused == {400: 2, 408: 1, 503: 1}
    unread = [line for line in lines if not line["path"]]
    assert [(line["status"], line["method"]) for line in unread] == [(400, ""), (408, ""), (400, "")]
    assert unread[1]["ms"] >= 500
    assert [line["status"] for line in lines if line["path"] == "/v1/models"] == [503]


def post_of(path: str, body: dict[str, object]) -> tuple[bytes, bytes]:
    """A request after which the connection ends, cut in the middle of its body."""
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content[:9], content[9:]


def test_what_still_comes_or_is_still_read_when_the_drain_begins_is_finished(tiny_engine: Path) -> None:
    begin, rest = post_of("/v1/completions", {"prompt": "Once upon", "max_tokens": 5})
    long = b"".join(post_of("/tokenize", {"prompt": "9 " * 300_000, "return_token_strs": True}))
    with serving(tiny_engine) as served, connected(served, 1, begin) as (sender,), socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        reader.settimeout(SLOWNESS)
        reader.connect((served.host, served.port))
        reader.sendall(long)
        received = reader.recv(100)
        served.process.terminate()
        with contextlib.suppress(ConnectionError):  # of a server that waits for nobody
            eventually(lambda: served.send("/health/ready")[0] == 503)
        time.sleep(2.5)  # more than uvicorn gives to the last answers
        sender.sendall(rest)
        head, _, content = read_all(sender).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert json.loads(content)["usage"]["completion_tokens"] >= 1
        received += read_all(reader)
        assert len(json.loads(received.partition(b"\r\n\r\n")[2])["token_strs"]) >= 300_000
        assert served.process.wait(SLOWNESS) == 0


def test_who_does_not_read_is_left_when_the_drain_ends(tiny_engine: Path) -> None:
    with serving(tiny_engine, "--drain", "0.3") as served, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((served.host, served.port))
        client.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1000)
        assert client.recv(100).startswith(b"HTTP/1.1 200 ")
        served.process.terminate()
        assert served.process.wait(SLOWNESS) == 0
        assert served.process.stderr is not None
        assert served.process.stderr.read() == ""


def test_the_collector_of_cycles_leaves_alone_what_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """It stops every thread, for as long as it looks at all that there is."""
    seen = list[tuple[int, int]]()
    monkeypatch.setattr(_DrainingServer, "run", lambda *_: seen.append((gc.get_freeze_count(), gc.get_threshold()[0])))
    before = gc.get_threshold()
    idle = SimpleNamespace(app=None, limits=Limits(), reports=Reports(), close=lambda: None)
    try:
        with bind("127.0.0.1", 0) as listening:
            serve(cast(Server, idle), listening, 0.0, lambda address: None)
    finally:
        gc.unfreeze()
        gc.set_threshold(*before)
    ((frozen, threshold),) = seen
    assert frozen > 10_000
    assert threshold > before[0]
