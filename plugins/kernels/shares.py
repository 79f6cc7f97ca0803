# mypy: ignore-errors
"""What the products of `low_bit_linear.py` and `split_linear.py` have in common: sums of the inputs by shares.

Each share of the inputs is summed for itself, and then the shares in their order: by the program that has them all, by
the last that finishes, or where the product is read.
"""

import triton
import triton.language as tl

from .widened import from_e4m3, from_int8


@triton.jit
def share_sums(
    x, weight, scale, zero, N, F, K, Z, W, n, f,
    KIND: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The sum of this program's shares for outputs f (BLOCK_F,) and tokens n (BLOCK_N,), in f32, (BLOCK_F, BLOCK_N).

    x (N, K); W shares in all, of whole BLOCK_K each, summed STEP inputs at a time. Of KIND "same" weight is (F, K) as
    x, of "e4m3" or "int8" their bits in u8, and scale and zero are not read; of "int4" they are those of
    `ops/low_bit_linear.py`, and STEP a pair of groups.
    """
    K = K // 16 * 16  # no change; tells the compiler that rows and the end of a row are aligned
    k = tl.arange(0, STEP)
    real = n < N
    inside = f < F
    of_x = x + n.to(tl.int64)[None, :] * K + k[:, None]
    of_weight = weight + f.to(tl.int64)[:, None] * K + k[None, :]
    length = tl.cdiv(tl.cdiv(K, BLOCK_K), W) * BLOCK_K  # of a share
    whole = tl.zeros([BLOCK_F, BLOCK_N], tl.float32)
    first = tl.program_id(2)
    for share in range(first, first + W // tl.num_programs(2)):
        total = tl.zeros([BLOCK_F, BLOCK_N], tl.float32)
        for start in range(share * length, tl.minimum((share + 1) * length, K), STEP):
            if KIND == "int4":
                total = _pair_of_groups(x, weight, scale, zero, N, F, K, Z, n, f, start, total, STEP // 2)
            else:
                has = start + k < K
                a = tl.load(of_x + start, mask=has[:, None] & real[None, :], other=0.0)
                w = tl.load(of_weight + start, mask=inside[:, None] & has[None, :], other=0)
                if KIND == "e4m3":
                    w = from_e4m3(w)
                elif KIND == "int8":
                    w = from_int8(w)
                total = tl.dot(w.to(a.dtype), a, total, input_precision="ieee")
        whole += total
    return whole


@triton.jit
def _pair_of_groups(x, weight, scale, zero, N, F, K, Z, n, f, start, total, GROUP: tl.constexpr):
    """`total` and the products of the inputs from `start` on, whose weights are the two halves of bytes."""
    k = tl.arange(0, GROUP)
    real = n < N
    inside = f < F
    of_x = x + n.to(tl.int64)[None, :] * K + k[:, None]
    of_weight = weight + f[:, None] * GROUP + k[None, :]
    bits = tl.load(of_weight + start // (2 * GROUP) * F * GROUP, mask=inside[:, None], other=0).to(tl.uint32)
    for half in tl.static_range(2):
        group = start // GROUP + half
        has = group * GROUP + k < K
        a = tl.load(of_x + group * GROUP, mask=has[:, None] & real[None, :], other=0.0)
        step = tl.load(scale + group * F + f, mask=inside, other=0.0)
        middle = tl.load(zero + group * F + f, mask=inside & (group + 0 * f < Z), other=8).to(tl.float32)
        numbers = (((bits >> (4 * half)) & 15) | 0x4B000000).to(tl.float32, bitcast=True)  # and 2^23
        w = (numbers - (8388608.0 + middle)[:, None]) * step[:, None]
        total = tl.dot(w.to(a.dtype), a, total, input_precision="ieee")
    return total


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


@triton.jit
def added(x, place, apart, mask, kind: tl.constexpr, SHARES: tl.constexpr):
    """Numbers of a product at some places, f32: as they are, or from SHARES sums that lie `apart`, rounded to kind."""
    whole = tl.load(x + place, mask=mask, other=0.0).to(tl.float32)
    for share in tl.static_range(1, SHARES):
        whole += tl.load(x + share * apart + place, mask=mask, other=0.0)
    return whole.to(kind).to(tl.float32)


def put(pointer, value, mask, _semantic=None):
    """`tl.store` of f32 numbers by the threads that have them, which for sums of a product it has change places first.

    A function of the Triton compiler, which gives `_semantic`; its interpreter gives none, and stores.
    """
    if _semantic is None:
        tl.store(pointer, value, mask=mask)
        return
    asm = "{ .reg .pred p; setp.ne.s32 p, $3, 0; @p st.global.f32 [$1], $2; mov.u32 $0, 0; }"
    arguments = [pointer.to(tl.int64, _semantic=_semantic), value, mask.to(tl.int32, _semantic=_semantic)]
    tl.inline_asm_elementwise(asm, "=r,l,f,r", arguments, tl.int32, False, 1, _semantic=_semantic)


put.__triton_builtin__ = True
