"""The process that compiles: ONNX file in, TensorRT engine file out.

Run as `python -m nemodiff.builder.compilers.compile FOLDER`, where FOLDER holds a `tensorrt.Job` and gets the result.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner

from ...errors import BuildError
from ...plugins import OPS
from ...plugins.tensorrt.api import TensorRT, load
from ...plugins.tensorrt.launch import Kernels
from ...plugins.tensorrt.protocols import Builder, Config, Network
from ...whole_file import whole
from ..files import EngineFile
from ..graph.stages import split
from .checks import check_inputs, check_layers
from .child import end_with_parent, read_job, write_result
from .profiles import Corners, shape
from .tensorrt import Compiled, Job


def main(folder: Path) -> None:
    """Do the job in `folder`."""
    end_with_parent()
    result: Compiled | BuildError
    try:
        result = compile_job(read_job(folder))
    except BuildError as error:
        result = error
    write_result(folder, result)


def compile_job(job: Job) -> Compiled:
    """Parse, check, build; the facts for the manifest. Raises BuildError."""
    api, choices = load(job.backend, BuildError), job.choices
    proto = onnx.load(job.model, load_external_data=False)
    if choices.plugins:
        quick = job.backend == "tensorrt"
        kernels = Kernels(job.engine.parent, job.kernels, job.sms[0]) if quick else None
        _import_function(job.creators)(api, kernels)
        if quick:
            proto = split(proto, OPS)
    builder = api.builder()
    network = api.network(builder)
    _parse(api, network, proto, job)
    check_inputs(network)
    layers = check_layers(network, proto, job)
    config = _configure(api, builder, network, proto, job)
    out = EngineFile(job.engine)
    done = builder.build_serialized_network_to_stream(network, config, api.stream_writer(out.write))
    try:
        digest = out.close()
    except OSError as error:
        raise BuildError(
            f"--backend {job.backend}: writing the engine failed ({error.strerror}); free some space or choose another "
            "--output"
        ) from None
    if not done or not out.nbytes:
        remedy = "report it with this line" if choices.workspace is None else "use a larger --workspace or leave it out"
        raise BuildError(f"--backend {job.backend}: building failed ({_reason(api)}); {remedy}")
    if choices.timing_cache is not None and (cache := config.get_timing_cache()) is not None:
        with whole(choices.timing_cache) as stage:
            stage.write_bytes(bytes(cache.serialize()))
    return Compiled(api.module.__name__, api.version, layers, out.nbytes, digest)


def _import_function(name: str) -> Any:
    """The function that `module:function` names."""
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise BuildError(f"--plugins: {module} cannot be imported ({error}); leave --plugins out") from None


def _parse(api: TensorRT, network: Network, proto: onnx.ModelProto, job: Job) -> None:
    if not job.choices.plugins:  # a body parsed once per layer warns about its names, an inlined one has unique names
        proto = onnx.inliner.inline_local_functions(proto)
    parser = api.parser(network)
    if not parser.parse(proto.SerializeToString(), str(job.model)):
        reason = _reason(api)
        if parser.num_errors:
            first = parser.get_error(0)
            reason = f"node {first.node_name()!r}: {' '.join(first.desc().split())}"
        raise BuildError(f"{job.model}: TensorRT cannot parse it ({reason}); report it with this line")


def _configure(api: TensorRT, builder: Builder, network: Network, proto: onnx.ModelProto, job: Job) -> Config:
    """The builder's configuration. Raises BuildError."""
    config = builder.create_builder_config()
    enum, choices = api.module, job.choices
    declared = declared_shapes(proto)
    for profile in job.profiles:
        _add_profile(builder, network, config, declared, profile)
    if job.backend == "tensorrt-rtx":  # the full TensorRT builds for the GPU at hand
        _set_targets(api, config, job.sms)
    config.profiling_verbosity = enum.ProfilingVerbosity.DETAILED
    if choices.plugins:
        config.set_preview_feature(enum.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    if choices.opt_level is not None:
        config.builder_optimization_level = choices.opt_level
    if choices.workspace is not None:
        config.set_memory_pool_limit(enum.MemoryPoolType.WORKSPACE, choices.workspace * 2**20)
    if choices.strip_weights:
        config.set_flag(enum.BuilderFlag.STRIP_PLAN)
    if choices.refit:
        config.set_flag(enum.BuilderFlag.REFIT)
    if choices.version_compatible:
        config.set_flag(enum.BuilderFlag.VERSION_COMPATIBLE)
    if (path := choices.timing_cache) is not None:
        cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        if not config.set_timing_cache(cache, False):
            raise BuildError(f"{path}: not a timing cache of this TensorRT and GPU; remove it or name another file")
    return config


def declared_shapes(proto: onnx.ModelProto) -> dict[str, tuple[str | int, ...]]:
    """The shapes of a graph's inputs, a letter for each dynamic size."""
    return {
        value.name: tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in proto.graph.input
    }


def _add_profile(
    builder: Builder,
    network: Network,
    config: Config,
    declared: Mapping[str, tuple[str | int, ...]],
    profile: Corners,
) -> None:
    """Declare the least, best and largest shape of every dynamic input."""
    shapes = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        if -1 in tuple(tensor.shape):
            least, best, most = (shape(declared[tensor.name], corner) for corner in profile)
            shapes.set_shape(tensor.name, least, best, most)
    config.add_optimization_profile(shapes)


def _set_targets(api: TensorRT, config: Config, sms: tuple[int, ...]) -> None:
    config.num_compute_capabilities = len(sms)
    for index, sm in enumerate(sms):
        if sm not in api.sms():
            raise BuildError(
                f"--sm is {sm}, allowed by {api.module.__name__} {api.version}: {api.sms()}; choose among them"
            )
        config.set_compute_capability(getattr(api.module.ComputeCapability, f"SM{sm}"), index)


def _reason(api: TensorRT) -> str:
    return api.errors()[:400] or "no reason given"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
