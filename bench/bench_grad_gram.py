"""grad_gram against two products a layer and an in-place multiply-add."""

import torch

from bench.measure import compare
from fused_so import ops

# n, then the widths of a network: each layer goes from one to the next.
AUTOENCODER = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
SIZES = [
    (512, *AUTOENCODER),
    (128, *AUTOENCODER),
    (1024, 1000, 1000),
    (256, 1000, 1000),
    (128, 64, 64),
]


def layers(size):
    n, *widths = size
    return [torch.randn(n, d) for d in widths[1:]], [torch.randn(n, d) for d in widths[:-1]]


def two_products(gs, hs):
    n = len(gs[0])
    gram, ones = torch.zeros(n, n), torch.ones(())
    for g, h in zip(gs, hs, strict=True):
        gram.addcmul_(torch.addmm(ones, h, h.T), torch.mm(g, g.T))
    return gram


def products_and_one(gs, hs):
    return sum((h @ h.T + 1) * (g @ g.T) for g, h in zip(gs, hs, strict=True))


def center(gram):
    mean = gram.mean(0)
    return gram.sub_(mean[:, None] + mean - mean.mean())


def centered_products(gs, hs):
    # Loses digits to cancellation when the mean gradient is large.
    return center(two_products(gs, hs))


def report(benchmark, name, size, centered, baselines):
    gs, hs = layers(size)
    n, *widths = size
    entries = sum(widths[:-1]) + sum(widths[1:])
    shape = "autoencoder" if tuple(widths) == AUTOENCODER else "-".join(map(str, widths))
    compare(
        benchmark,
        f"{name} n {n}, {shape}",
        lambda: ops.grad_gram(gs, hs, centered=centered),
        {key: lambda run=run: run(gs, hs) for key, run in baselines.items()},
        flops=n * (n + 1) * entries,
        bytes=4 * (n * entries + n * n),
    )


def test_grad_gram(benchmark, size):
    baselines = {"addmm, mm, addcmul": two_products, "mm, add, mul": products_and_one}
    report(benchmark, "grad_gram", size, False, baselines)


def test_grad_gram_centered(benchmark, size):
    report(benchmark, "grad_gram centered", size, True, {"addmm, mm, HKH": centered_products})
