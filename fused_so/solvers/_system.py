"""What the solvers share: the system as flat vectors, when to stop, and what comes out."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_so._dtypes import accumulate_dtype
from fused_so.ops import _check

Product = Callable[[Any], Any]


@dataclass(frozen=True)
class Solution:
    """What a solver found.

    Attributes:
        x: the solution, a tensor or list of tensors as the right-hand side is.
        iterations: how many steps it took, a product with the matrix each.
        residual: ||b - A x|| / ||b||, as the recurrences have it; in the norm of the inverse of
            the preconditioner's matrix where `minres_qlp` has one.
        status: why it stopped.

            - "converged": the residual is at most `tolerance`.
            - "progress": the quadratic model hardly falls any more (`progress`).
            - "least_squares" (minres_qlp): no x has a smaller residual.
            - "max_iterations": neither was reached.
            - "singular", "indefinite" (cg): the curvature along the next direction is zero to
              rounding, or negative; x is what was found before.
            - "bad_preconditioner": the preconditioner is not positive definite.
            - "not_finite": b, a product or a preconditioned vector holds a NaN or Inf; x is what
              was found before.
    """

    x: Tensor | list[Tensor]
    iterations: int
    residual: float
    status: str


class System:
    """(A + damping I) x = b, all of b in one contiguous vector of the accumulate dtype."""

    def __init__(
        self,
        product: Product,
        b: Tensor | Sequence[Tensor],
        preconditioner: Product | None,
        damping: float,
    ):
        for name, function in (("product", product), ("preconditioner", preconditioner)):
            if not callable(function) and not (name == "preconditioner" and function is None):
                raise TypeError(f"{name} must be callable, got {type(function).__name__}")
        _check.within("damping", damping, 0.0, math.inf)
        self._product, self._preconditioner, self._damping = product, preconditioner, damping
        self._single = isinstance(b, Tensor)
        tensors = [b] if self._single else _check.tensor_list("b", b)
        if not tensors:
            raise ValueError("b must hold at least one tensor, got an empty list")
        for i, tensor in enumerate(tensors):
            _check.floating(f"b[{i}]", tensor)
            _check.same_dtype(f"b[{i}]", tensor, "b[0]", tensors[0])
            _check.same_device(f"b[{i}]", tensor, "b[0]", tensors[0])
        self._shapes = [tensor.shape for tensor in tensors]
        self._sizes = [tensor.numel() for tensor in tensors]
        self.dtype = accumulate_dtype(tensors[0].dtype)
        # In units in which squares neither overflow nor vanish; the solution gets them back.
        self.b, self._unit = normalized(self.flatten("b", b))
        self.eps = torch.finfo(self.dtype).eps

    @property
    def preconditioned(self) -> bool:
        return self._preconditioner is not None

    def flatten(self, name: str, value: Tensor | Sequence[Tensor], out: Tensor | None = None):
        """`value`, shaped as b is, as one vector."""
        flat = self._parts(name, value)
        return torch.cat(flat, out=out) if out is not None else torch.cat(flat)

    def _parts(self, name: str, value: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """`value`, if it is shaped as b is, as vectors."""
        tensors = [value] if self._single else _check.tensor_list(name, value)
        if len(tensors) != len(self._shapes):
            raise ValueError(
                f"{name} must give {len(self._shapes)} tensors, one for each of b, "
                f"got {len(tensors)}"
            )
        for i, (tensor, shape) in enumerate(zip(tensors, self._shapes, strict=True)):
            _check.shape(name if self._single else f"{name}[{i}]", tensor, tuple(shape))
        return [tensor.reshape(-1).to(self.dtype) for tensor in tensors]

    def shaped(self, flat: Tensor) -> Tensor | list[Tensor]:
        """Views into `flat`, shaped as b is."""
        parts = flat.split(self._sizes)
        shaped = [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]
        return shaped[0] if self._single else shaped

    def solution(self, flat: Tensor) -> Tensor | list[Tensor]:
        """x in the units of b, shaped as it is; takes `flat` over."""
        return self.shaped(flat if self._unit == 1.0 else flat.mul_(self._unit))

    def product(self, v: Tensor, out: Tensor | None = None) -> Tensor:
        """A v + damping v."""
        image = self._product(self.shaped(v))
        if not self._damping:
            return self.flatten("product", image, out)
        out = torch.empty_like(v) if out is None else out
        parts = zip(
            self._parts("product", image), v.split(self._sizes), out.split(self._sizes), strict=True
        )
        # In the pass that puts the parts together.
        for part, own, damped in parts:
            torch.add(part, own, alpha=self._damping, out=damped)
        return out

    def precondition(self, r: Tensor) -> Tensor:
        """M^-1 r; r itself without a preconditioner."""
        if self._preconditioner is None:
            return r
        return self.flatten("preconditioner", self._preconditioner(self.shaped(r)))


def normalized(v: Tensor) -> tuple[Tensor, float]:
    """v over a power of two about its largest entry, which rounds nothing; and that power."""
    largest = v.abs().max().item() if v.numel() else 0.0
    if not largest or not math.isfinite(largest):
        return v, 1.0
    unit = 2.0 ** (math.frexp(largest)[1] - 1)
    return v / unit, unit


class Progress:
    """Martens' stop: the model phi = x^T A x / 2 - b^T x fell by too little over the last k steps.

    (phi_i - phi_{i-k}) / phi_i < k epsilon, with k = max(10, i / 10) and phi_i < 0 (Martens 2010,
    section 4.4).
    """

    def __init__(self, epsilon: float | None):
        self.epsilon = epsilon
        self._values: list[float] = []

    def stalls(self, value: float) -> bool:
        self._values.append(value)
        i = len(self._values) - 1
        k = max(10, math.ceil(i / 10))
        if i < k or value >= 0:
            return False
        return (value - self._values[i - k]) / value < k * self.epsilon


def check_options(max_iterations: int, tolerance: float, progress: float | None) -> None:
    if isinstance(max_iterations, bool) or not isinstance(max_iterations, int):
        raise TypeError(f"max_iterations must be an int, got {max_iterations!r}")
    if max_iterations < 1:
        raise ValueError(f"max_iterations must be at least 1, got {max_iterations}")
    _check.within("tolerance", tolerance, 0.0, math.inf)
    if progress is not None:
        _check.within("progress", progress, 0.0, math.inf)
