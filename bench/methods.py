"""The optimizers under comparison, and which of their options are searched.

Baselines: SGD, Adam, and SGD on a model with normalization layers. Published second-order
libraries: SINGD (Lin et al. 2024), SIRFShampoo (Lin et al. 2024) and pytorch-optimizer's SOAP
(Vyas et al. 2024), by their own interfaces and, but for what is searched, their own defaults;
`pip install -e '.[compare]'` installs them. The others are fused_so's.
"""

from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from optuna.distributions import BaseDistribution, FloatDistribution
from torch import nn
from torch.optim.lr_scheduler import LinearLR

import fused_so
from bench.normalization import MeanOnlyBatchNorm, normalized


def unchanged(model: nn.Module) -> nn.Module:
    return model


@dataclass(frozen=True)
class Method:
    """How to build an optimizer, which values to search, and whether to search them unasked.

    `build` takes the model, the likelihood of its outputs and options. `space` is the range of each
    hyperparameter that a search draws.
    `adapt` takes the problem's model and gives the one to train, before it is copied or hooked.
    """

    build: Callable[..., torch.optim.Optimizer]
    space: Mapping[str, BaseDistribution]
    searched: bool = False
    adapt: Callable[[nn.Module], nn.Module] = unchanged


def _sgd(model: nn.Module, _: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, **options)


def _sgd_plain(model: nn.Module, _: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **options)


def sutskever_momentum(update: int, momentum_max: float) -> float:
    """The momentum of update 0, 1, ... by Sutskever et al. (2013), equation 5."""
    # mu_t = min(1 - 2^(-1 - log2(floor(t / 250) + 1)), mu_max)
    return min(1 - 2 ** (-1 - math.log2(update // 250 + 1)), momentum_max)


def _sgd_nesterov(
    model: nn.Module, _: Any, *, momentum_max: float = 0.99, **options: Any
) -> torch.optim.Optimizer:
    """Without the paper's last 1000 updates at momentum 0.9: iterates are averaged here."""
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.5, nesterov=True, **options)
    updates = itertools.count()

    def schedule(*_: Any) -> None:
        momentum = sutskever_momentum(next(updates), momentum_max)
        for group in optimizer.param_groups:
            group["momentum"] = momentum

    optimizer.register_step_pre_hook(schedule)
    return optimizer


def _adam(model: nn.Module, _: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), **options)


def _fused_so(
    name: str, *, likelihood: bool = False, **fixed: Any
) -> Callable[..., torch.optim.Optimizer]:
    def build(model: nn.Module, of_outputs: Any, **options: Any) -> torch.optim.Optimizer:
        if likelihood:
            options["likelihood"] = of_outputs
        return getattr(fused_so, name)(model, **{**fixed, **options})

    return build


def _growing(optimizer: torch.optim.Optimizer, updates: int) -> torch.optim.Optimizer:
    """The optimizer with a learning rate that grows to its own from half of it."""
    schedule = LinearLR(optimizer, start_factor=0.5, total_iters=updates)
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    return optimizer


def _kfac_growing(
    model: nn.Module, of_outputs: Any, *, lr: float = 0.12, **options: Any
) -> torch.optim.Optimizer:
    return _growing(fused_so.KFAC(model, lr, likelihood=of_outputs, **options), 300)


def _adam_growing(
    model: nn.Module, _: Any, *, lr: float = 1.8e-3, **options: Any
) -> torch.optim.Optimizer:
    """From the rate that a search of short trials finds on curves."""
    return _growing(torch.optim.Adam(model.parameters(), lr=lr, **options), 1500)


def _published(module: str, name: str, *, of_parameters: bool = False, **fixed: Any):
    """The builder of another library's optimizer, which takes the model or its parameters."""

    def build(model: nn.Module, _: Any, **options: Any) -> torch.optim.Optimizer:
        try:
            kind = getattr(importlib.import_module(module), name)
        except ImportError as error:
            raise ImportError(
                f"{name} is of the package {module.partition('.')[0]}, which is not installed: "
                f"pip install -e '.[compare]'"
            ) from error
        of = model.parameters() if of_parameters else model
        return _with_closure(kind)(of, **fixed, **options)

    return build


def _with_closure(kind: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The optimizer, whose step may not take a closure, with one that does."""

    class WithClosure(kind):
        def step(self, closure: Callable[[], Any]) -> Any:
            loss = closure()
            super().step()
            return loss

    return WithClosure


def _method(
    build: Callable[..., torch.optim.Optimizer],
    *,
    searched: bool = False,
    adapt: Callable[[nn.Module], nn.Module] = unchanged,
    **space: BaseDistribution,
) -> Method:
    return Method(build, space, searched, adapt)


def _log(low: float, high: float) -> FloatDistribution:
    return FloatDistribution(low, high, log=True)


_RELATIVE_DAMPING = _log(1e-3, 3.2)

METHODS: dict[str, Method] = {
    "sgd": _method(_sgd, searched=True, lr=_log(3.2e-4, 3.2e-1)),
    "adam": _method(_adam, searched=True, lr=_log(1e-4, 3.2e-2)),
    "cgd": _method(_fused_so("CGD"), lr=_log(3.2e-4, 3.2e-1)),
    "nnn": _method(_fused_so("NNN"), lr=_log(3.2e-3, 1), relative_damping=_RELATIVE_DAMPING),
    "ekfac": _method(
        _fused_so("EKFAC", likelihood=True),
        lr=_log(3.2e-4, 3.2e-1),
        relative_damping=_RELATIVE_DAMPING,
    ),
    "kfac": _method(
        _fused_so("KFAC", likelihood=True),
        lr=_log(3.2e-4, 3.2e-1),
        relative_damping=_RELATIVE_DAMPING,
    ),
    "adam_growing": _method(_adam_growing, lr=_log(1e-4, 3.2e-2)),
    "kfac_growing": _method(
        _kfac_growing, lr=_log(3.2e-4, 3.2e-1), relative_damping=_RELATIVE_DAMPING
    ),
    "acp": _method(_fused_so("ACP"), lr=_log(3.2e-3, 1), relative_damping=_RELATIVE_DAMPING),
    "kfac_tridiagonal": _method(
        _fused_so("KFAC", likelihood=True, structure="block_tridiagonal"),
        lr=_log(3.2e-4, 3.2e-1),
        relative_damping=_RELATIVE_DAMPING,
    ),
    # The paper's first lambda, 150, takes a hundred updates to come down here.
    "kfac_paper": _method(
        _fused_so("KFAC", likelihood=True, recipe="paper", damping=1.0), lr=_log(0.1, 1)
    ),
    "kfac_paper_tridiagonal": _method(
        _fused_so(
            "KFAC",
            likelihood=True,
            recipe="paper",
            damping=1.0,
            structure="block_tridiagonal",
        ),
        lr=_log(0.1, 1),
    ),
    "ubp": _method(_fused_so("UBP", likelihood=True), searched=True, lr=_log(3.2e-4, 3.2e-1)),
    # Without momentum, as Algorithm 2 of George 2017; a longer correction does no harm then.
    "sgd_plain": _method(_sgd_plain, searched=True, lr=_log(3.2e-3, 3.2)),
    "ubp_plain": _method(
        _fused_so("UBP", likelihood=True, momentum=0.0, max_correction=0.5, max_norm=None),
        searched=True,
        lr=_log(3.2e-3, 3.2),
    ),
    "natural_gradient": _method(
        _fused_so("NaturalGradient", likelihood=True), lr=_log(3.2e-2, 1), damping=_log(1e-3, 10)
    ),
    "tonga": _method(_fused_so("TONGA"), lr=_log(1e-2, 1), relative_damping=_RELATIVE_DAMPING),
    "sgd_nesterov": _method(
        _sgd_nesterov,
        searched=True,
        lr=_log(1e-4, 1e-1),
        momentum_max=FloatDistribution(0.9, 0.999),
    ),
    "bn": _method(
        _sgd, searched=True, adapt=partial(normalized, nn.BatchNorm1d), lr=_log(1e-4, 3.2e-1)
    ),
    "mean_only_bn": _method(
        _sgd, searched=True, adapt=partial(normalized, MeanOnlyBatchNorm), lr=_log(1e-4, 3.2e-1)
    ),
    # The heuristic of the thesis, and a number for all layers; `acp` has the library's default.
    "acp_heuristic": _method(
        _fused_so("ACP", alpha="max_squared_gradient"),
        lr=_log(3.2e-3, 1),
        relative_damping=_RELATIVE_DAMPING,
    ),
    "acp_fixed": _method(
        _fused_so("ACP", alpha=1.0), searched=True, lr=_log(3.2e-3, 1), alpha=_log(1e-3, 10)
    ),
    # Momentum 0.9 makes the steps of `kfac` ten times as long.
    "kfac_plain": _method(
        _fused_so("KFAC", likelihood=True, momentum=0.0, nesterov=False),
        searched=True,
        lr=_log(3.2e-3, 1),
        relative_damping=_RELATIVE_DAMPING,
    ),
    "singd": _method(
        _published("singd.optim.optimizer", "SINGD"),
        searched=True,
        lr=_log(1e-5, 1e-1),
        damping=_log(1e-5, 1),
    ),
    "sirfshampoo": _method(
        _published("sirfshampoo", "SIRFShampoo"),
        searched=True,
        lr=_log(1e-5, 1e-1),
        lam=_log(1e-5, 1),
    ),
    # Without weight decay, as all of them.
    "soap": _method(
        _published("pytorch_optimizer", "SOAP", of_parameters=True, weight_decay=0.0),
        searched=True,
        lr=_log(1e-4, 1e-1),
    ),
}
