"""Makes TensorRT know the ops, by one adapter for all of them.

TensorRT-RTX gets an op as one `IPluginV3` that launches all its stages over a workspace. The full TensorRT gets each
stage as a quick plugin with its PTX, in chains that `builder/graph/stages.py` writes, so that an engine needs no
Python to run. TensorRT finds both by the `plugin_namespace` of the graph's nodes.
"""

from __future__ import annotations

from .. import OPS
from .api import TensorRT
from .launch import Kernels
from .quick import register_quick
from .v3 import register_v3


def register(api: TensorRT, kernels: Kernels | None = None) -> None:
    """Register every op; registering again replaces what runs, so one process serves one card's engines.

    Args:
        api: the loaded TensorRT module.
        kernels: the engine's compiled kernels. They may be missing where a TensorRT-RTX engine is built, which runs
            nothing; the full TensorRT puts them into the engine.
    """
    for op in OPS:
        if api.backend == "tensorrt-rtx":
            register_v3(api, op, kernels)
        else:
            assert kernels is not None, "quick plugins are made of their kernels"
            for stage in op.stages:
                register_quick(api, op, stage, kernels)
