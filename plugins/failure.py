"""Why kernels cannot be compiled or launched, in one line."""

from __future__ import annotations

import subprocess

from ..errors import first_line

_HOST = "C compiler"  # of Triton, which builds what launches a kernel


def failure(stderr: str) -> str:
    """What went wrong, in one line: the assembler's own words if it has said any, else Python's last."""
    lines = stderr.strip().splitlines()
    for line in lines:
        if line.startswith("ptxas") and ("fatal" in line or "error" in line):
            return line
    return lines[-1] if lines else "the compiler gave no reason"


def refusal(error: Exception, dtype: str) -> str | None:
    """Why a card, its assembler or this machine refuses a kernel, and what to do; None for any other error.

    `dtype` is the engine's, f32, f16 or bf16. Call it where Triton has been imported.
    """
    from triton.runtime.errors import OutOfResources, PTXASError

    if isinstance(error, OutOfResources):
        unit = " bytes" if error.name == "shared memory" else ""
        less = "build again with --dtype bf16, or " if dtype == "f32" else ""
        return (
            f"needs {error.required}{unit} of {error.name}, allowed on this card: {error.limit}; {less}run with "
            "--device cpu"
        )
    if isinstance(error, PTXASError):
        said = str(error).partition("Repro command")[0]
        return f"is refused by Triton's assembler ({failure(said):.300}); update triton, or run with --device cpu"
    if isinstance(error, subprocess.CalledProcessError) or (isinstance(error, RuntimeError) and _HOST in str(error)):
        return (
            f"needs a {_HOST} and Python's headers, with which Triton builds its launcher ({first_line(error):.200}); "
            "install gcc and python3-dev, or run with --device cpu"
        )
    return None
