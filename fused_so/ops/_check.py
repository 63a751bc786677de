"""Checks shared by the public ops. Each message names the argument, the rule and what came."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_so._dtypes import accumulate_dtype

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def floating(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a Tensor, got {type(value).__name__}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {value.dtype}")
    if value.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {value.layout}")


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


def contiguous(name: str, value: Tensor) -> None:
    if not value.is_contiguous():
        raise ValueError(
            f"{name} is updated in place and must be contiguous, got strides {value.stride()}"
        )


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
