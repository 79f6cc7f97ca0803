"""Both graphs of a model that sees go through TensorRT-RTX's parser and builder, with profiles by patches.

No card that could be had runs such an engine, so `build` refuses the backend; this shows that the graphs are no
obstacle.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnx.inliner
import pytest
from stand_ins.vision import write_vision_checkpoint

from nemodiff.builder.checkpoint.checkpoint import open_checkpoint
from nemodiff.builder.checkpoint.weights import write_weights
from nemodiff.builder.compilers.checks import check_inputs
from nemodiff.builder.graph.graph import build_graph
from nemodiff.builder.graph.vision import build_vision_graph
from nemodiff.engine_folder import VISION_WEIGHTS_FILE, WEIGHTS_FILE
from nemodiff.errors import BuildError
from nemodiff.plugins.tensorrt.api import load

pytestmark = pytest.mark.trt
PATCHES, EMBEDDINGS = (4, 256, 1024), (1, 64, 256)
ROWS, TOKENS = (1, 1, 4), (1, 64, 64)


@pytest.mark.parametrize("part", ["vision", "decoder"])
def test_a_graph_is_built_for_every_size_of_its_profile(tmp_path: Path, part: str) -> None:
    pytest.importorskip("tensorrt_rtx", reason="needs the trt extra: pip install 'nemodiff[trt]'")
    checkpoint = open_checkpoint(write_vision_checkpoint(tmp_path / "checkpoint", dtype="bf16"))
    if part == "vision":
        graph, weights = build_vision_graph(checkpoint.model, "bf16", fused=True), VISION_WEIGHTS_FILE
    else:
        graph, weights = build_graph(checkpoint.model, "bf16", capacity=512), WEIGHTS_FILE
    write_weights(graph, checkpoint.tensors, tmp_path / weights, lambda nbytes: None)
    api: Any = load("tensorrt-rtx", BuildError)
    builder = api.builder()
    network = api.network(builder)
    parser = api.parser(network)
    proto = onnx.inliner.inline_local_functions(graph.proto)
    assert parser.parse(proto.SerializeToString(), str(tmp_path / "graph.onnx")), api.errors()
    check_inputs(network)
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        sizes = [EMBEDDINGS] if tensor.name == "embeddings" else [PATCHES] if part == "vision" else [ROWS, TOKENS]
        shapes = []
        for corner in range(3):
            dynamic = iter([size[corner] for size in sizes])
            shapes.append(tuple(next(dynamic) if size == -1 else size for size in tensor.shape))
        profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(api.module.ComputeCapability.SM89, 0)
    engine = bytearray()

    def write(data: memoryview) -> int:
        engine.extend(data)
        return data.nbytes

    assert builder.build_serialized_network_to_stream(network, config, api.stream_writer(write)), api.errors()
    assert len(engine) > graph.weight_bytes // 2
