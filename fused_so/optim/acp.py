"""ACP, the amortized covariance preconditioner (George 2017, Algorithm 4)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fused_so.optim.base import check_choice, check_grad_scaler, check_number, loss_scale
from fused_so.optim.factors import Factor
from fused_so.optim.kronecker import KroneckerOptimizer
from fused_so.optim.layers import Layer
from fused_so.optim.rows import joined

HEURISTICS = ("rms_gradient", "max_squared_gradient")
_ALPHA_DECAY = 0.975


class ACP(KroneckerOptimizer):
    r"""Gradient descent preconditioned by the inverse covariance of every layer's input.

    For a linear layer with mean input m and input covariance C, both running averages,

    .. math::
        \Delta W = \frac1\alpha (\nabla_W - \nabla_b m^T) (C + \lambda I)^{-1}, \qquad
        \Delta b = \frac1\alpha \nabla_b - \Delta W m, \qquad
        \lambda = \frac\epsilon\alpha + \delta \frac{\operatorname{tr} C}{d}

    the step under the curvature alpha E[(h, 1)(h, 1)^T] of George 2017, eq. 6.2.3 to 6.2.5.
    `p.grad` is only read, so clipping and gradient reduction work as with any optimizer.

    Args:
        model: the module to train. Its nn.Linear layers are preconditioned; every other
            parameter takes momentum SGD with the same lr and bound, and a warning lists them.
        lr: the learning rate, >= 0. While max_norm = 1 binds, an update before momentum moves the
            preactivations of a param group by lr: the root of the sum of squares over units, of
            the mean over examples; whatever the scale of the loss.
        alpha: the scale of the curvature with respect to a layer's output: a number > 0 for all
            layers, or an estimate per layer and batch from each example's largest derivative of
            its loss with respect to an output of the layer. "max_squared_gradient" is that of the
            thesis (section 6.3.2): the largest of them, squared. "rms_gradient", the default, is
            their root mean square, as in RMSprop and Adam: an estimate by squares vanishes faster
            than the gradient as the fit improves, and so lengthens the step. Either falls by at
            most 2.5% a step, so that a well fitted batch does not stretch the next steps.
        damping: epsilon >= 0, in units of alpha times a squared input; it is divided by alpha.
        relative_damping: delta >= 0, relative to the mean variance of the layer's inputs. It
            keeps directions that the batches seen so far do not span from exploding.
        momentum: of the preconditioned updates, in [0, 1].
        nesterov: take the look-ahead form of momentum.
        weight_decay: >= 0, decoupled from the metric: added to the update times the parameter.
        statistics_every: average mean and covariance every so many steps.
        inverse_every: invert them every so many steps; or "auto": a layer's whenever its
            statistics, averaged anew, have drifted from its inverse. What counts steps also
            happens at steps 0, 1, 2, 4, 8, ... up to there, while averages of few batches
            improve quickly.
        drift_tolerance: > 0, for "auto": the root mean square eigenvalue of (C + lambda I) A - I
            from which on the inverse A is renewed.
        decay: of the exponential averages, in [0, 1]; bias-corrected, so that the first batches
            count fully.
        max_norm: an upper bound for the root mean square over examples of the change of a param
            group's preactivations, sqrt(Delta^T (A (x) I) Delta) with A = E[(h, 1)(h, 1)^T] damped
            (a "KL clip" with lr outside, so that schedules act on clipped steps too). Longer
            updates are shortened; None for no bound.
        loss_reduction: "mean" if the loss is a mean over examples, "sum" if it is a sum. Only
            "max_squared_gradient" depends on it.
        grad_scaler: the torch.amp.GradScaler in use, if any. Only the estimates of alpha, which
            see gradients before they are unscaled, depend on it.
        params: parameters or param groups; by default all of the model's that require a
            gradient. A group may set any of the options above but loss_reduction, grad_scaler.

    Raises:
        TypeError, ValueError: an option out of its range, a model without trainable nn.Linear,
            or a layer whose weight and bias are in different groups.
        RuntimeError: from `step`, if a covariance cannot be inverted even with the damping
            raised a thousandfold.
    """

    uses_rows = True

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.04,
        *,
        alpha: float | str = "rms_gradient",
        damping: float = 1e-8,
        relative_damping: float = 0.3,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        statistics_every: int = 10,
        inverse_every: int | str = 100,
        drift_tolerance: float = 0.1,
        decay: float = 0.95,
        max_norm: float | None = 1.0,
        loss_reduction: str = "mean",
        grad_scaler: torch.amp.GradScaler | None = None,
        params: Iterable | None = None,
    ):
        check_choice("loss_reduction", loss_reduction, ("mean", "sum"))
        check_grad_scaler(grad_scaler)
        self._loss_reduction = loss_reduction
        self._grad_scaler = grad_scaler
        options = {
            "lr": lr,
            "alpha": alpha,
            "damping": damping,
            "relative_damping": relative_damping,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "statistics_every": statistics_every,
            "inverse_every": inverse_every,
            "drift_tolerance": drift_tolerance,
            "decay": decay,
            "max_norm": max_norm,
        }
        super().__init__(model, options, params)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        alpha = group["alpha"]
        if isinstance(alpha, str):
            if alpha not in HEURISTICS:
                raise ValueError(f"alpha must be a number or one of {HEURISTICS}, got {alpha!r}")
        else:
            check_number("alpha", alpha, 0.0, positive=True)

    def observes(self, layer: Layer) -> bool:
        return layer.group["alpha"] in HEURISTICS or self.averages(layer)

    def observe(self, layer: Layer, h: Tensor, g: Tensor) -> None:
        if self.averages(layer):
            self.average(Factor(layer, "input"), h)
        alpha = layer.group["alpha"]
        if alpha in HEURISTICS and g.numel():
            # max_j |d loss_i / d a_ij|
            layer.batch.setdefault("largest", []).append(g.abs().amax(1))

    def refresh(self, layers: list[Layer]) -> None:
        self._update_alphas([layer for layer in layers if layer.state.get("examples")])
        super().refresh([layer for layer in layers if "alpha" in layer.state])

    def dampings(self, layer: Layer) -> dict[str, Tensor]:
        # lambda = epsilon / alpha + delta tr(C) / d
        absolute = layer.group["damping"] / layer.state["alpha"]
        variance = layer.state["covariance"].diagonal().mean()
        return {"input": absolute + layer.group["relative_damping"] * variance}

    def gradient_scale(self, layer: Layer) -> Tensor | float:
        return layer.state["alpha"]

    def curvature_scale(self, layer: Layer) -> Tensor | float:
        return layer.state["alpha"]

    def layer_diagnostics(self, layer: Layer) -> dict[str, Any]:
        alpha = layer.state.get("alpha")
        return {
            **super().layer_diagnostics(layer),
            **({} if alpha is None else {"alpha": float(alpha)}),
        }

    def _update_alphas(self, layers: list[Layer]) -> None:
        kinds: dict[tuple, list[tuple[Layer, Tensor]]] = {}
        for layer in layers:
            heuristic = layer.group["alpha"]
            if heuristic not in HEURISTICS:
                layer.state["alpha"] = heuristic
            elif "largest" in layer.batch:
                largest, dtype = joined(layer.batch["largest"]), layer.state["covariance"].dtype
                kind = (heuristic, dtype, largest.device, largest.dtype, largest.shape)
                kinds.setdefault(kind, []).append((layer, largest))
        for (heuristic, dtype, device, *_), same in kinds.items():
            estimates = self._estimates(heuristic, torch.stack([largest for _, largest in same]))
            last = [layer.state.get("alpha", 0.0) for layer, _ in same]
            last = torch.stack([torch.as_tensor(a, dtype=dtype, device=device) for a in last])
            last = last.double()
            # Rises at once and falls slowly: a batch that happens to be fitted well must not
            # shrink the metric, and so stretch the step, while momentum carries the last ones.
            alphas = torch.maximum(estimates, _ALPHA_DECAY * last)
            last = torch.where(last > 0, last, 1.0)
            alphas = torch.where((alphas > 0) & (alphas < math.inf), alphas, last).to(dtype)
            for (layer, _), alpha in zip(same, alphas.unbind(), strict=True):
                layer.state["alpha"] = alpha

    def _estimates(self, heuristic: str, largest: Tensor) -> Tensor:
        """alpha of every layer, whose examples' largest derivatives are a row of `largest`."""
        largest, n = largest.double(), largest.shape[1]  # whose squares do not overflow
        scale = 1.0 / loss_scale(self._grad_scaler, largest.device)
        if heuristic == "rms_gradient":
            # alpha = sqrt(mean_i max_j (d loss_i / d a_ij)^2) for a mean over examples, whose
            # 1/n is undone; for a sum n times that: the step is the same.
            return torch.linalg.vector_norm(largest, dim=1) * (scale * math.sqrt(n))
        if self._loss_reduction == "mean":
            scale = scale * n
        # alpha = max_ij (d loss_i / d a_ij)^2
        return (scale * largest.amax(1)).square()
