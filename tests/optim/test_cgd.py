"""CGD is gradient descent in the coordinates of a centered input."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fused_so
from tests.optim.nets import layer_rows, linears, twins

DOUBLE = torch.float64


def test_step_is_sgd_on_the_layer_written_with_a_centered_input():
    # a = W (h - m) + c with c = b + W m: a plain step on (W, c), mapped back to (W, b).
    layer = nn.Linear(5, 3, dtype=DOUBLE)
    x = torch.randn(20, 5, dtype=DOUBLE) + 2
    target = torch.randn(20, 3, dtype=DOUBLE)
    m = x.mean(0)
    weight = layer.weight.detach().clone().requires_grad_()
    offset = (layer.bias + layer.weight @ m).detach().requires_grad_()
    ((x - m) @ weight.T + offset - target).square().mean().backward()
    stepped_weight = weight - 0.1 * weight.grad
    # The function after the step, W' (h - m) + c', is what has to agree.
    expected = (x - m) @ stepped_weight.T + offset - 0.1 * offset.grad

    opt = fused_so.CGD(layer, lr=0.1, momentum=0.0, max_norm=None)
    (layer(x) - target).square().mean().backward()
    opt.step()
    torch.testing.assert_close(layer.weight, stepped_weight)
    torch.testing.assert_close(layer(x), expected)


def test_accumulated_batches_are_centered_by_their_common_mean():
    x = torch.randn(30, 5, dtype=DOUBLE) + torch.arange(30, dtype=DOUBLE)[:, None] / 10
    whole, parts = nn.Linear(5, 3, dtype=DOUBLE), nn.Linear(5, 3, dtype=DOUBLE)
    parts.load_state_dict(whole.state_dict())
    a, b = fused_so.CGD(whole), fused_so.CGD(parts)
    whole(x).square().sum().backward()
    for part in x.split([7, 23]):
        parts(part).square().sum().backward()
    a.step()
    b.step()
    torch.testing.assert_close(whole.weight, parts.weight)
    torch.testing.assert_close(whole.bias, parts.bias)


def test_without_bias_it_is_sgd():
    ours, theirs = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)
    theirs.load_state_dict(ours.state_dict())
    options = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}
    a, b = (
        fused_so.CGD(ours, max_norm=None, **options),
        torch.optim.SGD(theirs.parameters(), **options),
    )
    for _ in range(3):
        x = torch.randn(6, 4)
        for model, opt in ((ours, a), (theirs, b)):
            opt.zero_grad()
            model(x).square().mean().backward()
            opt.step()
        torch.testing.assert_close(ours.weight, theirs.weight)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="lr must be at least 0 and finite, got -1"):
        fused_so.CGD(nn.Linear(2, 2), lr=-1)
    with pytest.raises(ValueError, match="max_norm must be positive, got 0"):
        fused_so.CGD(nn.Linear(2, 2), max_norm=0)


def test_no_activation_is_kept_for_the_step():
    model = nn.Linear(30, 40)
    opt = fused_so.CGD(model)
    model(torch.randn(4, 30)).sum().backward()
    assert "kept_rows" not in opt._layers[0].batch


@pytest.mark.parametrize("nesterov", [False, True])
def test_ten_steps_follow_an_independent_loop(nesterov):
    model, twin = twins(6, 5, 3)
    lr, momentum, decay, max_norm = 0.1, 0.8, 0.01, 0.3
    opt = fused_so.CGD(
        model, lr, momentum=momentum, nesterov=nesterov, weight_decay=decay, max_norm=max_norm
    )
    velocity, clipped = {}, []
    for _ in range(10):
        x, y = torch.randn(20, 6, dtype=DOUBLE) + 1, torch.randn(20, 3, dtype=DOUBLE)
        for net in (model, twin):
            net.zero_grad()
            (net(x) - y).square().mean().backward()
        opt.step()
        updates = {}
        for layer, (h, _) in zip(linears(twin), layer_rows(twin, x), strict=True):
            m, gb = h.mean(0), layer.bias.grad
            updates[layer.weight] = layer.weight.grad - torch.outer(gb, m)
            updates[layer.bias] = gb - updates[layer.weight] @ m
        length = sum((update * p.grad).sum() for p, update in updates.items()).sqrt()
        clipped.append(bool(length > max_norm))
        with torch.no_grad():
            for p, update in updates.items():
                step = update * (max_norm / length).clamp(max=1) + decay * p
                velocity[p] = momentum * velocity.get(p, 0.0) + step
                p -= lr * (step + momentum * velocity[p] if nesterov else velocity[p])
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)
    assert True in clipped
    assert False in clipped
