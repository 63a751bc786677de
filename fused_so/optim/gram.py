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
from fused_so.optim.rows import Rows, combined, pulled

_TRIES = 4
MOST_ROWS = 16384
"""An (n, n) matrix of float32 is then 1 GiB, and three of them are alive at once."""


class Step(NamedTuple):
    """A solution Delta.

    Attributes:
        updates: (dW, db) a layer.
        energies: (n,), the squared norms of the columns of U.
        damping: lambda as it was used.
        square: b^T Delta, if it is known without a pass over the parameters; then NaN or Inf
            says that the updates may not be finite.
    """

    updates: list[tuple[Tensor, Tensor | None]]
    energies: Tensor
    damping: Tensor
    square: Tensor | None


def damped_step(
    layers: Sequence[Rows],
    *,
    scales: Tensor,
    damping: float,
    relative_damping: float = 0.0,
    trace: Tensor | None = None,
    mean: Tensor | None = None,
    share: Tensor | None = None,
    waits: bool = True,
    refine: bool = False,
) -> Step:
    r"""(lambda I + C)^-1 b for all layers at once, with C = sum_i u_i u_i^T.

    Args:
        layers: with n rows each, in the same order; b is their grad_weight and grad_bias.
        scales: (n,), what u_i is times g_i (h_i, 1)^T.
        damping, relative_damping, trace: lambda = damping + relative_damping max(tr(C), trace) / n;
            1 in place of 0.
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
        ValueError: n is above MOST_ROWS.
        RuntimeError: if `waits`, where lambda I + K is not positive definite even with lambda
            raised a thousandfold.

    C less m m^T takes no other factorization. With M = lambda I + K, z = M^-1 U^T b and
    w = M^-1 mean, the formula of Sherman and Morrison adds U w (mean^T z) / (lambda mean^T w):
    1 - m^T (lambda I + C)^-1 m is lambda mean^T w, and nothing cancels. So if b is proportional
    to m, as within a batch, centering lengthens the step and does not turn it.
    """
    check_rows(len(scales))
    gram = ops.grad_gram(
        [layer.g for layer in layers],
        [layer.h for layer in layers],
        biases=[layer.grad_bias is not None for layer in layers],
    )
    scales = scales.to(gram.dtype)
    gram = gram.mul_(scales[:, None]).mul_(scales)
    energies = gram.diagonal().clone()
    total = energies.sum() if trace is None else torch.maximum(energies.sum(), trace)
    damped = damping + relative_damping * total / len(scales)
    # Relative to nothing, damping is nothing; without a curvature the step is the gradient.
    damped = torch.where(damped < torch.finfo(damped.dtype).tiny, 1.0, damped)
    right = pulled(layers, scales) if share is None else share.to(gram.dtype)
    columns = right[:, None] if mean is None else torch.stack([right, mean.to(gram.dtype)], 1)
    solved, damped, factor = _solve(gram, damped, columns, waits)
    z = solved[:, 0]
    # U^T (lambda I + U U^T)^-1 b is M^-1 U^T b in either way; with b = U beta it is beta - lambda z
    coefficients = z if share is not None else -z / damped
    if mean is not None:
        w, mean = solved[:, 1], columns[:, 1]
        slope = mean.dot(right - damped * z if share is not None else z)
        coefficients = coefficients + w * (slope / (damped * mean.dot(w)))
    # b^T Delta = beta^T K c; K_ii c_i overflows before Delta does.
    square = None if share is None else right.dot(gram @ coefficients)
    direct = None if share is not None else 1 / damped
    updates = combined(layers, coefficients * scales, direct)
    if refine and share is None:
        residual = _residual(layers, updates, scales, damped)
        z = torch.cholesky_solve(pulled(residual, scales)[:, None], factor)[:, 0]
        more = combined(residual, -z / damped * scales, direct)
        updates = [
            (dw.add_(more_w), None if db is None else db.add_(more_b))
            for (dw, db), (more_w, more_b) in zip(updates, more, strict=True)
        ]
    return Step(updates, energies, damped, square)


def check_rows(n: int, of: str = "", instead: str = "") -> None:
    """Raises where the (n, n) matrix of so many rows would be absurd."""
    if n > MOST_ROWS:
        raise ValueError(
            f"rows must be at most {MOST_ROWS}, of which the step takes an (n, n) matrix, got "
            f"{n}{of}: {4 * n * n / 2**30:.1f} GiB in float32; use smaller batches{instead}"
        )


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
    images = combined(at, pulled(at, scales) * scales, damping)
    return [
        layer._replace(
            grad_weight=accumulate(layer.grad_weight) - dw,
            grad_bias=None if db is None else accumulate(layer.grad_bias) - db,
        )
        for layer, (dw, db) in zip(layers, images, strict=True)
    ]


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
