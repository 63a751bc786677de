"""The truncated-Newton step of `NaturalGradient`: a solver, and products with the metric."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fused_so.likelihoods import Likelihood
from fused_so.optim.base import check_count, check_number
from fused_so.optim.batches import Batch, Watch
from fused_so.optim.metric import Metric
from fused_so.solvers import Solution, cg, minres_qlp

_SOLVERS = {"cg": cg, "minres_qlp": minres_qlp}
_UNUSABLE = ("singular", "bad_preconditioner", "not_finite")


class TruncatedSteps:
    """Solves (G + damping I) x = p.grad by the named solver, with its options."""

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
    ):
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
        """Nothing is kept between steps."""

    def remove_hooks(self) -> None:
        """There are none."""

    def solve(
        self,
        params: Sequence[Tensor],
        batches: Sequence[Batch],
        examples: int | None,
        damping: float,
        start: list[Tensor] | None,
    ) -> tuple[Solution, str | None]:
        """The solver's answer, and why it cannot be used; "" if it is zero as it should be."""
        names = [self._names[p] for p in params]
        product = Metric(
            self._watch, names, params, self._likelihood, self._metric, batches, examples
        )
        gradients = [p.grad for p in params]
        solution = self._solve(product, gradients, x0=start, damping=damping, **self._options)
        if solution.status in _UNUSABLE:
            return solution, f"the solver stopped as {solution.status!r}"
        slopes = [torch.sum(x.double() * g) for x, g in zip(solution.x, gradients, strict=True)]
        if torch.stack(slopes).sum() > 0:
            return solution, None
        if not solution.residual:
            return solution, ""
        return solution, f"the solution is no descent (the solver: {solution.status!r})"
