"""Oracle of `fused_so.ops.jacobian_backprop`."""

from __future__ import annotations

from torch import Tensor

from fused_so._dtypes import accumulate


def jacobian_backprop(
    jac: Tensor,
    weight: Tensor,
    *,
    dphi: Tensor | None = None,
    direction: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    j = accumulate(jac)
    if dphi is not None:
        j = j * accumulate(dphi)[:, None, :]
    # jac_in = J W;  pullback_i = jac_in_i^T (J_i direction_i)
    jac_in = j @ accumulate(weight)
    if direction is None:
        return jac_in, None
    tangent = j @ accumulate(direction)[:, :, None]
    return jac_in, (jac_in.mT @ tangent)[:, :, 0]
