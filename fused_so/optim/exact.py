"""The exact damped step of `NaturalGradient(solver="gram")`, for models of linear layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fused_so._dtypes import accumulate
from fused_so.capture import Capture
from fused_so.likelihoods import Likelihood
from fused_so.optim.base import loss_scale
from fused_so.optim.batches import Batch, Watch
from fused_so.optim.gram import check_rows, damped_step
from fused_so.optim.metric import (
    curvature_columns,
    empirical_scale,
    examples_of,
    fisher_roots,
    weight_of,
)
from fused_so.optim.readback import Readback
from fused_so.optim.rows import Rows, common_scale, joined, pulled
from fused_so.optim.solved import Solved


class ExactSteps:
    """Solves with every linear layer's rows: those of the backward pass, or of one of its own.

    Those of the backward pass are rows of the loss times the scale of `grad_scaler`.
    """

    def __init__(
        self,
        watch: Watch,
        likelihood: Likelihood,
        metric: str,
        grad_scaler: torch.amp.GradScaler | None,
    ):
        self._grad_scaler = grad_scaler
        self._system: tuple[list[nn.Linear], list[Rows], Tensor] | None = None
        self._watch, self._likelihood, self._metric = watch, likelihood, metric
        self._layers: dict[nn.Linear, str] = {}
        self._params: set[Tensor] = set()
        self._captures: list[Capture] = []
        self._calls: dict[nn.Linear, list[tuple[Tensor, Tensor]]] = {}

    def adopt(self, params: Mapping[Tensor, str]) -> None:
        """Hooks the layers that own the named parameters; raises if some have another owner."""
        modules = dict(self._watch.module.named_modules())
        uses = Counter(p for m in modules.values() for p in m._parameters.values() if p is not None)
        owned = {
            p: (module, name)
            for name, module in modules.items()
            if isinstance(module, nn.Linear)
            for p in module._parameters.values()
            if p is not None and uses[p] == 1
        }
        others = [name for p, name in params.items() if p not in owned]
        if others:
            raise ValueError(
                f"solver 'gram' needs every trained parameter to be that of one nn.Linear, but "
                f"these are not: {', '.join(others)}; use 'cg', or train them in another optimizer"
            )
        for p in params:
            module, name = owned[p]
            if module not in self._layers and self._metric == "empirical_fisher":
                self._captures.append(Capture(module, partial(self._receive, module)))
            self._layers[module] = name
        self._params.update(params)

    def _receive(self, module: nn.Linear, h: Tensor, g: Tensor) -> None:
        if self._watch.active:
            self._calls.setdefault(module, []).append((h, g))

    def forget(self) -> None:
        self._calls.clear()
        self._system = None

    def remove_hooks(self) -> None:
        for capture in self._captures:
            capture.remove()

    def solve(
        self,
        params: Sequence[Tensor],
        batches: Sequence[Batch],
        examples: int | None,
        damping: float,
        state: Mapping[Tensor, dict[str, Any]],
    ) -> Solved:
        layers = [m for m in self._layers if self._trains(m.weight) or self._trains(m.bias)]
        seen = self._metric == "empirical_fisher"
        if seen:
            rows = [self._seen_rows(module, batches) for module in layers]
            scale = empirical_scale(self._likelihood, [batch.score for batch in batches])
            scale = scale / loss_scale(self._grad_scaler, rows[0].g.device)
        else:
            rows, scale = self._own_rows(layers, batches, examples), 1.0
        ones = rows[0].g.new_ones(len(rows[0].g))
        waits = not Readback.waits_for(ones)
        c = common_scale(rows) if seen and waits else None
        step = damped_step(
            rows,
            scales=scale * ones,
            damping=damping,
            share=None if c is None else c / scale * ones,
            waits=waits,
            # Three products are little beside a backward pass of their own, not beside none.
            refine=not seen,
        )
        self._system = layers, rows, scale * ones
        found = {
            p: delta
            for module, pair in zip(layers, step.updates, strict=True)
            for p, delta in zip((module.weight, module.bias), pair, strict=True)
        }
        return Solved([found[p] for p in params], step.square)

    def curvature(self, step: Mapping[Tensor, Tensor]) -> Tensor:
        """v^T G v with the metric of the last solution, which is given up with it."""
        (layers, rows, scales), self._system = self._system, None
        at = [
            row._replace(
                grad_weight=step.get(module.weight, row.grad_weight),
                grad_bias=step.get(module.bias),
            )
            for module, row in zip(layers, rows, strict=True)
        ]
        # G = U U^T
        return pulled(at, scales).double().square().sum()

    def _rows(self, module: nn.Linear, g: Tensor, h: Tensor) -> Rows:
        bias = module.bias.grad if self._trains(module.bias) else None
        if self._trains(module.weight):
            return Rows(accumulate(g), accumulate(h), module.weight.grad, bias)
        # To a bias alone the layer's inputs mean nothing.
        return Rows(accumulate(g), accumulate(h[:, :0]), module.weight[:, :0], bias)

    def _trains(self, param: Tensor | None) -> bool:
        return param in self._params and param.grad is not None

    def _seen_rows(self, module: nn.Linear, batches: Sequence[Batch]) -> Rows:
        calls = self._calls.get(module, [])
        self._check_calls(
            module,
            [len(h) for h, _ in calls],
            [examples_of(batch.score) for batch in batches],
        )
        h, g = (joined(parts) for parts in zip(*calls, strict=True))
        return self._rows(module, g, h)

    def _own_rows(
        self, layers: list[nn.Linear], batches: Sequence[Batch], examples: int | None
    ) -> list[Rows]:
        """The rows of J^T S for every column of S, with S S^T = D."""
        calls: dict[nn.Linear, list[tuple[Tensor, Tensor]]] = {module: [] for module in layers}

        def keep(module: nn.Linear, args: tuple, output: Tensor) -> Tensor:
            calls[module].append((args[0].detach(), output))
            return output.clone()  # an activation in place must not change what is kept

        handles = [module.register_forward_hook(keep) for module in layers]
        try:
            with torch.enable_grad():
                outputs = [self._watch.call(batch, {}) for batch in batches]
        finally:
            for handle in handles:
                handle.remove()
        sizes = [examples_of(out) for out in outputs]
        for module in layers:
            self._check_calls(module, [h.shape[:-1].numel() for h, _ in calls[module]], sizes)
        if self._metric == "gauss_newton":
            # A column of D's root an output; before any of them is made.
            check_rows(
                sum(out.numel() for out in outputs),
                f" (one an example and output, outputs {[tuple(out.shape) for out in outputs]})",
                ", solver 'cg' or metric 'sampled_fisher' (a row an example)",
            )
        weight = weight_of(self._likelihood, outputs, examples)
        scores = [batch.score for batch in batches]
        columns = fisher_roots(self._likelihood, self._metric, outputs, scores, weight)
        if columns is None:
            columns = curvature_columns(self._likelihood, outputs, scores, weight)
        else:
            columns = [column[None] for column in columns]
        gs: list[list[Tensor]] = [[] for _ in layers]
        hs: list[list[Tensor]] = [[] for _ in layers]
        for i, (out, cols) in enumerate(zip(outputs, columns, strict=True)):
            at = [calls[module][i][1] for module in layers]
            for column in cols:
                pulled = torch.autograd.grad(
                    out, at, column.to(out.dtype), retain_graph=True, materialize_grads=True
                )
                for k, module in enumerate(layers):
                    gs[k].append(pulled[k].reshape(-1, module.out_features))
                    hs[k].append(calls[module][i][0].reshape(-1, module.in_features))
        return [
            self._rows(module, torch.cat(gs[k]), torch.cat(hs[k]))
            for k, module in enumerate(layers)
        ]

    def _check_calls(self, module: nn.Linear, got: list[int], expected: list[int]) -> None:
        if got != expected:
            raise ValueError(
                f"solver 'gram' needs layer {self._layers[module]!r} to be called once in every "
                f"call of the model, with an example a row: {expected} rows, got {got}; use 'cg'"
            )
