"""Small networks, and their curvature built whole from Jacobians, for the optimizers' tests."""

from __future__ import annotations

import copy
import itertools

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, hessian, jacrev, vmap

import fused_so

DOUBLE = torch.float64

# Each likelihood's loss in PyTorch, its reduction being the last argument.
LOSSES = {
    "gaussian": lambda f, y, reduction: F.mse_loss(f, y, reduction=reduction) / (2 * 0.7**2),
    "bernoulli": lambda f, y, reduction: F.binary_cross_entropy_with_logits(
        f, y, reduction=reduction
    ),
    "categorical": lambda f, y, reduction: F.cross_entropy(f, y, reduction=reduction),
}
LIKELIHOODS = {
    "gaussian": lambda reduction: fused_so.Gaussian(0.7, reduction=reduction),
    "bernoulli": lambda reduction: fused_so.Bernoulli(reduction=reduction),
    "categorical": lambda reduction: fused_so.Categorical(reduction=reduction),
}


def chain(*widths, bias=True, dtype=DOUBLE, activation=nn.Tanh):
    """Linear layers with an activation between; `bias` for all, or one an entry."""
    biases = [bias] * (len(widths) - 1) if isinstance(bias, bool) else bias
    layers = []
    for (fan_in, fan_out), has_bias in zip(itertools.pairwise(widths), biases, strict=True):
        layers += [nn.Linear(fan_in, fan_out, bias=has_bias, dtype=dtype), activation()]
    return nn.Sequential(*layers[:-1])


def twins(*widths, count=2, **options):
    models = [chain(*widths, **options) for _ in range(count)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    return models


def linears(model):
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]


def targets(kind, n, o):
    if kind == "categorical":
        return torch.randint(0, o, (n,))
    y = torch.randn(n, o, dtype=DOUBLE)
    return y if kind == "gaussian" else (y > 0).to(DOUBLE)


def loss_of(kind, f, y, reduction="mean"):
    if reduction == "batchmean":
        return LOSSES[kind](f, y, "sum") / len(f)
    return LOSSES[kind](f, y, reduction)


def output_curvature(kind, f, y, reduction="mean"):
    """The Hessian of PyTorch's loss with respect to the outputs f (n, o): (n, o, n, o)."""
    return hessian(lambda outputs: loss_of(kind, outputs, y, reduction))(f.detach())


def layer_rows(model, x):
    """For each linear of a Sequential its inputs (n, in) and d outputs / d its outputs (n, o, out).

    Through a perturbation that is added to the layer's output, not through hooks.
    """
    layers = linears(model)

    def run(x, *shifts):
        h, inputs, shifts = x, [], list(shifts)
        for module in model:
            if isinstance(module, nn.Linear):
                inputs.append(h)
                h = F.linear(h, module.weight, module.bias) + shifts.pop(0)
            else:
                h = module(h)
        return h, inputs

    zeros = [torch.zeros(layer.out_features, dtype=x.dtype) for layer in layers]
    argnums = tuple(range(1, len(layers) + 1))
    jacobian = jacrev(run, argnums=argnums, has_aux=True)
    jacobians, inputs = vmap(jacobian, in_dims=(0, *(None,) * len(layers)))(x, *zeros)
    return [(h.detach(), j.detach()) for h, j in zip(inputs, jacobians, strict=True)]


def example_curvatures(jacobians, curvature):
    """J_i^T D_i J_i (n, out, out) for J (n, o, out) and D (n, o, n, o)."""
    blocks = torch.einsum("iaib->iab", curvature)
    return torch.einsum("iao,iab,ibp->iop", jacobians, blocks, jacobians)


def dense_fisher(model, x, curvature):
    """The Gauss-Newton matrix of all parameters, in the order of `model.parameters()`."""
    model = copy.deepcopy(model)  # the copy has no hooks
    params = {name: p.detach() for name, p in model.named_parameters()}
    jacobian = jacrev(lambda params: functional_call(model, params, (x,)))(params)
    n, o = curvature.shape[:2]
    flat = torch.cat([j.reshape(n * o, -1) for j in jacobian.values()], 1)
    return flat.T @ curvature.reshape(n * o, n * o) @ flat


def homogeneous(h, bias=True):
    return torch.cat([h, h.new_ones(len(h), 1)], 1) if bias else h


def damped(factor, damping, bias=True):
    """The factor of (h, 1) or h with damping added for the entries of h."""
    diagonal = torch.full((len(factor),), float(damping), dtype=factor.dtype)
    if bias:
        diagonal[-1] = 0
    return factor + torch.diag(diagonal)


def joint(weight, bias):
    """(out, in + 1)"""
    return weight if bias is None else torch.cat([weight, bias[:, None]], 1)


def vec(matrix):
    """Columns below one another: (A kron G) vec(V) = vec(G V A^T)."""
    return matrix.T.reshape(-1)


def unvec(vector, like):
    return vector.reshape(like.shape[1], like.shape[0]).T


def grads(layer):
    return joint(layer.weight.grad, None if layer.bias is None else layer.bias.grad)


def values(layer):
    bias = None if layer.bias is None else layer.bias.detach()
    return joint(layer.weight.detach(), bias).clone()


def bare(**options):
    """Options under which a step is the undamped preconditioned gradient of one batch."""
    return {
        "lr": 1.0,
        "momentum": 0.0,
        "nesterov": False,
        "max_norm": None,
        "max_decrease": None,
        "damping": 0.0,
        "relative_damping": 0.0,
        "warmup": 0,
    } | options


def train(model, opt, batches, loss_fn):
    for x, y in batches:
        opt.zero_grad()
        loss_fn(model(x), y).backward()
        opt.step()
