"""Whether a gradient is known to be a multiple of the sum of the examples' own."""

from __future__ import annotations

import pytest
import torch

from fused_so.optim.rows import Rows, common_scale, layer_scales

C = -0.25
SCALES = {
    "one of all layers": lambda layers: [common_scale(layers)] * len(layers),
    "one a layer": layer_scales,
}
SIZES = [(5, 4, 3), (9, 300, 400), (64, 30, 20)]


def rows(n, out, width, *, bias=True, dtype=torch.float32, cancel=None, size=1.0):
    """c sum_i g_i (h_i, 1)^T; its second half takes back the first but for `cancel`."""
    g, h = torch.randn(n, out), size * torch.randn(n, width)
    if cancel is not None:
        g, h = torch.cat([g, cancel * torch.randn(n, out) - g]), torch.cat([h, h])
    g, h = g.to(dtype), h.to(dtype)
    return Rows(g, h, C * (g.T @ h), C * g.sum(0) if bias else None)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_multiple_is_found(scales, bias, dtype):
    layers = [rows(*size, bias=bias, dtype=dtype) for size in SIZES]
    tolerance = 100 * torch.finfo(dtype).eps
    for scale in SCALES[scales](layers):
        torch.testing.assert_close(
            scale, torch.tensor(C, dtype=dtype), rtol=tolerance, atol=0, check_dtype=True
        )


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("size", [1.0, 1e-6])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SIZES)
def test_sums_that_nearly_cancel_are_held_against_the_rounding_of_their_terms(
    shape, bias, size, scales
):
    layer = rows(*shape, bias=bias, cancel=1e-5, size=size)
    # Another order of summation, and so another rounding.
    order = torch.randperm(len(layer.g))
    layer = layer._replace(g=layer.g[order], h=layer.h[order])
    found = SCALES[scales]([layer, rows(64, 30, 20)])
    assert all(scale is not None for scale in found)


@pytest.mark.parametrize("scales", SCALES)
def test_a_layer_of_many_units_and_one_example(scales):
    """Whose sums do not cancel: nothing hides the rounding of u^T B, a sum of 3000 terms."""
    for _ in range(200):
        assert SCALES[scales]([rows(1, 3000, 40, bias=False)]) != [None]


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("change", ["one entry", "one bias", "decay", "cut off", "columns"])
@pytest.mark.parametrize("changed", range(len(SIZES)))
def test_a_gradient_that_was_changed_is_not_taken_for_one(scales, change, changed):
    layers = [rows(*size) for size in SIZES]
    weight, bias = layers[changed][2:]
    if change == "one entry":
        weight[-1, -1] += 0.1 * weight.abs().max()
    elif change == "one bias":
        bias[-1] += 0.1 * bias.abs().max()
    elif change == "decay":
        weight.add_(torch.randn_like(weight), alpha=1e-2)
    elif change == "cut off":
        weight.clamp_(max=0.9 * weight.max().item())
    else:
        weight.sub_(weight.mean(0))
    found = SCALES[scales](layers)
    assert found[changed] is None
    if scales == "one a layer":
        assert all(scale is not None for i, scale in enumerate(found) if i != changed)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("changed", ["weight", "bias"])
@pytest.mark.parametrize("size", [1e-4, 255.0, 1e4])
def test_weight_and_bias_count_alike_whatever_the_size_of_the_inputs(size, changed, scales):
    layer = rows(8, 300, 200, size=size)
    (layer.grad_weight if changed == "weight" else layer.grad_bias).mul_(0.99)
    assert SCALES[scales]([layer]) == [None]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 1, 3), (7, 3, 1)])
def test_one_layer_of_one_unit_or_input(shape, bias):
    layer = rows(*shape, bias=bias)
    layer.grad_weight.view(-1)[0] += 1
    assert common_scale([layer]) is None


def test_one_layer_of_which_only_the_bias_is_trained():
    layer = rows(7, 5, 3)
    layer.grad_bias[0] += 1
    alone = layer._replace(h=layer.h[:, :0], grad_weight=layer.grad_weight[:, :0])
    assert common_scale([alone]) is None


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("value", [0.0, torch.nan])
def test_what_says_nothing_or_is_not_finite_has_no_scale(scales, value):
    layers = [rows(*size) for size in SIZES]
    for layer in layers:
        layer.g.fill_(value)
    assert SCALES[scales](layers) == [None] * len(layers)
