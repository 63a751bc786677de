"""The block-tridiagonal inverse of K-FAC (Martens and Grosse 2015, section 3.3 and appendix B).

The gradients of consecutive layers i and j = i + 1 are modelled as jointly normal, and those of
others as independent given the ones between. With F_ij = A_ij (x) G_ij, A of the inputs x and G of
the output gradients, the inverse is Xi^T diag(Sigma_i^-1) Xi, where Xi = I - Psi and

    Psi_i   = (A_ij A_jj^-1) (x) (G_ij G_jj^-1) = P (x) Q
    Sigma_i = A_ii (x) G_ii - (P A_jj P^T) (x) (Q G_jj Q^T)

The inputs are x = (h - m, 1), so that A_ii = diag(C_i, 1), or h for a layer without bias. C_i and
G_ii are damped, A_ij and G_ij are not. The paper damps the constant input's variance as well, which
makes it less correlated with the others; here that variance stays 1, and its entries of A_ij are
made smaller instead.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from fused_so._dtypes import accumulate_dtype
from fused_so.optim.eigen import eigenbasis
from fused_so.optim.factors import BOOSTS, Factor, boosted, not_positive_definite
from fused_so.optim.kronecker import KroneckerOptimizer
from fused_so.optim.layers import Layer


class Batch(NamedTuple):
    """A call's rows of one factor, and the factor's mean and weight before they entered it."""

    x: Tensor
    mean: Tensor
    decay: float


class TridiagonalInverse:
    """The interaction of each layer of an optimizer with the next: statistics and inverse."""

    def __init__(self, optimizer: KroneckerOptimizer):
        self._optimizer = optimizer

    def _pairs(self) -> list[tuple[Layer, Layer]]:
        layers = self._optimizer._layers
        return list(itertools.pairwise(layers))

    # Statistics.

    def observe(self, factor: Factor, x: Tensor) -> None:
        """Takes in a call's rows, before they enter the factor's own statistics."""
        if len(x) == 0:
            return
        state, batch = factor.layer.state, factor.layer.batch
        seen = state.get(factor.key("examples"), 0.0)
        if not batch.get(f"{factor.side}_discounted"):
            seen *= factor.layer.group["decay"]
        mean = state.get(
            factor.key("mean"), x.new_zeros(x.shape[1], dtype=accumulate_dtype(x.dtype))
        )
        batch[f"{factor.side}_cross"] = Batch(x, mean.clone(), seen / (seen + len(x)))
        for layer, following in self._pairs():
            # A backward pass comes to the following layer first.
            if layer is factor.layer:
                other = following.batch.pop(f"{factor.side}_cross", None)
                if other is not None:
                    self._average(factor, batch[f"{factor.side}_cross"], other, following)

    def _average(self, factor: Factor, one: Batch, two: Batch, following: Layer) -> None:
        if len(one.x) != len(two.x):
            self._optimizer._warn_once(
                ("rows", factor.layer.name),
                f"layers {factor.layer.name!r} and {following.name!r} see {len(one.x)} and "
                f"{len(two.x)} rows; their interaction is left out",
            )
            return
        x, y = one.x.to(one.mean), two.x.to(two.mean)
        x_mean, y_mean = x.mean(0), y.mean(0)
        # The same mixture as of the factors themselves, see `ops.covariance_`; G is not centered.
        keep, new = one.decay, 1 - one.decay
        if factor.side == "output":
            cross = new / len(x) * x.T @ y
        else:
            cross = new / len(x) * (x - x_mean).T @ (y - y_mean)
            shift = keep * new * (one.mean - x_mean)
            cross = cross.addr(shift, two.mean - y_mean)
        last = factor.get("cross", torch.zeros_like(cross))
        cross = cross.add(last, alpha=keep)
        cross = torch.where(cross.isfinite().all(), cross, last)
        factor.layer.state[factor.key("cross")] = cross

    # The inverse.

    def refresh(self, due: list[Layer]) -> None:
        """Brings up to date what depends on the factors of the layers that are due."""
        for layer in self._optimizer._layers:
            layer.batch.pop("update", None)
        for layer, following in self._pairs():
            if (layer in due or following in due) and "cross" in layer.state:
                for side in ("input", "output"):
                    self._refresh(Factor(layer, side), Factor(following, side))

    def _refresh(self, factor: Factor, following: Factor) -> None:
        lower, cross = self._cholesky(factor), self._cross(factor, following)
        # P = A_ij A_jj^-1
        regression = torch.cholesky_solve(cross.mT, self._cholesky(following)).mT
        # With A_ii = L L^T and L^-1 (P A_jj P^T) L^-T = E S E^T, K = L^-T E diagonalizes both:
        # Sigma^-1 v = K_G ((K_G^T V K_A) / (1 - s_G s_A^T)) K_A^T
        explained = regression @ cross.mT
        whitened = torch.linalg.solve_triangular(lower, explained, upper=False)
        whitened = torch.linalg.solve_triangular(lower, whitened.mT, upper=False)
        values, vectors = eigenbasis((whitened + whitened.mT) / 2)
        basis = torch.linalg.solve_triangular(lower.mT, vectors, upper=True)
        state = factor.layer.state
        state[factor.key("regression")], state[factor.key("joint_basis")] = regression, basis
        state[factor.key("explained")] = values.clamp(max=1)

    def _cholesky(self, factor: Factor) -> Tensor:
        """L with L L^T the damped factor, with more damping where it is not positive definite."""
        damping = self._optimizer.dampings(factor.layer)[factor.side]
        covariance = factor.get("covariance")
        for boost in BOOSTS:
            damped = covariance.clone()
            damped.diagonal().add_(boosted(damping, covariance, boost))
            lower, info = torch.linalg.cholesky_ex(damped)
            if info == 0:
                return torch.block_diag(lower, lower.new_ones(1, 1)) if factor.centered else lower
        raise not_positive_definite(factor, boosted(damping, covariance, boost))

    def _cross(self, factor: Factor, following: Factor) -> Tensor:
        """A_ij, in which the constants' correlations are damped like those of other inputs.

        rho = 1 / sqrt(1 + d / c) for inputs of mean variance c with d added. The constants of two
        layers would otherwise be fully correlated, and Sigma of the biases next to singular
        where g_j explains g_i.
        """
        cross = _undamped_cross(factor, following)
        for side, constants in ((factor, cross[-1]), (following, cross[:, -1])):
            if side.centered:
                c = self._optimizer.mean_variances(side.layer)[0]
                constants.mul_((1 + self._optimizer.dampings(side.layer)["input"] / c).rsqrt())
        return cross

    def precondition(self, layers: list[Layer]) -> dict[Layer, tuple[Tensor, Tensor]]:
        """The updates of weight and bias of those layers that have an inverse.

        Those of all layers come at once: the rest are kept until the next step or refresh.
        """
        if any("update" not in layer.batch for layer in layers):
            found = self._updates()
            for layer in self._optimizer._layers:
                layer.batch["update"] = found.get(layer)
        return {layer: layer.batch["update"] for layer in layers if layer.batch["update"]}

    def _updates(self) -> dict[Layer, tuple[Tensor, Tensor]]:
        """Of the layers that have a gradient and an inverse, each (out, in) and (out,)."""
        optimizer = self._optimizer
        moved = [x for x in optimizer._layers if x.module.weight.grad is not None]
        inverted = [layer for layer in moved if layer.inverted]
        v = {layer: _homogeneous(optimizer, layer) for layer in inverted}
        pairs = [(i, j) for i, j in self._pairs() if i in v and j in v and "regression" in i.state]
        # u = Xi v
        u = dict(v)
        for i, j in pairs:
            state = i.state
            u[i] = v[i] - state["output_regression"] @ v[j] @ state["regression"].mT
        # w = diag(Sigma^-1) u
        w = {layer: self._solve(layer, u[layer], pairs) for layer in inverted}
        # Xi^T w
        result = dict(w)
        for i, j in pairs:
            state = i.state
            result[j] = w[j] - state["output_regression"].mT @ w[i] @ state["regression"]
        return {layer: _update(optimizer, layer, x) for layer, x in result.items()}

    def _solve(self, layer: Layer, v: Tensor, pairs: list[tuple[Layer, Layer]]) -> Tensor:
        state = layer.state
        if not any(i is layer for i, _ in pairs):
            inverse = state["inverse"]
            if layer.centered:
                inverse = torch.block_diag(inverse, inverse.new_ones(1, 1))
            return state["output_inverse"] @ v @ inverse
        k_in, k_out = state["joint_basis"], state["output_joint_basis"]
        left = 1 - state["output_explained"][:, None] * state["explained"]
        left = left.clamp(min=torch.finfo(left.dtype).eps)
        return k_out @ ((k_out.mT @ v @ k_in) / left) @ k_in.mT


def _undamped_cross(factor: Factor, following: Factor) -> Tensor:
    """A_ij of the inputs (x - m, 1), or G_ij."""
    cross = factor.get("cross")
    if factor.side == "output":
        return cross
    m, n = factor.get("mean"), following.get("mean")
    if not factor.centered and not following.centered:
        return cross + m[:, None] * n
    if following.centered:
        # E[x_i 1] is 0 where x_i is centered
        ones = torch.zeros_like(m) if factor.centered else m
        cross = torch.cat([cross, ones[:, None]], 1)
    if factor.centered:
        one = n.new_ones(1)
        last = torch.cat([torch.zeros_like(n), one]) if following.centered else n
        cross = torch.cat([cross, last[None]], 0)
    return cross


def _homogeneous(optimizer: KroneckerOptimizer, layer: Layer) -> Tensor:
    """The gradient in the coordinates W (h - m) + d: (grad_W - grad_b m^T, grad_b)."""
    grad_weight, grad_bias = (g.to(layer.state["mean"]) for g in optimizer.gradients(layer))
    if not layer.centered:
        return grad_weight
    centered = grad_weight.addr(grad_bias, layer.state["mean"], alpha=-1)
    return torch.cat([centered, grad_bias[:, None]], 1)


def _update(optimizer: KroneckerOptimizer, layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Back from W (h - m) + d to W and b = d - W m."""
    if not layer.centered:
        return x, x.new_zeros(len(x))
    weight = x[:, :-1].contiguous()
    return weight, x[:, -1] - weight @ layer.state["mean"]
