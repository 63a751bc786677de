"""Checks shared by the public ops. Each message names the argument, the rule and what came."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from operator import itemgetter

import torch
from torch import Tensor
from torch.nn import Parameter

from fused_so._dtypes import accumulate_dtype

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def floating(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {value.layout}")


def wide(name: str, value: object) -> None:
    """Requires a tensor of a dtype in which ops accumulate."""
    if isinstance(value, Tensor) and value.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {value.dtype}")
    floating(name, value)


def shape(name: str, value: Tensor, expected: tuple[int | str, ...]) -> None:
    """Requires the rank of `expected`, and its sizes where they are numbers."""
    floating(name, value)
    got = value.shape
    # The common case first: checks are most of the cost of an op on small matrices.
    if got == expected:
        return
    fits = len(got) == len(expected) and all(
        isinstance(want, str) or size == want for size, want in zip(got, expected, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in expected)
        raise ValueError(f"{name} must have shape ({wanted}), got {tuple(got)}")


def mutated(*tensors: Tensor) -> None:
    """Tells autograd that an op has changed these: a graph that still needs them must fail."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)


def same_device(name: str, value: Tensor, source_name: str, source: Tensor) -> None:
    if value.device != source.device:
        raise ValueError(
            f"{name} must be on the device of {source_name}, {source.device}, got {value.device}"
        )


def same_dtype(name: str, value: Tensor, source_name: str, source: Tensor) -> None:
    if value.dtype != source.dtype:
        raise TypeError(
            f"{name} must have the dtype of {source_name}, {source.dtype}, got {value.dtype}"
        )


def accumulates(name: str, value: Tensor, source_name: str, source: Tensor) -> None:
    """Requires the dtype in which results for `source` are accumulated."""
    wanted = accumulate_dtype(source.dtype)
    if value.dtype != wanted:
        raise TypeError(
            f"{name} must be {wanted} for {source_name} in {source.dtype}, got {value.dtype}"
        )


def alike(tensors: Sequence[object]) -> bool:
    """Whether all are dense tensors of one device and one dtype in which ops accumulate.

    The common case of long lists, in passes that take a tenth of the checks that name a culprit.
    """
    return (
        all([isinstance(t, Tensor) for t in tensors])
        and {t.layout for t in tensors} <= {torch.strided}
        and len({t.device for t in tensors}) <= 1
        and {t.dtype for t in tensors} in ({torch.float32}, {torch.float64})
    )


def contiguous(name: str, value: Tensor) -> None:
    if not value.is_contiguous():
        raise ValueError(
            f"{name} is updated in place and must be contiguous, got strides {value.stride()}"
        )


def apart(
    written: Sequence[Tensor], read: Sequence[Tensor], names: Callable[[], list[str]]
) -> None:
    """Requires that no tensor of `written`, which are contiguous, overlaps another one in memory.

    A strided tensor counts from its first entry to its last: one that lies between the entries of
    another is refused too. `names`, of all tensors in order, is asked for only when it comes to
    that."""
    tensors = [*written, *read]
    # Fake and other tensors without memory are of a subclass; meta tensors have no address.
    if torch.compiler.is_compiling() or not set(map(type, tensors)) <= {Tensor, Parameter}:
        return
    try:
        begins = [t.data_ptr() for t in tensors]
    except RuntimeError:  # those of the transforms of torch.func, of no subclass
        return
    ends = [begin + t.nbytes for begin, t in zip(begins, written, strict=False)]
    ends += [
        begin + (t.nbytes if t.is_contiguous() else _extent(t))
        for begin, t in zip(begins[len(written) :], read, strict=True)
    ]
    # The common case first: each ends before the next begins.
    in_order = sorted(begins)
    if not all(map(int.__le__, sorted(ends), in_order[1:])):
        _raise_on_overlap(begins, ends, len(written), names)


def _extent(x: Tensor) -> int:
    """Bytes from the first entry of x to its last."""
    if x.numel() == 0:
        return 0
    steps = zip(x.shape, x.stride(), strict=True)
    return x.element_size() * (1 + sum((size - 1) * stride for size, stride in steps))


def _raise_on_overlap(
    begins: list[int], ends: list[int], written: int, names: Callable[[], list[str]]
) -> None:
    """Tensors that are read may overlap one another; the first `written` may overlap none."""
    spans = [
        (begin, end, i)
        for i, (begin, end) in enumerate(zip(begins, ends, strict=True))
        if begin and end > begin
    ]
    farthest = farthest_written = (0, 0, 0)
    for span in sorted(spans):
        before = farthest if span[2] < written else farthest_written
        if before[1] > span[0]:
            (_, end, i), (begin, last, j) = before, span
            first, second = sorted((i, j))
            named = names()
            raise ValueError(
                f"{named[first]} is updated in place and must not overlap {named[second]} in "
                f"memory, got {min(end, last) - begin} bytes in common"
            )
        farthest = max(farthest, span, key=itemgetter(1))
        if span[2] < written:
            farthest_written = max(farthest_written, span, key=itemgetter(1))


def within(name: str, value: float, low: float, high: float) -> None:
    """Requires a real number low <= value <= high; NaN is refused too."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not low <= value <= high or math.isinf(value):
        upper = " and finite" if math.isinf(high) else f" and at most {high:g}"
        raise ValueError(f"{name} must be at least {low:g}{upper}, got {value}")


def boolean(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def tensor_list(name: str, value: object) -> list:
    if not isinstance(value, list | tuple):
        raise TypeError(f"{name} must be a list of tensors, got {type(value).__name__}")
    return list(value)
