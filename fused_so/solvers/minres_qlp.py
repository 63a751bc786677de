"""MINRES-QLP, for symmetric systems that may be singular or indefinite."""

from __future__ import annotations

import copy
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
"""What is smaller than this many eps, relative to the largest entry met, is zero."""


@torch.no_grad()
def minres_qlp(
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
    r"""Minimizes ||b - A x|| for any symmetric A; of all minimizers, the shortest.

    Iterates minimize the residual over growing Krylov spaces, so that neither a zero nor a
    negative eigenvalue stops them. If A is singular, x is the pseudoinverse's solution, whether b
    is in the range of A or not. All tensors of b live in one contiguous vector, so that every
    vector operation is one call.

    Args:
        product, b, x0, damping, preconditioner, max_iterations, tolerance: as for `cg`, for a
            symmetric A; the preconditioner is positive definite all the same. With it, residual
            and length are those of M^-1/2 A M^-1/2. x0 is scaled so that the residual is
            smallest; what it has in the null space of A stays, and with it x is not the shortest.
        progress: as for `cg`; takes one more vector, and only makes sense for a positive
            semi-definite A.

    Returns:
        A `Solution`; its status is "least_squares" if b is not in the range of A. From the square
        root of the rounding unit on, eigenvalues and rounding look alike: then the iterations
        go on, and the solution before is what counts unless the residual falls below its own by
        more than rounding, which one product more decides.

    Raises:
        TypeError, ValueError: an argument, or what product or preconditioner gives, breaks a rule
            above.

    Source: Choi, Paige and Saunders 2011, with the QLP factorization from the first iteration on
    and x made at the end. Waits for the device in every iteration.
    """
    check_options(max_iterations, tolerance, progress)
    system = System(product, b, preconditioner, damping)
    norm = system.b.norm().item()
    nothing = system.shaped(torch.zeros_like(system.b))
    if not math.isfinite(norm):
        return Solution(nothing, 0, math.nan, "not_finite")
    if norm == 0:
        return Solution(nothing, 0, 0.0, "converged")
    start, r = _start(system, x0)
    if r is None:
        return Solution(nothing, 0, 1.0, "not_finite")
    run = _Run(system, start, r, Progress(progress))
    status = run.begin(tolerance)
    while not status:
        status = run.iterate(tolerance)
        if not status and run.iterations == max_iterations:
            status = "max_iterations"
    run, status = run.best(status)
    return Solution(system.solution(run.x()), run.iterations, run.residual, status)


class _Run:
    """The Lanczos vectors, the factors Q_k T_k P_k = L_k of their matrix, and x = W_k u_k."""

    def __init__(self, system: System, start: Tensor, r: Tensor, stop: Progress):
        self._system, self._stop = system, stop
        self.iterations = 0
        # x = settled + mu_{k-1} w_{k-1} + mu_k w_k: only the last two columns of W_k still turn.
        self._settled = start
        self._w_last, self._w = torch.zeros_like(r), torch.zeros_like(r)
        # z = M v beta and q = v beta with the Lanczos vector v of the norm v^T M v = 1.
        self._z, self._z_last = r, torch.zeros_like(r)
        self._beta = self._beta_last = 0.0
        self._largest = 0.0  # entry of T_k, about the norm of A
        self._length = 0.0  # largest entry met of u_k, about the norm of x
        self._delta = self._epsilon = 0.0
        self._left = (-1.0, 0.0)
        # The last rows of L_k, newest last: its diagonal, the two below it, and L_k u_k = t_k.
        self._gamma, self._theta, self._eta = [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]
        self._tau, self._mu = [0.0, 0.0], [0.0, 0.0, 0.0, 0.0]
        self._residual = r.clone() if stop.epsilon is not None else None
        self._phi = self._norm = 1.0
        # As it would have ended where the residual seemed smallest, and how small ||A r|| was.
        self._ending: _Run | None = None
        self._bar = system.eps**0.5

    @property
    def residual(self) -> float:
        return abs(self._phi) / self._norm

    def x(self) -> Tensor:
        x = self._settled.add(self._w_last, alpha=self._mu[-2])
        return x.add_(self._w, alpha=self._mu[-1])

    def begin(self, tolerance: float) -> str:
        system = self._system
        self._q = system.precondition(self._z)
        square = self._q.dot(self._z).item()
        norm = system.precondition(system.b).dot(system.b).item()
        if not (math.isfinite(square) and math.isfinite(norm)):
            return "not_finite"
        if square < 0 or norm <= 0:
            return "bad_preconditioner"
        self._phi = self._beta = math.sqrt(square)
        self._norm = math.sqrt(norm)
        return "converged" if self.residual <= tolerance else ""

    def iterate(self, tolerance: float) -> str:
        """One more column of T_k, and what to stop for."""
        system, beta_last, beta = self._system, self._beta_last, self._beta
        # beta_{k+1} v_{k+1} = A v_k - alpha_k v_k - beta_k v_{k-1}
        v = self._q / beta
        z = system.product(v)
        alpha = v.dot(z).item()
        z.sub_(self._z, alpha=alpha / beta)
        if beta_last:
            z.sub_(self._z_last, alpha=beta / beta_last)
        q = system.precondition(z)
        square = q.dot(z).item()
        if not (math.isfinite(alpha) and math.isfinite(square)):
            return "not_finite"
        beta_next = math.sqrt(abs(square))
        self._largest = max(self._largest, abs(alpha), beta_next)
        if beta_next <= _ROUNDING * system.eps * self._largest:
            beta_next = 0.0  # the Krylov space is exhausted
        elif square < 0:
            return "bad_preconditioner"
        self._z_last, self._z, self._q = self._z, z, q
        self._beta_last, self._beta = beta, beta_next
        self.iterations += 1
        # ||A r_{k-1}|| over ||r_{k-1}||: if that is nothing beside ||A||, r_{k-1} is smallest.
        c, s = self._left
        root = math.hypot(s * self._delta - c * alpha, c * beta_next)
        if root <= _ROUNDING * system.eps * self._largest:
            self._factor(alpha, beta_next, v, last=True)
            return "least_squares"
        self._foresee(root / self._largest, alpha, beta_next, v)
        self._factor(alpha, beta_next, v)
        if self.residual <= tolerance:
            return "converged"
        return "progress" if self._stalls() else ""

    def _foresee(self, root: float, alpha: float, beta: float, v: Tensor) -> None:
        """Keeps what ending here would give, while ||A r|| falls: later it is rounding's."""
        if root < self._bar:
            self._bar, self._ending = root, None
            ending = copy.copy(self)
            ending._settled, ending._w_last = self._settled.clone(), self._w_last.clone()
            ending._residual = None
            ending._factor(alpha, beta, v.clone(), last=True)
            self._ending = ending
        elif self._ending is not None:
            self._bar = 0.0

    def best(self, status: str) -> tuple[_Run, str]:
        """This run, or the one that would have ended before if the residual fell no further."""
        if self._ending is None or status in ("not_finite", "bad_preconditioner"):
            return self, status
        r = self._system.b - self._system.product(self.x())
        residual = math.sqrt(abs(self._system.precondition(r).dot(r).item()))
        # A fall that A x's rounding alone can make is none.
        rounding = self._system.eps * self._largest * self._length
        if residual + rounding <= abs(self._ending._phi):
            return self, status
        self._ending.iterations = self.iterations
        return self._ending, "least_squares"

    def _factor(self, alpha: float, beta: float, v: Tensor, last: bool = False) -> None:
        """Takes in column k of T_k, (beta_k, alpha_k, beta_{k+1}).

        If it is the last, T_k is singular: u_k ends with the shortest solution's zero.
        """
        # Q_{k-1} on the column's middle two entries, and on the first two of the next one.
        c, s = self._left
        delta, gamma = c * self._delta + s * alpha, s * self._delta - c * alpha
        epsilon, self._epsilon, self._delta = self._epsilon, s * beta, -c * beta
        # Q_k removes beta_{k+1}.
        c, s, gamma = (0.0, 1.0, 0.0) if last else _reflection(gamma, beta)
        # P_{k-2,k} removes epsilon_k, P_{k-1,k} what is left of delta_k; L_k has a new row.
        c2, s2, corner = _reflection(self._gamma[0], epsilon)
        delta, middle = s2 * self._theta[1] - c2 * delta, c2 * self._theta[1] + s2 * delta
        c3, s3, pivot = _reflection(self._gamma[1], delta)
        diagonal = [corner, pivot, c2 * c3 * gamma]
        lower = [self._theta[0], middle, -s3 * c2 * gamma]
        lowest = [*self._eta, s2 * gamma]
        right = [*self._tau, c * self._phi]

        # The last three rows of L_k u_k = t_k, where the diagonal has changed.
        mu = [*self._mu, 0.0]
        for row in range(3):
            known = lowest[row] * mu[row] + lower[row] * mu[row + 1]
            mu[row + 2] = (right[row] - known) / diagonal[row] if diagonal[row] else 0.0
        self._length = max(self._length, *map(abs, mu[2:]))
        self._left, self._mu, self._phi = (c, s), mu[1:], s * self._phi
        self._gamma, self._theta, self._eta = diagonal[1:], lower[1:], lowest[1:]
        self._tau = right[1:]
        if self._residual is not None:
            # r_k = s_k^2 r_{k-1} - phi_k c_k v_{k+1}
            self._residual.mul_(s * s)
            if beta:
                self._residual.sub_(self._z, alpha=self._phi * c / beta)

        # W_k = V_k P_k; w_{k-2} turns for the last time.
        self._settled.add_(self._w_last, alpha=mu[2] * c2).add_(v, alpha=mu[2] * s2)
        turned = self._w_last.mul_(s2).sub_(v, alpha=c2)
        self._w_last = torch.mul(self._w, c3, out=v).add_(turned, alpha=s3)
        self._w = turned.mul_(-c3).add_(self._w, alpha=s3)

    def _stalls(self) -> bool:
        if self._residual is None:
            return False
        x = self.x()
        # phi = x^T (A x - 2 b) / 2 = -x^T (r + b) / 2
        return self._stop.stalls(-0.5 * (x.dot(self._residual) + x.dot(self._system.b)).item())


def _start(system: System, x0: Tensor | Sequence[Tensor] | None) -> tuple[Tensor, Tensor | None]:
    """s x0 and r = b - s A x0, which is smallest; None for r if they are not finite."""
    if x0 is None:
        return torch.zeros_like(system.b), system.b.clone()
    start, _ = normalized(system.flatten("x0", x0))
    image = system.product(start)
    weighted = system.precondition(image)
    square, slope = image.dot(weighted).item(), system.b.dot(weighted).item()
    if not (math.isfinite(square) and math.isfinite(slope)):
        return start.zero_(), None
    scale = slope / square if square > 0 else 0.0
    return start.mul_(scale), system.b.sub(image, alpha=scale)


def _reflection(a: float, b: float) -> tuple[float, float, float]:
    """c, s and r >= 0 with [[c, s], [s, -c]] (a, b)^T = (r, 0)^T."""
    r = math.hypot(a, b)
    return (a / r, b / r, r) if r else (1.0, 0.0, 0.0)
