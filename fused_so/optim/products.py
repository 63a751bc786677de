"""Products by the library's own kernels.

On a CPU large ones take half of torch.mm's time where its BLAS has no AVX-512 kernels, three
quarters on a matrix unit, else as long; those of few rows and columns take some microseconds more.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_so import ops

_LARGE = 1 << 16  # entries of a matrix whose product with a vector is worth several threads
_BAG = 32  # rows that one thread adds up at a time


def outer_sum(g: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """sum_i g_i h_i^T and sum_i g_i, over the rows of g (n, out) and h (n, in)."""
    total_weight, total_bias, _ = ops.centered_grad(g, h, centered=False)
    return total_weight, total_bias


def product(a: Tensor, b: Tensor) -> Tensor:
    """A B, for any two matrices: a sum of outer products, of A's columns with B's rows."""
    return outer_sum(a.T, b)[0]


def vector_times(x: Tensor, matrix: Tensor) -> Tensor:
    """x^T A, for a vector x (n,) and a matrix A (n, d), on a CPU."""
    # torch's products with a vector take one thread, and so a large matrix slower than memory
    # gives it; a weighted sum of embeddings is the same, and in float32 takes them all.
    large = matrix.dtype == torch.float32 and matrix.numel() >= _LARGE
    if not (large and matrix.is_contiguous()):
        return x @ matrix
    rows, bags = _bags(len(x))
    return F.embedding_bag(rows, matrix, bags, mode="sum", per_sample_weights=x).sum(0)


@functools.cache
def _bags(n: int) -> tuple[Tensor, Tensor]:
    """The numbers of n rows, and of those that begin a bag."""
    return torch.arange(n), torch.arange(0, n, _BAG)


def rows_times(x: Tensor, matrix: Tensor) -> Tensor:
    """x A, for rows x (n, d) and a symmetric matrix A (d, d)."""
    # The rank-1 correction of `precondition` is not wanted.
    zeros = x.new_zeros(max(x.shape))
    return ops.precondition(x, zeros[: len(x)], zeros[: x.shape[1]], matrix)[0]
