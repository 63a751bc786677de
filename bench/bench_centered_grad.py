"""centered_grad against the centered product, and against a product corrected afterwards.

row_scales against the same products with vectors in plain PyTorch.
"""

import itertools

import pytest
import torch
from torch.nn import functional as F

from bench.bench_steps import WIDTHS
from bench.measure import compare
from fused_so import ops

# n, out, in
SIZES = [(4096, 64, 64), (256, 1000, 784), (128, 500, 1000), (1024, 256, 256), (128, 64, 64)]


def test_centered_grad(benchmark, size):
    n, out, width = size
    g, h = torch.randn(n, out), torch.rand(n, width)

    def centered():
        mean = h.mean(0)
        return g.T @ (h - mean), g.sum(0), mean

    def corrected():
        # Loses digits to cancellation when the mean is large.
        mean, bias = h.mean(0), g.sum(0)
        return (g.T @ h).addr_(bias, mean, alpha=-1), bias, mean

    compare(
        benchmark,
        f"centered_grad n {n}, {out} x {width}",
        lambda: ops.centered_grad(g, h),
        {"centered mm": centered, "mm, addr": corrected},
        flops=2 * n * out * width,
        bytes=4 * (n * out + n * width + out * width),
    )


@pytest.mark.parametrize("n", [128, 1024])
def test_row_scales(benchmark, n):
    layers = []
    for width, out in itertools.pairwise(WIDTHS):
        g, h = torch.randn(n, out), torch.randn(n, width)
        layers.append((g, h, g.T @ h, g.sum(0), torch.randn(out)))
    lists = [list(side) for side in zip(*layers, strict=True)]

    def plain(vector_times):
        results = []
        for g, h, weight, bias, u in layers:
            w = g @ u
            found = torch.cat([vector_times(u, weight), (u @ bias)[None]])
            expected = torch.cat([w @ h, w.sum()[None]])
            scale = found @ expected / expected.square().sum()
            results.append((scale, (found - scale * expected).norm(), expected.norm(), w.norm()))
        return results

    rows = torch.arange(max(WIDTHS))

    def by_bags(u, weight):
        # Unlike u @ weight a weighted sum of embeddings takes all threads.
        n = len(u)
        bags = rows[:n:32]
        return F.embedding_bag(rows[:n], weight, bags, mode="sum", per_sample_weights=u).sum(0)

    entries = sum(weight.numel() + g.numel() + h.numel() for g, h, weight, _, _ in layers)
    compare(
        benchmark,
        f"row_scales autoencoder, n {n}",
        lambda: ops.row_scales(*lists),
        {"mv": lambda: plain(torch.matmul), "embedding bags": lambda: plain(by_bags)},
        flops=2 * entries,
        bytes=4 * entries,
    )
