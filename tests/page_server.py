"""A server of the page for its tests: the static files, and `POST /events` over a real scheduler.

It speaks as `nemodiff serve` does, in the least code: server-sent events of `as_dict`, errors as `{"error": ...}`, and
a client that hangs up has its request cancelled.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import nemodiff
from nemodiff.runtime.events import as_dict
from nemodiff.serving.export import PAGE


@contextlib.contextmanager
def serve(engine: nemodiff.LoadedEngine) -> Iterator[tuple[str, nemodiff.Scheduler]]:
    """The address of a server on a free port, and its scheduler."""
    with nemodiff.Scheduler(engine, rows=4) as scheduler:

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *arguments: Any) -> None:
                super().__init__(*arguments, directory=str(PAGE))

            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                body["max_new_tokens"] = body.pop("max_tokens", None)
                try:
                    handle = scheduler.submit(body.pop("prompt"), steps=True, **body)
                except nemodiff.NemodiffError as error:
                    answer = json.dumps({"error": {"message": str(error)}}).encode()
                    self.send_response(400)
                    self.send_header("Content-Length", str(len(answer)))
                    self.end_headers()
                    self.wfile.write(answer)
                    return
                self.send_response(200)
                self.send_header("Content-Type", "text/event-stream")
                self.end_headers()
                try:
                    for event in handle:
                        self.wfile.write(b"data: " + json.dumps(as_dict(event)).encode() + b"\n\n")
                except OSError:
                    handle.cancel()

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", scheduler
        finally:
            server.shutdown()
            thread.join()
            server.server_close()
