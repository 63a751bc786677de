"""What the ways to a natural-gradient step have in common: the answer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fused_so.solvers import Solution

NOT_FINITE = "a gradient is not finite"


class Solved(NamedTuple):
    """(G + damping I)^-1 p.grad for every parameter.

    Attributes:
        deltas: in the order of the parameters.
        square: the sum of delta^T p.grad, if it is known without a pass over the parameters; it is
            not finite where deltas may not be.
        failure: why deltas cannot be used; "" if they are zero as they should be.
        solution: what the solver said, if one was run.
    """

    deltas: list[Tensor]
    square: Tensor | None = None
    failure: str | None = None
    solution: Solution | None = None
