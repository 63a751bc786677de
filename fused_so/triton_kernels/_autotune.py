"""The search for the fastest configuration of a launch: opt-in, by FUSED_SO_AUTOTUNE=1.

Tiles decide how sums are cut, on the host too (grids, partial sums), so that what is tried is the
launcher's own function and not one kernel, as `triton.autotune` would have it. Without the opt-in
the heuristic's choice is taken and nothing is timed.
"""

import functools
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from fused_so import _extension

from ._matrix import float32_precision

C = TypeVar("C", bound=Hashable)

# Milliseconds that a candidate runs before it is timed, and while it is.
WARM_UP, TIMED = 5, 20

# The choices so far, for the life of the process.
choices: dict[tuple, Hashable] = {}


def fastest(
    kernel: tuple,
    sizes: Sequence[int],
    heuristic: C,
    candidates: Sequence[C],
    launch: Callable[[C], object],
    device: torch.device,
) -> C:
    """The heuristic's candidate or, if the search is on, the one with which `launch` is fastest.

    Sizes up to the same power of two share a choice. `launch` may be called any number of times:
    what the caller wants to keep is not its to change. While a CUDA graph is captured nothing can
    be timed, so that an unknown choice is then the heuristic's, for this call."""
    if not _extension.AUTOTUNE:
        return heuristic
    classes = (max(size - 1, 0).bit_length() for size in sizes)
    key = (*kernel, device, float32_precision(), *classes)
    if key not in choices:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return heuristic
        # Of equals the first is taken, which is the heuristic's.
        others = (candidate for candidate in candidates if candidate != heuristic)
        choices[key] = min((heuristic, *others), key=lambda c: milliseconds(launch, c))
    return choices[key]


def milliseconds(launch: Callable[[C], object], candidate: C) -> float:
    """The median time of a launch; infinite where the candidate does not compile or fit."""
    try:
        call = functools.partial(launch, candidate)
        return do_bench(call, warmup=WARM_UP, rep=TIMED, return_mode="median")
    except (OutOfResources, CompilationError, torch.OutOfMemoryError):
        return float("inf")
