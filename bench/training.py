"""One optimizer trained under a budget, and the search for its hyperparameters."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import optuna
import torch
from optuna.distributions import BaseDistribution, CategoricalDistribution
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

from bench.batch_sizes import BatchSizes
from bench.methods import METHODS, Method
from bench.problems import Examples, Problem
from bench.search import BiasedRandomSampler

AVERAGING_DECAY = 0.99
EVALUATIONS = 30
EVALUATED_ROWS = 5000
"""Training error is over the first 5,000 training examples; test error is over the whole set."""

SEARCH_SEED = 1000
"""Trials have a seed of their own: no method is tuned to the seeds that it is judged by."""


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
    hyperparameters: dict[str, Any]
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
    def result(self) -> float:
        """What a search minimizes: the final training error, inf where it diverged."""
        return math.inf if self.diverged else self.final("train_error")

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


def batches(examples: Examples, size: int | str, seed: int) -> Iterator[Examples]:
    """Endless batches of `size` distinct rows, reshuffled every epoch; the remainder is dropped.

    `size` may also be a schedule, as `BatchSizes.parse` reads it.
    """
    sizes, generator = BatchSizes.parse(size), torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for update in itertools.count():
        n = sizes.at(update)
        if len(order) < n:
            order = torch.randperm(len(examples), generator=generator)
        rows, order = order[:n], order[n:]
        yield examples.take(rows)


@torch.no_grad()
def polyak_average_(averages: list[Tensor], params: list[Tensor], seen: Tensor) -> None:
    """Move the averages towards the parameters; `seen` counts the updates averaged so far.

    The decay grows to AVERAGING_DECAY as (1 + seen) / (10 + seen): a fixed one would show mostly
    the initial parameters for the first few hundred updates.
    """
    decay = min(AVERAGING_DECAY, float((1 + seen) / (10 + seen)))
    torch._foreach_lerp_(averages, params, 1 - decay)


@torch.no_grad()
def evaluate(problem: Problem, model: nn.Module) -> dict[str, float]:
    """Training and test error, inf where they are not finite."""
    errors = {}
    model.eval()
    train = problem.train.take(slice(EVALUATED_ROWS))
    # Averaged parameters have other statistics than those they were averaged from.
    if any(isinstance(module, nn.BatchNorm1d) for module in model.modules()):
        update_bn(train.inputs.split(problem.batch_size), model)
    for name, examples in (("train_error", train), ("test_error", problem.test)):
        error = problem.error(model(examples.inputs), examples.targets).item()
        errors[name] = error if math.isfinite(error) else math.inf
    return errors


def train(
    run: Run,
    problem: Problem,
    budget: Budget,
    batch_size: int | str,
    *,
    evaluations: int = EVALUATIONS,
    advance: Callable[[float, Run], object] = lambda amount, run: None,
) -> None:
    """Train `run` until its budget is spent or it diverges, recording errors in it as it goes.

    Evaluations come more densely at the start, where curves bend most. `advance` is told of
    progress, in the budget's unit, outside the timed part.
    """
    torch.manual_seed(run.seed)  # for methods that sample
    method = METHODS[run.optimizer]
    model = method.adapt(problem.build(run.seed))
    # Copied before the optimizer can put hooks on the model.
    average = AveragedModel(model, multi_avg_fn=polyak_average_)
    optimizer = method.build(model, problem.likelihood, **run.hyperparameters)
    run.settings = dict(optimizer.defaults)
    stream = batches(problem.train, batch_size, run.seed)
    spent = {"seconds": 0.0, "updates": 0}
    run.record(**spent, **evaluate(problem, average))

    for step in range(1, evaluations + 1):
        goal = budget.amount * (step / evaluations) ** 1.5
        while spent[budget.unit] < goal:
            before = spent[budget.unit]
            start = time.perf_counter()
            loss = optimizer.step(partial(_backward, problem, model, optimizer, next(stream)))
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


def _backward(
    problem: Problem, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Examples
) -> Tensor:
    optimizer.zero_grad()
    loss = problem.loss(model(batch.inputs), batch.targets)
    loss.backward()
    return loss


def new_study(method: Method, problem: Problem, seed: int = 0) -> optuna.Study:
    """An empty search for hyperparameters: biased random search, the same for every method.

    Its first trial is the method's own defaults, those in the range that is searched.
    """
    study = optuna.create_study(sampler=BiasedRandomSampler(seed))
    defaults = method.build(nn.Linear(1, 1), problem.likelihood).defaults
    study.enqueue_trial(
        {name: defaults[name] for name, one in method.space.items() if _holds(one, defaults, name)}
    )
    return study


def _holds(distribution: BaseDistribution, options: Mapping[str, Any], name: str) -> bool:
    value = options.get(name)
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices
    return value is not None and distribution.low <= value <= distribution.high


def search(
    optimizer: str,
    problem: Problem,
    budget: Budget,
    batch_size: int | str,
    trials: int,
    advance: Callable[[float, Run], object],
) -> list[dict[str, Any]]:
    """Train `trials` settings; the final training errors, best first, inf where it diverged."""
    study, space = new_study(METHODS[optimizer], problem), dict(METHODS[optimizer].space)
    tried: list[dict[str, Any]] = []
    for _ in range(trials):
        trial = study.ask(space)
        run = Run(optimizer, SEARCH_SEED, trial.params)
        train(run, problem, budget, batch_size, evaluations=1, advance=advance)
        study.tell(trial, run.result)
        tried.append({**trial.params, "train_error": run.result})
    return sorted(tried, key=lambda one: one["train_error"])


def evaluation_seconds(problem: Problem) -> float:
    """How long one evaluation takes here."""
    model = problem.build(0)
    evaluate(problem, model)
    start = time.perf_counter()
    evaluate(problem, model)
    return time.perf_counter() - start
