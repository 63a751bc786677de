"""grad_gram: the inner products of gradients that are really made, symmetric to the bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_so import ops, reference
from tests.ops import budget, checks

# (out, in) of layers of mixed sizes.
MIXED = [(3, 5), (1, 40), (33, 1), (70, 65)]
# Around the tiles of every instruction set (4 to 32 rows).
ROWS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97]


def per_example_gradients(gs, hs, biases=None):
    """(n, all parameters), by autograd, one example after the other."""
    biases = [True] * len(gs) if biases is None else biases
    rows = []
    for i in range(gs[0].shape[0]):
        row = []
        for g, h, bias in zip(gs, hs, biases, strict=True):
            layer = torch.nn.Linear(h.shape[1], g.shape[1], bias=bias, dtype=g.dtype)
            loss = (layer(h[i]) * g[i]).sum()
            row += [grad.flatten() for grad in torch.autograd.grad(loss, layer.parameters())]
        rows.append(torch.cat(row))
    return torch.stack(rows)


def check(*args, **kwargs):
    checks.grad_gram(ops.grad_gram, *args, **kwargs)


@budget.needs_kernel
def test_the_compiled_kernel_is_what_runs():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("fused_so::grad_gram", "CPU")


@pytest.mark.parametrize("run", [ops.grad_gram, reference.grad_gram])
@pytest.mark.parametrize("biases", [None, [True, False, False, True], (False,) * 4])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_equals_the_products_of_gradients_that_autograd_makes(run, biases, offset):
    gs, hs = checks.layers(37, MIXED, torch.float64, offset=offset)
    gradients = per_example_gradients(gs, hs, biases)
    expected = gradients @ gradients.T
    torch.testing.assert_close(run(gs, hs, biases=biases), expected, rtol=1e-13, atol=1e-13)
    gradients -= gradients.mean(0)
    expected = gradients @ gradients.T
    # autograd's gradients, and not these products, lose digits of what the offset swamps
    atol = 1e-13 * (1 + offset**2) * expected.max().item()
    got = run(gs, hs, centered=True, biases=biases)
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", budget.DTYPES)
@pytest.mark.parametrize("layout", budget.LAYOUTS)
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize(
    ("n", "sizes"), [(1, [(1, 1)]), (2, MIXED), (40, MIXED), (150, [(20, 130), (65, 7)])]
)
def test_budget_of_dtypes_and_layouts(n, sizes, centered, layout, dtype):
    check(n, sizes, dtype, layout, centered=centered)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", ROWS)
def test_budget_around_the_tiles(n, dtype):
    check(n, MIXED, dtype)
    check(n, MIXED, dtype, centered=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [0, 1, 15, 16, 17, 255, 257, 511, 512, 513, 1100])
def test_budget_around_the_blocks_of_depth(width, dtype):
    check(33, [(width, 40), (40, width)], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [128, 256, 257, 520, 800])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_budget_beyond_one_block_of_rows(n, threads, dtype):
    budget.with_threads(threads, lambda: check(n, [(30, 50), (2, 3)], dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("biases", [None, [True, False, False, True]])
def test_budget_of_centering_a_mean_far_beyond_the_deviations(biases, dtype):
    # H K H of a rounded K would be noise. That the reference is right here too is tested above.
    check(70, MIXED, dtype, offset=1000.0, centered=True, biases=biases)


def test_centering_loses_no_digits_to_common_gradients():
    gs, hs = checks.layers(50, MIXED, torch.float32, offset=1000.0)
    gradients = per_example_gradients([g.double() for g in gs], [h.double() for h in hs])
    gradients -= gradients.mean(0)
    expected = gradients @ gradients.T
    error = (ops.grad_gram(gs, hs, centered=True) - expected).abs().max()
    # A few roundings of the largest entry; H K H of a rounded K is wrong by several of it.
    assert error <= 8 * torch.finfo(torch.float32).eps * expected.max()


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-12, 1e12, 1e16])
def test_huge_and_tiny_scales(scale, centered):
    check(40, MIXED, torch.float32, centered=centered, scale=scale)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    n=st.integers(0, 200),
    sizes=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=4),
    dtype=st.sampled_from(budget.DTYPES),
    layout=st.sampled_from(budget.LAYOUTS),
    centered=st.booleans(),
    bias=st.booleans(),
)
def test_budget_of_random_shapes(n, sizes, dtype, layout, centered, bias):
    check(n, sizes, dtype, layout, centered=centered, biases=[bias] * len(sizes))


@pytest.mark.parametrize("centered", [False, True])
def test_no_rows(centered):
    gram = ops.grad_gram([torch.empty(0, 3)], [torch.empty(0, 2)], centered=centered)
    assert gram.shape == (0, 0)


def test_one_centered_row_is_zero():
    gs, hs = checks.layers(1, MIXED, torch.float32)
    assert torch.equal(ops.grad_gram(gs, hs, centered=True), torch.zeros(1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_without_inputs_has_its_bias_beyond_few_rows(dtype):
    g = budget.random_matrix(30, 4, dtype, seed=0)
    gram = ops.grad_gram([g], [torch.empty(30, 0, dtype=dtype)])
    eps = 45 * torch.finfo(dtype).eps
    torch.testing.assert_close(gram, g @ g.T, rtol=eps, atol=eps)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_an_entry_that_is_not_finite_spoils_its_example_and_no_other(value, side):
    sides = checks.layers(70, MIXED, torch.float32)
    clean = ops.grad_gram(*sides)
    sides[side][1][40, 0] = value
    gram = ops.grad_gram(*sides)
    assert not gram[40].isfinite().any()
    others = torch.arange(70) != 40
    assert torch.equal(gram[others][:, others], clean[others][:, others])
    assert ops.grad_gram(*sides, centered=True).isnan().all()


def test_float16_does_not_overflow_where_float32_does_not():
    g, h = torch.full((20, 3), 6e4).half(), torch.full((20, 5), 6e4).half()
    gram = ops.grad_gram([g], [h])
    torch.testing.assert_close(gram, reference.grad_gram([g], [h]), rtol=1e-6, atol=0)
    assert torch.equal(ops.grad_gram([g], [h], centered=True), torch.zeros(20, 20))


@pytest.mark.parametrize("n", [20, 129, 300, 600])
@pytest.mark.parametrize("centered", [False, True])
def test_threads_do_not_change_a_bit(n, centered):
    gs, hs = checks.layers(n, [(64, 300), (700, 40)], torch.float32)
    budget.assert_threads_do_not_change_a_bit(lambda: [ops.grad_gram(gs, hs, centered=centered)])


def test_the_exact_natural_gradient_from_the_gram_matrix():
    # (lambda I + U U^T)^-1 mean(g) = sum_i c_i g_i with U = [g_1 .. g_n]/sqrt(n) and
    # c = (lambda I + K/n)^-1 1/n.
    n, damping = 37, 0.3
    gs, hs = checks.layers(n, MIXED, torch.float64)
    gradients = per_example_gradients(gs, hs)
    fisher = gradients.T @ gradients / n
    damped = fisher + damping * torch.eye(len(fisher), dtype=torch.float64)
    expected = torch.linalg.solve(damped, gradients.mean(0))

    k = ops.grad_gram(gs, hs)
    eye = torch.eye(n, dtype=torch.float64)
    c = torch.linalg.solve(damping * eye + k / n, torch.full((n,), 1 / n, dtype=torch.float64))
    # The weighted sum of the gradients is one more outer product a layer.
    step = []
    for g, h in zip(gs, hs, strict=True):
        step += [((c[:, None] * g).T @ h).flatten(), g.T @ c]
    torch.testing.assert_close(torch.cat(step), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("centered", [False, True])
def test_opcheck(dtype, centered):
    gs, hs = checks.layers(7, MIXED[:2], dtype)
    options = {"centered": centered, "biases": [True, False]}
    torch.library.opcheck(torch.ops.fused_so.grad_gram.default, (gs, hs), options)


@budget.needs_kernel
@pytest.mark.parametrize("short", ["gs", "hs", "biases"])
@pytest.mark.parametrize("entries", [0, 1])
def test_lists_of_unequal_length_raise_without_the_public_checks(short, entries):
    lists = {"gs": [torch.ones(3, 2)] * 2, "hs": [torch.ones(3, 4)] * 2, "biases": [True, True]}
    lists[short] = lists[short][:entries]
    with pytest.raises(RuntimeError, match="grad_gram: .* must hold .* got"):
        torch.ops.fused_so.grad_gram(
            lists["gs"], lists["hs"], centered=False, biases=lists["biases"]
        )


def test_compile_fullgraph():
    gs, hs = checks.layers(7, MIXED, torch.float32)
    compiled = torch.compile(lambda gs, hs: ops.grad_gram(gs, hs, centered=True), fullgraph=True)
    assert torch.equal(compiled(gs, hs), ops.grad_gram(gs, hs, centered=True))


def ones(*shape, **options):
    return torch.ones(*shape, **options)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"gs": [], "hs": []}, ValueError, "gs must hold at least one tensor, got an empty list"),
        ({"gs": ones(6, 2)}, TypeError, "gs must be a list of tensors, got Tensor"),
        ({"hs": ones(6, 2)}, TypeError, "hs must be a list of tensors, got Tensor"),
        ({"hs": [ones(6, 3)]}, ValueError, "hs must hold 2 tensors, one for each of gs, got 1"),
        ({"gs": [ones(6, 2), 1.0]}, TypeError, r"gs\[1\] must be a Tensor, got float"),
        ({"gs": [ones(6), ones(6, 2)]}, ValueError, r"gs\[0\] must have shape \(n, out\), got"),
        ({"gs": [ones(6, 2), ones(5, 2)]}, ValueError, r"gs\[1\] must have shape \(6, out\), got"),
        ({"hs": [ones(6, 3), ones(5, 4)]}, ValueError, r"hs\[1\] must have shape \(6, in\), got"),
        ({"hs": [ones(6, 3), ones(6, 4, 1)]}, ValueError, r"hs\[1\].*got \(6, 4, 1\)"),
        ({"hs": [ones(6, 3).int()] * 2}, TypeError, r"hs\[0\] must be float16.*got torch.int32"),
        ({"gs": [ones(6, 2).cfloat()] * 2}, TypeError, r"gs\[0\] must be .*got torch.complex64"),
        (
            {"hs": [ones(6, 3), ones(6, 4).double()]},
            *(TypeError, r"hs\[1\] must have the dtype of gs\[0\], torch.float32, got"),
        ),
        (
            {"gs": [ones(6, 2), ones(6, 1, device="meta")]},
            *(ValueError, r"gs\[1\] must be on the device of gs\[0\], cpu, got meta"),
        ),
        ({"centered": 1}, TypeError, "centered must be True or False, got 1"),
        ({"biases": True}, TypeError, "biases must be a list of bool or None, got bool"),
        ({"biases": [True]}, ValueError, "biases must hold 2 bools, one for each of gs, got 1"),
        ({"biases": [True, 0]}, TypeError, r"biases\[1\] must be True or False, got 0"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"gs": [ones(6, 2), ones(6, 1)], "hs": [ones(6, 3), ones(6, 4)]} | change
    with pytest.raises(error, match=message):
        ops.grad_gram(**arguments)


@pytest.mark.parametrize("centered", [False, True])
def test_a_layer_without_inputs_is_its_bias(centered):
    g, h = torch.randn(7, 3, dtype=torch.float64), torch.randn(7, 4, dtype=torch.float64)
    gram = ops.grad_gram([g, g], [h[:, :0], h], biases=[True, False], centered=centered)
    expected = (g @ g.T) * (1 + h @ h.T)
    if centered:
        expected = expected - expected.mean(0)
        expected = expected - expected.mean(1, keepdim=True)
    torch.testing.assert_close(gram, expected, rtol=1e-12, atol=1e-12)
