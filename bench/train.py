"""Train optimizers side by side under one budget; leave a table, a JSON file and a figure.

    python -m bench.train --problem curves --optimizers sgd,adam,acp --seconds 60

Every method starts from the same parameters and sees the same batches for the same seed, has its
iterates averaged the same way, and is judged by the averaged parameters. Evaluating does not
count as training time. Baselines have their learning rate searched, each candidate by a shorter
run on seed 0. Seeds are the outer loop, so that noise on the machine meets every method alike.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import optuna
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from bench.problems import PROBLEMS, Examples, Problem

AVERAGING_DECAY = 0.99
EVALUATIONS = 30
EVALUATED_ROWS = 5000
"""Training error is over the first 5,000 training examples; test error is over the whole set."""


@dataclass(frozen=True)
class Method:
    """How to build an optimizer, which values to search, and whether to search them unasked."""

    build: Callable[..., torch.optim.Optimizer]
    candidates: Mapping[str, Sequence[float]]
    searched: bool


def _sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, **options)


def _adam(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), **options)


def _fused_so(name: str) -> Callable[..., torch.optim.Optimizer]:
    def build(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
        import fused_so  # here, so that the baselines run without it

        return getattr(fused_so, name)(model, **options)

    return build


def _decades(first: float, last: float) -> tuple[float, ...]:
    """Two values a decade from 10^first to 10^last, to two digits."""
    return tuple(float(f"{10.0**power:.2g}") for power in np.arange(first, last + 0.1, 0.5))


METHODS: dict[str, Method] = {
    "sgd": Method(_sgd, {"lr": _decades(-3.5, -1)}, searched=True),
    "adam": Method(_adam, {"lr": _decades(-4, -1.5)}, searched=True),
    "cgd": Method(_fused_so("CGD"), {"lr": _decades(-3.5, -1)}, searched=False),
    "acp": Method(_fused_so("ACP"), {"lr": _decades(-2.5, 0)}, searched=False),
}


@dataclass(frozen=True)
class Budget:
    """How long to train: an amount of `seconds` (of training, not evaluating) or of `updates`."""

    amount: float
    unit: str

    def __str__(self) -> str:
        return f"{self.amount:g} {'s' if self.unit == 'seconds' else self.unit}"


@dataclass
class Run:
    """One optimizer trained once, and what was measured on the way, from before the first update.

    `curve` has equally long lists: seconds (of training), updates, train_error and test_error.
    """

    optimizer: str
    seed: int
    hyperparameters: dict[str, float]
    settings: dict[str, Any] = field(default_factory=dict)
    diverged: bool = False
    curve: dict[str, list[float]] = field(
        default_factory=lambda: {
            "seconds": [],
            "updates": [],
            "train_error": [],
            "test_error": [],
        }
    )

    def record(self, **values: float) -> None:
        for name, value in values.items():
            self.curve[name].append(value)
        if not math.isfinite(values["train_error"]):
            self.diverged = True

    def final(self, name: str) -> float:
        return self.curve[name][-1] if self.curve[name] else math.inf

    @property
    def updates_per_second(self) -> float:
        return self.final("updates") / max(self.final("seconds"), 1e-9)

    def first_below(self, error: float) -> tuple[float, float]:
        """Seconds and updates at the first evaluation with training error <= `error`, or inf."""
        for seconds, updates, reached in zip(
            self.curve["seconds"], self.curve["updates"], self.curve["train_error"], strict=True
        ):
            if reached <= error:
                return seconds, updates
        return math.inf, math.inf


def batches(examples: Examples, size: int, seed: int) -> Iterator[Examples]:
    """Endless batches of `size` distinct rows, reshuffled every epoch; the remainder is dropped."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(examples), generator=generator)
        for rows in order[: len(order) // size * size].split(size):
            yield examples.take(rows)


@torch.no_grad()
def evaluate(problem: Problem, model: nn.Module) -> dict[str, float]:
    """Training and test error, inf where they are not finite."""
    errors = {}
    model.eval()
    train = problem.train.take(slice(EVALUATED_ROWS))
    for name, examples in (("train_error", train), ("test_error", problem.test)):
        error = problem.error(model(examples.inputs), examples.targets).item()
        errors[name] = error if math.isfinite(error) else math.inf
    return errors


def train(
    run: Run,
    problem: Problem,
    budget: Budget,
    batch_size: int,
    *,
    evaluations: int = EVALUATIONS,
    advance: Callable[[float, Run], object] = lambda amount, run: None,
) -> None:
    """Train `run` until its budget is spent or it diverges, recording errors in it as it goes.

    Evaluations come more densely at the start, where curves bend most. `advance` is told of
    progress, in the budget's unit, outside the timed part.
    """
    torch.manual_seed(run.seed)  # for methods that sample
    model = problem.build(run.seed)
    # Copied before the optimizer can put hooks on the model.
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGING_DECAY))
    optimizer = METHODS[run.optimizer].build(model, **run.hyperparameters)
    run.settings = dict(optimizer.defaults)
    stream = batches(problem.train, batch_size, run.seed)
    spent = {"seconds": 0.0, "updates": 0}
    run.record(**spent, **evaluate(problem, average))

    for step in range(1, evaluations + 1):
        goal = budget.amount * (step / evaluations) ** 1.5
        while spent[budget.unit] < goal:
            before = spent[budget.unit]
            start = time.perf_counter()
            batch = next(stream)
            optimizer.zero_grad()
            loss = problem.loss(model(batch.inputs), batch.targets)
            loss.backward()
            optimizer.step()
            average.update_parameters(model)
            finite = math.isfinite(loss.item())
            spent["seconds"] += time.perf_counter() - start
            spent["updates"] += 1
            advance(spent[budget.unit] - before, run)
            if not finite:
                run.record(**spent, train_error=math.inf, test_error=math.inf)
                return
        if spent["updates"] > run.final("updates"):
            run.record(**spent, **evaluate(problem, average))
        if run.diverged:
            return


def search(
    optimizer: str,
    problem: Problem,
    budget: Budget,
    batch_size: int,
    advance: Callable[[float, Run], object],
) -> list[dict[str, float]]:
    """Train every candidate on seed 0; the final training errors, best first, inf if diverged."""
    candidates = METHODS[optimizer].candidates
    tried: list[dict[str, float]] = []

    def objective(trial: optuna.Trial) -> float:
        chosen = {
            name: trial.suggest_categorical(name, values) for name, values in candidates.items()
        }
        run = Run(optimizer, 0, chosen)
        train(run, problem, budget, batch_size, evaluations=1, advance=advance)
        tried.append({**chosen, "train_error": run.final("train_error")})
        return tried[-1]["train_error"]

    study = optuna.create_study(sampler=optuna.samplers.GridSampler(candidates, seed=0))
    study.optimize(objective, n_trials=_trials(optimizer))
    return sorted(tried, key=lambda trial: trial["train_error"])


def _trials(optimizer: str) -> int:
    return math.prod(len(values) for values in METHODS[optimizer].candidates.values())


def environment() -> dict[str, Any]:
    """The machine, the software and the moment, as far as they can be known."""
    fused_so = sys.modules.get("fused_so")
    changes = _git("status", "--porcelain")
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fused_so": getattr(fused_so, "__version__", None),
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _by_optimizer(runs: Sequence[Run]) -> dict[str, list[Run]]:
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run.optimizer, []).append(run)
    return grouped


def _spread(values: Sequence[float]) -> str:
    """The median, and [min, max] if there is more than one value; never where it is inf."""

    def show(value: float) -> str:
        return f"{value:.4g}" if math.isfinite(value) else "never"

    if len(values) == 1:
        return show(values[0])
    return f"{show(statistics.median(values))} [{show(min(values))}, {show(max(values))}]"


def table(runs: Sequence[Run]) -> str:
    """Median [min, max] over seeds of every optimizer's final figures, as aligned text.

    The last two columns, if SGD ran, are the training seconds and updates at the first
    evaluation at which a run was as good as the best of SGD's final training errors.
    """
    grouped = _by_optimizer(runs)
    header = ["optimizer", "lr", "updates", "updates/s", "train error", "test error"]
    if "sgd" in grouped:
        target = min(run.final("train_error") for run in grouped["sgd"])
        header += [f"s to SGD's {target:.4g}", "updates to it"]
    rows = [header]
    for name, group in grouped.items():
        row = [name, _learning_rate(group[0])]
        row.append(_spread([run.final("updates") for run in group]))
        row.append(_spread([run.updates_per_second for run in group]))
        for error in ("train_error", "test_error"):
            row.append(_spread([run.final(error) for run in group]).replace("never", "diverged"))
        if "sgd" in grouped:
            reached = [run.first_below(target) for run in group]
            row += [_spread(column) for column in zip(*reached, strict=True)]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _learning_rate(run: Run) -> str:
    rate = run.settings.get("lr")
    return f"{rate:g}" if isinstance(rate, (int, float)) else "-"


def figure(
    problem: Problem, runs: Sequence[Run], batch_size: int, machine: Mapping[str, Any]
) -> Figure:
    """Training error against seconds and against updates: the seeds' median, and their range."""
    drawing = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    panels = drawing.subplots(1, 2, sharey=True)
    grouped = _by_optimizer(runs)
    finals = []
    for name, group in grouped.items():
        colour = matplotlib.colormaps["tab10"](list(METHODS).index(name))
        label = f"{name}, lr {_learning_rate(group[0])}"
        for panel, axis in zip(panels, ("seconds", "updates"), strict=True):
            positions, errors = _align(group, axis)
            middle = np.median(errors, axis=0)
            panel.plot(positions, middle, color=colour, label=label, linewidth=1.8)
            panel.fill_between(
                positions, errors.min(0), errors.max(0), color=colour, alpha=0.2, linewidth=0
            )
        finals += [run.final("train_error") for run in group if not run.diverged]
    for panel, axis in zip(panels, ("seconds of training", "updates"), strict=True):
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.yaxis.set_minor_formatter("")
        panel.set_xlim(left=0)
        panel.set_xlabel(axis)
        panel.grid(which="both", alpha=0.25, linewidth=0.5)
        panel.spines[["top", "right"]].set_visible(False)
    if finals:
        panels[0].set_ylim(0.8 * min(finals), 3 * max(finals))
    panels[0].set_ylabel("training error\n" + problem.error_name, fontsize=9)
    panels[1].legend(frameon=False)
    seeds = len({run.seed for run in runs})
    drawing.suptitle(
        f"{problem.name}: batch {batch_size}, "
        + (f"median and range of {seeds} seeds\n" if seeds > 1 else "one seed\n")
        + f"{machine['cpu']}, threads: {machine['threads']}, torch {machine['torch']}",
        fontsize=10,
    )
    return drawing


def _align(runs: Sequence[Run], axis: str) -> tuple[np.ndarray, np.ndarray]:
    """Every run's training error at common positions, (runs, positions), up to the shortest run.

    A diverged run does not shorten the others: its error is inf from where it ended.
    """
    ends = [run.final(axis) for run in runs if not run.diverged]
    end = min(ends) if ends else max(run.final(axis) for run in runs)
    positions = np.unique([x for run in runs for x in run.curve[axis] if x <= end])
    rows = []
    for run in runs:
        errors = np.log(run.curve["train_error"])
        finite = np.isfinite(errors)
        xs = np.asarray(run.curve[axis])[finite]
        right = np.inf if run.diverged else None
        rows.append(np.interp(positions, xs, errors[finite], right=right))
    return positions, np.exp(rows)


def write(
    directory: Path,
    problem: Problem,
    arguments: Mapping[str, Any],
    machine: Mapping[str, Any],
    searches: Mapping[str, Any],
    runs: Sequence[Run],
    interrupted: bool,
) -> None:
    """Write `<problem>.json` and `<problem>.png` into `directory`."""
    document = {
        "problem": problem.name,
        "error": problem.error_name,
        "evaluated_examples": {
            "train": min(EVALUATED_ROWS, len(problem.train)),
            "test": len(problem.test),
        },
        "averaging_decay": AVERAGING_DECAY,
        "machine": machine,
        "arguments": arguments,
        "interrupted": interrupted,
        "searches": searches,
        "runs": [{**asdict(run), "updates_per_second": run.updates_per_second} for run in runs],
    }
    text = json.dumps(document, indent=1, default=str)
    (directory / f"{problem.name}.json").write_text(text + "\n")
    drawing = figure(problem, runs, arguments["batch_size"], machine)
    drawing.savefig(directory / f"{problem.name}.png")


def _positive(kind: type) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"must be a positive {kind.__name__}, got {text!r}")
        return value

    return parse


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
    return _optimizer(name), _positive(float)(value)


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
        "--seconds", type=_positive(float), default=60.0, help="training time a run (default: 60)"
    )
    length.add_argument(
        "--updates", type=_positive(int), help="updates a run, for results that need no clock"
    )
    add("--seeds", type=_positive(int), default=3, help="runs an optimizer (default: 3)")
    add("--batch-size", type=_positive(int), default=256, help="for all methods (default: 256)")
    add(
        "--search-seconds",
        type=_positive(float),
        help="training time a candidate of a search (default: a quarter of a run)",
    )
    add(
        "--tune",
        choices=("baselines", "all"),
        default="baselines",
        help="whose learning rate to search (default: baselines; the others use their defaults)",
    )
    add(
        "--lr",
        type=_rate,
        action="append",
        default=[],
        metavar="OPTIMIZER=RATE",
        help="fix a learning rate instead of searching it; may be repeated",
    )
    add("--threads", type=_positive(int), help="torch.set_num_threads (default: torch's own)")
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
            METHODS[name].build(nn.Linear(1, 1), **({"lr": 1.0} if name in given else {}))
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
    """What a run and what a candidate of a search may spend."""
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
        model = problem.build(0)
        evaluate(problem, model)
        start = time.perf_counter()
        evaluate(problem, model)
        evaluation = time.perf_counter() - start
        total = trials * (trial.amount + 2 * evaluation)
        total += runs * (budget.amount + (EVALUATIONS + 1) * evaluation)
        plan += f", about {total / 60:.1f} minutes in all"
    print(plan, file=sys.stderr)
    if load is not None and load > 0.5:
        print(
            f"the load average is {load:.1f}: seconds mislead if that is other work",
            file=sys.stderr,
        )


def _report_search(optimizer: str, tried: Sequence[Mapping[str, float]], trial: Budget) -> None:
    """Print what a search found, and whether a wider one might have found better."""
    listed = ", ".join(
        " ".join(
            f"{'error' if key == 'train_error' else key} {value:.4g}" for key, value in one.items()
        )
        for one in tried
    )
    print(f"{optimizer}, after {trial}: {listed}")
    for name, values in METHODS[optimizer].candidates.items():
        if tried[0][name] in (min(values), max(values)):
            print(f"{optimizer}: the best {name}, {tried[0][name]:g}, is at the edge of the search")


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    _check(parser, arguments)
    problem = PROBLEMS[arguments.problem]()
    if arguments.batch_size > len(problem.train):
        parser.error(
            f"argument --batch-size: {problem.name} has only {len(problem.train)} training examples"
        )
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    optuna.logging.set_verbosity(optuna.logging.WARNING)

    budget, trial = _budgets(arguments)
    rates = dict(arguments.lr)
    chosen = {name: {"lr": rates[name]} if name in rates else {} for name in arguments.optimizers}
    to_search = _to_search(arguments)
    machine = environment()
    count = arguments.seeds * len(arguments.optimizers)
    trials = sum(_trials(name) for name in to_search)
    _announce(problem, count, budget, trials, trial, machine["load_average"])

    searches: dict[str, list[dict[str, float]]] = {}
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
                searches[name] = search(name, problem, trial, arguments.batch_size, advance)
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
    if runs:
        print(table(runs))
        write(arguments.out, problem, vars(arguments), machine, searches, runs, interrupted)
        print(f"wrote {arguments.out / problem.name}.json and .png")
    return 130 if interrupted else 0


if __name__ == "__main__":
    sys.exit(main())
