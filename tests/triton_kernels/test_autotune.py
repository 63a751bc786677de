"""The opt-in search: every candidate computes the same, and nothing is timed without it."""

import importlib
import itertools

import pytest
import torch

from fused_so import _extension
from fused_so.triton_kernels import _autotune, _product
from tests.ops import budget, checks
from tests.triton_kernels.device import DEVICE, moved


def module(name):
    """The function of the same name hides it."""
    return importlib.import_module(f"fused_so.triton_kernels.{name}")


covariances, grams = module("covariance"), module("grad_gram")
TILES = {
    "covariance": (covariances.CONFIGS, covariances.MORE_CONFIGS),
    "product": (_product.CONFIGS, _product.MORE_CONFIGS),
}
OPS = ("covariance_", "centered_grad", "precondition", "grad_gram", "jacobian_backprop")
GRAM_SIZES = [(20, 65), (3, 130)]


def candidates(op, dtype):
    """The search's, of the type that is multiplied."""
    if op == "grad_gram":
        return grams.candidates(70, dtype)
    tiles = TILES["covariance" if op == "covariance_" else "product"]
    return list(itertools.chain.from_iterable(configs[dtype] for configs in tiles))


class Clock:
    """In place of the clock: the candidate that is wished for is the fastest.

    Every trial is made, or with `brief` that one alone."""

    def __init__(self):
        self.tried, self.wished, self.brief = [], None, False

    def __call__(self, launch, candidate):
        if not self.brief or candidate == self.wished:
            launch(candidate)
        self.tried.append(candidate)
        return float(candidate != self.wished)


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(_extension, "AUTOTUNE", True)
    monkeypatch.setattr(_autotune, "choices", {})
    monkeypatch.setattr(_autotune, "milliseconds", Clock())
    return _autotune.milliseconds


@pytest.fixture
def launched(monkeypatch):
    """What every launch was made with, in order: a plan or, for the covariance, a tile."""
    seen = []

    def recorded(launch):
        def record(*arguments):
            seen.append(arguments[-1])
            return launch(*arguments)

        return record

    for op in OPS:
        kernels = module(op.removesuffix("_"))
        monkeypatch.setattr(kernels, "_launch", recorded(kernels._launch))
    return seen


def covariance_(n, d, dtype, decay=0.7, bad=None):
    """(accepted, cov, mean) and what they were before."""
    results = budget.accumulate(dtype)
    h = budget.random_matrix(n, d, dtype, seed=1)
    if bad is not None:
        h[n // 2, d // 2] = bad
    cov, mean = torch.eye(d, dtype=results), torch.ones(d, dtype=results)
    state = cov.to(DEVICE), mean.to(DEVICE)
    accepted = covariances.covariance_(*state, moved(h), decay=decay)
    return accepted.cpu(), state[0].cpu(), state[1].cpu(), h


def check(op, dtype):
    """The op at a size off the tiles, held to its budget."""
    if op == "covariance_":
        accepted, cov, mean, h = covariance_(50, 70, dtype)
        assert accepted

        def oracle(h):
            m = h.mean(0)
            shift, eye = 1 - m, torch.eye(70, dtype=h.dtype)
            batch = (h - m).T @ (h - m) / 50
            return 0.7 * eye + 0.3 * batch + 0.21 * torch.outer(shift, shift), 0.7 + 0.3 * m

        results = [h.to(cov.dtype)]
        if dtype in (torch.float16, torch.bfloat16):
            # Deviations are rounded to the type of h: plain PyTorch in that type is the measure.
            exact = oracle(h.double())
            limit = 4 * torch.finfo(dtype).eps * exact[0].abs().max()
            assert (cov - exact[0]).abs().max() <= limit
            assert (mean - exact[1]).abs().max() <= 1e-5
        else:
            budget.assert_within_budget([cov, mean], oracle, results, budget.row_orders)
    elif op == "centered_grad":

        def run(*arguments):
            return [x.cpu() for x in module(op).centered_grad(*map(moved, arguments))]

        checks.centered_grad(run, 300, 40, 70, dtype)
    elif op == "precondition":

        def run(*arguments, output_inverse, alpha):
            scale = torch.full((), alpha, dtype=arguments[2].dtype, device=DEVICE)
            options = {"output_inverse": moved(output_inverse), "alpha": scale}
            return [x.cpu() for x in module(op).precondition(*map(moved, arguments), **options)]

        checks.precondition(run, 40, 70, dtype, sides="both", alpha=0.3)
    elif op == "grad_gram":

        def run(gs, hs, *, centered, biases):
            sides = [[moved(x) for x in side] for side in (gs, hs)]
            return grams.grad_gram(*sides, centered=centered, biases=[True] * len(gs)).cpu()

        checks.grad_gram(run, 70, GRAM_SIZES, dtype)
    else:

        def run(arguments):
            jac, weight, dphi, direction = map(moved, arguments)
            results = module(op).jacobian_backprop(jac, weight, dphi=dphi, direction=direction)
            return [x.cpu() for x in results if x.numel()]

        checks.jacobian_backprop(run, 5, 7, 300, 70, dtype, given="direction")


FORCED = [
    (op, dtype, number)
    for op in OPS
    for dtype in budget.DTYPES
    if op != "precondition" or dtype in (torch.float32, torch.float64)
    for number in range(len(candidates(op, dtype)))
]


@pytest.mark.parametrize(("op", "dtype", "number"), FORCED)
def test_budget_of_every_candidate(op, dtype, number, clock, launched):
    clock.wished, clock.brief = candidates(op, dtype)[number], True
    check(op, dtype)
    # All were tried, once for every search, and the fastest is what was launched in the end.
    searches = len(_autotune.choices)
    assert sorted(clock.tried) == sorted(candidates(op, dtype) * searches)
    assert set(_autotune.choices.values()) == {clock.wished}
    plan = launched[-1]
    if op == "grad_gram":
        plan = plan.config, plan.depth == 0
    assert (plan if op in ("covariance_", "grad_gram") else plan.config) == clock.wished


@pytest.mark.parametrize("op", OPS)
def test_nothing_is_timed_by_default(op, monkeypatch, launched):
    def never(*_):
        raise AssertionError("timed")

    monkeypatch.setattr(_extension, "AUTOTUNE", False)
    for name in ("milliseconds", "do_bench"):
        monkeypatch.setattr(_autotune, name, never)
    monkeypatch.setattr(_autotune, "choices", {})
    check(op, torch.float32)
    assert not _autotune.choices
    # Two products of the two-sided step, and one launch of each of the others.
    assert len(launched) == (2 if op == "precondition" else 1)


@pytest.mark.parametrize("decay", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
def test_the_search_leaves_what_is_updated_in_place_as_one_update_does(decay, bad, clock):
    found = covariance_(50, 70, torch.float32, decay, bad)
    assert len(clock.tried) == 4
    clock.wished = covariances.heuristic_config(70, torch.float32)
    _extension.AUTOTUNE = False
    expected = covariance_(50, 70, torch.float32, decay, bad)
    assert all(torch.equal(x, y) for x, y in zip(found[:3], expected[:3], strict=True))
    assert found[0].item() is (bad is None)


def test_a_batch_that_will_be_refused_is_searched_on_as_any_other(clock, monkeypatch):
    # Refused at once, it would take every candidate the same time.
    launch, may_be_refused = covariances._launch, []

    def record(*arguments):
        may_be_refused.append(arguments[-2] is not None)
        launch(*arguments)

    monkeypatch.setattr(covariances, "_launch", record)
    accepted, *_ = covariance_(50, 70, torch.float32, bad=float("nan"))
    assert not accepted
    assert may_be_refused == [False] * 4 + [True]


def test_the_search_adds_a_layer_once(clock):
    # Nine layers take two launches, of which the second adds to what the first has left.
    gs, hs = checks.layers(20, [(5, 6)] * 9, torch.float32)
    gs, hs = ([moved(x) for x in side] for side in (gs, hs))
    options = {"centered": False, "biases": [True] * 9}
    found = grams.grad_gram(gs, hs, **options)
    assert len(_autotune.choices) == 2
    _extension.AUTOTUNE = False
    assert torch.equal(found, grams.grad_gram(gs, hs, **options))


def search(n=100, dtype=torch.float32, device="cpu", kernel="k"):
    choices = {"launch": lambda candidate: None, "device": torch.device(device)}
    return _autotune.fastest((kernel, dtype), (n,), "usual", ["other", "usual", "third"], **choices)


@pytest.fixture
def highest():
    yield
    torch.set_float32_matmul_precision("highest")


def test_a_choice_is_made_once_for_each_kernel_type_precision_device_and_class(clock, highest):
    clock.wished = "third"
    assert search() == "third"
    assert clock.tried == ["usual", "other", "third"]
    clock.wished = "other"
    for n in (65, 100, 128):
        assert search(n) == "third"
    assert len(clock.tried) == 3
    for changed in ({"n": 129}, {"n": 64}, {"dtype": torch.float64}, {"kernel": "l"}):
        assert search(**changed) == "other"
    assert search(device="meta") == "other"
    torch.set_float32_matmul_precision("high")
    assert search() == "other"
    assert len(clock.tried) == 3 * 7
    # Of equals it is the heuristic's.
    clock.wished = None
    assert search(n=1) == search(n=0) == "usual"
    assert len(clock.tried) == 3 * 8


def test_while_a_graph_is_captured_nothing_is_timed(clock, monkeypatch):
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    clock.wished = "third"
    assert search(device="cuda:3") == "usual"
    assert not clock.tried
    assert not _autotune.choices
    capturing[0] = False
    assert search(device="cuda:3") == "third"
    capturing[0] = True
    assert search(device="cuda:3") == "third"
    assert search(device="cuda:2") == "usual"


@pytest.mark.parametrize("error", [_autotune.OutOfResources(1, 2, "x"), torch.OutOfMemoryError()])
def test_what_does_not_fit_the_gpu_is_not_chosen(error, monkeypatch):
    def do_bench(call, **_):
        return 2.0 if call() == "small" else 1.0

    def launch(candidate):
        if candidate == "large":
            raise error
        return candidate

    monkeypatch.setattr(_autotune, "do_bench", do_bench)
    assert _autotune.milliseconds(launch, "small") == 2.0
    assert _autotune.milliseconds(launch, "large") == float("inf")
    with pytest.raises(ZeroDivisionError):
        _autotune.milliseconds(lambda candidate: 1 / 0, "small")


def test_the_clock_itself_times_the_launch(monkeypatch):
    seen = []

    def do_bench(call, **options):
        seen.append(options["return_mode"])
        return call()

    monkeypatch.setattr(_autotune, "do_bench", do_bench)
    assert _autotune.milliseconds(lambda candidate: 3 * candidate, 5) == 15
    assert seen == ["median"]


def test_the_variable(monkeypatch):
    monkeypatch.delenv("FUSED_SO_AUTOTUNE", raising=False)
    assert _extension.autotune() is False
    for value, wanted in (("", False), ("0", False), ("1", True)):
        monkeypatch.setenv("FUSED_SO_AUTOTUNE", value)
        assert _extension.autotune() is wanted


def test_another_value_of_the_variable(monkeypatch):
    monkeypatch.setenv("FUSED_SO_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="FUSED_SO_AUTOTUNE must be '0' or '1', got 'yes'"):
        _extension.autotune()


def test_large_results_are_not_cut_into_pieces():
    # The pieces of every matrix are as large as the result.
    tiles = {whole for _, whole in grams.candidates(46400, torch.float32)}
    assert tiles == {True}
    assert {whole for _, whole in grams.candidates(512, torch.float32)} == {True, False}
