"""The statistics of the layers' inputs and output gradients, and the inverses of their factors."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_so import ops
from fused_so._dtypes import accumulate_dtype
from fused_so.optim.base import check_count, check_number
from fused_so.optim.layers import Layer, LayerOptimizer, probe

BOOSTS = (1.0, 10.0, 100.0, 1000.0)
"""What the damping of a factor that is not positive definite is multiplied by, in turn."""


class Factor(NamedTuple):
    """One side of a layer's curvature: its statistics and inverse in the layer's state."""

    layer: Layer
    side: str  # "input" or "output"

    def get(self, name: str, default: Any = None) -> Any:
        return self.layer.state.get(self.key(name), default)

    def key(self, name: str) -> str:
        return name if self.side == "input" else f"output_{name}"

    def __str__(self) -> str:
        kind = "input" if self.side == "input" else "output gradient"
        return f"the {kind} of layer {self.layer.name!r}"

    @property
    def centered(self) -> bool:
        return self.side == "input" and self.layer.centered


class FactorOptimizer(LayerOptimizer):
    """Base of the optimizers that average and invert factors of their layers' curvature.

    A subclass says of what it `average`s (in `receive`), and its `dampings`; it calls `refresh`
    before it uses the inverses, and may `invert_factors` in its own way. Arguments as for
    `LayerOptimizer`.
    """

    sides: tuple[str, ...] = ("input",)
    """The factors that are not the identity."""

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        if "inverse_every" not in group:
            return
        check_number("damping", group["damping"], 0.0)
        check_number("relative_damping", group["relative_damping"], 0.0)
        check_number("decay", group["decay"], 0.0, 1.0)
        check_count("statistics_every", group["statistics_every"])
        if group["inverse_every"] != "auto":
            if isinstance(group["inverse_every"], str):
                raise ValueError(
                    f"inverse_every must be a whole number >= 1 or 'auto', got "
                    f"{group['inverse_every']!r}"
                )
            check_count("inverse_every", group["inverse_every"])
        check_number("warmup", group.get("warmup", 0), 0.0)
        check_number("drift_tolerance", group["drift_tolerance"], 0.0, positive=True)

    def dampings(self, layer: Layer) -> dict[str, Tensor]:
        """What is added to the diagonal of each side's factor."""
        raise NotImplementedError

    # Statistics.

    def due(self, every: int) -> bool:
        """Whether a job done every so many steps is due; at first at steps 0, 1, 2, 4, 8, ..."""
        early = self._steps < every and self._steps & (self._steps - 1) == 0
        return early or self._steps % every == 0

    def averages(self, layer: Layer) -> bool:
        """Whether the next batch enters the averages."""
        return self.due(layer.group["statistics_every"]) or not layer.inverted

    def average(self, factor: Factor, x: Tensor) -> None:
        """Takes x (n, d) into the factor's running mean and covariance.

        Examples are weighted: with W the discounted number of examples seen, the batch enters
        with weight n / (W + n). That is a bias-corrected exponential average over steps, and
        the batches of one step (gradient accumulation, a module called twice) count as one.
        """
        layer, state = factor.layer, factor.layer.state
        covariance, mean, examples = map(factor.key, ("covariance", "mean", "examples"))
        if covariance not in state:
            width = x.shape[1]
            dtype = accumulate_dtype(x.dtype)
            state[covariance] = torch.zeros(width, width, dtype=dtype, device=x.device)
            state[mean] = torch.zeros(width, dtype=dtype, device=x.device)
            state[examples] = 0.0
        discounted = f"{factor.side}_discounted"
        if not layer.batch.get(discounted):
            state[examples] *= layer.group["decay"]
            layer.batch[discounted] = True
        n = x.shape[0]
        if n == 0:
            return
        seen = state[examples]
        accepted = ops.covariance_(
            state[covariance], state[mean], x, decay=seen / (seen + n), centered=factor.centered
        )
        state[examples] += n
        layer.averaged = True

        def reject(value: Tensor) -> None:
            if not value:
                state[examples] = max(0.0, state[examples] - n)
                self._warn_once(
                    ("statistics", str(factor)),
                    f"{factor} holds a NaN or Inf, or overflows; that batch stays out of its "
                    f"statistics",
                )

        self._readback.watch(accepted, reject)

    def factors(self, layer: Layer) -> list[Factor]:
        return [Factor(layer, side) for side in self.sides]

    # Inverses.

    def refresh(self, layers: list[Layer]) -> None:
        """Inverts the factors that are due."""
        layers = [layer for layer in layers if self.ready(layer)]
        self.invert([layer for layer in layers if self._is_due(layer)])

    def ready(self, layer: Layer) -> bool:
        """Whether there are statistics to invert."""
        return all(factor.get("examples") for factor in self.factors(layer))

    def _is_due(self, layer: Layer) -> bool:
        every = layer.group["inverse_every"]
        if not layer.inverted:
            return True
        if every != "auto":
            return self.due(every)
        if layer.averaged:
            layer.averaged = False

            def judge(drifted: Tensor) -> None:
                layer.stale = bool(drifted)

            self._readback.watch(self.drift(layer) > layer.group["drift_tolerance"], judge)
        return layer.stale

    def drift(self, layer: Layer) -> Tensor:
        """How far the layer's inverses are from inverting its present statistics.

        The root mean square eigenvalue of (C + lambda I) A - I, the larger of the two sides',
        estimated by one random vector v: |(C + lambda I) A v - v| / |v|.
        """
        dampings, residuals = self.drift_dampings(layer), []
        for factor in self.factors(layer):
            covariance = factor.get("covariance")
            v = probe(len(covariance), covariance.dtype, covariance.device)
            product = self.drift_product(factor, dampings[factor.side], self.solve(factor, v))
            residuals.append((product - v).norm() / v.norm())
        return torch.stack(residuals).amax()

    def drift_dampings(self, layer: Layer) -> dict[str, Tensor]:
        """lambda of each side."""
        return self.dampings(layer)

    def drift_product(self, factor: Factor, damping: Tensor, v: Tensor) -> Tensor:
        """(C + lambda I) v, with C as it is now."""
        return torch.addcmul(factor.get("covariance") @ v, damping, v)

    def solve(self, factor: Factor, v: Tensor) -> Tensor:
        """(C + lambda I)^-1 v, with C and lambda as they were at the last refresh."""
        return factor.get("inverse") @ v

    def invert(self, layers: list[Layer]) -> None:
        """Replaces the layers' inverses; one that fails keeps its last good value, or zero."""
        for layer in layers:
            layer.state["refreshes"] = layer.state.get("refreshes", 0) + 1
            layer.averaged = layer.stale = False
        self.invert_factors(layers)

    def invert_factors(self, layers: list[Layer]) -> None:
        """Puts the inverse of every side's damped factor into the layers' states."""
        dampings = [self.dampings(layer) for layer in layers]
        jobs = [
            (factor, damping[factor.side])
            for layer, damping in zip(layers, dampings, strict=True)
            for factor in self.factors(layer)
        ]
        for same in _by_kind(jobs):
            self._invert(same)

    def _invert(self, jobs: list[tuple[Factor, Tensor]], boost: float = 1.0) -> None:
        if not jobs:
            return
        factors = [factor for factor, _ in jobs]
        covariances = [factor.get("covariance") for factor in factors]
        damping = torch.stack(
            [boosted(d, c, boost) for (_, d), c in zip(jobs, covariances, strict=True)]
        )
        # Algorithm 4, line 7, of George 2017.
        inverses, info = ops.damped_inverse(covariances, damping)
        for factor, inverse, failure in zip(factors, inverses, info.unbind(), strict=True):
            factor.layer.state[factor.key("inverse")] = torch.where(
                failure == 0, inverse, factor.get("inverse", 0.0)
            )
        self._readback.watch(info, partial(self._retry, jobs, damping, boost))

    def _retry(self, jobs: list, damping: Tensor, boost: float, info: Tensor) -> None:
        failed = [i for i, failure in enumerate(info.tolist()) if failure]
        if failed and boost >= BOOSTS[-1]:
            raise not_positive_definite(jobs[failed[0]][0], damping[failed[0]])
        self._invert([jobs[i] for i in failed], 10 * boost)

    def layer_diagnostics(self, layer: Layer) -> dict[str, Any]:
        report: dict[str, Any] = {"refreshes": layer.state.get("refreshes", 0)}
        if not layer.inverted:
            return report
        dampings = self.dampings(layer)
        for factor in self.factors(layer):
            damping = dampings[factor.side]
            values = torch.linalg.eigvalsh(factor.get("covariance")) + damping
            report[factor.key("damping")] = float(damping)
            report[factor.key("condition")] = (values[-1] / values[0]).item()
        return report


def not_positive_definite(factor: Factor, damping: Tensor) -> RuntimeError:
    return RuntimeError(
        f"the covariance of {factor} is not positive definite even with damping "
        f"{damping.item():.3g}; raise damping or relative_damping"
    )


def boosted(damping: Tensor, covariance: Tensor, boost: float) -> Tensor:
    if boost == 1:
        return damping
    # Ten times nothing is nothing: a retry starts from the rounding of the variance.
    variance = covariance.diagonal().mean()
    rounding = torch.finfo(variance.dtype).eps * torch.where(variance > 0, variance, 1.0)
    return boost * torch.maximum(damping, rounding)


def _by_kind(jobs: list[tuple[Factor, Tensor]]) -> list[list[tuple[Factor, Tensor]]]:
    kinds: dict[tuple, list] = {}
    for job in jobs:
        covariance = job[0].get("covariance")
        kinds.setdefault((covariance.device, covariance.dtype), []).append(job)
    return list(kinds.values())
