"""A server started by the command, and plain HTTP to it, for tests of what goes over the wire.

In: an engine folder and options of `nemodiff serve`. Out: `Served`, with its address and its process. The surprising
fact: raw connections are needed, since a client library neither sends broken requests nor leaves in the middle.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

START = 60.0  # seconds until a server that does not start is given up


class Served:
    """A running server."""

    def __init__(self, process: subprocess.Popen[str], host: str, port: int) -> None:
        self.process, self.host, self.port = process, host, port
        self.url = f"http://{host}:{port}"

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=60)

    def send(
        self, path: str, body: Any = None, *, method: str | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """One request; a body that is not bytes is sent as JSON."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection = self.connect()
        with contextlib.closing(connection):
            sent = {"Content-Type": "application/json", **{k.replace("_", "-"): v for k, v in headers.items()}}
            connection.request(method or ("GET" if body is None else "POST"), path, data, sent)
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()

    def ask(self, path: str, body: Any = None, **headers: str) -> Any:
        """The same for an answer that is JSON and not a refusal."""
        status, _, content = self.send(path, body, **headers)
        assert status == 200, content
        return json.loads(content)

    def stream(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The objects of a stream, the end mark left out."""
        status, headers, content = self.send(path, body)
        assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8"), content
        return [json.loads(line[6:]) for line in content.decode().split("\n\n") if line and line != "data: [DONE]"]

    def figures(self) -> dict[str, float]:
        """What /metrics says."""
        lines = self.send("/metrics")[2].decode().splitlines()
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}

    def settled(self) -> dict[str, float]:
        """The figures once nothing runs or waits."""
        for _ in range(600):
            figures = self.figures()
            if not figures["nemodiff_requests_running"] + figures["nemodiff_requests_waiting"]:
                return figures
            time.sleep(0.05)
        raise AssertionError("requests still run")


@contextlib.contextmanager
def serving(engine: Path, *options: str, environment: dict[str, str] | None = None) -> Iterator[Served]:
    """Start `nemodiff serve` on a free port and stop it by its process at the end."""
    command = [sys.executable, "-W", "error", "-m", "nemodiff", "serve", str(engine), "--port", "0", *options]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env={**os.environ, **(environment or {})}
    )
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        found = re.fullmatch(r"serving \S+ on http://([\d.]+):(\d+)\n", line)
        assert found is not None, line + process.stderr.read()
        yield Served(process, found[1], int(found[2]))
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(START)
        process.stderr.close()
