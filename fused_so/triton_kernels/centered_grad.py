"""Weight gradient of a linear layer with its input centered, and both column statistics.

Two launches, or three when the rows are split: column sums, the product that subtracts the mean
as it loads h, and the sum of the partial products. No centered copy of h is ever written.
2 n out in operations (twice that in half precision); n (out + in) entries read twice.
"""

import functools

import torch
import triton
import triton.language as tl

from ._matrix import (
    MAX_SPLITS,
    SUM_COLUMNS,
    SUM_ROWS,
    column_sums,
    device_guard,
    dot_precision,
    load_widths,
    multiple_of,
    row_splits,
    sum_of_splits,
)
from ._product import (
    ADD_BLOCK,
    Plan,
    add_partials,
    corrected_product,
    launch_planned,
    plan,
    product_tile,
    rounded,
    store_tile,
)


def centered_grad(
    g: torch.Tensor, h: torch.Tensor, *, centered: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad_weight (out, in), grad_bias (out,) and mean (in,) of g (n, out) and h (n, in)."""
    (n, out), width = g.shape, h.shape[1]
    dtype = torch.promote_types(g.dtype, torch.float32)
    shapes = (out, width), (out,), (width,)
    if n == 0:
        return tuple(g.new_zeros(shape, dtype=dtype) for shape in shapes)
    with device_guard(g):
        if not centered:
            # Not searched: of halves a tile of the search spills on sm_100.
            return _launch(g, h, False, plan(width, out, n, g.dtype))
        launch = functools.partial(_launch, g, h, True)
        return launch_planned("centered_grad", launch, g, width, out, n, g.dtype)


def _launch(g: torch.Tensor, h: torch.Tensor, centered: bool, planned: Plan):
    (n, out), width = g.shape, h.shape[1]
    dtype = torch.promote_types(g.dtype, torch.float32)
    shapes = (out, width), (out,), (width,)
    grad_weight, grad_bias, mean = (g.new_empty(shape, dtype=dtype) for shape in shapes)
    rows_per_split, sum_splits = row_splits(n)
    # A mean of float32 would be off by its rounding, which the sum of g can make large.
    h_sums = mean.new_empty((sum_splits, width), dtype=torch.float64)
    g_sums = mean.new_empty((sum_splits, out), dtype=torch.float64)
    config, tiles, splits, depth = planned
    partials = grad_weight if splits == 1 else grad_weight.new_empty((splits, out, width))
    (h_width_n, h_width_i), (g_width_n, g_width_o) = load_widths(h), load_widths(g)

    summed = width if centered else 0  # columns of h
    blocks = triton.cdiv(summed, SUM_COLUMNS) + triton.cdiv(out, SUM_COLUMNS)
    _sum_columns[(max(1, blocks), sum_splits)](
        h, *h.stride(), g, *g.stride(), n, summed, out, rows_per_split, h_sums, g_sums,
        BLOCK_N=SUM_ROWS, BLOCK_D=SUM_COLUMNS,
        WIDTH_HN=h_width_n, WIDTH_HI=h_width_i, WIDTH_GN=g_width_n, WIDTH_GO=g_width_o,
    )  # fmt: skip
    _centered_product[(tiles, splits)](
        h, *h.stride(), g, *g.stride(), n, width, out, depth,
        h_sums, g_sums, sum_splits, partials, grad_bias, mean,
        BLOCK_S=MAX_SPLITS, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_K=config.block_k, PRECISION=dot_precision(g.dtype), ROUNDED=rounded(g.dtype),
        CENTERED=centered, WIDTH_OUT=load_widths(grad_weight)[1],
        WIDTH_HN=h_width_n, WIDTH_HI=h_width_i, WIDTH_GN=g_width_n, WIDTH_GO=g_width_o,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if splits > 1:
        add_partials[(triton.cdiv(grad_weight.numel(), ADD_BLOCK),)](
            partials, splits, grad_weight.numel(), grad_weight, BLOCK=ADD_BLOCK
        )
    return grad_weight, grad_bias, mean


@triton.jit
def _sum_columns(
    h_ptr,  # (n, width)
    stride_hn,
    stride_hi,
    g_ptr,  # (n, out)
    stride_gn,
    stride_go,
    n,
    width,
    out,
    rows_per_split,
    h_sums_ptr,  # (splits, width)
    g_sums_ptr,  # (splits, out)
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDTH_HN: tl.constexpr,
    WIDTH_HI: tl.constexpr,
    WIDTH_GN: tl.constexpr,
    WIDTH_GO: tl.constexpr,
):
    """Each program one block of columns, of h first and then of g. n (width + out) entries."""
    block = tl.program_id(0)
    h_blocks = tl.cdiv(width, BLOCK_D)
    if block < h_blocks:
        _sum_block(
            h_ptr, stride_hn, stride_hi, n, width, rows_per_split, block, h_sums_ptr,
            BLOCK_N, BLOCK_D, WIDTH_HN, WIDTH_HI,
        )  # fmt: skip
    else:
        _sum_block(
            g_ptr, stride_gn, stride_go, n, out, rows_per_split, block - h_blocks, g_sums_ptr,
            BLOCK_N, BLOCK_D, WIDTH_GN, WIDTH_GO,
        )  # fmt: skip


@triton.jit
def _sum_block(
    x_ptr,  # (n, d)
    stride_n,
    stride_d,
    n,
    d,
    rows_per_split,
    block,
    sums_ptr,  # (splits, d)
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDTH_N: tl.constexpr,
    WIDTH_D: tl.constexpr,
):
    col = block * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1).to(tl.int64)
    first = split * rows_per_split
    total, _ = column_sums(
        x_ptr, stride_n, stride_d, d, col, first, tl.minimum(first + rows_per_split, n),
        sums_ptr.dtype.element_ty, SQUARES=False,
        BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, WIDTH_N=WIDTH_N, WIDTH_D=WIDTH_D,
    )  # fmt: skip
    tl.store(sums_ptr + split * d + col, total, mask=col < d)


@triton.jit
def _centered_product(
    h_ptr,  # (n, width)
    stride_hn,
    stride_hi,
    g_ptr,  # (n, out)
    stride_gn,
    stride_go,
    n,
    width,
    out,
    depth,
    h_sums_ptr,  # (sum_splits, width)
    g_sums_ptr,  # (sum_splits, out)
    sum_splits,
    partials_ptr,  # (splits, out, width)
    bias_ptr,  # (out,)
    mean_ptr,  # (width,)
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUNDED: tl.constexpr,
    CENTERED: tl.constexpr,
    WIDTH_HN: tl.constexpr,
    WIDTH_HI: tl.constexpr,
    WIDTH_GN: tl.constexpr,
    WIDTH_GO: tl.constexpr,
    WIDTH_OUT: tl.constexpr,
):
    ACC: tl.constexpr = mean_ptr.dtype.element_ty
    i, j = product_tile(tl.program_id(0), width, out, BLOCK_M, BLOCK_N)
    split = tl.program_id(1)
    row = i * BLOCK_M + tl.arange(0, BLOCK_M)
    col = j * BLOCK_N + tl.arange(0, BLOCK_N)
    mean = tl.zeros([BLOCK_M], h_sums_ptr.dtype.element_ty)
    shift = None
    if CENTERED:
        # m = (1/n) sum h
        mean = sum_of_splits(h_sums_ptr, width, sum_splits, row, width, BLOCK_S) / n
        # A half h minus a half shift is what the product takes apart without loss.
        shift = mean.to(ACC).to(h_ptr.dtype.element_ty).to(ACC)

    # dW^T = (H - 1 s^T)^T G, or H^T G
    row_offset = row.to(tl.int64) * multiple_of(stride_hi, WIDTH_HN)
    value, _ = corrected_product(
        h_ptr, row_offset, stride_hn, g_ptr, stride_gn, stride_go, width, out, n, split, depth,
        row, col, shift, None, 0, None, 0, None, 0, ACC,
        BLOCK_K=BLOCK_K, PRECISION=PRECISION, ROUNDED=ROUNDED,
        WIDTH_AM=WIDTH_HI, WIDTH_AK=WIDTH_HN, WIDTH_BK=WIDTH_GN, WIDTH_BN=WIDTH_GO,
    )  # fmt: skip
    bias = sum_of_splits(g_sums_ptr, out, sum_splits, col, out, BLOCK_S).to(ACC)
    if CENTERED:
        # dW^T <- dW^T - (m - s) (sum g)^T, once
        rest = (mean - shift).to(ACC)
        value -= tl.where(split == 0, rest, 0.0)[:, None] * bias[None, :]
    if (split == 0) & (j == 0):
        tl.store(mean_ptr + row, mean.to(ACC), mask=row < width)
    if (split == 0) & (i == 0):
        tl.store(bias_ptr + col, bias, mask=col < out)
    out_ptr = partials_ptr + split.to(tl.int64) * out * width
    stride_out = multiple_of(width, WIDTH_OUT)
    store_tile(out_ptr, 1, stride_out, stride_out, out, row, col, value)
