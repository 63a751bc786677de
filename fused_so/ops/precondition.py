"""The Kronecker-factored step of a linear layer from its ordinary gradient, and its length."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fused_so import reference
from fused_so._dtypes import accumulate_dtype
from fused_so.ops import _check
from fused_so.ops._layers import by_device, lists_of_layers
from fused_so.ops._registry import define


def precondition(
    grad_weight: Tensor | Sequence[Tensor],
    grad_bias: Tensor | Sequence[Tensor],
    mean: Tensor | Sequence[Tensor],
    input_inverse: Tensor | Sequence[Tensor] | None,
    *,
    output_inverse: Tensor | Sequence[Tensor] | None = None,
    alpha: float | Tensor | Sequence[float | Tensor] = 1.0,
) -> tuple[Tensor, Tensor] | tuple[list[Tensor], list[Tensor]]:
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

        Or lists, with an entry for each of any number of layers of any sizes and dtypes: small
        layers of one shape then share their launches on a GPU. An inverse that is None is so in
        all layers; an alpha that is no list is that of all.

    Returns:
        dw (out, in), db (out,); float32, or float64 for float64. Of lists a list of each.

    Raises:
        TypeError, ValueError: an argument breaks a rule above.

    Source: George 2017, eq. 6.2.4 and 6.2.5 (G the identity); Martens and Grosse 2015,
    section 3.2 (both sides). Not differentiable.
    """
    if isinstance(grad_weight, Sequence):
        return _precondition_lists(
            grad_weight, grad_bias, mean, input_inverse, output_inverse, alpha
        )
    _check_layer("", grad_weight, grad_bias, mean, input_inverse, output_inverse)
    _check_alpha("alpha", alpha, "grad_weight", grad_weight)
    return _precondition(
        grad_weight,
        grad_bias,
        mean,
        input_inverse,
        output_inverse=output_inverse,
        alpha=None if _is_one(alpha) else _alpha_tensor(alpha, mean),
    )


def _precondition_lists(grad_weight, grad_bias, mean, input_inverse, output_inverse, alpha):
    one_alpha = isinstance(alpha, str) or not isinstance(alpha, Sequence)
    optional = {
        "input_inverse": input_inverse,
        "output_inverse": output_inverse,
        "alpha": None if one_alpha else alpha,
    }
    lists = lists_of_layers(
        grad_weight=grad_weight,
        grad_bias=grad_bias,
        mean=mean,
        **{name: given for name, given in optional.items() if given is not None},
    )
    count = len(grad_weight)
    arguments = ("grad_weight", "grad_bias", "mean", "input_inverse", "output_inverse")
    layers = zip(*(lists.get(name, [None] * count) for name in arguments), strict=True)
    alphas = lists.pop("alpha", [alpha] * count)
    for i, layer in enumerate(layers):
        for name, entry in zip(arguments, layer, strict=True):
            if entry is None and name in lists:  # where None is no tensor
                _check.floating(f"{name}[{i}]", entry)
        _check_layer(f"[{i}]", *layer)
        name = "alpha" if one_alpha else f"alpha[{i}]"
        _check_alpha(name, alphas[i], f"grad_weight[{i}]", layer[0])
    if not all(map(_is_one, alphas)):
        lists["alpha"] = _alpha_tensors(alphas, lists["mean"])

    dws: list = [None] * count
    dbs: list = [None] * count
    for members in by_device(lists["mean"]):
        options = {name: [entries[i] for i in members] for name, entries in lists.items()}
        positional = [options.pop(name, None) for name in arguments[:-1]]
        for i, dw, db in zip(members, *_precondition_list(*positional, **options), strict=True):
            dws[i], dbs[i] = dw, db
    return dws, dbs


def _check_layer(at, grad_weight, grad_bias, mean, input_inverse, output_inverse):
    """Raises if a layer's arguments do not fit together; `at` follows their names."""
    weight_name = f"grad_weight{at}"
    _check.shape(weight_name, grad_weight, ("out", "in"))
    out, width = grad_weight.shape
    _check.shape(f"grad_bias{at}", grad_bias, (out,))
    _check.same_dtype(f"grad_bias{at}", grad_bias, weight_name, grad_weight)
    _check.same_device(f"grad_bias{at}", grad_bias, weight_name, grad_weight)
    statistics = [(f"mean{at}", mean, (width,))]
    if input_inverse is not None:
        statistics.append((f"input_inverse{at}", input_inverse, (width, width)))
    if output_inverse is not None:
        statistics.append((f"output_inverse{at}", output_inverse, (out, out)))
    for name, value, expected in statistics:
        _check_statistic(name, value, expected, weight_name, grad_weight)


def _check_alpha(name, alpha, weight_name, grad_weight):
    if isinstance(alpha, Tensor):
        _check_statistic(name, alpha, (), weight_name, grad_weight)
        return
    _check.within(name, alpha, 0.0, math.inf)
    if alpha == 0:
        raise ValueError(f"{name} must be positive, got {alpha}")


def _check_statistic(name, value, expected, weight_name, grad_weight):
    _check.shape(name, value, expected)
    _check.accumulates(name, value, weight_name, grad_weight)
    _check.same_device(name, value, weight_name, grad_weight)


def _is_one(alpha: float | Tensor) -> bool:
    return not isinstance(alpha, Tensor) and alpha == 1


def _alpha_tensor(alpha: float | Tensor, mean: Tensor) -> Tensor:
    if isinstance(alpha, Tensor):
        return alpha
    return torch.full((), alpha, dtype=mean.dtype, device=mean.device)


def _alpha_tensors(alphas: list, means: list[Tensor]) -> list[Tensor]:
    """One tensor for each number, however many layers share it: each takes a launch."""
    made: dict[tuple, Tensor] = {}
    result = []
    for alpha, mean in zip(alphas, means, strict=True):
        if not isinstance(alpha, Tensor):
            key = (float(alpha), mean.dtype, mean.device)
            if key not in made:
                made[key] = _alpha_tensor(alpha, mean)
            alpha = made[key]
        result.append(alpha)
    return result


def _fake(grad_weight, grad_bias, mean, input_inverse, *, output_inverse=None, alpha=None):
    dtype = accumulate_dtype(grad_weight.dtype)
    return (
        grad_weight.new_empty(grad_weight.shape, dtype=dtype),
        grad_weight.new_empty(grad_bias.shape, dtype=dtype),
    )


def _fake_list(grad_weight, grad_bias, mean, input_inverse, *, output_inverse=None, alpha=None):
    layers = zip(grad_weight, grad_bias, mean, strict=True)
    steps = [_fake(gw, gb, m, None) for gw, gb, m in layers]
    return [dw for dw, _ in steps], [db for _, db in steps]


_precondition = define(
    "precondition(Tensor grad_weight, Tensor grad_bias, Tensor mean, Tensor? input_inverse, *,"
    " Tensor? output_inverse=None, Tensor? alpha=None) -> (Tensor dw, Tensor db)",
    stem="precondition",
    reference=reference.precondition,
    fake=_fake,
)
_precondition_list = define(
    "precondition_list(Tensor[] grad_weight, Tensor[] grad_bias, Tensor[] mean,"
    " Tensor[]? input_inverse, *, Tensor[]? output_inverse=None, Tensor[]? alpha=None)"
    " -> (Tensor[] dw, Tensor[] db)",
    stem="precondition",
    reference=reference.precondition,
    fake=_fake_list,
)


def inner_products(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    r"""The inner product of every two tensors of the lists, entry by entry.

    .. math:: \sum_j x_j y_j

    Of steps Delta = F^-1 g and gradients g they are the squared lengths Delta^T F Delta in the
    metric F, without a product with F.

    Args:
        x: any number k of tensors, float32 or float64.
        y: k tensors of the same shapes, dtypes and devices, all on one device.

    Returns:
        (k,), float64; on a CUDA GPU from sums in the dtype.

    Raises:
        TypeError, ValueError: an argument breaks a rule above.

    Source: Ba, Grosse and Martens 2017, section 5 (the squared Fisher norm of an update). Not
    differentiable.
    """
    lists = lists_of_layers(x=x, y=y)
    x, y = lists["x"], lists["y"]
    if not (_check.alike([*x, *y]) and [a.shape for a in x] == [b.shape for b in y]):
        _raise_unless_pairs(x, y)
    return _inner_products(x, y) if x else torch.zeros(0, dtype=torch.float64)


def _raise_unless_pairs(x: list, y: list) -> None:
    for i, (a, b) in enumerate(zip(x, y, strict=True)):
        _check.wide(f"x[{i}]", a)
        _check.shape(f"y[{i}]", b, tuple(a.shape))
        _check.same_dtype(f"y[{i}]", b, f"x[{i}]", a)
        _check.same_device(f"x[{i}]", a, "x[0]", x[0])
        _check.same_device(f"y[{i}]", b, f"x[{i}]", a)


def _fake_inner_products(x, y):
    return x[0].new_empty(len(x), dtype=torch.float64)


_inner_products = define(
    "inner_products(Tensor[] x, Tensor[] y) -> Tensor",
    stem="precondition",
    reference=reference.inner_products,
    fake=_fake_inner_products,
)
