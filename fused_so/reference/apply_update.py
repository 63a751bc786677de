"""Oracle of `fused_so.ops.apply_update`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_so.reference._dtype import accumulate


@torch.no_grad()
def apply_update_(
    params: Sequence[Tensor],
    updates: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    *,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    scale: Tensor | None = None,
) -> None:
    for i, (param, update) in enumerate(zip(params, updates, strict=True)):
        p, u = accumulate(param), accumulate(update)
        # u = s Delta + lambda p;  v <- mu v + u;  p <- p - eta (u + mu v if nesterov, else v)
        if scale is not None:
            u = scale * u
        u = u + weight_decay * p
        if momentum:
            v = momentum_buffers[i].mul_(momentum).add_(u)
            u = u + momentum * v if nesterov else v
        param.copy_(p - lr * u)
