"""The methods under comparison: what they build, and what they make of a model."""

from __future__ import annotations

import builtins
import copy
import re

import pytest
import torch
from torch import nn

from bench.methods import METHODS, sutskever_momentum
from bench.normalization import MeanOnlyBatchNorm, normalized
from bench.problems import PROBLEMS, autoencoder, default_data
from bench.training import EVALUATED_ROWS, evaluate
from fused_so.likelihoods import Bernoulli

PUBLISHED = ("singd", "sirfshampoo", "soap")
MODULES = {"singd": "singd", "sirfshampoo": "sirfshampoo", "soap": "pytorch_optimizer"}
WIDTHS = (12, 16, 8, 3, 8, 16, 12)


@pytest.mark.parametrize(
    ("update", "momentum"),
    [(0, 0.5), (249, 0.5), (250, 0.75), (500, 1 - 1 / 6), (750, 0.875), (1000, 0.9), (10**6, 0.99)],
)
def test_sutskever_momentum_by_hand(update, momentum):
    assert sutskever_momentum(update, 0.99) == pytest.approx(momentum, rel=1e-12)


def test_sgd_nesterov_steps_with_the_scheduled_momentum():
    """Against the recursion v <- mu v + g, p <- p - lr (g + mu v), through the change at 250."""
    model = nn.Linear(1, 1, bias=False).double()
    optimizer = METHODS["sgd_nesterov"].build(model, None, lr=0.1, momentum_max=0.7)
    expected, velocity = model.weight.item(), 0.0
    for update in range(253):
        momentum = 0.5 if update < 250 else 0.7
        gradient = 1.0 + update % 3
        model.weight.grad = torch.full_like(model.weight, gradient)
        optimizer.step()
        velocity = momentum * velocity + gradient
        expected -= 0.1 * (gradient + momentum * velocity)
    assert model.weight.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "lr", "updates"), [("kfac_growing", 0.12, 300), ("adam_growing", 1.8e-3, 1500)]
)
def test_growing_rates_double(name, lr, updates):
    model = nn.Linear(2, 1)
    optimizer = METHODS[name].build(model, Bernoulli())
    rates = []
    for _ in range(updates + 3):
        optimizer.zero_grad()
        model(torch.randn(4, 2)).sum().backward()
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
    expected = [lr * (0.5 + 0.5 * min(update / updates, 1)) for update in range(updates + 3)]
    assert rates == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_trains_with_every_hyperparameter_of_its_space(name):
    if name in PUBLISHED:
        pytest.importorskip(MODULES[name])
    torch.manual_seed(0)
    method = METHODS[name]
    model = method.adapt(autoencoder(WIDTHS, 0))
    likelihood = Bernoulli(reduction="batchmean")
    # The geometric or arithmetic middle of every range.
    options = {
        key: (d.low * d.high) ** 0.5 if d.log else (d.low + d.high) / 2
        for key, d in method.space.items()
    }
    optimizer = method.build(model, likelihood, **options)
    before = [parameter.clone() for parameter in model.parameters()]
    batch = torch.rand(32, WIDTHS[0])
    losses = []

    def closure():
        optimizer.zero_grad()
        loss = likelihood.value(model(batch), batch)
        loss.backward()
        return loss

    for _ in range(30):
        losses.append(optimizer.step(closure).item())
    assert losses[-1] < losses[0]
    assert not any(map(torch.equal, before, model.parameters()))
    for key, value in options.items():
        if key != "momentum_max":
            # A group's own may have been scheduled since.
            assert {**optimizer.param_groups[0], **optimizer.defaults}[key] == value


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_missing_library_says_how_to_install_it(name, monkeypatch):
    def without(module, *args, of=builtins.__import__, **kwargs):
        if module.partition(".")[0] == MODULES[name]:
            raise ModuleNotFoundError(module)
        return of(module, *args, **kwargs)

    monkeypatch.setattr("importlib.import_module", without)
    message = f"package {MODULES[name]}, which is not installed: pip install -e '.[compare]'"
    with pytest.raises(ImportError, match=re.escape(message)):
        METHODS[name].build(nn.Linear(1, 1), None)


@pytest.mark.parametrize(
    ("name", "kind"), [("bn", nn.BatchNorm1d), ("mean_only_bn", MeanOnlyBatchNorm)]
)
def test_normalization_stands_before_every_activation_and_keeps_the_parameters(name, kind):
    model = autoencoder(WIDTHS, 0)
    plain = copy.deepcopy(model)
    adapted = METHODS[name].adapt(model)
    kinds = [type(layer) for layer in adapted]
    tanh = [nn.Linear, kind, nn.Tanh]
    assert kinds == [*tanh, *tanh, nn.Linear, *tanh, *tanh, nn.Linear]
    for old, new in zip(
        (layer for layer in plain if isinstance(layer, nn.Linear)),
        (i for i, layer in enumerate(adapted) if isinstance(layer, nn.Linear)),
        strict=True,
    ):
        assert torch.equal(adapted[new].weight, old.weight)
        owner = adapted[new] if adapted[new].bias is not None else adapted[new + 1]
        assert torch.equal(owner.bias, old.bias)
        if isinstance(adapted[new], nn.BatchNorm1d):
            assert (adapted[new].weight == 1).all()
    rows = torch.rand(9, WIDTHS[0])
    assert adapted(rows).shape == plain(rows).shape


@pytest.mark.parametrize("name", ["bn", "mean_only_bn"])
def test_normalization_starts_as_the_same_function_in_evaluation(name):
    plain = autoencoder(WIDTHS, 0).double().eval()
    adapted = METHODS[name].adapt(copy.deepcopy(plain)).double().eval()
    rows = torch.rand(9, WIDTHS[0], dtype=torch.float64)
    tolerance = {"bn": 1e-4, "mean_only_bn": 1e-12}[name]  # sqrt(1 + eps) a layer, eps 1e-5
    torch.testing.assert_close(adapted(rows), plain(rows), rtol=tolerance, atol=tolerance)


def test_mean_only_batch_norm_against_the_formula():
    generator = torch.Generator().manual_seed(0)
    layer = MeanOnlyBatchNorm(4, momentum=0.2).double()
    first, second, weights = (
        torch.randn(7, 4, generator=generator, dtype=torch.float64) + 3 for _ in range(3)
    )
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([1.0, -2.0, 0.5, 0.0]))
    rows = first.clone().requires_grad_()
    outputs = layer(rows)
    torch.testing.assert_close(outputs, first - first.sum(0) / 7 + layer.bias)
    (outputs * weights).sum().backward()
    # d/dx_ij of sum w (x - mean) is w_ij less the mean of its column
    torch.testing.assert_close(rows.grad, weights - weights.sum(0) / 7)
    torch.testing.assert_close(layer.bias.grad, weights.sum(0))
    layer(second)
    running = 0.8 * (0.2 * first.sum(0) / 7) + 0.2 * second.sum(0) / 7
    layer.eval()
    torch.testing.assert_close(layer(second), second - running + layer.bias)
    torch.testing.assert_close(layer.running_mean, running)  # evaluation does not move it
    assert not layer.running_mean.requires_grad


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, MeanOnlyBatchNorm])
def test_evaluation_takes_statistics_anew(kind):
    """Those of the model in training are of other parameters than the averages."""
    problem = PROBLEMS["digits"](default_data())
    model = normalized(kind, problem.build(0))
    layer = next(module for module in model if isinstance(module, kind))
    layer.running_mean.fill_(7.0)
    evaluate(problem, model)
    batches = problem.train.inputs[:EVALUATED_ROWS].split(problem.batch_size)
    means = torch.stack([model[0](batch).mean(0) for batch in batches])
    torch.testing.assert_close(layer.running_mean, means.mean(0))
    assert layer.momentum == 0.1
