"""Execution contexts of an engine: a number of them share one scratch memory and one configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from ....errors import EngineError
from ....plugins.tensorrt.api import TensorRT
from ....plugins.tensorrt.protocols import Context, Engine
from .device import Device, Memory


def scratch_bytes(engine: Engine) -> int:
    """Device memory that a run of any profile takes."""
    numbers = range(engine.num_optimization_profiles)
    return max(engine.get_device_memory_size_for_profile_v2(number) for number in numbers)


def make_config(api: TensorRT, engine: Engine, kernels: Literal["EAGER", "NONE"]) -> Any:
    """TensorRT-RTX's configuration, which all contexts share with its cache of kernels; full TensorRT has none.

    `EAGER` compiles kernels for a shape at once when it first comes, `NONE` keeps those that serve every shape.
    """
    strategies = getattr(api.module, "DynamicShapesKernelSpecializationStrategy", None)
    if strategies is None:
        return None
    config = engine.create_runtime_config()
    config.dynamic_shapes_kernel_specialization_strategy = getattr(strategies, kernels)
    config.set_execution_context_allocation_strategy(api.module.ExecutionContextAllocationStrategy.USER_MANAGED)
    config.set_runtime_cache(config.create_runtime_cache())
    return config


def make_context(
    folder: Path, api: TensorRT, device: Device, engine: Engine, config: Any, profile: int, scratch: Memory
) -> Context:
    """A context of a profile over the scratch memory. Raises EngineError."""
    strategy = api.module.ExecutionContextAllocationStrategy.USER_MANAGED
    context = engine.create_execution_context(strategy if config is None else config)
    if context is None or not context.set_optimization_profile_async(profile, device.stream):
        raise EngineError(f"{folder}: no execution context ({api.errors()}); free memory on the GPU")
    context.set_device_memory(scratch.address, scratch.nbytes)
    return context
