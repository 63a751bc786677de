"""Oracle of `fused_so.ops.apply_update`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_so._dtypes import accumulate


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
            v = momentum * momentum_buffers[i] + u
            u = u + momentum * v if nesterov else v
            momentum_buffers[i].copy_(_unless_skipped(scale, v, momentum_buffers[i]))
        param.copy_(_unless_skipped(scale, p - lr * u, p))


def _unless_skipped(scale: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    return new if scale is None else torch.where(scale == 0, old, new)
