"""A symmetric product, tile by tile: only the lower triangle is computed, the upper is its mirror.

The covariance sums over rows, the Gram matrix over columns: the same product with the strides
exchanged. Everything here works on one square tile; what happens to it afterwards is the caller's.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ._matrix import multiple_of


class Config(NamedTuple):
    """Tile of the product: BLOCK_M x BLOCK_M of the result, BLOCK_K terms of the sum at a time."""

    block_m: int
    block_k: int
    num_warps: int
    num_stages: int


def triangle_grid(size: int, block: int) -> tuple[int]:
    """One program for each tile on or below the diagonal."""
    tiles = triton.cdiv(size, block)
    return (tiles * (tiles + 1) // 2,)


@triton.jit
def triangle_tile(tile):
    """Position (i, j), j <= i, of a tile counted along the rows: tile = i (i + 1) / 2 + j."""
    i = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) / 2.0).to(tl.int32)
    # The root is rounded: next to a row's first or last tile it may be off by one.
    i = tl.where(i * (i + 1) // 2 > tile, i - 1, i)
    i = tl.where((i + 1) * (i + 2) // 2 <= tile, i + 1, i)
    return i, tile - i * (i + 1) // 2


@triton.jit
def _load_shifted(ptrs, mask, shift, shift_k, ACC: tl.constexpr, SHIFTED: tl.constexpr):
    x = tl.load(ptrs, mask=mask, other=0.0)  # (BLOCK_K, BLOCK_M)
    if shift_k is not None:
        # Past the end of the sum both are 0.
        x = x.to(ACC) - shift_k[:, None]
    if SHIFTED:
        # The subtraction is float32 even for half inputs. Its result is then rounded to the
        # input's type: the same relative error the inputs carry already, independent from entry
        # to entry, and the product stays on the fast half units.
        deviation = x.to(ACC) - shift[None, :]
        if x.dtype == tl.float16:
            # Two float16 numbers can be twice float16's range apart.
            deviation *= 0.5
        # Masked entries were loaded as 0, and 0 - shift is not 0.
        x = tl.where(mask, deviation, 0.0).to(x.dtype)
    return x


@triton.jit
def symmetric_product(
    x_ptr,
    stride_k,
    stride_m,
    size_k,
    size_m,
    row,
    col,
    shift_row,  # (BLOCK_M,), or None unless SHIFTED
    shift_col,
    shift_k_ptr,  # (size_k,), or None
    ACC: tl.constexpr,
    SHIFTED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDTH_K: tl.constexpr,
    WIDTH_M: tl.constexpr,
):
    """acc[r, c] = sum_k (x[k, row_r] - shift_r) (x[k, col_c] - shift_c), (BLOCK_M, BLOCK_M).

    With shift_k, x[k, :] - shift_k takes the place of x[k, :], and halves become float32."""
    size_k, stride_m = multiple_of(size_k, WIDTH_K), multiple_of(stride_m, WIDTH_K)
    size_m, stride_k = multiple_of(size_m, WIDTH_M), multiple_of(stride_k, WIDTH_M)
    k = tl.arange(0, BLOCK_K)
    # An offset can pass 2^31, and so can a stride times the block.
    offset_k = k.to(tl.int64)[:, None] * stride_k  # (BLOCK_K, 1)
    row_ptrs = x_ptr + offset_k + row.to(tl.int64)[None, :] * stride_m  # (BLOCK_K, BLOCK_M)
    col_ptrs = x_ptr + offset_k + col.to(tl.int64)[None, :] * stride_m
    step = tl.cast(stride_k, tl.int64) * BLOCK_K
    row_mask = (row < size_m)[None, :]
    col_mask = (col < size_m)[None, :]

    acc = tl.zeros((row.shape[0], col.shape[0]), ACC)
    for start in range(0, size_k, BLOCK_K):
        k_mask = (k < size_k - start)[:, None]
        shift_k = None
        if shift_k_ptr is not None:
            shift_k = tl.load(shift_k_ptr + start + k, mask=k < size_k - start, other=0.0)
        x_row = _load_shifted(row_ptrs, k_mask & row_mask, shift_row, shift_k, ACC, SHIFTED)
        x_col = _load_shifted(col_ptrs, k_mask & col_mask, shift_col, shift_k, ACC, SHIFTED)
        acc = tl.dot(tl.trans(x_row), x_col, acc, input_precision=PRECISION, out_dtype=ACC)
        row_ptrs += step
        col_ptrs += step
    if SHIFTED and x_ptr.dtype.element_ty == tl.float16:
        acc *= 4.0  # both factors were halved
    return acc


@triton.jit
def tile_pointers(out_ptr, row, col, size, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Pointers to the ROWS x COLS tile of a contiguous (size, size) matrix that begins at (row,
    col) and, entry by entry, to its mirror, which begins at (col, row)."""
    r, c = tl.arange(0, ROWS)[:, None], tl.arange(0, COLS)[None, :]
    # Only the tile's corner needs 64 bits: within a tile 32 do, at half the registers.
    corner = out_ptr + row.to(tl.int64) * size + col
    mirror = out_ptr + col.to(tl.int64) * size + row
    return corner + (r * size + c), mirror + (c * size + r)


@triton.jit
def lower_mask(row, col, size):
    """Entries of a tile in the lower triangle: all of them, except on the diagonal, where the two
    halves of the tile are summed in different orders and need not agree to the bit."""
    # One comparison an entry: rows past the end are moved above every column.
    return tl.where(row < size, row, -1)[:, None] >= col[None, :]
