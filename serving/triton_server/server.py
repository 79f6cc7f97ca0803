"""Finding a Triton server on this machine and running it on a model repository.

In: a repository and ports. Out: `TritonServer`, a context manager around the process. A `tritonserver` on PATH is taken
as it is; else the one that `nemodiff triton install` has put here, with a made-up environment whose Python sees this
very nemodiff. The surprising fact: Triton's Python backend starts an isolated Python that ignores PYTHONPATH and takes
the environment of the first `python3` on PATH, so an environment of two links and a `.pth` file is what it gets.
"""

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
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

from ...errors import ServerError
from .install import NUMPY, WHEEL, installed

_NONE_FOUND = (
    "no Triton server found for it: there is no tritonserver on PATH and none installed here; get one with: nemodiff "
    "triton install, or use Triton's container as config.pbtxt in the model's folder says"
)


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
            found = self._found(repository)
            attempts = 3 if ports is None else 1  # a port that was free may be taken by the time it is used
            while attempts:
                attempts -= 1
                self.ports = free_ports() if ports is None else ports
                self.http, self.grpc, self.metrics = (f"{host}:{port}" for port in self.ports)
                self.process = self._launch(found, repository, host, arguments)
                if patience is None or self._ready(patience, last=not attempts):
                    break
        except BaseException:
            self.stop()
            raise

    def _launch(
        self, found: tuple[str, dict[str, str], list[str]], repository: Path, host: str, arguments: Iterable[str]
    ) -> subprocess.Popen[bytes]:
        executable, environment, options = found
        command = [executable, f"--model-repository={repository}", *options]
        for name, port in zip(("http", "grpc", "metrics"), self.ports, strict=True):
            command += [f"--{name}-address={host}", f"--{name}-port={port}"]
        with contextlib.ExitStack() as stack:
            output = stack.enter_context(self._log.open("ab")) if self._log is not None else sys.stderr.fileno()
            return subprocess.Popen(
                [*command, *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_dies_with(os.getpid()),
            )

    def __enter__(self) -> TritonServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self, patience: float = 40.0) -> int:
        """Ask the server to stop, make it after `patience` seconds, and return its exit code."""
        code = 0
        if self.process is not None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # what hangs, and Python processes that it left
            code = self.process.wait()
        for left in Path("/dev/shm").glob(f"{self.shared}*"):
            left.unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)
        return code

    def logged(self) -> str:
        """The log file's text."""
        return self._log.read_text(errors="replace") if self._log is not None and self._log.exists() else ""

    def _ready(self, patience: float, last: bool) -> bool:
        """Wait until it serves; False if it has ended and another attempt is worth it. Raises ServerError."""
        assert self.process is not None
        end = time.monotonic() + patience
        hint = "see its log" + (f" {self._log}" if self._log is not None else "")
        while time.monotonic() < end:
            if (code := self.process.poll()) is not None:
                if not last and "already in use" in self.logged():
                    return False
                raise ServerError(f"tritonserver has ended with code {code}; {hint}")
            with contextlib.suppress(OSError, urllib.error.URLError):
                for address in (f"{self.http}/v2/health/ready", f"{self.metrics}/metrics"):  # the latter comes last
                    urllib.request.urlopen(f"http://{address}", timeout=1).close()
                return True
            time.sleep(0.05)
        raise ServerError(f"tritonserver is not ready after {patience:.0f} seconds; {hint}")

    def _found(self, repository: Path) -> tuple[str, dict[str, str], list[str]]:
        """The executable, its environment and the options it needs."""
        region = f"--backend-config=python,shm-region-prefix-name={self.shared}"
        on_path = shutil.which("tritonserver")
        if on_path is not None:
            return on_path, dict(os.environ), [region]
        if not installed():
            raise ServerError(f"{repository}: {_NONE_FOUND}")
        server, backends = WHEEL / "pytriton" / "tritonserver", self._folder / "backends"
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
        (backends / "python").mkdir(parents=True)
        for file in (*(server / "backends" / "python").iterdir(), stub):
            if file.is_file():
                (backends / "python" / file.name).symlink_to(file)
        libraries = [str(WHEEL / "nvidia_pytriton.libs")]
        if sysconfig.get_config_var("Py_ENABLE_SHARED"):
            libraries.append(str(sysconfig.get_config_var("LIBDIR")))
        environment = {
            **{name: value for name, value in os.environ.items() if name != "PYTHONHOME"},
            "LD_LIBRARY_PATH": ":".join(libraries),
            "PATH": f"{self._python(version)}:{os.environ.get('PATH', '/usr/bin:/bin')}",
        }
        _check_libraries(stub, environment)
        options = [f"--backend-directory={backends}", "--allow-gpu-metrics=false", "--disable-auto-complete-config"]
        return str(server / "bin" / "tritonserver"), environment, [*options, region]

    def _python(self, version: str) -> Path:
        """The `bin` of an environment in which this nemodiff and its packages are, behind NumPy 1."""
        environment, base = self._folder / "environment", Path(getattr(sys, "_base_executable", sys.executable))
        packages = environment / "lib" / f"python{version}" / "site-packages"
        (environment / "bin").mkdir(parents=True)
        packages.mkdir(parents=True)
        (environment / "bin" / "python3").symlink_to(base)
        (environment / "pyvenv.cfg").write_text(f"home = {base.resolve().parent}\n", encoding="utf-8")
        (packages / "nemodiff").symlink_to(Path(__file__).resolve().parents[2], target_is_directory=True)
        ours = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
        (packages / "nemodiff.pth").write_text("\n".join([str(NUMPY), *ours]) + "\n", encoding="utf-8")
        return environment / "bin"


def serve(repository: Path, host: str, ports: tuple[int, int, int], arguments: Iterable[str]) -> None:
    """Run a server in the foreground until it ends or is told to, its output on standard error. Raises ServerError."""
    if (repository / "config.pbtxt").exists():
        raise ServerError(
            f"{repository} is a model and not a repository; give the folder that holds it: nemodiff triton run "
            f"{repository.resolve().parent}"
        )
    if repository.is_dir() and not any(repository.glob("*/config.pbtxt")):
        raise ServerError(f"{repository} holds no model; write one into it: nemodiff triton export ENGINE --repo REPO")

    def interrupted(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupted)
    with TritonServer(repository, host=host, ports=ports, arguments=arguments, patience=None) as server:
        assert server.process is not None
        try:
            code = server.process.wait()
        except KeyboardInterrupt:
            code = server.stop()
    if code != 0:
        raise ServerError(f"tritonserver has ended with code {code}; its log above says why, use other ports if taken")


def _check_libraries(program: Path, environment: dict[str, str]) -> None:
    """A Python process whose libraries are missing would make the server wait for ever. Raises ServerError."""
    traced = {**environment, "LD_TRACE_LOADED_OBJECTS": "1"}
    shown = subprocess.run([str(program)], env=traced, capture_output=True, text=True).stdout
    missing = [line.split()[0] for line in shown.splitlines() if "not found" in line]
    if missing:
        raise ServerError(
            f"{program.name} needs {', '.join(missing)}, which is not here; install it or use a container"
        )


def free_ports() -> tuple[int, int, int]:
    """Three that are free at this moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        http, grpc, metrics = (int(each.getsockname()[1]) for each in sockets)
        return http, grpc, metrics


def _dies_with(parent: int) -> Callable[[], None]:
    """In the child: ask the kernel to end it when this process ends, in whatever way."""
    library = ctypes.CDLL(None)

    def ask() -> None:
        library.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)

    return ask
