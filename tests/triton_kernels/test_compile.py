"""Every Triton kernel, compiled for GPUs that are not there, exactly as its launcher launches it.

The launchers run on meta tensors under a driver that only names a target, so the specialization,
the configuration and the precision are the shipped ones and cannot drift from the test.
"""

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
}
KERNELS = {
    *PRODUCTS,
    "covariance._sum_columns",
    "covariance._add_splits",
    "covariance._update_product",
    "centered_grad._sum_columns",
    "centered_grad._add_partials",
    "precondition._finish_rows",
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


def covariance_cases():
    from fused_so.triton_kernels.covariance import covariance, covariance_

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
    half = meta(8192, 2000, dtype=torch.float16)
    yield "centered_grad float16", lambda: centered_grad(half, half)
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
    from fused_so.triton_kernels.precondition import precondition

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


def compile_all(target):
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
    from fused_so.triton_kernels._product import CONFIGS

    out, errors = compilers[target].communicate()
    assert compilers[target].returncode == 0, errors[-3000:]
    kernels = json.loads(out.splitlines()[-1])
    # The capture itself works: no kernel and no configuration was missed.
    assert {name for _, name, _, _ in kernels} == KERNELS
    for product, dtypes in PRODUCTS.items():
        reached = {tuple(config) for _, name, config, _ in kernels if name == product}
        assert reached == {tuple(config) for dtype in dtypes for config in CONFIGS[dtype]}, product
    for case, name, _, used in kernels:
        assert used["spilled"] == 0, (case, name, used)
        assert used["shared"] <= SHARED_MEMORY[target] * 1024, (case, name, used)


if __name__ == "__main__":
    compile_all(sys.argv[1])
