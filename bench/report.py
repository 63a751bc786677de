"""What runs leave behind: a table, a JSON file and a figure."""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from bench.problems import Problem
from bench.training import AVERAGING_DECAY, EVALUATED_ROWS, Run

NO_ERROR = 1e-9
"""Where an error of 0 is drawn on the logarithmic axis: below all others."""


def write_whole(file: Path, text: str) -> None:
    """Write `file` whole or not at all, so that a killed program leaves no half of one."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        unfinished.write_text(text)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def earlier(file: Path, experiment: Mapping[str, Any]) -> dict[str, Any]:
    """The document that an earlier call of the same experiment left in the file, {} if none."""
    try:
        document = json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    same = all(document.get(name) == value for name, value in experiment.items())
    return document if same else {}


def _by_optimizer(runs: Sequence[Run]) -> dict[str, list[Run]]:
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(run.optimizer, []).append(run)
    return grouped


def spread(values: Sequence[float], digits: int = 4) -> str:
    """The median, and [min, max] if there is more than one value; never where it is inf."""

    def show(value: float) -> str:
        return f"{value:.{digits}g}" if math.isfinite(value) else "never"

    if len(values) == 1:
        return show(values[0])
    return f"{show(statistics.median(values))} [{show(min(values))}, {show(max(values))}]"


def table(runs: Sequence[Run]) -> str:
    """Median [min, max] over seeds of every optimizer's final figures, as aligned text.

    The last two columns, if SGD ran, are the training seconds and updates at the first
    evaluation at which a run was as good as the best of SGD's final training errors.
    """
    grouped = _by_optimizer(runs)
    header = ["optimizer", "lr", "updates", "seconds", "ms/step", "train error", "test error"]
    if "sgd" in grouped:
        target = min(run.final("train_error") for run in grouped["sgd"])
        header += [f"s to SGD's {target:.4g}", "updates to it"]
    rows = [header]
    for name, group in grouped.items():
        row = [name, _learning_rate(group[0])]
        row.append(spread([run.final("updates") for run in group]))
        row.append(spread([run.final("seconds") for run in group]))
        row.append(spread([1000 / max(run.updates_per_second, 1e-9) for run in group]))
        for error in ("train_error", "test_error"):
            row.append(spread([run.final(error) for run in group]).replace("never", "diverged"))
        if "sgd" in grouped:
            reached = [run.first_below(target) for run in group]
            row += [spread(column) for column in zip(*reached, strict=True)]
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
    problem: Problem, runs: Sequence[Run], batch_size: int | str, machine: Mapping[str, Any]
) -> Figure:
    """The curves of all optimizers, labeled with their learning rates."""
    groups = {
        f"{name}, lr {_learning_rate(group[0])}": group
        for name, group in _by_optimizer(runs).items()
    }
    return curves(groups, problem.name, problem.error_name, batch_size, machine)


def curves(
    groups: Mapping[str, Sequence[Run]],
    title: str,
    error_name: str,
    batch_size: int | str,
    machine: Mapping[str, Any],
) -> Figure:
    """Training error against seconds and against updates: the seeds' median, and their range."""
    drawing = Figure(figsize=(10, 4.2), dpi=150, layout="constrained")
    panels = drawing.subplots(1, 2, sharey=True)
    finals = []
    colours = matplotlib.colormaps["tab10" if len(groups) <= 10 else "tab20"].colors
    for colour, (label, group) in zip(itertools.cycle(colours), groups.items(), strict=False):
        for panel, axis in zip(panels, ("seconds", "updates"), strict=True):
            positions, errors = _align(group, axis)
            middle = np.median(errors, axis=0)
            panel.plot(positions, middle, color=colour, label=label, linewidth=1.8)
            panel.fill_between(
                positions, errors.min(0), errors.max(0), color=colour, alpha=0.2, linewidth=0
            )
        finals += [
            run.final("train_error")
            for run in group
            if not run.diverged and run.final("train_error") > 0
        ]
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
    panels[0].set_ylabel("training error\n" + error_name, fontsize=9)
    panels[1].legend(frameon=False)
    seeds = len({run.seed for group in groups.values() for run in group})
    drawing.suptitle(
        f"{title}: batch {batch_size}, "
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
        errors = np.log(np.maximum(run.curve["train_error"], NO_ERROR))
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
    write_whole(directory / f"{problem.name}.json", text + "\n")
    drawing = figure(problem, runs, arguments["batch_size"], machine)
    drawing.savefig(directory / f"{problem.name}.png")
