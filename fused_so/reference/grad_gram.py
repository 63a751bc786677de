"""Oracle of `fused_so.ops.grad_gram`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fused_so._dtypes import accumulate


def grad_gram(
    gs: Sequence[Tensor],
    hs: Sequence[Tensor],
    *,
    centered: bool = False,
    biases: Sequence[bool] | None = None,
) -> Tensor:
    biases = [True] * len(gs) if biases is None else biases
    layer_gram = _up_to_centering if centered else _plain
    gram = sum(
        layer_gram(accumulate(g), accumulate(h), int(bias))
        for g, h, bias in zip(gs, hs, biases, strict=True)
    )
    if centered:
        mean = gram.mean(0)
        gram = gram - (mean[:, None] + mean - mean.mean())
    # A BLAS product need not be symmetric to the bit.
    return gram.tril() + gram.tril(-1).T


def _plain(g: Tensor, h: Tensor, bias: int) -> Tensor:
    return (h @ h.T + bias) * (g @ g.T)


def _up_to_centering(g: Tensor, h: Tensor, bias: int) -> Tensor:
    """`_plain` less terms u_i + u_j, which centering removes: with large means they swamp it.

    With y_i = g_i - c and x_i = h_i - m, the gradient g_i (h_i, 1)^T of an example is
    c (m, 1)^T, the same for all, and c (x_i, 0)^T + y_i (m, 1)^T + y_i (x_i, 0)^T.
    """
    c, m = g.mean(0), h.mean(0)
    y, x = g - c, h - m
    a, b = y @ c, x @ m
    input_gram, output_gram = x @ x.T, y @ y.T
    return (
        (c @ c + a[:, None] + a) * input_gram
        + (m @ m + bias + b[:, None] + b) * output_gram
        + input_gram * output_gram
        + a[:, None] * b
        + b[:, None] * a
    )
