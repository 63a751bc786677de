"""What is trained: data, a model, a loss to minimize and an error to report.

Deep autoencoders after Hinton & Salakhutdinov (2006), whose targets are their inputs, and
classifiers after George (2017), section 4.1.2. `curves` is drawn from a formula and `digits` ships
with scikit-learn: nothing to download. `mnist`, `faces` and `cifar` read their standard files.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.image_files import (
    SIDE,
    cifar_batches,
    faces_patches,
    mnist_images,
    olivetti_images,
)
from fused_so.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood


def default_data() -> Path:
    """Where data is kept when no folder is given: fused_so in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fused_so"


@dataclass(frozen=True, eq=False)
class Examples:
    """Rows of `inputs` and what the model should make of each; an autoencoder has one for both."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, rows: Tensor | slice) -> Examples:
        """Select rows; a tensor that is both inputs and targets is gathered once."""
        inputs = self.inputs[rows]
        return Examples(inputs, inputs if self.targets is self.inputs else self.targets[rows])


@dataclass(frozen=True, eq=False)
class Problem:
    """One training problem.

    `build(seed)` gives the model with initial parameters that depend on the seed alone.
    `loss(outputs, targets)` is minimized, `error(outputs, targets)` is reported; both are means
    over examples, and `error_name` says in which units the error is. `likelihood` has the loss
    as its value; optimizers that need the curvature at the outputs are given it. `batch_size` is
    that of a comparison that names none.
    """

    name: str
    train: Examples
    test: Examples
    build: Callable[[int], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    error: Callable[[Tensor, Tensor], Tensor]
    error_name: str
    likelihood: Likelihood
    batch_size: int = 256


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy in nats, summed over pixels and averaged over images."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(targets)


def squared_error(logits: Tensor, targets: Tensor) -> Tensor:
    """Squared reconstruction error, summed over pixels and averaged over images."""
    return (torch.sigmoid(logits) - targets).square().sum(dim=1).mean()


def half_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Half the squared error, summed over pixels and averaged over images: Gaussian, scale 1."""
    return linear_squared_error(outputs, targets) / 2


def linear_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared error of linear outputs, summed over pixels and averaged over images."""
    return (outputs - targets).square().sum(dim=1).mean()


def error_rate(logits: Tensor, targets: Tensor) -> Tensor:
    """Percentage of examples whose largest logit is not their class's."""
    return 100 * (logits.argmax(dim=1) != targets).float().mean()


def autoencoder(widths: Sequence[int], seed: int) -> nn.Sequential:
    """Tanh layers of the given widths, from pixels to the code and back to pixels' logits.

    The code, the narrowest layer, is linear, and so is the output.
    """
    generator = torch.Generator().manual_seed(seed)
    linear_layers = {widths.index(min(widths)), len(widths) - 1}
    model = nn.Sequential()
    input_scale = 1.0
    for layer, (fan_in, fan_out) in enumerate(itertools.pairwise(widths), start=1):
        is_tanh = layer not in linear_layers
        output_scale = 0.5 if is_tanh else 1.0
        linear = nn.utils.skip_init(nn.Linear, fan_in, fan_out)
        sparse_initialization_(linear, input_scale * output_scale, generator)
        nn.init.constant_(linear.bias, 0.5 if is_tanh else 0.0)
        model.append(linear)
        if is_tanh:
            model.append(nn.Tanh())
        input_scale = output_scale
    return model


def classifier(widths: Sequence[int], seed: int) -> nn.Sequential:
    """Tanh layers of the given widths and linear logits, initialized as Glorot & Bengio (2010)."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential()
    for fan_in, fan_out in itertools.pairwise(widths):
        linear = nn.utils.skip_init(nn.Linear, fan_in, fan_out)
        nn.init.xavier_uniform_(linear.weight, generator=generator)
        nn.init.zeros_(linear.bias)
        model.extend([linear, nn.Tanh()])
    return model[:-1]


@torch.no_grad()
def sparse_initialization_(
    linear: nn.Linear, std: float, generator: torch.Generator, connections: int = 15
) -> None:
    """Give every unit `connections` incoming weights from N(0, std^2) and make the rest zero.

    Martens (2010): units stay distinct and unsaturated whatever the fan-in. His code halves the
    standard deviation for each side of the weight, input or output, that is a tanh unit, and
    gives tanh units a bias of 0.5: the network then starts like one of logistic units.
    """
    weight = linear.weight
    connections = min(connections, linear.in_features)
    columns = torch.rand(weight.shape, generator=generator).topk(connections, dim=1).indices
    values = std * torch.randn(columns.shape, generator=generator)
    weight.zero_().scatter_(1, columns, values)


def curve_images(
    count: int, seed: int, *, margin: float = 4.0, stroke: float = 0.6, steps: int = 64
) -> np.ndarray:
    """Draw `count` smooth curves, each through three random points: (count, 784) in [0, 1].

    The points are uniform over the image less `margin` pixels on every side. A curve is the
    parabola that passes the first, second and third at times 0, 1/2 and 1. Its ink is the line
    blurred by a Gaussian of standard deviation `stroke` pixels, 1 at the centre of a straight
    stroke, cut off at 1 where strokes cross, in 256 levels: a Gaussian's tail would fill the
    images with denormal numbers, which make products ten times slower. A Gaussian separates into
    rows and columns, so one small matrix product an image draws all `steps` points of the curve.
    """
    rng = np.random.default_rng(seed)
    points = rng.uniform(margin, SIDE - margin, size=(count, 3, 1, 2)).astype(np.float32)
    start, middle, end = points[:, 0], points[:, 1], points[:, 2]
    control = 2 * middle - (start + end) / 2
    time = ((np.arange(steps, dtype=np.float32) + 0.5) / steps)[:, None]
    positions = (1 - time) ** 2 * start + 2 * time * (1 - time) * control + time**2 * end
    velocity = 2 * (1 - time) * (control - start) + 2 * time * (end - control)
    lengths = np.linalg.norm(velocity, axis=2, keepdims=True) / steps

    centres = np.arange(SIDE, dtype=np.float32) + 0.5
    columns, rows = (
        np.exp(-0.5 * ((positions[..., axis, None] - centres) / stroke) ** 2) for axis in (0, 1)
    )
    rows *= lengths / (stroke * math.sqrt(2 * math.pi))
    ink = np.matmul(rows.transpose(0, 2, 1), columns)
    levels = np.rint(255 * np.minimum(ink, 1.0))
    return (levels / 255).astype(np.float32).reshape(count, SIDE * SIDE)


def curves(data: Path) -> Problem:
    """20,000 + 10,000 synthetic curves, 784-400-200-100-50-25-6 and back; kept in `data`."""
    file = data / "curves-1.npy"
    try:
        levels = np.load(file)
    except (OSError, ValueError):
        # Chunks, because a whole set at once takes GBs.
        images = np.concatenate([curve_images(2000, seed) for seed in range(15)])
        levels = np.rint(255 * images).astype(np.uint8)
        _keep(file, levels)
    images = torch.from_numpy(levels.astype(np.float32) / 255)
    return _autoencoding(
        "curves", images, 20_000, (784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784)
    )


def _keep(file: Path, array: np.ndarray) -> None:
    """Saves it whole or not at all; a folder that cannot be written costs only the time."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}.npy")
        np.save(unfinished, array)
        unfinished.replace(file)
    except OSError:
        pass


def _digits() -> Examples:
    """The images in [0, 1] and their classes, shuffled: other people wrote the file's last ones."""
    from sklearn.datasets import load_digits

    file = load_digits()
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(file.data)))
    images = torch.from_numpy(file.data / 16).float()
    return Examples(images[order], torch.from_numpy(file.target).long()[order])


def digits(data: Path) -> Problem:
    """1,500 + 297 scanned 8x8 digits of scikit-learn, shuffled; 64-128-64-32-10 and back."""
    return _autoencoding("digits", _digits().inputs, 1500, (64, 128, 64, 32, 10, 32, 64, 128, 64))


def digits_classifier(data: Path) -> Problem:
    """The classes of the same digits: eight tanh layers of 30, the depth of George 2017, 4.1.2."""
    examples = _digits()
    train, test = examples.take(slice(1500)), examples.take(slice(1500, None))
    # The training error rate of all methods is soon 0.
    name = "cross-entropy (nats, mean over images)"
    return _classifying("digits_classifier", train, test, 30, F.cross_entropy, name)


def mnist(data: Path) -> Problem:
    """The 60,000 + 10,000 images of MNIST from `data`; 784-1000-500-250-30 and back."""
    train, test = mnist_images(data)
    images = torch.from_numpy(np.concatenate([train, test]).astype(np.float32) / 255)
    widths = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
    return _autoencoding("mnist", images, len(train), widths)


def faces(data: Path, copies: int = 414) -> Problem:
    """25x25 patches of the Olivetti faces from `data`; 625-2000-1000-500-30 and back.

    The first 25 of the 40 people to train and the last 10 to test: 103,500 + 41,400 patches, as in
    Martens (2010). Outputs are linear and the loss is half the squared error. Patches are those of
    the augmented file if it is there; else `copies` of each face are drawn by `face_patches`.
    """
    patches = faces_patches(data)
    if patches is None:
        patches = face_patches(torch.from_numpy(olivetti_images(data).copy()), copies).numpy()
    # One shift a pixel and one scale for all: zero means and a mean variance of 1.
    patches = torch.from_numpy(patches - patches.mean(axis=0))
    patches /= patches.square().mean().sqrt()
    person = len(patches) // 40
    train, test = patches[: 25 * person], patches[-10 * person :]
    widths = (625, 2000, 1000, 500, 30, 500, 1000, 2000, 625)
    return Problem(
        name="faces",
        train=Examples(train, train),
        test=Examples(test, test),
        build=lambda seed: autoencoder(widths, seed),
        loss=half_squared_error,
        error=linear_squared_error,
        error_name="squared error (sum over pixels, mean over images)",
        likelihood=Gaussian(reduction="batchmean"),
    )


def face_patches(images: Tensor, copies: int, seed: int = 0) -> Tensor:
    """`copies` of each (64, 64) image, turned by -90 to 90 degrees and shrunk: (n copies, 625).

    After the supplement of Hinton & Salakhutdinov (2006). A pixel of a patch spans 1.4 to 1.8 of
    the image's; so the patch, about the image's center, is within it however it is turned.
    """
    generator = torch.Generator().manual_seed(seed)
    patches = []
    for image in images:
        angle = math.pi * (torch.rand(copies, generator=generator) - 0.5)
        scale = (1.4 + 0.4 * torch.rand(copies, generator=generator)) * 25 / images.shape[-1]
        cos, sin, zero = scale * angle.cos(), scale * angle.sin(), torch.zeros(copies)
        turns = torch.stack([cos, -sin, zero, sin, cos, zero], dim=1).view(copies, 2, 3)
        grid = F.affine_grid(turns, [copies, 1, 25, 25], align_corners=False)
        turned = F.grid_sample(image.expand(copies, 1, -1, -1), grid, align_corners=False)
        patches.append(turned.view(copies, 625))
    return torch.cat(patches)


def cifar(data: Path) -> Problem:
    """The 50,000 + 10,000 images of CIFAR-10 from `data`; 8 hidden layers of 100.

    Pixels are in [0, 1]. Units are tanh, where George (2017) has rectifiers.
    """
    batches = cifar_batches(data)
    images = torch.from_numpy(np.concatenate([rows for rows, _ in batches])).float() / 255
    classes = torch.from_numpy(np.concatenate([labels for _, labels in batches]))
    examples, tested = Examples(images, classes), len(batches[-1][1])
    return _classifying("cifar", examples.take(slice(-tested)), examples.take(slice(-tested, None)))


def _classifying(
    name: str,
    train: Examples,
    test: Examples,
    width: int = 100,
    error: Callable[[Tensor, Tensor], Tensor] = error_rate,
    error_name: str = "error rate (%)",
) -> Problem:
    widths = (train.inputs.shape[1], *[width] * 8, 10)
    return Problem(
        name=name,
        train=train,
        test=test,
        build=lambda seed: classifier(widths, seed),
        loss=F.cross_entropy,
        error=error,
        error_name=error_name,
        likelihood=Categorical(),
    )


def _autoencoding(name: str, images: Tensor, train_count: int, widths: Sequence[int]) -> Problem:
    train, test = images[:train_count], images[train_count:]
    return Problem(
        name=name,
        train=Examples(train, train),
        test=Examples(test, test),
        build=lambda seed: autoencoder(widths, seed),
        loss=cross_entropy,
        error=squared_error,
        error_name="squared error (sum over pixels, mean over images)",
        likelihood=Bernoulli(reduction="batchmean"),
    )


PROBLEMS: dict[str, Callable[[Path], Problem]] = {
    "curves": curves,
    "digits": digits,
    "digits_classifier": digits_classifier,
    "mnist": mnist,
    "faces": faces,
    "cifar": cifar,
}
