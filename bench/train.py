"""Train optimizers side by side under one budget; leave a table, a JSON file and a figure.

    python -m bench.train --problem curves --optimizers sgd,adam,acp --seconds 60

Every method starts from the same parameters and sees the same batches for the same seed, has its
iterates averaged the same way, and is judged by the averaged parameters. Evaluating does not
count as training time. Baselines have their hyperparameters tuned by biased random search, each
setting by a shorter run on a seed of its own. Seeds are the outer loop, so that noise on the
machine meets every method alike.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import torch
from torch import nn
from tqdm import tqdm

from bench.arguments import positive
from bench.batch_sizes import BatchSizes, batch_size
from bench.environment import environment
from bench.methods import METHODS
from bench.problems import PROBLEMS, Problem, default_data
from bench.report import table, write
from bench.search import at_edge
from bench.training import EVALUATIONS, Budget, Run, evaluation_seconds, search, train
from fused_so.likelihoods import Bernoulli


def _optimizer(name: str) -> str:
    if name not in METHODS:
        raise argparse.ArgumentTypeError(
            f"unknown optimizer {name!r} (choose from {', '.join(METHODS)})"
        )
    return name


def _optimizers(text: str) -> list[str]:
    return list(dict.fromkeys(_optimizer(name.strip()) for name in text.split(",")))


def _rate(text: str) -> tuple[str, float]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be OPTIMIZER=RATE, got {text!r}")
    return _optimizer(name), positive(float)(value)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--problem", required=True, choices=PROBLEMS)
    add(
        "--optimizers",
        required=True,
        type=_optimizers,
        metavar="NAME,...",
        help=f"any of {', '.join(METHODS)}",
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--seconds", type=positive(float), default=60.0, help="training time a run (default: 60)"
    )
    length.add_argument(
        "--updates", type=positive(int), help="updates a run, for results that need no clock"
    )
    add("--seeds", type=positive(int), default=3, help="runs an optimizer (default: 3)")
    add(
        "--batch-size",
        type=batch_size,
        default=256,
        metavar="N|FIRST:LAST:UPDATES",
        help="for all methods; growing exponentially within so many updates (default: 256)",
    )
    add(
        "--search-seconds",
        type=positive(float),
        help="training time a trial of a search (default: a quarter of a run)",
    )
    add("--trials", type=positive(int), default=8, help="settings a search tries (default: 8)")
    add(
        "--tune",
        choices=("baselines", "all"),
        default="baselines",
        help="whose hyperparameters to search (default: baselines; the others use their defaults)",
    )
    add(
        "--lr",
        type=_rate,
        action="append",
        default=[],
        metavar="OPTIMIZER=RATE",
        help="fix a learning rate instead of searching it; may be repeated",
    )
    add(
        "--data",
        type=Path,
        default=default_data(),
        metavar="DIR",
        help="where files of mnist, faces, cifar are, and curves are kept (default: %(default)s)",
    )
    add("--threads", type=positive(int), help="torch.set_num_threads (default: torch's own)")
    add("--out", type=Path, default=Path("results"), help="folder for the files (default: results)")
    return parser


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Refuse what only shows when arguments are put together, before anything is trained."""
    if arguments.updates and arguments.search_seconds:
        parser.error("argument --search-seconds: not allowed with argument --updates")
    for name in dict(arguments.lr):
        if name not in arguments.optimizers:
            parser.error(f"argument --lr: {name!r} is not among --optimizers")
    given = {*dict(arguments.lr), *_to_search(arguments)}
    for name in arguments.optimizers:
        try:
            METHODS[name].build(
                nn.Linear(1, 1), Bernoulli(), **({"lr": 1.0} if name in given else {})
            )
        except (ImportError, AttributeError, TypeError) as error:
            parser.error(f"argument --optimizers: {name!r} cannot be used here: {error}")
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")


def _to_search(arguments: argparse.Namespace) -> list[str]:
    """The optimizers whose hyperparameters are neither given nor left at their defaults."""
    return [
        name
        for name in arguments.optimizers
        if name not in dict(arguments.lr) and (METHODS[name].searched or arguments.tune == "all")
    ]


def _budgets(arguments: argparse.Namespace) -> tuple[Budget, Budget]:
    """What a run and what a trial of a search may spend."""
    if arguments.updates:
        return (
            Budget(arguments.updates, "updates"),
            Budget(math.ceil(arguments.updates / 4), "updates"),
        )
    return (
        Budget(arguments.seconds, "seconds"),
        Budget(arguments.search_seconds or arguments.seconds / 4, "seconds"),
    )


def _announce(
    problem: Problem, runs: int, budget: Budget, trials: int, trial: Budget, load: float | None
) -> None:
    """Say how long everything will take: budgets, and evaluations as one timed here takes."""
    plan = f"{problem.name}: {trials} search runs of {trial} and {runs} runs of {budget}"
    if budget.unit == "seconds":
        evaluation = evaluation_seconds(problem)
        total = trials * (trial.amount + 2 * evaluation)
        total += runs * (budget.amount + (EVALUATIONS + 1) * evaluation)
        plan += f", about {total / 60:.1f} minutes in all"
    print(plan, file=sys.stderr)
    if load is not None and load > 0.5:
        print(
            f"the load average is {load:.1f}: seconds mislead if that is other work",
            file=sys.stderr,
        )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _report_search(optimizer: str, tried: Sequence[Mapping[str, Any]], trial: Budget) -> None:
    """Print what a search found, and whether a wider one might have found better."""
    listed = ", ".join(
        " ".join(
            f"{'error' if key == 'train_error' else key} {_short(value)}"
            for key, value in one.items()
        )
        for one in tried
    )
    print(f"{optimizer}, after {trial}: {listed}")
    for name, distribution in METHODS[optimizer].space.items():
        if at_edge(distribution, tried[0][name]):
            print(f"{optimizer}: the best {name}, {tried[0][name]:g}, is at the edge of the search")


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    _check(parser, arguments)
    try:
        problem = PROBLEMS[arguments.problem](arguments.data)
    except (OSError, ValueError) as error:
        parser.error(f"argument --data: {error}")
    if BatchSizes.parse(arguments.batch_size).last > len(problem.train):
        parser.error(
            f"argument --batch-size: {problem.name} has only {len(problem.train)} training examples"
        )
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # or it reports Ctrl-C as a failure

    budget, trial = _budgets(arguments)
    rates = dict(arguments.lr)
    chosen = {name: {"lr": rates[name]} if name in rates else {} for name in arguments.optimizers}
    to_search = _to_search(arguments)
    machine = environment()
    count = arguments.seeds * len(arguments.optimizers)
    trials = arguments.trials * len(to_search)
    _announce(problem, count, budget, trials, trial, machine["load_average"])

    searches: dict[str, list[dict[str, Any]]] = {}
    runs: list[Run] = []
    interrupted = False
    total = count * budget.amount + trials * trial.amount
    with tqdm(total=total, bar_format="{l_bar}{bar}| {elapsed}<{remaining}") as bar:

        def advance(amount: float, run: Run) -> None:
            bar.set_description(
                f"{run.optimizer} seed {run.seed}, error {run.final('train_error'):.3g}",
                refresh=False,
            )
            bar.update(min(amount, total - bar.n))  # the last update may overspend a little

        try:
            for name in to_search:
                searches[name] = search(
                    name, problem, trial, arguments.batch_size, arguments.trials, advance
                )
                chosen[name] = {
                    key: value for key, value in searches[name][0].items() if key != "train_error"
                }
            for seed in range(arguments.seeds):
                for name in arguments.optimizers:
                    runs.append(Run(name, seed, chosen[name]))
                    train(runs[-1], problem, budget, arguments.batch_size, advance=advance)
        except KeyboardInterrupt:
            interrupted = True

    for name, tried in searches.items():
        _report_search(name, tried, trial)
    runs = [run for run in runs if run.curve["seconds"]]
    if interrupted:
        print("interrupted: the last run is shorter than asked, and others may be missing")
    if not runs:
        print("no run was measured: nothing is written")
    else:
        print(table(runs))
        write(arguments.out, problem, vars(arguments), machine, searches, runs, interrupted)
        print(f"wrote {arguments.out / problem.name}.json and .png")
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
