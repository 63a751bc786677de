"""CG and MINRES-QLP against dense solves, on systems of every kind."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import minres

from fused_so.solvers import cg, minres_qlp

DOUBLE = torch.float64
SOLVERS = [cg, minres_qlp]


def symmetric(eigenvalues, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.as_tensor(eigenvalues, dtype=DOUBLE)
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=DOUBLE, generator=generator))
    a = (q * values) @ q.T
    return (a + a.T) / 2


POSITIVE = torch.linspace(0.1, 10, 20, dtype=DOUBLE)
INDEFINITE = torch.cat([torch.linspace(-5, -1, 8), torch.linspace(0.5, 9, 12)]).to(DOUBLE)
SINGULAR = torch.cat([torch.zeros(6), torch.linspace(0.5, 9, 14)]).to(DOUBLE)
SINGULAR_INDEFINITE = torch.cat([torch.linspace(-5, -1, 5), torch.zeros(5), POSITIVE[5:15]])


def counted(a):
    def product(v):
        product.calls += 1
        return a @ v

    product.calls = 0
    return product


def shortest(a, b):
    return torch.linalg.pinv(a, rtol=1e-10) @ b


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("eigenvalues", [POSITIVE, SINGULAR])
def test_consistent_semi_definite_systems_give_the_shortest_solution(solver, eigenvalues):
    a = symmetric(eigenvalues)
    b = a @ torch.randn(20, dtype=DOUBLE)
    solution = solver(lambda v: a @ v, b, max_iterations=60, tolerance=1e-13)
    assert solution.status == "converged"
    torch.testing.assert_close(solution.x, shortest(a, b), rtol=1e-10, atol=1e-10)
    true = (b - a @ solution.x).norm() / b.norm()
    assert abs(solution.residual - true) < 1e-14


@pytest.mark.parametrize("eigenvalues", [INDEFINITE, SINGULAR_INDEFINITE])
def test_minres_qlp_takes_indefinite_systems(eigenvalues):
    a = symmetric(eigenvalues)
    b = a @ torch.randn(20, dtype=DOUBLE)
    solution = minres_qlp(lambda v: a @ v, b, max_iterations=60, tolerance=1e-13)
    assert solution.status == "converged"
    torch.testing.assert_close(solution.x, shortest(a, b), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("eigenvalues", [SINGULAR, SINGULAR_INDEFINITE])
def test_minres_qlp_gives_the_pseudoinverse_solution_of_inconsistent_systems(eigenvalues, seed):
    a = symmetric(eigenvalues, seed)
    b = torch.randn(20, dtype=DOUBLE)
    solution = minres_qlp(lambda v: a @ v, b, max_iterations=60, tolerance=1e-13)
    expected = shortest(a, b)
    assert solution.status == "least_squares"
    torch.testing.assert_close(solution.x, expected, rtol=1e-9, atol=1e-9)
    smallest = (b - a @ expected).norm() / b.norm()
    assert solution.residual == pytest.approx(smallest.item(), rel=1e-10)


@pytest.mark.parametrize("iterations", [20, 60])
@pytest.mark.parametrize("eigenvalues", [SINGULAR, SINGULAR_INDEFINITE])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-2), (DOUBLE, 1e-10)])
def test_rounding_does_not_hide_that_a_system_is_inconsistent(
    dtype, error, eigenvalues, iterations
):
    """Lanczos vectors that have lost their orthogonality must not lead into the null space."""
    for seed in range(12):
        a = symmetric(eigenvalues, seed)
        b = torch.randn(20, dtype=dtype, generator=torch.Generator().manual_seed(seed))
        single = a.to(dtype)
        solution = minres_qlp(lambda v, a=single: a @ v, b, max_iterations=iterations, tolerance=0)
        expected = shortest(a, b.double())
        assert solution.status == "least_squares"
        assert (solution.x - expected).norm() < error * expected.norm()


@pytest.mark.parametrize("shape", ["two", "cluster", "decades"])
@pytest.mark.parametrize(
    ("dtype", "smallest", "tolerance"),
    [(torch.float32, 1e-4, 1e-5), (torch.float32, 1e-5, 5e-3), (DOUBLE, 1e-9, 1e-10)],
)
def test_a_small_eigenvalue_is_none_of_zero(dtype, smallest, tolerance, shape):
    values = {
        "two": torch.tensor([1.0, smallest]),
        "cluster": torch.cat([torch.ones(3), smallest * torch.arange(1, 6)]),
        "decades": torch.logspace(0, math.log10(smallest), 12, dtype=DOUBLE),
    }[shape].to(dtype)
    b = torch.ones(len(values), dtype=dtype)
    solution = minres_qlp(lambda v: values * v, b, tolerance=tolerance, max_iterations=200)
    assert solution.status == "converged"
    rounding = torch.finfo(dtype).eps * solution.x.norm()
    assert (b - values * solution.x).norm() <= tolerance * b.norm() + rounding


def test_a_matrix_of_zeros_has_the_zero_solution():
    solution = minres_qlp(torch.zeros_like, torch.ones(4, dtype=DOUBLE))
    assert (solution.status, solution.residual) == ("least_squares", 1.0)
    assert torch.equal(solution.x, torch.zeros(4, dtype=DOUBLE))
    solution = cg(torch.zeros_like, torch.ones(4, dtype=DOUBLE))
    assert (solution.status, solution.iterations) == ("singular", 0)
    assert torch.equal(solution.x, torch.zeros(4, dtype=DOUBLE))


@pytest.mark.parametrize("iterations", [1, 2, 3, 6, 10])
@pytest.mark.parametrize("eigenvalues", [POSITIVE, INDEFINITE])
def test_minres_qlp_has_the_iterates_of_minres(eigenvalues, iterations):
    a, b = symmetric(eigenvalues), torch.randn(20, dtype=DOUBLE)
    expected, _ = minres(a.numpy(), b.numpy(), rtol=0, maxiter=iterations)
    solution = minres_qlp(lambda v: a @ v, b, max_iterations=iterations, tolerance=0.0)
    assert (solution.status, solution.iterations) == ("max_iterations", iterations)
    np.testing.assert_allclose(solution.x.numpy(), expected, rtol=1e-10, atol=1e-11)
    # As the smallest residual over the Krylov space.
    krylov = torch.stack([torch.matrix_power(a, i) @ b for i in range(iterations)], 1)
    krylov, _ = torch.linalg.qr(krylov)
    best = torch.linalg.lstsq(a @ krylov, b[:, None]).solution
    if iterations < 6:
        torch.testing.assert_close(solution.x, krylov @ best[:, 0], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("iterations", [1, 2, 4])
def test_cg_minimizes_the_model_over_the_krylov_space(iterations):
    a, b = symmetric(POSITIVE), torch.randn(20, dtype=DOUBLE)
    solution = cg(lambda v: a @ v, b, max_iterations=iterations, tolerance=0.0)
    krylov = torch.stack([torch.matrix_power(a, i) @ b for i in range(iterations)], 1)
    krylov, _ = torch.linalg.qr(krylov)
    expected = krylov @ torch.linalg.solve(krylov.T @ a @ krylov, krylov.T @ b)
    torch.testing.assert_close(solution.x, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("solver", SOLVERS)
def test_lists_are_one_vector(solver):
    a, b = symmetric(POSITIVE), torch.randn(20, dtype=DOUBLE)
    shapes = [(2, 3), (), (13,)]

    def split(v):
        parts = v.split([math.prod(shape) for shape in shapes])
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def product(tensors):
        assert [tuple(t.shape) for t in tensors] == shapes
        return split(a @ torch.cat([t.reshape(-1) for t in tensors]))

    whole = solver(lambda v: a @ v, b)
    parts = solver(product, split(b))
    assert (parts.status, parts.iterations) == (whole.status, whole.iterations)
    for got, expected in zip(parts.x, split(whole.x), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("solver", SOLVERS)
def test_an_exact_preconditioner_takes_one_iteration_and_a_good_one_takes_fewer(solver):
    scale = torch.logspace(0, 3, 20, dtype=DOUBLE)
    a = symmetric(POSITIVE / 10) * scale[:, None].sqrt() * scale.sqrt()
    b = torch.randn(20, dtype=DOUBLE)
    expected = torch.linalg.solve(a, b)
    exact = solver(
        lambda v: a @ v, b, preconditioner=lambda r: torch.linalg.solve(a, r), tolerance=1e-9
    )
    assert (exact.status, exact.iterations) == ("converged", 1)
    torch.testing.assert_close(exact.x, expected, rtol=1e-8, atol=1e-10)
    options = {"max_iterations": 200, "tolerance": 1e-12}
    good = solver(lambda v: a @ v, b, preconditioner=lambda r: r / scale, **options)
    bare = solver(lambda v: a @ v, b, **options)
    torch.testing.assert_close(good.x, expected, rtol=1e-8, atol=1e-10)
    assert good.iterations < bare.iterations


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("preconditioned", [False, True])
def test_warm_start_takes_the_best_multiple_of_the_start(solver, preconditioned):
    a, b = symmetric(POSITIVE), torch.randn(20, dtype=DOUBLE)
    solution = torch.linalg.solve(a, b)
    weights = torch.linspace(1, 3, 20, dtype=DOUBLE)
    options = {"preconditioner": (lambda r: r * weights) if preconditioned else None}
    product = counted(a)
    exact = solver(product, b, x0=-7 * solution, tolerance=1e-12, **options)
    assert (exact.status, exact.iterations, product.calls) == ("converged", 0, 1)
    torch.testing.assert_close(exact.x, solution)
    near = solution + 0.01 * torch.randn(20, dtype=DOUBLE)
    warm = solver(lambda v: a @ v, b, x0=near, max_iterations=3, **options)
    cold = solver(lambda v: a @ v, b, max_iterations=3, **options)
    assert (warm.x - solution).norm() < 0.5 * (cold.x - solution).norm()
    for x0 in (near, torch.randn(20, dtype=DOUBLE), torch.zeros(20, dtype=DOUBLE)):
        done = solver(lambda v: a @ v, b, x0=x0, max_iterations=60, tolerance=1e-12, **options)
        torch.testing.assert_close(done.x, solution, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("epsilon", [0.08, 0.05, 0.03, 0.02])
@pytest.mark.parametrize("solver", SOLVERS)
def test_relative_progress_stops_where_the_model_hardly_falls(solver, epsilon):
    a = symmetric(torch.logspace(-6, 0, 60, dtype=DOUBLE))
    b = torch.randn(60, dtype=DOUBLE)
    solution = solver(lambda v: a @ v, b, max_iterations=500, tolerance=0.0, progress=epsilon)

    def model(k):
        x = solver(lambda v: a @ v, b, max_iterations=k, tolerance=0.0).x
        return (0.5 * x @ (a @ x) - b @ x).item()

    # The rule, with models computed from the iterates; the first is after one iteration.
    values = [model(k) for k in range(1, solution.iterations + 1)]
    stops = [
        i >= 10 and (values[i] - values[i - 10]) / values[i] < 10 * epsilon
        for i in range(len(values))
    ]
    assert solution.status == "progress"
    assert solution.iterations > 11
    assert stops == [False] * (len(values) - 1) + [True]


def test_cg_says_that_a_matrix_is_indefinite():
    a = symmetric(torch.tensor([-1.0, 2.0, 3.0]))
    b = torch.ones(3, dtype=DOUBLE)
    solution = cg(lambda v: a @ v, b, max_iterations=10)
    assert solution.status == "indefinite"
    negative = cg(lambda v: -v, b)
    assert (negative.status, negative.iterations, negative.residual) == ("indefinite", 0, 1.0)
    assert not negative.x.any()


def test_cg_says_that_a_matrix_is_singular_where_b_is_out_of_reach():
    a = torch.diag(torch.tensor([1.0, 2.0, 0.0], dtype=DOUBLE))
    solution = cg(lambda v: a @ v, torch.ones(3, dtype=DOUBLE), max_iterations=10)
    assert solution.status == "singular"
    assert torch.isfinite(solution.x).all()
    # An eigenvalue that rounding does not tell from zero.
    a = torch.tensor([1.0, 1e-17], dtype=DOUBLE)
    assert cg(lambda v: a * v, torch.ones(2, dtype=DOUBLE)).status == "singular"


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_ends_with_what_was_found_before(solver, bad):
    a, b = symmetric(POSITIVE), torch.randn(20, dtype=DOUBLE)
    calls = itertools.count()

    def product(v):
        return a @ v if next(calls) < 4 else torch.full_like(v, bad)

    solution = solver(product, b)
    before = solver(lambda v: a @ v, b, max_iterations=4)
    assert (solution.status, solution.iterations) == ("not_finite", 4)
    assert torch.equal(solution.x, before.x)

    for broken in (
        solver(lambda v: a @ v, torch.full_like(b, bad)),
        solver(lambda v: v * bad, b),
        solver(lambda v: v * bad, b, x0=b),
        solver(lambda v: a @ v, b, preconditioner=lambda r: r * bad),
    ):
        assert (broken.status, broken.iterations) == ("not_finite", 0)
        assert not broken.x.any()


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_preconditioner_must_be_positive_definite(solver):
    a, b = symmetric(POSITIVE), torch.randn(20, dtype=DOUBLE)
    solution = solver(lambda v: a @ v, b, preconditioner=lambda r: -r)
    assert (solution.status, solution.iterations) == ("bad_preconditioner", 0)
    assert not solution.x.any()


@pytest.mark.parametrize("solver", SOLVERS)
def test_nothing_to_solve(solver):
    solution = solver(lambda v: v * math.nan, torch.zeros(3))
    assert (solution.status, solution.iterations, solution.residual) == ("converged", 0, 0.0)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_are_in_the_accumulate_dtype(solver, dtype):
    a = symmetric(POSITIVE + 1).float()
    b = torch.randn(20).to(dtype)
    solution = solver(lambda v: a @ v, b, tolerance=1e-5, max_iterations=30)
    assert solution.x.dtype == torch.float32
    expected = torch.linalg.solve(a.double(), b.double())
    torch.testing.assert_close(solution.x.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("exponent", [-120, -60, 60, 120])
@pytest.mark.parametrize("warm", [False, True])
def test_the_units_of_the_right_hand_side_do_not_matter(warm, exponent, solver):
    """Even where its square would overflow or vanish."""
    a, b = symmetric(POSITIVE + 1).float(), torch.randn(20).clamp(-2, 2)
    b = torch.where(b.abs() < 0.1, 1.0, b)
    start = torch.randn(20) if warm else None
    units = 2.0**exponent
    expected = solver(lambda v: a @ v, b, x0=start, tolerance=1e-5)
    solution = solver(
        lambda v: a @ v, units * b, x0=units * start if warm else None, tolerance=1e-5
    )
    assert (solution.status, solution.iterations) == ("converged", expected.iterations)
    assert solution.residual == expected.residual
    torch.testing.assert_close(solution.x / units, expected.x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_float32_needs_no_more_than_its_rounding_allows(solver):
    # Eigenvalues over eight decades: neither solver may take the small ones for a null space.
    a = symmetric(torch.arange(1, 201, dtype=DOUBLE) ** -1.0 + 1e-4).float()
    b = torch.randn(200)
    solution = solver(lambda v: a @ v, b, max_iterations=400)
    assert solution.status == "converged"
    assert (b - a @ solution.x).norm() < 2e-4 * b.norm()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"product": 3}, TypeError, "product must be callable, got int"),
        ({"preconditioner": 3}, TypeError, "preconditioner must be callable, got int"),
        ({"b": []}, ValueError, "b must hold at least one tensor, got an empty list"),
        ({"b": 3}, TypeError, "b must be a list of tensors, got int"),
        ({"b": torch.ones(3).int()}, TypeError, "b[0] must be float16, bfloat16, float32 or"),
        ({"b": [torch.ones(2), torch.ones(2).double()]}, TypeError, "b[1] must have the dtype"),
        ({"product": lambda v: v[:2]}, ValueError, "product must have shape (3), got (2,)"),
        ({"product": lambda v: None}, TypeError, "product must be a Tensor, got NoneType"),
        ({"x0": torch.ones(4)}, ValueError, "x0 must have shape (3), got (4,)"),
        (
            {"b": [torch.ones(2), torch.ones(1)], "product": lambda v: v[:1]},
            ValueError,
            "product must give 2 tensors, one for each of b, got 1",
        ),
        ({"max_iterations": 0}, ValueError, "max_iterations must be at least 1, got 0"),
        ({"max_iterations": 2.0}, TypeError, "max_iterations must be an int, got 2.0"),
        ({"tolerance": -1.0}, ValueError, "tolerance must be at least 0 and finite, got -1.0"),
        ({"progress": math.nan}, ValueError, "progress must be at least 0 and finite, got nan"),
    ],
)
def test_bad_arguments_are_named(solver, changes, error, message):
    arguments = {"product": lambda v: v * 2, "b": torch.ones(3), **changes}
    with pytest.raises(error) as caught:
        solver(arguments.pop("product"), arguments.pop("b"), **arguments)
    assert message in str(caught.value)
