"""The data, the models and the losses that `bench.train` rests on."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
import torch
from torch import nn

from bench import problems
from bench.problems import (
    MNIST_FILES,
    PROBLEMS,
    autoencoder,
    cross_entropy,
    curve_images,
    sparse_initialization_,
    squared_error,
)

SIZES = {
    "curves": (20_000, 10_000, 784),
    "digits": (1500, 297, 64),
    "digits_classifier": (1500, 297, 64),
    "mnist": (300, 200, 784),
}


def write_mnist(folder, train: int, test: int) -> None:
    """Files of MNIST's formats, of random pixels; the last two gzipped."""
    random = np.random.default_rng(0)
    for name, count in zip(MNIST_FILES, (train, train, test, test), strict=True):
        if "images" in name:
            content = struct.pack(">4I", 0x803, count, 28, 28) + random.bytes(count * 784)
        else:
            content = struct.pack(">2I", 0x801, count) + bytes(count)
        if "t10k" in name:
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)


@pytest.fixture(scope="module", params=list(PROBLEMS))
def problem(request, tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    if request.param == "mnist":
        write_mnist(data, *SIZES["mnist"][:2])
    return PROBLEMS[request.param](data)


def test_shapes_and_ranges(problem):
    train, test, pixels = SIZES[problem.name]
    assert problem.train.inputs.shape == (train, pixels)
    assert problem.test.inputs.shape == (test, pixels)
    for examples in (problem.train, problem.test):
        assert examples.inputs.dtype == torch.float32
        assert examples.inputs.min() == 0
        assert examples.inputs.max() == 1
        if problem.name == "digits_classifier":
            assert sorted(examples.targets.unique().tolist()) == list(range(10))
        else:
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
    expected = (32, 10) if problem.name == "digits_classifier" else batch.targets.shape
    assert outputs.shape == expected
    assert torch.isfinite(problem.loss(outputs, batch.targets))
    assert torch.isfinite(problem.error(outputs, batch.targets))
    value = problem.likelihood.value(outputs, batch.targets)
    torch.testing.assert_close(problem.loss(outputs, batch.targets), value)


def test_parameters_depend_on_the_seed_alone(problem):
    first = problem.build(3).state_dict()
    torch.rand(7)  # moves the global generator
    again, other = problem.build(3).state_dict(), problem.build(4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])


def test_digits_are_the_same_every_time():
    first, again = (PROBLEMS["digits"](None) for _ in range(2))
    assert torch.equal(first.train.inputs, again.train.inputs)


def test_digits_keep_their_labels():
    from sklearn.datasets import load_digits

    problem, digits = PROBLEMS["digits_classifier"](None), load_digits()
    match = torch.cdist(problem.test.inputs, torch.from_numpy(digits.data / 16).float()).argmin(1)
    assert torch.equal(problem.test.targets, torch.from_numpy(digits.target)[match])


def test_curves_are_drawn_once_and_kept(tmp_path, monkeypatch):
    drawn = PROBLEMS["curves"](tmp_path / "new").train.inputs
    monkeypatch.delattr(problems, "curve_images")
    assert torch.equal(PROBLEMS["curves"](tmp_path / "new").train.inputs, drawn)


def test_mnist_reads_pixels_in_order(tmp_path):
    write_mnist(tmp_path, 3, 2)
    pixels = np.frombuffer((tmp_path / MNIST_FILES[0]).read_bytes(), np.uint8, offset=16)
    expected = torch.from_numpy(pixels.reshape(3, 784).astype(np.float32)) / 255
    assert torch.equal(PROBLEMS["mnist"](tmp_path).train.inputs, expected)


def test_mnist_names_the_files_it_wants(tmp_path):
    write_mnist(tmp_path, 3, 2)
    (tmp_path / MNIST_FILES[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"not there: {MNIST_FILES[1]}$") as caught:
        PROBLEMS["mnist"](tmp_path)
    assert all(name in str(caught.value) for name in MNIST_FILES)


@pytest.mark.parametrize("damage", [lambda c: c[:-1], lambda c: b"", lambda c: b"\0\0" + c[2:5]])
def test_mnist_refuses_a_damaged_file(tmp_path, damage):
    write_mnist(tmp_path, 3, 2)
    file = tmp_path / MNIST_FILES[0]
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match="must be an IDX file of 28 x 28 images"):
        PROBLEMS["mnist"](tmp_path)


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


def test_the_likelihood_has_the_loss_as_its_value(problem):
    batch = problem.train.take(slice(20))
    outputs = problem.build(0)(batch.inputs)
    value = problem.likelihood.value(outputs, batch.targets)
    torch.testing.assert_close(value, problem.loss(outputs, batch.targets))
