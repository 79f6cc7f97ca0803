"""Images as users send them: on the command line, in files of prompts, over HTTP, and to Triton's model."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.server
import ipaddress
import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import PATIENCE, output_of
from stand_ins.asgi import asked
from stand_ins.http_server import Served, serving
from stand_ins.vision import as_bytes, picture

import nemodiff
from nemodiff.cli import main
from nemodiff.errors import RequestError
from nemodiff.serving.http import image_urls
from nemodiff.serving.http.app import Limits, Server
from nemodiff.serving.http.image_urls import fetch, is_public
from nemodiff.serving.triton_server.parameters import read

QUESTION = "What is this?"
DATA = as_bytes(picture(30, 20))
URL = "data:image/png;base64," + base64.b64encode(DATA).decode()


@pytest.fixture(scope="module")
def expected(seeing_engine: Path) -> dict[str, Any]:
    content = [{"type": "image", "image": DATA}, {"type": "text", "text": QUESTION}]
    answer = nemodiff.generate(nemodiff.load(seeing_engine), [{"role": "user", "content": content}], max_new_tokens=12)
    return {"text": answer.text, "image_tokens": answer.image_tokens, "prompt_tokens": answer.prompt_tokens}


@pytest.fixture(scope="module")
def server(seeing_engine: Path) -> Iterator[Served]:
    with serving(seeing_engine) as served:
        yield served


def test_run_shows_images(seeing_engine: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(DATA)
    base = ["run", str(seeing_engine), "-p", QUESTION, "--max-new-tokens", "12", "--json"]
    for image, stdin in ((str(path), b""), ("-", DATA)):
        result = CliRunner().invoke(main, [*base, "--image", image, "--stats"], input=stdin)
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)["text"] == expected["text"]
        assert f"after images of {expected['image_tokens'][0]} tokens" in result.stderr
    twice = json.loads(output_of(*base, "--image", str(path), "--image", str(path)))
    assert twice["image_tokens"] == expected["image_tokens"] * 2
    lines = tmp_path / "lines.jsonl"
    content = [{"type": "image", "image": str(path)}, {"type": "text", "text": QUESTION}]
    by_url = [{"type": "image_url", "image_url": {"url": URL}}, content[1]]
    texts = [json.dumps({"messages": [{"role": "user", "content": one}]}) for one in (content, by_url)]
    lines.write_text("\n".join(texts))
    answers = output_of("run", str(seeing_engine), "--input-file", str(lines), "--json", "--max-new-tokens", "12")
    assert [json.loads(line)["text"] for line in answers.splitlines()] == [expected["text"]] * 2


def test_run_refuses_what_is_no_image(seeing_engine: Path, tmp_path: Path, refused: Any) -> None:
    base = ["run", str(seeing_engine), "-p", QUESTION]
    refused([*base, "--image", str(tmp_path / "none.png")], "none.png", "cannot be read")
    refused([*base, "--image", "-", "--image", "-"], "standard input", code=2)
    refused(["run", str(seeing_engine), "--image", "-"], "standard input", code=2)
    refused([*base, "--raw", "--image", "x"], "leave out --raw", code=2)
    refused(["run", str(seeing_engine), "--input-file", "x", "--image", "y"], "--image goes with --prompt", code=2)


def chat(*parts: Any, **fields: Any) -> dict[str, Any]:
    content = [*parts, {"type": "text", "text": QUESTION}]
    return {"model": "seeing", "messages": [{"role": "user", "content": content}], "max_tokens": 12, **fields}


def test_chat_takes_image_parts(server: Served, expected: dict[str, Any]) -> None:
    image = {"type": "image_url", "image_url": {"url": URL, "detail": "high"}}
    for mode in ("ar", "linear_spec", "quadratic_spec"):
        answer = server.ask("/v1/chat/completions", chat(image, mode=mode))
        assert answer["choices"][0]["message"]["content"] == expected["text"]
        assert answer["usage"]["prompt_tokens"] == expected["prompt_tokens"]
        assert answer["usage"]["prompt_tokens_details"]["image_tokens"] == sum(expected["image_tokens"])
    again = server.ask("/v1/chat/completions", chat(image))
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > sum(expected["image_tokens"])


def test_other_apis_take_images(server: Served, expected: dict[str, Any]) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(DATA).decode()}
    content = [{"type": "image", "source": source}, {"type": "text", "text": QUESTION}]
    body = {"model": "seeing", "messages": [{"role": "user", "content": content}]}
    message = server.ask("/v1/messages", {**body, "max_tokens": 12})
    assert "".join(block["text"] for block in message["content"]) == expected["text"]
    assert server.ask("/v1/messages/count_tokens", body) == {"input_tokens": expected["prompt_tokens"]}
    parts = [{"type": "input_image", "image_url": URL}, {"type": "input_text", "text": QUESTION}]
    items = [{"role": "user", "content": parts}]
    answer = server.ask("/v1/responses", {"model": "seeing", "input": items, "max_output_tokens": 12})
    assert "".join(item["content"][0]["text"] for item in answer["output"]) == expected["text"]


def test_what_a_tool_has_given_may_hold_images(server: Served, expected: dict[str, Any]) -> None:
    """In every API, as if the user had shown them after the tool's text."""
    call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    image = {"type": "image_url", "image_url": {"url": URL}}
    before = [{"role": "user", "content": "Look."}, {"role": "assistant", "tool_calls": [call]}]
    told = {"role": "tool", "tool_call_id": "a", "content": "seen"}
    messages = [*before, told, {"role": "user", "content": [image]}]
    meant = server.ask("/v1/chat/completions", {"model": "seeing", "messages": messages, "max_tokens": 12})
    wanted, tokens = meant["choices"][0]["message"]["content"], meant["usage"]["prompt_tokens"]
    messages = [*before, {**told, "content": [{"type": "text", "text": "seen"}, image]}]
    answer = server.ask("/v1/chat/completions", {"model": "seeing", "messages": messages, "max_tokens": 12})
    assert answer["choices"][0]["message"]["content"] == wanted
    assert answer["usage"]["prompt_tokens_details"]["image_tokens"] == sum(expected["image_tokens"])
    source = {"type": "base64", "media_type": "image/png", "data": base64.b64encode(DATA).decode()}
    found = [{"type": "image", "source": source}, {"type": "text", "text": "seen"}]
    turns = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "look", "input": {}}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "a", "content": found}]},
    ]
    message = server.ask("/v1/messages", {"model": "seeing", "messages": turns, "max_tokens": 12})
    assert "".join(block["text"] for block in message["content"]) == wanted
    output = [{"type": "input_text", "text": "seen"}, {"type": "input_image", "image_url": URL}]
    items = [
        {"role": "user", "content": "Look."},
        {"type": "function_call", "call_id": "a", "name": "look", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": output},
    ]
    response = server.ask("/v1/responses", {"model": "seeing", "input": items, "max_output_tokens": 12})
    assert "".join(item["content"][0]["text"] for item in response["output"]) == wanted
    assert response["usage"]["input_tokens"] == message["usage"]["input_tokens"] + message["usage"].get(
        "cache_read_input_tokens", 0
    )
    assert response["usage"]["input_tokens"] == tokens


@pytest.mark.parametrize(
    ("part", "fragment"),
    [
        ({"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}, "--allow-image-urls"),
        ({"type": "image_url", "image_url": {"url": "/etc/passwd"}}, "allowed: data:image"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}, "not a whole image file"),
        ({"type": "image_url"}, "image_url"),
        ({"type": "image", "image": "/etc/passwd"}, "type"),
    ],
)
def test_chat_refuses_what_is_no_image(server: Served, part: dict[str, Any], fragment: str) -> None:
    status, _, body = server.send("/v1/chat/completions", chat(part))
    assert status in (400, 422)
    assert fragment in json.loads(body)["error"]["message"]


def test_a_server_that_fetches_does_not_call_its_own_network(seeing_engine: Path, web: str) -> None:
    with serving(seeing_engine, "--allow-image-urls") as served:
        part = {"type": "image_url", "image_url": {"url": f"{web}/a.png"}}
        status, _, body = served.send("/v1/chat/completions", chat(part))
    assert status == 400
    assert "no public address" in json.loads(body)["error"]["message"]


def test_a_request_to_triton_has_images_in_base64(expected: dict[str, Any], seeing_engine: Path) -> None:
    request = read({"text_input": [QUESTION], "image": [base64.b64encode(DATA).decode()], "max_tokens": [12]}, {}, {})
    answer = nemodiff.generate(nemodiff.load(seeing_engine), request.content, max_new_tokens=12)
    assert answer.text == expected["text"]
    with pytest.raises(RequestError, match="image 1 is no base64"):
        read({"text_input": [QUESTION], "image": ["*"]}, {}, {})


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("192.168.0.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("2002:7f00:1::", False),
        ("64:ff9b::127.0.0.1", False),
        ("64:ff9b::a9fe:a9fe", False),
        ("::127.0.0.1", False),
        ("fec0::1", False),
        ("fd00::1", False),
        ("fe80::1", False),
    ],
)
def test_private_addresses_are_not_called(address: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(address)) == public


DRIPS = 3000  # a minute


class Pictures(http.server.BaseHTTPRequestHandler):
    dripped = 0

    def do_GET(self) -> None:
        if self.path == "/slow.png":
            self.server.done.wait(PATIENCE)  # type: ignore[attr-defined]
        if self.path == "/dripping.png":  # each piece comes in time
            with contextlib.suppress(OSError):
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
                for _ in range(DRIPS):
                    self.wfile.write(b"a")
                    Pictures.dripped += 1
                    time.sleep(0.02)
            return
        self.send_response({"/moved.png": 302, "/lost.png": 404}.get(self.path, 200))
        self.send_header("Location", "/a.png")
        self.end_headers()
        self.wfile.write(DATA if self.path != "/large.png" else bytes(5000))

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def web() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pictures)
    server.done = threading.Event()  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.done.set()  # type: ignore[attr-defined]
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_image_is_fetched_under_limits(web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def anyone(address: object) -> bool:
        return True

    assert fetch(f"{web}/a.png", anyone) == DATA
    with pytest.raises(RequestError, match="no public address"):
        fetch(f"{web}/a.png")
    for name, fragment in (("moved", "302"), ("lost", "404")):
        with pytest.raises(RequestError, match=fragment):
            fetch(f"{web}/{name}.png", anyone)
    for name in ("slow", "dripping"):
        with pytest.raises(RequestError, match="it takes too long"):
            fetch(f"{web}/{name}.png", anyone, seconds=0.3)
    assert Pictures.dripped < DRIPS
    parts = [{"type": "image_url", "image_url": {"url": f"{web}/a.png"}}] * 17
    with pytest.raises(RequestError, match="17 images by URL, allowed in a request: 16"):
        image_urls.with_images([[{"role": "user", "content": parts}]], allowed=True)
    monkeypatch.setattr(image_urls, "MOST_BYTES", 4000)
    with pytest.raises(RequestError, match="more than 4,000 bytes"):
        fetch(f"{web}/large.png", anyone)
    for url in ("http://", "http://user@host/", "http://[::1", "http://host:x/"):
        with pytest.raises(RequestError, match="cannot be fetched"):
            fetch(url, anyone)


def test_slow_image_hosts_hold_up_no_other_prompt(seeing_engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = threading.Event()  # set once they answer

    def fetch(url: str, **_: Any) -> bytes:
        assert hosts.wait(PATIENCE)
        return DATA

    def told(*parts: dict[str, Any]) -> dict[str, Any]:
        content = [*parts, {"type": "text", "text": QUESTION}]
        return {"messages": [{"role": "user", "content": content}], "max_tokens": 3}

    async def ask(server: Server) -> None:
        seen = told({"type": "image_url", "image_url": {"url": "http://slow.example/a.png"}})
        counted = {"messages": [{"role": "user", "content": [
            {"type": "image", "source": {"type": "url", "url": "http://slow.example/a.png"}}
        ]}]}  # fmt: skip
        paths = [("/v1/chat/completions", seen), ("/v1/messages/count_tokens", counted)] * 40
        slow = [asyncio.create_task(asked(server.app, *one)) for one in paths]
        await asyncio.sleep(0.05)
        for path, body in (("/v1/chat/completions", told()), ("/tokenize", {"prompt": QUESTION})):
            status, _ = await asyncio.wait_for(asked(server.app, path, body), PATIENCE)
            assert status == 200
        assert not any(task.done() for task in slow)
        hosts.set()
        assert {status for status, _ in await asyncio.gather(*slow)} == {200}

    monkeypatch.setattr(image_urls, "fetch", fetch)
    loaded = nemodiff.load(seeing_engine, threads=1)
    with nemodiff.Scheduler(loaded) as scheduler:
        server = Server(loaded, scheduler, Limits(image_urls=True), "seeing", {})
        try:
            asyncio.run(ask(server))
        finally:
            hosts.set()
            server.close()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium; install it: scripts/debian-packages")
def test_a_picture_is_dropped_on_the_page(server: Served, expected: dict[str, Any]) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason='needs playwright: pip install "nemodiff[test]"')
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(reduced_motion="reduce")
        page.set_default_timeout(10_000)
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text))
        page.goto(f"http://{server.host}:{server.port}/")
        page.get_by_label("Prompt", exact=True).fill(QUESTION)
        page.get_by_text("Options").click()
        page.get_by_label("Most tokens").fill("12")
        page.get_by_label("Diffusion").uncheck()
        picture = page.locator("#pictures img")
        page.locator("#picture").set_input_files({"name": "a.png", "mimeType": "image/png", "buffer": DATA})
        playwright.expect(picture).to_have_count(1)
        page.get_by_title("Take this picture away").click()
        playwright.expect(picture).to_have_count(0)
        page.evaluate(
            """(text) => {
              const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
              const transfer = new DataTransfer();
              transfer.items.add(new File([bytes], "a.png", { type: "image/png" }));
              document.getElementById("request").dispatchEvent(
                new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true }));
            }""",
            base64.b64encode(DATA).decode(),
        )
        playwright.expect(picture).to_have_count(1)
        page.get_by_role("button", name="Run").click()
        playwright.expect(page.locator("#note")).to_have_text("Finished")
        for lane in page.locator(".lane").all():
            tokens = lane.locator(".answer .token:not([hidden])").all_text_contents()
            assert "".join(tokens).strip() == expected["text"].strip()
        assert page.locator(".lane").count() == 2
        assert complaints == []
        browser.close()
