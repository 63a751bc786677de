"""What is trained: data, a model, a loss to minimize and an error to report.

Both problems are deep autoencoders after Hinton & Salakhutdinov (2006), whose targets are their
inputs. `curves` is drawn from a formula and `digits` ships with scikit-learn: nothing to download.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 28
"""Height and width of a `curves` image, in pixels."""


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
    over examples, and `error_name` says in which units the error is.
    """

    name: str
    train: Examples
    test: Examples
    build: Callable[[int], nn.Module]
    loss: Callable[[Tensor, Tensor], Tensor]
    error: Callable[[Tensor, Tensor], Tensor]
    error_name: str


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


def curves() -> Problem:
    """20,000 + 10,000 synthetic curves, 784-400-200-100-50-25-6 and back."""
    chunks = [curve_images(2000, seed) for seed in range(15)]  # a whole set at once takes GBs
    images = torch.from_numpy(np.concatenate(chunks))
    return _autoencoding(
        "curves", images, 20_000, (784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784)
    )


def digits() -> Problem:
    """scikit-learn's 1,797 scanned 8x8 digits, shuffled, 1,500 to train; 64-128-64-32-10 and back.

    The rows are shuffled because the file's last ones were written by other people.
    """
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().data / 16).float()
    order = np.random.default_rng(0).permutation(len(images))
    return _autoencoding(
        "digits", images[torch.from_numpy(order)], 1500, (64, 128, 64, 32, 10, 32, 64, 128, 64)
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
    )


PROBLEMS: dict[str, Callable[[], Problem]] = {"curves": curves, "digits": digits}
