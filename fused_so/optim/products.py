"""Products by the library's own kernels.

On a CPU large ones take half of torch.mm's time where its BLAS has no AVX-512 kernels, three
quarters on a matrix unit, else as long; those of few rows and columns take some microseconds more.
"""

from __future__ import annotations

from torch import Tensor

from fused_so import ops


def outer_sum(g: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """sum_i g_i h_i^T and sum_i g_i, over the rows of g (n, out) and h (n, in)."""
    total_weight, total_bias, _ = ops.centered_grad(g, h, centered=False)
    return total_weight, total_bias


def product(a: Tensor, b: Tensor) -> Tensor:
    """A B, for any two matrices: a sum of outer products, of A's columns with B's rows."""
    return outer_sum(a.T, b)[0]


def rows_times(x: Tensor, matrix: Tensor) -> Tensor:
    """x A, for rows x (n, d) and a symmetric matrix A (d, d)."""
    # The rank-1 correction of `precondition` is not wanted.
    zeros = x.new_zeros(max(x.shape))
    return ops.precondition(x, zeros[: len(x)], zeros[: x.shape[1]], matrix)[0]
