"""Gradients for the output factors: what a model's own distribution would send back.

One more backward pass, from the outputs to the layers' outputs alone, right after the model's
forward pass and before the user's own. What it starts from is, with S_i S_i^T = D_i the curvature
of the loss at the outputs of example i and N what the loss divides its sum by,

    sampled        the score of targets drawn from the model        E[N s s^T] = D
    gauss_newton   S r, random signs r                              E[S r (S r)^T] = D
    exact          every column of S in turn                        sum_k S_k S_k^T = D

D is both Fisher and Gauss-Newton (`fused_so.likelihoods`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from fused_so._dtypes import accumulate
from fused_so.capture import Capture, hook
from fused_so.likelihoods import Categorical, Likelihood

SAMPLED = ("sampled", "gauss_newton", "exact")
_ZERO = 1e-2  # rounding, of a relative sum


class OutputPasses:
    """Runs the extra backward passes of one model.

    While `wanted()`, a forward pass of the model in grad mode ends with the passes of `kind`; the
    captures' hooks then receive each layer's rows, scaled so that the output factor is the mean of
    their products. Meanwhile `rows` is the number of examples (None at all other times), `scale`
    that over N, and `first` says whether the pass is the first after its forward pass.

    Args:
        model, likelihood, kind: what is differentiated, and from what.
        captures: the hooks on the model's layers.
        wanted: asked before every forward pass.
    """

    def __init__(
        self,
        model: nn.Module,
        likelihood: Likelihood,
        kind: str,
        captures: list[Capture],
        wanted: Callable[[], bool],
    ):
        self.rows: int | None = None
        self._knows_classes = not isinstance(likelihood, Categorical)
        self.first = False
        self.scale = 1.0
        self._likelihood, self._kind = likelihood, kind
        self._captures, self._wanted = captures, wanted
        self._handles = [
            hook(model.register_forward_pre_hook, self._begin),
            hook(model.register_forward_hook, self._end),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _begin(self, *_) -> None:
        observed = any(capture.active for capture in self._captures)
        wanted = observed and torch.is_grad_enabled() and self._wanted()
        for capture in self._captures:
            capture.edges, capture.rows = ([] if wanted else None), 0

    @torch.compiler.disable
    def _end(self, module: nn.Module, args: tuple, outputs: Tensor) -> None:
        edges = [edge for capture in self._captures for edge in capture.edges or ()]
        for capture in self._captures:
            capture.edges = None
        if not edges:
            return
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"the model must return one tensor for its curvature to be sampled, got "
                f"{type(outputs).__name__}; wrap the model, or use factors='empirical'"
            )
        if outputs.numel() == 0:
            return
        try:
            for first, scores in enumerate(self._scores(outputs.detach())):
                self.first = first == 0
                # The statistics that the hooks take are not the model's to compute in half.
                with torch.autocast(outputs.device.type, enabled=False):
                    torch.autograd.grad(
                        outputs, edges, scores.to(outputs), retain_graph=True, allow_unused=True
                    )
        finally:
            self.rows = None
        if not self._knows_classes and outputs.ndim > 2 and outputs.requires_grad:
            outputs.register_hook(self._check_classes)

    def _check_classes(self, g: Tensor) -> None:
        """Raises if the loss's gradient g shows its classes in a dimension that is not the second.

        That of a cross-entropy, softmax(f) - e_y, sums to 0 over the classes. Looked at once, with
        gradients that tell; any other loss is let pass.
        """
        g = accumulate(g.detach())
        # sum |sum_d g| / sum |g|, dimension by dimension
        sums = torch.stack([g.sum(d).abs().sum() for d in range(1, g.ndim)]) / g.abs().sum()
        over = sums.tolist()
        self._knows_classes = all(map(math.isfinite, over))
        if over[0] > max(_ZERO, 10 * min(over)) and min(over) < _ZERO:
            self._knows_classes = False
            raise ValueError(
                f"outputs of shape {tuple(g.shape)} must have their classes in dimension 1, as "
                f"nn.CrossEntropyLoss has, but the gradient of the loss sums to 0 over dimension "
                f"{1 + over.index(min(over))}, as over classes; return (n, classes, ...) from the "
                f"model, or one row a target"
            )

    @torch.no_grad()
    def _scores(self, outputs: Tensor) -> Iterator[Tensor]:
        """What the passes start from, scaled so that G is a mean over rows of their products."""
        likelihood, n = self._likelihood, self._likelihood.examples(outputs)
        normalizer = likelihood.normalizer(outputs)
        self.rows, self.scale = n, n / max(normalizer, 1)
        if self._kind == "sampled":
            # N sum_i s s^T is the mean over i of n N s s^T
            targets = likelihood.sample(outputs)
            yield likelihood.score(outputs, targets).mul_(math.sqrt(n * normalizer))
        elif self._kind == "gauss_newton":
            # sum_i S r (S r)^T is the mean over i of n of them
            yield likelihood.sketch(outputs).mul_(math.sqrt(n))
        else:
            # sum_ik S_k S_k^T is the mean over i and k of n o of them
            columns = likelihood.curvature_sqrt_columns(outputs)
            yield from math.sqrt(n * len(columns)) * columns
