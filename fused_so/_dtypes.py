"""The dtype rule of the house: accumulate in float32, or in float64 for float64."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an op accumulates and answers."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def accumulate(x: Tensor) -> Tensor:
    # A conversion to the dtype that x already has costs as much as a small op.
    dtype = accumulate_dtype(x.dtype)
    return x if x.dtype == dtype else x.to(dtype)
