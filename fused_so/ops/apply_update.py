"""The parameter update of many tensors at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fused_so import reference
from fused_so._dtypes import accumulate_dtype
from fused_so.ops import _check
from fused_so.ops._registry import define


def apply_update_(
    params: Sequence[Tensor],
    updates: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    *,
    lr: float,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    scale: Tensor | None = None,
) -> None:
    r"""Momentum, weight decay and the step, for every tensor of the lists, in place.

    .. math::
        u &= s\, \Delta + \lambda p \\
        v &\leftarrow \mu v + u \\
        p &\leftarrow p - \eta\, (u + \mu v \text{ if nesterov, else } v)

    With s = 1 these are the steps of `torch.optim.SGD` with gradient Delta.

    Args:
        params: k contiguous tensors, updated in place, all of one dtype.
        updates: k tensors of the same shapes, in the dtype of params or its accumulate dtype.
        momentum_buffers: k contiguous tensors of the accumulate dtype (float32, or float64 for
            float64 params), updated in place; an empty list if momentum is 0.
        lr: the learning rate eta, >= 0.
        momentum: mu, in [0, 1].
        weight_decay: lambda, >= 0; outside the metric, scaled by lr alone.
        nesterov: use the look-ahead form.
        scale: a 0-dim tensor s of the accumulate dtype on the same device, or None for 1. A clip
            factor computed on a GPU stays there. 0 skips the update: nothing is changed, whatever
            Delta holds.

    What is updated in place may overlap nothing else in memory; a tensor with gaps between its
    entries takes all from the first to the last.

    Raises:
        TypeError, ValueError: an argument breaks a rule above; nothing is changed.

    Source: Sutskever et al. 2013, section 2, in the form of `torch.optim.SGD`.
    """
    params = _check.tensor_list("params", params)
    updates = _check.tensor_list("updates", updates)
    buffers = _check.tensor_list("momentum_buffers", momentum_buffers)
    _check.boolean("nesterov", nesterov)
    for name, value, high in (
        ("lr", lr, math.inf),
        ("momentum", momentum, 1.0),
        ("weight_decay", weight_decay, math.inf),
    ):
        _check.within(name, value, 0.0, high)
    expected = len(params) if momentum else 0
    for name, tensors, count in (
        ("updates", updates, len(params)),
        ("momentum_buffers", buffers, expected),
    ):
        if len(tensors) != count:
            rule = "one for each of params" if count else "empty when momentum is 0"
            raise ValueError(f"{name} must hold {count} tensors ({rule}), got {len(tensors)}")
    if not _match(params, updates, buffers):
        _raise_unless_matching(params, updates, buffers)
    if not params:
        return
    read = updates
    if scale is not None:
        _check.shape("scale", scale, ())
        _check.accumulates("scale", scale, "params", params[0])
        _check.same_device("scale", scale, "params[0]", params[0])
        read = [*updates, scale]
    _check.apart([*params, *buffers], read, lambda: _names(params, buffers, updates))
    _apply_update_(
        params,
        updates,
        buffers,
        lr=float(lr),
        momentum=float(momentum),
        weight_decay=float(weight_decay),
        nesterov=nesterov,
        scale=scale,
    )
    _check.mutated(*params, *buffers)


def _names(params: list, buffers: list, updates: list) -> list[str]:
    lists = {"params": params, "momentum_buffers": buffers, "updates": updates}
    return [f"{name}[{i}]" for name, of in lists.items() for i in range(len(of))] + ["scale"]


def _match(params: list, updates: list, buffers: list) -> bool:
    """Whether the lists are what `_raise_unless_matching` asks for, without naming the culprit."""
    tensors = [*params, *updates, *buffers]
    if not params or not all([isinstance(t, Tensor) for t in tensors]):
        return False
    # Lists and sets, not generators: of many small tensors the checks take most of the time.
    dtype, shapes = params[0].dtype, [p.shape for p in params]
    wide = accumulate_dtype(dtype) if dtype in _check.FLOATING else None
    return (
        {t.layout for t in tensors} == {torch.strided}
        and {t.device for t in tensors} == {params[0].device}
        and wide is not None
        and {p.dtype for p in params} == {dtype}
        and {u.dtype for u in updates} in ({dtype}, {wide})
        and {b.dtype for b in buffers} <= {wide}
        and all([t.is_contiguous() for t in (*params, *buffers)])
        and [u.shape for u in updates] == shapes
        and (not buffers or [b.shape for b in buffers] == shapes)
    )


def _raise_unless_matching(params: list, updates: list, buffers: list) -> None:
    for i, (param, update) in enumerate(zip(params, updates, strict=True)):
        _check.floating(f"params[{i}]", param)
        _check.contiguous(f"params[{i}]", param)
        _check.shape(f"updates[{i}]", update, tuple(param.shape))
        _check.same_dtype(f"params[{i}]", param, "params[0]", params[0])
        if update.dtype != param.dtype:
            _check.accumulates(f"updates[{i}]", update, f"params[{i}]", param)
        _check.same_dtype(f"updates[{i}]", update, "updates[0]", updates[0])
        _check.same_device(f"params[{i}]", param, "params[0]", params[0])
        _check.same_device(f"updates[{i}]", update, "params[0]", params[0])
    for i, buffer in enumerate(buffers):
        _check.shape(f"momentum_buffers[{i}]", buffer, tuple(params[i].shape))
        _check.accumulates(f"momentum_buffers[{i}]", buffer, f"params[{i}]", params[i])
        _check.contiguous(f"momentum_buffers[{i}]", buffer)
        _check.same_device(f"momentum_buffers[{i}]", buffer, "params[0]", params[0])


def _fake(params, updates, momentum_buffers, *, lr, momentum, weight_decay, nesterov, scale=None):
    return None


_apply_update_ = define(
    "apply_update_(Tensor(a!)[] params, Tensor[] updates, Tensor(b!)[] momentum_buffers, *,"
    " float lr, float momentum, float weight_decay, bool nesterov, Tensor? scale=None) -> ()",
    stem="apply_update",
    reference=reference.apply_update_,
    fake=_fake,
)
