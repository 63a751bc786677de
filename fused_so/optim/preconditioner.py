"""Any Kronecker optimizer as a preconditioner in front of another optimizer."""

from __future__ import annotations

import itertools
from typing import Any

from torch import nn

from fused_so.optim.kronecker import KroneckerOptimizer

_OF_THE_OTHER = ("lr", "momentum", "nesterov", "weight_decay", "warmup", "recipe")


class Preconditioner:
    """Rewrites `p.grad` of a model's linear layers, for any torch optimizer to step with.

    .. code-block:: python

        preconditioner = fused_so.Preconditioner(fused_so.KFAC, model, likelihood=likelihood)
        optimizer = torch.optim.Adam(model.parameters())
        for x, y in loader:
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            preconditioner.step()
            optimizer.step()

    `step` replaces the gradients of weights and biases that a layer owns by the preconditioned
    ones, times the factor that keeps them within `max_norm` and `max_decrease`; other gradients
    stay. Clip or unscale gradients before. If a gradient is not finite, those of its param group
    become zero.

    Args:
        method: `fused_so.CGD`, `ACP`, `NNN`, `KFAC` or `EKFAC`.
        model: the module to train.
        options: those of the method, without lr, momentum, nesterov, weight_decay and recipe,
            which belong to the optimizer behind. A group of `params` may set the same.

    Raises:
        TypeError, ValueError: as from the method; or an option of the optimizer behind.
    """

    def __init__(self, method: type[KroneckerOptimizer], model: nn.Module, **options: Any):
        if not (isinstance(method, type) and issubclass(method, KroneckerOptimizer)):
            raise TypeError(f"method must be one of CGD, ACP, NNN, KFAC and EKFAC, got {method!r}")
        params = options.pop("params", None)
        params = None if params is None else list(params)
        groups = [group for group in params or () if isinstance(group, dict)]
        for given, name in itertools.product((options, *groups), _OF_THE_OTHER):
            if name in given:
                raise TypeError(f"{name} belongs to the optimizer behind the preconditioner")
        # momentum 0: no buffers
        self._method = method(model, momentum=0.0, nesterov=False, params=params, **options)
        self._method.rewrites_gradients = True

    def step(self) -> None:
        """Preconditions the gradients in place."""
        self._method.step()

    def state_dict(self) -> dict[str, Any]:
        """What resumes it, as for any optimizer."""
        return self._method.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes from `state_dict`; nothing is changed if it is not of this model."""
        self._method.load_state_dict(state_dict)

    def diagnostics(self) -> dict[str, Any]:
        """As the method's own."""
        return self._method.diagnostics()

    def remove_hooks(self) -> None:
        """Detaches it from the model."""
        self._method.remove_hooks()
