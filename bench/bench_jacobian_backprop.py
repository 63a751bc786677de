"""jacobian_backprop against the same products in plain PyTorch."""

import pytest
import torch

from bench.measure import compare
from fused_so import ops

# n, o, out, in
SIZES = [(256, 10, 1000, 500), (64, 30, 500, 1000), (128, 1, 250, 500), (32, 4, 64, 64)]


@pytest.mark.parametrize("pull", [True, False], ids=["pullback", "alone"])
def test_jacobian_backprop(benchmark, size, pull):
    n, o, out, width = size
    jac, weight = torch.randn(n, o, out), torch.randn(out, width)
    dphi, direction = torch.rand(n, out), torch.randn(n, out)

    def product():
        j = jac * dphi[:, None]
        return j, (j.view(n * o, out) @ weight).view(n, o, width)

    def batched():
        j, jac_in = product()
        tangent = torch.bmm(j, direction[:, :, None])
        return jac_in, torch.bmm(tangent.mT, jac_in)[:, 0]

    def einsum():
        j, jac_in = product()
        tangent = torch.einsum("noi,ni->no", j, direction)
        return jac_in, torch.einsum("noj,no->nj", jac_in, tangent)

    def transposed():
        # W^T (J^T (J direction)): the pull-back in one more product of n rows.
        j, jac_in = product()
        tangent = torch.bmm(j, direction[:, :, None])
        return jac_in, torch.bmm(tangent.mT, j)[:, 0] @ weight

    compare(
        benchmark,
        f"jacobian_backprop n {n}, o {o}, {out} -> {width}{', pullback' if pull else ''}",
        lambda: ops.jacobian_backprop(
            jac, weight, dphi=dphi, direction=direction if pull else None
        ),
        {"mm, bmm": batched, "mm, einsum": einsum, "mm, bmm, mm": transposed}
        if pull
        else {"mm": product},
        flops=2 * n * o * (out * width + (out + width) * pull),
        bytes=4 * (n * o * (out + width) + out * width + n * out),
    )
