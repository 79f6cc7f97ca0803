"""The errors a user can cause.

Each is one line that says what is wrong, what the value is, what is allowed and what to do next. The command line
prints it on standard error and exits; a traceback is shown only for a defect of nemodiff itself.
"""


def first_line(error: BaseException) -> str:
    """The first line of what any error says, or its kind where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def system_reason(error: BaseException) -> str:
    """What the system says of an error, without its number and path; of any other error all that it says."""
    return str(getattr(error, "strerror", None) or error)


def excerpt(value: object, most: int = 60) -> str:
    """The beginning of what Python writes for a value, and no more of it: a list may have a million parts."""
    if isinstance(value, str):
        return repr(value[:most])[:most]
    if not isinstance(value, (list, dict)):
        return repr(value)[:most]
    text = "[" if isinstance(value, list) else "{"
    for number, one in enumerate(value):
        if len(text) >= most:
            break
        text += (", " if number else "") + excerpt(one, most - len(text))
        if isinstance(value, dict):
            text += ": " + excerpt(value[one], max(0, most - len(text)))
    return (text + ("]" if isinstance(value, list) else "}"))[:most]


def install(requirement: str, *flags: str) -> str:
    """The command that installs a requirement, as any shell takes it: to cmd.exe single quotes are none."""
    word = f'"{requirement}"' if set("[<>=!~; ") & set(requirement) else requirement
    return " ".join(("pip install", *flags, word))


class NemodiffError(Exception):
    """A problem the user can fix; `str(error)` is the one line shown to them. Command-line exit code: 1."""


class CheckpointError(NemodiffError):
    """The checkpoint folder cannot be built from: a file is missing, broken, or says something unsupported."""


class BuildError(NemodiffError):
    """The engine cannot be written: the output is no engine, the disk is full, a value does not fit the dtype."""


class EngineError(NemodiffError):
    """The engine folder cannot be loaded: not an engine, a newer schema, files missing or changed."""


class RequestError(NemodiffError):
    """A request cannot be served: a value out of range, a prompt that does not fit, an unsupported combination.

    place: of the request among several that were given at once, from 0; None where it is the only one.
    """

    place: int | None = None


class ContextLengthError(RequestError):
    """A prompt with its answer is longer than the engine's max_seq_len; clients shorten it themselves on its code."""


class BusyError(NemodiffError):
    """A request comes when too many wait already, or when the scheduler is closed; it may be sent again later."""


class ServerError(NemodiffError):
    """A server cannot be started or has failed to start: it is not installed, a port is taken, a model is refused."""
