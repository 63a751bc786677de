"""The optimizers under comparison, and which of their options are searched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

import fused_so


@dataclass(frozen=True)
class Method:
    """How to build an optimizer, which values to search, and whether to search them unasked.

    `build` takes the model, the likelihood of its outputs and options.
    """

    build: Callable[..., torch.optim.Optimizer]
    candidates: Mapping[str, Sequence[float]]
    searched: bool


def _sgd(model: nn.Module, _: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, **options)


def _sgd_plain(model: nn.Module, _: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **options)


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


def _decades(first: float, last: float) -> tuple[float, ...]:
    """Two values a decade from 10^first to 10^last, to two digits."""
    return tuple(float(f"{10.0**power:.2g}") for power in np.arange(first, last + 0.1, 0.5))


METHODS: dict[str, Method] = {
    "sgd": Method(_sgd, {"lr": _decades(-3.5, -0.5)}, searched=True),
    "adam": Method(_adam, {"lr": _decades(-4, -1.5)}, searched=True),
    "cgd": Method(_fused_so("CGD"), {"lr": _decades(-3.5, -1)}, searched=False),
    "nnn": Method(_fused_so("NNN"), {"lr": _decades(-2.5, 0)}, searched=False),
    "ekfac": Method(_fused_so("EKFAC", likelihood=True), {"lr": _decades(-2.5, 0)}, searched=False),
    "kfac": Method(_fused_so("KFAC", likelihood=True), {"lr": _decades(-2.5, 0)}, searched=False),
    "acp": Method(_fused_so("ACP"), {"lr": _decades(-2.5, 0)}, searched=False),
    "kfac_tridiagonal": Method(
        _fused_so("KFAC", likelihood=True, structure="block_tridiagonal"),
        {"lr": _decades(-2.5, 0)},
        searched=False,
    ),
    "ubp": Method(_fused_so("UBP", likelihood=True), {"lr": _decades(-3.5, -0.5)}, searched=True),
    # Without momentum, as Algorithm 2 of George 2017; a longer correction does no harm then.
    "sgd_plain": Method(_sgd_plain, {"lr": _decades(-2.5, 0.5)}, searched=True),
    "ubp_plain": Method(
        _fused_so("UBP", likelihood=True, momentum=0.0, max_correction=0.5),
        {"lr": _decades(-2.5, 0.5)},
        searched=True,
    ),
    "natural_gradient": Method(
        _fused_so("NaturalGradient", likelihood=True), {"lr": _decades(-1.5, 0)}, searched=False
    ),
    "tonga": Method(_fused_so("TONGA"), {"lr": _decades(-2, 0)}, searched=False),
}
