"""Measure two replicas of `nemodiff serve` behind nginx, and kill one of them under load.

Clients stream answers without pause. Every request must end in a whole answer or in an error that its client sees; a
stream that ends without its end mark, and without an error, would be lost. Needs nginx. Writes `results/replicas.json`.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from common import questions, record

from nemodiff.builder.build import Builder

CONFIG = record.ROOT / "examples" / "serve" / "nginx.conf"
PACKAGES = ("nemodiff", "onnxruntime", "uvicorn")
End = Literal["whole", "error", "lost"]


@contextlib.contextmanager
def replica(engine: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server of one thread and four rows on a free port."""
    words = [sys.executable, "-m", "nemodiff", "serve", str(engine), "--port", "0", "--threads", "1", "--rows", "4"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            announced = re.search(r":(\d+)\n", process.stderr.readline())
            assert announced is not None
            yield process, int(announced[1])
        finally:
            process.kill()


@contextlib.contextmanager
def router(folder: Path, ports: list[int]) -> Iterator[int]:
    """nginx with the example's configuration over some replicas; gives its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    servers = [f"    server 127.0.0.1:{one} max_fails=1 fail_timeout=5s;\n" for one in ports]
    text = re.sub(r"( +server 127[^\n]*\n)+", lambda _: "".join(servers), CONFIG.read_text())
    (folder / "nginx.conf").write_text(text.replace("listen 127.0.0.1:8000", f"listen 127.0.0.1:{port}"))
    words = ["nginx", "-p", str(folder), "-c", "nginx.conf", "-g", "daemon off; worker_processes 1;"]
    with subprocess.Popen(words) as process:
        try:
            for _ in range(100):
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                time.sleep(0.05)
            yield port
        finally:
            process.send_signal(signal.SIGTERM)


def ask(port: int, text: str) -> End:
    """Stream one answer and say how it ended."""
    body = {
        "model": "engine",
        "ignore_eos": True,
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 200,
        "stream": True,
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
        except (http.client.HTTPException, OSError):
            return "error"
    if response.status != 200 or b'"error"' in content:
        return "error"
    return "whole" if content.endswith(b"data: [DONE]\n\n") else "lost"


def load(port: int, clients: int, seconds: float, at_half: Any = None) -> tuple[Counter[End], float]:
    """Let clients ask for some time; how requests ended, and whole answers per second."""
    ends: Counter[End] = Counter()
    lock = threading.Lock()
    texts = [question.text for question in questions.draw(20)]
    began = time.monotonic()

    def client(number: int) -> None:
        turn = number
        while time.monotonic() < began + seconds:
            end = ask(port, texts[turn % len(texts)])
            turn += clients
            with lock:
                ends[end] += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    if at_half is not None:
        time.sleep(seconds / 2)
        at_half()
    for thread in threads:
        thread.join()
    return ends, ends["whole"] / (time.monotonic() - began)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8, help="clients at a time (default 8)")
    parser.add_argument("--seconds", type=float, default=20.0, help="seconds of each load (default 20)")
    arguments = parser.parse_args()
    if shutil.which("nginx") is None:
        sys.exit("nginx is missing; install it: apt-get install nginx-light")
    origin = record.origin(PACKAGES, 1)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        engine = Builder(record.MODEL, folder / "engine").run()
        replicas = [stack.enter_context(replica(engine)) for _ in range(2)]
        (folder / "one").mkdir()
        (folder / "two").mkdir()
        with router(folder / "one", [replicas[0][1]]) as port:
            load(port, arguments.clients, arguments.seconds / 4)  # warm
            _, one = load(port, arguments.clients, arguments.seconds)
        with router(folder / "two", [port for _, port in replicas]) as port:
            whole, two = load(port, arguments.clients, arguments.seconds)
            killed, _ = load(port, arguments.clients, arguments.seconds, at_half=replicas[0][0].kill)
    figures = {
        "checkpoint": record.MODEL.name,
        "clients": arguments.clients,
        "answers_per_s": {"one replica": one, "two replicas": two},
        "ends": {"two replicas": dict(whole), "one of two killed half-way": dict(killed)},
    }
    lost = whole["lost"] + killed["lost"]
    goals = [
        record.goal("answers per second of two replicas over one", two / one, "at least", 1.6, "x"),
        record.goal("requests lost without an error, one of two replicas killed", lost, "at most", 0, "requests"),
        record.goal("errors that clients saw when it was killed", killed["error"], "at most", arguments.clients, ""),
    ]
    record.write("replicas", origin, goals, figures)


if __name__ == "__main__":
    main()
