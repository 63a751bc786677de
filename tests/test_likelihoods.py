"""Likelihoods are PyTorch's losses, and their curvature and samples belong to those losses."""

from __future__ import annotations

import itertools
import math
import pickle
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, hessian, jacrev, jvp, vmap

import fused_so
from fused_so.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood, likelihood_of

PYTORCH_REDUCTIONS = ["mean", "sum", "none"]
REDUCTIONS = [*PYTORCH_REDUCTIONS, "batchmean"]
SCALE = 0.7


class Case(NamedTuple):
    likelihood: Likelihood
    outputs: Tensor
    targets: Tensor

    def loss(self, outputs, targets, reduction):
        """PyTorch's, in its own words."""
        if reduction == "batchmean":
            return self.loss(outputs, targets, "sum") / self.normalizer(reduction)
        if isinstance(self.likelihood, Gaussian):
            return F.mse_loss(outputs, targets, reduction=reduction) / (2 * SCALE**2)
        if isinstance(self.likelihood, Bernoulli):
            return F.binary_cross_entropy_with_logits(outputs, targets, reduction=reduction)
        ignored = self.likelihood.ignore_index
        return F.cross_entropy(outputs, targets, ignore_index=ignored, reduction=reduction)

    def normalizer(self, reduction):
        if reduction == "batchmean":
            alone = isinstance(self.likelihood, Categorical) and self.outputs.ndim == 1
            return 1 if alone else len(self.outputs)
        if reduction != "mean":
            return 1
        if isinstance(self.likelihood, Categorical):
            return int((self.targets != self.likelihood.ignore_index).sum())
        return self.outputs.numel()


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def classes(shape, count, ignored=None):
    """Every class, in turn, with every third target ignored."""
    targets = torch.arange(math.prod(shape)) % count
    if ignored is not None:
        targets[1::3] = ignored
    return targets.reshape(shape)


def entries(likelihood, *shape):
    outputs = draw(*shape)
    return Case(likelihood, outputs, (outputs.flip(0) > 0).double())


CASES = {
    "gaussian": Case(Gaussian(SCALE), draw(4, 3), draw(4, 3).flip(1)),
    "gaussian, vector": Case(Gaussian(SCALE), draw(4), draw(4).flip(0)),
    "gaussian, image": Case(Gaussian(SCALE), draw(2, 2, 3), draw(2, 2, 3).flip(2)),
    "bernoulli": entries(Bernoulli(), 4, 3),
    "bernoulli, vector": entries(Bernoulli(), 5),
    "bernoulli, image": entries(Bernoulli(), 2, 2, 2),
    "categorical": Case(Categorical(), draw(5, 4), classes((5,), 4)),
    "categorical, one example": Case(Categorical(), draw(4), torch.tensor(2)),
    "categorical, ignored": Case(Categorical(), draw(7, 3), classes((7,), 3, ignored=-100)),
    "categorical, ignored class": Case(Categorical(1), draw(7, 3), classes((7,), 3)),
    "categorical, sequence": Case(Categorical(-1), draw(2, 3, 4), classes((2, 4), 3, ignored=-1)),
    "categorical, image": Case(Categorical(), draw(2, 3, 2, 2), classes((2, 2, 2), 3, -100)),
}
DRAWN = [name for name in CASES if name != "categorical, ignored class"]
THREE = ["gaussian", "bernoulli", "categorical, sequence"]


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


def matrix(product, like):
    """The matrix of a linear map between tensors of one shape."""
    basis = torch.eye(like.numel(), dtype=like.dtype).reshape(like.numel(), *like.shape)
    return vmap(product)(basis).reshape(like.numel(), like.numel()).T


def curvature(likelihood, case, **kwargs):
    return matrix(
        lambda v: likelihood.curvature_product(case.outputs, v, targets=case.targets, **kwargs),
        case.outputs,
    )


def root(likelihood, case, transposed=False):
    return matrix(
        lambda v: likelihood.curvature_sqrt_product(
            case.outputs, v, targets=case.targets, transposed=transposed
        ),
        case.outputs,
    )


def rows_of(case):
    """Outputs and targets with a dimension of examples."""
    if isinstance(case.likelihood, Categorical) and case.outputs.ndim == 1:
        return case.outputs[None], case.targets[None]
    return case.outputs, case.targets


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_value_and_score_are_those_of_the_loss(case, reduction):
    likelihood = replace(case.likelihood, reduction=reduction)
    outputs = case.outputs.clone().requires_grad_()
    expected = case.loss(outputs, case.targets, reduction)
    close(likelihood.value(outputs, case.targets), expected)
    expected.sum().backward()
    with torch.no_grad():
        close(likelihood.score(outputs, case.targets), outputs.grad)


def test_value_of_targets_between_0_and_1():
    outputs = draw(4, 3).requires_grad_()
    targets = draw(4, 3).sigmoid()
    expected = F.binary_cross_entropy_with_logits(outputs, targets)
    close(Bernoulli().value(outputs, targets), expected)
    close(Bernoulli().score(outputs, targets), torch.autograd.grad(expected, outputs)[0])


def test_gaussian_scales_of_note():
    outputs, targets = draw(4, 3), draw(4, 3).flip(1)
    squares = (outputs - targets).square()
    half = Gaussian(reduction="sum")
    close(half.value(outputs, targets), squares.sum() / 2)
    close(half.curvature_product(outputs, targets), targets)
    whole = Gaussian(math.sqrt(0.5))
    close(whole.value(outputs, targets), F.mse_loss(outputs, targets))
    close(whole.curvature_product(outputs, targets), 2 / 12 * targets)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_normalizer_is_what_the_sum_is_divided_by(case, reduction):
    likelihood = replace(case.likelihood, reduction=reduction)
    count = likelihood.normalizer(case.outputs, case.targets)
    assert int(count) == case.normalizer(reduction)
    sums = case.loss(case.outputs, case.targets, "sum")
    close(likelihood.value(case.outputs, case.targets).sum() * count, sums)


def test_without_targets_all_are_counted():
    for likelihood, shape, count in [
        (Gaussian(), (4, 3), 12),
        (Bernoulli(), (4, 3), 12),
        (Categorical(), (4, 3), 4),
        (Categorical(), (4, 3, 5, 2), 40),
        (Categorical(), (3,), 1),
    ]:
        outputs = draw(*shape)
        assert likelihood.normalizer(outputs) == count
        summed = replace(likelihood, reduction="sum")
        v = draw(*shape).flip(0)
        close(
            likelihood.curvature_product(outputs, v) * count, summed.curvature_product(outputs, v)
        )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["gauss_newton", "fisher"])
def test_curvature_is_the_hessian_of_the_loss(case, reduction, kind):
    likelihood = replace(case.likelihood, reduction=reduction)
    expected = hessian(lambda f: case.loss(f, case.targets, reduction).sum())(case.outputs)
    close(
        curvature(likelihood, case, kind=kind),
        expected.reshape(case.outputs.numel(), case.outputs.numel()),
    )


def losses_of_row(case, f, targets):
    """Minus the log-probability of each target of one example, ignored or not."""
    if isinstance(case.likelihood, Bernoulli):
        return F.binary_cross_entropy_with_logits(f, targets, reduction="none")
    return -f.log_softmax(0).gather(0, targets[None])[0]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", [name for name in CASES if "gaussian" not in name])
def test_fisher_is_the_expectation_over_all_targets(name, reduction):
    case = CASES[name]
    blocks = []
    for f, y in zip(*rows_of(case), strict=True):
        count, counted = 2, torch.ones_like(y)
        if isinstance(case.likelihood, Categorical):
            count, counted = f.shape[0], y != case.likelihood.ignore_index
        outcomes = torch.tensor(list(itertools.product(range(count), repeat=y.numel())))
        outcomes = outcomes.reshape(-1, *y.shape).to(y.dtype)

        def total(f, t, weights):
            return (weights * losses_of_row(case, f, t)).sum()

        probabilities = (-vmap(total, (None, 0, None))(f, outcomes, torch.ones_like(y))).exp()
        close(probabilities.sum(), torch.ones((), dtype=f.dtype))
        scores = vmap(grad(total), (None, 0, None))(f, outcomes, counted)
        scores = scores.reshape(len(outcomes), -1)
        blocks.append(scores.T @ (probabilities[:, None] * scores))
    expected = torch.block_diag(*blocks) / case.normalizer(reduction)
    likelihood = replace(case.likelihood, reduction=reduction)
    close(curvature(likelihood, case, kind="fisher"), expected)


@pytest.mark.parametrize("name", ["gaussian", "bernoulli", "categorical"])
def test_fisher_is_the_expectation_over_samples(name):
    case = CASES[name]
    n = 40_000
    outputs = case.outputs[:1].expand(n, -1)
    targets = case.likelihood.sample(outputs, generator=torch.Generator().manual_seed(5))
    count = case.likelihood.normalizer(outputs)
    scores = count * case.likelihood.score(outputs, targets)
    products = scores[:, :, None] * scores[:, None, :]
    f = case.outputs[:1]
    expected = matrix(lambda v: case.likelihood.curvature_product(f, v, kind="fisher"), f)
    standard_error = products.std(0) / math.sqrt(n)
    deviation = products.mean(0) - case.likelihood.normalizer(f) * expected
    assert (deviation.abs() <= 4 * standard_error).all()


def test_tables_on_probabilities_become_these_on_logits():
    f, target = draw(4), torch.tensor(2)
    y = F.one_hot(target, 4).double()
    p = f.softmax(0)
    jacobian = jacrev(lambda f: f.softmax(0))(f)
    fisher = matrix(lambda v: Categorical().curvature_product(f, v, kind="fisher"), f)
    close(jacobian.T @ torch.diag(1 / p) @ jacobian, fisher)
    score = Categorical().score(f, target)
    close(jacobian.T @ torch.diag(y / p**2) @ jacobian, torch.outer(score, score))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_score_tells_the_value(case, reduction):
    likelihood = replace(case.likelihood, reduction=reduction)
    score = likelihood.score(case.outputs, case.targets)
    value = case.loss(case.outputs, case.targets, "sum" if reduction == "none" else reduction)
    close(likelihood.value_from_score(case.outputs, score), value)


def test_the_score_tells_the_value_for_targets_between_0_and_1():
    f, y = draw(6, 4), draw(6, 4).sigmoid()
    score = Bernoulli().score(f, y)
    close(
        Bernoulli().value_from_score(f, score),
        F.binary_cross_entropy_with_logits(f, y),
    )


def test_a_score_of_no_probability_counts_as_that_of_0_or_1():
    f = draw(6, 4)
    y = (draw(4, 6).reshape(6, 4) > 0).double()
    score = 1024 * Bernoulli().score(f, y)
    close(Bernoulli().value_from_score(f, score), F.binary_cross_entropy_with_logits(f, y))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_lower_bound_of_the_value_of_binary_targets_is_pinskers(reduction):
    likelihood, f = Bernoulli(reduction=reduction), draw(6, 4)
    for y in (draw(6, 4).sigmoid(), (draw(4, 6).reshape(6, 4) > 0).double()):
        bound = 2 * (f.sigmoid() - y).square().sum() / likelihood.normalizer(f)
        close(likelihood.value_lower_bound(f, likelihood.score(f, y)), bound)
    # The entropy of the targets is all that is missing where they are near the probabilities.
    y = (f + 1e-3).sigmoid()
    entropy = -(y * y.log() + (1 - y) * (1 - y).log()).sum() / likelihood.normalizer(f)
    missing = likelihood.value(f, y).sum() - entropy
    bound = likelihood.value_lower_bound(f, likelihood.score(f, y))
    assert 0.1 * missing < bound < missing


@pytest.mark.parametrize("factor", [0.1, 1.0, 2.0, 10.0, 1024.0])
@pytest.mark.parametrize("fit", [0.3, 4.0, 12.0])
def test_no_score_has_a_lower_bound_above_its_value(case, fit, factor):
    likelihood = case.likelihood
    score = factor * likelihood.score(case.outputs, case.targets)
    bound = likelihood.value_lower_bound(case.outputs, score)
    assert 0 <= bound <= likelihood.value_from_score(case.outputs, score)
    y = (draw(6, 4) > 0).double()
    f = fit * (2 * y - 1)
    score = factor * Bernoulli().score(f, y)
    bound = Bernoulli().value_lower_bound(f, score)
    assert 0 < bound <= Bernoulli().value_from_score(f, score)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_lower_bound_is_of_the_accumulate_dtype(dtype):
    f, y = draw(6, 4).to(dtype), (draw(6, 4) > 0).to(dtype)
    for likelihood in (Bernoulli(), Gaussian(), Categorical()):
        assert likelihood.value_lower_bound(f, torch.zeros_like(f)).dtype == torch.float32
    score = Bernoulli().score(f, y).to(dtype)
    bound = Bernoulli().value_lower_bound(f, score)
    expected = 2 * score.float().square().sum() * f.numel()
    torch.testing.assert_close(bound, expected, rtol=1e-2, atol=0)


def test_nothing_has_the_lower_bound_0_and_what_is_no_number_none():
    assert Bernoulli().value_lower_bound(torch.empty(0, 3), torch.empty(0, 3)) == 0
    f = torch.full((2, 3), torch.nan)
    assert Bernoulli().value_lower_bound(f, torch.ones(2, 3)).isnan()


def test_a_logit_that_is_infinite_has_no_curvature():
    f = torch.tensor([[torch.inf, -torch.inf, 0.0]])
    expected = torch.tensor([[0.0, 0.0, 0.5]])
    ones = torch.ones_like(f)
    found = Bernoulli(reduction="sum").curvature_sqrt_product(f, ones)
    torch.testing.assert_close(found, expected)


def test_a_score_of_no_target_has_the_value_0():
    f = draw(6, 4)
    assert Categorical().value_from_score(f, f.softmax(1)) == 0


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_score_tells_the_value_of_weighted_classes(reduction):
    f, y = draw(7, 3).requires_grad_(), classes((7,), 3)
    weight = torch.tensor([0.2, 1.0, 5.0], dtype=f.dtype)
    loss = F.cross_entropy(f, y, weight=weight, reduction=reduction)
    (score,) = torch.autograd.grad(loss, f)
    close(Categorical().value_from_score(f.detach(), score), loss.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_score_tells_the_value_where_the_fit_is_perfect(dtype):
    f = 100 * torch.eye(3, dtype=dtype)
    for likelihood in (Categorical(), Bernoulli(), Gaussian()):
        value = likelihood.value_from_score(f, torch.zeros_like(f))
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        # Bernoulli: zeros are as likely as ones where the logit is 0
        assert value == (pytest.approx(math.log(2) * 6 / 9) if likelihood == Bernoulli() else 0)


def test_the_value_of_a_nearly_perfect_fit_keeps_its_digits():
    f = torch.tensor([[0.0, -30.0], [-35.0, 0.0]], dtype=torch.float64)
    targets = torch.tensor([0, 1])
    value = F.cross_entropy(f, targets)
    found = Categorical().value_from_score(f, Categorical().score(f, targets))
    # p - 1 has some digits left: p is 1e-13 below 1.
    torch.testing.assert_close(found, value, rtol=1e-2, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_root_and_its_transpose(case, reduction):
    likelihood = replace(case.likelihood, reduction=reduction)
    s = root(likelihood, case)
    close(s @ s.T, curvature(likelihood, case))
    close(root(likelihood, case, transposed=True), s.T)


def test_root_is_square_and_that_of_the_formula():
    f = draw(1, 4)
    p = f[0].softmax(0)
    case = Case(Categorical(reduction="sum"), f, torch.tensor([0]))
    close(root(case.likelihood, case), torch.diag(p.sqrt()) - torch.outer(p, p.sqrt()))


def test_columns_are_those_of_the_root(case):
    outputs, targets = rows_of(case)
    entries = outputs[0].numel()
    columns = case.likelihood.curvature_sqrt_columns(case.outputs, targets=case.targets)
    assert columns.shape == (entries, *case.outputs.shape)
    columns = columns.reshape(entries, len(outputs), entries)
    blocks = torch.block_diag(*columns.movedim(0, 2))
    close(blocks, root(case.likelihood, Case(case.likelihood, outputs, targets)))


@pytest.mark.parametrize("name", THREE)
def test_backward_passes_of_columns_make_the_exact_curvature_of_a_model(name):
    case = CASES[name]
    weight = draw(5, case.outputs[0].numel())
    x = draw(case.outputs.shape[0], 5)

    def model(weight, x):
        return (x @ weight).tanh().reshape(-1, *case.outputs.shape[1:])

    outputs = model(weight, x)
    columns = case.likelihood.curvature_sqrt_columns(outputs, targets=case.targets)

    def gradient(x, column):
        return grad(lambda w: (model(w, x[None])[0] * column).sum())(weight).flatten()

    gradients = vmap(vmap(gradient), (None, 0))(x, columns).flatten(0, 1)
    jacobian = jacrev(model)(weight, x).reshape(outputs.numel(), -1)
    d = curvature(case.likelihood, Case(case.likelihood, outputs, case.targets))
    close(gradients.T @ gradients, jacobian.T @ d @ jacobian)


@pytest.mark.parametrize("name", THREE)
def test_sketch_is_the_root_times_signs(name):
    case = CASES[name]
    n = 20_000
    f, y = case.outputs[:1], case.targets[:1]
    outputs, targets = f.expand(n, *f.shape[1:]), y.expand(n, *y.shape[1:])
    generator = torch.Generator().manual_seed(7)
    rows = case.likelihood.sketch(outputs, targets=targets, generator=generator).flatten(1)
    rows = rows * math.sqrt(case.likelihood.normalizer(outputs, targets))
    s = root(replace(case.likelihood, reduction="sum"), Case(case.likelihood, f, y))
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=f.numel()))).double()
    # Every row is one of the 2^k that signs can make, and over all of these S r r^T S^T is D.
    possible = signs @ s.T
    nearest = torch.cdist(rows, possible).argmin(1)
    close(rows, possible[nearest])
    close(possible.T @ possible / len(possible), s @ s.T)
    products = rows[:, :, None] * rows[:, None, :]
    standard_error = products.std(0) / math.sqrt(n)
    assert ((products.mean(0) - s @ s.T).abs() <= 4 * standard_error + 1e-12).all()


@pytest.mark.parametrize("name", DRAWN)
def test_samples_are_targets_that_the_loss_takes(name):
    case = CASES[name]
    outputs = case.outputs.clone().requires_grad_()
    sampled = case.likelihood.sample(outputs)
    assert sampled.shape == case.targets.shape
    assert sampled.dtype == case.targets.dtype
    assert not sampled.requires_grad
    assert case.loss(outputs, sampled, "mean").isfinite()
    masked = case.likelihood.sample(outputs, case.targets)
    if isinstance(case.likelihood, Categorical):
        ignored = case.targets == case.likelihood.ignore_index
        assert torch.equal(masked == case.likelihood.ignore_index, ignored)


def test_samples_follow_the_generator():
    for name in THREE:
        likelihood, outputs, _ = CASES[name]
        outputs = outputs.repeat(20, *(1,) * (outputs.ndim - 1))
        first, again, other = (
            likelihood.sample(outputs, generator=torch.Generator().manual_seed(seed))
            for seed in (1, 1, 2)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_frequencies_of_samples():
    n = 40_000
    generator = torch.Generator().manual_seed(11)
    f = torch.tensor([1.0, -2.0, 0.5, -torch.inf], dtype=torch.float64)
    p = f.softmax(0)
    positions = torch.stack([f, f.flip(0)], 1).expand(n, 4, 2)
    drawn = F.one_hot(Categorical().sample(positions, generator=generator), 4).double().mean(0)
    expected = torch.stack([p, p.flip(0)])
    assert ((drawn - expected).abs() <= 4 * (expected * (1 - expected) / n).sqrt()).all()

    p = f.sigmoid()
    drawn = Bernoulli().sample(f.expand(n, 4), generator=generator)
    assert set(drawn.unique().tolist()) == {0.0, 1.0}
    assert ((drawn.mean(0) - p).abs() <= 4 * (p * (1 - p) / n).sqrt()).all()

    means = f[:3]
    drawn = Gaussian(SCALE).sample(means.expand(n, 3), generator=generator)
    assert ((drawn.mean(0) - means).abs() <= 4 * SCALE / math.sqrt(n)).all()
    assert ((drawn.std(0) - SCALE).abs() <= 4 * SCALE / math.sqrt(2 * n)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_extreme_logits(dtype):
    f = torch.tensor([[1e4, -1e4, 0.0]]).to(dtype)
    top = f[0, 0].item()
    right, wrong = torch.tensor([0]), torch.tensor([1])
    summed = Categorical(reduction="sum")
    assert summed.value(f, right).item() == 0
    assert summed.value(f, wrong).item() == 2 * top
    assert summed.score(f, wrong).tolist() == [[1, -1, 0]]
    ones = Bernoulli(reduction="sum")
    assert ones.value(f[:, :2], torch.tensor([[0.0, 1.0]])).item() == 2 * top
    assert ones.score(f, torch.tensor([[0.0, 1.0, 0.5]])).tolist() == [[1, -1, 0]]
    v = torch.tensor([[1.0, -2.0, 3.0]])
    assert summed.curvature_product(f, v).tolist() == [[0, 0, 0]]
    assert ones.curvature_product(f, v).tolist() == [[0, 0, 0.75]]
    assert ones.curvature_sqrt_product(f, v).tolist() == [[0, 0, 1.5]]
    for transposed in (False, True):
        assert summed.curvature_sqrt_product(f, v, transposed=transposed).tolist() == [[0, 0, 0]]
    assert summed.sample(f).item() == 0
    assert ones.sample(f)[0, :2].tolist() == [1, 0]


@pytest.mark.parametrize("likelihood", [Bernoulli(), Categorical()])
def test_extreme_logits_have_finite_derivatives(likelihood):
    f = torch.tensor([[1e4, -1e4, 0.0, 200.0]])
    v = torch.ones_like(f)
    for product in (likelihood.curvature_product, likelihood.curvature_sqrt_product):
        (slope,) = torch.autograd.functional.vjp(lambda f, p=product: p(f, v), f, v)[1:]
        assert slope.isfinite().all()


def test_curvature_of_confident_outputs_is_not_rounded_away():
    f = torch.tensor([[30.0, -30.0, 60.0]])
    v = torch.ones_like(f)
    for product in (Bernoulli().curvature_product, Bernoulli().curvature_sqrt_product):
        exact = product(f.double(), v.double())
        torch.testing.assert_close(product(f, v).double(), exact, rtol=1e-5, atol=0)
    # p (1 - p) is below the smallest float32, its root is not.
    far = torch.tensor([[150.0]])
    expected = torch.tensor([[math.exp(-75)]])
    torch.testing.assert_close(
        Bernoulli().curvature_sqrt_product(far, v[:, :1]), expected, rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_half_precision_is_computed_in_float32(name, dtype):
    likelihood, outputs, targets = CASES[name]
    half = outputs.to(dtype)
    v = outputs.flip(0).to(dtype)
    if targets.is_floating_point():
        targets = targets.to(dtype)
    for method, argument in [
        (likelihood.value, targets),
        (likelihood.score, targets),
        (likelihood.curvature_product, v),
        (likelihood.curvature_sqrt_product, v),
    ]:
        got = method(half, argument)
        assert got.dtype == torch.float32
        wide = argument.float() if argument.is_floating_point() else argument
        assert torch.equal(got, method(half.float(), wide))
    for got in (likelihood.curvature_sqrt_columns(half), likelihood.sketch(half)):
        assert got.dtype == torch.float32
    if targets.is_floating_point():
        # The loss accepts it, and a small scale is not lost beside a large output.
        assert likelihood.sample(half).dtype == torch.float32


def test_forward_mode_of_the_score_is_the_curvature(case):
    v = case.outputs.flip(0)
    _, tangent = jvp(lambda f: case.likelihood.score(f, case.targets), (case.outputs,), (v,))
    close(tangent, case.likelihood.curvature_product(case.outputs, v, targets=case.targets))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["gaussian", "bernoulli", "categorical, ignored"])
def test_under_vmap_every_row_is_a_call_of_its_own(name):
    case = CASES[name]
    likelihood = replace(case.likelihood, reduction="sum")
    outputs, targets = case.outputs, case.targets
    v = outputs.flip(1)
    close(vmap(likelihood.value)(outputs, targets).sum(), likelihood.value(outputs, targets))
    close(vmap(likelihood.score)(outputs, targets), likelihood.score(outputs, targets))
    for method in (likelihood.curvature_product, likelihood.curvature_sqrt_product):
        got = vmap(lambda f, v, t, m=method: m(f, v, targets=t))(outputs, v, targets)
        close(got, method(outputs, v, targets=targets))
    drawn = vmap(likelihood.sample, randomness="different")(outputs, targets)
    assert drawn.shape == targets.shape
    assert likelihood.value(outputs, drawn).isfinite()
    if isinstance(likelihood, Categorical):
        assert torch.equal(drawn == -100, targets == -100)
    assert vmap(likelihood.sketch, randomness="different")(outputs).shape == outputs.shape


@pytest.mark.parametrize("name", DRAWN)
def test_no_method_reads_a_number(name):
    """Tensors without data stand in for a device on which reading one would wait."""
    likelihood, outputs, targets = CASES[name]
    f, y = outputs.to("meta"), targets.to("meta")
    shape = outputs.shape
    assert likelihood.value(f, y).shape == ()
    assert likelihood.score(f, y).shape == shape
    assert likelihood.sample(f, y).shape == y.shape
    assert likelihood.curvature_product(f, f, targets=y).shape == shape
    assert likelihood.curvature_sqrt_product(f, f, targets=y).shape == shape
    assert likelihood.curvature_sqrt_columns(f, targets=y).shape[1:] == shape
    assert likelihood.sketch(f, targets=y).shape == shape


@pytest.mark.parametrize("name", THREE)
def test_compiles_in_one_graph(name):
    likelihood, outputs, targets = CASES[name]

    def step(f, y, v):
        d = likelihood.curvature_product(f, v, targets=y)
        return likelihood.value(f, y), likelihood.score(f, y), d

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for got, expected in zip(
        compiled(outputs, targets, outputs.flip(0)),
        step(outputs, targets, outputs.flip(0)),
        strict=True,
    ):
        close(got, expected)


@pytest.mark.parametrize(
    ("likelihood", "outputs", "targets"),
    [
        (Gaussian(), torch.ones(0, 3), torch.ones(0, 3)),
        (Bernoulli(), torch.ones(0, 3), torch.ones(0, 3)),
        (Categorical(), torch.ones(0, 3), torch.ones(0).long()),
        (Categorical(), torch.ones(2, 3), torch.full((2,), -100)),
    ],
)
def test_a_mean_of_nothing(likelihood, outputs, targets):
    """NaN with gradient 0, as PyTorch has it."""
    assert likelihood.value(outputs, targets).isnan()
    none = torch.zeros_like(outputs)
    assert torch.equal(likelihood.score(outputs, targets), none)
    assert torch.equal(likelihood.curvature_product(outputs, outputs, targets=targets), none)
    assert torch.equal(likelihood.curvature_sqrt_product(outputs, outputs, targets=targets), none)
    assert likelihood.sample(outputs, targets).shape == targets.shape


def test_class_index_out_of_range_raises():
    for method in (Categorical().value, Categorical().score):
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            method(draw(2, 3), torch.tensor([1, 3]))


@pytest.mark.parametrize("reduction", PYTORCH_REDUCTIONS)
@pytest.mark.parametrize(
    ("loss", "likelihood", "name"),
    [
        (nn.MSELoss(), Gaussian(math.sqrt(0.5)), "gaussian"),
        (nn.BCEWithLogitsLoss(), Bernoulli(), "bernoulli"),
        (nn.CrossEntropyLoss(), Categorical(), "categorical, ignored"),
        (nn.CrossEntropyLoss(ignore_index=-1), Categorical(-1), "categorical, sequence"),
    ],
)
def test_likelihood_of_a_loss(loss, likelihood, name, reduction):
    loss.reduction = reduction
    likelihood = replace(likelihood, reduction=reduction)
    assert likelihood_of(loss) == likelihood
    assert likelihood_of(likelihood) is likelihood
    _, outputs, targets = CASES[name]
    close(likelihood_of(loss).value(outputs, targets), loss(outputs, targets))


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (nn.CrossEntropyLoss(weight=torch.ones(3)), ValueError, "must have no weight"),
        (nn.CrossEntropyLoss(label_smoothing=0.1), ValueError, "no label_smoothing, got 0.1"),
        (nn.BCEWithLogitsLoss(pos_weight=torch.ones(3)), ValueError, "must have no pos_weight"),
        (nn.BCEWithLogitsLoss(weight=torch.zeros(())), ValueError, "must have no weight"),
        (nn.BCELoss(), TypeError, "nn.CrossEntropyLoss, or a Likelihood, got BCELoss"),
        (F.mse_loss, TypeError, "loss must be nn.MSELoss.* got function"),
        (type("Own", (nn.MSELoss,), {})(), TypeError, "got Own"),
    ],
)
def test_losses_that_are_no_likelihood(loss, error, message):
    with pytest.raises(error, match=message):
        likelihood_of(loss)


def test_they_are_values():
    for likelihood in (Gaussian(0.3), Bernoulli(reduction="sum"), Categorical(ignore_index=0)):
        assert pickle.loads(pickle.dumps(likelihood)) == likelihood
        assert hash(likelihood) == hash(replace(likelihood))
        assert likelihood != replace(likelihood, reduction="none")
        assert eval(repr(likelihood)) == likelihood
    assert fused_so.Gaussian is fused_so.likelihoods.Gaussian


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: Gaussian(0.0), ValueError, "scale must be positive.* got 0.0"),
        (lambda: Gaussian(-1.0), ValueError, "scale must be at least 0 and finite, got -1.0"),
        (lambda: Gaussian(math.nan), ValueError, "scale must be .* got nan"),
        (lambda: Gaussian(1e-200), ValueError, "its square positive and finite, got 1e-200"),
        (lambda: Gaussian(torch.ones(())), TypeError, "scale must be a number, got Tensor"),
        (lambda: Bernoulli(reduction="avg"), ValueError, "reduction must be one of .* got 'avg'"),
        (lambda: Categorical(reduction=None), ValueError, "reduction must be one of .* got None"),
        (lambda: Categorical(1.0), TypeError, "ignore_index must be an int, got 1.0"),
        (lambda: Categorical(True), TypeError, "ignore_index must be an int, got True"),
    ],
)
def test_bad_options(build, error, message):
    with pytest.raises(error, match=message):
        build()


FLAT = torch.ones(4, 3)
LABELS = torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: Gaussian().value([1.0], FLAT), TypeError, "outputs must be a Tensor, got list"),
        (lambda: Gaussian().value(FLAT.long(), FLAT), TypeError, "outputs must be .* got .*int64"),
        (lambda: Gaussian().value(FLAT, FLAT.long()), TypeError, "targets must be .* got .*int64"),
        (
            lambda: Gaussian().score(FLAT, FLAT[:, :1]),
            ValueError,
            r"targets must have shape \(4, 3\), got \(4, 1\)",
        ),
        (
            lambda: Bernoulli().value(FLAT, None),
            TypeError,
            "targets must be a Tensor, got NoneType",
        ),
        (
            lambda: Bernoulli().value(FLAT, FLAT.to("meta")),
            ValueError,
            "targets must be on the device of outputs, cpu, got meta",
        ),
        (lambda: Categorical().score(FLAT, None), TypeError, "targets must be a Tensor"),
        (
            lambda: Categorical().score(FLAT, FLAT),
            TypeError,
            "targets must be class indices, torch.int64, got torch.float32",
        ),
        (
            lambda: Categorical().sample(FLAT, LABELS[:3]),
            ValueError,
            r"targets must have shape \(4,\), .* \(4, 3\) without the classes, got \(3,\)",
        ),
        (
            lambda: Categorical().value(FLAT[0, 0], LABELS[0]),
            ValueError,
            "outputs must be .* got a 0-dim tensor",
        ),
        (
            lambda: Categorical(2).sample(FLAT),
            ValueError,
            "ignore_index must not be one of the 3 classes, got 2",
        ),
        (
            lambda: Gaussian().sample(FLAT, generator=3),
            TypeError,
            "generator must be a torch.Generator or None, got int",
        ),
        (
            lambda: Gaussian().curvature_product(FLAT, FLAT, kind="hessian"),
            ValueError,
            "kind must be one of .* got 'hessian'",
        ),
        (
            lambda: Bernoulli().curvature_product(FLAT, FLAT[0]),
            ValueError,
            r"v must have shape \(4, 3\), got \(3,\)",
        ),
        (
            lambda: Bernoulli().curvature_sqrt_product(FLAT, FLAT.to("meta")),
            ValueError,
            "v must be on the device of outputs, cpu, got meta",
        ),
        (
            lambda: Bernoulli().curvature_sqrt_product(FLAT, FLAT, transposed=1),
            TypeError,
            "transposed must be True or False, got 1",
        ),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
