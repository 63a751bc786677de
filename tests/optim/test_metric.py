"""Products with a metric against matrices made whole."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import fused_so
from fused_so.optim.batches import Batch, Watch
from fused_so.optim.metric import METRICS, Metric, curvatures_of
from tests.optim.dense import (
    DOUBLE,
    chain,
    example_gradients,
    flat,
    gauss_newton,
    jacobian,
    loss_hessian,
    output_hessian,
)

N, OUTPUTS = 6, 3
LIKELIHOODS = {
    "gaussian": fused_so.Gaussian(0.7),
    "bernoulli": fused_so.Bernoulli(reduction="batchmean"),
    "bernoulli, mean of entries": fused_so.Bernoulli(),
    "categorical": fused_so.Categorical(),
    "categorical, sum": fused_so.Categorical(reduction="sum"),
}


def targets_of(likelihood):
    if isinstance(likelihood, fused_so.Categorical):
        return torch.randint(OUTPUTS, (N,))
    return torch.rand(N, OUTPUTS, dtype=DOUBLE)


class Convolutions(nn.Module):
    """Not only Linear: convolution, batch norm, a weight used twice, an unused one."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3, dtype=DOUBLE)
        self.bn = nn.BatchNorm1d(4, dtype=DOUBLE)
        self.mix = nn.Linear(4, 4, dtype=DOUBLE)
        self.head = nn.Linear(4, OUTPUTS, dtype=DOUBLE)
        self.unused = nn.Parameter(torch.zeros(2, dtype=DOUBLE))

    def forward(self, x, *, gain=1.0):
        h = torch.tanh(self.bn(self.conv(x[:, None]))).square().mean(2)
        return self.head(gain * torch.tanh(self.mix(torch.sin(self.mix(h)))))


def product_matrix(model, likelihood, kind, batches, **options):
    params = list(model.parameters())
    names = [name for name, _ in model.named_parameters()]
    metric = Metric(Watch(model), names, params, likelihood, kind, batches, **options)
    columns = []
    for e in torch.eye(sum(p.numel() for p in params), dtype=DOUBLE):
        parts = e.split([p.numel() for p in params])
        v = [t.view(p.shape) for t, p in zip(parts, params, strict=True)]
        columns.append(flat(metric(v)))
    return torch.stack(columns, 1)


def scored(model, likelihood, x, y):
    outputs = model(x).detach()
    return Batch((x,), {}, likelihood.score(outputs, y))


@pytest.mark.parametrize("architecture", ["linear", "any"])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_products_are_those_of_the_dense_matrices(name, architecture):
    likelihood = LIKELIHOODS[name]
    model = chain(5, 4, OUTPUTS) if architecture == "linear" else Convolutions().eval()
    x, y = torch.randn(N, 5, dtype=DOUBLE), targets_of(likelihood)
    batch = scored(model, likelihood, x, y)

    def value(outputs):
        return likelihood.value(outputs, y)

    expected = gauss_newton(model, value, x)
    got = product_matrix(model, likelihood, "gauss_newton", [batch])
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    got = product_matrix(model, likelihood, "hessian", [batch])
    expected = loss_hessian(model, value, x)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)

    # (1/N) sum_i grad l_i grad l_i^T, with the gradients of single losses.
    one = replace(likelihood, reduction="sum")
    rows = example_gradients(
        model,
        lambda out: torch.stack([one.value(out[i : i + 1], y[i : i + 1]) for i in range(N)]),
        x,
    )
    count = likelihood.normalizer(model(x), y)
    got = product_matrix(model, likelihood, "empirical_fisher", [batch])
    torch.testing.assert_close(got, rows.T @ rows / count, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LIKELIHOODS)
def test_extended_gauss_newton_is_the_fisher_matrix(name):
    """Section 7 of Pascanu and Bengio: J^T H J, and E[grad l grad l^T] over the model's targets."""
    likelihood = LIKELIHOODS[name]
    model = chain(5, 4, OUTPUTS)
    x = torch.randn(N, 5, dtype=DOUBLE)
    outputs, jac = model(x).detach(), jacobian(model, x)
    one = replace(likelihood, reduction="sum")
    fisher = torch.zeros(jac.shape[2], jac.shape[2], dtype=DOUBLE)
    for i in range(N):
        for probability, y in _all_targets(likelihood, outputs[i : i + 1]):
            g = one.score(outputs[i : i + 1], y).reshape(-1) @ jac[i]
            fisher += probability * torch.outer(g, g)
    fisher /= likelihood.normalizer(outputs)
    got = product_matrix(model, likelihood, "gauss_newton", [Batch((x,), {})])
    torch.testing.assert_close(got, fisher, rtol=1e-10, atol=1e-12)


def _all_targets(likelihood, outputs):
    """Every target with its probability; a Gaussian by a quadrature exact for squares."""
    if isinstance(likelihood, fused_so.Categorical):
        for k, p in enumerate(outputs.softmax(1)[0]):
            yield p, torch.tensor([k])
    elif isinstance(likelihood, fused_so.Bernoulli):
        p = outputs.sigmoid()
        for bits in torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=DOUBLE)] * OUTPUTS):
            yield torch.where(bits == 1, p, 1 - p).prod(), bits[None]
    else:
        for signs in torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=DOUBLE)] * OUTPUTS):
            yield 1 / 2**OUTPUTS, outputs + likelihood.scale * signs


def test_sampled_fisher_is_an_unbiased_rank_one_matrix_an_example():
    likelihood = fused_so.Categorical()
    outputs = torch.randn(4, OUTPUTS, dtype=DOUBLE)
    expected = output_hessian(lambda out: likelihood.value(out, torch.zeros(4).long()), outputs)
    mean = torch.zeros_like(expected)
    draws = 4000
    for _ in range(draws):
        (curvature,) = curvatures_of(likelihood, "sampled_fisher", [outputs], [None])
        columns = [
            curvature(torch.eye(OUTPUTS, dtype=DOUBLE)[k].expand(4, OUTPUTS))
            for k in range(OUTPUTS)
        ]
        block = torch.stack(columns, 2)
        assert (torch.linalg.matrix_rank(block, rtol=1e-9) == 1).all()
        mean += block / draws
    # Four standard errors, the entries of a draw being below 1 / 4.
    assert (mean - expected).abs().max() < 4 * 0.25 / math.sqrt(draws)


@pytest.mark.parametrize("kind", METRICS[::2])
@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum"])
def test_several_batches_are_one(kind, reduction):
    likelihood = fused_so.Bernoulli(reduction=reduction)
    model = chain(5, 4, OUTPUTS)
    x, y = torch.randn(N, 5, dtype=DOUBLE), torch.rand(N, OUTPUTS, dtype=DOUBLE)
    whole = scored(model, likelihood, x, y)
    parts = [
        Batch((x[rows],), {}, whole.score[rows])
        for rows in (slice(0, 1), slice(1, 4), slice(4, None))
    ]
    expected = product_matrix(model, likelihood, kind, [whole])
    got = product_matrix(model, likelihood, kind, parts)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


def test_the_metric_of_a_sum_is_that_of_as_many_examples_as_the_gradient_has():
    model, x = chain(5, 4, OUTPUTS), torch.randn(N, 5, dtype=DOUBLE)
    for reduction, factor in (("sum", 30 / N), ("none", 30 / N), ("mean", 1)):
        likelihood = fused_so.Gaussian(reduction=reduction)
        bare = product_matrix(model, likelihood, "gauss_newton", [Batch((x,), {})])
        got = product_matrix(model, likelihood, "gauss_newton", [Batch((x,), {})], examples=30)
        torch.testing.assert_close(got, factor * bare)


@pytest.mark.parametrize("ignore_index", [-100, 0, 2])
def test_ignored_targets_have_no_curvature_and_are_not_counted(ignore_index):
    likelihood = fused_so.Categorical(ignore_index)
    model, x = chain(5, 4, OUTPUTS), torch.randn(N, 5, dtype=DOUBLE)
    y = torch.tensor([1, ignore_index, 1, ignore_index, 1, 1])
    batch = scored(model, likelihood, x, y)
    used = y != ignore_index
    expected = product_matrix(
        model, fused_so.Categorical(), "gauss_newton", [Batch((x[used],), {})]
    )
    got = product_matrix(model, likelihood, "gauss_newton", [batch])
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


def test_buffers_and_gradients_stay_as_they_are():
    model = Convolutions().train()
    x = torch.randn(N, 5, dtype=DOUBLE)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    product_matrix(model, fused_so.Gaussian(), "gauss_newton", [Batch((x,), {"gain": 2.0})])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_it_is_a_kl_divergence_on_the_paper_s_two_parameter_autoencoder():
    """Figure 1: y = w sigmoid(w x + b) - b. KL = 1/2 delta^T G delta + O(delta^3)."""

    class Autoencoder(nn.Module):
        def __init__(self, w, b):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(w, dtype=DOUBLE))
            self.b = nn.Parameter(torch.tensor(b, dtype=DOUBLE))

        def forward(self, x):
            return self.w * torch.sigmoid(self.w * x + self.b) - self.b

    x = torch.linspace(-2, 3, 7, dtype=DOUBLE)[:, None]
    for w, b in ((0.5, -0.2), (-1.3, 2.0)):
        model = Autoencoder(w, b)
        matrix = product_matrix(model, fused_so.Gaussian(), "gauss_newton", [Batch((x,), {})])

        def divergence(dw, db, w=w, b=b, x=x):
            # of normal distributions of variance 1, averaged over x
            other = Autoencoder(w + dw, b + db)(x)
            return 0.5 * (other - Autoencoder(w, b)(x)).square().mean().item()

        h = 1e-4
        second = torch.tensor(
            [
                [
                    sum(
                        s * t * divergence(h * (s * (i == 0) + t * (j == 0)),
                                           h * (s * (i == 1) + t * (j == 1)))
                        for s in (-1, 1) for t in (-1, 1)
                    ) / (4 * h * h)
                    for j in range(2)
                ]
                for i in range(2)
            ],
            dtype=DOUBLE,
        )  # fmt: skip
        torch.testing.assert_close(matrix, second, rtol=1e-5, atol=1e-6)
        # And the step goes where the divergence says.
        opt = fused_so.NaturalGradient(
            model, 1.0, likelihood=fused_so.Gaussian(), damping=1e-3, tolerance=1e-12
        )
        (0.5 * (model(x) - x).square().mean()).backward()
        before, gradient = flat(model.parameters()), flat(p.grad for p in model.parameters())
        opt.step()
        expected = torch.linalg.solve(second + 1e-3 * torch.eye(2, dtype=DOUBLE), gradient)
        step = before - flat(model.parameters())
        torch.testing.assert_close(step, expected, rtol=1e-3, atol=1e-5)
        cosine = expected @ gradient / (expected.norm() * gradient.norm())
        assert cosine < 0.99  # which is not where the gradient does
