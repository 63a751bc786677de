"""The block-tridiagonal inverse against Martens and Grosse 2015, section 3.3, built densely."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import fused_so
from tests.optim.nets import (
    DOUBLE,
    bare,
    chain,
    damped,
    example_curvatures,
    grads,
    homogeneous,
    layer_rows,
    linears,
    loss_of,
    output_curvature,
    targets,
    twins,
    unvec,
    values,
    vec,
)

WIDTHS = {3: (5, 4, 3, 2), 4: (4, 3, 4, 3, 2)}
BIASES = {
    3: [(True, True, True), (False, False, False), (True, False, True), (False, True, False)],
    4: [(True, True, True, True), (True, True, False, False)],
}
CASES = [(depth, bias) for depth, biases in BIASES.items() for bias in biases]


def all_factors(model, x, y, kind):
    """E[x_i x_j^T] of the inputs (h, 1) or h and the joint Fisher's G_ij, of all pairs."""
    curvature = output_curvature(kind, model(x), y)
    rows = layer_rows(model, x)
    inputs = [
        homogeneous(h, layer.bias is not None)
        for layer, (h, _) in zip(linears(model), rows, strict=True)
    ]
    sizes = [j.shape[2] for _, j in rows]
    gram = example_curvatures(torch.cat([j for _, j in rows], 2), curvature).sum(0)
    grams = [list(row.split(sizes, 1)) for row in gram.split(sizes, 0)]
    return [[a.T @ b / len(x) for b in inputs] for a in inputs], grams


def less_constant(mean, rho):
    """(h, 1) with its constant, in the coordinates (h - m, 1), multiplied by rho."""
    center = torch.eye(len(mean) + 1, dtype=DOUBLE)
    center[:-1, -1] = -mean
    scale = torch.diag(torch.cat([torch.ones_like(mean), rho[None]]))
    return torch.linalg.solve(center, scale @ center)


def dense_inverse(a, g):
    """F-hat^-1 = Xi^T Lambda Xi from all blocks A_ij and G_ij."""
    depth = len(a)
    f = [[torch.kron(a[i][j], g[i][j]) for j in range(depth)] for i in range(depth)]
    sizes = [len(f[i][i]) for i in range(depth)]
    xi = torch.eye(sum(sizes), dtype=DOUBLE)
    blocks = [list(row.split(sizes, 1)) for row in xi.split(sizes, 0)]
    sigmas = []
    for i in range(depth):
        if i + 1 == depth:
            sigmas.append(f[i][i])
            continue
        psi = f[i][i + 1] @ torch.linalg.inv(f[i + 1][i + 1])
        sigmas.append(f[i][i] - psi @ f[i + 1][i + 1] @ psi.T)
        blocks[i][i + 1].sub_(psi)
    return xi.T @ torch.block_diag(*map(torch.linalg.inv, sigmas)) @ xi, f, sizes


@pytest.mark.parametrize("kind", ["gaussian", "categorical"])
@pytest.mark.parametrize(("depth", "bias"), CASES)
def test_update_is_that_of_the_dense_inverse(depth, bias, kind):
    model = chain(*WIDTHS[depth], bias=bias)
    layers = linears(model)
    x, y = torch.randn(60, WIDTHS[depth][0], dtype=DOUBLE) + 0.5, targets(kind, 60, 2)
    opt = fused_so.KFAC(
        model,
        likelihood=fused_so.Categorical() if kind == "categorical" else fused_so.Gaussian(0.7),
        factors="exact",
        structure="block_tridiagonal",
        **bare(damping=1e-3, relative_damping=1e-3),
    )
    loss_of(kind, model(x), y).backward()
    a, g = all_factors(model, x, y, kind)
    shrink = []
    for i, layer in enumerate(layers):
        state, has_bias = opt.state[layer.weight], layer.bias is not None
        c, k = state["covariance"].diagonal().mean(), state["output_covariance"].diagonal().mean()
        d = ((c / k * 1e-3).sqrt() + 1e-3**0.5 * c, (k / c * 1e-3).sqrt() + 1e-3**0.5 * k)
        rho = (1 + d[0] / c) ** -0.5
        shrink.append(
            less_constant(a[i][i][:-1, -1], rho)
            if has_bias
            else torch.eye(layer.in_features, dtype=DOUBLE)
        )
        a[i][i], g[i][i] = damped(a[i][i], d[0], has_bias), damped(g[i][i], d[1], False)
    for i, j in itertools.permutations(range(depth), 2):
        a[i][j] = shrink[i] @ a[i][j] @ shrink[j].T
    inverse, f, sizes = dense_inverse(a, g)
    # F-hat has the blocks of F-tilde on the tridiagonal, and its inverse no others.
    f_hat = [row.split(sizes, 1) for row in torch.linalg.inv(inverse).split(sizes, 0)]
    precision = [row.split(sizes, 1) for row in inverse.split(sizes, 0)]
    for i, j in itertools.product(range(depth), repeat=2):
        if abs(i - j) <= 1:
            torch.testing.assert_close(f_hat[i][j], f[i][j], rtol=1e-6, atol=1e-9)
        else:
            torch.testing.assert_close(precision[i][j], 0 * precision[i][j], rtol=0, atol=1e-8)

    gradients = [grads(layer) for layer in layers]
    expected = (inverse @ torch.cat([vec(gradient) for gradient in gradients])).split(sizes)
    before = [values(layer) for layer in layers]
    opt.step()
    block_diagonal = [
        torch.linalg.solve(f[i][i], vec(gradient)) for i, gradient in enumerate(gradients)
    ]
    for layer, old, step, alone, gradient in zip(
        layers, before, expected, block_diagonal, gradients, strict=True
    ):
        ours = old - values(layer)
        torch.testing.assert_close(ours, unvec(step, gradient), rtol=1e-7, atol=1e-9)
        assert (ours - unvec(alone, gradient)).norm() > 1e-2 * ours.norm()


def test_ten_steps_follow_an_independent_loop():
    """Averages, amortization, damping, weight decay, clip and momentum, with the dense inverse."""
    model, twin = twins(5, 4, 3, 2)
    lr, momentum, decay, max_norm, eta, lam, delta = 0.2, 0.8, 0.7, 0.3, 0.02, 1e-2, 0.05
    opt = fused_so.KFAC(
        model, lr, likelihood=fused_so.Categorical(), factors="exact", damping=lam,
        relative_damping=delta, momentum=momentum, nesterov=True, weight_decay=eta,
        statistics_every=3, inverse_every=4, decay=decay, max_norm=max_norm, warmup=0,
        structure="block_tridiagonal",
    )  # fmt: skip
    layers = linears(twin)
    sizes = [0, *itertools.accumulate(layer.in_features for layer in layers)]
    outs = [0, *itertools.accumulate(layer.out_features for layer in layers)]
    second, gram, weight, velocity, clipped = 0.0, 0.0, 0.0, {}, []
    for t in range(10):
        n = 20 + 5 * (t % 3)
        x, y = torch.randn(n, 5, dtype=DOUBLE), targets("categorical", n, 2)
        for net, optimizer in ((model, opt), (twin, twin)):
            optimizer.zero_grad()
            loss_of("categorical", net(x), y).backward()
        opt.step()
        if t in (0, 1, 2, 3, 6, 9):
            weight = decay * weight + n
            share = n / weight
            rows = layer_rows(twin, x)
            h = homogeneous(torch.cat([h for h, _ in rows], 1))
            curvature = output_curvature("categorical", twin(x), y)
            each = example_curvatures(torch.cat([j for _, j in rows], 2), curvature)
            second = (1 - share) * second + share * h.T @ h / n
            gram = (1 - share) * gram + share * each.sum(0)
        mean = second[-1, :-1]
        if t in (0, 1, 2, 4, 8):
            # In the coordinates W (h - m) + d the inputs are (h - m, 1).
            c = second[:-1, :-1] - torch.outer(mean, mean)
            one = torch.ones(1, 1, dtype=DOUBLE)
            cuts, spans = itertools.pairwise(sizes), itertools.pairwise(outs)
            cuts, spans = [slice(*cut) for cut in cuts], [slice(*span) for span in spans]
            a = [[torch.block_diag(c[i, j], one) for j in cuts] for i in cuts]
            g = [[gram[i, j].clone() for j in spans] for i in spans]
            rhos = []
            for i, layer in enumerate(layers):
                v = c[cuts[i], cuts[i]].trace() / layer.in_features
                k = g[i][i].trace() / layer.out_features
                gamma, root = (lam + eta) ** 0.5, delta**0.5
                d = (v / k).sqrt() * gamma + root * v
                rhos.append((1 + d / v) ** -0.5)
                a[i][i] = damped(a[i][i], d)
                g[i][i] = damped(g[i][i], (k / v).sqrt() * gamma + root * k, False)
            for i, j in itertools.permutations(range(3), 2):
                a[i][j][-1, -1] = rhos[i] * rhos[j]
            inverse = dense_inverse(a, g)[0]
        gradients = []
        for layer, cut in zip(layers, cuts, strict=True):
            gradient = grads(layer) + eta * values(layer)
            gradient[:, :-1] -= torch.outer(gradient[:, -1], mean[cut])
            gradients.append(gradient)
        flat = torch.cat([vec(gradient) for gradient in gradients])
        step = inverse @ flat
        nu = min(1.0, max_norm / (step @ flat).sqrt().item())
        clipped.append(nu < 1)
        parts = step.split([gradient.numel() for gradient in gradients])
        for layer, part, gradient, cut in zip(layers, parts, gradients, cuts, strict=True):
            update = nu * unvec(part, gradient)
            update[:, -1] -= update[:, :-1] @ mean[cut]
            velocity[layer] = momentum * velocity.get(layer, 0.0) + update
            change = lr * (update + momentum * velocity[layer])
            with torch.no_grad():
                layer.weight -= change[:, :-1]
                layer.bias -= change[:, -1]
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)
    assert True in clipped


@pytest.mark.parametrize("bias", [(True, True, True), (True, False, True), (False, True, False)])
def test_cross_statistics_are_running_means(bias):
    model = chain(5, 4, 3, 2, bias=bias)
    layers = linears(model)
    opt = fused_so.KFAC(
        model, lr=0.0, likelihood=fused_so.Categorical(), factors="exact", decay=0.6,
        structure="block_tridiagonal", statistics_every=1,
    )  # fmt: skip
    weight, second, gram = 0.0, None, None
    for n in (20, 7, 30):
        x, y = torch.randn(n, 5, dtype=DOUBLE) + 0.5, targets("categorical", n, 2)
        opt.zero_grad()
        loss_of("categorical", model(x), y).backward()
        opt.step()
        inputs = torch.cat([h for h, _ in layer_rows(model, x)], 1)
        rows = homogeneous(inputs)
        outputs = torch.cat([j for _, j in layer_rows(model, x)], 2)
        with torch.no_grad():
            f = model(x)
        g = example_curvatures(outputs, output_curvature("categorical", f, y)).sum(0)
        weight = 0.6 * weight + n
        share = n / weight
        second = (1 - share) * (0.0 if second is None else second) + share * rows.T @ rows / n
        gram = (1 - share) * (0.0 if gram is None else gram) + share * g
    mean = second[-1, :-1]
    covariance = second[:-1, :-1] - torch.outer(mean, mean)
    ins = list(itertools.accumulate((layer.in_features for layer in layers), initial=0))
    outs = list(itertools.accumulate((layer.out_features for layer in layers), initial=0))
    for i in (0, 1):
        state = opt.state[layers[i].weight]
        expected = covariance[ins[i] : ins[i + 1], ins[i + 1] : ins[i + 2]]
        torch.testing.assert_close(state["cross"], expected)
        expected = gram[outs[i] : outs[i + 1], outs[i + 1] : outs[i + 2]]
        torch.testing.assert_close(state["output_cross"], expected)


def test_a_layer_that_the_batch_does_not_use_stays_out():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4, dtype=DOUBLE) for _ in range(3))

        def forward(self, x, detour):
            h = self.a(x).tanh()
            return self.c(self.b(h).tanh() if detour else h)

    model = Branches()
    opt = fused_so.KFAC(
        model, likelihood=fused_so.Gaussian(), structure="block_tridiagonal", statistics_every=1
    )
    for detour in (False, True, False, True):
        before = model.b.weight.detach().clone()
        opt.zero_grad()
        model(torch.randn(9, 4, dtype=DOUBLE), detour).square().mean().backward()
        opt.step()
        assert torch.equal(before, model.b.weight) != detour
    assert all(p.isfinite().all() for p in model.parameters())
    assert "regression" in opt.state[model.a.weight]


def test_layers_with_other_numbers_of_rows_are_left_apart_with_a_warning():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3, dtype=DOUBLE), nn.Linear(3, 2, dtype=DOUBLE)

        def forward(self, x):
            return self.b(self.a(x).tanh().mean(1))

    models = [Pooled(), Pooled()]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(9, 5, 4, dtype=DOUBLE)
    for model, structure in zip(models, ("block_diagonal", "block_tridiagonal"), strict=True):
        opt = fused_so.KFAC(
            model, likelihood=fused_so.Gaussian(), factors="exact", structure=structure
        )
        if structure == "block_diagonal":
            model(x).square().mean().backward()
        else:
            with pytest.warns(UserWarning, match="'a' and 'b' see 45 and 9 rows"):
                model(x).square().mean().backward()
        opt.step()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q)


def test_empty_and_non_finite_batches_leave_the_interaction_alone():
    model = chain(4, 3, 2)
    opt = fused_so.KFAC(
        model, likelihood=fused_so.Gaussian(), factors="exact", statistics_every=1,
        structure="block_tridiagonal",
    )  # fmt: skip
    state = opt.state[model[0].weight]
    bad = torch.full((5, 4), float("nan"), dtype=DOUBLE)
    with pytest.warns(UserWarning):
        for x in (torch.zeros(0, 4, dtype=DOUBLE), bad):
            opt.zero_grad()
            model(x).square().sum().backward()
            opt.step()
    for _ in range(2):
        opt.zero_grad()
        model(torch.randn(9, 4, dtype=DOUBLE)).square().mean().backward()
        opt.step()
    kept = state["cross"].clone(), state["regression"].clone()
    opt.zero_grad()
    model(bad).square().mean().backward()  # each warning comes once
    opt.step()
    assert torch.equal(state["cross"], kept[0])
    assert all(v.isfinite().all() for v in state.values() if torch.is_tensor(v))
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("rows", [1, 2])
def test_fewer_rows_than_units_without_damping_are_retried(rows):
    model = chain(6, 5, 3)
    opt = fused_so.KFAC(
        model, likelihood=fused_so.Gaussian(), factors="exact", structure="block_tridiagonal",
        damping=0.0, relative_damping=0.0,
    )  # fmt: skip
    for _ in range(3):
        opt.zero_grad()
        model(torch.randn(rows, 6, dtype=DOUBLE)).square().mean().backward()
        opt.step()
    assert all(p.isfinite().all() for p in model.parameters())
