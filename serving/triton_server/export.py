"""A Triton model repository of an engine.

In: an engine folder and model-level defaults. Out: a folder `REPO/NAME` with `config.pbtxt`, `1/model.py` and the
engine, copied or linked. The surprising fact: the folder holds no code of nemodiff's but a page that imports it, so it
works with any server in whose Python nemodiff is installed, and the configuration says how.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ...builder.staging import Kind, staged
from ...engine_folder import EngineInfo, read_engine
from ...errors import RequestError
from ...runtime.loading import check_device
from ...runtime.requests.options import make_options
from ...runtime.requests.settings import settle
from ...runtime.text.codec import TextCodec
from .outputs import OUTPUTS, Output
from .parameters import INPUTS, Input, model_parameters, read

MARKER = "nemodiff_triton.json"  # tells a model folder of ours
EXPORTED = Kind("exported Triton model", MARKER, frozenset({MARKER, "config.pbtxt", "1"}), "--repo or --name")

_MODEL = '''"""The model of this repository. All of it is in nemodiff, to be installed in the server's Python."""


class TritonPythonModel:
    """Becomes nemodiff's model when the server makes one, so that looking at this file costs nothing."""

    def __new__(cls):
        try:
            from nemodiff.serving.triton_server.model import TritonPythonModel as Model
        except ImportError as error:
            from triton_python_backend_utils import TritonModelException

            raise TritonModelException(
                f"nemodiff cannot be imported ({error}); install it in the server's Python: pip install nemodiff"
            ) from None
        return Model()
'''


def export(
    engine: Path,
    repository: Path,
    *,
    name: str = "nemodiff",
    parameters: Mapping[str, str] | None = None,
    link: bool = False,
    batched: bool = False,
) -> Path:
    """Write `repository/name`, replacing only an earlier export.

    Args:
        engine: a folder made by `nemodiff build`.
        repository: Triton's model repository; made if it is not there.
        name: of the model.
        parameters: model-level values by name: the scheduler's numbers and defaults of requests.
        link: link the engine instead of copying it.
        batched: tensors have a batch dimension of 1 in front, as TensorRT-LLM's clients send them.

    Raises:
        EngineError: the engine is none.
        RequestError: a name or parameter is wrong.
        BuildError: the folder cannot be written or holds something else.
    """
    info = read_engine(engine)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise RequestError(f"--name is {name!r:.60}, allowed: letters, digits, '.', '_' and '-'")
    chosen = dict(parameters or {})
    try:
        _check(info, TextCodec(engine), chosen)
    except RequestError as error:
        raise RequestError(f"--set: {error}") from None
    with staged(repository / name, EXPORTED) as stage:
        version = stage / "1"
        version.mkdir()
        if link:
            (version / "engine").symlink_to(engine.resolve(), target_is_directory=True)
        else:
            shutil.copytree(engine, version / "engine")
        (version / "model.py").write_text(_MODEL, encoding="utf-8")
        (stage / "config.pbtxt").write_text(config(info, name, chosen, batched), encoding="utf-8")
        about = {"files": sorted(EXPORTED.files), "nemodiff": importlib.metadata.version("nemodiff"), "linked": link}
        (stage / MARKER).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return repository / name


def _check(info: EngineInfo, text: TextCodec, given: dict[str, str]) -> None:
    """Refuse what the server would refuse when it loads the model, or at every request. Raises RequestError."""
    parsed = model_parameters(given)
    limit = info.build.max_batch_size
    if parsed.rows is not None and not 1 <= parsed.rows <= limit:
        raise RequestError(f"rows is {parsed.rows}, allowed: 1 to {limit}; build with a larger --max-batch-size")
    for name, least in (("waiting", 1), ("prefill_tokens", 1), ("threads", 1)):
        value = getattr(parsed, name)
        if value is not None and value < least:
            raise RequestError(f"{name} is {value}, allowed: {least} or more")
    if not 0 <= parsed.stream_interval_ms < math.inf:
        raise RequestError(f"stream_interval_ms is {parsed.stream_interval_ms}, allowed: 0 or more")
    check_device(parsed.device, info.manifest.backend)
    settle(info, text, 1, make_options(read({"text_input": ["x"]}, {}, parsed.values).options))


def config(info: EngineInfo, name: str, parameters: Mapping[str, str], batched: bool) -> str:
    """The text of `config.pbtxt`."""
    version = importlib.metadata.version("nemodiff")
    lines = [
        f"# Made by nemodiff {version} from an engine for {info.manifest.backend}.",
        "# On this machine: nemodiff triton run REPOSITORY. In Triton's container, nemodiff must be installed, in an",
        "# image of your own (examples/triton/Dockerfile in nemodiff's source); then:",
        "#   docker run --rm -p 8000:8000 -p 8001:8001 -p 8002:8002 -v REPOSITORY:/models IMAGE \\",
        "#     tritonserver --model-repository=/models",
        f"name: {_quoted(name)}",
        'backend: "python"',
        f"max_batch_size: {int(batched)}",
        "model_transaction_policy { decoupled: true }",
        # One instance: it serves all requests at once. KIND_MODEL: the engine says itself where it runs.
        "instance_group [ { count: 1 kind: KIND_MODEL } ]",
        "input [",
        ",\n".join(_tensor(i, " optional: true" * (i.name != "text_input")) for i in INPUTS),
        "]",
        "output [",
        ",\n".join(_tensor(o) for o in OUTPUTS),
        "]",
    ]
    if parameters:
        pairs = (f"  {{ key: {_quoted(k)} value: {{ string_value: {_quoted(v)} }} }}" for k, v in parameters.items())
        lines += ["parameters [", ",\n".join(pairs), "]"]
    return "\n".join(lines) + "\n"


def _tensor(declared: Input | Output, optional: str = "") -> str:
    dims = -1 if declared.many else 1
    return f"  {{ name: {_quoted(declared.name)} data_type: TYPE_{declared.type} dims: [ {dims} ]{optional} }}"


def _quoted(text: str) -> str:
    """A string of protobuf's text format, whose escapes are those of JSON but for the spelling of Unicode."""
    return json.dumps(text, ensure_ascii=False)


def parse_assignments(given: Iterable[str]) -> dict[str, str]:
    """`rows=4` and the like. Raises RequestError."""
    pairs: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise RequestError(f"--set is {text!r:.60}, allowed: NAME=VALUE, such as rows=4 or mode=ar")
        pairs[name] = value
    return pairs
