"""What every test of an op asks: how wrong may it be, and is it the kernel that ran."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fused_so

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# The names of the tests of an op that say something about its kernel's code paths.
KERNEL_CASES = (
    "tiles or depth or beyond or random or bit or scales or finite or no_rows or empty"
    " or conditioned or condition_ or denormal or first_bad or definite or lower or far"
    " or batch or mixed or strides or centering"
)
LAYOUTS = ["contiguous", "transposed", "strided", "expanded"]


def accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def random_matrix(
    rows: int, cols: int, dtype: torch.dtype, *, seed: int, layout: str = "contiguous"
) -> Tensor:
    """A random matrix whose columns have a mean, in memory as `layout` says."""
    generator = torch.Generator().manual_seed(seed)
    offset = torch.randn(cols, generator=generator)
    x = (torch.randn(rows, cols, generator=generator) + offset).to(dtype)
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "strided":
        # What lies between the entries is poison.
        room = torch.full((2 * rows, 3 * cols), torch.nan, dtype=dtype)
        room[::2, ::3] = x
        return room[::2, ::3]
    if layout == "expanded":
        return x[:1].expand(rows, cols)
    return x


def assert_within_budget(
    got: Sequence[Tensor],
    oracle: Callable[..., Sequence[Tensor]],
    arguments: Sequence[Tensor | None],
    orders: Callable[[Sequence[Tensor | None]], Sequence[Sequence[Tensor | None]]],
) -> None:
    """Each result's error against float64 is at most twice plain PyTorch's, plus eps x largest.

    `oracle` in the accumulate dtype is the plain op, and in float64 with short sums the truth.
    `orders` gives the same arguments with the summed index in other orders; the plain error is
    the worst of these, so that a result of few entries is not held to one lucky sum. For the same
    reason float64 may also err as float32 does, scaled by the two eps.
    """
    dtype = got[0].dtype
    arguments = [a if a is None else a.to(dtype) for a in arguments]
    exact, plain = _exact_and_errors(oracle, arguments, orders)
    if dtype == torch.float64:
        single = [a if a is None else a.float() for a in arguments]
        _, errors = _exact_and_errors(oracle, single, orders)
        scale = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
        plain = [max(p, scale * e) for p, e in zip(plain, errors, strict=True)]
    for i, (result, truth) in enumerate(zip(got, exact, strict=True)):
        assert result.shape == truth.shape
        assert not result.isnan().any(), f"result {i} holds NaN"
        error = _largest(result - truth)
        budget = 2 * plain[i] + torch.finfo(dtype).eps * _largest(truth)
        assert error <= budget, f"result {i}: error {error:.3g}, budget {budget:.3g}"


def _exact_and_errors(oracle, arguments, orders) -> tuple[Sequence[Tensor], list[float]]:
    """The truth, and the worst error of each result of the plain op over all orders."""
    with _ShortSums():
        exact = oracle(*(a if a is None else a.double() for a in arguments))
    plain = [oracle(*a) for a in (arguments, *orders(arguments))]
    return exact, [max(_largest(p[i] - truth) for p in plain) for i, truth in enumerate(exact)]


def _largest(x: Tensor) -> float:
    return x.double().abs().max().item() if x.numel() else 0.0


class _ShortSums(TorchDispatchMode):
    """Products as pairwise sums of short ones.

    BLAS adds thousands of terms to one accumulator: its float64 is not always much better than
    the float64 that is to be judged.
    """

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if function is aten.dot.default:
            return (args[0] * args[1]).sum()
        if function is aten.mv.default:
            return (args[0] * args[1]).sum(1)
        if function is aten.mm.default:
            return _product(args[0][None], args[1][None])[0]
        if function is aten.bmm.default:
            return _product(*args)
        return function(*args, **(kwargs or {}))


def _product(a: Tensor, b: Tensor) -> Tensor:
    entries = a.shape[0] * a.shape[1] * b.shape[2]
    parts = max(2, min(64, (1 << 23) // max(entries, 1)))
    terms = max(8, -(-a.shape[2] // parts))
    pairs = zip(a.split(terms, 2), b.split(terms, 1), strict=True)
    return torch.stack([torch.bmm(x, y) for x, y in pairs]).sum(0)


def row_orders(arguments):
    """Matrices that share their rows, with the rows in three other orders."""
    rows = arguments[0].shape[0]
    for seed in range(3):
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
        yield [a if a is None else a[order] for a in arguments]


needs_kernel = pytest.mark.skipif(
    "_C" not in fused_so.LOADED_LIBRARIES, reason="the compiled library is not built"
)


def variants() -> list[str]:
    """The instruction sets that the CPU kernels can be forced to use here."""
    flags = ""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            flags = file.read()
    names = ["portable"]
    names += ["avx2"] if " avx2 " in flags and " fma " in flags else []
    names += ["avx512"] if "avx512dq" in flags and "avx512vl" in flags else []
    names += ["amx"] if "amx_tile" in flags and "amx_bf16" in flags else []
    return names


def run_file_with(variant: str, file: str) -> None:
    """Runs the tests of `file` again, in a process whose kernels are those of `variant`."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", file]
    command += ["-k", KERNEL_CASES]
    result = subprocess.run(
        command,
        # glibc fills new memory with ones: what a kernel forgets to write shows.
        env={**os.environ, "FUSED_SO_CPU": variant, "MALLOC_PERTURB_": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, f"with FUSED_SO_CPU={variant}:\n{result.stdout[-4000:]}"


def assert_threads_do_not_change_a_bit(run: Callable[[], Sequence[Tensor]]) -> None:
    """Two and three workers cut a product among them, where it is worth it; many share panels."""
    one, *others = (with_threads(count, run) for count in (1, 2, 3, 5, 8))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def with_threads(count: int, run: Callable):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return run()
    finally:
        torch.set_num_threads(before)
