"""A product whose left factor loses a rank-1 term as it is loaded: (A - u v^T) B, tile by tile.

Centering is such a term, and so is the bias' part of a layer's gradient. A long sum is cut into
pieces, for more programs than the result has tiles; their partial products are added in order
afterwards, so a result is the same in every run.
"""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
import triton
import triton.language as tl

from ._autotune import fastest
from ._matrix import float32_precision, multiple_of

# A GPU has 100 to 150 processors: fewer programs than this leave some of them idle.
ENOUGH_PROGRAMS = 128
# Cutting a sum shorter than this costs more in partial products than it gains.
MIN_DEPTH = 128
# Entries of a result that one program adds up over the splits.
ADD_BLOCK = 256
# Rows of tiles that run side by side, so that their columns of B are still cached.
GROUP = tl.constexpr(8)

T = TypeVar("T")


class Config(NamedTuple):
    """Tile of the product: BLOCK_M x BLOCK_N of the result, BLOCK_K terms of the sum at a time."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


class Plan(NamedTuple):
    """One product's tile, its grid, and the length of the pieces of its sum."""

    config: Config
    tiles: int
    splits: int
    depth: int


# Largest tile first, by the type of B: 128 x 128 is what keeps the tensor cores busier than the
# cache. The depths are what Triton 3.6 and 3.9 compile without spills and within the shared memory
# of every target. Not yet measured on a GPU.
CONFIGS = {
    torch.float64: (
        Config(block_m=64, block_n=64, block_k=16, num_warps=8, num_stages=3),
        Config(block_m=32, block_n=32, block_k=16, num_warps=4, num_stages=3),
    ),
    torch.float32: (
        Config(block_m=128, block_n=128, block_k=16, num_warps=8, num_stages=3),
        Config(block_m=64, block_n=64, block_k=32, num_warps=8, num_stages=3),
        Config(block_m=32, block_n=32, block_k=32, num_warps=4, num_stages=3),
    ),
    torch.float16: (
        Config(block_m=128, block_n=128, block_k=32, num_warps=8, num_stages=3),
        Config(block_m=64, block_n=64, block_k=64, num_warps=8, num_stages=3),
        Config(block_m=32, block_n=32, block_k=64, num_warps=4, num_stages=3),
    ),
}
CONFIGS[torch.bfloat16] = CONFIGS[torch.float16]
# What the opt-in search tries beside these. Four stages are more than Triton 3.6 can make of halves
# that are converted, on AMD.
MORE_CONFIGS = {
    torch.float64: (Config(block_m=32, block_n=64, block_k=16, num_warps=4, num_stages=3),),
    torch.float32: (
        Config(block_m=128, block_n=64, block_k=16, num_warps=8, num_stages=3),
        Config(block_m=64, block_n=64, block_k=16, num_warps=4, num_stages=3),
    ),
    torch.float16: (
        Config(block_m=128, block_n=64, block_k=32, num_warps=8, num_stages=3),
        Config(block_m=64, block_n=64, block_k=32, num_warps=4, num_stages=3),
    ),
}
MORE_CONFIGS[torch.bfloat16] = MORE_CONFIGS[torch.float16]


def plan(m: int, n: int, k: int, dtype: torch.dtype, *, splittable: bool = True) -> Plan:
    """The largest tile that leaves few processors idle, and the fewest pieces that do the same.

    It does not matter how many products one launch makes: none may depend on its neighbors."""
    most = max(1, k // MIN_DEPTH) if splittable else 1
    for config in CONFIGS[dtype]:
        if _tiles(config, m, n) * most >= ENOUGH_PROGRAMS:
            break
    return plan_with(config, m, n, k, splittable=splittable)


def plan_with(config: Config, m: int, n: int, k: int, *, splittable: bool = True) -> Plan:
    """The fewest pieces that leave few processors idle with this tile."""
    tiles = _tiles(config, m, n)
    most = max(1, k // MIN_DEPTH) if splittable else 1
    depth = triton.cdiv(k, min(most, triton.cdiv(ENOUGH_PROGRAMS, tiles)))
    depth = max(1, triton.cdiv(depth, config.block_k)) * config.block_k
    return Plan(config, tiles, max(1, triton.cdiv(k, depth)), depth)


def _tiles(config: Config, m: int, n: int) -> int:
    # Without columns there are tiles all the same: a program may have more to write.
    return max(1, triton.cdiv(m, config.block_m)) * max(1, triton.cdiv(n, config.block_n))


def launch_planned(
    kernel: str,
    launch: Callable[[Plan], T],
    x: torch.Tensor,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    *variant: bool,
    splittable: bool = True,
) -> T:
    """launch(plan), which changes nothing but what it returns, with the tile there is to use.

    dtype is that of B; `variant` is what else may make another tile the fastest."""
    planned = plan(m, n, k, dtype, splittable=splittable)
    config = fastest(
        (kernel, x.dtype, dtype, *variant, splittable),
        (m, n, k),
        planned.config,
        (*CONFIGS[dtype], *MORE_CONFIGS[dtype]),
        lambda config: launch(plan_with(config, m, n, k, splittable=splittable)),
        x.device,
    )
    if config != planned.config:
        planned = plan_with(config, m, n, k, splittable=splittable)
    return launch(planned)


@triton.jit
def product_tile(tile, size_m, size_n, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Position (i, j) of a tile counted down the rows of one group after another."""
    tiles_m = tl.maximum(tl.cdiv(size_m, BLOCK_M), 1)
    tiles_n = tl.maximum(tl.cdiv(size_n, BLOCK_N), 1)
    return tl.swizzle2d(tile // tiles_n, tile % tiles_n, tiles_m, tiles_n, GROUP)


@triton.jit
def corrected_product(
    a_ptr,  # (size_m, size_k)
    row_offset,  # (BLOCK_M,), of the rows of A from a_ptr: int64
    stride_ak,
    b_ptr,  # (size_k, size_n)
    stride_bk,
    stride_bn,
    size_m,
    size_n,
    size_k,
    split,
    depth,
    row,
    col,
    u,  # (BLOCK_M,), or None when A is not corrected
    v_ptr,  # (size_k,), or None for ones
    stride_v,
    scale_ptrs,  # (BLOCK_M,), to the first factor of each row, or None when A is not scaled
    stride_sk,
    other_ptrs,  # (BLOCK_M,), to the first entry of what each row is multiplied by, or None
    stride_ok,
    ACC: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUNDED: tl.constexpr,
    WIDTH_AM: tl.constexpr,
    WIDTH_AK: tl.constexpr,
    WIDTH_BK: tl.constexpr,
    WIDTH_BN: tl.constexpr,
):
    """acc[r, c] = sum_k (a[row_r, k] - u_r v[k]) s[r, k] b[k, col_c], (BLOCK_M, BLOCK_N), and
    dots[r] = sum_k (a[row_r, k] - u_r v[k]) s[r, k] other[r, k], (BLOCK_M,), or 0 without other.

    The sum runs over the piece of k that is number `split`, `depth` long. The strides of the rows
    of A, of the factors and of `other` are multiples of WIDTH_AK."""
    # An offset can pass 2^31, and so can a stride times the block.
    first = split.to(tl.int64) * depth
    size_k = tl.minimum(size_k - first, depth).to(tl.int32)
    size_am, stride_ak = multiple_of(size_m, WIDTH_AM), multiple_of(stride_ak, WIDTH_AM)
    size_ak = multiple_of(size_k, WIDTH_AK)
    size_bk, stride_bn = multiple_of(size_k, WIDTH_BK), multiple_of(stride_bn, WIDTH_BK)
    size_bn, stride_bk = multiple_of(size_n, WIDTH_BN), multiple_of(stride_bk, WIDTH_BN)
    k = tl.arange(0, BLOCK_K)
    at = first + k
    a_ptrs = a_ptr + row_offset[:, None] + at[None, :] * stride_ak
    b_ptrs = b_ptr + at[:, None] * stride_bk + col.to(tl.int64)[None, :] * stride_bn
    a_step = tl.cast(stride_ak, tl.int64) * BLOCK_K
    b_step = tl.cast(stride_bk, tl.int64) * BLOCK_K
    a_mask = (row < size_am)[:, None]
    b_mask = (col < size_bn)[None, :]
    if v_ptr is not None:
        v_ptrs = v_ptr + at * stride_v
        v_step = tl.cast(stride_v, tl.int64) * BLOCK_K

    acc = tl.zeros((row.shape[0], col.shape[0]), ACC)
    # Summed over the columns at the end only: a sum across threads waits for all of them.
    products = tl.zeros((row.shape[0], BLOCK_K), ACC)
    for start in range(0, size_k, BLOCK_K):
        mask = a_mask & (k < size_ak - start)[None, :]
        a = tl.load(a_ptrs, mask=mask, other=0.0)
        b = tl.load(b_ptrs, mask=b_mask & (k < size_bk - start)[:, None], other=0.0)
        if u is not None:
            # Past the end a becomes -u v instead of 0, but there b is 0.
            a = a.to(ACC)
            if v_ptr is None:
                a -= u[:, None]
            else:
                v = tl.load(v_ptrs, mask=k < size_k - start, other=0.0).to(ACC)
                v_ptrs += v_step
                a -= u[:, None] * v[None, :]
        if scale_ptrs is not None:
            s_ptrs = scale_ptrs[:, None] + (at + start)[None, :] * stride_sk
            a = a.to(ACC) * tl.load(s_ptrs, mask=mask, other=0.0).to(ACC)
            if b.dtype == tl.float16:
                # Two float16 numbers can have a product far below float16's range.
                b = b.to(ACC)
        if other_ptrs is not None:
            o_ptrs = other_ptrs[:, None] + (at + start)[None, :] * stride_ok
            other = tl.load(o_ptrs, mask=mask, other=0.0).to(ACC)
            products += a.to(ACC) * other
        acc = _add_product(acc, a, b, PRECISION, ROUNDED)
        a_ptrs += a_step
        b_ptrs += b_step
    return acc, tl.sum(products, axis=1)


@triton.jit
def _add_product(acc, a, b, PRECISION: tl.constexpr, ROUNDED: tl.constexpr):
    """acc + a b, where b may be of half precision and a, computed from halves, of float32.

    The difference of two half numbers is the sum of two: it, rounded, and what rounding took.
    Two products on the half units are exact where one in float32 costs six."""
    if a.dtype == b.dtype:
        return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)
    high = a
    if b.dtype == tl.float16:
        # Two float16 numbers can be twice float16's range apart: the second takes the excess.
        high = tl.clamp(a, -65504.0, 65504.0)
    high = high.to(b.dtype)
    acc = tl.dot(high, b, acc, out_dtype=acc.dtype)
    if not ROUNDED:
        low = (a - high.to(a.dtype)).to(b.dtype)
        acc = tl.dot(low, b, acc, out_dtype=acc.dtype)
    return acc


def rounded(dtype: torch.dtype) -> bool:
    """Whether bfloat16 is all that PyTorch's setting asks of what is computed from bfloat16."""
    return dtype == torch.bfloat16 and float32_precision() == "medium"


@triton.jit
def store_tile(out_ptr, stride_m, stride_n, size_m, size_n, row, col, value):
    """out[row, col] = value for the rows and columns that there are."""
    ptrs = out_ptr + row.to(tl.int64)[:, None] * stride_m + col.to(tl.int64)[None, :] * stride_n
    tl.store(ptrs, value, mask=(row < size_m)[:, None] & (col < size_n)[None, :])


@triton.jit
def add_partials(
    partials_ptr,  # (splits, size)
    splits,
    size,
    sum_ptr,  # (size,)
    BLOCK: tl.constexpr,
):
    """Always in the same order. (splits + 1) size entries."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ptrs = partials_ptr + at
    total = tl.load(ptrs, mask=at < size, other=0.0)
    for _ in range(1, splits):
        ptrs += size
        total += tl.load(ptrs, mask=at < size, other=0.0)
    tl.store(sum_ptr + at, total, mask=at < size)
