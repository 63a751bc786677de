"""Whose inputs should the metric of natural gradient be of? After the restricted MNIST experiment.

    python -m bench.metric_inputs --seeds 20

Few labeled digits (300 of scikit-learn's 1,797), a tanh network 64-100-10, and natural gradient
whose metric is that of the gradient's own batch, of another batch of the labeled digits, or of
unlabeled ones (Pascanu and Bengio 2014, section 5 and 8.5), beside TONGA and SGD. These three take
equally many inputs, 100; a fourth takes all 900 unlabeled ones. Every method has its settings
searched by the error on 200 validation digits, on seeds of its own; a seed draws the split, the
initial parameters and the batches. What is reported is the last step, on 397 test digits.

The file is written after every method; a run that was stopped goes on with the next one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import fused_so
from bench.environment import environment
from bench.problems import Examples
from bench.training import batches

LABELED, VALIDATION, TEST, BATCH, HIDDEN = 300, 200, 397, 100, 100
SEARCH_SEEDS = (1000, 1001, 1002)


@dataclass(frozen=True)
class Split:
    """Labeled, validation and test digits, and inputs without labels."""

    labeled: Examples
    validation: Examples
    test: Examples
    unlabeled: Tensor


def split(seed: int) -> Split:
    digits = load_digits()
    order = torch.randperm(len(digits.data), generator=torch.Generator().manual_seed(seed))
    inputs, labels = torch.from_numpy(digits.data / 16).float(), torch.from_numpy(digits.target)
    all_digits = Examples(inputs[order], labels[order])
    ends = list(itertools.accumulate((0, LABELED, VALIDATION, TEST)))
    parts = [all_digits.take(slice(a, b)) for a, b in itertools.pairwise(ends)]
    return Split(*parts, all_digits.inputs[ends[-1] :])


def _other_batches(data: Split, seed: int) -> Iterator[Tensor]:
    return (batch.inputs for batch in batches(data.labeled, BATCH, seed + 1_000_000))


def _unlabeled_batches(data: Split, seed: int, size: int = BATCH) -> Iterator[Tensor]:
    unlabeled = Examples(data.unlabeled, data.unlabeled)
    return (batch.inputs for batch in batches(unlabeled, size, seed + 2_000_000))


def _natural(
    inputs: Callable[[Split, int], Iterator[Tensor]] | None,
    model: nn.Module,
    data: Split,
    seed: int,
    **settings: float,
) -> torch.optim.Optimizer:
    return fused_so.NaturalGradient(
        model,
        likelihood=fused_so.Categorical(),
        metric_inputs=None if inputs is None else inputs(data, seed),
        warm_start=True,
        **settings,
    )


def _tonga(model: nn.Module, data: Split, seed: int, **settings: float) -> torch.optim.Optimizer:
    return fused_so.TONGA(model, relative_damping=0.0, momentum=0.0, nesterov=False, **settings)


def _sgd(model: nn.Module, data: Split, seed: int, **settings: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), momentum=0.9, **settings)


GRID = {"lr": (0.1, 0.3, 1.0), "damping": (0.01, 0.1, 1.0, 10.0)}
SAME = "metric of the same batch"
METHODS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, Sequence[float]]]] = {
    SAME: (partial(_natural, None), GRID),
    "metric of another batch": (partial(_natural, _other_batches), GRID),
    "metric of unlabeled inputs": (partial(_natural, _unlabeled_batches), GRID),
    "metric of all 900 unlabeled inputs": (
        partial(_natural, partial(_unlabeled_batches, size=900)),
        GRID,
    ),
    "covariance (TONGA)": (_tonga, GRID),
    "SGD with momentum": (_sgd, {"lr": (0.03, 0.1, 0.3, 1.0, 3.0)}),
}


def train(method: str, settings: dict[str, float], seed: int, updates: int) -> dict[str, float]:
    """Cross-entropy of the labeled digits, and the share of the others misclassified."""
    data = split(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 10))
    optimizer = METHODS[method][0](model, data, seed, **settings)
    stream = batches(data.labeled, BATCH, seed)
    for _ in range(updates):
        batch = next(stream)
        optimizer.zero_grad()
        F.cross_entropy(model(batch.inputs), batch.targets).backward()
        optimizer.step()
    with torch.no_grad():
        loss = F.cross_entropy(model(data.labeled.inputs), data.labeled.targets).item()
        wrong = {
            name: (model(part.inputs).argmax(1) != part.targets).float().mean().item()
            for name, part in (("validation", data.validation), ("test", data.test))
        }
    return {"train_loss": loss, **wrong}


def search(method: str, updates: int) -> list[dict[str, Any]]:
    """All settings with their mean validation error, best first; equal ones by training loss."""
    grid = METHODS[method][1]
    tried = []
    for values in itertools.product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        runs = [train(method, settings, seed, updates) for seed in SEARCH_SEEDS]
        mean = {key: statistics.mean(run[key] for run in runs) for key in runs[0]}
        tried.append({"settings": settings, **mean})
    return sorted(tried, key=lambda trial: (trial["validation"], trial["train_loss"]))


def table(results: dict[str, Any]) -> str:
    """Median [min, max] over seeds, as lines of Markdown.

    A seed has one split for all methods, so that differences between methods have less noise than
    the errors: their mean and its standard error.
    """
    lines = [
        "| method | settings | training loss | test error | less that of the same batch |",
        "|---|---|---|---|---|",
    ]
    for method, result in results.items():
        settings = ", ".join(f"{k} {v:g}" for k, v in result["settings"].items())
        loss = _spread([run["train_loss"] for run in result["runs"]], "{:.2g}")
        wrong = [100 * run["test"] for run in result["runs"]]
        cells = [method, settings, loss, _spread(wrong, "{:.1f}%"), "-"]
        if method != SAME and len(wrong) > 1:
            same = [100 * run["test"] for run in results[SAME]["runs"]]
            off = [a - b for a, b in zip(wrong, same, strict=True)]
            error = statistics.stdev(off) / len(off) ** 0.5
            cells[-1] = f"{statistics.mean(off):+.2f} +- {error:.2f}"
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(values: list[float], form: str) -> str:
    middle, low, high = (
        form.format(value) for value in (statistics.median(values), min(values), max(values))
    )
    return f"{middle} [{low}, {high}]"


def _same_experiment(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Of the same code on the same machine, so that one file may hold the methods of both."""
    keys = ("cpu", "threads", "torch", "fused_so", "commit", "uncommitted_changes")
    return one["arguments"] == other["arguments"] and all(
        one["machine"][key] == other["machine"][key] for key in keys
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.metric_inputs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seeds", type=int, default=20, help="runs a method (default: 20)")
    parser.add_argument("--updates", type=int, default=100, help="of a run (default: 100)")
    parser.add_argument("--out", type=Path, default=Path("results"), help="(default: results)")
    options = parser.parse_args(arguments)
    if min(options.seeds, options.updates) < 1:
        parser.error("--seeds and --updates must be at least 1")
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "metric_inputs.json"
    document = {
        "machine": environment(),
        "arguments": {"seeds": options.seeds, "updates": options.updates},
        "results": {},
    }
    if file.exists():
        before = json.loads(file.read_text())
        if _same_experiment(before, document):
            document = before
    results = document["results"]
    for place, method in enumerate(METHODS):
        if method not in results:
            tried = search(method, options.updates)
            best = tried[0]["settings"]
            runs = [train(method, best, seed, options.updates) for seed in range(options.seeds)]
            results[method] = {"settings": best, "runs": runs, "search": tried}
            file.write_text(json.dumps(document, indent=1) + "\n")
        print(table(results).splitlines()[2 + place], flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
