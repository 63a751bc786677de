"""The Triton covariance against an exact one: in the interpreter, or on a GPU if there is one."""

import importlib

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from fused_so.triton_kernels._matrix import load_widths
from fused_so.triton_kernels._symmetric import triangle_grid, triangle_tile
from fused_so.triton_kernels.covariance import covariance, covariance_, covariance_list_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = (torch.float16, torch.bfloat16)
DTYPES = (*HALF, torch.float32, torch.float64)
# Below, at and past the tile sizes, one row, one column, several splits of the rows.
SHAPES = [(1, 1), (5, 1), (1, 7), (7, 3), (33, 17), (32, 32), (130, 65), (64, 129), (600, 20)]


@pytest.fixture(autouse=True)
def small_and_large_tiles(request, monkeypatch):
    """`tile`: the configuration for any size, so that small tests run the large tiles too."""
    if "tile" in request.fixturenames:
        module = importlib.import_module("fused_so.triton_kernels.covariance")
        choose = module.heuristic_config
        d = request.getfixturevalue("tile")
        monkeypatch.setattr(module, "heuristic_config", lambda _, dtype: choose(d, dtype))


def batch(n, d, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    # Columns of unlike scale and mean.
    x = x * torch.linspace(0.5, 2, d, dtype=torch.float64) + torch.linspace(-1, 3, d)
    return x.to(DEVICE, dtype)


def state(d, dtype, seed=1):
    x = batch(d + 3, d, torch.promote_types(dtype, torch.float32), seed)
    cov = x.T @ x / len(x)
    # BLAS need not make it symmetric to the bit, which a running covariance is.
    return (cov + cov.T) / 2, x.mean(0)


def statistics(h, centered):
    mean = h.mean(0)
    x = h - mean if centered else h
    return x.T @ x / len(h), mean


def mixture(cov, mean, batch_cov, batch_mean, decay, centered):
    shift = mean - batch_mean
    outer = decay * (1 - decay) * shift[:, None] * shift[None, :] if centered else 0
    return (
        decay * cov + (1 - decay) * batch_cov + outer,
        decay * mean + (1 - decay) * batch_mean,
    )


def exact(x):
    """The same formulas then run in 80 bits, so that float64 itself can be judged."""
    return x.double().cpu().numpy().astype(np.longdouble)


def largest_error(result, reference):
    return abs(exact(result) - reference).max()


def assert_within_budget(results, plains, references, dtype):
    """At most twice the error of plain PyTorch in the same dtype, plus eps of the largest entry."""
    for result, plain, reference in zip(results, plains, references, strict=True):
        budget = 2 * largest_error(plain, reference)
        budget += torch.finfo(dtype).eps * abs(reference).max()
        error = largest_error(result, reference)
        assert error <= budget, f"error {error:.3e}, budget {budget:.3e}"


def check_covariance(h, centered=True):
    cov, mean = covariance(h, centered=centered)
    assert cov.dtype == mean.dtype == torch.promote_types(h.dtype, torch.float32)
    assert torch.equal(cov, cov.T)
    plain, reference = statistics(h, centered), statistics(exact(h), centered)
    assert_within_budget((cov, mean), plain, reference, h.dtype)


@pytest.mark.parametrize("tile", [1, 1000])
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_covariance(n, d, dtype, centered, tile):
    check_covariance(batch(n, d, dtype), centered)


VIEWS = {
    "transposed": lambda dtype: batch(24, 40, dtype).T,
    "every other row": lambda dtype: batch(70, 24, dtype)[::2],
    "every third column": lambda dtype: batch(35, 72, dtype)[:, ::3],
    "offset": lambda dtype: batch(35, 40, dtype)[1:, 3:],
    "one row, repeated": lambda dtype: batch(1, 20, dtype).expand(9, 20),
    "one column, repeated": lambda dtype: batch(40, 1, dtype).expand(40, 18),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", VIEWS)
def test_any_strides(view, dtype):
    check_covariance(VIEWS[view](dtype))


@pytest.mark.parametrize("tile", [1, 1000])
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), [(1, 1), (33, 17), (300, 70)])
def test_update(n, d, dtype, decay, centered, tile):
    h = batch(n, d, dtype)
    cov, mean = state(d, dtype)
    plain = mixture(cov, mean, *(x.to(cov) for x in statistics(h, centered)), decay, centered)
    reference = statistics(exact(h), centered)
    reference = mixture(exact(cov), exact(mean), *reference, decay, centered)
    before = cov.clone().tril(), mean.clone()

    accepted = covariance_(cov, mean, h, decay=decay, centered=centered)
    assert accepted.dtype == torch.bool
    assert accepted.shape == ()
    assert accepted.item() is True
    assert torch.equal(cov, cov.T)
    assert_within_budget((cov, mean), plain, reference, dtype)
    if decay == 1.0:
        assert torch.equal(cov.tril(), before[0])
        assert torch.equal(mean, before[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_decay_zero_forgets_even_nan(dtype):
    h = batch(40, 33, dtype)
    cov, mean = (x.fill_(float("nan")) for x in state(33, dtype))
    assert covariance_(cov, mean, h, decay=0.0)
    expected = covariance(h)
    assert torch.equal(cov, expected[0])
    assert torch.equal(mean, expected[1])


BAD = {
    "nan": float("nan"),
    "inf": float("inf"),
    "-inf": float("-inf"),
    "square overflows": 1e200,
}


@pytest.mark.parametrize("place", [(0, 0), (-1, -1), (299, 64)])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_bad_batch_leaves_the_state(bad, place, decay):
    # float32 overflows from 1e20 on. Two blocks of columns, two splits of the rows.
    dtype = torch.float64 if bad == "square overflows" else torch.float32
    for n in (300, 520):
        h = batch(n, 70, dtype)
        h[place] = BAD[bad]
        cov, mean = state(70, dtype)
        before = cov.clone(), mean.clone()
        accepted = covariance_(cov, mean, h, decay=decay)
        assert accepted.item() is False
        assert torch.equal(cov, before[0])
        assert torch.equal(mean, before[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(dtype):
    h = batch(0, 5, dtype)
    cov, mean = covariance(h)
    assert not cov.any()
    assert not mean.any()
    assert cov.shape == (5, 5)
    assert mean.shape == (5,)
    cov, mean = state(5, dtype)
    before = cov.clone(), mean.clone()
    assert covariance_(cov, mean, h, decay=0.5).item() is False
    assert torch.equal(cov, before[0])
    assert torch.equal(mean, before[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_mean_keeps_its_digits(dtype):
    h = (torch.randn(500, 20, dtype=torch.float64) + 1e3).to(DEVICE, dtype)
    cov, _ = covariance(h)
    # Without centering, sums of squares near 1e6 would leave an error near 1e6 eps.
    assert largest_error(cov, statistics(exact(h), True)[0]) < 20 * torch.finfo(dtype).eps


def test_float16_deviation_past_its_range():
    h = torch.full((8, 3), 6e4, dtype=torch.float16, device=DEVICE)
    h[0] = -6e4
    cov, _ = covariance(h)
    reference, _ = statistics(exact(h), True)
    assert largest_error(cov, reference) <= 1e-3 * reference.max()


def test_many_rows():
    # More rows than the fixed number of splits takes at their smallest size.
    check_covariance(batch(64 * 256 + 100, 3, torch.float32))


def test_triangle_covers_every_tile_once():
    @triton.jit
    def positions(tile_ptr, i_ptr, j_ptr, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        i, j = triangle_tile(tl.load(tile_ptr + at))
        tl.store(i_ptr + at, i)
        tl.store(j_ptr + at, j)

    # Every tile of a small triangle, then first and last tiles of rows where float32 rounds.
    small = torch.tril_indices(40, 40)
    rows = torch.arange(1500, 30000, 7)
    ends = torch.stack([rows, rows]), torch.stack([rows, torch.zeros_like(rows)])
    expected = torch.cat([small, *ends], dim=1)
    expected = expected[:, : expected.shape[1] // 64 * 64].to(DEVICE)
    tile = (expected[0] * (expected[0] + 1) // 2 + expected[1]).int()
    i, j = torch.zeros_like(tile), torch.zeros_like(tile)
    positions[(len(tile) // 64,)](tile, i, j, BLOCK=64)
    assert torch.equal(i.long(), expected[0])
    assert torch.equal(j.long(), expected[1])
    assert triangle_grid(40 * 64 - 1, 64) == (40 * 41 // 2,)


def test_load_widths():
    x = torch.empty(1000, 500)
    assert load_widths(x) == (1, 4)
    assert load_widths(x.half()) == (1, 4)
    assert load_widths(x.T) == (4, 1)
    assert load_widths(x[:, :30]) == (1, 2)
    assert load_widths(x[:, ::2]) == (1, 1)
    assert load_widths(x[:1].expand(8, 500)) == (1, 4)


def test_offsets_past_32_bits():
    # Three rows 2^30 + 1 apart: the last one begins past 2^31. Untouched pages cost no memory.
    stride = 2**30 + 1
    h = torch.empty(2 * stride + 5, dtype=torch.float16, device=DEVICE)
    h = h.as_strided((3, 5), (stride, 1)).copy_(batch(3, 5, torch.float16))
    check_covariance(h)
    check_covariance(h.T)


@pytest.fixture
def launches(monkeypatch):
    """The layers of every launch of the product, in order."""
    module = importlib.import_module("fused_so.triton_kernels.covariance")
    counts, kernel = [], module._update_product

    class Counted:
        def __getitem__(self, grid):
            counts.append(grid[1])
            return kernel[grid]

    monkeypatch.setattr(module, "_update_product", Counted())
    return counts


def check_layers(hs, decays, centered=True, refused=()):
    """Equal to the bit to calls one by one, which are held to the budget above."""
    states = [state(h.shape[1], h.dtype, seed=i) for i, h in enumerate(hs)]
    covs, means = ([x.clone() for x in side] for side in zip(*states, strict=True))
    accepted = covariance_list_(covs, means, hs, decay=decays, centered=centered)
    assert accepted.dtype == torch.bool
    assert accepted.tolist() == [i not in refused for i in range(len(hs))]
    for i, (cov, mean) in enumerate(states):
        covariance_(cov, mean, hs[i], decay=decays[i], centered=centered)
        assert torch.equal(covs[i], cov)
        assert torch.equal(means[i], mean)


@pytest.mark.parametrize("tile", [1, 1000])
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), [(1, 1), (33, 17), (300, 70)])
def test_layers_of_one_shape_take_one_launch(n, d, dtype, centered, tile, launches):
    check_layers([batch(n, d, dtype, seed=i) for i in range(3)], [0.9] * 3, centered)
    assert launches[0] == 3


@pytest.mark.parametrize(("count", "expected"), [(1, [1]), (8, [8]), (10, [8, 2])])
def test_more_layers_than_one_launch_takes(count, expected, launches):
    check_layers([batch(20, 35, torch.float32, seed=i) for i in range(count)], [0.9] * count)
    assert launches[: len(expected)] == expected


@pytest.mark.parametrize("bad", [0, 1, 2])
@pytest.mark.parametrize("n", [33, 520])
def test_a_bad_batch_is_refused_and_the_others_are_taken(n, bad, launches):
    # In the last of two blocks of columns.
    hs = [batch(n, 70, torch.float32, seed=i) for i in range(3)]
    hs[bad][n // 2, 69] = float("nan")
    check_layers(hs, [0.9] * 3, refused={bad})
    assert launches[0] == 3


def test_layers_unlike_each_other_are_not_mixed(launches):
    f32 = torch.float32
    hs = [
        batch(33, 20, f32, 0),
        batch(20, 33, f32, 1),
        batch(33, 20, f32, 2),
        batch(0, 20, f32, 3),
        batch(66, 20, f32, 4)[::2],
        batch(33, 20, torch.bfloat16, 5),
        batch(33, 20, f32, 6),
    ]
    check_layers(hs, [0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.5], refused={3})
    assert launches[:5] == [2, 1, 1, 1, 1]
