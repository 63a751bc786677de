"""Grid, random and biased random search compared: the experiment of George 2017, table 4.I.

    python -m bench.search_experiment --out bench/results

100 searches by each of the three procedures, each of 100 experiments, each one a training of 100
updates by SGD from new initial parameters on new batches, in which two hyperparameters are tuned:
the learning rate and the standard deviation of the initial weights. The thesis trained its MNIST
autoencoder; this is one of scikit-learn's 1,797 digits, 64-32-16-8-16-32-64 with tanh layers and
logistic outputs, batch 64, small enough for 30,000 trainings. An experiment's result is the squared
reconstruction error over all digits after its last update, a search's result the best of its
experiments. As the smallest of 100 noisy results looks better than it is, each search's best
setting is also trained 20 times anew.

Experiment i of several searches is one batched training. Finished pieces are in the JSON file; the
same command goes on from there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from matplotlib.figure import Figure
from optuna.distributions import FloatDistribution
from torch import Tensor
from tqdm import tqdm

from bench.arguments import positive
from bench.environment import environment
from bench.report import earlier, write_whole
from bench.search import BiasedRandomSampler

WIDTHS = (64, 32, 16, 8, 16, 32, 64)
BATCH, UPDATES, EXPERIMENTS, TOGETHER, RETRAININGS = 64, 100, 100, 20, 20
SPACE = {
    "lr": FloatDistribution(1e-3, 10.0, log=True),
    "initial_std": FloatDistribution(1e-2, 10.0, log=True),
}
THESIS = {"grid": (27.23, 0.42), "random": (27.02, 0.28), "biased": (26.61, 0.13)}


def digits() -> Tensor:
    from sklearn.datasets import load_digits

    return torch.from_numpy(load_digits().data / 16).float()


def study_of(procedure: str, seed: int) -> optuna.Study:
    """An empty search; a grid takes equal steps from end to end of each range, and is queued."""
    sampler = BiasedRandomSampler if procedure == "biased" else optuna.samplers.RandomSampler
    study = optuna.create_study(sampler=sampler(seed))
    if procedure == "grid":
        side = math.isqrt(EXPERIMENTS)
        axes = [np.geomspace(one.low, one.high, side).tolist() for one in SPACE.values()]
        for point in itertools.product(*axes):
            study.enqueue_trial(dict(zip(SPACE, point, strict=True)))
    return study


def train(images: Tensor, rates: Tensor, stds: Tensor, generator: torch.Generator) -> Tensor:
    """Train one autoencoder for each of `rates` and `stds` (k,); the final errors (k,).

    The error is squared, summed over pixels and averaged over images; inf where it diverged.
    """
    k = len(rates)
    weights, biases = [], []
    for fan_in, fan_out in itertools.pairwise(WIDTHS):
        weight = torch.randn(k, fan_in, fan_out, generator=generator) * stds[:, None, None]
        weights.append(weight.requires_grad_())
        biases.append(torch.zeros(k, 1, fan_out, requires_grad=True))
    params = [*weights, *biases]

    def errors(batch: Tensor) -> Tensor:
        h = batch
        for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True), start=1):
            h = torch.baddbmm(bias, h, weight)
            h = h.tanh() if layer < len(weights) else h.sigmoid()
        return (h - batch).square().sum(2).mean(1)

    for _ in range(UPDATES):
        rows = torch.randint(len(images), (k, BATCH), generator=generator)
        gradients = torch.autograd.grad(errors(images[rows]).sum(), params)
        with torch.no_grad():
            for p, g in zip(params, gradients, strict=True):
                p -= rates[:, None, None] * g
    with torch.no_grad():
        final = errors(images.expand(k, -1, -1))
    return final.where(final.isfinite(), torch.inf)


def searches(procedure: str, first: int, count: int, images: Tensor, advance: Any) -> list[dict]:
    """Run searches `first`, `first` + 1, ... of one procedure, experiment by experiment."""
    studies = [study_of(procedure, seed) for seed in range(first, first + count)]
    generator = torch.Generator().manual_seed(first)
    for _ in range(EXPERIMENTS):
        trials = [study.ask(SPACE) for study in studies]
        rates, stds = (torch.tensor([trial.params[name] for trial in trials]) for name in SPACE)
        results = train(images, rates, stds, generator).tolist()
        for study, trial, result in zip(studies, trials, results, strict=True):
            study.tell(trial, result)
        advance(count)
    found = []
    for seed, study in enumerate(studies, start=first):
        best = {name: torch.tensor(study.best_params[name]) for name in SPACE}
        again = train(
            images,
            best["lr"].expand(RETRAININGS),
            best["initial_std"].expand(RETRAININGS),
            generator,
        )
        found.append(
            {
                "procedure": procedure,
                "seed": seed,
                "best": study.best_value,
                "best_setting": study.best_params,
                "again": again.mean().item(),
                # One search of each procedure is drawn.
                "experiments": [
                    [*trial.params.values(), trial.value] for trial in study.trials if seed == 0
                ],
            }
        )
    return found


def summary(found: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over searches: of the best result, and of training it anew."""
    table = {}
    for procedure in THESIS:
        own = [one for one in found if one["procedure"] == procedure]
        if len(own) > 1:
            table[procedure] = {
                f"{statistic.__name__}_{key}": statistic(one[key] for one in own)
                for key in ("best", "again")
                for statistic in (statistics.mean, statistics.stdev)
            }
    return table


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """The summary as Markdown, beside the thesis."""
    lines = ["| search | best result | trained anew | thesis |", "|---|---|---|---|"]
    for name, row in rows.items():
        mean, std = THESIS[name]
        lines.append(
            f"| {name} | {row['mean_best']:.3f} ({row['stdev_best']:.3f}) "
            f"| {row['mean_again']:.3f} ({row['stdev_again']:.3f}) | {mean} ({std}) |"
        )
    return "\n".join(lines)


def figure(found: Sequence[Mapping[str, Any]]) -> Figure:
    """One search of each procedure: where its experiments lie, and what came out."""
    drawing = Figure(figsize=(10, 3.6), dpi=150, layout="constrained")
    panels = drawing.subplots(1, len(THESIS), sharex=True, sharey=True)
    shown = {one["procedure"]: one["experiments"] for one in found if one["experiments"]}
    finite = [row[2] for rows in shown.values() for row in rows if math.isfinite(row[2])]
    low, high = min(finite), float(np.quantile(finite, 0.9))
    for panel, (procedure, rows) in zip(panels, shown.items(), strict=False):
        rates, stds, results = np.array(rows).T
        points = panel.scatter(
            rates, stds, c=np.minimum(results, high), s=22, cmap="viridis", vmin=low, vmax=high
        )
        panel.set(title=procedure, xscale="log", yscale="log", xlabel="learning rate")
    panels[0].set_ylabel("std of initial weights")
    drawing.colorbar(points, ax=panels, label="final squared error", extend="max")
    return drawing


def experiment() -> dict[str, Any]:
    """What decides the results, as their file says it."""
    return {
        "problem": "digits, autoencoder " + "-".join(map(str, WIDTHS)),
        "batch_size": BATCH,
        "updates": UPDATES,
        "experiments": EXPERIMENTS,
        "space": {name: [one.low, one.high] for name, one in SPACE.items()},
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.search_experiment",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--searches", type=positive(int), default=100, help="by each procedure (default: 100)"
    )
    parser.add_argument("--out", type=Path, default=Path("results"), help="(default: results)")
    options = parser.parse_args(argv)
    if options.searches < 2:
        parser.error("argument --searches: must be at least 2, or there is no deviation")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "search.json"
    found = earlier(file, experiment()).get("searches", [])

    done = {(one["procedure"], one["seed"]) for one in found}
    missing = [
        (procedure, first, min(TOGETHER, options.searches - first))
        for first in range(0, options.searches, TOGETHER)
        for procedure in THESIS
        if (procedure, min(first + TOGETHER, options.searches) - 1) not in done
    ]
    images = digits()
    with tqdm(total=EXPERIMENTS * sum(count for *_, count in missing), unit="run") as bar:
        for procedure, first, count in missing:
            kept = [
                one
                for one in found
                if (one["procedure"], one["seed"] // TOGETHER * TOGETHER) != (procedure, first)
            ]
            found = kept + searches(procedure, first, count, images, bar.update)
            document = {
                **experiment(),
                "thesis": THESIS,
                "summary": summary(found),
                "searches": found,
                "machine": environment(),
            }
            write_whole(file, json.dumps(document, indent=1) + "\n")
    figure(found).savefig(options.out / "search.png")
    print(table(summary(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
