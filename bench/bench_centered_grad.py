"""centered_grad against the centered product, and against a product corrected afterwards."""

import torch

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
