"""What every optimizer shares."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fused_so.optim.base import Update, squared_norm

ALPHAS = {
    "none": [1.0, 1.0, 1.0],
    "numbers": [2.0, 2, 0.5],
    "tensors": [torch.tensor(2.0), torch.tensor(3.0), torch.tensor(0.5)],
    "both": [torch.tensor(2.0), 3, torch.tensor(0.5)],
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("alphas", ALPHAS)
def test_the_squared_norm_is_a_sum_over_parameters_of_products_over_alpha(alphas, given, dtype):
    updates, truth = [], 0.0
    for size, alpha in zip([(3, 4), (3,), (2, 1)], ALPHAS[alphas], strict=True):
        param = nn.Parameter(torch.randn(size).to(dtype))
        param.grad, delta = torch.randn(size).to(dtype), torch.randn(size)
        delta = delta.to(dtype if dtype == torch.float64 else torch.float32)
        grad = torch.randn(size).to(delta) if given else None
        updates.append(Update(param, delta, alpha, grad))
        product = delta.double() * (param.grad if grad is None else grad).double()
        truth = truth + product.sum() / alpha
    square = squared_norm(updates)
    assert square.dtype == torch.float64
    torch.testing.assert_close(square, truth.double(), rtol=1e-6, atol=1e-6)
