"""The Triton precondition against float64: in the interpreter, or on a GPU if there is one."""

import pytest
import torch

from fused_so import reference
from fused_so.triton_kernels import _product
from fused_so.triton_kernels.precondition import precondition
from tests.ops import budget, checks
from tests.triton_kernels.device import DEVICE, far_apart, moved

SIDES = ["none", "input", "output", "both"]
RESULTS = (torch.float32, torch.float64)
# The products are of the type that the results have.
TILED = [(dtype, tile) for dtype in RESULTS for tile in range(len(_product.CONFIGS[dtype]))]


def run(grad_weight, grad_bias, mean, a, *, output_inverse=None, alpha=None):
    if alpha is not None:
        alpha = torch.full((), alpha, dtype=mean.dtype, device=DEVICE)
    arguments = (moved(x) for x in (grad_weight, grad_bias, mean, a))
    got = precondition(*arguments, output_inverse=moved(output_inverse), alpha=alpha)
    return [x.cpu() for x in got]


@pytest.mark.parametrize(("dtype", "tile"), TILED)
@pytest.mark.parametrize("sides", ["input", "output", "both"])
@pytest.mark.parametrize(("out", "width"), [(1, 1), (14, 32), (40, 70)])
def test_budget_of_every_tile(out, width, sides, dtype, tile, monkeypatch):
    monkeypatch.setitem(_product.CONFIGS, dtype, _product.CONFIGS[dtype][tile : tile + 1])
    checks.precondition(run, out, width, dtype, sides=sides, alpha=0.3)


@pytest.mark.parametrize("dtype", budget.DTYPES)
@pytest.mark.parametrize("layout", budget.LAYOUTS)
@pytest.mark.parametrize("sides", SIDES)
def test_any_strides_and_dtypes(sides, layout, dtype):
    checks.precondition(run, 24, 35, dtype, layout=layout, sides=sides)


@pytest.mark.parametrize(
    ("out", "width", "sides"),
    [(20, 300, "input"), (300, 10, "output"), (5, 300, "both"), (9, 600, "none")],
)
def test_long_sums_are_split(out, width, sides):
    checks.precondition(run, out, width, torch.float32, sides=sides, alpha=3.0)


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize(("out", "width"), [(0, 0), (0, 3), (3, 0)])
def test_empty(out, width, sides):
    a = torch.ones(width, width) if sides in ("input", "both") else None
    go = torch.ones(out, out) if sides in ("output", "both") else None
    arguments = torch.ones(out, width), torch.ones(out), torch.ones(width), a
    got = run(*arguments, output_inverse=go, alpha=2.0)
    expected = reference.precondition(*arguments, output_inverse=go, alpha=2.0)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("sides", SIDES)
def test_without_alpha_the_step_is_that_of_one(sides):
    x = [budget.random_matrix(20, 20, torch.float32, seed=s) for s in range(3)]
    a = x[1] if sides in ("input", "both") else None
    go = x[2] if sides in ("output", "both") else None
    arguments = x[0], x[0][:, 0], x[1][0], a
    one, none = (run(*arguments, output_inverse=go, alpha=alpha) for alpha in (1.0, None))
    assert all(torch.equal(p, q) for p, q in zip(one, none, strict=True))


@pytest.mark.parametrize("dtype", RESULTS)
@pytest.mark.parametrize("alpha", [1e-30, 1e-3, 0.5, 7.0, 1e30])
def test_alpha_of_any_size(alpha, dtype):
    grad, bias, mean = torch.ones(1, 1, dtype=dtype), torch.ones(1, dtype=dtype), torch.zeros(1)
    dw, db = run(grad, bias, mean.to(dtype), None, alpha=alpha)
    exact = 1 / torch.tensor(alpha, dtype=dtype)
    torch.testing.assert_close(dw[0, 0], exact, rtol=torch.finfo(dtype).eps, atol=0)
    assert torch.equal(db, dw[0])


def test_a_mean_that_nearly_cancels_the_gradient():
    # gw = gb m^T + a remainder 10^-4 its size: the correction is made before any product.
    mean, bias = torch.rand(40) + 1, torch.rand(30) + 1
    rest = 1e-4 * torch.randn(30, 40)
    grad = torch.outer(bias, mean) + rest
    a = budget.random_matrix(40, 40, torch.float32, seed=3)
    dw, _ = run(grad, bias, mean, a)
    exact, _ = reference.precondition(*(x.double() for x in (grad, bias, mean, a)))
    plain, _ = reference.precondition(grad, bias, mean, a)
    limit = 2 * (plain - exact).abs().max() + torch.finfo(torch.float32).eps * exact.abs().max()
    assert (dw - exact).abs().max() <= limit


@pytest.mark.parametrize("sides", SIDES)
def test_bad_entries_are_seen(sides):
    x = [budget.random_matrix(35, 35, torch.float32, seed=s) for s in range(3)]
    a = x[1] if sides in ("input", "both") else None
    go = x[2] if sides in ("output", "both") else None
    x[0][34, 3] = torch.nan
    arguments = x[0], x[1][:, 0], x[1][0], a
    got = run(*arguments, output_inverse=go)
    expected = reference.precondition(*arguments, output_inverse=go)
    for p, q in zip(got, expected, strict=True):
        assert torch.equal(p.isnan(), q.isnan())


def test_offsets_past_32_bits():
    grad, a, go = (budget.random_matrix(3, 3, torch.float32, seed=s).to(DEVICE) for s in range(3))
    bias, mean = grad[:, 0].clone(), a[0].clone()

    def step(grad, a, go):
        return precondition(grad, bias, mean, a, output_inverse=go)

    for sides in ((a, go), (a, None), (None, go), (None, None)):
        expected = step(grad, *sides)
        far = (None if x is None else far_apart(x) for x in sides)
        got = step(far_apart(grad), *far)
        assert all(torch.equal(p, q) for p, q in zip(got, expected, strict=True))
