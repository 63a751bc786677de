"""Oracle of `fused_so.ops.centered_grad`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_so._dtypes import accumulate


def centered_grad(g: Tensor, h: Tensor, *, centered: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    g, h = accumulate(g), accumulate(h)
    mean = h.sum(0) / max(len(h), 1) if centered else h.new_zeros(h.shape[1])
    return g.T @ (h - mean if centered else h), g.sum(0), mean


def row_scales(
    g: Sequence[Tensor],
    h: Sequence[Tensor],
    grad_weight: Sequence[Tensor],
    grad_bias: Sequence[Tensor | None],
    probes: Sequence[Tensor],
    *,
    common: bool = False,
) -> Tensor:
    layers = list(zip(g, h, grad_weight, grad_bias, probes, strict=True))
    found, expected = zip(*(_probed(*layer) for layer in layers), strict=True)
    # c = <found, expected> / |expected|^2
    products = torch.stack([f @ e for f, e in zip(found, expected, strict=True)])
    squares = torch.stack([e @ e for e in expected])
    scales = products.sum() / squares.sum() if common else products / squares
    scales = scales.expand(len(layers))
    pairs = zip(layers, found, expected, scales, strict=True)
    agree = torch.stack([_agrees(*pair) for pair in pairs])
    return torch.where(agree, scales, torch.nan)


def _probed(g, h, grad_weight, grad_bias, u) -> tuple[Tensor, Tensor]:
    """u^T (B, b) and sum_i (u^T g_i) (h_i, 1)^T, the bias' entry last; without a bias both 0."""
    g, h, b, u = g.double(), h.double(), grad_weight.double(), u.double()
    w = g @ u
    has_bias = grad_bias is not None and grad_bias.numel() > 0
    bias_found, bias_expected = (u @ grad_bias.double(), w.sum()) if has_bias else u.new_zeros(2)
    return torch.cat([u @ b, bias_found[None]]), torch.cat([w @ h, bias_expected[None]])


def _agrees(layer, found: Tensor, expected: Tensor, scale: Tensor) -> Tensor:
    """Whether found is scale times expected but for rounding, weight and bias each by itself."""
    g, h, grad_weight, _, u = layer
    errors = (found - scale * expected).abs()
    errors = torch.stack([errors[:-1].norm(), errors[-1]])
    unit = 8 * torch.finfo(grad_weight.dtype).eps * scale.abs()
    g, h, u = g.double(), h.double(), u.double()
    sizes = torch.stack([expected[:-1].norm(), (g @ u).norm()])
    # Sums that nearly cancel are less than their rounding; |u| |g| |(h, 1)| is not.
    size = g.norm() * u.norm() / len(u) ** 0.5
    largest = size * torch.stack([h.norm(), h.new_tensor(len(h)).sqrt()])
    return (errors <= unit * sizes).all() | (errors <= unit * largest).all()
