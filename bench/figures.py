"""The papers' figures and README's table, from the files that bench.evidence leaves.

    python -m bench.figures --evidence bench/results/evidence --readme README.md

For every problem there, a PNG of training error against seconds and updates for each comparison of
the papers, with a JSON beside it that names the files it is drawn from; and between two comments
in README the table of seconds and updates to a target error. Nothing is trained.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.report import curves, spread, write_whole
from bench.training import Budget, Run

FIGURES = {
    "centering": ("sgd", "cgd", "mean_only_bn"),
    "second_order": ("acp_fixed", "acp_heuristic", "acp", "nnn", "kfac", "bn"),
    "ubp": ("sgd_plain", "ubp_plain", "sgd", "ubp"),
    "kfac": (
        "kfac",
        "kfac_plain",
        "kfac_tridiagonal",
        "kfac_paper",
        "kfac_paper_tridiagonal",
        "sgd_nesterov",
    ),
    "published": ("acp", "kfac", "adam", "singd", "sirfshampoo", "soap"),
}
"""George 2017, figures 6.1, 6.2 and 5.1; Martens and Grosse 2015, figure 4; other libraries."""

ROUNDING = 1e-7
"""Errors below it say nothing: float32 rounds a probability near 1 by as much."""

BEGIN = "<!-- from bench/results/evidence by python -m bench.figures -->"
END = "<!-- end of what bench.figures writes -->"


@dataclass(frozen=True)
class Results:
    """One problem's evidence: runs by method and role (tuned, default, longer)."""

    folder: Path
    name: str
    plan: Mapping[str, Any]
    methods: Mapping[str, Mapping[str, Any]]
    runs: Mapping[str, Mapping[str, Sequence[Run]]]
    machines: Sequence[Mapping[str, Any]]
    error_name: str


def read(evidence: Path) -> list[Results]:
    """Every problem with an index in this folder and a finished run."""
    found = []
    for file in sorted(evidence.glob("*/index.json")):
        index = json.loads(file.read_text())
        documents = {
            method: {
                role: [
                    json.loads((file.parent / method / one).read_text())
                    for one in parts.get(role, ())
                ]
                for role in ("tuned", "default", "longer")
            }
            for method, parts in index["methods"].items()
        }
        flat = [one for roles in documents.values() for group in roles.values() for one in group]
        if not flat:
            continue
        found.append(
            Results(
                folder=file.parent,
                name=index["problem"],
                plan=index["plan"],
                methods=index["methods"],
                runs={
                    method: {
                        role: [Run(**one["run"]) for one in group] for role, group in roles.items()
                    }
                    for method, roles in documents.items()
                },
                machines=[one["machine"] for one in flat],
                error_name=flat[0]["error_name"],
            )
        )
    return found


def draw(results: Results) -> list[Path]:
    """Write the figures for which there are at least two methods; the PNG files."""
    written = []
    every = tuple(results.methods)
    for name, wanted in {**FIGURES, "all": every}.items():
        groups = {
            f"{method}, {_setting(results.methods[method]['hyperparameters'])}": (method, group)
            for method in wanted
            if (group := results.runs.get(method, {}).get("tuned"))
        }
        if len(groups) < 2:
            continue
        drawing = curves(
            {label: group for label, (_, group) in groups.items()},
            f"{results.name}, {name.replace('_', ' ')}",
            results.error_name,
            results.plan["batch_size"],
            results.machines[0],
        )
        file = results.folder / f"{name}.png"
        drawing.savefig(file)
        document = {
            "problem": results.name,
            "plan": results.plan,
            "left_out": [method for method in wanted if method not in dict(groups.values())],
            "files": {
                label: [f"{method}/{one}" for one in results.methods[method]["tuned"]]
                for label, (method, _) in groups.items()
            },
        }
        write_whole(file.with_suffix(".json"), json.dumps(document, indent=1) + "\n")
        written.append(file)
    return written


def _setting(hyperparameters: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.2g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in hyperparameters.items()
    )


def targets(results: Results) -> list[tuple[float, str]]:
    """The errors whose reaching is timed, and what they are.

    They are the median final training errors of tuned Adam, of its usual and its longer runs, or,
    without Adam, that of the method that has the largest one.
    """
    adam, longer = results.runs.get("adam", {}), results.plan["longer"].get("adam")
    lengths = {"tuned": results.plan["run"], "longer": longer}
    found = [
        (_median_final(adam[role]), f"tuned Adam's after {Budget(**length)}")
        for role, length in lengths.items()
        if adam.get(role)
    ]
    if found:
        return found
    finals = {
        method: _median_final(roles["tuned"])
        for method, roles in results.runs.items()
        if roles["tuned"]
    }
    finite = [method for method in finals if math.isfinite(finals[method])]
    if not finite:
        return []
    worst = max(finite, key=finals.get)
    return [(finals[worst], f"tuned {worst}'s after {Budget(**results.plan['run'])}")]


def _median_final(runs: Sequence[Run]) -> float:
    return statistics.median(run.result for run in runs)


def table(results: Results) -> str:
    """Markdown: what every method reached, and how soon it was at the targets."""
    errors = targets(results)
    aims = " and ".join(f"{whose}, {error:.3g}" for error, whose in errors) or "nothing"
    budget = Budget(**results.plan["run"])
    machines = sorted(
        {
            f"{one['cpu']}, {one['threads']} thread{'s' if one['threads'] > 1 else ''}, "
            f"torch {one['torch']}, commit {(one['commit'] or 'unknown')[:7]}"
            for one in results.machines
        }
    )
    lines = [
        f"`{results.name}`, {results.error_name}; to reach: {aims} "
        f"({results.plan['trials']} trials of {Budget(**results.plan['trial'])} a method, "
        f"batch {results.plan['batch_size']}, medians [ranges] over seeds; {'; '.join(machines)}):",
        "",
        "| method | setting | trained for | training error "
        + "".join(f"| seconds to {error:.3g} | updates " for error, _ in errors)
        + "|",
        "|---|---|---|---|" + "---|---|" * len(errors),
    ]
    rows = [
        (method, role, runs)
        for method, roles in results.runs.items()
        for role, runs in roles.items()
        if runs
    ]
    for method, role, runs in sorted(rows, key=lambda row: _median_final(row[2])):
        tuned = _setting(results.methods[method]["hyperparameters"])
        cells = [
            f"`{method}`",
            "its defaults" if role == "default" else f"tuned: {tuned}",
            str(Budget(**results.plan["longer"][method]) if role == "longer" else budget),
            _finals(runs),
            *(
                _short(column)
                for error, _ in errors
                for column in zip(*(run.first_below(error) for run in runs), strict=True)
            ),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, *_untuned(results)])


def _untuned(results: Results) -> list[str]:
    """A line on how long the defaults take to what both they and the tuned settings reach."""
    ratios = []
    for method, roles in results.runs.items():
        if not roles["default"] or not roles["tuned"]:
            continue
        if roles["default"][0].settings == roles["tuned"][0].settings:
            ratios.append((1.0, f"`{method}` the same setting"))
            continue
        common = max(ROUNDING, *(_median_final(roles[role]) for role in ("default", "tuned")))
        untuned, tuned = (
            statistics.median(run.first_below(common)[0] for run in roles[role])
            for role in ("default", "tuned")
        )
        if not tuned:  # no better than before the first update
            continue
        ratios.append((untuned / tuned, f"`{method}` {untuned / tuned:.2g}"))
    if not ratios:
        return []
    listed = ", ".join(text for _, text in sorted(ratios))
    return [
        "",
        f"Seconds of the defaults over those of the tuned setting, to the larger of their two "
        f"final errors (or {ROUNDING:g}, below which is rounding): {listed}.",
    ]


def _finals(runs: Sequence[Run]) -> str:
    return _short([run.result for run in runs]).replace("never", "diverged")


def _short(values: Sequence[float]) -> str:
    if not any(map(math.isfinite, values)):
        return "never"
    # No exponents: 5.76e+03 updates are 5760.
    return re.sub(r"\d\.\d+e\+\d+", lambda one: f"{float(one[0]):.0f}", spread(values, digits=3))


def block(evidence: Path) -> str:
    """What stands in README between the two comments, and they themselves."""
    tables = [table(results) for results in read(evidence)]
    return "\n".join([BEGIN, *(f"\n{one}\n" for one in tables), END])


def with_block(readme: str, new: str) -> str:
    """`readme` with its block replaced.

    Raises:
        ValueError: one of the two comments is not there, exactly once and in order.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in before + after:
        raise ValueError(f"README must have the line {BEGIN!r} once, and below it {END!r}")
    return before + new + after


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.figures",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    folder = Path("bench/results/evidence")
    parser.add_argument("--evidence", type=Path, default=folder, help="(default: %(default)s)")
    parser.add_argument("--readme", type=Path, help="write the tables between its comments")
    arguments = parser.parse_args(argv)
    found = read(arguments.evidence)
    if not found:
        parser.error(f"argument --evidence: no finished runs in {arguments.evidence}")
    for results in found:
        for file in draw(results):
            print(f"wrote {file}")
    if arguments.readme:
        try:
            text = with_block(arguments.readme.read_text(), block(arguments.evidence))
        except (OSError, ValueError) as error:
            parser.error(f"argument --readme: {error}")
        write_whole(arguments.readme, text)
    else:
        print(block(arguments.evidence))
    return 0


if __name__ == "__main__":
    sys.exit(main())
