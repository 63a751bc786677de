"""apply_update_ against torch.optim.SGD and the reference; its CUDA kernel run on the CPU."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fused_so import reference
from fused_so.ops import apply_update_
from tests.cuda import shim
from tests.ops import budget

# Around a block's share on a GPU (2048), a chunk on the CPU (65536), and nothing at all.
SHAPES = [(3, 4), (0,), (1,), (), (2047,), (2048,), (2049,), (5, 0, 2), (65536,), (257, 256)]
RULES = [
    {"lr": 0.1},
    {"lr": 0.1, "weight_decay": 0.01},
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01, "nesterov": True},
    {"lr": 0.0, "momentum": 1.0},
]
# Of params and of updates.
DTYPE_PAIRS = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
]


def problem(rule, shapes=SHAPES, dtypes=(torch.float32, torch.float32)):
    """Random params, updates and, with momentum, buffers."""
    params = [torch.randn(shape).to(dtypes[0]) for shape in shapes]
    updates = [torch.randn(shape).to(dtypes[1]) for shape in shapes]
    buffers = [torch.randn(shape).to(budget.accumulate(dtypes[0])) for shape in shapes]
    return params, updates, buffers if rule.get("momentum") else []


def clones(*lists):
    return [[t.clone() for t in tensors] for tensors in lists]


def assert_agree(got, wanted):
    """To two roundings of the dtype: a fused multiply-add rounds once where others round twice."""
    for mine, oracle in zip(got, wanted, strict=True):
        eps = torch.finfo(mine.dtype).eps
        torch.testing.assert_close(mine, oracle, rtol=2 * eps, atol=2 * eps)


@budget.needs_kernel
def test_the_compiled_kernel_is_what_runs():
    assert torch._C._dispatch_has_kernel_for_dispatch_key("fused_so::apply_update_", "CPU")


@pytest.mark.parametrize("rule", [r for r in RULES if r["lr"]], ids=str)
def test_follows_sgd_over_several_steps(rule):
    shapes = [(5, 7), (7,), (), (40, 30)]
    params = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    buffers = [torch.zeros_like(p) for p in params] if rule.get("momentum") else []
    theirs = [p.clone().requires_grad_() for p in params]
    sgd = torch.optim.SGD(theirs, **rule)
    for _ in range(5):
        updates = [torch.randn_like(p) for p in params]
        for their, update in zip(theirs, updates, strict=True):
            their.grad = update.clone()
        sgd.step()
        assert apply_update_(params, updates, buffers, **rule) is None
    for mine, their in zip(params, theirs, strict=True):
        torch.testing.assert_close(mine, their.detach(), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("scale", [None, 0.25])
def test_random_tensors_agree_with_the_reference(rule, dtypes, scale):
    params, updates, buffers = problem(rule, dtypes=dtypes)
    if scale is not None:
        scale = torch.tensor(scale, dtype=budget.accumulate(dtypes[0]))
    wanted_params, wanted_buffers = clones(params, buffers)
    before = clones(updates)[0]
    reference.apply_update_(wanted_params, updates, wanted_buffers, **rule, scale=scale)
    apply_update_(params, updates, buffers, **rule, scale=scale)
    assert_agree(params, wanted_params)
    assert_agree(buffers, wanted_buffers)
    assert all(map(torch.equal, updates, before))


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e30])
def test_huge_and_tiny_scales(scale):
    rule = RULES[4]
    params, updates, buffers = ([scale * t for t in tensors] for tensors in problem(rule))
    wanted_params, wanted_buffers = ([t.double() for t in tensors] for tensors in (params, buffers))
    doubles = [u.double() for u in updates]
    reference.apply_update_(wanted_params, doubles, wanted_buffers, **rule)
    apply_update_(params, updates, buffers, **rule)
    # a few roundings of the largest entry, or last places of a denormal number
    eps, least = torch.finfo(torch.float32).eps, torch.finfo(torch.float32).smallest_normal
    for mine, oracle in zip(params + buffers, wanted_params + wanted_buffers, strict=True):
        if mine.numel():
            error, largest = (mine - oracle).abs().max(), oracle.abs().max()
            assert error <= 4 * eps * torch.clamp(largest, min=least)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_params_of_16_bits_are_rounded_to_the_nearest_even(dtype):
    """0 - 1 Delta, for every number of the dtype, the middle to the next, and either side of it."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    middles = (numbers + torch.cat([numbers[1:], numbers[:1]])) / 2
    updates = torch.cat(
        [numbers, middles, *(torch.nextafter(middles, m) for m in (-numbers, 2 * numbers))]
    )
    tiny = torch.tensor([0.0, -0.0, 1e-45, -1e-30, 65519.996, 65520.0, 1e30, 3.4028235e38])
    updates = torch.cat(
        [updates, tiny, -tiny, torch.randn(4099) * 10.0 ** torch.randint(-9, 6, (4099,))]
    )
    params = torch.zeros(updates.shape, dtype=dtype)
    apply_update_([params], [updates], [], lr=1.0)
    expected = (0 - updates).to(dtype)
    nan = expected.isnan()
    assert torch.equal(params.isnan(), nan)
    assert torch.equal(params[~nan].view(torch.int16), expected[~nan].view(torch.int16))


@pytest.mark.parametrize("threads", [1, 2, 3, 7, 70])
def test_every_entry_is_updated_once_on_any_number_of_threads(threads):
    shapes = [(65536,), (3,), (65537,), (200, 700)] + [(5,)] * 80
    params, updates, _ = problem(RULES[0], shapes)
    expected = clones(params)[0]
    reference.apply_update_(expected, updates, [], **RULES[0])
    budget.with_threads(threads, lambda: apply_update_(params, updates, [], **RULES[0]))
    assert_agree(params, expected)


def test_updates_of_any_strides():
    rule = RULES[3]
    params, _, buffers = problem(rule, [(6, 8), (10,), (3, 4, 5)])
    updates = [torch.randn(8, 6).T, torch.randn(20)[::2], torch.randn(4, 1).expand(3, 4, 5)]
    assert not any(u.is_contiguous() for u in updates)
    wanted_params, wanted_buffers = clones(params, buffers)
    apply_update_(wanted_params, [u.contiguous() for u in updates], wanted_buffers, **rule)
    apply_update_(params, updates, buffers, **rule)
    assert all(map(torch.equal, params, wanted_params))
    assert all(map(torch.equal, buffers, wanted_buffers))


def test_many_tensors_and_any_number_of_threads():
    rule = RULES[4]
    params, updates, buffers = problem(rule, [(n % 97, 3) for n in range(1000)] + [(300, 400)])
    results = []
    for count in (1, 2, 3):
        copies = clones(params, buffers)
        budget.with_threads(count, lambda c=copies: apply_update_(c[0], updates, c[1], **rule))
        results.append([*copies[0], *copies[1]])
    assert all(map(torch.equal, results[0], results[1]))
    assert all(map(torch.equal, results[0], results[2]))


def test_a_nan_stays_in_its_entry():
    params, updates, buffers = problem(RULES[2], [(100,)])
    updates[0][7] = torch.nan
    apply_update_(params, updates, buffers, **RULES[2])
    assert params[0].isnan().nonzero().tolist() == [[7]]
    assert buffers[0].isnan().nonzero().tolist() == [[7]]


@pytest.mark.parametrize("run", [apply_update_, reference.apply_update_])
def test_a_scale_of_zero_skips_the_update_whatever_it_holds(run):
    params, updates, buffers = problem(RULES[4], [(3, 4), (70,)])
    updates[1][5] = torch.nan
    before = clones(params, buffers)
    run(params, updates, buffers, **RULES[4], scale=torch.zeros(()))
    assert all(map(torch.equal, params, before[0]))
    assert all(map(torch.equal, buffers, before[1]))


def test_autograd_learns_of_the_change():
    weight = torch.ones(3, requires_grad=True)
    product = (weight * weight).sum()
    with torch.no_grad():
        apply_update_([weight], [torch.ones(3)], [], lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@budget.needs_kernel
@pytest.mark.parametrize("short", ["params", "updates", "momentum_buffers"])
def test_lists_of_unequal_length_raise_without_the_public_checks(short):
    lists = {
        name: [torch.ones(2), torch.ones(2)] for name in ("params", "updates", "momentum_buffers")
    }
    lists[short].pop()
    rule = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "nesterov": False}
    op = torch.ops.fused_so.apply_update_
    with pytest.raises(RuntimeError, match=r"apply_update_: .* must hold \d entries, got \d"):
        op(*lists.values(), **rule)
    op([], [], [], **rule, scale=torch.ones(()))


def test_no_tensors_at_all():
    apply_update_([], [], [], lr=0.1, momentum=0.9)


@pytest.mark.parametrize("rule", [RULES[1], RULES[4]], ids=str)
@pytest.mark.parametrize("scale", [None, 0.5])
def test_opcheck(rule, scale):
    params, updates, buffers = problem(rule, [(3, 4), (5,), (0,)])
    rule = {"momentum": 0.0, "weight_decay": 0.0, "nesterov": False} | rule
    torch.library.opcheck(
        torch.ops.fused_so.apply_update_.default,
        (params, updates, buffers),
        rule | {"scale": None if scale is None else torch.tensor(scale)},
    )


def test_compiles_as_one_graph():
    params, updates, buffers = problem(RULES[4], [(3, 4), (5,)])
    wanted_params, wanted_buffers = clones(params, buffers)
    apply_update_(wanted_params, [2 * u for u in updates], wanted_buffers, **RULES[4])

    @torch.compile(fullgraph=True)
    def step(params, updates, buffers):
        apply_update_(params, [2 * u for u in updates], buffers, **RULES[4])

    step(params, updates, buffers)
    assert all(map(torch.equal, params, wanted_params))
    assert all(map(torch.equal, buffers, wanted_buffers))


def ones(*shape, **options):
    return torch.ones(*shape, **options)


MOMENTUM = {"lr": 0.1, "momentum": 0.9}


@pytest.mark.parametrize(
    ("params", "updates", "buffers", "rule", "error", "message"),
    [
        ([ones(2)], [ones(2)], [], {"lr": -1.0}, ValueError, "lr must be .* finite, got -1.0"),
        ([ones(2)], [ones(2)], [], {"lr": float("nan")}, ValueError, "lr must be.*got nan"),
        ([ones(2)], [ones(2)], [], {"lr": "x"}, TypeError, "lr must be a number, got str"),
        (
            *([ones(2)], [ones(2)], [ones(2)]),
            *({"lr": 1.0, "momentum": 1.5}, ValueError, "momentum.*at most 1, got 1.5"),
        ),
        (
            *([ones(2)], [ones(2)], []),
            *({"lr": 1.0, "weight_decay": -0.1}, ValueError, "weight_decay.*got -0.1"),
        ),
        ([ones(2)], [], [], {"lr": 1.0}, ValueError, "updates must hold 1 tensors.*got 0"),
        ([ones(2)], [ones(2)], [], MOMENTUM, ValueError, "momentum_buffers must hold 1.*got 0"),
        ([ones(2)], [ones(2)], [ones(2)], {"lr": 1.0}, ValueError, "momentum_buffers.*got 1"),
        ([None], [ones(2)], [], {"lr": 1.0}, TypeError, r"params\[0\] must be a Tensor"),
        (
            *([ones(2, dtype=torch.int64)], [ones(2)], []),
            *({"lr": 1.0}, TypeError, r"params\[0\] must be float16.*got torch.int64"),
        ),
        (
            *([ones(2, dtype=torch.complex64)], [ones(2)], []),
            *({"lr": 1.0}, TypeError, r"params\[0\] must be.*got torch.complex64"),
        ),
        (
            *([ones(2), ones(2).double()], [ones(2), ones(2)], []),
            *({"lr": 1.0}, TypeError, r"params\[1\] must have the dtype.*got torch.float64"),
        ),
        (
            *([ones(2, 3).T], [ones(3, 2)], []),
            *({"lr": 1.0}, ValueError, r"params\[0\].*contiguous, got strides \(1, 3\)"),
        ),
        (
            *([ones(2), ones(2)], [ones(2), ones(3)], []),
            *({"lr": 1.0}, ValueError, r"updates\[1\] must have shape \(2\), got \(3,\)"),
        ),
        (
            *([ones(2)], [ones(2).double()], []),
            *({"lr": 1.0}, TypeError, r"updates\[0\] must be torch.float32.*got torch.float64"),
        ),
        (
            *([ones(2).bfloat16()] * 2, [ones(2).bfloat16(), ones(2)], []),
            *({"lr": 1.0}, TypeError, r"updates\[1\] must have the dtype of updates\[0\]"),
        ),
        (
            *([ones(2)], [ones(2, device="meta")], []),
            *({"lr": 1.0}, ValueError, r"updates\[0\] must be on the device of.*got meta"),
        ),
        (
            *([ones(2)], [ones(2)], [ones(3)]),
            *(MOMENTUM, ValueError, r"momentum_buffers\[0\] must have shape \(2\), got \(3,\)"),
        ),
        (
            *([ones(2).bfloat16()], [ones(2).bfloat16()], [ones(2).bfloat16()]),
            *(MOMENTUM, TypeError, r"momentum_buffers\[0\] must be torch.float32.*got torch.bf"),
        ),
        (
            *([ones(2)], [ones(2)], [ones(4)[::2]]),
            *(MOMENTUM, ValueError, r"momentum_buffers\[0\].*contiguous, got strides \(2,\)"),
        ),
        (
            *([ones(2)], [ones(2)], []),
            *({"lr": 1.0, "scale": ones(1)}, ValueError, r"scale must have shape \(\), got \(1,"),
        ),
        (
            *([ones(2)], [ones(2)], []),
            *({"lr": 1.0, "scale": ones(()).double()}, TypeError, "scale must be torch.float32"),
        ),
        (
            *([ones(2)], [ones(2)], []),
            *({"lr": 1.0, "scale": ones((), device="meta")}, ValueError, "scale must be on the"),
        ),
    ],
)
def test_bad_arguments_change_nothing(params, updates, buffers, rule, error, message):
    tensors = [t for t in (*params, *buffers) if t is not None]
    before = [t.clone() for t in tensors]
    with pytest.raises(error, match=message):
        apply_update_(params, updates, buffers, **rule)
    assert all(map(torch.equal, tensors, before))


@pytest.mark.parametrize("layout", ["to_sparse_coo", "to_sparse_csr"])
@pytest.mark.parametrize("place", ["params", "updates", "momentum_buffers"])
def test_sparse_tensors_are_refused(place, layout):
    lists = {name: [torch.ones(2, 2)] for name in ("params", "updates", "momentum_buffers")}
    lists[place] = [getattr(torch.ones(2, 2), layout)()]
    with pytest.raises(TypeError, match=rf"{place}\[0\] must be a dense \(strided\) tensor"):
        apply_update_(*lists.values(), lr=1.0, momentum=0.9)


# Entries of one array of 16, as (first, size); what of it is params, buffers and updates.
OVERLAPS = {
    "params[0] .* overlap params[1] in memory, got 8 bytes": ([(0, 2), (0, 2)], [], []),
    "params[0] .* overlap params[1] in memory, got 4 bytes": ([(2, 2), (3, 2)], [], []),
    "params[1] .* overlap params[2] in memory, got 4 bytes": ([(8, 1), (0, 6), (2, 1)], [], []),
    "momentum_buffers[0] .* overlap momentum_buffers[1] in memory": ([], [(4, 3), (6, 3)], []),
    "params[1] .* overlap momentum_buffers[0] in memory": ([(0, 2), (2, 2)], [(3, 2), (8, 2)], []),
    "params[0] .* overlap updates[0] in memory, got 8 bytes": ([(4, 2)], [], [(4, 2)]),
    "params[0] .* overlap updates[1] in memory": ([(4, 2), (8, 2)], [], [(0, 2), (3, 2)]),
    "momentum_buffers[0] .* overlap updates[0] in memory": ([], [(4, 4)], [(7, 4)]),
}


@pytest.mark.parametrize(("message", "entries"), OVERLAPS.items(), ids=OVERLAPS)
def test_what_is_updated_may_overlap_nothing(message, entries):
    memory = torch.arange(16.0)
    before = memory.clone()
    sizes = [size for _, size in max(entries, key=len)]
    # What is not in the array has its own memory.
    params, buffers, updates = (
        [memory[first : first + size] for first, size in of] or [torch.ones(n) for n in sizes]
        for of in entries
    )
    message = message.replace("[", r"\[")
    with pytest.raises(ValueError, match=message):
        apply_update_(params, updates, buffers, lr=1.0, momentum=0.9)
    assert torch.equal(memory, before)


def test_an_update_that_lies_between_the_entries_of_a_param_is_refused():
    memory = torch.ones(6)
    with pytest.raises(ValueError, match=r"params\[0\] .* updates\[0\] in memory, got 8 bytes"):
        apply_update_([memory[2:4]], [memory[1:5:3]], [], lr=1.0)
    with pytest.raises(ValueError, match=r"params\[0\] .* scale in memory, got 4 bytes"):
        apply_update_([memory[2:4]], [torch.ones(2)], [], lr=1.0, scale=memory[3])


@pytest.mark.filterwarnings("error")
def test_tensors_without_memory_overlap_nothing():
    with FakeTensorMode():
        apply_update_([torch.ones(2), torch.ones(2)], [torch.ones(2)] * 2, [], lr=1.0)
    params = [torch.ones(2, device="meta") for _ in range(2)]
    apply_update_(params, [torch.ones(2, device="meta")] * 2, [], lr=1.0)


def test_neighbors_in_one_array_and_updates_that_overlap_are_fine():
    memory, update = torch.ones(9), torch.ones(1).expand(3)
    params = [memory[:3], memory[6:], memory[4:4], memory[4:4]]
    empty = torch.ones(0)
    apply_update_(params, [update, update, empty, empty], [], lr=0.5)
    assert memory.tolist() == [0.5] * 3 + [1.0] * 3 + [0.5] * 3


# The CUDA kernel.


@pytest.fixture(scope="module")
def cuda_kernel(tmp_path_factory):
    """csrc/cuda/apply_update.cuh run on the CPU (tests/cuda_shim), with apply_update_'s arguments.

    Returns the number of launches.
    """
    directory = tmp_path_factory.mktemp("cuda_shim")
    library = shim.build(shim.SHIM / "apply_update.cpp", directory)

    def pointers(tensors):
        return (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))

    def run(params, updates, buffers, *, lr, scale=None, **rule):
        used = [i for i, p in enumerate(params) if p.numel()]
        params, updates = [params[i] for i in used], [updates[i] for i in used]
        buffers = [buffers[i] for i in used] if buffers else []
        dtypes = f"{shim.NAMES[params[0].dtype]},{shim.NAMES[updates[0].dtype]}"
        numbers = (
            lr,
            rule.get("momentum", 0),
            rule.get("weight_decay", 0),
            rule.get("nesterov", 0),
        )
        library.shim_reset(0)
        status = library.apply_update(
            dtypes.encode(),
            ctypes.c_int64(len(params)),
            pointers(params),
            pointers(updates),
            pointers(buffers) if buffers else None,
            (ctypes.c_int64 * len(params))(*(p.numel() for p in params)),
            (ctypes.c_double * 4)(*numbers),
            shim.pointer(scale),
        )
        shim.assert_success(library, status)
        return library.shim_launches()

    return run


def test_the_cuda_kernel_skips_at_a_scale_of_zero(cuda_kernel):
    params, updates, buffers = problem(RULES[4], [(3, 4), (70,)])
    updates[1][5] = torch.nan
    before = clones(params, buffers)
    cuda_kernel(params, updates, buffers, **RULES[4], scale=torch.zeros(()))
    assert all(map(torch.equal, params, before[0]))
    assert all(map(torch.equal, buffers, before[1]))


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("scale", [None, 0.25])
def test_the_cuda_kernel_agrees_with_the_reference(cuda_kernel, rule, dtypes, scale):
    params, updates, buffers = problem(rule, dtypes=dtypes)
    # A guard behind every tensor: nothing may be written there.
    room = [torch.cat([p.flatten(), torch.full((300,), 7.0, dtype=p.dtype)]) for p in params]
    params = [r[: p.numel()].view(p.shape) for r, p in zip(room, params, strict=True)]
    if scale is not None:
        scale = torch.tensor(scale, dtype=budget.accumulate(dtypes[0]))
    wanted_params, wanted_buffers = clones(params, buffers)
    reference.apply_update_(wanted_params, updates, wanted_buffers, **rule, scale=scale)
    assert cuda_kernel(params, updates, buffers, **rule, scale=scale) == 1
    assert_agree(params, wanted_params)
    assert_agree(buffers, wanted_buffers)
    assert all((r[-300:] == 7.0).all() for r in room)


@pytest.mark.parametrize(
    ("count", "launches"), [(1, 1), (95, 1), (96, 1), (97, 1), (768, 1), (769, 2), (2000, 3)]
)
def test_the_cuda_kernel_takes_many_tensors_in_one_launch(cuda_kernel, count, launches):
    rule = RULES[4]
    params, updates, buffers = problem(rule, [(1 + n % 7,) for n in range(count - 1)] + [(5000,)])
    wanted_params, wanted_buffers = clones(params, buffers)
    reference.apply_update_(wanted_params, updates, wanted_buffers, **rule)
    assert cuda_kernel(params, updates, buffers, **rule) == launches
    assert_agree(params, wanted_params)
    assert_agree(buffers, wanted_buffers)


def test_the_cuda_kernel_compiles_without_spills(tmp_path):
    """For every architecture of setup.py: neither spills nor a stack, and at most 96 registers."""
    found = shim.resources(shim.ROOT / "csrc" / "cuda" / "apply_update.cu", tmp_path)
    tables = 2
    assert len(found) == len(shim.ARCHITECTURES) * len(DTYPE_PAIRS) * tables
    for kernel in found:
        assert kernel.stack == kernel.spills == 0, kernel
        assert kernel.registers <= 96, kernel
