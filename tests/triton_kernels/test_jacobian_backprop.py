"""The Triton jacobian_backprop against float64: in the interpreter, or on a GPU if there is one."""

import pytest
import torch

from fused_so.triton_kernels import _product
from fused_so.triton_kernels.jacobian_backprop import jacobian_backprop
from tests.ops import budget, checks
from tests.triton_kernels.device import DEVICE, far_apart, moved

GIVEN = ["neither", "dphi", "direction", "both"]
TILED = [(dtype, tile) for dtype in budget.DTYPES for tile in range(len(_product.CONFIGS[dtype]))]


def run(arguments):
    jac, weight, dphi, direction = (moved(x) for x in arguments)
    jac_in, pullback = jacobian_backprop(jac, weight, dphi=dphi, direction=direction)
    if direction is None:
        assert pullback.shape == (0,)
        return [jac_in.cpu()]
    return [jac_in.cpu(), pullback.cpu()]


def check(*args, **kwargs):
    checks.jacobian_backprop(run, *args, **kwargs)


@pytest.fixture(autouse=True)
def one_tile(request, monkeypatch):
    """`tile`: the number of the one configuration that there is, for any size."""
    if "tile" not in request.fixturenames:
        return
    tile = request.getfixturevalue("tile")
    for dtype, configs in _product.CONFIGS.items():
        at = min(tile, len(configs) - 1)
        monkeypatch.setitem(_product.CONFIGS, dtype, configs[at : at + 1])


@pytest.mark.parametrize(("dtype", "tile"), TILED)
@pytest.mark.parametrize(
    ("n", "o", "out", "width"), [(1, 1, 1, 1), (5, 7, 40, 70), (9, 4, 130, 33), (2, 70, 20, 35)]
)
def test_budget_of_every_tile(n, o, out, width, dtype, tile):
    check(n, o, out, width, dtype)


@pytest.mark.parametrize("dtype", budget.DTYPES)
@pytest.mark.parametrize("layout", checks.JACOBIAN_LAYOUTS)
@pytest.mark.parametrize("given", GIVEN)
def test_any_strides_and_dtypes(given, layout, dtype):
    check(5, 3, 40, 33, dtype, layout, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize(
    ("n", "o", "out", "width"), [(1, 1, 300, 5), (3, 9, 300, 130), (4, 1, 260, 10)]
)
def test_long_sums_are_split(n, o, out, width, given, dtype):
    check(n, o, out, width, dtype, given=given)


@pytest.mark.parametrize("o", [1, 2, 7, 8, 9, 17])
def test_any_number_of_outputs(o):
    check(3, o, 20, 129, torch.float32)


@pytest.mark.parametrize("scale", [1e-7, 1e4])
def test_float16_products_beyond_float16(scale):
    # phi' and J of 1e-4 are ordinary numbers, whose product float16 cannot hold.
    jac, weight, dphi, direction = checks.jacobian_arguments(4, 3, 40, 33, torch.float16)
    small = [(jac * scale**0.5).half(), weight, (dphi * scale**0.5).half(), direction]
    exact = checks.jacobian_oracle(*(x.double() for x in small))
    plain = checks.jacobian_oracle(*(x.float() for x in small))
    for got, p, truth in zip(run(small), plain, exact, strict=True):
        limit = 2 * (p - truth).abs().max() + torch.finfo(torch.float32).eps * truth.abs().max()
        assert (got - truth).abs().max() <= limit


@pytest.mark.parametrize(
    ("n", "o", "out", "width"), [(0, 2, 3, 4), (5, 0, 3, 4), (5, 2, 0, 4), (5, 2, 3, 0)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("given", GIVEN)
def test_empty_sides_sum_to_zero(n, o, out, width, given, dtype):
    got = run(checks.jacobian_arguments(n, o, out, width, dtype, given=given))
    results = budget.accumulate(dtype)
    assert torch.equal(got[0], torch.zeros(n, o, width, dtype=results))
    if given in ("direction", "both"):
        assert torch.equal(got[1], torch.zeros(n, width, dtype=results))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("out", [20, 300])
def test_examples_do_not_mix(out, value):
    arguments = checks.jacobian_arguments(7, 5, out, 30, torch.float32)
    clean = run(arguments)
    arguments[0][3, 4, 2] = value
    for before, after in zip(clean, run(arguments), strict=True):
        assert not after[3].isfinite().all()
        rest = torch.arange(7) != 3
        assert torch.equal(before[rest], after[rest])


def test_an_expanded_identity_gives_the_weight():
    weight = budget.random_matrix(5, 3, torch.float32, seed=0)
    (jac_in,) = run([torch.eye(5).expand(40, 5, 5), weight, None, None])
    assert torch.equal(jac_in, weight.expand(40, 5, 3))


@pytest.mark.parametrize("out", [3, 300])
def test_offsets_past_32_bits(out):
    # Examples, outputs, and the rows of all that goes with them, each too far apart for 32 bits.
    arguments = checks.jacobian_arguments(3, 3, out, 3, torch.float16)
    jac, weight, dphi, direction = (x.to(DEVICE) for x in arguments)
    expected = jacobian_backprop(jac, weight, dphi=dphi, direction=direction)
    far_examples = far_apart(jac.reshape(3, 3 * out)).unflatten(1, (3, out))
    far_outputs = far_apart(jac.transpose(0, 1).reshape(3, 3 * out)).unflatten(1, (3, out))
    weights = [weight] if out > 3 else [weight, far_apart(weight), far_apart(weight.T).T]
    for far in (far_examples, far_outputs.transpose(0, 1)):
        for w in weights:
            got = jacobian_backprop(far, w, dphi=far_apart(dphi), direction=far_apart(direction))
            assert all(torch.equal(p, q) for p, q in zip(got, expected, strict=True))
