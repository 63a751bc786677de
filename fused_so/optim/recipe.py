"""The full recipe of K-FAC (Martens and Grosse 2015, long version, sections 6.4 to 7).

Step size and momentum minimize, over the span of the preconditioned gradient -Delta and the last
step delta_0, the quadratic model of the batch's objective h = loss + eta/2 |theta|^2

    M(delta) - M(0) = delta^T (F + (lambda + eta) I) delta / 2 + grad h^T delta

with the exact Fisher F, by one forward-mode product a direction. lambda follows how well M
predicts h (Levenberg-Marquardt), and gamma, which damps the factors, how low M gets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fused_so.capture import hook
from fused_so.optim.base import Update
from fused_so.optim.kronecker import KroneckerOptimizer

T1, T2 = 5, 20
PAPER = {
    "lr": 1.0,
    "damping": 150.0,
    "relative_damping": 0.0,
    "statistics_every": 1,
    "inverse_every": T2,
    "decay": 0.95,
    "warmup": 0,
}
"""The defaults of K-FAC's options under this recipe."""
OMEGA_1, OMEGA_2 = (19 / 20) ** T1, math.sqrt(19 / 20) ** T2


class PaperRecipe:
    """Takes the steps of one optimizer, which has one param group and a likelihood."""

    def __init__(self, optimizer: KroneckerOptimizer):
        if optimizer._likelihood is None:
            raise ValueError("recipe='paper' needs the likelihood of the model's outputs")
        if optimizer._factors == "empirical":
            raise ValueError("factors must not be 'empirical' for recipe='paper'")
        self._optimizer = optimizer
        self.check()
        self._call: tuple[tuple, dict, Tensor] | None = None
        self.ratio = self.predicted = math.nan
        self._random = torch.get_rng_state()
        model = optimizer._model
        self._handles = [
            hook(model.register_forward_pre_hook, self._begin),
            hook(model.register_forward_hook, self._keep, with_kwargs=True),
        ]

    def diagnostics(self) -> dict[str, Any]:
        group = self._optimizer.param_groups[0]
        # At the minimum M(delta) - M(0) = -delta^T (F + (lambda + eta) I) delta / 2.
        norm = max(0.0, -2 * self.predicted) ** 0.5
        report = {name: group[name] for name in ("damping", "gamma")}
        return {**report, "ratio": self.ratio, "norm": [norm]}

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def check(self) -> None:
        """Raises if there are several param groups, parameters of half precision, or no damping."""
        groups = self._optimizer.param_groups
        if len(groups) > 1:
            raise ValueError("params must be one group for recipe='paper', got several")
        if not groups[0]["damping"]:
            raise ValueError(
                "damping must be positive for recipe='paper', which multiplies it to adapt it, "
                "got 0"
            )
        for param in groups[0]["params"]:
            # The strong damping of the beginning makes steps of less than half an ulp.
            if param.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"params must be float32 or float64 for recipe='paper', got {param.dtype}, in "
                    f"which its short steps round to nothing; keep them in float32 and run the "
                    f"model under torch.autocast"
                )

    def _begin(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self._random = torch.get_rng_state()

    @contextmanager
    def _same_network(self) -> Iterator[None]:
        """Calls of the model draw the dropout of the batch's own call, and move no buffer."""
        model = self._optimizer._model
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        try:
            with torch.random.fork_rng(devices=[]):
                torch.set_rng_state(self._random)
                yield
        finally:
            for buffer, before in buffers:
                buffer.copy_(before)

    def _keep(self, module: Any, args: tuple, kwargs: dict, output: Tensor) -> None:
        if torch.is_grad_enabled():
            self._call = (args, kwargs, output.detach())

    def update(self) -> None:
        """Takes a step from the gradients that are there."""
        optimizer, group = self._optimizer, self._optimizer.param_groups[0]
        if optimizer.closure is None:
            raise ValueError(
                "recipe='paper' adapts its damping to the loss after the step: call "
                "step(closure), where closure clears the gradients, computes the loss, calls "
                "backward and returns the loss"
            )
        if all(param.grad is None for param in group["params"]):
            raise ValueError("recipe='paper' needs gradients: closure must call backward")
        if self._call is None:
            raise ValueError(
                "recipe='paper' needs the outputs of the model: closure must call the model that "
                "was given, as model(...)"
            )
        before = self._objective(optimizer.loss)
        gammas = self._gammas()
        proposals = []
        for group["gamma"] in gammas:
            self._invert(anew=len(gammas) > 1)
            proposals.append((*self._propose(), group["gamma"]))
        # Reversed: gamma stays where no model is lower, as for a gradient that is not finite.
        predicted, delta, group["gamma"] = min(reversed(proposals), key=lambda p: p[0])
        if group["gamma"] != gammas[-1]:
            self._invert(anew=True)
        self.predicted = predicted
        self._take(delta)
        if (optimizer._steps + 1) % T1 == 0:
            # A share lr of the minimum's step: M(lr delta) - M(0) = lr (2 - lr) (M(delta) - M(0))
            self._adapt(before, group["lr"] * (2 - group["lr"]) * predicted)
        self._call = None

    def _gammas(self) -> list[float]:
        """What damps the factors; now and then, also a smaller and a larger value to try."""
        optimizer, group = self._optimizer, self._optimizer.param_groups[0]
        gamma = group["gamma"]
        if gamma is None:
            return [math.sqrt(group["damping"] + group["weight_decay"])]
        if optimizer._steps % T2:
            return [gamma]
        return [OMEGA_2 * gamma, gamma / OMEGA_2, gamma]

    def _invert(self, anew: bool) -> None:
        optimizer = self._optimizer
        layers = [layer for layer in optimizer._layers if layer.module.weight.grad is not None]
        if anew:
            optimizer.invert([layer for layer in layers if optimizer.ready(layer)])
        else:
            optimizer.refresh(layers)

    def _propose(self) -> tuple[float, list[tuple[Tensor, Tensor]]]:
        """M(delta) - M(0) at its minimum over the two directions, and delta there."""
        optimizer, group = self._optimizer, self._optimizer.param_groups[0]
        updates = [u for kind in optimizer._updates(group).values() for u in kind]
        steps = [[-u.delta.to(u.param) for u in updates]]
        last = [optimizer.state[u.param].get("last_step") for u in updates]
        if all(step is not None for step in last):
            steps.append([step.clone() for step in last])
        damping = group["damping"] + group["weight_decay"]
        # Q = D^T (F + (lambda + eta) I) D and b = D^T grad h for the directions D
        quadratic = self._fisher(updates, steps) + damping * _inner(steps, steps)
        slope = _inner(steps, [[self._slope(u) for u in updates]])[:, 0]
        if not (quadratic.isfinite().all() and slope.isfinite().all()):
            return math.inf, [(u.param, torch.full_like(u.param, math.nan)) for u in updates]
        weights = -torch.linalg.lstsq(quadratic, slope[:, None], driver="gelsd").solution[:, 0]
        predicted = (0.5 * weights @ quadratic @ weights + slope @ weights).item()
        delta = []
        for i, update in enumerate(updates):
            step = sum(w * s[i] for w, s in zip(weights.tolist(), steps, strict=True))
            delta.append((update.param, step))
        return predicted, delta

    def _slope(self, update: Update) -> Tensor:
        """grad h"""
        if update.grad is not None:
            return update.grad
        decay = self._optimizer.param_groups[0]["weight_decay"]
        return update.param.grad.add(update.param, alpha=decay)

    def _fisher(self, updates: list[Update], steps: list[list[Tensor]]) -> Tensor:
        """D^T F D: inner products of S^T J d, with S S^T the curvature at the outputs."""
        args, kwargs, outputs = self._call
        model, likelihood = self._optimizer._model, self._optimizer._likelihood
        names = {p: name for name, p in model.named_parameters()}
        at = {names[u.param]: u.param.detach() for u in updates}

        def run(params: dict[str, Tensor]) -> Tensor:
            # A derivative may not be written into buffers: copies.
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            return torch.func.functional_call(model, buffers | params, args, kwargs)

        images = []
        for step in steps:
            tangent = {names[u.param]: s for u, s in zip(updates, step, strict=True)}
            with self._same_network(), _forward_mode():
                _, moved = torch.func.jvp(run, (at,), (tangent,))
            images.append(likelihood.curvature_sqrt_product(outputs, moved, transposed=True))
        flat = torch.stack([image.flatten() for image in images]).double()
        return (flat @ flat.T).cpu()

    def _take(self, delta: list[tuple[Tensor, Tensor]]) -> None:
        optimizer, group = self._optimizer, self._optimizer.param_groups[0]
        finite = all(bool(step.isfinite().all()) for _, step in delta)
        optimizer._warn_unless_finite(torch.tensor(finite))
        if finite:
            for param, step in delta:
                param.add_(step, alpha=group["lr"])
                optimizer.state[param]["last_step"] = group["lr"] * step

    # Damping.

    def _adapt(self, before: float, predicted: float) -> None:
        """Levenberg-Marquardt: rho = (h(theta + delta) - h(theta)) / (M(delta) - M(0))."""
        optimizer, group = self._optimizer, self._optimizer.param_groups[0]
        if not predicted < 0:  # no step was taken
            return
        kept = [(param, param.grad) for param in group["params"]]
        for param, _ in kept:
            param.grad = None  # the closure may clear them in place
        try:
            with optimizer.unobserved(), self._same_network(), torch.enable_grad():
                after = self._objective(optimizer.closure())
        finally:
            for param, grad in kept:
                param.grad = grad
        self.ratio = (after - before) / predicted
        if self.ratio > 0.75:
            group["damping"] *= OMEGA_1
        elif not self.ratio >= 0.25:
            group["damping"] /= OMEGA_1

    def _objective(self, loss: Any) -> float:
        group = self._optimizer.param_groups[0]
        squares = sum(p.detach().double().square().sum().item() for p in group["params"])
        if loss is None:
            raise ValueError("closure must return the loss for recipe='paper', got None")
        loss = loss.item() if isinstance(loss, Tensor) else float(loss)
        return loss + 0.5 * group["weight_decay"] * squares


_NO_FORWARD_MODE = ("forward AD", "forward-mode", "jvp", "setup_context")


@contextmanager
def _forward_mode() -> Iterator[None]:
    """Attention by operations that have forward-mode derivatives; of others an error is clear."""
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _NO_FORWARD_MODE):
            raise
        raise NotImplementedError(
            f"recipe='paper' takes forward-mode derivatives of the model, which one of its "
            f"operations does not have ({error}); use recipe=None"
        ) from error


def _inner(one: list[list[Tensor]], two: list[list[Tensor]]) -> Tensor:
    """All inner products of lists of tensors, in float64, on the host."""

    def inner(a: list[Tensor], b: list[Tensor]) -> float:
        products = (torch.sum(x * y, dtype=torch.float64) for x, y in zip(a, b, strict=True))
        return sum(product.item() for product in products)

    return torch.tensor([[inner(a, b) for b in two] for a in one], dtype=torch.float64)
