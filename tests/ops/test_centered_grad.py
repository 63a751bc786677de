"""centered_grad: right for every layout and dtype, and a rank-1 correction of the gradient."""

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_so import ops, reference
from tests.ops import budget, checks


def check(*sizes, **options):
    checks.centered_grad(ops.centered_grad, *sizes, **options)


@pytest.mark.parametrize("dtype", budget.DTYPES)
@pytest.mark.parametrize("layout", budget.LAYOUTS)
@pytest.mark.parametrize(
    ("n", "out", "width"),
    [(1, 1, 1), (3, 2, 5), (33, 14, 32), (300, 65, 130), (4096, 64, 64), (20, 300, 300)],
)
def test_budget_of_dtypes_and_layouts(n, out, width, layout, dtype):
    check(n, out, width, dtype, layout)


@pytest.mark.parametrize("out", [1, 2, 5, 6, 7, 13, 14, 15, 27, 28, 29])
@pytest.mark.parametrize("width", [1, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33])
def test_budget_around_the_tiles(out, width):
    check(50, out, width, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [0, 1, 255, 256, 257, 383, 384, 385, 511, 512, 513, 769, 1500])
@pytest.mark.parametrize("out", [10, 300])
def test_budget_around_the_blocks_of_depth(n, out, dtype):
    check(n, out, 300, dtype)


@pytest.mark.parametrize(("out", "width"), [(2060, 40), (40, 2060)])
def test_budget_beyond_one_block(out, width):
    check(30, out, width, torch.float32)


def test_budget_where_many_threads_share_panels():
    budget.with_threads(8, lambda: check(600, 2060, 2060, torch.float32))


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-12, 1e12, 1e18])
def test_huge_and_tiny_scales(scale):
    check(50, 20, 30, torch.float32, scale=scale)


@pytest.mark.parametrize(("n", "out", "width"), [(500, 20, 30), (9000, 20, 30), (4096, 64, 64)])
def test_budget_with_a_mean_far_from_zero(n, out, width):
    check(n, out, width, torch.float32, offset=1000.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("drift", ["steady", "first rows", "last rows"])
def test_budget_where_the_mean_of_random_rows_is_not_that_of_all(drift, centered, dtype):
    n = 9000
    g = budget.random_matrix(n, 20, dtype, seed=1)
    h = budget.random_matrix(n, 30, dtype, seed=2)
    row = torch.arange(n, dtype=dtype)[:, None]
    h += {"steady": row / 90, "first rows": 100 * (row < 300), "last rows": 100 * (row > 8700)}[
        drift
    ]
    got = ops.centered_grad(g, h, centered=centered)
    oracle = functools.partial(reference.centered_grad, centered=centered)
    budget.assert_within_budget(got, oracle, [g, h], budget.row_orders)


@pytest.mark.parametrize("out", [1, 13, 63, 64])
@pytest.mark.parametrize("width", [64, 127, 240])
def test_budget_of_many_random_rows(out, width):
    # An even number of neighbours is multiplied where it lies, between others' columns.
    room = budget.random_matrix(4500, out + 3, torch.float32, seed=1)
    h = budget.random_matrix(4500, width, torch.float32, seed=2)
    for g in (room[:, :out], room[:, 3:]):
        got = ops.centered_grad(g, h)
        budget.assert_within_budget(got, reference.centered_grad, [g, h], budget.row_orders)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    n=st.integers(0, 900),
    out=st.integers(1, 90),
    width=st.integers(1, 90),
    dtype=st.sampled_from(budget.DTYPES),
    layout=st.sampled_from(budget.LAYOUTS),
)
def test_budget_of_random_shapes(n, out, width, dtype, layout):
    check(n, out, width, dtype, layout if n else "contiguous")


@pytest.mark.parametrize("dtype", budget.DTYPES)
@pytest.mark.parametrize("layout", budget.LAYOUTS)
@pytest.mark.parametrize(("n", "out", "width"), [(3, 2, 5), (300, 65, 130), (20, 300, 300)])
def test_budget_without_centering(n, out, width, layout, dtype):
    check(n, out, width, dtype, layout, offset=2.0, centered=False)


@pytest.mark.parametrize("centered", [True, False])
def test_no_rows_give_zeros(centered):
    g, h = torch.empty(0, 3), torch.empty(0, 2)
    weight, bias, mean = ops.centered_grad(g, h, centered=centered)
    assert torch.equal(weight, torch.zeros(3, 2))
    assert torch.equal(bias, torch.zeros(3))
    assert torch.equal(mean, torch.zeros(2))


def test_centering_is_a_rank_one_correction_of_autograd():
    # Centering is a rank-1 correction: sum_i g_i (h_i - m)^T = grad_weight - grad_bias m^T.
    h = budget.random_matrix(40, 7, torch.float64, seed=0)
    layer = torch.nn.Linear(7, 5, dtype=torch.float64)
    output = layer(h)
    loss = output.tanh().square().sum()
    (g,) = torch.autograd.grad(loss, output, retain_graph=True)
    loss.backward()
    weight, bias, mean = ops.centered_grad(g, h)
    expected = layer.weight.grad - torch.outer(layer.bias.grad, mean)
    torch.testing.assert_close(weight, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(bias, layer.bias.grad, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("n", "out", "width"),
    [
        (4096, 64, 64),
        (9000, 20, 30),
        (300, 300, 400),
        (700, 3, 900),
        (600, 1000, 2100),
        (600, 2100, 100),
    ],
)
def test_threads_do_not_change_a_bit(n, out, width):
    g = budget.random_matrix(n, out, torch.float32, seed=0)
    h = budget.random_matrix(n, width, torch.float32, seed=1)
    budget.assert_threads_do_not_change_a_bit(lambda: ops.centered_grad(g, h))


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, centered):
    g = budget.random_matrix(7, 5, dtype, seed=0)
    h = budget.random_matrix(7, 3, dtype, seed=0)
    op = torch.ops.fused_so.centered_grad.default
    torch.library.opcheck(op, (g, h), {"centered": centered})


def test_compile_fullgraph():
    g = budget.random_matrix(7, 5, torch.float32, seed=0)
    h = budget.random_matrix(7, 3, torch.float32, seed=1)
    got = torch.compile(lambda g, h: ops.centered_grad(g, h), fullgraph=True)(g, h)
    assert all(torch.equal(a, b) for a, b in zip(got, ops.centered_grad(g, h), strict=True))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"g": None}, TypeError, "g must be a Tensor, got NoneType"),
        ({"g": torch.ones(6)}, ValueError, r"g must have shape \(n, out\), got \(6,\)"),
        ({"h": torch.ones(6)}, ValueError, r"h must have shape \(6, in\), got \(6,\)"),
        ({"h": torch.ones(5, 3)}, ValueError, r"h must have shape \(6, in\), got \(5, 3\)"),
        ({"h": torch.ones(6, 3).int()}, TypeError, "h must be float16.*got torch.int32"),
        ({"g": torch.ones(6, 2).cfloat()}, TypeError, "g must be float16.*got torch.complex64"),
        ({"h": torch.ones(6, 3).double()}, TypeError, "h must have the dtype of g, torch.float32"),
        ({"h": torch.ones(6, 3, device="meta")}, ValueError, "h must be on the device of g, cpu"),
        ({"centered": 1}, TypeError, "centered must be True or False, got 1"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        ops.centered_grad(**{"g": torch.ones(6, 2), "h": torch.ones(6, 3)} | change)


# row_scales: whether gradients are multiples of the sums of their rows.

C = -0.25


def rows_and_gradients(n, out, width, *, dtype=torch.float32, bias=True, seed=0, scale=1.0):
    """g, h, c g^T h, c times the sum of g's rows, and a probe."""
    generator = torch.Generator().manual_seed(seed)
    g, h, u = (torch.randn(*s, generator=generator) for s in ((n, out), (n, width), (out,)))
    g, h, u = (scale * g).to(dtype), h.to(dtype), u.to(dtype)
    weight = (C * (g.double().T @ h.double())).to(dtype)
    return g, h, weight, (C * g.double().sum(0)).to(dtype) if bias else None, u


def lists_of(*layers):
    return [list(side) for side in zip(*layers, strict=True)]


# Around the rows that one task takes, those added up in one go, and the width of vectors.
ROWS = [
    (1, 1, 2),
    (5, 16, 17),
    (64, 65, 33),
    (129, 63, 31),
    (130, 15, 1),
    (70, 1100, 300),
    (1500, 20, 40),
]


@pytest.mark.parametrize("common", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_scales_of_random_rows_of_any_size(dtype, common, scale):
    layers = [
        rows_and_gradients(*size, dtype=dtype, bias=i % 2 == 0, seed=i, scale=scale)
        for i, size in enumerate(ROWS)
    ]
    scales = ops.row_scales(*lists_of(*layers), common=common)
    assert scales.dtype == torch.float64
    expected = torch.full((len(ROWS),), C, dtype=torch.float64)
    torch.testing.assert_close(scales, expected, rtol=100 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("common", [True, False])
@pytest.mark.parametrize("changed", range(len(ROWS)))
@pytest.mark.parametrize("of", ["weight", "bias"])
def test_one_changed_entry_of_random_gradients_beyond_any_tile_is_seen(of, changed, common):
    layers = [rows_and_gradients(*size, seed=i) for i, size in enumerate(ROWS)]
    gradient = layers[changed][2 if of == "weight" else 3]
    gradient.view(-1)[-1] += 0.01 * gradient.abs().max()
    known = ops.row_scales(*lists_of(*layers), common=common).isnan().logical_not()
    assert not known[changed]
    if not common:
        assert known.sum() == len(ROWS) - 1


def test_one_scale_of_all_random_layers_is_not_several():
    layers = [rows_and_gradients(*size, seed=i) for i, size in enumerate(ROWS)]
    for gradient in layers[2][2:4]:
        gradient.mul_(2)
    own = ops.row_scales(*lists_of(*layers))
    torch.testing.assert_close(own[2].item(), 2 * C, rtol=1e-5, atol=0)
    # The rows of other layers hold nothing against theirs.
    assert ops.row_scales(*lists_of(*layers), common=True).isnan().any()


@pytest.mark.parametrize("layout", budget.LAYOUTS)
def test_scales_of_random_rows_in_any_layout(layout):
    g, h, u = (
        budget.random_matrix(rows, cols, torch.float32, seed=seed, layout=layout)
        for seed, (rows, cols) in enumerate(((40, 30), (40, 20), (2, 30)))
    )
    weight, bias = g.T @ h, g.sum(0)
    weight = weight.T.contiguous().T if layout == "transposed" else weight
    if layout == "strided":
        # What lies between the entries is poison.
        room = torch.full((60, 41), torch.nan)
        room[::2, :20], room[::2, 40] = weight, bias
        weight, bias = room[::2, :20], room[::2, 40]
    (scale,) = ops.row_scales([g], [h], [weight], [bias], [u[0]])
    torch.testing.assert_close(scale.item(), 1.0, rtol=1e-5, atol=0)


@pytest.mark.parametrize("size", [1e-6, 1e6])
def test_the_size_of_the_probes_of_random_rows_does_not_matter(size):
    """Neither for sums that nearly cancel, nor for gradients that were changed."""
    layers = []
    for i, shape in enumerate(ROWS):
        g, h, _, _, u = rows_and_gradients(*shape, seed=i)
        g, h = torch.cat([g, -(1 - 1e-5) * g]), torch.cat([h, h])
        # Another order of summation, and so another rounding.
        order = torch.randperm(len(g))
        layers.append((g, h, g[order].T @ h[order], g[order].sum(0), size * u))
        g, h, weight, bias, u = rows_and_gradients(*shape, seed=i)
        layers.append((g, h, weight + 0.1 * weight.abs().max(), bias, size * u))
    got = ops.row_scales(*lists_of(*layers)).isnan()
    assert got.tolist() == [False, True] * len(ROWS)


def test_scales_of_random_rows_of_zeros_and_to_zero():
    g, h, weight, bias, u = rows_and_gradients(9, 5, 4)
    zeros = torch.zeros_like
    given = (
        (g, h, zeros(weight), zeros(bias), u),
        (zeros(g), h, zeros(weight), zeros(bias), u),
        (g, h, weight, bias, u),
        (g, h[:, :0], weight[:, :0], bias, u),  # a layer of which only the bias is trained
    )
    own = ops.row_scales(*lists_of(*given))
    assert own[0] == 0
    assert own[1].isnan()
    torch.testing.assert_close(own[2:], torch.full((2,), C).double(), rtol=1e-5, atol=0)
    # Zeros are any multiple of zeros.
    all_layers = ops.row_scales(*lists_of(given[1], given[2]), common=True)
    torch.testing.assert_close(all_layers, torch.full((2,), C).double(), rtol=1e-5, atol=0)


def test_no_rows_have_no_scale():
    g, h, weight, bias, u = rows_and_gradients(0, 5, 4)
    assert ops.row_scales([g], [h], [weight], [bias], [u]).isnan().all()
    empty = ops.row_scales([], [], [], [], [])
    assert empty.shape == (0,)
    assert empty.dtype == torch.float64


@budget.needs_kernel
@pytest.mark.parametrize("common", [True, False])
def test_scales_of_random_rows_do_not_change_a_bit_with_the_threads(common):
    layers = [rows_and_gradients(*size, seed=i) for i, size in enumerate(ROWS)]
    lists = lists_of(*layers)
    budget.assert_threads_do_not_change_a_bit(lambda: [ops.row_scales(*lists, common=common)])


@budget.needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cancel", [1.0, 1e-5])
def test_the_kernel_finds_what_the_reference_finds_of_random_rows(cancel, dtype):
    layers = []
    for i, size in enumerate(ROWS):
        g, h, weight, bias, u = rows_and_gradients(*size, dtype=dtype, seed=i)
        # The second half takes back the first but for `cancel`, and rounding must not count.
        g, h = torch.cat([g, (cancel - 1) * g]), torch.cat([h, h])
        weight, bias = g.T @ h, g.sum(0)
        if i == 3 and cancel == 1:
            weight[0, 0] += 0.1 * weight.abs().max()
        layers.append((g, h, weight, bias, u))
    lists = lists_of(*layers)
    got, expected = ops.row_scales(*lists), reference.row_scales(*lists)
    rounding = torch.finfo(dtype).eps / cancel
    torch.testing.assert_close(got, expected, rtol=100 * rounding, atol=0, equal_nan=True)
    assert got.isnan().tolist() == [i == 3 and cancel == 1 for i in range(len(ROWS))]


def test_opcheck_of_row_scales():
    lists = lists_of(*(rows_and_gradients(*size) for size in ROWS[:2]))
    torch.library.opcheck(torch.ops.fused_so.row_scales.default, lists, {"common": True})


@budget.needs_kernel
@pytest.mark.parametrize("short", range(5))
def test_short_lists_of_row_scales_raise_without_the_public_checks(short):
    lists = lists_of(*(rows_and_gradients(*size) for size in ROWS[:2]))
    lists[short] = lists[short][:1]
    with pytest.raises(RuntimeError, match=r"row_scales: .* must hold \d entries, got \d"):
        torch.ops.fused_so.row_scales(*lists)


@budget.needs_kernel
@pytest.mark.parametrize("place", range(5))
def test_nobody_reads_beyond_random_rows_without_the_public_checks(place):
    lists = lists_of(rows_and_gradients(5, 16, 17))
    whole = lists[place][0]
    lists[place] = [whole[:-1]]
    with pytest.raises(RuntimeError, match="row_scales: the shapes of layer 0 do not fit"):
        torch.ops.fused_so.row_scales(*lists)
    if place > 0:
        lists[place] = [whole.half()]
        with pytest.raises(RuntimeError, match="row_scales: all must have one dtype"):
            torch.ops.fused_so.row_scales(*lists)


def test_compile_fullgraph_of_row_scales():
    lists = lists_of(*(rows_and_gradients(*size, bias=i > 0) for i, size in enumerate(ROWS[:2])))
    compiled = torch.compile(ops.row_scales, fullgraph=True)
    assert torch.equal(compiled(*lists), ops.row_scales(*lists))


ROW_ARGUMENTS = ("g", "h", "grad_weight", "grad_bias", "probes")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"g": None}, TypeError, "g must be a list of tensors, got NoneType"),
        ({"h": []}, ValueError, "h must hold 1 entries, one for each of g, got 0"),
        ({"g": [torch.ones(3)]}, ValueError, r"g\[0\] must have shape \(n, out\), got \(3,\)"),
        ({"h": [torch.ones(2, 4)]}, ValueError, r"h\[0\] must have shape \(3, in\), got \(2, 4\)"),
        (
            {"grad_weight": [torch.ones(4, 2)]},
            ValueError,
            r"grad_weight\[0\] must have shape \(2, 4\), got \(4, 2\)",
        ),
        (
            {"grad_bias": [torch.ones(3)]},
            ValueError,
            r"grad_bias\[0\] must have shape \(2\), got \(3,\)",
        ),
        (
            {"probes": [torch.ones(1)]},
            ValueError,
            r"probes\[0\] must have shape \(2\), got \(1,\)",
        ),
        (
            {"h": [torch.ones(3, 4, dtype=torch.float64)]},
            TypeError,
            r"h\[0\] must have the dtype of g\[0\], torch.float32, got torch.float64",
        ),
        (
            {"g": [torch.ones(3, 2, dtype=torch.float16)]},
            TypeError,
            r"g\[0\] must be float32 or float64, got torch.float16",
        ),
        (
            {"probes": [torch.ones(2, device="meta")]},
            ValueError,
            r"probes\[0\] must be on the device of g\[0\], cpu, got meta",
        ),
        ({"common": 1}, TypeError, "common must be True or False, got 1"),
    ],
)
def test_bad_input_of_row_scales(change, error, message):
    layer = (torch.ones(3, 2), torch.ones(3, 4), torch.ones(2, 4), None, torch.ones(2))
    arguments = dict(zip(ROW_ARGUMENTS, lists_of(layer), strict=True)) | change
    with pytest.raises(error, match=message):
        ops.row_scales(**arguments)
