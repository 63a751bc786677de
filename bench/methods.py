"""The optimizers under comparison, and which of their options are searched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from optuna.distributions import BaseDistribution, FloatDistribution
from torch import nn

import fused_so


@dataclass(frozen=True)
class Method:
    """How to build an optimizer, which values to search, and whether to search them unasked.

    `build` takes the model, the likelihood of its outputs and options. `space` is the range of each
    hyperparameter that a search draws; `candidates` are the learning rates of a search on a grid.
    `adapt` takes the problem's model and gives the one to train, before it is copied or hooked.
    """

    build: Callable[..., torch.optim.Optimizer]
    space: Mapping[str, BaseDistribution]
    candidates: Mapping[str, Sequence[float]]
    searched: bool = False
    adapt: Callable[[nn.Module], nn.Module] = lambda model: model


def _sgd(model: nn.Module, _: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, **options)


def _adam(model: nn.Module, _: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), **options)


def _fused_so(
    name: str, *, likelihood: bool = False, **fixed: Any
) -> Callable[..., torch.optim.Optimizer]:
    def build(model: nn.Module, of_outputs: Any, **options: Any) -> torch.optim.Optimizer:
        if likelihood:
            options["likelihood"] = of_outputs
        return getattr(fused_so, name)(model, **fixed, **options)

    return build


def _method(
    build: Callable[..., torch.optim.Optimizer],
    *,
    searched: bool = False,
    **space: BaseDistribution,
) -> Method:
    """On a grid, two learning rates a decade, to two digits."""
    first, last = np.log10(space["lr"].low), np.log10(space["lr"].high)
    rates = 10.0 ** np.arange(first, last + 0.1, 0.5)
    return Method(build, space, {"lr": tuple(float(f"{rate:.2g}") for rate in rates)}, searched)


def _log(low: float, high: float) -> FloatDistribution:
    return FloatDistribution(low, high, log=True)


METHODS: dict[str, Method] = {
    "sgd": _method(_sgd, searched=True, lr=_log(3.2e-4, 1e-1)),
    "adam": _method(_adam, searched=True, lr=_log(1e-4, 3.2e-2)),
    "cgd": _method(_fused_so("CGD"), lr=_log(3.2e-4, 1e-1)),
    "nnn": _method(_fused_so("NNN"), lr=_log(3.2e-3, 1)),
    "ekfac": _method(_fused_so("EKFAC", likelihood=True), lr=_log(3.2e-3, 1)),
    "kfac": _method(_fused_so("KFAC", likelihood=True), lr=_log(3.2e-3, 1)),
    "acp": _method(_fused_so("ACP"), lr=_log(3.2e-3, 1)),
    "kfac_tridiagonal": _method(
        _fused_so("KFAC", likelihood=True, structure="block_tridiagonal"), lr=_log(3.2e-3, 1)
    ),
    "ubp": _method(_fused_so("UBP", likelihood=True), searched=True, lr=_log(3.2e-4, 1e-1)),
    "natural_gradient": _method(_fused_so("NaturalGradient", likelihood=True), lr=_log(3.2e-2, 1)),
    "tonga": _method(_fused_so("TONGA"), lr=_log(1e-2, 1)),
}
