"""Inverses of damped symmetric positive definite matrices, batched and of mixed sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fused_so import reference
from fused_so._dtypes import accumulate_dtype
from fused_so.ops import _check
from fused_so.ops._registry import define

_STACK_BYTES = 4 << 20
"""The copies of a list's matrices on a CPU: no op takes more than its results and 8 MiB."""


def damped_inverse(
    a: Tensor | Sequence[Tensor], damping: float | Tensor
) -> tuple[Tensor | list[Tensor], Tensor]:
    r"""(A + damping I)^-1 of symmetric matrices, by Cholesky; no synchronization with a GPU.

    Args:
        a: (..., d, d), symmetric; only the lower triangle is read. Or a list of matrices (d, d)
            of any sizes, which are grouped by size.
        damping: a number >= 0, or a tensor of the batch shape (...), or (k,) for a list of k.
            A tensor's values are not checked: that would synchronize.

    Returns:
        inverse, shaped as a (a list for a list), symmetric to the bit, float32 or, for float64,
        float64; and info, int32 of the batch shape: 0, or the order of the first leading minor
        of A + damping I that is not positive definite. Such an inverse is all NaN.

    Raises:
        TypeError: a is not of a floating dtype, the list mixes dtypes, or damping is neither a
            number nor a tensor.
        ValueError: a is not square, damping is negative, NaN or infinite or has another shape,
            devices differ, or the list is empty.

    Source: George 2017, Algorithm 4 line 7. Not differentiable.
    """
    if isinstance(a, Sequence):
        return _damped_inverse_of_list(a, damping)
    _check.floating("a", a)
    if a.dim() < 2 or a.shape[-1] != a.shape[-2]:
        raise ValueError(f"a must be square, (..., d, d), got shape {tuple(a.shape)}")
    return _damped_inverse(a, _damping_tensor(damping, a.shape[:-2], a))


def _damped_inverse_of_list(matrices, damping):
    if not matrices:
        raise ValueError("a must hold at least one matrix, got an empty list")
    for i, matrix in enumerate(matrices):
        _check.shape(f"a[{i}]", matrix, ("d", "d"))
        if matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"a[{i}] must be square, got shape {tuple(matrix.shape)}")
        _check.same_dtype(f"a[{i}]", matrix, "a[0]", matrices[0])
        _check.same_device(f"a[{i}]", matrix, "a[0]", matrices[0])
    damping = _damping_tensor(damping, (len(matrices),), matrices[0])

    inverses: list = [None] * len(matrices)
    infos: list = [None] * len(matrices)
    for group in _groups(matrices):
        if len(group) == 1:
            batch, batch_damping = matrices[group[0]].unsqueeze(0), damping[group[0]].unsqueeze(0)
        else:
            batch = torch.stack([matrices[i] for i in group])
            batch_damping = torch.stack([damping[i] for i in group])
        inverse, info = _damped_inverse(batch, batch_damping)
        for i, one_inverse, one_info in zip(group, inverse.unbind(), info.unbind(), strict=True):
            inverses[i], infos[i] = one_inverse, one_info
    return inverses, torch.stack(infos)


def _groups(matrices: Sequence[Tensor]) -> list[list[int]]:
    """The numbers of the matrices that go into one batch: of one size.

    On a CPU, where a large matrix keeps all threads busy, no more than _STACK_BYTES of them.
    """
    members: dict[int, list[int]] = {}
    for i, matrix in enumerate(matrices):
        members.setdefault(matrix.shape[0], []).append(i)
    if matrices[0].device.type != "cpu":
        return list(members.values())
    groups = []
    for d, same in members.items():
        count = max(1, _STACK_BYTES // max(1, d * d * matrices[0].element_size()))
        groups += [same[i : i + count] for i in range(0, len(same), count)]
    return groups


def _damping_tensor(damping: float | Tensor, batch: Sequence[int], a: Tensor) -> Tensor:
    dtype = accumulate_dtype(a.dtype)
    if isinstance(damping, Tensor):
        _check.shape("damping", damping, tuple(batch))
        _check.same_device("damping", damping, "a", a)
        return damping.to(dtype)
    _check.within("damping", damping, 0.0, math.inf)
    return torch.full(tuple(batch), float(damping), dtype=dtype, device=a.device)


def _fake(a, damping):
    inverse = a.new_empty(a.shape, dtype=accumulate_dtype(a.dtype))
    return inverse, a.new_empty(a.shape[:-2], dtype=torch.int32)


_damped_inverse = define(
    "damped_inverse(Tensor a, Tensor damping) -> (Tensor inverse, Tensor info)",
    stem="damped_inverse",
    reference=reference.damped_inverse,
    fake=_fake,
)
