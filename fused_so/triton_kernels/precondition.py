"""The Kronecker-factored step of a linear layer from its ordinary gradient.

One launch for each inverse, a product that makes the rank-1 correction as it loads the gradient,
and one that finishes the rows: scale, and the bias' step. Alpha is read on the device.
2 out in^2 operations for the input's inverse and 2 out^2 in for the output's, each over one read
of the gradient and the inverse; then two passes over out in entries.
"""

import functools

import torch
import triton
import triton.language as tl

from ._matrix import device_guard, dot_precision, load_widths, multiple_of
from ._product import Plan, corrected_product, launch_planned, product_tile, store_tile

# Tile of the pass over the rows: whole rows by one program, so that it can finish the bias. Some
# other shapes spill a register or two under Triton 3.6 or 3.9.
FINISH_ROWS = 8
FINISH_COLUMNS = 64


def precondition(
    grad_weight: torch.Tensor,
    grad_bias: torch.Tensor,
    mean: torch.Tensor,
    input_inverse: torch.Tensor | None,
    *,
    output_inverse: torch.Tensor | None = None,
    alpha: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dw (out, in) and db (out,) of a gradient (out, in), (out,); alpha is a 0-dim tensor."""
    dw, db = mean.new_empty(grad_weight.shape), mean.new_empty(grad_bias.shape)
    out, width = dw.shape
    if out == 0:
        return dw, db
    with device_guard(mean):
        source, corrected = grad_weight[None], False
        if width > 0 and input_inverse is not None:
            # (gw - gb m^T) A
            splittable = output_inverse is None
            source = _multiply(grad_weight, input_inverse, grad_bias, mean, splittable=splittable)
            corrected = True
        if width > 0 and output_inverse is not None:
            if corrected:
                source = _multiply(output_inverse, source[0])
            else:
                # The left factor is the one to be corrected: (gw^T - m gb^T) Go^T.
                source = _multiply(
                    grad_weight.T, output_inverse.T, mean, grad_bias, transposed=True
                )
            corrected = True
        _finish_rows[(triton.cdiv(out, FINISH_ROWS),)](
            source, *source.stride(), len(source), grad_bias, *grad_bias.stride(),
            mean, *mean.stride(), output_inverse, *_strides(output_inverse), alpha, dw, db,
            out, width, CORRECTED=corrected, BLOCK_M=FINISH_ROWS, BLOCK_N=FINISH_COLUMNS,
            WIDTH_N=load_widths(source[0])[1],
        )  # fmt: skip
    return dw, db


def _strides(matrix: torch.Tensor | None) -> tuple[int, int]:
    return (0, 0) if matrix is None else matrix.stride()


def _multiply(a, b, u=None, v=None, *, splittable=True, transposed=False):
    """Partial products (splits, m, n) of (a - u v^T) b, or (splits, n, m) if `transposed`."""
    (m, k), n = a.shape, b.shape[1]
    launch = functools.partial(_launch, a, b, u, v, transposed)
    corrected = u is not None
    return launch_planned(
        "precondition", launch, a, m, n, k, b.dtype, corrected, transposed, splittable=splittable
    )


def _launch(a, b, u, v, transposed: bool, plan: Plan) -> torch.Tensor:
    (m, k), n = a.shape, b.shape[1]
    config, tiles, splits, depth = plan
    partials = b.new_empty((splits, n, m) if transposed else (splits, m, n))
    result = partials.mT if transposed else partials
    (width_am, width_ak), (width_bk, width_bn) = load_widths(a), load_widths(b)
    width_rm, width_rn = load_widths(result[0])
    _product[(tiles, splits)](
        a, *a.stride(), b, *b.stride(), m, n, k, depth,
        u, 0 if u is None else u.stride(0), v, 0 if v is None else v.stride(0),
        result, *result.stride(),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        PRECISION=dot_precision(b.dtype),
        WIDTH_AM=width_am, WIDTH_AK=width_ak, WIDTH_BK=width_bk, WIDTH_BN=width_bn,
        WIDTH_RM=width_rm, WIDTH_RN=width_rn,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return partials


@triton.jit
def _product(
    a_ptr,  # (m, k)
    stride_am,
    stride_ak,
    b_ptr,  # (k, n)
    stride_bk,
    stride_bn,
    m,
    n,
    k,
    depth,
    u_ptr,  # (m,), or None
    stride_u,
    v_ptr,  # (k,)
    stride_v,
    result_ptr,  # (splits, m, n)
    stride_rs,
    stride_rm,
    stride_rn,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH_AM: tl.constexpr,
    WIDTH_AK: tl.constexpr,
    WIDTH_BK: tl.constexpr,
    WIDTH_BN: tl.constexpr,
    WIDTH_RM: tl.constexpr,
    WIDTH_RN: tl.constexpr,
):
    ACC: tl.constexpr = result_ptr.dtype.element_ty
    i, j = product_tile(tl.program_id(0), m, n, BLOCK_M, BLOCK_N)
    split = tl.program_id(1)
    row = i * BLOCK_M + tl.arange(0, BLOCK_M)
    col = j * BLOCK_N + tl.arange(0, BLOCK_N)
    u = None
    if u_ptr is not None:
        u = tl.load(u_ptr + row.to(tl.int64) * stride_u, mask=row < m, other=0.0).to(ACC)
    row_offset = row.to(tl.int64) * multiple_of(stride_am, WIDTH_AK)
    value, _ = corrected_product(
        a_ptr, row_offset, stride_ak, b_ptr, stride_bk, stride_bn, m, n, k, split, depth,
        row, col, u, v_ptr, stride_v, None, 0, None, 0, ACC,
        BLOCK_K=BLOCK_K, PRECISION=PRECISION, ROUNDED=False,
        WIDTH_AM=WIDTH_AM, WIDTH_AK=WIDTH_AK, WIDTH_BK=WIDTH_BK, WIDTH_BN=WIDTH_BN,
    )  # fmt: skip
    m, stride_rn = multiple_of(m, WIDTH_RM), multiple_of(stride_rn, WIDTH_RM)
    n, stride_rm = multiple_of(n, WIDTH_RN), multiple_of(stride_rm, WIDTH_RN)
    result_ptr += split.to(tl.int64) * stride_rs
    store_tile(result_ptr, stride_rm, stride_rn, m, n, row, col, value)


@triton.jit
def _reciprocal(x):
    """1 / x for x > 0. A quotient rounded to nearest is a call, around which registers spill, and
    Triton's faster one of float32 may be two ulp off."""
    r = tl.rsqrt(x) * tl.rsqrt(x)
    # Newton: r <- r + r (1 - x r)
    return tl.fma(r, tl.fma(-x, r, tl.full((), 1.0, x.dtype)), r)


@triton.jit
def _finish_rows(
    source_ptr,  # (splits, out, width): the gradient, or partial products of the step
    stride_ss,
    stride_so,
    stride_si,
    splits,
    bias_ptr,  # (out,)
    stride_b,
    mean_ptr,  # (width,)
    stride_m,
    go_ptr,  # (out, out), or None
    stride_go,
    stride_gi,
    alpha_ptr,  # (), or None
    dw_ptr,  # (out, width)
    db_ptr,  # (out,)
    out,
    width,
    CORRECTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH_N: tl.constexpr,
):
    """4 out width operations, (splits + 1) out width entries and, for Go gb, out^2."""
    ACC: tl.constexpr = dw_ptr.dtype.element_ty
    scale = tl.full((), 1.0, ACC)
    if alpha_ptr is not None:
        scale = _reciprocal(tl.load(alpha_ptr))
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = row < out
    at = row.to(tl.int64)
    bias = tl.load(bias_ptr + at * stride_b, mask=row_mask, other=0.0).to(ACC)
    width, stride_so = multiple_of(width, WIDTH_N), multiple_of(stride_so, WIDTH_N)
    stride_ss = multiple_of(stride_ss, WIDTH_N)

    dot_mean = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for start in range(0, width, BLOCK_N):
        col = tl.arange(0, BLOCK_N).to(tl.int64) + start
        mask = row_mask[:, None] & (col < width)[None, :]
        ptrs = source_ptr + at[:, None] * stride_so + col[None, :] * stride_si
        step = tl.load(ptrs, mask=mask, other=0.0).to(ACC)
        for _ in tl.range(1, splits, num_stages=1):
            ptrs += stride_ss
            step += tl.load(ptrs, mask=mask, other=0.0).to(ACC)
        mean = tl.load(mean_ptr + col * stride_m, mask=col < width, other=0.0)
        if not CORRECTED:
            step -= bias[:, None] * mean[None, :]
        # dW = 1/alpha Go (gw - gb m^T) A
        step *= scale
        tl.store(dw_ptr + at[:, None] * width + col[None, :], step, mask=mask)
        dot_mean += step * mean[None, :]

    if go_ptr is not None:
        dot_bias = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        for start in range(0, out, BLOCK_N):
            k = tl.arange(0, BLOCK_N).to(tl.int64) + start
            mask = row_mask[:, None] & (k < out)[None, :]
            ptrs = go_ptr + at[:, None] * stride_go + k[None, :] * stride_gi
            go = tl.load(ptrs, mask=mask, other=0.0)
            other = tl.load(bias_ptr + k * stride_b, mask=k < out, other=0.0).to(ACC)
            dot_bias += go * other[None, :]
        bias = tl.sum(dot_bias, axis=1)
    # db = 1/alpha Go gb - dW m
    tl.store(db_ptr + at, scale * bias - tl.sum(dot_mean, axis=1), mask=row_mask)
