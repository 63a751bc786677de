"""UBP against Algorithm 2 done by hand and by torch.func, and as a torch optimizer among others."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

import fused_so
from fused_so.optim import curvature as curvatures
from fused_so.optim.chain import ACTIVATIONS, Link

DOUBLE = torch.float64
N = 9
BOTTLENECK = (5, 7, 3, 6, 4)


def chain(*widths, bias=True, dtype=DOUBLE, activation=nn.Tanh, seed=1):
    torch.manual_seed(seed)
    layers = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out, bias=bias, dtype=dtype), activation()]
    return nn.Sequential(*layers[:-1])


def problem(kind, o=4, n=N, dtype=DOUBLE):
    """A likelihood, and targets for n rows of o outputs."""
    generator = torch.Generator().manual_seed(2)
    if kind == "categorical":
        return fused_so.Categorical(), torch.randint(o, (n,), generator=generator)
    if kind == "bernoulli":
        return fused_so.Bernoulli(), torch.rand(n, o, generator=generator, dtype=dtype).round()
    likelihood = fused_so.Gaussian(0.7, reduction="batchmean")
    return likelihood, torch.randn(n, o, generator=generator, dtype=dtype)


KINDS = ["gaussian", "bernoulli", "categorical"]


def inputs(n=N, width=5, dtype=DOUBLE):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(3), dtype=dtype)


def ubp(model, lr, likelihood, **options):
    """Bare Algorithm 2, unless options say otherwise."""
    options = {"momentum": 0.0, "max_correction": None, "max_norm": None} | options
    return fused_so.UBP(model, lr, likelihood=likelihood, **options)


def backward(model, likelihood, x, y):
    model.zero_grad()
    loss = likelihood.value(model(x), y)
    loss.backward()
    return loss


def stepped(model, lr, likelihood, x, y, **options):
    """The parameters after one step on a copy of the model."""
    model = copy.deepcopy(model)
    opt = ubp(model, lr, likelihood, **options)
    backward(model, likelihood, x, y)
    opt.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def assert_same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}")


def dense(model, x, loss, change, *, curvature="gauss_newton", limit=None):
    """Algorithm 2 with every Jacobian and Hessian built whole, by torch.func, from the loss alone.

    `change(name, gradient)` is what the step will add to a parameter.
    """
    modules = list(model)
    rows = [x]
    for module in modules:
        rows.append(module(rows[-1]).detach())
    positions = [i for i, module in enumerate(modules) if isinstance(module, nn.Linear)]
    outputs = rows[-1]
    plain = {len(modules): torch.func.grad(loss)(outputs)}
    per_row = torch.einsum("iaib->iab", torch.func.hessian(loss)(outputs))
    signal, result = plain[len(modules)], {}
    for i in reversed(positions):
        module, h, a = modules[i], rows[i], rows[i + 1]
        above = next((j for j in positions if j > i), len(modules))

        def run(a, first, last):
            for module in modules[first:last]:
                a = module(a)
            return a

        def phi(a, first=i + 1, last=above):
            return run(a, first, last)

        def upper(a, first=i + 1):
            return run(a, first, len(modules))

        da = torch.func.vjp(phi, a)[1](signal)[0]
        changes = {"weight": change(f"{i}.weight", da.T @ h)}
        moved = h @ changes["weight"].T
        if module.bias is not None:
            changes["bias"] = change(f"{i}.bias", da.sum(0))
            moved = moved + changes["bias"]
        if curvature == "hessian":
            hessian = torch.func.hessian(lambda a, upper=upper: loss(upper(a)))(a)
            term = torch.einsum("iajb,jb->ia", hessian, moved)
        else:
            jac = torch.vmap(torch.func.jacrev(upper))(a)
            term = torch.einsum("npa,npq,nqb,nb->na", jac, per_row, jac, moved)
        weight = module.weight.detach()
        signal = da @ (weight + changes["weight"]) + term @ weight
        if limit is not None:
            # The plain signal: the gradient at the old weights.
            reference = torch.func.grad(lambda h, i=i: loss(run(h, i, len(modules))))(h)
            error = signal - reference
            signal = reference + error * min(1.0, limit * reference.norm() / error.norm())
        for name, value in reversed(changes.items()):
            old = getattr(module, name).detach()
            result[f"{i}.{name}"] = old + value
    return dict(reversed(result.items()))


def plain_change(lr):
    return lambda name, gradient: -lr * gradient


# The algorithm.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.GELU, nn.Sigmoid])
@pytest.mark.parametrize(
    ("curvature", "mode"),
    [("gauss_newton", "matrix_free"), ("gauss_newton", "jacobian"), ("hessian", "matrix_free")],
)
def test_step_is_algorithm_2_with_dense_derivatives(kind, bias, activation, curvature, mode):
    model = chain(*BOTTLENECK, bias=bias, activation=activation)
    likelihood, y = problem(kind)
    x = inputs()
    got = stepped(model, 0.5, likelihood, x, y, curvature=curvature, mode=mode)
    expected = dense(
        model, x, lambda f: likelihood.value(f, y), plain_change(0.5), curvature=curvature
    )
    assert_same(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_three_exact_routes_agree(kind, bias, seed, monkeypatch):
    widths = [(6, 9, 2, 8, 3, 5), (5, 4, 3, 2, 6), (4, 12, 12, 1, 12, 7), (8, 3, 10)][seed]
    model = chain(*widths, bias=bias, seed=seed)
    likelihood, y = problem(kind, o=widths[-1])
    x = inputs(width=widths[0])
    factored = []
    factor = curvatures.triangular_factor
    monkeypatch.setattr(
        curvatures, "triangular_factor", lambda rows: factored.append(1) or factor(rows)
    )
    recompressed = stepped(model, 0.8, likelihood, x, y, mode="jacobian")
    assert bool(factored) == any(d < widths[-1] for d in widths[2:-1])
    monkeypatch.setattr(curvatures, "triangular_factor", lambda rows: rows)
    explicit = stepped(model, 0.8, likelihood, x, y, mode="jacobian")
    matrix_free = stepped(model, 0.8, likelihood, x, y, mode="matrix_free")
    for other in (recompressed, matrix_free):
        assert_same(explicit, other, rtol=1e-12, atol=1e-12)


def test_one_hidden_layer_by_hand():
    # One example, one unit a layer: f = v tanh(w x), l = (f - y)^2 / 2.
    x, y, w, v, lr = 0.7, -0.4, 0.6, 1.3, 0.2
    model = nn.Sequential(
        nn.Linear(1, 1, bias=False, dtype=DOUBLE), nn.Tanh(),
        nn.Linear(1, 1, bias=False, dtype=DOUBLE),
    )  # fmt: skip
    with torch.no_grad():
        model[0].weight.fill_(w)
        model[2].weight.fill_(v)
    h = math.tanh(w * x)
    df = v * h - y
    dv = -lr * df * h
    # (v + dv) df + v * 1 * dv h, and back through tanh
    dw = -lr * ((v + dv) * df + v * dv * h) * (1 - h * h) * x
    rows = torch.tensor([[x]], dtype=DOUBLE)
    targets = torch.tensor([[y]], dtype=DOUBLE)
    got = stepped(model, lr, fused_so.Gaussian(), rows, targets)
    torch.testing.assert_close(got["2.weight"].item(), v + dv, rtol=1e-14, atol=0)
    torch.testing.assert_close(got["0.weight"].item(), w + dw, rtol=1e-14, atol=0)


@pytest.mark.parametrize("curvature", ["gauss_newton", "hessian"])
def test_the_signal_is_the_gradient_after_the_layers_above_have_changed(curvature):
    """Halving lr divides the error by four; with Gauss-Newton on curved activations only by two."""
    likelihood, y = problem("bernoulli")
    x = inputs()
    lrs = [0.4 * 2.0**-k for k in range(8)]
    errors = []
    for lr in lrs:
        model = chain(*BOTTLENECK)
        new = stepped(model, lr, likelihood, x, y, curvature=curvature)
        ours = (model[0].weight.detach() - new["0.weight"]) / lr
        with torch.no_grad():
            for name, p in model.named_parameters():
                if not name.startswith("0."):
                    p.copy_(new[name])
        backward(model, likelihood, x, y)
        errors.append((ours - model[0].weight.grad).norm().item())
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(errors)][3:]
    order = 2 if curvature == "hessian" else 1
    assert all(abs(slope - order) < 0.05 for slope in slopes), slopes


def test_gauss_newton_is_of_second_order_for_piecewise_linear_activations():
    likelihood, y = problem("categorical")
    x = inputs()
    model = chain(*BOTTLENECK, activation=nn.LeakyReLU)
    both = [
        stepped(model, 0.3, likelihood, x, y, curvature=curvature)
        for curvature in ("gauss_newton", "hessian")
    ]
    assert_same(*both, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("mode", ["matrix_free", "jacobian", "sketch"])
def test_without_lr_above_it_is_sgd(mode):
    """As lr goes to 0 the steps' difference from SGD's vanishes faster than the steps."""
    likelihood, y = problem("gaussian")
    model, x = chain(*BOTTLENECK), inputs()
    backward(model, likelihood, x, y)
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for lr in (1e-4, 1e-6):
        got = stepped(model, lr, likelihood, x, y, mode=mode)
        old = dict(model.named_parameters())
        for name, gradient in gradients.items():
            difference = (old[name].detach() - got[name]) / lr - gradient
            assert difference.norm() <= 50 * lr * gradient.norm() + 1e-9
    # The top layer has nothing above: SGD's step, to the last rounding.
    torch_step = model[-1].weight.detach() - 1e-6 * gradients["6.weight"]
    torch.testing.assert_close(got["6.weight"], torch_step, rtol=1e-15, atol=0)


def test_layers_above_that_do_not_move_change_nothing():
    likelihood, y = problem("gaussian")
    model, x = chain(*BOTTLENECK), inputs()
    for p in model[2:].parameters():
        p.requires_grad_(False)
    backward(model, likelihood, x, y)
    expected = model[0].weight.detach() - 0.3 * model[0].weight.grad
    got = stepped(model, 0.3, likelihood, x, y)
    torch.testing.assert_close(got["0.weight"], expected, rtol=1e-15, atol=1e-16)


def test_frozen_layers_pass_the_signals_on():
    """Only the top and the bottom move; so do only a weight here and a bias there."""
    likelihood, y = problem("bernoulli")
    x = inputs()
    for frozen in (["2.", "4."], ["6.weight", "4.bias", "2.", "0.bias"]):
        model = chain(*BOTTLENECK)
        for name, p in model.named_parameters():
            p.requires_grad_(not name.startswith(tuple(frozen)))

        def change(name, gradient, frozen=tuple(frozen)):
            return 0 * gradient if name.startswith(frozen) else -0.5 * gradient

        expected = dense(model, x, lambda f: likelihood.value(f, y), change)
        for mode in ("matrix_free", "jacobian"):
            got = stepped(model, 0.5, likelihood, x, y, mode=mode)
            assert_same(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("nesterov", [False, True])
def test_corrections_are_those_of_the_update_that_is_applied(nesterov):
    """Momentum, weight decay and a group's own lr, over three steps, against the dense one."""
    likelihood, y = problem("bernoulli")
    x = inputs()
    model = chain(*BOTTLENECK)
    twin = copy.deepcopy(model)
    lrs = {"0": 0.3, "2": 0.3, "4": 0.9, "6": 0.9}
    opt = ubp(
        model,
        0.3,
        likelihood,
        momentum=0.8,
        nesterov=nesterov,
        weight_decay=0.1,
        params=[
            {"params": model[:4].parameters()},
            {"params": model[4:].parameters(), "lr": 0.9},
        ],
    )
    velocity = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    for _ in range(3):
        old = {name: p.detach().clone() for name, p in twin.named_parameters()}

        def change(name, gradient, old=old):
            update = gradient + 0.1 * old[name]
            velocity[name] = 0.8 * velocity[name] + update
            look_ahead = update + 0.8 * velocity[name] if nesterov else velocity[name]
            return -lrs[name.split(".")[0]] * look_ahead

        expected = dense(twin, x, lambda f: likelihood.value(f, y), change)
        twin.load_state_dict(expected)
        backward(model, likelihood, x, y)
        opt.step()
        got = {name: p.detach() for name, p in model.named_parameters()}
        assert_same(got, expected, rtol=1e-11, atol=1e-12)


def test_ignored_targets_have_no_curvature():
    likelihood, y = problem("categorical")
    y[::3] = -100
    model, x = chain(*BOTTLENECK), inputs()
    expected = dense(model, x, lambda f: likelihood.value(f, y), plain_change(0.5))
    for mode in ("matrix_free", "jacobian"):
        got = stepped(model, 0.5, likelihood, x, y, mode=mode)
        assert_same(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("module", [nn.MSELoss(), nn.BCEWithLogitsLoss(reduction="sum")])
def test_a_loss_module_is_a_likelihood(module):
    model, x = chain(*BOTTLENECK), inputs()
    y = torch.rand(N, 4, dtype=DOUBLE)
    opt = ubp(model, 0.1, module)
    expected = dense(model, x, lambda f: module(f, y), plain_change(0.1))
    module(model(x), y).backward()
    opt.step()
    assert_same(dict(model.named_parameters()), expected, rtol=1e-12, atol=1e-13)


# Sketches.


def test_sketch_is_unbiased():
    """The mean correction over draws, within four standard errors of the exact one."""
    likelihood, y = problem("categorical")
    model, x = chain(5, 6, 4), inputs()
    exact = stepped(model, 0.5, likelihood, x, y)["0.weight"]
    draws = torch.stack(
        [
            stepped(model, 0.5, likelihood, x, y, mode="sketch", sketch_size=2, seed=seed)[
                "0.weight"
            ]
            for seed in range(400)
        ]
    )
    error = draws.std(0) / len(draws) ** 0.5
    assert (error > 0).all()
    assert ((draws.mean(0) - exact).abs() < 4 * error).all()


def test_more_rows_make_a_sketch_less_noisy():
    likelihood, y = problem("gaussian")
    model, x = chain(5, 6, 4), inputs()
    noise = []
    for size in (1, 16):
        draws = [
            stepped(model, 0.5, likelihood, x, y, mode="sketch", sketch_size=size, seed=seed)
            for seed in range(100)
        ]
        noise.append(torch.stack([draw["0.weight"] for draw in draws]).std(0).norm())
    # Four times in the mean.
    assert 3 < noise[0] / noise[1] < 5


def test_sketches_differ_from_step_to_step():
    likelihood, y = problem("gaussian")
    model, x = chain(5, 6, 4), inputs()
    opt = ubp(model, 0.0, likelihood, mode="sketch")
    drawn = []
    original = fused_so.Gaussian.sketch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            fused_so.Gaussian,
            "sketch",
            lambda *a, **k: drawn.append(original(*a, **k)) or drawn[-1],
        )
        for _ in range(2):
            backward(model, likelihood, x, y)
            opt.step()
    assert len(drawn) == 16
    assert len({tuple(rows.sign().flatten().tolist()) for rows in drawn}) == 16


# Recompression.


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_the_triangular_factor_keeps_the_accuracy_of_its_dtype(dtype):
    """Directions that J shrinks a thousandfold, whose squares float32 could not tell from zero."""
    shrink = 1e-3 if dtype == torch.float32 else 1e-7
    u = torch.linalg.qr(torch.randn(5, 40, 6, dtype=DOUBLE)).Q
    v = torch.linalg.qr(torch.randn(5, 6, 6, dtype=DOUBLE)).Q
    sizes = torch.tensor([1, 0.9, 0.5, 3 * shrink, 2 * shrink, shrink], dtype=DOUBLE)
    rows = ((u * sizes) @ v.mT).to(dtype)
    factor = curvatures.triangular_factor(rows)
    assert factor.shape == (5, 6, 6)
    assert factor.dtype == dtype
    # Against the rows as they are, in float64.
    expected = torch.linalg.svdvals(rows.double())
    if dtype == DOUBLE:
        expected = torch.linalg.svdvals(rows)
    error = (torch.linalg.svdvals(factor.double()) - expected).abs().max()
    assert error < 4 * torch.finfo(dtype).eps


def test_singular_rows_have_a_factor():
    rows = torch.zeros(3, 8, 5)
    rows[1] = torch.randn(8, 1)  # of rank 1
    rows[2, :, :2] = 1e-20 * torch.randn(8, 2)
    factor = curvatures.triangular_factor(rows)
    torch.testing.assert_close(
        factor.double().mT @ factor.double(),
        rows.double().mT @ rows.double(),
        rtol=1e-6,
        atol=1e-38,
    )


def test_float32_stays_within_its_rounding_on_an_ill_conditioned_chain():
    likelihood, y = problem("bernoulli", o=12, dtype=torch.float32)
    model = chain(6, 8, 4, 9, 12, dtype=torch.float32)
    with torch.no_grad():
        model[4].weight.mul_(torch.logspace(0, -4, 4))
    x = inputs(width=6, dtype=torch.float32)
    exact = stepped(copy.deepcopy(model).double(), 2.0, likelihood, x.double(), y.double())
    worst = {}
    for mode in ("matrix_free", "jacobian"):
        got = stepped(model, 2.0, likelihood, x, y, mode=mode)
        worst[mode] = max((got[name].double() - exact[name]).abs().max() for name in exact)
    assert worst["jacobian"] <= 2 * worst["matrix_free"] + 1e-7


# The bound.


def test_a_signal_differs_from_the_plain_one_by_no_more_than_the_bound():
    likelihood, y = problem("gaussian")
    model, x = chain(*BOTTLENECK), inputs()
    loss = lambda f: likelihood.value(f, y)  # noqa: E731
    free = ubp(copy.deepcopy(model), 0.5, likelihood)
    backward(free._model, likelihood, x, y)
    free.step()
    ratios = list(free.diagnostics().values())
    assert max(ratios) > 1.5 > min(ratios)
    for mode in ("matrix_free", "jacobian"):
        got = stepped(model, 0.5, likelihood, x, y, max_correction=1.5, mode=mode)
        expected = dense(model, x, loss, plain_change(0.5), limit=1.5)
        assert_same(got, expected, rtol=1e-12, atol=1e-13)


def test_a_layer_goes_by_the_bound_of_its_weights_group():
    likelihood, y = problem("gaussian")
    model, x = chain(*BOTTLENECK), inputs()
    expected = stepped(model, 0.5, likelihood, x, y, max_correction=0.3)
    parameters = dict(model.named_parameters())
    biases = [p for name, p in parameters.items() if name.endswith("bias")]
    weights = [p for name, p in parameters.items() if name.endswith("weight")]
    groups = [{"params": biases, "max_correction": 0.01}, {"params": weights}]
    opt = ubp(model, 0.5, likelihood, max_correction=0.3, params=groups)
    backward(model, likelihood, x, y)
    opt.step()
    assert_same(dict(model.named_parameters()), expected, rtol=0, atol=0)


def test_diagnostics_have_the_ratio_of_every_layer_below_the_top():
    likelihood, y = problem("gaussian")
    model, x = chain(*BOTTLENECK), inputs()
    opt = ubp(model, 0.5, likelihood, max_correction=0.3)
    assert opt.diagnostics() == {}
    backward(model, likelihood, x, y)
    h = model[:6](x).detach()
    df = model(x).detach().requires_grad_()
    likelihood.value(df, y).backward()
    moved = -0.5 * (h @ h.T + 1) @ df.grad
    weight = model[6].weight.detach()
    changed = weight - 0.5 * df.grad.T @ h
    difference = df.grad @ changed + likelihood.curvature_product(df, moved) @ weight
    plain = df.grad @ weight
    opt.step()
    ratios = opt.diagnostics()
    assert list(ratios) == ["4", "2", "0"]
    assert ratios["4"] == pytest.approx(((difference - plain).norm() / plain.norm()).item())


# Which mode.


def test_auto_takes_the_mode_with_fewer_operations():
    likelihood = fused_so.Gaussian()
    deep, wide = chain(4, *[8] * 12, 1), chain(8, 8, 8, 8)
    assert ubp(deep, 0.1, likelihood)._taken() == "jacobian"
    assert ubp(wide, 0.1, likelihood)._taken() == "matrix_free"
    assert ubp(deep, 0.1, likelihood, curvature="hessian")._taken() == "matrix_free"
    assert ubp(wide, 0.1, likelihood, mode="sketch")._taken() == "sketch"


@pytest.mark.parametrize("mode", ["matrix_free", "jacobian", "sketch"])
def test_operations_are_those_that_run(mode):
    """What explain() counts is what the products of a step add up to."""
    from torch.utils.flop_counter import FlopCounterMode

    model = chain(20, 30, 40, 6, 50, 12, dtype=torch.float32)
    likelihood, y = problem("gaussian", o=12, dtype=torch.float32)
    x = inputs(width=20, dtype=torch.float32)
    opt = ubp(model, 0.1, likelihood, mode=mode, sketch_size=5)
    ours = fused_so.reference.jacobian_backprop
    products = {torch.ops.fused_so.centered_grad: lambda g, h, **options: 2 * g[0] * g[1] * h[1]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused_so.ops, "jacobian_backprop", ours)
        with FlopCounterMode(display=False, custom_mapping=products) as counter:
            backward(model, likelihood, x, y)
            opt.step()
    count = {line.split(":")[0].strip(): line for line in opt.explain(N).splitlines()[1:]}
    said = float(count[mode].split(": ")[1].split(" Gflop")[0]) * 1e9
    assert said == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_explain_says_which_and_why():
    text = ubp(chain(8, 8, 8, 8), 0.1, fused_so.Gaussian()).explain(batch_size=64)
    assert "mode 'auto' takes 'matrix_free'" in text
    assert "at batch 64" in text
    assert "fewer operations" in text
    hessian = ubp(chain(8, 8, 8), 0.1, fused_so.Gaussian(), curvature="hessian").explain()
    assert "the only mode that has the Hessian" in hessian
    with pytest.raises(ValueError, match="batch_size must be a whole number >= 1, got 0"):
        ubp(chain(3, 2), 0.1, fused_so.Gaussian()).explain(0)


# Activations and models.


def test_activations_that_are_linear_piece_by_piece_are_supported():
    pieces = {nn.Hardshrink, nn.Hardsigmoid, nn.Hardtanh, nn.LeakyReLU, nn.ReLU, nn.ReLU6}
    assert pieces | {nn.Softshrink, nn.Threshold} <= set(ACTIVATIONS)
    likelihood, y = problem("bernoulli")
    x = inputs()
    for activation in (
        nn.Hardsigmoid,
        lambda: nn.Hardshrink(0.1),
        lambda: nn.Softshrink(0.1),
        lambda: nn.Threshold(0.1, 0.2),
    ):
        model = chain(*BOTTLENECK, activation=activation)
        expected = dense(model, x, lambda f: likelihood.value(f, y), plain_change(0.5))
        for curvature in ("gauss_newton", "hessian"):
            got = stepped(model, 0.5, likelihood, x, y, curvature=curvature)
            assert_same(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_derivatives_of_every_activation(kind):
    a = torch.linspace(-4, 4, 63, dtype=DOUBLE).reshape(7, 9) + 0.013
    module = kind(0.5, -2.0) if kind is nn.Threshold else kind()
    link = Link("", nn.Linear(1, 1), [module])
    slope, bend = link.derivatives(a, module(a.clone()), second=True)
    expected = torch.func.vmap(torch.func.vmap(torch.func.grad(module)))(a)
    torch.testing.assert_close(slope, expected, rtol=1e-12, atol=1e-14)
    step = 1e-5
    up, down = (link.derivatives(a + d, module(a + d), second=False)[0] for d in (step, -step))
    difference = (up - down) / (2 * step)
    bend = torch.zeros_like(a) if bend is None else bend
    torch.testing.assert_close(bend, difference, rtol=1e-6, atol=1e-8)
    assert link.derivatives(a, module(a.clone()), second=False)[1] is None


def test_activations_in_a_row_and_nested_sequentials():
    likelihood, y = problem("bernoulli")
    x = inputs()
    flat = nn.Sequential(
        nn.Linear(5, 6, dtype=DOUBLE), nn.ReLU(inplace=True), nn.Tanh(), nn.Softplus(),
        nn.Linear(6, 6, dtype=DOUBLE), nn.Linear(6, 4, dtype=DOUBLE), nn.ELU(),
    )  # fmt: skip
    nested = nn.Sequential(
        nn.Flatten(), nn.Dropout(0.5).eval(), nn.Sequential(flat[:3], nn.Identity()),
        nn.Sequential(nn.Sequential(flat[3], nn.Sequential(flat[4], nn.Flatten())), flat[5:]),
    )  # fmt: skip
    nested = copy.deepcopy(nested)
    functional = nn.Sequential(*flat)
    functional[1] = nn.ReLU()
    for curvature in ("gauss_newton", "hessian"):
        expected = dense(
            functional, x, lambda f: likelihood.value(f, y), plain_change(0.5), curvature=curvature
        )
        got = stepped(nested, 0.5, likelihood, x.view(N, 5, 1), y, curvature=curvature)
        for value, other in zip(got.values(), expected.values(), strict=True):
            torch.testing.assert_close(value, other, rtol=1e-12, atol=1e-13)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.inner(x)


class Skip(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def tied():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second)


def twice():
    shared = nn.Linear(4, 4)
    return nn.Sequential(nn.Sequential(shared, nn.Tanh()), shared)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: nn.Sequential(nn.Linear(4, 4), nn.PReLU()),
            r"module '1' \(PReLU\): is not one of them; activations may be CELU, .*, Threshold$",
        ),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.Softmax(1)), r"module '1' \(Softmax\)"),
        (lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), r"module '1' \(LayerNorm\)"),
        (
            lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 4), Residual())),
            r"module '0.1' \(Residual\): has a forward of its own.*residual",
        ),
        (lambda: nn.Sequential(Skip(nn.Linear(4, 4))), r"module '0' \(Skip\): has a forward"),
        (Residual, r"in eval mode; Residual: has a forward of its own"),
        (twice, r"module '1' \(Linear\): is used, or has a parameter that is used, more than"),
        (tied, r"module '0' \(Linear\): is used, or has a parameter"),
        (
            lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)),
            r"module '1' \(BatchNorm1d\): in training mode it couples the examples",
        ),
        (
            lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).eval(),
            r"module '1' \(BatchNorm1d\): in eval mode, fold it",
        ),
        (
            lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)),
            r"module '1' \(Dropout\): drops units while in training mode; call eval\(\)",
        ),
        (
            lambda: nn.Sequential(nn.Linear(4, 4), nn.ELU(inplace=True)),
            r"module '1' \(ELU\): overwrites its input; build it with inplace=False",
        ),
        (lambda: nn.Sequential(nn.Flatten(0), nn.Linear(4, 4)), r"module '0' \(Flatten\)"),
        (
            lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))),
            r"module '0' \(ParametrizedLinear\)",
        ),
        (lambda: nn.Sequential(nn.Tanh()), r"model must hold an nn\.Linear"),
        (
            lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4).double()),
            r"model must have its parameters on one device and in one dtype, got .*float32.*64",
        ),
    ],
)
def test_what_is_no_chain_is_refused_by_name(model, message):
    model = model()
    if not list(model.parameters()):
        with pytest.raises(ValueError, match="empty parameter list"):
            fused_so.UBP(model, likelihood=fused_so.Gaussian())
        return
    with pytest.raises(ValueError, match=message):
        fused_so.UBP(model, likelihood=fused_so.Gaussian())
    # Nothing is left on a model that was refused.
    assert all(not module._forward_hooks for module in model.modules())


def test_a_dropout_put_in_training_mode_later_is_refused_in_the_forward_pass():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).eval()
    _opt = fused_so.UBP(model, likelihood=fused_so.Gaussian())
    model.train()
    with pytest.raises(ValueError, match=r"module '1' \(Dropout\): drops units"):
        model(torch.randn(3, 4))
    with torch.no_grad():
        model(torch.randn(3, 4))
    nn.Sequential(nn.Dropout(0.0), nn.Linear(4, 4))
    fused_so.UBP(nn.Sequential(nn.Dropout(0.0), nn.Linear(4, 4)), likelihood=fused_so.Gaussian())


def test_inputs_that_are_not_rows_are_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    _opt = fused_so.UBP(model, likelihood=fused_so.Gaussian())
    with pytest.raises(ValueError, match=r"rows of examples, \(n, d\); .*layer '0' .*\(2, 3, 4\)"):
        model(torch.randn(2, 3, 4))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1}, ValueError, "lr must be at least 0"),
        ({"momentum": 2}, ValueError, "momentum must be at least 0"),
        ({"weight_decay": -1}, ValueError, "weight_decay must be"),
        ({"max_correction": 0}, ValueError, "max_correction must be positive, got 0"),
        ({"max_norm": 0}, ValueError, "max_norm must be positive, got 0"),
        ({"nesterov": 1}, TypeError, "nesterov must be True or False, got 1"),
        ({"curvature": "fisher"}, ValueError, "curvature must be one of .* got 'fisher'"),
        ({"mode": "exact"}, ValueError, "mode must be one of .* got 'exact'"),
        (
            {"curvature": "hessian", "mode": "jacobian"},
            ValueError,
            "mode must be 'matrix_free' or 'auto' for curvature='hessian'.* got 'jacobian'",
        ),
        ({"sketch_size": 0}, ValueError, "sketch_size must be a whole number >= 1, got 0"),
        ({"seed": -1}, ValueError, "seed must be a whole number >= 0, got -1"),
        ({"likelihood": nn.L1Loss()}, TypeError, "likelihood must be .*MSELoss.* got L1Loss"),
        ({"grad_scaler": 1}, TypeError, "grad_scaler must be a torch.amp.GradScaler .* got int"),
        ({"params": [nn.Parameter(torch.zeros(3))]}, ValueError, r"params must be .* \(3,\)"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        fused_so.UBP(chain(3, 2), **{"likelihood": fused_so.Gaussian()} | options)


# As an optimizer among others.


def test_the_gradient_stays_the_true_one_and_hooks_cost_nothing_in_accuracy():
    likelihood, y = problem("gaussian")
    model, x = chain(*BOTTLENECK), inputs()
    twin = copy.deepcopy(model)
    opt = ubp(model, 0.3, likelihood)
    backward(model, likelihood, x, y)
    backward(twin, likelihood, x, y)
    opt.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize("mode", ["matrix_free", "sketch"])
def test_checkpoints_resume_bit_for_bit(mode):
    likelihood, y = problem("bernoulli", dtype=torch.float32)
    x = inputs(dtype=torch.float32)
    options = {"mode": mode, "momentum": 0.9, "weight_decay": 0.01, "max_correction": 0.2}
    options["max_norm"] = 0.5
    model = chain(*BOTTLENECK, dtype=torch.float32)
    opt = ubp(model, 0.1, likelihood, **options)

    def train(model, opt):
        for _ in range(3):
            opt.step(lambda: backward(model, likelihood, x, y))

    train(model, opt)
    saved = pickle.loads(pickle.dumps((model.state_dict(), opt.state_dict())))
    train(model, opt)
    resumed = chain(*BOTTLENECK, dtype=torch.float32, seed=9)
    again = ubp(resumed, 0.7, likelihood, **options)
    resumed.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    train(resumed, again)
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_checkpoints_of_others_are_refused():
    opt = ubp(chain(3, 4, 2), 0.1, fused_so.Gaussian())
    other = ubp(chain(3, 5, 2), 0.1, fused_so.Gaussian())
    with pytest.raises(ValueError, match=r"layer '0' \(in, out, bias\) is \(3, 4, True\) here"):
        opt.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="one of UBP, got one of CGD"):
        opt.load_state_dict(fused_so.CGD(chain(3, 4, 2)).state_dict())


def test_schedulers_and_both_forms_of_the_loop():
    likelihood, y = problem("gaussian")
    x = inputs()
    models = [chain(*BOTTLENECK), chain(*BOTTLENECK)]
    for model, closure in zip(models, (True, False), strict=True):
        opt = ubp(model, 0.2, likelihood, momentum=0.5)
        schedule = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)
        for _ in range(3):
            if closure:
                loss = opt.step(lambda model=model: backward(model, likelihood, x, y))
                assert loss.item() > 0
            else:
                # zero_grad between the two passes forgets nothing of this batch.
                loss = likelihood.value(model(x), y)
                opt.zero_grad()
                loss.backward()
                opt.step()
            schedule.step()
        assert opt.param_groups[0]["lr"] == 0.2 / 8
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_step_without_a_backward_pass_is_refused():
    likelihood, y = problem("gaussian")
    model, x = chain(*BOTTLENECK), inputs()
    opt = ubp(model, 0.2, likelihood)
    opt.step()  # no gradients, nothing to do
    backward(model, likelihood, x, y)
    opt.step()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"no backward pass.*step\(closure\)"):
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    model.zero_grad()
    model[2:](torch.randn(3, 7, dtype=DOUBLE)).sum().backward()
    with pytest.raises(RuntimeError, match="through the whole model"):
        opt.step()


def sgd_step(model, lr):
    return {name: (p - lr * p.grad).detach() for name, p in model.named_parameters()}


@pytest.mark.parametrize("how", ["accumulated", "clipped by value", "two models in one loss"])
def test_gradients_of_something_else_make_it_sgd_with_a_warning(how):
    likelihood, y = problem("gaussian")
    model, x = chain(*BOTTLENECK), inputs()
    opt = ubp(model, 0.2, likelihood)
    loss = likelihood.value(model(x), y)
    if how == "two models in one loss":
        loss = loss + model(x + 1).square().sum()
    loss.backward()
    if how == "accumulated":
        likelihood.value(model(x + 1), y).backward()
    elif how == "clipped by value":
        nn.utils.clip_grad_value_(model.parameters(), 0.05)
    expected = sgd_step(model, 0.2)
    with pytest.warns(UserWarning, match="not those of the last backward pass"):
        opt.step()
    assert_same(dict(model.named_parameters()), expected, rtol=1e-14, atol=1e-15)


def own_gradients(model, fixed, lr):
    """SGD's change for the parameters in `fixed`, of the gradients they have; UBP's for others."""
    held = {name: p.grad.clone() for name, p in model.named_parameters() if name in fixed}
    return lambda name, gradient: -lr * held.get(name, gradient)


@pytest.mark.parametrize("fixed", [("0.weight",), ("2.weight", "4.bias"), ("6.bias",)])
@pytest.mark.parametrize("how", ["clipped by value", "clipped by a norm of their own"])
@pytest.mark.parametrize("mode", ["matrix_free", "jacobian"])
def test_each_gradient_of_something_else_takes_sgds_step(fixed, how, mode):
    """The layers below still hear of what it really changes."""
    likelihood, y = problem("gaussian")
    model, x = chain(*BOTTLENECK), inputs()
    opt = ubp(model, 0.2, likelihood, mode=mode)
    backward(model, likelihood, x, y)
    chosen = [p for name, p in model.named_parameters() if name in fixed]
    if how == "clipped by value":
        nn.utils.clip_grad_value_(chosen, 1e-3)
    else:
        nn.utils.clip_grad_norm_(chosen, 1e-3)
    change = own_gradients(model, fixed, 0.2)
    expected = dense(model, x, lambda f: likelihood.value(f, y), change)
    with pytest.warns(UserWarning, match="not those of the last backward pass"):
        opt.step()
    assert_same(dict(model.named_parameters()), expected, rtol=1e-12, atol=1e-13)


def test_a_limit_by_value_that_only_lower_layers_reach_is_seen():
    likelihood, y = problem("gaussian")
    model, x = chain(*BOTTLENECK), inputs()
    with torch.no_grad():
        model[6].weight.mul_(30)
    opt = ubp(model, 0.2, likelihood)
    backward(model, likelihood, 10 * x, y)
    largest = {name: p.grad.abs().max().item() for name, p in model.named_parameters()}
    limit = max(largest["6.weight"], largest["6.bias"]) * 1.01
    fixed = [name for name, value in largest.items() if value > limit]
    assert "0.weight" in fixed
    nn.utils.clip_grad_value_(model.parameters(), limit)
    change = own_gradients(model, fixed, 0.2)
    expected = dense(model, 10 * x, lambda f: likelihood.value(f, y), change)
    with pytest.warns(UserWarning, match="not those of the last backward pass"):
        opt.step()
    assert_same(dict(model.named_parameters()), expected, rtol=1e-12, atol=1e-13)


def test_a_limit_by_value_is_seen_beside_an_input_far_larger_than_the_others():
    likelihood, y = problem("gaussian", n=256)
    model, x = chain(*BOTTLENECK), inputs(n=256)
    x[0] *= 100
    opt = ubp(model, 0.1, likelihood)
    backward(model, likelihood, x, y)
    nn.utils.clip_grad_value_(model[0].weight, 0.1 * model[0].weight.grad.abs().max().item())
    with pytest.warns(UserWarning, match="not those of the last backward pass"):
        opt.step()


def test_max_norm_bounds_the_gradient_and_its_corrections():
    likelihood, y = problem("gaussian")
    model, x = chain(*BOTTLENECK), inputs()
    groups = [
        {"params": list(model[4:].parameters()), "max_norm": 0.2},
        {"params": list(model[:4].parameters()), "max_norm": 1e3},
    ]
    opt = ubp(model, 0.5, likelihood, params=groups)
    backward(model, likelihood, x, y)
    norm = torch.stack([p.grad.square().sum() for p in groups[0]["params"]]).sum().sqrt()
    assert 0.2 < norm < 1e3
    # The layers below hear of the shorter step above, and take their own in full.
    shorter = {"lr": 0.5 * 0.2 / norm.item()}
    other = copy.deepcopy(model)
    expected = ubp(
        other,
        0.5,
        likelihood,
        params=[
            {"params": list(other[4:].parameters()), **shorter},
            {"params": list(other[:4].parameters())},
        ],
    )
    backward(other, likelihood, x, y)
    opt.step()
    expected.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_clipping_the_norm_clips_the_corrected_gradient():
    likelihood, y = problem("gaussian")
    model, x = chain(*BOTTLENECK), inputs()
    opt = ubp(model, 0.5, likelihood)
    backward(model, likelihood, x, y)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.7)
    share = 0.7 / (norm.item() + 1e-6)
    expected = dense(model, x, lambda f: likelihood.value(f, y), plain_change(0.5 * share))
    opt.step()
    assert share < 1
    assert_same(dict(model.named_parameters()), expected, rtol=1e-11, atol=1e-12)


def test_gradient_scaler():
    likelihood, y = problem("bernoulli", dtype=torch.float32)
    x = inputs(dtype=torch.float32)
    model = chain(*BOTTLENECK, dtype=torch.float32)
    bare = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    a = ubp(model, 0.3, likelihood, grad_scaler=scaler, max_correction=1e-3)
    b = ubp(bare, 0.3, likelihood, max_correction=1e-3)
    for _ in range(3):
        a.zero_grad()
        scaler.scale(likelihood.value(model(x), y)).backward()
        scaler.unscale_(a)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(a)
        scaler.update()
        backward(bare, likelihood, x, y)
        nn.utils.clip_grad_norm_(bare.parameters(), 0.1)
        b.step()
    for p, q in zip(model.parameters(), bare.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["matrix_free", "jacobian", "sketch"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e38])
def test_a_step_that_is_not_finite_is_skipped_whole(mode, bad):
    likelihood, y = problem("gaussian", dtype=torch.float32)
    model = chain(*BOTTLENECK, dtype=torch.float32, activation=nn.ReLU)
    opt = ubp(model, 0.1, likelihood, momentum=0.9, mode=mode, max_correction=0.3)
    x = inputs(dtype=torch.float32)
    opt.step(lambda: backward(model, likelihood, x, y))
    before = [p.detach().clone() for p in model.parameters()]
    buffers = [opt.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    with pytest.warns(UserWarning, match="UBP: a gradient is not finite") as caught:
        for _ in range(2):
            spoiled = x.clone()
            spoiled[1] = bad
            opt.step(lambda spoiled=spoiled: backward(model, likelihood, spoiled, y))
    assert len(caught) == 1
    for p, old, buffer in zip(model.parameters(), before, buffers, strict=True):
        assert torch.equal(p, old)
        assert torch.equal(opt.state[p]["momentum_buffer"], buffer)
    opt.step(lambda: backward(model, likelihood, x, y))
    assert not torch.equal(model[0].weight, before[0])


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e8])
def test_tiny_and_huge_inputs(size):
    likelihood, y = problem("bernoulli", dtype=torch.float32)
    model = chain(*BOTTLENECK, dtype=torch.float32, activation=nn.LeakyReLU)
    x = size * inputs(dtype=torch.float32)
    for mode in ("matrix_free", "jacobian"):
        twin = copy.deepcopy(model)
        opt = ubp(twin, 0.1, likelihood, mode=mode, max_correction=0.3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            opt.step(lambda twin=twin: backward(twin, likelihood, x, y))
        assert all(p.isfinite().all() for p in twin.parameters())
        assert not torch.equal(twin[6].bias, model[6].bias)


def test_a_gradient_that_vanishes_changes_nothing():
    model, x = chain(*BOTTLENECK), inputs()
    opt = ubp(model, 0.1, fused_so.Gaussian())
    before = [p.detach().clone() for p in model.parameters()]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step(lambda: backward(model, fused_so.Gaussian(), x, model(x).detach()))
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_models_and_autocast(dtype):
    likelihood, y = problem("gaussian", dtype=torch.float32)
    x = inputs(dtype=torch.float32)
    model = chain(*BOTTLENECK, dtype=torch.float32)
    exact = stepped(model, 0.3, likelihood, x, y)
    low = stepped(copy.deepcopy(model).to(dtype), 0.3, likelihood, x.to(dtype), y)
    mixed = copy.deepcopy(model)
    opt = ubp(mixed, 0.3, likelihood)
    with torch.autocast("cpu", dtype):
        out = mixed(x)
    likelihood.value(out, y).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()
    step = {name: (exact[name] - p.detach()).norm() for name, p in model.named_parameters()}
    rounding = 16 * torch.finfo(dtype).eps
    for name, value in mixed.named_parameters():
        assert (value - exact[name]).norm() < rounding * step[name]
        assert low[name].dtype == dtype
        scale = step[name] + model.state_dict()[name].norm()
        assert (low[name].float() - exact[name]).norm() < rounding * scale


@pytest.mark.parametrize("n", [1, 16])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU])
def test_rounding_in_low_precision_is_not_taken_for_another_gradient(n, activation):
    """Sums of few examples may nearly cancel, their rounding does not."""
    widths = (196, 250, 125, 62, 8, 62, 125, 250, 196)
    model = chain(*widths, dtype=torch.float32, activation=activation, seed=0)
    likelihood = fused_so.Gaussian()
    opt = ubp(model, 0.01, likelihood)
    x = torch.rand(n, 196, generator=torch.Generator().manual_seed(4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            opt.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                out = model(x)
            likelihood.value(out, x).backward()
            opt.step()


def test_compiled_models_learn_the_same():
    likelihood, y = problem("gaussian")
    x = inputs()
    model, twin = chain(*BOTTLENECK), chain(*BOTTLENECK)
    compiled = torch.compile(twin, backend="aot_eager")
    a, b = ubp(model, 0.3, likelihood), ubp(compiled, 0.3, likelihood)
    for _ in range(3):
        a.step(lambda: backward(model, likelihood, x, y))
        b.step(lambda: backward(compiled, likelihood, x, y))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_copied_and_pickled_models_are_free_of_the_optimizer():
    likelihood, y = problem("gaussian")
    model, x = chain(*BOTTLENECK), inputs()
    opt = ubp(model, 0.3, likelihood)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        backward(twin, likelihood, x, y)
        assert opt._passage is None
    with pytest.raises(TypeError, match="UBP is bound to its model's hooks"):
        copy.deepcopy(opt)
    opt.remove_hooks()
    backward(model, likelihood, x, y)
    with pytest.raises(RuntimeError, match="no backward pass"):
        opt.step()


def test_what_is_held_between_steps():
    likelihood, y = problem("bernoulli", o=40, n=200, dtype=torch.float32)
    model = chain(40, 30, 20, 10, 20, 30, 40, dtype=torch.float32)
    opt = ubp(model, 0.1, likelihood, momentum=0.9, mode="matrix_free")
    loss = backward(model, likelihood, inputs(200, 40, torch.float32), y)
    passage = opt._passage
    opt.step()
    held = sum(v.numel() for s in opt.state.values() for v in s.values() if torch.is_tensor(v))
    assert held == sum(p.numel() for p in model.parameters())
    assert opt._passage is None
    # Nor by the graph of a loss that is still there.
    assert loss.item() > 0
    assert passage.outputs is None
    rows = (*passage.inputs, *passage.signals, *passage.preactivations)
    assert all(value is None for value in rows)


def peak_memory(optimizer, n=256, width=196):
    """The most bytes held in a step, by the profiler's record of every allocation."""
    model = chain(width, 250, 125, 62, 8, 62, 125, 250, width, dtype=torch.float32)
    x, loss, opt = torch.rand(n, width), nn.BCEWithLogitsLoss(), optimizer(model)

    def step():
        opt.zero_grad()
        loss(model(x), x).backward()
        opt.step()

    step()
    opt.zero_grad()
    # Parameters, momentum and inputs were there before.
    held = highest = 4 * (2 * sum(p.numel() for p in model.parameters()) + x.numel())
    with torch.profiler.profile(profile_memory=True) as profiler:
        step()
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


def test_matrix_free_takes_at_most_twice_the_memory_of_sgd():
    """The 784-1000-500-250-30 autoencoder at batch 1024, a quarter of it in every direction."""
    sgd = peak_memory(lambda model: torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9))
    ours = peak_memory(
        lambda model: ubp(model, 1e-4, nn.BCEWithLogitsLoss(), mode="matrix_free", momentum=0.9)
    )
    assert sgd < ours <= 2 * sgd


def test_the_rows_of_a_loss_that_is_kept_are_let_go():
    likelihood, y = problem("gaussian")
    model, x = chain(*BOTTLENECK), inputs()
    opt = ubp(model, 0.1, likelihood)
    loss = backward(model, likelihood, x, y)
    passage = opt._passage
    opt.zero_grad()
    assert passage.outputs is None
    assert loss.item() > 0
