"""The engine under the Kronecker-factored optimizers: they differ only in their factors.

In the coordinates W (h - m) + d of a linear layer, with m the mean of its inputs, its curvature is
modelled as F = alpha diag(C, 1) (x) G: C the covariance of the inputs, G that of the gradients
with respect to the outputs, or I. Back in W and b = d - W m that is the homogeneous factor

    [[C + m m^T, m], [m^T, 1]] (x) G

whose damped inverse is `ops.precondition`. The engine keeps the statistics, decides when to
invert them, preconditions by rows or by gradients, bounds the step and applies it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_so import ops
from fused_so._dtypes import accumulate_dtype
from fused_so.optim.base import Update, check_count, check_number
from fused_so.optim.layers import Layer, LayerOptimizer, probe
from fused_so.optim.products import outer_sum, rows_times

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


class KroneckerOptimizer(LayerOptimizer):
    """Base of the optimizers that precondition linear layers with Kronecker factors.

    A subclass implements `observes` and `observe` (what a batch tells about a layer) and, where
    the defaults below are not its own, `dampings`, `invert`, `precondition` and
    `curvature_scale`. Every parameter that is not a layer's takes momentum SGD with the same
    settings. Arguments as for `LayerOptimizer`.
    """

    sides: tuple[str, ...] = ("input",)
    """The factors that are not the identity."""
    uses_rows = False
    """Whether `precondition` asks for `gradient_rows`."""
    decay_in_metric = False
    """Whether weight decay is part of the gradient that is preconditioned."""

    def __init__(self, model: nn.Module, defaults: dict[str, Any], params: Iterable | None = None):
        self.rewrites_gradients = False
        super().__init__(model, defaults, params)

    # What an optimizer defines.

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

    def observes(self, layer: Layer) -> bool:
        """Whether the next batch has to be seen."""
        return self.averages(layer)

    def observe(self, layer: Layer, h: Tensor, g: Tensor) -> None:
        """Takes in one call's input h (n, in) and output gradient g (n, out)."""
        raise NotImplementedError

    def dampings(self, layer: Layer) -> dict[str, Tensor]:
        """What is added to the diagonal of each side's factor."""
        raise NotImplementedError

    def curvature_scale(self, layer: Layer) -> Tensor | float:
        """alpha in the layer's metric F = alpha A (x) G, by which the bound's norm is divided."""
        return 1.0

    def gradients(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """The gradients of weight and bias that are preconditioned."""
        grad_weight, grad_bias = layer.gradients()
        decay, bias = layer.group["weight_decay"], layer.bias
        if not self.decay_in_metric or decay == 0:
            return grad_weight, grad_bias
        if "decayed" not in layer.batch:
            layer.batch["decayed"] = (
                grad_weight.add(layer.module.weight, alpha=decay),
                grad_bias if bias is None else grad_bias.add(bias, alpha=decay),
            )
        return layer.batch["decayed"]

    def precondition(self, layer: Layer) -> tuple[Tensor, Tensor] | None:
        """The update of weight and bias, or None while the layer has no inverse."""
        state = layer.state
        if not layer.inverted:
            return None
        mean, inverse, alpha = self.mean(layer), state["inverse"], self.gradient_scale(layer)
        output_inverse = state.get("output_inverse")
        grad_weight, grad_bias = self.gradients(layer)
        rows = self.gradient_rows(layer)
        if rows is None:
            # The inverse of the homogeneous factor, as in George 2017, eq. 6.2.4 and 6.2.5.
            return ops.precondition(
                grad_weight, grad_bias, mean, inverse, output_inverse=output_inverse, alpha=alpha
            )
        # The same in fewer operations: dW = Go (g^T Z) and dW m = Go g^T (Z m), with
        # Z = c/alpha (h - 1 m^T) A.
        h, g, scale = rows
        moves_bias = layer.bias is not None and layer.bias.grad is not None
        ones = torch.full_like(h[:, 0], float(moves_bias))
        z = ops.precondition(h, ones, mean, inverse, alpha=alpha / scale)[0]
        if output_inverse is None:
            return outer_sum(g, z)[0], grad_bias / alpha - g.T @ (z @ mean)
        if len(h) < z.shape[1]:  # Go g^T takes less than Go dW
            g = rows_times(g, output_inverse)
            return outer_sum(g, z)[0], output_inverse @ (grad_bias / alpha) - g.T @ (z @ mean)
        change = grad_bias / alpha - g.T @ (z @ mean)
        return output_inverse @ outer_sum(g, z)[0], output_inverse @ change

    def gradient_scale(self, layer: Layer) -> Tensor | float:
        """alpha, by which the preconditioned gradient is divided."""
        return 1.0

    def mean(self, layer: Layer) -> Tensor:
        """m, around which the layer is centered."""
        return layer.state["mean"]

    # The step.

    def _update(self) -> None:
        self.refresh([layer for layer in self._layers if layer.module.weight.grad is not None])
        for group in self.param_groups:
            kinds = self._updates(group)
            bounds = self._bounds(group, list(kinds.values()))
            for (kind, updates), bound in zip(kinds.items(), bounds, strict=True):
                self._take(group, kind, updates, bound)

    def _take(self, group: dict, kind: str, updates: list[Update], bound: Tensor) -> None:
        layers = kind == "layers"
        warmup = group.get("warmup", 0)
        if self._steps < warmup:
            # The first steps, on the curvature of few batches while it changes fastest, decide on
            # much of what follows: from a fifth of lr to lr.
            bound = bound * min(1.0, 0.2 + 0.8 * self._steps / warmup)
        if not self.rewrites_gradients:
            decayed = layers and self.decay_in_metric
            self._apply(group, updates, bound, weight_decay=0.0 if decayed else None)
            return
        for param, delta, *_ in updates:
            bound = bound.to(delta)
            # 0 where a gradient is not finite, and delta neither
            param.grad.copy_(torch.where(bound > 0, bound * delta if layers else delta, 0.0))

    def _updates(self, group: dict) -> dict[str, list[Update]]:
        """The updates of the "layers" and of the "plain" parameters, where there are any.

        They are bounded apart: the norm of the first is in the layers' metric, that of the others
        in the identity.
        """
        layered = []
        for layer in self._layers:
            if layer.group is not group or layer.module.weight.grad is None:
                continue
            update = self.precondition(layer)
            if update is None:
                self._warn_once(
                    ("unseen", layer.name),
                    f"no batch of layer {layer.name!r} was observed (is its weight used without "
                    f"calling the module?); it takes the plain gradient until one is",
                )
                continue
            alpha = self.curvature_scale(layer)
            params = (layer.module.weight, layer.bias)
            for param, delta, grad in zip(params, update, self.gradients(layer), strict=True):
                if param is not None and param.grad is not None:
                    layered.append(Update(param, delta, alpha, grad))
        plain = self._plain_updates(group, (update.param for update in layered))
        kinds = {"layers": layered, "plain": plain}
        return {kind: updates for kind, updates in kinds.items() if updates}

    # Rows: the examples' inputs and output gradients, where working with them takes less.

    def captures(self, layer: Layer) -> bool:
        return layer.prefers_rows or self.observes(layer)

    def receive(self, layer: Layer, h: Tensor, g: Tensor) -> None:
        self._keep_rows(layer, h, g)
        self.observe(layer, h, g)

    def _keep_rows(self, layer: Layer, h: Tensor, g: Tensor) -> None:
        """Keeps h (n, in) and g (n, out) until the step if g^T (h A) takes less than (g^T h) A."""
        if not self.uses_rows or self._readback.waits_for(h):
            return
        n, width, height = h.shape[0], h.shape[1], g.shape[1]
        by_rows = n * width * (width + height)
        by_gradient = width * width * height
        if "output" in self.sides:
            by_rows += min(n, width) * height * height
            by_gradient += width * height * height
        decayed = self.decay_in_metric and layer.group["weight_decay"] > 0
        layer.state["prefers_rows"] = by_rows < by_gradient and not decayed
        once = "kept_rows" not in layer.batch
        usable = h.dtype == g.dtype == accumulate_dtype(g.dtype)
        layer.batch["kept_rows"] = (h, g) if layer.prefers_rows and once and usable else None

    def gradient_rows(self, layer: Layer) -> tuple[Tensor, Tensor, Tensor] | None:
        """h, g and c with the layer's weight gradient = c g^T h, where both are known to agree.

        A loss may use a weight in other ways, several backward passes may have met, and
        gradients may have been clipped (c) or changed. So both sides are multiplied by one random
        vector and compared, and p.grad is what counts. None on a GPU, where that would mean
        waiting for it.
        """
        rows, gradient = layer.batch.get("kept_rows"), layer.module.weight.grad
        if rows is None or rows[0].dtype != gradient.dtype:
            return None
        h, g = rows
        v = probe(h.shape[1], h.dtype, h.device)
        product, weights = gradient @ v, h @ v
        expected = g.T @ weights
        scale = product.dot(expected) / expected.dot(expected)
        # Rounding, in a sum of n products that may nearly cancel.
        rounding = 8 * torch.finfo(h.dtype).eps * (g.abs().T @ weights.abs()).norm()
        agree = (product - scale * expected).norm() <= scale.abs() * rounding
        return (h, g, scale) if agree else None

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
        dampings, residuals = self.dampings(layer), []
        for factor in self.factors(layer):
            covariance = factor.get("covariance")
            v = probe(len(covariance), covariance.dtype, covariance.device)
            av = self.solve(factor, v)
            residual = self.damped_product(factor, dampings[factor.side], av) - v
            residuals.append(residual.norm() / v.norm())
        return torch.stack(residuals).amax()

    def damped_product(self, factor: Factor, damping: Tensor, v: Tensor) -> Tensor:
        """(C + lambda I) v as they are now, lambda being `damping`."""
        return factor.get("covariance") @ v + damping * v

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
            last_good = factor.get("inverse", torch.zeros_like(inverse))
            factor.layer.state[factor.key("inverse")] = torch.where(
                failure == 0, inverse, last_good
            )
        self._readback.watch(info, partial(self._retry, jobs, damping, boost))

    def _retry(self, jobs: list, damping: Tensor, boost: float, info: Tensor) -> None:
        failed = [i for i, failure in enumerate(info.tolist()) if failure]
        if failed and boost >= BOOSTS[-1]:
            raise not_positive_definite(jobs[failed[0]][0], damping[failed[0]])
        self._invert([jobs[i] for i in failed], 10 * boost)

    # What can be plotted.

    @torch.no_grad()
    def diagnostics(self) -> dict[str, Any]:
        """What the last step did and what the factors are like; computed here, and only here.

        Returns:
            "steps"; "norm", those of the last updates in their metrics, group by group, of
            layers and then of other parameters; "bound", the factors that max_norm multiplied
            them by; and for each layer "refreshes" of its inverses, and for each side its
            "damping" and "condition", the condition number of the damped factor as it is now.
        """
        return {
            "steps": self._steps,
            "norm": [square.clamp(min=0).sqrt().item() for square, _ in self._bounded],
            "bound": [factor.item() for _, factor in self._bounded],
            "layers": {layer.name: self.layer_diagnostics(layer) for layer in self._layers},
        }

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
