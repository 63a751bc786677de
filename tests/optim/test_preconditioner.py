"""The methods in front of other optimizers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fused_so
from tests.optim.nets import DOUBLE, chain, parameters, twins

EXACT = {"likelihood": fused_so.Gaussian(), "factors": "exact"}
METHODS = {
    "CGD": (fused_so.CGD, {}),
    "ACP": (fused_so.ACP, {"damping": 1e-3}),
    "NNN": (fused_so.NNN, {"damping": 1e-3}),
    "KFAC": (fused_so.KFAC, {"relative_damping": 0.1, **EXACT}),
    "tridiagonal": (fused_so.KFAC, {"structure": "block_tridiagonal", **EXACT}),
    "EKFAC": (fused_so.EKFAC, {"diagonal_every": 1, **EXACT}),
}


def unwarmed(method):
    """A warm-up belongs to the steps, which the optimizer behind takes."""
    return {} if method in ("CGD", "ACP") else {"warmup": 0}


def gradients(model, x):
    model.zero_grad()
    model(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("max_norm", [None, 1e-3])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_become_the_methods_own_update(method, max_norm):
    build, options = METHODS[method]
    model, twin = twins(6, 5, 3)
    options = options | {"max_norm": max_norm}
    preconditioner = fused_so.Preconditioner(build, model, **options)
    opt = build(twin, lr=1.0, momentum=0.0, nesterov=False, **unwarmed(method), **options)
    for _ in range(5):
        x = torch.randn(20, 6, dtype=DOUBLE)
        gradients(model, x)
        gradients(twin, x)
        preconditioner.step()
        before = parameters(twin)
        opt.step()
        for p, old, q in zip(model.parameters(), before, twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, old - q.detach(), rtol=1e-9, atol=1e-12)
            assert torch.equal(p, old)
            p.data.copy_(q)


@pytest.mark.parametrize("rows", [4, 100])
def test_few_rows_and_many(rows):
    """4 rows are fewer than units, so that the method works on them and not on the gradient."""
    model, twin = twins(40, 30, 20)
    preconditioner = fused_so.Preconditioner(fused_so.ACP, model, alpha=1.0, max_norm=None)
    opt = fused_so.ACP(twin, lr=1.0, alpha=1.0, momentum=0.0, nesterov=False, max_norm=None)
    for _ in range(2):
        x = torch.randn(rows, 40, dtype=DOUBLE)
        gradients(model, x)
        gradients(twin, x)
        preconditioner.step()
        before = parameters(twin)
        opt.step()
        for p, old, q in zip(model.parameters(), before, twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, old - q.detach(), rtol=1e-8, atol=1e-10)
            p.data.copy_(q)


@pytest.mark.parametrize("method", METHODS)
def test_momentum_sgd_behind_it_is_the_method_with_momentum(method):
    build, options = METHODS[method]
    model, twin = twins(6, 5, 3)
    preconditioner = fused_so.Preconditioner(build, model, **options)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    # One refresh: NNN's momentum, which a later one turns, belongs to the optimizer behind.
    opt = build(twin, lr=0.1, momentum=0.9, nesterov=True, **unwarmed(method), **options)
    for _ in range(1 if method == "NNN" else 5):
        x = torch.randn(20, 6, dtype=DOUBLE)
        gradients(model, x)
        gradients(twin, x)
        preconditioner.step()
        sgd.step()
        opt.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_adam_behind_it_sees_the_update():
    model, twin = twins(6, 5, 3)
    preconditioner = fused_so.Preconditioner(fused_so.KFAC, model, **EXACT)
    oracle = fused_so.Preconditioner(fused_so.KFAC, twin, **EXACT)
    adam = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    other = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(4):
        x = torch.randn(20, 6, dtype=DOUBLE)
        adam.zero_grad()
        model(x).square().mean().backward()
        preconditioner.step()
        adam.step()

        gradients(twin, x)
        oracle.step()
        updates = [p.grad.clone() for p in twin.parameters()]
        for p, update in zip(twin.parameters(), updates, strict=True):
            p.grad = update
        other.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p, q)
    assert all("momentum_buffer" not in s for s in preconditioner._method.state.values())


@pytest.mark.parametrize("method", METHODS)
def test_other_gradients_are_not_touched(method):
    build, options = METHODS[method]
    model = nn.Sequential(nn.LayerNorm(6, dtype=DOUBLE), *chain(6, 5, 3))
    with pytest.warns(UserWarning, match=r"0\.weight, 0\.bias"):
        preconditioner = fused_so.Preconditioner(build, model, **options)
    before = gradients(model, torch.randn(20, 6, dtype=DOUBLE))
    preconditioner.step()
    for p, gradient in zip(list(model.parameters())[:2], before, strict=False):
        assert torch.equal(p.grad, gradient)
    assert not torch.equal(model[1].weight.grad, before[2])


@pytest.mark.parametrize("method", METHODS)
def test_gradients_that_are_not_finite_become_zero(method):
    build, options = METHODS[method]
    model = chain(6, 5, 3)
    preconditioner = fused_so.Preconditioner(build, model, **options)
    x = torch.randn(20, 6, dtype=DOUBLE)
    gradients(model, x)
    preconditioner.step()
    bad = gradients(model, x)[0].fill_(float("nan"))
    model[0].weight.grad.copy_(bad)
    with pytest.warns(UserWarning, match="a gradient is not finite"):
        preconditioner.step()
    for p in model.parameters():
        assert torch.equal(p.grad, torch.zeros_like(p))
    gradients(model, x)
    preconditioner.step()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": 0.1}, TypeError, "lr belongs to the optimizer behind the preconditioner"),
        ({"momentum": 0.9}, TypeError, "momentum belongs to the optimizer behind"),
        ({"nesterov": True}, TypeError, "nesterov belongs to the optimizer behind"),
        ({"weight_decay": 0.1}, TypeError, "weight_decay belongs to the optimizer behind"),
        ({"warmup": 10}, TypeError, "warmup belongs to the optimizer behind"),
        ({"recipe": "paper"}, TypeError, "recipe belongs to the optimizer behind"),
        ({"damping": -1.0}, ValueError, "damping must be at least 0 and finite, got -1"),
        ({"nothing": 1}, TypeError, "nothing"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        fused_so.Preconditioner(fused_so.KFAC, chain(3, 2), **options)


@pytest.mark.parametrize("method", [torch.optim.SGD, "KFAC", None])
def test_bad_methods_are_named(method):
    with pytest.raises(TypeError, match="method must be one of CGD, ACP, NNN, KFAC and EKFAC, got"):
        fused_so.Preconditioner(method, chain(3, 2))


@pytest.mark.parametrize("method", METHODS)
def test_resuming_is_bit_for_bit(method, tmp_path):
    build, options = METHODS[method]
    model, twin = twins(6, 5, 3)
    one = fused_so.Preconditioner(build, model, **options)
    two = fused_so.Preconditioner(build, twin, **options)
    for _ in range(5):
        gradients(model, torch.randn(20, 6, dtype=DOUBLE))
        one.step()
    torch.save(one.state_dict(), tmp_path / "checkpoint.pt")
    two.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    for _ in range(6):
        x = torch.randn(20, 6, dtype=DOUBLE)
        for net, preconditioner in ((model, one), (twin, two)):
            gradients(net, x)
            preconditioner.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
    assert one.diagnostics() == two.diagnostics()
    with pytest.raises(ValueError, match="layer '0'"):
        fused_so.Preconditioner(build, chain(6, 4, 3), **options).load_state_dict(one.state_dict())


def test_hooks_are_removed_and_copies_are_free_of_them():
    model = chain(6, 5, 3)
    preconditioner = fused_so.Preconditioner(fused_so.KFAC, model, **EXACT)
    gradients(copy.deepcopy(model), torch.randn(20, 6, dtype=DOUBLE))
    assert not preconditioner._method.state[model[0].weight]
    preconditioner.remove_hooks()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_layers_without_bias_and_half_precision_gradients():
    model = chain(6, 5, 3, bias=False, dtype=torch.bfloat16)
    preconditioner = fused_so.Preconditioner(fused_so.KFAC, model, **EXACT)
    before = gradients(model, torch.randn(20, 6, dtype=torch.bfloat16))
    preconditioner.step()
    for p, gradient in zip(model.parameters(), before, strict=True):
        assert p.grad.dtype == torch.bfloat16
        assert p.grad.isfinite().all()
        assert not torch.equal(p.grad, gradient)


def test_gradients_that_no_layer_owns_become_zero_too():
    model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match="trains the others"):
        preconditioner = fused_so.Preconditioner(fused_so.ACP, model)
    x = torch.randn(8, 4)
    model(x).square().mean().backward()
    before = model[0].weight.grad.clone()
    preconditioner.step()
    assert torch.equal(model[0].weight.grad, before)
    model.zero_grad()
    x[0, 0] = float("nan")
    with pytest.warns(UserWarning, match="not finite|NaN or Inf"):
        model(x).square().mean().backward()
        preconditioner.step()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


def test_a_group_cannot_set_what_the_other_optimizer_does_either():
    model = chain(3, 2)
    groups = [{"params": model.parameters(), "lr": 3.0}]
    with pytest.raises(TypeError, match="lr belongs to the optimizer behind"):
        fused_so.Preconditioner(fused_so.ACP, model, params=groups)
