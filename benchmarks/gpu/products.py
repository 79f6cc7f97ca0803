"""Measure products of some tokens with a matrix: torch's, which a step mostly consists of, and what may replace them.

A token must have the same bits in a pass of one and of many (self-speculation verifies in one pass what mode ar decides
in many), so a way is only kept if it gives them. Torch's TunableOp is not among the ways: its source registers no other
kernel than the library's own choice on NVIDIA's cards (ATen/cuda/tunable/TunableGemm.h, 2.13). Nor is a product of one
token by plain multiplications: it would sum in another order than a tensor core does for 32.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from gpu import models as gpu_models
from gpu.plan import Cell, Figures, Lab, RunConfig
from nemodiff.config import ModelConfig
from nemodiff.contract import ITEMSIZE
from nemodiff.plugins.op import Arg, Op, run
from nemodiff.plugins.ops import linear, token_quantise

Product = Callable[[Any, Any], Any]  # x (N, in) and a matrix as `_matrix` makes it -> (N, out)
MOST = 32  # tokens of a product that has always as many rows
NARROW = ("qkv", "o", "down")  # matrices whose outputs are too few to fill a card


def types(torch: Any) -> dict[str, Any]:
    """torch's types by the names of `Arg.dtype` and of engines."""
    floats = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
    return {**floats, "i32": torch.int32, "i8": torch.int8, "u8": torch.uint8}


def projections(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """The matrices of a layer and of the head, (out, in)."""
    hidden = model.hidden_size
    inner = model.intermediate_size
    heads = model.num_heads * model.head_dim
    return {
        "qkv": (heads + 2 * model.num_kv_heads * model.head_dim, hidden),
        "o": (hidden, heads),
        "gate_up": (2 * inner, hidden),
        "down": (hidden, inner),
        "head": (model.vocab_size, hidden),
    }


def by_torch(lab: Lab) -> Product:
    """torch's product."""
    product: Product = lab.card.torch.nn.functional.linear
    return product


def of_many_rows(lab: Lab) -> Product:
    """torch's product of always MOST rows, so that the library takes one kernel for all passes of up to as many."""
    functional = lab.card.torch.nn.functional
    return lambda x, matrix: functional.linear(functional.pad(x, (0, 0, 0, MOST - len(x))), matrix)[: len(x)]


def in_batches(lab: Lab) -> Product:
    """torch's products of parts of the inputs, a batch of them, then their sum in f32: its kernels, split by us."""
    torch = lab.card.torch

    def product(x: Any, matrix: Any) -> Any:
        out, size_in = matrix.shape
        parts = 1
        while 2 * parts <= linear.shares(out, size_in) and size_in % (2 * parts) == 0:
            parts *= 2
        a = x.view(len(x), parts, -1).transpose(0, 1)  # (parts, N, in / parts)
        b = matrix.view(out, parts, -1).permute(1, 2, 0)
        wide = {"out_dtype": torch.float32} if x.dtype != torch.float32 else {}
        return torch.bmm(a, b, **wide).sum(0).to(x.dtype)

    return product


def in_shares(lab: Lab, varied: Callable[[Op], Op] = lambda op: op) -> Product:
    """`SplitLinear`, or what `varied` makes of it, of up to MOST rows: (N, shares, out), which another kernel adds."""
    torch = lab.card.torch
    model = gpu_models.work("tiny", "bf16").model  # for constants, of which the op has none

    def product(x: Any, matrix: Any) -> Any:
        def new(arg: Arg, shape: tuple[int, ...]) -> Any:
            return torch.empty(shape, dtype=torch.float32, device=x.device)

        tile = next(tile for tile in linear.TILES if len(x) <= tile)
        op = linear.split(None, tile, linear.shares(*matrix.shape))
        nothing = {"scale": x.new_empty(0, dtype=torch.float32), "zero": x.new_empty(0, dtype=torch.uint8)}
        return run(varied(op), model, {"x": x, "weight": matrix, **nothing}, new)[0].transpose(0, 1)

    return product


def by_8_bits(lab: Lab) -> Product:
    """Both sides in e4m3, the tokens quantised first; torch's, on cards with fp8."""
    torch = lab.card.torch
    model = gpu_models.work("tiny", "bf16").model

    def product(x: Any, matrix: Any) -> Any:
        def new(arg: Arg, shape: tuple[int, ...]) -> Any:
            return torch.empty(shape, dtype={"u8": torch.uint8, "f32": torch.float32}[arg.dtype], device=x.device)

        values, scale = run(token_quantise.OP, model, {"x": x}, new)
        gain = torch.ones(1, len(matrix), dtype=torch.float32, device=x.device)
        a, b = values.view(torch.float8_e4m3fn), matrix.t()
        return torch._scaled_mm(a, b, scale[:, None], gain, out_dtype=torch.bfloat16)

    return product


WAYS: dict[str, Callable[[Lab], Product]] = {"linear": by_torch, "e4m3 linear": by_8_bits}
# Of a narrow matrix: how, and the library that torch asks for it.
NARROW_WAYS: dict[str, tuple[Callable[[Lab], Product], str]] = {
    "cuBLAS": (by_torch, "cublas"),
    "cuBLASLt": (by_torch, "cublaslt"),
    f"of {MOST} rows": (of_many_rows, "default"),
    "in batches": (in_batches, "default"),
    "in shares": (in_shares, "default"),
}


def _matrix(lab: Lab, how: str, out: int, size_in: int, dtype: str) -> Any:
    """A random matrix, (out, in)."""
    torch, device = lab.card.torch, lab.card.name
    if how == "e4m3 linear":
        bits = torch.randint(0, 120, (out, size_in), dtype=torch.uint8, device=device)
        return bits.view(torch.float8_e4m3fn)
    return torch.empty(out, size_in, dtype=types(torch)[dtype], device=device).normal_()


def microseconds(
    lab: Lab, product: Product, sizes: tuple[int, int], dtype: str, tokens: int, how: str = "linear"
) -> float:
    """Of a product of some tokens with a matrix of some sizes, (out, in), as one of WAYS has it."""
    out, size_in = sizes
    with lab.card.use(gpu_models.CARRIED):
        x = lab.card.torch.empty(tokens, size_in, dtype=types(lab.card.torch)[dtype], device=lab.card.name).normal_()
        count = lab.card.sets(out * size_in * ITEMSIZE[dtype])
        matrices = [_matrix(lab, how, out, size_in, dtype) for _ in range(count)]
    return 1e6 * lab.card.per_launch([lambda m=m: product(x, m) for m in matrices])


def measured(lab: Lab, how: str, sizes: tuple[int, int], dtype: str, tokens: int) -> Figures:
    """One of WAYS with a matrix of some sizes, (out, in)."""
    out, size_in = sizes
    item = ITEMSIZE[dtype]
    nbytes = out * size_in * (1 if how == "e4m3 linear" else item) + tokens * (out + size_in) * item
    us = microseconds(lab, WAYS[how](lab), sizes, dtype, tokens, how)
    figures = {"us": us, "bytes": nbytes, "to_copy_ceiling": lab.to_copy_ceiling(nbytes, us / 1e6)}
    return {"op": how, "stages": [f"{how}, {out} x {size_in}"], **figures, "tokens": tokens, "context": None}


@contextlib.contextmanager
def library(lab: Lab, name: str) -> Iterator[None]:
    """Let torch ask a library for its products; a CPU has none of them."""
    if not lab.card.is_gpu:
        yield
        return
    prefer = lab.card.torch.backends.cuda.preferred_blas_library
    before = prefer()
    try:
        prefer(name)
        yield
    finally:
        prefer(before)


def narrow(lab: Lab, sizes: tuple[int, int], dtype: str, counts: list[int]) -> Figures:
    """All of NARROW_WAYS side by side, by numbers of tokens, and the quickest of those that keep a token's bits."""
    torch = lab.card.torch
    out, size_in = sizes
    nbytes = out * size_in * ITEMSIZE[dtype]
    with lab.card.use(gpu_models.CARRIED):
        x = torch.empty(max(counts), size_in, dtype=types(torch)[dtype], device=lab.card.name).normal_()
        matrices = [_matrix(lab, "linear", out, size_in, dtype) for _ in range(lab.card.sets(nbytes))]
    ways: dict[str, Figures] = {}
    for name, (how, asked) in NARROW_WAYS.items():
        try:
            with library(lab, asked):
                ways[name] = _compared(lab, how(lab), x, matrices, counts)
        except (RuntimeError, TypeError) as error:  # a torch without that library or type
            if "CUDA error" in str(error):
                raise
            ways[name] = {"skipped": str(error).splitlines()[0][:160]}
    sound = {name: sum(way["us"].values()) for name, way in ways.items() if way.get("same_bits")}
    winner = min(sound, key=lambda name: sound[name]) if sound else None
    return {"out": out, "in": size_in, "bytes": nbytes, "ways": ways, "winner": winner}


def _compared(lab: Lab, product: Product, x: Any, matrices: list[Any], counts: list[int]) -> Figures:
    """Microseconds by tokens, and whether the first token's bits are the same in all of them."""
    times, bits = {}, []
    for count in counts:
        some = x[:count]
        seconds = lab.card.per_launch([lambda m=m, some=some: product(some, m) for m in matrices])
        times[str(count)] = seconds * 1e6
        with lab.card.use(gpu_models.CARRIED):
            bits.append(product(some, matrices[0])[0].clone())
    return {"us": times, "same_bits": all(bool((one == bits[0]).all()) for one in bits)}


def linear_cells(config: RunConfig, shape: str, ways: Iterable[str]) -> Iterator[Cell]:
    """Some of WAYS with every matrix of a layer, and the head's."""
    model = gpu_models.work(shape, config.dtype).model
    for how, (name, sizes) in itertools.product(ways, projections(model).items()):
        for tokens in config.scale.kernel_sizes:

            def measure(lab: Lab, how: str = how, sizes: tuple[int, int] = sizes, tokens: int = tokens) -> Figures:
                return measured(lab, how, sizes, config.dtype, tokens)

            nbytes = 8 * sizes[0] * sizes[1] * ITEMSIZE[config.dtype]
            yield Cell("kernels", shape, f"{how} {name} tokens {tokens}", nbytes, 0.3, measure)


def narrow_cells(config: RunConfig, shape: str) -> Iterator[Cell]:
    """The matrices that torch's products reach the least of the ceiling with."""
    model = gpu_models.work(shape, config.dtype).model
    counts = [tokens for tokens in config.scale.narrow if tokens <= MOST]
    for name in NARROW:

        def measure(lab: Lab, sizes: tuple[int, int] = projections(model)[name]) -> Figures:
            return narrow(lab, sizes, config.dtype, counts)

        nbytes = 8 * model.hidden_size**2 * ITEMSIZE[config.dtype]
        yield Cell("narrow", shape, name, nbytes, 0.5 * len(NARROW_WAYS) * len(counts), measure)
