"""How a compiling child process is started: it imports what this process would, wherever it stands."""

from __future__ import annotations

import os
import sys


def child_command(module: str, *arguments: str) -> list[str]:
    """The command line that runs a module of nemodiff."""
    return [sys.executable, "-P", "-m", module, *arguments]  # -P: nothing comes from the folder it stands in


def child_environment() -> dict[str, str]:
    """This process's environment with its import path."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
