"""Weight gradient of a linear layer with its input centered, and both column statistics."""

from __future__ import annotations

from torch import Tensor

from fused_so import reference
from fused_so._dtypes import accumulate_dtype
from fused_so.ops import _check
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
