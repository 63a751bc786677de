"""Jacobians of the network's outputs through one layer, and a direction's pull-back with them."""

from __future__ import annotations

from torch import Tensor

from fused_so import reference
from fused_so._dtypes import accumulate_dtype
from fused_so.ops import _check
from fused_so.ops._registry import define


def jacobian_backprop(
    jac: Tensor,
    weight: Tensor,
    *,
    dphi: Tensor | None = None,
    direction: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""Carries per-example Jacobians from a layer's output phi(W h + b) down to its input h.

    With J_i the Jacobian with respect to the preactivation a = W h + b of example i:

    .. math::
        J_i = jac_i\, \mathrm{diag}(\phi'(a_i)), \qquad
        jac\_in_i = J_i W, \qquad
        pullback_i = jac\_in_i^T (J_i\, direction_i)

    With direction = dW h + db, the change of the preactivation, the pull-back is the Gauss-Newton
    term of updated backpropagation, W^T J^T J (dW h + db). Nothing is summed or averaged over the
    examples.

    Args:
        jac: (n, o, out), the Jacobian of the network's o outputs with respect to the layer's
            output, for each example; any strides, expanded along n among them.
        weight: (out, in), same dtype and device, as the two below; any strides.
        dphi: (n, out), derivative of the elementwise activation, or None for ones.
        direction: (n, out), or None for no pull-back.

    Returns:
        jac_in (n, o, in), and pullback (n, in), or None without a direction; float32, or float64
        for float64. With o = 0 or out = 0 the sums are zero. (The registered op
        `torch.ops.fused_so.jacobian_backprop` returns an empty tensor in place of None.)

    Raises:
        TypeError: an argument is not a tensor of a floating dtype, or the dtypes differ.
        ValueError: a shape breaks a rule above, or the devices differ.

    Source: George 2017, Algorithm 2 (updated backpropagation), lines 9, 14 and 15.
    Not differentiable.
    """
    _check.shape("jac", jac, ("n", "o", "out"))
    n, _, out = jac.shape
    others = {"weight": (weight, (out, "in"))}
    if dphi is not None:
        others["dphi"] = (dphi, (n, out))
    if direction is not None:
        others["direction"] = (direction, (n, out))
    for name, (value, expected) in others.items():
        _check.shape(name, value, expected)
        _check.same_device(name, value, "jac", jac)
        _check.same_dtype(name, value, "jac", jac)
    jac_in, pullback = _jacobian_backprop(jac, weight, dphi=dphi, direction=direction)
    return jac_in, None if direction is None else pullback


def _reference(jac, weight, *, dphi=None, direction=None):
    jac_in, pullback = reference.jacobian_backprop(jac, weight, dphi=dphi, direction=direction)
    return jac_in, jac_in.new_empty(0) if pullback is None else pullback


def _fake(jac, weight, *, dphi=None, direction=None):
    dtype = accumulate_dtype(jac.dtype)
    n, outputs, _ = jac.shape
    width = weight.shape[1]
    return (
        jac.new_empty((n, outputs, width), dtype=dtype),
        jac.new_empty((0,) if direction is None else (n, width), dtype=dtype),
    )


# An op returns tensors: without a direction the second one is empty, of shape (0,).
_jacobian_backprop = define(
    "jacobian_backprop(Tensor jac, Tensor weight, *, Tensor? dphi=None, Tensor? direction=None)"
    " -> (Tensor jac_in, Tensor pullback)",
    stem="jacobian_backprop",
    reference=_reference,
    fake=_fake,
)
