"""CGD, centered gradient descent (George 2017, Algorithm 3)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from fused_so import ops
from fused_so._dtypes import accumulate_dtype
from fused_so.optim.kronecker import KroneckerOptimizer
from fused_so.optim.layers import Layer


class CGD(KroneckerOptimizer):
    r"""Gradient descent on linear layers whose inputs are centered by the batch's mean m.

    .. math:: \Delta W = \nabla_W - \nabla_b m^T, \qquad \Delta b = \nabla_b - \Delta W m

    the gradient step of the layer written as W (h - m) + b'. A layer without bias has nothing
    to move the mean into and takes its plain gradient.

    Args:
        model: the module to train. Its nn.Linear layers are centered; every other parameter
            takes momentum SGD, and a warning lists them.
        lr: the learning rate, >= 0; where max_norm does not bind, about that of SGD, often somewhat
            larger.
        momentum: of the centered gradients, in [0, 1].
        nesterov: take the look-ahead form of momentum.
        weight_decay: >= 0, added to the update times the parameter.
        max_norm: an upper bound for the norm of a param group's update in its metric, the centered
            gradient's; None for no bound. With it one lr serves losses of different sizes: an
            update's length is at most lr max_norm while gradients are large.
        params: parameters or param groups; by default all of the model's that require a
            gradient. A group may set any of the options above.

    Raises:
        TypeError, ValueError: as for `ACP`.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.2,
        *,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        max_norm: float | None = 1.0,
        params: Iterable | None = None,
    ):
        options = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "max_norm": max_norm,
        }
        super().__init__(model, options, params)

    def observes(self, layer: Layer) -> bool:
        return layer.centered

    def observe(self, layer: Layer, h: Tensor, g: Tensor) -> None:
        batch = layer.batch
        total = h.sum(0, dtype=accumulate_dtype(h.dtype))
        batch["sum"] = batch["sum"] + total if "sum" in batch else total
        batch["rows"] = batch.get("rows", 0) + h.shape[0]

    def precondition(self, layers: list[Layer]) -> dict[Layer, tuple[Tensor, Tensor]]:
        plain = {layer: layer.gradients() for layer in layers if not layer.centered}
        seen = [layer for layer in layers if layer.centered and layer.batch.get("rows")]
        gradients = [layer.gradients() for layer in seen]
        # Algorithm 3, lines 5 and 6, with the bias as in eq. 6.2.5.
        steps = ops.precondition(
            [grad_weight for grad_weight, _ in gradients],
            [grad_bias for _, grad_bias in gradients],
            [layer.batch["sum"] / layer.batch["rows"] for layer in seen],
            None,
        )
        return plain | dict(zip(seen, zip(*steps, strict=True), strict=True))
