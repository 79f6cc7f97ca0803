"""The standard streams and the words of the command line as UTF-8, whatever the locale is."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

import click

from ..runtime.text.checks import check_text


def set_up_streams() -> None:
    """Read and write UTF-8, but in a terminal its own encoding, where what that lacks is escaped: `\\u4f60`.

    A terminal in plain ASCII is one whose locale says nothing; what it shows is UTF-8 nearly everywhere.
    """
    _replace_closed()
    for number in range(3):
        if hasattr(os, "set_blocking"):
            os.set_blocking(number, True)  # a program that shares one may have left it so that reading does not wait
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding=_encoding(stream, "utf-8"), errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding=_encoding(sys.stdin, "utf-8-sig"), errors="strict")


def abandon_streams() -> None:
    """Drop what standard output and error hold and cannot get rid of, so that Python's end does not try it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, stream.fileno())
            os.close(nowhere)


def _replace_closed() -> None:
    """Write what has nowhere to go to the null device.

    The numbers of closed streams are taken: the next file that is opened would get one, and with it what a library
    writes there. Standard input stays None, which says that it was closed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def _encoding(stream: io.TextIOWrapper, utf8: str) -> str:
    keeps = stream.isatty() and stream.encoding.lower() not in ("ascii", "us-ascii", "ansi_x3.4-1968", "646")
    return stream.encoding if keeps else utf8


def typed(word: str) -> str:
    """A word of the command line as UTF-8 if its bytes are that, also where the locale made it something else."""
    try:
        return os.fsencode(word).decode("utf-8")
    except UnicodeError:
        return word


class _Text(click.types.StringParamType):
    """Text for the model or a client; a path stays as the system spelled it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        text = typed(super().convert(value, param, ctx))
        check_text(text, max(param.opts, key=len) if param else self.name)
        return text


TEXT = _Text()
