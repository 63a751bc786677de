"""The Triton precondition against float64: in the interpreter, or on a GPU if there is one."""

import importlib

import pytest
import torch

from fused_so import reference
from fused_so.triton_kernels import _matrix, _product
from fused_so.triton_kernels.precondition import precondition, precondition_list
from tests.ops import budget, checks
from tests.triton_kernels.device import DEVICE, far_apart, moved

# The function of that name hides the module.
kernels = importlib.import_module("fused_so.triton_kernels.precondition")
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


def run_lists(grad_weight, grad_bias, mean, a, *, output_inverse=None, alpha=None):
    lists = (x and [moved(y) for y in x] for x in (grad_weight, grad_bias, mean, a, output_inverse))
    *arguments, go = lists
    if alpha is not None:
        # As an optimizer has them: parts of one tensor, not aligned.
        means = arguments[2]
        alpha = [means[0].new_tensor(alpha)[i].to(m) for i, m in enumerate(means)]
    dws, dbs = precondition_list(*arguments, output_inverse=go, alpha=alpha)
    return [x.cpu() for x in dws], [x.cpu() for x in dbs]


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


@pytest.fixture
def launches(monkeypatch):
    """The layers of every launch of the last kernel, in order."""
    counts = []
    kernel = kernels._finish_rows

    class Counted:
        def __getitem__(self, grid):
            counts.append(grid[1])
            return kernel[grid]

    monkeypatch.setattr(kernels, "_finish_rows", Counted())
    return counts


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize(("count", "expected"), [(1, [1]), (3, [3]), (8, [8]), (10, [8, 2])])
def test_layers_of_one_shape_take_one_launch(count, expected, sides, launches):
    kinds = [(14, 35, torch.float32, "contiguous")] * count
    checks.precondition_lists(run_lists, kinds, [0.5 + i for i in range(count)], sides=sides)
    assert launches == expected


@pytest.mark.parametrize("sides", SIDES)
def test_layers_unlike_each_other_are_not_mixed(sides, launches):
    small, strided = (14, 35, torch.float32, "contiguous"), (14, 35, torch.float32, "strided")
    half, double = (14, 35, torch.bfloat16, "contiguous"), (14, 35, torch.float64, "contiguous")
    turned = (35, 14, torch.float32, "contiguous")
    kinds = [small, turned, strided, half, small, double, turned, small]
    checks.precondition_lists(run_lists, kinds, [0.5 + i for i in range(8)], sides=sides)
    assert sorted(launches) == [1, 1, 1, 2, 3]


@pytest.mark.parametrize("dtype", budget.DTYPES)
@pytest.mark.parametrize("layout", budget.LAYOUTS)
@pytest.mark.parametrize("sides", SIDES)
def test_layers_of_any_strides_and_dtypes(sides, layout, dtype, launches):
    checks.precondition_lists(
        run_lists, [(24, 35, dtype, layout)] * 3, [1.0, 2.0, 3.0], sides=sides
    )
    assert launches == [3]


@pytest.mark.parametrize(
    ("out", "width", "sides"),
    [(20, 300, "input"), (300, 10, "output"), (5, 300, "both"), (9, 600, "none")],
)
def test_long_sums_of_layers_are_split(out, width, sides):
    kinds = [(out, width, torch.float32, "contiguous")] * 3
    checks.precondition_lists(run_lists, kinds, [3.0, 1.0, 0.1], sides=sides)


def test_layers_that_are_not_aligned_are_launched_apart(launches):
    # As in a bucket of gradients that lie one after the other.
    room = torch.randn(6 * 12 * 35 + 1)
    whole, off = (
        [room[i + first :][: 12 * 35] for i in range(0, 6 * 420, 840)] for first in (0, 1)
    )
    gradients = [x.view(12, 35) for x in (*whole, *off)]
    biases, means = [torch.randn(12) for _ in gradients], [torch.randn(35) for _ in gradients]
    inverses = [torch.randn(35, 35) for _ in gradients]
    # Not by `moved`, which would copy the whole storage to another address.
    arguments = [[y.to(DEVICE) for y in x] for x in (gradients, biases, means, inverses)]
    dws, _ = precondition_list(*arguments)
    assert launches == ([3, 3] if DEVICE == "cpu" else [6])
    for i, dw in enumerate(dws):
        expected, _ = precondition(*(x[i] for x in arguments))
        assert torch.equal(dw, expected)


LISTS = ("grad_weight", "grad_bias", "mean", "input_inverse", "output_inverse", "alpha")


@pytest.mark.parametrize("short", LISTS)
@pytest.mark.parametrize("entries", [0, 1, 3])
def test_lists_of_unequal_length_raise(short, entries):
    shapes = (3, 4), (3,), (4,), (4, 4), (3, 3), ()
    lists = {
        name: [torch.ones(shape, device=DEVICE)] * (entries if name == short else 2)
        for name, shape in zip(LISTS, shapes, strict=True)
    }
    *positional, output_inverse, alpha = lists.values()
    with pytest.raises(ValueError, match="is (shorter|longer) than"):
        precondition_list(*positional, output_inverse=output_inverse, alpha=alpha)


@pytest.mark.parametrize("sides", SIDES)
def test_a_layer_does_not_depend_on_those_it_is_launched_with(sides, monkeypatch):
    """Nor are some of a launch aligned where others are not: Triton would compile once more."""
    seen, addresses = [], kernels.addresses
    monkeypatch.setattr(kernels, "addresses", lambda x: seen.append(x) or addresses(x))
    out, width = 25, 701  # sums long enough to be split, results of no multiple of 16 bytes

    def layers(*shape):
        return [torch.randn(*shape, device=DEVICE) for _ in range(5)]

    grads, biases, means = layers(out, width), layers(out), layers(width)
    inverses = layers(width, width) if sides in ("input", "both") else None
    outputs = layers(out, out) if sides in ("output", "both") else None
    dws, dbs = precondition_list(grads, biases, means, inverses, output_inverse=outputs)
    for group in seen:
        assert len({x is None or x.data_ptr() % 16 == 0 for x in group}) == 1
    for i, got in enumerate(zip(dws, dbs, strict=True)):
        a, go = (None if x is None else x[i] for x in (inverses, outputs))
        expected = precondition(grads[i], biases[i], means[i], a, output_inverse=go)
        assert all(torch.equal(x, y) for x, y in zip(got, expected, strict=True))


def test_a_layer_at_work_for_longer_than_its_launch_is_launched_alone(launches, monkeypatch):
    size = 4 * (14 * 35 + 14 + 35 + 35 * 35)
    kinds = [(14, 35, torch.float32, "contiguous")] * 3
    for limit, expected in ((size, [3]), (size - 1, [1, 1, 1])):
        monkeypatch.setattr(_matrix, "JOINED_BYTES", limit)
        launches.clear()
        checks.precondition_lists(run_lists, kinds, [1.0, 2.0, 3.0], sides="input")
        assert launches == expected


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize(("out", "width"), [(0, 0), (0, 3), (3, 0)])
def test_empty_layers(out, width, sides):
    a = [torch.ones(width, width)] * 2 if sides in ("input", "both") else None
    go = [torch.ones(out, out)] * 2 if sides in ("output", "both") else None
    arguments = [torch.ones(out, width)] * 2, [torch.ones(out)] * 2, [torch.ones(width)] * 2, a
    got = run_lists(*arguments, output_inverse=go, alpha=[1.0, 2.0])
    expected = reference.precondition(*arguments, output_inverse=go, alpha=[1.0, 2.0])
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("sides", SIDES)
def test_bad_entries_of_one_layer_stay_in_it(sides):
    layers = [
        checks.kronecker_layer(35, 35, torch.float32, sides=sides, seed=s) for s in (0, 9, 18)
    ]
    layers[1][0][34, 3] = torch.nan
    *arguments, a, go = (None if x[0] is None else list(x) for x in zip(*layers, strict=True))
    dws, dbs = run_lists(*arguments, a, output_inverse=go)
    for i, (dw, db) in enumerate(zip(dws, dbs, strict=True)):
        assert dw.isnan().any() == db.isnan().any() == (i == 1)
