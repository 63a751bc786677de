"""When inverses are renewed, and what `diagnostics` tells."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fused_so
from fused_so.optim import factors
from tests.optim.nets import DOUBLE, chain, linears

METHODS = {
    "ACP": lambda model, **o: fused_so.ACP(model, alpha=1.0, **o),
    "NNN": fused_so.NNN,
    "KFAC": lambda model, **o: fused_so.KFAC(
        model, likelihood=fused_so.Gaussian(), factors="exact", **o
    ),
    "tridiagonal": lambda model, **o: fused_so.KFAC(
        model,
        likelihood=fused_so.Gaussian(),
        factors="exact",
        structure="block_tridiagonal",
        **o,
    ),
    "EKFAC": lambda model, **o: fused_so.EKFAC(
        model, likelihood=fused_so.Gaussian(), factors="exact", **o
    ),
}


class Parallel(nn.Module):
    """Two layers side by side, so that each has inputs of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 3, dtype=DOUBLE), nn.Linear(5, 3, dtype=DOUBLE)

    def forward(self, x, scale=1.0):
        return self.a(x) + self.b(scale * x)


def refreshes(opt):
    return [layer["refreshes"] for layer in opt.diagnostics()["layers"].values()]


def step(model, opt, *inputs, clear="before"):
    if clear == "before":
        opt.zero_grad()
    loss = model(*inputs).square().mean()
    if clear == "between":
        opt.zero_grad()
    loss.backward()
    opt.step()
    if clear == "after":
        opt.zero_grad()


@pytest.mark.parametrize("clear", ["before", "between", "after"])
@pytest.mark.parametrize("method", METHODS)
def test_auto_renews_a_layer_when_its_own_statistics_drift(method, clear):
    model = Parallel()
    opt = METHODS[method](model, lr=1e-4, inverse_every="auto", statistics_every=1, decay=0.5)
    x = torch.randn(30, 5, dtype=DOUBLE)
    for _ in range(6):
        step(model, opt, x, clear=clear)
    assert refreshes(opt) == [1, 1]
    state = opt.state[model.b.weight]
    kept = {key: state[key] for key in ("inverse", "basis") if key in state}
    step(model, opt, x, 1.01, clear=clear)
    assert refreshes(opt) == [1, 1]
    for key, value in kept.items():
        assert state[key] is value
    step(model, opt, x, torch.tensor([5.0, 1, 1, 1, 1], dtype=DOUBLE), clear=clear)
    assert refreshes(opt) == [1, 2]
    for key, value in kept.items():
        assert state[key] is not value


def test_auto_looks_only_at_statistics_that_were_averaged_anew():
    model = nn.Linear(5, 3, dtype=DOUBLE)
    opt = METHODS["ACP"](model, inverse_every="auto", statistics_every=10, decay=0.5)
    counts = []
    for t in range(21):
        step(model, opt, (1.0 + t) * torch.randn(30, 5, dtype=DOUBLE))
        counts.append(refreshes(opt)[0])
    renewed = [t for t in range(1, 21) if counts[t] > counts[t - 1]]
    assert renewed
    assert set(renewed) <= {1, 2, 4, 8, 10, 20}


def train_ekfac(**options):
    """One that was inverted at its first step, and that layer's drift of both sides."""
    model = nn.Linear(5, 3, dtype=DOUBLE)
    opt = METHODS["EKFAC"](
        model, lr=0.0, inverse_every="auto", statistics_every=1, decay=0.0, **options
    )
    x = torch.randn(30, 5, dtype=DOUBLE)
    step(model, opt, x)
    return model, opt, x


def test_a_basis_does_not_depend_on_the_scale_of_the_statistics():
    model, opt, x = train_ekfac()
    for scale in (7.0, 0.01):
        step(model, opt, scale * x)
        assert opt.drift(opt._layers[0]) < 1e-6
    assert refreshes(opt) == [1]
    step(model, opt, x * torch.tensor([5.0, 1, 1, 1, 1], dtype=DOUBLE))
    assert refreshes(opt) == [2]


def test_a_basis_does_not_depend_on_the_damping():
    model, opt, _ = train_ekfac()
    drifts = []
    for damping in (0.1, 1e-3, 10.0):
        opt.param_groups[0]["relative_damping"] = damping
        drifts.append(opt.drift(opt._layers[0]))
    assert max(drifts) < 1e-6
    with torch.no_grad():
        opt.state[model.weight]["covariance"][0, 0] *= 2
    drifts = []
    for damping in (0.1, 1e-3):
        opt.param_groups[0]["relative_damping"] = damping
        drifts.append(opt.drift(opt._layers[0]))
    assert drifts[0] == drifts[1] > 1e-2


def dense_drifts(opt, layer):
    """(C + lambda I) A - I of each side, with A from the last refresh."""
    dampings = opt.dampings(layer)
    matrices = []
    for side in opt.sides:
        prefix = "" if side == "input" else "output_"
        covariance, state = layer.state[f"{prefix}covariance"], layer.state
        identity = torch.eye(len(covariance), dtype=DOUBLE)
        if "diagonal" in state:
            # Bases are compared at the scale, and with the damping, of the last refresh.
            basis, values = state[f"{prefix}basis"], state[f"{prefix}values"]
            damping = state[f"{prefix}basis_damping"]
            inverse = basis @ torch.diag(1 / (values + damping)) @ basis.T
            covariance = covariance * values.sum() / covariance.trace()
        else:
            inverse, damping = state[f"{prefix}inverse"], dampings[side]
        matrices.append((covariance + damping * identity) @ inverse - identity)
    return matrices


@pytest.mark.parametrize("method", METHODS)
def test_drift_estimates_the_root_mean_square_eigenvalue(method, monkeypatch):
    model = chain(20, 15, 10)
    opt = METHODS[method](model, inverse_every=100, statistics_every=1)
    for scale in (1.0, 1.0, 1.0, 1.3):  # the last one is after the last refresh
        step(model, opt, scale * torch.randn(40, 20, dtype=DOUBLE) + scale)
    layer = opt._layers[0]
    matrices = dense_drifts(opt, layer)
    probed = max(
        (m @ (v := factors.probe(len(m), DOUBLE, m.device))).norm() / v.norm() for m in matrices
    )
    torch.testing.assert_close(opt.drift(layer), probed)
    if len(matrices) > 1:
        return
    monkeypatch.setattr(factors, "probe", lambda d, dtype, _: torch.randn(d, dtype=dtype))
    draws = torch.stack([opt.drift(layer) for _ in range(400)]).square()
    expected = matrices[0].square().sum() / len(matrices[0])
    assert expected > 1e-3
    assert (draws.mean() - expected).abs() < 4 * draws.std() / math.sqrt(400)


@pytest.mark.parametrize("share", [0.99, 1.01])
def test_the_tolerance_is_the_limit(share):
    models = [nn.Linear(5, 3, dtype=DOUBLE) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x, y = torch.randn(2, 30, 5, dtype=DOUBLE)
    tolerance = 1e3
    for model in models:
        opt = METHODS["KFAC"](
            model, inverse_every="auto", statistics_every=1, drift_tolerance=tolerance
        )
        step(model, opt, x)
        step(model, opt, 2 * y)
        tolerance = share * opt.drift(opt._layers[0]).item()
    assert refreshes(opt) == [1 if share > 1 else 2]


def test_a_stale_inverse_stays_in_use():
    model = nn.Linear(5, 3, dtype=DOUBLE)
    opt = METHODS["KFAC"](
        model, lr=0.5, momentum=0.0, nesterov=False, max_norm=None, max_decrease=None,
        inverse_every="auto", statistics_every=1, drift_tolerance=1e3, warmup=0,
    )  # fmt: skip
    step(model, opt, torch.randn(30, 5, dtype=DOUBLE))
    state = opt.state[model.weight]
    a, g = state["inverse"].clone(), state["output_inverse"].clone()
    before = model.weight.detach().clone()
    step(model, opt, 3 * torch.randn(30, 5, dtype=DOUBLE))
    gradient = model.weight.grad - torch.outer(model.bias.grad, state["mean"])
    torch.testing.assert_close(before - model.weight, 0.5 * g @ gradient @ a)


# Diagnostics.


@pytest.mark.parametrize("max_norm", [None, 1e-2])
@pytest.mark.parametrize("method", METHODS)
def test_diagnostics_are_the_dense_numbers(method, max_norm):
    model = chain(6, 5, 4)
    options = {} if method == "ACP" else {"warmup": 0}
    if method in ("KFAC", "EKFAC"):
        options["max_decrease"] = None
    opt = METHODS[method](
        model, lr=1.0, momentum=0.0, nesterov=False, max_norm=max_norm, damping=1e-3,
        relative_damping=0.01, **options,
    )  # fmt: skip
    layers = {"0": {"refreshes": 0}, "2": {"refreshes": 0}}
    assert opt.diagnostics() == {"steps": 0, "norm": [], "bound": [], "layers": layers}
    x = torch.randn(30, 6, dtype=DOUBLE)
    before = [p.detach().clone() for p in model.parameters()]
    step(model, opt, x)
    report = opt.diagnostics()
    assert report["steps"] == 1
    changes = [old - p.detach() for old, p in zip(before, model.parameters(), strict=True)]
    # The last update's square is delta^T gradient over the scale n / N of the curvature, here 1/4.
    squared = sum((c * p.grad).sum() for c, p in zip(changes, model.parameters(), strict=True))
    scale = 1.0 if method in ("ACP", "NNN") else 30 / (30 * 4)
    factor = report["bound"][0]
    norm = (squared / factor / scale).sqrt().item()
    assert report["norm"] == [pytest.approx(norm)]
    assert factor == (1.0 if max_norm is None else pytest.approx(max_norm / norm))

    for name, layer in zip(("0", "2"), linears(model), strict=True):
        state, numbers = opt.state[layer.weight], report["layers"][name]
        c = state["covariance"]
        v = c.trace() / len(c)
        dampings = {"": 1e-3 + 0.01 * v}
        if "output_covariance" in state:
            g = state["output_covariance"]
            k = g.trace() / len(g)
            dampings = {
                "": (v / k * 1e-3).sqrt() + 0.1 * v, "output_": (k / v * 1e-3).sqrt() + 0.1 * k
            }  # fmt: skip
            if method == "EKFAC":
                share = (1e-3 / (v * k) + 0.01).sqrt()
                dampings = {"": share * v, "output_": share * k}
        expected = {"refreshes": 1}
        for prefix, damping in dampings.items():
            factor = state[f"{prefix}covariance"]
            damped = factor + damping * torch.eye(len(factor), dtype=DOUBLE)
            expected[f"{prefix}damping"] = pytest.approx(damping.item())
            expected[f"{prefix}condition"] = pytest.approx(torch.linalg.cond(damped).item())
        if method == "ACP":
            expected["alpha"] = 1.0
        assert numbers == expected


@pytest.mark.parametrize("method", ["ACP", "KFAC"])
def test_nothing_is_computed_unless_asked(method, monkeypatch):
    calls = []
    for name in ("eigvalsh", "cond"):
        monkeypatch.setattr(torch.linalg, name, lambda *_, name=name: calls.append(name))
    model = chain(6, 5, 4)
    opt = METHODS[method](model)
    for _ in range(3):
        step(model, opt, torch.randn(30, 6, dtype=DOUBLE))
    assert not calls


def test_cgd_reports_its_norms():
    model = chain(6, 4)
    opt = fused_so.CGD(model, max_norm=1e-2)
    step(model, opt, torch.randn(30, 6, dtype=DOUBLE))
    report = opt.diagnostics()
    assert report["layers"] == {"0": {"refreshes": 0}}
    assert report["bound"][0] * report["norm"][0] == pytest.approx(1e-2)
