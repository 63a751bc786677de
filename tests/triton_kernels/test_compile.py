"""Every Triton kernel, compiled for GPUs that are not there, exactly as its launcher launches it.

The launchers run on meta tensors under a driver that only names a target, so the specialization,
the configuration and the precision are the shipped ones and cannot drift from the test.
"""

import functools
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

# The products of `_product`, and the types that they have a tile for.
PRODUCTS = {
    "centered_grad._centered_product": (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    ),
    "precondition._product": (torch.float32, torch.float64),
    "jacobian_backprop._product": (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    ),
}
KERNELS = {
    *PRODUCTS,
    "covariance._update_product",
    "grad_gram._layers",
    "grad_gram._pieces",
    "covariance._sum_columns",
    "covariance._add_splits",
    "centered_grad._sum_columns",
    "_product.add_partials",
    "precondition._finish_rows",
    "grad_gram._column_means",
    "grad_gram._along_means",
    "grad_gram._add_pieces",
    "grad_gram._gram_means",
    "grad_gram._subtract_means",
    "jacobian_backprop._pull_back",
}
# What a launch configures.
CONFIG = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
# The least shared memory a block may have on any chip of the family: 99 KiB on sm_86 and sm_89.
SHARED_MEMORY = {"sm_80": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def cases():
    """Calls that between them reach every shipped configuration: (name, function)."""
    yield from covariance_cases()
    yield from centered_grad_cases()
    yield from precondition_cases()
    yield from grad_gram_cases()
    yield from jacobian_backprop_cases()
    yield from searching_cases()


def covariance_cases():
    from fused_so.triton_kernels.covariance import covariance, covariance_, covariance_list_

    def update(h, centered):
        d, dtype = h.shape[1], torch.promote_types(h.dtype, torch.float32)
        cov, mean = meta(d, d, dtype=dtype), meta(d, dtype=dtype)
        covariance_(cov, mean, h, decay=0.9, centered=centered)

    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        # Below and above the size where the tile changes; 1000 is not a multiple of 16.
        for d in (30, 1000):
            h = meta(8192, d, dtype=dtype)
            yield f"covariance_ {dtype} d={d}", lambda h=h: update(h, True)
    yield "covariance_ uncentered", lambda: update(meta(8192, 4096, dtype=torch.bfloat16), False)
    yield "covariance_ transposed", lambda: update(meta(4096, 128).T, True)
    # Triton compiles an argument that is 1 as a constant.
    yield "covariance_ one by one", lambda: update(meta(1, 1), True)
    # A stride past 2^31 arrives as int64.
    yield "covariance_ int64 stride", lambda: update(far_apart(600, 1000), True)

    def updates(h, centered, count=3):
        d, dtype = h.shape[1], torch.promote_types(h.dtype, torch.float32)
        covs, means = [meta(d, d, dtype=dtype)] * count, [meta(d, dtype=dtype)] * count
        covariance_list_(covs, means, [h] * count, decay=[0.9] * count, centered=centered)

    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for d in (30, 1000):
            for centered in (True, False):
                h = meta(1024, d, dtype=dtype)
                name = f"covariance_ layers {dtype} {d} {centered}"
                yield name, lambda h=h, centered=centered: updates(h, centered)
    yield "covariance_ layers transposed", lambda: updates(meta(250, 128).T, True)
    yield "covariance_ layers one by one", lambda: updates(meta(1, 1), True)
    yield "covariance float16", lambda: covariance(meta(100, 1000, dtype=torch.float16))


def far_apart(rows, cols):
    """A matrix whose stride passes 2^31."""
    return meta(2**41).as_strided((rows, cols), (2**31 + 8, 1))


def centered_grad_cases():
    from fused_so.triton_kernels.centered_grad import centered_grad

    # Each size has its own tile; 1000, 500 and 250 are not multiples of 16.
    for size in ((8192, 1000, 2000), (1024, 500, 250), (30, 10, 20)):
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            g, h = (meta(size[0], cols, dtype=dtype) for cols in size[1:])
            yield f"centered_grad {dtype} {size}", lambda g=g, h=h: centered_grad(g, h)
            plain = functools.partial(centered_grad, g, h, centered=False)
            yield f"centered_grad uncentered {dtype} {size}", plain
    half = meta(8192, 2000, dtype=torch.float16)
    yield "centered_grad float16", lambda: centered_grad(half, half)
    yield "centered_grad uncentered float16", lambda: centered_grad(half, half, centered=False)
    g, h = meta(1000, 1024), meta(784, 1024)
    yield "centered_grad transposed", lambda: centered_grad(g.T, h.T)
    yield "centered_grad one by one", lambda: centered_grad(meta(1, 1), meta(1, 1))
    far = far_apart(600, 1000)
    yield "centered_grad int64 stride", lambda: centered_grad(far, far)

    def at_medium():
        torch.set_float32_matmul_precision("medium")
        half, single = meta(1024, 1000, dtype=torch.bfloat16), meta(1024, 1000)
        centered_grad(half, half)
        centered_grad(single, single)
        torch.set_float32_matmul_precision("highest")

    yield "centered_grad medium", at_medium


def precondition_cases():
    from fused_so.triton_kernels.precondition import precondition, precondition_list

    def step(grad, input_side, output_side, alpha=True):
        dtype = torch.promote_types(grad.dtype, torch.float32)
        out, width = grad.shape
        a = meta(width, width, dtype=dtype) if input_side else None
        go = meta(out, out, dtype=dtype) if output_side else None
        scale = meta(dtype=dtype) if alpha else None
        precondition(grad, grad[:, 0], meta(width, dtype=dtype), a, output_inverse=go, alpha=scale)

    both = True, True
    for dtype in (torch.float32, torch.float64):
        # One tile, and then two.
        for shape in ((1000, 2000), (500, 500)):
            grad = meta(*shape, dtype=dtype)
            yield f"precondition {dtype} {shape}", lambda grad=grad: step(grad, *both)
    for sides in ((True, False), (False, True), (False, False)):
        grad = meta(1000, 2000, dtype=torch.bfloat16)
        name = f"precondition bfloat16 {sides}"
        yield name, lambda grad=grad, sides=sides: step(grad, *sides)
    yield "precondition without alpha", lambda: step(meta(64, 64), *both, alpha=False)
    yield "precondition transposed", lambda: step(meta(2000, 1000).T, *both)
    yield "precondition one by one", lambda: step(meta(1, 1), *both)
    yield "precondition int64 stride", lambda: step(far_apart(600, 1000), True, False)

    def steps(grad, sides, alpha=True, count=3):
        out, width = grad.shape
        dtype = torch.promote_types(grad.dtype, torch.float32)
        a, go = (
            [meta(d, d, dtype=dtype)] * count if side else None
            for d, side in zip((width, out), sides, strict=True)
        )
        scales = [meta(dtype=dtype)] * count if alpha else None
        means = [meta(width, dtype=dtype)] * count
        biases = [grad[:, 0]] * count
        precondition_list([grad] * count, biases, means, a, output_inverse=go, alpha=scales)

    # Every tile again, with the addresses of several layers.
    for dtype in (torch.float32, torch.float64):
        for width in (500, 250, 30):
            grad = meta(width, width, dtype=dtype)
            for sides in (both, (True, False), (False, True), (False, False)):
                name = f"precondition layers {dtype} {width} {sides}"
                yield name, lambda grad=grad, sides=sides: steps(grad, sides)
    half = meta(250, 500, dtype=torch.bfloat16)
    yield "precondition layers bfloat16", lambda: steps(half, both)
    yield "precondition layers without alpha", lambda: steps(half, both, alpha=False)
    yield "precondition layers transposed", lambda: steps(meta(250, 500).T, both)
    yield "precondition nine layers", lambda: steps(meta(250, 500), both, count=9)
    yield "precondition layers one by one", lambda: steps(meta(1, 1), both)


def grad_gram_cases():
    from fused_so.triton_kernels.grad_gram import grad_gram

    autoencoder = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)

    def gram(n, widths, dtype, centered=False):
        gs, hs = ([meta(n, d, dtype=dtype) for d in side] for side in (widths[1:], widths[:-1]))
        grad_gram(gs, hs, centered=centered, biases=[True] * len(gs))

    # One launch of large tiles and of small ones, pieces of large tiles and of small ones.
    for n, widths in (
        (1024, (1000, 1000)),
        (1024, autoencoder),
        (50, (64, 64)),
        (512, autoencoder),
        (64, autoencoder),
    ):
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            arguments = n, widths, dtype
            yield f"grad_gram {arguments}", lambda arguments=arguments: gram(*arguments)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for arguments in ((1024, (1000, 1000), dtype, True), (512, (500, 250, 30), dtype, True)):
            yield f"grad_gram {arguments}", lambda arguments=arguments: gram(*arguments)
    # More layers than one launch takes: the second one adds to the first.
    yield "grad_gram nine layers", lambda: gram(1024, (1000,) * 10, torch.float16)
    yield "grad_gram nine wide layers", lambda: gram(200, (1000,) * 10, torch.float16)
    yield "grad_gram one by one", lambda: gram(1, (1, 1), torch.float32, True)

    def views():
        far = far_apart(600, 1000)
        grad_gram([far, far], [far, far], centered=False, biases=[True, False])
        transposed = meta(1000, 600).T
        grad_gram([transposed], [meta(600, 1000)], centered=False, biases=[True])

    yield "grad_gram transposed and int64 stride", views


def jacobian_backprop_cases():
    from fused_so.triton_kernels.jacobian_backprop import jacobian_backprop

    def propagate(n, o, out, width, dtype, scaled=True, pulled=True):
        row, weight = meta(n, out, dtype=dtype), meta(out, width, dtype=dtype)
        dphi, direction = row if scaled else None, row if pulled else None
        jac = meta(n, o, out, dtype=dtype)
        jacobian_backprop(jac, weight, dphi=dphi, direction=direction)

    # Each size has its own tile; the second one also has its sums cut.
    for size in ((256, 10, 1000, 2000), (64, 4, 1000, 500), (8, 4, 64, 30)):
        for dtype in (torch.bfloat16, torch.float32, torch.float64):
            arguments = *size, dtype
            name = f"jacobian_backprop {arguments}"
            yield name, lambda arguments=arguments: propagate(*arguments)
        arguments = *size, torch.float16
        for options in ((True, True), (False, True)):
            name = f"jacobian_backprop {arguments} {options}"
            yield name, lambda a=arguments, options=options: propagate(*a, *options)
    for options in ((True, False), (False, False)):
        name = f"jacobian_backprop alone {options}"
        yield name, lambda options=options: propagate(64, 4, 1000, 500, torch.float32, *options)
    yield "jacobian_backprop one by one", lambda: propagate(1, 1, 1, 1, torch.float32)

    row, far = meta(64, 1000), far_apart(64, 1000)
    permuted, weight = meta(10, 64, 1000).transpose(0, 1), meta(500, 1000).T
    yield (
        "jacobian_backprop permuted and transposed",
        lambda: jacobian_backprop(permuted, weight, dphi=row, direction=row),
    )
    expanded = far_apart(4, 1000).expand(64, 4, 1000)
    yield (
        "jacobian_backprop int64 stride",
        lambda: jacobian_backprop(expanded, meta(1000, 500), dphi=far, direction=far),
    )

    def at_medium():
        torch.set_float32_matmul_precision("medium")
        propagate(256, 10, 1000, 2000, torch.bfloat16)
        propagate(256, 10, 1000, 2000, torch.float32)
        torch.set_float32_matmul_precision("highest")

    yield "jacobian_backprop medium", at_medium


def searching_cases():
    """What the opt-in search tries beside what the heuristics choose, for every op and type."""
    from fused_so import _extension
    from fused_so.triton_kernels import _autotune

    def compile_more(launch, candidate, more):
        # Of grad_gram a candidate says too whether its sums stay whole.
        config = candidate[0] if isinstance(candidate[0], tuple) else candidate
        if config in more and (config is candidate or not candidate[1]):
            launch(candidate)
            return 1.0
        return 0.0

    def searching(op, call):
        kernels = module({"covariance": op, "grad_gram": op}.get(op, "_product"))
        more = {config for configs in kernels.MORE_CONFIGS.values() for config in configs}
        milliseconds = _autotune.milliseconds
        _extension.AUTOTUNE = True
        _autotune.milliseconds = functools.partial(compile_more, more=more)
        call()
        _extension.AUTOTUNE, _autotune.milliseconds = False, milliseconds

    halves_too = torch.float16, torch.bfloat16, torch.float32, torch.float64
    wanted = (
        *(f"covariance_ {dtype} d=1000" for dtype in halves_too),
        *(f"centered_grad {dtype} (8192, 1000, 2000)" for dtype in halves_too),
        "centered_grad float16",
        "covariance float16",
        "precondition torch.float32 (1000, 2000)",
        "precondition torch.float64 (1000, 2000)",
        *(f"jacobian_backprop {(256, 10, 1000, 2000, dtype)}" for dtype in halves_too),
    )
    for name, call in (
        *covariance_cases(),
        *centered_grad_cases(),
        *precondition_cases(),
        *grad_gram_cases(),
        *jacobian_backprop_cases(),
    ):
        large = name.startswith(("grad_gram (512", "grad_gram nine wide layers"))
        if large or name in wanted:
            op = name.split()[0].removesuffix("_")
            yield f"searching {name}", lambda op=op, call=call: searching(op, call)


def module(name):
    """Of the kernels: the function of the same name may hide it."""
    return importlib.import_module(f"fused_so.triton_kernels.{name}")


def compile_all(target, prefix=""):
    """In a process of its own: prints [[case, kernel, configuration, {resource: number}], ...]
    as JSON."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    is_hip = target.startswith("gfx")
    if is_hip:
        torch.version.hip = "what a ROCm build of PyTorch says"

    class AbsentDevice:
        def get_current_target(self):
            return (
                GPUTarget("hip", target, 64) if is_hip else GPUTarget("cuda", int(target[3:]), 32)
            )

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    triton.runtime.driver.set_active(AbsentDevice())
    compiled = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        name = f"{self.__module__.split('.')[-1]}.{self.__name__}"
        config = tuple(kwargs.get(key) for key in CONFIG)
        compiled.append((name, config, run(self, *args, grid=grid, warmup=True, **kwargs)))

    JITFunction.run = compile_only
    result = []
    for case, call in cases():
        if not case.startswith(prefix):
            continue
        compiled.clear()
        call()
        result += [[case, name, config, resources(kernel)] for name, config, kernel in compiled]
    print(json.dumps(result))


def resources(kernel):
    """Registers, bytes of spilled registers and bytes of shared memory."""
    shared = kernel.metadata.shared
    if "amdgcn" in kernel.asm:
        keys = ("vgpr_count", "private_segment_fixed_size")
        registers, stack = (
            re.search(rf"\.{key}:\s+(\d+)", kernel.asm["amdgcn"])[1] for key in keys
        )
        return {"registers": int(registers), "spilled": int(stack), "shared": shared}
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        command = [cuobjdump, "-res-usage", cubin]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return {"registers": int(registers), "spilled": int(stack), "shared": shared}


@pytest.fixture(scope="module")
def compilers():
    """One process a target, all at work at the same time."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    processes = {
        target: subprocess.Popen(
            [sys.executable, __file__, target],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for target in SHARED_MEMORY
    }  # fmt: skip
    yield processes
    for process in processes.values():
        process.kill()
        process.communicate()


@pytest.mark.parametrize("target", SHARED_MEMORY)
def test_compiles_without_spills(target, compilers):
    _product, covariance, grad_gram = map(module, ("_product", "covariance", "grad_gram"))
    out, errors = compilers[target].communicate()
    assert compilers[target].returncode == 0, errors[-3000:]
    kernels = json.loads(out.splitlines()[-1])
    # The capture itself works: no kernel and no configuration was missed.
    assert {name for _, name, _, _ in kernels} == KERNELS
    shipped = {
        product: [
            config
            for dtype in dtypes
            for config in (*_product.CONFIGS[dtype], *_product.MORE_CONFIGS[dtype])
        ]
        for product, dtypes in PRODUCTS.items()
    }
    shipped["grad_gram._layers"] = itertools.chain(*grad_gram.WHOLE_CONFIGS.values())
    tuned = {"covariance._update_product": covariance, "grad_gram._pieces": grad_gram}
    for name, configs in tuned.items():
        shipped[name] = itertools.chain(*configs.CONFIGS.values(), *configs.MORE_CONFIGS.values())
    for product, configs in shipped.items():
        reached = [config for _, name, config, _ in kernels if name == product]
        # A tile of a symmetric product is a square: it has no BLOCK_N.
        reached = {tuple(x for x in config if x is not None) for config in reached}
        assert reached == {tuple(config) for config in configs}, product
    for case, name, _, used in kernels:
        assert used["spilled"] == 0, (case, name, used)
        assert used["shared"] <= SHARED_MEMORY[target] * 1024, (case, name, used)


if __name__ == "__main__":
    compile_all(*sys.argv[1:])
