"""Products of a vector with the curvature of a model's parameters, which is never made."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fused_so._dtypes import accumulate_dtype
from fused_so.likelihoods import Categorical, Likelihood
from fused_so.optim.batches import Batch, Watch

METRICS = ("gauss_newton", "sampled_fisher", "empirical_fisher", "hessian")
OF_TARGETS = ("empirical_fisher", "hessian")


class Metric:
    r"""The curvature G at the model's present parameters, as a function v -> G v.

    .. math:: G = \sum_i J_i^T D_i J_i

    with J_i the Jacobian of example i's outputs and D_i what `kind` says: the likelihood's
    curvature for "gauss_newton"; N s_i s_i^T with the scores s_i of the targets for
    "empirical_fisher" and of targets drawn from the model for "sampled_fisher". "hessian" adds
    sum s_i d^2 f_i to "gauss_newton". Several batches count as one.

    u -> J^T u is built once, as a graph that can be differentiated: its derivative with respect
    to u, in a direction v, is J v, so that a product takes no new forward pass. The forward-mode
    pass of `torch.func.jvp` would repeat it every time.

    Args:
        watch: of the model.
        names, params: the parameters that v is shaped as.
        likelihood: of the outputs.
        kind: one of METRICS.
        batches: with the score of the loss where `kind` is in OF_TARGETS.
        examples: how many the gradient is of, if the batches are not the same ones: the metric of
            a sum is that of a sum of so many.
    """

    def __init__(
        self,
        watch: Watch,
        names: Sequence[str],
        params: Sequence[Tensor],
        likelihood: Likelihood,
        kind: str,
        batches: Sequence[Batch],
        examples: int | None = None,
    ):
        self._kind = kind
        # Leaves of their own: the graph below ends here, and no hook of a parameter runs.
        self._params = [p.detach().requires_grad_() for p in params]
        named = dict(zip(names, self._params, strict=True))
        with torch.enable_grad():
            outputs = [watch.call(batch, named) for batch in batches]
        weight = weight_of(likelihood, outputs, examples)
        scores = [batch.score for batch in batches]
        curvatures = curvatures_of(likelihood, kind, outputs, scores, weight)
        self._parts = [
            (out, curvature, *self._pull_back(out, batch.score))
            for out, curvature, batch in zip(outputs, curvatures, batches, strict=True)
        ]

    def _pull_back(self, outputs: Tensor, score: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """u, and J^T u as a function of it, at the score: there its slope holds s d^2 f too."""
        at = torch.zeros_like(outputs) if self._kind != "hessian" else score.to(outputs.dtype)
        with torch.enable_grad():
            u = at.detach().clone().requires_grad_()
            pulled = torch.autograd.grad(
                outputs, self._params, u, create_graph=True, materialize_grads=True
            )
        return u, list(pulled)

    def __call__(self, v: Sequence[Tensor]) -> list[Tensor]:
        v = [t.to(p.dtype) for t, p in zip(v, self._params, strict=True)]
        total: list[Tensor] | None = None
        for outputs, curvature, u, pulled in self._parts:
            # A parameter that these outputs do not depend on has no slope.
            pairs = [(p, t) for p, t in zip(pulled, v, strict=True) if p.requires_grad]
            of = [u, *self._params] if self._kind == "hessian" else [u]
            tangent, *second = torch.autograd.grad(
                [p for p, _ in pairs], of, [t for _, t in pairs],
                retain_graph=True, materialize_grads=True,
            )  # fmt: skip
            # J^T D J v
            image = torch.autograd.grad(
                outputs, self._params, curvature(tangent).to(outputs.dtype),
                retain_graph=True, materialize_grads=True,
            )  # fmt: skip
            for addend in (image, second):
                if addend:
                    total = list(addend) if total is None else torch._foreach_add(total, addend)
        return total


def curvatures_of(
    likelihood: Likelihood,
    kind: str,
    outputs: list[Tensor],
    scores: list[Tensor | None],
    weight: float = 1.0,
) -> list[Callable[[Tensor], Tensor]]:
    """v -> D v at each batch's outputs; together they are the metric of one loss over all."""
    roots = fisher_roots(likelihood, kind, outputs, scores, weight)
    if roots is not None:
        return [lambda v, s=s: s * _rows(likelihood, s * v) for s in roots]
    outputs = [out.detach() for out in outputs]
    targets, shares = _targets_and_shares(likelihood, outputs, scores)
    return [
        lambda v, out=out, y=y, share=share: (
            (share * weight) * likelihood.curvature_product(out, v.to(out.dtype), targets=y)
        )
        for out, y, share in zip(outputs, targets, shares, strict=True)
    ]


def curvature_columns(
    likelihood: Likelihood,
    outputs: list[Tensor],
    scores: list[Tensor | None],
    weight: float = 1.0,
) -> list[Tensor]:
    """For each batch the columns of S_i with D_i = S_i S_i^T, (columns, *outputs.shape)."""
    outputs = [out.detach() for out in outputs]
    targets, shares = _targets_and_shares(likelihood, outputs, scores)
    return [
        (share * weight) ** 0.5 * likelihood.curvature_sqrt_columns(out, targets=y)
        for out, y, share in zip(outputs, targets, shares, strict=True)
    ]


def fisher_roots(
    likelihood: Likelihood,
    kind: str,
    outputs: list[Tensor],
    scores: list[Tensor | None],
    weight: float = 1.0,
) -> list[Tensor] | None:
    """For either Fisher of single targets, s_i with D_i = s_i s_i^T, as the outputs; or None."""
    if kind == "empirical_fisher":
        return [score * empirical_scale(likelihood, scores) for score in scores]
    if kind != "sampled_fisher":
        return None
    outputs = [out.detach() for out in outputs]
    targets, shares = _targets_and_shares(likelihood, outputs, scores)
    return [
        # N_b s s^T is the Fisher of a batch of its own.
        (share * weight * _count(likelihood, out, y)) ** 0.5
        * likelihood.score(out, likelihood.sample(out, y))
        for out, y, share in zip(outputs, targets, shares, strict=True)
    ]


def empirical_scale(likelihood: Likelihood, scores: list[Tensor]) -> Tensor | float:
    """sqrt(N), with the N of one mean over all batches: sum_i N s_i s_i^T is the metric."""
    if not _averages(likelihood):
        return 1.0
    return sum(_count(likelihood, score, _targets(likelihood, score)) for score in scores) ** 0.5


def weight_of(likelihood: Likelihood, outputs: list[Tensor], examples: int | None) -> float:
    """What the metric of these outputs counts for beside the gradient of so many examples."""
    if examples is None or _averages(likelihood):
        return 1.0
    return examples / max(1, sum(map(examples_of, outputs)))


def examples_of(outputs: Tensor) -> int:
    return outputs.shape[0] if outputs.ndim else 1


def _targets_and_shares(
    likelihood: Likelihood, outputs: list[Tensor], scores: list[Tensor | None]
) -> tuple[list[Tensor | None], list[Tensor | float]]:
    """What is known of the targets, and each batch's part in a mean over all, 1 in a sum."""
    targets = [_targets(likelihood, score) for score in scores]
    if not _averages(likelihood) or len(outputs) == 1:
        return targets, [1.0] * len(outputs)
    counts = [_count(likelihood, out, y) for out, y in zip(outputs, targets, strict=True)]
    total = sum(counts)
    return targets, [count / total for count in counts]


def _count(likelihood: Likelihood, outputs: Tensor, targets: Tensor | None) -> Tensor:
    """N, in the dtype of what it scales: the quotient of whole numbers would be float32."""
    count = likelihood.normalizer(outputs, targets)
    return torch.as_tensor(count, dtype=accumulate_dtype(outputs.dtype), device=outputs.device)


def _averages(likelihood: Likelihood) -> bool:
    return likelihood.reduction in ("mean", "batchmean")


def _targets(likelihood: Likelihood, score: Tensor | None) -> Tensor | None:
    """Targets that say which ones the loss ignored: those whose row of the score is all zero."""
    if score is None or not isinstance(likelihood, Categorical):
        return None
    ignored = (score == 0).all(min(score.ndim - 1, 1))
    other = 1 if likelihood.ignore_index == 0 else 0
    return torch.where(ignored, likelihood.ignore_index, other)


def _rows(likelihood: Likelihood, x: Tensor) -> Tensor:
    """The sums over each example's entries, which broadcast to x."""
    if x.ndim > 1:
        return x.flatten(1).sum(1).reshape(-1, *(1,) * (x.ndim - 1))
    return x.sum(0, keepdim=True) if isinstance(likelihood, Categorical) else x
