"""Inner products of per-example gradients, from two Gram matrices a layer that are never stored.

Many examples make enough tiles of the result to fill a GPU: then one launch makes both products of
every layer tile by tile, multiplies them and adds them up. Few examples do not: then the products
themselves are divided among programs, over layers and pieces of features, and a second launch
multiplies and adds them, always in the same order, so that a result is the same in every run.
Centering adds two launches before and two after.

n^2 (in + out) operations a layer, half of two general products; each side of a layer is read once
for every row of tiles.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._autotune import fastest
from ._matrix import (
    LAYERS,
    SUM_COLUMNS,
    SUM_ROWS,
    column_sums,
    device_guard,
    dot_precision,
    load_widths,
    multiple_of,
    pick,
)
from ._product import ENOUGH_PROGRAMS, MIN_DEPTH
from ._symmetric import (
    Config,
    lower_mask,
    symmetric_product,
    tile_pointers,
    triangle_grid,
    triangle_tile,
)

# Largest tile first, by the type that is multiplied: what compiles without spills under Triton 3.6
# and 3.9. Not yet measured on a GPU.
CONFIGS = {
    torch.float64: (Config(block_m=32, block_k=16, num_warps=4, num_stages=3),),
    torch.float32: (
        Config(block_m=64, block_k=32, num_warps=8, num_stages=2),
        Config(block_m=32, block_k=32, num_warps=4, num_stages=3),
    ),
    torch.float16: (
        Config(block_m=64, block_k=32, num_warps=8, num_stages=4),
        Config(block_m=32, block_k=32, num_warps=4, num_stages=3),
    ),
}
CONFIGS[torch.bfloat16] = CONFIGS[torch.float16]
# The same tiles where one program makes both products: it has two more of them to keep.
WHOLE_CONFIGS = {dtype: list(configs) for dtype, configs in CONFIGS.items()}
WHOLE_CONFIGS[torch.float32][0] = CONFIGS[torch.float32][0]._replace(block_k=16, num_stages=3)
for half in (torch.float16, torch.bfloat16):
    WHOLE_CONFIGS[half][0] = CONFIGS[half][0]._replace(num_stages=3)
# What the opt-in search tries beside these where sums are cut: both products at once spill.
MORE_CONFIGS = {
    torch.float64: (Config(block_m=32, block_k=32, num_warps=4, num_stages=2),),
    torch.float32: (Config(block_m=32, block_k=32, num_warps=4, num_stages=2),),
    torch.float16: (),
}
MORE_CONFIGS[torch.bfloat16] = MORE_CONFIGS[torch.float16]
# Rows of the result that its column sums add at a time: twice as many spill a register.
MEAN_ROWS = 16
# Rows of a tile that one program of the second launch adds up. Tiles are few there.
STRIP = 16


class Plan(NamedTuple):
    """The tile, how many of them there are, and how the sums over features are cut."""

    config: Config
    tiles: int
    depth: int  # features in a piece, or 0 when one program makes both products of all layers
    pieces: int  # of the widest matrix


def plan(n: int, widths: Sequence[int], dtype: torch.dtype) -> Plan:
    """The largest tile that leaves few processors idle, and the fewest pieces that do the same.

    `widths` are those of all matrices of one launch, `dtype` is the type that is multiplied."""
    most = sum(max(1, width // MIN_DEPTH) for width in widths)
    choices = zip(CONFIGS[dtype], WHOLE_CONFIGS[dtype], strict=True)
    for configs in choices:
        (tiles,) = triangle_grid(n, configs[0].block_m)
        if tiles * most >= ENOUGH_PROGRAMS:
            break
    config, whole_config = configs
    # A second launch costs more than a short sum on few processors.
    whole = tiles >= ENOUGH_PROGRAMS or sum(widths) <= 2 * MIN_DEPTH
    return plan_with(whole_config if whole else config, whole, n, widths)


def plan_with(config: Config, whole: bool, n: int, widths: Sequence[int]) -> Plan:
    """The fewest pieces that leave few processors idle with this tile, or none if `whole`."""
    (tiles,) = triangle_grid(n, config.block_m)
    if whole:
        return Plan(config, tiles, 0, 1)
    depth = max(MIN_DEPTH, sum(widths) // triton.cdiv(ENOUGH_PROGRAMS, tiles))
    depth = triton.cdiv(depth, config.block_k) * config.block_k
    return Plan(config, tiles, depth, max(1, triton.cdiv(max(widths), depth)))


def candidates(n: int, dtype: torch.dtype) -> list[tuple[Config, bool]]:
    """What the opt-in search chooses between: a tile, and whether sums stay whole.

    Pieces of many tiles would take far more memory than the result."""
    whole = [(config, True) for config in WHOLE_CONFIGS[dtype]]
    pieces = [(config, False) for config in (*CONFIGS[dtype], *MORE_CONFIGS[dtype])]
    few = (c for c in pieces if triangle_grid(n, c[0].block_m)[0] <= 4 * ENOUGH_PROGRAMS)
    return [*whole, *few]


def grad_gram(
    gs: Sequence[torch.Tensor],
    hs: Sequence[torch.Tensor],
    *,
    centered: bool,
    biases: Sequence[bool],
) -> torch.Tensor:
    """gram (n, n) of the matrices gs (n, out_l) and hs (n, in_l), biases of the layers included."""
    n = gs[0].shape[0]
    gram = gs[0].new_empty((n, n), dtype=torch.promote_types(gs[0].dtype, torch.float32))
    if n == 0:
        return gram
    with device_guard(gram):
        for first in range(0, len(gs), LAYERS):
            chunk = slice(first, first + LAYERS)
            sides = [x for layer in zip(gs[chunk], hs[chunk], strict=True) for x in layer]
            _add_layers(gram, sides, biases[chunk], centered=centered, add=first > 0)
        if centered:
            _center(gram)
    return gram


def _add_layers(gram, sides, biases, *, centered, add):
    """gram = sum of the layers' terms, plus gram if `add`. sides: g and h of each layer."""
    n, count = len(gram), len(sides)
    # The matrices as arguments: pointers, strides of rows and of columns, numbers of columns.
    # Triton 3.6 for AMD cannot choose between a matrix below and one beyond 2 GiB.
    padded = [*sides, *sides[:1] * (2 * LAYERS - count)]
    table = (
        tuple(padded),
        tuple(x.stride(0) for x in padded),
        tuple(x.stride(1) for x in padded),
        tuple(x.shape[1] for x in padded),
    )
    widths_n, widths_d = zip(*(load_widths(x) for x in sides), strict=True)
    unit_stride = all(x.stride(1) == 1 or x.shape[1] <= 1 for x in sides)
    loads = {"WIDTH_N": min(widths_n), "WIDTH_D": min(widths_d), "UNIT_STRIDE": unit_stride}
    bias_mask = sum(bias << layer for layer, bias in enumerate(biases))
    widest = max(x.shape[1] for x in sides)

    means = along = squares = None
    if centered:
        means = gram.new_empty((count, widest))
        along, squares = gram.new_empty((count, n)), gram.new_empty(count)
        _column_means[(max(1, triton.cdiv(widest, SUM_COLUMNS)), count)](
            table, n, means, widest, BLOCK_N=SUM_ROWS, BLOCK_D=SUM_COLUMNS, **loads
        )
        _along_means[(triton.cdiv(n, SUM_ROWS), count)](
            table, n, means, widest, along, squares,
            BLOCK_N=SUM_ROWS, BLOCK_D=SUM_COLUMNS, **loads,
        )  # fmt: skip

    # A deviation from the mean of halves is a float32.
    dtype = gram.dtype if centered else sides[0].dtype
    widths = [x.shape[1] for x in sides]
    planned = plan(n, widths, dtype)
    launch = functools.partial(
        _launch, table, count, bias_mask, means, widest, along, squares, add, dtype, loads
    )
    config, whole = fastest(
        ("grad_gram", sides[0].dtype, centered, count),
        (n, sum(widths)),
        (planned.config, planned.depth == 0),
        candidates(n, dtype),
        # Tried on memory of its own.
        lambda choice: launch(gram.new_empty((n, n)), plan_with(*choice, n, widths)),
        gram.device,
    )
    if (config, whole) != (planned.config, planned.depth == 0):
        planned = plan_with(config, whole, n, widths)
    launch(gram, planned)


def _launch(
    table, count, bias_mask, means, widest, along, squares, add, dtype, loads, gram, plan: Plan
):
    n = len(gram)
    config, tiles, depth, pieces = plan
    tile = {"BLOCK_M": config.block_m, "BLOCK_K": config.block_k}
    launch = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    precision = dot_precision(dtype)
    if depth == 0:
        _layers[(tiles,)](
            table, count // 2, bias_mask, n, means, widest, along, squares, gram,
            ADD=add, PRECISION=precision, **tile, **loads, **launch,
        )  # fmt: skip
        return
    partials = gram.new_empty((count * pieces, tiles, config.block_m, config.block_m))
    _pieces[(tiles, count * pieces)](
        table, n, means, widest, depth, pieces, partials,
        PRECISION=precision, **tile, **loads, **launch,
    )  # fmt: skip
    _add_pieces[(tiles, config.block_m // STRIP)](
        table[3], count // 2, bias_mask, n, depth, pieces, partials, along, squares, gram,
        ADD=add, BLOCK_M=config.block_m, STRIP=STRIP,
    )  # fmt: skip


def _center(gram):
    """gram <- H gram H, in place, with H = I - 1 1^T / n."""
    n, block = len(gram), CONFIGS[gram.dtype][-1].block_m
    means = gram.new_empty(n)
    _gram_means[(triton.cdiv(n, SUM_COLUMNS),)](
        gram, n, means,
        BLOCK_N=MEAN_ROWS, BLOCK_D=SUM_COLUMNS, WIDTH_D=load_widths(gram)[1],
    )  # fmt: skip
    _subtract_means[triangle_grid(n, block)](gram, n, means, BLOCK_M=block, BLOCK_N=1024)


@triton.jit
def _matrix(table, index, UNIT_STRIDE: tl.constexpr):
    """Pointer, strides of rows and of columns, and number of columns of a matrix."""
    stride_d = 1 if UNIT_STRIDE else pick(table[2], index)
    return pick(table[0], index), pick(table[1], index), stride_d, pick(table[3], index)


@triton.jit
def _column_means(
    table,
    n,
    means_ptr,  # (count, widest)
    widest,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDTH_N: tl.constexpr,
    WIDTH_D: tl.constexpr,
    UNIT_STRIDE: tl.constexpr,
):
    """Rounded to the type of the matrices, so that a deviation of halves is exact in float32.

    Which point the deviations are taken from, close to the mean, does not change the result. The
    sums are float64 so that the mean of equal rows is that row, and their deviations are 0."""
    ACC: tl.constexpr = means_ptr.dtype.element_ty
    index = tl.program_id(1)
    x_ptr, stride_n, stride_d, d = _matrix(table, index, UNIT_STRIDE)
    col = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total, _ = column_sums(
        x_ptr, stride_n, stride_d, d, col, 0, n, tl.float64, SQUARES=False,
        BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, WIDTH_N=WIDTH_N, WIDTH_D=WIDTH_D,
    )  # fmt: skip
    mean = (total / n).to(ACC).to(x_ptr.dtype.element_ty).to(ACC)
    tl.store(means_ptr + index.to(tl.int64) * widest + col, mean, mask=col < d)


@triton.jit
def _along_means(
    table,
    n,
    means_ptr,  # (count, widest)
    widest,
    along_ptr,  # (count, n)
    squares_ptr,  # (count,)
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDTH_N: tl.constexpr,
    WIDTH_D: tl.constexpr,
    UNIT_STRIDE: tl.constexpr,
):
    """along_i = m . (x_i - m) and |m|^2, for the mean m of each matrix."""
    ACC: tl.constexpr = means_ptr.dtype.element_ty
    index = tl.program_id(1)
    x_ptr, stride_n, stride_d, d = _matrix(table, index, UNIT_STRIDE)
    d, stride_n = multiple_of(d, WIDTH_D), multiple_of(stride_n, WIDTH_D)
    stride_d = multiple_of(stride_d, WIDTH_N)
    means_ptr += index.to(tl.int64) * widest
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ptrs = x_ptr + row.to(tl.int64)[:, None] * stride_n
    along = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    square = tl.zeros((BLOCK_D,), ACC)
    for start in range(0, d, BLOCK_D):
        col = start + tl.arange(0, BLOCK_D)
        mask = (row < n)[:, None] & (col < d)[None, :]
        x = tl.load(row_ptrs + col.to(tl.int64)[None, :] * stride_d, mask=mask, other=0.0).to(ACC)
        mean = tl.load(means_ptr + col, mask=col < d, other=0.0)
        along += (x - mean[None, :]) * mean[None, :]
        square += mean * mean
    tl.store(along_ptr + index.to(tl.int64) * n + row, tl.sum(along, axis=1), mask=row < n)
    if tl.program_id(0) == 0:
        tl.store(squares_ptr + index, tl.sum(square, axis=0))


@triton.jit
def _gram_tile(
    table,
    index,
    piece,
    depth,
    n,
    means_ptr,  # (count, widest), or None
    widest,
    row,
    col,
    ACC: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH_N: tl.constexpr,
    WIDTH_D: tl.constexpr,
    UNIT_STRIDE: tl.constexpr,
):
    """x x^T of matrix `index`, or of its deviations from the mean.

    Over the piece of features that is number `piece`, or over all of them if that is None."""
    x_ptr, stride_n, stride_d, d = _matrix(table, index, UNIT_STRIDE)
    shift_ptr = None
    if means_ptr is not None:
        shift_ptr = means_ptr + tl.cast(index, tl.int64) * widest
    if piece is not None:
        first = piece.to(tl.int64) * depth
        x_ptr += first * stride_d
        d = tl.minimum(d - first, depth).to(tl.int32)
        if means_ptr is not None:
            shift_ptr += first
    return symmetric_product(
        x_ptr, stride_d, stride_n, d, n, row, col, None, None, shift_ptr,
        ACC, SHIFTED=False, BLOCK_K=BLOCK_K, PRECISION=PRECISION,
        WIDTH_K=WIDTH_D, WIDTH_M=WIDTH_N,
    )  # fmt: skip


@triton.jit
def _layer_term(
    x,
    y,
    layer,
    bias_mask,
    along_ptr,  # (count, n), or None
    squares_ptr,  # (count,)
    n,
    row,
    col,
):
    """What a layer adds to the result, from the tiles x of h h^T and y of g g^T."""
    bias = ((bias_mask >> layer) & 1).to(x.dtype)
    if along_ptr is None:
        # K_ij = (X_ij + 1) Y_ij
        value = (x + bias) * y
    else:
        # With x and y of deviations from the means c of g and m of h, a_i = c . y_i and
        # b_i = m . x_i, g_i (h_i, 1) = c (m, 1) + c (x_i, 0) + y_i (m, 1) + y_i (x_i, 0). Of the
        # inner product of two of these, what H K H removes, which may be far larger than what it
        # leaves, is left out:
        # K_ij = (|c|^2 + a_i + a_j) X_ij + (|m|^2 + 1 + b_i + b_j) Y_ij + X_ij Y_ij
        #        + a_i b_j + a_j b_i
        a_ptr = along_ptr + tl.cast(2 * layer, tl.int64) * n
        b_ptr = a_ptr + n
        a_row = tl.load(a_ptr + row, mask=row < n, other=0.0)[:, None]
        a_col = tl.load(a_ptr + col, mask=col < n, other=0.0)[None, :]
        b_row = tl.load(b_ptr + row, mask=row < n, other=0.0)[:, None]
        b_col = tl.load(b_ptr + col, mask=col < n, other=0.0)[None, :]
        c_square = tl.load(squares_ptr + 2 * layer)
        m_square = tl.load(squares_ptr + 2 * layer + 1) + bias
        value = (c_square + a_row + a_col) * x + (m_square + b_row + b_col + x) * y
        value += a_row * b_col + a_col * b_row
    return value


@triton.jit
def _store_symmetric(gram_ptr, first_row, first_col, row, col, n, value, ADD: tl.constexpr):
    """A tile, or a strip of one, and its mirror; plus what is there already if ADD."""
    lower = lower_mask(row, col, n)
    ptrs, mirror_ptrs = tile_pointers(gram_ptr, first_row, first_col, n, row.shape[0], col.shape[0])
    if ADD:
        value += tl.load(ptrs, mask=lower, other=0.0)
    tl.store(ptrs, value, mask=lower)
    tl.store(mirror_ptrs, value, mask=lower)


@triton.jit(do_not_specialize=["layers", "bias_mask"])
def _layers(
    table,
    layers,
    bias_mask,
    n,
    means_ptr,
    widest,
    along_ptr,
    squares_ptr,
    gram_ptr,  # (n, n)
    ADD: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDTH_N: tl.constexpr,
    WIDTH_D: tl.constexpr,
    UNIT_STRIDE: tl.constexpr,
):
    """Both products of every layer and their elementwise product, one tile a program."""
    ACC: tl.constexpr = gram_ptr.dtype.element_ty
    i, j = triangle_tile(tl.program_id(0))
    row = i * BLOCK_M + tl.arange(0, BLOCK_M)
    col = j * BLOCK_M + tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_M, BLOCK_M), ACC)
    y = tl.zeros((BLOCK_M, BLOCK_M), ACC)
    # g and h in turn: one loop over features in the code, and half the registers of two.
    for index in range(2 * layers):
        value = _gram_tile(
            table, index, None, 0, n, means_ptr, widest, row, col,
            ACC, BLOCK_K, PRECISION, WIDTH_N, WIDTH_D, UNIT_STRIDE,
        )  # fmt: skip
        if index % 2 == 0:
            y = value
        else:
            layer = index // 2
            total += _layer_term(value, y, layer, bias_mask, along_ptr, squares_ptr, n, row, col)
    _store_symmetric(gram_ptr, i * BLOCK_M, j * BLOCK_M, row, col, n, total, ADD)


@triton.jit(do_not_specialize=["pieces"])
def _pieces(
    table,
    n,
    means_ptr,
    widest,
    depth,
    pieces,
    partials_ptr,  # (count * pieces, tiles, BLOCK_M, BLOCK_M)
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDTH_N: tl.constexpr,
    WIDTH_D: tl.constexpr,
    UNIT_STRIDE: tl.constexpr,
):
    """One tile of one product, over one piece of its features."""
    ACC: tl.constexpr = partials_ptr.dtype.element_ty
    tile, item = tl.program_id(0), tl.program_id(1)
    index, piece = item // pieces, item % pieces
    if piece * depth >= pick(table[3], index):
        return
    i, j = triangle_tile(tile)
    row = i * BLOCK_M + tl.arange(0, BLOCK_M)
    col = j * BLOCK_M + tl.arange(0, BLOCK_M)
    value = _gram_tile(
        table, index, piece, depth, n, means_ptr, widest, row, col,
        ACC, BLOCK_K, PRECISION, WIDTH_N, WIDTH_D, UNIT_STRIDE,
    )  # fmt: skip
    r = tl.arange(0, BLOCK_M)
    at = (item.to(tl.int64) * tl.num_programs(0) + tile) * (BLOCK_M * BLOCK_M)
    tl.store(partials_ptr + at + (r[:, None] * BLOCK_M + r[None, :]), value)


@triton.jit
def _sum_of_pieces(partials_ptr, stride, index, widths, depth, pieces, inside):
    """A strip of a tile of the product of matrix `index`."""
    total = tl.zeros(inside.shape, partials_ptr.dtype.element_ty)
    partials_ptr += tl.cast(index * pieces, tl.int64) * stride
    for _ in range(0, pick(widths, index), depth):
        total += tl.load(partials_ptr + inside)
        partials_ptr += stride
    return total


@triton.jit(do_not_specialize=["layers", "bias_mask", "pieces"])
def _add_pieces(
    widths,
    layers,
    bias_mask,
    n,
    depth,
    pieces,
    partials_ptr,  # (count * pieces, tiles, BLOCK_M, BLOCK_M)
    along_ptr,
    squares_ptr,
    gram_ptr,  # (n, n)
    ADD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STRIP: tl.constexpr,
):
    """The sums of the pieces, their elementwise products and the sum of these over the layers."""
    ACC: tl.constexpr = gram_ptr.dtype.element_ty
    tile, strip = tl.program_id(0), tl.program_id(1)
    i, j = triangle_tile(tile)
    first_row, first_col = i * BLOCK_M + strip * STRIP, j * BLOCK_M
    row = first_row + tl.arange(0, STRIP)
    col = first_col + tl.arange(0, BLOCK_M)
    r = strip * STRIP + tl.arange(0, STRIP)
    inside = r[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    size: tl.constexpr = BLOCK_M * BLOCK_M
    partials_ptr += tile.to(tl.int64) * size
    stride = tl.num_programs(0).to(tl.int64) * size
    total = tl.zeros((STRIP, BLOCK_M), ACC)
    for layer in range(layers):
        y = _sum_of_pieces(partials_ptr, stride, 2 * layer, widths, depth, pieces, inside)
        x = _sum_of_pieces(partials_ptr, stride, 2 * layer + 1, widths, depth, pieces, inside)
        total += _layer_term(x, y, layer, bias_mask, along_ptr, squares_ptr, n, row, col)
    _store_symmetric(gram_ptr, first_row, first_col, row, col, n, total, ADD)


@triton.jit
def _gram_means(
    gram_ptr,  # (n, n)
    n,
    means_ptr,  # (n,)
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDTH_D: tl.constexpr,
):
    col = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    total, _ = column_sums(
        gram_ptr, n, 1, n, col, 0, n, tl.float64, SQUARES=False,
        BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, WIDTH_N=1, WIDTH_D=WIDTH_D,
    )  # fmt: skip
    tl.store(means_ptr + col, total / n, mask=col < n)


@triton.jit
def _subtract_means(
    gram_ptr,  # (n, n)
    n,
    means_ptr,  # (n,)
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """K_ij <- K_ij - (mean_i + mean_j - mean of the means)"""
    ACC: tl.constexpr = gram_ptr.dtype.element_ty
    total = tl.zeros((BLOCK_N,), tl.float64)
    for start in range(0, n, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        total += tl.load(means_ptr + at, mask=at < n, other=0.0)
    mean = (tl.sum(total, axis=0) / n).to(ACC)
    i, j = triangle_tile(tl.program_id(0))
    row = i * BLOCK_M + tl.arange(0, BLOCK_M)
    col = j * BLOCK_M + tl.arange(0, BLOCK_M)
    mean_row = tl.load(means_ptr + row, mask=row < n, other=0.0)
    mean_col = tl.load(means_ptr + col, mask=col < n, other=0.0)
    value = mean - (mean_row[:, None] + mean_col[None, :])
    _store_symmetric(gram_ptr, i * BLOCK_M, j * BLOCK_M, row, col, n, value, ADD=True)
