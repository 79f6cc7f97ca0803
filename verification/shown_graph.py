"""The graph of an ONNX Runtime engine, run with its inner values as outputs, so that an op can be named."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from ..contract import MAX_BLOCK, MEMORY_PATTERN, cache_names, caches
from ..engine_folder import MODEL_FILE
from ..engine_info import EngineInfo
from ..errors import RequestError, first_line
from .script import Block, Script


class ShownGraph:
    """The graph of an ONNX Runtime engine with the values of these names as outputs."""

    def __init__(self, folder: Path, info: EngineInfo, names: Collection[str]) -> None:
        import onnx
        import onnxruntime

        proto = onnx.load(folder / MODEL_FILE, load_external_data=False)
        known = {output.name for output in proto.graph.output}
        made = [name for node in proto.graph.node for name in node.output]
        self._taps = [name for name in made if name in names and name not in known]
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self._taps)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # The weights stay where they are; the graph with more outputs exists in memory alone.
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", os.fspath(folder))
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session = onnxruntime.InferenceSession(
                proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime raises classes of its own without a common base
            raise RequestError(
                f"{folder / MODEL_FILE}: cannot be run with its values shown ({first_line(error)}); leave --layers out"
            ) from None
        self._pattern = {i.name: np.zeros((0, 0), np.int32) for i in proto.graph.input if i.name == MEMORY_PATTERN.name}
        self._info = info
        self._caches = caches(info.model, info.build.kv_bits)
        own = np.float16 if info.build.dtype == "f16" else np.float32
        self._dtypes = {"compute": own, "i8": np.int8, "f32": np.float32}

    def run(self, script: Script) -> dict[str, np.ndarray]:
        """Every inner value of a script's tokens, (T, width) f32 by name."""
        model = self._info.model
        ends = [block.prefix + block.ids.size for block in script.blocks]
        shape = (1, model.num_kv_heads, max([script.tokens.size, *ends]) + MAX_BLOCK)
        held: dict[str, np.ndarray] = {
            cache.name: np.zeros((*shape, int(cache.shape[-1])), self._dtypes[cache.kind]) for cache in self._caches
        }
        values: dict[str, np.ndarray] = {}
        text = script.tokens.size
        slots = np.arange(text, dtype=np.int32)
        visible = np.stack([slots + 1, np.zeros_like(slots), np.zeros_like(slots)], axis=1)
        whole = Block(0, script.tokens, slots + np.int32(script.offset), visible, np.zeros(text, np.float32))
        order = sorted(zip(script.starts(), script.blocks, strict=True), key=lambda pair: -pair[1].prefix)
        for at, block in [(0, whole), *order]:
            for name, value in self._pass(block, held):
                flat = _flat(value)
                values.setdefault(name, np.zeros((script.size, flat.shape[1]), np.float32))[at : at + len(flat)] = flat
        return values

    def _pass(self, block: Block, held: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        size = block.ids.size
        feeds = {
            "ids": block.ids[None],
            "pos": block.pos[None],
            "write_at": np.array([block.prefix], np.int32),
            "visible": block.visible[None],
            "rows": np.arange(size, dtype=np.int32)[None],
            "threshold": np.zeros(1, np.float32),
            **({"adapter": block.gate[None]} if self._info.has_adapter else {}),
            **(self._no_image(size) if self._info.model.vision else {}),
            **self._pattern,
            **held,
        }
        outputs = [f"{cache.name}_out" for cache in self._caches]
        results = self._session.run([*outputs, *self._taps], feeds)
        for cache, value in zip(self._caches, results, strict=False):
            held[cache.name] = value
        for name in cache_names(self._info.model.num_layers):
            numbers = held[name] * held[name.replace("cache", "scale")] if self._info.build.kv_bits else held[name]
            yield name, numbers[:, :, block.prefix : block.prefix + size]
        yield from zip(self._taps, results[len(outputs) :], strict=True)

    def _no_image(self, size: int) -> dict[str, np.ndarray]:
        """No embedding stands in the place of a token's own."""
        none = np.full((1, size), -1, np.int32)
        return {"embedding": none, "embeddings": np.zeros((1, self._info.model.hidden_size), np.float32)}


def _flat(value: np.ndarray) -> np.ndarray:
    """(1, S, width) or (1, heads, S, D) -> (S, width) f32."""
    one = value[0] if value.ndim == 3 else value[0].transpose(1, 0, 2)
    return np.asarray(one.reshape(len(one), -1), np.float32)
