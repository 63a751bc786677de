"""covariance and covariance_ against addmm and a rank-1 update."""

import torch

from bench.measure import compare
from fused_so import ops

# n, d
SIZES = [(1024, 1000), (128, 1000), (512, 784), (4096, 256), (256, 64)]
DECAY = 0.95


def test_covariance_in_place(benchmark, size):
    n, d = size
    h = torch.rand(n, d)
    cov, mean = ops.covariance(torch.rand(2 * d, d))

    def centered():
        batch_mean = h.mean(0)
        hc = h - batch_mean
        cov.addmm_(hc.T, hc, beta=DECAY, alpha=(1 - DECAY) / n)
        shift = mean - batch_mean
        cov.addr_(shift, shift, alpha=DECAY * (1 - DECAY))
        mean.lerp_(batch_mean, 1 - DECAY)

    def corrected():
        # Loses digits to cancellation when the mean is large.
        batch_mean = h.mean(0)
        cov.addmm_(h.T, h, beta=DECAY, alpha=(1 - DECAY) / n)
        cov.addr_(batch_mean, batch_mean, alpha=DECAY - 1)
        shift = mean - batch_mean
        cov.addr_(shift, shift, alpha=DECAY * (1 - DECAY))
        mean.lerp_(batch_mean, 1 - DECAY)

    compare(
        benchmark,
        f"covariance_ n {n}, d {d}",
        lambda: ops.covariance_(cov, mean, h, decay=DECAY),
        {"centered addmm, addr": centered, "addmm, two addr": corrected},
        flops=n * d * (d + 1),
        bytes=4 * (n * d + 2 * d * d),
    )


LAYERS = 8


def test_covariance_in_place_of_layers(benchmark, size):
    n, d = size
    hs = [torch.rand(n, d) for _ in range(LAYERS)]
    covs, means = ([x() for _ in hs] for x in (lambda: torch.eye(d), lambda: torch.rand(d)))

    def centered():
        for cov, mean, h in zip(covs, means, hs, strict=True):
            batch_mean = h.mean(0)
            hc = h - batch_mean
            cov.addmm_(hc.T, hc, beta=DECAY, alpha=(1 - DECAY) / n)
            shift = mean - batch_mean
            cov.addr_(shift, shift, alpha=DECAY * (1 - DECAY))
            mean.lerp_(batch_mean, 1 - DECAY)

    def one_by_one():
        for layer in zip(covs, means, hs, strict=True):
            ops.covariance_(*layer, decay=DECAY)

    compare(
        benchmark,
        f"covariance_ {LAYERS} of n {n}, d {d}",
        lambda: ops.covariance_(covs, means, hs, decay=DECAY),
        {"centered addmm, addr": centered, "one by one": one_by_one},
        flops=LAYERS * n * d * (d + 1),
        bytes=LAYERS * 4 * (n * d + 2 * d * d),
    )


def test_covariance(benchmark, size):
    n, d = size
    h = torch.rand(n, d)

    def centered():
        mean = h.mean(0)
        hc = h - mean
        return (hc.T @ hc).div_(n), mean

    compare(
        benchmark,
        f"covariance n {n}, d {d}",
        lambda: ops.covariance(h),
        {"centered mm": centered, "torch.cov": lambda: torch.cov(h.T, correction=0)},
        flops=n * d * (d + 1),
        bytes=4 * (n * d + d * d),
    )
