"""UBP, updated backpropagation (George 2017, chapter 5, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fused_so.likelihoods import Likelihood, likelihood_of
from fused_so.ops import _check
from fused_so.optim import ubp_cost
from fused_so.optim.base import (
    ModelOptimizer,
    check_choice,
    check_count,
    check_grad_scaler,
    check_number,
)
from fused_so.optim.chain import Link, find_chain, refuse_random
from fused_so.optim.curvature import at_outputs
from fused_so.optim.passage import Passage, Watch
from fused_so.optim.ubp_descent import Descent, change_of

CURVATURES = ("gauss_newton", "hessian")
MODES = ("auto", "jacobian", "matrix_free", "sketch")


class UBP(ModelOptimizer):
    r"""Gradient descent whose backpropagated signal knows of the updates above it.

    SGD updates a layer by its gradient at the old values of the layers above, which change in the
    same step. UBP goes from the top down and gives every layer the gradient, to first order in
    the step, after the layers above have been updated. With g the signal that reaches the output
    of a layer h' = phi(a), a = W h + b, for each example; sums go over the batch:

    .. math::
        da = \phi'(a)\, g, \qquad
        \nabla_W = \sum da\, h^T, \quad \nabla_b = \sum da, \qquad
        g_{below} = (W + \Delta W)^T da + W^T H (\Delta W h + \Delta b)

    Delta is what the step will really change: with the layer's lr, momentum, weight decay and
    what was clipped off. H is the curvature of the loss with respect to a, an example at a time,
    with the old weights above. `explain` says what that costs. `p.grad` is only read and stays the
    true gradient.

    Peak memory of "matrix_free": within twice that of SGD with momentum, everything counted, on the
    784-1000-500-250-30 tanh autoencoder up to batch 1024.

    The model is a chain: nn.Sequential, nested or not, of nn.Linear, the elementwise activations
    of `fused_so.optim.chain`, nn.Flatten, and nn.Dropout in eval mode. The loss is that of
    `likelihood`, on the model's outputs (n, o). One batch a step: hooks keep the rows of the last
    backward pass through the model until the step, whether `loss.backward(); opt.step()` or
    `opt.step(closure)` runs it. The gradients are to be those of that pass, up to one factor, the
    topmost one's. A parameter whose gradient is not (several passes were accumulated, or it was
    clipped by value or by a norm of its own) takes the step of SGD, and a warning says so; a
    penalty in the loss that is small beside the gradient is taken along uncorrected.

    Args:
        model: the chain to train.
        lr: the learning rate, >= 0; where max_norm does not bind, about that of SGD.
        likelihood: what the loss is: a `fused_so.likelihoods.Likelihood` with the loss's own
            reduction, or the nn loss that has one.
        curvature: "gauss_newton": J^T D J, with J the Jacobian of the outputs and D the
            likelihood's curvature. "hessian": all of it, with the second derivatives of the
            activations; the signal's error is then of second order in lr. For piecewise linear
            activations the two are the same.
        mode: "matrix_free": H v by products through the layers above; exact. "jacobian": by the
            explicit rows of a square root of H, (n, o, d), and fewer below a narrow layer; exact.
            "sketch": by `sketch_size` random combinations of those rows, an unbiased estimate.
            "auto": the exact one with fewer operations. "hessian" takes "matrix_free" or "auto".
        sketch_size: rows a sketch has, >= 1. Its noise falls with the root.
        seed: of the sketches, >= 0; with the number of the step it determines the draw, so that a
            checkpoint resumes bit for bit.
        max_correction: an upper bound > 0 for the norm, over a batch, of what a layer's signal
            differs from the plain one, relative to the plain one: a longer difference is
            shortened. Corrections are multiplied by H at every layer and may explode on the way
            down (section 5.5). None for no bound.
        momentum: of the updates, in [0, 1].
        nesterov: take the look-ahead form of momentum.
        weight_decay: >= 0, added to the update times the parameter.
        max_norm: an upper bound > 0 for the norm of a param group's gradient; a longer one is
            scaled down, and its corrections with it. None for no bound. With it one lr serves
            losses of different sizes.
        grad_scaler: the torch.amp.GradScaler in use, if any: the signals are seen before they are
            unscaled. Without it corrections are lost.
        params: parameters or param groups of the model; by default all that require a gradient. A
            group may set lr, max_correction, momentum, nesterov, weight_decay, max_norm. A layer
            has one signal and goes by the max_correction of its weight's group, of its bias's only
            if the weight is not trained. Other parameters stay as they are, and signals pass
            through them.

    Raises:
        TypeError, ValueError: an option out of its range, or a model that is no chain; also from
            a forward pass, if a dropout is in training mode then or the inputs are not rows.
        RuntimeError: from `step`, if there are gradients but no backward pass through the whole
            model was seen since the last step.

    Source: George 2017, Algorithm 2, where the update is -lr times the gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.2,
        *,
        likelihood: Likelihood | nn.Module,
        curvature: str = "gauss_newton",
        mode: str = "auto",
        sketch_size: int = 8,
        seed: int = 0,
        max_correction: float | None = 0.1,
        momentum: float = 0.9,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        max_norm: float | None = 1.0,
        grad_scaler: torch.amp.GradScaler | None = None,
        params: Iterable | None = None,
    ):
        check_choice("curvature", curvature, CURVATURES)
        check_choice("mode", mode, MODES)
        if curvature == "hessian" and mode in ("jacobian", "sketch"):
            raise ValueError(
                f"mode must be 'matrix_free' or 'auto' for curvature='hessian', which may be "
                f"indefinite and then has no square root to carry; got {mode!r}"
            )
        check_count("sketch_size", sketch_size)
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise ValueError(f"seed must be a whole number >= 0, got {seed!r}")
        check_grad_scaler(grad_scaler)
        self._likelihood = likelihood_of(likelihood, name="likelihood")
        self._curvature, self._mode = curvature, mode
        self._sketch_size, self._seed = sketch_size, seed
        self._grad_scaler = grad_scaler
        self._links: list[Link] = []
        self._passage: Passage | None = None
        self._ratios: dict[str, Tensor] = {}
        options = {
            "lr": lr,
            "max_correction": max_correction,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "max_norm": max_norm,
        }
        super().__init__(model, options, params)
        self._links, last, dropouts = find_chain(model)
        self._adopt()
        self._watch = Watch(self._links, last, partial(refuse_random, dropouts), self._receive)

    # Options, and the model.

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        _check.boolean("nesterov", group["nesterov"])
        if group["max_correction"] is not None:
            check_number("max_correction", group["max_correction"], 0.0, positive=True)

    def _adopt(self) -> None:
        owned = {p for link in self._links for p in link.linear.parameters()}
        for group in self.param_groups:
            for p in group["params"]:
                if p not in owned:
                    raise ValueError(
                        f"params must be weights and biases of the model's nn.Linear layers, got "
                        f"one of shape {tuple(p.shape)} that is not"
                    )
        places = {(p.device, p.dtype) for p in owned}
        if len(places) > 1:
            raise ValueError(
                f"model must have its parameters on one device and in one dtype, got "
                f"{sorted(map(str, places))}"
            )

    def _layer_shapes(self) -> dict[str, tuple[int, int, bool]]:
        return {
            link.name: (
                link.linear.in_features,
                link.linear.out_features,
                link.linear.bias is not None,
            )
            for link in self._links
        }

    def remove_hooks(self) -> None:
        """Detaches the optimizer from the model; it can no longer step."""
        self._watch.remove()

    # What it has to say.

    def diagnostics(self) -> dict[str, float]:
        """How much the last step changed the signal at each layer's output, before the bound.

        By layer name: the norm over the batch of the updated signal minus the plain one, relative
        to the plain one. The top layer has the plain one. Waits for the device.
        """
        return {name: ratio.item() for name, ratio in self._ratios.items()}

    def explain(self, batch_size: int = 128) -> str:
        """Which mode computes the corrections and why, counted in operations and numbers held."""
        check_count("batch_size", batch_size)
        taken = self._taken()
        lines = [
            f"curvature {self._curvature!r}, mode {self._mode!r} takes {taken!r}:",
            *ubp_cost.lines(self._shapes(), self._costs(), batch_size),
        ]
        if self._mode == "auto":
            only = "the only mode that has the Hessian"
            fewer = "the exact mode with fewer operations; both grow alike with the batch"
            lines.append(f"  {taken} is {only if self._curvature == 'hessian' else fewer}")
        return "\n".join(lines)

    def _shapes(self) -> list[tuple[int, int]]:
        return [(link.linear.out_features, link.linear.in_features) for link in self._links]

    def _costs(self) -> dict[str, ubp_cost.Cost]:
        return ubp_cost.of_modes(self._shapes(), self._curvature, self._sketch_size)

    def _taken(self) -> str:
        return self._mode if self._mode != "auto" else ubp_cost.cheaper_exact(self._costs())

    # The step.

    def _receive(self, passage: Passage) -> None:
        self._passage = passage

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, and with them the rows of their batch."""
        super().zero_grad(set_to_none)
        self._forget_batch()

    def _forget_batch(self) -> None:
        if self._passage is not None:
            # The graph of a loss that the caller still holds has the same one.
            self._passage.clear()
            self._passage = None

    def _update(self) -> None:
        groups = {p: group for group in self.param_groups for p in group["params"]}
        moving = [
            link
            for link in self._links
            if any(p in groups and p.grad is not None for p in link.linear.parameters())
        ]
        if not moving:
            return
        if self._passage is None:
            raise RuntimeError(
                "UBP saw no backward pass through the whole model since the last step or "
                "zero_grad; call step() after loss.backward(), or step(closure) with a closure "
                "that clears the gradients, computes the loss and calls backward()"
            )
        bounds = {
            id(group): self._bounds(group, [self._plain_updates(group)])[0]
            for group in self.param_groups
            if any(p.grad is not None for p in group["params"])
        }
        descent = Descent(
            self._links,
            self._passage,
            groups,
            lambda p: bounds[id(groups[p])],
            lambda p, delta: change_of(groups[p], self.state.get(p, {}), p, delta),
            at_outputs(
                self._likelihood,
                self._passage.outputs,
                self._passage.signals[-1],
                self._taken(),
                self._sketch_size,
                self._generator,
            ),
            hessian=self._curvature == "hessian",
            unscale=self._unscale(),
        )
        descent.run()
        self._forget_batch()
        self._ratios = descent.ratios
        self._readback.watch(descent.agrees, self._warn_unless_agreeing)
        # Sums meet every NaN and Inf, in one pass.
        sums = torch.stack([update.delta.sum() for update in descent.updates])
        finite = sums.isfinite().all().double()
        self._readback.watch(finite, self._warn_unless_finite)
        for group in self.param_groups:
            own = [update for update in descent.updates if groups[update.param] is group]
            self._apply(group, own, finite)

    def _generator(self) -> torch.Generator:
        device = self._passage.outputs.device
        return torch.Generator(device).manual_seed(self._seed + self._steps)

    def _unscale(self) -> Tensor | None:
        scaler = self._grad_scaler
        if scaler is None or scaler._scale is None:
            return None
        return 1.0 / scaler._scale  # get_scale() would wait for the device

    def _warn_unless_agreeing(self, agrees: Tensor) -> None:
        if not agrees:
            self._warn_once(
                ("passes",),
                "some gradients are not those of the last backward pass through the model, up to "
                "one factor (were several passes accumulated, gradients clipped by value or "
                "layer by layer, or too small for float16?); their parameters take the step of SGD",
            )
