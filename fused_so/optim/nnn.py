"""NNN, natural neural networks (Desjardins et al. 2015, as in George 2017, section 6.4.2)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fused_so.optim.eigen import eigenbasis
from fused_so.optim.factors import Factor
from fused_so.optim.kronecker import KroneckerOptimizer
from fused_so.optim.layers import Layer


class NNN(KroneckerOptimizer):
    r"""Momentum gradient descent on whitened layers, a = V U (h - mu) + d.

    U = (C + lambda I)^{-1/2} and mu are taken from the running covariance C and mean of the
    layer's inputs at each refresh and then kept; V and d are what is trained. Seen from the
    layer's own W = V U and b = d - W mu, a gradient step on them is

    .. math::
        \Delta W = (\nabla_W - \nabla_b \mu^T)\, U^2, \qquad
        \Delta b = \nabla_b - \Delta W \mu

    the step of ACP with alpha = 1 and frozen statistics. A refresh changes V and d, never W and b,
    so that the network computes what it did; the momentum, which lives in V and d, is carried
    over: with M for W and M_b for b in the old coordinates (U, mu), in the new ones (U', mu')

    .. math::
        M' = M U^{-1} U', \qquad M_b' = M_b + M \mu - M' \mu'

    U is the symmetric root, the one whose coordinates turn least from one refresh to the next.

    Args:
        model: the module to train. Its nn.Linear layers are whitened; every other parameter
            takes momentum SGD with the same lr and bound, and a warning lists them.
        lr: the learning rate, >= 0, in the meaning it has for `ACP`: while max_norm = 1 binds, an
            update before momentum moves the preactivations of a param group by lr.
        damping: epsilon >= 0, added to the eigenvalues of C.
        relative_damping: delta >= 0, relative to the mean variance of the layer's inputs; lambda
            is the sum of both.
        momentum: of V and d, in [0, 1].
        nesterov: take the look-ahead form of momentum.
        weight_decay: >= 0, decoupled: added to the update times W and b.
        statistics_every, inverse_every, drift_tolerance, decay: as for `ACP`; a refresh takes one
            eigendecomposition a layer.
        max_norm: as for `ACP`, in the metric of the whitened coordinates, which alpha does not
            scale: one layer's steps are as long as its gradients say.
        warmup: the number of first steps over which updates grow from a fifth to their full
            length; 0 for none.
        params: parameters or param groups, as for `ACP`.

    Raises:
        TypeError, ValueError: an option out of its range; a model without trainable nn.Linear; a
            layer whose weight and bias are in different groups.
    """

    uses_rows = True

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.04,
        *,
        damping: float = 1e-8,
        relative_damping: float = 0.1,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        statistics_every: int = 10,
        inverse_every: int | str = 100,
        drift_tolerance: float = 0.1,
        decay: float = 0.95,
        max_norm: float | None = 1.0,
        warmup: float = 32,
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
            "drift_tolerance": drift_tolerance,
            "decay": decay,
            "max_norm": max_norm,
            "warmup": warmup,
        }
        super().__init__(model, options, params)

    def observe(self, layer: Layer, h: Tensor, g: Tensor) -> None:
        if self.averages(layer):
            self.average(Factor(layer, "input"), h)

    def dampings(self, layer: Layer) -> dict[str, Tensor]:
        variance = layer.state["covariance"].diagonal().mean()
        group = layer.group
        return {"input": group["damping"] + group["relative_damping"] * variance}

    def mean(self, layer: Layer) -> Tensor:
        return layer.state["whitening_mean"]

    def invert_factors(self, layers: list[Layer]) -> None:
        for layer in layers:
            state = layer.state
            values, basis = eigenbasis(state["covariance"])
            values = values + self.dampings(layer)["input"]
            # A singular C without damping: what has no variance is left alone.
            floor = len(values) * torch.finfo(values.dtype).eps * values.amax()
            scales = torch.where(values > floor, values, torch.inf).rsqrt()
            if "coloring" in state:
                self._carry_momentum(layer, scales, basis)
            # U^-1, U^2 and mu
            state["coloring"] = (basis * torch.where(scales > 0, 1 / scales, 0)) @ basis.mT
            state["inverse"] = (basis * scales.square()) @ basis.mT
            state["whitening_mean"] = state["mean"].clone()

    def _carry_momentum(self, layer: Layer, scales: Tensor, basis: Tensor) -> None:
        """M' = M U^-1 U' and M_b' = M_b + M mu - M' mu'."""
        state, weight, bias = layer.state, layer.module.weight, layer.bias
        buffer = self.state[weight].get("momentum_buffer")
        if buffer is None:
            return
        whitening = (basis * scales) @ basis.mT
        moved = buffer @ state["coloring"] @ whitening
        if bias is not None and "momentum_buffer" in self.state[bias]:
            change = buffer @ state["whitening_mean"] - moved @ state["mean"]
            self.state[bias]["momentum_buffer"].add_(change)
        buffer.copy_(moved)
