"""The data, the models and the losses that `bench.train` rests on."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.problems import (
    PROBLEMS,
    autoencoder,
    cross_entropy,
    curve_images,
    sparse_initialization_,
    squared_error,
)

SIZES = {"curves": (20_000, 10_000, 784), "digits": (1500, 297, 64)}


@pytest.fixture(scope="module", params=list(PROBLEMS))
def problem(request):
    return PROBLEMS[request.param]()


def test_shapes_and_ranges(problem):
    train, test, pixels = SIZES[problem.name]
    assert problem.train.inputs.shape == (train, pixels)
    assert problem.test.inputs.shape == (test, pixels)
    for examples in (problem.train, problem.test):
        assert examples.inputs.dtype == torch.float32
        assert examples.inputs.min() == 0
        assert examples.inputs.max() == 1
        assert examples.targets is examples.inputs


def test_no_denormal_pixels(problem):
    """Denormal numbers slow every product down by a factor of ten."""
    pixels = problem.train.inputs
    assert not ((pixels > 0) & (pixels < torch.finfo(torch.float32).tiny)).any()


def test_train_and_test_are_different_images(problem):
    train, test = (examples.inputs[:200] for examples in (problem.train, problem.test))
    assert torch.cdist(train, test).min() > 1e-3


def test_initial_loss_and_error_are_finite(problem):
    batch = problem.train.take(slice(32))
    outputs = problem.build(0)(batch.inputs)
    assert outputs.shape == batch.targets.shape
    assert torch.isfinite(problem.loss(outputs, batch.targets))
    assert torch.isfinite(problem.error(outputs, batch.targets))


def test_parameters_depend_on_the_seed_alone(problem):
    first = problem.build(3).state_dict()
    torch.rand(7)  # moves the global generator
    again, other = problem.build(3).state_dict(), problem.build(4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])


def test_digits_are_the_same_every_time():
    assert torch.equal(PROBLEMS["digits"]().train.inputs, PROBLEMS["digits"]().train.inputs)


def test_curves_depend_on_the_seed_alone():
    assert (curve_images(50, 1) == curve_images(50, 1)).all()
    assert (curve_images(50, 1) != curve_images(50, 2)).any()


def test_predicting_the_mean_curve_costs_17_to_21():
    images = torch.from_numpy(curve_images(3000, 0))
    assert 17 < (images - images.mean(dim=0)).square().sum(dim=1).mean() < 21


def test_curve_passes_where_it_should():
    """A stroke is drawn inside the margin, is connected ink, and is brightest at its centre."""
    images = curve_images(500, 0).reshape(-1, 28, 28)
    assert (images.max(axis=(1, 2)) > 0.6).all()
    assert images.sum(axis=(1, 2)).min() > 1


def test_cross_entropy_and_squared_error_by_hand():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    targets = torch.rand(5, 7, generator=generator, dtype=torch.float64)
    p = 1 / (1 + torch.exp(-logits))
    by_hand = -(targets * p.log() + (1 - targets) * (1 - p).log()).sum() / 5
    torch.testing.assert_close(cross_entropy(logits, targets), by_hand)
    torch.testing.assert_close(squared_error(logits, targets), ((p - targets) ** 2).sum() / 5)


@pytest.mark.parametrize(("fan_in", "connections"), [(400, 15), (15, 15), (6, 6), (1, 1)])
def test_sparse_initialization_connects_every_unit_equally(fan_in, connections):
    linear = nn.Linear(fan_in, 50)
    sparse_initialization_(linear, 1.0, torch.Generator().manual_seed(0))
    assert ((linear.weight != 0).sum(dim=1) == connections).all()


def test_sparse_initialization_has_the_given_standard_deviation():
    linear = nn.Linear(300, 2000)
    sparse_initialization_(linear, 0.25, torch.Generator().manual_seed(0))
    values = linear.weight[linear.weight != 0]
    assert values.std().item() == pytest.approx(0.25, rel=0.02)


def test_autoencoder_has_linear_code_and_output_and_martens_initialization():
    model = autoencoder((64, 32, 10, 32, 64), 0)
    kinds = [type(layer) for layer in model]
    assert kinds == [nn.Linear, nn.Tanh, nn.Linear, nn.Linear, nn.Tanh, nn.Linear]
    biases = [layer.bias.unique().tolist() for layer in model if isinstance(layer, nn.Linear)]
    assert biases == [[0.5], [0.0], [0.5], [0.0]]
