"""The engine under the Kronecker-factored optimizers: CGD and ACP differ only in their factors.

Every linear layer's curvature is modelled as alpha [[C + m m^T, m], [m^T, 1]] (x) I, with m and
C the mean and covariance of its inputs. The engine keeps the statistics, bounds the step and
applies it; an optimizer says what the factors are.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fused_so import ops
from fused_so._dtypes import accumulate_dtype
from fused_so.optim.base import Update
from fused_so.optim.layers import Layer, LayerOptimizer


class KroneckerOptimizer(LayerOptimizer):
    """Base of the optimizers that precondition linear layers with Kronecker factors.

    A subclass implements `observes` and `observe` (what a batch tells about a layer), `refresh`
    (once a step, before preconditioning) and `precondition` (the layer's update). Every parameter
    that is not a layer's takes momentum SGD with the same settings. Arguments as for
    `LayerOptimizer`.
    """

    # What an optimizer defines.

    uses_rows = False
    """Whether `precondition` asks for `gradient_rows`."""

    def observes(self, layer: Layer) -> bool:
        """Whether the next batch has to be seen."""
        raise NotImplementedError

    def observe(self, layer: Layer, h: Tensor, g: Tensor) -> None:
        """Takes in one call's input h (n, in) and output gradient g (n, out)."""
        raise NotImplementedError

    def refresh(self, layers: list[Layer]) -> None:
        """Brings the layers' factors up to date."""

    def precondition(self, layer: Layer) -> tuple[Tensor, Tensor] | None:
        """The update of weight and bias, or None while the layer has no statistics."""
        raise NotImplementedError

    def curvature_scale(self, layer: Layer) -> Tensor | float:
        """alpha in the layer's metric F = alpha A (x) I, with A that of its inputs."""
        return 1.0

    # The step.

    def _update(self) -> None:
        self.refresh([layer for layer in self._layers if layer.module.weight.grad is not None])
        for group in self.param_groups:
            kinds = self._updates(group)
            for updates, bound in zip(kinds, self._bounds(group, kinds), strict=True):
                self._apply(group, updates, bound)

    def _updates(self, group: dict) -> list[list[Update]]:
        """The updates of the preconditioned and of the other parameters, where there are any.

        They are bounded apart: the norm of the first is the root mean square of the change of
        preactivations, that of the others is in the identity metric.
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
            for param, delta in zip((layer.module.weight, layer.bias), update, strict=True):
                if param is not None and param.grad is not None:
                    layered.append(Update(param, delta, alpha))
        plain = self._plain_updates(group, (update.param for update in layered))
        return [updates for updates in (layered, plain) if updates]

    # Rows: the examples' inputs and output gradients, where working with them takes less.

    def captures(self, layer: Layer) -> bool:
        return layer.prefers_rows or self.observes(layer)

    def receive(self, layer: Layer, h: Tensor, g: Tensor) -> None:
        if self.uses_rows and not self._readback.waits_for(h):
            self._keep_rows(layer, h, g)
        self.observe(layer, h, g)

    def _keep_rows(self, layer: Layer, h: Tensor, g: Tensor) -> None:
        """Keeps h (n, in) and g (n, out) until the step if g^T (h A) takes less than (g^T h) A."""
        n, width, height = h.shape[0], h.shape[1], g.shape[1]
        layer.prefers_rows = n * (width + height) < width * height
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
        probe = _probe(h.shape[1], h.dtype, h.device)
        product, weights = gradient @ probe, h @ probe
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

    def average_covariance(self, layer: Layer, h: Tensor, decay: float) -> None:
        """Takes h (n, in) into the layer's running mean and covariance.

        Examples are weighted: with W the discounted number of examples seen, the batch enters
        with weight n / (W + n). That is a bias-corrected exponential average over steps, and
        the batches of one step (gradient accumulation, a module called twice) count as one.
        """
        state = layer.state
        width = layer.module.in_features
        if "covariance" not in state:
            dtype = accumulate_dtype(h.dtype)
            state["covariance"] = torch.zeros(width, width, dtype=dtype, device=h.device)
            state["mean"] = torch.zeros(width, dtype=dtype, device=h.device)
            state["examples"] = 0.0
        if not layer.batch.get("discounted"):
            state["examples"] *= decay
            layer.batch["discounted"] = True
        n = h.shape[0]
        if n == 0:
            return
        seen = state["examples"]
        accepted = ops.covariance_(
            state["covariance"], state["mean"], h, decay=seen / (seen + n), centered=layer.centered
        )
        state["examples"] += n

        def reject(value: Tensor) -> None:
            if not value:
                state["examples"] = max(0.0, state["examples"] - n)
                self._warn_once(
                    ("input", layer.name),
                    f"the input of layer {layer.name!r} holds a NaN or Inf, or overflows; "
                    f"that batch stays out of its statistics",
                )

        self._readback.watch(accepted, reject)


@functools.cache
def _probe(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, dtype=dtype, generator=generator).to(device)
