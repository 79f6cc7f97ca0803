"""A running `nemodiff serve` and plain HTTP to it, since a client library sends no broken requests."""

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

from . import other_system

PATIENCE = 120.0  # seconds until a server that does not answer, or end, is given up


class Served:
    """A running server: its process, its address, and the line that told it."""

    def __init__(self, process: subprocess.Popen[str], host: str, port: int, announcement: str) -> None:
        self.process = process
        self.announcement = announcement
        self.host = host
        self.port = port
        self.url = f"http://{host}:{port}"

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE)

    def send(
        self, path: str, body: Any = None, *, method: str | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        """One request; a body that is not bytes is sent as JSON."""
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection = self.connect()
        with contextlib.closing(connection):
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            method = method or ("GET" if body is None else "POST")
            connection.request(method, path, data, {"Content-Type": "application/json", **named})
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()

    def ask(self, path: str, body: Any = None, **headers: str) -> Any:
        """One request whose answer is JSON and no error."""
        status, _, content = self.send(path, body, **headers)
        assert status == 200, content
        return json.loads(content)

    def stream(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The objects of a stream, the end mark left out."""
        status, headers, content = self.send(path, body)
        assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8"), content
        return [json.loads(line[6:]) for line in content.decode().split("\n\n") if line and line != "data: [DONE]"]

    def metrics(self) -> dict[str, float]:
        """The values of /metrics by name and labels."""
        values = {}
        for line in self.send("/metrics")[2].decode().splitlines():
            if not line.startswith("#"):
                name, _, value = line.rpartition(" ")
                values[name] = float(value)
        return values

    def settled(self) -> dict[str, float]:
        """The metrics once nothing runs or waits."""
        for _ in range(2400):
            values = self.metrics()
            if not values["nemodiff_requests_running"] + values["nemodiff_requests_waiting"]:
                return values
            time.sleep(0.05)
        raise AssertionError("requests still run")


@contextlib.contextmanager
def serving(
    engine: Path,
    *options: str,
    threads: int | None = 1,
    environment: dict[str, str] | None = None,
    warnings: str = "error",
    system: str | None = None,
) -> Iterator[Served]:
    """Start `nemodiff serve` on a free port and stop it by its process at the end.

    threads: None for as many as it takes by itself, which spin where they wait (`conftest.OneThread`).
    system: another one, of `other_system`, as far as this one can stand for it.
    """
    chosen = [] if threads is None else ["--threads", str(threads)]
    words = ["serve", str(engine), "--port", "0", *chosen, *options]
    begun = ["-m", "nemodiff", *words] if system is None else [other_system.__file__, system, json.dumps(words)]
    command = [sys.executable, "-W", warnings, *begun]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env={**os.environ, **(environment or {})}
    )
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        said = json.loads(line)["message"] if line.startswith("{") else line.rstrip("\n")
        announced = re.fullmatch(r"serving \S+ on http://([\d.]+):(\d+)", said)
        assert announced is not None, line + process.stderr.read()
        yield Served(process, announced[1], int(announced[2]), line)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(PATIENCE)
        process.stderr.close()
