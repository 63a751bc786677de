r"""What a loss looks like at the output of a model: its score, its curvature, its samples.

A likelihood l_i = -log p(y_i | f_i) of the targets y_i given a model's outputs f_i, one example
a row i, and a reduction are one of PyTorch's losses:

.. math:: L = \frac1N \sum_i l_i

==========================  ====================================  =============================
likelihood, outputs f       PyTorch's loss                        N, if reduction is "mean"
==========================  ====================================  =============================
``Gaussian(scale)``, means  ``mse_loss / (2 scale^2)``            entries of the outputs
``Bernoulli()``, logits     ``binary_cross_entropy_with_logits``  entries of the outputs
``Categorical()``, logits   ``cross_entropy``                     targets that are not ignored
==========================  ====================================  =============================

With the reduction "sum", and with "none", which keeps one loss an entry or target, N = 1. With
"batchmean" N is the number of examples, as in ``nn.KLDivLoss`` and where a loop sums over an
example's entries and averages over examples: ``mse_loss(..., reduction="sum") / len(f)``. A mean
over entries is not one over rows: on (n, o) outputs, N of ``mse_loss`` is n o.

Curvature is that of L with respect to the outputs, one block D_i a row: the rows of the outputs
do not interact. The Gauss-Newton block is the Hessian of l_i / N. The Fisher block is

.. math:: \frac1N E_{y \sim p(y | f_i)}[\nabla l_i \nabla l_i^T]

the average, weighted as the loss weighs its terms, of what single scores expect; not the
expectation for the gradient of the averaged L, which is N times smaller. So a natural gradient is
the same for a sum and a mean. All outputs here are natural parameters (up to a scale), so that no
Hessian depends on the targets, and both blocks are the same matrix (Pascanu and Bengio 2014,
section 7): with p the probabilities of a row

=============  ====================  ==========================================
likelihood     N D                   sqrt(N) S, where S S^T = D
=============  ====================  ==========================================
Gaussian       I / scale^2           I / scale
Bernoulli      diag(p (1 - p))       diag(sqrt(p (1 - p)))
Categorical    diag(p) - p p^T       diag(sqrt(p)) - p sqrt(p)^T
=============  ====================  ==========================================

How that compares with the sources:

- Table 3.I of George 2017 has I for the squared error. The Hessian of ||f - y||^2 is 2 I, which is
  ``Gaussian(scale=math.sqrt(0.5))``; I belongs to half of it, ``Gaussian(scale=1)``. Equation 9 of
  Pascanu and Bengio prints beta^2 where a standard deviation beta gives 1 / beta^2.
- Tables 3.II and 3.III cut the network after the sigmoid or softmax. With the Jacobian
  diag(p) - p p^T of the softmax on both sides, their Fisher diag(1/p) becomes the D above (Pascanu
  and Bengio, eq. 20 and 21), and their Gauss-Newton diag(y / p^2) becomes the outer product of an
  example's own score (George, section 3.4), of which D is the expectation.

float16 and bfloat16 are computed in float32, and results are float32 (float64 for float64
outputs). Nothing waits for a device. All methods run under the transforms of torch.func; those
that draw numbers need `randomness="different"` (or "same") in a vmap.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_so._dtypes import accumulate
from fused_so.ops import _check

REDUCTIONS = ("mean", "batchmean", "sum", "none")
KINDS = ("gauss_newton", "fisher")


@dataclass(frozen=True)
class Likelihood(ABC):
    """What the likelihoods share; `fused_so.likelihoods` has the formulas and the units.

    Every method takes the outputs, of a floating dtype, and targets on the same device. Where
    targets are optional they matter to `Categorical` only: ignored ones have no curvature and are
    not counted in a mean. Without them every target counts.

    Raises (all methods):
        TypeError: an argument is not a tensor, or of a dtype that its likelihood does not take.
        ValueError: a shape or a device does not fit the outputs.
    """

    reduction: str = field(default="mean", kw_only=True)

    def __post_init__(self):
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {REDUCTIONS}, got {self.reduction!r}")

    def value(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """L, the negative log-likelihood without constant terms, as PyTorch's loss reduces it.

        Returns:
            A 0-dim tensor; for the reduction "none" one loss an entry of the targets. As in
            PyTorch a mean of nothing is NaN.
        """
        x = self._checked(outputs, targets, required=True)
        losses = self._losses(x, targets)
        if self.reduction == "none":
            return losses
        total = losses.sum()
        return total / self._normalizer(x, targets)

    def normalizer(self, outputs: Tensor, targets: Tensor | None = None) -> Tensor | int:
        """N, what the sum over examples is divided by; a tensor if targets must be counted."""
        x = self._checked(outputs, targets)
        return self._normalizer(x, targets)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The gradient of L with respect to the outputs, in their shape.

        For the reduction "none", that of the sum. Row i is the gradient of l_i / N, so for targets
        from `sample` N times the sum of outer products of rows estimates the Fisher.
        """
        x = self._checked(outputs, targets, required=True)
        return self._weight(x, targets) * self._score(x, targets)

    def value_from_score(self, outputs: Tensor, score: Tensor) -> Tensor:
        """L, from its gradient with respect to the outputs in place of the targets.

        The sum for the reduction "none". `Categorical` needs no N: of terms that are ignored or
        weighted by a factor, the gradient is so too. Never negative, whatever the score is.

        Args:
            outputs: as for `value`.
            score: in the shape of the outputs, as `score` returns it.
        """
        x = self._checked(outputs, None)
        _check_like("score", score, outputs)
        return self._value_from_score(x, score.to(x.dtype))

    def value_lower_bound(self, outputs: Tensor, score: Tensor) -> Tensor:
        """At most `value_from_score`, for less; 0 if there is nothing to say for less.

        Arguments as for `value_from_score`.
        """
        x = self._checked(outputs, None)
        _check_like("score", score, outputs)
        return self._value_lower_bound(x, score.to(x.dtype))

    def has_score(self, outputs: Tensor, score: Tensor) -> Tensor:
        """Whether `score` may be a gradient of L; a 0-dim bool. True where that cannot be told.

        Only `Bernoulli` tells: its targets, which a score implies, are between 0 and 1, so that a
        multiple of the score is found out. What is not a number is let pass.
        """
        x = self._checked(outputs, None)
        _check_like("score", score, outputs)
        return self._has_score(x, score.to(x.dtype))

    def sample(
        self,
        outputs: Tensor,
        targets: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Targets drawn from the model's own distribution, as the loss takes them; no gradient.

        Args:
            outputs: as for `value`.
            targets: those that are ignored stay so.
            generator: on the device of the outputs; by default torch's own.
        """
        x = self._checked(outputs, targets)
        _check_generator(generator)
        return self._sample(x.detach(), targets, generator)

    def curvature_product(
        self,
        outputs: Tensor,
        v: Tensor,
        *,
        kind: str = "gauss_newton",
        targets: Tensor | None = None,
    ) -> Tensor:
        """D_i v_i for every row i.

        Args:
            outputs: as for `value`.
            v: in the shape of the outputs; `torch.vmap` takes many at once.
            kind: "gauss_newton", the Hessian, or "fisher": for these likelihoods the same numbers.
            targets: ignored ones have no curvature.

        Raises:
            ValueError: kind is neither.
        """
        x = self._checked(outputs, targets)
        _check_like("v", v, outputs)
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
        return self._weight(x, targets) * self._product(x, v.to(x.dtype))

    def curvature_sqrt_product(
        self,
        outputs: Tensor,
        v: Tensor,
        *,
        targets: Tensor | None = None,
        transposed: bool = False,
    ) -> Tensor:
        """S_i v_i for every row i, or S_i^T v_i if `transposed`, where S_i S_i^T = D_i.

        S is square, and as singular as D. S_i^T turns the tangents of the outputs into those whose
        squares sum to the curvature: v^T D v = ||S^T v||^2. Arguments as in `curvature_product`.
        """
        x = self._checked(outputs, targets)
        _check_like("v", v, outputs)
        _check.boolean("transposed", transposed)
        root = self._sqrt_transposed if transposed else self._sqrt
        return self._weight(x, targets) ** 0.5 * root(x, v.to(x.dtype))

    def curvature_sqrt_columns(self, outputs: Tensor, *, targets: Tensor | None = None) -> Tensor:
        """All columns of S_i, the k-th of every row in result[k], in the shape of the outputs.

        A backward pass from each gives per-example gradients J_i^T S_i e_k; the sum of their outer
        products is J^T D J, the exact curvature. There are as many as a row has entries: o for
        (n, o), o d for (n, o, d). One-dimensional outputs are n rows of one entry, but one row of
        o classes for `Categorical`.
        """
        x = self._checked(outputs, targets)
        row = self._row(x)
        entries = math.prod(row)
        basis = torch.eye(entries, dtype=x.dtype, device=x.device)
        basis = basis.reshape(entries, *(1,) * (x.ndim - len(row)), *row)
        columns = torch.vmap(lambda e: self._sqrt(x, e))(basis.expand(entries, *x.shape))
        return self._weight(x, targets) ** 0.5 * columns

    def sketch(
        self,
        outputs: Tensor,
        *,
        targets: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """S_i r_i for every row i, with independent random signs r_i.

        E[S r (S r)^T] = D: one backward pass from it gives per-example gradients whose outer
        products sum to an unbiased estimate of J^T D J, scaled as `curvature_product`. Where the
        model is confident it has much less noise than sampled targets have: no rare draw is large.
        Arguments as in `sample`.
        """
        x = self._checked(outputs, targets)
        _check_generator(generator)
        # bernoulli_ takes four times as long on a CPU. One sign in 2^24, in float32, is 0.
        signs = torch.empty_like(x).uniform_(-1, 1, generator=generator).sign_()
        return self._sqrt(x, self._weight(x, targets) ** 0.5 * signs)

    def _checked(self, outputs: Tensor, targets: Tensor | None, required: bool = False) -> Tensor:
        """The outputs in the dtype to compute in, after all checks."""
        self._check_outputs(outputs)
        if required or targets is not None:
            self._check_targets(outputs, targets)
            _check.same_device("targets", targets, "outputs", outputs)
        return accumulate(outputs)

    def _check_outputs(self, outputs: Tensor) -> None:
        _check.floating("outputs", outputs)

    def _check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        _check.shape("targets", targets, tuple(outputs.shape))

    def _row(self, x: Tensor) -> torch.Size:
        """The shape of one example's outputs."""
        return x.shape[1:]

    def _normalizer(self, x: Tensor, targets: Tensor | None) -> Tensor | int:
        """N."""
        if self.reduction == "mean":
            return self._count(x, targets)
        return self.examples(x) if self.reduction == "batchmean" else 1

    def examples(self, outputs: Tensor) -> int:
        """The number of examples, along the first dimension of the outputs."""
        return outputs.shape[0] if outputs.ndim else 1

    def _count(self, x: Tensor, targets: Tensor | None) -> Tensor | int:
        """N of a mean."""
        return x.numel()

    def _weight(self, x: Tensor, targets: Tensor | None) -> Tensor | float:
        """What L multiplies each term by: 1 / N, or 0 where it is ignored; broadcasts to x."""
        return 1.0 / max(self._normalizer(x, None), 1)

    # What follows is the mathematics of a subclass, all of it for the weight 1.

    @abstractmethod
    def _losses(self, x: Tensor, targets: Tensor) -> Tensor: ...

    @abstractmethod
    def _score(self, x: Tensor, targets: Tensor) -> Tensor: ...

    @abstractmethod
    def _value_from_score(self, x: Tensor, score: Tensor) -> Tensor: ...

    def _value_lower_bound(self, x: Tensor, score: Tensor) -> Tensor:
        return score.new_zeros(())

    def _has_score(self, x: Tensor, score: Tensor) -> Tensor:
        return score.new_ones((), dtype=torch.bool)

    @abstractmethod
    def _sample(
        self, x: Tensor, targets: Tensor | None, generator: torch.Generator | None
    ) -> Tensor: ...

    @abstractmethod
    def _product(self, x: Tensor, v: Tensor) -> Tensor: ...

    @abstractmethod
    def _sqrt(self, x: Tensor, v: Tensor) -> Tensor: ...

    def _sqrt_transposed(self, x: Tensor, v: Tensor) -> Tensor:
        return self._sqrt(x, v)


@dataclass(frozen=True)
class Gaussian(Likelihood):
    r"""Independent normal targets of one known standard deviation; the outputs are their means.

    .. math:: l_i = \frac1{2 \sigma^2} ||f_i - y_i||^2

    sigma being `scale`; log(sigma sqrt(2 pi)) an entry is dropped. L is ``F.mse_loss`` over
    2 sigma^2: half the squared error by default, ``F.mse_loss`` itself at sigma = sqrt(1/2).
    Outputs (n, ...) and targets of the same shape are floating.

    Args:
        scale: the standard deviation sigma, > 0.
        reduction: "mean" (over entries, as in PyTorch), "batchmean" (over examples), "sum" or
            "none".

    Raises:
        TypeError, ValueError: an argument breaks a rule above.

    Source: Pascanu and Bengio 2014, section 8.2.1, with the Fisher 1 / sigma^2.
    """

    scale: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        _check.within("scale", self.scale, 0.0, math.inf)
        if not 0 < self.scale * self.scale < math.inf:
            raise ValueError(
                f"scale must be positive, and its square positive and finite, got {self.scale}"
            )

    @property
    def _precision(self) -> float:
        return 1 / (self.scale * self.scale)

    def _losses(self, x: Tensor, targets: Tensor) -> Tensor:
        # (f - y)^2 / (2 sigma^2)
        return 0.5 * self._precision * (x - targets.to(x.dtype)).square()

    def _score(self, x: Tensor, targets: Tensor) -> Tensor:
        # (f - y) / sigma^2
        return self._precision * (x - targets.to(x.dtype))

    def _value_from_score(self, x: Tensor, score: Tensor) -> Tensor:
        # g = (f - y) / (sigma^2 N), so that L = sigma^2 N |g|^2 / 2
        n = max(self._normalizer(x, None), 1)
        return 0.5 * n / self._precision * score.square().sum()

    def _sample(
        self, x: Tensor, targets: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        # y = f + sigma z
        return x + self.scale * torch.empty_like(x).normal_(generator=generator)

    def _product(self, x: Tensor, v: Tensor) -> Tensor:
        return self._precision * v

    def _sqrt(self, x: Tensor, v: Tensor) -> Tensor:
        return v / self.scale


@dataclass(frozen=True)
class Bernoulli(Likelihood):
    r"""Independent binary targets; the outputs are the logits of their being 1.

    .. math:: l_i = -\sum_j y_{ij} \log p_{ij} + (1 - y_{ij}) \log(1 - p_{ij}), \quad
        p = \operatorname{sigmoid}(f)

    L is ``F.binary_cross_entropy_with_logits``; nothing is dropped. Outputs (n, ...) and targets
    of the same shape are floating. Targets between 0 and 1 are taken, as in PyTorch, and not
    checked, which would wait for the device.

    Args:
        reduction: "mean" (over entries, as in PyTorch), "batchmean" (over examples), "sum" or
            "none".

    Raises:
        ValueError: an unknown reduction.

    Source: Pascanu and Bengio 2014, section 8.2.2 and eq. 17, on the logits.
    """

    def _losses(self, x: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(x, targets.to(x.dtype), reduction="none")

    def _score(self, x: Tensor, targets: Tensor) -> Tensor:
        # p - y
        return x.sigmoid() - targets.to(x.dtype)

    def _value_from_score(self, x: Tensor, score: Tensor) -> Tensor:
        n = max(self._normalizer(x, None), 1)
        targets = self._targets(x.sigmoid(), score).clamp_(0, 1)
        return F.binary_cross_entropy_with_logits(x, targets, reduction="sum") / n

    def _value_lower_bound(self, x: Tensor, score: Tensor) -> Tensor:
        # Pinsker's inequality: l_i >= KL(y_i || p_i) >= 2 |p_i - y_i|^2
        n, p = max(self._normalizer(x, None), 1), x.sigmoid()
        targets = self._targets(p, score).clamp_(0, 1)
        return torch.linalg.vector_norm(targets.sub_(p)).square() * (2 / n)

    def _has_score(self, x: Tensor, score: Tensor) -> Tensor:
        # In [0, 1] but for a hundredth: half precision has rounded.
        return ~((self._targets(x.sigmoid(), score) - 0.5).abs() > 0.51).any()

    def _targets(self, p: Tensor, score: Tensor) -> Tensor:
        # y = p - N g
        return p.sub(score, alpha=max(self._normalizer(p, None), 1))

    def _sample(
        self, x: Tensor, targets: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        return (torch.empty_like(x).uniform_(generator=generator) < x.sigmoid()).to(x.dtype)

    def _product(self, x: Tensor, v: Tensor) -> Tensor:
        # p (1 - p) v, where 1 - sigmoid(x) would round to nothing
        return x.sigmoid() * (-x).sigmoid() * v

    def _sqrt(self, x: Tensor, v: Tensor) -> Tensor:
        # sqrt(p (1 - p)) v, in logarithms: the square underflows, and its root has no slope at 0
        return F.logsigmoid(x).add_(F.logsigmoid(-x)).mul_(0.5).exp_() * v


@dataclass(frozen=True)
class Categorical(Likelihood):
    r"""One class out of o; the outputs are the logits of the classes.

    .. math:: l_i = -\log p_{i, y_i}, \qquad p_i = \operatorname{softmax}(f_i)

    summed over positions if there are any. L is ``F.cross_entropy``; nothing is dropped. Outputs
    are (n, o) or (n, o, d1, ...), or (o,) for one example; targets are class indices, int64,
    without the dimension of the classes: (n,), (n, d1, ...) or (). An index out of range raises
    in PyTorch, as there. Targets given as probabilities are not supported.

    Args:
        ignore_index: targets of this value have neither loss nor curvature, and are not counted
            in a mean.
        reduction: "mean" (over targets that are not ignored, as in PyTorch), "batchmean" (over
            examples, ignored or not), "sum" or "none".

    Raises:
        TypeError: ignore_index is not an int.
        ValueError: an unknown reduction; from `sample`, an ignore_index that is one of the
            classes, since the loss would ignore it when it is drawn (`sketch` has no such limit).

    Source: Pascanu and Bengio 2014, eq. 19 to 21. The root is that of diag(p) - p p^T =
    (diag(sqrt p) - p sqrt(p)^T) (diag(sqrt p) - sqrt(p) p^T), as sqrt(p)^T sqrt(p) = 1.
    """

    ignore_index: int = -100

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, int):
            raise TypeError(f"ignore_index must be an int, got {self.ignore_index!r}")

    def _check_outputs(self, outputs: Tensor) -> None:
        super()._check_outputs(outputs)
        if outputs.ndim == 0:
            raise ValueError("outputs must be (n, classes, ...) or (classes,), got a 0-dim tensor")

    def _check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        if not isinstance(targets, Tensor):
            raise TypeError(f"targets must be a Tensor, got {type(targets).__name__}")
        if targets.dtype != torch.int64:
            raise TypeError(f"targets must be class indices, torch.int64, got {targets.dtype}")
        dim = _class_dim(outputs)
        expected = (*outputs.shape[:dim], *outputs.shape[dim + 1 :])
        if tuple(targets.shape) != expected:
            raise ValueError(
                f"targets must have shape {expected}, that of the outputs {tuple(outputs.shape)} "
                f"without the classes, got {tuple(targets.shape)}"
            )

    def _row(self, x: Tensor) -> torch.Size:
        return x.shape[_class_dim(x) :]

    def examples(self, outputs: Tensor) -> int:
        return outputs.shape[0] if outputs.ndim > 1 else 1

    def _count(self, x: Tensor, targets: Tensor | None) -> Tensor | int:
        if targets is None:
            dim = _class_dim(x)
            return math.prod(x.shape[:dim]) * math.prod(x.shape[dim + 1 :])
        return (targets != self.ignore_index).sum()

    def _weight(self, x: Tensor, targets: Tensor | None) -> Tensor | float:
        if targets is None:
            return super()._weight(x, targets)
        weight = (targets != self.ignore_index).to(x.dtype).unsqueeze(_class_dim(x))
        if self.reduction == "mean":
            # The gradient of a mean of nothing is 0 in PyTorch, though the mean is NaN.
            return weight / self._count(x, targets).clamp(min=1)
        return weight * super()._weight(x, None)

    def _losses(self, x: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(x, targets, ignore_index=self.ignore_index, reduction="none")

    def _score(self, x: Tensor, targets: Tensor) -> Tensor:
        # p - e_y; an ignored index may be out of range, and has weight 0
        dim = _class_dim(x)
        index = torch.where(targets == self.ignore_index, 0, targets).unsqueeze(dim)
        return x.softmax(dim).scatter_add(dim, index, -torch.ones_like(index, dtype=x.dtype))

    def _value_from_score(self, x: Tensor, score: Tensor) -> Tensor:
        # Of a row g = w (p - e_y) only entry y is negative, so that w l = -g_y log p_y / (p_y - 1).
        dim = _class_dim(x)
        least, target = score.min(dim, keepdim=True)
        log_p = x.log_softmax(dim).gather(dim, target)
        return (-least.clamp(max=0) * torch.where(log_p < 0, log_p / log_p.expm1(), 1.0)).sum()

    def _sample(
        self, x: Tensor, targets: Tensor | None, generator: torch.Generator | None
    ) -> Tensor:
        dim = _class_dim(x)
        if 0 <= self.ignore_index < x.shape[dim]:
            raise ValueError(
                f"ignore_index must not be one of the {x.shape[dim]} classes, got "
                f"{self.ignore_index}: the loss would ignore it where it is drawn. Mark ignored "
                f"targets by another value, or use sketch"
            )
        # The first of o exponential clocks of rates p_j rings for class j with probability p_j:
        # argmin_j E_j / p_j. torch.multinomial would wait for the device.
        clocks = torch.empty_like(x).exponential_(generator=generator)
        drawn = (x - clocks.log()).argmax(dim)
        if targets is None:
            return drawn
        return torch.where(targets == self.ignore_index, targets, drawn)

    def _product(self, x: Tensor, v: Tensor) -> Tensor:
        # diag(p) v - p p^T v = p (v - p^T v)
        dim = _class_dim(x)
        p = x.softmax(dim)
        return p * (v - (p * v).sum(dim, keepdim=True))

    def _sqrt(self, x: Tensor, v: Tensor) -> Tensor:
        # diag(s) v - p s^T v = s (v - s (s^T v)), s = sqrt(p)
        dim = _class_dim(x)
        s = _sqrt_softmax(x, dim)
        return s * (v - s * (s * v).sum(dim, keepdim=True))

    def _sqrt_transposed(self, x: Tensor, v: Tensor) -> Tensor:
        # diag(s) v - s p^T v = s (v - p^T v)
        dim = _class_dim(x)
        s = _sqrt_softmax(x, dim)
        return s * (v - (s * s * v).sum(dim, keepdim=True))


def likelihood_of(loss: nn.Module | Likelihood, *, name: str = "loss") -> Likelihood:
    """The likelihood whose `value` is this loss; a likelihood is returned as it is.

    Args:
        name: what errors call it.
        loss: nn.MSELoss (Gaussian of scale sqrt(1/2)), nn.BCEWithLogitsLoss or
            nn.CrossEntropyLoss, whose reduction and ignore_index are kept.

    Raises:
        TypeError: another loss; also a subclass, which may compute anything.
        ValueError: a loss with weight, pos_weight or label_smoothing: it is no negative
            log-likelihood of the targets, or not one of these.
    """
    if isinstance(loss, Likelihood):
        return loss
    if type(loss) not in (nn.MSELoss, nn.BCEWithLogitsLoss, nn.CrossEntropyLoss):
        raise TypeError(
            f"{name} must be nn.MSELoss, nn.BCEWithLogitsLoss or nn.CrossEntropyLoss, or a "
            f"Likelihood, got {loss.__name__ if isinstance(loss, type) else type(loss).__name__}"
            f"{', the class and not an object of it' if isinstance(loss, type) else ''}"
        )
    for option in ("weight", "pos_weight", "label_smoothing"):
        given = getattr(loss, option, None)
        if isinstance(given, Tensor) or given:
            raise ValueError(f"{type(loss).__name__} must have no {option}, got {given}")
    if isinstance(loss, nn.MSELoss):
        return Gaussian(math.sqrt(0.5), reduction=loss.reduction)
    if isinstance(loss, nn.BCEWithLogitsLoss):
        return Bernoulli(reduction=loss.reduction)
    return Categorical(loss.ignore_index, reduction=loss.reduction)


def _class_dim(outputs: Tensor) -> int:
    return min(outputs.ndim - 1, 1)


def _sqrt_softmax(x: Tensor, dim: int) -> Tensor:
    """In logarithms: the root of a probability that underflows has no slope."""
    return (0.5 * x.log_softmax(dim)).exp()


def _check_like(name: str, value: Tensor, outputs: Tensor) -> None:
    _check.shape(name, value, tuple(outputs.shape))
    _check.same_device(name, value, "outputs", outputs)


def _check_generator(generator: object) -> None:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator or None, got {type(generator).__name__}"
        )
