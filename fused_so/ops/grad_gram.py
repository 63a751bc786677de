"""Inner products of per-example gradients, which are never made."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fused_so import reference
from fused_so._dtypes import accumulate_dtype
from fused_so.ops import _check
from fused_so.ops._registry import define


def grad_gram(
    gs: Sequence[Tensor],
    hs: Sequence[Tensor],
    *,
    centered: bool = False,
    biases: Sequence[bool] | None = None,
) -> Tensor:
    r"""Inner products of the examples' gradients with respect to all weights and biases.

    Example i's gradient is :math:`g_{li} (h_{li}, 1)^T` in linear layer l, so that

    .. math:: K = \sum_l (h_l h_l^T + 1) \circ (g_l g_l^T)

    where the 1 is the bias. If `centered`, K is replaced by H K H with H = I - 1 1^T / n: the
    inner products of the gradients less their mean. That mean may be large: h and g are centered
    before they are multiplied, so that it does not cancel.

    Args:
        gs: a matrix (n, out_l) a layer, any strides: each example's own gradient with respect to
            the layer's output. Those of a loss that is a mean over examples carry its 1/n.
        hs: a matrix (n, in_l) a layer, any strides: the layer's input. All of one dtype.
        centered: subtract the mean gradient.
        biases: for each layer, whether it has a bias. None: all have.

    Returns:
        gram (n, n), symmetric to the bit, summed over layers and not averaged; float32, or
        float64 for float64 input.

    Raises:
        TypeError: gs or hs is no list, or holds something else than tensors of one floating
            dtype; centered or an entry of biases is no bool.
        ValueError: the lists are empty or differ in length, a tensor is no matrix of n rows, or
            devices differ.

    Source: Goodfellow 2015, "Efficient per-example gradient computations", whose squared norms
    are the diagonal; Le Roux, Manzagol and Bengio 2008 (centered: TONGA's covariance of the
    gradients, eq. 12 of Pascanu and Bengio 2014, from the side of the examples). Not
    differentiable.
    """
    gs = _check.tensor_list("gs", gs)
    hs = _check.tensor_list("hs", hs)
    if not gs:
        raise ValueError("gs must hold at least one tensor, got an empty list")
    if len(hs) != len(gs):
        raise ValueError(f"hs must hold {len(gs)} tensors, one for each of gs, got {len(hs)}")
    _check.shape("gs[0]", gs[0], ("n", "out"))
    n = gs[0].shape[0]
    for list_name, tensors, width in (("gs", gs, "out"), ("hs", hs, "in")):
        for i, tensor in enumerate(tensors):
            name = f"{list_name}[{i}]"
            _check.shape(name, tensor, (n, width))
            _check.same_dtype(name, tensor, "gs[0]", gs[0])
            _check.same_device(name, tensor, "gs[0]", gs[0])
    _check.boolean("centered", centered)
    return _grad_gram(gs, hs, centered=centered, biases=_bias_list(biases, len(gs)))


def _bias_list(biases: Sequence[bool] | None, count: int) -> list[bool]:
    if biases is None:
        return [True] * count
    if not isinstance(biases, list | tuple):
        raise TypeError(f"biases must be a list of bool or None, got {type(biases).__name__}")
    if len(biases) != count:
        raise ValueError(f"biases must hold {count} bools, one for each of gs, got {len(biases)}")
    for i, bias in enumerate(biases):
        _check.boolean(f"biases[{i}]", bias)
    return list(biases)


def _fake(gs, hs, *, centered, biases):
    n = gs[0].shape[0]
    return gs[0].new_empty((n, n), dtype=accumulate_dtype(gs[0].dtype))


_grad_gram = define(
    "grad_gram(Tensor[] gs, Tensor[] hs, *, bool centered, bool[] biases) -> Tensor gram",
    stem="grad_gram",
    reference=reference.grad_gram,
    fake=_fake,
)
