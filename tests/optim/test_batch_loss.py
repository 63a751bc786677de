"""The loss that the gradients at the outputs tell of, and the bound on steps that it makes."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

import fused_so
from fused_so.optim.batch_loss import MOST_PASSES, BatchLoss
from tests.optim.nets import DOUBLE, LIKELIHOODS, bare, chain, loss_of, parameters, targets

KINDS = tuple(LIKELIHOODS)
METHODS = {"KFAC": fused_so.KFAC, "EKFAC": fused_so.EKFAC}


def always():
    return True


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_found(kind, reduction):
    model = chain(4, 5, 3)
    watch = BatchLoss(model, LIKELIHOODS[kind](reduction), always)
    assert watch.value() is None
    x, y = torch.randn(7, 4, dtype=DOUBLE), targets(kind, 7, 3)
    loss = loss_of(kind, model(x), y, reduction)
    assert watch.value() is None
    loss.backward()
    torch.testing.assert_close(watch.value(), loss.detach())
    watch.forget()
    assert watch.value() is None


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_batches_count_as_their_mean(kind):
    model = chain(4, 5, 3)
    watch = BatchLoss(model, LIKELIHOODS[kind]("mean"), always)
    losses = []
    for n in (7, 7, 5):
        x, y = torch.randn(n, 4, dtype=DOUBLE), targets(kind, n, 3)
        losses.append(loss_of(kind, model(x), y))
        (losses[-1] / 3).backward()
    torch.testing.assert_close(watch.value(), sum(losses).detach() / 3)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("kind", [*KINDS, "soft"])
def test_several_passes_of_a_sum_are_summed(kind, reduction):
    model, losses = chain(4, 5, 3), []
    watch = BatchLoss(model, LIKELIHOODS.get(kind, fused_so.Bernoulli)(reduction=reduction), always)
    for n in (7, 5):
        x = torch.randn(n, 4, dtype=DOUBLE)
        if kind == "soft":
            y = torch.rand(n, 3, dtype=DOUBLE)
            losses.append(F.binary_cross_entropy_with_logits(model(x), y, reduction="sum"))
        else:
            losses.append(loss_of(kind, model(x), targets(kind, n, 3), "sum"))
    sum(losses).backward()
    torch.testing.assert_close(watch.value(), sum(losses).detach())


@pytest.mark.parametrize("kind", KINDS)
def test_a_scaled_loss_is_found_from_its_scale(kind):
    model = chain(4, 5, 3)
    watch = BatchLoss(model, LIKELIHOODS[kind]("mean"), always)
    x, y = torch.randn(7, 4, dtype=DOUBLE), targets(kind, 7, 3)
    loss = loss_of(kind, model(x), y)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss).backward()
    torch.testing.assert_close(watch.value(scaler), loss.detach())


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_may_be_on_several_devices(kind):
    watch = BatchLoss(chain(4, 5, 3), LIKELIHOODS[kind]("mean"), always)
    scaler = torch.amp.GradScaler("cpu")
    with FakeTensorMode():
        scaler._scale = torch.ones((), device="cuda:0")
        for device in ("cuda:1", "cuda:0"):
            watch._passes.append((torch.ones(7, 3, device=device), torch.ones(7, 3, device=device)))
        assert watch.value(scaler).device == torch.device("cuda:1")


def test_outputs_that_tell_nothing_are_passed_over():
    model = chain(4, 5, 3)
    watch = BatchLoss(model, fused_so.Gaussian(), always)
    x = torch.randn(7, 4, dtype=DOUBLE)
    with torch.no_grad():
        model(x)
    outputs = model(x)
    outputs.mul_(2)  # written over: what the gradient belongs to is gone
    outputs.sum().backward()
    model(x[:0]).sum().backward()
    assert watch.value() is None
    watch.remove()
    model(x).sum().backward()
    assert watch.value() is None


def outputs_of(model, params, x):
    return torch.func.functional_call(model, params, (x,))


def loss_of_one(model, params, x, y):
    return F.cross_entropy(outputs_of(model, params, x[None]), y[None])


TRANSFORMS = {
    "vmap of grad": lambda model, params, x, y: torch.func.vmap(
        torch.func.grad(partial(loss_of_one, model)), (None, 0, 0)
    )(params, x, y),
    "jacrev": lambda model, params, x, y: torch.func.jacrev(partial(outputs_of, model))(params, x),
    "grad": lambda model, params, x, y: torch.func.grad(partial(loss_of_one, model))(
        params, x[0], y[0]
    ),
    "vectorized jacobian": lambda model, params, x, y: torch.autograd.functional.jacobian(
        model, x, vectorize=True
    ),
    "batched gradients": lambda model, params, x, y: torch.autograd.grad(
        model(x), list(params.values()), torch.eye(9, dtype=DOUBLE).reshape(9, 3, 3),
        is_grads_batched=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_derivatives_by_transforms_are_no_batches_of_the_loss(transform):
    model = chain(4, 5, 3)
    x, y = torch.randn(3, 4, dtype=DOUBLE), torch.randint(0, 3, (3,))
    params = dict(model.named_parameters())
    expected = transform(model, params, x, y)
    watch = BatchLoss(model, fused_so.Categorical(), always)
    torch.testing.assert_close(transform(model, params, x, y), expected)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    torch.testing.assert_close(watch.value(), loss.detach())


@pytest.mark.parametrize("options", [{"max_decrease": None}, {"recipe": "paper"}])
def test_nothing_is_held_where_nothing_is_bounded(options):
    model = chain(4, 5, 3)
    opt = fused_so.KFAC(model, likelihood=fused_so.Gaussian(), **options)
    x = torch.randn(7, 4, dtype=DOUBLE)
    model(x).square().mean().backward()
    assert opt._batch_loss.value() is None
    if "max_decrease" in options:
        opt.param_groups[0]["max_decrease"] = 1.0
        model(x).square().mean().backward()
        assert opt._batch_loss.value() is not None


def test_what_nobody_asks_for_is_not_held_for_ever():
    model = chain(4, 5, 3)
    opt = fused_so.KFAC(model, likelihood=fused_so.Gaussian())
    x = torch.randn(7, 4, dtype=DOUBLE)
    for passes in range(1, MOST_PASSES + 5):
        (model(x).square().mean() / MOST_PASSES).backward()
        known = passes <= MOST_PASSES
        assert len(opt._batch_loss._passes) == (passes if known else 0)
        assert (opt._batch_loss.value() is not None) == known
    opt.step()
    assert opt.diagnostics()["bound"][0] > 0
    model(x).square().mean().backward()
    assert opt._batch_loss.value() is not None


# The bound.


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_no_update_predicts_a_larger_decrease(method, kind, reduction, weight_decay):
    model = chain(4, 5, 3)
    share = 1e-3
    opt = METHODS[method](
        model, likelihood=LIKELIHOODS[kind](reduction), weight_decay=weight_decay,
        **bare(damping=1e-2, max_decrease=share),
    )  # fmt: skip
    x, y = torch.randn(30, 4, dtype=DOUBLE), targets(kind, 30, 3)
    loss = loss_of(kind, model(x), y, reduction)
    loss.backward()
    before = parameters(model)
    opt.step()
    decrease = sum(
        ((old - new.detach()) * (new.grad + weight_decay * old)).sum()
        for old, new in zip(before, model.parameters(), strict=True)
    )
    penalty = weight_decay / 2 * sum(old.square().sum() for old in before)
    torch.testing.assert_close(decrease, share * (loss.detach() + penalty))
    assert 0 < opt.diagnostics()["bound"][0] < 1


def test_a_loss_that_is_large_enough_is_told_by_its_gradient():
    model = chain(4, 5, 3)
    watch = BatchLoss(model, fused_so.Bernoulli(), always)
    assert not watch.is_at_least(torch.tensor(0.0))
    least = []
    for n in (7, 5):
        x, y = torch.randn(n, 4, dtype=DOUBLE), targets("bernoulli", n, 3)
        outputs = model(x)
        (loss_of("bernoulli", outputs, y) / 2).backward()
        least.append(2 * (outputs.detach().sigmoid() - y).square().mean())
    least = sum(least) / 2
    assert watch.is_at_least(0.999 * least)
    assert not watch.is_at_least(1.001 * least)
    assert not watch.is_at_least(torch.tensor(torch.nan))
    watch.forget()
    assert not watch.is_at_least(0.999 * least)


def test_a_loss_on_a_device_that_would_be_waited_for_is_not_looked_at():
    watch = BatchLoss(chain(4, 5, 3), fused_so.Bernoulli(), always)
    with FakeTensorMode():
        on_gpu = torch.ones(2, 3, device="cuda")
    watch._passes.append((on_gpu, on_gpu))
    assert not watch.is_at_least(torch.tensor(0.0))
    watch.forget()
    watch._passes.append((torch.ones(2, 3), torch.ones(2, 3)))
    assert watch.is_at_least(torch.tensor(0.0))
    with FakeTensorMode():
        assert not watch.is_at_least(torch.tensor(0.0, device="cuda"))


def test_an_empty_batch_of_a_sum_has_no_loss_and_moves_nothing():
    model = chain(4, 5, 3)
    likelihood = fused_so.Bernoulli(reduction="sum")
    opt = fused_so.KFAC(model, likelihood=likelihood, factors="empirical")
    before = parameters(model)
    outputs = model(torch.empty(0, 4, dtype=DOUBLE))
    F.binary_cross_entropy_with_logits(
        outputs, torch.empty(0, 3, dtype=DOUBLE), reduction="sum"
    ).backward()
    opt.step()
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("method", [*METHODS, "TONGA"])
@pytest.mark.parametrize(
    "reduction, of_loss, passes, scale, told",
    [
        ("mean", "mean", 1, 1, False),
        ("batchmean", "batchmean", 1, 1, False),
        ("sum", "sum", 1, 1, False),
        ("mean", "mean", 2, 0.5, False),
        ("mean", "sum", 1, 1, True),
        ("mean", "batchmean", 1, 1, True),
        ("mean", "mean", 1, 10, True),
        ("mean", "mean", 2, 1, True),
    ],
)
def test_a_loss_that_is_a_multiple_of_the_likelihoods_is_told(
    method, reduction, of_loss, passes, scale, told
):
    torch.manual_seed(0)
    model, likelihood = chain(4, 5, 3), fused_so.Bernoulli(reduction=reduction)
    sums = {"loss_reduction": "sum"} if method == "TONGA" and of_loss == "sum" else {}
    opt = getattr(fused_so, method)(model, likelihood=likelihood, **sums)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            opt.zero_grad()
            for _ in range(passes):
                x, y = torch.randn(30, 4, dtype=DOUBLE), targets("bernoulli", 30, 3)
                (scale * loss_of("bernoulli", model(x), y, of_loss)).backward()
            opt.step()
    found = [str(one.message) for one in caught if "likelihood must be" in str(one.message)]
    assert len(found) == told
    assert all(one.startswith(f"{method}: likelihood must be that of the loss") for one in found)


@pytest.mark.parametrize("method", [*METHODS, "TONGA"])
def test_options_of_the_bound_are_checked(method):
    build = partial(getattr(fused_so, method), chain(4, 5, 3), likelihood=fused_so.Bernoulli())
    for value in (-1, 0):
        with pytest.raises(ValueError, match=f"max_decrease must be positive, got {value}"):
            build(max_decrease=value)
    with pytest.raises(TypeError, match="likelihood must be nn.MSELoss.*got Bernoulli, the class"):
        build(likelihood=fused_so.Bernoulli)
    with pytest.raises(TypeError, match="likelihood must be nn.MSELoss.*got L1Loss$"):
        build(likelihood=nn.L1Loss())


def test_a_score_that_is_no_number_is_not_told():
    f = torch.full((2, 3), torch.nan)
    for likelihood in (fused_so.Bernoulli(), fused_so.Gaussian(), fused_so.Categorical()):
        assert likelihood.has_score(f, f)
    assert not fused_so.Bernoulli().has_score(torch.zeros(2, 3), torch.ones(2, 3))
    # Rounded to half precision: 1 - p is N g but for 2^-9.
    outputs = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    score = fused_so.Bernoulli().score(outputs, torch.ones(2, 3)).bfloat16()
    assert fused_so.Bernoulli().has_score(outputs, score)


@pytest.mark.parametrize("reduction", ["batchmean", "sum"])
@pytest.mark.parametrize("share, computed", [(2.0, False), (0.05, True), (1e-3, True)])
@pytest.mark.parametrize(
    "method, options",
    [
        ("KFAC", {}),
        ("KFAC", {"weight_decay": 0.1}),
        ("EKFAC", {}),
        ("EKFAC", {"momentum": 0.5}),
        ("TONGA", {}),
    ],
)
def test_the_loss_is_computed_only_where_it_may_bound_the_step(
    method, options, share, computed, reduction, monkeypatch
):
    values, models = [], [chain(4, 5, 3) for _ in range(2)]
    value = BatchLoss.value

    def counted(*arguments):
        values.append(value(*arguments))
        return values[-1]

    monkeypatch.setattr(BatchLoss, "value", counted)
    models[1].load_state_dict(models[0].state_dict())
    x, y = torch.randn(30, 4, dtype=DOUBLE), targets("bernoulli", 30, 3)
    build, likelihood = getattr(fused_so, method), fused_so.Bernoulli(reduction=reduction)
    if method == "TONGA" and reduction == "sum":
        options = {**options, "loss_reduction": "sum"}
    for model in models:
        torch.manual_seed(0)
        scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
        opt = build(
            model, lr=0.1, likelihood=likelihood, max_decrease=share, grad_scaler=scaler, **options
        )
        for _ in range(3):
            opt.zero_grad()
            scaler.scale(loss_of("bernoulli", model(x), y, reduction)).backward()
            scaler.step(opt)
            scaler.update()
        if model is models[0]:
            assert bool(values) == computed
            monkeypatch.setattr(BatchLoss, "is_at_least", lambda *_: False)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("method", METHODS)
def test_the_passes_of_the_curvature_are_no_batches_of_the_loss(method):
    models = [chain(4, 5, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for model, factors in zip(models, ("exact", "gauss_newton"), strict=True):
        opt = METHODS[method](model, likelihood=fused_so.Gaussian(), factors=factors)
        torch.manual_seed(4)
        x, y = torch.randn(30, 4, dtype=DOUBLE), torch.randn(30, 3, dtype=DOUBLE)
        loss = F.mse_loss(model(x), y) / 2
        loss.backward()
        torch.testing.assert_close(opt._batch_loss.value(), loss.detach())
        opt.zero_grad()
        assert opt._batch_loss.value() is None


def test_no_step_goes_uphill_where_the_loss_has_other_terms():
    # With this one all gradients at the outputs are positive, as of no target.
    model, x = chain(4, 5, 3), torch.randn(30, 4, dtype=DOUBLE)
    opt = fused_so.KFAC(model, likelihood=fused_so.Categorical(), warmup=0)
    before = parameters(model)
    outputs = model(x)
    (F.cross_entropy(outputs, outputs.argmax(1)) + 100 * outputs.mean()).backward()
    opt.step()
    assert opt.diagnostics()["bound"] == [0]
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("decay", [None, 0.9])
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
@pytest.mark.parametrize("kind", KINDS)
def test_tonga_predicts_no_larger_decrease(kind, reduction, decay):
    model = nn.Sequential(chain(4, 5, 3), nn.LayerNorm(3, dtype=DOUBLE))
    opt = fused_so.TONGA(
        model, lr=1e-3, momentum=0.0, decay=decay, max_decrease=1e-3,
        likelihood=LIKELIHOODS[kind](reduction),
        loss_reduction="sum" if reduction == "sum" else "mean",
    )  # fmt: skip
    for _ in range(2):
        x, y = torch.randn(30, 4, dtype=DOUBLE), targets(kind, 30, 3)
        opt.zero_grad()
        loss = loss_of(kind, model(x), y, reduction)
        loss.backward()
        before = parameters(model)
        opt.step()
        changes = [
            (old - new.detach()) / 1e-3 for old, new in zip(before, model.parameters(), strict=True)
        ]
        *layers, gain, offset = zip(changes, model.parameters(), strict=True)
        decrease = sum((change * p.grad).sum() for change, p in layers)
        torch.testing.assert_close(decrease, 1e-3 * loss.detach())
        for change, p in (gain, offset):  # no linear layer's: unbounded
            torch.testing.assert_close(change, p.grad)
    assert opt._batch_loss.value() is None


def test_tonga_descends_on_a_small_loss_whose_likelihood_it_knows():
    # Without it the loss grows tenfold within 50 updates.
    model = chain(6, 8, 2, 8, 6)
    x = torch.rand(64, 2, dtype=DOUBLE) @ torch.rand(2, 6, dtype=DOUBLE)
    opt = fused_so.TONGA(model, likelihood=nn.MSELoss())
    losses = []
    for _ in range(200):
        opt.zero_grad()
        losses.append(F.mse_loss(model(x), x))
        losses[-1].backward()
        opt.step()
    assert max(losses) < 1.5 * losses[0]
    # The last ones swing, and rounding decides how far.
    assert min(losses) < 0.03 * losses[0]


def test_without_a_likelihood_there_is_no_bound():
    models = [chain(4, 5, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x, y = torch.randn(30, 4, dtype=DOUBLE), torch.randint(0, 3, (30,))
    for model, share in zip(models, (None, 1e-9), strict=True):
        opt = fused_so.KFAC(model, max_decrease=share)
        F.cross_entropy(model(x), y).backward()
        opt.step()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p, q)


def test_a_grad_scaler_changes_nothing():
    models = [chain(4, 5, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x, y = torch.randn(30, 4, dtype=DOUBLE), torch.randn(30, 3, dtype=DOUBLE)
    for model, scale in zip(models, (1.0, 1024.0), strict=True):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        opt = fused_so.KFAC(
            model, likelihood=fused_so.Gaussian(), factors="exact", max_decrease=1e-3,
            grad_scaler=scaler,
        )  # fmt: skip
        scaler.scale(F.mse_loss(model(x), y) / 2).backward()
        scaler.step(opt)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_the_bound_is_no_number_where_the_outputs_are_none():
    # A loss that leaves a NaN of the outputs alone has finite gradients.
    model = nn.Sequential(nn.Linear(4, 3, dtype=DOUBLE))
    opt = fused_so.KFAC(model, likelihood=fused_so.Bernoulli(), factors="empirical")
    x = torch.randn(30, 4, dtype=DOUBLE)
    outputs = model(x)
    outputs.register_hook(lambda g: torch.nan_to_num(g))
    opt._batch_loss._passes.append((torch.full((2, 3), torch.nan), torch.ones(2, 3)))
    F.binary_cross_entropy_with_logits(outputs, torch.ones_like(outputs)).backward()
    opt.step()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("structure", ["block_diagonal", "block_tridiagonal"])
def test_a_classifier_that_fits_its_data_stays_fit(structure):
    # Its curvature vanishes; without max_decrease the loss stays between 5e-3 and 0.2.
    torch.manual_seed(0)
    model = chain(10, 20, 20, 4, dtype=torch.float32)
    x = torch.randn(400, 10)
    y = chain(10, 30, 4, dtype=torch.float32)(4 * x).argmax(1)
    opt = fused_so.KFAC(model, likelihood=nn.CrossEntropyLoss(), structure=structure)
    losses = []
    for step in range(500):
        rows = torch.arange(64) + 64 * step
        opt.zero_grad()
        F.cross_entropy(model(x[rows % 400]), y[rows % 400]).backward()
        opt.step()
        if step >= 400:
            with torch.no_grad():
                losses.append(F.cross_entropy(model(x), y).item())
    assert max(losses) < 2e-3


@pytest.mark.parametrize("method", METHODS)
def test_factors_that_nobody_asked_for_come_with_a_warning(method, recwarn):
    METHODS[method](chain(4, 3), factors="empirical")
    METHODS[method](chain(4, 3), likelihood=fused_so.Gaussian())
    assert not recwarn
    with pytest.warns(
        UserWarning, match="without the likelihood .* pass likelihood= .* or factors"
    ):
        METHODS[method](chain(4, 3))
