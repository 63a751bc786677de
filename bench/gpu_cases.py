"""What `bench.gpu_ops` times: every op, its sizes, and the best ordinary PyTorch for the same.

A function takes one set of inputs and returns what it computed, also where that is in place. It
runs on any device, so that the numbers of all of them are compared on the CPU in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fused_so import ops

AUTOENCODER = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
DECAY, DAMPING = 0.95, 0.1
RULE = {"lr": 1e-6, "momentum": 0.9, "weight_decay": 1e-4, "nesterov": True}

Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Case:
    """One op at one size; flops and bytes are the least it must compute and move."""

    name: str
    inputs: Callable[[torch.device], Inputs]
    ours: Callable[..., Any]
    baselines: tuple[Callable[..., Any], ...]
    flops: float
    bytes: float
    dtype: torch.dtype = torch.float32


def tensors(x: Any) -> list[Tensor]:
    """All tensors of nested lists and tuples, in order."""
    if isinstance(x, Tensor):
        return [x]
    return [tensor for item in x or () for tensor in tensors(item)]


# covariance_


def covariance_ours(cov, mean, h):
    ops.covariance_(cov, mean, h, decay=DECAY)
    return cov, mean


def covariance_centered(cov, mean, h):
    batch_mean = h.mean(0)
    hc = h - batch_mean
    batch_mean = batch_mean.to(mean.dtype)
    if h.dtype == cov.dtype:
        cov.addmm_(hc.T, hc, beta=DECAY, alpha=(1 - DECAY) / len(h))
    else:
        cov.mul_(DECAY).add_(hc.T @ hc, alpha=(1 - DECAY) / len(h))
    shift = mean - batch_mean
    cov.addr_(shift, shift, alpha=DECAY * (1 - DECAY))
    mean.lerp_(batch_mean, 1 - DECAY)
    return cov, mean


def covariance_joined(covs, means, hs):
    ops.covariance_(covs, means, hs, decay=DECAY)
    return covs, means


def covariance_centered_each(covs, means, hs):
    for layer in zip(covs, means, hs, strict=True):
        covariance_centered(*layer)
    return covs, means


def covariance_each(covs, means, hs):
    for layer in zip(covs, means, hs, strict=True):
        covariance_ours(*layer)
    return covs, means


def covariance_cases():
    for dtype in (torch.float32, torch.bfloat16):
        for n, d in (
            (128, 32),
            (1024, 256),
            (1024, 1000),
            (8192, 1024),
            (8192, 2048),
            (8192, 4096),
            (8192, 8192),
        ):

            def inputs(device, n=n, d=d, dtype=dtype):
                h = torch.randn(n, d, device=device) + 1
                return torch.eye(d, device=device), torch.ones(d, device=device), h.to(dtype)

            yield Case(
                f"covariance_ {str(dtype)[6:]} n {n}, d {d}",
                inputs,
                covariance_ours,
                (covariance_centered,),
                flops=n * d * (d + 1),
                bytes=dtype.itemsize * n * d + 8 * d * d,
                dtype=dtype,
            )
    for count, n, d in ((16, 128, 32), (16, 256, 256), (8, 256, 1000)):

        def layers(device, count=count, n=n, d=d):
            hs = [torch.randn(n, d, device=device) + 1 for _ in range(count)]
            covs = [torch.eye(d, device=device) for _ in hs]
            return covs, [torch.ones(d, device=device) for _ in hs], hs

        yield Case(
            f"covariance_ {count} of n {n}, d {d}",
            layers,
            covariance_joined,
            (covariance_centered_each, covariance_each),
            flops=count * n * d * (d + 1),
            bytes=count * (4 * n * d + 8 * d * d),
        )


# damped_inverse


def damped_inverse_ours(a):
    return ops.damped_inverse(a, DAMPING)[0]


def inverse_by_cholesky(a):
    eye = torch.eye(a.shape[-1], device=a.device)
    factor, _ = torch.linalg.cholesky_ex(a + DAMPING * eye)
    return torch.cholesky_inverse(factor)


def inverse_by_inv(a):
    eye = torch.eye(a.shape[-1], device=a.device)
    return torch.linalg.inv_ex(a + DAMPING * eye).inverse


def damped_inverse_cases():
    for count, d in (
        (1024, 32),
        (256, 64),
        (64, 128),
        (16, 256),
        (16, 512),
        (8, 1000),
        (1, 2048),
        (1, 4096),
        (1, 8192),
    ):

        def inputs(device, count=count, d=d):
            h = torch.randn(count, 2 * d, d, device=device)
            return (h.mT @ h / (2 * d),)

        yield Case(
            f"damped_inverse {count} x {d}",
            inputs,
            damped_inverse_ours,
            (inverse_by_cholesky, inverse_by_inv),
            flops=count * d**3,
            bytes=8 * count * d * d,
        )


# centered_grad


def centered_grad_ours(g, h):
    return ops.centered_grad(g, h)


def grad_of_centered(g, h):
    mean = h.mean(0)
    return g.T @ (h - mean), g.sum(0), mean


def grad_corrected(g, h):
    mean, bias = h.mean(0), g.sum(0)
    return torch.addr(g.T @ h, bias, mean, alpha=-1), bias, mean


def centered_grad_cases():
    for n, out, width in (
        (128, 32, 32),
        (4096, 64, 64),
        (65536, 64, 64),
        (1024, 1000, 784),
        (8192, 1024, 1024),
        (8192, 4096, 4096),
        (8192, 8192, 8192),
    ):

        def inputs(device, n=n, out=out, width=width):
            return torch.randn(n, out, device=device), torch.rand(n, width, device=device)

        yield Case(
            f"centered_grad n {n}, {out} x {width}",
            inputs,
            centered_grad_ours,
            (grad_of_centered, grad_corrected),
            flops=2 * n * out * width,
            bytes=4 * (n * out + n * width + out * width),
        )


# precondition


def precondition_ours(grad_weight, grad_bias, mean, a):
    return ops.precondition(grad_weight, grad_bias, mean, a)


def precondition_plain(grad_weight, grad_bias, mean, a):
    dw = torch.addr(grad_weight, grad_bias, mean, alpha=-1) @ a
    return dw, grad_bias - dw @ mean


def precondition_each(*lists):
    return [ops.precondition(*layer) for layer in zip(*lists, strict=True)]


def precondition_plain_each(*lists):
    return [precondition_plain(*layer) for layer in zip(*lists, strict=True)]


def precondition_joined(*lists):
    # In the order of the others.
    return list(zip(*ops.precondition(*lists), strict=True))


def precondition_cases():
    for out, width in ((32, 32), (256, 256), (1000, 784), (2048, 2048), (4096, 4096), (8192, 8192)):

        def inputs(device, out=out, width=width):
            a = torch.randn(width, width, device=device) / width**0.5
            vectors = (torch.randn(d, device=device) for d in (out, width))
            return torch.randn(out, width, device=device), *vectors, a

        yield Case(
            f"precondition {out} x {width}",
            inputs,
            precondition_ours,
            (precondition_plain,),
            flops=2 * out * width * width,
            bytes=4 * (2 * out * width + width * width),
        )
    for count, out, width in ((16, 32, 32), (16, 256, 256), (8, 500, 1000)):

        def layers(device, count=count, out=out, width=width):
            shapes = (out, width), (out,), (width,), (width, width)
            return tuple([torch.randn(s, device=device) for _ in range(count)] for s in shapes)

        yield Case(
            f"precondition {count} of {out} x {width}",
            layers,
            precondition_joined,
            (precondition_plain_each, precondition_each),
            flops=count * 2 * out * width * width,
            bytes=count * 4 * (2 * out * width + width * width),
        )


# grad_gram


def grad_gram_ours(gs, hs):
    return ops.grad_gram(gs, hs)


def gram_of_products(gs, hs):
    n = len(gs[0])
    gram, ones = gs[0].new_zeros(n, n), gs[0].new_ones(())
    for g, h in zip(gs, hs, strict=True):
        gram.addcmul_(torch.addmm(ones, h, h.T), torch.mm(g, g.T))
    return gram


def grad_gram_cases():
    for n, widths in (
        (32, (32, 32)),
        (128, AUTOENCODER),
        (512, AUTOENCODER),
        (1024, AUTOENCODER),
        (2048, (1024, 1024)),
        (8192, (1024, 1024)),
        (512, (8192, 8192)),
    ):

        def inputs(device, n=n, widths=widths):
            gs, hs = (
                [torch.randn(n, d, device=device) for d in side]
                for side in (widths[1:], widths[:-1])
            )
            return gs, hs

        entries = sum(widths[:-1]) + sum(widths[1:])
        shape = "autoencoder" if widths == AUTOENCODER else "-".join(map(str, widths))
        yield Case(
            f"grad_gram n {n}, {shape}",
            inputs,
            grad_gram_ours,
            (gram_of_products,),
            flops=n * (n + 1) * entries,
            bytes=4 * (n * entries + n * n),
        )


# jacobian_backprop


def jacobian_ours(jac, weight, dphi, direction):
    return ops.jacobian_backprop(jac, weight, dphi=dphi, direction=direction)


def jacobian_batched(jac, weight, dphi, direction):
    j = jac * dphi[:, None]
    jac_in = j @ weight
    tangent = torch.bmm(j, direction[:, :, None])
    return jac_in, torch.bmm(tangent.mT, jac_in)[:, 0]


def jacobian_transposed(jac, weight, dphi, direction):
    j = jac * dphi[:, None]
    tangent = torch.bmm(j, direction[:, :, None])
    return j @ weight, torch.bmm(tangent.mT, j)[:, 0] @ weight


def jacobian_cases():
    for n, o, out, width in (
        (32, 4, 32, 32),
        (4096, 10, 64, 64),
        (256, 10, 1000, 500),
        (64, 30, 500, 1000),
        (1024, 30, 1024, 1024),
        (64, 10, 8192, 8192),
    ):

        def inputs(device, n=n, o=o, out=out, width=width):
            jac, weight = (
                torch.randn(n, o, out, device=device),
                torch.randn(out, width, device=device),
            )
            dphi, direction = torch.rand(n, out, device=device), torch.randn(n, out, device=device)
            return jac, weight, dphi, direction

        yield Case(
            f"jacobian_backprop n {n}, o {o}, {out} -> {width}",
            inputs,
            jacobian_ours,
            (jacobian_batched, jacobian_transposed),
            flops=2 * n * o * (out * width + out + width),
            bytes=4 * (n * o * (out + width) + out * width + 2 * n * out + n * width),
        )


# apply_update_


def apply_update_ours(params, updates, buffers):
    ops.apply_update_(params, updates, buffers, **RULE)
    return params, buffers


def sgd_foreach(params, updates, buffers):
    step = torch._foreach_add(updates, params, alpha=RULE["weight_decay"])
    torch._foreach_mul_(buffers, RULE["momentum"])
    torch._foreach_add_(buffers, step)
    torch._foreach_add_(step, buffers, alpha=RULE["momentum"])
    torch._foreach_add_(params, step, alpha=-RULE["lr"])
    return params, buffers


def sgd_fused(params, updates, buffers):
    torch._fused_sgd_(
        params, updates, buffers, **RULE, dampening=0.0, maximize=False, is_first_step=False
    )
    return params, buffers


def apply_update_cases():
    chain = [*zip(AUTOENCODER[1:], AUTOENCODER[:-1], strict=True)]
    for name, shapes in (
        ("32 x 32", [(32, 32)]),
        ("autoencoder", [shape for out, width in chain for shape in ((out, width), (out,))]),
        ("8192 x 8192", [(8192, 8192)]),
    ):

        def inputs(device, shapes=shapes):
            return tuple([torch.randn(s, device=device) for s in shapes] for _ in range(3))

        entries = sum(torch.Size(shape).numel() for shape in shapes)
        yield Case(
            f"apply_update_ {name}",
            inputs,
            apply_update_ours,
            (sgd_foreach, sgd_fused),
            flops=8 * entries,
            bytes=20 * entries,
        )


CASES: dict[str, Callable[[], Any]] = {
    "covariance_": covariance_cases,
    "damped_inverse": damped_inverse_cases,
    "centered_grad": centered_grad_cases,
    "precondition": precondition_cases,
    "grad_gram": grad_gram_cases,
    "jacobian_backprop": jacobian_cases,
    "apply_update_": apply_update_cases,
}
