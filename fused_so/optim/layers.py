"""The linear layers of a model: found, hooked, and matched with their param groups and state."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fused_so.capture import Capture
from fused_so.likelihoods import Likelihood
from fused_so.optim.base import ModelOptimizer, check_number
from fused_so.optim.batch_loss import BatchLoss


@dataclass(eq=False)
class Layer:
    """A linear layer, its param group, and what its optimizer holds of the current batch."""

    name: str
    module: nn.Linear
    group: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    batch: dict[str, Any] = field(default_factory=dict)
    owns_bias: bool = False  # whether its bias is in the group
    averaged: bool = False  # since its inverses were last held against its statistics
    stale: bool = False

    @property
    def prefers_rows(self) -> bool:
        """Whether the last batch was better preconditioned by rows: the next is then kept."""
        return self.state.get("prefers_rows", False)

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias, if it is trained with the weight."""
        if not self.owns_bias:
            return None
        bias = self.module.bias
        return bias if bias.requires_grad else None

    @property
    def centered(self) -> bool:
        # Without a bias to move there is no homogeneous coordinate to project out.
        return self.bias is not None

    @property
    def inverted(self) -> bool:
        """Whether its statistics have ever been inverted."""
        return self.state.get("refreshes", 0) > 0

    def gradients(self) -> tuple[Tensor, Tensor]:
        """The gradients of weight and bias; zeros for a bias that is not trained."""
        weight, bias = self.module.weight, self.bias
        if bias is None or bias.grad is None:
            return weight.grad, weight.grad.new_zeros(weight.shape[0])
        return weight.grad, bias.grad


class LayerOptimizer(ModelOptimizer):
    """Base of the optimizers that learn from the inputs and output gradients of linear layers.

    Every nn.Linear that is in a param group, whose weight requires a gradient and whose
    parameters no other module shares, is a layer. A subclass says of which layers it `captures`
    the next calls, and what `receive` does with their rows. Arguments as for `ModelOptimizer`.
    """

    def __init__(self, model: nn.Module, defaults: dict[str, Any], params: Iterable | None = None):
        self._layers: list[Layer] = []
        self._captures: list[Capture] = []
        self._batch_loss: BatchLoss | None = None
        self._checked_scores = False  # once, whether they can be the likelihood's
        super().__init__(model, defaults, params)
        self._adopt()
        if not self._layers:
            raise ValueError(
                f"model must hold an nn.Linear with a trainable weight for "
                f"{type(self).__name__} to precondition, got none; use torch.optim.SGD instead"
            )

    # What an optimizer defines.

    def captures(self, layer: Layer) -> bool:
        """Whether the layer's next calls have to be seen."""
        raise NotImplementedError

    def receive(self, layer: Layer, h: Tensor, g: Tensor) -> None:
        """Takes one call's input h (n, in) and output gradient g (n, out), in the backward pass."""
        raise NotImplementedError

    # The layers.

    def _adopt(self) -> None:
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
            self._captures.append(Capture(module, partial(self._receive, layer)))
        self._bind_layers()
        self._warn_of_plain_parameters()
        self._choose_what_to_capture()

    def _bind_layers(self) -> None:
        """Points every layer at its param group and state; loading a checkpoint replaces both."""
        for layer in self._layers:
            weight, bias = layer.module.weight, layer.module.bias
            layer.state = self.state[weight]
            layer.group = next(
                g for g in self.param_groups if any(p is weight for p in g["params"])
            )
            layer.owns_bias = any(p is bias for p in layer.group["params"])

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
    def _receive(self, layer: Layer, h: Tensor, g: Tensor) -> None:
        self.receive(layer, h, g)

    def _choose_what_to_capture(self) -> None:
        for layer, capture in zip(self._layers, self._captures, strict=True):
            capture.active = self.captures(layer)

    @contextmanager
    def unobserved(self) -> Iterator[None]:
        """Calls of the model in this block leave no trace in the optimizer."""
        active = [capture.active for capture in self._captures]
        for capture in self._captures:
            capture.active = False
        try:
            yield
        finally:
            for capture, was in zip(self._captures, active, strict=True):
                capture.active = was

    def step(self, closure: Any = None) -> Any:
        """Updates the parameters from their gradients; `closure`, if given, computes those."""
        loss = super().step(closure)
        self._forget_batch()
        self._choose_what_to_capture()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients, and with them what the next step would know of their batch."""
        super().zero_grad(set_to_none)
        self._forget_batch()

    def _forget_batch(self) -> None:
        for layer in self._layers:
            layer.batch.clear()
        if self._batch_loss is not None:
            self._batch_loss.forget()

    # The loss, for the optimizers that bound an update by the decrease that it predicts.

    def check_group(self, group: dict[str, Any]) -> None:
        super().check_group(group)
        if group.get("max_decrease") is not None:
            check_number("max_decrease", group["max_decrease"], 0.0, positive=True)

    def _watch_loss(self, likelihood: Likelihood) -> None:
        self._batch_loss = BatchLoss(self._model, likelihood, self._wants_loss)

    def _wants_loss(self) -> bool:
        return any(group["max_decrease"] is not None for group in self.param_groups)

    def _loss_bounding(self, group: dict[str, Any], predicted: Tensor) -> Tensor | None:
        """The batch's loss; None where it cannot bound the group's updates, unknown or not.

        `predicted` is by how much its gradient says that they lower it.
        """
        if self._batch_loss is None or group["max_decrease"] is None:
            return None
        if not self._checked_scores:
            found = self._batch_loss.has_scores(self._grad_scaler)
            if found is not None:
                self._checked_scores = True
                self._readback.watch(found, self._warn_unless_scores)
        if self._batch_loss.is_at_least(predicted / group["max_decrease"], self._grad_scaler):
            return None
        return self._batch_loss.value(self._grad_scaler)

    def _warn_unless_scores(self, found: Tensor) -> None:
        if not found:
            self._warn_once(
                ("scores",),
                "likelihood must be that of the loss, but no targets give the gradient at the "
                "model's outputs: does its reduction differ from the loss's, or is the loss "
                "multiplied by a number (a GradScaler's is known by grad_scaler=)? max_decrease "
                "then makes steps too short",
            )

    def remove_hooks(self) -> None:
        """Detaches the optimizer from the model; it can no longer learn statistics."""
        for capture in self._captures:
            capture.remove()
        if self._batch_loss is not None:
            self._batch_loss.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resumes bit for bit from `state_dict`; nothing is changed if it is not of this model.

        Raises:
            ValueError: the checkpoint is of another optimizer or architecture, or of other choices.
        """
        super().load_state_dict(state_dict)
        self._bind_layers()
        self._choose_what_to_capture()

    def _layer_shapes(self) -> dict[str, tuple[int, int, bool]]:
        return {
            layer.name: (layer.module.in_features, layer.module.out_features, layer.centered)
            for layer in self._layers
        }


@functools.cache
def probe(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A random vector, always the same, for comparing matrices by one product."""
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, dtype=dtype, generator=generator).to(device)
