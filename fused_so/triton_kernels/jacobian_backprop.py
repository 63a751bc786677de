"""Jacobians of a batch through one linear layer and the activation after it.

One product over the rows of all Jacobians: it scales them as it loads them, and takes their inner
products with the direction from the same registers, so that jac is read once for each column of
tiles and never written scaled. With a direction, or when the sums are cut into pieces, a second
launch finishes each example: it adds the pieces and pulls the direction back.

2 n o out in operations, 2 n o (out + in) more for the pull-back; n o (out + in) entries, and
n o in read again for the pull-back.
"""

import functools

import torch
import triton
import triton.language as tl

from ._matrix import device_guard, dot_precision, load_widths, multiple_of
from ._product import (
    ADD_BLOCK,
    Plan,
    add_partials,
    corrected_product,
    launch_planned,
    product_tile,
    rounded,
    store_tile,
)

# Tile of the pull-back: rows of one example, and columns.
PULL_ROWS = 8
PULL_COLUMNS = 128


def jacobian_backprop(
    jac: torch.Tensor,
    weight: torch.Tensor,
    *,
    dphi: torch.Tensor | None = None,
    direction: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """jac_in (n, o, in) and pullback (n, in), or an empty one without a direction."""
    (n, outputs, out), width = jac.shape, weight.shape[1]
    dtype = torch.promote_types(jac.dtype, torch.float32)
    if n * outputs * width == 0:
        pulled = 0 if direction is None else (n, width)
        return jac.new_zeros((n, outputs, width), dtype=dtype), jac.new_zeros(pulled, dtype=dtype)
    # Every row of tiles reads all of the weight, so that a copy of it costs little beside them; and
    # the largest tile of float32 spills with columns that are not neighbours.
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    # Scaled float16 are float32, and so is what they are multiplied by.
    widened = dphi is not None and jac.dtype == torch.float16
    multiplied = torch.float32 if widened else jac.dtype
    with device_guard(jac):
        return launch_planned(
            "jacobian_backprop",
            functools.partial(_launch, jac, weight, dphi, direction, multiplied),
            jac,
            n * outputs,
            width,
            out,
            multiplied,
            dphi is not None,
            direction is not None,
        )


def _launch(jac, weight, dphi, direction, multiplied, plan: Plan):
    (n, outputs, out), width = jac.shape, weight.shape[1]
    dtype = torch.promote_types(jac.dtype, torch.float32)
    jac_in = jac.new_empty((n, outputs, width), dtype=dtype)
    pullback = jac.new_empty(0 if direction is None else (n, width), dtype=dtype)
    rows = n * outputs
    config, tiles, splits, depth = plan
    partials = jac_in if splits == 1 else jac_in.new_empty((splits, *jac_in.shape))
    dots = None if direction is None else jac_in.new_empty((splits, rows))
    width_bk, width_bn = load_widths(weight)

    _product[(tiles, splits)](
        jac, *jac.stride(), weight, *weight.stride(), rows, outputs, width, out, depth,
        dphi, *_strides(dphi), direction, *_strides(direction), partials, dots,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        PRECISION=dot_precision(multiplied), ROUNDED=rounded(jac.dtype),
        WIDTH_AK=_load_width(jac, dphi, direction), WIDTH_BK=width_bk, WIDTH_BN=width_bn,
        WIDTH_RN=load_widths(jac_in[0])[1],
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if direction is not None:
        # One axis: the second one of a grid ends at 65535.
        _pull_back[(n * triton.cdiv(width, PULL_COLUMNS),)](
            partials, dots, splits, n, outputs, width, jac_in, pullback,
            BLOCK_R=min(PULL_ROWS, triton.next_power_of_2(outputs)), BLOCK_N=PULL_COLUMNS,
            WIDTH_N=load_widths(jac_in[0])[1],
        )  # fmt: skip
    elif splits > 1:
        add_partials[(triton.cdiv(jac_in.numel(), ADD_BLOCK),)](
            partials, splits, jac_in.numel(), jac_in, BLOCK=ADD_BLOCK
        )
    return jac_in, pullback


def _strides(matrix: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if matrix is None else matrix.stride()


def _load_width(jac: torch.Tensor, *others: torch.Tensor | None) -> int:
    """How many neighbours along a row of jac, and of the matrices beside it, one load may take."""
    views = [jac[0], jac[:, 0], *(x for x in others if x is not None)]
    return min(load_widths(view)[1] for view in views)


@triton.jit
def _product(
    jac_ptr,  # (n, outputs, out)
    stride_jn,
    stride_jo,
    stride_jk,
    weight_ptr,  # (out, width)
    stride_wk,
    stride_wi,
    rows,
    outputs,
    width,
    out,
    depth,
    dphi_ptr,  # (n, out), or None
    stride_sn,
    stride_sk,
    direction_ptr,  # (n, out), or None
    stride_dn,
    stride_dk,
    partials_ptr,  # (splits, rows, width)
    dots_ptr,  # (splits, rows), or None without a direction
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    ROUNDED: tl.constexpr,
    WIDTH_AK: tl.constexpr,
    WIDTH_BK: tl.constexpr,
    WIDTH_BN: tl.constexpr,
    WIDTH_RN: tl.constexpr,
):
    ACC: tl.constexpr = partials_ptr.dtype.element_ty
    i, j = product_tile(tl.program_id(0), rows, width, BLOCK_M, BLOCK_N)
    split = tl.program_id(1)
    # The examples' rows, one below the other.
    row = i.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = j * BLOCK_N + tl.arange(0, BLOCK_N)
    example, output = row // outputs, row % outputs
    row_offset = example * multiple_of(stride_jn, WIDTH_AK)
    row_offset += output * multiple_of(stride_jo, WIDTH_AK)
    scale_ptrs = None
    if dphi_ptr is not None:
        scale_ptrs = dphi_ptr + example * multiple_of(stride_sn, WIDTH_AK)
    other_ptrs = None
    if direction_ptr is not None:
        other_ptrs = direction_ptr + example * multiple_of(stride_dn, WIDTH_AK)
    # jac_in = (jac * dphi) W,  t = (jac * dphi) direction
    value, dots = corrected_product(
        jac_ptr, row_offset, stride_jk, weight_ptr, stride_wk, stride_wi,
        rows, width, out, split, depth, row, col, None, None, 0,
        scale_ptrs, stride_sk, other_ptrs, stride_dk,
        ACC, BLOCK_K=BLOCK_K, PRECISION=PRECISION, ROUNDED=ROUNDED,
        WIDTH_AM=1, WIDTH_AK=WIDTH_AK, WIDTH_BK=WIDTH_BK, WIDTH_BN=WIDTH_BN,
    )  # fmt: skip
    if dots_ptr is not None:
        dots_ptr += split.to(tl.int64) * rows
        tl.store(dots_ptr + row, dots, mask=row < tl.where(j == 0, rows, 0))
    width = multiple_of(width, WIDTH_RN)
    partials_ptr += split.to(tl.int64) * rows * width
    store_tile(partials_ptr, width, 1, rows, width, row, col, value)


@triton.jit
def _pull_back(
    partials_ptr,  # (splits, n, outputs, width)
    dots_ptr,  # (splits, n, outputs)
    splits,
    n,
    outputs,
    width,
    jac_in_ptr,  # (n, outputs, width)
    pullback_ptr,  # (n, width)
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH_N: tl.constexpr,
):
    """pullback_i = jac_in_i^T t_i, and jac_in itself if it is still in pieces.

    Always in the same order. 2 n outputs width operations, (splits + 1) n outputs width entries."""
    ACC: tl.constexpr = jac_in_ptr.dtype.element_ty
    width = multiple_of(width, WIDTH_N)
    blocks = tl.cdiv(width, BLOCK_N)
    example = (tl.program_id(0) // blocks).to(tl.int64)
    col = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    pulled = tl.zeros((BLOCK_R, BLOCK_N), ACC)
    for start in range(0, outputs, BLOCK_R):
        output = start + tl.arange(0, BLOCK_R)
        row = example * outputs + output
        row_mask = output < outputs
        mask = row_mask[:, None] & (col < width)[None, :]
        at = row[:, None] * width + col[None, :]
        value = tl.load(partials_ptr + at, mask=mask, other=0.0)
        dots = tl.load(dots_ptr + row, mask=row_mask, other=0.0)
        if splits > 1:
            ptrs, dot_ptrs = partials_ptr + at, dots_ptr + row
            for _ in tl.range(1, splits, num_stages=1):
                ptrs += tl.cast(n, tl.int64) * outputs * width
                dot_ptrs += tl.cast(n, tl.int64) * outputs
                value += tl.load(ptrs, mask=mask, other=0.0)
                dots += tl.load(dot_ptrs, mask=row_mask, other=0.0)
            tl.store(jac_in_ptr + at, value, mask=mask)
        pulled += value * dots[:, None]
    tl.store(pullback_ptr + example * width + col, tl.sum(pulled, axis=0), mask=col < width)
