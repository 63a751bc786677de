"""Whole training steps, as multiples of a step of SGD with momentum.

On a deep autoencoder; and, for the modes of UBP that carry Jacobians, on a classifier with few
outputs.

A round is ROUND_STEPS steps of every optimizer, in blocks that take turns, so that it holds each
one's amortized work in the right proportion: statistics every 10 steps, inverses every 100.
"""

import itertools
import statistics
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fused_so
from bench import measure
from bench.problems import autoencoder, cross_entropy
from fused_so.optim.batches import Batch, Watch
from fused_so.optim.metric import Metric

# batch
SIZES = [(1024,), (512,), (128,)]
WIDTHS = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
# Statistics and inverses come more often up to step 64.
EARLY_STEPS, ROUNDS, ROUND_STEPS, BLOCK_STEPS = 65, 1, 100, 10
PRODUCTS = 20  # iterations of a step of truncated Newton
LIKELIHOOD = fused_so.Bernoulli(reduction="batchmean")
AMORTIZED = {"statistics_every": 10, "inverse_every": 100}
OPTIMIZERS = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9),
    "sgd fused": lambda model: torch.optim.SGD(
        model.parameters(), lr=1e-4, momentum=0.9, fused=True
    ),
    "adam fused": lambda model: torch.optim.Adam(model.parameters(), lr=1e-5, fused=True),
    "cgd": lambda model: fused_so.CGD(model, lr=1e-4),
    "acp": lambda model: fused_so.ACP(model, lr=1e-4),
    "nnn": lambda model: fused_so.NNN(model, lr=1e-4),
    "kfac": lambda model: fused_so.KFAC(model, lr=1e-4, likelihood=LIKELIHOOD, **AMORTIZED),
    "ekfac": lambda model: fused_so.EKFAC(model, lr=1e-4, likelihood=LIKELIHOOD, **AMORTIZED),
    "ubp": lambda model: fused_so.UBP(model, lr=1e-4, likelihood=LIKELIHOOD),
    "tonga": lambda model: fused_so.TONGA(model, lr=1e-4),
    "gram": lambda model: fused_so.NaturalGradient(
        model,
        lr=1e-4,
        likelihood=LIKELIHOOD,
        solver="gram",
        metric="empirical_fisher",
        momentum=0.9,
    ),
}


def ubp(mode: str):
    return lambda model: fused_so.UBP(model, lr=1e-4, mode=mode, likelihood=fused_so.Categorical())


# 3072 inputs, as of CIFAR-10, eight hidden layers of 100, 10 classes.
CLASSIFIER_WIDTHS = (3072, *[100] * 8, 10)
CLASSIFIER_OPTIMIZERS = {
    "classifier: sgd": OPTIMIZERS["sgd"],
    "classifier: sgd fused": OPTIMIZERS["sgd fused"],
    "classifier: ubp jacobian": ubp("jacobian"),
    "classifier: ubp matrix_free": ubp("matrix_free"),
    "classifier: ubp sketch": ubp("sketch"),
}


def stepper(name: str, x: torch.Tensor):
    model = autoencoder(WIDTHS, 0).to(x.device)
    optimizer = OPTIMIZERS[name](model)

    def step():
        optimizer.zero_grad()
        cross_entropy(model(x), x).backward()
        optimizer.step()

    return step


def classifier_stepper(name: str, x: torch.Tensor, y: torch.Tensor):
    torch.manual_seed(0)
    layers = []
    for fan_in, fan_out in itertools.pairwise(CLASSIFIER_WIDTHS):
        layers += [nn.Linear(fan_in, fan_out), nn.Tanh()]
    model = nn.Sequential(*layers[:-1])
    optimizer = CLASSIFIER_OPTIMIZERS[name](model)

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


@pytest.mark.benchmark(group="steps")
def test_steps(benchmark, size):
    (batch,) = size
    x = torch.rand(batch, WIDTHS[0])
    steps = {name: stepper(name, x) for name in OPTIMIZERS}
    compare(benchmark, batch, steps)


@pytest.mark.benchmark(group="steps")
def test_classifier_steps(benchmark, size):
    (batch,) = size
    x, y = torch.randn(batch, CLASSIFIER_WIDTHS[0]), torch.randint(10, (batch,))
    compare(
        benchmark, batch, {name: classifier_stepper(name, x, y) for name in CLASSIFIER_OPTIMIZERS}
    )


def compare(benchmark, batch: int, steps: dict):
    brief = measure.REPORT.brief
    rounds, round_steps = (1, BLOCK_STEPS) if brief else (ROUNDS, ROUND_STEPS)
    for step in steps.values():
        for _ in range(BLOCK_STEPS if brief else EARLY_STEPS):
            step()
    seconds = {name: [] for name in steps}
    for _ in range(rounds):
        spent = dict.fromkeys(steps, 0.0)
        for _ in range(round_steps // BLOCK_STEPS):
            for name, step in steps.items():
                start = time.perf_counter()
                for _ in range(BLOCK_STEPS):
                    step()
                spent[name] += time.perf_counter() - start
        for name, total in spent.items():
            seconds[name].append(total / round_steps)

    medians = {name: statistics.median(values) for name, values in seconds.items()}
    sgd = min(median for name, median in medians.items() if "sgd" in name)
    rows = [
        {
            "batch": batch,
            "optimizer": name,
            "ms": medians[name] * 1e3,
            "times_sgd": medians[name] / sgd,
            "threads": torch.get_num_threads(),
        }
        for name in steps
    ]
    measure.REPORT.steps.extend(rows)
    benchmark.extra_info["steps"] = rows
    benchmark.pedantic(list(steps.values())[-1], rounds=1, iterations=1)


@pytest.mark.benchmark(group="steps")
def test_truncated_newton(benchmark, size):
    """A step of CG with 20 iterations, against 20 products with the metric and a gradient."""
    (batch,) = size
    x = torch.rand(batch, WIDTHS[0])
    model = autoencoder(WIDTHS, 0)
    optimizer = fused_so.NaturalGradient(
        model, lr=1e-4, likelihood=LIKELIHOOD, max_iterations=PRODUCTS, tolerance=0.0
    )
    twin = autoencoder(WIDTHS, 0)
    params = dict(twin.named_parameters())
    metric = Metric(
        Watch(twin), list(params), list(params.values()), LIKELIHOOD, "gauss_newton",
        [Batch((x,), {})],
    )  # fmt: skip
    v = [torch.randn_like(p) for p in params.values()]

    def gradient(of):
        of.zero_grad()
        cross_entropy(of(x), x).backward()

    def step():
        gradient(model)
        optimizer.step()

    def parts():
        gradient(twin)
        for _ in range(PRODUCTS):
            metric(v)

    measure.compare(
        benchmark,
        f"cg step of {PRODUCTS} iterations, batch {batch}",
        step,
        {"products and a gradient": parts},
        compiled=False,
        rounds=5,
    )
