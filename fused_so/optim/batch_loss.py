"""The loss of a step's batches, read off the gradients that it sent back to the outputs.

A training loop shows its loss to no optimizer. But the likelihood and the outputs of the model are
known, and with them the gradient at the outputs says what the targets were.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fused_so._dtypes import accumulate
from fused_so.capture import hook
from fused_so.likelihoods import Likelihood
from fused_so.optim.base import loss_scale
from fused_so.optim.readback import Readback

MOST_PASSES = 64


class BatchLoss:
    """Watches one model's outputs for the backward passes of a loss.

    After more than MOST_PASSES of them it gives up until the next step and holds nothing: steps may
    have ended, with the hooks still on the model.

    Args:
        model: called as `model(...)`, to return the one tensor that the loss is of.
        likelihood: that of the loss.
        wanted: asked after every forward pass; outputs and gradients of others are not held.
    """

    def __init__(self, model: nn.Module, likelihood: Likelihood, wanted: Callable[[], bool]):
        self._likelihood, self._wanted = likelihood, wanted
        self._passes: list[tuple[Tensor, Tensor]] = []
        self._gave_up = False
        self._handle = hook(model.register_forward_hook, self._watch)

    def remove(self) -> None:
        self._handle.remove()

    def forget(self) -> None:
        self._passes.clear()
        self._gave_up = False

    @torch.compiler.disable
    def _watch(self, module: nn.Module, args: tuple, outputs: Tensor) -> None:
        if not (isinstance(outputs, Tensor) and outputs.requires_grad):
            return
        if self._gave_up or not self._wanted():
            return
        known, version = outputs.detach(), outputs._version

        def keep(g: Tensor) -> None:
            # Outputs that were written over since say nothing any more.
            told = _has_memory(g) and g.numel() and known._version == version
            if self._gave_up or not told:
                return
            self._passes.append((known, g.detach()))
            if len(self._passes) > MOST_PASSES:
                self._passes.clear()
                self._gave_up = True

        outputs.register_hook(keep)

    def value(self, grad_scaler: torch.amp.GradScaler | None = None) -> Tensor | None:
        """L, with its reduction; None if no backward pass, or too many, came through the outputs.

        Of several passes the mean, each taken to have been divided by their number, as where
        gradients are accumulated; the sum if L is one.
        """
        return self._mean(self._likelihood.value_from_score, grad_scaler)

    def has_scores(self, grad_scaler: torch.amp.GradScaler | None = None) -> Tensor | None:
        """Whether all gradients may be those of the likelihood; None as for `value`."""
        found = self._of_passes(self._likelihood.has_score, grad_scaler)
        return torch.stack([one.to(found[0].device) for one in found]).all() if found else None

    def is_at_least(self, amount: Tensor, grad_scaler: torch.amp.GradScaler | None = None) -> bool:
        """Whether L is known to be, from less than it takes to compute it, and without waiting."""
        if any(map(Readback.waits_for, (amount, *(g for _, g in self._passes)))):
            return False
        bound = self._mean(self._likelihood.value_lower_bound, grad_scaler)
        return bound is not None and bool(bound >= amount)

    def _mean(
        self,
        of_pass: Callable[[Tensor, Tensor], Tensor],
        grad_scaler: torch.amp.GradScaler | None,
    ) -> Tensor | None:
        """The mean, or the sum if L is one, over the passes, of a function of outputs and score."""
        if not self._passes:
            return None
        first, *others = self._of_passes(of_pass, grad_scaler)
        return sum((value.to(first.device) for value in others), first) / self._count

    def _of_passes(
        self,
        of_pass: Callable[[Tensor, Tensor], Tensor],
        grad_scaler: torch.amp.GradScaler | None,
    ) -> list[Tensor]:
        values = []
        for outputs, g in self._passes:
            factor = self._count / loss_scale(grad_scaler, g.device)
            one = not isinstance(factor, Tensor) and factor == 1
            values.append(of_pass(outputs, accumulate(g) if one else accumulate(g) * factor))
        return values

    @property
    def _count(self) -> int:
        """By how many passes the loss of each was divided."""
        return 1 if self._likelihood.reduction in ("sum", "none") else len(self._passes)


def _has_memory(x: Tensor) -> bool:
    """Whether x holds numbers that outlive the pass; not under the transforms of torch.func."""
    try:
        x.data_ptr()
    except RuntimeError:
        return False
    return True
