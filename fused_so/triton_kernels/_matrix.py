"""What the kernels share: launch settings for matrices of any strides, sums over columns."""

import math
from collections.abc import Hashable, Sequence
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
# Layers that one launch takes: their addresses are arguments. Fewer leave the rest unused.
LAYERS = 8
# A launch takes the host about 5 us, in which an H200 moves 20 MB (4.3 TB/s, copied). A layer of
# more is longer at work than its launches take, which hide behind that work: joining them gains
# nothing, and one by one their partial products are not all in memory at once. Counted, not
# measured.
JOINED_BYTES = 20 << 20


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


def joined(layers: Sequence[Sequence[torch.Tensor | Hashable]]) -> list[list[int]]:
    """The numbers of the layers that one launch takes together: alike in all but their addresses.

    Each layer is its tensors, and what else they must have in common. Layers are apart in memory:
    their addresses are arguments of the kernel, in tuples of LAYERS, where a stack would be a copy
    for each argument and a table in device memory one from the host. All of a tuple are multiples
    of 16 or none is: Triton compiles a kernel for every pattern of those that are."""
    groups: list[list[int]] = []
    last: dict[tuple, list[int]] = {}
    for i, layer in enumerate(layers):
        kind = tuple(
            (x.dtype, x.shape, x.stride(), x.data_ptr() % 16 == 0)
            if isinstance(x, torch.Tensor)
            else x
            for x in layer
        )
        moved = sum(x.nbytes for x in layer if isinstance(x, torch.Tensor))
        group = last.get(kind)
        if group is None or len(group) == LAYERS or moved > JOINED_BYTES:
            group = last[kind] = []
            groups.append(group)
        group.append(i)
    return groups


def addresses(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...] | None:
    """One argument of each layer of a launch: of one layer, or of LAYERS. None for None."""
    if tensors[0] is None:
        return None
    unused = LAYERS - len(tensors) if len(tensors) > 1 else 0
    return (*tensors, *[tensors[0]] * unused)


@triton.jit
def pick(values, index):
    """values[index]: a tuple can only be indexed by what the compiler knows."""
    picked = values[0]
    for i in tl.static_range(1, len(values)):
        picked = tl.where(index == i, values[i], picked)
    return picked


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
