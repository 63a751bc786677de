"""The per-example gradients of linear layers, as the rows of two matrices a layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_so import ops
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
    first = layers[0]
    if len(layers) == 1 and first.h.shape[1] + (first.grad_bias is not None) == 1:
        return None  # one number is a multiple of any other
    scales = _scales(layers, common=True)
    return None if None in scales else scales[0]


def layer_scales(layers: Sequence[Rows]) -> list[Tensor | None]:
    """The same for each layer by itself, all of them with more than one input or a bias."""
    return _scales(layers, common=False)


def _scales(layers: Sequence[Rows], *, common: bool) -> list[Tensor | None]:
    g, h, grad_weight, grad_bias = (
        [x if x is None else accumulate(x) for x in side] for side in zip(*layers, strict=True)
    )
    probes = [probe(x.shape[1], x.dtype, x.device) for x in g]
    scales = ops.row_scales(g, h, grad_weight, grad_bias, probes, common=common)
    known = [not math.isnan(scale) for scale in scales.tolist()]
    scales = scales.to(g[0].dtype).unbind()
    return [scale if yes else None for scale, yes in zip(scales, known, strict=True)]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The rows of several calls; those of one call are not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
