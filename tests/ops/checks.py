"""Calls of an op, on whichever device `run` runs it, held to the budget."""

import torch

from fused_so import reference
from tests.ops import budget


def centered_grad(run, n, out, width, dtype, layout="contiguous", offset=0.0, scale=1.0):
    g = budget.random_matrix(n, out, dtype, seed=1, layout=layout)
    h = budget.random_matrix(n, width, dtype, seed=2, layout=layout) + offset
    h = h if scale == 1 else scale * h  # which would lose the layout
    got = run(g, h)
    budget.assert_within_budget(got, reference.centered_grad, [g, h], budget.row_orders)


def _feature_orders(arguments):
    """Input and output features in three other orders; the oracle puts the results back."""
    grad_weight, grad_bias, mean, a, go = arguments
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        rows, cols = (torch.randperm(n, generator=generator) for n in grad_weight.shape)
        yield (
            grad_weight[rows][:, cols],
            grad_bias[rows],
            mean[cols],
            None if a is None else a[cols][:, cols],
            None if go is None else go[rows][:, rows],
            rows,
            cols,
        )


def precondition(
    run, out, width, dtype, *, layout="contiguous", sides="both", alpha=1.0, scale=1.0
):
    results = budget.accumulate(dtype)
    grad_weight = budget.random_matrix(out, width, dtype, seed=1, layout=layout)
    grad_bias = budget.random_matrix(out, 1, dtype, seed=2, layout=layout)[:, 0]
    if scale != 1:  # which would lose the layout
        grad_weight, grad_bias = scale * grad_weight, scale * grad_bias
    mean = budget.random_matrix(width, 1, results, seed=3, layout=layout)[:, 0]
    # Not symmetric, so that a transposed read shows.
    a = budget.random_matrix(width, width, results, seed=4, layout=layout)
    go = budget.random_matrix(out, out, results, seed=5, layout=layout)
    a = a if sides in ("input", "both") else None
    go = go if sides in ("output", "both") else None
    got = run(grad_weight, grad_bias, mean, a, output_inverse=go, alpha=alpha)

    def oracle(grad_weight, grad_bias, mean, a, go, rows=None, cols=None):
        dw, db = reference.precondition(
            grad_weight, grad_bias, mean, a, output_inverse=go, alpha=float(alpha)
        )
        if rows is not None:
            rows, cols = rows.long().argsort(), cols.long().argsort()
            dw, db = dw[rows][:, cols], db[rows]
        return dw, db

    budget.assert_within_budget(got, oracle, [grad_weight, grad_bias, mean, a, go], _feature_orders)
