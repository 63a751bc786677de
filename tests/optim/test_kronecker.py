"""The engine: the layers that go by their gradients are preconditioned in one call."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fused_so
from fused_so import ops
from tests.optim.nets import chain, parameters, twins

METHODS = {
    "CGD": (fused_so.CGD, {}),
    "ACP": (fused_so.ACP, {}),
    "ACP, one alpha": (fused_so.ACP, {"alpha": 0.5}),
    "NNN": (fused_so.NNN, {}),
    "KFAC": (fused_so.KFAC, {}),
}


def step(model, opt, x):
    opt.zero_grad()
    model(x).square().mean().backward()
    opt.step()


@pytest.fixture
def calls(monkeypatch):
    """The shapes of the gradients of every list that was preconditioned."""
    seen = []
    precondition = ops.precondition

    def record(weights, *arguments, **options):
        if isinstance(weights, list):
            seen.append([tuple(w.shape) for w in weights])
        return precondition(weights, *arguments, **options)

    monkeypatch.setattr(ops, "precondition", record)
    return seen


@pytest.mark.parametrize("method", METHODS)
def test_all_layers_of_a_group_take_one_call(method, calls):
    build, options = METHODS[method]
    model = chain(6, 5, 5, 5, 3)
    first, *rest = (layer for layer in model if isinstance(layer, nn.Linear))
    groups = [
        {"params": list(first.parameters())},
        {"params": [p for layer in rest for p in layer.parameters()]},
    ]
    opt = build(model, lr=0.1, params=groups, **options)
    for _ in range(3):
        # Rows enough that no layer is preconditioned by them.
        step(model, opt, torch.randn(200, 6, dtype=torch.float64))
    assert calls == [[(5, 6)], [(5, 5), (5, 5), (3, 5)]] * 3


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", [4, 200])
def test_steps_are_those_of_calls_one_by_one_to_the_bit(method, rows, monkeypatch):
    build, options = METHODS[method]
    model, twin = twins(40, 30, 30, 3)
    batches = [torch.randn(rows, 40, dtype=torch.float64) for _ in range(6)]
    opt = build(model, lr=0.1, **options)
    for x in batches:
        step(model, opt, x)
    precondition = ops.precondition

    def one_by_one(weights, biases, means, inverses, *, output_inverse=None, alpha=1.0):
        if not isinstance(weights, list):
            return precondition(
                weights, biases, means, inverses, output_inverse=output_inverse, alpha=alpha
            )
        none = [None] * len(weights)
        alpha = alpha if isinstance(alpha, list) else [alpha] * len(weights)
        layers = zip(
            weights, biases, means, inverses or none, output_inverse or none, alpha, strict=True
        )
        steps = [precondition(*rest, output_inverse=go, alpha=a) for *rest, go, a in layers]
        return [dw for dw, _ in steps], [db for _, db in steps]

    monkeypatch.setattr(ops, "precondition", one_by_one)
    opt = build(twin, lr=0.1, **options)
    for x in batches:
        step(twin, opt, x)
    pairs = zip(parameters(model), parameters(twin), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)
