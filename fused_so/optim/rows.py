"""The per-example gradients of linear layers, as the rows of two matrices a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fused_so._dtypes import accumulate
from fused_so.optim.layers import probe
from fused_so.optim.products import outer_sum


class Rows(NamedTuple):
    """A linear layer's examples: i's gradient is g_i (h_i, 1)^T, the 1 if it has a bias.

    grad_weight and grad_bias are what the step is for; a layer without bias has None.
    """

    g: Tensor
    h: Tensor
    grad_weight: Tensor
    grad_bias: Tensor | None


def pulled(layers: Sequence[Rows], scales: Tensor) -> Tensor:
    """U^T b: the inner products of the examples' gradients with b."""
    total = torch.zeros_like(scales)
    for g, h, grad_weight, grad_bias in layers:
        # (g_i^T B) h_i
        g, h = accumulate(g), accumulate(h)
        total += torch.linalg.vecdot(g @ accumulate(grad_weight), h)
        if grad_bias is not None:
            total += g @ accumulate(grad_bias)
    return total * scales


def combined(
    layers: Sequence[Rows], coefficients: Tensor, direct: Tensor | None
) -> list[tuple[Tensor, Tensor | None]]:
    """sum_i c_i g_i (h_i, 1)^T, plus `direct` times the gradients."""
    updates = []
    for g, h, grad_weight, grad_bias in layers:
        g, h = accumulate(g), accumulate(h)
        delta, offset = outer_sum(g * coefficients[:, None], h)
        if direct is not None:
            delta = delta.addcmul_(accumulate(grad_weight), direct)
            if grad_bias is not None:
                offset = offset.addcmul_(accumulate(grad_bias), direct)
        updates.append((delta, None if grad_bias is None else offset))
    return updates


def common_scale(layers: Sequence[Rows]) -> Tensor | None:
    """c with b = c sum_i g_i (h_i, 1)^T, where that is so in every layer; else None.

    Waits for the device.
    """
    products, expected, rounding = _probed(layers)
    scale = (products * expected).sum() / expected.square().sum()
    return scale if _agree(products, scale * expected, scale * rounding).all() else None


def layer_scales(layers: Sequence[Rows]) -> list[Tensor | None]:
    """The same for each layer by itself."""
    products, expected, rounding = _probed(layers)
    scales = (products * expected).sum(1) / expected.square().sum(1)
    agree = _agree(products, scales[:, None] * expected, scales * rounding).tolist()
    return [scale if yes else None for scale, yes in zip(scales.unbind(), agree, strict=True)]


def _probed(layers: Sequence[Rows]) -> tuple[Tensor, Tensor, Tensor]:
    """b and sum_i g_i (h_i, 1)^T times a random vector, a row a layer, and the second's rounding.

    A loss may use a weight in other ways, and gradients may have been clipped (c) or changed.
    """
    gs, weights, products, expected = [], [], [], []
    for g, h, grad_weight, grad_bias in layers:
        g, h = accumulate(g), accumulate(h)
        x = probe(h.shape[1], h.dtype, h.device)
        # B (x, 1) and sum_i g_i (h_i^T x + 1)
        if grad_bias is None:
            weights.append(h @ x)
            products.append(accumulate(grad_weight) @ x)
        else:
            weights.append(torch.addmv(x.new_ones(len(h)), h, x))
            products.append(torch.addmv(accumulate(grad_bias), accumulate(grad_weight), x))
        gs.append(g)
        expected.append(g.T @ weights[-1])
    # Rounding, in sums of n products that may nearly cancel: |g|^T |w| is at most |g| |w|.
    sizes = torch._foreach_mul(torch._foreach_norm(gs), torch._foreach_norm(weights))
    rounding = 8 * torch.finfo(gs[0].dtype).eps * torch.stack(sizes)
    return pad_sequence(products, True), pad_sequence(expected, True), rounding


def _agree(products: Tensor, expected: Tensor, rounding: Tensor) -> Tensor:
    return torch.linalg.vector_norm(products - expected, dim=1) <= rounding.abs()


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The rows of several calls; those of one call are not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
