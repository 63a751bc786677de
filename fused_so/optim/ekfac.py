"""EKFAC, K-FAC with a diagonal of its own in the eigenbasis (George et al. 2018)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fused_so.likelihoods import Likelihood
from fused_so.optim.base import check_count
from fused_so.optim.eigen import eigenbasis
from fused_so.optim.factors import Factor
from fused_so.optim.fisher import FisherOptimizer
from fused_so.optim.layers import Layer


class EKFAC(FisherOptimizer):
    r"""Natural gradient descent, diagonal in the eigenbases of K-FAC's factors.

    In the coordinates W (h - m) + d, with C = E_C diag E_C^T and G = E_G diag E_G^T as in `KFAC`,
    and with x = ((E_C^T (h - m)), 1),

    .. math::
        S = E[(E_G^T g)^2 (x^2)^T], \qquad
        [\Delta W E_C, \Delta d] = E_G \frac{E_G^T [(\nabla_W - \nabla_b m^T) E_C, \nabla_b]}
        {S + \lambda + \delta \bar S}

    and b = d - W m: the second moments S, one for each entry of the gradient, take the place of
    the products of eigenvalues, which equal them if inputs and gradients are independent. No
    diagonal in this basis is closer to the Fisher (in those coordinates, in the Frobenius norm).

    Args:
        model, lr, likelihood, momentum, nesterov, weight_decay, statistics_every,
            drift_tolerance, decay, max_norm, max_decrease, warmup, grad_scaler, params: as for
            `KFAC`.
        factors: as for `KFAC`, of C and G and of S.
        damping: lambda >= 0, in units of the loss's curvature; weight_decay is added to it.
        relative_damping: delta >= 0, relative to the mean of S over the layer.
        inverse_every: renew the eigenbases every so many steps, or "auto", which compares the
            factors but for their scale; S starts again from the products of eigenvalues.
        diagonal_every: average S every so many steps, with the same decay. Each time costs about
            what preconditioning costs, and, unless factors are "empirical", the extra pass.

    Raises:
        TypeError, ValueError: as for `KFAC`.
    """

    uses_rows = False

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.06,
        *,
        likelihood: Likelihood | nn.Module | None = None,
        factors: str | None = None,
        damping: float = 0.0,
        relative_damping: float = 0.1,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        statistics_every: int = 5,
        inverse_every: int | str = 100,
        diagonal_every: int = 5,
        drift_tolerance: float = 0.4,
        decay: float = 0.8,
        max_norm: float | None = 1.0,
        max_decrease: float | None = 2.0,
        warmup: float = 64,
        grad_scaler: torch.amp.GradScaler | None = None,
        params: Iterable | None = None,
    ):
        options = {
            "lr": lr,
            "damping": damping,
            "relative_damping": relative_damping,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "statistics_every": statistics_every,
            "inverse_every": inverse_every,
            "diagonal_every": diagonal_every,
            "drift_tolerance": drift_tolerance,
            "decay": decay,
            "max_norm": max_norm,
            "max_decrease": max_decrease,
            "warmup": warmup,
        }
        super().__init__(
            model,
            options,
            params,
            likelihood=likelihood,
            factors=factors,
            grad_scaler=grad_scaler,
        )

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check_count("diagonal_every", group["diagonal_every"])

    # The diagonal.

    def observes(self, layer: Layer) -> bool:
        return super().observes(layer) or self.due(layer.group["diagonal_every"])

    def observe(self, layer: Layer, h: Tensor, g: Tensor) -> None:
        super().observe(layer, h, g)
        if layer.inverted and self.due(layer.group["diagonal_every"]):
            self._average_diagonal(layer, h, g if self._passes else self._per_example(layer, g))

    def _average_diagonal(self, layer: Layer, h: Tensor, g: Tensor) -> None:
        state, n = layer.state, len(h)
        if n == 0:
            return
        dtype = state["diagonal"].dtype
        # S_b = (1/n) sum_i (E_G^T g_i)^2 (x_i^2)^T
        x = (h.to(dtype) - self._center(layer)) @ state["basis"]
        squares = (g.to(dtype) @ state["output_basis"]).square_().mT
        batch = squares @ x.square_() / n
        if layer.centered:
            batch = torch.cat([batch, squares.mean(1, keepdim=True)], 1)
        if not layer.batch.get("diagonal_discounted"):
            state["diagonal_examples"] *= layer.group["decay"]
            layer.batch["diagonal_discounted"] = True
        state["diagonal_examples"] += n
        mixed = state["diagonal"].lerp(batch, n / state["diagonal_examples"])
        finite = mixed.isfinite().all()
        state["diagonal"] = torch.where(finite, mixed, state["diagonal"])

        def reject(value: Tensor) -> None:
            if not value:
                state["diagonal_examples"] -= n

        self._readback.watch(finite, reject)

    def _center(self, layer: Layer) -> Tensor:
        mean = layer.state["mean"]
        return mean if layer.centered else torch.zeros_like(mean)

    # The inverse.

    def dampings(self, layer: Layer) -> dict[str, Tensor]:
        # What the drift of either basis is measured with: a factor's share of lambda + delta S.
        c, k = self.mean_variances(layer)
        group = layer.group
        absolute = group["damping"] + group["weight_decay"]
        share = (absolute / (c * k) + group["relative_damping"]).sqrt()
        return {"input": share * c, "output": share * k}

    def invert_factors(self, layers: list[Layer]) -> None:
        for layer in layers:
            state = layer.state
            dampings = self.dampings(layer)
            for factor in self.factors(layer):
                values, basis = eigenbasis(factor.get("covariance"))
                state[factor.key("values")], state[factor.key("basis")] = values, basis
                state[factor.key("basis_damping")] = dampings[factor.side]
            inputs = state["values"]
            if layer.centered:
                inputs = torch.cat([inputs, inputs.new_ones(1)])
            state["diagonal"] = state["output_values"][:, None] * inputs
            state["diagonal_examples"] = state["output_examples"]

    def drift_dampings(self, layer: Layer) -> dict[str, Tensor]:
        return {factor.side: factor.get("basis_damping") for factor in self.factors(layer)}

    def drift_product(self, factor: Factor, damping: Tensor, v: Tensor) -> Tensor:
        # Of a basis only the shape of C matters: at the scale and with the damping of then.
        covariance, values = factor.get("covariance"), factor.get("values")
        trace = covariance.diagonal().sum()
        scale = torch.where(trace > 0, values.sum() / trace, 1.0)
        return torch.addcmul(scale * (covariance @ v), damping, v)

    def solve(self, factor: Factor, v: Tensor) -> Tensor:
        values, basis = factor.get("values"), factor.get("basis")
        return basis @ ((basis.mT @ v) / (values + factor.get("basis_damping")))

    def precondition(self, layers: list[Layer]) -> dict[Layer, tuple[Tensor, Tensor]]:
        return {layer: self._precondition(layer) for layer in layers if layer.inverted}

    def _precondition(self, layer: Layer) -> tuple[Tensor, Tensor]:
        state, group = layer.state, layer.group
        m, e_in, e_out = self._center(layer), state["basis"], state["output_basis"]
        grad_weight, grad_bias = (grad.to(m) for grad in self.gradients(layer))
        diagonal = state["diagonal"]
        absolute = group["damping"] + group["weight_decay"]
        damped = diagonal + (absolute + group["relative_damping"] * diagonal.mean())
        if not absolute and not group["relative_damping"]:
            # What has no curvature is left alone.
            floor = max(damped.shape) * torch.finfo(damped.dtype).eps * damped.amax()
            damped = torch.where(damped > floor, damped, torch.inf)
        # dW = E_G [E_G^T (grad_W - grad_b m^T) E_C / S] E_C^T
        projected = e_out.mT @ grad_weight.addr(grad_bias, m, alpha=-1) @ e_in
        dw = e_out @ (projected / damped[:, : len(m)]) @ e_in.mT
        if not layer.centered:
            return dw, torch.zeros_like(grad_bias)
        # db = E_G [E_G^T grad_b / S_b] - dW m
        return dw, e_out @ ((e_out.mT @ grad_bias) / damped[:, -1]) - dw @ m
