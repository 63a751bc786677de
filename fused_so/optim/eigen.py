"""Eigendecompositions of covariances that survive what LAPACK does not."""

from __future__ import annotations

import torch
from torch import Tensor


def eigenbasis(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (d,), ascending and not negative, and orthonormal eigenvectors (d, d), columns.

    Where the decomposition fails to converge it is tried once more in float64 on a matrix whose
    diagonal is changed by rounding errors.

    Raises:
        RuntimeError: it fails again.
    """
    try:
        values, vectors = torch.linalg.eigh(covariance)
    except torch.linalg.LinAlgError:
        wide = covariance.double()
        shift = torch.finfo(covariance.dtype).eps * wide.diagonal().abs().amax()
        steps = torch.linspace(0, 1, len(wide), dtype=wide.dtype, device=wide.device)
        values, vectors = torch.linalg.eigh(wide + torch.diag(shift * steps))
        values, vectors = values.to(covariance.dtype), vectors.to(covariance.dtype)
    # Rounding may leave an eigenvalue of a covariance below zero.
    return values.clamp(min=0), vectors
