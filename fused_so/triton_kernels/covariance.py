"""Covariance of the rows of a matrix, and its exponentially weighted update in place.

Two or three launches: column statistics (in two stages when there are many rows), then the
symmetric product. The second reads what the first decided from device memory, so the host never
waits, and no centered copy of h is ever written.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ._autotune import fastest
from ._matrix import (
    SUM_COLUMNS,
    SUM_ROWS,
    addresses,
    column_sums,
    device_guard,
    dot_precision,
    joined,
    load_widths,
    multiple_of,
    pick,
    row_splits,
    sum_of_splits,
)
from ._symmetric import (
    Config,
    lower_mask,
    symmetric_product,
    tile_pointers,
    triangle_grid,
    triangle_tile,
)

# By the type of h, the small tile and, where there is one, the large: what compiles without spills.
# 128 x 128 spills in the epilogue under Triton 3.6, and so does 64 x 64 with four warps. Not yet
# measured on a GPU.
CONFIGS = {
    torch.float64: (Config(block_m=32, block_k=16, num_warps=4, num_stages=3),),
    torch.float32: (
        Config(block_m=32, block_k=32, num_warps=4, num_stages=3),
        Config(block_m=64, block_k=32, num_warps=8, num_stages=3),
    ),
    torch.float16: (
        Config(block_m=32, block_k=32, num_warps=4, num_stages=3),
        Config(block_m=64, block_k=64, num_warps=8, num_stages=4),
    ),
}
CONFIGS[torch.bfloat16] = CONFIGS[torch.float16]
# What the opt-in search tries beside these.
MORE_CONFIGS = {
    torch.float64: (Config(block_m=32, block_k=32, num_warps=4, num_stages=2),),
    torch.float32: (
        Config(block_m=64, block_k=16, num_warps=8, num_stages=4),
        Config(block_m=32, block_k=64, num_warps=4, num_stages=2),
    ),
    torch.float16: (
        Config(block_m=64, block_k=32, num_warps=8, num_stages=4),
        Config(block_m=32, block_k=64, num_warps=4, num_stages=4),
    ),
}
MORE_CONFIGS[torch.bfloat16] = MORE_CONFIGS[torch.float16]


def heuristic_config(d: int, dtype: torch.dtype) -> Config:
    """The large tile where it leaves few processors idle."""
    return CONFIGS[dtype][0 if d <= 512 else -1]


def covariance(h: torch.Tensor, *, centered: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """cov (d, d) and mean (d,) of the rows of h (n, d)."""
    n, d = h.shape
    dtype = torch.promote_types(h.dtype, torch.float32)
    if n == 0:
        return h.new_zeros((d, d), dtype=dtype), h.new_zeros(d, dtype=dtype)
    cov = h.new_empty((d, d), dtype=dtype)
    mean = h.new_empty(d, dtype=dtype)
    with device_guard(h):
        # With decay 0 the update reads neither cov nor mean.
        _update([cov], [mean], [h], decay=0.0, centered=centered, accepted=None)
    return cov, mean


def covariance_(
    cov: torch.Tensor, mean: torch.Tensor, h: torch.Tensor, *, decay: float, centered: bool = True
) -> torch.Tensor:
    """Moves cov (d, d) and mean (d,) towards those of h (n, d), unless h is not finite.

    Returns a 0-dim bool tensor on h's device: whether they were changed."""
    accepted = covariance_list_([cov], [mean], [h], decay=[decay], centered=centered)
    return accepted.reshape(())


def covariance_list_(
    cov: Sequence[torch.Tensor],
    mean: Sequence[torch.Tensor],
    h: Sequence[torch.Tensor],
    *,
    decay: Sequence[float],
    centered: bool = True,
) -> torch.Tensor:
    """The same of many layers, all on one device; whether each was changed, (layers,)."""
    layers = list(zip(cov, mean, h, decay, strict=True))
    groups = joined(layers)
    accepted: list = [None] * len(layers)
    with device_guard(h[0]):
        for group in groups:
            covs, means, hs, (shared, *_) = zip(*(layers[i] for i in group), strict=True)
            n, d = hs[0].shape
            if n == 0 or d == 0:
                taken = hs[0].new_full((len(group),), n > 0, dtype=torch.bool)
            else:
                taken = hs[0].new_empty(len(group), dtype=torch.bool)
                _update(covs, means, hs, decay=shared, centered=centered, accepted=taken)
            if len(groups) == 1:
                return taken
            for i, one in zip(group, taken.unbind(), strict=True):
                accepted[i] = one
        return torch.stack(accepted)


def _update(cov, mean, h, *, decay, centered, accepted):
    """The launches of all ops, on layers of one kind; `accepted` None takes them as they are."""
    n, d = h[0].shape
    if d == 0:
        return
    config = fastest(
        ("covariance", h[0].dtype, centered),
        (n, d, len(h)),
        heuristic_config(d, h[0].dtype),
        (*CONFIGS[h[0].dtype], *MORE_CONFIGS[h[0].dtype]),
        # Tried on memory of its own, and on any batch: one that is refused takes no time.
        lambda config: _launch(
            *([x.new_empty(x.shape) for x in side] for side in (cov, mean)),
            *(h, decay, centered, None, config),
        ),
        h[0].device,
    )
    _launch(cov, mean, h, decay, centered, accepted, config)


def _launch(cov, mean, h, decay, centered, accepted, config: Config):
    (n, d), layers = h[0].shape, len(h)
    rows_per_split, splits = row_splits(n)
    blocks = triton.cdiv(d, SUM_COLUMNS)
    # Rows: the batch mean, the old mean. The product reads the old mean from this copy, so that
    # its tiles on the diagonal may overwrite the original while other tiles are still to come.
    means = cov[0].new_empty((layers, 2, d))
    finite = cov[0].new_empty((layers, blocks), dtype=torch.int32)
    width_n, width_d = load_widths(h[0])

    sums = cov[0].new_empty((layers, splits, 2, d)) if splits > 1 else None
    _sum_columns[(blocks, splits, layers)](
        addresses(h), *h[0].stride(), n, d, rows_per_split, sums, addresses(mean), decay, means,
        finite, BLOCK_N=SUM_ROWS, BLOCK_D=SUM_COLUMNS, WIDTH_N=width_n, WIDTH_D=width_d,
    )  # fmt: skip
    if splits > 1:
        _add_splits[(blocks, layers)](
            sums, splits, n, d, addresses(mean), decay, means, finite,
            BLOCK_S=triton.next_power_of_2(splits), BLOCK_D=SUM_COLUMNS,
        )  # fmt: skip
    _update_product[(*triangle_grid(d, config.block_m), layers)](
        addresses(h), *h[0].stride(), n, d, means, finite, addresses(cov), addresses(mean),
        accepted, decay,
        CENTERED=centered, BLOCKS=triton.next_power_of_2(blocks), BLOCK_D=SUM_COLUMNS,
        BLOCK_M=config.block_m, BLOCK_K=config.block_k, PRECISION=dot_precision(h[0].dtype),
        WIDTH_N=width_n, WIDTH_D=width_d,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


@triton.jit
def _sum_columns(
    h_ptrs,  # (n, d), of each layer
    stride_n,
    stride_d,
    n,
    d,
    rows_per_split,
    sums_ptr,  # (layers, splits, 2, d), or None when there is one split
    mean_ptrs,  # (d,)
    decay: tl.float64,
    means_ptr,  # (layers, 2, d)
    finite_ptr,  # (layers, blocks)
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDTH_N: tl.constexpr,
    WIDTH_D: tl.constexpr,
):
    layer = tl.program_id(2)
    mean_ptr = pick(mean_ptrs, layer)
    ACC: tl.constexpr = mean_ptr.dtype.element_ty
    col = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    split = tl.program_id(1).to(tl.int64)
    first = split * rows_per_split
    last = tl.minimum(first + rows_per_split, n)
    total, squares = column_sums(
        pick(h_ptrs, layer), stride_n, stride_d, d, col, first, last,
        ACC, SQUARES=True, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, WIDTH_N=WIDTH_N, WIDTH_D=WIDTH_D,
    )  # fmt: skip

    if sums_ptr is None:
        _finish_columns(total, squares, col, layer, n, d, mean_ptr, decay, means_ptr, finite_ptr)
    else:
        sums_ptr += (layer.to(tl.int64) * tl.num_programs(1) + split) * 2 * d
        tl.store(sums_ptr + col, total, mask=col < d)
        tl.store(sums_ptr + d + col, squares, mask=col < d)


@triton.jit
def _add_splits(
    sums_ptr,  # (layers, splits, 2, d)
    splits,
    n,
    d,
    mean_ptrs,  # (d,)
    decay: tl.float64,
    means_ptr,  # (layers, 2, d)
    finite_ptr,  # (layers, blocks)
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    layer = tl.program_id(1)
    sums_ptr += layer.to(tl.int64) * splits * 2 * d
    col = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = sum_of_splits(sums_ptr, 2 * d, splits, col, d, BLOCK_S)
    squares = sum_of_splits(sums_ptr + d, 2 * d, splits, col, d, BLOCK_S)
    mean_ptr = pick(mean_ptrs, layer)
    _finish_columns(total, squares, col, layer, n, d, mean_ptr, decay, means_ptr, finite_ptr)


@triton.jit
def _finish_columns(total, squares, col, layer, n, d, mean_ptr, decay, means_ptr, finite_ptr):
    means_ptr += layer.to(tl.int64) * 2 * d
    batch_mean = total / n
    # With decay 0 the old mean may be uninitialized memory, and 0 * NaN is not 0: take 0 for it.
    old = tl.load(mean_ptr + col, mask=(col < d) & (decay != 0.0), other=0.0)
    tl.store(means_ptr + col, batch_mean, mask=col < d)
    tl.store(means_ptr + d + col, old, mask=col < d)
    # By Cauchy and Schwarz the sums of squares bound every entry of the product: when they are
    # finite, so are h, its mean and its covariance. A NaN compares false.
    finite = tl.min((squares < float("inf")).to(tl.int32), axis=0)
    tl.store(finite_ptr + layer * tl.num_programs(0) + tl.program_id(0), finite)


@triton.jit
def _update_product(
    h_ptrs,  # (n, d), of each layer
    stride_n,
    stride_d,
    n,
    d,
    means_ptr,  # (layers, 2, d)
    finite_ptr,  # (layers, blocks)
    cov_ptrs,  # (d, d)
    mean_ptrs,  # (d,)
    accepted_ptr,  # (layers,), or None
    decay: tl.float64,
    CENTERED: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH_N: tl.constexpr,
    WIDTH_D: tl.constexpr,
):
    layer = tl.program_id(1)
    if accepted_ptr is not None:
        block = tl.arange(0, BLOCKS)
        finite_ptr += layer * tl.cdiv(d, BLOCK_D)
        finite = tl.load(finite_ptr + block, mask=block * BLOCK_D < d, other=1)
        accepted = tl.min(finite, axis=0) != 0
        if tl.program_id(0) == 0:
            tl.store(accepted_ptr + layer, accepted)
        if not accepted:
            return

    ACC: tl.constexpr = cov_ptrs[0].dtype.element_ty
    means_ptr += layer.to(tl.int64) * 2 * d
    d = multiple_of(d, WIDTH_D)
    # 1 - decay is taken in float64: in float32 it would lose the digits of a decay close to 1.
    keep = tl.full((), decay, ACC)
    blend = tl.full((), 1.0 - decay, ACC)

    i, j = triangle_tile(tl.program_id(0))
    row = i * BLOCK_M + tl.arange(0, BLOCK_M)
    col = j * BLOCK_M + tl.arange(0, BLOCK_M)
    batch_row = tl.load(means_ptr + row, mask=row < d, other=0.0)  # (BLOCK_M,)
    batch_col = tl.load(means_ptr + col, mask=col < d, other=0.0)

    # C_b = (1/n) sum (h - m_b)(h - m_b)^T
    value = symmetric_product(
        pick(h_ptrs, layer), stride_n, stride_d, n, d, row, col, batch_row, batch_col, None,
        ACC, SHIFTED=CENTERED, BLOCK_K=BLOCK_K, PRECISION=PRECISION,
        WIDTH_K=WIDTH_N, WIDTH_M=WIDTH_D,
    ) * (1.0 / tl.full((), n, ACC))  # fmt: skip
    old_row = tl.load(means_ptr + d + row, mask=row < d, other=0.0)
    old_col = tl.load(means_ptr + d + col, mask=col < d, other=0.0)
    # cov <- decay cov + (1 - decay) (C_b + decay (mean - m_b)(mean - m_b)^T)
    if CENTERED:
        value += keep * (old_row - batch_row)[:, None] * (old_col - batch_col)[None, :]
    lower = lower_mask(row, col, d)  # (BLOCK_M, BLOCK_M)
    cov_ptr = pick(cov_ptrs, layer)
    ptrs, mirror_ptrs = tile_pointers(cov_ptr, i * BLOCK_M, j * BLOCK_M, d, BLOCK_M, BLOCK_M)
    value = blend * value + keep * tl.load(ptrs, mask=lower & (decay != 0.0), other=0.0)
    tl.store(ptrs, value, mask=lower)
    tl.store(mirror_ptrs, value, mask=lower)

    # mean <- decay mean + (1 - decay) m_b
    if i == j:
        tl.store(pick(mean_ptrs, layer) + row, keep * old_row + blend * batch_row, mask=row < d)
