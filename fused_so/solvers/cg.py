"""Preconditioned conjugate gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fused_so.solvers._system import (
    Product,
    Progress,
    Solution,
    System,
    check_options,
    normalized,
)

_ROUNDING = 16
"""A curvature of this many eps, relative to the largest one met, is zero."""


@torch.no_grad()
def cg(
    product: Product,
    b: Tensor | Sequence[Tensor],
    *,
    x0: Tensor | Sequence[Tensor] | None = None,
    damping: float = 0.0,
    preconditioner: Product | None = None,
    max_iterations: int = 20,
    tolerance: float = 1e-4,
    progress: float | None = None,
) -> Solution:
    r"""Solves A x = b for a symmetric positive (semi-)definite A.

    Iterates minimize :math:`\phi(x) = \frac12 x^T A x - b^T x` over growing Krylov spaces. All
    tensors of b live in one contiguous vector, so that every vector operation is one call.

    Args:
        product: v -> A v, both a tensor or a list of tensors shaped as b is. What it is given is
            a view into the solver's vectors: read it, do not keep it.
        b: the right-hand side, a tensor or a list of tensors of one dtype on one device. The
            vectors are float32, or float64 for float64.
        x0: where to start, as b is; by default at zero. The start is that multiple of x0 for
            which phi is smallest, which takes no more than the product with x0: an old solution
            of another length does no harm. x0 of negative curvature is not used.
        damping: >= 0; A + damping I takes the place of A.
        preconditioner: r -> M^-1 r, for a symmetric positive definite M close to A; lists as for
            product.
        max_iterations: the largest number of products, that with x0 not counted.
        tolerance: stop when ||b - A x|| <= tolerance ||b||.
        progress: stop also when phi fell by less than this fraction a step over the last
            max(10, 10%) steps (Martens uses 5e-4). None: never.

    Returns:
        A `Solution`. A breakdown raises nothing: see its `status`.

    Raises:
        TypeError, ValueError: an argument, or what product or preconditioner gives, breaks a rule
            above.

    Source: Hestenes and Stiefel 1952; Martens 2010, section 4.4, for `progress`. Waits for the
    device in every iteration, to know whether to stop.
    """
    check_options(max_iterations, tolerance, progress)
    system = System(product, b, preconditioner, damping)
    b, stop = system.b, Progress(progress)
    x, r = torch.zeros_like(b), b.clone()
    norm = b.norm().item()
    if not math.isfinite(norm):
        return Solution(system.solution(x), 0, math.nan, "not_finite")
    if norm == 0:
        return Solution(system.solution(x), 0, 0.0, "converged")
    if x0 is not None and not _start(system, x0, x, r):
        return Solution(system.solution(x), 0, 1.0, "not_finite")

    iterations, largest, length, rz, rr = 0, 0.0, 0.0, 0.0, r.dot(r).item()
    p, q = torch.zeros_like(b), torch.empty_like(b)
    status = "converged" if math.sqrt(rr) <= tolerance * norm else ""
    while not status:
        z = system.precondition(r)
        last, rz = rz, (z.dot(r).item() if system.preconditioned else rr)
        if not rz > 0:
            status = "bad_preconditioner" if math.isfinite(rz) else "not_finite"
            break
        # p = z + beta p, and with it p^T M p, since r is orthogonal to the old p
        beta = rz / last if last else 0.0
        torch.add(z, p, alpha=beta, out=p)
        length = rz + beta * beta * length
        system.product(p, out=q)
        pq = p.dot(q).item()
        if not math.isfinite(pq):
            status = "not_finite"
            break
        curvature = pq / length
        largest = max(largest, abs(curvature))
        if curvature <= _ROUNDING * system.eps * largest:
            tiny = abs(curvature) <= _ROUNDING * system.eps * largest
            status = "singular" if tiny else "indefinite"
            break
        before, step = rr, rz / pq
        rr = r.sub_(q, alpha=step).dot(r).item()
        # b has a part in the null space, along which phi falls for ever.
        if rr > norm * norm and curvature <= system.eps ** (2 / 3) * largest:
            status, rr = "singular", before
            break
        if not math.isfinite(rr):
            status, rr = "not_finite", before
            break
        x.add_(p, alpha=step)
        iterations += 1
        if math.sqrt(rr) <= tolerance * norm:
            status = "converged"
        # phi = x^T (A x - 2 b) / 2 = -x^T (r + b) / 2
        elif progress is not None and stop.stalls(-0.5 * (x.dot(r) + x.dot(b)).item()):
            status = "progress"
        elif iterations == max_iterations:
            status = "max_iterations"
    return Solution(system.solution(x), iterations, math.sqrt(rr) / norm, status)


def _start(system: System, x0: Tensor | Sequence[Tensor], x: Tensor, r: Tensor) -> bool:
    """Sets x = s x0 and r = b - s A x0, with phi(s x0) smallest; False if they are not finite."""
    start, _ = normalized(system.flatten("x0", x0))
    image = system.product(start)
    curvature, slope = start.dot(image).item(), start.dot(system.b).item()
    if not (math.isfinite(curvature) and math.isfinite(slope)):
        return False
    if curvature > 0:
        x.add_(start, alpha=slope / curvature)
        r.sub_(image, alpha=slope / curvature)
    return True
