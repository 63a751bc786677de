"""apply_update_ against torch.optim.SGD over the parameters of the autoencoder."""

import torch

from bench.measure import compare
from fused_so import ops

# The widths of the autoencoder up to its code: 784-1000-500-250-30 and back, or a small one.
SIZES = [(784, 1000, 500, 250, 30), (64, 32, 8)]
RULE = {"lr": 1e-6, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}


def parameters(widths):
    there_and_back = [*widths, *widths[-2::-1]]
    layers = list(zip(there_and_back[1:], there_and_back[:-1], strict=True))
    return [torch.randn(shape) for out, width in layers for shape in ((out, width), (out,))]


def sgd(widths, **options):
    params = [p.requires_grad_() for p in parameters(widths)]
    for p in params:
        p.grad = torch.randn_like(p)
    return torch.optim.SGD(params, **RULE, **options).step


def test_apply_update(benchmark, size):
    params, updates = parameters(size), parameters(size)
    buffers = [torch.zeros_like(p) for p in params]

    def plain():
        with torch.no_grad():
            for p, u, v in zip(params, updates, buffers, strict=True):
                step = u + RULE["weight_decay"] * p
                v.mul_(RULE["momentum"]).add_(step)
                p.sub_(RULE["lr"] * (step + RULE["momentum"] * v))

    entries = sum(p.numel() for p in params)
    # Of the optimizers torch.compile would trace the state as well: `plain` is compiled instead.
    foreach, fused = sgd(size, foreach=True), sgd(size, fused=True)
    compare(
        benchmark,
        f"apply_update_ {'-'.join(map(str, size))}",
        lambda: ops.apply_update_(params, updates, buffers, **RULE),
        {
            "plain": plain,
            "SGD(foreach)": torch.compiler.disable(foreach),
            "SGD(fused)": torch.compiler.disable(fused),
        },
        flops=8 * entries,
        bytes=20 * entries,
    )
