"""Oracle of `fused_so.ops.centered_grad`."""

from __future__ import annotations

from torch import Tensor

from fused_so._dtypes import accumulate


def centered_grad(g: Tensor, h: Tensor, *, centered: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    g, h = accumulate(g), accumulate(h)
    mean = h.sum(0) / max(len(h), 1) if centered else h.new_zeros(h.shape[1])
    return g.T @ (h - mean if centered else h), g.sum(0), mean
