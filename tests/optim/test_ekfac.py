"""EKFAC against the dense Fisher, in the coordinates W (h - m) + d."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fused_so
from tests.optim.nets import (
    DOUBLE,
    LIKELIHOODS,
    bare,
    chain,
    example_curvatures,
    grads,
    homogeneous,
    layer_rows,
    linears,
    loss_of,
    output_curvature,
    targets,
    twins,
    values,
)

KINDS = list(LIKELIHOODS)


def centered_fishers(model, x, y, kind):
    """sum_i x_i x_i^T kron J_i^T D_i J_i of each layer, x being (h - m, 1), or h without bias."""
    with torch.no_grad():
        curvature = output_curvature(kind, model(x), y)
    fishers = []
    for layer, (h, jacobians) in zip(linears(model), layer_rows(model, x), strict=True):
        rows = h if layer.bias is None else homogeneous(h - h.mean(0))
        each = example_curvatures(jacobians, curvature)
        n = len(x)
        fisher = torch.einsum("ia,ib,ipq->apbq", rows, rows, each)
        size = rows.shape[1] * each.shape[1]
        fishers.append((fisher.reshape(size, size), rows.T @ rows / n, each.sum(0)))
    return fishers


def kept(opt, layer):
    """E_A kron E_G and vec S from the optimizer's state, vec by columns of (out, in + 1)."""
    state = opt.state[layer.weight]
    basis = state["basis"]
    if layer.bias is not None:
        basis = torch.block_diag(basis, torch.ones(1, 1, dtype=DOUBLE))
    # torch.kron fails on some strides
    vectors = torch.kron(basis.contiguous(), state["output_basis"].contiguous())
    return vectors, state["diagonal"].T.reshape(-1)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_no_further_from_the_fisher_than_kfac(kind, bias):
    model = chain(5, 4, 3, bias=bias)
    x, y = torch.randn(40, 5, dtype=DOUBLE) + 0.5, targets(kind, 40, 3)
    # With decay 0 the second batch, the same, is all that the diagonal holds.
    opt = fused_so.EKFAC(
        model, 0.0, likelihood=LIKELIHOODS[kind]("mean"), factors="exact", decay=0.0,
        inverse_every=100, diagonal_every=1,
    )  # fmt: skip
    for t in range(2):
        loss_of(kind, model(x), y).backward()
        if t == 0:
            opt.step()
    for layer, (fisher, a, g) in zip(
        linears(model), centered_fishers(model, x, y, kind), strict=True
    ):
        vectors, diagonal = kept(opt, layer)
        # The diagonal of the Fisher in that basis, of which nothing is closer.
        torch.testing.assert_close(diagonal, (vectors.T @ fisher @ vectors).diagonal())
        eigen = vectors @ torch.diag(diagonal) @ vectors.T
        kronecker = torch.kron(a, g)
        further, rounding = (fisher - kronecker).norm(), 1e-14 * fisher.norm()
        assert (fisher - eigen).norm() <= 0.999 * further + rounding
        # Until then it is K-FAC's.
        opt.invert([each for each in opt._layers if each.module is layer])
        vectors, diagonal = kept(opt, layer)
        torch.testing.assert_close(vectors @ torch.diag(diagonal) @ vectors.T, kronecker)


def test_equals_kfac_where_inputs_and_gradients_are_independent():
    # A linear network: the Jacobians are the same for every example.
    models = twins(6, 3, 3, activation=nn.Identity)
    options = {"likelihood": fused_so.Gaussian(0.7), "factors": "exact", "decay": 0.0}
    options |= bare(lr=0.0, statistics_every=1, inverse_every=100)
    x, y = torch.randn(40, 6, dtype=DOUBLE), torch.randn(40, 3, dtype=DOUBLE)
    for model, optimizer in zip(models, (fused_so.EKFAC, fused_so.KFAC), strict=True):
        opt = optimizer(model, **options)
        for lr in (0.0, 0.0, 0.0, 0.3):  # the fourth step keeps the bases, and has its own diagonal
            opt.param_groups[0]["lr"] = lr
            opt.zero_grad()
            loss_of("gaussian", model(x), y).backward()
            opt.step()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


def test_sampled_diagonal_is_that_of_the_drawn_scores():
    model = chain(4, 3, 2)
    opt = fused_so.EKFAC(model, 0.0, likelihood=fused_so.Bernoulli(), decay=0.0, diagonal_every=1)
    x = torch.randn(9, 4, dtype=DOUBLE)
    model(x).sum().backward()
    opt.step()
    state = torch.get_rng_state()
    f = model(x).detach()
    torch.set_rng_state(state)
    drawn = fused_so.Bernoulli().sample(f)
    score = f.sigmoid() - drawn  # of one entry; the loss is the mean over 9 * 2
    for layer, (h, jacobians) in zip(linears(model), layer_rows(model, x), strict=True):
        g = torch.einsum("iao,ia->io", jacobians, score)
        vectors, diagonal = kept(opt, layer)
        rows = homogeneous(h - h.mean(0))
        each = torch.einsum("ia,ip->iap", rows, g).reshape(9, -1) / math.sqrt(18)
        torch.testing.assert_close(diagonal, (each @ vectors).square().sum(0))


@pytest.mark.parametrize("factors", ["exact", "empirical"])
def test_ten_steps_follow_an_independent_loop(factors):
    model, twin = twins(6, 5, 4, 3)
    lr, momentum, decay, max_norm, eta, lam, delta = 0.2, 0.8, 0.7, 0.3, 0.02, 1e-3, 0.05
    warmup = 6
    likelihood = None if factors == "empirical" else nn.CrossEntropyLoss()
    opt = fused_so.EKFAC(
        model, lr, likelihood=likelihood, factors=factors, damping=lam, relative_damping=delta,
        momentum=momentum, nesterov=True, weight_decay=eta, statistics_every=3, inverse_every=4,
        decay=decay, diagonal_every=2, max_norm=max_norm, warmup=warmup,
    )  # fmt: skip
    stats = {layer: {"weight": 0.0} for layer in linears(twin)}
    velocity, clipped = {}, []
    for t in range(10):
        n = 20 + 5 * (t % 3)
        x, y = torch.randn(n, 6, dtype=DOUBLE), torch.randint(0, 3, (n,))
        for net, optimizer in ((model, opt), (twin, twin)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
        opt.step()
        curvature = output_curvature("categorical", twin(x), y)
        score = (twin(x).softmax(1) - nn.functional.one_hot(y, 3)).detach()
        updates, length = {}, 0.0
        for layer, (h, jacobians) in zip(linears(twin), layer_rows(twin, x), strict=True):
            s = stats[layer]
            if factors == "exact":
                each = n * example_curvatures(jacobians, curvature)
            else:
                g = torch.einsum("iao,ia->io", jacobians, score)
                each = torch.einsum("ip,iq->ipq", g, g)
            if t in (0, 1, 2, 3, 6, 9):
                rows = homogeneous(h)
                s["weight"] = decay * s["weight"] + n
                share = n / s["weight"]
                s["a"] = (1 - share) * s.get("a", 0.0) + share * rows.T @ rows / n
                s["g"] = (1 - share) * s.get("g", 0.0) + share * each.mean(0)
            mean = s["a"][-1, :-1]
            if t in (1, 2, 4, 6, 8):
                # Each example's curvature in the eigenbasis, of which the diagonal is kept.
                centered = homogeneous(h - mean) @ s["basis"]
                diagonal = torch.einsum("ipq,pa,qa->ia", each, s["out"], s["out"])
                batch = diagonal.T @ centered.square() / n
                s["seen"] = decay * s["seen"] + n
                s["diagonal"] = s["diagonal"].lerp(batch, n / s["seen"])
            if t in (0, 1, 2, 4, 8):
                cov = s["a"][:-1, :-1] - torch.outer(mean, mean)
                basis = torch.linalg.eigh(cov)
                s["basis"] = torch.block_diag(basis[1], torch.ones(1, 1, dtype=DOUBLE))
                out = torch.linalg.eigh(s["g"])
                s["out"] = out[1]
                eigenvalues = torch.cat([basis[0], torch.ones(1, dtype=DOUBLE)])
                s["diagonal"], s["seen"] = torch.outer(out[0], eigenvalues), s["weight"]
            gradient = grads(layer) + eta * values(layer)
            gradient[:, :-1] -= torch.outer(gradient[:, -1], mean)
            damped = s["diagonal"] + lam + eta + delta * s["diagonal"].mean()
            step = s["out"] @ ((s["out"].T @ gradient @ s["basis"]) / damped) @ s["basis"].T
            length = length + (step * gradient).sum()
            step[:, -1] -= step[:, :-1] @ mean
            updates[layer] = step
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


def test_a_bad_batch_stays_out_of_the_diagonal_and_its_weight():
    model = chain(4, 3, 2)
    opt = fused_so.EKFAC(
        model,
        likelihood=fused_so.Gaussian(),
        factors="exact",
        diagonal_every=1,
        statistics_every=1,
        decay=0.95,
    )
    for _ in range(2):
        opt.zero_grad()
        model(torch.randn(9, 4, dtype=DOUBLE)).square().mean().backward()
        opt.step()
    state = opt.state[model[0].weight]
    before, seen = state["diagonal"].clone(), state["diagonal_examples"]
    x = torch.randn(9, 4, dtype=DOUBLE)
    x[2, 1] = float("nan")
    opt.zero_grad()
    with pytest.warns(UserWarning, match="NaN or Inf"):
        model(x).square().mean().backward()
    assert torch.equal(state["diagonal"], before)
    assert state["diagonal_examples"] == pytest.approx(0.95 * seen)


@pytest.mark.parametrize("rows", [1, 2])
def test_directions_without_curvature_and_damping_are_left_alone(rows):
    model = chain(5, 4, 2)
    opt = fused_so.EKFAC(
        model, likelihood=fused_so.Gaussian(), factors="exact", diagonal_every=1,
        damping=0.0, relative_damping=0.0,
    )  # fmt: skip
    x, before = torch.randn(rows, 5, dtype=DOUBLE), values(model[0])
    for _ in range(3):
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()
    assert not torch.equal(values(model[0]), before)
    assert all(p.isfinite().all() for p in model.parameters())
