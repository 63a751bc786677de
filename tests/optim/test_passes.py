"""The extra backward passes: when they are made, what they leave, and what they bear."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn

import fused_so
from tests.optim.nets import DOUBLE, chain, linears, parameters, twins

METHODS = {
    "KFAC": fused_so.KFAC,
    "tridiagonal": lambda model, *args, **options: fused_so.KFAC(
        model, *args, structure="block_tridiagonal", **options
    ),
    "EKFAC": fused_so.EKFAC,
}
SOURCES = ("sampled", "gauss_newton", "exact", "empirical")


def build(method, model, *args, factors="sampled", **options):
    likelihood = None if factors == "empirical" else fused_so.Categorical()
    return METHODS[method](model, *args, likelihood=likelihood, factors=factors, **options)


def batch(n=12, dtype=DOUBLE):
    return torch.randn(n, 6, dtype=dtype), torch.randint(0, 3, (n,))


def train(model, opt, steps, seed=1, dtype=DOUBLE):
    torch.manual_seed(seed)
    for _ in range(steps):
        x, y = batch(dtype=dtype)
        opt.zero_grad()
        nn.functional.cross_entropy(model(x).to(dtype), y).backward()
        opt.step()


@pytest.fixture
def grad_calls(monkeypatch):
    calls, grad = [], torch.autograd.grad

    def counted(*args, **options):
        calls.append(1)
        return grad(*args, **options)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    return calls


@pytest.mark.parametrize(("factors", "passes"), [("sampled", 1), ("gauss_newton", 1), ("exact", 3)])
def test_passes_are_made_on_steps_with_statistics_only(grad_calls, factors, passes):
    model = chain(6, 5, 3)
    opt = build("KFAC", model, factors=factors, statistics_every=4)
    made, handed = [], []
    for _ in range(10):
        grad_calls.clear()
        before = opt.state[model[0].weight].get("examples")
        train(model, opt, 1)
        made.append(len(grad_calls))
        handed.append(opt.state[model[0].weight]["examples"] != before)
    due = [t in (0, 1, 2, 4, 8) for t in range(10)]
    assert made == [passes if d else 0 for d in due]
    assert handed == due


def test_no_pass_where_only_few_rows_are_kept(grad_calls):
    # 4 rows are fewer than units, so that the layers are seen on every step.
    model = chain(40, 30, 20)
    opt = build("KFAC", model, statistics_every=4)
    made = []
    for t in range(9):
        grad_calls.clear()
        opt.zero_grad()
        x = torch.randn(4, 40, dtype=DOUBLE)
        nn.functional.cross_entropy(model(x), torch.randint(0, 20, (4,))).backward()
        opt.step()
        made += [t] * len(grad_calls)
        assert all(capture.active for capture in opt._captures)
    assert made == [0, 1, 2, 4, 8]


def test_ekfac_also_makes_them_for_its_diagonal(grad_calls):
    model = chain(6, 5, 3)
    opt = build("EKFAC", model, statistics_every=8, diagonal_every=3)
    made = []
    for t in range(10):
        grad_calls.clear()
        train(model, opt, 1)
        made += [t] * len(grad_calls)
    assert made == [0, 1, 2, 3, 4, 6, 8, 9]


def test_no_pass_without_gradients_or_for_copies(grad_calls):
    model = chain(6, 5, 3)
    opt = build("KFAC", model)
    x, _ = batch()
    with torch.no_grad():
        model(x)
    with torch.inference_mode():
        model(x)
    state = torch.get_rng_state()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin(x).sum().backward()
    with opt.unobserved():
        model(x)
    assert torch.equal(torch.get_rng_state(), state)
    assert not grad_calls
    assert not opt.state[model[0].weight]
    opt.remove_hooks()
    model(x).sum().backward()
    assert not grad_calls
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("factors", SOURCES)
@pytest.mark.parametrize("method", METHODS)
def test_the_gradient_of_the_loss_is_untouched(method, factors):
    model, twin = twins(6, 5, 3)
    opt = build(method, model, factors=factors)
    for _ in range(3):
        x, y = batch()
        for net in (model, twin):
            net.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
        opt.step()
        twin.load_state_dict(model.state_dict())


@pytest.mark.parametrize("rows", [4, 50])
@pytest.mark.parametrize("method", METHODS)
def test_no_activation_outlives_the_step_or_zero_grad(method, rows):
    model = chain(40, 30, 20)
    opt = build(method, model)
    for end in ("step", "zero_grad", "step"):
        kept = []
        handle = model[0].register_forward_hook(
            lambda module, args, output, kept=kept: kept.extend(
                weakref.ref(tensor.untyped_storage()) for tensor in (args[0], output)
            )
        )
        nn.functional.cross_entropy(
            model(torch.randn(rows, 40, dtype=DOUBLE)), torch.randint(0, 20, (rows,))
        ).backward()
        handle.remove()
        getattr(opt, end)()
        gc.collect()
        assert all(layer.batch == {} for layer in opt._layers)
        assert all(capture.edges is None for capture in opt._captures)
        assert all(reference() is None for reference in kept)


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factors", ["sampled", "exact", "empirical"])
@pytest.mark.parametrize("method", METHODS)
def test_resuming_is_bit_for_bit(method, factors, dtype, tmp_path):
    options = {"factors": factors, "statistics_every": 3, "inverse_every": 4, "weight_decay": 0.01}
    model = chain(6, 5, 3, dtype=dtype)
    opt = build(method, model, **options)
    train(model, opt, 7, dtype=dtype)
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "checkpoint.pt")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed = chain(6, 5, 3, dtype=dtype)
    again = build(method, resumed, **options)
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["opt"])
    train(model, opt, 9, seed=2, dtype=dtype)
    train(resumed, again, 9, seed=2, dtype=dtype)
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
        for key, value in opt.state[p].items():
            other = again.state[q][key]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


@pytest.mark.parametrize("method", METHODS)
def test_other_architectures_are_refused_and_change_nothing(method):
    model = chain(6, 5, 3)
    opt = build(method, model)
    train(model, opt, 2)
    before = {k: v.clone() for k, v in opt.state[model[0].weight].items() if torch.is_tensor(v)}
    with pytest.raises(ValueError, match=r"layer '0' .*\(6, 5, True\) here and \(6, 4, True\)"):
        opt.load_state_dict(build(method, chain(6, 4, 3)).state_dict())
    with pytest.raises(ValueError, match="must be one of .*KFAC, got one of ACP"):
        opt.load_state_dict(fused_so.ACP(chain(6, 5, 3)).state_dict())
    for key, value in before.items():
        assert torch.equal(opt.state[model[0].weight][key], value)
    with pytest.raises(TypeError, match="bound to its model's hooks"):
        copy.deepcopy(opt)


KFAC_CHOICES = {
    "factors": ({"factors": "exact"}, {"factors": "gauss_newton"}),
    "structure": ({"structure": "block_diagonal"}, {"structure": "block_tridiagonal"}),
    "recipe": ({"recipe": None}, {"recipe": "paper"}),
}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("choice", KFAC_CHOICES)
def test_other_choices_are_refused_and_change_nothing(choice, swapped):
    mine, other = reversed(KFAC_CHOICES[choice]) if swapped else KFAC_CHOICES[choice]
    options = {"likelihood": fused_so.Categorical(), "inverse_every": 3}
    model = chain(6, 5, 3)
    opt = fused_so.KFAC(model, **options | mine)
    model(batch()[0]).sum().backward()
    before = copy.deepcopy(opt.state_dict())
    there = fused_so.KFAC(chain(6, 5, 3), **options | other | {"inverse_every": 7}).state_dict()
    a, b = (repr(chosen[choice]) for chosen in (mine, other))
    with pytest.raises(ValueError, match=f"{choice} .* {a} here and {b} there"):
        opt.load_state_dict(there)
    after = opt.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, state in before["state"].items():
        for key, value in state.items():
            same = torch.equal if torch.is_tensor(value) else lambda a, b: a == b
            assert same(after["state"][index][key], value)


def test_ekfac_refuses_other_factors():
    there = build("EKFAC", chain(6, 5, 3), factors="empirical").state_dict()
    opt = build("EKFAC", chain(6, 5, 3))
    with pytest.raises(ValueError, match="factors .* 'sampled' here and 'empirical' there"):
        opt.load_state_dict(there)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_accumulation_is_the_step_of_the_whole_batch(method):
    whole, parts = twins(6, 5, 3)
    optimizers = [
        build(method, model, 0.1, factors="exact", statistics_every=1, inverse_every=1)
        for model in (whole, parts)
    ]
    for _ in range(3):
        x, y = batch(60)
        for opt in optimizers:
            opt.zero_grad()
        nn.functional.cross_entropy(whole(x), y).backward()
        for some, of in zip(x.split(20), y.split(20), strict=True):
            (nn.functional.cross_entropy(parts(some), of) / 3).backward()
        for opt in optimizers:
            opt.step()
        for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


ACCUMULATED = [
    ("empirical", "mean", "'empirical' takes one backward pass a step, .* layer '(0|2)'"),
    ("empirical", "sum", "'empirical' takes one backward pass a step, .* layer '(0|2)'"),
    ("exact", "sum", "reduction 'sum' takes one backward pass a step, .* layer '2' .*'batchmean'"),
    ("sampled", "none", "reduction 'none' takes one backward pass a step, .* layer '2'"),
]


@pytest.mark.parametrize(("factors", "reduction", "message"), ACCUMULATED)
@pytest.mark.parametrize("method", METHODS)
def test_gradient_accumulation_of_unknown_scale_is_refused(method, factors, reduction, message):
    model = chain(6, 5, 3)
    likelihood = fused_so.Categorical(reduction=reduction)
    opt = METHODS[method](model, likelihood=likelihood, factors=factors, statistics_every=1)

    def backward():
        x, y = batch()
        loss = nn.functional.cross_entropy(model(x), y, reduction=reduction)
        loss.sum().backward()

    # A GradScaler may have skipped the step.
    for clear in (opt.zero_grad, model.zero_grad, lambda: model.zero_grad(set_to_none=False)):
        clear()
        backward()
    kept = {k: v.clone() for k, v in opt.state[model[2].weight].items() if torch.is_tensor(v)}
    before = parameters(model)
    with pytest.raises(ValueError, match=message):
        backward()
    if factors == "empirical":  # others learn from the forward pass
        for key, value in kept.items():
            assert torch.equal(opt.state[model[2].weight][key], value), key
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    for _ in range(2):
        opt.zero_grad()
        backward()
        opt.step()
    assert not torch.equal(model[0].weight, before[0])


@pytest.mark.parametrize("max_norm", [None, 1e-2])
@pytest.mark.parametrize("method", METHODS)
def test_empirical_factors_of_a_sum_are_those_of_the_sum(method, max_norm):
    models = twins(6, 5, 3)
    for model, reduction in zip(models, ("mean", "sum"), strict=True):
        opt = METHODS[method](
            model, likelihood=fused_so.Categorical(reduction=reduction), factors="empirical",
            statistics_every=1, max_norm=max_norm,
        )  # fmt: skip
        torch.manual_seed(3)
        for _ in range(3):
            x, y = batch()
            opt.zero_grad()
            nn.functional.cross_entropy(model(x), y, reduction=reduction).backward()
            opt.step()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_a_layer_called_twice_is_no_accumulation():
    model = chain(6, 6, 3)
    opt = fused_so.KFAC(model, statistics_every=1)
    for _ in range(2):
        opt.zero_grad()
        x, y = batch()
        nn.functional.cross_entropy(model[2](model[0](model[0](x))), y).backward()
        opt.step()


@pytest.mark.parametrize("method", METHODS)
def test_closures_and_schedulers(method):
    models = twins(6, 5, 3)
    first, second = (build(method, model, 0.1, factors="exact") for model in models)
    schedule = torch.optim.lr_scheduler.StepLR(first, 1, gamma=0.5)
    for t in range(3):
        x, y = batch()

        def closure(x=x, y=y):
            first.zero_grad()
            loss = nn.functional.cross_entropy(models[0](x), y)
            loss.backward()
            return loss

        assert first.step(closure).item() > 0
        schedule.step()
        second.param_groups[0]["lr"] = 0.1 * 0.5**t
        second.zero_grad()
        nn.functional.cross_entropy(models[1](x), y).backward()
        second.step()
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("factors", ["empirical", "exact"])
@pytest.mark.parametrize("method", METHODS)
def test_gradient_scaler_changes_nothing_but_rounding(method, factors):
    models = twins(6, 5, 3, dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaled = build(method, models[0], factors=factors, grad_scaler=scaler)
    bare = build(method, models[1], factors=factors)
    for _ in range(3):
        x, y = batch(32, torch.float32)
        scaled.zero_grad()
        bare.zero_grad()
        scaler.scale(nn.functional.cross_entropy(models[0](x), y)).backward()
        scaler.unscale_(scaled)
        scaler.step(scaled)
        scaler.update()
        nn.functional.cross_entropy(models[1](x), y).backward()
        bare.step()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_scaled_half_precision_gradients_do_not_underflow():
    # Gradients of 1e-7 an example are subnormal in float16 unless they are scaled.
    model = nn.Linear(4, 3, dtype=torch.float16)
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    opt = fused_so.KFAC(model, grad_scaler=scaler)
    x = torch.randn(2, 4, dtype=torch.float16)
    scaler.scale(1e-7 * model(x).sum()).backward()
    # n g = 2e-7 for every entry
    expected = torch.full((3, 3), 4e-14)
    torch.testing.assert_close(
        opt.state[model.weight]["output_covariance"], expected, rtol=1e-2, atol=0
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("method", METHODS)
def test_compiled_models_learn_the_same(method, backend):
    torch.compiler.reset()
    model, twin = twins(6, 5, 3, dtype=torch.float32)
    compiled = torch.compile(twin, backend=backend)
    a, b = build(method, model, factors="exact"), build(method, compiled, factors="exact")
    train(model, a, 4, dtype=torch.float32)
    train(compiled, b, 4, dtype=torch.float32)
    refreshes = [opt.diagnostics()["layers"]["0"]["refreshes"] for opt in (a, b)]
    assert refreshes[0] == refreshes[1] > 1
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("factors", ["sampled", "exact"])
def test_activations_in_place(factors):
    models = twins(6, 5, 3, activation=nn.ReLU)
    for module in models[1]:
        if isinstance(module, nn.ReLU):
            module.inplace = True
    for model in models:
        opt = build("KFAC", model, factors=factors)
        train(model, opt, 4)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("factors", SOURCES)
@pytest.mark.parametrize("method", METHODS)
def test_steps_under_autocast(method, factors):
    model, twin = twins(6, 5, 3, dtype=torch.float32)
    options = {"factors": factors, "statistics_every": 1, "inverse_every": 1}
    a, b = build(method, model, **options), build(method, twin, **options)
    start = parameters(model)
    for _ in range(3):
        x, y = batch(200, torch.float32)
        for net, opt, half in ((model, a, False), (twin, b, True)):
            opt.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=half), torch.random.fork_rng():
                loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()
            opt.step()
    whole, half, before = (
        torch.cat([p.detach().flatten() for p in params])
        for params in (model.parameters(), twin.parameters(), start)
    )
    assert (half - whole).norm() < 0.1 * (whole - before).norm()


def test_half_precision_autocast():
    model, twin = twins(6, 5, 3, dtype=torch.float32)
    x, _ = batch(200, torch.float32)
    a, b = build("KFAC", model, factors="exact"), build("KFAC", twin, factors="exact")
    model(x)
    with torch.autocast("cpu", torch.bfloat16):
        twin(x)
    for p, q in zip(linears(model), linears(twin), strict=True):
        exact, half = (o.state[m.weight]["output_covariance"] for o, m in ((a, p), (b, q)))
        assert half.dtype == torch.float32
        assert (half - exact).norm() < 2e-2 * exact.norm()


def test_a_model_that_returns_no_tensor_is_named():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x):
            return self.linear(x), x

    model = Pair()
    opt = fused_so.KFAC(model, likelihood=fused_so.Gaussian())
    with pytest.raises(TypeError, match="must return one tensor .* got tuple.*'empirical'"):
        model(torch.randn(4, 3))
    opt.remove_hooks()
    opt = fused_so.KFAC(model)
    before = parameters(model)
    model(torch.randn(4, 3))[0].square().mean().backward()
    opt.step()
    assert not torch.equal(model.linear.weight, before[0])


@pytest.mark.parametrize("method", METHODS)
def test_a_layer_beside_the_path_to_the_output(method):
    class Beside(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(6, 6, dtype=DOUBLE) for _ in range(3))
            self.kept = None

        def forward(self, x):
            h = self.a(x).tanh()
            self.kept = self.b(h)  # its gradient comes from elsewhere, or from nowhere
            return self.c(h)

    model = Beside()
    opt = METHODS[method](model, likelihood=fused_so.Categorical(), statistics_every=1)
    x, y = torch.randn(12, 6, dtype=DOUBLE), torch.randint(0, 6, (12,))
    for _ in range(2):
        before = parameters(model.b)
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
        assert torch.equal(model.b.weight, before[0])
    opt.zero_grad()
    loss = nn.functional.cross_entropy(model(x), y) + model.kept.square().mean()
    loss.backward()
    with pytest.warns(UserWarning, match="no batch of layer 'b'"):
        opt.step()
    assert not torch.equal(model.b.weight, before[0])
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("factors", ["exact", "empirical"])
@pytest.mark.parametrize("method", METHODS)
def test_nan_keeps_the_last_inverse_and_is_named_once(method, factors):
    model = chain(6, 5, 3)
    opt = build(method, model, factors=factors, statistics_every=1, inverse_every=1)
    train(model, opt, 3)
    names = (
        "covariance", "mean", "output_covariance", "inverse", "output_inverse", "cross",
        "regression", "basis", "output_basis", "momentum_buffer",
    )  # fmt: skip
    states = [opt.state[layer.weight] for layer in linears(model)]
    kept = [{k: s[k].clone() for k in names if k in s} for s in states]
    before = parameters(model)
    with pytest.warns(UserWarning) as caught:
        for _ in range(2):
            x, y = batch()
            x[3, 2] = float("nan")
            opt.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            opt.step()
    messages = [str(w.message) for w in caught if "KFAC" in str(w.message)]
    assert len(messages) == len(set(messages))
    assert any("input of layer '0' holds a NaN or Inf" in m for m in messages)
    assert any("output gradient of layer '2' holds a NaN or Inf" in m for m in messages)
    assert any("a gradient is not finite" in m for m in messages)
    for state, values in zip(states, kept, strict=True):
        for key, value in values.items():
            assert torch.equal(state[key], value), key
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)
    train(model, opt, 1)
    assert not torch.equal(model[0].weight, before[0])
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("factors", SOURCES)
@pytest.mark.parametrize("method", METHODS)
def test_an_empty_batch_changes_nothing(method, factors):
    model = chain(6, 5, 3)
    options = {"factors": factors, "statistics_every": 1, "momentum": 0.0, "nesterov": False}
    opt = build(method, model, **options)
    train(model, opt, 2)
    before = parameters(model)
    opt.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.zeros(0, 6, dtype=DOUBLE)).sum().backward()
        opt.step()
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)


FISHER = [
    ({"likelihood": "gaussian"}, TypeError, "likelihood must be nn.MSELoss.* got str"),
    ({"likelihood": nn.L1Loss()}, TypeError, "likelihood must be nn.MSELoss.* got L1Loss"),
    ({"factors": "monte carlo"}, ValueError, "factors must be one of .*'exact'.*got 'monte carlo'"),
    ({"factors": "exact"}, ValueError, "factors='exact' needs the likelihood .* likelihood="),
    ({"grad_scaler": 1}, TypeError, "grad_scaler must be a torch.amp.GradScaler.* got int"),
    ({"lr": -1.0}, ValueError, "lr must be at least 0 and finite, got -1"),
    ({"damping": -1e-3}, ValueError, "damping must be at least 0 and finite, got -0.001"),
    ({"relative_damping": float("nan")}, ValueError, "relative_damping must .* got nan"),
    ({"momentum": 1.5}, ValueError, "momentum must be at least 0 and at most 1, got 1.5"),
    ({"weight_decay": -1}, ValueError, "weight_decay must be at least 0 and finite, got -1"),
    ({"decay": 2.0}, ValueError, "decay must be .* at most 1, got 2.0"),
    ({"statistics_every": 0}, ValueError, "statistics_every must be .* >= 1, got 0"),
    ({"inverse_every": 2.5}, ValueError, "inverse_every must be .* >= 1, got 2.5"),
    ({"inverse_every": "often"}, ValueError, "inverse_every must be .* or 'auto', got 'often'"),
    ({"drift_tolerance": 0.0}, ValueError, "drift_tolerance must be positive, got 0"),
    ({"max_norm": 0}, ValueError, "max_norm must be positive, got 0"),
    ({"warmup": -1}, ValueError, "warmup must be at least 0 and finite, got -1"),
    ({"max_decrease": 0.0}, ValueError, "max_decrease must be positive, got 0"),
    ({"max_decrease": -1}, ValueError, "max_decrease must be positive, got -1"),
]
OWN = {
    fused_so.KFAC: [
        ({"structure": "dense"}, ValueError, "structure must be one of .* got 'dense'"),
        ({"recipe": 1}, ValueError, "recipe must be None or 'paper', got 1"),
    ],
    fused_so.EKFAC: [({"diagonal_every": 0}, ValueError, "diagonal_every must .* >= 1, got 0")],
}
OF_THE_FISHER = ("likelihood", "factors", "grad_scaler", "max_decrease")
CASES = [(method, *case) for method, own in OWN.items() for case in FISHER + own] + [
    (fused_so.NNN, *case) for case in FISHER if next(iter(case[0])) not in OF_THE_FISHER
]


@pytest.mark.parametrize(("method", "options", "error", "message"), CASES)
def test_bad_options_are_named(method, options, error, message):
    model = chain(3, 2)
    with pytest.raises(error, match=message):
        method(model, **options)
    assert not any(m._forward_pre_hooks for m in model.modules())


class Positions(nn.Module):
    """Logits of every position, their classes last, second, or with the positions as rows."""

    def __init__(self, form):
        super().__init__()
        self.layers, self.form = chain(6, 5, 3), form

    def forward(self, x):
        f = self.layers(x)
        return {"last": f, "second": f.transpose(1, 2), "rows": f.flatten(0, 1)}[self.form]


def positions_loss(f, y, form):
    if form == "rows":
        return nn.functional.cross_entropy(f, y.flatten())
    return nn.functional.cross_entropy(f.transpose(1, 2) if form == "last" else f, y)


@pytest.mark.parametrize("positions", [1, 7])
@pytest.mark.parametrize("factors", ["sampled", "gauss_newton", "exact"])
def test_classes_in_the_last_dimension_are_refused(factors, positions):
    model = Positions("last")
    opt = build("KFAC", model, factors=factors)
    before = parameters(model)
    x, y = torch.randn(4, positions, 6, dtype=DOUBLE), torch.randint(0, 3, (4, positions))
    shape = rf"\(4, {positions}, 3\)"
    with pytest.raises(ValueError, match=f"outputs of shape {shape} .* over dimension 2"):
        positions_loss(model(x), y, "last").backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    del opt


@pytest.mark.parametrize("method", METHODS)
def test_positions_are_rows_wherever_the_classes_may_be(method):
    models = [Positions("second"), Positions("rows")]
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        # A bound would be on the divergence of an example: of all its positions, or of one.
        opt = build(method, model, 0.1, factors="exact", statistics_every=1, max_norm=None)
        torch.manual_seed(2)
        for _ in range(3):
            x, y = torch.randn(4, 7, 6, dtype=DOUBLE), torch.randint(0, 3, (4, 7))
            opt.zero_grad()
            positions_loss(model(x), y, model.form).backward()
            opt.step()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


def test_other_losses_on_positions_are_let_pass():
    model = Positions("second")
    opt = build("KFAC", model)
    both = torch.randn(4, 3, 7, dtype=DOUBLE)
    both = both - both.mean(1, keepdim=True)
    both = both - both.mean(2, keepdim=True) + 1e-4 * torch.tensor([1.0, -1, 1, -1, 1, -1, 0])
    for loss in (
        lambda f: 0 * f.sum(),
        lambda f: (both * f).sum(),
        lambda f: f.square().mean(),
        lambda f: f.sum(),
    ):
        opt._passes._knows_classes = False
        opt.zero_grad()
        loss(model(torch.randn(4, 7, 6, dtype=DOUBLE))).backward()
        opt.step()
