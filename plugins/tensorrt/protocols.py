"""The calls of `tensorrt` and `tensorrt_rtx` that nemodiff makes, as types; the two modules have none of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

Shape = Sequence[int]


class Tensor(Protocol):
    """A tensor of a network."""

    name: str
    shape: Shape
    dtype: Any


class Layer(Protocol):
    """A layer of a network; `type` is a LayerType."""

    name: str
    type: Any
    num_inputs: int

    def get_input(self, index: int) -> Tensor | None: ...


class Network(Protocol):
    """A network under construction."""

    num_layers: int
    num_inputs: int

    def get_layer(self, index: int) -> Layer: ...
    def get_input(self, index: int) -> Tensor: ...


class ParserError(Protocol):
    """Why a node could not be parsed."""

    def desc(self) -> str: ...
    def node_name(self) -> str: ...


class Parser(Protocol):
    """The ONNX parser; external weights are found beside `path`."""

    num_errors: int

    def parse(self, model: bytes, path: str) -> bool: ...
    def get_error(self, index: int) -> ParserError: ...


class OptimizationProfile(Protocol):
    """Minimum, optimum and maximum shape per input."""

    def set_shape(self, name: str, minimum: Shape, optimum: Shape, maximum: Shape) -> None: ...


class TimingCache(Protocol):
    """Measured tactics of earlier builds."""

    def serialize(self) -> Any: ...


class Config(Protocol):
    """How to build."""

    builder_optimization_level: int
    num_compute_capabilities: int
    profiling_verbosity: Any

    def add_optimization_profile(self, profile: OptimizationProfile) -> int: ...
    def set_compute_capability(self, capability: Any, index: int) -> bool: ...
    def set_flag(self, flag: Any) -> None: ...
    def set_preview_feature(self, feature: Any, enable: bool) -> None: ...
    def set_memory_pool_limit(self, pool: Any, size: int) -> None: ...
    def create_timing_cache(self, data: bytes) -> TimingCache: ...
    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool: ...
    def get_timing_cache(self) -> TimingCache | None: ...


class Builder(Protocol):
    """Compiles networks."""

    def create_network(self, flags: int) -> Network: ...
    def create_builder_config(self) -> Config: ...
    def create_optimization_profile(self) -> OptimizationProfile: ...
    def build_serialized_network_to_stream(self, network: Network, config: Config, writer: Any) -> bool: ...


class Registry(Protocol):
    """Where plugin creators are found by name, version and namespace."""

    def register_creator(self, creator: Any, namespace: str) -> bool: ...
    def deregister_creator(self, creator: Any) -> bool: ...
    def get_creator(self, name: str, version: str, namespace: str) -> Any: ...


class Inspector(Protocol):
    """What an engine says about its own layers; `form` is a LayerInformationFormat."""

    def get_engine_information(self, form: Any) -> str: ...


class Context(Protocol):
    """State of an execution; addresses are device pointers, streams are CUDA handles."""

    def set_optimization_profile_async(self, index: int, stream: int) -> bool: ...
    def set_input_shape(self, name: str, shape: Shape) -> bool: ...
    def set_tensor_address(self, name: str, address: int) -> bool: ...
    def infer_shapes(self) -> list[str]: ...
    def set_device_memory(self, address: int, size: int) -> None: ...
    def execute_async_v3(self, stream: int) -> bool: ...


class Engine(Protocol):
    """A deserialized engine."""

    num_io_tensors: int
    num_layers: int
    num_optimization_profiles: int

    def get_tensor_name(self, index: int) -> str: ...
    def get_tensor_shape(self, name: str) -> Shape: ...
    def get_device_memory_size_for_profile_v2(self, profile: int) -> int: ...
    def create_execution_context(self, strategy: Any = ...) -> Context | None: ...
    def create_runtime_config(self) -> Any: ...
    def create_engine_inspector(self) -> Inspector: ...


class Runtime(Protocol):
    """Loads engines."""

    engine_host_code_allowed: bool

    def deserialize_cuda_engine(self, data: Any) -> Engine | None: ...
