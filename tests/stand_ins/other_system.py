"""Runs commands of nemodiff in one process as on a system that is not here: what it lacks is taken away first.

    python tests/stand_ins/other_system.py darwin '["build", "CHECKPOINT", "-o", "ENGINE"]' '["inspect", "ENGINE"]'

Only what no type checker of that platform sees has to be here: names that the product asks for before it uses them,
names in strings, modules, and files of the system. Processes that a command starts lack nothing. A library that loads
files of its own by the name of the platform is imported before, as in `darwin+torch`.
"""

import importlib
import json
import os
import platform
import sys
import sysconfig
import urllib.request
from typing import Any

MISSING_NAMES = {"darwin": {os: ("O_DIRECT", "O_PATH", "POSIX_FADV_DONTNEED", "posix_fadvise", "sched_getaffinity")}}
MISSING_MODULES = {"darwin": ("tensorrt_lean", "tensorrt_rtx", "triton")}
VARIABLES = {"darwin": ("SC_PAGE_SIZE", "SC_PHYS_PAGES")}  # that os.sysconf knows
ANSWERS = {"darwin": {"system": "Darwin", "release": "23.0.0", "machine": "arm64", "processor": "arm"}}  # of platform
LINUX = ("/dev/shm", "/proc/", "/sys/")


def become(system: str) -> None:
    """Make this process one of that system, as far as Python's libraries and the installed packages stand it."""
    for module, names in MISSING_NAMES[system].items():
        for name in names:
            delattr(module, name)
    for name in MISSING_MODULES[system]:
        sys.modules[name] = None  # type: ignore[assignment]  # which an import takes for a missing one
    for name, text in ANSWERS[system].items():
        setattr(platform, name, lambda text=text: text)
    sysconf = os.sysconf

    def known(name: str) -> int:
        if name not in VARIABLES[system]:
            raise ValueError("unrecognized configuration name")
        return sysconf(name)

    os.sysconf = known  # type: ignore[assignment]
    sys.addaudithook(refuse_files_of_linux)
    # Modules of Python's own that look at this, and what they load on one platform alone: here for good already.
    assert urllib.request
    sysconfig.get_config_vars()
    sys.platform = system


def refuse_files_of_linux(event: str, arguments: tuple[Any, ...]) -> None:
    """Have every way to open one of these files fail."""
    if event in ("open", "os.listdir", "os.scandir") and str(arguments[0]).startswith(LINUX):
        raise FileNotFoundError(2, "No such file or directory", arguments[0])


if __name__ == "__main__":
    system, *libraries = sys.argv[1].split("+")
    for library in libraries:
        importlib.import_module(library)
    become(system)
    from nemodiff.cli import main

    for words in sys.argv[2:]:
        main(json.loads(words), standalone_mode=False)
