"""The walk of updated backpropagation, from the top layer down (George 2017, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fused_so._dtypes import accumulate
from fused_so.optim.base import Update
from fused_so.optim.chain import Link
from fused_so.optim.curvature import CarriedRows, Linearized, MatrixFree
from fused_so.optim.layers import probe
from fused_so.optim.passage import Passage
from fused_so.optim.products import outer_sum, product


class Change(NamedTuple):
    """What the step will add to a parameter: factor times direction."""

    direction: Tensor
    factor: float


def change_of(
    group: Mapping[str, Any], state: Mapping[str, Any], p: nn.Parameter, delta: Tensor
) -> Change:
    """What the step will do with an update delta of p.

    With u = delta + lambda p and v the momentum buffer before the step, mu v + u after it:
    -lr (u + mu v), or with Nesterov's look-ahead -lr ((1 + mu) u + mu^2 v).
    """
    momentum, decay = group["momentum"], group["weight_decay"]
    of_new, of_old = (1 + momentum, momentum**2) if group["nesterov"] else (1.0, momentum)
    direction = delta
    if decay:
        direction = torch.add(direction, accumulate(p), alpha=decay)
    if momentum and "momentum_buffer" in state:
        direction = torch.add(direction, state["momentum_buffer"], alpha=of_old / of_new)
    return Change(direction, -group["lr"] * of_new)


class Descent:
    """One step's updates, and the signals that lead to them.

    A signal is split into the plain one, which autograd has computed, and its error: what the
    changes above add. So without changes the step is SGD's to the bit.

    Args:
        links, passage: the chain, and what the last backward pass left of it.
        groups: the param group of every trained parameter.
        bound: what a parameter's gradient and its correction are multiplied by, 0-dim.
        change: what the step will do to a parameter, given its update.
        curvature: H v, layer by layer.
        hessian: whether H needs second derivatives.
        unscale: what the seen signals have to be multiplied by, if anything.
    """

    def __init__(
        self,
        links: list[Link],
        passage: Passage,
        groups: Mapping[nn.Parameter, dict[str, Any]],
        bound: Callable[[nn.Parameter], Tensor],
        change: Callable[[nn.Parameter, Tensor], Change],
        curvature: MatrixFree | CarriedRows,
        *,
        hessian: bool,
        unscale: Tensor | None,
    ):
        self._links, self._passage, self._groups = links, passage, groups
        self._bound, self._change = bound, change
        self._curvature, self._hessian, self._unscale = curvature, hessian, unscale
        self._share: Tensor | None = None
        self._eps = torch.finfo(passage.outputs.dtype).eps
        self.updates: list[Update] = []
        self.ratios: dict[str, Tensor] = {}
        self.agrees = torch.ones((), dtype=torch.bool, device=passage.outputs.device)
        """Whether all gradients are those of the passage, times one factor; 0-dim."""

    def run(self) -> None:
        trained = [i for i, link in enumerate(self._links) if self._trained(link)]
        error = None
        for index in range(len(self._links) - 1, trained[0] - 1, -1):
            error = self._layer(index, error, lowest=trained[0])

    def _trained(self, link: Link) -> list[nn.Parameter]:
        parameters = (link.linear.weight, link.linear.bias)
        return [p for p in parameters if p in self._groups and p.grad is not None]

    def _layer(self, index: int, error: Tensor | None, lowest: int) -> Tensor | None:
        """Updates one layer; the error (n, out) of its output's signal in, its input's out."""
        link, passage = self._links[index], self._passage
        weight, bias = link.linear.weight, link.linear.bias
        h, output, preactivation, signal = passage.take(index)
        slope, bend = link.derivatives(preactivation, output, second=self._hessian)
        # What autograd handed over is not ours to change.
        signal = signal if self._unscale is None else signal * self._unscale
        if bend is not None:
            bend = bend.mul_(signal)
        # da = phi'(a) g
        if slope is not None:
            signal = signal * slope
            error = None if error is None else error.mul_(slope)
        trained = self._trained(link)
        shares = self._measure_shares(trained, weight, h, signal) if trained else ()

        # grad_W = da h^T and grad_b = da, of which p.grad is the plain part; times the bound
        changes: dict[nn.Parameter, Change] = {}
        for p, share in zip(trained, shares, strict=True):
            grad = accumulate(p.grad)
            bound = self._bound(p).to(grad.dtype)
            if error is None:
                delta = grad * bound
            elif p is weight:
                delta = outer_sum(error * (share * bound), h)[0].addcmul_(grad, bound)
            else:
                delta = (grad + error.sum(0) * share) * bound
            self.updates.append(Update(p, delta))
            changes[p] = self._change(p, delta)
        if index == lowest:
            return None

        moved = _movement(h, changes.get(weight), changes.get(bias))
        signal = signal if error is None else signal + error
        # W^T (H (dW h + db)) and the error's own part of W^T da
        below = self._curvature.descend(
            Linearized(accumulate(weight), slope, bend), error, moved, last=index == lowest + 1
        )
        if weight in changes:
            # dW^T da
            direction, factor = changes[weight]
            below = below.add_(product(signal, direction), alpha=factor)
        return None if below is None else self._bounded(index - 1, below)

    def _bounded(self, index: int, error: Tensor) -> Tensor:
        """The error of a link's output signal, shortened to the link's max_correction."""
        link = self._links[index]
        plain = self._passage.signals[index]
        size = torch.linalg.vector_norm(error).double()
        reference = torch.linalg.vector_norm(accumulate(plain)).double()
        if self._unscale is not None:
            reference = reference * self._unscale
        self.ratios[link.name] = size / reference
        trained = self._trained(link)
        limit = self._groups[trained[0]]["max_correction"] if trained else None
        if limit is None:
            return error
        factor = torch.where(size > 0, (limit * reference / size).clamp(max=1.0), 1.0)
        return error.mul_(factor.to(error.dtype))

    def _measure_shares(
        self, trained: list[nn.Parameter], weight: nn.Parameter, h: Tensor, signal: Tensor
    ) -> Tensor:
        """c in p.grad = c * (the passage's gradient), for the parameters of a layer; or 0.

        The topmost trained parameter says what c is; another gradient than that has 0, and so no
        correction. A clipped gradient has c < 1, and so then have corrections, which are gradients
        too. Both sides are multiplied by one random vector.
        """
        v = probe(h.shape[1], h.dtype, h.device)
        along, ones = h @ v, h.new_ones(h.shape[0])
        weights = torch.stack([along if p is weight else ones for p in trained], 1)
        gradients = [accumulate(p.grad) for p in trained]
        products = [
            grad @ v if p is weight else grad for p, grad in zip(trained, gradients, strict=True)
        ]
        held = torch.stack(products, 1).double()
        expected = (signal.T @ weights).double()
        # h v may cancel, its rounding does not; but squares of tiny inputs vanish in float32.
        reach = torch.maximum(torch.linalg.vector_norm(h, dim=1), along.abs())
        reaches = torch.stack([reach if p is weight else ones for p in trained], 1)
        sizes = (signal.abs().T @ reaches).double().norm(dim=0)
        topmost = self._share is None
        if topmost:
            square = expected[:, 0].dot(expected[:, 0])
            fit = held[:, 0].dot(expected[:, 0]) / square
            self._share = torch.where(square > 0, fit, 1.0)
        # Rounding in the dtypes of the passage, and products in TF32.
        rounding = max(1e-3, 4 * self._eps)
        misses = (held - self._share * expected).norm(dim=0)
        agree = misses <= rounding * self._share.abs() * sizes
        # What is not finite has a warning of its own.
        passed = agree | ~misses.isfinite()
        self.agrees = self.agrees & passed.all()
        shares = torch.where(agree, self._share, 0.0).to(signal.dtype)
        if topmost:
            self._share = torch.where(passed[0], self._share, 0.0)
        return shares


def _movement(h: Tensor, of_weight: Change | None, of_bias: Change | None) -> Tensor | None:
    """dW h + db, (n, out)."""
    if of_weight is None:
        if of_bias is None:
            return None
        return (of_bias.factor * of_bias.direction).expand(h.shape[0], -1)
    direction, factor = of_weight
    moved = product(h, direction.T).mul_(factor)
    return moved if of_bias is None else moved.add_(of_bias.direction, alpha=of_bias.factor)
