"""The engine under the Kronecker-factored optimizers: CGD and ACP differ only in their factors.

Every linear layer's curvature is modelled as alpha [[C + m m^T, m], [m^T, 1]] (x) I, with m and
C the mean and covariance of its inputs. The engine finds the layers, keeps their statistics,
bounds the step, applies it, and resumes; an optimizer says what the factors are.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_so import ops
from fused_so._dtypes import accumulate, accumulate_dtype
from fused_so.capture import Capture
from fused_so.ops import _check
from fused_so.optim.readback import Readback


@dataclass(eq=False)
class Layer:
    """A linear layer, its param group, and what its optimizer holds of the current batch."""

    name: str
    module: nn.Linear
    group: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    batch: dict[str, Any] = field(default_factory=dict)
    prefers_rows: bool = False

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias, if it is trained with the weight."""
        bias = self.module.bias
        owned = bias is not None and any(bias is p for p in self.group["params"])
        return bias if owned and bias.requires_grad else None

    @property
    def centered(self) -> bool:
        # Without a bias to move there is no homogeneous coordinate to project out.
        return self.bias is not None

    def gradients(self) -> tuple[Tensor, Tensor]:
        """The gradients of weight and bias; zeros for a bias that is not trained."""
        weight, bias = self.module.weight, self.bias
        if bias is None or bias.grad is None:
            return weight.grad, weight.grad.new_zeros(weight.shape[0])
        return weight.grad, bias.grad

    def keep_rows(self, h: Tensor, g: Tensor) -> None:
        """Keeps h (n, in) and g (n, out) until the step if g^T (h A) takes less than (g^T h) A."""
        n, width, height = h.shape[0], h.shape[1], g.shape[1]
        self.prefers_rows = n * (width + height) < width * height
        once = "kept_rows" not in self.batch
        usable = h.dtype == g.dtype == accumulate_dtype(g.dtype)
        self.batch["kept_rows"] = (h, g) if self.prefers_rows and once and usable else None


class Update(NamedTuple):
    """A parameter's step Delta before lr and bound, and the scale alpha of its metric."""

    param: nn.Parameter
    delta: Tensor
    alpha: Tensor | float = 1.0


class KroneckerOptimizer(torch.optim.Optimizer):
    """Base of the optimizers that precondition linear layers with Kronecker factors.

    A subclass implements `observe` (what a batch tells about a layer), `refresh` (once a step,
    before preconditioning) and `precondition` (the layer's update).

    Args:
        model: the module to train. Every nn.Linear whose weight requires a gradient is a layer;
            every other parameter takes momentum SGD with the same settings.
        defaults: the options of a param group.
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
        self._layers: list[Layer] = []
        self._captures: list[Capture] = []
        self._model: nn.Module | None = None
        super().__init__(params, defaults)
        self._readback = Readback()
        self._warned_of: set[tuple[str, ...]] = set()
        self._steps = 0
        self._model = model
        self._adopt_layers()
        if not self._layers:
            raise ValueError(
                f"model must hold an nn.Linear with a trainable weight for "
                f"{type(self).__name__} to precondition, got none; use torch.optim.SGD instead"
            )

    # What an optimizer defines.

    uses_rows = False
    """Whether `precondition` asks for `gradient_rows`."""

    def check_group(self, group: dict[str, Any]) -> None:
        """Raises on an option out of range."""
        check_number("lr", group["lr"], 0.0)
        check_number("momentum", group["momentum"], 0.0, 1.0)
        check_number("weight_decay", group["weight_decay"], 0.0)
        if group["max_norm"] is not None:
            check_number("max_norm", group["max_norm"], 0.0, positive=True)

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

    def curvature_scale(self, layer: Layer) -> Tensor | float:
        """alpha in the layer's metric F = alpha A (x) I, with A that of its inputs."""
        return 1.0

    # The step.

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates the parameters from their gradients; `closure`, if given, computes those."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        self._readback.poll()
        self.refresh([layer for layer in self._layers if layer.module.weight.grad is not None])
        for group in self.param_groups:
            kinds = self._updates(group)
            for updates, bound in zip(kinds, self._bounds(group, kinds), strict=True):
                self._apply(group, updates, bound)

        self._steps += 1
        for layer in self._layers:
            layer.batch.clear()
        self._choose_what_to_capture()
        return loss

    def _updates(self, group: dict[str, Any]) -> list[list[Update]]:
        """The updates of the preconditioned and of the other parameters, where there are any."""
        layered, owned = [], set()
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
                    owned.add(param)
        plain = [
            Update(p, p.grad) for p in group["params"] if p.grad is not None and p not in owned
        ]
        for update in plain:
            if update.delta.layout != torch.strided:
                raise TypeError(
                    f"gradients must be dense, got layout {update.delta.layout} for a parameter of "
                    f"shape {tuple(update.param.shape)}; use nn.Embedding(sparse=False)"
                )
        return [updates for updates in (layered, plain) if updates]

    def _apply(self, group: dict[str, Any], updates: list[Update], bound: Tensor) -> None:
        for same in _by_kind(updates):
            params = [update.param for update in same]
            # A parameter in another memory format (channels_last) is updated through a copy.
            dense = [param.contiguous() for param in params]
            ops.apply_update_(
                dense,
                [update.delta for update in same],
                [self._momentum_buffer(p) for p in params] if group["momentum"] else [],
                lr=group["lr"],
                momentum=group["momentum"],
                weight_decay=group["weight_decay"],
                nesterov=group["nesterov"],
                scale=bound.to(params[0].device, accumulate_dtype(params[0].dtype)),
            )
            for param, updated in zip(params, dense, strict=True):
                if updated.data_ptr() != param.data_ptr():
                    param.copy_(updated)

    def _bounds(self, group: dict[str, Any], kinds: list[list[Update]]) -> list[Tensor]:
        """The factors that keep the norms of the updates below max_norm.

        One for the preconditioned parameters, whose norm is the root mean square of the change
        of preactivations, and one for the others, in the identity metric; both are 0, which
        skips the step, if any gradient of the group is not finite.
        """
        if not kinds:
            return []
        squares = [_squared_norm(updates) for updates in kinds]
        finite = torch.isfinite(sum(square.to(squares[0].device) for square in squares))
        self._readback.watch(finite, self._warn_unless_finite)
        factors = []
        for square in squares:
            factor = torch.ones_like(square)
            if group["max_norm"] is not None:
                # nu = min(1, max_norm / norm); rounding may leave 0 below zero
                factor = (group["max_norm"] / square.clamp(min=0.0).sqrt()).clamp(max=1.0)
            factors.append(torch.where(finite.to(square.device), factor, 0.0))
        return factors

    def _momentum_buffer(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(
                param, dtype=accumulate_dtype(param.dtype), memory_format=torch.contiguous_format
            )
        return state["momentum_buffer"]

    # Layers and their statistics.

    def _adopt_layers(self) -> None:
        """Hooks every supported layer of the param groups that is not hooked yet."""
        groups = {p: group for group in self.param_groups for p in group["params"]}
        uses = Counter(
            p
            for module in self._model.modules()
            for p in module._parameters.values()
            if p is not None
        )
        known = {layer.module for layer in self._layers}
        for name, module in self._model.named_modules():
            if not isinstance(module, nn.Linear) or module in known:
                continue
            weight, bias = module.weight, module.bias
            # A tied weight or bias also belongs to something that these statistics do not see.
            tied = uses[weight] > 1 or (bias is not None and uses[bias] > 1)
            if tied or weight not in groups or not weight.requires_grad:
                continue
            if bias in groups and groups[bias] is not groups[weight]:
                raise ValueError(
                    f"params must keep the weight and bias of layer {name!r} in one group"
                )
            # torch.compile wraps a model in a module of its own; a checkpoint serves both.
            layer = Layer(name.replace("_orig_mod.", ""), module)
            self._layers.append(layer)
            self._captures.append(Capture(module, partial(self._observe, layer)))
        self._bind_layers()
        self._warn_of_plain_parameters()
        self._choose_what_to_capture()

    def _bind_layers(self) -> None:
        """Points every layer at its param group and state; loading a checkpoint replaces both."""
        for layer in self._layers:
            weight = layer.module.weight
            layer.state = self.state[weight]
            layer.group = next(
                g for g in self.param_groups if any(p is weight for p in g["params"])
            )

    def _warn_of_plain_parameters(self) -> None:
        owned = {p for layer in self._layers for p in (layer.module.weight, layer.bias)}
        names = {p: name for name, p in self._model.named_parameters()}
        plain = [
            names.get(p, "(not in the model)")
            for group in self.param_groups
            for p in group["params"]
            if p not in owned
        ]
        if plain:
            self._warn_once(
                ("plain", *plain),
                f"nn.Linear layers with parameters of their own are preconditioned; momentum SGD "
                f"with the same lr trains the others: {', '.join(plain)}",
            )

    @torch.no_grad()
    def _observe(self, layer: Layer, h: Tensor, g: Tensor) -> None:
        if self.uses_rows and not self._readback.waits_for(h):
            layer.keep_rows(h, g)
        self.observe(layer, h, g)

    def _choose_what_to_capture(self) -> None:
        for layer, capture in zip(self._layers, self._captures, strict=True):
            capture.active = layer.prefers_rows or self.observes(layer)

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
                self._adopt_layers()
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, and with them what the next step would know of their batch."""
        super().zero_grad(set_to_none)
        for layer in self._layers:
            layer.batch.clear()

    def remove_hooks(self) -> None:
        """Detaches the optimizer from the model; it can no longer learn statistics."""
        for capture in self._captures:
            capture.remove()

    def state_dict(self) -> dict[str, Any]:
        """As for any torch optimizer, with the layers, all shapes and the number of steps."""
        self._readback.flush()
        return {
            **super().state_dict(),
            "optimizer": type(self).__name__,
            "layers": self._layer_shapes(),
            "shapes": self._parameter_shapes(),
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
            ValueError: the checkpoint is of another optimizer or architecture.
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
        self._bind_layers()
        self._choose_what_to_capture()

    def _layer_shapes(self) -> dict[str, tuple[int, int, bool]]:
        return {
            layer.name: (layer.module.in_features, layer.module.out_features, layer.centered)
            for layer in self._layers
        }

    def _parameter_shapes(self) -> list[tuple[int, ...]]:
        return [tuple(p.shape) for group in self.param_groups for p in group["params"]]

    def _check_checkpoint(self, state_dict: dict[str, Any]) -> None:
        keys = {"state", "param_groups", "optimizer", "layers", "shapes", "steps"}
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
        for there in state_dict["param_groups"]:
            lacking = set(self.defaults) - set(there)
            if lacking:
                raise ValueError(
                    f"state_dict must have the options of {type(self).__name__}, but it lacks "
                    f"{sorted(lacking)}"
                )


@functools.cache
def _probe(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, dtype=dtype, generator=generator).to(device)


def _squared_norm(updates: list[Update]) -> Tensor:
    """sum Delta^T (A (x) I) Delta, in float64 from products in the accumulate dtype.

    Delta = (alpha A (x) I)^-1 g, so that this is Delta^T g / alpha, without a product with A.
    """
    squares: dict[torch.device, list[Tensor]] = {}
    for param, delta, alpha in updates:
        grad = accumulate(param.grad).reshape(-1)
        square = torch.dot(accumulate(delta).reshape(-1), grad) / alpha
        squares.setdefault(square.device, []).append(square)
    first, *others = (torch.stack(here).sum(dtype=torch.float64) for here in squares.values())
    return sum((other.to(first.device) for other in others), first)


def _by_kind(updates: list[Update]) -> list[list[Update]]:
    kinds: dict[tuple, list[Update]] = {}
    for update in updates:
        kind = (update.param.device, update.param.dtype, update.delta.dtype)
        kinds.setdefault(kind, []).append(update)
    return list(kinds.values())


def check_number(
    name: str, value: float, low: float, high: float = math.inf, *, positive: bool = False
) -> None:
    _check.within(name, value, low, high)
    if positive and value == 0:
        raise ValueError(f"{name} must be positive, got 0")
