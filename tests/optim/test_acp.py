"""ACP against the algebra it comes from, and as a torch optimizer among others."""

from __future__ import annotations

import copy
import itertools
import math
import pickle

import pytest
import torch
from torch import nn

import fused_so

DOUBLE = torch.float64


def chain(*widths, bias=True, dtype=DOUBLE):
    layers = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out, bias=bias, dtype=dtype), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def backward(model, x, y=None):
    model.zero_grad()
    out = model(x)
    loss = (out - (0 if y is None else y)).square().sum() / len(x)
    loss.backward()
    return loss


def plain(**options):
    """Options under which a step is the bare preconditioned gradient of one batch."""
    return {
        "momentum": 0.0,
        "nesterov": False,
        "max_norm": None,
        "relative_damping": 0.0,
        "damping": 0.0,
    } | options


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("bias", [True, False])
def test_step_is_the_inverse_of_the_dense_homogeneous_factor(bias):
    # The metric alpha E[(h, 1)(h, 1)^T] (x) I, built whole and solved.
    model = chain(5, 4, bias=bias)
    x = torch.randn(50, 5, dtype=DOUBLE)
    opt = fused_so.ACP(model, lr=0.5, alpha=3.0, **plain())
    backward(model, x, torch.randn(50, 4, dtype=DOUBLE))
    before = parameters(model)
    grads = [p.grad for p in model.parameters()]

    rows = torch.cat([x, x.new_ones(50, 1)], 1) if bias else x
    gradient = torch.cat([grads[0], grads[1][:, None]], 1) if bias else grads[0]
    expected = torch.linalg.solve(3.0 * rows.T @ rows / 50, gradient.T).T
    opt.step()
    step = [(old - new) / 0.5 for old, new in zip(before, parameters(model), strict=True)]
    torch.testing.assert_close(step[0], expected[:, :5], rtol=1e-10, atol=1e-12)
    if bias:
        torch.testing.assert_close(step[1], expected[:, 5], rtol=1e-10, atol=1e-12)


def test_damping_is_epsilon_over_alpha_plus_a_share_of_the_variance():
    model = chain(6, 3)
    x = torch.randn(40, 6, dtype=DOUBLE) * torch.linspace(0.1, 2, 6, dtype=DOUBLE)
    options = plain(damping=0.3, relative_damping=0.2, alpha=2.0)
    opt = fused_so.ACP(model, lr=1.0, **options)
    backward(model, x)
    opt.step()
    cov = torch.cov(x.T, correction=0)
    damping = 0.3 / 2.0 + 0.2 * cov.trace() / 6
    expected = torch.linalg.inv(cov + damping * torch.eye(6, dtype=DOUBLE))
    torch.testing.assert_close(opt.state[model[0].weight]["inverse"], expected)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("heuristic", ["max_squared_gradient", "rms_gradient"])
def test_alpha_is_estimated_per_layer_and_batch(heuristic, reduction):
    first, last = nn.Linear(6, 5, dtype=DOUBLE), nn.Linear(5, 3, dtype=DOUBLE)
    model = nn.Sequential(first, last)
    opt = fused_so.ACP(model, alpha=heuristic, loss_reduction=reduction)
    expected, followed = {}, []
    for parts, size in (([20], 1.0), ([20], 3.0), ([7, 13], 0.1)):
        x = size * torch.randn(20, 6, dtype=DOUBLE)
        a = first(x)
        b = last(a)
        per_example = torch.autograd.grad(b.square().sum(), [a, b])
        opt.zero_grad()
        for part in x.split(parts):
            loss = model(part).square().sum()
            (loss / 20 if reduction == "mean" else loss).backward()
        opt.step()
        for layer, gradient in zip((first, last), per_example, strict=True):
            largest = gradient.square().amax(1)
            thesis = heuristic == "max_squared_gradient"
            batch = largest.max() if thesis else largest.mean().sqrt()
            if reduction == "sum" and not thesis:
                batch = 20 * batch
            # It rises at once and falls by 2.5% a step at most.
            expected[layer] = torch.maximum(batch, 0.975 * expected.get(layer, batch))
            torch.testing.assert_close(opt.state[layer.weight]["alpha"], expected[layer])
            followed.append(bool(expected[layer] == batch))
    assert True in followed
    assert False in followed


@pytest.mark.parametrize("heuristic", ["max_squared_gradient", "rms_gradient"])
@pytest.mark.parametrize("second", [DOUBLE, torch.float32])
def test_alphas_of_layers_with_other_rows_and_dtypes_are_those_of_each_alone(heuristic, second):
    dtypes = (DOUBLE, second, DOUBLE)
    layers = [nn.Linear(6, 5, dtype=dtype) for dtype in dtypes]
    together = fused_so.ACP(nn.ModuleList(layers), lr=0.0, alpha=heuristic)
    alone = [fused_so.ACP(copy.deepcopy(layer), lr=0.0, alpha=heuristic) for layer in layers]
    for _ in range(2):
        xs = [torch.randn(n, 6, dtype=dtype) for n, dtype in zip((4, 9, 9), dtypes, strict=True)]
        together.zero_grad()
        sum(layer(x).square().sum() for layer, x in zip(layers, xs, strict=True)).backward()
        together.step()
        for opt, x in zip(alone, xs, strict=True):
            opt.zero_grad()
            opt._model(x).square().sum().backward()
            opt.step()
    for layer, opt in zip(layers, alone, strict=True):
        ours, single = together.state[layer.weight]["alpha"], opt.state[opt._model.weight]["alpha"]
        assert ours.dtype == layer.weight.dtype
        torch.testing.assert_close(ours, single)


@pytest.mark.parametrize("heuristic", ["max_squared_gradient", "rms_gradient"])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_leaves_alpha(heuristic, bad):
    model = chain(4, 3)
    opt = fused_so.ACP(model, alpha=heuristic)
    x = torch.randn(9, 4, dtype=DOUBLE)
    backward(model, x)
    opt.step()
    before = opt.state[model[0].weight]["alpha"].clone()
    opt.zero_grad()
    (bad * model(x).sum()).backward()
    with pytest.warns(UserWarning, match="gradient is not finite"):
        opt.step()
    assert torch.equal(opt.state[model[0].weight]["alpha"], before)


def test_ten_steps_follow_an_independent_loop():
    """The whole algorithm in plain PyTorch: averages, amortization, damping, clip, momentum."""
    torch.manual_seed(1)
    model = chain(7, 6, 4)
    twin = chain(7, 6, 4)
    twin.load_state_dict(model.state_dict())
    lr, momentum, decay, max_norm, alpha = 0.2, 0.8, 0.7, 0.6, 0.5
    opt = fused_so.ACP(
        model, lr, alpha=alpha, damping=1e-2, relative_damping=0.1, momentum=momentum,
        decay=decay, max_norm=max_norm, statistics_every=3, inverse_every=5, weight_decay=0.01,
    )  # fmt: skip
    second, weight, inverses = {}, {}, {}
    velocity = {p: torch.zeros_like(p) for p in twin.parameters()}
    clipped = []
    for t in range(10):
        x = torch.randn(32, 7, dtype=DOUBLE)
        backward(model, x)
        backward(twin, x)
        opt.step()

        h = x
        updates = {}
        for layer in (twin[0], twin[2]):
            if t in (0, 1, 2, 3, 6, 9):
                rows = torch.cat([h, h.new_ones(32, 1)], 1).detach()
                weight[layer] = decay * weight.get(layer, 0.0) + 1
                share = 1 / weight[layer]
                batch = rows.T @ rows / 32
                second[layer] = (1 - share) * second.get(layer, 0 * batch) + share * batch
            mean = second[layer][-1, :-1]
            cov = second[layer][:-1, :-1] - torch.outer(mean, mean)
            if t in (0, 1, 2, 4, 5):
                damping = 1e-2 / alpha + 0.1 * cov.trace() / len(cov)
                inverses[layer] = torch.linalg.inv(
                    cov + damping * torch.eye(len(cov), dtype=DOUBLE)
                )
            gw, gb = layer.weight.grad, layer.bias.grad
            dw = (gw - torch.outer(gb, mean)) @ inverses[layer] / alpha
            updates[layer.weight], updates[layer.bias] = dw, gb / alpha - dw @ mean
            h = torch.tanh(layer(h))
        length = math.sqrt(sum((updates[p] * p.grad).sum() for p in updates) / alpha)
        nu = min(1.0, max_norm / length)
        clipped.append(nu < 1)
        with torch.no_grad():
            for p, update in updates.items():
                update = nu * update + 0.01 * p
                velocity[p] = momentum * velocity[p] + update
                p -= lr * (update + momentum * velocity[p])
        for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    assert True in clipped
    assert False in clipped


@pytest.mark.parametrize("lr", [1.0, 0.25])
def test_max_norm_bounds_the_change_of_preactivations_before_the_learning_rate(lr):
    model = chain(5, 4)
    x = torch.randn(64, 5, dtype=DOUBLE)
    opt = fused_so.ACP(model, lr=lr, **plain(alpha=1e-6, max_norm=0.3))
    before = parameters(model)
    backward(model, x)
    opt.step()
    steps = [old - new for old, new in zip(before, parameters(model), strict=True)]
    change = x @ steps[0].T + steps[1]
    rms = change.square().sum(1).mean().sqrt()
    torch.testing.assert_close(rms, torch.tensor(0.3 * lr, dtype=DOUBLE))


def test_the_scale_of_the_loss_does_not_matter_by_default():
    x = torch.randn(32, 6, dtype=DOUBLE)
    models = [chain(6, 5, 3), chain(6, 5, 3)]
    models[1].load_state_dict(models[0].state_dict())
    for model, scale in zip(models, (1.0, 1e4), strict=True):
        opt = fused_so.ACP(model, damping=0.0)
        for _ in range(5):
            opt.zero_grad()
            (scale * model(x).square().mean()).backward()
            opt.step()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_gradient_accumulation_is_the_step_of_the_whole_batch():
    x = torch.randn(60, 6, dtype=DOUBLE)
    whole, parts = chain(6, 5, 3), chain(6, 5, 3)
    parts.load_state_dict(whole.state_dict())
    options = {"lr": 0.1, "statistics_every": 1, "inverse_every": 1}
    a, b = fused_so.ACP(whole, **options), fused_so.ACP(parts, **options)
    for _ in range(3):
        a.zero_grad()
        b.zero_grad()
        (whole(x).square().sum() / 60).backward()
        for part in x.split([10, 20, 30]):
            (parts(part).square().sum() / 60).backward()
        a.step()
        b.step()
        for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_leading_dimensions_are_rows():
    flat, deep = chain(6, 4), chain(6, 4)
    deep.load_state_dict(flat.state_dict())
    x = torch.randn(4, 3, 5, 6, dtype=DOUBLE)
    a, b = fused_so.ACP(flat), fused_so.ACP(deep)
    flat(x.reshape(-1, 6)).square().mean().backward()
    deep(x).square().mean().backward()
    a.step()
    b.step()
    for p, q in zip(flat.parameters(), deep.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_module_called_twice_sees_both_inputs():
    shared = nn.Linear(4, 4, dtype=DOUBLE)
    opt = fused_so.ACP(shared, statistics_every=1)
    x, y = torch.randn(9, 4, dtype=DOUBLE), torch.randn(5, 4, dtype=DOUBLE) + 1
    (shared(x).sum() + shared(y).square().sum()).backward()
    opt.step()
    rows = torch.cat([x, y])
    torch.testing.assert_close(opt.state[shared.weight]["mean"], rows.mean(0))
    expected = torch.cov(rows.T, correction=0)
    torch.testing.assert_close(opt.state[shared.weight]["covariance"], expected)


def test_gradient_scaler_changes_nothing_but_rounding():
    x = torch.randn(32, 6)
    scaled, bare = chain(6, 5, 3, dtype=torch.float32), chain(6, 5, 3, dtype=torch.float32)
    scaled.load_state_dict(bare.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    a = fused_so.ACP(scaled, grad_scaler=scaler)
    b = fused_so.ACP(bare)
    for _ in range(3):
        a.zero_grad()
        b.zero_grad()
        scaler.scale(scaled(x).square().mean()).backward()
        scaler.unscale_(a)
        nn.utils.clip_grad_norm_(scaled.parameters(), 1.0)
        scaler.step(a)
        scaler.update()
        bare(x).square().mean().backward()
        nn.utils.clip_grad_norm_(bare.parameters(), 1.0)
        b.step()
    for p, q in zip(scaled.parameters(), bare.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_gradient_scaler_skips_an_overflowing_step_and_recovers():
    model = chain(6, 3, dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    opt = fused_so.ACP(model, grad_scaler=scaler)
    before = parameters(model)
    opt.zero_grad()
    scaler.scale(model(torch.randn(8, 6)).square().sum() * 10).backward()
    scaler.step(opt)
    scaler.update(1.0)
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)
    opt.zero_grad()
    scaler.scale(model(torch.randn(8, 6)).square().sum()).backward()
    scaler.step(opt)
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert not torch.equal(model[0].weight, before[0])


def test_clip_grad_norm_scales_the_step():
    model, twin = chain(6, 3), chain(6, 3)
    twin.load_state_dict(model.state_dict())
    x = torch.randn(30, 6, dtype=DOUBLE)
    before = parameters(model)
    options = plain(damping=1e-3, alpha=1.0)
    a, b = fused_so.ACP(model, lr=0.1, **options), fused_so.ACP(twin, lr=0.1, **options)
    backward(model, x)
    backward(twin, x)
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    a.step()
    b.step()
    for old, p, q in zip(before, model.parameters(), twin.parameters(), strict=True):
        expected = (old - q) * 1e-3 / norm
        torch.testing.assert_close(old - p, expected, rtol=1e-5, atol=1e-12)


class Cast(nn.Module):
    def forward(self, x):
        return x.float()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("change", "from_rows"),
    [
        ("nothing", True),
        ("clip", True),
        ("penalty", False),
        ("bias penalty", False),
        ("bias clipped", False),
        ("two passes", False),
    ],
)
def test_few_rows_are_preconditioned_before_their_product(change, from_rows, bias, monkeypatch):
    """4 rows of a 30 -> 40 layer: n (in + out) < in out. p.grad is what counts all the same."""
    from_rows = from_rows or ("bias" in change and not bias)
    models = [nn.Linear(30, 40, bias=bias, dtype=DOUBLE) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [fused_so.ACP(model, max_norm=None, alpha=2.0) for model in models]
    taken = []
    rows = optimizers[0].gradient_rows

    def spy(layers):
        taken.append(rows(layers))
        return taken[-1]

    monkeypatch.setattr(optimizers[0], "gradient_rows", spy)
    monkeypatch.setattr(optimizers[1], "gradient_rows", lambda layers: {})
    for _ in range(3):
        x = torch.randn(4, 30, dtype=DOUBLE) + 1
        if change == "bias clipped":
            x *= 1e4  # beside which nothing shows in the bias
        for model, opt in zip(models, optimizers, strict=True):
            opt.zero_grad()
            for part in x.split(2) if change == "two passes" else [x]:
                loss = model(part).square().sum()
                if change == "penalty":
                    loss = loss + 1e-3 * model.weight.square().sum()
                if change == "bias penalty" and bias:
                    loss = loss + 1e-3 * model.bias.square().sum()
                loss.backward()
            if change == "clip":
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if change == "bias clipped" and bias:
                model.bias.grad.mul_(0.99)
            opt.step()
        for p, q in zip(*(model.parameters() for model in models), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
        assert (optimizers[0]._layers[0] in taken[-1]) == from_rows
        assert not optimizers[0]._layers[0].batch


def test_rows_are_held_against_the_gradient_layer_by_layer():
    model = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 60), nn.Linear(60, 50)).to(DOUBLE)
    model[2].float()
    model.insert(2, Cast())
    opt = fused_so.ACP(model)
    for _ in range(2):  # from the second step on rows are kept
        opt.zero_grad()
        loss = model(torch.randn(4, 30, dtype=DOUBLE)).square().sum()
        (loss + 1e-3 * model[1].weight.square().sum()).backward()
        for param in model[0].parameters():
            param.grad.mul_(0.5)
        found = opt.gradient_rows(opt._layers)
        opt.step()
    first, _, last = opt._layers
    assert list(found) == [first, last]
    for layer, scale, rtol in ((first, 0.5, 1e-12), (last, 1.0, 1e-5)):
        h, _, c = found[layer]
        assert c.dtype == h.dtype == layer.module.weight.dtype
        torch.testing.assert_close(c.double(), torch.tensor(scale, dtype=DOUBLE), rtol=rtol, atol=0)


def test_true_gradient_is_left_in_grad():
    model = chain(6, 5, 3)
    opt = fused_so.ACP(model)
    backward(model, torch.randn(12, 6, dtype=DOUBLE))
    grads = [p.grad.clone() for p in model.parameters()]
    opt.step()
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert torch.equal(p.grad, grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, DOUBLE])
@pytest.mark.parametrize("optimizer", [fused_so.ACP, fused_so.CGD])
def test_resuming_is_bit_for_bit(optimizer, dtype, tmp_path):
    def train(model, opt, steps, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            x = torch.randn(16, 6, generator=generator).to(dtype)
            opt.zero_grad()
            model(x).square().mean().backward()
            opt.step()

    options = {"statistics_every": 3, "inverse_every": 4} if optimizer is fused_so.ACP else {}
    model = chain(6, 5, 3, dtype=dtype)
    opt = optimizer(model, **options)
    train(model, opt, 7, seed=1)
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "checkpoint.pt")

    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed = chain(6, 5, 3, dtype=dtype)
    again = optimizer(resumed, **options)
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["opt"])
    train(model, opt, 9, seed=2)
    train(resumed, again, 9, seed=2)
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
        for key, value in opt.state[p].items():
            other = again.state[q][key]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other


def test_checkpoint_of_another_architecture_is_refused_and_changes_nothing():
    opt = fused_so.ACP(chain(6, 5, 3))
    model = chain(6, 4, 3)
    other = fused_so.ACP(model)
    backward(model, torch.randn(9, 6, dtype=DOUBLE))
    other.step()
    before = {k: v.clone() for k, v in other.state[model[0].weight].items() if torch.is_tensor(v)}
    with pytest.raises(ValueError, match=r"layer '0' .*\(6, 4, True\) here and \(6, 5, True\)"):
        other.load_state_dict(opt.state_dict())
    with pytest.raises(ValueError, match="lacks.*layers"):
        other.load_state_dict(torch.optim.SGD(model.parameters()).state_dict())
    with pytest.raises(ValueError, match="must be one of ACP, got one of CGD"):
        other.load_state_dict(fused_so.CGD(chain(6, 4, 3)).state_dict())
    older = fused_so.ACP(chain(6, 4, 3)).state_dict()
    del older["param_groups"][0]["max_norm"]
    with pytest.raises(ValueError, match=r"options of ACP, but it lacks \['max_norm'\]"):
        other.load_state_dict(older)
    for key, value in before.items():
        assert torch.equal(other.state[model[0].weight][key], value)
    assert other.state_dict()["steps"] == 1


def test_param_groups_have_their_own_options_and_follow_schedulers():
    model = chain(6, 5, 3)
    groups = [
        {"params": list(model[0].parameters()), "lr": 0.0},
        {"params": list(model[2].parameters()), "damping": 0.5, "alpha": 1.0},
    ]
    opt = fused_so.ACP(model, lr=0.1, params=groups)
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    first, second = parameters(model[0]), parameters(model[2])
    backward(model, torch.randn(9, 6, dtype=DOUBLE))
    opt.step()
    schedule.step()
    assert all(torch.equal(p, q) for p, q in zip(model[0].parameters(), first, strict=True))
    assert not torch.equal(model[2].weight, second[0])
    assert [g["lr"] for g in opt.param_groups] == [0.0, 0.05]
    assert opt.param_groups[1]["damping"] == 0.5


def test_statistics_and_inverses_are_amortized():
    model = chain(4, 3)
    opt = fused_so.ACP(model, alpha=1.0, statistics_every=10, inverse_every=100)
    captured, inverted = [], []
    for t in range(205):
        last = opt.state[model[0].weight].get("inverse")
        count = opt.state[model[0].weight].get("examples")
        backward(model, torch.randn(8, 4, dtype=DOUBLE))
        if opt.state[model[0].weight].get("examples") != count:
            captured.append(t)
        opt.step()
        if opt.state[model[0].weight]["inverse"] is not last:
            inverted.append(t)
    assert captured == [0, 1, 2, 4, 8, *range(10, 205, 10)]
    assert inverted == [0, 1, 2, 4, 8, 16, 32, 64, 100, 200]


def test_forward_passes_without_backward_are_not_statistics():
    model = chain(4, 3)
    opt = fused_so.ACP(model)
    model(torch.full((5, 4), 7.0, dtype=DOUBLE))
    with torch.no_grad():
        model(torch.full((5, 4), 9.0, dtype=DOUBLE))
    backward(model, torch.zeros(5, 4, dtype=DOUBLE) + 1)
    opt.step()
    expected = torch.ones(4, dtype=DOUBLE)
    torch.testing.assert_close(opt.state[model[0].weight]["mean"], expected)


def test_other_parameters_are_trained_by_momentum_sgd_and_listed_once():
    model = nn.Sequential(nn.Conv1d(2, 3, 1), nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, 2))
    with pytest.warns(UserWarning, match=r"0\.weight, 0\.bias, 2\.weight, 2\.bias$") as caught:
        opt = fused_so.ACP(model, lr=0.1, momentum=0.5, nesterov=False, max_norm=None)
    assert len(caught) == 1
    twin = nn.Sequential(nn.Conv1d(2, 3, 1), nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, 2))
    twin.load_state_dict(model.state_dict())
    sgd = torch.optim.SGD([*twin[0].parameters(), *twin[2].parameters()], lr=0.1, momentum=0.5)
    for _ in range(3):
        x = torch.randn(7, 2, 4)
        opt.zero_grad()
        model(x).square().mean().backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            q.grad = p.grad.clone()
        opt.step()
        sgd.step()
        for i in (0, 2):
            for p, q in zip(model[i].parameters(), twin[i].parameters(), strict=True):
                torch.testing.assert_close(p, q)


def test_nan_batch_stays_out_of_the_statistics_and_of_the_parameters():
    model = chain(4, 3)
    opt = fused_so.ACP(model, statistics_every=1)
    backward(model, torch.randn(9, 4, dtype=DOUBLE))
    opt.step()
    state = opt.state[model[0].weight]
    before = parameters(model)
    kept = {key: state[key].clone() for key in ("covariance", "mean", "inverse")}
    momentum = state["momentum_buffer"].clone()
    x = torch.randn(9, 4, dtype=DOUBLE)
    x[3, 2] = float("nan")
    with pytest.warns(UserWarning) as caught:
        for _ in range(2):
            backward(model, x)
            opt.step()
    messages = [str(w.message) for w in caught]
    assert len(messages) == 2
    assert any("input of layer '0'" in m for m in messages)
    assert any("gradient is not finite" in m for m in messages)
    for key, value in kept.items():
        assert torch.equal(state[key], value)
    assert torch.equal(state["momentum_buffer"], momentum)
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)
    backward(model, torch.randn(9, 4, dtype=DOUBLE))
    opt.step()
    assert not torch.equal(model[0].weight, before[0])
    assert torch.isfinite(model[0].weight).all()


def test_a_first_batch_of_nan_leaves_the_averages_unbiased():
    model = chain(4, 3)
    opt = fused_so.ACP(model, statistics_every=1)
    with pytest.warns(UserWarning, match="NaN or Inf"):
        backward(model, torch.full((9, 4), float("inf"), dtype=DOUBLE))
    with pytest.warns(UserWarning) as caught:
        opt.step()
    messages = sorted(str(w.message) for w in caught)
    assert len(messages) == 2
    assert "gradient is not finite" in messages[0]
    assert "no batch of layer '0' was observed" in messages[1]
    x = torch.randn(9, 4, dtype=DOUBLE)
    backward(model, x)
    opt.step()
    torch.testing.assert_close(opt.state[model[0].weight]["mean"], x.mean(0))


def test_indefinite_covariance_is_retried_with_more_damping_then_named():
    model = chain(3, 2)
    opt = fused_so.ACP(model, lr=0.1, **plain(damping=1e-3, alpha=1.0, inverse_every=1))
    backward(model, torch.randn(9, 3, dtype=DOUBLE))
    opt.step()
    state = opt.state[model[0].weight]
    identity = torch.eye(3, dtype=DOUBLE)
    state["covariance"].copy_(identity.diagonal().diag() * 1.0)
    state["covariance"][1, 1] = -0.05
    opt.step()
    retried = torch.diag(torch.tensor([1.1, 0.05, 1.1], dtype=DOUBLE))
    torch.testing.assert_close(state["inverse"] @ retried, identity)
    last_good = state["inverse"]
    state["covariance"][1, 1] = -50.0
    with pytest.raises(RuntimeError, match=r"layer '0' .* damping 1;"):
        opt.step()
    assert torch.equal(state["inverse"], last_good)


def test_hooks_can_be_removed_and_copies_are_free_of_them():
    model = chain(4, 3)
    opt = fused_so.ACP(model, statistics_every=1)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        backward(twin, torch.randn(6, 4, dtype=DOUBLE))
        assert not opt.state[model[0].weight]
    opt.remove_hooks()
    assert not model[0]._forward_hooks
    backward(model, torch.randn(6, 4, dtype=DOUBLE))
    assert not opt.state[model[0].weight]


def test_compiled_models_learn_the_same():
    model, twin = chain(6, 5, 3, dtype=torch.float32), chain(6, 5, 3, dtype=torch.float32)
    twin.load_state_dict(model.state_dict())
    compiled = torch.compile(twin, backend="aot_eager")
    a, b = fused_so.ACP(model), fused_so.ACP(compiled)
    for _ in range(4):
        x = torch.randn(16, 6)
        backward(model, x)
        backward(compiled, x)
        a.step()
        b.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_closure_form():
    model = chain(4, 3)
    opt = fused_so.ACP(model)
    before = parameters(model)
    x = torch.randn(6, 4, dtype=DOUBLE)
    loss = opt.step(lambda: backward(model, x))
    assert loss.item() > 0
    assert not torch.equal(model[0].weight, before[0])


def test_a_dropped_first_batch_leaves_a_layer_unobserved():
    first, last = nn.Linear(4, 3), nn.Linear(4, 2)
    opt = fused_so.ACP(nn.ModuleList([first, last]))
    x = torch.randn(8, 4)
    (first(x).sum() + last(x).sum()).backward()
    opt.zero_grad(set_to_none=False)
    first(x).square().sum().backward()
    before = [p.clone() for p in last.parameters()]
    with pytest.warns(UserWarning, match="no batch of layer '1' was observed"):
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(before, last.parameters(), strict=True))


@pytest.mark.parametrize("max_norm", [1.0, None])
def test_a_sum_over_examples_takes_the_steps_of_a_mean(max_norm):
    x = torch.randn(32, 6, dtype=DOUBLE)
    models = [chain(6, 5, 3), chain(6, 5, 3)]
    models[1].load_state_dict(models[0].state_dict())
    for model, n in zip(models, (32, 1), strict=True):
        opt = fused_so.ACP(model, damping=0.0, max_norm=max_norm)
        for _ in range(5):
            opt.zero_grad()
            (model(x).square().sum() / n).backward()
            opt.step()
    for p, q in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


def test_huge_and_tiny_losses_take_the_same_steps():
    x = torch.randn(32, 6)
    ends = []
    for scale in (1e-18, 1.0, 1e18):
        torch.manual_seed(0)
        model = chain(6, 5, 3, dtype=torch.float32)
        opt = fused_so.ACP(model, damping=0.0)
        for _ in range(5):
            opt.zero_grad()
            (scale * model(x).square().mean()).backward()
            opt.step()
        ends.append(parameters(model))
    for other in (ends[0], ends[2]):
        for p, q in zip(ends[1], other, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_linear_whose_forward_never_runs_takes_the_plain_rule():
    # nn.MultiheadAttention uses its out_proj's weight without calling the module.
    model = nn.MultiheadAttention(8, 2)
    with pytest.warns(UserWarning, match="in_proj_weight"):
        opt = fused_so.ACP(model, lr=0.1, max_norm=None, momentum=0.0)
    x = torch.randn(5, 3, 8)
    before = model.out_proj.weight.detach().clone()
    model(x, x, x)[0].square().mean().backward()
    with pytest.warns(UserWarning, match=r"no batch of layer 'out_proj' was observed"):
        opt.step()
    torch.testing.assert_close(model.out_proj.weight, before - 0.1 * model.out_proj.weight.grad)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must be at least 0 and finite, got -1"),
        ({"lr": "fast"}, TypeError, "lr must be a number, got str"),
        ({"momentum": 1.5}, ValueError, "momentum must be at least 0 and at most 1, got 1.5"),
        ({"alpha": 0.0}, ValueError, "alpha must be positive, got 0"),
        ({"alpha": "min"}, ValueError, "alpha must be .*'max_squared_gradient'.*, got 'min'"),
        ({"damping": -1e-3}, ValueError, "damping must be at least 0 and finite, got -0.001"),
        ({"relative_damping": float("nan")}, ValueError, "relative_damping must .* got nan"),
        ({"decay": 2.0}, ValueError, "decay must be .* at most 1, got 2.0"),
        ({"statistics_every": 0}, ValueError, "statistics_every must be .* >= 1, got 0"),
        ({"inverse_every": 2.5}, ValueError, "inverse_every must be .* >= 1, got 2.5"),
        ({"max_norm": 0}, ValueError, "max_norm must be positive, got 0"),
        ({"grad_scaler": 1}, TypeError, "grad_scaler must be a torch.amp.GradScaler.* got int"),
        ({"loss_reduction": "none"}, ValueError, "loss_reduction must be .* got 'none'"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        fused_so.ACP(chain(3, 2), **options)


@pytest.mark.parametrize("rows", [4, 100])
def test_what_stays_after_a_step(rows):
    # 4 rows are fewer than a layer's units, so that the step works on them.
    model = chain(40, 30, 20, dtype=torch.float32)
    opt = fused_so.ACP(model)
    for _ in range(3):
        backward(model, torch.randn(rows, 40))
        opt.step()
    assert all(not layer.batch for layer in opt._layers)
    held = sum(v.numel() for s in opt.state.values() for v in s.values() if torch.is_tensor(v))
    momentum = sum(p.numel() for p in model.parameters())
    # Each layer: covariance, its inverse and a mean, and alpha.
    factors = sum(2 * d * d + d + 1 for d in (40, 30))
    assert held == momentum + factors


def test_bad_models_are_named():
    with pytest.raises(TypeError, match="model must be an nn.Module, got generator"):
        fused_so.ACP(chain(3, 2).parameters())
    with pytest.raises(ValueError, match=r"nn\.Linear with a trainable weight for ACP"):
        fused_so.ACP(nn.Conv1d(2, 2, 1))
    with pytest.raises(ValueError, match="uninitialized"):
        fused_so.ACP(nn.LazyLinear(3))
    model = chain(3, 2)
    groups = [{"params": [model[0].weight]}, {"params": [model[0].bias]}]
    with pytest.raises(ValueError, match="weight and bias of layer '0' in one group"):
        fused_so.ACP(model, params=groups)
    opt = fused_so.ACP(model, params=[model[0].weight])
    with pytest.raises(ValueError, match="lr must be at least 0 and finite, got -1"):
        opt.add_param_group({"params": [model[0].bias], "lr": -1.0})
    assert len(opt.param_groups) == 1


def test_parameters_that_were_not_given_are_not_touched():
    model = chain(4, 3)
    opt = fused_so.ACP(model, params=[model[0].weight])
    bias = model[0].bias.detach().clone()
    backward(model, torch.randn(9, 4, dtype=DOUBLE))
    opt.step()
    assert torch.equal(model[0].bias, bias)
    assert len(opt.state_dict()["state"]) == 1


def test_a_frozen_bias_is_no_bias():
    # The metric of the weight alone is E[h h^T], not the covariance.
    model = chain(4, 3)
    model[0].bias.requires_grad_(False)
    opt = fused_so.ACP(model, lr=1.0, **plain(alpha=1.0))
    x = torch.randn(30, 4, dtype=DOUBLE) + 5
    before = model[0].weight.detach().clone()
    backward(model, x)
    opt.step()
    expected = torch.linalg.solve(x.T @ x / 30, model[0].weight.grad.T).T
    torch.testing.assert_close(before - model[0].weight, expected, rtol=1e-8, atol=1e-10)


def test_tied_parameters_take_the_plain_rule_once():
    first, last = nn.Linear(4, 4), nn.Linear(4, 4)
    last.bias = first.bias
    embedding, head, free = nn.Embedding(6, 4), nn.Linear(4, 6), nn.Linear(4, 4)
    head.weight = embedding.weight
    model = nn.ModuleList([first, last, embedding, head, free])
    with pytest.warns(UserWarning, match=r"0\.weight, 0\.bias, 1\.weight, 2\.weight, 3\.bias$"):
        opt = fused_so.ACP(model, lr=0.1, momentum=0.0, max_norm=None)
    before = first.bias.detach().clone()
    loss = head(last(first(free(embedding(torch.tensor([1, 2, 3])))))).square().sum()
    loss.backward()
    opt.step()
    torch.testing.assert_close(first.bias, before - 0.1 * first.bias.grad)
    assert list(opt.state_dict()["layers"]) == ["4"]


def test_a_layer_first_used_late_gets_its_statistics_at_once():
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    opt = fused_so.ACP(model, alpha=1.0)
    for t in range(35):
        h = model[0](torch.randn(8, 4))
        opt.zero_grad()
        (model[1](h) if t >= 33 else h).square().mean().backward()
        opt.step()
        assert ("inverse" in opt.state[model[1].weight]) == (t >= 33)


def test_half_precision_plain_parameters_do_not_overflow_the_bound():
    model = nn.Sequential(nn.Linear(4, 64), nn.LayerNorm(64)).half()
    with pytest.warns(UserWarning, match=r"1\.weight, 1\.bias"):
        opt = fused_so.ACP(model, lr=0.1)
    before = model[1].weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.full_like(p, 200.0)
    with pytest.warns(UserWarning, match="no batch"):
        opt.step()
    assert not torch.equal(model[1].weight, before)
    assert all(p.isfinite().all() for p in model.parameters())


def test_layers_of_two_dtypes_in_one_model():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.narrow, self.wide = nn.Linear(4, 3), nn.Linear(3, 2, dtype=DOUBLE)

        def forward(self, x):
            return self.wide(self.narrow(x).double())

    model = Mixed()
    opt = fused_so.ACP(model)
    model(torch.randn(8, 4)).square().mean().backward()
    opt.step()
    assert opt.state[model.narrow.weight]["inverse"].dtype == torch.float32
    assert opt.state[model.wide.weight]["inverse"].dtype == DOUBLE


def test_other_memory_formats_are_trained():
    model = nn.Sequential(nn.Conv2d(3, 5, 2), nn.Flatten(), nn.Linear(20, 2))
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x = torch.randn(6, 3, 3, 3)
    for each in (model, twin):
        with pytest.warns(UserWarning, match=r"0\.weight, 0\.bias"):
            opt = fused_so.ACP(each)
        for _ in range(3):
            opt.zero_grad()
            each(x).square().mean().backward()
            opt.step()
    assert not twin[0].weight.is_contiguous()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_sparse_gradients_are_refused_by_name():
    model = nn.Sequential(nn.Embedding(5, 4, sparse=True), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match=r"0\.weight"):
        opt = fused_so.ACP(model)
    model(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(TypeError, match=r"gradients must be dense.*\(5, 4\).*sparse=False"):
        opt.step()


def test_a_constant_input_without_damping_is_retried_from_rounding():
    model = chain(3, 2)
    opt = fused_so.ACP(model, **plain(alpha=1.0, max_norm=1.0))
    backward(model, torch.ones(1, 3, dtype=DOUBLE))
    opt.step()
    assert all(p.isfinite().all() for p in model.parameters())


def test_checkpoints_survive_schedulers_and_compiled_models():
    model = chain(4, 3)
    opt = fused_so.ACP(model)
    torch.optim.lr_scheduler.StepLR(opt, 1)
    twin = chain(4, 3)
    compiled = fused_so.ACP(torch.compile(twin))
    compiled.load_state_dict(opt.state_dict())
    assert compiled.param_groups[0]["initial_lr"] == opt.defaults["lr"]
    opt.load_state_dict(compiled.state_dict())


def test_checkpoint_with_other_shapes_outside_the_layers_is_refused():
    def build(channels):
        model = nn.Sequential(nn.Conv1d(2, channels, 1), nn.Flatten(0), nn.Linear(3, 2))
        with pytest.warns(UserWarning, match=r"0\.weight"):
            return fused_so.ACP(model)

    with pytest.raises(ValueError, match=r"parameters have shapes .*\(5, 2, 1\)"):
        build(3).load_state_dict(build(5).state_dict())


def test_layers_of_a_group_added_later_are_preconditioned():
    model = chain(4, 4, 3)
    opt = fused_so.ACP(model, params=model[2].parameters())
    opt.add_param_group({"params": list(model[0].parameters())})
    backward(model, torch.randn(9, 4, dtype=DOUBLE))
    opt.step()
    assert "inverse" in opt.state[model[0].weight]


def test_copying_the_optimizer_says_what_to_do():
    with pytest.raises(TypeError, match="bound to its model's hooks.*load_state_dict"):
        copy.deepcopy(fused_so.ACP(chain(3, 2)))


def mean_error(batch_size, steps=60):
    """Training error of a small regression with ACP's defaults, before and after."""
    torch.manual_seed(0)
    x = torch.randn(512, 20)
    y = x[:, :3] + 0.1 * torch.randn(512, 3)
    model = chain(20, 50, 3, dtype=torch.float32)
    opt = fused_so.ACP(model)
    before = (model(x) - y).square().mean().item()
    for _ in range(steps):
        rows = torch.randint(0, 512, (batch_size,))
        opt.zero_grad()
        (model(x[rows]) - y[rows]).square().mean().backward()
        opt.step()
    return before, (model(x) - y).square().mean().item()


@pytest.mark.parametrize("batch_size", [16, 64, 256])
def test_defaults_learn_from_the_first_steps(batch_size):
    before, after = mean_error(batch_size)
    assert after < before / 2


def test_defaults_do_not_explode_where_a_classifier_fits_its_data():
    # The gradient, and with it alpha, collapses within ten steps: steps must not grow for that.
    torch.manual_seed(0)
    x = torch.randn(256, 16)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    model = chain(16, 64, 64, 4, dtype=torch.float32)
    opt = fused_so.ACP(model)
    losses = []
    for _ in range(150):
        rows = torch.randint(0, 256, (64,))
        opt.zero_grad()
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert max(losses) < 20
    assert max(losses[-20:]) < losses[0] / 2
