"""Layer inputs and output gradients, as (n, d) matrices, handed over during the backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle


class Capture:
    """A forward hook on one nn.Linear that hands over its input and its output's gradient.

    While `active`, every backward pass through a call of the module runs `receive(h, g)` with
    h (n, in), the input, and g (n, out), the gradient of the loss with respect to the output;
    leading dimensions are flattened into n. Neither is kept: both live as long as autograd
    holds them, and the hook as long as this object. Forward passes without gradients are not
    seen. While `edges` is a list, every such call appends where its output stands in the graph of
    autograd, and adds to `rows`.
    """

    def __init__(self, module: nn.Linear, receive: Callable[[Tensor, Tensor], None]):
        self.active = True
        self.edges: list[GradientEdge] | None = None
        self.rows = 0
        self._receive = receive
        self._handle = hook(module.register_forward_hook, self._watch, with_kwargs=True)

    def _watch(self, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        if not (self.active and output.requires_grad):
            return
        h = (args[0] if args else kwargs["input"]).detach()

        def hand_over(g: Tensor) -> None:
            self._receive(_as_matrix(h), _as_matrix(g.detach()))

        output.register_hook(hand_over)
        if self.edges is not None:
            self.edges.append(get_gradient_edge(output))
            self.rows += output.numel() // output.shape[-1]

    def remove(self) -> None:
        self._handle.remove()


def _as_matrix(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def hook(
    register: Callable[..., RemovableHandle], method: Callable, *first: object, **options: bool
) -> RemovableHandle:
    """register(method), with `first` as its first arguments, for as long as its object lives."""
    handle = register(_Hook(method, *first), **options)
    weakref.finalize(method.__self__, handle.remove).atexit = False
    return handle


class _Hook:
    """A method as a hook, by which the model neither keeps an optimizer that nobody else holds
    any more, nor drags it along where the model is copied or pickled."""

    def __init__(self, method: Callable, *first: object):
        self._method, self._first = weakref.WeakMethod(method), first

    def __call__(self, *arguments) -> None:
        method = self._method()
        if method is not None:
            method(*self._first, *arguments)

    def __reduce__(self):
        return inert, ()


def inert() -> Callable:
    """A hook that does nothing, for copies of models whose hooks belong to somebody else."""
    return _do_nothing


def _do_nothing(*_) -> None:
    return None
