"""The loss of a step's batches, read off the gradients that it sent back to the outputs.

A training loop shows its loss to no optimizer. But the likelihood and the outputs of the model are
known, and with them the gradient at the outputs says what the targets were.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fused_so._dtypes import accumulate
from fused_so.capture import Hook
from fused_so.likelihoods import Likelihood


class BatchLoss:
    """Watches one model's outputs for the backward passes of a loss.

    Args:
        model: called as `model(...)`, to return the one tensor that the loss is of.
        likelihood: that of the loss.
    """

    def __init__(self, model: nn.Module, likelihood: Likelihood):
        self._likelihood = likelihood
        self._passes: list[tuple[Tensor, Tensor]] = []
        self._handle = model.register_forward_hook(Hook(self._watch))

    def remove(self) -> None:
        self._handle.remove()

    def forget(self) -> None:
        self._passes.clear()

    @torch.compiler.disable
    def _watch(self, module: nn.Module, args: tuple, outputs: Tensor) -> None:
        if not (isinstance(outputs, Tensor) and outputs.requires_grad):
            return
        known, version = outputs.detach(), outputs._version

        def keep(g: Tensor) -> None:
            # Outputs that were written over since say nothing any more.
            if g.numel() and known._version == version:
                self._passes.append((known, g.detach()))

        outputs.register_hook(keep)

    def value(self, scale: Tensor | float = 1.0) -> Tensor | None:
        """L, with its reduction; None if no backward pass has come through the outputs.

        Of several passes the mean, each taken to have been divided by their number, as where
        gradients are accumulated. `scale` is what L was multiplied by, for a GradScaler.
        """
        if not self._passes:
            return None
        count = len(self._passes)
        return sum(
            self._likelihood.value_from_score(outputs, accumulate(g) * (count / scale)) / count
            for outputs, g in self._passes
        )
