"""K-FAC against dense curvature, built whole from Jacobians and Hessians of PyTorch's losses."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn

import fused_so
from fused_so.optim.kfac import STRUCTURES
from tests.optim.nets import (
    DOUBLE,
    LIKELIHOODS,
    bare,
    chain,
    damped,
    dense_fisher,
    example_curvatures,
    grads,
    homogeneous,
    layer_rows,
    linears,
    loss_of,
    output_curvature,
    parameters,
    targets,
    twins,
    unvec,
    values,
    vec,
)

KINDS = list(LIKELIHOODS)
REDUCTIONS = ("mean", "batchmean", "sum")


def dense_factors(model, x, y, kind, reduction="mean"):
    """E[h h^T] with the mean of (h, 1), and G = sum_i J_i^T D_i J_i, for each layer."""
    curvature = output_curvature(kind, model(x), y, reduction)
    factors = []
    for layer, (h, jacobians) in zip(linears(model), layer_rows(model, x), strict=True):
        rows = homogeneous(h, layer.bias is not None)
        gram = example_curvatures(jacobians, curvature).sum(0)
        factors.append((rows.T @ rows / len(h), gram))
    return factors


def kept_factors(opt, layer):
    """The same from the optimizer's state."""
    state = opt.state[layer.weight]
    c, m = state["covariance"], state["mean"]
    if layer.bias is not None:
        c = torch.cat([c + torch.outer(m, m), m[:, None]], 1)
        c = torch.cat([c, torch.cat([m, m.new_ones(1)])[None]], 0)
    return c, state["output_covariance"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_exact_factors_and_their_inverse_are_the_dense_ones(kind, reduction, bias):
    model = chain(5, 4, 3, bias=bias)
    x, y = torch.randn(40, 5, dtype=DOUBLE) + 0.5, targets(kind, 40, 3)
    opt = fused_so.KFAC(
        model, likelihood=LIKELIHOODS[kind](reduction), factors="exact", **bare(damping=1e-3)
    )
    loss_of(kind, model(x), y, reduction).backward()
    expected = dense_factors(model, x, y, kind, reduction)
    before = [values(layer) for layer in linears(model)]
    opt.step()
    for layer, (a, g), old in zip(linears(model), expected, before, strict=True):
        for ours, dense in zip(kept_factors(opt, layer), (a, g), strict=True):
            torch.testing.assert_close(ours, dense, rtol=1e-10, atol=1e-12)
        width = layer.in_features
        cov = a if layer.bias is None else a - torch.outer(a[-1], a[-1])
        c, k = cov[:width, :width].trace() / width, g.trace() / len(g)
        root = math.sqrt(1e-3)
        a = damped(a, (c / k).sqrt() * root, layer.bias is not None)
        g = g + (k / c).sqrt() * root * torch.eye(len(g), dtype=DOUBLE)
        gradient = grads(layer)
        # (A kron G)^-1 vec of the gradient
        step = unvec(torch.linalg.solve(torch.kron(a, g), vec(gradient)), gradient)
        torch.testing.assert_close(old - values(layer), step, rtol=1e-8, atol=1e-10)


def layer_blocks(model, fisher):
    """The diagonal blocks of the layers, for (out, in) weights and then biases row by row."""
    blocks, at = [], 0
    for layer in linears(model):
        size = layer.weight.numel() + (0 if layer.bias is None else layer.out_features)
        blocks.append(fisher[at : at + size, at : at + size])
        at += size
    return blocks


def flat(layer):
    """The layer's gradient in the order of its parameters."""
    return torch.cat([p.grad.reshape(-1) for p in layer.parameters()])


def flat_step(layer, old):
    return torch.cat(
        [(a - p.detach()).reshape(-1) for a, p in zip(old, layer.parameters(), strict=True)]
    )


def test_linear_network_takes_the_exact_gauss_newton_step_of_every_layer():
    model = chain(6, 3, 3, 3, activation=nn.Identity)
    x, y = torch.randn(40, 6, dtype=DOUBLE) - 1, torch.randn(40, 3, dtype=DOUBLE)
    opt = fused_so.KFAC(model, likelihood=fused_so.Gaussian(0.7), factors="exact", **bare())
    loss_of("gaussian", model(x), y).backward()
    fisher = dense_fisher(model, x, output_curvature("gaussian", model(x), y))
    before = [[p.detach().clone() for p in layer.parameters()] for layer in linears(model)]
    opt.step()
    blocks = layer_blocks(model, fisher)
    for layer, block, old in zip(linears(model), blocks, before, strict=True):
        expected = torch.linalg.solve(block, flat(layer))
        torch.testing.assert_close(flat_step(layer, old), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_linear_layer_jumps_to_the_least_squares_solution(reduction, structure):
    layer = nn.Linear(4, 3, dtype=DOUBLE)
    x, y = torch.randn(30, 4, dtype=DOUBLE), torch.randn(30, 3, dtype=DOUBLE)
    opt = fused_so.KFAC(
        layer,
        likelihood=fused_so.Gaussian(0.7, reduction=reduction),
        factors="gauss_newton",
        structure=structure,
        **bare(statistics_every=1),
    )
    for _ in range(2):
        opt.zero_grad()
        loss_of("gaussian", layer(x), y, reduction).backward()
        # Random signs leave G = I / N plus noise, which one dimension a time averages away.
        opt.state[layer.weight]["output_covariance"] = torch.eye(3, dtype=DOUBLE) / (
            0.49 * {"mean": 3, "batchmean": 1, "sum": 1 / 30}[reduction]
        )
        opt.step()
    solution = torch.linalg.lstsq(homogeneous(x), y).solution.T
    torch.testing.assert_close(values(layer), solution, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_one_example_solves_the_exact_fisher_of_every_layer(kind):
    # F = x x^T kron G is singular; the step is one of its solutions, F delta = gradient. Layers
    # are no wider than the rank of the curvature at the outputs.
    model = chain(5, 2, 2, 3)
    x, y = torch.randn(1, 5, dtype=DOUBLE), targets(kind, 1, 3)
    options = bare(relative_damping=1e-14)
    last = linears(model)[-1]
    opt = fused_so.KFAC(model, likelihood=LIKELIHOODS[kind]("mean"), factors="exact", **options)
    loss_of(kind, model(x), y).backward()
    fisher = dense_fisher(model, x, output_curvature(kind, model(x), y))
    before = [[p.detach().clone() for p in layer.parameters()] for layer in linears(model)]
    opt.step()
    for layer, block, old in zip(linears(model), layer_blocks(model, fisher), before, strict=True):
        if layer is last and kind == "categorical":
            continue  # its G is singular: softmax does not see a common shift
        torch.testing.assert_close(block @ flat_step(layer, old), flat(layer), rtol=1e-5, atol=1e-7)


class Gated(nn.Module):
    """Outputs (W x + b) sigmoid(z): the layer's Jacobian depends on z alone."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 3, dtype=DOUBLE)

    def forward(self, xz):
        return self.first(xz[:, :4]) * xz[:, 4:].sigmoid()


def test_first_layer_with_independent_factors_takes_the_exact_step():
    # Every x meets every z, so that inputs and Jacobians are independent over the batch.
    xs, zs = torch.randn(7, 4, dtype=DOUBLE), torch.randn(5, 3, dtype=DOUBLE)
    x = torch.stack([torch.cat(pair) for pair in itertools.product(xs, zs)])
    model, y = Gated(), torch.randn(35, 3, dtype=DOUBLE)
    opt = fused_so.KFAC(model, likelihood=fused_so.Gaussian(0.7), factors="exact", **bare())
    loss_of("gaussian", model(x), y).backward()
    fisher = dense_fisher(model, x, output_curvature("gaussian", model(x), y))
    old = parameters(model)
    opt.step()
    expected = torch.linalg.solve(fisher, flat(model.first))
    torch.testing.assert_close(flat_step(model.first, old), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("factors", ["sampled", "gauss_newton"])
@pytest.mark.parametrize("kind", KINDS)
def test_sampled_factors_converge_at_the_monte_carlo_rate(kind, factors):
    model = chain(4, 3, 2)
    x, y = torch.randn(6, 4, dtype=DOUBLE), targets(kind, 6, 2)
    opt = fused_so.KFAC(model, likelihood=LIKELIHOODS[kind]("mean"), factors=factors)
    exact = torch.cat([g.reshape(-1) for _, g in dense_factors(model, x, y, kind)])
    weights = [layer.weight for layer in linears(model)]
    draws = []
    for _ in range(1024):
        model(x)
        draws.append(torch.cat([opt.state[w]["output_covariance"].reshape(-1) for w in weights]))
        for weight in weights:
            opt.state[weight].clear()
    errors = torch.stack(draws) - exact
    standard = errors.std(0) / math.sqrt(1024)
    if standard.max() < 1e-12:  # Gaussian signs: sums of squares without noise in the last layer
        return
    noisy = standard > 1e-12
    assert (errors.mean(0)[noisy].abs() / standard[noisy]).max() < 4.5
    # Means of 4 and of 32 draws: an error sqrt(8) times smaller.
    few, many = (errors.reshape(-1, k, len(exact)).mean(1).square().mean().sqrt() for k in (4, 32))
    assert 2.2 < few / many < 3.6


def test_draws_of_many_steps_are_averaged():
    model = chain(4, 3, 2)
    x = torch.randn(6, 4, dtype=DOUBLE)
    opt = fused_so.KFAC(
        model, lr=0.0, likelihood=fused_so.Bernoulli(), decay=1.0, statistics_every=1
    )
    draws = []
    for t in range(5):
        torch.manual_seed(t)
        twin = chain(4, 3, 2)
        twin.load_state_dict(model.state_dict())
        single = fused_so.KFAC(twin, lr=0.0, likelihood=fused_so.Bernoulli())
        state = torch.get_rng_state()
        twin(x)
        draws.append(single.state[twin[2].weight]["output_covariance"])
        torch.set_rng_state(state)
        model(x).square().mean().backward()
        opt.step()
    expected = torch.stack(draws).mean(0)
    torch.testing.assert_close(opt.state[model[2].weight]["output_covariance"], expected)


class Pooled(nn.Module):
    """A layer on every position of a sequence, their mean, and another layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 3, dtype=DOUBLE)
        self.last = nn.Linear(3, 2, dtype=DOUBLE)

    def forward(self, x, shift=0.0):
        return self.last((self.first(x) + shift).tanh().mean(1))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_layers_that_see_several_rows_of_an_example(reduction):
    model = Pooled()
    x, y = torch.randn(6, 5, 4, dtype=DOUBLE), targets("categorical", 6, 2)
    opt = fused_so.KFAC(
        model, likelihood=fused_so.Categorical(reduction=reduction), factors="exact"
    )
    curvature = output_curvature("categorical", model(x), y, reduction)
    shift = torch.zeros(6, 5, 3, dtype=DOUBLE)
    jacobian = torch.func.jacrev(lambda shift: model(x, shift))(shift)  # (n, o, n, t, out)
    expected = torch.einsum("iamtc,iajb,jbmtd->cd", jacobian, curvature, jacobian)
    opt.state.clear()
    opt._bind_layers()
    model(x).sum().backward()
    state = opt.state[model.first.weight]
    torch.testing.assert_close(state["output_covariance"], expected.detach())
    torch.testing.assert_close(state["mean"], x.mean((0, 1)))


class Siamese(nn.Module):
    """A layer that is called twice, on 1 and on 2 rows of an example."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(4, 3, dtype=DOUBLE)

    def forward(self, x, shift=0.0):
        one, two = self.shared(x[:, :1]), self.shared(x[:, 1:])
        return (torch.cat([one, two], 1) + shift).tanh().sum(1)


@pytest.mark.parametrize("factors", ["exact", "sampled"])
def test_layers_that_are_called_several_times(factors):
    model, x = Siamese(), torch.randn(6, 3, 4, dtype=DOUBLE)
    opt = fused_so.KFAC(model, likelihood=fused_so.Gaussian(), factors=factors)
    shift = torch.zeros(6, 3, 3, dtype=DOUBLE)
    plain = copy.deepcopy(model)
    jacobian = torch.func.jacrev(lambda shift: plain(x, shift))(shift)
    state = torch.get_rng_state()
    f = model(x).detach()
    if factors == "exact":  # N = 6 * 3
        expected = torch.einsum("iamtc,iamtd->cd", jacobian, jacobian) / 18
    else:
        torch.set_rng_state(state)
        score = f - fused_so.Gaussian().sample(f)
        each = torch.einsum("iaitc,ia->itc", jacobian, score)
        expected = torch.einsum("itc,itd->cd", each, each) / 18
    kept = opt.state[model.shared.weight]
    torch.testing.assert_close(kept["output_covariance"], expected.detach())
    rows = x.reshape(-1, 4)
    torch.testing.assert_close(kept["covariance"], torch.cov(rows.T, correction=0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_norm", [None, 1e-2])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_every_reduction_takes_the_same_steps(structure, max_norm, kind):
    models = twins(5, 4, 3, count=3)
    x, y = torch.randn(20, 5, dtype=DOUBLE), targets(kind, 20, 3)
    for model, reduction in zip(models, REDUCTIONS, strict=True):
        opt = fused_so.KFAC(
            model,
            likelihood=LIKELIHOODS[kind](reduction),
            factors="exact",
            structure=structure,
            max_norm=max_norm,
        )
        for _ in range(3):
            opt.zero_grad()
            loss_of(kind, model(x), y, reduction).backward()
            opt.step()
    for other in models[1:]:
        for p, q in zip(models[0].parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_max_norm_bounds_twice_the_divergence_of_an_example(kind):
    # One layer and no damping, so that the modelled divergence is the true one to second order.
    model = nn.Linear(4, 3, dtype=DOUBLE)
    nn.init.zeros_(model.weight)  # so that all examples have the same curvature
    x, y = torch.randn(9, 4, dtype=DOUBLE), targets(kind, 9, 3)
    opt = fused_so.KFAC(
        model,
        likelihood=LIKELIHOODS[kind]("mean"),
        factors="exact",
        **bare(relative_damping=1e-12, max_norm=1e-3),
    )
    before = model(x).detach()
    curvature = output_curvature(kind, before, y, "sum")
    loss_of(kind, model(x), y).backward()
    opt.step()
    change = (model(x) - before).detach()
    # delta^T F delta an example
    twice = torch.einsum("ia,iajb,jb->", change, curvature, change) / len(x)
    torch.testing.assert_close(twice.sqrt(), torch.tensor(1e-3, dtype=DOUBLE), rtol=1e-5, atol=0)


def affine_twin(model, omega, shift):
    """The same function of inputs omega x + shift, with sigmoid in the place of tanh."""
    twin = chain(*[model[0].in_features, *(m.out_features for m in linears(model))],
                 activation=nn.Sigmoid)  # fmt: skip
    with torch.no_grad():
        for i, (ours, theirs) in enumerate(zip(linears(model), linears(twin), strict=True)):
            weight, bias = ours.weight, ours.bias
            if i == 0:
                weight = weight @ torch.linalg.inv(omega)
                bias = bias - weight @ shift
            else:
                # tanh(a) = 2 sigmoid(2 a) - 1
                weight, bias = 2 * weight, bias - weight.sum(1)
            scale = 1 if ours is linears(model)[-1] else 2
            theirs.weight.copy_(scale * weight)
            theirs.bias.copy_(scale * bias)
    return twin


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("kind", ["gaussian", "bernoulli"])
def test_path_of_outputs_survives_affine_reparametrization(kind, structure, momentum):
    """Martens and Grosse 2015, corollary 2: inputs transformed, tanh against sigmoid."""
    model = chain(4, 3, 3, 2)
    omega = torch.randn(4, 4, dtype=DOUBLE) + 2 * torch.eye(4, dtype=DOUBLE)
    shift = torch.randn(4, dtype=DOUBLE)
    twin = affine_twin(model, omega, shift)
    x, y = torch.randn(50, 4, dtype=DOUBLE), targets(kind, 50, 2)
    outputs = []
    for net, inputs in ((model, x), (twin, x @ omega.T + shift)):
        opt = fused_so.KFAC(
            net,
            likelihood=LIKELIHOODS[kind]("mean"),
            factors="exact",
            structure=structure,
            statistics_every=2,
            inverse_every=2,
            **bare(lr=0.2, momentum=momentum, max_norm=0.5),
        )
        path = []
        for _ in range(8):
            opt.zero_grad()
            f = net(inputs)
            path.append(f.detach())
            loss_of(kind, f, y).backward()
            opt.step()
        outputs.append(torch.stack(path))
    torch.testing.assert_close(outputs[0][0], outputs[1][0])
    assert (outputs[0][-1] - outputs[0][0]).abs().max() > 0.1
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("factors", ["exact", "empirical"])
def test_ten_steps_follow_an_independent_loop(factors):
    """The whole algorithm in plain PyTorch: averages, amortization, damping, clip, momentum."""
    model, twin = twins(6, 5, 4, 3)
    lr, momentum, decay, max_norm, eta, lam, delta = 0.2, 0.8, 0.7, 0.3, 0.02, 1e-2, 0.05
    warmup = 6
    likelihood = None if factors == "empirical" else nn.CrossEntropyLoss()
    opt = fused_so.KFAC(
        model, lr, likelihood=likelihood, factors=factors, damping=lam, relative_damping=delta,
        momentum=momentum, nesterov=True, weight_decay=eta, statistics_every=3, inverse_every=4,
        decay=decay, max_norm=max_norm, warmup=warmup,
    )  # fmt: skip
    second, gram, weight, inverses, velocity = {}, {}, 0.0, {}, {}
    clipped = []
    for t in range(10):
        n = 20 + 5 * (t % 3)
        x, y = torch.randn(n, 6, dtype=DOUBLE), torch.randint(0, 3, (n,))
        for net, optimizer in ((model, opt), (twin, twin)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
        opt.step()
        if t in (0, 1, 2, 3, 6, 9):
            curvature = output_curvature("categorical", twin(x), y)
            score = (twin(x).softmax(1) - nn.functional.one_hot(y, 3)).detach()
            weight = decay * weight + n
            share = n / weight
            for layer, (h, jacobians) in zip(linears(twin), layer_rows(twin, x), strict=True):
                rows = homogeneous(h)
                a = rows.T @ rows / n
                if factors == "exact":
                    g = example_curvatures(jacobians, curvature).sum(0)
                else:
                    each = torch.einsum("iao,ia->io", jacobians, score)
                    g = each.T @ each / n
                second[layer] = (1 - share) * second.get(layer, 0.0) + share * a
                gram[layer] = (1 - share) * gram.get(layer, 0.0) + share * g
        updates, length = {}, 0.0
        for layer in linears(twin):
            a, g = second[layer], gram[layer]
            if t in (0, 1, 2, 4, 8):
                mean = a[-1, :-1]
                c = (a[:-1, :-1] - torch.outer(mean, mean)).trace() / len(mean)
                k = g.trace() / len(g)
                gamma = math.sqrt(lam + eta)
                pi = (c / k).sqrt()
                inverses[layer] = (
                    damped(a, pi * gamma + math.sqrt(delta) * c).inverse(),
                    damped(g, gamma / pi + math.sqrt(delta) * k, bias=False).inverse(),
                )
            # The homogeneous inverse was taken with the mean of then, the gradient is centered
            # by the mean of now: W (h - m) + d has C and m of its own.
            mean = a[-1, :-1]
            gradient = grads(layer) + eta * values(layer)
            input_inverse = inverses[layer][0][:-1, :-1]
            dw = inverses[layer][1] @ (
                gradient[:, :-1] - torch.outer(gradient[:, -1], mean)
            ) @ input_inverse  # fmt: skip
            db = inverses[layer][1] @ gradient[:, -1] - dw @ mean
            updates[layer] = torch.cat([dw, db[:, None]], 1)
            length = length + (updates[layer] * gradient).sum()
        nu = min(1.0, max_norm / math.sqrt(length))
        clipped.append(nu < 1)
        with torch.no_grad():
            for layer, update in updates.items():
                now = momentum * min(1.0, (t + 1) / warmup)
                longer = (1 - now) / (1 - momentum)
                update = nu * longer * min(1.0, 0.2 + 0.8 * t / warmup) * update
                velocity[layer] = now * velocity.get(layer, 0.0) + update
                step = lr * (update + now * velocity[layer])
                layer.weight -= step[:, :-1]
                layer.bias -= step[:, -1]
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)
    assert True in clipped


def test_momentum_of_one_is_not_warmed_up():
    """lr / (1 - momentum) has no value to keep: updates add up, at their lengths."""
    model = chain(4, 3)
    opt = fused_so.KFAC(
        model, 1.0, likelihood=nn.CrossEntropyLoss(), factors="exact", momentum=1.0, nesterov=False,
        max_norm=1e-3, warmup=4,
    )  # fmt: skip
    x, y = torch.randn(16, 4, dtype=DOUBLE), torch.randint(0, 3, (16,))
    norms, before, last = [], model[0].weight.detach().clone(), 0.0
    for _ in range(3):
        opt.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        opt.step()
        # v <- v + u and p <- p - v, so that u is the change of the step
        step = before - model[0].weight.detach()
        norms.append((step - last).norm())
        before, last = model[0].weight.detach().clone(), step
    # The gradient of so short steps stays what it was: only the warm-up, 0.2, 0.4 and 0.6, shows.
    assert float(norms[1] / norms[0]) == pytest.approx(2.0, rel=0.05)
    assert float(norms[2] / norms[0]) == pytest.approx(3.0, rel=0.05)


@pytest.mark.parametrize("structure", ["block_diagonal", "block_tridiagonal"])
def test_inputs_that_do_not_vary_are_damped(structure):
    model = chain(8, 16, 16, 3, dtype=torch.float32)
    with torch.no_grad():
        model[0].bias += 30  # all of tanh is saturated
    start = max(p.abs().max() for p in model.parameters())
    opt = fused_so.KFAC(model, likelihood=fused_so.Categorical(), structure=structure)
    x, y = torch.randn(64, 8), torch.randint(0, 3, (64,))
    for _ in range(60):
        opt.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
    assert loss < 1.2
    assert max(p.abs().max() for p in model.parameters()) < 2 * start


def test_layers_that_prefer_rows_resume_bit_for_bit():
    # Resumed at a step without statistics: what is kept of it is decided by the step before.
    def build():
        torch.manual_seed(0)
        model = chain(128, 128, 10)
        return model, fused_so.KFAC(model, likelihood=fused_so.Gaussian(), factors="exact")

    def run(model, opt, steps):
        for seed in steps:
            torch.manual_seed(seed)
            opt.zero_grad()
            model(torch.randn(16, 128, dtype=DOUBLE)).square().mean().backward()
            opt.step()

    model, opt = build()
    run(model, opt, range(7))
    other, resumed = build()
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(opt.state_dict())
    for m, o in ((model, opt), (other, resumed)):
        run(m, o, range(7, 12))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
