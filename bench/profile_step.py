"""`python -m bench.profile_step`: where every millisecond of a training step goes, op by op."""

from __future__ import annotations

import argparse
import time

import torch
from torch.profiler import ProfilerActivity, profile

from bench.bench_steps import OPTIMIZERS, WIDTHS, stepper


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.profile_step", description=__doc__)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="acp")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=100, help="inverses are refreshed every 100")
    parser.add_argument("--rows", type=int, default=25)
    options = parser.parse_args(arguments)
    if min(options.batch, options.steps, options.rows) < 1:
        parser.error("--batch, --steps and --rows must be at least 1")

    step = stepper(options.optimizer, torch.rand(options.batch, WIDTHS[0]))
    for _ in range(options.steps):  # beyond the first ones, which refresh more often
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(options.steps):
            step()
    start = time.perf_counter()
    for _ in range(options.steps):
        step()
    wall = time.perf_counter() - start
    for line in table(profiler, options.steps, options.rows):
        print(line)
    print(f"{'wall clock, without the profiler':<50}{wall * 1e3 / options.steps:>10.3f}")
    return 0


def table(profiler: profile, steps: int, rows: int) -> list[str]:
    """The costliest ops, each without the ops that it calls, in milliseconds a step."""
    events = sorted(profiler.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    lines = [f"{'op':<50}{'ms a step':>10}{'share':>8}{'calls a step':>14}"]
    for event in events[:rows]:
        ms = event.self_cpu_time_total / 1e3 / steps
        share = event.self_cpu_time_total / total
        lines.append(f"{event.key[:49]:<50}{ms:>10.3f}{share:>8.1%}{event.count / steps:>14.2f}")
    lines.append(f"{'all ops':<50}{total / 1e3 / steps:>10.3f}")
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
