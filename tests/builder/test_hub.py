"""Checkpoints from the Hugging Face hub, played by a small server in this process.

`nemodiff build OWNER/NAME@REVISION` runs as its own process with HF_ENDPOINT and HF_HOME set, as a user would run it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import http.server
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import PATIENCE, assert_one_line, snapshot
from stand_ins.checkpoints import write_checkpoint

import nemodiff
from nemodiff.cli import main

NEMODIFF = Path(sys.executable).with_name("nemodiff")
REPO, COMMIT = "acme/tri-mode", "c0ffee00" * 5
# Bytes that huggingface_hub writes at once. It resumes inside a file only while it runs and only by such pieces; a new
# command starts an unfinished file again and keeps the finished ones.
PIECE = 10 * 2**20
SENT = PIECE + 2**20  # bytes that the server sends before it fails
DECOYS = (
    "README.md",
    "pytorch_model.bin",
    "other.safetensors",
    "original/consolidated.safetensors",
    "original/model.safetensors",
    "linear_spec_lora/README.md",
    "linear_spec_lora/adapter_model.bin",
)


@dataclasses.dataclass
class Hub:
    """The server's files and faults, and the requests it got."""

    folder: Path
    endpoint: str = ""
    refusals: dict[str, tuple[int, str]] = dataclasses.field(default_factory=dict)  # path prefix: status, X-Error-Code
    faults: list[str] = dataclasses.field(default_factory=list)  # of the next downloads of model.safetensors
    downloads: list[tuple[str, str | None]] = dataclasses.field(default_factory=list)  # path, Range
    stalled: threading.Event = dataclasses.field(default_factory=threading.Event)
    released: threading.Event = dataclasses.field(default_factory=threading.Event)

    def files(self) -> list[str]:
        return sorted(str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file())


class Handler(http.server.BaseHTTPRequestHandler):
    """As much of the hub's API as `snapshot_download` needs."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        for prefix, (status, code) in self.hub.refusals.items():
            if path.startswith(prefix):
                headers = {"X-Error-Code": code, "X-Error-Message": "two\\nlines"} if code else {}
                return self.answer(status, b"<html>no</html>", headers)
        if path == f"/api/models/{REPO}/revision/main" or path == f"/api/models/{REPO}/revision/v1":
            return self.answer(200, json.dumps({"id": REPO, "sha": COMMIT}).encode())
        if path == f"/api/models/{REPO}/tree/{COMMIT}":
            return self.answer(200, json.dumps([self.entry(name) for name in self.hub.files()]).encode())
        if path.startswith(f"/{REPO}/resolve/{COMMIT}/"):
            return self.send_file(path.removeprefix(f"/{REPO}/resolve/{COMMIT}/"))
        known = path.startswith(f"/api/models/{REPO}/")
        return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound" if known else "RepoNotFound"})

    def entry(self, name: str) -> dict[str, object]:
        content = (self.hub.folder / name).read_bytes()
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def send_file(self, name: str) -> None:
        content = (self.hub.folder / name).read_bytes()
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if self.command == "HEAD":
            return self.answer(200, content, headers)
        span = self.headers.get("Range")
        self.hub.downloads.append((name, span))
        first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", span).groups() if span else ("0", "")
        start, total = int(first), len(content)
        content = content[: int(last) + 1] if last else content
        if start or last:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{total}"
        fault = self.hub.faults.pop(0) if name == "model.safetensors" and self.hub.faults else None
        return self.answer(206 if start or last else 200, content[start:], headers, fault)

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None, fault: str | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body if fault is None else body[:SENT])
        if fault is None:
            return
        self.close_connection = True
        if fault == "stall":
            self.hub.stalled.set()
            self.hub.released.wait(PATIENCE)
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())  # at once: http.server would end the stream first, which is a cut

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(checkpoint: Path) -> Iterator[Hub]:
    hub = Hub(checkpoint.parent / "repository")
    checkpoint.rename(hub.folder)
    for name in DECOYS:
        (hub.folder / name).parent.mkdir(exist_ok=True)
        (hub.folder / name).write_bytes(b"decoy")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    yield hub
    hub.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


def large(hub: Hub) -> None:
    """Make the weights large enough that they come in more than one piece."""
    shutil.rmtree(hub.folder)
    write_checkpoint(hub.folder, dtype="f32", intermediate_size=20_000)
    assert (hub.folder / "model.safetensors").stat().st_size > SENT


def start_build(hub: Hub, name: str, *flags: str, command: str = "build", **environment: str) -> subprocess.Popen[str]:
    root = hub.folder.parent
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    return subprocess.Popen(
        [NEMODIFF, command, name, "-o", root / "engine", *flags],
        env=inherited | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(root / "hf")} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
    )


def build(hub: Hub, name: str = REPO, *flags: str, **environment: str) -> tuple[int, str]:
    """Run `nemodiff build` to its end; exit code and standard error."""
    process = start_build(hub, name, *flags, **environment)
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert stdout == "" or "--dry-run" in flags
    return process.returncode, stderr


def refused(hub: Hub, name: str, *fragments: str, **environment: str) -> None:
    code, stderr = build(hub, name, **environment)
    assert_one_line(stderr, *fragments)
    assert code == 1
    left = [path for path in snapshot(hub.folder.parent) if "engine" in Path(path).name]
    assert left == []


@pytest.mark.parametrize("shards", [1, 2])
def test_only_needed_files_are_fetched_and_the_revision_is_recorded(hub: Hub, shards: int) -> None:
    if shards > 1:
        split = write_checkpoint(hub.folder.parent / "split", shards=shards)
        (hub.folder / "model.safetensors").unlink()
        for path in split.glob("model*"):
            path.rename(hub.folder / path.name)
        shutil.rmtree(split)
    needed = set(hub.files()) - set(DECOYS)
    code, stderr = build(hub, f"{REPO}@v1")
    assert code == 0, stderr
    assert sorted(name for name, _ in hub.downloads) == sorted(needed)
    engine = hub.folder.parent / "engine"
    manifest = json.loads((engine / "manifest.json").read_text())
    assert (manifest["checkpoint"]["name"], manifest["checkpoint"]["revision"]) == (REPO, COMMIT)
    assert set(manifest["checkpoint"]["files"]) == needed - {"model.safetensors.index.json"}
    assert manifest["adapter"] == {"name": "linear_spec_lora", "rank": 4, "scale": 2.0, "acts_in": ["draft"]}
    assert nemodiff.generate(nemodiff.load(engine), [130, 131], max_new_tokens=2).token_ids


@pytest.mark.parametrize("shards", [1, 2])
def test_dry_run_fetches_headers_alone(hub: Hub, shards: int) -> None:
    large(hub)
    if shards > 1:
        shutil.rmtree(hub.folder)
        write_checkpoint(hub.folder, dtype="f32", intermediate_size=20_000, shards=shards)
    process = start_build(hub, REPO, "--dry-run", "--json")
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, stderr
    weights = [span for name, span in hub.downloads if name.endswith(".safetensors")]
    assert len(weights) == shards
    assert set(weights) == {"bytes=0-100000"}
    local = CliRunner().invoke(main, ["build", str(hub.folder), "-o", "engine", "--dry-run", "--json"])
    plan = json.loads(stdout)
    assert plan["checkpoint_bytes"] > SENT
    ours = {k: v for k, v in plan.items() if k != "disk_free"}
    assert ours == {k: v for k, v in json.loads(local.stdout).items() if k != "disk_free"}


def test_export_takes_a_hub_id_and_its_dry_run_fetches_headers_alone(hub: Hub) -> None:
    large(hub)
    stdout, stderr = start_build(hub, REPO, "--dry-run", command="export").communicate(timeout=PATIENCE)
    assert "twin         Ministral3ForCausalLM" in stdout, stderr
    assert [span for name, span in hub.downloads if name.endswith(".safetensors")] == ["bytes=0-100000"]
    process = start_build(hub, f"{REPO}@v1", command="export")
    assert process.communicate(timeout=PATIENCE)[0] == ""
    assert process.returncode == 0
    twin = hub.folder.parent / "engine"
    origin = json.loads((twin / "nemodiff_export.json").read_text())
    assert origin["checkpoint"] == {"name": REPO, "revision": COMMIT}
    assert (twin / "model.safetensors").stat().st_size > SENT


def test_a_cached_checkpoint_needs_no_hub(hub: Hub) -> None:
    assert build(hub)[0] == 0
    hub.downloads.clear()
    assert build(hub, HF_HUB_OFFLINE="1")[0] == 0
    assert build(hub, f"{REPO}@{COMMIT}", "--dry-run", HF_ENDPOINT="http://127.0.0.1:1")[0] == 0
    assert hub.downloads == []


def test_a_reset_connection_is_reported_and_the_same_command_finishes(hub: Hub) -> None:
    large(hub)
    hub.faults.append("reset")
    refused(hub, REPO, f"{REPO}: the download failed (", "run the same command again, whole files are kept")
    hub.downloads.clear()
    assert build(hub)[0] == 0
    assert hub.downloads == [("model.safetensors", None)]


def test_a_killed_download_is_finished_by_the_same_command(hub: Hub) -> None:
    large(hub)
    hub.faults.append("stall")
    process = start_build(hub, REPO)
    assert hub.stalled.wait(PATIENCE)
    process.kill()
    process.communicate()
    hub.downloads.clear()
    assert build(hub)[0] == 0
    assert ("model.safetensors", None) in hub.downloads
    engine = hub.folder.parent / "engine"
    assert nemodiff.generate(nemodiff.load(engine), [130, 131], max_new_tokens=2).token_ids


def test_a_cut_connection_is_resumed_at_once(hub: Hub) -> None:
    large(hub)
    hub.faults.append("cut")
    code, stderr = build(hub)
    assert code == 0, stderr
    assert ("model.safetensors", f"bytes={PIECE}-") in hub.downloads


INFO, FILES = f"/api/models/{REPO}", f"/{REPO}/resolve"


@pytest.mark.parametrize(
    ("name", "refusals", "fragments"),
    [
        pytest.param("acme/nothing", {}, ["no such folder here, and the hub has no", "HF_TOKEN"], id="unknown 404"),
        pytest.param(
            REPO,
            {INFO: (401, "RepoNotFound")},
            ["no such repository; check the name, or set HF_TOKEN"],
            id="unknown 401",
        ),
        pytest.param(
            f"{REPO}@v9", {}, [f"{REPO}@v9: the hub has no revision 'v9'; leave it out"], id="unknown revision"
        ),
        pytest.param(f"{REPO}@{'0' * 40}", {}, ["the hub has no revision '0000"], id="unknown commit"),
        pytest.param(REPO, {INFO: (401, "GatedRepo")}, ["the hub asks for access; accept its terms"], id="gated 401"),
        pytest.param(REPO, {INFO: (403, "GatedRepo")}, ["asks for access", "set HF_TOKEN"], id="gated 403"),
        pytest.param(REPO, {FILES: (403, "GatedRepo")}, ["the hub asks for access"], id="gated files"),
        pytest.param(REPO, {INFO: (403, "")}, ["the download failed (", "run the same command again"], id="forbidden"),
        pytest.param(REPO, {FILES: (404, "EntryNotFound")}, ["the download failed (", "again"], id="file vanished"),
        pytest.param(REPO, {INFO: (200, "")}, ["the download failed (", "give a folder"], id="captive portal"),
        pytest.param("acme/a..b", {}, ["acme/a..b: the download failed (", "give a folder"], id="name no hub has"),
    ],
)
def test_what_the_hub_refuses_is_one_line(
    hub: Hub, name: str, refusals: dict[str, tuple[int, str]], fragments: list[str]
) -> None:
    hub.refusals = refusals
    refused(hub, name, *fragments)


def test_a_hub_that_is_down_is_one_line(hub: Hub) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closing:
        port = closing.getsockname()[1]
    refused(hub, REPO, f"{REPO}: the download failed (", "again", HF_ENDPOINT=f"http://127.0.0.1:{port}")


def test_offline_without_a_copy_is_one_line(hub: Hub) -> None:
    refused(hub, REPO, f"{REPO}: the download failed (", "give a folder", HF_HUB_OFFLINE="1")
    assert hub.downloads == []


def test_a_file_where_the_cache_should_be_is_one_line(hub: Hub) -> None:
    (hub.folder.parent / "hf").write_text("in the way")
    refused(hub, REPO, f"{REPO}: the download failed (", "give a folder")
