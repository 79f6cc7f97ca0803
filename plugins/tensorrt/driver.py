"""Calls of the CUDA driver, through the module `cuda.bindings.driver` or what plays it."""

from __future__ import annotations

from typing import Any

from ...errors import EngineError


def call(driver: Any, name: str, *arguments: Any, subject: str, next_step: str) -> Any:
    """Call a function of the driver and give what it returns after its status: one value, or a list of several.

    Args:
        driver: the module.
        name: the function's.
        arguments: the function's.
        subject: what the error is about.
        next_step: what the user can do about it.

    Raises:
        EngineError: the status is not 0.
    """
    status, *results = getattr(driver, name)(*arguments)
    if int(status):
        raise EngineError(f"{subject}: {name} failed with {status_name(status)}; {next_step}")
    return results[0] if len(results) == 1 else results


def status_name(status: Any) -> str:
    """A status by its name in CUDA, or by its number."""
    return str(getattr(status, "name", status))
