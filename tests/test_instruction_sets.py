"""The CPU kernels of every instruction set that runs here, held to the same budgets."""

import os

import pytest

from tests.ops import budget

OPS = (
    "apply_update",
    "centered_grad",
    "covariance",
    "damped_inverse",
    "grad_gram",
    "jacobian_backprop",
    "precondition",
)


@budget.needs_kernel
@pytest.mark.skipif("FUSED_SO_CPU" in os.environ, reason="an instruction set is already chosen")
@pytest.mark.parametrize("variant", budget.variants())
@pytest.mark.parametrize("op", OPS)
def test_every_instruction_set(op, variant):
    budget.run_file_with(variant, f"tests/ops/test_{op}.py")
