"""The Kronecker-factored step of a linear layer from its ordinary gradient.

One launch for each inverse, a product that makes the rank-1 correction as it loads the gradient,
and one that finishes the rows: scale, and the bias' step. Alpha is read on the device.
2 out in^2 operations for the input's inverse and 2 out^2 in for the output's, each over one read
of the gradient and the inverse; then two passes over out in entries.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ._matrix import (
    addresses,
    device_guard,
    dot_precision,
    joined,
    load_widths,
    multiple_of,
    pick,
)
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
    with device_guard(mean):
        layer = grad_weight, grad_bias, mean, input_inverse, output_inverse
        ((dw, db),) = _steps([layer], alpha)
    return dw, db


def precondition_list(
    grad_weight: Sequence[torch.Tensor],
    grad_bias: Sequence[torch.Tensor],
    mean: Sequence[torch.Tensor],
    input_inverse: Sequence[torch.Tensor] | None,
    *,
    output_inverse: Sequence[torch.Tensor] | None = None,
    alpha: Sequence[torch.Tensor] | None = None,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The same of many layers, each in its place, all on one device."""
    count = len(grad_weight)
    options = (input_inverse, output_inverse, alpha)
    options = ([None] * count if given is None else given for given in options)
    entries = zip(grad_weight, grad_bias, mean, *options, strict=True)
    layers = [layer for *layer, _ in entries]
    dws: list = [None] * count
    dbs: list = [None] * count
    with device_guard(mean[0]):
        for group in joined(layers):
            alphas = None if alpha is None else [alpha[i] for i in group]
            if alphas is not None:
                # Parts of one tensor, as they often are, would differ in alignment.
                alphas = alphas[0] if len(group) == 1 else torch.stack(alphas)
            for i, step in zip(group, _steps([layers[i] for i in group], alphas), strict=True):
                dws[i], dbs[i] = step
    return dws, dbs


def inner_products(x: Sequence[torch.Tensor], y: Sequence[torch.Tensor]) -> torch.Tensor:
    """torch's own dots, in the dtype: one read of both binds."""
    dots = [torch.dot(a.reshape(-1), b.reshape(-1)) for a, b in zip(x, y, strict=True)]
    return torch.stack(dots).double()


def _steps(layers: list[tuple], alphas: torch.Tensor | None) -> list[tuple]:
    """(dw, db) of layers that one launch can take; alphas, if any, is one number a layer."""
    gw, gb, mean, a, go = (list(side) for side in zip(*layers, strict=True))
    dw = [m.new_empty(w.shape) for m, w in zip(mean, gw, strict=True)]
    db = [m.new_empty(b.shape) for m, b in zip(mean, gb, strict=True)]
    out, width = dw[0].shape
    if out == 0:
        return list(zip(dw, db, strict=True))
    source, corrected = [w[None] for w in gw], False
    if width > 0 and a[0] is not None:
        # (gw - gb m^T) A
        source = _multiply(gw, a, gb, mean, splittable=go[0] is None)
        corrected = True
    if width > 0 and go[0] is not None:
        if corrected:
            source = _multiply(go, [step[0] for step in source])
        else:
            # The left factor is the one to be corrected: (gw^T - m gb^T) Go^T.
            flipped = ([x.T for x in side] for side in (gw, go))
            # With a stride to keep, a register of several layers' product spills (Triton 3.9).
            bias = [b.contiguous() for b in gb]
            source = _multiply(*flipped, mean, bias, transposed=True)
        corrected = True
    # The addresses of many layers take registers, of which float64 leaves too few.
    few = len(layers) > 1 and dw[0].dtype == torch.float64
    columns = FINISH_COLUMNS // 4 if few else FINISH_COLUMNS
    _finish_rows[(triton.cdiv(out, FINISH_ROWS), len(layers))](
        addresses(source), *source[0].stride(), len(source[0]), addresses(gb), *gb[0].stride(),
        addresses(mean), *mean[0].stride(), addresses(go), *_strides(go[0], 2), alphas,
        addresses(dw), addresses(db), out, width,
        CORRECTED=corrected, BLOCK_M=FINISH_ROWS, BLOCK_N=columns,
        WIDTH_N=load_widths(source[0][0])[1],
    )  # fmt: skip
    return list(zip(dw, db, strict=True))


def _strides(x: torch.Tensor | None, axes: int) -> tuple[int, ...]:
    return (0,) * axes if x is None else x.stride()


def _multiply(a, b, u=None, v=None, *, splittable=True, transposed=False):
    """Of each layer partial products (splits, m, n) of (a - u v^T) b, or their transposes."""
    (m, k), n = a[0].shape, b[0].shape[1]
    corrected = u is not None
    none = [None] * len(a)
    launch = functools.partial(_launch, a, b, u or none, v or none, transposed)
    return launch_planned(
        "precondition", launch, a[0], m, n, k, b[0].dtype, corrected, transposed,
        splittable=splittable,
    )  # fmt: skip


def _launch(a, b, u, v, transposed: bool, plan: Plan) -> list[torch.Tensor]:
    (m, k), n = a[0].shape, b[0].shape[1]
    config, tiles, splits, depth = plan
    shape = (splits, n, m) if transposed else (splits, m, n)
    # Not parts of one tensor, which would differ in alignment.
    partials = [b[0].new_empty(shape) for _ in a]
    result = [x.mT if transposed else x for x in partials]
    (width_am, width_ak), (width_bk, width_bn) = load_widths(a[0]), load_widths(b[0])
    width_rm, width_rn = load_widths(result[0][0])
    _product[(tiles, splits, len(a))](
        addresses(a), *a[0].stride(), addresses(b), *b[0].stride(), m, n, k, depth,
        addresses(u), *_strides(u[0], 1), addresses(v), *_strides(v[0], 1),
        addresses(result), *result[0].stride(),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        PRECISION=dot_precision(b[0].dtype),
        WIDTH_AM=width_am, WIDTH_AK=width_ak, WIDTH_BK=width_bk, WIDTH_BN=width_bn,
        WIDTH_RM=width_rm, WIDTH_RN=width_rn,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return partials


@triton.jit
def _product(
    a_ptrs,  # (m, k), of each layer
    stride_am,
    stride_ak,
    b_ptrs,  # (k, n)
    stride_bk,
    stride_bn,
    m,
    n,
    k,
    depth,
    u_ptrs,  # (m,), or None
    stride_u,
    v_ptrs,  # (k,), or None
    stride_v,
    result_ptrs,  # (splits, m, n)
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
    i, j = product_tile(tl.program_id(0), m, n, BLOCK_M, BLOCK_N)
    split, layer = tl.program_id(1), tl.program_id(2)
    ACC: tl.constexpr = result_ptrs[0].dtype.element_ty
    row = i * BLOCK_M + tl.arange(0, BLOCK_M)
    col = j * BLOCK_N + tl.arange(0, BLOCK_N)
    u = None
    v_ptr = None
    if u_ptrs is not None:
        u_ptr, v_ptr = pick(u_ptrs, layer), pick(v_ptrs, layer)
        u = tl.load(u_ptr + row.to(tl.int64) * stride_u, mask=row < m, other=0.0).to(ACC)
    row_offset = row.to(tl.int64) * multiple_of(stride_am, WIDTH_AK)
    value, _ = corrected_product(
        pick(a_ptrs, layer), row_offset, stride_ak, pick(b_ptrs, layer), stride_bk, stride_bn,
        m, n, k, split, depth, row, col, u, v_ptr, stride_v, None, 0, None, 0, ACC,
        BLOCK_K=BLOCK_K, PRECISION=PRECISION, ROUNDED=False,
        WIDTH_AM=WIDTH_AM, WIDTH_AK=WIDTH_AK, WIDTH_BK=WIDTH_BK, WIDTH_BN=WIDTH_BN,
    )  # fmt: skip
    m, stride_rn = multiple_of(m, WIDTH_RM), multiple_of(stride_rn, WIDTH_RM)
    n, stride_rm = multiple_of(n, WIDTH_RN), multiple_of(stride_rm, WIDTH_RN)
    result_ptr = pick(result_ptrs, layer) + split.to(tl.int64) * stride_rs
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
    source_ptrs,  # (splits, out, width), of each layer: gradient, or partial products of the step
    stride_ss,
    stride_so,
    stride_si,
    splits,
    bias_ptrs,  # (out,)
    stride_b,
    mean_ptrs,  # (width,)
    stride_m,
    go_ptrs,  # (out, out), or None
    stride_go,
    stride_gi,
    alpha_ptr,  # (layers,), or None
    dw_ptrs,  # (out, width)
    db_ptrs,  # (out,)
    out,
    width,
    CORRECTED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH_N: tl.constexpr,
):
    """4 out width operations, (splits + 1) out width entries and, for Go gb, out^2."""
    layer = tl.program_id(1)
    source_ptr, bias_ptr = pick(source_ptrs, layer), pick(bias_ptrs, layer)
    mean_ptr, dw_ptr = pick(mean_ptrs, layer), pick(dw_ptrs, layer)
    ACC: tl.constexpr = dw_ptr.dtype.element_ty
    scale = tl.full((), 1.0, ACC)
    if alpha_ptr is not None:
        scale = _reciprocal(tl.load(alpha_ptr + layer))
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

    if go_ptrs is not None:
        go_ptr = pick(go_ptrs, layer)
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
    tl.store(pick(db_ptrs, layer) + at, scale * bias - tl.sum(dot_mean, axis=1), mask=row_mask)
