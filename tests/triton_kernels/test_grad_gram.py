"""The Triton grad_gram against float64: in the interpreter, or on a GPU if there is one."""

import importlib

import pytest
import torch

from fused_so import reference
from fused_so.triton_kernels.grad_gram import grad_gram
from tests.ops import budget, checks
from tests.triton_kernels.device import DEVICE, far_apart, moved

# The function of that name hides the module.
kernels = importlib.import_module("fused_so.triton_kernels.grad_gram")
# (out, in) of layers of mixed sizes.
MIXED = [(3, 5), (1, 40), (33, 1), (70, 65)]
# A sum long enough to be cut into pieces, and one that is not.
LONG = [(300, 130), (20, 65)]
TILED = [(dtype, tile) for dtype in budget.DTYPES for tile in range(len(kernels.CONFIGS[dtype]))]


@pytest.fixture(autouse=True)
def one_tile(request, monkeypatch):
    """`tile`: the number of the one configuration that there is, for any size."""
    if "tile" not in request.fixturenames:
        return
    tile = request.getfixturevalue("tile")
    for configs in (kernels.CONFIGS, kernels.WHOLE_CONFIGS):
        for dtype, choices in configs.items():
            at = min(tile, len(choices) - 1)
            monkeypatch.setitem(configs, dtype, choices[at : at + 1])


def run(gs, hs, *, centered=False, biases=None):
    biases = [True] * len(gs) if biases is None else list(biases)
    gs, hs = ([moved(x) for x in side] for side in (gs, hs))
    return grad_gram(gs, hs, centered=centered, biases=biases).cpu()


def check(*args, **kwargs):
    checks.grad_gram(run, *args, **kwargs)


@pytest.mark.parametrize(("dtype", "tile"), TILED)
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize(
    ("n", "sizes"), [(1, [(1, 1)]), (33, MIXED), (65, [(40, 3)]), (40, LONG), (70, LONG[:1])]
)
def test_budget_of_every_tile(n, sizes, centered, dtype, tile):
    check(n, sizes, dtype, centered=centered)


@pytest.mark.parametrize("dtype", budget.DTYPES)
@pytest.mark.parametrize("layout", budget.LAYOUTS)
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize(("n", "sizes"), [(40, MIXED), (20, LONG)])
def test_any_strides_and_dtypes(n, sizes, centered, layout, dtype):
    check(n, sizes, dtype, layout, centered=centered)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("biases", [[True, False], [False, True], [False, False]])
@pytest.mark.parametrize("sizes", [LONG, [(3, 5), (7, 2)]])
def test_layers_without_a_bias(sizes, biases, centered):
    check(17, sizes, torch.float32, centered=centered, biases=biases)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("sizes", [(3, 5), (40, 30)])
@pytest.mark.parametrize("count", [7, 8, 9, 17])
def test_more_layers_than_one_launch_takes(count, sizes, centered):
    # Some in one piece a side, some in several; every other layer has no bias.
    biases = [i % 2 == 0 for i in range(count)]
    check(9, [sizes] * count, torch.float32, centered=centered, biases=biases)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("biases", [None, [True, False, False, True]])
@pytest.mark.parametrize("sizes", [MIXED, [*LONG, *LONG]])
def test_centering_a_mean_far_beyond_the_deviations(sizes, biases, dtype):
    check(40, sizes, dtype, offset=1000.0, centered=True, biases=biases)


@pytest.mark.parametrize("centered", [False, True])
def test_no_rows(centered):
    assert run([torch.empty(0, 3)], [torch.empty(0, 2)], centered=centered).shape == (0, 0)


@pytest.mark.parametrize("sizes", [[(4, 0)], [(300, 0), (0, 300), (5, 130)], [(0, 0)]])
@pytest.mark.parametrize("centered", [False, True])
def test_layers_without_inputs_or_outputs(sizes, centered):
    gs, hs = checks.layers(9, sizes, torch.float64)
    expected = reference.grad_gram(gs, hs, centered=centered)
    got = run(gs, hs, centered=centered)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


def test_one_centered_row_is_zero():
    assert torch.equal(
        run(*checks.layers(1, MIXED, torch.float32), centered=True), torch.zeros(1, 1)
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("sizes", [MIXED, LONG])
def test_an_entry_that_is_not_finite_spoils_its_example_and_no_other(sizes, side, value):
    sides = checks.layers(37, sizes, torch.float32)
    clean = run(*sides)
    sides[side][1][20, 0] = value
    gram = run(*sides)
    assert not gram[20].isfinite().any()
    others = torch.arange(37) != 20
    assert torch.equal(gram[others][:, others], clean[others][:, others])
    assert run(*sides, centered=True).isnan().all()


def test_float16_does_not_overflow_where_float32_does_not():
    g, h = torch.full((20, 3), 6e4).half(), torch.full((20, 5), 6e4).half()
    torch.testing.assert_close(run([g], [h]), reference.grad_gram([g], [h]), rtol=1e-6, atol=0)
    assert torch.equal(run([g], [h], centered=True), torch.zeros(20, 20))


def test_float16_deviations_past_its_range():
    g, h = torch.full((4, 3), 6e4).half(), torch.full((4, 5), 6e4).half()
    g[0] = -6e4
    expected = reference.grad_gram([g.double()], [h.double()], centered=True)
    got = run([g], [h], centered=True)
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("centered", [False, True])
def test_offsets_past_32_bits(centered):
    g, h = (budget.random_matrix(3, 3, torch.float16, seed=seed).to(DEVICE) for seed in (0, 1))
    # Columns that only together with the number of a piece are too far apart for 32 bits.
    stride = 2**24 + 1
    room = torch.empty(299 * stride + 3, dtype=torch.float16, device=DEVICE)
    long = budget.random_matrix(3, 300, torch.float16, seed=2).to(DEVICE)
    far_long = room.as_strided((3, 300), (1, stride)).copy_(long)
    for near, far in (
        ([g, h], [far_apart(g), far_apart(h)]),
        ([g.T, h.T], [far_apart(g).T, far_apart(h).T]),
        ([g, long], [far_apart(g), far_long]),
    ):
        expected, got = (
            grad_gram([x], [y], centered=centered, biases=[True]) for x, y in (near, far)
        )
        assert torch.equal(got, expected)


def test_plan_covers_the_features_once_and_fills_a_gpu_where_it_can():
    autoencoder = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
    both = [*autoencoder[:-1], *autoencoder[1:]]

    def chosen(n, widths, dtype=torch.float32):
        config, tiles, depth, pieces = kernels.plan(n, widths, dtype)
        assert depth % config.block_k == 0
        if depth:
            assert (pieces - 1) * depth < max(widths) <= pieces * depth
            programs = tiles * sum(-(-width // depth) for width in widths)
            return config.block_m, tiles, programs
        assert pieces == 1
        return config.block_m, tiles, tiles

    assert chosen(2048, [1000, 1000]) == (64, 528, 528)
    assert chosen(1024, [1000, 1000]) == (64, 136, 136)
    assert chosen(512, both) == (64, 36, 576)
    assert chosen(128, both) == (64, 3, 150)
    assert chosen(32, both) == (32, 1, 72)
    assert chosen(128, [64, 64]) == (32, 10, 10)
    assert chosen(10, [0, 0]) == (32, 1, 1)
    assert chosen(512, both, torch.float64) == (32, 136, 136)


def test_a_layer_without_inputs_is_its_bias():
    g, h = torch.randn(37, 5), torch.randn(37, 4)
    for hs in ([h[:, :0], h], [h, h[:, :0]], [h[:, :0], h[:, :0]]):
        got = run([g, g], hs)
        expected = reference.grad_gram([g, g], hs, centered=False, biases=[True, True])
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
