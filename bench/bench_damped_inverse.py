"""damped_inverse against PyTorch's Cholesky route and its general inverse."""

import torch

from bench.measure import compare
from fused_so import ops

# One large, many small, and the factors of the 784-1000-500-250-30 autoencoder in one list.
AUTOENCODER = (784, 1000, 500, 250, 30, 250, 500, 1000)
SIZES = [(1, 1000), (16, 256), (32, 128), (64, 64), AUTOENCODER, (8, 40)]
DAMPING = 0.1


def covariances(count, d):
    h = torch.randn(count, 2 * d, d)
    return h.mT @ h / (2 * d)


def cholesky(a):
    damped = a + DAMPING * torch.eye(a.shape[-1])
    factor, info = torch.linalg.cholesky_ex(damped)
    return torch.cholesky_inverse(factor), info


def inv(a):
    return torch.linalg.inv(a + DAMPING * torch.eye(a.shape[-1]))


def test_damped_inverse(benchmark, size):
    if size == AUTOENCODER:
        name, sizes = "mixed, autoencoder", size
        a = [covariances(1, d)[0] for d in sizes]
        baselines = {
            "cholesky": lambda: [cholesky(matrix) for matrix in a],
            "inv": lambda: [inv(matrix) for matrix in a],
        }
    else:
        count, d = size
        name, sizes = f"{count} x {d}", (d,) * count
        a = covariances(count, d)
        baselines = {"cholesky": lambda: cholesky(a)}
        if count == 1:
            # Batched, MKL's getri reports errors on two threads and takes a second a call.
            baselines["inv"] = lambda: inv(a)
    compare(
        benchmark,
        f"damped_inverse {name}",
        lambda: ops.damped_inverse(a, DAMPING),
        baselines,
        flops=sum(d**3 for d in sizes),
        bytes=sum(2 * 4 * d * d for d in sizes),
    )
