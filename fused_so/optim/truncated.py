"""The truncated-Newton step of `NaturalGradient`: a solver, and products with the metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_so.likelihoods import Likelihood
from fused_so.optim.base import Update, check_count, check_number, squared_norm
from fused_so.optim.batches import Batch, Watch
from fused_so.optim.metric import Metric
from fused_so.optim.solved import NOT_FINITE, Solved
from fused_so.solvers import Solution, cg, minres_qlp

_SOLVERS = {"cg": cg, "minres_qlp": minres_qlp}
_UNUSABLE = ("singular", "bad_preconditioner", "not_finite")


class TruncatedSteps:
    """Solves (G + damping I) x = p.grad by the named solver, with its options.

    With `warm_start` it begins at the last solution, which the state of every parameter keeps.
    """

    def __init__(
        self,
        watch: Watch,
        likelihood: Likelihood,
        metric: str,
        solver: str,
        *,
        max_iterations: int,
        tolerance: float,
        progress: float | None,
        preconditioner: Callable[[list[Tensor]], list[Tensor]] | None,
        warm_start: bool,
    ):
        self._warm_start = warm_start
        self._product: Metric | None = None
        self._watch, self._likelihood, self._metric = watch, likelihood, metric
        self._solve = _SOLVERS[solver]
        self._options = {
            "max_iterations": max_iterations,
            "tolerance": tolerance,
            "progress": progress,
            "preconditioner": preconditioner,
        }

    @staticmethod
    def check(max_iterations: Any, tolerance: Any, progress: Any, preconditioner: Any) -> None:
        """Raises on an option out of range."""
        check_count("max_iterations", max_iterations)
        check_number("tolerance", tolerance, 0.0)
        if progress is not None:
            check_number("progress", progress, 0.0)
        if preconditioner is not None and not callable(preconditioner):
            raise TypeError(f"preconditioner must be callable, got {type(preconditioner).__name__}")

    def adopt(self, names: Mapping[Tensor, str]) -> None:
        self._names = names

    def forget(self) -> None:
        self._product = None

    def remove_hooks(self) -> None:
        """There are none."""

    def solve(
        self,
        params: Sequence[Tensor],
        batches: Sequence[Batch],
        examples: int | None,
        damping: float,
        state: Mapping[Tensor, dict[str, Any]],
    ) -> Solved:
        names = [self._names[p] for p in params]
        product = self._product = Metric(
            self._watch, names, params, self._likelihood, self._metric, batches, examples
        )
        gradients = [p.grad for p in params]
        last = [state[p].get("solution") if self._warm_start else None for p in params]
        start = None if any(x is None for x in last) else last
        solution = self._solve(product, gradients, x0=start, damping=damping, **self._options)
        slope = squared_norm([Update(p, x) for p, x in zip(params, solution.x, strict=True)])
        failure = _failure_of(solution, slope)
        if failure is None and self._warm_start:
            for p, x in zip(params, solution.x, strict=True):
                state[p]["solution"] = x
        return Solved(solution.x, slope, failure, solution)

    def curvature(self, step: Mapping[Tensor, Tensor]) -> Tensor:
        """v^T G v with the metric of the last solution, which is given up with it."""
        product, self._product = self._product, None
        v = list(step.values())
        pairs = zip(v, product(v), strict=True)
        return torch.stack([torch.sum(a.double() * image) for a, image in pairs]).sum()


def _failure_of(solution: Solution, slope: Tensor) -> str | None:
    """Why the solution cannot be used; "" if it is zero as it should be."""
    if math.isnan(solution.residual):
        return NOT_FINITE
    if solution.status in _UNUSABLE:
        return f"the solver stopped as {solution.status!r}"
    if slope > 0:
        return None
    if not solution.residual:
        return ""
    return f"the solution is no descent (the solver: {solution.status!r})"
