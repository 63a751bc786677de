"""Chains of linear layers and elementwise activations, and how one is found in a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

ACTIVATIONS = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardshrink, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh,
    nn.LeakyReLU, nn.LogSigmoid, nn.Mish, nn.ReLU, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid,
    nn.Softplus, nn.Softshrink, nn.Softsign, nn.Tanh, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip
DROPOUTS = (nn.Dropout, nn.AlphaDropout)


@dataclass(eq=False)
class Link:
    """A linear layer and the activations between it and the next one: h' = phi(W h + b)."""

    name: str
    linear: nn.Linear
    activations: list[nn.Module] = field(default_factory=list)

    @property
    def slope_from_output(self) -> bool:
        """Whether phi' follows from the output, so that no preactivation has to be kept."""
        kinds = [type(module) for module in self.activations]
        return not kinds or kinds in ([nn.Tanh], [nn.Sigmoid], [nn.ReLU])

    def derivatives(
        self, preactivation: Tensor | None, output: Tensor, *, second: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """phi' and, if `second`, phi'', shaped as the output; None for all ones and all zeros."""
        if not self.activations:
            return None, None
        if not self.slope_from_output:
            return _by_autograd(self.activations, preactivation, second)
        y, kind = output, type(self.activations[0])
        if kind is nn.ReLU:
            return (y > 0).to(y.dtype), None
        if kind is nn.Tanh:
            # 1 - y^2 and -2 y (1 - y^2)
            slope = torch.addcmul(torch.ones((), dtype=y.dtype, device=y.device), y, y, value=-1)
            return slope, -2 * y * slope if second else None
        # y (1 - y) and y (1 - y) (1 - 2 y)
        slope = y * (1 - y)
        return slope, slope * (1 - 2 * y) if second else None


@torch.enable_grad()
def _by_autograd(
    activations: list[nn.Module], a: Tensor, second: bool
) -> tuple[Tensor, Tensor | None]:
    a = a.detach().requires_grad_()
    y = a.clone()  # a leaf cannot be changed in place
    for activation in activations:
        y = _straight(activation, y) if type(activation) is nn.Hardsigmoid else activation(y)
    (slope,) = torch.autograd.grad(y.sum(), a, create_graph=second)
    if not second or not slope.requires_grad:
        return slope.detach(), None
    (bend,) = torch.autograd.grad(slope.sum(), a, allow_unused=True)
    return slope.detach(), bend


def _straight(activation: nn.Module, a: Tensor) -> Tensor:
    """A piecewise linear activation whose backward torch cannot differentiate: its line at a."""
    at = a.detach().requires_grad_()
    y = activation(at)
    (slope,) = torch.autograd.grad(y.sum(), at)
    return y.detach() + slope * (a - at.detach())


def find_chain(model: nn.Module) -> tuple[list[Link], nn.Module, list[tuple[str, nn.Module]]]:
    """The links of a model from input to output, its last module, and its dropouts by name.

    Raises:
        ValueError: the model is not such a chain; the message names the module at fault.
    """
    links: list[Link] = []
    dropouts: list[tuple[str, nn.Module]] = []
    owners = Counter(
        p for module in model.modules() for p in module._parameters.values() if p is not None
    )
    last = model
    for name, module in _leaves(getattr(model, "_orig_mod", model), ""):
        last, kind = module, type(module)
        if kind is nn.Linear and "weight" in module._parameters:
            shared = any(link.linear is module for link in links)
            if shared or any(owners[p] > 1 for p in module._parameters.values() if p is not None):
                _refuse(name, module, "is used, or has a parameter that is used, more than once")
            links.append(Link(name, module))
        elif kind in DROPOUTS:
            dropouts.append((name, module))
        elif kind is nn.Flatten:
            if module.start_dim != 1 or module.end_dim not in (-1, 1):
                _refuse(name, module, "must flatten all but the first dimension")
        elif kind in ACTIVATIONS:
            if getattr(module, "inplace", False) and kind is not nn.ReLU:
                _refuse(name, module, "overwrites its input; build it with inplace=False")
            if links:
                links[-1].activations.append(module)
        elif kind is not nn.Identity:
            _refuse(name, module, _reason(module))
    if not links:
        raise ValueError("model must hold an nn.Linear for UBP to train, got none")
    refuse_random(dropouts)
    return links, last, dropouts


def refuse_random(dropouts: list[tuple[str, nn.Module]]) -> None:
    """Raises if a dropout drops: UBP would differentiate another network than the loss saw."""
    for name, module in dropouts:
        if module.training and module.p > 0:
            _refuse(name, module, "drops units while in training mode; call eval() on it")


def _leaves(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
        for child_name, child in module._modules.items():
            yield from _leaves(child, f"{name}.{child_name}" if name else child_name)
    else:
        yield name, module


def _reason(module: nn.Module) -> str:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        mode = "in training mode it couples the examples of a batch"
        return mode if module.training else "in eval mode, fold it into the nn.Linear before it"
    if any(True for _ in module.children()):
        return "has a forward of its own, which may not be a chain (a residual connection)"
    known = ", ".join(kind.__name__ for kind in ACTIVATIONS)
    return f"is not one of them; activations may be {known}"


def _refuse(name: str, module: nn.Module, reason: str) -> None:
    where = f"module {name!r} ({type(module).__name__})" if name else type(module).__name__
    raise ValueError(
        f"model must be a chain (nn.Sequential, nested or not) of nn.Linear, elementwise "
        f"activations, nn.Flatten and nn.Dropout in eval mode; {where}: {reason}"
    )
