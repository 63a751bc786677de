"""Oracle of `fused_so.ops.precondition`."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_so._dtypes import accumulate


def precondition(
    grad_weight: Tensor,
    grad_bias: Tensor,
    mean: Tensor,
    input_inverse: Tensor | None,
    *,
    output_inverse: Tensor | None = None,
    alpha: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
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
