"""The first layer that strays, on Polygraphy: a runner per engine and one for the reference, under its Comparator.

Every engine shows the K and V that it keeps of each layer, which are a projection of the state that enters the layer;
so nothing has to be built into an engine to look into it. The graph of an ONNX Runtime engine is run once more with
every value as an output, which names the op.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RequestError, install
from ..runtime.engines.engine import Engine
from ..whole_file import whole
from .network import Network
from .replay import replay
from .rounding import STATE, UNIT
from .script import Script
from .shown_graph import ShownGraph
from .verify import Reference

# What is to blame where the first thing that strays is of an engine that shows K and V alone.
_KEYS = "k_proj, its rotation, or the cache write of layer {}"
_VALUES = "v_proj or the cache write of layer {}"
_STATE = "what enters layer {0}: its input norm, or attention or MLP before it"
_END = "attention or MLP of the last layer, the last norm, or the head"
_NUMBER = "script"  # the only input of a runner: a script by its place


def import_polygraphy() -> Any:
    """Polygraphy, silent. Raises RequestError where it is missing."""
    try:
        import polygraphy.backend.base
        import polygraphy.comparator
        import polygraphy.logger
    except ImportError:
        raise RequestError(
            f"--layers needs Polygraphy, which is not installed; install it with: {install('nemodiff[verify]')}"
        ) from None
    polygraphy.logger.G_LOGGER.module_severity = polygraphy.logger.G_LOGGER.CRITICAL
    polygraphy.logger.G_LOGGER.colors = False  # it would print that it misses a package for them
    return polygraphy


def compare_layers(
    engine: Engine,
    folder: Path,
    reference: Reference,
    scripts: Sequence[Script],
    columns: np.ndarray,
) -> tuple[list[dict[str, Any]], Any]:
    """Mean deviation and bound of every value that both have, in the order of computation; and Polygraphy's results.

    Args:
        engine: the engine that is judged.
        folder: where its files are.
        reference: what says which values are right.
        scripts: what both compute.
        columns: ids whose logits are compared.

    Raises:
        RequestError: Polygraphy is missing, or the engine does not show its values.
    """
    polygraphy = import_polygraphy()
    comparator = polygraphy.comparator
    noise: dict[str, float] = {}

    base: Any = polygraphy.backend.base.BaseRunner

    class Runner(base):  # type: ignore[misc]
        """Computes a script; `compute` gives its values by name."""

        def __init__(self, name: str, compute: Any) -> None:
            super().__init__(name)
            self._compute = compute

        def get_input_metadata_impl(self) -> Any:
            from polygraphy.common import TensorMetadata

            return TensorMetadata().add(_NUMBER, dtype=np.dtype(np.int64), shape=(1,))

        def infer_impl(self, feed_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            started = time.perf_counter()
            values: dict[str, np.ndarray] = self._compute(scripts[int(feed_dict[_NUMBER][0])])
            self.inference_time = time.perf_counter() - started
            return {name: np.ascontiguousarray(value) for name, value in values.items()}

    def right(script: Script) -> dict[str, np.ndarray]:
        (answer,) = reference.answer([script], columns, states=True)
        values = {**answer.states, "logits": _of(answer.logits, answer.ids, columns)}
        found = {**answer.state_noise, "logits": float(answer.noise.mean())}
        for name, value in values.items():
            bound = STATE * found[name] + UNIT["f32"] * float(np.abs(value).mean())
            noise[name] = max(noise.get(name, 0.0), bound)
        return values

    def given(script: Script) -> dict[str, np.ndarray]:
        got = replay(engine, script, columns, states=True)
        return {**got.states, **({"logits": got.logits} if got.logits.size else {})}

    runners = [Runner("reference", right), Runner("engine", given)]
    if engine.info.manifest.backend == "onnxruntime" and isinstance(reference, Network):
        runners.append(Runner("graph", lambda script: ShownGraph(folder, engine.info, noise).run(script)))
    feeds = [{_NUMBER: np.array([number])} for number in range(len(scripts))]
    results = comparator.Comparator.run(runners, data_loader=feeds)
    deviations: dict[str, float] = {}
    for other in range(1, len(runners)):
        # Names that a runner lacks are skipped: an engine shows K and V alone, a graph has no value of another name.
        compare = comparator.SimpleCompareFunc(
            atol={"": 0.0, **noise}, rtol=0.0, check_error_stat="mean", find_output_func=_same_name
        )
        with np.errstate(over="ignore"):  # in a relative error that is not asked for
            (result,) = comparator.Comparator.compare_accuracy(results, comparisons=[(0, other)], compare_func=compare)
        for iterations in result.values():
            for iteration in iterations:
                for name, compared in iteration.items():
                    deviation = compared.mean_absdiff
                    deviations[name] = max(deviations.get(name, 0.0), deviation if np.isfinite(deviation) else 1e30)
    found = [
        {"name": name, "deviation": deviations[name], "bound": bound}
        for name, bound in noise.items()
        if name in deviations
    ]
    return found, results


def save_results(results: Any, path: Path) -> None:
    """Write all values as Polygraphy's tools read them."""
    with whole(path) as stage:
        results.save(str(stage))


def blame(layers: Sequence[Mapping[str, Any]]) -> str | None:
    """What the first stray value tells: the op where all were compared, else the parts that K and V leave over."""
    strays = {layer["name"] for layer in layers if not layer["deviation"] <= layer["bound"]}
    first = next((layer["name"] for layer in layers if layer["name"] in strays), None)
    if first is None:
        return None
    compared = {layer["name"] for layer in layers}
    if any(name.endswith(".o_proj") for name in compared):  # every value was
        return str(first)
    if first.endswith(".residual"):
        _, number, half, _ = first.split(".")
        return f"attention of layer {number}" if half == "self_attn" else f"the MLP of layer {number}"
    if first == "embed_tokens":
        return "the embedding"
    if first == "logits":
        return "the last norm or the head" if "embed_tokens" in compared else _END
    number = first.rpartition("_")[2]
    keys, values = (f"{kind}_cache_{number}" in strays for kind in "kv")
    return (_STATE if keys and values else _KEYS if keys else _VALUES).format(number)


def _of(logits: np.ndarray, ids: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return np.asarray(logits[:, np.searchsorted(ids, columns)], np.float32)


def _same_name(name: str, _index: int, other: Mapping[str, Any]) -> list[str]:
    return [name] if name in other else []
