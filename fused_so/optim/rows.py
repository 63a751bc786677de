"""The per-example gradients of linear layers, as the rows of two matrices a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fused_so._dtypes import accumulate
from fused_so.optim.layers import probe
from fused_so.optim.products import outer_sum, vector_times


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
    updates, column = [], coefficients[:, None]
    for g, h, grad_weight, grad_bias in layers:
        delta, offset = outer_sum(accumulate(g) * column, accumulate(h))
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
    probed = _probed(layers)
    if probed.expected.numel() == 1:  # a multiple of any other number
        return None
    scale = (probed.products * probed.expected).sum() / probed.expected.square().sum()
    return scale if _agree(layers, probed, scale).all() else None


def layer_scales(layers: Sequence[Rows]) -> list[Tensor | None]:
    """The same for each layer by itself, all of them with more than one input or a bias."""
    probed = _probed(layers)
    scales = (probed.products * probed.expected).sum(1) / probed.expected.square().sum(1)
    agree = _agree(layers, probed, scales).tolist()
    return [scale if yes else None for scale, yes in zip(scales.unbind(), agree, strict=True)]


class _Probed(NamedTuple):
    """A random vector u times b and times sum_i g_i (h_i, 1)^T, a row a layer.

    A loss may use a weight in other ways, and gradients may have been clipped (c) or changed.
    """

    products: Tensor
    expected: Tensor
    weights: list[Tensor]  # u^T g_i, of which the second is a sum


def _probed(layers: Sequence[Rows]) -> _Probed:
    weights, products, expected = [], [], []
    for g, h, grad_weight, grad_bias in layers:
        g, h = accumulate(g), accumulate(h)
        u = probe(g.shape[1], g.dtype, g.device)
        w = g @ u
        # u^T B and sum_i (u^T g_i) (h_i, 1)
        product, expect = vector_times(u, accumulate(grad_weight)), w @ h
        if grad_bias is not None:
            product = torch.cat([product, torch.dot(u, accumulate(grad_bias))[None]])
            expect = torch.cat([expect, w.sum()[None]])
        weights.append(w)
        products.append(product)
        expected.append(expect)
    return _Probed(pad_sequence(products, True), pad_sequence(expected, True), weights)


def _agree(layers: Sequence[Rows], probed: _Probed, scales: Tensor) -> Tensor:
    """Whether products are scales times what is expected, but for rounding, in each layer."""
    products, expected, weights = probed
    errors = torch.linalg.vector_norm(products - scales[..., None] * expected, dim=1)
    unit = 8 * torch.finfo(errors.dtype).eps * scales.abs()
    agree = errors <= unit * torch.linalg.vector_norm(expected, dim=1)
    if agree.all():
        return agree
    # Sums of n products that nearly cancel are less than their rounding. |w|^T |(h, 1)|, which is
    # at most |w| |(h, 1)|, is not; but it takes a pass over h.
    sizes = torch.stack(torch._foreach_norm([accumulate(layer.h) for layer in layers])).square()
    sizes += sizes.new_tensor([0 if grad_bias is None else len(h) for _, h, _, grad_bias in layers])
    return errors <= unit * sizes.sqrt() * torch.stack(torch._foreach_norm(weights))


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The rows of several calls; those of one call are not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
