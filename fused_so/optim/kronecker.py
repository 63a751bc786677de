"""The engine under the Kronecker-factored optimizers: they differ only in their factors.

In the coordinates W (h - m) + d of a linear layer, with m the mean of its inputs, its curvature is
modelled as F = alpha diag(C, 1) (x) G: C the covariance of the inputs, G that of the gradients
with respect to the outputs, or I. Back in W and b = d - W m that is the homogeneous factor

    [[C + m m^T, m], [m^T, 1]] (x) G

whose damped inverse is `ops.precondition`. `factors.py` keeps the statistics and inverts them; the
engine preconditions with them, by rows or by gradients, bounds the step and applies it.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fused_so import ops
from fused_so._dtypes import accumulate_dtype
from fused_so.optim.base import Update
from fused_so.optim.factors import FactorOptimizer
from fused_so.optim.layers import Layer
from fused_so.optim.products import outer_sum, product, rows_times
from fused_so.optim.rows import Rows, layer_scales

COLD = 0.2
"""The share of its length that the first update of a warm-up has."""


class KroneckerOptimizer(FactorOptimizer):
    """Base of the optimizers that precondition linear layers with Kronecker factors.

    A subclass implements `observes` and `observe` (what a batch tells about a layer) and, where
    the defaults below are not its own, `dampings`, `invert`, `precondition` and
    `curvature_scale`. Every parameter that is not a layer's takes momentum SGD with the same
    settings. Arguments as for `LayerOptimizer`.
    """

    uses_rows = False
    """Whether `precondition` asks for `gradient_rows`."""
    decay_in_metric = False
    """Whether weight decay is part of the gradient that is preconditioned."""

    def __init__(self, model: nn.Module, defaults: dict[str, Any], params: Iterable | None = None):
        self.rewrites_gradients = False
        super().__init__(model, defaults, params)

    # What an optimizer defines.

    def observes(self, layer: Layer) -> bool:
        """Whether the next batch has to be seen."""
        return self.averages(layer)

    def observe(self, layer: Layer, h: Tensor, g: Tensor) -> None:
        """Takes in one call's input h (n, in) and output gradient g (n, out)."""
        raise NotImplementedError

    def curvature_scale(self, layer: Layer) -> Tensor | float:
        """alpha in the layer's metric F = alpha A (x) G, by which the bound's norm is divided."""
        return 1.0

    def largest_decrease(self, group: dict[str, Any], predicted: Tensor) -> Tensor | None:
        """The most by which the update of a group's layers may lower the loss, over alpha.

        None where that is no less than what its gradient predicts, `predicted`, over alpha too.
        """
        return None

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

    def precondition(self, layers: list[Layer]) -> dict[Layer, tuple[Tensor, Tensor]]:
        """The updates of weight and bias of those layers that have an inverse."""
        layers = [layer for layer in layers if layer.inverted]
        updates = self._from_rows(self.gradient_rows(layers))
        others = [layer for layer in layers if layer not in updates]
        states = [layer.state for layer in others]
        gradients = [self.gradients(layer) for layer in others]
        # The inverse of the homogeneous factor, as in George 2017, eq. 6.2.4 and 6.2.5.
        steps = ops.precondition(
            [grad_weight for grad_weight, _ in gradients],
            [grad_bias for _, grad_bias in gradients],
            [self.mean(layer) for layer in others],
            [state["inverse"] for state in states],
            output_inverse=(
                [state["output_inverse"] for state in states] if "output" in self.sides else None
            ),
            alpha=[self.gradient_scale(layer) for layer in others],
        )
        return updates | dict(zip(others, zip(*steps, strict=True), strict=True))

    def _from_rows(
        self, rows: dict[Layer, tuple[Tensor, Tensor, Tensor]]
    ) -> dict[Layer, tuple[Tensor, Tensor]]:
        """The same in fewer operations, from h, g and c of the layers.

        dW = Go g^T Z and db = Go g^T r, with Z = c/alpha (h - 1 m^T) A and r = c/alpha 1 - Z m.
        """
        if not rows:
            return {}
        ones = [
            h.new_full((len(h),), float(layer.bias is not None and layer.bias.grad is not None))
            for layer, (h, _, _) in rows.items()
        ]
        zs, rs = ops.precondition(
            [h for h, _, _ in rows.values()],
            ones,
            [self.mean(layer) for layer in rows],
            [layer.state["inverse"] for layer in rows],
            alpha=[self.gradient_scale(layer) / scale for layer, (_, _, scale) in rows.items()],
        )
        updates = {}
        for (layer, (_, g, _)), z, r in zip(rows.items(), zs, rs, strict=True):
            output_inverse = layer.state.get("output_inverse")
            if output_inverse is not None and len(g) < z.shape[1]:
                # Go g^T takes less than Go dW
                g, output_inverse = rows_times(g, output_inverse), None
            dw, db = outer_sum(g, z)[0], g.T @ r
            if output_inverse is not None:
                dw, db = product(output_inverse, dw), output_inverse @ db
            updates[layer] = dw, db
        return updates

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
            largest = partial(self._largest_decrease, group, kinds.get("layers"))
            bounds = self._bounds(group, list(kinds.values()), largest_decrease=largest)
            for (kind, updates), bound in zip(kinds.items(), bounds, strict=True):
                self._take(group, kind, updates, bound)

    def _largest_decrease(
        self,
        group: dict[str, Any],
        layered: list[Update] | None,
        updates: list[Update],
        predicted: Tensor,
    ) -> Tensor | None:
        return self.largest_decrease(group, predicted) if updates is layered else None

    def _take(self, group: dict, kind: str, updates: list[Update], bound: Tensor) -> None:
        layers = kind == "layers"
        if not self.rewrites_gradients:
            length, momentum = self._warmed(group)
            # Nothing to launch once it is warm.
            bound = bound if length == 1 else bound * length
            decayed = layers and self.decay_in_metric
            self._apply(group, updates, bound, momentum, weight_decay=0.0 if decayed else None)
            return
        for param, delta, *_ in updates:
            bound = bound.to(delta)
            # 0 where a gradient is not finite, and delta neither
            param.grad.copy_(torch.where(bound > 0, bound * delta if layers else delta, 0.0))

    def _warmed(self, group: dict[str, Any]) -> tuple[float, float]:
        """What an update is multiplied by, and the momentum, at this step.

        The first steps, on the curvature of few batches while it changes fastest, decide on much
        of what follows.
        """
        warmup = group.get("warmup", 0)
        cold = self._steps < warmup
        length = COLD + (1 - COLD) * self._steps / warmup if cold else 1.0
        return length, group["momentum"]

    def _updates(self, group: dict) -> dict[str, list[Update]]:
        """The updates of the "layers" and of the "plain" parameters, where there are any.

        They are bounded apart: the norm of the first is in the layers' metric, that of the others
        in the identity.
        """
        layered = []
        layers = [
            layer
            for layer in self._layers
            if layer.group is group and layer.module.weight.grad is not None
        ]
        found = self.precondition(layers)
        for layer in layers:
            update = found.get(layer)
            if update is None:
                self._warn_once(
                    ("unseen", layer.name),
                    f"no batch of layer {layer.name!r} was observed (was the model, or is the "
                    f"layer's weight, used without calling it?); it takes the plain gradient until "
                    f"one is",
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

    def gradient_rows(self, layers: list[Layer]) -> dict[Layer, tuple[Tensor, Tensor, Tensor]]:
        """h, g and c of the layers with gradients that are known to be c g^T h and c g^T 1.

        A loss may use a weight in other ways, several backward passes may have met, and
        gradients may have been clipped (c) or changed; p.grad is what counts. None of them on a
        GPU, where knowing would mean waiting for it.
        """
        kinds: dict[tuple, list[tuple[Layer, Rows]]] = {}
        for layer in layers:
            rows, gradient = layer.batch.get("kept_rows"), layer.module.weight.grad
            if rows is not None and rows[0].dtype == gradient.dtype:
                (h, g), bias = rows, layer.bias
                of = Rows(g, h, gradient, None if bias is None else bias.grad)
                kinds.setdefault((h.dtype, h.device), []).append((layer, of))
        found = {}
        for same in kinds.values():
            scales = layer_scales([rows for _, rows in same])
            for (layer, rows), scale in zip(same, scales, strict=True):
                if scale is not None:
                    found[layer] = (rows.h, rows.g, scale)
        return found

    # What can be plotted.

    @torch.no_grad()
    def diagnostics(self) -> dict[str, Any]:
        """What the last step did and what the factors are like; computed here, and only here.

        Returns:
            "steps"; "norm", those of the last updates in their metrics, group by group, of
            layers and then of other parameters; "bound", the factors that max_norm (and
            max_decrease) multiplied them by; and for each layer "refreshes" of its inverses, and
            for each side its "damping" and "condition", the condition number of the damped factor
            as it is now.
        """
        return {
            "steps": self._steps,
            "norm": [square.clamp(min=0).sqrt().item() for square, _ in self._bounded],
            "bound": [factor.item() for _, factor in self._bounded],
            "layers": {layer.name: self.layer_diagnostics(layer) for layer in self._layers},
        }
