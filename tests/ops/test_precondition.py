"""precondition: right for every layout and dtype, and the inverse of the homogeneous factor."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_so import ops, reference
from tests.ops import budget, checks


def check(*sizes, **options):
    checks.precondition(ops.precondition, *sizes, **options)


@pytest.mark.parametrize("dtype", budget.DTYPES)
@pytest.mark.parametrize("layout", budget.LAYOUTS)
@pytest.mark.parametrize("sides", ["none", "input", "output", "both"])
@pytest.mark.parametrize(("out", "width"), [(1, 1), (14, 32), (65, 33), (40, 400)])
def test_budget_of_dtypes_and_layouts(out, width, sides, layout, dtype):
    check(out, width, dtype, layout=layout, sides=sides, alpha=0.3)


@pytest.mark.parametrize("out", [1, 2, 13, 14, 15, 29])
@pytest.mark.parametrize("width", [1, 7, 16, 17, 31, 32, 33])
def test_budget_around_the_tiles(out, width):
    check(out, width, torch.float32)


@pytest.mark.parametrize("width", [255, 257, 511, 513, 700])
def test_budget_around_the_blocks_of_depth(width):
    check(20, width, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("sides", ["input", "output", "both"])
def test_budget_beyond_one_block_of_rows_and_columns(sides, dtype):
    check(1500, 617, dtype, sides=sides, alpha=0.3)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    out=st.integers(1, 120),
    width=st.integers(1, 120),
    dtype=st.sampled_from(budget.DTYPES),
    layout=st.sampled_from(budget.LAYOUTS),
    sides=st.sampled_from(["none", "input", "output", "both"]),
    alpha=st.sampled_from([1.0, 1e-3, 7.0]),
)
def test_budget_of_random_shapes(out, width, dtype, layout, sides, alpha):
    check(out, width, dtype, layout=layout, sides=sides, alpha=alpha)


def test_alpha_as_a_tensor_equals_the_number_to_the_bit():
    x = [budget.random_matrix(5, 5, torch.float32, seed=s) for s in range(2)]
    arguments = (x[0], x[0][0], x[0][1], x[1])
    number = ops.precondition(*arguments, alpha=0.5)
    tensor = ops.precondition(*arguments, alpha=torch.tensor(0.5))
    assert all(torch.equal(a, b) for a, b in zip(number, tensor, strict=True))


def test_the_inverse_of_the_homogeneous_factor():
    # The block inverse of [[C + m m^T, m], [m^T, 1]] (x) G on [grad_weight grad_bias].
    width, out, alpha = 7, 5, 0.3
    h = budget.random_matrix(50, width, torch.float64, seed=0)
    g = budget.random_matrix(50, out, torch.float64, seed=1)
    cov, mean = reference.covariance(h)
    output_factor = reference.covariance(g)[0]
    factor = torch.zeros(width + 1, width + 1, dtype=torch.float64)
    factor[:width, :width] = cov + torch.outer(mean, mean)
    factor[width, :width] = factor[:width, width] = mean
    factor[width, width] = 1
    grad = torch.cat([g.T @ h, g.sum(0)[:, None]], 1)
    # Row-major: vec of a matrix X under F (x) G is G X F.
    dense = alpha * torch.kron(output_factor, factor)
    expected = torch.linalg.solve(dense, grad.reshape(-1)).reshape(out, width + 1)

    dw, db = ops.precondition(
        grad[:, :width],
        grad[:, width],
        mean,
        torch.linalg.inv(cov),
        output_inverse=torch.linalg.inv(output_factor),
        alpha=alpha,
    )
    torch.testing.assert_close(torch.cat([dw, db[:, None]], 1), expected, rtol=1e-10, atol=1e-10)


def test_empty_sides():
    dw, db = ops.precondition(torch.ones(3, 0), torch.ones(3), torch.ones(0), torch.ones(0, 0))
    assert dw.shape == (3, 0)
    assert torch.equal(db, torch.ones(3))


@pytest.mark.parametrize(("out", "width"), [(200, 200), (700, 1100), (2100, 30)])
def test_threads_do_not_change_a_bit(out, width):
    grad, a, go = (
        budget.random_matrix(rows, cols, torch.float32, seed=1)
        for rows, cols in ((out, width), (width, width), (out, out))
    )
    budget.assert_threads_do_not_change_a_bit(
        lambda: ops.precondition(grad, grad[:, 0], a[0], a, output_inverse=go)
    )


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-12, 1e12, 1e30])
def test_huge_and_tiny_scales(scale):
    check(40, 30, torch.float32, scale=scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck(dtype):
    grad = budget.random_matrix(4, 3, dtype, seed=0)
    mean, a, go, alpha = torch.ones(3), torch.eye(3), torch.eye(4), torch.tensor(2.0)
    op = torch.ops.fused_so.precondition.default
    torch.library.opcheck(op, (grad, grad[:, 0], mean, a), {"output_inverse": go, "alpha": alpha})
    torch.library.opcheck(op, (grad, grad[:, 0], mean, None))


def test_compile_fullgraph():
    x = budget.random_matrix(5, 5, torch.float32, seed=0)

    def step(x):
        return ops.precondition(x, x[0], x[1], x, output_inverse=x, alpha=2.0)

    got = torch.compile(step, fullgraph=True)(x)
    assert all(torch.equal(a, b) for a, b in zip(got, step(x), strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grad_weight": torch.ones(4)}, ValueError, r"grad_weight .*\(out, in\), got \(4,\)"),
        ({"grad_weight": torch.ones(4, 3).int()}, TypeError, "grad_weight .* got torch.int32"),
        ({"grad_bias": torch.ones(3)}, ValueError, r"grad_bias .*\(4,?\), got \(3,\)"),
        ({"grad_bias": torch.ones(4).half()}, TypeError, "grad_bias must have the dtype of"),
        ({"mean": torch.ones(4)}, ValueError, r"mean must have shape \(3,?\), got \(4,\)"),
        ({"mean": torch.ones(3).double()}, TypeError, "mean must be torch.float32 .*float64"),
        ({"mean": torch.ones(3).cfloat()}, TypeError, "mean must be float16.*got torch.complex64"),
        ({"input_inverse": torch.ones(3, 2)}, ValueError, r"input_inverse .* got \(3, 2\)"),
        ({"output_inverse": torch.ones(3, 3)}, ValueError, r"output_inverse .* got \(3, 3\)"),
        ({"mean": torch.ones(3, device="meta")}, ValueError, "mean must be on the device of"),
        ({"alpha": 0}, ValueError, "alpha must be positive, got 0"),
        ({"alpha": -1.0}, ValueError, "alpha must be at least 0 and finite, got -1.0"),
        ({"alpha": float("inf")}, ValueError, "alpha must be at least 0 and finite, got inf"),
        ({"alpha": float("nan")}, ValueError, "alpha must be at least 0 and finite, got nan"),
        ({"alpha": torch.ones(1)}, ValueError, r"alpha must have shape \(\), got \(1,\)"),
        ({"alpha": "1"}, TypeError, "alpha must be a number, got str"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {
        "grad_weight": torch.ones(4, 3),
        "grad_bias": torch.ones(4),
        "mean": torch.ones(3),
        "input_inverse": torch.eye(3),
        "output_inverse": torch.eye(4),
        "alpha": 1.0,
    } | change
    with pytest.raises(error, match=message):
        ops.precondition(**arguments)
