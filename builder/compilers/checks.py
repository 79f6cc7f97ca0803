"""What became of the graph when TensorRT parsed it: the parser changes it without a word, so its result is counted.

The parser drops an input that no layer needs, and takes the body of a function where a plugin was meant.
"""

from __future__ import annotations

import collections

import onnx

from ...contract import DOMAIN
from ...errors import BuildError
from ...plugins.tensorrt.protocols import Network
from .tensorrt import Job

_NATIVE = ("ATTENTION_INPUT", "KV_CACHE_UPDATE", "ROTARY_EMBEDDING")
_PLUGIN = "PLUGIN_V3"


def check_inputs(network: Network) -> None:
    """Check that every input of the network reaches a layer. Raises BuildError."""
    used = set()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        for number in range(layer.num_inputs):
            tensor = layer.get_input(number)
            if tensor is not None:
                used.add(tensor.name)
    for index in range(network.num_inputs):
        name = network.get_input(index).name
        if name not in used:
            raise BuildError(
                f"input {name!r} of the graph reaches no layer after parsing, allowed: every input is used; this "
                "TensorRT version ignores it, so install another one"
            )


def check_layers(network: Network, proto: onnx.ModelProto, job: Job) -> dict[str, dict[str, int]]:
    """Check that each op became what the job wants, and count the layers by implementation. Raises BuildError."""
    kinds: dict[str, str] = {}  # by layer name, which is the node's name
    counts: collections.Counter[str] = collections.Counter()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kind = str(layer.type).rpartition(".")[2]
        counts[kind] += 1
        kinds[layer.name] = kind
    plugins: collections.Counter[str] = collections.Counter()
    natives: collections.Counter[str] = collections.Counter()
    for node in proto.graph.node:
        if node.domain == DOMAIN:
            ops = plugins if kinds.get(node.name) == _PLUGIN else natives
            ops[node.op_type] += 1
    _check_lowering(job, plugins, natives, counts[_PLUGIN])
    attentions = 0 if job.choices.plugins else job.attentions
    for kind, count in (("ATTENTION_INPUT", attentions), ("KV_CACHE_UPDATE", job.caches)):
        if counts[kind] != count:
            raise BuildError(
                f"the network has {counts[kind]} {kind} layers, allowed: {count}; this TensorRT version parses the "
                "graph otherwise, so install another one"
            )
    known = {kind: counts[kind] for kind in _NATIVE if counts[kind]}
    return {"plugin": dict(plugins), "native": {**natives, **known}}


def _check_lowering(
    job: Job, plugins: collections.Counter[str], natives: collections.Counter[str], plugin_layers: int
) -> None:
    """Refuse a network in which an op took the other way than the one the job asks for."""
    strays = natives if job.choices.plugins else plugins
    if not strays and plugin_layers == plugins.total():
        return
    if job.choices.plugins:
        change, remedy = "became native layers, asked for: plugin", "leave out --plugins"
    else:
        change, remedy = "became a plugin, asked for: native layers", "add --plugins"
    raise BuildError(
        f"{dict(strays) or plugin_layers} of the graph's ops {change}; this TensorRT version parses them otherwise, so "
        f"{remedy}"
    )
