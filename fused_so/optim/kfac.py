"""K-FAC, Kronecker-factored approximate curvature (Martens and Grosse 2015)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fused_so.likelihoods import Likelihood
from fused_so.optim.base import check_choice
from fused_so.optim.factors import Factor
from fused_so.optim.fisher import FisherOptimizer
from fused_so.optim.layers import Layer
from fused_so.optim.recipe import PAPER, PaperRecipe
from fused_so.optim.tridiagonal import TridiagonalInverse

STRUCTURES = ("block_diagonal", "block_tridiagonal")
DEFAULTS = {
    "lr": 0.06,
    "damping": 0.0,
    "relative_damping": 0.1,
    "statistics_every": 5,
    "inverse_every": "auto",
    "decay": 0.8,
    "warmup": 64,
}


class KFAC(FisherOptimizer):
    r"""Natural gradient descent with the Fisher of every layer as a Kronecker product.

    For a linear layer with inputs h of mean m and covariance C, and gradients g of the loss with
    respect to its outputs, G = E[g g^T] over the model's own distribution of targets,

    .. math::
        \Delta W = G_\lambda^{-1} (\nabla_W - \nabla_b m^T)\, C_\lambda^{-1}, \qquad
        \Delta b = G_\lambda^{-1} \nabla_b - \Delta W m

    which is the inverse of the damped homogeneous factor times that of G (Martens and Grosse
    2015, section 3). Damping is factored: with c = tr C / in, k = tr G / out and pi^2 = c / k,

    .. math::
        C_\lambda = C + (\pi \sqrt{\lambda + \eta} + \sqrt\delta\, c) I, \qquad
        G_\lambda = G + (\sqrt{\lambda + \eta} / \pi + \sqrt\delta\, k) I

    lambda being `damping`, delta `relative_damping`, eta `weight_decay`. `p.grad` is only read.

    Args:
        model: the module to train; called as `model(...)` and returning one tensor, unless
            factors are "empirical". Evaluate it under torch.no_grad(): every other forward pass
            is taken for training. Parameters that are no nn.Linear's take momentum SGD with the
            same lr and bound, and a warning lists them.
        lr: the learning rate, >= 0. While max_norm = 1 binds, as it usually does, a step without
            momentum changes the model's distribution, as the factors have it, by lr^2 / 2 nats an
            example; with momentum beta, lr / (1 - beta) takes the place of lr.
        likelihood: that of the loss: `fused_so.Categorical()` and the others, or the nn loss in
            use. It must divide by what the loss divides by (`reduction`), and take outputs of
            the model's shape, (n, classes, ...). Targets that the loss ignores count like others
            in C, G and N, unknown to the model's own pass. None: the factors are "empirical", in
            which they have no gradient but count as rows.
        factors: whose gradients make G. "sampled": of targets drawn from the model, one more
            backward pass on steps with statistics. "gauss_newton": of random signs times a root
            of the curvature at the outputs; the same expectation, less noise. "exact": that
            expectation, with as many passes as there are outputs. "empirical": of the loss
            itself, a mean over rows (with a likelihood of reduction "sum" a sum), in one backward
            pass a step; no extra pass, but no Fisher, and it vanishes faster than the gradient
            where the fit is good: without a likelihood, whose loss bounds them, steps then grow.
        structure: "block_diagonal", or "block_tridiagonal", which also models the interaction of
            each layer with the next (section 3.3; the layers in the order of `model.modules()`,
            each called once in a forward pass) for eigendecompositions at each refresh and about
            three times the products a step. Unlike the other inputs' the variance of the constant
            one is not damped, but its correlation with that of the next layer is.
        damping: lambda >= 0, in units of the loss's curvature.
        relative_damping: delta >= 0, relative to the mean curvature of the layer.
        momentum: of the preconditioned updates, in [0, 1].
        nesterov: take the look-ahead form of momentum.
        weight_decay: eta >= 0: eta / 2 times the squared norm is part of objective and metric.
            Parameters that no layer owns decay as in SGD.
        statistics_every: average the statistics every so many steps.
        inverse_every, drift_tolerance, decay: as for `ACP`.
        max_norm: an upper bound for the norm of a param group's update in its metric, before lr
            (a "KL clip"): its square is twice the divergence, in nats an example, by which the
            update changes the model's distribution, to second order and as the factors have it;
            in a deep network it may really change it by much more. None for no bound.
        max_decrease: an upper bound for the decrease of the loss that the update of a param group
            predicts, before lr: its product with the gradient, in multiples of the loss of the
            batch; Newton's step on a quadratic loss of minimum 0 has 2. It takes over where the
            curvature, and with it max_norm, vanishes, as where a classifier fits its data. The
            loss (with weight_decay the objective) is read off the gradients at the outputs of the
            model, and taken to be that of the likelihood: other terms of it are not counted, so
            that a penalty on the weights is better given as weight_decay. Without a likelihood,
            or with None, there is no such bound.
        warmup: the number of first steps over which updates grow from a fifth to their full
            length, and momentum from 0, while what it is less by makes updates longer, so that
            lr / (1 - momentum) stays; 0 for none.
        recipe: None, or "paper" for the whole of Martens and Grosse 2015 (sections 6 and 7 of the
            long version), which needs `step(closure)` and a likelihood: lambda and the factors'
            damping are adapted, step size and momentum come from the exact Fisher's quadratic
            model on the batch; momentum, nesterov, max_norm, max_decrease and warmup are ignored.
            At times the closure is called again, and must compute the loss of the same batch. The
            model must have forward-mode derivatives, and parameters in float32 or float64. The
            options whose default is None have one that depends on the recipe.
        grad_scaler: the torch.amp.GradScaler in use, if any; "empirical" and max_decrease depend
            on it.
        params: parameters or param groups, as for `ACP`; recipe="paper" takes one group.

    Raises:
        TypeError, ValueError: an option out of its range; a model without trainable nn.Linear; a
            layer whose weight and bias are in different groups; factors without a likelihood.
        RuntimeError: from `step`, if a factor cannot be inverted even with the damping raised a
            thousandfold.

    The step that max_decrease bounds is Polyak's, as bounded by Loizou et al. (2021, SPS_max), in
    the metric of the factors and with a minimum of 0.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float | None = None,
        *,
        likelihood: Likelihood | nn.Module | None = None,
        factors: str | None = None,
        structure: str = "block_diagonal",
        damping: float | None = None,
        relative_damping: float | None = None,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        statistics_every: int | None = None,
        inverse_every: int | str | None = None,
        drift_tolerance: float = 0.4,
        decay: float | None = None,
        max_norm: float | None = 1.0,
        max_decrease: float | None = 2.0,
        warmup: float | None = None,
        recipe: str | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        params: Iterable | None = None,
    ):
        check_choice("structure", structure, STRUCTURES)
        if recipe not in (None, "paper"):
            raise ValueError(f"recipe must be None or 'paper', got {recipe!r}")
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
            "max_decrease": max_decrease,
            "warmup": warmup,
            "gamma": None,
        }
        for name, value in (PAPER if recipe == "paper" else DEFAULTS).items():
            options[name] = value if options[name] is None else options[name]
        self._recipe: PaperRecipe | None = None
        self._tridiagonal: TridiagonalInverse | None = None
        fisher = {"likelihood": likelihood, "factors": factors, "grad_scaler": grad_scaler}
        super().__init__(model, options, params, **fisher)
        if structure == "block_tridiagonal":
            self._tridiagonal = TridiagonalInverse(self)
        if recipe == "paper":
            try:
                self._recipe = PaperRecipe(self)
            except ValueError:
                self.remove_hooks()
                raise

    def _choices(self) -> dict[str, Any]:
        return {
            **super()._choices(),
            "structure": STRUCTURES[self._tridiagonal is not None],
            "recipe": None if self._recipe is None else "paper",
        }

    def dampings(self, layer: Layer) -> dict[str, Tensor]:
        group = layer.group
        c, k = self.mean_variances(layer)
        # pi gamma and gamma / pi, with gamma = sqrt(lambda + eta) unless it is adapted
        gamma = group["gamma"]
        if gamma is None:
            gamma = math.sqrt(group["damping"] + group["weight_decay"])
        pi, root = (c / k).sqrt(), math.sqrt(group["relative_damping"])
        return {"input": pi * gamma + root * c, "output": gamma / pi + root * k}

    # The block-tridiagonal inverse.

    def average(self, factor: Factor, x: Tensor) -> None:
        if self._tridiagonal is not None:
            self._tridiagonal.observe(factor, x)
        super().average(factor, x)

    def invert_factors(self, layers: list[Layer]) -> None:
        super().invert_factors(layers)
        if self._tridiagonal is not None:
            self._tridiagonal.refresh(layers)

    def precondition(self, layers: list[Layer]) -> dict[Layer, tuple[Tensor, Tensor]]:
        if self._tridiagonal is None:
            return super().precondition(layers)
        return self._tridiagonal.precondition(layers)

    # The paper's recipe.

    def _adopt(self) -> None:
        if self._recipe is not None:
            self._recipe.check()
        super()._adopt()

    def _update(self) -> None:
        if self._recipe is None:
            super()._update()
        else:
            self._recipe.update()

    def _wants_loss(self) -> bool:
        return self._recipe is None and super()._wants_loss()

    def diagnostics(self) -> dict[str, Any]:
        """As for every Kronecker optimizer; with recipe="paper" also "damping" (lambda), "gamma",
        "ratio", of the last evaluated change of the loss to the predicted one; "norm" is that of
        the last step under the damped exact Fisher."""
        report = super().diagnostics()
        return report if self._recipe is None else report | self._recipe.diagnostics()

    def remove_hooks(self) -> None:
        super().remove_hooks()
        if self._recipe is not None:
            self._recipe.remove()
