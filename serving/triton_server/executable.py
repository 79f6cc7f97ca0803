"""Finding a tritonserver on this machine, and the environment that it runs in.

One on PATH is taken as it is. Else the one that `nemodiff triton install` has put here gets an environment whose Python
sees this very nemodiff.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from ...errors import ServerError
from .install import NUMPY, WHEEL, installed

_NOT_FOUND = (
    "no Triton server found for it: there is no tritonserver on PATH and none installed here; get one with: nemodiff "
    "triton install, or use Triton's container as config.pbtxt in the model's folder says"
)


@dataclasses.dataclass(frozen=True)
class Executable:
    """A tritonserver, its environment and the options that it needs to run here."""

    path: str
    environment: dict[str, str]
    options: tuple[str, ...] = ()


def find_executable(repository: Path, folder: Path) -> Executable:
    """Find a server for a repository.

    Args:
        repository: the model repository, for the error.
        folder: takes what the server's environment is made of; it must stay while the server runs.

    Raises:
        ServerError: there is none, or a library that it needs is missing.
    """
    on_path = shutil.which("tritonserver")
    if on_path is not None:
        return Executable(on_path, dict(os.environ))
    if not installed():
        raise ServerError(f"{repository}: {_NOT_FOUND}")
    server = WHEEL / "pytriton" / "tritonserver"
    backends = folder / "backends"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
    (backends / "python").mkdir(parents=True)
    for file in (*(server / "backends" / "python").iterdir(), stub):
        if file.is_file():
            (backends / "python" / file.name).symlink_to(file)
    libraries = [str(WHEEL / "nvidia_pytriton.libs")]
    if sysconfig.get_config_var("Py_ENABLE_SHARED"):
        libraries.append(str(sysconfig.get_config_var("LIBDIR")))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONHOME"}
    environment["LD_LIBRARY_PATH"] = ":".join(libraries)
    environment["PATH"] = f"{_python_environment(folder, version)}:{os.environ.get('PATH', '/usr/bin:/bin')}"
    _check_libraries(stub, environment)
    options = (f"--backend-directory={backends}", "--allow-gpu-metrics=false", "--disable-auto-complete-config")
    return Executable(str(server / "bin" / "tritonserver"), environment, options)


def _python_environment(folder: Path, version: str) -> Path:
    """Make an environment with NumPy 1 before this nemodiff and its packages, and return its `bin`.

    The Python backend starts an isolated Python that ignores PYTHONPATH and takes the environment of the first
    `python3` on PATH, so two links and a `.pth` file are what it gets.
    """
    environment = folder / "environment"
    base = Path(getattr(sys, "_base_executable", sys.executable))
    packages = environment / "lib" / f"python{version}" / "site-packages"
    (environment / "bin").mkdir(parents=True)
    packages.mkdir(parents=True)
    (environment / "bin" / "python3").symlink_to(base)
    (environment / "pyvenv.cfg").write_text(f"home = {base.resolve().parent}\n", encoding="utf-8")
    (packages / "nemodiff").symlink_to(Path(__file__).resolve().parents[2], target_is_directory=True)
    ours = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "nemodiff.pth").write_text("\n".join([str(NUMPY), *ours]) + "\n", encoding="utf-8")
    return environment / "bin"


def _check_libraries(program: Path, environment: dict[str, str]) -> None:
    """Raise ServerError if libraries are missing, because the server would wait for ever for such a Python process."""
    loader = {**environment, "LD_TRACE_LOADED_OBJECTS": "1"}
    libraries = subprocess.run([str(program)], env=loader, capture_output=True, text=True).stdout
    missing = [line.split()[0] for line in libraries.splitlines() if "not found" in line]
    if missing:
        raise ServerError(
            f"{program.name} needs {', '.join(missing)}, which is not here; install it or use a container"
        )
