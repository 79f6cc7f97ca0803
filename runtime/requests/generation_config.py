"""The sampling that a model's makers propose in its generation_config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...engine_folder import GENERATION_FILE, PROPOSED, build_again, engine_path
from ...engine_info import read_object
from ...errors import RequestError
from .options import OPTIONS, make_options


def sampling_defaults(folder: str | Path) -> dict[str, Any]:
    """The options of a request that an engine's generation_config.json proposes; none without that file.

    With `do_sample` true and no temperature that is 1, as in transformers; with `do_sample` false it is left out.
    Raises RequestError: a value is none of its option. Raises EngineError: the folder is no path, or the file
    holds no JSON object.
    """
    path = engine_path(folder) / GENERATION_FILE
    if not path.is_file():
        return {}
    values = read_object(path, build_again(path.parent))
    chosen = {name: values[name] for name in PROPOSED if values.get(name) is not None}
    if chosen.get("top_k") == -1:
        del chosen["top_k"]
    samples = values.get("do_sample")
    if samples is True:
        chosen.setdefault("temperature", 1.0)
    elif samples is False:
        chosen.pop("temperature", None)
    try:
        make_options(chosen)
    except RequestError as error:
        raise RequestError(f"{path}: {error}; leave --generation-config out or fix the file") from None
    return {name: float(value) if OPTIONS[name].type is float else value for name, value in chosen.items()}
