"""Writing a model repository for Triton Inference Server.

The exported folder holds `config.pbtxt`, the engine and a `model.py` that only imports nemodiff, so it works with any
server in whose Python nemodiff is installed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ...builder.files import copy_folder
from ...builder.resources import check_export_disk, disk_free
from ...builder.staging import Kind, staged
from ...builder.swap import stays
from ...engine_folder import TRITON_ENGINE, TRITON_FILE
from ...engine_info import EngineInfo, read_engine
from ...errors import RequestError
from ...runtime.loading import check_device, check_resources
from ...runtime.requests.options import make_options
from ...runtime.requests.settings import settle
from ...runtime.scheduler.scheduler import check_limits
from ...runtime.text.codec import TextCodec
from ...version import __version__
from .outputs import OUTPUTS, Output
from .parameters import INPUTS, Input, model_parameters, read

EXPORTED = Kind("exported Triton model", TRITON_FILE, frozenset({TRITON_FILE, "config.pbtxt", "1"}), "--repo or --name")

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
    gpus: Iterable[int] = (),
) -> Path:
    """Write `repository/name`, replacing only an earlier export.

    Args:
        engine: a folder made by `nemodiff build`.
        repository: Triton's model repository; made if it is not there.
        name: of the model.
        parameters: model-level values by name: the scheduler's numbers and defaults of requests.
        link: link the engine instead of copying it.
        batched: tensors have a leading batch dimension of 1, as TensorRT-LLM's clients send them.
        gpus: numbers of GPUs that get an instance each, with a process and an engine of its own; without any there is
            one instance, where the engine chooses.

    Raises:
        EngineError: the folder is no engine.
        RequestError: a name or parameter is wrong.
        BuildError: the folder cannot be written or holds something else.
    """
    info = read_engine(engine)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise RequestError(f"--name is {name!r:.60}, allowed: letters, digits, '.', '_' and '-'")
    values = dict(parameters or {})
    gpus = list(gpus)
    if gpus and ("device" in values or info.manifest.backend == "onnxruntime"):
        reason = "--set device says where" if "device" in values else f"{engine} is built for onnxruntime, a CPU"
        raise RequestError(f"--gpu is {', '.join(map(str, gpus))} and {reason}; leave one of them out")
    if len(set(gpus)) < len(gpus):
        raise RequestError(f"--gpu is {', '.join(map(str, gpus))}, allowed: each GPU once; leave the others out")
    try:
        _check(info, engine, values)
    except RequestError as error:
        raise RequestError(f"--set: {error}") from None
    if not link:
        nbytes = sum(int(entry["bytes"]) for entry in info.manifest.files.values())
        check_export_disk(repository / name, nbytes, disk_free(repository / name), "--repo or add --link")
    with staged(repository / name, EXPORTED) as stage:
        copied = stage / TRITON_ENGINE
        copied.parent.mkdir()
        if link:
            copied.symlink_to(engine.resolve(), target_is_directory=True)
        else:
            copy_folder(engine, copied, stays)
        (copied.parent / "model.py").write_text(_MODEL, encoding="utf-8")
        (stage / "config.pbtxt").write_text(config(info, name, values, batched, gpus), encoding="utf-8")
        marker = {"files": sorted(EXPORTED.files), "nemodiff": __version__, "linked": link}
        (stage / TRITON_FILE).write_text(json.dumps(marker, indent=1) + "\n", encoding="utf-8")
    return repository / name


def _check(info: EngineInfo, engine: Path, values: dict[str, str]) -> None:
    """Refuse what the server would refuse when it loads the model, or at every request. Raises RequestError."""
    parsed = model_parameters(values)
    check_limits(info, **parsed.limits)
    check_resources(parsed.threads, parsed.gpu_memory_utilization)
    if not 0 <= parsed.stream_interval_ms < math.inf:
        raise RequestError(f"stream_interval_ms is {parsed.stream_interval_ms}, allowed: 0 or more")
    check_device(parsed.device, info.manifest.backend)
    request = read({"text_input": ["x"]}, {}, parsed.defaults(engine))
    settle(info, TextCodec(engine), 1, make_options(request.options))


def config(info: EngineInfo, name: str, parameters: Mapping[str, str], batched: bool, gpus: list[int]) -> str:
    """The text of `config.pbtxt`."""
    lines = [
        f"# Made by nemodiff {__version__} from an engine for {info.manifest.backend}.",
        "# On this machine: nemodiff triton run REPOSITORY. In Triton's container, nemodiff must be installed, in an",
        "# image of your own (examples/triton/Dockerfile in nemodiff's source); then:",
        "#   docker run --rm -p 8000:8000 -p 8001:8001 -p 8002:8002 -v REPOSITORY:/models IMAGE \\",
        "#     tritonserver --model-repository=/models",
        f"name: {_quoted(name)}",
        'backend: "python"',
        f"max_batch_size: {int(batched)}",
        "model_transaction_policy { decoupled: true }",
        # An instance serves many requests at once. KIND_MODEL leaves the choice of a device to the engine.
        f"instance_group [ {{ count: 1 kind: {f'KIND_GPU gpus: {gpus}' if gpus else 'KIND_MODEL'} }} ]",
        "input [",
        ",\n".join(_tensor(i, optional=i.name != "text_input") for i in INPUTS),
        "]",
        "output [",
        ",\n".join(_tensor(o) for o in OUTPUTS),
        "]",
    ]
    if parameters:
        lines += ["parameters [", ",\n".join(_parameter(*pair) for pair in parameters.items()), "]"]
    return "\n".join(lines) + "\n"


def _tensor(declared: Input | Output, optional: bool = False) -> str:
    dims = -1 if declared.many else 1
    end = " optional: true" if optional else ""
    return f"  {{ name: {_quoted(declared.name)} data_type: TYPE_{declared.type} dims: [ {dims} ]{end} }}"


def _parameter(name: str, value: str) -> str:
    return f"  {{ key: {_quoted(name)} value: {{ string_value: {_quoted(value)} }} }}"


def _quoted(text: str) -> str:
    """A string of protobuf's text format, whose escapes are those of JSON but for the spelling of Unicode."""
    return json.dumps(text, ensure_ascii=False)


def parse_assignments(assignments: Iterable[str]) -> dict[str, str]:
    """Names and values of texts like `rows=4`. Raises RequestError."""
    pairs: dict[str, str] = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise RequestError(f"--set is {text!r:.60}, allowed: NAME=VALUE, such as rows=4 or mode=ar")
        pairs[name] = value
    return pairs
