"""Weight gradient of a linear layer with its input centered, and both column statistics.

And whether a layer's gradient is such a sum over examples at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_so import reference
from fused_so._dtypes import accumulate_dtype
from fused_so.ops import _check
from fused_so.ops._layers import lists_of_layers
from fused_so.ops._registry import define


def centered_grad(g: Tensor, h: Tensor, *, centered: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    r"""Gradient of a linear layer's weight with the layer's input centered.

    .. math:: \sum_i g_i (h_i - m)^T, \qquad \sum_i g_i, \qquad m = \frac1n \sum_i h_i

    Sums over the rows, as autograd does; only m is a mean. With n = 0 all three are zero. If not
    `centered`, m = 0: the first is autograd's gradient, sum_i g_i h_i^T.

    Args:
        g: (n, out), gradients with respect to the layer's output; any strides.
        h: (n, in), the layer's input, same dtype and device; any strides.
        centered: whether m is the mean, or 0.

    Returns:
        grad_weight (out, in), grad_bias (out,), mean (in,); float32, or float64 for float64.

    Raises:
        TypeError: g or h is not a tensor of a floating dtype, or their dtypes differ; centered is
            no bool.
        ValueError: g or h is not a matrix, or their rows or devices differ.

    Source: George 2017, eq. 6.2.4 and Algorithm 3 (centered gradient descent).
    Not differentiable.
    """
    _check.shape("g", g, ("n", "out"))
    _check.shape("h", h, (g.shape[0], "in"))
    _check.same_device("h", h, "g", g)
    _check.same_dtype("h", h, "g", g)
    _check.boolean("centered", centered)
    return _centered_grad(g, h, centered=centered)


def _fake(g, h, *, centered=True):
    dtype = accumulate_dtype(g.dtype)
    out, width = g.shape[1], h.shape[1]
    return (
        g.new_empty((out, width), dtype=dtype),
        g.new_empty((out,), dtype=dtype),
        g.new_empty((width,), dtype=dtype),
    )


_centered_grad = define(
    "centered_grad(Tensor g, Tensor h, *, bool centered=True)"
    " -> (Tensor grad_weight, Tensor grad_bias, Tensor mean)",
    stem="centered_grad",
    reference=reference.centered_grad,
    fake=_fake,
)


def row_scales(
    g: Sequence[Tensor],
    h: Sequence[Tensor],
    grad_weight: Sequence[Tensor],
    grad_bias: Sequence[Tensor | None],
    probes: Sequence[Tensor],
    *,
    common: bool = False,
) -> Tensor:
    r"""c where a layer's gradients are c times the sums of its examples', else NaN.

    .. math:: \nabla_W = c \sum_i g_i h_i^T, \qquad \nabla_b = c \sum_i g_i

    A loss may use a weight in other ways, and gradients may have been clipped (c) or changed. Both
    sides are multiplied by one vector u from the left; they agree if they do so but for rounding,
    weight and bias each by itself, as inputs far from 1 make one of them far larger. With one input
    and no bias, or with a bias alone, each side is one number, and c is always found. Where all
    rows or gradients of the rows are zero there is no c: NaN.

    Args:
        g: a list of (n, out), gradients with respect to each layer's output, all float32 or all
            float64 and on one device, as what follows. A CPU copies what has gaps within its rows.
        h: (n, in), the layers' inputs.
        grad_weight: (out, in).
        grad_bias: (out,), or None for a layer without bias.
        probes: u (out,), any vectors without zeros; best random.
        common: whether c must be one number for all layers: a layer that has another, or makes
            another of it, has NaN.

    Returns:
        (layers,), float64; of no layers (0,).

    Raises:
        TypeError, ValueError: an argument breaks a rule above.

    Source: Freivalds 1977, a product of matrices verified by products with a vector. Not
    differentiable.
    """
    lists = lists_of_layers(g=g, h=h, grad_weight=grad_weight, grad_bias=grad_bias, probes=probes)
    _check.boolean("common", common)
    layers = list(zip(*lists.values(), strict=True))
    given = [x for layer in layers for x in layer if x is not None]
    if not (_check.alike(given) and all([_fit(*layer) for layer in layers])):
        for i, layer in enumerate(layers):
            _check_rows(i, lists["g"][0], *layer)
    if not layers:
        return torch.zeros(0, dtype=torch.float64)
    for i, bias in enumerate(lists["grad_bias"]):
        if bias is None:
            lists["grad_bias"][i] = lists["g"][i].new_zeros(0)
    return _row_scales(*lists.values(), common=common)


def _fit(g, h, grad_weight, grad_bias, probe) -> bool:
    """Whether the shapes of a layer's tensors, some of which may be None, fit together."""
    if g is None or h is None or g.ndim != 2 or h.ndim != 2 or grad_weight is None or probe is None:
        return False
    (n, out), width = g.shape, h.shape[1]
    return (h.shape[0], grad_weight.shape, probe.shape) == (n, (out, width), (out,)) and (
        grad_bias is None or grad_bias.shape == (out,)
    )


def _check_rows(i, first, g, h, grad_weight, grad_bias, probe):
    """Raises if what is given of layer i does not fit together, or not with the `first` g."""
    _check.wide(f"g[{i}]", g)
    _check.shape(f"g[{i}]", g, ("n", "out"))
    n, out = g.shape
    _check.shape(f"h[{i}]", h, (n, "in"))
    others = [
        (f"grad_weight[{i}]", grad_weight, (out, h.shape[1])),
        (f"probes[{i}]", probe, (out,)),
    ]
    if grad_bias is not None:
        others.append((f"grad_bias[{i}]", grad_bias, (out,)))
    for name, value, shape in others:
        _check.shape(name, value, shape)
    for name, value in (
        (f"g[{i}]", g),
        (f"h[{i}]", h),
        *((name, value) for name, value, _ in others),
    ):
        _check.same_dtype(name, value, "g[0]", first)
        _check.same_device(name, value, "g[0]", first)


def _fake_row_scales(g, h, grad_weight, grad_bias, probes, *, common=False):
    return g[0].new_empty(len(g), dtype=torch.float64)


_row_scales = define(
    "row_scales(Tensor[] g, Tensor[] h, Tensor[] grad_weight, Tensor[] grad_bias, Tensor[] probes,"
    " *, bool common=False) -> Tensor",
    stem="centered_grad",
    reference=reference.row_scales,
    fake=_fake_row_scales,
    triton=False,
)
