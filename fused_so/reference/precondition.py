"""Oracle of `fused_so.ops.precondition`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_so._dtypes import accumulate


def precondition(
    grad_weight: Tensor | Sequence[Tensor],
    grad_bias: Tensor | Sequence[Tensor],
    mean: Tensor | Sequence[Tensor],
    input_inverse: Tensor | Sequence[Tensor] | None,
    *,
    output_inverse: Tensor | Sequence[Tensor] | None = None,
    alpha: float | Tensor | Sequence[float | Tensor] | None = None,
) -> tuple[Tensor, Tensor] | tuple[list[Tensor], list[Tensor]]:
    if isinstance(grad_weight, Sequence):
        options = (input_inverse, output_inverse, alpha)
        options = (x if isinstance(x, Sequence) else [x] * len(grad_weight) for x in options)
        layers = zip(grad_weight, grad_bias, mean, *options, strict=True)
        steps = [
            precondition(gw, gb, m, a, output_inverse=go, alpha=scale)
            for gw, gb, m, a, go, scale in layers
        ]
        return [dw for dw, _ in steps], [db for _, db in steps]

    gw, gb = accumulate(grad_weight), accumulate(grad_bias)
    # dW = 1/alpha G^-1 (gw - gb m^T) A;  db = 1/alpha G^-1 gb - dW m
    dw = gw - torch.outer(gb, mean)
    db = gb
    if input_inverse is not None:
        dw = dw @ input_inverse
    if output_inverse is not None:
        dw = output_inverse @ dw
        db = output_inverse @ db
    if alpha is not None:
        dw, db = dw / alpha, db / alpha
    return dw, db - dw @ mean


def inner_products(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    return torch.stack([(a.double() * b.double()).sum() for a, b in zip(x, y, strict=True)])
