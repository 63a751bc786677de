"""The paper's recipe against a loop with the whole Fisher built from Jacobians."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fused_so
from fused_so.optim.kfac import STRUCTURES
from tests.optim.nets import (
    DOUBLE,
    chain,
    damped,
    dense_fisher,
    example_curvatures,
    grads,
    homogeneous,
    layer_rows,
    linears,
    output_curvature,
    parameters,
    values,
)

cross_entropy = nn.functional.cross_entropy


class Scale(nn.Module):
    """A parameter that no layer owns."""

    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, width, dtype=DOUBLE))

    def forward(self, x):
        return x * self.scale


def build(plain=True):
    model = chain(4, 4, 3)
    if plain:
        model.insert(2, Scale(4))
    return model


def paper(model, **options):
    return fused_so.KFAC(
        model, likelihood=fused_so.Categorical(), factors="exact", recipe="paper", **options
    )


def closure_of(model, opt, x, y):
    def closure():
        opt.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def kfac_direction(layer, stats, inverses, eta):
    """The preconditioned gradient of W (h - m) + d, as changes of W and b."""
    mean = stats[layer][0][-1, :-1]
    gradient = grads(layer) + eta * values(layer)
    a, g = inverses[layer]
    dw = g @ (gradient[:, :-1] - torch.outer(gradient[:, -1], mean)) @ a
    return dw, g @ gradient[:, -1] - dw @ mean


def inverted(stats, gamma):
    inverses = {}
    for layer, (a, g) in stats.items():
        mean = a[-1, :-1]
        c = (a[:-1, :-1] - torch.outer(mean, mean)).trace() / len(mean)
        pi = (c / (g.trace() / len(g))).sqrt()
        inverse = damped(a, pi * gamma).inverse()[:-1, :-1]
        inverses[layer] = inverse, damped(g, gamma / pi, False).inverse()
    return inverses


@pytest.mark.filterwarnings("ignore:KFAC")
@pytest.mark.parametrize("lr", [1.0, 0.6])
def test_22_steps_follow_an_independent_loop_with_the_whole_fisher(lr):
    model, twin = build(), build()
    twin.load_state_dict(model.state_dict())
    eta, lam, gamma = 0.01, 0.3, math.sqrt(0.3 + 0.01)
    opt = paper(model, lr=lr, damping=lam, weight_decay=eta, decay=0.8)
    stats, weight, last, inverses, path = {}, 0.0, None, {}, []
    data, labels = torch.randn(40, 4, dtype=DOUBLE), torch.randint(0, 3, (40,))
    for t in range(22):
        rows = torch.randint(0, 40, (25,))
        x, y = data[rows], labels[rows]
        opt.step(closure_of(model, opt, x, y))

        twin.zero_grad()
        loss = cross_entropy(twin(x), y)
        loss.backward()
        params = list(twin.parameters())
        theta = nn.utils.parameters_to_vector(params).detach()
        before = loss.item() + 0.5 * eta * theta.square().sum().item()
        slope = torch.cat([p.grad.reshape(-1) for p in params]) + eta * theta
        curvature = output_curvature("categorical", twin(x), y)
        metric = dense_fisher(twin, x, curvature) + (lam + eta) * torch.eye(
            len(theta), dtype=DOUBLE
        )
        weight = 0.8 * weight + 25
        share = 25 / weight
        for layer, (h, jacobians) in zip(linears(twin), layer_rows(twin, x), strict=True):
            a = homogeneous(h).T @ homogeneous(h) / 25
            g = example_curvatures(jacobians, curvature).sum(0)
            old = stats.get(layer, (a, g))
            stats[layer] = old[0].lerp(a, share), old[1].lerp(g, share)

        proposals = []
        tried = [gamma]
        if t == 20:
            tried = [gamma * math.sqrt(19 / 20) ** 20, gamma / math.sqrt(19 / 20) ** 20, gamma]
        for candidate in tried:
            if t in (0, 1, 2, 4, 8, 16, 20):
                inverses = inverted(stats, candidate)
            # What no layer owns takes its gradient.
            changes = {p: p.grad for p in params}
            for layer in linears(twin):
                step = kfac_direction(layer, stats, inverses, eta)
                changes[layer.weight], changes[layer.bias] = step
            direction = -torch.cat([changes[p].reshape(-1) for p in params])
            basis = torch.stack([direction] if last is None else [direction, last], 1)
            # min over w of w^T B^T (F + (lambda + eta) I) B w / 2 + slope^T B w
            w = -torch.linalg.solve(basis.T @ metric @ basis, basis.T @ slope)
            delta = basis @ w
            model_value = (0.5 * delta @ metric @ delta + slope @ delta).item()
            shorter = lr * delta
            change = (0.5 * shorter @ metric @ shorter + slope @ shorter).item()
            proposals.append((model_value, change, shorter, candidate, inverses))
        _, predicted, last, gamma, inverses = min(proposals, key=lambda proposal: proposal[0])
        path.append((lam, gamma))
        nn.utils.vector_to_parameters(theta + last, params)
        if t % 5 == 4:
            with torch.no_grad():
                after = cross_entropy(twin(x), y) + 0.5 * eta * (theta + last).square().sum()
            ratio = (after.item() - before) / predicted
            if ratio > 0.75:
                lam *= (19 / 20) ** 5
            elif ratio < 0.25:
                lam /= (19 / 20) ** 5
            assert opt.diagnostics()["ratio"] == pytest.approx(ratio, rel=1e-6)
        assert opt.diagnostics()["damping"] == pytest.approx(lam)
        assert opt.diagnostics()["gamma"] == pytest.approx(gamma)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)
    assert len({lam for lam, _ in path}) > 1
    assert len({gamma for _, gamma in path}) > 1
    assert opt.param_groups[0]["gamma"] == pytest.approx(gamma)


@pytest.mark.parametrize(("ratio", "factor"), [(0.9, 0.95**5), (0.5, 1.0), (0.1, 0.95**-5)])
def test_lambda_follows_the_ratio(ratio, factor):
    model = build(plain=False)
    opt = paper(model, damping=2.0)
    x, y = torch.randn(9, 4, dtype=DOUBLE), torch.randint(0, 3, (9,))
    recipe = opt._recipe
    for _ in range(4):
        opt.step(closure_of(model, opt, x, y))
    assert opt.param_groups[0]["damping"] == 2.0
    predictions = []
    propose = recipe._propose

    def remember():
        predictions.append(propose())
        return predictions[-1]

    recipe._propose = remember
    calls = []
    closure = closure_of(model, opt, x, y)

    def rigged():
        loss = closure().item()
        calls.append(loss)
        return loss if len(calls) == 1 else calls[0] + ratio * predictions[-1][0]

    opt.step(rigged)
    assert len(calls) == 2
    assert recipe.ratio == pytest.approx(ratio)
    assert opt.param_groups[0]["damping"] == pytest.approx(2.0 * factor)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_gamma_is_the_one_of_the_lowest_model(structure):
    model = build(plain=False)
    opt = paper(model, damping=2.0, structure=structure)
    x, y = torch.randn(9, 4, dtype=DOUBLE), torch.randint(0, 3, (9,))
    recipe, proposals = opt._recipe, []
    propose = recipe._propose

    def remember():
        proposals.append((propose()[0], opt.param_groups[0]["gamma"]))
        return proposals[-1][0], []

    for t in range(21):
        if t == 20:
            before = opt.param_groups[0]["gamma"]
            recipe._propose = remember
        opt.step(closure_of(model, opt, x, y))
    omega = math.sqrt(19 / 20) ** 20
    assert [gamma for _, gamma in proposals] == [omega * before, before / omega, before]
    assert opt.param_groups[0]["gamma"] == min(proposals)[1]
    assert min(proposals)[0] < 0
    assert len({value for value, _ in proposals}) == 3
    # The inverses are those of the gamma that was chosen.
    layer = opt._layers[0]
    inverse = layer.state["inverse"].clone()
    opt.invert([layer])
    torch.testing.assert_close(layer.state["inverse"], inverse)


def test_evaluating_the_step_leaves_gradients_and_statistics_alone():
    model = build(plain=False)
    opt = paper(model, decay=1.0)
    x, y = torch.randn(9, 4, dtype=DOUBLE), torch.randint(0, 3, (9,))
    closures = []

    def closure():
        closures.append(parameters(model))
        return closure_of(model, opt, x, y)()

    for t in range(5):
        opt.step(closure)
        assert opt.state[model[0].weight]["examples"] == 9 * (t + 1)
        assert opt.state[model[0].weight]["output_examples"] == 27 * (t + 1)
    assert len(closures) == 6  # the fifth step looks at the loss after it
    twin = build(plain=False)
    for p, q in zip(twin.parameters(), closures[4], strict=True):
        p.data.copy_(q)
    cross_entropy(twin(x), y).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert opt._recipe._call is None
    assert all(not layer.batch for layer in opt._layers)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_resuming_is_bit_for_bit(structure):
    x, y = torch.randn(9, 4, dtype=DOUBLE), torch.randint(0, 3, (9,))
    models = [build(plain=False), build(plain=False)]
    first, again = (paper(model, damping=1.0, structure=structure) for model in models)
    for _ in range(18):
        first.step(closure_of(models[0], first, x, y))
    models[1].load_state_dict(models[0].state_dict())
    again.load_state_dict(first.state_dict())
    for _ in range(5):
        for model, opt in zip(models, (first, again), strict=True):
            opt.step(closure_of(model, opt, x, y))
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            assert torch.equal(p, q)
    assert first.param_groups[0]["gamma"] == again.param_groups[0]["gamma"]


def test_a_gradient_that_is_not_finite_skips_the_step():
    model = build(plain=False)
    opt = paper(model)
    x, y = torch.randn(9, 4, dtype=DOUBLE), torch.randint(0, 3, (9,))
    opt.step(closure_of(model, opt, x, y))
    before = parameters(model)
    bad = x.clone()
    bad[0, 0] = float("nan")
    with pytest.warns(UserWarning, match="a gradient is not finite"):
        opt.step(closure_of(model, opt, bad, y))
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)
    opt.step(closure_of(model, opt, x, y))
    assert not torch.equal(model[0].weight, before[0])
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_smaller_learning_rate_is_compared_with_its_own_prediction():
    model = build(plain=False)
    x, y = torch.randn(30, 4, dtype=DOUBLE), torch.randint(0, 3, (30,))
    opt = paper(model, lr=1e-3, damping=10.0)
    for _ in range(5):
        opt.step(closure_of(model, opt, x, y))
    # So short a step is predicted well.
    assert opt.diagnostics()["ratio"] == pytest.approx(1.0, abs=1e-2)


def test_running_statistics_see_every_batch_once():
    model = chain(4, 4, 3)
    model.insert(1, nn.BatchNorm1d(4, dtype=DOUBLE))
    x, y = torch.randn(9, 4, dtype=DOUBLE), torch.randint(0, 3, (9,))
    with pytest.warns(UserWarning, match=r"1\.weight, 1\.bias"):
        opt = paper(model)
    for t in range(3):
        mean = model[1].running_mean.clone()
        with torch.no_grad():
            expected = mean.lerp(model[0](x).mean(0), 0.1)
        opt.step(closure_of(model, opt, x, y))
        torch.testing.assert_close(model[1].running_mean, expected)
        assert model[1].num_batches_tracked == t + 1


def test_what_the_recipe_needs_is_said():
    model = build(plain=False)
    x, y = torch.randn(9, 4, dtype=DOUBLE), torch.randint(0, 3, (9,))
    with pytest.raises(ValueError, match="recipe must be None or 'paper', got 'full'"):
        fused_so.KFAC(model, recipe="full")
    with pytest.raises(ValueError, match="recipe='paper' needs the likelihood"):
        fused_so.KFAC(model, recipe="paper")
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
    with pytest.raises(ValueError, match="params must be one group for recipe='paper'"):
        paper(model, params=groups)
    with pytest.raises(ValueError, match="damping must be positive for recipe='paper'.* got 0"):
        paper(model, damping=0.0)
    assert not model._forward_hooks
    opt = paper(model)
    before = parameters(model)
    with pytest.raises(ValueError, match="needs gradients: closure must call backward"):
        opt.step(lambda: cross_entropy(model(x), y))
    cross_entropy(model(x), y).backward()
    with pytest.raises(ValueError, match=r"step\(closure\), where closure clears the gradients"):
        opt.step()
    opt._recipe._call = None
    model.zero_grad()
    with pytest.raises(ValueError, match=r"closure must call the model that was given"):
        opt.step(lambda: cross_entropy(model[2](model[0](x)), y).backward())
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)
    assert opt.closure is None


def test_hooks_are_removed():
    model = build(plain=False)
    opt = paper(model)
    opt.remove_hooks()
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    model(torch.randn(9, 4, dtype=DOUBLE))
    assert opt._recipe._call is None


def test_a_second_group_is_refused_and_leaves_the_first():
    model, other = build(plain=False), nn.Linear(2, 2, dtype=DOUBLE)
    opt = paper(model)
    with pytest.raises(ValueError, match="params must be one group"):
        opt.add_param_group({"params": other.parameters()})
    assert len(opt.param_groups) == 1


def test_the_damping_is_judged_on_the_same_network():
    model = nn.Sequential(nn.Linear(4, 40, dtype=DOUBLE), nn.Dropout(), nn.Linear(40, 2).double())
    opt = paper(model, damping=1e6)
    x, y = torch.randn(20, 4, dtype=DOUBLE), torch.randn(20, 2, dtype=DOUBLE)
    for _ in range(5):
        opt.step(closure_of(model, opt, x, y))
    # The loss falls by the slope of so small a step, of which the damping takes a half: unless
    # other units are dropped.
    assert opt.diagnostics()["ratio"] == pytest.approx(2, abs=1e-3)


class Jump(torch.autograd.Function):
    """x, whose forward-mode derivative is not finite."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g

    @staticmethod
    def jvp(ctx, t):
        return t * float("inf")


class Jumping(nn.Module):
    def forward(self, x):
        return Jump.apply(x)


def test_a_model_that_is_not_finite_takes_no_step():
    model = nn.Sequential(nn.Linear(4, 2, dtype=DOUBLE), Jumping())
    opt = paper(model)
    before = parameters(model)
    with pytest.warns(UserWarning, match="not finite"):
        opt.step(
            closure_of(model, opt, torch.randn(9, 4, dtype=DOUBLE), torch.randn(9, 2).double())
        )
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_are_refused(dtype):
    model = chain(4, 4, 3).to(dtype)
    message = f"float32 or float64 for recipe='paper', got {dtype}, .*torch.autocast"
    with pytest.raises(ValueError, match=message):
        paper(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_autocast_moves_where_the_parameters_are_float32():
    model = chain(4, 4, 3, dtype=torch.float32)
    opt = paper(model)
    x, y = torch.randn(30, 4), torch.randint(0, 3, (30,))
    before = parameters(model)

    def closure():
        opt.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = cross_entropy(model(x).float(), y)
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(6):
        opt.step(closure)
    assert closure().item() < first
    assert all(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


class Attention(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.first, self.last = nn.Linear(4, 12, dtype=dtype), nn.Linear(4, 3, dtype=dtype)

    def forward(self, x):
        q, k, v = self.first(x).chunk(3, -1)
        h = nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])
        return self.last(h[:, 0].mean(1))


def test_attention_is_differentiated_forwards():
    model = Attention()
    opt = paper(model)
    x, y = torch.randn(20, 6, 4), torch.randint(0, 3, (20,))
    first = cross_entropy(model(x), y).item()
    for _ in range(6):
        opt.step(closure_of(model, opt, x, y))
    with torch.no_grad():
        assert cross_entropy(model(x), y) < first
    assert all(p.isfinite().all() for p in model.parameters())


class Backwards(torch.autograd.Function):
    """x, without a forward-mode derivative."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g


def test_a_model_without_forward_derivatives_is_named():
    class Plain(nn.Module):
        def forward(self, x):
            return Backwards.apply(x)

    model = nn.Sequential(nn.Linear(4, 3, dtype=DOUBLE), Plain())
    opt = paper(model)
    before = parameters(model)
    x, y = torch.randn(9, 4, dtype=DOUBLE), torch.randint(0, 3, (9,))
    with pytest.raises(NotImplementedError, match="takes forward-mode derivatives .*recipe=None"):
        opt.step(closure_of(model, opt, x, y))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
