"""How much does the order of the data decide the trained model? After Pascanu and Bengio 2014.

    python -m bench.order --out bench/results

Section 6 and figure 3, small. One pass over a stream of drawn digits; its first half is cut into
10 equal segments. For each segment, and over 5 runs, that segment alone is replaced by other
examples; the rest of the stream and the initial parameters stay. What is measured is the variance,
over the 5 runs, of the trained model's outputs (class probabilities) on held-out digits, summed
over classes and averaged over digits. The stream of deformed digits of the paper is replaced by
scikit-learn's, moved by up to one pixel and with noise of standard deviation 0.1: 40 batches of 128
examples a half, none of them seen twice. As in the paper, the methods are compared where they have
learned equally well: each method has the step size whose error on held-out digits, without any
replacement, is nearest to SGD's with its best one; errors are in the file. All of it is repeated on
several seeds. The file is written after every seed of a method; the same command goes on from
there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import fused_so
from bench.arguments import positive
from bench.environment import environment
from bench.report import earlier, write_whole

SEGMENTS, REPLACEMENTS, BATCH, HELD_OUT = 10, 5, 128, 500
BATCHES = 40
"""In each half of the stream."""
RATES = tuple(float(f"{10.0**power:.2g}") for power in np.arange(-3.0, 0.6, 0.25))


def _sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr)


def _natural(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return fused_so.NaturalGradient(model, lr=lr, likelihood=fused_so.Categorical(), damping=0.1)


METHODS: dict[str, Callable[[nn.Module, float], torch.optim.Optimizer]] = {
    "SGD": _sgd,
    "natural gradient": _natural,
}


class Digits:
    """Held-out digits, and a stream of new examples made of the others."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = np.random.default_rng(0).permutation(len(digits.target))
        images = torch.from_numpy(digits.images[order] / 16).float()
        labels = torch.from_numpy(digits.target[order])
        self.held_out = images[:HELD_OUT].flatten(1), labels[:HELD_OUT]
        self.images, self.labels = F.pad(images[HELD_OUT:], (1, 1, 1, 1)), labels[HELD_OUT:]

    def examples(self, count: int, seed: Sequence[int]) -> tuple[Tensor, Tensor]:
        """`count` digits drawn, moved by at most a pixel each way, with noise: inputs, labels."""
        rng = np.random.default_rng(seed)
        rows = torch.from_numpy(rng.integers(len(self.labels), size=count))
        down, right = (torch.from_numpy(rng.integers(3, size=count))[:, None] for _ in range(2))
        window = torch.arange(8)
        moved = self.images[
            rows[:, None, None], (down + window)[:, :, None], (right + window)[:, None, :]
        ]
        noise = torch.from_numpy(rng.normal(scale=0.1, size=(count, 64))).float()
        return moved.flatten(1) + noise, self.labels[rows]


def stream(
    data: Digits, seed: int, replaced: int | None, replacement: int
) -> tuple[Tensor, Tensor]:
    """Both halves, with segment `replaced` of the first half drawn anew (None: as it is)."""
    count = BATCHES * BATCH // SEGMENTS
    parts = [
        data.examples(count, (seed, segment, replacement + 1 if segment == replaced else 0))
        for segment in range(SEGMENTS)
    ]
    parts.append(data.examples(BATCHES * BATCH, (seed, SEGMENTS, 0)))
    inputs, labels = zip(*parts, strict=True)
    return torch.cat(inputs), torch.cat(labels)


def train(
    method: str, lr: float, data: Digits, seed: int, replaced: int | None = None, run: int = 0
) -> tuple[Tensor, float]:
    """One pass over the stream: probabilities of the held-out digits, and their share misjudged."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    optimizer = METHODS[method](model, lr)
    inputs, labels = stream(data, seed, replaced, run)
    for x, y in zip(inputs.split(BATCH), labels.split(BATCH), strict=True):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        x, y = data.held_out
        outputs = model(x).softmax(1)
    return outputs, (outputs.argmax(1) != y).float().mean().item()


def chosen_rates(data: Digits, seed: int, advance: Callable[[], object]) -> dict[str, float]:
    """SGD's best step size, and the others' whose error is nearest to what it gives."""
    errors: dict[str, dict[float, float]] = {}
    for method in METHODS:
        errors[method] = {}
        for lr in RATES:
            errors[method][lr] = train(method, lr, data, seed)[1]
            advance()
    best = min(errors["SGD"].values())
    return {
        method: min(found, key=lambda lr, found=found: abs(found[lr] - best))
        for method, found in errors.items()
    }


def variances(
    method: str, lr: float, data: Digits, seed: int, advance: Callable[[], object]
) -> list[float]:
    """For each segment the variance of the outputs, summed over classes, averaged over digits."""
    found = []
    for segment in range(SEGMENTS):
        outputs = []
        for run in range(REPLACEMENTS):
            outputs.append(train(method, lr, data, seed, segment, run)[0])
            advance()
        found.append(torch.stack(outputs).var(dim=0).sum(1).mean().item())
    return found


def experiment() -> dict[str, Any]:
    """What one file's results have in common."""
    return {
        "segments": SEGMENTS,
        "replacements": REPLACEMENTS,
        "batches": BATCHES,
        "batch": BATCH,
        "held_out": HELD_OUT,
        "rates": list(RATES),
    }


def finished(file: Path) -> dict[str, Any]:
    """The results that an earlier call of the same experiment left in the file."""
    return earlier(file, experiment()).get("results", {})


def figure(results: dict[str, Any]) -> Figure:
    """The variance by segment: the seeds' median and range."""
    drawing = Figure(figsize=(6, 4), dpi=150, layout="constrained")
    panel = drawing.subplots()
    for method, result in results.items():
        values = np.array([seed["variance"] for seed in result["seeds"]])
        error = statistics.median(seed["error"] for seed in result["seeds"])
        segments = np.arange(1, SEGMENTS + 1)
        label = f"{method}, lr {result['lr']:g}, error {error:.1%}"
        (line,) = panel.plot(segments, np.median(values, axis=0), marker="o", label=label)
        panel.fill_between(
            segments, values.min(0), values.max(0), color=line.get_color(), alpha=0.2, linewidth=0
        )
    panel.set(
        yscale="log",
        xlabel="tenth of the first half that was replaced",
        ylabel="variance of the outputs",
    )
    panel.legend(frameon=False)
    panel.grid(which="both", alpha=0.25, linewidth=0.5)
    return drawing


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.order",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=positive(int), default=3, help="(default: 3)")
    parser.add_argument("--out", type=Path, default=Path("results"), help="(default: results)")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    file, data = options.out / "order.json", Digits()
    results = finished(file)
    runs = 1 + SEGMENTS * REPLACEMENTS
    with tqdm(total=len(METHODS) * (len(RATES) + options.seeds * runs), unit="run") as bar:
        if results:
            bar.update(len(METHODS) * len(RATES))
        else:
            rates = chosen_rates(data, 1000, bar.update)
            results = {method: {"lr": rates[method], "seeds": []} for method in METHODS}
        for seed in range(options.seeds):
            for method, result in results.items():
                if seed < len(result["seeds"]):
                    bar.update(runs)
                    continue
                error = train(method, result["lr"], data, seed)[1]
                bar.update()
                found = variances(method, result["lr"], data, seed, bar.update)
                result["seeds"].append({"error": error, "variance": found})
                document = {"machine": environment(), **experiment(), "results": results}
                write_whole(file, json.dumps(document, indent=1) + "\n")
    figure(results).savefig(options.out / "order.png")
    for method, result in results.items():
        values = np.median([seed["variance"] for seed in result["seeds"]], axis=0)
        print(f"{method}, lr {result['lr']:g}: " + ", ".join(f"{value:.2e}" for value in values))
    return 0


if __name__ == "__main__":
    sys.exit(main())
