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

# The least shared memory a block may have on any chip of the family: 99 KiB on sm_86 and sm_89.
SHARED_MEMORY = {"sm_80": 99, "sm_90": 227, "sm_100": 227, "gfx942": 64}


def cases():
    """Calls that between them reach every shipped configuration: (name, function)."""
    from fused_so.triton_kernels.covariance import covariance, covariance_

    def meta(*shape, dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

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
    yield "covariance_ transposed", lambda: update(meta(4096, 128, dtype=torch.float32).T, True)
    # Triton compiles an argument that is 1 as a constant.
    yield "covariance_ one by one", lambda: update(meta(1, 1, dtype=torch.float32), True)
    # A stride past 2^31 arrives as int64.
    wide = meta(2**41, dtype=torch.float32).as_strided((600, 1000), (2**31 + 8, 1))
    yield "covariance_ int64 stride", lambda: update(wide, True)
    yield "covariance float16", lambda: covariance(meta(100, 1000, dtype=torch.float16))


def compile_all(target):
    """In a process of its own: prints [[case, kernel, {resource: number}], ...] as JSON."""
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
        compiled.append((self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))

    JITFunction.run = compile_only
    result = []
    for case, call in cases():
        compiled.clear()
        call()
        result += [[case, name, resources(kernel)] for name, kernel in compiled]
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
    out, errors = compilers[target].communicate()
    assert compilers[target].returncode == 0, errors[-3000:]
    kernels = json.loads(out.splitlines()[-1])
    # The capture itself works: no kernel of the covariance was missed.
    assert {"_sum_columns", "_add_splits", "_update_product"} == {name for _, name, _ in kernels}
    for case, name, used in kernels:
        assert used["spilled"] == 0, (case, name, used)
        assert used["shared"] <= SHARED_MEMORY[target] * 1024, (case, name, used)


if __name__ == "__main__":
    compile_all(sys.argv[1])
