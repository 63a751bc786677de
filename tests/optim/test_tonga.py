"""TONGA against dense covariances of per-example gradients."""

from __future__ import annotations

import copy
import io
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import fused_so
from fused_so.optim import gram, past
from fused_so.optim.gram import damped_step
from fused_so.optim.rows import Rows
from tests.optim.dense import DOUBLE, chain, example_gradients, flat
from tests.optim.test_metric import LIKELIHOODS, targets_of

BARE = {"momentum": 0.0, "nesterov": False, "relative_damping": 0.0}


def gradients(model, x, y):
    """(examples, parameters), each that of one example's loss."""
    return example_gradients(model, lambda out: 0.5 * (out - y).square().sum(1), x)


def backward(opt, model, x, y, reduction="mean"):
    opt.zero_grad()
    loss = 0.5 * (model(x) - y).square().sum()
    (loss / len(x) if reduction == "mean" else loss).backward()


def step_of(opt, model):
    before = flat(model.parameters())
    opt.step()
    return (before - flat(model.parameters())) / opt.param_groups[0]["lr"]


def data(n=7):
    return torch.randn(n, 5, dtype=DOUBLE), torch.randn(n, 3, dtype=DOUBLE)


def dense_step(rows, gradient, damping, centered, weights=None):
    weights = torch.full((len(rows),), 1 / len(rows), dtype=DOUBLE) if weights is None else weights
    if centered:
        rows = rows - weights @ rows
    matrix = rows.T @ (weights[:, None] * rows)
    return torch.linalg.solve(matrix + damping * torch.eye(len(matrix), dtype=DOUBLE), gradient)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("change", ["nothing", "clip", "penalty", "accumulation"])
def test_step_is_the_dense_one(change, bias, centered, reduction):
    model, (x, y) = chain(5, 4, 3, bias=bias), data()
    rows = gradients(model, x, y)
    opt = fused_so.TONGA(model, 0.5, 0.2, centered=centered, loss_reduction=reduction, **BARE)
    if change == "accumulation":
        for part in ([0, 1], [2, 3, 4, 5, 6]):
            loss = 0.5 * (model(x[part]) - y[part]).square().sum()
            (loss / 7 if reduction == "mean" else loss).backward()
    else:
        backward(opt, model, x, y, reduction)
    if change == "clip":
        nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
    if change == "penalty":
        (0.3 * model[0].weight.square().sum()).backward()
    gradient = flat(p.grad for p in model.parameters())
    summed = 1 if reduction == "mean" else 7
    got = step_of(opt, model)
    expected = dense_step(rows, gradient / summed, 0.2, centered)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(flat(p.grad for p in model.parameters()), gradient)


@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("name", ["gaussian", "bernoulli", "categorical"])
def test_step_is_the_dense_one_with_every_likelihood(name, centered):
    likelihood, model = LIKELIHOODS[name], chain(5, 4, 3)
    x, y = torch.randn(6, 5, dtype=DOUBLE), targets_of(likelihood)
    one = replace(likelihood, reduction="sum")
    rows = example_gradients(
        model,
        lambda out: torch.stack([one.value(out[i : i + 1], y[i : i + 1]) for i in range(6)]),
        x,
    )
    opt = fused_so.TONGA(model, 0.5, 0.02, centered=centered, **BARE)
    opt.zero_grad()
    (one.value(model(x), y) / 6).backward()
    expected = dense_step(rows, rows.mean(0), 0.02, centered)
    torch.testing.assert_close(step_of(opt, model), expected, rtol=1e-10, atol=1e-10)


def test_the_short_way_is_taken_where_the_gradient_is_that_of_the_rows(monkeypatch):
    shares = []

    def spy(*args, **options):
        shares.append(options["share"])
        return damped_step(*args, **options)

    monkeypatch.setattr("fused_so.optim.tonga.damped_step", spy)
    model, (x, y) = chain(5, 4, 3), data()
    opt = fused_so.TONGA(model, 0.1)
    for change, short in (("nothing", True), ("clip", True), ("bias", False), ("one", False)):
        backward(opt, model, x, y)
        if change == "clip":
            nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
        elif change == "bias":
            model[2].bias.grad[0] += 1e-3
        elif change == "one":
            model[0].weight.grad.mul_(2)
        opt.step()
        assert (shares[-1] is not None) == short


def test_relative_damping_is_a_share_of_the_mean_eigenvalue():
    model, (x, y) = chain(5, 4, 3), data()
    rows = gradients(model, x, y)
    options = {**BARE, "relative_damping": 0.3}
    opt = fused_so.TONGA(model, 1.0, 0.1, **options)
    backward(opt, model, x, y)
    gradient = flat(p.grad for p in model.parameters())
    damping = 0.1 + 0.3 * rows.square().sum().item() / 7**2
    torch.testing.assert_close(step_of(opt, model), dense_step(rows, gradient, damping, False))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_damping_follows_the_larger_of_the_batch_and_the_average(reduction):
    model = chain(5, 4, 3)
    options = {**BARE, "damping": 0.0, "relative_damping": 0.3, "damping_decay": 0.75}
    opt = fused_so.TONGA(model, 0.1, loss_reduction=reduction, **options)
    average, larger = None, []
    for size in (1.0, 0.1, 2.0, 0.1):
        x, y = data()
        y = model(x).detach() + size * y
        rows = gradients(model, x, y)
        trace = rows.square().sum() / 7
        larger.append(average is not None and bool(average > trace))
        damping = 0.3 / 7 * max(trace, average or 0.0)
        average = trace if average is None else 0.75 * average + 0.25 * trace
        backward(opt, model, x, y, reduction)
        expected = dense_step(rows, rows.mean(0), damping, centered=False)
        torch.testing.assert_close(step_of(opt, model), expected, rtol=1e-9, atol=1e-12)
    assert larger == [False, True, False, True]
    for layer in (model[0], model[2]):
        torch.testing.assert_close(opt.state[layer.weight]["trace"], average)


def test_the_average_outlives_a_checkpoint_and_a_bad_batch():
    model, (x, y) = chain(5, 4, 3), data()
    opt = fused_so.TONGA(model)
    backward(opt, model, x, y)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    backward(opt, model, x * math.nan, y)
    with pytest.warns(UserWarning, match="a gradient is not finite"):
        opt.step()
    twin = copy.deepcopy(model)
    again = fused_so.TONGA(twin)
    again.load_state_dict(saved)
    for one, own in ((opt, model), (again, twin)):
        backward(one, own, x, 0.1 * y)
        one.step()
    assert torch.equal(flat(model.parameters()), flat(twin.parameters()))
    fresh = copy.deepcopy(model)
    alone = fused_so.TONGA(fresh, damping_decay=None)
    backward(alone, fresh, x, y)
    alone.step()
    assert "trace" not in alone.state[fresh[0].weight]


@pytest.mark.filterwarnings("ignore:TONGA. a gradient is not finite")
@pytest.mark.parametrize("first", [math.nan, math.inf, 0.0])
def test_the_average_begins_with_the_first_batch_that_tells(first):
    models = [chain(5, 4, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    (x, y), traces = data(), []
    for model, factors in zip(models, ((1.0,), (first, 1.0)), strict=True):
        opt = fused_so.TONGA(model, 0.0)
        for factor in factors:
            opt.zero_grad()
            (factor * (model(x) - y).square().mean()).backward()
            opt.step()
        traces.append(opt.state[model[0].weight]["trace"])
    assert torch.equal(*traces)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("decay", [None, 0.9])
def test_examples_without_a_gradient_leave_nothing_to_do(decay, centered, dtype):
    model, (x, _y) = chain(5, 4, 3, dtype=dtype), data()
    opt = fused_so.TONGA(
        model, 1.0, 0.0, centered=centered, decay=decay, momentum=0.0, nesterov=False
    )
    before = flat(model.parameters())
    # The squares of 1e-25 are nothing in float32.
    for factor in (0.0,) if dtype == DOUBLE else (0.0, 1e-25):
        opt.zero_grad()
        (factor * model(x.to(dtype))).sum().backward()
        opt.step()
        assert torch.equal(flat(model.parameters()), before)
    # A penalty's gradient is taken as it is.
    opt.zero_grad()
    (0.0 * model(x.to(dtype)).sum() + 0.5 * model[0].weight.square().sum()).backward()
    step = step_of(opt, model)
    assert torch.equal(step[:20], before[:20])
    assert not step[20:].any()


def test_centering_lengthens_the_step_and_does_not_turn_it():
    model, (x, y) = chain(5, 4, 3), data()
    steps = []
    for centered in (False, True):
        twin = copy.deepcopy(model)
        opt = fused_so.TONGA(twin, 1.0, 1e-3, centered=centered, **BARE)
        backward(opt, twin, x, y)
        steps.append(step_of(opt, twin))
    plain, centered = steps
    torch.testing.assert_close(plain / plain.norm(), centered / centered.norm())
    assert centered.norm() > 2 * plain.norm()


def test_an_uncentered_step_changes_the_losses_of_the_batch_by_at_most_lr():
    model, (x, y) = chain(5, 4, 3), data()
    rows = 100 * gradients(model, x, y)
    opt = fused_so.TONGA(model, 1.0, 1e-9, **BARE)
    opt.zero_grad()
    (100 * 0.5 * (model(x) - y).square().sum() / 7).backward()
    step = step_of(opt, model)
    rms = (rows @ step).square().mean().sqrt()
    assert 0.9 < rms <= 1


def test_layers_with_other_rows_have_a_covariance_of_their_own():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(5, 4, dtype=DOUBLE)
            self.head = nn.Linear(4, 3, dtype=DOUBLE)

        def forward(self, x):
            return self.head(torch.tanh(self.body(x)).mean(1))

    model = Pooled()
    x, y = torch.randn(6, 2, 5, dtype=DOUBLE), torch.randn(6, 3, dtype=DOUBLE)
    opt = fused_so.TONGA(model, 1.0, 0.1, **BARE)
    backward(opt, model, x, y)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    # The rows of each layer alone: 12 of the body, 6 of the head.
    unseen = copy.deepcopy(model)
    a = unseen.body(x).detach().requires_grad_()
    out = unseen.head(torch.tanh(a).mean(1))
    g_body, g_head = torch.autograd.grad(0.5 * (out - y).square().sum() / 6, [a, out])
    g_body = g_body.reshape(12, 4)
    h_body, h_head = x.reshape(12, 5), torch.tanh(a).mean(1).detach()
    opt.step()
    for name, g, h in (("body", g_body, h_body), ("head", g_head, h_head)):
        ones = torch.ones(len(h), 1, dtype=DOUBLE)
        rows = len(h) * torch.einsum("no,ni->noi", g, torch.cat([h, ones], 1)).flatten(1)
        expected = dense_step(rows, rows.mean(0), 0.1, False).view(g.shape[1], -1)
        moved = before[f"{name}.weight"] - getattr(model, name).weight
        torch.testing.assert_close(moved, expected[:, :-1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("centered", [False, True])
def test_the_past_enters_as_weighted_directions(centered):
    """Two batches of which all is kept as drawn: the dense mixture with the same weights."""
    model, decay, kept = chain(5, 4, 3), 0.7, 40
    opt = fused_so.TONGA(model, 0.1, 0.2, centered=centered, decay=decay, directions=kept, **BARE)
    directions, weights = None, None
    for _ in range(3):
        x, y = data()
        rows = gradients(model, x, y)
        backward(opt, model, x, y)
        gradient = flat(p.grad for p in model.parameters())
        pool, kappa = rows, torch.full((7,), (1 - decay) / 7, dtype=DOUBLE)
        if directions is not None:
            pool, kappa = torch.cat([rows, directions]), torch.cat([kappa, decay * weights])
        kappa = kappa / kappa.sum()
        expected = dense_step(pool, gradient, 0.2, centered, kappa)
        torch.testing.assert_close(step_of(opt, model), expected, rtol=1e-9, atol=1e-10)
        # What was kept, from the state: rows of their layers, and one weight each.
        states = [opt.state[model[k].weight] for k in (0, 2)]
        weights = states[0]["past_weights"]
        assert torch.equal(weights, states[1]["past_weights"])
        directions = torch.cat(
            [
                part
                for s in states
                for part in (
                    torch.einsum("no,ni->noi", s["past_g"], s["past_h"]).flatten(1),
                    s["past_g"],
                )
            ],
            1,
        )
        assert directions.shape[0] == kept
        # Each is one of the pool, and stands for an equal part of the trace.
        distance = (directions[:, None] - pool).norm(dim=2).amin(1)
        assert (distance < 1e-12).all()
        trace = (kappa * pool.square().sum(1)).sum()
        torch.testing.assert_close(
            weights * directions.square().sum(1), torch.full((kept,), trace.item() / kept).double()
        )


def test_directions_are_drawn_without_bias():
    """Averaged over the random offset, the covariance that is kept is that of the pool."""
    n, kept, draws = 9, 4, 3000
    h, g = torch.randn(n, 3, dtype=DOUBLE), torch.randn(n, 2, dtype=DOUBLE)
    weights, unit = torch.rand(n, dtype=DOUBLE), torch.rand(n, dtype=DOUBLE) + 1
    rows = unit[:, None] * torch.einsum("no,ni->noi", g, h).flatten(1)
    energies = weights * rows.square().sum(1)
    expected = rows.T @ (weights[:, None] * rows)
    mean = torch.zeros_like(expected)
    for seed in range(draws):
        state = {}
        past.draw([state], [0], [Rows(g, h, None, None)], weights, unit, energies, kept, seed)
        new = torch.einsum("no,ni->noi", state["past_g"], state["past_h"]).flatten(1)
        mean += new.T @ (state["past_weights"][:, None] * new) / draws
    assert (mean - expected).abs().max() < 4 * energies.sum() / math.sqrt(draws) / kept


def test_a_checkpoint_with_directions_resumes_bit_for_bit():
    batches = [data() for _ in range(6)]
    runs = []
    for resumed in (False, True):
        torch.manual_seed(6)
        model = chain(5, 4, 3)
        opt = fused_so.TONGA(model, decay=0.9, directions=5)
        for t, (x, y) in enumerate(batches):
            if resumed and t == 3:
                torch.save(opt.state_dict(), file := io.BytesIO())
                file.seek(0)
                model = copy.deepcopy(model)
                opt = fused_so.TONGA(model, decay=0.9, directions=5)
                opt.load_state_dict(torch.load(file))
            backward(opt, model, x, y)
            opt.step()
        runs.append(flat(model.parameters()))
    assert torch.equal(*runs)


def test_a_batch_with_a_nan_is_skipped_and_forgotten():
    model = chain(5, 4, 3)
    opt = fused_so.TONGA(model, decay=0.9, directions=5)
    for bad in (False, True, False):
        x, y = data()
        if bad:
            x[0, 0] = math.nan
        before = flat(model.parameters())
        backward(opt, model, x, y)
        if bad:
            with pytest.warns(UserWarning, match="a gradient is not finite; such steps are skip"):
                opt.step()
            assert torch.equal(flat(model.parameters()), before)
        else:
            opt.step()
            assert not torch.equal(flat(model.parameters()), before)
        for layer in (model[0], model[2]):
            assert all(
                torch.isfinite(v).all()
                for v in opt.state[layer.weight].values()
                if isinstance(v, torch.Tensor)
            )


def test_a_gram_matrix_that_cannot_be_factorized_is_an_error_that_changes_nothing():
    # Examples alike: K is singular, and float32 cannot tell the damping from zero.
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.good, self.bad = nn.Linear(2, 1), nn.Linear(2, 1)

        def forward(self, x):
            return self.good(x[:1]).sum() + self.bad(x).sum()

    model = Two()
    groups = [{"params": m.parameters()} for m in (model.good, model.bad)]
    opt = fused_so.TONGA(model, 0.1, 1e-30, params=groups, **BARE)
    before = flat(model.parameters())
    opt.zero_grad()
    model(torch.full((4, 2), 3.0)).backward()
    with pytest.raises(RuntimeError, match="not positive definite even with damping 1e-27; raise"):
        opt.step()
    assert torch.equal(flat(model.parameters()), before)
    assert gram._TRIES == 4


@pytest.mark.parametrize("failures", [0, 1, 3])
def test_a_failing_factorization_is_tried_with_ten_times_the_damping(failures, monkeypatch):
    factorize, tries = torch.linalg.cholesky_ex, []

    def failing(matrix):
        tries.append(matrix)
        factor, info = factorize(matrix)
        return factor, info + (len(tries) <= failures)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", failing)
    model, (x, y) = chain(5, 4, 3), data()
    rows = gradients(model, x, y)
    opt = fused_so.TONGA(model, 1.0, 0.01, **BARE)
    backward(opt, model, x, y)
    gradient = flat(p.grad for p in model.parameters())
    expected = dense_step(rows, gradient, 0.01 * 10**failures, False)
    torch.testing.assert_close(step_of(opt, model), expected, rtol=1e-10, atol=1e-10)


def test_an_absurd_number_of_rows_is_refused_before_anything_changes():
    model = nn.Linear(1, 1)
    opt = fused_so.TONGA(model)
    before = flat(model.parameters())
    model(torch.randn(16385, 1)).square().mean().backward()
    with pytest.raises(ValueError, match=r"rows must be at most 16384, .* got 16385: 1.0 GiB"):
        opt.step()
    assert torch.equal(flat(model.parameters()), before)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("decay", [None, 0.9])
def test_max_norm_bounds_the_norm_that_the_gram_matrix_knows(decay, centered, reduction):
    model, (x, y) = chain(5, 4, 3), data()
    opt = fused_so.TONGA(
        model, 1.0, 0.1, centered=centered, decay=decay, directions=4, loss_reduction=reduction,
        max_norm=1e-3, **BARE,
    )  # fmt: skip
    for _ in range(2):
        backward(opt, model, x, y, reduction)
        summed = 7 if reduction == "sum" else 1
        gradient = flat(p.grad for p in model.parameters()) / summed
        step = step_of(opt, model)
    ((square, factor),) = opt._bounded
    # Delta^T g over alpha, by the parameters instead of the Gram matrix
    expected = gradient @ (step / factor) / 1
    torch.testing.assert_close(square, expected, rtol=1e-9, atol=0.0)
    torch.testing.assert_close(square.sqrt() * factor, torch.tensor(1e-3, dtype=DOUBLE))


def test_without_waiting_a_failure_gives_what_is_not_finite():
    h = torch.ones(3, 2)
    rows = Rows(torch.ones(3, 1), h, torch.ones(1, 2), torch.ones(1))
    step = damped_step(
        [rows], scales=1e10 * torch.ones(3), damping=1e-30, share=torch.ones(3), waits=False
    )
    assert not torch.isfinite(step.updates[0][0]).any()


def test_other_parameters_take_momentum_sgd_and_are_named_once():
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)).double()
    x, y = data()
    with pytest.warns(UserWarning, match="momentum SGD with the same lr trains the others: 1.we"):
        opt = fused_so.TONGA(model, 0.2, **{**BARE, "relative_damping": 1.0})
    backward(opt, model, x, y)
    before = model[1].weight.detach().clone()
    opt.step()
    torch.testing.assert_close(before - model[1].weight, 0.2 * model[1].weight.grad)


@pytest.mark.parametrize("decay", [None, 0.5])
def test_gradient_scaler_changes_nothing_but_rounding(decay):
    x, y = torch.randn(16, 5), torch.randn(16, 3)
    scaled = chain(5, 4, 3, dtype=torch.float32)
    bare = copy.deepcopy(scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    a = fused_so.TONGA(scaled, 0.1, 0.1, decay=decay, directions=4, grad_scaler=scaler)
    b = fused_so.TONGA(bare, 0.1, 0.1, decay=decay, directions=4)
    for _ in range(3):
        a.zero_grad()
        scaler.scale(0.5 * (scaled(x) - y).square().sum() / 16).backward()
        scaler.unscale_(a)
        nn.utils.clip_grad_norm_(scaled.parameters(), 0.5)
        scaler.step(a)
        scaler.update()
        backward(b, bare, x, y)
        nn.utils.clip_grad_norm_(bare.parameters(), 0.5)
        b.step()
    torch.testing.assert_close(flat(scaled.parameters()), flat(bare.parameters()))


def test_nothing_is_kept_after_the_step_and_it_trains():
    torch.manual_seed(0)
    model, (x, y) = chain(5, 16, 3), data(40)
    opt = fused_so.TONGA(model)
    losses = []
    for _ in range(31):  # later it swings, and rounding decides how far
        backward(opt, model, x, y)
        losses.append((0.5 * (model(x) - y).square().sum() / 40).item())
        opt.step()
        assert not any(layer.batch for layer in opt._layers)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"damping": -1.0}, ValueError, "damping must be at least 0 and finite, got -1.0"),
        (
            {"damping": 0, "relative_damping": 0.0},
            ValueError,
            "damping or relative_damping must be positive",
        ),
        ({"damping_decay": 1.0}, ValueError, "damping_decay must be less than 1, got 1"),
        ({"damping_decay": 0}, ValueError, "damping_decay must be positive, got 0"),
        ({"centered": 1}, TypeError, "centered must be True or False, got 1"),
        ({"decay": 1.0}, ValueError, "decay must be less than 1, got 1"),
        ({"decay": 0.0}, ValueError, "decay must be positive, got 0"),
        ({"directions": 0}, ValueError, "directions must be a whole number >= 1, got 0"),
        ({"loss_reduction": "none"}, ValueError, "loss_reduction must be one of ('mean', 'sum')"),
        (
            {"grad_scaler": 1},
            TypeError,
            "grad_scaler must be a torch.amp.GradScaler or None, got int",
        ),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error) as caught:
        fused_so.TONGA(nn.Linear(2, 2), **options)
    assert message in str(caught.value)
