"""jacobian_backprop: right for every layout and dtype, and what autograd finds through a layer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_so import ops
from tests.ops import budget, checks


def run(arguments):
    jac, weight, dphi, direction = arguments
    jac_in, pullback = ops.jacobian_backprop(jac, weight, dphi=dphi, direction=direction)
    assert (pullback is None) == (direction is None)
    return [jac_in] if pullback is None else [jac_in, pullback]


def check(*args, **kwargs):
    checks.jacobian_backprop(run, *args, **kwargs)


@pytest.mark.parametrize("dtype", budget.DTYPES)
@pytest.mark.parametrize("layout", checks.JACOBIAN_LAYOUTS)
@pytest.mark.parametrize("given", ["neither", "dphi", "direction", "both"])
@pytest.mark.parametrize(
    ("n", "o", "out", "width"), [(1, 1, 1, 1), (3, 2, 5, 4), (20, 3, 65, 33), (9, 30, 40, 70)]
)
def test_budget_of_dtypes_and_layouts(n, o, out, width, given, layout, dtype):
    check(n, o, out, width, dtype, layout, given)


@pytest.mark.parametrize("rows", [1, 2, 5, 6, 7, 13, 14, 15, 27, 29])
@pytest.mark.parametrize("width", [1, 7, 8, 9, 16, 17, 31, 32, 33])
def test_budget_around_the_tiles(rows, width):
    check(4, rows, 20, width, torch.float32)
    check(rows, 1, 20, width, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("out", [1, 15, 255, 256, 257, 511, 512, 513, 1025, 1300])
def test_budget_around_the_blocks_of_depth(out, dtype):
    check(7, 5, out, 40, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize(
    ("n", "o", "out", "width"),
    [
        (300, 10, 70, 50),  # many examples to a block of rows, cut by its edges
        (3, 1100, 70, 50),  # many blocks of rows to an example
        (1, 1500, 70, 50),
        (2, 3000, 30, 10),
        (1500, 1, 70, 50),
        (12, 9, 530, 2060),  # more columns than are packed at once, and two blocks of depth
        (40, 10, 30, 900),
    ],
)
def test_budget_beyond_one_block(n, o, out, width, dtype):
    check(n, o, out, width, dtype)


def test_budget_beyond_the_rows_kept_at_a_time():
    check(3000, 100, 2, 3, torch.float32)


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-12, 1e12, 1e17])
def test_huge_and_tiny_scales(scale):
    check(9, 5, 20, 30, torch.float32, scale=scale)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(
    n=st.integers(1, 60),
    o=st.integers(1, 40),
    out=st.integers(1, 120),
    width=st.integers(1, 120),
    dtype=st.sampled_from(budget.DTYPES),
    layout=st.sampled_from(checks.JACOBIAN_LAYOUTS),
    given=st.sampled_from(["neither", "dphi", "direction", "both"]),
)
def test_budget_of_random_shapes(n, o, out, width, dtype, layout, given):
    check(n, o, out, width, dtype, layout, given)


def test_what_autograd_finds_through_a_layer():
    # f(h) = top(tanh(W h + b)): its Jacobians by h, and W^T J^T J direction, without our formula.
    n, o, out, width = 6, 4, 9, 7
    torch.manual_seed(0)
    layer = torch.nn.Linear(width, out).double()
    top = torch.nn.Sequential(torch.nn.Linear(out, 5), torch.nn.Tanh(), torch.nn.Linear(5, o))
    top.double()
    h = torch.randn(n, width, dtype=torch.float64)
    direction = torch.randn(n, out, dtype=torch.float64)
    preactivation = layer(h)

    jac = torch.func.vmap(torch.func.jacrev(top))(preactivation.tanh())
    slope = torch.func.vmap(torch.func.grad(lambda a: a.tanh().sum()))(preactivation)
    jac_in, pullback = ops.jacobian_backprop(jac, layer.weight, dphi=slope, direction=direction)

    def from_preactivation(a):
        return top(a.tanh())

    expected = torch.func.vmap(torch.func.jacfwd(lambda x: from_preactivation(layer(x))))(h)
    _, tangent = torch.func.jvp(from_preactivation, (preactivation,), (direction,))
    _, to_input = torch.func.vjp(lambda x: from_preactivation(layer(x)), h)
    torch.testing.assert_close(jac_in, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(pullback, to_input(tangent)[0], rtol=1e-12, atol=1e-14)


def test_an_expanded_identity_gives_the_weight():
    # At the top of the network jac is the identity, one for all examples.
    weight = budget.random_matrix(5, 3, torch.float32, seed=0)
    jac_in, pullback = ops.jacobian_backprop(torch.eye(5).expand(40, 5, 5), weight)
    assert torch.equal(jac_in, weight.expand(40, 5, 3))
    assert pullback is None


def test_examples_do_not_mix():
    # An example that is not finite spoils its own rows only.
    arguments = checks.jacobian_arguments(50, 5, 20, 30, torch.float32)
    clean = run(arguments)
    arguments[0][17, 3, 4] = torch.nan
    spoiled = run(arguments)
    for before, after in zip(clean, spoiled, strict=True):
        assert after[17].isnan().any()
        rest = torch.arange(50) != 17
        assert torch.equal(before[rest], after[rest])


@pytest.mark.parametrize(
    ("n", "o", "out", "width"), [(0, 2, 3, 4), (5, 0, 3, 4), (5, 2, 0, 4), (5, 2, 3, 0)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_empty_sides_sum_to_zero(n, o, out, width, dtype):
    jac_in, pullback = run(checks.jacobian_arguments(n, o, out, width, dtype))
    results = budget.accumulate(dtype)
    assert torch.equal(jac_in, torch.zeros(n, o, width, dtype=results))
    assert torch.equal(pullback, torch.zeros(n, width, dtype=results))


@pytest.mark.parametrize(
    ("n", "o", "out", "width"), [(100, 7, 200, 150), (2, 900, 60, 90), (3, 4, 600, 2000)]
)
def test_threads_do_not_change_a_bit(n, o, out, width):
    arguments = checks.jacobian_arguments(n, o, out, width, torch.float32)
    budget.assert_threads_do_not_change_a_bit(lambda: run(arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    jac, weight, dphi, direction = checks.jacobian_arguments(4, 3, 6, 5, dtype)
    op = torch.ops.fused_so.jacobian_backprop.default
    torch.library.opcheck(op, (jac, weight), {"dphi": dphi, "direction": direction})
    torch.library.opcheck(op, (jac, weight))


@pytest.mark.parametrize("given", ["neither", "both"])
def test_compile_fullgraph(given):
    arguments = checks.jacobian_arguments(4, 3, 6, 5, torch.float32, given=given)
    got = torch.compile(run, fullgraph=True)(arguments)
    assert all(torch.equal(a, b) for a, b in zip(got, run(arguments), strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"jac": [1.0]}, TypeError, "jac must be a Tensor, got list"),
        ({"jac": torch.ones(6, 4)}, ValueError, r"jac .*\(n, o, out\), got \(6, 4\)"),
        ({"jac": torch.ones(6, 2, 4).int()}, TypeError, "jac must be float16.* got torch.int32"),
        ({"weight": torch.ones(3, 4)}, ValueError, r"weight .*\(4, in\), got \(3, 4\)"),
        ({"weight": torch.ones(4)}, ValueError, r"weight .*\(4, in\), got \(4,\)"),
        ({"weight": torch.ones(4, 3).half()}, TypeError, "weight must have the dtype of jac"),
        ({"dphi": torch.ones(6, 2)}, ValueError, r"dphi must have shape \(6, 4\), got \(6, 2\)"),
        ({"dphi": torch.ones(6, 4).double()}, TypeError, "dphi must have the dtype of jac"),
        ({"dphi": 1.0}, TypeError, "dphi must be a Tensor, got float"),
        ({"direction": torch.ones(4)}, ValueError, r"direction .*\(6, 4\), got \(4,\)"),
        ({"direction": torch.ones(6, 4).cfloat()}, TypeError, "direction must be float16"),
        ({"weight": torch.ones(4, 3, device="meta")}, ValueError, "weight must be on the device"),
        ({"dphi": torch.ones(6, 4, device="meta")}, ValueError, "dphi must be on the device of"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {
        "jac": torch.ones(6, 2, 4),
        "weight": torch.ones(4, 3),
        "dphi": torch.ones(6, 4),
        "direction": torch.ones(6, 4),
    } | change
    with pytest.raises(error, match=message):
        ops.jacobian_backprop(**arguments)
