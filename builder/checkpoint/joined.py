"""Projections that share an input as one: what the weight of a packed product is made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ...contract import Quantization
from .quantized import QuantizedTensor
from .safetensors_file import Tensor
from .scheme import Scheme

Part = Tensor | QuantizedTensor


@dataclasses.dataclass(frozen=True)
class JoinedTensor:
    """Tensors (out, in) with their outputs one after the other, as a `QuantizedTensor` if all of them are."""

    parts: tuple[Part, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def file(self) -> Path:
        return self.parts[0].file

    @property
    def name(self) -> str:
        return ", ".join(part.name for part in self.parts)

    @property
    def exact(self) -> bool:
        """See `QuantizedTensor.exact`."""
        return all(isinstance(part, QuantizedTensor) and part.exact for part in self.parts)

    @property
    def kind(self) -> Quantization | None:
        return self._quantized()[0].kind

    @property
    def group(self) -> int:
        return self._quantized()[0].group

    @property
    def scheme(self) -> Scheme:
        """That of the checkpoint, so of every part."""
        return self._quantized()[0].scheme

    def numbers(self, start: int, stop: int) -> np.ndarray:
        """See `QuantizedTensor.numbers`."""
        return np.concatenate([self._quantized()[at].numbers(*rows) for at, rows in self.spans(start, stop)])

    def scales(self, start: int, stop: int) -> np.ndarray:
        """See `QuantizedTensor.scales`."""
        return np.concatenate([self._quantized()[at].scales(*rows) for at, rows in self.spans(start, stop)])

    def zeros(self, start: int, stop: int) -> np.ndarray | None:
        """See `QuantizedTensor.zeros`."""
        found = [self._quantized()[at].zeros(*rows) for at, rows in self.spans(start, stop)]
        zeros = [part for part in found if part is not None]
        return np.concatenate(zeros) if zeros else None

    def spans(self, start: int, stop: int) -> Iterator[tuple[int, tuple[int, int]]]:
        """Which rows of which part lie from `start` to `stop`."""
        begin = 0
        for at, part in enumerate(self.parts):
            first, last = max(start - begin, 0), min(stop - begin, part.shape[0])
            if first < last:
                yield at, (first, last)
            begin += part.shape[0]

    def check(self) -> None:
        """See `QuantizedTensor.check`."""
        for part in self.parts:
            if isinstance(part, QuantizedTensor):
                part.check()

    def forget(self) -> None:
        """See `Tensor.forget`."""
        for part in self.parts:
            part.forget()

    def _quantized(self) -> tuple[QuantizedTensor, ...]:
        return tuple(part for part in self.parts if isinstance(part, QuantizedTensor))
