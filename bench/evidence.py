"""Rerun all the evidence: tune every method alike, then train it on several seeds.

    python -m bench.evidence --out bench/results/evidence

For each problem, every method has the same number of trials, its own defaults and then settings of
biased random search, each of the same budget; then come the runs with the setting found and, for
our own methods, with the defaults. Work goes breadth first (trial by trial, seed by seed, all
methods each time), so that wherever it stops all methods are compared alike. A finished trial or
run is one JSON file under --out, named by all that the command says of it; the same command goes on
from there, and does nothing twice. One whose optimizer would have other options today is made anew;
other changes of the code are not noticed. `<problem>/index.json` says which files belong together.
Exit status 1: some pieces are left.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
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
from bench.report import write_whole
from bench.training import (
    EVALUATIONS,
    SEARCH_SEED,
    Budget,
    Run,
    evaluation_seconds,
    new_study,
    train,
)


@dataclass(frozen=True)
class Plan:
    """What is done on one problem; `longer` are further runs of single methods."""

    trial: Budget
    run: Budget
    longer: Mapping[str, Budget] = field(default_factory=dict)
    trials: int = 6
    seeds: int = 3
    batch_size: int | str = 256


def _seconds(amount: float) -> Budget:
    return Budget(amount, "seconds")


PLANS = {
    "curves": Plan(_seconds(5), _seconds(20), {"adam": _seconds(60)}),
    "digits": Plan(_seconds(2), _seconds(5)),
    "digits_classifier": Plan(_seconds(2), _seconds(5)),
    "faces": Plan(_seconds(10), _seconds(30)),
    "mnist": Plan(_seconds(10), _seconds(30)),
    "cifar": Plan(_seconds(10), _seconds(30)),
}
ALWAYS = ("curves", "digits", "digits_classifier")
"""The problems whose data needs no files, and which are run unasked."""

OURS = ("cgd", "acp", "nnn", "kfac", "ekfac", "ubp", "natural_gradient", "tonga")
"""The methods that are this library's optimizers as a user gets them, and run untuned too."""

ELSEWHERE = (
    "adam_growing", "kfac_growing", "kfac_paper", "kfac_paper_tridiagonal", "mean_only_bn",
    "sgd_plain", "ubp_plain",
)  # fmt: skip
"""The methods that are not run unasked: bench.everything asks for them, for one question each."""


@dataclass(frozen=True)
class Piece:
    """One trial or run: what the command says of it."""

    problem: str
    method: str
    role: str
    hyperparameters: dict[str, Any]
    seed: int
    budget: Budget
    batch_size: int | str
    threads: int
    evaluations: int

    def file(self) -> Path:
        """Its place under --out."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return Path(self.problem, self.method, f"{self.role}-{self.seed}-{digest[:12]}.json")


class OutOfTime(Exception):
    """The next piece would not end within --minutes."""


class Evidence:
    """The finished pieces in a folder, and how to make those that are missing."""

    def __init__(self, out: Path, minutes: float | None, dry: bool) -> None:
        self.out, self.dry = out, dry
        self.deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self.missing: dict[str, list[Budget]] = {}
        """The budgets of what is missing, by problem: counted by a dry run."""
        self.machines: set[str] = set()
        """What the finished pieces were run on."""

    def load(self, piece: Piece, problem: Problem) -> Run | None:
        try:
            document = json.loads((self.out / piece.file()).read_text())
        except FileNotFoundError:
            return None
        run = Run(**document["run"])
        self.machines.add(document["machine"]["cpu"])
        # An optimizer that could not be built has no options.
        return run if run.settings in ({}, options_of(piece, problem)) else None

    def finish(self, piece: Piece, problem: Problem, bar: tqdm | None) -> Run:
        """The piece's run, from its file or from training; in a dry run an empty one if missing.

        An error that the optimizer raises on its way (a factor that cannot be inverted) ends the
        run as divergence does.
        """
        run = self.load(piece, problem)
        if run is not None:
            return run
        run = Run(piece.method, piece.seed, piece.hyperparameters)
        if self.dry:
            self.missing.setdefault(piece.problem, []).append(piece.budget)
            return run
        length = piece.budget.amount if piece.budget.unit == "seconds" else 0
        if self.deadline is not None and time.monotonic() + length > self.deadline:
            raise OutOfTime
        bar.set_description(f"{piece.problem} {piece.method} {piece.role} {piece.seed}")
        machine, error = environment(), None
        try:
            train(run, problem, piece.budget, piece.batch_size, evaluations=piece.evaluations)
        except (ArithmeticError, RuntimeError, ValueError) as raised:
            run.diverged, error = True, f"{type(raised).__name__}: {raised}"
            bar.write(f"{piece.problem} {piece.method} {piece.role} {piece.seed}: {error}")
        document = {
            "piece": asdict(piece),
            "error_name": problem.error_name,
            "stopped_by": error,
            "run": asdict(run),
            "machine": machine,
        }
        _write(self.out / piece.file(), document)
        bar.update()
        return run


def options_of(piece: Piece, problem: Problem) -> dict[str, Any]:
    """What the piece's optimizer would have as its options now, as its file has them."""
    build = METHODS[piece.method].build
    optimizer = build(nn.Linear(1, 1), problem.likelihood, **piece.hyperparameters)
    return json.loads(json.dumps(optimizer.defaults, default=str))


def _write(file: Path, document: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(document, indent=1, default=str) + "\n")


def gather(
    name: str,
    methods: Sequence[str],
    plan: Plan,
    evidence: Evidence,
    problem: Problem,
    bar: tqdm | None,
) -> dict[str, Any]:
    """Do what is missing of one problem's plan; the files of every method, and its best setting."""

    def piece(method: str, role: str, setting: Mapping[str, Any], seed: int, budget: Budget) -> Run:
        evaluations = 1 if role.startswith("trial") else EVALUATIONS
        one = Piece(
            problem=name,
            method=method,
            role=role,
            hyperparameters=dict(setting),
            seed=seed,
            budget=budget,
            batch_size=plan.batch_size,
            threads=torch.get_num_threads(),
            evaluations=evaluations,
        )
        run = evidence.finish(one, problem, bar)
        index[method].setdefault(role.rstrip("0123456789"), []).append(str(one.file().name))
        return run

    index: dict[str, dict[str, Any]] = {method: {} for method in methods}
    try:
        # A study is replayed from the files: its sampler draws the same after the same results.
        studies = {method: new_study(METHODS[method], problem) for method in methods}
        for number in range(plan.trials):
            for method, study in studies.items():
                trial = study.ask(dict(METHODS[method].space))
                run = piece(method, f"trial{number:02d}", trial.params, SEARCH_SEED, plan.trial)
                study.tell(trial, run.result)
        for method, study in studies.items():
            index[method]["hyperparameters"] = study.best_params
        for seed in range(plan.seeds):
            for method, study in studies.items():
                piece(method, "tuned", study.best_params, seed, plan.run)
            for method in (method for method in methods if method in OURS):
                piece(method, "default", {}, seed, plan.run)
            for method in (method for method in methods if method in plan.longer):
                piece(method, "longer", studies[method].best_params, seed, plan.longer[method])
    finally:  # also of work that was stopped
        if not evidence.dry:
            _index(evidence.out / name / "index.json", name, plan, index)
    return index


def _index(file: Path, name: str, plan: Plan, index: Mapping[str, Any]) -> None:
    """Add methods to the problem's index; one of another plan is replaced."""
    document = {"problem": name, "plan": asdict(plan), "threads": torch.get_num_threads()}
    try:
        before = json.loads(file.read_text())
    except FileNotFoundError:
        before = {"methods": {}}
    same = all(before.get(key) == value for key, value in document.items())
    methods = before["methods"] if same else {}
    for method, parts in index.items():
        # Work that stopped early has passed only some of the files that an earlier call listed.
        kept = methods.get(method, {})
        if parts.get("hyperparameters", kept.get("hyperparameters")) != kept.get("hyperparameters"):
            kept = {}
        methods[method] = {
            **parts,
            **{k: v for k, v in kept.items() if len(v) > len(parts.get(k, ()))},
        }
    _write(file, {**document, "methods": methods})


def usable(methods: Sequence[str], problem: Problem, batch_size: int | str) -> list[str]:
    """The methods that take a step on this problem; why the others do not is printed."""
    found = []
    for method in methods:
        try:
            train(Run(method, 0, {}), problem, Budget(1, "updates"), batch_size, evaluations=1)
        except (ImportError, TypeError, ValueError) as error:
            print(f"{problem.name}: {method} is left out: {error}", file=sys.stderr)
        else:
            found.append(method)
    return found


def _names(known: Mapping[str, Any], what: str) -> Any:
    def parse(text: str) -> list[str]:
        names = list(dict.fromkeys(name.strip() for name in text.split(",")))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"unknown {what} {name!r} (choose from {', '.join(known)})"
                )
        return names

    return parse


def _budget(text: str) -> Budget:
    for suffix, unit, kind in (("s", "seconds", float), ("u", "updates", int)):
        if text.endswith(suffix):
            return Budget(positive(kind)(text.removesuffix(suffix)), unit)
    raise argparse.ArgumentTypeError(f"must be like 30s (seconds) or 500u (updates), got {text!r}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.evidence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    planned = {name: plan for name, plan in PLANS.items() if name in PROBLEMS}
    add(
        "--problems",
        type=_names(planned, "problem"),
        default=[name for name in ALWAYS if name in planned],
        metavar="NAME,...",
        help=f"any of {', '.join(planned)} (default: those that need no files)",
    )
    add(
        "--methods",
        type=_names(METHODS, "method"),
        default=[name for name in METHODS if name not in ELSEWHERE],
        metavar="NAME,...",
        help=f"any of {', '.join(METHODS)} (default: all but {', '.join(ELSEWHERE)})",
    )
    add("--minutes", type=positive(float), help="start nothing that would end later than this")
    add("--trials", type=positive(int), help="settings tried a method (default: the plan's)")
    add("--seeds", type=positive(int), help="runs a setting (default: the plan's)")
    add(
        "--trial-budget",
        type=_budget,
        metavar="10s|500u",
        help="training time or updates of a trial (default: the plan's)",
    )
    add(
        "--run-budget",
        type=_budget,
        metavar="30s|500u",
        help="the same of a run; no longer runs are then made (default: the plan's)",
    )
    add(
        "--batch-size",
        type=batch_size,
        metavar="N|FIRST:LAST:UPDATES",
        help="for all methods; growing exponentially within so many updates (default: the plan's)",
    )
    add("--threads", type=positive(int), help="torch.set_num_threads (default: torch's own)")
    add("--data", type=Path, default=default_data(), help="(default: %(default)s)")
    add("--out", type=Path, default=Path("results/evidence"), help="(default: results/evidence)")
    add("--dry-run", action="store_true", help="print what is missing and how long it takes")
    return parser


def _plan(name: str, arguments: argparse.Namespace) -> Plan:
    given = {
        "trial": arguments.trial_budget,
        "run": arguments.run_budget,
        "longer": {} if arguments.run_budget else None,
        "trials": arguments.trials,
        "seeds": arguments.seeds,
        "batch_size": arguments.batch_size,
    }
    changes = {key: value for key, value in given.items() if value is not None}
    return Plan(**{**vars(PLANS[name]), **changes})


def _announce(
    name: str, plan: Plan, budgets: Sequence[Budget], methods: Sequence[str], evaluation: float
) -> None:
    """Print the plan of one problem, what is missing of it, and the time that will take."""
    print(
        f"{name}: {', '.join(methods)}\n"
        f"  each {plan.trials} trials of {plan.trial} and {plan.seeds} seeds of {plan.run}, "
        f"our own also with their defaults, batch {plan.batch_size}"
        + "".join(f", {method} also for {budget}" for method, budget in plan.longer.items())
    )
    seconds = sum(budget.amount for budget in budgets if budget.unit == "seconds")
    trials = sum(budget == plan.trial for budget in budgets)
    seconds += evaluation * (2 * trials + (EVALUATIONS + 1) * (len(budgets) - trials))
    counted = sum(budget.amount for budget in budgets if budget.unit == "updates")
    print(
        f"  {len(budgets)} pieces are missing: about {seconds / 60:.1f} minutes"
        + (f" and {counted:g} updates" if counted else "")
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    work = []
    for name in arguments.problems:
        plan = _plan(name, arguments)
        try:
            problem = PROBLEMS[name](arguments.data)
        except (OSError, ValueError) as error:
            parser.error(f"argument --data: {error}")
        if BatchSizes.parse(plan.batch_size).last > len(problem.train):
            parser.error(f"argument --batch-size: {name} has {len(problem.train)} examples")
        methods = usable(arguments.methods, problem, plan.batch_size)
        counted = Evidence(arguments.out, None, dry=True)
        gather(name, methods, plan, counted, problem, None)
        missing = counted.missing.get(name, [])
        others = counted.machines - {environment()["cpu"]}
        if missing and others:
            print(
                f"{name}: finished pieces are of another machine, whose seconds are not this "
                f"one's: {', '.join(sorted(others))}",
                file=sys.stderr,
            )
        _announce(name, plan, missing, methods, evaluation_seconds(problem))
        work.append((name, methods, plan, problem, len(missing)))
    if arguments.dry_run:
        return 0

    evidence = Evidence(arguments.out, arguments.minutes, dry=False)
    with tqdm(total=sum(missing for *_, missing in work), unit="piece") as bar:
        try:
            for name, methods, plan, problem, _ in work:
                gather(name, methods, plan, evidence, problem, bar)
        except OutOfTime:
            pass
        except KeyboardInterrupt:
            print("interrupted: the same command goes on from here", file=sys.stderr)
            return 130
        left = bar.total - bar.n
    if left:
        print(f"{left:g} pieces are left: the same command goes on from here", file=sys.stderr)
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
