"""What is trained: data, a model, a loss to minimize and an error to report.

Deep autoencoders after Hinton & Salakhutdinov (2006), whose targets are their inputs, and one deep
classifier. `curves` is drawn from a formula and `digits` ships with scikit-learn: nothing to
download. `mnist` reads its standard files.
"""

from __future__ import annotations

import gzip
import itertools
import math
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fused_so.likelihoods import Bernoulli, Categorical, Likelihood

SIDE = 28
"""Height and width of a `curves` image, in pixels."""

MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


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
    as its value; optimizers that need the curvature at the outputs are given it.
    """

    name: str
    train: Examples
    test: Examples
    build: Callable[[int], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    error: Callable[[Tensor, Tensor], Tensor]
    error_name: str
    likelihood: Likelihood


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy in nats, summed over pixels and averaged over images."""
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / len(targets)


def squared_error(logits: Tensor, targets: Tensor) -> Tensor:
    """Squared reconstruction error, summed over pixels and averaged over images."""
    return (torch.sigmoid(logits) - targets).square().sum(dim=1).mean()


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


def digits(data: Path) -> Problem:
    """scikit-learn's 1,797 scanned 8x8 digits, shuffled, 1,500 to train; 64-128-64-32-10 and back.

    The rows are shuffled because the file's last ones were written by other people.
    """
    images, _ = _shuffled_digits()
    return _autoencoding("digits", images, 1500, (64, 128, 64, 32, 10, 32, 64, 128, 64))


def digits_classifier(data: Path) -> Problem:
    """The classes of the same digits: eight tanh layers of 30, the depth of George 2017, 4.1.2."""
    images, labels = _shuffled_digits()
    return Problem(
        name="digits_classifier",
        train=Examples(images[:1500], labels[:1500]),
        test=Examples(images[1500:], labels[1500:]),
        build=lambda seed: classifier((64, *[30] * 8, 10), seed),
        loss=F.cross_entropy,
        error=F.cross_entropy,
        error_name="cross-entropy (nats, mean over images)",
        likelihood=Categorical(),
    )


def classifier(widths: Sequence[int], seed: int) -> nn.Sequential:
    """Tanh layers of the given widths but for the last, which has the logits; Glorot's weights."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential()
    for fan_in, fan_out in itertools.pairwise(widths):
        linear = nn.utils.skip_init(nn.Linear, fan_in, fan_out)
        nn.init.xavier_uniform_(linear.weight, generator=generator)
        nn.init.zeros_(linear.bias)
        model.extend([linear, nn.Tanh()])
    return model[:-1]


def _shuffled_digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(digits.data)))
    return torch.from_numpy(digits.data / 16).float()[order], torch.from_numpy(digits.target)[order]


def mnist(data: Path) -> Problem:
    """The 60,000 + 10,000 images of MNIST from `data`; 784-1000-500-250-30 and back.

    Raises:
        FileNotFoundError: naming the four files, gzipped or not, and those that are not there.
        ValueError: a file is not what its name says.
    """
    found = {}
    for name in MNIST_FILES:
        candidates = (data / name, data / f"{name}.gz")
        found[name] = next((file for file in candidates if file.is_file()), None)
    missing = [name for name, file in found.items() if file is None]
    if missing:
        raise FileNotFoundError(
            f"mnist needs the four files {', '.join(MNIST_FILES)} (or each with .gz) in {data}; "
            f"not there: {', '.join(missing)}"
        )
    train, test = (idx_images(found[name]) for name in (MNIST_FILES[0], MNIST_FILES[2]))
    images = torch.from_numpy(np.concatenate([train, test]).astype(np.float32) / 255)
    widths = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
    return _autoencoding("mnist", images, len(train), widths)


def idx_images(file: Path) -> np.ndarray:
    """The images of an IDX file, as rows of bytes."""
    content = (gzip.open if file.suffix == ".gz" else open)(file, "rb").read()
    magic, count, height, width = struct.unpack(">4I", content[:16].ljust(16, b"\0"))
    whole = len(content) == 16 + count * height * width
    if magic != 0x803 or (height, width) != (SIDE, SIDE) or not whole:
        raise ValueError(f"{file} must be an IDX file of {SIDE} x {SIDE} images, but it is not")
    return np.frombuffer(content, np.uint8, offset=16).reshape(count, height * width)


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
}
