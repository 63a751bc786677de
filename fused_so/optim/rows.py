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
    weight, bias = _probed(layers)
    if weight.expected.numel() == 1 and layers[0].grad_bias is None:
        return None  # one number is a multiple of any other
    scale = (weight.product() + bias.product()).sum() / (weight.square() + bias.square()).sum()
    return scale if all(_agree(layers, weight, bias, scale)) else None


def layer_scales(layers: Sequence[Rows]) -> list[Tensor | None]:
    """The same for each layer by itself, all of them with more than one input or a bias."""
    weight, bias = _probed(layers)
    scales = (weight.product() + bias.product()) / (weight.square() + bias.square())
    agree = _agree(layers, weight, bias, scales)
    return [scale if yes else None for scale, yes in zip(scales.unbind(), agree, strict=True)]


class _Probed(NamedTuple):
    """A random vector u times a part of b, and times the same of sum_i g_i (h_i, 1)^T.

    A loss may use a weight in other ways, and gradients may have been clipped (c) or changed.
    """

    found: Tensor  # (layers, inputs or 1)
    expected: Tensor
    size: Tensor  # (layers,), that of the terms of `expected` if they do not cancel

    def product(self) -> Tensor:
        return (self.found * self.expected).sum(1)

    def square(self) -> Tensor:
        return self.expected.square().sum(1)

    def errors(self, scales: Tensor) -> Tensor:
        return torch.linalg.vector_norm(self.found - scales[..., None] * self.expected, dim=1)


def _probed(layers: Sequence[Rows]) -> tuple[_Probed, _Probed]:
    """That of the weights, and that of the biases, 0 where there is none."""
    weights, found, expected, bias_found, bias_expected = [], [], [], [], []
    for g, h, grad_weight, grad_bias in layers:
        g, h = accumulate(g), accumulate(h)
        u = probe(g.shape[1], g.dtype, g.device)
        w = g @ u
        # u^T B and sum_i (u^T g_i) (h_i, 1)
        weights.append(w)
        found.append(vector_times(u, accumulate(grad_weight)))
        expected.append(w @ h)
        zero = w.new_zeros(1)
        bias_found.append(zero if grad_bias is None else (u @ accumulate(grad_bias))[None])
        bias_expected.append(zero if grad_bias is None else w.sum()[None])
    expected = pad_sequence(expected, True)
    size, bias_size = torch.linalg.vector_norm(expected, dim=1), torch._foreach_norm(weights)
    return (
        _Probed(pad_sequence(found, True), expected, size),
        _Probed(*(torch.stack(x) for x in (bias_found, bias_expected)), torch.stack(bias_size)),
    )


def _agree(layers: Sequence[Rows], weight: _Probed, bias: _Probed, scales: Tensor) -> list[bool]:
    """Whether what was found is scales times what is expected, but for rounding, in each layer.

    Weight and bias each by itself: inputs far from 1 make one of them far larger.
    """
    errors = torch.stack([weight.errors(scales), bias.errors(scales)])
    unit = 8 * torch.finfo(errors.dtype).eps * scales.abs()
    agree = (errors <= unit * torch.stack([weight.size, bias.size])).all(0).tolist()
    if all(agree):
        return agree
    # Sums that nearly cancel are less than their rounding. |g| |(h, 1)| is not, but takes a pass.
    rows = torch.stack(torch._foreach_norm([accumulate(layer.h) for layer in layers]))
    ones = rows.new_tensor([len(layer.h) for layer in layers]).sqrt()
    sizes = torch.stack(torch._foreach_norm([accumulate(layer.g) for layer in layers]))
    return (errors <= unit * sizes * torch.stack([rows, ones])).all(0).tolist()


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The rows of several calls; those of one call are not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
