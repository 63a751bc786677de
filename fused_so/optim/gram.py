r"""The damped step with a covariance of per-example gradients, from their inner products.

With the scaled gradients of n examples as columns of U and K = U^T U (`ops.grad_gram`),

.. math:: (\lambda I + U U^T)^{-1} U \beta = U (\lambda I + K)^{-1} \beta

so that a step with the full matrix takes one Cholesky factorization of (n, n) and one product
g^T diag(w) h a layer. A gradient b that is no such combination takes one product more:

.. math:: (\lambda I + U U^T)^{-1} b = \frac1\lambda (b - U (\lambda I + K)^{-1} U^T b)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fused_so import ops
from fused_so._dtypes import accumulate

_TRIES = 4


class Rows(NamedTuple):
    """A linear layer's examples: i's gradient is g_i (h_i, 1)^T, the 1 if it has a bias.

    grad_weight and grad_bias are what the step is for; a layer without bias has None.
    """

    g: Tensor
    h: Tensor
    grad_weight: Tensor
    grad_bias: Tensor | None


class Step(NamedTuple):
    """(dW, db) a layer, the squared norms of the columns of U, and the damping that was used."""

    updates: list[tuple[Tensor, Tensor | None]]
    energies: Tensor
    damping: Tensor


def damped_step(
    layers: Sequence[Rows],
    *,
    scales: Tensor,
    damping: float,
    relative_damping: float = 0.0,
    mean: Tensor | None = None,
    share: Tensor | None = None,
    waits: bool = True,
    refine: bool = False,
) -> Step:
    r"""(lambda I + C)^-1 b for all layers at once, with C = sum_i u_i u_i^T.

    Args:
        layers: with n rows each, in the same order; b is their grad_weight and grad_bias.
        scales: (n,), what u_i is times g_i (h_i, 1)^T.
        damping, relative_damping: lambda = damping + relative_damping tr(C) / n; 1 in place of 0.
        mean: (n,) of unit length, to subtract m m^T with m = U mean from C. If u_i is
            sqrt(kappa_i) times a gradient, with weights kappa_i that sum to 1, and mean
            sqrt(kappa_i), then C is the covariance of the gradients around their weighted mean.
        share: (n,), beta where b = U beta is known; otherwise the longer way is taken.
        waits: whether a failing factorization may be noticed, which a device is waited for.
        refine: improve a step of the longer way once by its residual, for three products more:
            b - U z cancels, which costs it all but about lambda / ||C|| of its digits. Not with
            mean.

    Returns:
        A `Step`; its updates are not finite if K is not, or if it cannot be factorized.

    Raises:
        RuntimeError: if `waits`, where lambda I + K is not positive definite even with lambda
            raised a thousandfold.

    C less m m^T takes no other factorization. With M = lambda I + K, z = M^-1 U^T b and
    w = M^-1 mean, the formula of Sherman and Morrison adds U w (mean^T z) / (lambda mean^T w):
    1 - m^T (lambda I + C)^-1 m is lambda mean^T w, and nothing cancels. So if b is proportional
    to m, as within a batch, centering lengthens the step and does not turn it.
    """
    gram = ops.grad_gram(
        [layer.g for layer in layers],
        [layer.h for layer in layers],
        biases=[layer.grad_bias is not None for layer in layers],
    )
    scales = scales.to(gram.dtype)
    gram = gram.mul_(scales[:, None]).mul_(scales)
    energies = gram.diagonal().clone()
    damped = damping + relative_damping * energies.mean()
    # Relative to nothing, damping is nothing; without a curvature the step is the gradient.
    damped = torch.where(damped < torch.finfo(damped.dtype).tiny, 1.0, damped)
    right = _pulled(layers, scales) if share is None else share.to(gram.dtype)
    columns = right[:, None] if mean is None else torch.stack([right, mean.to(gram.dtype)], 1)
    solved, damped, factor = _solve(gram, damped, columns, waits)
    z = solved[:, 0]
    # U^T (lambda I + U U^T)^-1 b is M^-1 U^T b in either way; with b = U beta it is beta - lambda z
    coefficients = z if share is not None else -z / damped
    if mean is not None:
        w, mean = solved[:, 1], columns[:, 1]
        slope = mean.dot(right - damped * z if share is not None else z)
        coefficients = coefficients + w * (slope / (damped * mean.dot(w)))
    direct = None if share is not None else 1 / damped
    updates = _combine(layers, coefficients * scales, direct)
    if refine and share is None:
        residual = _residual(layers, updates, scales, damped)
        z = torch.cholesky_solve(_pulled(residual, scales)[:, None], factor)[:, 0]
        more = _combine(residual, -z / damped * scales, direct)
        updates = [
            (dw.add_(more_w), None if db is None else db.add_(more_b))
            for (dw, db), (more_w, more_b) in zip(updates, more, strict=True)
        ]
    return Step(updates, energies, damped)


def _residual(
    layers: Sequence[Rows],
    updates: list[tuple[Tensor, Tensor | None]],
    scales: Tensor,
    damping: Tensor,
) -> list[Rows]:
    """The layers with b - (lambda I + U U^T) Delta in place of b."""
    at = [
        layer._replace(grad_weight=dw, grad_bias=db)
        for layer, (dw, db) in zip(layers, updates, strict=True)
    ]
    images = _combine(at, _pulled(at, scales) * scales, damping)
    return [
        layer._replace(
            grad_weight=accumulate(layer.grad_weight) - dw,
            grad_bias=None if db is None else accumulate(layer.grad_bias) - db,
        )
        for layer, (dw, db) in zip(layers, images, strict=True)
    ]


def _pulled(layers: Sequence[Rows], scales: Tensor) -> Tensor:
    """U^T b: the inner products of the examples' gradients with b."""
    total = torch.zeros_like(scales)
    for g, h, grad_weight, grad_bias in layers:
        # (g_i^T B) h_i
        g, h = accumulate(g), accumulate(h)
        total += torch.linalg.vecdot(g @ accumulate(grad_weight), h)
        if grad_bias is not None:
            total += g @ accumulate(grad_bias)
    return total * scales


def _solve(
    gram: Tensor, damping: Tensor, columns: Tensor, waits: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(damping I + gram)^-1 columns, with ten times the damping where that is not enough; the
    damping, and the Cholesky factor."""
    for attempt in range(_TRIES if waits else 1):
        matrix = gram.clone()
        matrix.diagonal().add_(damping)
        factor, info = torch.linalg.cholesky_ex(matrix)
        solved = torch.cholesky_solve(columns, factor)
        if not waits:
            return torch.where(info == 0, solved, torch.nan), damping, factor
        if info == 0 or not torch.isfinite(gram).all():
            return solved, damping, factor
        if attempt < _TRIES - 1:
            damping = 10 * damping
    raise RuntimeError(
        f"the Gram matrix of the gradients is not positive definite even with damping "
        f"{damping.item():.3g}; raise damping"
    )


def _combine(
    layers: Sequence[Rows], coefficients: Tensor, direct: Tensor | None
) -> list[tuple[Tensor, Tensor | None]]:
    """sum_i c_i g_i (h_i, 1)^T, plus `direct` times the gradients."""
    updates = []
    for g, h, grad_weight, grad_bias in layers:
        g, h = accumulate(g), accumulate(h)
        delta = (g * coefficients[:, None]).T @ h
        offset = None if grad_bias is None else g.T @ coefficients
        if direct is not None:
            delta = delta.addcmul_(accumulate(grad_weight), direct)
            if offset is not None:
                offset = offset.addcmul_(accumulate(grad_bias), direct)
        updates.append((delta, offset))
    return updates


def common_scale(layers: Sequence[Rows]) -> Tensor | None:
    """c with b = c sum_i g_i (h_i, 1)^T, where that is so in every layer; else None.

    A loss may use a weight in other ways, and gradients may have been clipped (c) or changed.
    Both sides are multiplied by a random vector a layer and compared. Waits for the device.
    """
    products, expected, rounding = [], [], []
    for g, h, grad_weight, grad_bias in layers:
        g, h = accumulate(g), accumulate(h)
        generator = torch.Generator().manual_seed(h.shape[1])
        probe = torch.randn(h.shape[1], dtype=h.dtype, generator=generator).to(h.device)
        weights = h @ probe
        products.append(accumulate(grad_weight) @ probe)
        if grad_bias is not None:
            products[-1] = products[-1] + accumulate(grad_bias)
            weights = weights + 1
        expected.append(g.T @ weights)
        # Rounding, in a sum of n products that may nearly cancel.
        rounding.append(8 * torch.finfo(h.dtype).eps * (g.abs().T @ weights.abs()).norm())
    square = sum(e.dot(e) for e in expected)
    scale = sum(p.dot(e) for p, e in zip(products, expected, strict=True)) / square
    off = [
        (p - scale * e).norm() - scale.abs() * r
        for p, e, r in zip(products, expected, rounding, strict=True)
    ]
    return scale if (torch.stack(off) <= 0).all() else None


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The rows of several calls; those of one call are not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)
