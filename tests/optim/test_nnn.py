"""NNN against a network whose layers are whitened for real."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fused_so
from tests.optim.nets import DOUBLE, chain, linears, parameters, twins

DAMPING, RELATIVE = 1e-3, 0.05


def root(matrix, power):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**power) @ vectors.T


class Whitened:
    """a = V U (h - mu) + d, or V U h without d; V and d trained by torch.optim.SGD."""

    def __init__(self, model, **options):
        self.layers = [
            {
                "U": torch.eye(layer.in_features, dtype=DOUBLE),
                "mu": torch.zeros(layer.in_features, dtype=DOUBLE),
                "V": layer.weight.detach().clone().requires_grad_(),
                "d": None if layer.bias is None else layer.bias.detach().clone().requires_grad_(),
            }
            for layer in linears(model)
        ]
        trained = [p for layer in self.layers for p in (layer["V"], layer["d"]) if p is not None]
        self.opt = torch.optim.SGD(trained, **options)
        self.weight = 0.0

    def __call__(self, h):
        self.inputs = []
        for i, layer in enumerate(self.layers):
            self.inputs.append(h.detach())
            h = F.linear((h - layer["mu"]) @ layer["U"].T, layer["V"], layer["d"])
            h = h if i + 1 == len(self.layers) else h.tanh()
        return h

    def average(self, decay):
        n = len(self.inputs[0])
        self.weight = decay * self.weight + n
        share = n / self.weight
        for layer, h in zip(self.layers, self.inputs, strict=True):
            rows = torch.cat([h, h.new_ones(n, 1)], 1)
            second = rows.T @ rows / n
            layer["second"] = (1 - share) * layer.get("second", 0.0) + share * second

    @torch.no_grad()
    def refresh(self):
        for layer in self.layers:
            mean, second = layer["second"][-1, :-1], layer["second"][:-1, :-1]
            if layer["d"] is None:
                mean = torch.zeros_like(mean)
            cov = second - torch.outer(mean, mean)
            damping = DAMPING + RELATIVE * cov.trace() / len(cov)
            whitening = root(cov + damping * torch.eye(len(cov), dtype=DOUBLE), -0.5)
            # The same function: W = V U and b = d - W mu stay.
            weight = layer["V"] @ layer["U"]
            if layer["d"] is not None:
                layer["d"].add_(weight @ (mean - layer["mu"]))
            layer["V"].copy_(weight @ torch.linalg.inv(whitening))
            layer["U"], layer["mu"] = whitening, mean


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_path_is_that_of_sgd_on_the_whitened_network(momentum, nesterov, bias):
    """Ten steps across four refreshes, with variable batches and amortized statistics."""
    model = chain(6, 5, 3, bias=bias)
    whitened = Whitened(model, lr=0.1, momentum=momentum, nesterov=nesterov)
    opt = fused_so.NNN(
        model, 0.1, damping=DAMPING, relative_damping=RELATIVE, momentum=momentum, decay=0.7,
        nesterov=nesterov, statistics_every=2, inverse_every=4, max_norm=None, warmup=0,
    )  # fmt: skip
    for t in range(10):
        n = 20 + 5 * (t % 3)
        x, y = torch.randn(n, 6, dtype=DOUBLE) + 0.5, torch.randn(n, 3, dtype=DOUBLE)
        opt.zero_grad()
        F.mse_loss(model(x), y).backward()
        opt.step()

        whitened(x)
        if t in (0, 1, 2, 4, 6, 8):
            whitened.average(0.7)
        if t in (0, 1, 2, 4, 8):
            outputs = whitened(x)
            whitened.refresh()
            torch.testing.assert_close(whitened(x), outputs)
        whitened.opt.zero_grad()
        F.mse_loss(whitened(x), y).backward()
        whitened.opt.step()
        with torch.no_grad():
            torch.testing.assert_close(model(x), whitened(x), rtol=1e-9, atol=1e-10)
    assert opt.state[model[0].weight]["refreshes"] == 5


def test_refresh_leaves_outputs_unchanged_and_carries_the_momentum():
    model = chain(6, 5, 3)
    x = torch.randn(30, 6, dtype=DOUBLE) + 1
    opt = fused_so.NNN(model, lr=0.0, inverse_every=1, statistics_every=1, decay=0.5)
    before = parameters(model)
    for scale in (1.0, 3.0):
        opt.zero_grad()
        model(scale * x).square().mean().backward()
        opt.step()
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)
    # With lr 0 and no new gradient, a refresh alone moves the buffers: in V and d they stay.
    layer, state = model[0], opt.state[model[0].weight]

    def whitened_momentum():
        buffer, mean = state["momentum_buffer"], state["whitening_mean"]
        inverse_root = root(state["inverse"], -0.5)
        bias = opt.state[layer.bias]["momentum_buffer"]
        return (buffer @ inverse_root).clone(), (bias + buffer @ mean).clone()

    old_inverse, kept = state["inverse"].clone(), whitened_momentum()
    state["covariance"].add_(torch.diag(torch.linspace(0, 4, 6, dtype=DOUBLE)))
    state["mean"].add_(1.0)
    opt.invert([opt._layers[0]])
    assert not torch.allclose(state["inverse"], old_inverse)
    for now, then in zip(whitened_momentum(), kept, strict=True):
        torch.testing.assert_close(now, then, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
def test_momentum_free_step_is_that_of_acp_with_frozen_statistics(bias):
    model, twin = twins(6, 5, 3, bias=bias)
    options = {
        "lr": 0.1, "momentum": 0.0, "nesterov": False, "damping": DAMPING, "max_norm": 0.5,
        "relative_damping": RELATIVE, "weight_decay": 0.01, "inverse_every": 100,
    }  # fmt: skip
    # Statistics of steps 0, 1, 2, 4 only: none of them after the last refresh.
    opt = fused_so.NNN(model, statistics_every=100, warmup=0, **options)
    acp = fused_so.ACP(twin, alpha=1.0, statistics_every=100, **options)
    for _ in range(8):
        x = torch.randn(30, 6, dtype=DOUBLE) + 1
        for net, optimizer in ((model, opt), (twin, acp)):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


def test_mean_is_frozen_between_refreshes():
    model = nn.Linear(4, 3, dtype=DOUBLE)
    opt = fused_so.NNN(model, statistics_every=1, inverse_every=100)
    for t in range(4):
        opt.zero_grad()
        model(torch.randn(9, 4, dtype=DOUBLE) + t).square().mean().backward()
        opt.step()
        state = opt.state[model.weight]
        assert torch.equal(state["mean"], state["whitening_mean"]) == (t in (0, 1, 2))


def test_directions_without_variance_are_left_alone():
    model = nn.Linear(4, 3, bias=False, dtype=DOUBLE)
    opt = fused_so.NNN(model, 0.1, damping=0.0, relative_damping=0.0, max_norm=None, momentum=0.5)
    before = model.weight.detach().clone()
    x = torch.randn(2, 4, dtype=DOUBLE)
    for _ in range(3):
        opt.zero_grad()
        (model(x) - 1).square().mean().backward()
        opt.step()
    assert all(v.isfinite().all() for v in opt.state[model.weight].values() if torch.is_tensor(v))
    # The change is in the span of the inputs, where U^2 is the pseudo-inverse.
    change = model.weight.detach() - before
    assert change.norm() > 1e-3
    beyond = torch.linalg.svd(x)[2][2:]
    torch.testing.assert_close(change @ beyond.T, torch.zeros(3, 2, dtype=DOUBLE))


def test_nnn_momentum_differs_from_that_of_acp():
    """Else the carried momentum would not matter, nor would the tests above see it."""
    ends = []
    for optimizer in (fused_so.NNN, lambda m, **o: fused_so.ACP(m, alpha=1.0, **o)):
        torch.manual_seed(0)
        model = chain(6, 5, 3)
        opt = optimizer(model, inverse_every=3, max_norm=None, lr=0.1)
        for scale in itertools.islice(itertools.cycle((1.0, 2.0)), 6):
            opt.zero_grad()
            model(scale * torch.randn(20, 6, dtype=DOUBLE) + scale).square().mean().backward()
            opt.step()
        ends.append(model[0].weight.detach())
    assert (ends[0] - ends[1]).norm() > 1e-4 * ends[0].norm()


@pytest.mark.parametrize("dtype", [DOUBLE, torch.float32, torch.bfloat16])
def test_resuming_is_bit_for_bit(dtype, tmp_path):
    models = twins(6, 5, 3, dtype=dtype)
    options = {"statistics_every": 3, "inverse_every": 4, "weight_decay": 0.01}
    first, again = (fused_so.NNN(model, **options) for model in models)

    def advance(pairs, steps):
        for _ in range(steps):
            x = torch.randn(16, 6).to(dtype)
            for model, opt in pairs:
                opt.zero_grad()
                model(x).square().mean().backward()
                opt.step()

    advance([(models[0], first)], 7)
    torch.save(first.state_dict(), tmp_path / "checkpoint.pt")
    models[1].load_state_dict(models[0].state_dict())
    again.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    advance(list(zip(models, (first, again), strict=True)), 9)
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(first.state[p]["momentum_buffer"], again.state[q]["momentum_buffer"])
