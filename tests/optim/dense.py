"""Metrics of small models by brute force: whole Jacobians and matrices, in float64."""

from __future__ import annotations

import copy
import itertools

import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev

DOUBLE = torch.float64


def chain(*widths, bias=True, dtype=DOUBLE):
    layers = []
    for fan_in, fan_out in itertools.pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out, bias=bias, dtype=dtype), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def function(model, *inputs):
    """The model, without hooks or running averages, as a function of one vector of parameters."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d) and module.training:
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    names = [name for name, _ in model.named_parameters()]
    params = [p.detach() for p in model.parameters()]
    sizes, shapes = [p.numel() for p in params], [p.shape for p in params]

    def call(vector):
        parts = [v.view(s) for v, s in zip(vector.split(sizes), shapes, strict=True)]
        return functional_call(model, dict(zip(names, parts, strict=True)), inputs)

    return call, flat(params)


def jacobian(model, *inputs):
    """(examples, outputs, parameters)."""
    call, at = function(model, *inputs)
    jac = jacrev(call)(at)
    return jac.reshape(len(jac), -1, jac.shape[-1])


def output_hessian(value, outputs):
    """D_i for every example, from the loss alone: (examples, outputs, outputs)."""
    n = len(outputs)
    whole = hessian(value)(outputs.detach()).reshape(n, outputs[0].numel(), n, -1)
    return torch.stack([whole[i, :, i] for i in range(n)])


def gauss_newton(model, value, x):
    jac, (call, at) = jacobian(model, x), function(model, x)
    return torch.einsum("noi,nop,npj->ij", jac, output_hessian(value, call(at)), jac)


def loss_hessian(model, value, x):
    call, at = function(model, x)
    return hessian(lambda v: value(call(v)))(at)


def example_gradients(model, values, x):
    """(examples, parameters): the gradient of every example's own loss, values(outputs)[i]."""
    call, at = function(model, x)
    return jacrev(lambda v: values(call(v)))(at)
