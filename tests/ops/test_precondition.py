"""precondition: right for every layout and dtype, and the inverse of the homogeneous factor."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_so import ops, reference
from tests.ops import budget, checks

# The function of that name hides the module.
module = importlib.import_module("fused_so.ops.precondition")


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


MIXED = [
    (14, 32, torch.float32, "contiguous"),
    (1, 1, torch.float32, "contiguous"),
    (14, 32, torch.float32, "transposed"),
    (40, 70, torch.float64, "strided"),
    (14, 32, torch.bfloat16, "expanded"),
    (70, 40, torch.float16, "contiguous"),
    (14, 32, torch.float32, "contiguous"),
]


@pytest.mark.parametrize("sides", ["none", "input", "output", "both"])
@pytest.mark.parametrize("run", [ops.precondition, reference.precondition])
def test_budget_of_layers_of_mixed_shapes_strides_and_dtypes(run, sides):
    alphas = [1.0, 2.0, 0.1, 1.0, 3.0, 0.7, 5.0]
    checks.precondition_lists(run, MIXED, alphas, sides=sides)


def layers(sides="both"):
    """The lists of arguments, and what gives one layer's."""
    made = [
        checks.kronecker_layer(*size, dtype, layout=layout, sides=sides, seed=10 * i)
        for i, (*size, dtype, layout) in enumerate(MIXED)
    ]
    return [None if side[0] is None else list(side) for side in zip(*made, strict=True)]


@pytest.mark.parametrize("sides", ["none", "input", "both"])
@pytest.mark.parametrize("numbers", [[1.0] * 7, [1.0, 2.0, 2.0, 0.5, 2.0, 1.0, 3.0]])
@pytest.mark.parametrize("tensors", [(), range(7), (1, 5)])
def test_layers_equal_calls_one_by_one_to_the_bit(sides, numbers, tensors):
    gw, gb, mean, a, go = layers(sides)
    alphas = [mean[i].new_tensor(n) if i in tensors else n for i, n in enumerate(numbers)]
    dws, dbs = ops.precondition(gw, tuple(gb), mean, a, output_inverse=go, alpha=alphas)
    assert len(dws) == len(dbs) == 7
    for i, (dw, db) in enumerate(zip(dws, dbs, strict=True)):
        expected = ops.precondition(
            gw[i], gb[i], mean[i], a and a[i], output_inverse=go and go[i], alpha=alphas[i]
        )
        assert torch.equal(dw, expected[0])
        assert torch.equal(db, expected[1])


LISTS = ("grad_weight", "grad_bias", "mean", "input_inverse", "output_inverse", "alpha")


@budget.needs_kernel
@pytest.mark.parametrize("short", LISTS)
@pytest.mark.parametrize("entries", [0, 1])
def test_lists_of_unequal_length_raise_without_the_public_checks(short, entries):
    shapes = (3, 4), (3,), (4,), (4, 4), (3, 3), ()
    lists = {
        name: [torch.ones(shape), torch.ones(shape)]
        for name, shape in zip(LISTS, shapes, strict=True)
    }
    lists[short] = lists[short][:entries]
    *positional, output_inverse, alpha = lists.values()
    with pytest.raises(RuntimeError, match=r"precondition_list: .* must hold \d entries, got \d"):
        torch.ops.fused_so.precondition_list(
            *positional, output_inverse=output_inverse, alpha=alpha
        )


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_one_alpha_is_that_of_all_layers(alpha):
    gw, gb, mean, a, _ = layers()
    got = ops.precondition(gw, gb, mean, a, alpha=alpha)
    expected = ops.precondition(gw, gb, mean, a, alpha=[alpha] * 7)
    for x, y in zip(got, expected, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(x, y, strict=True))


def test_no_layers():
    assert ops.precondition([], [], [], []) == ([], [])
    assert ops.precondition([], [], [], None, output_inverse=[], alpha=2.0) == ([], [])


def test_layers_may_be_on_several_devices(monkeypatch):
    # One call of a kernel for each, and every result in its place.
    seen = []
    kernel = module._precondition_list

    def run(weights, *arguments, **options):
        seen.append([w.device.type for w in weights])
        return kernel(weights, *arguments, **options)

    monkeypatch.setattr(module, "_precondition_list", run)
    devices = ["cpu", "meta", "cpu", "meta", "meta"]
    lists = [
        [torch.full(size, 1.0 + i, device=device) for i, device in enumerate(devices)]
        for size in ((3, 2), (3,), (2,), (2, 2))
    ]
    dws, dbs = ops.precondition(*lists, alpha=[2.0] * 5)
    assert seen == [["cpu"] * 2, ["meta"] * 3]
    assert [dw.device.type for dw in dws] == [db.device.type for db in dbs] == devices
    for i in (0, 2):
        expected = ops.precondition(*(x[i] for x in lists), alpha=2.0)
        assert torch.equal(dws[i], expected[0])
        assert torch.equal(dbs[i], expected[1])


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


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_opcheck_of_layers(alpha):
    gw, gb, mean, a, go = (None if x is None else x[:3] for x in layers())
    op = torch.ops.fused_so.precondition_list.default
    alpha = None if alpha is None else [torch.tensor(alpha)] * 3
    torch.library.opcheck(op, (gw, gb, mean, a), {"output_inverse": go, "alpha": alpha})
    torch.library.opcheck(op, (gw, gb, mean, None), {"alpha": alpha})


def test_compile_fullgraph_of_layers():
    *arguments, go = layers()
    alphas = [1.0, 2.0, 2.0, 0.5, 2.0, 1.0, 3.0]

    def step(*arguments):
        return ops.precondition(*arguments, output_inverse=go, alpha=alphas)

    got = torch.compile(step, fullgraph=True)(*arguments)
    for x, y in zip(got, step(*arguments), strict=True):
        assert all(torch.equal(p, q) for p, q in zip(x, y, strict=True))


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


def one_wrong(name, entry, count=3):
    """The list of that argument with another last entry."""
    good = {
        "grad_weight": torch.ones(4, 3),
        "grad_bias": torch.ones(4),
        "mean": torch.ones(3),
        "input_inverse": torch.eye(3),
        "output_inverse": torch.eye(4),
        "alpha": 1.0,
    }
    return {name: [good[name]] * (count - 1) + [entry]}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            one_wrong("grad_weight", torch.ones(4)),
            *(ValueError, r"grad_weight\[2\] must have shape \(out, in\), got \(4,\)"),
        ),
        (one_wrong("grad_weight", 1.0), TypeError, r"grad_weight\[2\] must be a Tensor, got float"),
        (
            one_wrong("grad_bias", torch.ones(4).half()),
            *(
                TypeError,
                r"grad_bias\[2\] must have the dtype of grad_weight\[2\], torch.float32, ",
            ),
        ),
        (
            one_wrong("mean", torch.ones(3).double()),
            *(TypeError, r"mean\[2\] must be torch.float32 for grad_weight\[2\] in torch.float32"),
        ),
        (
            one_wrong("mean", torch.ones(4)),
            ValueError,
            r"mean\[2\] must have shape \(3\), got \(4,",
        ),
        (
            one_wrong("input_inverse", None),
            TypeError,
            r"input_inverse\[2\] must be a Tensor, got N",
        ),
        (
            one_wrong("input_inverse", torch.ones(3, 2)),
            ValueError,
            r"input_inverse\[2\] .*\(3, 2\)",
        ),
        (one_wrong("output_inverse", torch.eye(3)), ValueError, r"output_inverse\[2\] .*\(3, 3\)"),
        (
            one_wrong("mean", torch.ones(3, device="meta")),
            *(ValueError, r"mean\[2\] must be on the device of grad_weight\[2\], cpu, got meta"),
        ),
        (one_wrong("alpha", 0), ValueError, r"alpha\[2\] must be positive, got 0"),
        (one_wrong("alpha", True), TypeError, r"alpha\[2\] must be a number, got bool"),
        (
            one_wrong("alpha", torch.ones(1)),
            ValueError,
            r"alpha\[2\] must have shape \(\), got \(1,",
        ),
        ({"alpha": 0}, ValueError, "alpha must be positive, got 0"),
        ({"alpha": "111"}, TypeError, "alpha must be a number, got str"),
        (
            {"alpha": [1.0]},
            ValueError,
            "alpha must hold 3 entries, one for each of grad_weight, got",
        ),
        ({"mean": torch.ones(3)}, TypeError, "mean must be a list of tensors, got Tensor"),
        ({"input_inverse": []}, ValueError, "input_inverse must hold 3 entries, one for each .* 0"),
        ({"grad_bias": None}, TypeError, "grad_bias must be a list of tensors, got NoneType"),
        ({"grad_weight": "abc"}, TypeError, "grad_weight must be a list of tensors, got str"),
    ],
)
def test_bad_lists(change, error, message):
    arguments = {
        "grad_weight": [torch.ones(4, 3)] * 3,
        "grad_bias": [torch.ones(4)] * 3,
        "mean": [torch.ones(3)] * 3,
        "input_inverse": [torch.eye(3)] * 3,
        "output_inverse": [torch.eye(4)] * 3,
    } | change
    with pytest.raises(error, match=message):
        ops.precondition(**arguments)


# inner_products: of steps and gradients, the squared lengths of the steps.

# Around the entries that one task takes, and none.
PAIRS = [(), (0,), (1,), (3, 5), (65535,), (65536,), (65537,), (300, 700), (2, 3, 4)]


def pairs(dtype, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    made = ([torch.randn(s, generator=generator).to(dtype) for s in PAIRS] for _ in range(2))
    x, y = made
    return [scale * a for a in x], y


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_inner_products_of_random_tensors(dtype, scale):
    x, y = pairs(dtype, scale)
    got = ops.inner_products(x, y)
    assert got.dtype == torch.float64
    for a, b, product in zip(x, y, got, strict=True):
        terms = a.double() * b.double()
        # The sum of float64 products, in which only rounding of float64 is left.
        assert (product - terms.sum()).abs() <= 1e-14 * terms.abs().sum()


def test_inner_products_of_random_tensors_in_any_layout():
    x = torch.randn(40, 30)
    y = torch.randn(30, 40).T
    poisoned = torch.full((80, 90), torch.nan)
    poisoned[::2, ::3] = x
    got = ops.inner_products([x, poisoned[::2, ::3], x[:1].expand(40, 30)], [y, y, y])
    truth = torch.stack([(x.double() * y).sum()] * 2 + [(x[0].double() * y).sum()])
    torch.testing.assert_close(got, truth, rtol=1e-12, atol=1e-10)


def test_inner_products_of_random_tensors_of_mixed_dtypes():
    single, double = (pairs(dtype) for dtype in (torch.float32, torch.float64))
    mixed = ops.inner_products(single[0] + double[0], single[1] + double[1])
    assert torch.equal(mixed, torch.cat([ops.inner_products(*single), ops.inner_products(*double)]))


def test_inner_products_hold_what_is_not_finite():
    x = [torch.ones(70000), torch.ones(3), torch.ones(3)]
    x[0][-1], x[1][0] = torch.nan, torch.inf
    assert ops.inner_products(x, [torch.ones_like(t) for t in x]).isfinite().tolist() == [
        False,
        False,
        True,
    ]


def test_inner_products_of_no_tensors_are_empty():
    got = ops.inner_products([], [])
    assert got.shape == (0,)
    assert got.dtype == torch.float64


@budget.needs_kernel
def test_threads_do_not_change_a_bit_of_inner_products():
    x, y = pairs(torch.float32)
    budget.assert_threads_do_not_change_a_bit(lambda: [ops.inner_products(x, y)])


def test_opcheck_of_inner_products():
    x, y = pairs(torch.float32)
    torch.library.opcheck(torch.ops.fused_so.inner_products.default, (x, y))


@budget.needs_kernel
def test_inner_products_without_the_public_checks():
    with pytest.raises(RuntimeError, match="inner_products: y must hold 1 entries, got 0"):
        torch.ops.fused_so.inner_products([torch.ones(2)], [])
    half = [torch.ones(2, dtype=torch.float16)]
    with pytest.raises(RuntimeError, match="inner_products: x must be float32 or float64"):
        torch.ops.fused_so.inner_products(half, half)
    for other in (torch.ones(3), torch.ones(2).double()):
        with pytest.raises(RuntimeError, match="inner_products: the tensors of pair 0 do not fit"):
            torch.ops.fused_so.inner_products([torch.ones(2)], [other])


def test_compile_fullgraph_of_inner_products():
    x, y = pairs(torch.float32)
    compiled = torch.compile(ops.inner_products, fullgraph=True)
    assert torch.equal(compiled(x, y), ops.inner_products(x, y))


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (torch.ones(2), [torch.ones(2)], TypeError, "x must be a list of tensors, got Tensor"),
        ([torch.ones(2)], [], ValueError, "y must hold 1 entries, one for each of x, got 0"),
        ([1.0], [1.0], TypeError, r"x\[0\] must be a Tensor, got float"),
        (
            [torch.ones(2)],
            [torch.ones(3)],
            ValueError,
            r"y\[0\] must have shape \(2\), got \(3,\)",
        ),
        (
            [torch.ones(2).half()],
            [torch.ones(2).half()],
            TypeError,
            r"x\[0\] must be float32 or float64, got torch.float16",
        ),
        (
            [torch.ones(2).long()],
            [torch.ones(2).long()],
            TypeError,
            r"x\[0\] must be float32 or float64, got torch.int64",
        ),
        (
            [torch.ones(2)],
            [torch.ones(2).double()],
            TypeError,
            r"y\[0\] must have the dtype of x\[0\], torch.float32, got torch.float64",
        ),
        (
            [torch.ones(2), torch.ones(2, device="meta")],
            [torch.ones(2), torch.ones(2)],
            ValueError,
            r"x\[1\] must be on the device of x\[0\], cpu, got meta",
        ),
        (
            [torch.ones(2)],
            [torch.ones(2, device="meta")],
            ValueError,
            r"y\[0\] must be on the device of x\[0\], cpu, got meta",
        ),
    ],
)
def test_bad_input_of_inner_products(x, y, error, message):
    with pytest.raises(error, match=message):
        ops.inner_products(x, y)
