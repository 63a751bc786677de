"""precondition against the same products in plain PyTorch, and inner_products against dots."""

import itertools

import pytest
import torch

from bench.bench_steps import WIDTHS
from bench.measure import compare
from fused_so import ops

# out, in
SIZES = [(1000, 784), (500, 1000), (256, 256), (64, 64)]


@pytest.mark.parametrize("sides", ["input", "both"])
def test_precondition(benchmark, size, sides):
    out, width = size
    grad_weight, grad_bias, mean = torch.randn(out, width), torch.randn(out), torch.rand(width)
    a, go = torch.randn(width, width), torch.randn(out, out)
    a, go = a + a.T, go + go.T
    both = sides == "both"
    alpha = torch.tensor(0.5)

    def plain():
        dw = torch.addr(grad_weight, grad_bias, mean, alpha=-1) @ a
        db = grad_bias
        if both:
            dw, db = go @ dw, go @ db
        dw = dw.div_(alpha)
        return dw, db / alpha - dw @ mean

    compare(
        benchmark,
        f"precondition {out} x {width}, {sides}",
        lambda: ops.precondition(
            grad_weight,
            grad_bias,
            mean,
            a,
            output_inverse=go if both else None,
            alpha=alpha,
        ),
        {"addr, mm": plain},
        flops=2 * out * width * (width + out * both),
        bytes=4 * (2 * out * width + width * width + out * out * both),
    )


LAYERS = 8


def test_precondition_of_layers(benchmark, size):
    out, width = size
    shapes = (out, width), (out,), (width,), (width, width)
    lists = [[torch.randn(shape) for _ in range(LAYERS)] for shape in shapes]

    def plain():
        steps = []
        for grad_weight, grad_bias, mean, a in zip(*lists, strict=True):
            dw = torch.addr(grad_weight, grad_bias, mean, alpha=-1) @ a
            steps.append((dw, grad_bias - dw @ mean))
        return steps

    def one_by_one():
        return [ops.precondition(*layer) for layer in zip(*lists, strict=True)]

    compare(
        benchmark,
        f"precondition {LAYERS} of {out} x {width}, input",
        lambda: ops.precondition(*lists),
        {"addr, mm": plain, "one by one": one_by_one},
        flops=LAYERS * 2 * out * width * width,
        bytes=LAYERS * 4 * (2 * out * width + width * width),
    )


def test_inner_products(benchmark):
    shapes = [s for width, out in itertools.pairwise(WIDTHS) for s in ((out, width), (out,))]
    x, y = ([torch.randn(shape) for shape in shapes] for _ in range(2))

    def plain():
        return torch.stack([torch.dot(a.view(-1), b.view(-1)) for a, b in zip(x, y, strict=True)])

    entries = sum(a.numel() for a in x)
    compare(
        benchmark,
        "inner_products autoencoder",
        lambda: ops.inner_products(x, y),
        {"dot": plain},
        flops=2 * entries,
        bytes=8 * entries,
    )
