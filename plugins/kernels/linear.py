# mypy: ignore-errors
"""The kernels of `ops/linear.py`: a program per tile of tokens and outputs, and share of the inputs.

What reads the shares adds them, so no program waits for another. Programs of one tile of weights are neighbours in the
grid, so after the first of them the weights come from the second-level cache. Weights are asked for before the kernel
before has ended, since no kernel writes them, and the kernel behind may begin once they have been multiplied: earlier,
and its own weights would push these out of the cache.

The weights are the left side of the product: a card may take that side from registers, where they have just been
widened, and a pass of few tokens fills a tile of outputs all the same.
"""

import triton
import triton.language as tl

from .dependent import ask, follow, lead, wait
from .shares import added, put, times
from .swiglu import gated
from .widened import from_e4m3, from_int8


@triton.jit
def linear(
    x, weight, scale, zero, N, F, K, Z, y,
    BITS: tl.constexpr, E4M3: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
    STEP: tl.constexpr, SHARES: tl.constexpr, WHOLE: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x (N, K), weight, scale, zero -> y (SHARES, N, F) f32, a share a program; or WHOLE, which is (N, F)."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    f = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    sums = _sums(
        x, weight, scale, zero, N, F, K, Z, n, f,
        BITS, E4M3, BLOCK_N, BLOCK_F, BLOCK_K, STEP, SHARES, WHOLE, False, AHEAD, PDL,
    )  # fmt: skip
    # One wide number for the tile and a narrow one for each place in it.
    corner = (tl.program_id(2) * N + tl.program_id(0) * BLOCK_N).to(tl.int64) * F + tl.program_id(1) * BLOCK_F
    place = tl.arange(0, BLOCK_N)[None, :] * F + tl.arange(0, BLOCK_F)[:, None]
    inside = (f < F)[:, None] & (n < N)[None, :]
    if WHOLE:
        tl.store(y + corner + place, sums.to(y.dtype.element_ty), mask=inside)
    else:
        put(y + corner + place, sums, inside)


@triton.jit
def gated_linear(
    x, weight, scale, zero, N, F, K, Z, y,
    BITS: tl.constexpr, E4M3: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
    STEP: tl.constexpr, SHARES: tl.constexpr, WHOLE: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The same of one share, whose outputs are the gate's and then as many others -> y (N, F / 2)."""
    half: tl.constexpr = BLOCK_F // 2
    kind: tl.constexpr = y.dtype.element_ty
    W = F // 2
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, BLOCK_F)  # first those of the gate
    f = tl.program_id(1) * half + row % half + row // half * W
    sums = _sums(
        x, weight, scale, zero, N, F, K, Z, n, f,
        BITS, E4M3, BLOCK_N, BLOCK_F, BLOCK_K, STEP, SHARES, WHOLE, True, AHEAD, PDL,
    )  # fmt: skip
    pairs = tl.permute(tl.reshape(sums.to(kind), [2, half, BLOCK_N]), [1, 2, 0])
    gate, up = tl.split(pairs)
    f = tl.program_id(1) * half + tl.arange(0, half)
    place = n.to(tl.int64)[None, :] * W + f[:, None]
    inside = (f < W)[:, None] & (n < N)[None, :]
    tl.store(y + place, gated(gate.to(tl.float32), up.to(tl.float32)).to(kind), mask=inside)


@triton.jit
def share_sum(part, F, y, SHARES: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """part (SHARES, N, F) f32 -> y (N, F); a program per token and some outputs."""
    follow(PDL)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    place = tl.program_id(0).to(tl.int64) * F + f
    kind: tl.constexpr = y.dtype.element_ty
    sums = added(part, place, tl.num_programs(0).to(tl.int64) * F, f < F, kind, SHARES)
    tl.store(y + place, sums.to(kind), mask=f < F)


@triton.jit
def _sums(
    x, weight, scale, zero, N, F, K, Z, n, f,
    BITS: tl.constexpr, E4M3: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
    STEP: tl.constexpr, SHARES: tl.constexpr, WHOLE: tl.constexpr, HALVES: tl.constexpr,
    AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """This program's share for outputs f (BLOCK_F,) and tokens n (BLOCK_N,), or WHOLE the sum of all, f32.

    (BLOCK_F, BLOCK_N). Shares are of whole BLOCK_K, summed STEP inputs at a time. HALVES: f are two runs, one in each
    half of F, and not one.
    """
    K = K // 16 * 16  # no change; tells the compiler that rows and the end of a row are aligned
    length = tl.cdiv(tl.cdiv(K, BLOCK_K), SHARES) * BLOCK_K  # of a share
    share = tl.program_id(2)
    if PDL:
        _ask(weight, F, K, f, share * length, length, BITS, BLOCK_F, STEP, HALVES, AHEAD)
    wait(PDL)
    gain = tl.load(scale + f, mask=f < F, other=0.0) if BITS == 8 else f
    if WHOLE and SHARES > 1:
        sums = tl.zeros([BLOCK_F, BLOCK_N], tl.float32)
        for one in range(SHARES):
            sums += _share(
                x, weight, scale, zero, N, F, K, Z, n, f, one * length, length, gain,
                BITS, E4M3, BLOCK_N, BLOCK_F, STEP,
            )  # fmt: skip
    else:
        sums = _share(
            x, weight, scale, zero, N, F, K, Z, n, f, share * length, length, gain, BITS, E4M3, BLOCK_N, BLOCK_F, STEP
        )
    lead(PDL)
    return sums


@triton.jit
def _ask(
    weight, F, K, f, begin, length,
    BITS: tl.constexpr, BLOCK_F: tl.constexpr, STEP: tl.constexpr, HALVES: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Have this program's first weights, AHEAD bytes of all programs together, brought into the cache."""
    first = tl.program_id(0) == 0  # of those that read the same
    each = AHEAD // (tl.num_programs(1) * tl.num_programs(2) * BLOCK_F)  # bytes of an output
    if BITS == 4:
        # A run of outputs lies together for each pair of groups; a thread asks for one.
        runs: tl.constexpr = 2 if HALVES else 1
        rows: tl.constexpr = BLOCK_F // runs
        group: tl.constexpr = STEP // 2  # bytes of an output in a pair
        pair = tl.arange(0, BLOCK_F) // runs
        row = tl.program_id(1) * rows + tl.arange(0, BLOCK_F) % runs * (F // runs)
        wanted = tl.minimum(each, tl.cdiv(tl.minimum(length, K - begin), 2)) // group
        size = tl.minimum(rows, F // runs - tl.program_id(1) * rows) * group
        pointer = weight + ((begin // STEP + pair).to(tl.int64) * F + row) * group
        ask(pointer, tl.where((pair < wanted) & first, size, 0))
    else:
        item: tl.constexpr = BITS // 8
        size = tl.minimum(each // 16 * 16, tl.minimum(length, K - begin) * item)
        ask(weight + tl.minimum(f, F - 1).to(tl.int64) * K + begin, tl.where(first, size, 0) + 0 * f)


@triton.jit
def _share(
    x, weight, scale, zero, N, F, K, Z, n, f, begin, length, gain,
    BITS: tl.constexpr, E4M3: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The sum of the share that begins at an input, times gain (BLOCK_F,) where that is the scale."""
    k = tl.arange(0, STEP)
    real = n < N
    inside = f < F
    of_x = x + n.to(tl.int64)[None, :] * K + k[:, None]
    of_weight = weight + f.to(tl.int64)[:, None] * K + k[None, :]
    total = tl.zeros([BLOCK_F, BLOCK_N], tl.float32)
    for start in range(begin, tl.minimum(begin + length, K), STEP):
        if BITS == 4:
            total = _pair_of_groups(x, weight, scale, zero, N, F, K, Z, n, f, start, total, STEP // 2)
        else:
            has = start + k < K
            a = tl.load(of_x + start, mask=has[:, None] & real[None, :], other=0.0)
            w = tl.load(of_weight + start, mask=inside[:, None] & has[None, :], other=0)
            if BITS == 8:
                w = from_e4m3(w) if E4M3 else from_int8(w)
            total = tl.dot(w.to(a.dtype), a, total, input_precision="ieee")
    return times(total, gain[:, None]) if BITS == 8 else total


@triton.jit
def _pair_of_groups(x, weight, scale, zero, N, F, K, Z, n, f, start, total, GROUP: tl.constexpr):
    """`total` and the products of the inputs from `start` on, whose weights are the two halves of bytes."""
    PART: tl.constexpr = 16 if x.dtype.element_ty == tl.float32 else GROUP  # see STEP_F32 in `ops/linear.py`
    k = tl.arange(0, PART)
    real = n < N
    inside = f < F
    of_x = x + n.to(tl.int64)[None, :] * K + k[:, None]
    of_weight = weight + f[:, None] * GROUP + k[None, :] + start // (2 * GROUP) * F * GROUP
    for part in tl.static_range(GROUP // PART):
        bits = tl.load(of_weight + part * PART, mask=inside[:, None], other=0).to(tl.uint32)
        for half in tl.static_range(2):
            group = start // GROUP + half
            has = group * GROUP + part * PART + k < K
            a = tl.load(of_x + group * GROUP + part * PART, mask=has[:, None] & real[None, :], other=0.0)
            place = group * F + f
            step = tl.load(scale + place, mask=inside, other=0.0)
            middle = tl.load(zero + place, mask=inside & (place < Z), other=8).to(tl.float32)
            numbers = (((bits >> (4 * half)) & 15) | 0x4B000000).to(tl.float32, bitcast=True)  # and 2^23
            w = (numbers - (8388608.0 + middle)[:, None]) * step[:, None]
            total = tl.dot(w.to(a.dtype), a, total, input_precision="ieee")
    return total
