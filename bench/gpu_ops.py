"""`python -m bench.gpu_ops OP`: times an op over its sizes beside the best ordinary PyTorch.

With --tuned the op as FUSED_SO_AUTOTUNE=1 has it takes the place of PyTorch.

First every size beside eager PyTorch, then again beside compiled PyTorch too, while time is left.
Each call is timed by device events of its own, on one of several sets of inputs that together are
larger than the L2 cache; inputs so small that MOST_SETS of them are not cost their launches, not
their loads. "graph_ms" is a call within a CUDA graph: kernels without their launches.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench.gpu_cases import CASES, Case, Inputs, tensors
from bench.gpu_rows import leave, seconds_left
from fused_so import _extension

ROUNDS = 5
SECONDS_A_CANDIDATE = 0.15
MOST_SETS = 128
# A first compilation takes about this long; so much must be left to begin with one.
SECONDS_TO_COMPILE = 8.0
# The same of a search, which compiles every candidate of the op.
SECONDS_TO_SEARCH = 10.0


def sets_of_inputs(case: Case, device: torch.device, cache_bytes: int) -> list[Inputs]:
    """Two to MOST_SETS sets of inputs, together at least three times as large as the cache."""
    first = case.inputs(device)
    size = sum(x.nbytes for x in tensors(first))
    count = min(MOST_SETS, max(2, math.ceil(3 * cache_bytes / max(size, 1))))
    return [first, *(case.inputs(device) for _ in range(count - 1))]


def timings(
    function: Callable[..., Any], sets: Sequence[Inputs], first: int, calls: int
) -> list[float]:
    """Milliseconds of each of `calls` calls, on the sets from number `first` on, in turn."""
    chosen = [sets[(first + i) % len(sets)] for i in range(calls)]
    if tensors(sets[0])[0].is_cuda:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in chosen]
        for inputs, (start, end) in zip(chosen, events, strict=True):
            start.record()
            function(*inputs)
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]
    elapsed = []
    for inputs in chosen:
        begin = time.perf_counter()
        function(*inputs)
        elapsed.append((time.perf_counter() - begin) * 1e3)
    return elapsed


def interleave(
    candidates: dict[str, Callable[..., Any]], sets: Sequence[Inputs]
) -> dict[str, float]:
    """The median milliseconds of a call of each, all of them timed in turn in every round."""
    calls = {}
    for name, function in candidates.items():
        timings(function, sets, 0, 2)
        once = statistics.median(timings(function, sets, 2, 3))
        wanted = SECONDS_A_CANDIDATE * 1e3 / ROUNDS / max(once, 1e-3)
        calls[name] = min(100, max(1, round(wanted)))
    times = {name: [] for name in candidates}
    for round_ in range(ROUNDS):
        for name, function in candidates.items():
            times[name] += timings(function, sets, round_ * calls[name], calls[name])
    return {name: statistics.median(values) for name, values in times.items()}


def graph_ms(function: Callable[..., Any], sets: Sequence[Inputs]) -> float | None:
    """Milliseconds of a call within a CUDA graph of several; None where it cannot be captured."""
    if not tensors(sets[0])[0].is_cuda:
        return None
    chosen = sets[:16]
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for inputs in chosen:
                function(*inputs)
    except RuntimeError:
        return None
    graph.replay()
    return statistics.median(timings(lambda *_: graph.replay(), chosen, 0, 5)) / len(chosen)


def difference(case: Case, device: torch.device) -> float:
    """The largest difference of ours from the first baseline, relative to the largest entry."""
    torch.manual_seed(0)
    mine = tensors(case.ours(*case.inputs(device)))
    torch.manual_seed(0)
    theirs = tensors(case.baselines[0](*case.inputs(device)))
    return max(
        ((x.float() - y.float()).abs().max() / y.float().abs().max().clamp_min(1e-30)).item()
        for x, y in zip(mine, theirs, strict=True)
    )


def rates(device: torch.device) -> dict[str, float]:
    """Bytes a second of a large copy, read and written, and TFLOP/s of large products."""
    small = device.type == "cpu"
    a = torch.randn((1 if small else 256) << 18, device=device)
    sets = [(torch.empty_like(a), a)]
    copy_ms = interleave({"copy": torch.Tensor.copy_}, sets)["copy"]
    found = {"copy_gbytes": 2 * a.nbytes / copy_ms / 1e6}
    size = 256 if small else 8192
    for name, dtype, precision in (
        ("bfloat16", torch.bfloat16, "highest"),
        ("tf32", torch.float32, "high"),
        ("float32", torch.float32, "highest"),
    ):
        sets = [tuple(torch.randn(size, size, device=device).to(dtype) for _ in range(2))]
        torch.set_float32_matmul_precision(precision)
        ms = interleave({"product": torch.mm}, sets)["product"]
        found[f"product_{name}_tflops"] = 2 * size**3 / ms / 1e9
    torch.set_float32_matmul_precision("highest")
    # Float32 accuracy: its own units, or three TF32 products.
    found["product_float32_tflops"] = max(
        found["product_float32_tflops"], found["product_tf32_tflops"] / 3
    )
    return found


def row_of(case: Case, medians: dict[str, float], found: dict[str, float]) -> dict[str, Any]:
    """What is reported of a case, from its medians in ms and the machine's rates."""
    others = {name: ms for name, ms in medians.items() if name != "ours"}
    best = min(others, key=others.get)
    ms = medians["ours"]
    product = found[f"product_{str(case.dtype)[6:]}_tflops"]
    limit = max(case.flops / product / 1e9, case.bytes / found["copy_gbytes"] / 1e6)
    return {
        "op": case.name,
        "ms": ms,
        "pytorch_ms": others,
        "best_pytorch": best,
        "best_pytorch_ms": others[best],
        "ratio": others[best] / ms,
        "tflops": case.flops / ms / 1e9,
        "gbytes": case.bytes / ms / 1e6,
        "limit_ms": limit,
        "share_of_limit": limit / ms,
    }


def has_kernel(op: str, device: torch.device) -> bool:
    """Whether a kernel, and not the reference, is what runs."""
    key = device.type.upper()
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fused_so::{op}", key)


def time_op(op: str, device: torch.device, cache_bytes: int) -> bool:
    """Leaves the rows of an op; whether all of them could be timed but for want of time."""
    found = rates(device)
    leave(found)
    kernel = has_kernel(op, device)
    good = True
    compiled: dict[Callable[..., Any], Callable[..., Any]] = {}
    for with_compiled in (False, True):
        for case in CASES[op]():
            left = seconds_left()
            if left < (SECONDS_TO_COMPILE if with_compiled and not compiled else 2.0):
                leave({"not_timed": case.name, "compiled": with_compiled})
                continue
            candidates = {"ours": case.ours}
            for baseline in case.baselines:
                candidates[baseline.__name__] = baseline
                if with_compiled:
                    if baseline not in compiled:
                        compiled[baseline] = torch.compile(baseline, dynamic=True)
                    candidates[f"{baseline.__name__}, compiled"] = compiled[baseline]
            row = time_case(case, candidates, device, cache_bytes, found)
            leave(row | {"kernel": kernel})
            good = good and "failed" not in row
    return good


def time_case(case, candidates, device, cache_bytes, found) -> dict[str, Any]:
    """A row of figures, or of what went wrong: the other sizes go on."""
    try:
        sets = sets_of_inputs(case, device, cache_bytes)
        return {
            **row_of(case, interleave(candidates, sets), found),
            "graph_ms": graph_ms(case.ours, sets),
            "difference": difference(case, device),
        }
    except Exception as error:  # torch.compile's own are of many kinds
        return {"failed": case.name, "error": str(error)[:500]}


@contextlib.contextmanager
def searching():
    """Triton kernels search for their fastest tiles, or use what they have found."""
    before, _extension.AUTOTUNE = _extension.AUTOTUNE, True
    try:
        yield
    finally:
        _extension.AUTOTUNE = before


def time_tuned(op: str, device: torch.device, cache_bytes: int) -> bool:
    """Leaves what a search gains at every size; whether all could be tried but for want of time."""
    good = True
    for case in CASES[op]():
        if seconds_left() < SECONDS_TO_SEARCH:
            leave({"not_timed": case.name, "tuned": True})
            continue
        try:
            row = tuned_row(case, device, cache_bytes)
        except Exception as error:  # as in time_case
            row = {"failed": f"{case.name}, tuned", "error": str(error)[:500]}
        leave(row)
        good = good and "failed" not in row
    return good


def tuned_row(case: Case, device: torch.device, cache_bytes: int) -> dict[str, Any]:
    """The heuristic's tiles and the search's, timed in turn, and what the search has chosen."""
    from fused_so.triton_kernels import _autotune

    sets = sets_of_inputs(case, device, cache_bytes)
    # Sizes of one class share a choice: each of them is to make its own.
    _autotune.choices.clear()

    def tuned(*inputs):
        with searching():
            return case.ours(*inputs)

    tuned(*sets[0])
    medians = interleave({"heuristic": case.ours, "tuned": tuned}, sets)
    return {
        "tuned": case.name,
        "ms": medians["heuristic"],
        "tuned_ms": medians["tuned"],
        "ratio": medians["heuristic"] / medians["tuned"],
        "choices": [str(choice) for choice in _autotune.choices.values()],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_ops", description=__doc__)
    parser.add_argument("op", choices=CASES)
    parser.add_argument("--tuned", action="store_true", help="what a search for tiles gains")
    chosen = parser.parse_args(arguments)
    torch.backends.cuda.matmul.allow_tf32 = False
    device = torch.device("cuda")
    time_all = time_tuned if chosen.tuned else time_op
    good = time_all(chosen.op, device, torch.cuda.get_device_properties(device).L2_cache_size)
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
