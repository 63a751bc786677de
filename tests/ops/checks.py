"""Calls of an op, on whichever device `run` runs it, held to the budget."""

from functools import partial

import torch

from fused_so import reference
from tests.ops import budget


def centered_grad(
    run, n, out, width, dtype, layout="contiguous", offset=0.0, scale=1.0, centered=True
):
    g = budget.random_matrix(n, out, dtype, seed=1, layout=layout)
    h = budget.random_matrix(n, width, dtype, seed=2, layout=layout) + offset
    h = h if scale == 1 else scale * h  # which would lose the layout
    oracle = partial(reference.centered_grad, centered=centered)
    got = run(g, h) if centered else run(g, h, centered=False)
    budget.assert_within_budget(got, oracle, [g, h], budget.row_orders)


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


def kronecker_layer(out, width, dtype, *, layout="contiguous", sides="both", scale=1.0, seed=0):
    """grad_weight, grad_bias, mean and the inverses of the sides, or None."""
    results = budget.accumulate(dtype)
    grad_weight = budget.random_matrix(out, width, dtype, seed=seed + 1, layout=layout)
    grad_bias = budget.random_matrix(out, 1, dtype, seed=seed + 2, layout=layout)[:, 0]
    if scale != 1:  # which would lose the layout
        grad_weight, grad_bias = scale * grad_weight, scale * grad_bias
    mean = budget.random_matrix(width, 1, results, seed=seed + 3, layout=layout)[:, 0]
    # Not symmetric, so that a transposed read shows.
    a = budget.random_matrix(width, width, results, seed=seed + 4, layout=layout)
    go = budget.random_matrix(out, out, results, seed=seed + 5, layout=layout)
    a = a if sides in ("input", "both") else None
    go = go if sides in ("output", "both") else None
    return grad_weight, grad_bias, mean, a, go


def assert_step_within_budget(got, layer, alpha):
    def oracle(grad_weight, grad_bias, mean, a, go, rows=None, cols=None):
        dw, db = reference.precondition(
            grad_weight, grad_bias, mean, a, output_inverse=go, alpha=float(alpha)
        )
        if rows is not None:
            rows, cols = rows.long().argsort(), cols.long().argsort()
            dw, db = dw[rows][:, cols], db[rows]
        return dw, db

    budget.assert_within_budget(got, oracle, layer, _feature_orders)


def precondition(run, out, width, dtype, *, alpha=1.0, **options):
    layer = kronecker_layer(out, width, dtype, **options)
    got = run(*layer[:-1], output_inverse=layer[-1], alpha=alpha)
    assert_step_within_budget(got, layer, alpha)


def precondition_lists(run, kinds, alphas, *, sides="both"):
    """kinds: (out, width, dtype, layout) of each layer; alphas: one number each."""
    layers = [
        kronecker_layer(out, width, dtype, layout=layout, sides=sides, seed=10 * i)
        for i, (out, width, dtype, layout) in enumerate(kinds)
    ]
    *arguments, a, go = (list(side) for side in zip(*layers, strict=True))
    a, go = a if sides in ("input", "both") else None, go if sides in ("output", "both") else None
    steps = zip(*run(*arguments, a, output_inverse=go, alpha=alphas), strict=True)
    for got, layer, alpha in zip(steps, layers, alphas, strict=True):
        assert_step_within_budget(got, layer, alpha)


def layers(n, sizes, dtype, layout="contiguous", offset=0.0):
    """Each layer's g and h, of n rows; sizes: its (out, in)."""
    layout = layout if n else "contiguous"
    sides = []
    for side in (0, 1):
        sides.append(
            [
                budget.random_matrix(n, size[side], dtype, seed=2 * i + side, layout=layout)
                for i, size in enumerate(sizes)
            ]
        )
        for x in sides[-1]:
            if offset:
                x += offset
    return sides


def _column_orders(arguments):
    """The matrices with their columns, over which the products sum, in seven other orders.

    Few rows make few entries, whose largest error in one order is a matter of luck.
    """
    for seed in range(7):
        generator = torch.Generator().manual_seed(seed)
        yield [x[:, torch.randperm(x.shape[1], generator=generator)] for x in arguments]


def grad_gram(
    run, n, sizes, dtype, layout="contiguous", offset=0.0, centered=False, biases=None, scale=1.0
):
    gs, hs = layers(n, sizes, dtype, layout, offset)
    gs = gs if scale == 1 else [scale * g for g in gs]  # which would lose the layout
    got = run(gs, hs, centered=centered, biases=biases)
    assert torch.equal(got, got.T)

    def oracle(*tensors):
        gs, hs = tensors[: len(sizes)], tensors[len(sizes) :]
        return [reference.grad_gram(gs, hs, centered=centered, biases=biases)]

    budget.assert_within_budget([got], oracle, [*gs, *hs], _column_orders)


JACOBIAN_LAYOUTS = [*budget.LAYOUTS, "permuted"]


def _random_jacobian(n, o, out, dtype, layout="contiguous"):
    """(n, o, out) with rows of random_matrix, in memory as `layout` says; poison in between."""
    jac = budget.random_matrix(n * o, out, dtype, seed=1).reshape(n, o, out)
    if layout == "transposed":
        return jac.mT.contiguous().mT
    if layout == "permuted":
        return jac.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "strided":
        room = torch.full((2 * n, 2 * o, 3 * out), torch.nan, dtype=dtype)
        room[::2, ::2, ::3] = jac
        return room[::2, ::2, ::3]
    if layout == "expanded":
        return jac[:1].expand(n, o, out)
    return jac


def jacobian_oracle(jac, weight, dphi, direction, outputs=None):
    jac_in, pullback = reference.jacobian_backprop(jac, weight, dphi=dphi, direction=direction)
    if outputs is not None:
        jac_in = jac_in[:, outputs.long().argsort()]
    return [jac_in] if pullback is None else [jac_in, pullback]


def _output_orders(arguments):
    """Layer and network outputs, which are summed over, in other orders; the oracle undoes it."""
    jac, weight, dphi, direction = arguments
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        outputs, features = (torch.randperm(size, generator=generator) for size in jac.shape[1:])
        yield (
            jac[:, outputs][:, :, features],
            weight[features],
            None if dphi is None else dphi[:, features],
            None if direction is None else direction[:, features],
            outputs,
        )


def jacobian_arguments(n, o, out, width, dtype, layout="contiguous", given="both"):
    rest = layout if layout in budget.LAYOUTS else "contiguous"
    weight = budget.random_matrix(out, width, dtype, seed=2, layout=rest)
    dphi = budget.random_matrix(n, out, dtype, seed=3, layout=rest)
    direction = budget.random_matrix(n, out, dtype, seed=4, layout=rest)
    return [
        _random_jacobian(n, o, out, dtype, layout),
        weight,
        dphi if given in ("dphi", "both") else None,
        direction if given in ("direction", "both") else None,
    ]


def jacobian_backprop(run, *args, scale=1.0, **kwargs):
    """run takes the list of arguments, None where not given, and returns a list of results."""
    arguments = jacobian_arguments(*args, **kwargs)
    if scale != 1:  # which would lose the layout
        arguments[0] = scale * arguments[0]
    budget.assert_within_budget(run(arguments), jacobian_oracle, arguments, _output_orders)
