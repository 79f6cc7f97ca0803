# mypy: ignore-errors
"""The kernels of `ops/low_bit_linear.py`: a program per tile of tokens and outputs, or for few tokens per share of one.

Programs of one tile of weights are neighbours in the grid, so after the first of them the weights come from the
second-level cache. The weights are the left side of the product: a card may take that side from registers, where they
have just been widened, and a pass of few tokens fills a tile of outputs all the same. Each share of the inputs is
summed for itself, and then the shares in their order, by the program that has them all or by the last that finishes.
"""

import triton
import triton.language as tl

from .dependent import follow


@triton.jit
def from_e4m3(bits):
    """The f32 of the bits of e4m3 numbers, u8."""
    wide = bits.to(tl.uint32)
    # Sign to bit 31, exponent and mantissa to bits 26..20: the f32 of exactly 2^-120 of the value, subnormal numbers
    # too, because the exponent's bias is 127 instead of 7.
    small = (((wide & 0x80) << 24) | ((wide & 0x7F) << 20)).to(tl.float32, bitcast=True)
    return small * 1.329227995784916e36  # 2^120


@triton.jit
def from_int8(bits):
    """The f32 of the bits of int8 numbers, u8."""
    # The last bits of 2^23 count from 0; a byte with its sign turned over does so from -128.
    return ((bits.to(tl.uint32) ^ 0x80) | 0x4B000000).to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def byte_linear(
    x, weight, scale, counters, N, F, K, W, part, y,
    E4M3: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x (N, K), weight (F, K) u8, scale (F,) f32 -> y (N, F), by W shares."""
    follow(PDL)
    K = K // 16 * 16  # no change; tells the compiler that rows and the end of a row are aligned
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    k = tl.arange(0, BLOCK_K)
    real = n < N
    inside = f < F
    of_x = x + n.to(tl.int64)[None, :] * K + k[:, None]
    of_weight = weight + f.to(tl.int64)[:, None] * K + k[None, :]
    length = tl.cdiv(tl.cdiv(K, BLOCK_K), W) * BLOCK_K  # of a share
    whole = tl.zeros([BLOCK_F, BLOCK_N], tl.float32)
    first = tl.program_id(2)
    for share in range(first, first + W // tl.num_programs(2)):
        total = tl.zeros([BLOCK_F, BLOCK_N], tl.float32)
        for start in range(share * length, tl.minimum((share + 1) * length, K), BLOCK_K):
            has = start + k < K
            a = tl.load(of_x + start, mask=has[:, None] & real[None, :], other=0.0)
            bits = tl.load(of_weight + start, mask=inside[:, None] & has[None, :], other=0)
            w = from_e4m3(bits) if E4M3 else from_int8(bits)
            total = tl.dot(w.to(a.dtype), a, total, input_precision="ieee")
        whole += total
    gain = tl.load(scale + f, mask=inside, other=0.0)
    finish(whole, gain, counters, N, F, part, y, n, f, BLOCK_N, BLOCK_F)


@triton.jit
def nibble_linear(
    x, weight, scale, zero, counters, N, F, K, Z, W, part, y,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x (N, K), weight (P, F, GROUP) u8, scale (2 P, F) f32, zero (2 P, F) or (0, F) u8 -> y (N, F), by W shares."""
    follow(PDL)
    K = K // 16 * 16
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    k = tl.arange(0, GROUP)
    real = n < N
    inside = f < F
    of_x = x + n.to(tl.int64)[None, :] * K + k[:, None]
    of_weight = weight + f[:, None] * GROUP + k[None, :]
    pairs = tl.cdiv(K, 2 * GROUP)
    length = tl.cdiv(pairs, W)  # of a share
    whole = tl.zeros([BLOCK_F, BLOCK_N], tl.float32)
    first = tl.program_id(2)
    for share in range(first, first + W // tl.num_programs(2)):
        total = tl.zeros([BLOCK_F, BLOCK_N], tl.float32)
        for pair in range(share * length, tl.minimum((share + 1) * length, pairs)):
            bits = tl.load(of_weight + pair * F * GROUP, mask=inside[:, None], other=0).to(tl.uint32)
            for half in tl.static_range(2):
                group = pair * 2 + half
                has = group * GROUP + k < K
                a = tl.load(of_x + group * GROUP, mask=has[:, None] & real[None, :], other=0.0)
                step = tl.load(scale + group * F + f, mask=inside, other=0.0)
                middle = tl.load(zero + group * F + f, mask=inside & (group + 0 * f < Z), other=8).to(tl.float32)
                numbers = (((bits >> (4 * half)) & 15) | 0x4B000000).to(tl.float32, bitcast=True)  # and 2^23
                w = (numbers - (8388608.0 + middle)[:, None]) * step[:, None]
                total = tl.dot(w.to(a.dtype), a, total, input_precision="ieee")
        whole += total
    finish(whole, tl.full([BLOCK_F], 1.0, tl.float32), counters, N, F, part, y, n, f, BLOCK_N, BLOCK_F)


@triton.jit
def finish(whole, gain, counters, N, F, part, y, n, f, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr):
    """Write whole (BLOCK_F, BLOCK_N) times gain (BLOCK_F,); or where it is one share, their sum once all are there."""
    real = (f < F)[:, None] & (n < N)[None, :]
    # One wide number for the tile and a narrow one for each place in it.
    corner = tl.program_id(0).to(tl.int64) * BLOCK_N * F + tl.program_id(1) * BLOCK_F
    place = tl.arange(0, BLOCK_N)[None, :] * F + tl.arange(0, BLOCK_F)[:, None]
    shares = tl.num_programs(2)
    if shares == 1:
        tl.store(y + corner + place, (whole * gain[:, None]).to(y.dtype.element_ty), mask=real)
    else:
        size = N * F  # of a share of few tokens
        tl.store(part + corner + tl.program_id(2) * size + place, whole, mask=real)
        tl.debug_barrier()  # every thread has written before one says so
        counter = counters + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
        done = tl.atomic_add(counter, 1, sem="acq_rel")
        if done == shares - 1:
            tl.store(counter, 0)
            whole = tl.zeros([BLOCK_F, BLOCK_N], tl.float32)
            for share in range(shares):
                # What others wrote is read past the first-level cache.
                whole += tl.load(part + corner + share * size + place, mask=real, other=0.0, cache_modifier=".cg")
            tl.store(y + corner + place, (whole * gain[:, None]).to(y.dtype.element_ty), mask=real)
