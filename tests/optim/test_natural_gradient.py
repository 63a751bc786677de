"""NaturalGradient against dense solves, and as a torch optimizer among others."""

from __future__ import annotations

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

import fused_so
from tests.optim.dense import (
    DOUBLE,
    chain,
    example_gradients,
    flat,
    function,
    gauss_newton,
    loss_hessian,
)
from tests.optim.test_metric import LIKELIHOODS, Convolutions, targets_of

EXACT = {"max_iterations": 400, "tolerance": 1e-13}
LOSSES = {
    "gaussian": lambda out, y: (out - y).square().mean() / (2 * 0.7**2),
    "bernoulli": lambda out, y: (
        nn.functional.binary_cross_entropy_with_logits(out, y, reduction="sum") / len(out)
    ),
    "bernoulli, mean of entries": nn.functional.binary_cross_entropy_with_logits,
    "categorical": nn.functional.cross_entropy,
    "categorical, sum": lambda out, y: nn.functional.cross_entropy(out, y, reduction="sum"),
}


def problem(name="gaussian", *, n=6, model=None):
    model = chain(5, 4, 3) if model is None else model
    x, y = torch.randn(n, 5, dtype=DOUBLE), targets_of(LIKELIHOODS[name])
    return model, x, y


def backward(opt, model, x, y, name="gaussian", **call):
    opt.zero_grad()
    loss = LOSSES[name](model(x, **call), y)
    loss.backward()
    return loss


def step_of(opt, model, run=None):
    """The change of the parameters, over -lr."""
    before = flat(model.parameters())
    (run or opt.step)()
    return (before - flat(model.parameters())) / opt.param_groups[0]["lr"]


def solved(matrix, damping, gradient):
    return torch.linalg.solve(matrix + damping * torch.eye(len(gradient), dtype=DOUBLE), gradient)


def empirical_fisher(model, likelihood, x, y):
    one = type(likelihood)(reduction="sum")
    rows = example_gradients(
        model,
        lambda out: torch.stack([one.value(out[i : i + 1], y[i : i + 1]) for i in range(len(y))]),
        x,
    )
    return rows.T @ rows / likelihood.normalizer(model(x), y)


def gradient_of(model):
    return flat(p.grad for p in model.parameters())


@pytest.mark.parametrize("solver", ["cg", "minres_qlp", "gram"])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_step_is_the_dense_damped_solution(name, solver):
    model, x, y = problem(name)
    options = {} if solver == "gram" else EXACT
    likelihood = LIKELIHOODS[name]
    opt = fused_so.NaturalGradient(
        model, 0.5, likelihood=likelihood, solver=solver, damping=0.03, **options
    )
    backward(opt, model, x, y, name)
    gradient = gradient_of(model)
    matrix = gauss_newton(model, lambda out: likelihood.value(out, y), x)
    got = step_of(opt, model)
    torch.testing.assert_close(got, solved(matrix, 0.03, gradient), rtol=1e-10, atol=1e-10)
    assert torch.equal(gradient_of(model), gradient)


@pytest.mark.parametrize("solver", ["cg", "gram"])
@pytest.mark.parametrize("change", ["nothing", "clip", "penalty", "accumulation"])
@pytest.mark.parametrize("name", ["bernoulli", "bernoulli, mean of entries", "categorical, sum"])
def test_empirical_fisher_step_is_the_dense_one(name, change, solver):
    model, x, y = problem(name)
    likelihood = LIKELIHOODS[name]
    options = {} if solver == "gram" else EXACT
    opt = fused_so.NaturalGradient(
        model, 1.0, likelihood=likelihood, solver=solver, metric="empirical_fisher", damping=0.02,
        **options,
    )  # fmt: skip
    if change == "accumulation":
        opt.zero_grad()
        weights = (1, 1, 1) if likelihood.reduction == "sum" else (1 / 6, 3 / 6, 2 / 6)
        for rows, weight in zip(([0], [1, 2, 3], [4, 5]), weights, strict=True):
            (weight * LOSSES[name](model(x[rows]), y[rows])).backward()
    else:
        backward(opt, model, x, y, name)
    if change == "clip":
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    if change == "penalty":
        (0.1 * model[0].weight.square().sum()).backward()
    gradient = gradient_of(model)
    matrix = empirical_fisher(model, likelihood, x, y)
    got = step_of(opt, model)
    torch.testing.assert_close(got, solved(matrix, 0.02, gradient), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("metric", ["empirical_fisher", "gauss_newton"])
@pytest.mark.parametrize("kept", [["0.weight", "2.weight"], ["0.bias", "2.weight", "2.bias"]])
def test_gram_solves_for_its_own_parameters_alone(kept, metric, frozen):
    """Others, trained elsewhere or not at all, have no part in the matrix."""
    steps = []
    for solver in ("gram", "cg"):
        torch.manual_seed(4)
        model, x, y = problem("categorical")
        named = dict(model.named_parameters())
        for name, p in named.items():
            p.requires_grad_(name in kept or not frozen)
        opt = fused_so.NaturalGradient(
            model, 1.0, likelihood=fused_so.Categorical(), solver=solver, metric=metric,
            damping=0.02, params=[named[name] for name in kept],
            **({} if solver == "gram" else EXACT),
        )  # fmt: skip
        backward(opt, model, x, y, "categorical")
        steps.append(step_of(opt, model))
    torch.testing.assert_close(*steps, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("damping", [1e-2, 1e-3, 1e-4, 1e-5])
def test_gram_in_float32_loses_no_more_than_a_dense_solve(damping):
    model, likelihood = chain(20, 30, 3), fused_so.Gaussian(reduction="batchmean")
    single = copy.deepcopy(model).float()
    model.load_state_dict(single.state_dict())
    x, y = torch.randn(64, 20), torch.randn(64, 3)
    loss = 0.5 * (model(x.double()) - y).square().sum() / 64
    gradient = flat(torch.autograd.grad(loss, list(model.parameters())))
    matrix = gauss_newton(model, lambda out: likelihood.value(out, y.double()), x.double())
    matrix += damping * torch.eye(len(matrix), dtype=DOUBLE)
    expected = torch.linalg.solve(matrix, gradient)
    before = flat(single.parameters())
    opt = fused_so.NaturalGradient(
        single, 1.0, likelihood=likelihood, solver="gram", damping=damping
    )
    opt.zero_grad()
    (0.5 * (single(x) - y).square().sum() / 64).backward()
    dense = torch.linalg.solve(matrix.float(), flat(p.grad for p in single.parameters()))
    opt.step()
    got = before - flat(single.parameters())
    # and the rounding of the parameters that a step is added to
    rounding = torch.finfo(torch.float32).eps * (before.norm() + got.norm())
    assert (got - expected).norm() <= (dense - expected).norm() + rounding


def test_sampled_fisher_by_gram_is_the_same_draw_by_cg():
    steps = []
    for solver in ("gram", "cg"):
        torch.manual_seed(3)
        model, x, y = problem("categorical")
        opt = fused_so.NaturalGradient(
            model, 1.0, likelihood=fused_so.Categorical(), solver=solver, metric="sampled_fisher",
            damping=0.05, **({} if solver == "gram" else EXACT),
        )  # fmt: skip
        backward(opt, model, x, y, "categorical")
        steps.append(step_of(opt, model))
    torch.testing.assert_close(*steps, rtol=1e-10, atol=1e-11)


def test_hessian_step_is_newton_s_and_minres_qlp_takes_it_indefinite():
    model, x, y = problem()
    likelihood = LIKELIHOODS["gaussian"]
    opt = fused_so.NaturalGradient(
        model, 1.0, likelihood=likelihood, metric="hessian", solver="minres_qlp", damping=0.0,
        max_iterations=2000, tolerance=1e-12,
    )  # fmt: skip
    backward(opt, model, x, y)
    gradient = gradient_of(model)
    matrix = loss_hessian(model, lambda out: likelihood.value(out, y), x)
    assert torch.linalg.eigvalsh(matrix).min() < -1e-3
    expected = torch.linalg.solve(matrix, gradient)
    before = flat(model.parameters())
    if expected @ gradient > 0:
        torch.testing.assert_close(step_of(opt, model), expected, rtol=1e-6, atol=1e-8)
    else:
        with pytest.warns(UserWarning, match="no descent"):
            opt.step()
        assert torch.equal(flat(model.parameters()), before)
        torch.testing.assert_close(flat(opt.last_solution.x), expected, rtol=1e-6, atol=1e-8)


def test_any_module_and_keyword_arguments():
    model = Convolutions()
    model.unused.requires_grad_(False)
    _, x, y = problem("categorical", model=model)
    likelihood = fused_so.Categorical()
    opt = fused_so.NaturalGradient(
        model, 1.0, likelihood=nn.CrossEntropyLoss(), damping=0.01, **EXACT
    )
    backward(opt, model, x, y, "categorical", gain=2.0)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradient, before = flat(p.grad for p in trained), flat(trained)

    class Gained(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x, gain=2.0)

    buffers = {name: b.clone() for name, b in model.named_buffers()}
    matrix = gauss_newton(Gained(), lambda out: likelihood.value(out, y), x)
    keep = torch.cat([torch.full((p.numel(),), p.requires_grad) for p in model.parameters()])
    opt.step()
    got = before - flat(trained)
    expected = solved(matrix[keep][:, keep], 0.01, gradient)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())


@pytest.mark.filterwarnings("ignore:.*the solution is no descent")
@pytest.mark.parametrize("metric", ["gauss_newton", "hessian"])
def test_a_transformer_s_layer_as_it_is(metric):
    """Flash attention, which a CPU takes too, has no second derivative."""
    attending = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, dtype=DOUBLE)
    model = nn.Sequential(attending, nn.Flatten(), nn.Linear(12, 3, dtype=DOUBLE))
    x, y = torch.randn(6, 3, 4, dtype=DOUBLE), torch.randint(3, (6,))
    opt = fused_so.NaturalGradient(
        model, 1.0, likelihood=fused_so.Categorical(), metric=metric, solver="minres_qlp",
        damping=0.1, max_iterations=2000, tolerance=1e-12,
    )  # fmt: skip
    backward(opt, model, x, y, "categorical")
    gradient = gradient_of(model)
    value = lambda out: nn.functional.cross_entropy(out, y)  # noqa: E731
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        if metric == "gauss_newton":
            matrix = gauss_newton(model, value, x)
        else:  # torch.func's second derivative of this layer is not that of finite differences
            call, at = function(model, x)
            matrix = torch.autograd.functional.hessian(lambda v: value(call(v)), at)
    opt.step()
    expected = solved(matrix, 0.1, gradient)
    torch.testing.assert_close(flat(opt.last_solution.x), expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("solver", ["cg", "gram"])
@pytest.mark.parametrize("form", ["step", "tuple", "dict", "iterable", "attribute"])
def test_metric_inputs_are_what_the_metric_is_of(form, solver):
    model, x, y = problem("categorical")
    other = torch.randn(9, 5, dtype=DOUBLE)
    options = {} if solver == "gram" else EXACT
    if form == "iterable":
        options = {**options, "metric_inputs": [other]}
    opt = fused_so.NaturalGradient(
        model, 1.0, likelihood=fused_so.Categorical(), solver=solver, damping=0.02, **options
    )
    if form == "attribute":
        opt.metric_inputs = [other]
    given = {"step": other, "tuple": (other,), "dict": {"input": other}}.get(form)
    backward(opt, model, x, y, "categorical")
    gradient = gradient_of(model)
    zeros = torch.zeros(9, dtype=torch.int64)
    matrix = gauss_newton(model, lambda out: nn.functional.cross_entropy(out, zeros), other)
    got = step_of(opt, model, lambda: opt.step(metric_inputs=given))
    torch.testing.assert_close(got, solved(matrix, 0.02, gradient), rtol=1e-10, atol=1e-10)
    own = gauss_newton(model, lambda out: nn.functional.cross_entropy(out, y), x)
    assert (got - solved(own, 0.02, gradient)).norm() > 0.01 * got.norm()


def test_metric_inputs_go_round_and_round_and_a_step_s_own_come_first():
    model, x, y = problem()
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    loader = [torch.randn(k, 5, dtype=DOUBLE) for k in (2, 3)]
    opt = fused_so.NaturalGradient(model, 0.1, likelihood=fused_so.Gaussian(), metric_inputs=loader)
    for given in (None, None, torch.randn(7, 5, dtype=DOUBLE), None):
        backward(opt, model, x, y)
        opt.step(metric_inputs=given)
    assert seen == [6, 2, 6, 3, 6, 7, 6, 2]
    opt.metric_inputs = iter(loader[:1])
    backward(opt, model, x, y)
    opt.step()
    backward(opt, model, x, y)
    with pytest.raises(ValueError, match="metric_inputs must hold a batch for every step, but"):
        opt.step()


def test_a_kronecker_factor_preconditions():
    """One linear layer and a Gaussian: the Gauss-Newton matrix is A (x) I, and K-FAC is exact."""
    model = nn.Linear(5, 3, dtype=DOUBLE)
    x = torch.randn(40, 5, dtype=DOUBLE) * torch.logspace(0, 2, 5, dtype=DOUBLE) + 1
    y = torch.randn(40, 3, dtype=DOUBLE)
    cov, mean = fused_so.ops.covariance(x)
    inverse, _ = fused_so.ops.damped_inverse(cov, 0.0)

    def kronecker(gradients):
        weight, bias = gradients
        return list(fused_so.ops.precondition(weight, bias, mean, inverse))

    steps = []
    for preconditioner in (kronecker, None):
        twin = copy.deepcopy(model)
        opt = fused_so.NaturalGradient(
            twin, 1.0, likelihood=fused_so.Gaussian(reduction="batchmean"), damping=0.0,
            preconditioner=preconditioner, tolerance=1e-10, max_iterations=100,
        )  # fmt: skip
        opt.zero_grad()
        (0.5 * (twin(x) - y).square().sum() / 40).backward()
        opt.step()
        steps.append(opt.last_solution.iterations)
        # Newton's step on a quadratic function ends in its minimum.
        rows = torch.cat([x, x.new_ones(40, 1)], 1)
        best = torch.linalg.lstsq(rows, y).solution
        torch.testing.assert_close(twin.weight, best[:5].T, rtol=1e-6, atol=1e-8)
    assert steps[0] == 1
    assert steps[1] > 5


def test_warm_start_takes_the_last_solution():
    model, x, y = problem()
    opt = fused_so.NaturalGradient(
        model, 1e-9, likelihood=LIKELIHOODS["gaussian"], max_iterations=100, tolerance=1e-7,
        warm_start=True,
    )  # fmt: skip
    iterations = []
    for _ in range(2):
        backward(opt, model, x, y)
        opt.step()
        iterations.append(opt.last_solution.iterations)
    # The parameters have hardly moved: there is hardly anything left to solve.
    assert iterations[1] <= 2 < iterations[0]


@pytest.mark.parametrize("solver", ["cg", "gram"])
def test_damping_follows_the_reduction_ratio(solver):
    # A linear model with squared errors is quadratic: the ratio is 1 at every lr below 2.
    model = nn.Linear(5, 3, dtype=DOUBLE)
    x, y = torch.randn(20, 5, dtype=DOUBLE), torch.randn(20, 3, dtype=DOUBLE)
    opt = fused_so.NaturalGradient(
        model, 1.0, likelihood=fused_so.Gaussian(reduction="batchmean"), solver=solver,
        damping=0.6, adapt_damping_every=2, **({} if solver == "gram" else EXACT),
    )  # fmt: skip
    scale, kept, calls = 1.0, [], []

    def closure():
        calls.append(1)
        opt.zero_grad()
        loss = scale * 0.5 * (model(x) - y).square().sum() / 20
        loss.backward()
        return loss

    for _ in range(3):
        opt.step(closure)
        kept.append(opt.damping)
    assert kept == pytest.approx([0.4, 0.4, 0.8 / 3])
    assert len(calls) == 5
    # A loss ten times as curved as the likelihood says: the step overshoots.
    scale = 10.0
    opt.step(closure)
    gradient = None

    def spying():
        nonlocal gradient
        loss = closure()
        gradient = gradient_of(model) if gradient is None else gradient
        return loss

    before = opt.damping
    opt.step(spying)
    assert opt.damping == before * 3 / 2
    assert torch.equal(gradient_of(model), gradient)  # that of the step, not of the look after it
    saved = opt.state_dict()
    assert saved["param_groups"][0]["damping"] == opt.damping


@pytest.mark.parametrize("lrs", [(0.7, 0.7), (1.5, 0.3)])
@pytest.mark.parametrize(
    ("solver", "options"),
    [
        ("cg", {"max_iterations": 3}),
        ("cg", {"max_iterations": 2, "warm_start": True}),
        ("cg", {"max_iterations": 3, "metric": "hessian", "damping": 1.0}),
        ("cg", {"max_norm": 0.02}),
        ("minres_qlp", {"max_iterations": 3}),
        ("gram", {}),
        ("gram", {"metric": "empirical_fisher"}),
    ],
)
def test_the_reduction_ratio_is_that_of_the_step_really_taken(solver, options, lrs):
    """Against the dense quadratic model, for steps that are no exact solution times one lr."""
    model, x, y = problem("categorical")
    likelihood = LIKELIHOODS["categorical"]
    groups = [
        {"params": model[k].parameters(), "lr": lr} for k, lr in zip((0, 2), lrs, strict=True)
    ]
    opt = fused_so.NaturalGradient(
        model, likelihood=likelihood, solver=solver, params=groups, adapt_damping_every=2,
        **{"damping": 0.03, "tolerance": 0.0, **options},
    )  # fmt: skip
    assert opt.reduction_ratio is None
    losses = []
    value = lambda out: likelihood.value(out, y)  # noqa: E731
    matrix_of = {
        "gauss_newton": lambda m: gauss_newton(m, value, x),
        "hessian": lambda m: loss_hessian(m, value, x),
        "empirical_fisher": lambda m: empirical_fisher(m, likelihood, x, y),
    }[options.get("metric", "gauss_newton")]

    def closure():
        losses.append(backward(opt, model, x, y, "categorical").detach())
        return losses[-1]

    for k in range(3):
        losses.clear()
        before = flat(model.parameters())
        matrix = matrix_of(model)
        ratio = opt.reduction_ratio
        opt.step(closure)
        if k == 1:
            assert (len(losses), opt.reduction_ratio) == (1, ratio)
            continue
        delta = before - flat(model.parameters())
        expected = gradient_of(model) @ delta - 0.5 * delta @ matrix @ delta
        ratio = ((losses[0] - losses[1]) / expected).item()
        assert opt.reduction_ratio == pytest.approx(ratio, rel=1e-8)


def test_a_step_that_promises_no_fall_raises_the_damping():
    """Learning rates of two groups may turn a descent upwards."""
    model = nn.Linear(2, 1, bias=False, dtype=DOUBLE)
    other = nn.Linear(1, 1, bias=False, dtype=DOUBLE)

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = model, other

        def forward(self, x):
            return self.a(x[:, :2]) + self.b(x[:, 2:])

    # Nearly the same input: of the solution's two parts one goes up.
    x = torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.1, 1.1]], dtype=DOUBLE)
    y = torch.tensor([[1.0], [-2.0]], dtype=DOUBLE)
    net = Sum()
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
    gradients = torch.autograd.grad(0.5 * (net(x) - y).square().sum() / 2, list(net.parameters()))
    matrix = x.T @ x / 2 + 1e-3 * torch.eye(3, dtype=DOUBLE)
    solution = torch.linalg.solve(matrix, flat(gradients))
    slopes = [solution[:2] @ flat(gradients)[:2], solution[2:] @ flat(gradients)[2:]]
    assert min(slopes) < 0 < max(slopes)
    lrs = [0.1 if slope < 0 else 0.0 for slope in slopes]
    groups = [
        {"params": m.parameters(), "lr": lr} for m, lr in zip((net.a, net.b), lrs, strict=True)
    ]
    opt = fused_so.NaturalGradient(
        net, likelihood=fused_so.Gaussian(reduction="batchmean"), params=groups, damping=1e-3,
        adapt_damping_every=1, **EXACT,
    )  # fmt: skip

    def closure():
        opt.zero_grad()
        loss = 0.5 * (net(x) - y).square().sum() / 2
        loss.backward()
        return loss

    opt.step(closure)
    assert opt.reduction_ratio == -math.inf
    assert opt.damping == pytest.approx(1.5e-3)


def test_line_search_halves_the_step_until_the_loss_falls():
    model, x, y = problem()
    likelihood = LIKELIHOODS["gaussian"]
    options = {"likelihood": likelihood, "damping": 0.01, **EXACT}
    bare = copy.deepcopy(model)
    opt = fused_so.NaturalGradient(model, 64.0, line_search=True, **options)
    twin = fused_so.NaturalGradient(bare, 1.0, **options)
    backward(twin, bare, x, y)
    direction = step_of(twin, bare)
    start = flat(model.parameters())
    losses = []

    def closure():
        losses.append(backward(opt, model, x, y).item())
        return losses[-1]

    opt.step(closure)
    scale = 64 / 2 ** (len(losses) - 2)
    torch.testing.assert_close(start - flat(model.parameters()), scale * direction)
    assert len(losses) > 2
    promised = gradient_of(model) @ direction
    assert losses[-1] <= losses[0] - 0.01 * scale * promised
    # every longer step was refused for a reason
    for k, loss in enumerate(losses[1:-1]):
        assert loss > losses[0] - 0.01 * 64 / 2**k * promised


def test_a_line_search_that_finds_nothing_leaves_the_parameters():
    model, x, y = problem()
    opt = fused_so.NaturalGradient(
        model, 1.0, likelihood=LIKELIHOODS["gaussian"], damping=0.2, line_search=True,
        adapt_damping_every=1,
    )  # fmt: skip
    before, falls = flat(model.parameters()), iter([1.0] + [2.0] * 20)

    def closure():
        backward(opt, model, x, y)
        return next(falls)

    with pytest.warns(UserWarning, match="the loss did not fall along the step"):
        opt.step(closure)
    assert torch.equal(flat(model.parameters()), before)
    assert opt.damping == pytest.approx(0.3)


def test_a_step_that_is_halved_to_nothing_has_not_fallen():
    model, x, y = problem()
    torch.nn.utils.vector_to_parameters(torch.ones(39, dtype=DOUBLE), model.parameters())
    opt = fused_so.NaturalGradient(
        model, 1e-15, likelihood=LIKELIHOODS["gaussian"], damping=0.2, line_search=True,
        adapt_damping_every=1,
    )  # fmt: skip
    losses = []

    def closure():
        backward(opt, model, x, y)
        losses.append(1.0 if (flat(model.parameters()) == 1).all() else 2.0)
        return losses[-1]

    with pytest.warns(UserWarning, match="the loss did not fall along the step"):
        opt.step(closure)
    assert losses[:2] == [1.0, 2.0]
    assert losses[-1] == 1.0
    assert opt.damping == pytest.approx(0.3)


def test_a_step_into_nan_is_taken_back_where_the_loss_is_looked_at():
    model, x, y = problem()
    opt = fused_so.NaturalGradient(
        model, 1.0, likelihood=LIKELIHOODS["gaussian"], damping=0.2, adapt_damping_every=1
    )
    before, values = flat(model.parameters()), iter([1.0, math.nan])

    def closure():
        backward(opt, model, x, y)
        return next(values)

    with pytest.warns(UserWarning, match="the loss was not finite along the step"):
        opt.step(closure)
    assert torch.equal(flat(model.parameters()), before)
    assert opt.damping == pytest.approx(0.3)


@pytest.mark.parametrize("line_search", [False, True])
@pytest.mark.parametrize("solver", ["cg", "gram"])
@pytest.mark.parametrize("lr", [0.0, 1.0])
def test_a_step_that_moves_nothing_says_nothing_of_the_damping(lr, solver, line_search):
    model, x, y = problem()
    opt = fused_so.NaturalGradient(
        model, lr, likelihood=LIKELIHOODS["gaussian"], solver=solver, damping=0.2,
        adapt_damping_every=1, line_search=line_search,
    )  # fmt: skip
    calls, before = [], flat(model.parameters())

    def closure():
        calls.append(1)
        loss = backward(opt, model, x, y)
        if lr:
            model[0].weight.grad[0, 0] = math.nan
        return loss

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(2):
            opt.step(closure)
    messages = [str(w.message) for w in warned if issubclass(w.category, UserWarning)]
    assert [("a gradient is not finite" in m) for m in messages] == [True] * bool(lr)
    assert (opt.damping, len(calls)) == (0.2, 2)
    assert torch.equal(flat(model.parameters()), before)


def test_a_param_group_that_comes_later_takes_the_damping_as_it_is():
    model, x, y = problem()
    opt = fused_so.NaturalGradient(
        model, 1.0, likelihood=LIKELIHOODS["gaussian"], damping=0.2, adapt_damping_every=1,
        params=model[0].parameters(),
    )  # fmt: skip
    opt.step(lambda: backward(opt, model, x, y))
    assert opt.damping != 0.2
    with pytest.raises(ValueError, match="damping must be the same in all param groups"):
        opt.add_param_group({"params": model[2].parameters(), "damping": 0.2})
    opt.add_param_group({"params": model[2].parameters()})
    assert opt.param_groups[1]["damping"] == opt.damping


@pytest.mark.parametrize(("given", "got"), [(None, "NoneType"), (torch.ones(2), r"shape \(2,\)")])
@pytest.mark.parametrize("looks", [{"line_search": True}, {"adapt_damping_every": 1}])
def test_a_closure_must_return_the_loss(looks, given, got):
    model, x, y = problem()
    opt = fused_so.NaturalGradient(
        model, 1.0, likelihood=LIKELIHOODS["gaussian"], warm_start=True, **looks
    )
    before = flat(model.parameters())

    def closure():
        backward(opt, model, x, y)
        return given

    with pytest.raises(TypeError, match=f"closure must return the loss, a number .* got {got}"):
        opt.step(closure)
    assert torch.equal(flat(model.parameters()), before)
    assert not opt.state


@pytest.mark.parametrize("lr", [1.0, 0.25])
def test_max_norm_bounds_the_norm_in_the_metric_over_all_groups(lr):
    model, x, y = problem()
    likelihood = LIKELIHOODS["gaussian"]
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    opt = fused_so.NaturalGradient(
        model, lr, likelihood=likelihood, damping=0.01, max_norm=0.02, params=groups, **EXACT
    )
    backward(opt, model, x, y)
    matrix = gauss_newton(model, lambda out: likelihood.value(out, y), x)
    matrix += 0.01 * torch.eye(len(matrix), dtype=DOUBLE)
    gradient = gradient_of(model)
    direction = torch.linalg.solve(matrix, gradient)
    step = step_of(opt, model)
    torch.testing.assert_close((step @ matrix @ step).sqrt().item(), 0.02)
    torch.testing.assert_close(step / step.norm(), direction / direction.norm())


# Recovery.


def frozen_step(opt, model, message, run=None):
    before = flat(model.parameters())
    with pytest.warns(UserWarning, match=message):
        (run or opt.step)()
    assert torch.equal(flat(model.parameters()), before)
    assert not any("solution" in state for state in opt.state.values())


@pytest.mark.parametrize("solver", ["cg", "minres_qlp"])
def test_a_nan_in_a_product_leaves_the_parameters(solver):
    model, x, y = problem()
    opt = fused_so.NaturalGradient(model, 1.0, likelihood=fused_so.Gaussian(), solver=solver)
    backward(opt, model, x, y)
    frozen_step(
        opt, model, "the solver stopped as 'not_finite'; such steps are skipped",
        lambda: opt.step(metric_inputs=torch.full((2, 5), math.nan, dtype=DOUBLE)),
    )  # fmt: skip


@pytest.mark.parametrize("solver", ["cg", "minres_qlp", "gram"])
def test_a_gradient_that_is_not_finite_leaves_the_parameters(solver):
    model, x, y = problem()
    opt = fused_so.NaturalGradient(model, 1.0, likelihood=fused_so.Gaussian(), solver=solver)
    backward(opt, model, x, y)
    model[0].weight.grad[0, 0] = math.inf
    frozen_step(opt, model, "a gradient is not finite; such steps are skipped")


def test_a_singular_metric_without_damping():
    """The metric of one example cannot be inverted for the gradient of another."""
    model = nn.Linear(4, 1, bias=False, dtype=DOUBLE)
    x = torch.eye(4, dtype=DOUBLE)
    options = {"likelihood": fused_so.Gaussian(), "damping": 0.0}
    opt = fused_so.NaturalGradient(model, 1.0, **options)
    opt.zero_grad()
    model(x[:1]).sum().backward()
    frozen_step(
        opt, model, "the solver stopped as 'singular'", lambda: opt.step(metric_inputs=x[1:2])
    )
    # MINRES-QLP takes the least squares solution: here nothing, which is no descent.
    opt = fused_so.NaturalGradient(model, 1.0, solver="minres_qlp", **options)
    opt.zero_grad()
    model(x[:1]).sum().backward()
    frozen_step(
        opt, model, "the solution is no descent .the solver: 'least_squares'.",
        lambda: opt.step(metric_inputs=x[1:2]),
    )  # fmt: skip
    # And the shortest one where there is one.
    opt.zero_grad()
    model(x[:2]).sum().backward()
    before = flat(model.parameters())
    opt.step(metric_inputs=x[1:3])
    moved = before - flat(model.parameters())
    torch.testing.assert_close(moved, torch.tensor([0.0, 2.0, 0.0, 0.0], dtype=DOUBLE))


def test_an_indefinite_hessian_with_cg():
    model = nn.Linear(2, 1, bias=False, dtype=DOUBLE)

    class Saddle(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0, 1.0], dtype=DOUBLE))

        def forward(self, x):
            return x * (-self.w.square()).sum()[None, None]

    model = Saddle()
    x, y = torch.ones(1, 1, dtype=DOUBLE), torch.full((1, 1), -9.0, dtype=DOUBLE)
    opt = fused_so.NaturalGradient(
        model, 1.0, likelihood=fused_so.Gaussian(), metric="hessian", damping=0.0
    )
    opt.zero_grad()
    (0.5 * (model(x) - y).square().mean()).backward()
    frozen_step(opt, model, "the solution is no descent .the solver: 'indefinite'.")


def test_no_gradient_and_a_zero_gradient_are_nothing_to_do():
    model, x, _y = problem()
    opt = fused_so.NaturalGradient(model, 1.0, likelihood=fused_so.Gaussian())
    before = flat(model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()
        opt.zero_grad()
        (0 * model(x)).sum().backward()
        opt.step()
    assert torch.equal(flat(model.parameters()), before)


def test_a_step_without_a_backward_pass_through_the_model_is_refused():
    model, x, _y = problem()
    opt = fused_so.NaturalGradient(model, 1.0, likelihood=fused_so.Gaussian())
    model[2](model[1](model[0](x))).sum().backward()
    with pytest.raises(ValueError, match="no backward pass went through a call of the model"):
        opt.step()


# As a torch optimizer.


def test_a_checkpoint_resumes_bit_for_bit():
    torch.manual_seed(5)
    batches = [problem("categorical")[1:] for _ in range(6)]
    runs = []
    for resumed in (False, True):
        torch.manual_seed(6)
        model = chain(5, 4, 3)
        build = lambda m: fused_so.NaturalGradient(  # noqa: E731
            m, 0.3, likelihood=fused_so.Categorical(), momentum=0.5, max_iterations=3,
            warm_start=True,
        )  # fmt: skip
        opt = build(model)
        for t, (x, y) in enumerate(batches):
            if resumed and t == 3:
                saved = copy.deepcopy(opt.state_dict())
                fresh = copy.deepcopy(model)
                model, opt = fresh, build(fresh)
                opt.load_state_dict(saved)
            backward(opt, model, x, y, "categorical")
            opt.step()
        runs.append(flat(model.parameters()))
    assert torch.equal(*runs)


def test_evaluation_leaves_nothing_and_the_hook_can_be_removed():
    model, x, y = problem()
    opt = fused_so.NaturalGradient(model, 1.0, likelihood=fused_so.Gaussian())
    with torch.no_grad():
        model(x)
    model(x)
    assert not opt._watch.batches
    backward(opt, model, x, y)
    assert len(opt._watch.batches) == 1
    opt.step()
    assert not opt._watch.batches
    pickle.loads(pickle.dumps(model))
    opt.remove_hooks()
    backward(opt, model, x, y)
    assert not opt._watch.batches


@pytest.mark.parametrize("solver", ["cg", "gram"])
def test_unscaled_scores_with_a_gradient_scaler(solver):
    x, y = torch.randn(6, 5), torch.randn(6, 3)
    steps = []
    for scale in (1024.0, None):
        torch.manual_seed(1)
        model = chain(5, 4, 3, dtype=torch.float32)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0)
        opt = fused_so.NaturalGradient(
            model, 1.0, likelihood=fused_so.Gaussian(), metric="empirical_fisher", damping=0.1,
            solver=solver, grad_scaler=scaler if scale else None,
        )  # fmt: skip
        before = flat(model.parameters())
        loss = 0.5 * (model(x) - y).square().mean()
        (scaler.scale(loss) if scale else loss).backward()
        scaler.step(opt) if scale else opt.step()
        steps.append(flat(model.parameters()) - before)
    torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-6)


def test_lower_precision_parameters_are_solved_for_in_float32():
    model = chain(5, 4, 3, dtype=torch.bfloat16)
    x, y = torch.randn(16, 5).bfloat16(), torch.randn(16, 3).bfloat16()
    opt = fused_so.NaturalGradient(model, 0.5, likelihood=fused_so.Gaussian(), damping=0.1)
    losses = []
    for _ in range(10):
        opt.zero_grad()
        loss = 0.5 * (model(x) - y).square().mean()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert opt.last_solution.x[0].dtype == torch.float32
    assert losses[-1] < 0.7 * losses[0]


def test_the_solver_sees_one_vector_and_the_model_one_extra_call():
    model, x, y = problem()
    calls, kept = [], []
    model.register_forward_pre_hook(lambda module, args: calls.append(1))

    def identity(r):
        kept.append(len(opt._watch.batches))
        return r

    opt = fused_so.NaturalGradient(
        model, 1.0, likelihood=fused_so.Gaussian(), max_iterations=7, tolerance=0.0,
        preconditioner=identity,
    )  # fmt: skip
    backward(opt, model, x, y)
    opt.step()
    assert opt.last_solution.iterations == 7
    assert len(calls) == 2
    assert set(kept) == {1}  # the products leave nothing behind
    first, second = opt.last_solution.x[:2]
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"solver": "lu"}, ValueError, "solver must be one of ('cg', 'minres_qlp', 'gram'), got"),
        ({"metric": "fisher"}, ValueError, "metric must be one of ('gauss_newton', 'sampled_fi"),
        ({"metric": "hessian", "solver": "gram"}, ValueError, "metric must not be 'hessian' for"),
        (
            {"likelihood": nn.L1Loss()},
            TypeError,
            "likelihood must be nn.MSELoss, nn.BCEWithLogitsLoss",
        ),
        ({"damping": -1.0}, ValueError, "damping must be at least 0 and finite, got -1.0"),
        ({"damping": 0.0, "solver": "gram"}, ValueError, "damping must be positive, got 0"),
        ({"damping": 0.0, "adapt_damping_every": 1}, ValueError, "damping must be positive with"),
        ({"momentum": 0.9, "line_search": True}, ValueError, "momentum must be 0 with adapt_damp"),
        ({"weight_decay": 0.1, "line_search": True}, ValueError, "weight_decay must be 0 with ad"),
        ({"weight_decay": 0.1, "adapt_damping_every": 1}, ValueError, "weight_decay must be 0 wi"),
        ({"line_search": 1}, TypeError, "line_search must be True or False, got 1"),
        ({"max_iterations": 0}, ValueError, "max_iterations must be a whole number >= 1, got 0"),
        ({"preconditioner": 1}, TypeError, "preconditioner must be callable, got int"),
        (
            {"grad_scaler": 1},
            TypeError,
            "grad_scaler must be a torch.amp.GradScaler or None, got int",
        ),
        ({"metric_inputs": 1}, TypeError, "metric_inputs must be an iterable of batches of inp"),
        (
            {"metric_inputs": [1], "metric": "hessian"},
            ValueError,
            "metric_inputs must be None for metric 'hessian', which needs targets",
        ),
        ({"params": [nn.Parameter(torch.ones(7))]}, ValueError, "params must be parameters of the"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error) as caught:
        fused_so.NaturalGradient(chain(5, 3), **{"likelihood": fused_so.Gaussian(), **options})
    assert message in str(caught.value)


def test_bad_steps_and_models_are_named():
    model, x, _y = problem()
    opt = fused_so.NaturalGradient(
        model, 1.0, likelihood=fused_so.Gaussian(), metric="empirical_fisher"
    )
    with pytest.raises(ValueError, match="metric_inputs must be None for metric 'empirical_f"):
        opt.step(metric_inputs=x)
    opt = fused_so.NaturalGradient(model, likelihood=fused_so.Gaussian())
    with pytest.raises(TypeError, match="metric_inputs must be a Tensor, a tuple or a dict"):
        opt.step(metric_inputs=3)
    opt = fused_so.NaturalGradient(model, likelihood=fused_so.Gaussian(), line_search=True)
    with pytest.raises(ValueError, match="step must be given a closure that computes the loss"):
        opt.step()
    groups = [{"params": model[0].parameters(), "damping": 1.0}, {"params": model[2].parameters()}]
    with pytest.raises(ValueError, match="damping must be the same in all param groups, got 1.0"):
        fused_so.NaturalGradient(model, likelihood=fused_so.Gaussian(), params=groups)

    class Two(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    pair = Two(5, 3)
    opt = fused_so.NaturalGradient(pair, likelihood=fused_so.Gaussian())
    with pytest.raises(TypeError, match="model must return one Tensor, .* got tuple"):
        pair(torch.randn(2, 5))


@pytest.mark.parametrize("metric", ["empirical_fisher", "gauss_newton"])
def test_gram_refuses_what_it_would_get_wrong(metric):
    options = {"likelihood": fused_so.Categorical(), "solver": "gram", "metric": metric}
    with pytest.raises(ValueError, match="every trained parameter .* not: unused, conv.weight, "):
        fused_so.NaturalGradient(Convolutions(), **options)
    shared = nn.Linear(3, 3)
    twice = nn.Sequential(shared, nn.Tanh(), shared)
    opt = fused_so.NaturalGradient(twice, **options)
    twice(torch.randn(4, 3)).square().sum().backward()
    with pytest.raises(ValueError, match="layer '0' to be called once in every call"):
        opt.step()


@pytest.mark.parametrize("metric", ["empirical_fisher", "sampled_fisher", "gauss_newton"])
def test_gram_refuses_an_absurd_matrix_before_it_is_made(metric, monkeypatch):
    """A row an example, and with the exact metric an output."""
    made = []
    grad_gram, columns = fused_so.ops.grad_gram, fused_so.Gaussian.curvature_sqrt_columns
    monkeypatch.setattr(
        "fused_so.ops.grad_gram", lambda *a, **k: made.append(1) or grad_gram(*a, **k)
    )
    monkeypatch.setattr(
        fused_so.Gaussian, "curvature_sqrt_columns",
        lambda *a, **k: made.append(2) or columns(*a, **k),
    )  # fmt: skip
    outputs, most = (200, 81) if metric == "gauss_newton" else (1, 16384)
    model = nn.Linear(1, outputs)
    opt = fused_so.NaturalGradient(
        model, 0.1, likelihood=fused_so.Gaussian(), solver="gram", metric=metric
    )
    before = flat(model.parameters())
    model(torch.randn(most + 1, 1)).square().sum().backward()
    with pytest.raises(ValueError, match=r"rows must be at most 16384, .* GiB in float32; use sm"):
        opt.step()
    assert torch.equal(flat(model.parameters()), before)
    assert not made
    assert not opt.state


@pytest.mark.parametrize("metric", ["empirical_fisher", "gauss_newton"])
def test_gram_sees_through_an_activation_in_place(metric):
    steps = []
    for inplace in (True, False):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(inplace=inplace), nn.Linear(4, 3)).double()
        opt = fused_so.NaturalGradient(
            model, 1.0, likelihood=fused_so.Categorical(), solver="gram", metric=metric
        )
        x, y = torch.randn(6, 5, dtype=DOUBLE), torch.randint(3, (6,))
        backward(opt, model, x, y, "categorical")
        steps.append(step_of(opt, model))
    torch.testing.assert_close(*steps)
