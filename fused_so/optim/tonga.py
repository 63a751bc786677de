"""TONGA, descent in the metric of the gradients' covariance (Le Roux, Manzagol and Bengio 2008)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fused_so._dtypes import accumulate
from fused_so.likelihoods import Likelihood, likelihood_of
from fused_so.ops import _check
from fused_so.optim.base import (
    Update,
    check_choice,
    check_count,
    check_grad_scaler,
    check_number,
    loss_scale,
)
from fused_so.optim.gram import damped_step
from fused_so.optim.layers import Layer, LayerOptimizer
from fused_so.optim.past import draw, with_past
from fused_so.optim.rows import Rows, common_scale, joined


class TONGA(LayerOptimizer):
    r"""Preconditions the gradient by the covariance of the examples' gradients, all layers at once.

    .. math::
        \Delta = (\lambda I + C)^{-1} \bar g, \qquad C = \frac1n \sum_i g_i g_i^T, \qquad
        \lambda = \epsilon + \frac\delta n \max(s, \bar s), \qquad
        s = \frac1n \sum_i ||g_i||^2

    with g_i example i's own gradient (that of a mean over examples times n) and their mean, and
    s-bar the average of s over past batches. The full matrix costs one (n, n) inner product and
    Cholesky factorization, and one product more than a gradient has: see `fused_so.optim.gram`.

    If `centered`, the mean's own part is subtracted from C. Within one batch that only lengthens
    the step, by n / (lambda sum_i w_i) with w = (lambda I + K / n)^-1 1: the direction is the
    same. The step is then a weighted mean of the examples' gradients over lambda, for which
    examples in directions of high variance weigh less. Uncentered, a step of lr 1 changes the
    losses of the batch's examples by at most 1 in the root mean square.

    With `decay`, C is an average over past batches too, weighted by powers of decay, around the
    average gradient if `centered`. Of the past it keeps `directions` examples a layer in the form
    (g_i, h_i), which takes directions (in + out) numbers a layer and not in times out each, and
    so many rows more in the products. After each step they are drawn anew from the old ones and
    the batch, in proportion to their part in the trace of C, and weighted so that the expectation
    of C is kept.

    An example is a row of a layer's input: positions of a sequence count as examples. Layers with
    equally many rows, at most 16,384, share a C, others have one of their own. Parameters that no
    nn.Linear owns take momentum SGD with the same lr, and a warning lists them. `p.grad` is only
    read; a step takes a product more where it has been changed otherwise than by a factor (weight
    penalties in the loss), and always on a GPU, where looking would mean waiting.

    Args:
        model: the module to train.
        lr: the learning rate, >= 0, in units of the loss: an update, before momentum, predicts that
            the loss falls by up to lr. The default is for losses of nats an example; a smaller
            one, like a mean squared error, needs its likelihood, or a smaller lr, with momentum
            such that lr / (1 - momentum) is below the loss.
        likelihood: that of the loss, as for `KFAC`, if the loss is to bound the updates.
        damping: epsilon >= 0, in units of squared gradients of one example. The default is there
            for gradients that are mere rounding, of a model that fits all its data.
        relative_damping: delta >= 0, relative to the mean of the n eigenvalues that an uncentered
            C can have besides zero. One of the two is positive.
        damping_decay: what s-bar keeps of itself in a step, in (0, 1); None: s is the batch's
            alone. Where a model fits most of its data, a batch without one of the few misfit
            examples has next to no C, and with a damping of its own next to none of that: the
            longest steps would be those that least is known about.
        centered: use the covariance, or the uncentered second moment.
        decay: what an average over past batches keeps of itself in a step, in (0, 1); None: C is
            the batch's alone.
        directions: how many past examples stand for the past, >= 1.
        momentum: of the preconditioned updates, in [0, 1].
        nesterov: take the look-ahead form of momentum.
        weight_decay: >= 0, outside the metric: added to the update times the parameter.
        max_norm: an upper bound for the norm of a param group's update in its damped metric; None
            for no bound.
        max_decrease: with a likelihood, an upper bound for the decrease of the loss that the update
            of a param group predicts, as for `KFAC`; None for no bound. With momentum beta,
            lr max_decrease / (1 - beta) of the loss may be predicted to go at a time, by default
            all of it.
        loss_reduction: "mean" if the loss is a mean over examples, "sum" if it is a sum. The step
            is the same.
        grad_scaler: the torch.amp.GradScaler in use, if any; rows are seen before they are
            unscaled.
        params: parameters or param groups; by default all of the model's that require a gradient.
            A group may set any option but likelihood, decay, directions, loss_reduction and
            grad_scaler.

    Raises:
        TypeError, ValueError: an option out of its range, a model without trainable nn.Linear,
            or a layer whose weight and bias are in different groups.
        RuntimeError: from `step`, if C cannot be factorized even with the damping raised a
            thousandfold; no parameter is changed.

    Source: Pascanu and Bengio 2014, section 4.1, eq. 12 and 13. For cross-entropy, the uncentered
    C is what George 2017, section 3.4, offers as a cheap Gauss-Newton matrix. It is the empirical
    Fisher: each example's one observed target in place of an expectation over targets. It has
    rank n at most, vanishes with the square of the residuals, faster than the Gauss-Newton matrix,
    as the fit becomes perfect, and knows nothing of targets that were not observed; the two are
    close only where the model's own targets would look like the observed ones.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.5,
        damping: float = 1e-8,
        *,
        likelihood: Likelihood | nn.Module | None = None,
        relative_damping: float = 0.1,
        damping_decay: float | None = 0.99,
        centered: bool = False,
        decay: float | None = None,
        directions: int = 128,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        max_norm: float | None = None,
        max_decrease: float | None = 0.2,
        loss_reduction: str = "mean",
        grad_scaler: torch.amp.GradScaler | None = None,
        params: Iterable | None = None,
    ):
        check_choice("loss_reduction", loss_reduction, ("mean", "sum"))
        _check_decay("decay", decay)
        check_count("directions", directions)
        check_grad_scaler(grad_scaler)
        likelihood = None if likelihood is None else likelihood_of(likelihood, name="likelihood")
        self._decay, self._directions = decay, directions
        self._loss_reduction, self._grad_scaler = loss_reduction, grad_scaler
        options = {
            "lr": lr,
            "damping": damping,
            "relative_damping": relative_damping,
            "damping_decay": damping_decay,
            "centered": centered,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "max_norm": max_norm,
            "max_decrease": max_decrease,
        }
        super().__init__(model, options, params)
        if likelihood is not None:
            self._watch_loss(likelihood)

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        check_number("damping", group["damping"], 0.0)
        check_number("relative_damping", group["relative_damping"], 0.0)
        if not group["damping"] and not group["relative_damping"]:
            raise ValueError("damping or relative_damping must be positive, got 0 for both")
        _check_decay("damping_decay", group["damping_decay"])
        _check.boolean("centered", group["centered"])

    def captures(self, layer: Layer) -> bool:
        return True

    def receive(self, layer: Layer, h: Tensor, g: Tensor) -> None:
        layer.batch.setdefault("rows", []).append((h, g))

    def _update(self) -> None:
        found = []
        # All before any is applied: a factorization that fails changes nothing.
        for group in self.param_groups:
            blocks = [self._block_updates(block) for block in self._blocks(group)]
            layered = [update for updates, _ in blocks for update in updates]
            squares = [square for _, square in blocks]
            known = None if any(square is None for square in squares) else sum(squares)
            plain = self._plain_updates(group, (update.param for update in layered))
            kinds = [pair for pair in ((layered, known), (plain, None)) if pair[0]]
            found.append((group, kinds))
        for group, kinds in found:
            updates, squares = [u for u, _ in kinds], [square for _, square in kinds]
            bounds = self._bounds(group, updates, squares, partial(self._largest_decrease, group))
            for same, bound in zip(updates, bounds, strict=True):
                self._apply(group, same, bound)

    def _largest_decrease(
        self, group: dict[str, Any], updates: list[Update], predicted: Tensor
    ) -> Tensor | None:
        """max_decrease times the batch's loss, over alpha; None of plain gradients."""
        if updates[0].delta is updates[0].param.grad:
            return None
        alpha = updates[0].alpha
        loss = self._loss_bounding(group, alpha * predicted)
        return None if loss is None else group["max_decrease"] / alpha * loss

    def _blocks(self, group: dict[str, Any]) -> list[list[tuple[Layer, Rows]]]:
        """The group's layers with what they received, those with equally many rows together."""
        blocks: dict[tuple, list[tuple[Layer, Rows]]] = {}
        for layer in self._layers:
            if layer.group is not group or layer.module.weight.grad is None:
                continue
            calls = layer.batch.get("rows")
            if not calls:
                self._warn_once(
                    ("unseen", layer.name),
                    f"no batch of layer {layer.name!r} was observed (is its weight used without "
                    f"calling the module?); it takes the plain gradient",
                )
                continue
            h, g = (accumulate(joined(parts)) for parts in zip(*calls, strict=True))
            if not len(h):
                continue
            bias = None if layer.bias is None else layer.bias.grad
            rows = Rows(g, h, layer.module.weight.grad, bias)
            blocks.setdefault((len(h), h.device, h.dtype), []).append((layer, rows))
        return list(blocks.values())

    def _block_updates(self, block: list[tuple[Layer, Rows]]) -> tuple[list[Update], Tensor | None]:
        """The updates, and sum Delta^T g / alpha over them if it is known."""
        layers, rows = zip(*block, strict=True)
        n, group = len(rows[0].h), layers[0].group
        ones = rows[0].g.new_ones(n)
        # unit r_i is the gradient of example i alone, and p.grad = c sum_i r_i if c is known.
        unit = ones * (n if self._loss_reduction == "mean" else 1)
        unit = unit / loss_scale(self._grad_scaler, ones.device)
        summed = 1 if self._loss_reduction == "mean" else n
        c = None if self._readback.waits_for(ones) else common_scale(rows)
        weights, pool, shares = ones / n, list(rows), None if c is None else c * ones
        states = [layer.state for layer in layers]
        members = [self._layers.index(layer) for layer in layers]
        if self._decay is not None:
            weights, unit, pool = with_past(states, members, rows, unit, self._decay)
            shares = None if c is None else torch.cat([shares, torch.zeros_like(unit[n:])])
        roots = weights.sqrt()
        scales = roots * unit
        step = damped_step(
            pool,
            scales=scales,
            damping=group["damping"],
            relative_damping=group["relative_damping"],
            trace=_trace(states, ones) if group["damping_decay"] else None,
            mean=roots if group["centered"] else None,
            # b = sum_i (c / scales_i) u_i; directions without weight have no part in it
            share=None if c is None else torch.where(shares != 0, shares / scales, 0.0),
            waits=not self._readback.waits_for(ones),
        )
        if group["damping_decay"]:
            _average_trace(states, step.energies.sum(), group["damping_decay"])
        if self._decay is not None:
            # The step's number as the seed, so that a resumed run draws the same.
            energies, count = step.energies, self._directions
            draw(states, members, pool, weights, unit, energies, count, self._steps)
        updates = []
        for layer, pair in zip(layers, step.updates, strict=True):
            for param, update in zip((layer.module.weight, layer.bias), pair, strict=True):
                if update is not None:
                    delta = update if summed == 1 else update.div_(summed)
                    updates.append(Update(param, delta, summed))
        # Delta^T g / alpha, with Delta and its scale both less by the factor n
        square = None if step.square is None else step.square.double() / summed**2
        return updates, square


def _check_decay(name: str, decay: float | None) -> None:
    if decay is not None:
        check_number(name, decay, 0.0, 1.0, positive=True)
        if decay == 1:
            raise ValueError(f"{name} must be less than 1, got 1")


def _trace(states: list[dict[str, Any]], like: Tensor) -> Tensor | None:
    """The average of s over past batches; the largest, where layers had other company then."""
    known = [state["trace"] for state in states if "trace" in state]
    return torch.stack(known).amax().to(like) if known else None


def _average_trace(states: list[dict[str, Any]], trace: Tensor, decay: float) -> None:
    """Adds a batch's s to every layer's average; one that is not finite is forgotten."""
    # 0: no batch has been averaged yet
    none = torch.zeros_like(trace)
    before = torch.stack([state.get("trace", none) for state in states]).to(trace)
    after = torch.lerp(torch.where(before > 0, before, trace), trace, 1 - decay)
    after = torch.where(torch.isfinite(trace), after, before)
    for state, average in zip(states, after.unbind(), strict=True):
        state["trace"] = average
