"""covariance and covariance_: right, symmetric to the bit, and untouched by a bad batch."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_so import ops, reference
from tests.ops import budget

# One below, at and above the tiles of every instruction set (6, 14 rows; 4 to 32 columns), the
# rows summed at a time (32) and the blocks of depth (256).
WIDTHS = [1, 2, 5, 6, 7, 13, 14, 15, 31, 32, 33, 63, 64, 65, 130]
ROWS = [1, 2, 31, 32, 33, 255, 256, 257, 511, 513, 800]


def state(d, dtype, seed=1):
    x = budget.random_matrix(2 * d, d, torch.float64, seed=seed)
    return (reference.covariance(x)[0].to(dtype), x[0].to(dtype))


def check_covariance(h, centered):
    got = ops.covariance(h, centered=centered)
    budget.assert_within_budget(
        got, lambda h: reference.covariance(h, centered=centered), [h], budget.row_orders
    )
    assert torch.equal(got[0], got[0].T)


def check_mixture(h, decay, centered):
    cov, mean = state(h.shape[1], budget.accumulate(h.dtype))
    got = cov.clone(), mean.clone()
    accepted = ops.covariance_(*got, h, decay=decay, centered=centered)
    assert accepted.shape == ()
    assert accepted.dtype == torch.bool
    assert accepted.item() == (h.shape[0] > 0)

    def oracle(h, cov, mean):
        cov, mean = cov.clone(), mean.clone()
        reference.covariance_(cov, mean, h, decay=decay, centered=centered)
        return cov, mean

    def orders(arguments):
        return [(h, cov, mean) for (h,) in budget.row_orders(arguments[:1])]

    budget.assert_within_budget(got, oracle, [h, cov, mean], orders)
    assert torch.equal(got[0], got[0].T)


@pytest.mark.parametrize("dtype", budget.DTYPES)
@pytest.mark.parametrize("layout", budget.LAYOUTS)
@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize(("n", "d"), [(1, 1), (2, 3), (33, 31), (40, 65), (300, 130), (4096, 64)])
def test_budget_of_dtypes_and_layouts(n, d, centered, layout, dtype):
    h = budget.random_matrix(n, d, dtype, seed=0, layout=layout)
    check_covariance(h, centered)
    check_mixture(h, 0.9, centered)


@pytest.mark.parametrize("d", WIDTHS)
def test_budget_around_the_tiles(d):
    check_covariance(budget.random_matrix(70, d, torch.float32, seed=d), True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("d", [17, 300])
def test_budget_around_the_blocks_of_depth(n, d, dtype):
    check_mixture(budget.random_matrix(n, d, dtype, seed=n), 0.5, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_budget_beyond_one_block_of_rows_columns_and_depth(dtype):
    check_mixture(budget.random_matrix(600, 2100, dtype, seed=0), 0.9, True)


def test_budget_of_a_large_size():
    check_covariance(budget.random_matrix(6, 4097, torch.float32, seed=0), True)


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-20, 1e-19, 1e-18, 1e-17, 1e-12, 1e12, 1e18])
def test_huge_and_tiny_scales(scale):
    check_covariance(scale * budget.random_matrix(50, 30, torch.float32, seed=0), True)


@pytest.mark.parametrize("scale", [1e-310, 1e-150, 1e-30, 1e30, 1e150])
def test_huge_and_tiny_scales_in_float64(scale):
    check_covariance(scale * budget.random_matrix(50, 30, torch.float64, seed=0), True)


def test_budget_with_a_mean_far_from_zero():
    h = budget.random_matrix(1000, 40, torch.float32, seed=0) + 1000
    check_covariance(h, True)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(
    n=st.integers(0, 700),
    d=st.integers(1, 140),
    dtype=st.sampled_from(budget.DTYPES),
    layout=st.sampled_from(budget.LAYOUTS),
    decay=st.sampled_from([0.0, 0.3, 0.99, 1.0]),
    centered=st.booleans(),
)
def test_budget_of_random_shapes(n, d, dtype, layout, decay, centered):
    h = budget.random_matrix(n, d, dtype, seed=n * d, layout=layout if n else "contiguous")
    check_mixture(h, decay, centered)


def test_no_rows_give_zeros():
    cov, mean = ops.covariance(torch.empty(0, 3))
    assert torch.equal(cov, torch.zeros(3, 3))
    assert torch.equal(mean, torch.zeros(3))


def test_no_columns():
    cov, mean = ops.covariance(torch.empty(5, 0))
    assert cov.shape == (0, 0)
    assert mean.shape == (0,)


def poison(value, n=50, d=20):
    h = budget.random_matrix(n, d, torch.float32, seed=3)
    h[n // 2, d - 1] = value
    return h


REFUSED = {
    "nan": poison(torch.nan),
    "inf": poison(torch.inf),
    "-inf": poison(-torch.inf),
    "a square overflows": poison(1e30),
    "the sum of squares overflows": torch.full((50, 20), 1.5e18),
    "no rows": torch.empty(0, 20),
}


@pytest.mark.parametrize("h", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_a_refused_batch_changes_nothing_to_the_bit(h, decay):
    cov, mean = state(20, torch.float32)
    before = cov.clone(), mean.clone()
    assert not ops.covariance_(cov, mean, h, decay=decay)
    assert not reference.covariance_(*before, h, decay=decay)
    assert torch.equal(cov, before[0])
    assert torch.equal(mean, before[1])


def test_float16_does_not_overflow_where_float32_does_not():
    check_covariance(torch.full((50, 20), 6e4, dtype=torch.float16), True)


def test_float16_subnormals_and_specials_are_read_to_the_bit():
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = bits.view(dtype)[None]
        finite = x[:, x.isfinite()[0]]
        _, mean = ops.covariance(finite[:, :30000:3], centered=False)
        assert torch.equal(mean, finite[0, :30000:3].float())


def test_decay_zero_lets_no_nan_through():
    h = budget.random_matrix(30, 20, torch.float32, seed=0)
    cov, mean = torch.full((20, 20), torch.nan), torch.full((20,), torch.nan)
    assert ops.covariance_(cov, mean, h, decay=0.0)
    batch_cov, batch_mean = ops.covariance(h)
    torch.testing.assert_close(cov, batch_cov)
    assert torch.equal(mean, batch_mean)


def test_decay_one_changes_nothing_to_the_bit():
    h = budget.random_matrix(30, 20, torch.float32, seed=0)
    cov, mean = state(20, torch.float32)
    before = cov.clone(), mean.clone()
    assert ops.covariance_(cov, mean, h, decay=1.0)
    assert torch.equal(cov, before[0])
    assert torch.equal(mean, before[1])


def test_two_batches_mixed_equal_one_batch_of_both():
    first = budget.random_matrix(60, 20, torch.float64, seed=0)
    second = budget.random_matrix(40, 20, torch.float64, seed=1)
    cov, mean = ops.covariance(first)
    assert ops.covariance_(cov, mean, second, decay=0.6)
    both = ops.covariance(torch.cat([first, second]))
    torch.testing.assert_close((cov, mean), both, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("n", "d"), [(300, 500), (4096, 64), (5, 900), (300, 2100), (600, 150)])
def test_threads_do_not_change_a_bit(n, d):
    h = budget.random_matrix(n, d, torch.float32, seed=0)
    budget.assert_threads_do_not_change_a_bit(lambda: ops.covariance(h))


@budget.needs_kernel
def test_an_unknown_instruction_set_is_refused_by_name():
    run = "import torch, fused_so; fused_so.ops.covariance(torch.ones(2, 2))"
    result = subprocess.run(
        [sys.executable, "-c", run],
        env={**os.environ, "FUSED_SO_CPU": "sse9"},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "FUSED_SO_CPU must be amx, avx512, avx2 or portable, got 'sse9'" in result.stderr


MIXED = [
    (33, 20, torch.float32, "contiguous"),
    (1, 1, torch.float32, "contiguous"),
    (33, 20, torch.float32, "strided"),
    (50, 70, torch.float64, "transposed"),
    (33, 20, torch.bfloat16, "expanded"),
    (0, 5, torch.float32, "contiguous"),
    (33, 20, torch.float32, "contiguous"),
]
DECAYS = [0.9, 0.5, 0.9, 0.0, 0.9, 0.9, 1.0]


def layers():
    """Lists of running covariances and means, and of batches."""
    made = [
        (*state(d, budget.accumulate(dtype), seed=i + 1), budget.random_matrix(n, d, dtype, seed=i))
        for i, (n, d, dtype, _) in enumerate(MIXED)
    ]
    covs, means, _ = (list(side) for side in zip(*made, strict=True))
    hs = [
        budget.random_matrix(n, d, dtype, seed=i, layout=layout)
        for i, (n, d, dtype, layout) in enumerate(MIXED)
    ]
    return covs, means, hs


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("decays", [DECAYS, 0.9])
def test_layers_equal_calls_one_by_one_to_the_bit(decays, centered):
    # Which are held to the budget above.
    covs, means, hs = layers()
    hs[2][1, 3] = torch.nan
    before = [(cov.clone(), mean.clone()) for cov, mean in zip(covs, means, strict=True)]
    accepted = ops.covariance_(covs, tuple(means), hs, decay=decays, centered=centered)
    assert accepted.tolist() == [True, True, False, True, True, False, True]
    for i, one in enumerate(before):
        decay = decays[i] if isinstance(decays, list) else decays
        assert ops.covariance_(*one, hs[i], decay=decay, centered=centered) == accepted[i]
        assert torch.equal(covs[i], one[0])
        assert torch.equal(means[i], one[1])


@pytest.mark.parametrize("centered", [True, False])
def test_layers_of_the_reference_equal_its_calls_one_by_one(centered):
    covs, means, hs = layers()
    hs[2][1, 3] = torch.nan
    before = [(cov.clone(), mean.clone()) for cov, mean in zip(covs, means, strict=True)]
    accepted = reference.covariance_(covs, means, hs, decay=DECAYS, centered=centered)
    for i, one in enumerate(before):
        taken = reference.covariance_(*one, hs[i], decay=DECAYS[i], centered=centered)
        assert taken == accepted[i]
        assert torch.equal(covs[i], one[0])
        assert torch.equal(means[i], one[1])


@pytest.mark.parametrize(
    "run", [torch.ops.fused_so.covariance_list_, reference.covariance_], ids=["op", "reference"]
)
@pytest.mark.parametrize("short", ["cov", "mean", "h", "decay"])
def test_lists_of_unequal_length_raise_without_the_public_checks(run, short):
    lists = {
        "cov": [torch.ones(4, 4), torch.ones(4, 4)],
        "mean": [torch.ones(4), torch.ones(4)],
        "h": [torch.rand(6, 4), torch.rand(6, 4)],
        "decay": [0.5, 0.5],
    }
    lists[short] = lists[short][:1]
    with pytest.raises((RuntimeError, ValueError), match="must hold|is (shorter|longer) than"):
        run(lists["cov"], lists["mean"], lists["h"], decay=lists["decay"])


def test_opcheck_of_layers():
    covs, means, hs = layers()
    op = torch.ops.fused_so.covariance_list_.default
    torch.library.opcheck(op, (covs, means, hs), {"decay": DECAYS, "centered": False})


def test_compile_fullgraph_of_layers():
    eager, traced = layers(), layers()
    step = torch.compile(lambda c, m, h: ops.covariance_(c, m, h, decay=DECAYS), fullgraph=True)
    assert torch.equal(step(*traced), ops.covariance_(*eager, decay=DECAYS))
    for x, y in zip((*eager[0], *eager[1]), (*traced[0], *traced[1]), strict=True):
        assert torch.equal(x, y)


ONE_COV, ONE_MEAN = torch.ones(4, 4), torch.ones(4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"h": [torch.ones(6, 4)]},
            ValueError,
            "cov must hold 1 entries, one for each of h, got 2",
        ),
        ({"h": [torch.ones(6, 4), torch.ones(4)]}, ValueError, r"h\[1\] must have shape \(n, d\)"),
        ({"h": [torch.ones(6, 4), 1.0]}, TypeError, r"h\[1\] must be a Tensor, got float"),
        (
            {"h": [torch.ones(6, 4), torch.ones(6, 3)]},
            *(ValueError, r"cov\[1\] must have shape \(3, 3\), got \(4, 4\)"),
        ),
        (
            {"h": [torch.ones(6, 4), torch.ones(6, 4).double()]},
            *(TypeError, r"cov\[1\] must be torch.float64 for h\[1\] in torch.float64, got"),
        ),
        (
            {"h": [torch.ones(6, 4), torch.ones(6, 4, device="meta")]},
            *(ValueError, r"cov\[1\] must be on the device of h\[1\], meta, got cpu"),
        ),
        ({"mean": [torch.ones(4), torch.ones(8)[::2]]}, ValueError, r"mean\[1\] .* contiguous"),
        ({"mean": torch.ones(4)}, TypeError, "mean must be a list of tensors, got Tensor"),
        (
            {"cov": [ONE_COV, ONE_COV]},
            *(ValueError, r"cov\[0\] is updated .* not overlap cov\[1\] in memory, got 64 bytes"),
        ),
        (
            {"mean": [ONE_MEAN, ONE_MEAN]},
            *(ValueError, r"mean\[0\] is updated .* not overlap mean\[1\] in memory, got 16"),
        ),
        (
            {"mean": [ONE_MEAN, ONE_COV[2]], "cov": [ONE_COV, torch.ones(4, 4)]},
            *(ValueError, r"cov\[0\] is updated .* not overlap mean\[1\] in memory, got 16"),
        ),
        (
            {"h": [torch.rand(6, 4), ONE_MEAN.expand(6, 4)], "mean": [torch.ones(4), ONE_MEAN]},
            *(ValueError, r"mean\[1\] is updated .* not overlap h\[1\] in memory, got 16"),
        ),
        ({"decay": 1.5}, ValueError, "decay must be at least 0 and at most 1, got 1.5"),
        (
            {"decay": [0.5, 1.5]},
            ValueError,
            r"decay\[1\] must be at least 0 and at most 1, got 1.5",
        ),
        ({"decay": [0.5]}, ValueError, "decay must hold 2 entries, one for each of h, got 1"),
        ({"decay": "11"}, TypeError, "decay must be a number, got str"),
        ({"centered": 1}, TypeError, "centered must be True or False, got 1"),
        ({"h": [], "cov": [], "mean": []}, ValueError, "h must hold at least one tensor, got an"),
    ],
)
def test_bad_lists_change_nothing(change, error, message):
    arguments = {
        "cov": [torch.ones(4, 4), torch.ones(4, 4)],
        "mean": [torch.ones(4), torch.ones(4)],
        "h": [torch.rand(6, 4), torch.rand(6, 4)],
        "decay": 0.5,
    } | change
    states = [x for name in ("cov", "mean") for x in arguments[name]]
    before = [x.clone() for x in states]
    with pytest.raises(error, match=message):
        ops.covariance_(**arguments)
    assert all(torch.equal(x, y) for x, y in zip(states, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck(dtype):
    h = budget.random_matrix(7, 5, dtype, seed=0)
    cov, mean = state(5, torch.float32)
    torch.library.opcheck(torch.ops.fused_so.covariance.default, (h,), {"centered": False})
    torch.library.opcheck(torch.ops.fused_so.covariance_.default, (cov, mean, h), {"decay": 0.5})


def test_compile_fullgraph():
    h = budget.random_matrix(7, 5, torch.float32, seed=0)
    compiled = torch.compile(lambda h: ops.covariance(h), fullgraph=True)
    assert all(torch.equal(a, b) for a, b in zip(compiled(h), ops.covariance(h), strict=True))

    eager, traced = state(5, torch.float32), state(5, torch.float32)
    step = torch.compile(lambda c, m, h: ops.covariance_(c, m, h, decay=0.5), fullgraph=True)
    assert step(*traced, h).item() == ops.covariance_(*eager, h, decay=0.5).item()
    assert torch.equal(eager[0], traced[0])
    assert torch.equal(eager[1], traced[1])


@pytest.mark.parametrize(
    ("h", "error", "message"),
    [
        ([1.0], TypeError, "h must be a Tensor, got list"),
        (torch.ones(3), ValueError, r"h must have shape \(n, d\), got \(3,\)"),
        (torch.ones(3, 2, 2), ValueError, r"h must have shape \(n, d\), got \(3, 2, 2\)"),
        (torch.ones(3, 2, dtype=torch.int64), TypeError, "h must be float16.*got torch.int64"),
        (torch.ones(3, 2, dtype=torch.cfloat), TypeError, "h must be .* got torch.complex64"),
        (torch.ones(3, 2).to_sparse(), TypeError, "h must be a dense .* got layout"),
    ],
)
def test_bad_input(h, error, message):
    with pytest.raises(error, match=message):
        ops.covariance(h)


BAD_MIXTURES = [
    ({"cov": torch.ones(4, 3)}, ValueError, r"cov must have shape \(4, 4\), got \(4, 3\)"),
    ({"cov": torch.ones(3, 3)}, ValueError, r"cov must have shape \(4, 4\), got \(3, 3\)"),
    ({"mean": torch.ones(4, 1)}, ValueError, r"mean must have shape \(4,?\), got \(4, 1\)"),
    ({"h": torch.ones(4)}, ValueError, r"h must have shape \(n, d\), got \(4,\)"),
    ({"h": torch.ones(6, 4, device="meta")}, ValueError, "cov must be on the device of h, meta"),
    ({"h": torch.ones(6, 4, dtype=torch.float64)}, TypeError, "cov must be torch.float64 for h"),
    ({"cov": torch.ones(4, 4).half()}, TypeError, "cov must be torch.float32 .* got torch.float16"),
    ({"mean": torch.ones(4).double()}, TypeError, "mean must be torch.float32 .*torch.float64"),
    ({"cov": torch.ones(4, 8)[:, ::2]}, ValueError, r"cov .*contiguous, got strides \(8, 2\)"),
    ({"mean": torch.ones(8)[::2]}, ValueError, r"mean .*contiguous, got strides \(2,\)"),
    ({"decay": -0.1}, ValueError, "decay must be at least 0 and at most 1, got -0.1"),
    ({"decay": 1.5}, ValueError, "decay must be at least 0 and at most 1, got 1.5"),
    ({"decay": float("nan")}, ValueError, "decay must be .* got nan"),
    ({"decay": "0.5"}, TypeError, "decay must be a number, got str"),
    (
        {"cov": ONE_COV, "mean": ONE_COV[1]},
        *(ValueError, "cov is updated in place and must not overlap mean in memory, got 16 bytes"),
    ),
    (
        {"cov": ONE_COV, "h": ONE_COV[1:]},
        *(ValueError, "cov is updated in place and must not overlap h in memory, got 48 bytes"),
    ),
    ({"mean": ONE_MEAN, "h": ONE_MEAN[None]}, ValueError, "mean is .* not overlap h in memory"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_MIXTURES)
def test_bad_mixture_changes_nothing(change, error, message):
    arguments = {"cov": torch.ones(4, 4), "mean": torch.ones(4), "h": torch.rand(6, 4)}
    arguments |= {"decay": 0.5} | change
    before = {name: arguments[name].clone() for name in ("cov", "mean")}
    with pytest.raises(error, match=message):
        ops.covariance_(**arguments)
    assert all(torch.equal(arguments[name], before[name]) for name in before)
