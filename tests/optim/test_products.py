"""Products through the ops, against float64."""

from __future__ import annotations

import pytest
import torch

from fused_so.optim.products import outer_sum, product, rows_times

DOUBLE = torch.float64
SHAPES = [(0, 3, 4), (1, 1, 1), (5, 1, 7), (33, 20, 17), (300, 129, 65)]


def close(ours, plain, truth, magnitude):
    """At most twice the error of the plain product, or rounding of the largest sum of sizes."""
    assert ours.shape == truth.shape
    if truth.numel():
        budget = 2 * (plain - truth).abs().max() + torch.finfo(ours.dtype).eps * magnitude.max()
        assert (ours - truth).abs().max() <= budget


@pytest.mark.parametrize("offset", [0.0, 100.0])
@pytest.mark.parametrize(("n", "out", "width"), SHAPES)
def test_products_are_those_of_float64(n, out, width, offset):
    g, h = torch.randn(n, out), torch.randn(n, width) + offset
    truth, sizes = g.double().T @ h.double(), g.abs().double().T @ h.abs().double()
    ours, total = outer_sum(g, h)
    close(ours, g.T @ h, truth, sizes)
    torch.testing.assert_close(total, g.sum(0))
    close(product(g.T, h), g.T @ h, truth, sizes)
    matrix = torch.randn(width, width)
    matrix = matrix + matrix.T
    truth = h.double() @ matrix.double()
    close(rows_times(h, matrix), h @ matrix, truth, h.abs().double() @ matrix.abs().double())


def test_operands_are_not_changed():
    a, b = torch.randn(6, 5, dtype=DOUBLE), torch.randn(5, 4, dtype=DOUBLE)
    before = a.clone(), b.clone()
    torch.testing.assert_close(product(a, b), a @ b)
    assert torch.equal(a, before[0])
    assert torch.equal(b, before[1])
