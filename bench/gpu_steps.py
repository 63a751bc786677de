"""`python -m bench.gpu_steps`: every optimizer's step on the autoencoder, beside SGD and Adam."""

from __future__ import annotations

import math
import statistics
import time

import torch

from bench.bench_steps import BLOCK_STEPS, OPTIMIZERS, WIDTHS, stepper
from bench.gpu_rows import leave, seconds_left

BATCHES = (128, 512, 1024)
# Statistics come every 10 steps and inverses every 100: a round holds both in proportion.
ROUND_STEPS, ROUNDS = 100, 3


def time_steps(
    batch: int,
    device: torch.device,
    steps: int = ROUND_STEPS,
    rounds: int = ROUNDS,
    seconds: float = math.inf,
):
    """Milliseconds of a step, by the wall clock, of each optimizer; blocks of them take turns.

    At least one round, and as many more as end within `seconds`."""
    begin = time.monotonic()
    x = torch.rand(batch, WIDTHS[0], device=device)
    takers = {name: stepper(name, x) for name in OPTIMIZERS}
    for step in takers.values():
        for _ in range(steps):
            step()
    times: dict[str, list[float]] = {name: [] for name in takers}
    for done in range(rounds):
        # The warm-up was as long as a round.
        round_seconds = (time.monotonic() - begin) / (done + 1)
        if done and time.monotonic() - begin + round_seconds > seconds:
            break
        spent = dict.fromkeys(takers, 0.0)
        for _ in range(steps // BLOCK_STEPS):
            for name, step in takers.items():
                _wait(device)
                start = time.perf_counter()
                for _ in range(BLOCK_STEPS):
                    step()
                _wait(device)
                spent[name] += time.perf_counter() - start
        for name, total in spent.items():
            times[name].append(total * 1e3 / (steps // BLOCK_STEPS * BLOCK_STEPS))
    return {name: statistics.median(values) for name, values in times.items()}


def _wait(device: torch.device) -> None:
    # Steps are as long as the host makes them too: what is timed is a block, waited for.
    if device.type == "cuda":
        torch.cuda.synchronize()


def rows_of(batch: int, medians: dict[str, float]) -> list[dict[str, object]]:
    sgd = min(medians["sgd"], medians["sgd fused"])
    return [
        {"batch": batch, "optimizer": name, "ms": ms, "times_sgd": ms / sgd}
        for name, ms in medians.items()
    ]


def main() -> int:
    for i, batch in enumerate(BATCHES):
        if seconds_left() < 5:
            leave({"not_timed": f"batch {batch}"})
            continue
        share = seconds_left() / (len(BATCHES) - i)
        for row in rows_of(batch, time_steps(batch, torch.device("cuda"), seconds=share)):
            leave(row)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
