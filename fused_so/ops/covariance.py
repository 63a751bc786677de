"""Covariance of the rows of a matrix, and its running average, in one symmetric product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fused_so import reference
from fused_so._dtypes import accumulate_dtype
from fused_so.ops import _check
from fused_so.ops._layers import lists_of_layers
from fused_so.ops._registry import define


def covariance(h: Tensor, *, centered: bool = True) -> tuple[Tensor, Tensor]:
    r"""Mean and covariance of the rows of `h`, averaged over the rows.

    .. math:: m = \frac1n \sum_i h_i, \qquad C = \frac1n \sum_i (h_i - m)(h_i - m)^T

    Args:
        h: (n, d), any strides. With n = 0 both results are zero.
        centered: without it m is not subtracted and C is the second moment; m is still returned.

    Returns:
        cov (d, d), symmetric to the bit, and mean (d,); float32, or float64 for float64 input.

    Raises:
        TypeError: h is not a tensor of a floating dtype.
        ValueError: h is not a matrix.

    Source: George 2017, eq. 6.2.4 (the factor of ACP). Not differentiable.
    """
    _check.shape("h", h, ("n", "d"))
    _check.boolean("centered", centered)
    return _covariance(h, centered=centered)


def covariance_(
    cov: Tensor | Sequence[Tensor],
    mean: Tensor | Sequence[Tensor],
    h: Tensor | Sequence[Tensor],
    *,
    decay: float | Sequence[float],
    centered: bool = True,
) -> Tensor:
    r"""Moves a running covariance towards that of the rows of `h`, in place.

    With batch statistics C_b, m_b, the covariance of the exponentially weighted mixture:

    .. math::
        C &\leftarrow \beta C + (1-\beta) C_b + \beta (1-\beta) (m - m_b)(m - m_b)^T \\
        m &\leftarrow \beta m + (1-\beta) m_b

    where beta is `decay`; the last term of C only if `centered`. decay = 0 replaces whatever
    was there, NaN included. A batch whose entries, or the sums of their squares, are not finite
    changes nothing, and so does one of no rows.

    Args:
        cov: (d, d), contiguous, float32 (float64 for h in float64), updated in place.
        mean: (d,), likewise.
        h: (n, d), any strides.
        decay: in [0, 1].

        Or lists, with an entry for each of k >= 1 layers of any sizes and dtypes, all on one
        device: small layers of one shape and decay then share their launches on a GPU. A decay
        that is no list is that of all.

    cov and mean may overlap nothing else in memory; an h with gaps between its entries takes all
    from the first to the last.

    Returns:
        A 0-dim bool tensor on the device of h: whether the batch was taken; (k,) for lists. Reading
        it is the only synchronization with a GPU, and is left to the caller.

    Raises:
        TypeError, ValueError: an argument breaks a rule above; nothing is changed.

    Source: George 2017, Algorithm 4 line 6, with the averaging of Martens and Grosse 2015,
    section 5 of the long version. Not differentiable.
    """
    if isinstance(h, Sequence):
        return _covariances_(cov, mean, h, decay, centered)
    _check_layer("", cov, mean, h)
    _check.within("decay", decay, 0.0, 1.0)
    _check.boolean("centered", centered)
    _check.apart([cov, mean], [h], lambda: ["cov", "mean", "h"])
    accepted = _covariance_(cov, mean, h, decay=float(decay), centered=centered)
    _check.mutated(cov, mean)
    return accepted


def _covariances_(cov, mean, h, decay, centered):
    lists = {"h": h, "cov": cov, "mean": mean}
    each = isinstance(decay, Sequence) and not isinstance(decay, str)
    lists = lists_of_layers(**(lists | {"decay": decay} if each else lists))
    if not lists["h"]:
        raise ValueError("h must hold at least one tensor, got an empty list")
    covs, means, hs = lists["cov"], lists["mean"], lists["h"]
    decays = lists["decay"] if each else [decay] * len(hs)
    for i, layer in enumerate(zip(covs, means, hs, strict=True)):
        _check_layer(f"[{i}]", *layer)
        _check.same_device(f"h[{i}]", hs[i], "h[0]", hs[0])
        _check.within(f"decay[{i}]" if each else "decay", decays[i], 0.0, 1.0)
    _check.boolean("centered", centered)
    _check.apart(
        [*covs, *means],
        hs,
        lambda: [f"{name}[{i}]" for name in ("cov", "mean", "h") for i in range(len(hs))],
    )
    decays = [float(beta) for beta in decays]
    accepted = _covariance_list_(covs, means, hs, decay=decays, centered=centered)
    _check.mutated(*covs, *means)
    return accepted


def _check_layer(at, cov, mean, h):
    """Raises if a layer's tensors do not fit together; `at` follows their names."""
    _check.shape(f"h{at}", h, ("n", "d"))
    d = h.shape[1]
    for name, statistic, expected in (("cov", cov, (d, d)), ("mean", mean, (d,))):
        _check.shape(f"{name}{at}", statistic, expected)
        _check.same_device(f"{name}{at}", statistic, f"h{at}", h)
        _check.accumulates(f"{name}{at}", statistic, f"h{at}", h)
        _check.contiguous(f"{name}{at}", statistic)


def _fake_covariance(h, *, centered=True):
    dtype = accumulate_dtype(h.dtype)
    d = h.shape[1]
    return h.new_empty((d, d), dtype=dtype), h.new_empty((d,), dtype=dtype)


def _fake_covariance_(cov, mean, h, *, decay, centered=True):
    return h.new_empty((), dtype=torch.bool)


def _fake_covariance_list_(cov, mean, h, *, decay, centered=True):
    return h[0].new_empty(len(h), dtype=torch.bool)


_covariance = define(
    "covariance(Tensor h, *, bool centered=True) -> (Tensor cov, Tensor mean)",
    stem="covariance",
    reference=reference.covariance,
    fake=_fake_covariance,
)
_covariance_ = define(
    "covariance_(Tensor(a!) cov, Tensor(b!) mean, Tensor h, *, float decay, bool centered=True)"
    " -> Tensor accepted",
    stem="covariance",
    reference=reference.covariance_,
    fake=_fake_covariance_,
)
_covariance_list_ = define(
    "covariance_list_(Tensor(a!)[] cov, Tensor(b!)[] mean, Tensor[] h, *, float[] decay,"
    " bool centered=True) -> Tensor accepted",
    stem="covariance",
    reference=reference.covariance_,
    fake=_fake_covariance_list_,
)
