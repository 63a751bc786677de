"""Oracle of `fused_so.ops.damped_inverse`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_so._dtypes import accumulate


def damped_inverse(
    a: Tensor | Sequence[Tensor], damping: float | Tensor
) -> tuple[Tensor | list[Tensor], Tensor]:
    if isinstance(a, Sequence):
        dampings = damping if isinstance(damping, Tensor) else [damping] * len(a)
        pairs = [damped_inverse(m, d) for m, d in zip(a, dampings, strict=True)]
        return [inverse for inverse, _ in pairs], torch.stack([info for _, info in pairs])

    a = accumulate(a)
    identity = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    damping = torch.as_tensor(damping, dtype=a.dtype, device=a.device)
    factor, info = torch.linalg.cholesky_ex(a + damping[..., None, None] * identity)
    inverse = torch.cholesky_inverse(factor)
    # LAPACK's potri fills each triangle on its own; mirror the lower one.
    inverse = inverse.tril() + inverse.tril(-1).mT
    return torch.where((info != 0)[..., None, None], torch.nan, inverse), info
