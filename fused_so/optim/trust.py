"""How far to trust a step: Levenberg-Marquardt damping, and a line search."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from fused_so.optim.base import Update, squared_norm

_SUFFICIENT = 1e-2
_HALVINGS = 10
_LEAST = 1e-12  # from nothing damping could not rise again


class Trust:
    r"""Looks at the loss after a step, and adapts the damping lambda by the reduction ratio

    .. math:: \rho = \frac{f(\theta - \delta) - f(\theta)}{-g^T \delta + \frac12 \delta^T G \delta}

    to 3/2 lambda below 1/4, and to 2/3 lambda above 3/4 (Martens 2010, section 4.1). With a
    solution Delta = (G + lambda I)^-1 g and delta = eta Delta, delta^T G delta is
    eta^2 (g^T Delta - lambda ||Delta||^2). Equation 30 of Pascanu and Bengio 2014 has only the
    first term below, for small steps: at eta = 1 a perfect quadratic model would make it 1/2, and
    lambda would never fall. Where the second is as large as the first (eta >= 2) it is left out.
    """

    def __init__(self, every: int | None, searches: bool):
        self._every, self._searches = every, searches
        self._closure: Callable[[], Any] | None = None
        self._loss: Any = None

    @property
    def _looks(self) -> bool:
        return self._every is not None or self._searches

    def check_group(self, group: dict[str, Any]) -> None:
        if self._looks and group["momentum"]:
            raise ValueError(
                f"momentum must be 0 with adapt_damping_every or line_search, which judge the "
                f"step of one batch, got {group['momentum']}"
            )
        if self._every is not None and not group["damping"]:
            raise ValueError("damping must be positive with adapt_damping_every, got 0")

    def begin(self, closure: Callable[[], Any] | None) -> None:
        if self._looks and closure is None:
            raise ValueError(
                "step must be given a closure that computes the loss, as in opt.step(closure), "
                "with adapt_damping_every or line_search"
            )
        self._closure = closure

    def closure(self) -> Any:
        self._loss = self._closure()
        return self._loss

    def take(
        self,
        groups: list[dict[str, Any]],
        updates: list[Update],
        steps: int,
        apply: Callable[[float], None],
        look: Callable[[Callable[[], Any]], Any],
    ) -> str | None:
        """Applies the updates, and judges them if it is due; a message if they were taken back.

        `apply(scale)` takes them, `look(closure)` calls the closure unobserved.
        """
        adapts = self._every is not None and steps % self._every == 0
        if not (adapts or self._searches):
            apply(1.0)
            return None
        loss = float(self._loss)
        before = [update.param.clone() for update in updates]
        grads = [update.param.grad for update in updates]
        scale = 1.0
        for _ in range(_HALVINGS if self._searches else 1):
            apply(scale)
            # g^T delta of what was really done, bounds and learning rates among it.
            promised = sum(
                torch.sum((old - u.param).double() * g).item()
                for old, u, g in zip(before, updates, grads, strict=True)
            )
            new = self._loss_now(updates, grads, look)
            # NaN is no fall either.
            if new <= loss - _SUFFICIENT * promised or (not self._searches and math.isfinite(new)):
                break
            for old, update in zip(before, updates, strict=True):
                update.param.copy_(old)
            scale /= 2
        else:
            promised = 0.0
        if adapts:
            ratio = -math.inf
            if promised:
                ratio = (loss - new) / _predicted(updates, promised, groups[0]["damping"])
            for group in groups:
                if not ratio >= 0.25:
                    group["damping"] *= 3 / 2
                elif ratio > 0.75:
                    group["damping"] = max(group["damping"] * 2 / 3, _LEAST)
        if promised:
            return None
        return "the loss did not fall" if self._searches else "the loss was not finite"

    def _loss_now(self, updates, grads, look) -> float:
        for update in updates:
            update.param.grad = None
        try:
            return float(look(self._closure))
        finally:
            for update, grad in zip(updates, grads, strict=True):
                update.param.grad = grad


def _predicted(updates: list[Update], promised: float, damping: float) -> float:
    """g^T delta - delta^T G delta / 2."""
    slope = squared_norm(updates).item()
    square = sum(update.delta.double().square().sum().item() for update in updates)
    eta = promised / slope
    model = promised - 0.5 * eta * eta * (slope - damping * square)
    return model if model > 0 else promised
