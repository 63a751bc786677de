"""What every optimizer here shares: one model's param groups, guarded updates, checkpoints."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_so import ops
from fused_so._dtypes import accumulate, accumulate_dtype
from fused_so.ops import _check
from fused_so.optim.readback import Readback

_TINY = torch.finfo(torch.float64).tiny


class Update(NamedTuple):
    """A parameter's step Delta = F^-1 g before lr and bound, the scale alpha of F, and g."""

    param: nn.Parameter
    delta: Tensor
    alpha: Tensor | float = 1.0
    grad: Tensor | None = None  # p.grad


class ModelOptimizer(torch.optim.Optimizer):
    """Base of the optimizers that know the model whose parameters they train.

    A subclass implements `_update`; where it has options beyond lr, momentum, nesterov,
    weight_decay and max_norm, it extends `check_group`.

    Args:
        model: the module to train.
        defaults: the options of a param group, those five among them.
        params: parameters or param groups, as for any torch optimizer; by default all of the
            model's parameters that require a gradient.
    """

    def __init__(self, model: nn.Module, defaults: dict[str, Any], params: Iterable | None = None):
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model must be an nn.Module, got {type(model).__name__}; "
                f"pass the model itself, not its parameters"
            )
        if any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
            raise ValueError("model has uninitialized (lazy) parameters; run one forward first")
        if params is None:
            params = [p for p in model.parameters() if p.requires_grad]
        self._model: nn.Module | None = None
        super().__init__(params, defaults)
        self._readback = Readback()
        self._warned_of: set[tuple[str, ...]] = set()
        self._steps = 0
        # Those of the step that is being taken, for the optimizers whose damping follows the loss.
        self.closure: Callable[[], Any] | None = None
        self.loss: Any = None
        self._bounded: list[tuple[Tensor, Tensor]] = []  # of the last step: norm^2, factor
        self._model = model

    # What an optimizer defines.

    def check_group(self, group: dict[str, Any]) -> None:
        """Raises on an option out of range."""
        check_number("lr", group["lr"], 0.0)
        check_number("momentum", group["momentum"], 0.0, 1.0)
        check_number("weight_decay", group["weight_decay"], 0.0)
        if group["max_norm"] is not None:
            check_number("max_norm", group["max_norm"], 0.0, positive=True)

    def _adopt(self) -> None:
        """Takes over what new param groups hold; raises if it cannot."""

    def _update(self) -> None:
        """Updates the parameters from their gradients."""
        raise NotImplementedError

    # The step.

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the parameters from their gradients; `closure`, if given, computes those."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._readback.poll()
        self._bounded.clear()
        self.closure, self.loss = closure, loss
        try:
            self._update()
        finally:
            self.closure = self.loss = None
        self._steps += 1
        return loss

    def _plain_updates(self, group: dict[str, Any], owned: Iterable[Tensor] = ()) -> list[Update]:
        """The plain gradients of the group's parameters that no other rule owns."""
        owned = set(owned)
        plain = [
            Update(p, p.grad) for p in group["params"] if p.grad is not None and p not in owned
        ]
        for update in plain:
            if update.delta.layout != torch.strided:
                raise TypeError(
                    f"gradients must be dense, got layout {update.delta.layout} for a parameter of "
                    f"shape {tuple(update.param.shape)}; use nn.Embedding(sparse=False)"
                )
        return plain

    def _apply(
        self,
        group: dict[str, Any],
        updates: list[Update],
        bound: Tensor,
        momentum: float | None = None,
        weight_decay: float | None = None,
    ) -> None:
        """Takes the updates, times `bound`, with the group's lr, momentum and weight decay.

        Or with another `momentum`, 0 only if that of the group is, or another `weight_decay`.
        """
        momentum = group["momentum"] if momentum is None else momentum
        weight_decay = group["weight_decay"] if weight_decay is None else weight_decay
        for same in _by_kind(updates):
            params = [update.param for update in same]
            # A parameter in another memory format (channels_last) is updated through a copy.
            dense = [param.contiguous() for param in params]
            ops.apply_update_(
                dense,
                [update.delta for update in same],
                [self._momentum_buffer(p) for p in params] if group["momentum"] else [],
                lr=group["lr"],
                momentum=momentum,
                weight_decay=weight_decay,
                nesterov=group["nesterov"],
                scale=bound.to(params[0].device, accumulate_dtype(params[0].dtype)),
            )
            for param, updated in zip(params, dense, strict=True):
                if updated.data_ptr() != param.data_ptr():
                    param.copy_(updated)

    def _bounds(
        self,
        group: dict[str, Any],
        kinds: list[list[Update]],
        squares: list[Tensor | None] | None = None,
        largest_decrease: Callable[[list[Update], Tensor], Tensor | None] | None = None,
    ) -> list[Tensor]:
        """The factors that keep the norms of the updates, one kind at a time, below max_norm.

        All are 0, which skips the step, if any gradient of the group is not finite. `squares` are
        the squared norms, where they are known. `largest_decrease` is given the updates and by how
        much they lower the loss as its gradient predicts, in units of the squares; it returns the
        most by which they may, or None where that is no less.
        """
        if not kinds:
            return []
        squares = [
            squared_norm(updates) if square is None else square
            for updates, square in zip(kinds, squares or [None] * len(kinds), strict=True)
        ]
        finite = torch.isfinite(sum(square.to(squares[0].device) for square in squares))
        self._readback.watch(finite, self._warn_unless_finite)
        factors = []
        for updates, square in zip(kinds, squares, strict=True):
            factor = torch.ones_like(square)
            if group["max_norm"] is not None:
                # nu = min(1, max_norm / norm); rounding may leave 0 below zero
                factor = (group["max_norm"] / square.clamp(min=0.0).sqrt()).clamp(max=1.0)
            decrease = largest_decrease and largest_decrease(updates, factor * square)
            if decrease is not None:
                # nu Delta^T g / alpha <= decrease
                factor = torch.fmin(factor, decrease.to(square) / square.clamp(min=_TINY))
            factors.append(torch.where(finite.to(square.device), factor, 0.0))
        self._bounded.extend(zip(squares, factors, strict=True))
        return factors

    def _momentum_buffer(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(
                param, dtype=accumulate_dtype(param.dtype), memory_format=torch.contiguous_format
            )
        return state["momentum_buffer"]

    def _warn_unless_finite(self, finite: Tensor) -> None:
        if not finite:
            self._warn_once(("gradient",), "a gradient is not finite; such steps are skipped")

    def _warn_once(self, subject: tuple[str, ...], message: str) -> None:
        if subject not in self._warned_of:
            self._warned_of.add(subject)
            warnings.warn(f"{type(self).__name__}: {message}", stacklevel=2)

    # Beginning, ending and resuming.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As for any torch optimizer; linear layers among the new parameters are preconditioned."""
        super().add_param_group(param_group)
        try:
            self.check_group(self.param_groups[-1])
            if self._model is not None:
                self._adopt()
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def state_dict(self) -> dict[str, Any]:
        """As for any torch optimizer, with the layers, all shapes and the number of steps."""
        self._readback.flush()
        return {
            **super().state_dict(),
            "optimizer": type(self).__name__,
            "layers": self._layer_shapes(),
            "shapes": self._parameter_shapes(),
            "choices": self._choices(),
            "steps": self._steps,
        }

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            f"{type(self).__name__} is bound to its model's hooks and cannot be copied or "
            f"pickled; build a new one on the copy and load_state_dict"
        )

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes bit for bit from `state_dict`; nothing is changed if it is not of this model.

        Raises:
            ValueError: the checkpoint is of another optimizer or architecture, or of other choices
                (`factors`, `structure`, `recipe`).
        """
        self._check_checkpoint(state_dict)
        super().load_state_dict(state_dict)
        # torch casts state to the dtype of its parameter; statistics stay in their own.
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for index, param in zip(saved, params, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                if isinstance(value, Tensor):
                    self.state[param][key] = value.to(param.device, copy=True)
        self._steps = state_dict["steps"]

    def _layer_shapes(self) -> dict[str, tuple[int, int, bool]]:
        """(in, out, bias) of every layer that is treated as one."""
        return {}

    def _choices(self) -> dict[str, Any]:
        """The arguments of the whole optimizer that decide what its state means."""
        return {}

    def _parameter_shapes(self) -> list[tuple[int, ...]]:
        return [tuple(p.shape) for group in self.param_groups for p in group["params"]]

    def _check_checkpoint(self, state_dict: dict[str, Any]) -> None:
        keys = {"state", "param_groups", "optimizer", "layers", "shapes", "choices", "steps"}
        missing = keys - set(state_dict)
        if missing:
            raise ValueError(
                f"state_dict must be one of {type(self).__name__}, but it lacks {sorted(missing)}"
            )
        if state_dict["optimizer"] != type(self).__name__:
            raise ValueError(
                f"state_dict must be one of {type(self).__name__}, got one of "
                f"{state_dict['optimizer']}"
            )
        saved, own = dict(state_dict["layers"]), self._layer_shapes()
        for name in sorted(saved.keys() | own.keys()):
            if tuple(saved.get(name, ())) != own.get(name, ()):
                raise ValueError(
                    f"state_dict must be of this architecture; layer {name!r} (in, out, bias) is "
                    f"{own.get(name, 'absent')} here and {saved.get(name, 'absent')} there"
                )
        saved_shapes = [tuple(shape) for shape in state_dict["shapes"]]
        if saved_shapes != self._parameter_shapes():
            raise ValueError(
                f"state_dict must be of this architecture; its parameters have shapes "
                f"{saved_shapes}, these have {self._parameter_shapes()}"
            )
        for name, chosen in self._choices().items():
            there = state_dict["choices"].get(name)
            if there != chosen:
                raise ValueError(
                    f"{name} must be that of the checkpoint, but is {chosen!r} here and {there!r} "
                    f"there"
                )
        for there in state_dict["param_groups"]:
            lacking = set(self.defaults) - set(there)
            if lacking:
                raise ValueError(
                    f"state_dict must have the options of {type(self).__name__}, but it lacks "
                    f"{sorted(lacking)}"
                )


def squared_norm(updates: list[Update]) -> Tensor:
    """sum Delta^T (F / alpha) Delta, in float64; on a GPU from products in the accumulate dtype.

    Delta = F^-1 g, so that this is Delta^T g / alpha, without a product with F.
    """
    devices: dict[torch.device, tuple[list, list, list]] = {}
    for param, delta, alpha, grad in updates:
        grad = accumulate(param.grad if grad is None else grad)
        here = devices.setdefault(grad.device, ([], [], []))
        for entries, entry in zip(here, (accumulate(delta), grad, alpha), strict=True):
            entries.append(entry)
    first, *others = (
        _quotients(ops.inner_products(deltas, grads), alphas).sum()
        for deltas, grads, alphas in devices.values()
    )
    return sum((other.to(first.device) for other in others), first)


def _quotients(values: Tensor, alphas: list[Tensor | float]) -> Tensor:
    """values / alphas, entry by entry; no division by the number 1 alone."""
    numbers = [alpha for alpha in alphas if not isinstance(alpha, Tensor)]
    if numbers == [1] * len(alphas):
        return values
    if numbers:
        alphas = [
            a.to(values.dtype) if isinstance(a, Tensor) else values.new_full((), a) for a in alphas
        ]
    return values / torch.stack(alphas)


def _by_kind(updates: list[Update]) -> list[list[Update]]:
    kinds: dict[tuple, list[Update]] = {}
    for update in updates:
        kind = (update.param.device, update.param.dtype, update.delta.dtype)
        kinds.setdefault(kind, []).append(update)
    return list(kinds.values())


def check_number(
    name: str, value: float, low: float, high: float = math.inf, *, positive: bool = False
) -> None:
    """Raises unless `value` is a number in [low, high], and not 0 if `positive`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if positive and number and value <= 0:
        raise ValueError(f"{name} must be positive, got {value}")
    _check.within(name, value, low, high)


def check_count(name: str, value: int) -> None:
    """Raises unless `value` is a whole number >= 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number >= 1, got {value!r}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raises unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}")


def check_grad_scaler(grad_scaler: object) -> None:
    """Raises unless it is a GradScaler or None."""
    if grad_scaler is not None and not isinstance(grad_scaler, torch.amp.GradScaler):
        raise TypeError(
            f"grad_scaler must be a torch.amp.GradScaler or None, got {type(grad_scaler).__name__}"
        )


def loss_scale(grad_scaler: torch.amp.GradScaler | None, device: torch.device) -> Tensor | float:
    """What the loss was multiplied by before the backward pass; get_scale() would synchronize."""
    scale = None if grad_scaler is None else grad_scaler._scale
    return 1.0 if scale is None else scale.to(device)
