"""How far to trust a step: Levenberg-Marquardt damping, and a line search."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fused_so.optim.base import Update

_SUFFICIENT = 1e-2
_HALVINGS = 10
_LEAST = 1e-12  # from nothing damping could not rise again


class Trust:
    r"""Looks at the loss after a step, and adapts the damping lambda by the reduction ratio

    .. math:: \rho = \frac{f(\theta - \delta) - f(\theta)}{-g^T \delta + \frac12 \delta^T G \delta}

    to 3/2 lambda below 1/4, and to 2/3 lambda above 3/4 (Martens 2010, section 4.1), with the step
    delta that is really taken: delta^T G delta is a product with G more, so that neither several
    learning rates nor a solver that was stopped early matter. Equation 30 of Pascanu and Bengio
    2014 has only the first term below, for small steps: with a learning rate of 1 a perfect
    quadratic model would make it 1/2, and lambda would never fall. Where the second is as large as
    the first (learning rates from 2 on) it is left out.
    """

    def __init__(self, every: int | None, searches: bool):
        self._every, self._searches = every, searches
        self.ratio: float | None = None

    @property
    def _looks(self) -> bool:
        return self._every is not None or self._searches

    def check_group(self, group: dict[str, Any]) -> None:
        for name in ("momentum", "weight_decay"):
            if self._looks and group[name]:
                raise ValueError(
                    f"{name} must be 0 with adapt_damping_every or line_search, which judge the "
                    f"step that the loss of one batch asks for, got {group[name]}"
                )
        if self._every is not None and not group["damping"]:
            raise ValueError("damping must be positive with adapt_damping_every, got 0")

    def check_closure(self, closure: Callable[[], Any] | None) -> None:
        if self._looks and closure is None:
            raise ValueError(
                "step must be given a closure that computes the loss, as in opt.step(closure), "
                "with adapt_damping_every or line_search"
            )

    def check_loss(self, loss: Any) -> None:
        if self._looks:
            _number(loss)

    def take(
        self,
        groups: list[dict[str, Any]],
        updates: list[Update],
        steps: int,
        apply: Callable[[float], None],
        curvature: Callable[[], Tensor],
        look: Callable[[], Any],
        loss: Any,
    ) -> str | None:
        """Applies the updates, and judges them if it is due; a message if they were taken back.

        `apply(scale)` takes them, `curvature()` is delta^T G delta at scale 1 before that, `look()`
        calls the closure unobserved, `loss` is what it gave before. A step that moves nothing (lr
        0, a gradient that is not finite) is not judged.
        """
        adapts = self._every is not None and steps % self._every == 0
        if not (adapts or self._searches):
            apply(1.0)
            return None
        loss, curved = _number(loss), curvature().item() if adapts else 0.0
        before = [update.param.clone() for update in updates]
        grads = [update.param.grad for update in updates]
        scale, failure = 1.0, None
        for _ in range(_HALVINGS if self._searches else 1):
            apply(scale)
            moved = any(
                not torch.equal(old, u.param) for old, u in zip(before, updates, strict=True)
            )
            if scale == 1.0 and not moved:
                return None
            # g^T delta of what was really done, bounds and learning rates among it.
            promised = sum(
                torch.sum((old - u.param).double() * g).item()
                for old, u, g in zip(before, updates, grads, strict=True)
            )
            new = self._loss_now(updates, grads, look)
            # NaN is no fall either, nor is a step that halving has rounded to nothing.
            falls = moved and new <= loss - _SUFFICIENT * promised
            if falls or (not self._searches and math.isfinite(new)):
                break
            for old, update in zip(before, updates, strict=True):
                update.param.copy_(old)
            scale /= 2
        else:
            failure = "the loss did not fall" if self._searches else "the loss was not finite"
        if adapts:
            # g^T delta - delta^T G delta / 2
            model = promised - 0.5 * scale * scale * curved
            expected = model if model > 0 else promised
            # Several learning rates may turn a descent upwards.
            self.ratio = -math.inf if failure or expected <= 0 else (loss - new) / expected
            for group in groups:
                if not self.ratio >= 0.25:
                    group["damping"] *= 3 / 2
                elif self.ratio > 0.75:
                    group["damping"] = max(group["damping"] * 2 / 3, _LEAST)
        return failure

    def _loss_now(self, updates, grads, look) -> float:
        for update in updates:
            update.param.grad = None
        try:
            return _number(look())
        finally:
            for update, grad in zip(updates, grads, strict=True):
                update.param.grad = grad


def _number(loss: Any) -> float:
    if not isinstance(loss, int | float) and not (isinstance(loss, Tensor) and loss.numel() == 1):
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(
            f"closure must return the loss, a number or a Tensor of one entry, with "
            f"adapt_damping_every or line_search, got {got}"
        )
    return float(loss)
