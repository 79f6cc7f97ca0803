"""Collects the nodes, constants and weights of one ONNX graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ...contract import DOMAIN, GROUP_SIZE, Dtype, Quantization
from ...engine_folder import WEIGHTS_FILE

CHANNELS = 16  # a convolution's inputs are a multiple of this, or ONNX Runtime takes another kernel
ALIGNMENT = 4096  # bytes; runtimes map external data by page
_NUMPY_TYPE: dict[str, np.dtype[Any]] = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}


# Where a weight comes from: a tensor of the checkpoint (or adapter), or several by their numbers of outputs, one after
# the other.
Source = str | Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight of the graph and where it comes from, perhaps transposed."""

    name: str
    sources: Mapping[str, int]  # by name: how many of the outputs, of a packed projection; else 0
    shape: tuple[int, ...]  # as stored in the engine
    transposed: bool
    scale: float
    offset: int
    nbytes: int
    quantization: Quantization | None = None  # then the f32 scales come after it: of its rows, int8 of its columns
    signed: bool = False  # of int4: each half of a byte is a signed number, and not that plus 8
    group_size: int = GROUP_SIZE  # inputs of int4 that share a scale
    scale_copies: int = 1  # of int4: how often each scale is stored, for equal parts of its group

    @property
    def source(self) -> str:
        """The one tensor that a weight which is not packed comes from."""
        (name,) = self.sources
        return name

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Each source's shape in the checkpoint."""
        shape = self.shape[::-1] if self.transposed else self.shape
        return {name: (size or shape[0], *shape[1:]) for name, size in self.sources.items()}


class GraphWriter:
    """A graph being written; each node is named after the tensor it makes.

    Every method that returns a string returns the name of the tensor that it has added.
    """

    def __init__(
        self,
        dtype: Dtype,
        file: str = WEIGHTS_FILE,
        *,
        packed: bool = False,
        dequantized: bool = False,
        convolved: bool = False,
        quantization: Quantization | None = None,
        group_size: int = GROUP_SIZE,
        mlp_group_size: int = GROUP_SIZE,
        kept: Mapping[str, bool] | None = None,
    ) -> None:
        self.dtype = _NUMPY_TYPE[dtype]
        self.packed = packed  # whether projections of one input become one product
        self.dequantized = dequantized  # whether products of few bits are of the dtype's numbers, for TensorRT
        self.convolved = convolved  # whether a product is a convolution with a kernel of 1 over the tokens
        self.quantization = quantization  # of the layers' projections
        # Whether products have an even number of tokens, the last one of zeros if need be, and whether those of MLPs
        # alone have: wide groups need it on ONNX Runtime.
        pairs = quantization == "int4" and not dequantized
        self.paired = pairs and group_size > GROUP_SIZE
        self.paired_mlps = pairs and mlp_group_size > GROUP_SIZE >= group_size
        # Whether tokens are as `flat` makes them, outside attention.
        self.flattened = convolved or self.paired or self.paired_mlps
        self.group_size = group_size  # inputs of an int4 weight that share a scale
        self.mlp_group_size = mlp_group_size  # likewise in the MLPs
        self.file = file  # of the weights
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.weights: list[Weight] = []
        self.quantized: set[str] = set()  # tensors that the graph has in 8 bits as well
        self.kept = kept  # see `build_graph`
        self._flat: set[str] = set()  # constants of `flat`
        self._end = 0  # of the last weight, in bytes of the external data file

    def node(self, op: str, args: list[str], name: str, **attributes: Any) -> str:
        """Add a node with one output."""
        self.nodes.append(helper.make_node(op, args, [name], name=name, **attributes))
        return name

    def split(self, x: str, names: list[str], sizes: str, axis: int) -> list[str]:
        """Add a node that cuts a tensor into parts; `sizes` names a constant, the parts' sizes along the axis."""
        self.nodes.append(helper.make_node("Split", [x, sizes], names, name=f"{x}.parts", axis=axis))
        return names

    def plugin(self, op: str, args: list[str], results: list[str], name: str, **attributes: Any) -> None:
        """Add a node of one of the custom ops."""
        attributes["plugin_namespace"] = DOMAIN
        self.nodes.append(helper.make_node(op, args, results, name=name, domain=DOMAIN, **attributes))

    def constant(self, name: str, value: Any) -> str:
        """Add a small constant, stored in the graph itself."""
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def weight(
        self,
        name: str,
        source: Source,
        shape: tuple[int, ...],
        transposed: bool,
        scale: float = 1.0,
        *,
        convolved: bool = False,
    ) -> str:
        """Declare an external weight. `shape` is the one stored here, so (in, out) for a transposed projection.

        The graph knows a convolved one as (out, in, 1, 1).
        """
        offset = self._begin()
        self._external(name, (*shape, 1, 1) if convolved else shape, self.dtype)
        self.weights.append(Weight(name, _by_name(source), shape, transposed, scale, offset, self._end - offset))
        return name

    def int8_weight(self, name: str, source: Source, size_in: int, size_out: int) -> tuple[str, str]:
        """Declare an external int8 projection (in, out) and its f32 scales (out)."""
        offset = self._begin()
        self._external(name, (size_in, size_out), np.dtype(np.int8))
        self._external(f"{name}_scale", (size_out,), np.dtype(np.float32))
        sources = _by_name(source)
        self.weights.append(
            Weight(name, sources, (size_in, size_out), True, 1.0, offset, self._end - offset, quantization="int8")
        )
        return name, f"{name}_scale"

    def int4_weight(self, name: str, source: Source, size_in: int, size_out: int, group: int) -> list[str]:
        """Declare an external int4 projection, two weights in a byte, and its f32 scales (out, groups).

        A kept one that is not around 0 has bytes of two zero points after them.
        """
        groups = size_in // group
        offset = self._begin()
        if self.dequantized:
            self._external(name, (size_out, size_in), np.dtype(ml_dtypes.int4))
        else:
            self._external(name, (size_out, groups, group // 2), np.dtype(np.uint8))
        self._external(f"{name}_scale", (size_out, groups), np.dtype(np.float32))
        names = [name, f"{name}_scale"]
        sources = _by_name(source)
        if self.kept is not None and not self.kept.get(next(iter(sources)), True):
            names.append(f"{name}_zero")
            self._external(names[-1], (size_out, -(-groups // 2)), np.dtype(np.uint8))
        weight = Weight(name, sources, (size_out, size_in), False, 1.0, offset, self._end - offset, "int4")
        self.weights.append(dataclasses.replace(weight, signed=self.dequantized, group_size=group))
        return names

    def packs(self, sources: Collection[str]) -> bool:
        """Whether these projections, which share an input, become one: all in the same bits."""
        return self.packed and (self.kept is None or len({self.kept.get(source) for source in sources}) == 1)

    def keeps(self, source: Source) -> bool:
        """Whether a projection may be quantized; where the checkpoint has some in these bits, no other is."""
        return self.kept is None or next(iter(_by_name(source))) in self.kept

    def _begin(self) -> int:
        """Begin a weight at the next page."""
        self._end = -(-self._end // ALIGNMENT) * ALIGNMENT
        return self._end

    def _external(self, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        """Declare an initializer that comes next in the external data file."""
        nbytes = int(np.prod(shape)) * dtype.itemsize
        if dtype == ml_dtypes.int4:
            nbytes //= 2
        tensor = TensorProto(name=name, dims=shape, data_type=helper.np_dtype_to_tensor_dtype(dtype))
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", self.file), ("offset", self._end), ("length", nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        self._end += nbytes
        self.initializers.append(tensor)

    def linear(self, x: str, name: str, source: Source, size_in: int, size_out: int, tokens: str | None = None) -> str:
        """Multiply by a projection of the checkpoint, in the engine's dtype.

        A convolution takes and gives what `flat` makes, but where `tokens` names the shape of x as (B, R, -1).
        """
        if self.convolved and size_in % CHANNELS == 0:
            return self._convolution(x, name, source, size_in, size_out, tokens)
        return self.node("MatMul", [x, self.weight(f"{name}.weight", source, (size_in, size_out), True)], name)

    def flat(self, x: str, size: int, name: str) -> str:
        """The tokens of all rows as the pixels of one picture, channels last: (1, 1, B S, size).

        Paired, their number is even; `unpadded` takes away what was added.
        """
        shape = f"tokens.flat.{size}"
        if shape not in self._flat:
            self._flat.add(self.constant(shape, np.array([1, 1, -1, size], np.int64)))
        if not self.paired:
            return self.node("Reshape", [x, shape], name)
        return self.even(self.node("Reshape", [x, shape], f"{name}.tokens"), name)

    def even(self, x: str, name: str) -> str:
        """Flat tokens, and where their number is odd one of zeros more; `real` takes it away."""
        return self.node("Pad", [x, "tokens.pads"], name)

    def real(self, x: str) -> str:
        """Flat tokens without the one that makes their number even."""
        return self.node("Slice", [x, "tokens.first", "tokens.count", "tokens.axis"], f"{x}.real")

    def unpadded(self, x: str) -> str:
        """Flat tokens as they leave products."""
        return self.real(x) if self.paired else x

    def _convolution(self, x: str, name: str, source: Source, size_in: int, size_out: int, tokens: str | None) -> str:
        """The product as a convolution over one picture, whose pixels are the tokens."""
        weight = self.weight(f"{name}.weight", source, (size_out, size_in), False, convolved=True)
        pixels = x if tokens is None else self.flat(x, size_in, f"{name}.pixels")
        pixels = self.node("Transpose", [pixels], f"{name}.channels", perm=[0, 3, 1, 2])
        made = self.node("Conv", [pixels, weight], f"{name}.convolution", kernel_shape=[1, 1])
        if tokens is None:
            return self.node("Transpose", [made], name, perm=[0, 2, 3, 1])
        made = self.node("Transpose", [made], f"{name}.rows", perm=[0, 2, 3, 1])
        return self.node("Reshape", [made, tokens], name)

    def norm(self, x: str, name: str, source: str, size: int, eps: float) -> str:
        """Normalize the last axis by its root mean square."""
        weight = self.weight(f"{name}.weight", source, (size,), False)
        return self.node("RMSNormalization", [x, weight], name, axis=-1, epsilon=eps)

    def compute(self, x: str, name: str) -> str:
        """Cast to the engine's dtype."""
        return self.node("Cast", [x], name, to=helper.np_dtype_to_tensor_dtype(self.dtype))


def _by_name(source: Source) -> Mapping[str, int]:
    return {source: 0} if isinstance(source, str) else source
