"""An optimizer that nobody holds any more, as after a notebook's cell is run again."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fused_so

LIKELIHOOD = fused_so.Categorical()
BUILD = {
    "CGD": fused_so.CGD,
    "ACP": fused_so.ACP,
    "NNN": fused_so.NNN,
    "KFAC": lambda model: fused_so.KFAC(model, likelihood=LIKELIHOOD),
    "KFAC, the paper's": lambda model: fused_so.KFAC(model, likelihood=LIKELIHOOD, recipe="paper"),
    "EKFAC": lambda model: fused_so.EKFAC(model, likelihood=LIKELIHOOD),
    "UBP": lambda model: fused_so.UBP(model, likelihood=LIKELIHOOD),
    "NaturalGradient": lambda model: fused_so.NaturalGradient(model, likelihood=LIKELIHOOD),
    "gram": lambda model: fused_so.NaturalGradient(
        model, likelihood=LIKELIHOOD, solver="gram", metric="empirical_fisher"
    ),
    "TONGA": lambda model: fused_so.TONGA(model, likelihood=LIKELIHOOD),
    "Preconditioner": lambda model: fused_so.Preconditioner(fused_so.ACP, model),
}


@pytest.mark.parametrize("name", BUILD)
def test_a_dropped_optimizer_leaves_nothing_on_its_model(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    opt = BUILD[name](model)
    x, y = torch.randn(8, 5), torch.randint(3, (8,))

    def loss():
        for p in model.parameters():
            p.grad = None
        value = F.cross_entropy(model(x), y)
        value.backward()
        return value

    if name == "KFAC, the paper's":
        opt.step(loss)
    else:
        loss()
        opt.step()
    assert any(module._forward_hooks for module in model.modules())
    alive = weakref.ref(opt)

    del opt
    gc.collect()

    assert alive() is None
    hooks = [(m._forward_hooks, m._forward_pre_hooks) for m in model.modules()]
    assert not any(hook for pair in hooks for hook in pair)
    loss()  # and it trains on


def test_a_compiled_model_outlives_its_optimizer():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    opt = fused_so.ACP(model)
    compiled = torch.compile(model)
    x = torch.randn(8, 5)
    compiled(x).square().mean().backward()
    opt.step()
    alive = weakref.ref(opt)

    del opt
    gc.collect()

    assert alive() is None
    torch.testing.assert_close(compiled(x), model(x))
