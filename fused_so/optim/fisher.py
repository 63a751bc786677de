"""What K-FAC and EKFAC share: both factors, learned from the model's own distribution."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fused_so._dtypes import accumulate
from fused_so.likelihoods import Likelihood, likelihood_of
from fused_so.optim.base import check_choice, check_grad_scaler, loss_scale
from fused_so.optim.factors import Factor
from fused_so.optim.kronecker import KroneckerOptimizer
from fused_so.optim.layers import Layer
from fused_so.optim.passes import SAMPLED, OutputPasses

FACTORS = (*SAMPLED, "empirical")
_LEAST_VARIANCE = 1e-4  # of a squared mean


class FisherOptimizer(KroneckerOptimizer):
    """Base of the optimizers whose metric is C (x) G in every layer.

    G = N sum_i g_i g_i^T over the rows g_i, gradients of the loss with respect to a layer's
    outputs, N being what the loss divides its sum by; C is a mean over rows.

    Args:
        model, defaults, params: as for `LayerOptimizer`.
        likelihood: that of the loss, or one of the nn losses that `likelihood_of` knows; None
            leaves the gradients of the user's own backward pass, of a mean over rows.
        factors: one of FACTORS; by default "sampled" with a likelihood, else "empirical".
        grad_scaler: the torch.amp.GradScaler in use, if any; only "empirical" and the bound
            by the loss depend on it.
    """

    sides = ("input", "output")
    uses_rows = True
    decay_in_metric = True

    def __init__(
        self,
        model: nn.Module,
        defaults: dict[str, Any],
        params: Iterable | None,
        *,
        likelihood: Likelihood | nn.Module | None,
        factors: str | None,
        grad_scaler: torch.amp.GradScaler | None,
    ):
        likelihood = None if likelihood is None else likelihood_of(likelihood, name="likelihood")
        unasked = likelihood is None and factors is None
        factors = factors or ("empirical" if likelihood is None else "sampled")
        check_choice("factors", factors, FACTORS)
        if likelihood is None and factors != "empirical":
            raise ValueError(
                f"factors={factors!r} needs the likelihood of the model's outputs; pass "
                f"likelihood= (fused_so.Categorical(), the nn loss you train with, ...)"
            )
        check_grad_scaler(grad_scaler)
        self._likelihood, self._factors, self._grad_scaler = likelihood, factors, grad_scaler
        self._passes: OutputPasses | None = None
        super().__init__(model, defaults, params)
        if factors != "empirical":
            self._passes = OutputPasses(
                self._model, likelihood, factors, self._captures, self._wants_passes
            )
        if likelihood is not None:
            # After the passes, whose own gradients at the outputs are none of the loss.
            self._watch_loss(likelihood)
        if unasked:
            self._warn_once(
                ("likelihood",),
                "without the likelihood of the loss the factors are 'empirical': they vanish "
                "faster than the gradient where the fit is good, and steps may grow without bound; "
                "pass likelihood= (the nn loss you train with, ...), or factors='empirical' if you "
                "mean it",
            )

    def _choices(self) -> dict[str, Any]:
        return {**super()._choices(), "factors": self._factors}

    # Statistics.

    def _wants_passes(self) -> bool:
        return any(self.observes(layer) for layer in self._layers)

    def receive(self, layer: Layer, h: Tensor, g: Tensor) -> None:
        passes = self._passes
        if passes is None:
            super().receive(layer, h, g)
        elif passes.rows is None:
            # The user's own backward pass: only what preconditioning by rows needs.
            if self._sums:
                self._check_alone(
                    layer,
                    f"a likelihood of reduction {self._likelihood.reduction!r}",
                    "how much they sum is not known to the curvature; divide the loss by what it "
                    "sums over (reduction='mean' or 'batchmean')",
                )
            self._keep_rows(layer, h, g)
        else:
            layer.state["scale"] = passes.scale
            # A layer may see several rows of an example, in one call or in several.
            rows = self._captures[self._layers.index(layer)].rows
            ratio = math.sqrt(rows / passes.rows)
            self.observe(layer, h, g if ratio == 1 else ratio * g)

    def observe(self, layer: Layer, h: Tensor, g: Tensor) -> None:
        if self._passes is None:
            g = self._per_example(layer, g)
        if self.averages(layer):
            if self._passes is None or self._passes.first:
                self.average(Factor(layer, "input"), h)
            self.average(Factor(layer, "output"), g)

    @property
    def _sums(self) -> bool:
        """Whether the loss is known to be a sum."""
        return self._likelihood is not None and self._likelihood.reduction in ("sum", "none")

    def _per_example(self, layer: Layer, g: Tensor) -> Tensor:
        """Rows such that G is their mean product: n g of a mean over rows, sqrt(n) g of a sum."""
        self._check_alone(
            layer,
            "factors='empirical'",
            "the gradients of single examples cannot be told from such parts; pass a likelihood "
            "and use other factors, or accumulate nothing",
        )
        n = len(g)
        layer.state["scale"] = float(n) if self._sums else 1.0
        scale = (math.sqrt(n) if self._sums else n) / loss_scale(self._grad_scaler, g.device)
        return accumulate(g) * scale  # in float16 what was scaled would underflow

    def _check_alone(self, layer: Layer, setting: str, reason: str) -> None:
        """Raises if the layer's gradient already holds that of another backward pass."""
        # PyTorch has no public name for the backward pass that is running.
        backward = torch._C._current_graph_task_id()
        last = layer.batch.setdefault("backward", backward)
        held = layer.module.weight.grad
        if last != backward and held is not None and held.any():
            raise ValueError(
                f"{setting} takes one backward pass a step, but layer {layer.name!r} has had "
                f"another (gradient accumulation, or reentrant checkpointing?): {reason}"
            )
        layer.batch["backward"] = backward

    def curvature_scale(self, layer: Layer) -> float:
        # F is that of the loss; the bound is on twice the divergence an example, N / n of it.
        return layer.state["scale"]

    def largest_decrease(self, group: dict[str, Any], predicted: Tensor) -> Tensor | None:
        """max_decrease times the batch's objective, loss + eta / 2 |theta|^2, over alpha."""
        layers = [layer for layer in self._layers if layer.group is group and layer.inverted]
        alpha = self.curvature_scale(layers[0])
        objective = self._loss_bounding(group, alpha * predicted)
        if objective is None:
            return None
        if group["weight_decay"]:
            params = [p for layer in layers for p in (layer.module.weight, layer.bias)]
            squares = [accumulate(p).square().sum() for p in params if p is not None]
            penalty = sum(square.to(objective.device) for square in squares)
            objective = objective + group["weight_decay"] / 2 * penalty
        return group["max_decrease"] / alpha * objective

    def mean_variances(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """tr C / in and tr G / out, both positive.

        Inputs that vary by less than a hundredth of their size count as varying by that much: what
        else they do is noise, which relative damping would follow down.
        """
        c, k = (f.get("covariance").diagonal().mean() for f in self.factors(layer))
        if layer.centered:
            c = torch.maximum(c, _LEAST_VARIANCE * layer.state["mean"].square().mean())
        return tuple(torch.where(m > 0, m, torch.finfo(m.dtype).tiny ** 0.5) for m in (c, k))

    def _warmed(self, group: dict[str, Any]) -> tuple[float, float]:
        """Momentum grows as well, or it would carry the first steps far; lr / (1 - beta) stays."""
        length, momentum = super()._warmed(group)
        if momentum == 1 or self._steps >= group["warmup"]:
            return length, momentum
        # beta_t = beta (t + 1) / T
        now = momentum * min(1.0, (self._steps + 1) / group["warmup"])
        return length * (1 - now) / (1 - momentum), now

    def remove_hooks(self) -> None:
        super().remove_hooks()
        if self._passes is not None:
            self._passes.remove()
