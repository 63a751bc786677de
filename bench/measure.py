"""Times an op beside the best ordinary PyTorch and beside the machine's own limits.

Everything compared is timed in turn, round after round, in one process, so that a busy machine
slows all alike; ratios of medians are what counts. Two yardsticks run in the same rounds: a
large matrix product and a large copy.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

ROUNDS, BRIEF_ROUNDS = 15, 3
SECONDS_A_ROUND = 0.02  # how long each candidate runs in a round, at least once


@dataclass
class Report:
    """What the summary prints: ops, filled by compare(), and training steps."""

    brief: bool = False
    rows: list[dict] = field(default_factory=list)
    steps: list[dict] = field(default_factory=list)


REPORT = Report()


def compare(
    benchmark,
    name: str,
    ours: Callable[[], object],
    baselines: dict[str, Callable[[], object]],
    *,
    flops: float = 0,
    bytes: float = 0,
    dtype: torch.dtype = torch.float32,
    compiled: bool = True,
    rounds: int = ROUNDS,
) -> dict:
    """Times `ours` against each baseline, eager and under torch.compile, and reports.

    Args:
        benchmark: the fixture of pytest-benchmark; gets the figures as extra_info.
        name: the op and its size, as printed.
        flops, bytes: what `ours` must at least compute and move; the limit is the larger of the
            two times at the rates of a large product in `dtype` and of a large copy.
        compiled: also try torch.compile on every baseline (never in brief mode).
        rounds: fewer for what takes seconds.
    """
    candidates = {"ours": ours, **baselines}
    if compiled and not REPORT.brief:
        for baseline, function in baselines.items():
            candidates[f"{baseline}, compiled"] = torch.compile(function, dynamic=False)
    product, product_flops = _product(dtype)
    copy, copy_bytes = _copy()
    medians = interleave({**candidates, "product": product, "copy": copy}, rounds)

    best = min((key for key in candidates if key != "ours"), key=medians.get)
    flop_rate = product_flops / medians["product"]
    byte_rate = copy_bytes / medians["copy"]
    limit = max(flops / flop_rate, bytes / byte_rate)
    row = {
        "op": name,
        "ms": medians["ours"] * 1e3,
        "best_pytorch": best,
        "best_pytorch_ms": medians[best] * 1e3,
        "ratio": medians[best] / medians["ours"],
        "gflops": flops / medians["ours"] / 1e9,
        "gbytes": bytes / medians["ours"] / 1e9,
        "share_of_limit": limit / medians["ours"],
        "product_gflops": flop_rate / 1e9,
        "copy_gbytes": byte_rate / 1e9,
        "threads": torch.get_num_threads(),
    }
    REPORT.rows.append(row)
    benchmark.extra_info.update(row)
    benchmark.pedantic(ours, rounds=BRIEF_ROUNDS if REPORT.brief else rounds, iterations=1)
    return row


def interleave(
    candidates: dict[str, Callable[[], object]], rounds: int = ROUNDS
) -> dict[str, float]:
    """The median seconds of one call of each, all of them timed in turn in every round."""
    calls = {}
    for key, function in candidates.items():
        function()
        function()
        start = time.perf_counter()
        function()
        once = time.perf_counter() - start
        calls[key] = 1 if REPORT.brief else max(1, round(SECONDS_A_ROUND / once))
    times = {key: [] for key in candidates}
    for _ in range(BRIEF_ROUNDS if REPORT.brief else rounds):
        for key, function in candidates.items():
            start = time.perf_counter()
            for _ in range(calls[key]):
                function()
            times[key].append((time.perf_counter() - start) / calls[key])
    return {key: statistics.median(values) for key, values in times.items()}


def _product(dtype: torch.dtype):
    size = 256 if REPORT.brief else 1024
    a, b, out = (torch.randn(size, size, dtype=dtype) for _ in range(3))
    return lambda: torch.mm(a, b, out=out), 2 * size**3


def _copy():
    entries = (1 if REPORT.brief else 32) << 18
    a, b = torch.randn(entries), torch.empty(entries)
    return lambda: b.copy_(a), 2 * 4 * entries


def table() -> list[str]:
    """The rows of this run, as lines of text."""
    head = (
        f"{'op':<44}{'ms':>9}{'PyTorch':>9}{'ratio':>7}{'GFLOP/s':>9}{'GB/s':>7}{'limit':>7}  best"
    )
    lines = [head]
    for row in REPORT.rows:
        lines.append(
            f"{row['op']:<44}{row['ms']:>9.3f}{row['best_pytorch_ms']:>9.3f}{row['ratio']:>6.2f}x"
            f"{row['gflops']:>9.1f}{row['gbytes']:>7.1f}{row['share_of_limit']:>7.0%}"
            f"  {row['best_pytorch']}"
        )
    rates = [(row["product_gflops"], row["copy_gbytes"]) for row in REPORT.rows]
    product, copy = (statistics.median(values) for values in zip(*rates, strict=True))
    lines.append(
        f"medians of the run: product {product:.0f} GFLOP/s, copy {copy:.1f} GB/s, "
        f"{torch.get_num_threads()} threads; limit: operations or bytes over these rates, "
        "measured with each row"
    )
    return lines


def steps_table() -> list[str]:
    """Training steps, as lines of text: a row for each optimizer, a column for each batch."""
    batches = sorted({row["batch"] for row in REPORT.steps})
    lines = [f"{'optimizer':<28}" + "".join(f"{f'batch {batch}':>20}" for batch in batches)]
    cells = {(row["optimizer"], row["batch"]): row for row in REPORT.steps}
    for name in dict.fromkeys(row["optimizer"] for row in REPORT.steps):
        line = f"{name:<28}"
        for batch in batches:
            row = cells.get((name, batch))  # a part may have been selected by -k
            line += f"{row['ms']:>11.1f} ms{row['times_sgd']:>5.2f}x" if row else " " * 20
        lines.append(line)
    return lines
