"""Installing a real Triton Inference Server for this machine, without a container and without a GPU.

The `tritonserver` of the nvidia-pytriton wheel (2.51, with its Python backend) goes into a folder of its own inside the
Python environment, and nothing of it into the environment's packages. That backend reads arrays by NumPy 1's memory
layout, so NumPy 1 is installed beside it.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

from ...errors import ServerError

FOLDER = Path(sys.prefix) / "share" / "nemodiff" / "triton"
WHEEL = FOLDER / "wheel"
NUMPY = FOLDER / "numpy"
_PACKAGES = {WHEEL: "nvidia-pytriton==0.7.0", NUMPY: "numpy==1.26.4"}


def installed() -> bool:
    """Whether `install` has finished here."""
    return all(folder.is_dir() for folder in _PACKAGES)


def install() -> Path:
    """Download what is missing, 290 MB on disk, and return the folder. Raises ServerError."""
    if platform.system() != "Linux" or sys.version_info >= (3, 13):
        raise ServerError(
            f"the bundled Triton server is for Linux and Python 3.11 or 3.12, this is Python "
            f"{sys.version_info.major}.{sys.version_info.minor} on {sys.platform}; use Triton's container"
        )
    for folder, package in _PACKAGES.items():
        if folder.is_dir():
            continue
        partial = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(partial, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(partial), package]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ServerError(f"{package} cannot be installed ({reason}); install pip or use Triton's container")
        partial.rename(folder)
    return FOLDER
