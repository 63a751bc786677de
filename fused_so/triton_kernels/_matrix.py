"""What the kernels share: launch settings for matrices of any strides, sums over columns."""

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

# Tile of the column sums, and how the rows are divided among programs: enough programs to fill a
# GPU, few enough partial sums that one program adds them up. Nothing depends on the device or on
# timing, so neither does the result.
SUM_ROWS = 32
SUM_COLUMNS = 64
MIN_ROWS_PER_SPLIT = 256
MAX_SPLITS = 64


def row_splits(n: int) -> tuple[int, int]:
    """How many rows one program sums, and how many programs that makes."""
    rows_per_split = max(MIN_ROWS_PER_SPLIT, triton.cdiv(n, MAX_SPLITS))
    return rows_per_split, triton.cdiv(n, rows_per_split)


def device_guard(x: torch.Tensor) -> AbstractContextManager:
    """Makes x's device the current one: Triton launches on the current device, not on x's."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def float32_precision() -> str:
    """`torch.get_float32_matmul_precision()`, also where the setting it has made way for is used.

    After `torch.backends.cuda.matmul.fp32_precision = "tf32"` PyTorch raises instead of answering.
    """
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "high" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "highest"


def dot_precision(dtype: torch.dtype) -> str:
    """What `tl.dot` makes of its operands so that float32 follows PyTorch's global setting."""
    # AMD has no three-product TF32, and TF32 itself on one generation only.
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    # Three TF32 products have float32's accuracy at several times the rate of the FP32 units.
    return "tf32x3" if float32_precision() == "highest" else "tf32"


def load_widths(x: torch.Tensor) -> tuple[int, int]:
    """For each axis of the matrix x, how many neighbours along it one 16-byte load may take.

    Triton finds out by itself only about sizes and strides that are multiples of 16. A layer of
    1000 or 500 units would load entry by entry, and its half inputs not even asynchronously."""
    (rows, cols), (row_stride, col_stride) = x.shape, x.stride()
    widest = 16 // x.element_size()
    return (
        math.gcd(widest, rows, col_stride) if row_stride == 1 else 1,
        math.gcd(widest, cols, row_stride) if col_stride == 1 else 1,
    )


@triton.jit
def multiple_of(x, WIDTH: tl.constexpr):
    """x, which is a multiple of WIDTH, in a form in which the compiler can see that it is."""
    return x // WIDTH * WIDTH


@triton.jit
def column_sums(
    x_ptr,  # (n, d)
    stride_n,
    stride_d,
    d,
    col,
    first,
    last,
    ACC: tl.constexpr,
    SQUARES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDTH_N: tl.constexpr,
    WIDTH_D: tl.constexpr,
):
    """Sums over rows first to last of x, and of x^2 if SQUARES, for columns col, (BLOCK_D,).

    BLOCK_N running sums a column, then a tree: the error grows with the rows of one of them."""
    d = multiple_of(d, WIDTH_D)
    stride_d, stride_n = multiple_of(stride_d, WIDTH_N), multiple_of(stride_n, WIDTH_D)
    col_ptrs = x_ptr + col.to(tl.int64) * stride_d
    total = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    squares = tl.zeros((BLOCK_N, BLOCK_D), ACC)
    for start in range(first, last, BLOCK_N):
        row = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask = (row < last)[:, None] & (col < d)[None, :]
        x = tl.load(col_ptrs[None, :] + row[:, None] * stride_n, mask=mask, other=0.0).to(ACC)
        total += x
        if SQUARES:
            squares += x * x
    return tl.sum(total, axis=0), tl.sum(squares, axis=0)


@triton.jit
def sum_of_splits(sums_ptr, stride, splits, col, d, BLOCK_S: tl.constexpr):
    """The total of the sums that `splits` programs left `stride` apart, for columns col."""
    split = tl.arange(0, BLOCK_S)
    mask = (split < splits)[:, None] & (col < d)[None, :]
    ptrs = sums_ptr + split.to(tl.int64)[:, None] * stride + col[None, :]  # (BLOCK_S, columns)
    return tl.sum(tl.load(ptrs, mask=mask, other=0.0), axis=0)
