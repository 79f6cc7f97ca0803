"""The process that compiles: ONNX file in, TensorRT engine file out.

Run as `python -m nemodiff.builder.compilers.compile FOLDER`, where FOLDER holds `job.json` (a `tensorrt.Job`) and gets
`result.json`. Standard input is the parent's end of a pipe: when it closes, this process ends. The surprising facts:
the parser drops an input that no layer needs without a word, and takes a function's body where a plugin was meant, so
both are counted here and refused.
"""

from __future__ import annotations

import collections
import importlib
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import onnx
import onnx.inliner

from ...contract import DOMAIN
from ...engine_folder import Profile, parse_kernel
from ...errors import BuildError
from ...plugins import OPS
from ...plugins.tensorrt.api import Builder, Config, Network, TensorRT, load
from ...plugins.tensorrt.launch import Kernels
from ..files import EngineFile
from ..graph.stages import split
from .tensorrt import Job

_NATIVE = ("ATTENTION_INPUT", "KV_CACHE_UPDATE", "ROTARY_EMBEDDING")


def main(folder: Path) -> None:
    """Do the job in `folder`."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    values = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    values |= {"sms": tuple(values["sms"]), "profiles": tuple(Profile(**p) for p in values["profiles"])}
    values |= {"kernels": tuple(parse_kernel(k) for k in values["kernels"])}
    try:
        result = compile_job(Job(**values))
    except BuildError as error:
        result = {"error": str(error)}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def _die_with_parent() -> None:
    os.read(0, 1)  # not sys.stdin: at exit Python cannot take a buffer's lock from this thread
    os._exit(1)


def compile_job(job: Job) -> dict[str, Any]:
    """Parse, check, build; the facts for the manifest. Raises BuildError."""
    api = load(job.backend, BuildError)
    proto = onnx.load(job.model, load_external_data=False)
    if job.plugins:
        quick = job.backend == "tensorrt"
        kernels = Kernels(Path(job.engine).parent, job.kernels, job.sms[0]) if quick else None
        _find(job.creators)(api, kernels)
        if quick:
            proto = split(proto, OPS)
    builder = api.builder()
    network = api.network(builder)
    _parse(api, network, proto, job)
    check_inputs(network)
    layers = check_layers(network, proto, job)
    config = _configure(api, builder, network, job)
    out = EngineFile(Path(job.engine))
    done = builder.build_serialized_network_to_stream(network, config, api.stream_writer(out.write))
    try:
        digest = out.close()
    except OSError as error:
        raise BuildError(
            f"--backend {job.backend}: writing the engine failed ({error.strerror}); free some space or choose another "
            "--output"
        ) from None
    if not done or not out.nbytes:
        remedy = "report it with this line" if job.workspace is None else "use a larger --workspace or leave it out"
        raise BuildError(f"--backend {job.backend}: building failed ({_reason(api)}); {remedy}")
    if job.timing_cache is not None and (cache := config.get_timing_cache()) is not None:
        Path(job.timing_cache).write_bytes(bytes(cache.serialize()))
    return {
        "module": api.module.__name__,
        "version": api.version,
        "layers": layers,
        "bytes": out.nbytes,
        "sha256": digest,
    }


def _find(place: str) -> Any:
    """The function at `module:function`."""
    module, _, function = place.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise BuildError(f"--plugins: {module} cannot be imported ({error}); leave --plugins out") from None


def _parse(api: TensorRT, network: Network, proto: onnx.ModelProto, job: Job) -> None:
    if not job.plugins:  # a body parsed once per layer warns about its names, an inlined one has unique names
        proto = onnx.inliner.inline_local_functions(proto)
    parser = api.parser(network)
    if not parser.parse(proto.SerializeToString(), job.model):
        found = [parser.get_error(index) for index in range(parser.num_errors)]
        first = f"node {found[0].node_name()!r}: {' '.join(found[0].desc().split())}" if found else _reason(api)
        raise BuildError(f"{job.model}: TensorRT cannot parse it ({first}); report it with this line")


def check_inputs(network: Network) -> None:
    """Every input of the network must reach a layer. Raises BuildError."""
    used = set()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        used |= {t.name for i in range(layer.num_inputs) if (t := layer.get_input(i)) is not None}
    for index in range(network.num_inputs):
        name = network.get_input(index).name
        if name not in used:
            raise BuildError(
                f"input {name!r} of the graph reaches no layer after parsing, allowed: every input is used; this "
                "TensorRT version ignores it, so install another one"
            )


def check_layers(network: Network, proto: onnx.ModelProto, job: Job) -> dict[str, dict[str, int]]:
    """Layers by implementation, counted; what was asked for must have been taken. Raises BuildError."""
    kinds: dict[str, str] = {}  # by layer name, which is the node's name
    counts: collections.Counter[str] = collections.Counter()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kind = str(layer.type).rpartition(".")[2]
        counts[kind] += 1
        kinds[layer.name] = kind
    plugin: collections.Counter[str] = collections.Counter()
    native: collections.Counter[str] = collections.Counter()
    for node in proto.graph.node:
        if node.domain == DOMAIN:
            (plugin if kinds.get(node.name) == "PLUGIN_V3" else native)[node.op_type] += 1
    wrong, right = (native, plugin) if job.plugins else (plugin, native)
    asked, got = ("plugin", "native layers") if job.plugins else ("native layers", "a plugin")
    if wrong or counts["PLUGIN_V3"] != plugin.total():
        raise BuildError(
            f"{dict(wrong) or counts['PLUGIN_V3']} of the graph's ops became {got}, asked for: {asked}; this "
            f"TensorRT version parses them otherwise, so {'leave out' if job.plugins else 'add'} --plugins"
        )
    attentions = 0 if job.plugins else job.layers
    for kind, wanted in (("ATTENTION_INPUT", attentions), ("KV_CACHE_UPDATE", 2 * job.layers)):
        if counts[kind] != wanted:
            raise BuildError(
                f"the network has {counts[kind]} {kind} layers, allowed: {wanted}; this TensorRT version parses the "
                "graph otherwise, so install another one"
            )
    known = {kind: counts[kind] for kind in _NATIVE if counts[kind]}
    done = dict(right)
    return {"plugin": done, "native": known} if job.plugins else {"plugin": {}, "native": {**done, **known}}


def _configure(api: TensorRT, builder: Builder, network: Network, job: Job) -> Config:
    config, enum = builder.create_builder_config(), api.module
    for profile in job.profiles:
        shapes = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            if -1 in tuple(tensor.shape):
                shapes.set_shape(tensor.name, *(shape(tensor.name, tensor.shape, p) for p in corners(profile)))
        config.add_optimization_profile(shapes)
    if job.backend == "tensorrt-rtx":  # the full TensorRT builds for the GPU at hand
        config.num_compute_capabilities = len(job.sms)
        for index, sm in enumerate(job.sms):
            if sm not in api.sms():
                raise BuildError(
                    f"--sm is {sm}, allowed by {api.module.__name__} {api.version}: {api.sms()}; choose among them"
                )
            config.set_compute_capability(getattr(enum.ComputeCapability, f"SM{sm}"), index)
    config.profiling_verbosity = enum.ProfilingVerbosity.DETAILED
    if job.plugins:
        config.set_preview_feature(enum.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    if job.opt_level is not None:
        config.builder_optimization_level = job.opt_level
    if job.workspace is not None:
        config.set_memory_pool_limit(enum.MemoryPoolType.WORKSPACE, job.workspace * 2**20)
    for wanted, flag in (
        (job.strip_weights, "STRIP_PLAN"),
        (job.refit, "REFIT"),
        (job.version_compatible, "VERSION_COMPATIBLE"),
    ):
        if wanted:
            config.set_flag(getattr(enum.BuilderFlag, flag))
    if job.timing_cache is not None:
        path = Path(job.timing_cache)
        cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
        if not config.set_timing_cache(cache, False):
            raise BuildError(f"{path}: not a timing cache of this TensorRT and GPU; remove it or name another file")
    return config


def corners(profile: Profile) -> tuple[tuple[int, int, int], tuple[int, int, int], tuple[int, int, int]]:
    """(B, S, R) at least, at best and at most. One row decodes a block, or prefills and wants one prediction."""
    best = (1, profile.max_tokens, 1 if profile.name == "prefill" else profile.max_rows)
    return (1, 1, 1), best, (profile.max_batch_size, profile.max_tokens, profile.max_rows)


def shape(name: str, declared: Any, corner: tuple[int, int, int]) -> tuple[int, ...]:
    """An input's shape at (B, S, R): the first axis is B, the second one S (R for `rows`) where it is dynamic."""
    rows, tokens, picked = corner
    dynamic = iter((rows, picked if name == "rows" else tokens))
    return tuple(next(dynamic) if size == -1 else int(size) for size in declared)


def _reason(api: TensorRT) -> str:
    return api.errors()[:400] or "no reason given"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
