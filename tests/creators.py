"""The least that TensorRT-RTX takes for the two ops: types and shapes, nothing that could run.

`register(api)` is what `builder/compile.py` calls before it parses plugins. The tests name it in the place of the
product's own registration, and the other functions here are ways to fail.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from nemodiff.builder.stages import Chain, Part

KEPT: list[Any] = []  # the registry holds bare pointers


def register(api: Any) -> None:
    trt = api.module

    def like_query(given: Any, shapes: Any, expressions: Any) -> list[Any]:
        return [trt.DimsExprs(given[0])]

    def like_ids(given: Any, shapes: Any, expressions: Any) -> list[Any]:
        return [trt.DimsExprs(given[1]), trt.DimsExprs(given[1]), trt.DimsExprs(given[1]), trt.DimsExprs(given[2])]

    commit = (trt.int32, trt.float32, trt.int32, trt.int32)
    _add(trt, "BlockAttention", like_query, lambda types: [types[0]])
    _add(trt, "ConfidenceCommit", like_ids, lambda types: list(commit))


def register_parts(api: Any) -> None:
    """BlockAttention in two stages, the first of which makes scratch; ConfidenceCommit in one."""
    trt = api.module
    same = lambda types: [types[0]]  # noqa: E731
    _add(trt, "Split", lambda given, *_: [trt.DimsExprs(given[0])], same)
    _add(trt, "Join", lambda given, *_: [trt.DimsExprs(given[1])], same)
    commit = (trt.int32, trt.float32, trt.int32, trt.int32)
    ids = lambda given, *_: [trt.DimsExprs(given[i]) for i in (1, 1, 1, 2)]  # noqa: E731
    _add(trt, "Commit", ids, lambda types: list(commit))


def chains() -> dict[str, Chain]:
    attention, commit = ("q", "k", "v", "visible", "slots"), ("logits", "ids", "threshold")
    made = ("token", "confidence", "next_ids", "masks_left")
    parts = (Part("Split", attention[:4], ("scratch",)), Part("Join", ("scratch", "q", "visible"), ("y",)))
    return {
        "BlockAttention": Chain(attention, ("y",), parts),
        "ConfidenceCommit": Chain(commit, made, (Part("Commit", commit, made),)),
    }


def only_attention(api: Any) -> None:
    trt = api.module
    _add(trt, "BlockAttention", lambda given, *_: [trt.DimsExprs(given[0])], lambda types: [types[0]])


def nothing(api: Any) -> None:
    pass


def abort(api: Any) -> None:
    os.write(2, b"terminate called\n")
    os.abort()


def killed(api: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def wait(api: Any) -> None:
    Path(os.environ["NEMODIFF_TEST_PID"]).write_text(str(os.getpid()))
    time.sleep(60)


def _add(trt: Any, name: str, shapes: Any, types: Any) -> None:
    bases: Any = (trt.IPluginV3, trt.IPluginV3OneCore, trt.IPluginV3OneBuild, trt.IPluginV3OneRuntime)

    class Plugin(*bases):  # type: ignore[misc]
        def __init__(self) -> None:
            for base in bases:
                base.__init__(self)
            self.num_outputs = 4 if "Commit" in name else 1
            self.plugin_namespace, self.plugin_name, self.plugin_version = "nemodiff", name, "1"
            self.timing_cache_id = ""

        def get_capability_interface(self, kind: Any) -> Any:
            return self

        def get_output_data_types(self, given: Any) -> Any:
            return types(given)

        def get_output_shapes(self, given: Any, shape_inputs: Any, expressions: Any) -> Any:
            return shapes(given, shape_inputs, expressions)

        def get_fields_to_serialize(self) -> Any:
            return trt.PluginFieldCollection([])

        def configure_plugin(self, given: Any, made: Any) -> None:
            pass

        def supports_format_combination(self, position: int, tensors: Any, inputs: int) -> bool:
            return bool(tensors[position].desc.format == trt.TensorFormat.LINEAR)

        def on_shape_change(self, given: Any, made: Any) -> None:
            pass

        def enqueue(self, *arguments: Any) -> int:
            return 1

        def attach_to_context(self, context: Any) -> Any:
            return self.clone()

        def get_valid_tactics(self) -> list[int]:
            return [1]

        def set_tactic(self, tactic: int) -> None:
            pass

        def get_workspace_size(self, given: Any, made: Any) -> int:
            return 0

        def clone(self) -> Any:
            copy = Plugin()
            copy.__dict__.update(self.__dict__)
            return copy

    class Creator(trt.IPluginCreatorV3One):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IPluginCreatorV3One.__init__(self)
            self.name, self.plugin_namespace, self.plugin_version = name, "nemodiff", "1"
            self.field_names = trt.PluginFieldCollection([])

        def create_plugin(self, node: str, fields: Any, phase: Any) -> Any:
            return Plugin()

    creator = Creator()
    KEPT.append(creator)
    assert trt.get_plugin_registry().register_creator(creator, "nemodiff")
