"""What only a GPU can prove: the ops there, their errors beside cuBLAS', and no synchronization."""

import pytest
import torch

import fused_so
from bench.problems import autoencoder
from fused_so import _extension, ops, reference
from fused_so.triton_kernels import _autotune
from tests.ops import budget, checks

# Two layers of one shape, which share their launches, twice.
WIDTHS = (100, 64, 64, 64, 30, 64, 64, 64, 100)
OPS = (
    "apply_update_",
    "centered_grad",
    "covariance",
    "covariance_",
    "covariance_list_",
    "damped_inverse",
    "grad_gram",
    "jacobian_backprop",
    "precondition",
    "precondition_list",
)


def random(*shape, dtype=torch.float32, seed=0, offset=0.0):
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(*shape, generator=generator, device="cuda", dtype=dtype)
    return x if offset == 0 else x.add_(offset)


def spd(*shape):
    h = random(*shape[:-1], 2 * shape[-1]) if len(shape) == 2 else random(*shape, 2 * shape[-1])
    return h @ h.mT / h.shape[-1]


@pytest.fixture(autouse=True)
def float32_is_float32():
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("name", OPS)
def test_a_kernel_and_not_the_reference_runs(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fused_so::{name}", "CUDA")


# Arguments of the registered ops: (positional, keywords).
def calls():
    x, square = random(7, 5), torch.eye(5, device="cuda")
    row = x[0].contiguous()
    return {
        "apply_update_": (
            ([x.clone()], [x.clone()], [x.clone()]),
            {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "nesterov": True, "scale": None},
        ),
        "centered_grad": ((x, random(7, 3)), {}),
        "covariance": ((x,), {"centered": True}),
        "covariance_": ((square.clone(), row.clone(), x), {"decay": 0.5}),
        "covariance_list_": (
            ([square.clone(), square.clone()], [row.clone(), row.clone()], [x, x]),
            {"decay": [0.5, 0.5]},
        ),
        "damped_inverse": ((spd(4, 4)[None], torch.full((1,), 0.1, device="cuda")), {}),
        "grad_gram": (([x], [x]), {"centered": True, "biases": [True]}),
        "jacobian_backprop": (
            (random(7, 2, 5), random(5, 3)),
            {"dphi": x, "direction": x},
        ),
        "precondition": (
            (x, x[:, 0].contiguous(), row, square),
            {"output_inverse": None, "alpha": torch.tensor(2.0, device="cuda")},
        ),
        "precondition_list": (
            ([x, x], [x[:, 0].contiguous()] * 2, [row, row], [square, square]),
            {"output_inverse": None, "alpha": [torch.tensor(2.0, device="cuda")] * 2},
        ),
    }


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    arguments, options = calls()[name]
    torch.library.opcheck(getattr(torch.ops.fused_so, name).default, arguments, options)


def oracle_of_inverse(a):
    """A Cholesky route, as `torch.linalg` has it."""
    factor, _ = torch.linalg.cholesky_ex(a + 0.1 * torch.eye(a.shape[-1], device=a.device).to(a))
    return (torch.cholesky_inverse(factor),)


def flat(lists):
    return [x for entries in lists for x in entries]


# Our call, the plain one, and arguments, of which the plain one is given float64 too.
def against_cublas(n, width):
    g, h = random(n, width, seed=1), random(n, width, seed=2, offset=1.0)
    square = random(width, width, seed=3) / width**0.5
    jac = random(max(1, n // 8), 8, width, seed=4)
    rows = jac[:, 0].contiguous()
    return {
        "covariance": (ops.covariance, reference.covariance, (h,)),
        "centered_grad": (ops.centered_grad, reference.centered_grad, (g, h)),
        "precondition": (
            ops.precondition,
            reference.precondition,
            (square.T.contiguous(), square[0].contiguous(), h[0].contiguous(), square),
        ),
        "precondition_list": (
            lambda *layer: flat(ops.precondition(*([x, x] for x in layer))),
            lambda *layer: [x for x in reference.precondition(*layer) for _ in range(2)],
            (square.T.contiguous(), square[0].contiguous(), h[0].contiguous(), square),
        ),
        "grad_gram": (
            lambda g, h: (ops.grad_gram([g], [h]),),
            lambda g, h: (reference.grad_gram([g], [h]),),
            (g, h),
        ),
        "jacobian_backprop": (
            lambda j, w, r: ops.jacobian_backprop(j, w, dphi=r, direction=r),
            lambda j, w, r: reference.jacobian_backprop(j, w, dphi=r, direction=r),
            (jac, square, rows),
        ),
        "damped_inverse": (
            lambda a: ops.damped_inverse(a, 0.1)[:1],
            oracle_of_inverse,
            (spd(2, width, width),),
        ),
    }


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("name", [name for name in OPS if not name.endswith("_")])
@pytest.mark.parametrize(("n", "width"), [(64, 32), (200, 100), (1024, 500), (2000, 1000)])
def test_errors_are_at_most_twice_those_of_cublas(n, width, name, precision):
    ours, plain, arguments = against_cublas(n, width)[name]
    exact = plain(*(x.double() for x in arguments))
    torch.set_float32_matmul_precision(precision)
    theirs, got = plain(*arguments), ours(*arguments)
    for i, (x, y, truth) in enumerate(zip(got, theirs, exact, strict=True)):
        error, allowed = ((z - truth).abs().max().item() for z in (x, y))
        limit = 2 * allowed + torch.finfo(torch.float32).eps * truth.abs().max().item()
        assert error <= limit, f"result {i}: error {error:.3g}, limit {limit:.3g}"


@pytest.mark.parametrize(
    "name", ["covariance", "centered_grad", "precondition", "grad_gram", "jacobian_backprop"]
)
def test_the_search_for_tiles_with_its_own_clock(name, monkeypatch):
    monkeypatch.setattr(_extension, "AUTOTUNE", True)
    monkeypatch.setattr(_autotune, "choices", {})
    ours, plain, arguments = against_cublas(300, 200)[name]
    first = ours(*arguments)
    assert _autotune.choices
    # What was found is used from now on.
    monkeypatch.setattr(_autotune, "do_bench", None)
    second = ours(*arguments)
    exact = plain(*(x.double() for x in arguments))
    for x, y, z, truth in zip(first, second, plain(*arguments), exact, strict=True):
        assert torch.equal(x, y)
        limit = 2 * (z - truth).abs().max() + torch.finfo(torch.float32).eps * truth.abs().max()
        assert (x - truth).abs().max() <= limit


def on_gpu(function):
    """function of tensors on the CPU, run on the GPU."""

    def moved(x):
        if isinstance(x, torch.Tensor):
            return x.cuda()
        return [moved(item) for item in x] if isinstance(x, list | tuple) else x

    def run(*arguments, **options):
        return home(function(*map(moved, arguments), **{k: moved(v) for k, v in options.items()}))

    def home(results):
        if isinstance(results, torch.Tensor):
            return results.cpu()
        return [home(x) for x in results if x is not None]

    return run


@pytest.mark.parametrize("dtype", budget.DTYPES)
def test_every_dtype_within_the_budget_of_the_cpu_tests(dtype):
    checks.centered_grad(on_gpu(ops.centered_grad), 300, 70, 65, dtype)
    checks.precondition(on_gpu(ops.precondition), 70, 65, dtype, alpha=0.3)
    kinds = [(70, 65, dtype, "contiguous"), (3, 200, dtype, "contiguous")] * 5
    alphas = [0.1 + i for i in range(10)]
    for sides in ("input", "both"):
        checks.precondition_lists(on_gpu(ops.precondition), kinds, alphas, sides=sides)
    for centered in (False, True):
        checks.grad_gram(on_gpu(ops.grad_gram), 130, [(70, 65), (3, 200)], dtype, centered=centered)

    def backprop(arguments):
        jac, weight, dphi, direction = arguments
        run = on_gpu(ops.jacobian_backprop)
        return run(jac, weight, dphi=dphi, direction=direction)

    checks.jacobian_backprop(backprop, 20, 10, 130, 70, dtype)


def training(name, seed=0):
    """A model, its optimizer, and a function that takes one step on one batch."""
    model = autoencoder(WIDTHS, seed).cuda()
    optimizer = getattr(fused_so, name)(model, lr=1e-3)
    x = random(128, WIDTHS[0])

    def step():
        optimizer.zero_grad(set_to_none=False)
        loss = (torch.sigmoid(model(x)) - x).square().sum() / len(x)
        loss.backward()
        optimizer.step()

    return model, optimizer, step


@pytest.mark.parametrize("name", ["CGD", "ACP"])
def test_a_step_never_waits_for_the_gpu(name):
    model, _, step = training(name)
    # The first steps compile kernels and create handles, which may wait.
    for _ in range(20):
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        # Past steps 32 and 64, which refresh all statistics and inverses.
        for _ in range(60):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["CGD", "ACP"])
def test_a_step_in_a_cuda_graph(name):
    # Steps 5, 6 and 7 refresh nothing: each is what a captured one repeats.
    model, _, step = training(name)
    twin, _, twin_step = training(name)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(5):
            step()
            twin_step()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for _ in range(3):
        graph.replay()
        twin_step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


# Entries past 2^31. Each takes 5 to 20 GB of the GPU's memory.


def test_covariance_past_32_bits():
    h = random(2**21 + 3, 1030, dtype=torch.bfloat16)
    cov, mean = ops.covariance(h)
    total, products = (torch.zeros(s, device="cuda").double() for s in ((1030,), (1030, 1030)))
    for rows in h.split(2**16):
        total += rows.double().sum(0)
        products += rows.double().T @ rows.double()
    expected = total / len(h)
    torch.testing.assert_close(mean.double(), expected, rtol=0, atol=1e-6)
    products = products / len(h) - expected[:, None] * expected
    torch.testing.assert_close(cov.double(), products, rtol=0, atol=5e-3)


def test_products_past_32_bits():
    rows = 2**28 + 5
    tall = random(rows, 8, dtype=torch.float16)
    grad_weight, grad_bias, mean = ops.centered_grad(tall, tall)
    total = sum(x.double().sum(0) for x in tall.split(2**24))
    torch.testing.assert_close(grad_bias.double(), total, rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(mean.double(), total / rows, rtol=0, atol=1e-6)
    assert (grad_weight.diagonal() / rows - 1).abs().max() < 1e-2

    a, bias = random(8, 8, seed=1), random(rows, dtype=torch.float16, seed=2)
    dw, db = ops.precondition(tall, bias, mean, a)
    last = slice(rows - 3, rows)
    expected = reference.precondition(tall[last], bias[last], mean, a)
    torch.testing.assert_close((dw[last], db[last]), expected, rtol=1e-4, atol=1e-4)


def test_jacobians_past_32_bits():
    jac = random(2**20, 33, 64, dtype=torch.bfloat16)
    weight = random(64, 8, dtype=torch.bfloat16)
    row = random(2**20, 64, dtype=torch.bfloat16)
    got = ops.jacobian_backprop(jac, weight, dphi=row, direction=row)
    last = slice(2**20 - 2, 2**20)
    expected = reference.jacobian_backprop(jac[last], weight, dphi=row[last], direction=row[last])
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x[last], y, rtol=1e-4, atol=1e-4 * y.abs().max().item())


def test_more_columns_than_the_second_axis_of_a_grid_has_blocks():
    ones, weight = torch.ones(1, 1, 2, device="cuda"), random(2, 65536 * 128 + 5)
    jac_in, pullback = ops.jacobian_backprop(ones, weight, direction=ones[0])
    torch.testing.assert_close(jac_in[0], weight.sum(0, keepdim=True))
    torch.testing.assert_close(pullback, 2 * jac_in[0])


def test_a_gram_matrix_past_32_bits():
    g, h = random(46400, 3), random(46400, 5, seed=1)
    gram = ops.grad_gram([g], [h])
    last = slice(46390, 46400)
    expected = (h[last] @ h.T + 1) * (g[last] @ g.T)
    torch.testing.assert_close(gram[last], expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(gram[:, last], expected.T, rtol=1e-4, atol=1e-3)


def test_inverses_past_32_bits():
    a = torch.zeros(129, 4096, 4096, device="cuda")
    a.diagonal(dim1=1, dim2=2).fill_(3.0)
    a[-1] = spd(4096, 4096)
    inverse, info = ops.damped_inverse(a, 1.0)
    assert not info.any()
    eye = torch.eye(4096, device="cuda")
    residual = inverse[-1].double() @ (a[-1] + eye).double() - eye
    assert residual.abs().max() < 1e-3
    torch.testing.assert_close(inverse[-2], eye / 4, rtol=1e-6, atol=0)


def test_an_update_past_32_bits():
    entries = 2**31 + 5
    p, u = (torch.ones(entries, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    ops.apply_update_([p], [u], [], lr=0.5)
    assert (p[-7:] == 0.5).all()
    assert p.eq(0.5).all()
