"""The Kronecker-factored step of a linear layer from its ordinary gradient."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fused_so import reference
from fused_so._dtypes import accumulate_dtype
from fused_so.ops import _check
from fused_so.ops._registry import define


def precondition(
    grad_weight: Tensor,
    grad_bias: Tensor,
    mean: Tensor,
    input_inverse: Tensor | None,
    *,
    output_inverse: Tensor | None = None,
    alpha: float | Tensor = 1.0,
) -> tuple[Tensor, Tensor]:
    r"""The layer's step under the metric alpha G (x) [[A^-1 + m m^T, m], [m^T, 1]].

    .. math::
        dW = \frac1\alpha\, G^{-1} (\nabla_W - \nabla_b m^T)\, A, \qquad
        db = \frac1\alpha\, G^{-1} \nabla_b - dW\, m

    where A is `input_inverse` and G^-1 is `output_inverse`. Gradients keep their scale: a sum
    gives a sum, a mean a mean.

    Args:
        grad_weight: (out, in). grad_bias: (out,), same dtype.
        mean: (in,), the mean input m. A layer without bias passes zeros for both.
        input_inverse: (in, in), symmetric, or None for the identity.
        output_inverse: (out, out), symmetric, or None for the identity.
        alpha: a number > 0, or a 0-dim tensor (not checked: that would synchronize).
        mean, the inverses and a tensor alpha are float32, or float64 for float64 gradients.

    Returns:
        dw (out, in), db (out,); float32, or float64 for float64.

    Raises:
        TypeError, ValueError: an argument breaks a rule above.

    Source: George 2017, eq. 6.2.4 and 6.2.5 (G the identity); Martens and Grosse 2015,
    section 3.2 (both sides). Not differentiable.
    """
    _check.shape("grad_weight", grad_weight, ("out", "in"))
    out, width = grad_weight.shape
    _check.shape("grad_bias", grad_bias, (out,))
    _check.same_dtype("grad_bias", grad_bias, "grad_weight", grad_weight)
    _check.same_device("grad_bias", grad_bias, "grad_weight", grad_weight)
    statistics = {"mean": (mean, (width,))}
    if input_inverse is not None:
        statistics["input_inverse"] = (input_inverse, (width, width))
    if output_inverse is not None:
        statistics["output_inverse"] = (output_inverse, (out, out))
    if isinstance(alpha, Tensor):
        statistics["alpha"] = (alpha, ())
    for name, (value, expected) in statistics.items():
        _check.shape(name, value, expected)
        _check.accumulates(name, value, "grad_weight", grad_weight)
        _check.same_device(name, value, "grad_weight", grad_weight)
    return _precondition(
        grad_weight,
        grad_bias,
        mean,
        input_inverse,
        output_inverse=output_inverse,
        alpha=_alpha_tensor(alpha, mean),
    )


def _alpha_tensor(alpha: float | Tensor, mean: Tensor) -> Tensor | None:
    if isinstance(alpha, Tensor):
        return alpha
    _check.within("alpha", alpha, 0.0, math.inf)
    if alpha == 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
    return None if alpha == 1 else torch.full((), alpha, dtype=mean.dtype, device=mean.device)


def _fake(grad_weight, grad_bias, mean, input_inverse, *, output_inverse=None, alpha=None):
    dtype = accumulate_dtype(grad_weight.dtype)
    return (
        grad_weight.new_empty(grad_weight.shape, dtype=dtype),
        grad_weight.new_empty(grad_bias.shape, dtype=dtype),
    )


_precondition = define(
    "precondition(Tensor grad_weight, Tensor grad_bias, Tensor mean, Tensor? input_inverse, *,"
    " Tensor? output_inverse=None, Tensor? alpha=None) -> (Tensor dw, Tensor db)",
    stem="precondition",
    reference=reference.precondition,
    fake=_fake,
)
