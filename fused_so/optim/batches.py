"""What a model was called with, and what the loss made of its outputs, kept until the step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from fused_so.capture import hook


class Batch(NamedTuple):
    """Arguments of a model, and the gradient of the loss with respect to its outputs, if known."""

    args: tuple
    kwargs: Mapping[str, Any]
    score: Tensor | None = None


class Watch:
    """A forward hook on a whole model that keeps the batches which a backward pass went through.

    Evaluations, and calls whose outputs no loss depends on, leave nothing.
    """

    def __init__(self, model: nn.Module):
        self.active = True
        self.batches: list[Batch] = []
        # A compiled model and the module it wraps have the same parameters.
        self.module = getattr(model, "_orig_mod", model)
        self._handle = hook(model.register_forward_hook, self._watch, with_kwargs=True)

    def _watch(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        if not (self.active and torch.is_grad_enabled()):
            return
        if not isinstance(output, Tensor):
            raise TypeError(
                f"model must return one Tensor, the outputs of its likelihood, "
                f"got {type(output).__name__}"
            )
        if output.requires_grad:
            output.register_hook(lambda g: self.batches.append(Batch(args, kwargs, g.detach())))

    def call(self, batch: Batch, params: Mapping[str, Tensor]) -> Tensor:
        """The model's outputs with other parameters; buffers such as running means stay put."""
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        # The other backends of attention cannot be differentiated twice.
        with sdpa_kernel(SDPBackend.MATH):
            return self.quietly(
                lambda: functional_call(
                    self.module, {**params, **buffers}, batch.args, batch.kwargs
                )
            )

    def quietly(self, function: Callable[[], Any]) -> Any:
        """Calls `function` and keeps nothing of what the model does in it."""
        before, self.active = self.active, False
        try:
            return function()
        finally:
            self.active = before

    def remove(self) -> None:
        self._handle.remove()


def batch_of(inputs: Any) -> Batch:
    """A tensor is a model's only argument, a tuple or list its arguments, a dict its keywords."""
    if isinstance(inputs, Tensor):
        return Batch((inputs,), {})
    if isinstance(inputs, tuple | list):
        return Batch(tuple(inputs), {})
    if isinstance(inputs, Mapping):
        return Batch((), dict(inputs))
    raise TypeError(
        f"metric_inputs must be a Tensor, a tuple or a dict of the model's arguments, "
        f"got {type(inputs).__name__}"
    )


class Inputs:
    """Goes round and round an iterable of inputs."""

    def __init__(self, inputs: Iterable):
        if isinstance(inputs, Tensor) or not isinstance(inputs, Iterable):
            raise TypeError(
                f"metric_inputs must be an iterable of batches of inputs, "
                f"got {type(inputs).__name__}"
            )
        self._inputs = inputs
        self._iterator: Iterator | None = None

    def next(self) -> Batch:
        if self._iterator is not None:
            for inputs in self._iterator:
                return batch_of(inputs)
        self._iterator = iter(self._inputs)
        for inputs in self._iterator:
            return batch_of(inputs)
        raise ValueError("metric_inputs must hold a batch for every step, but it is exhausted")
