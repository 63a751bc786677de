"""The data, the models and the losses that `bench.train` rests on."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import tarfile
from functools import partial

import numpy as np
import pytest
import scipy.io as scipy_io
import torch
from torch import nn

from bench import problems
from bench.image_files import CIFAR_BATCHES, FACES_FILE, MNIST_FILES, olivetti_images
from bench.problems import (
    PROBLEMS,
    autoencoder,
    cross_entropy,
    curve_images,
    error_rate,
    face_patches,
    sparse_initialization_,
    squared_error,
)

SIZES = {
    "curves": (20_000, 10_000, 784),
    "digits": (1500, 297, 64),
    "digits_classifier": (1500, 297, 64),
    "mnist": (300, 200, 784),
    "faces": (500, 200, 625),
    "cifar": (250, 50, 3072),
}
CLASSIFIERS = ("digits_classifier", "cifar")


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


def cifar_arrays(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(0)
    return [
        (random.integers(0, 256, (count, 3072), np.uint8), random.integers(0, 10, count))
        for _ in CIFAR_BATCHES
    ]


def write_cifar(folder, version: str, archived: bool, count: int = 4) -> None:
    """Files of CIFAR-10's formats; pickles name numpy's modules as those of Python 2 did."""
    contents = {}
    for name, (images, labels) in zip(CIFAR_BATCHES, cifar_arrays(count), strict=True):
        if version == "python":
            batch = {b"data": images, b"labels": labels.tolist(), b"batch_label": b"a batch"}
            content = pickle.dumps(batch, protocol=2).replace(b"numpy._core.", b"numpy.core.")
            contents[f"cifar-10-batches-py/{name}"] = content
        else:
            rows = np.concatenate([labels[:, None].astype(np.uint8), images], axis=1)
            contents[f"cifar-10-batches-bin/{name}.bin"] = rows.tobytes()
    if archived:
        with tarfile.open(folder / f"cifar-10-{version}.tar.gz", "w:gz") as tar:
            for name, content in contents.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        return
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


def olivetti_bytes() -> np.ndarray:
    """As Matlab has them: a column a face, whose pixels go down the columns of the image."""
    faces = np.random.default_rng(0).integers(0, 256, (4096, 400), np.uint8)
    faces[0, 0], faces[1, 0] = 0, 255
    return faces


def write_faces(folder) -> None:
    scipy_io.savemat(folder / "olivettifaces.mat", {"faces": olivetti_bytes()})


@pytest.fixture(scope="module", params=list(PROBLEMS))
def problem(request, tmp_path_factory):
    data = tmp_path_factory.mktemp("data")
    build = PROBLEMS[request.param]
    if request.param == "mnist":
        write_mnist(data, *SIZES["mnist"][:2])
    elif request.param == "cifar":
        write_cifar(data, "binary", archived=True, count=50)
    elif request.param == "faces":
        write_faces(data)
        build = partial(build, copies=2)
    return build(data)


def test_shapes_and_ranges(problem):
    train, test, pixels = SIZES[problem.name]
    assert problem.train.inputs.shape == (train, pixels)
    assert problem.test.inputs.shape == (test, pixels)
    for examples in (problem.train, problem.test):
        assert examples.inputs.dtype == torch.float32
        if problem.name != "faces":
            assert examples.inputs.min() == 0
            assert examples.inputs.max() == 1
        if problem.name in CLASSIFIERS:
            assert examples.targets.dtype == torch.int64
            assert set(examples.targets.tolist()) <= set(range(10))
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
    is_classifier = problem.name in CLASSIFIERS
    assert outputs.shape == ((32, 10) if is_classifier else batch.targets.shape)
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


@pytest.mark.parametrize("version", ["python", "binary"])
@pytest.mark.parametrize("archived", [False, True])
def test_cifar_reads_every_version_alike(tmp_path, version, archived):
    write_cifar(tmp_path, version, archived)
    problem = PROBLEMS["cifar"](tmp_path)
    arrays = cifar_arrays(4)
    images = torch.from_numpy(np.concatenate([rows for rows, _ in arrays]).astype(np.float32))
    classes = torch.from_numpy(np.concatenate([labels for _, labels in arrays]))
    assert torch.equal(problem.train.inputs, images[:20] / 255)
    assert torch.equal(problem.train.targets, classes[:20])
    assert torch.equal(problem.test.inputs, images[20:] / 255)
    assert torch.equal(problem.test.targets, classes[20:])


def test_cifar_names_the_files_it_wants(tmp_path):
    names = ("batches-py/", "python.tar.gz", "batches-bin/", "binary.tar.gz")
    with pytest.raises(FileNotFoundError) as caught:
        PROBLEMS["cifar"](tmp_path)
    assert all(f"cifar-10-{name}" in str(caught.value) for name in names)
    write_cifar(tmp_path, "python", archived=False)
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match="lacks cifar-10-batches-py/data_batch_3$"):
        PROBLEMS["cifar"](tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "test_batch must be a batch of CIFAR-10's python version"),
        (pickle.dumps({b"data": np.zeros((2, 5), np.uint8), b"labels": [1, 2]}), "3072 bytes"),
        (pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}), "from 0 to 9"),
        (pickle.dumps(os.getcwd), "getcwd is not part of an array"),
    ],
)
def test_cifar_refuses_a_damaged_pickle(tmp_path, content, message):
    write_cifar(tmp_path, "python", archived=False)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        PROBLEMS["cifar"](tmp_path)


def test_cifar_refuses_damaged_records_and_archives(tmp_path):
    write_cifar(tmp_path, "binary", archived=False)
    file = tmp_path / "cifar-10-batches-bin" / "data_batch_2.bin"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="data_batch_2.bin must have records of 3073 bytes, got"):
        PROBLEMS["cifar"](tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    write_cifar(other, "python", archived=True)
    archive = other / "cifar-10-python.tar.gz"
    archive.write_bytes(archive.read_bytes()[:1000])
    with pytest.raises(ValueError, match="python.tar.gz must be a gzipped tar archive"):
        PROBLEMS["cifar"](other)


def test_olivetti_is_read_alike_from_matlab_and_scikit_learn(tmp_path):
    import joblib

    write_faces(tmp_path)
    from_matlab = olivetti_images(tmp_path)
    expected = olivetti_bytes()[:, 7].reshape(64, 64, order="F").astype(np.float32) / 255
    np.testing.assert_array_equal(from_matlab[7], expected)
    (tmp_path / "olivettifaces.mat").unlink()
    joblib.dump(olivetti_bytes().T.copy(), tmp_path / "olivetti_py3.pkz", compress=6)
    np.testing.assert_array_equal(olivetti_images(tmp_path), from_matlab)


def test_faces_takes_the_augmented_file_first_and_standardizes_it(tmp_path):
    write_faces(tmp_path)
    patches = np.random.default_rng(0).normal(3, 2, (625, 80)).astype(np.float32)
    scipy_io.savemat(tmp_path / FACES_FILE, {"newfaces_single": patches})
    problem = PROBLEMS["faces"](tmp_path)
    centered = patches.T.astype(np.float64) - patches.T.mean(axis=0, dtype=np.float64)
    expected = torch.from_numpy(centered / np.sqrt((centered**2).mean())).float()
    torch.testing.assert_close(problem.train.inputs, expected[:50], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(problem.test.inputs, expected[-20:], rtol=1e-5, atol=1e-5)


def test_faces_names_the_files_it_wants(tmp_path):
    names = f"{FACES_FILE}, olivettifaces.mat or scikit-learn's olivetti_py3.pkz"
    with pytest.raises(FileNotFoundError, match=names):
        PROBLEMS["faces"](tmp_path)


@pytest.mark.parametrize("name", [FACES_FILE, "olivettifaces.mat", "olivetti_py3.pkz"])
def test_faces_refuses_a_damaged_file(tmp_path, name):
    (tmp_path / name).write_bytes(b"not what the name says")
    with pytest.raises(ValueError, match=f"{name} must be"):
        PROBLEMS["faces"](tmp_path)


def test_face_patches_stay_within_the_image_and_keep_its_center():
    """Patches of ones are ones, and the middle pixel of a patch is the middle of its image."""
    ones = face_patches(torch.ones(2, 64, 64), 50)
    torch.testing.assert_close(ones, torch.ones(100, 625))
    ramp = torch.arange(64.0).expand(1, 64, 64)
    patches = face_patches(ramp, 50).view(50, 25, 25)
    torch.testing.assert_close(patches[:, 12, 12], torch.full((50,), 31.5))
    assert patches[:, 12].std(dim=0).max() > 1  # turned by different angles


def test_error_rate_by_hand():
    logits = torch.tensor([[1.0, 2, 0], [3, 2, 1], [0, 0, 1], [5, 1, 1]])
    assert error_rate(logits, torch.tensor([1, 1, 2, 0])).item() == 25.0
