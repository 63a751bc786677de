"""Normalization layers that a method puts into a problem's model, in front of its activations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class MeanOnlyBatchNorm(nn.BatchNorm1d):
    """Subtract the batch's mean from each of `features` columns and add a learned bias.

    Salimans & Kingma (2016), section 4. In evaluation the mean is the running one,
    mean <- (1 - momentum) mean + momentum (mean of the batch), from zero on; or with momentum None
    the average over batches, which `torch.optim.swa_utils.update_bn` takes anew.
    """

    def __init__(self, features: int, momentum: float = 0.1):
        super().__init__(features, affine=False, momentum=momentum)
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, rows: Tensor) -> Tensor:
        if not self.training:
            return rows - self.running_mean + self.bias
        mean = rows.mean(dim=0)
        self.num_batches_tracked += 1
        rate = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.detach(), rate)
        return rows - mean + self.bias


def normalized(kind: Callable[[int], nn.Module], model: nn.Sequential) -> nn.Sequential:
    """The chain with a `kind` layer between each linear layer and its activation.

    A linear layer in front of one has no bias, which the normalization would cancel: its initial
    value becomes that of the normalization's bias. Weights are shared with `model`, and the
    normalization starts at scale 1, mean 0 and variance 1: in evaluation the initial function is
    that of `model`, for `nn.BatchNorm1d` up to its eps.
    """
    chain = nn.Sequential()
    layers = list(model)
    for layer, following in zip(layers, [*layers[1:], None], strict=True):
        if isinstance(layer, nn.Linear) and not isinstance(following, (nn.Linear, type(None))):
            linear = nn.utils.skip_init(
                nn.Linear, layer.in_features, layer.out_features, bias=False
            )
            linear.weight = layer.weight
            normalization = kind(layer.out_features)
            normalization.bias = layer.bias
            chain.extend([linear, normalization])
        else:
            chain.append(layer)
    return chain
