"""H v for the curvature H of the rest of a chain, on one layer after another from the top.

H is that of the loss with respect to a layer's preactivation, one block an example, all layers
above at their old weights. Two ways to have it: by products through those layers, or by rows J
with J^T J = H that are carried down.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fused_so import ops
from fused_so._dtypes import accumulate
from fused_so.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from fused_so.optim.products import product


class Linearized(NamedTuple):
    """One layer at the point where n examples pass it.

    `weight` (out, in); `slope` (n, out), phi'(a), None for ones; `bend` (n, out), phi''(a) times
    the gradient of the loss with respect to phi(a), None for zeros.
    """

    weight: Tensor
    slope: Tensor | None
    bend: Tensor | None


class MatrixFree:
    """H v by a tangent up to the outputs, their curvature, and a gradient back; exact.

    Without `bend` that is the Gauss-Newton product J^T D J v; with it forward-over-reverse, the
    Hessian. `curve` multiplies rows of output tangents (n, o) by D, into a new tensor.
    """

    def __init__(self, curve: Callable[[Tensor], Tensor]):
        self._curve = curve
        self._above: list[Linearized] = []

    def descend(
        self, layer: Linearized, error: Tensor | None, moved: Tensor | None, *, last: bool
    ) -> Tensor | None:
        """W^T (error + H moved), where `moved` is the preactivation's change; both (n, out).

        `last` says that no layer below will ask.
        """
        rows = error
        if moved is not None:
            rows = self._product(layer, moved)
            rows = rows if error is None else rows.add_(error)
        self._above.append(layer)
        return None if rows is None else product(rows, layer.weight)

    def _product(self, layer: Linearized, moved: Tensor) -> Tensor:
        # t <- W (phi'(a) t), up to the outputs
        tangents = []
        t = moved
        for upper in (layer, *reversed(self._above)):
            if upper is not layer:
                t = product(t, upper.weight.T)
            tangents.append(t if upper.bend is not None else None)
            # What is kept, or was given, must not change.
            owned = upper is not layer and upper.bend is None
            if upper.slope is not None:
                t = t.mul_(upper.slope) if owned else t * upper.slope
        # r <- W^T (phi'(a) r + phi''(a) g t), down again: the derivative of r along t
        r = self._curve(t)
        for upper in (*self._above, layer):
            if upper.slope is not None:
                r = r.mul_(upper.slope)
            t = tangents.pop()
            if t is not None:
                r = r.addcmul_(upper.bend, t)
            if upper is not layer:
                r = product(r, upper.weight)
        return r


class CarriedRows:
    """H v by rows J (n, r, out) of every example, J^T J = H, that come down with the layers.

    Where a layer is narrower than there are rows, a triangular factor of J^T J takes their place:
    the same H. Memory: n r d of the widest layer, three times.
    """

    def __init__(self, rows: Tensor):
        self._rows = rows

    def descend(
        self, layer: Linearized, error: Tensor | None, moved: Tensor | None, *, last: bool
    ) -> Tensor | None:
        """As that of `MatrixFree`."""
        if last:
            return self._end(layer, error, moved)
        if self._rows.shape[1] > self._rows.shape[2]:
            self._rows = triangular_factor(self._rows)
        # Algorithm 2, lines 9, 14 and 15.
        self._rows, below = ops.jacobian_backprop(
            self._rows, layer.weight, dphi=layer.slope, direction=moved
        )
        if error is None:
            return below
        of_error = product(error, layer.weight)
        return of_error if below is None else below.add_(of_error)

    def _end(self, layer: Linearized, error: Tensor | None, moved: Tensor | None) -> Tensor | None:
        """J^T (J v), without carrying J further."""
        rows = error
        if moved is not None:
            moved = moved if layer.slope is None else moved * layer.slope
            tangent = self._rows @ moved[:, :, None]
            rows = (self._rows.mT @ tangent)[:, :, 0]
            rows = rows if layer.slope is None else rows.mul_(layer.slope)
            rows = rows if error is None else rows.add_(error)
        return None if rows is None else product(rows, layer.weight)


def at_outputs(
    likelihood: Likelihood,
    outputs: Tensor,
    signal: Tensor,
    mode: str,
    sketch_size: int,
    generator: Callable[[], torch.Generator],
) -> MatrixFree | CarriedRows:
    """The curvature at the outputs (n, o), whose signal is given, ready to go down.

    `generator` is asked for one if the mode is "sketch".
    """
    outputs = accumulate(outputs)
    targets = _ignored(likelihood, signal)
    if mode == "matrix_free":
        curve = partial(likelihood.curvature_product, outputs, targets=targets)
        # Where entries do not interact D is diagonal, and the same for every layer.
        diagonal = isinstance(likelihood, Gaussian | Bernoulli)
        return MatrixFree(curve(torch.ones_like(outputs)).mul if diagonal else curve)
    if mode == "jacobian":
        columns = likelihood.curvature_sqrt_columns(outputs, targets=targets)
    else:
        draw = partial(likelihood.sketch, outputs, targets=targets, generator=generator())
        columns = torch.stack([draw() for _ in range(sketch_size)]) / sketch_size**0.5
    return CarriedRows(columns.transpose(0, 1))


def _ignored(likelihood: Likelihood, signal: Tensor) -> Tensor | None:
    """Targets that are ignored where the loss has ignored them: where its gradient is zero."""
    if not isinstance(likelihood, Categorical):
        return None
    ignored = likelihood.ignore_index
    return torch.where((signal != 0).any(1), int(ignored == 0), ignored)


def triangular_factor(rows: Tensor) -> Tensor:
    """R (n, d, d) with R^T R = J^T J for J (n, r, d), to the accuracy of J's own dtype.

    The condition number of J^T J is that of J, squared. For float32 it is formed and factored in
    float64, whose rounding is below the square of float32's, and shifted by that rounding, so
    that a singular one has a factor as well. float64 has no such reserve and takes a QR. Neither
    looks at the values, and so neither waits for a device.
    """
    if rows.dtype == torch.float64:
        return torch.linalg.qr(rows, mode="r").R
    wide = rows.double()
    gram = wide.mT @ wide
    diagonal = gram.diagonal(dim1=1, dim2=2)
    rounding = rows.shape[2] * torch.finfo(wide.dtype).eps
    shift = rounding * diagonal.sum(1, keepdim=True)
    diagonal += shift.clamp(min=torch.finfo(wide.dtype).tiny)
    return torch.linalg.cholesky_ex(gram).L.mT.to(rows.dtype)
