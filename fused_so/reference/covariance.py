"""Oracle of `fused_so.ops.covariance`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_so._dtypes import accumulate


def covariance(h: Tensor, *, centered: bool = True) -> tuple[Tensor, Tensor]:
    h = accumulate(h)
    n, d = h.shape
    if n == 0:
        return h.new_zeros(d, d), h.new_zeros(d)
    mean = h.mean(0)
    if centered:
        h = h - mean
    cov = h.T @ h / n
    # A BLAS product need not be symmetric to the bit.
    return cov.tril() + cov.tril(-1).T, mean


def covariance_(
    cov: Tensor | Sequence[Tensor],
    mean: Tensor | Sequence[Tensor],
    h: Tensor | Sequence[Tensor],
    *,
    decay: float | Sequence[float],
    centered: bool = True,
) -> Tensor:
    if isinstance(h, Sequence):
        decays = decay if isinstance(decay, Sequence) else [decay] * len(h)
        layers = zip(cov, mean, h, decays, strict=True)
        return torch.stack([covariance_(*x, decay=beta, centered=centered) for *x, beta in layers])
    if h.shape[0] == 0:
        return torch.zeros((), dtype=torch.bool, device=h.device)
    batch_cov, batch_mean = covariance(h, centered=centered)
    accepted = torch.isfinite(accumulate(h).square().sum())

    # decay = 0 must not let a NaN through: 0 * NaN is NaN.
    new_cov, new_mean = batch_cov, batch_mean
    if decay > 0:
        new_cov = decay * cov + (1 - decay) * batch_cov
        new_mean = decay * mean + (1 - decay) * batch_mean
        if centered:
            shift = mean - batch_mean
            new_cov += decay * (1 - decay) * torch.outer(shift, shift)

    cov.copy_(torch.where(accepted, new_cov, cov))
    mean.copy_(torch.where(accepted, new_mean, mean))
    return accepted
