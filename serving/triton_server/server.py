"""Running Triton Inference Server on a model repository."""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

from ...errors import ServerError
from .executable import Executable, find_executable

_ATTEMPTS = 3  # a port that was free may be taken by the time it is used
_PATIENCE = 40.0  # seconds until a server that was asked to stop is made to


class TritonServer:
    """A running server; leaving the block stops it, and finished requests are answered first.

    Args:
        repository: the model repository.
        ports: HTTP, gRPC, metrics; None takes free ones.
        host: address to listen on.
        arguments: further arguments for tritonserver.
        log: file for the server's output, None for standard error.
        patience: seconds until it must be ready; None does not wait for it.

    Raises:
        ServerError: there is none, or it does not become ready.
    """

    process: subprocess.Popen[bytes] | None = None

    def __init__(
        self,
        repository: Path,
        *,
        ports: tuple[int, int, int] | None = None,
        host: str = "127.0.0.1",
        arguments: Iterable[str] = (),
        log: Path | None = None,
        patience: float | None = 120.0,
    ) -> None:
        if not repository.is_dir():
            raise ServerError(f"{repository}: no such folder; make one with: nemodiff triton export")
        self._folder = Path(tempfile.mkdtemp(prefix="nemodiff-triton-"))
        self.shared = f"nemodiff_{os.getpid()}_{secrets.token_hex(4)}_"  # names of shared memory
        self._log = log
        try:
            executable = find_executable(repository, self._folder)
            attempts = _ATTEMPTS if ports is None else 1
            while attempts:
                attempts -= 1
                self.ports = free_ports() if ports is None else ports
                self.http, self.grpc, self.metrics = (f"{host}:{port}" for port in self.ports)
                self.process = self._launch(executable, repository, host, arguments)
                if patience is None or self._wait_until_ready(patience, last=not attempts):
                    break
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> TritonServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> int:
        """Ask the server to stop, make it if it does not, and return its exit code."""
        code = 0
        if self.process is not None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_PATIENCE)
            if sys.platform != "win32":  # for which there is no server
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self.process.pid, signal.SIGKILL)  # what hangs, and Python processes that it left
            code = self.process.wait()
        for segment in Path("/dev/shm").glob(f"{self.shared}*"):
            segment.unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)
        return code

    def logged(self) -> str:
        """The log file's text."""
        return self._log.read_text(errors="replace") if self._log is not None and self._log.exists() else ""

    def _launch(
        self, executable: Executable, repository: Path, host: str, arguments: Iterable[str]
    ) -> subprocess.Popen[bytes]:
        command = [
            executable.path,
            f"--model-repository={repository}",
            f"--backend-config=python,shm-region-prefix-name={self.shared}",
            *executable.options,
        ]
        for name, port in zip(("http", "grpc", "metrics"), self.ports, strict=True):
            command += [f"--{name}-address={host}", f"--{name}-port={port}"]
        with contextlib.ExitStack() as stack:
            output = stack.enter_context(self._log.open("ab")) if self._log is not None else sys.stderr.fileno()
            return subprocess.Popen(
                [*command, *arguments],
                env=executable.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_dies_with(os.getpid()),
            )

    def _wait_until_ready(self, patience: float, last: bool) -> bool:
        """Wait until it serves; False if it has ended and another attempt is worth it. Raises ServerError."""
        assert self.process is not None
        deadline = time.monotonic() + patience
        hint = "see its log" + (f" {self._log}" if self._log is not None else "")
        while time.monotonic() < deadline:
            if (code := self.process.poll()) is not None:
                if not last and "already in use" in self.logged():
                    return False
                raise ServerError(f"tritonserver has ended with code {code}; {hint}")
            with contextlib.suppress(OSError, urllib.error.URLError):
                for address in (f"{self.http}/v2/health/ready", f"{self.metrics}/metrics"):  # the latter opens last
                    urllib.request.urlopen(f"http://{address}", timeout=1).close()
                return True
            time.sleep(0.05)
        raise ServerError(f"tritonserver is not ready after {patience:.0f} seconds; {hint}")


def serve(repository: Path, host: str, ports: tuple[int, int, int], arguments: Iterable[str]) -> None:
    """Run a server in the foreground until it ends or gets a signal, its output on standard error.

    Raises:
        ServerError: the folder is no model repository, or the server fails.
    """
    if (repository / "config.pbtxt").exists():
        raise ServerError(
            f"{repository} is a model and not a repository; give the folder that holds it: nemodiff triton run "
            f"{repository.resolve().parent}"
        )
    if repository.is_dir() and not any(repository.glob("*/config.pbtxt")):
        raise ServerError(f"{repository} holds no model; write one into it: nemodiff triton export ENGINE --repo REPO")

    with TritonServer(repository, host=host, ports=ports, arguments=arguments, patience=None) as server:
        assert server.process is not None
        try:
            code = server.process.wait()
        except KeyboardInterrupt:
            code = server.stop()
    if code != 0:
        raise ServerError(f"tritonserver has ended with code {code}; its log above says why, use other ports if taken")


def free_ports() -> tuple[int, int, int]:
    """Three ports that are free at this moment, for HTTP, gRPC and metrics."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        http, grpc, metrics = (int(each.getsockname()[1]) for each in sockets)
        return http, grpc, metrics


def _dies_with(parent: int) -> Callable[[], None]:
    """For the child: have the kernel end it when this process ends in any way."""
    library = ctypes.CDLL(None)

    def set_death_signal() -> None:
        library.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)

    return set_death_signal
