"""The Triton centered_grad against float64: in the interpreter, or on a GPU if there is one."""

import pytest
import torch

from fused_so import reference
from fused_so.triton_kernels import _product
from fused_so.triton_kernels.centered_grad import centered_grad
from tests.ops import budget, checks
from tests.triton_kernels.device import DEVICE, far_apart, moved

HALF = (torch.float16, torch.bfloat16)
# One row, one column, below, at and past the tiles, two and three splits of the rows.
SHAPES = [(1, 1, 1), (3, 2, 5), (33, 17, 40), (64, 32, 64), (300, 20, 30), (130, 40, 70)]
TILED = [(dtype, tile) for dtype in budget.DTYPES for tile in range(len(_product.CONFIGS[dtype]))]


def run(g, h, **options):
    return [x.cpu() for x in centered_grad(moved(g), moved(h), **options)]


def column(values, dtype):
    return torch.tensor(values, dtype=torch.float64)[:, None].to(dtype)


@pytest.mark.parametrize(("dtype", "tile"), TILED)
@pytest.mark.parametrize(("n", "out", "width"), SHAPES)
def test_budget_of_every_tile(n, out, width, dtype, tile, monkeypatch):
    monkeypatch.setitem(_product.CONFIGS, dtype, _product.CONFIGS[dtype][tile : tile + 1])
    checks.centered_grad(run, n, out, width, dtype)


@pytest.mark.parametrize("dtype", budget.DTYPES)
@pytest.mark.parametrize(("n", "out", "width"), [(3, 2, 5), (33, 17, 40), (300, 20, 30)])
def test_budget_without_centering(n, out, width, dtype):
    checks.centered_grad(run, n, out, width, dtype, offset=2.0, centered=False)


@pytest.mark.parametrize("dtype", budget.DTYPES)
@pytest.mark.parametrize("layout", budget.LAYOUTS)
@pytest.mark.parametrize(("n", "out", "width"), [(24, 40, 16), (35, 9, 50)])
def test_any_strides(n, out, width, layout, dtype):
    checks.centered_grad(run, n, out, width, dtype, layout)


@pytest.mark.parametrize("dtype", budget.DTYPES)
def test_sides_of_unlike_strides(dtype):
    g = budget.random_matrix(40, 24, dtype, seed=1, layout="transposed")
    h = budget.random_matrix(40, 36, dtype, seed=2)
    for g, h in ((g, h), (h, g)):  # noqa: B020
        budget.assert_within_budget(run(g, h), reference.centered_grad, [g, h], budget.row_orders)


def test_many_rows():
    # More than the fixed numbers of splits take at their smallest size.
    checks.centered_grad(run, 64 * 256 + 100, 3, 2, torch.float32)


@pytest.mark.parametrize("dtype", budget.DTYPES)
@pytest.mark.parametrize("n", [50, 500])
def test_mean_far_from_zero(n, dtype):
    checks.centered_grad(run, n, 20, 30, dtype, offset=1000.0)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("exponent", [-20, -12, 10])
def test_halves_of_any_size(exponent, dtype):
    # Down to float16's subnormal numbers and close to its end.
    g = budget.random_matrix(60, 5, dtype, seed=1)
    h = (budget.random_matrix(60, 7, torch.float32, seed=2) * 2.0**exponent).to(dtype)
    budget.assert_within_budget(run(g, h), reference.centered_grad, [g, h], budget.row_orders)


def test_float16_deviation_past_its_range():
    g, h = column([1, 2, 3, 4], torch.float16), column([6e4, 6e4, 6e4, -6e4], torch.float16)
    got, _, _ = run(g, h)
    exact, _, _ = reference.centered_grad(g.double(), h.double())
    assert (got - exact).abs() <= 1e-3 * exact.abs()


@pytest.fixture
def medium():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def test_medium_rounds_deviations_to_bfloat16(medium):
    g = budget.random_matrix(50, 10, torch.bfloat16, seed=1)
    h = budget.random_matrix(50, 20, torch.bfloat16, seed=2)
    got, bias, mean = run(g, h)
    shift = mean.bfloat16()
    expected = g.double().T @ (h - shift).double() - torch.outer(bias, mean - shift.float())
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "out", "width"), [(0, 3, 2), (5, 0, 3), (5, 3, 0), (300, 0, 70)])
def test_empty(n, out, width, dtype):
    g, h = torch.ones(n, out, dtype=dtype), torch.ones(n, width, dtype=dtype)
    for got, expected in zip(run(g, h), reference.centered_grad(g, h), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", budget.DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_entries_are_seen_and_stay_in_their_column(bad, dtype):
    g = budget.random_matrix(300, 33, dtype, seed=1)
    h = budget.random_matrix(300, 35, dtype, seed=2)
    good = run(g, h)
    g[299, 3] = h[7, 34] = bad
    got = run(g, h)
    good[0][3], good[0][:, 34], good[1][3], good[2][34] = (torch.nan,) * 4
    for x, y in zip(got, good, strict=True):
        torch.testing.assert_close(torch.where(x.isfinite(), x, torch.nan), y, equal_nan=True)


def test_offsets_past_32_bits():
    g, h = (budget.random_matrix(3, 5, torch.float16, seed=s).to(DEVICE) for s in range(2))
    expected = centered_grad(g, h)
    for a, b in ((far_apart(g), h), (g, far_apart(h))):
        assert all(torch.equal(x, y) for x, y in zip(centered_grad(a, b), expected, strict=True))
    # The columns are far apart.
    expected = centered_grad(g.T.contiguous(), h.T.contiguous())
    got = centered_grad(far_apart(g).T, far_apart(h).T)
    assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))
