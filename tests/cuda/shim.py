"""CUDA kernels run on the CPU, compiled as C++ (tests/cuda_shim); and what nvcc makes of them."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).parents[2]
SHIM = ROOT / "tests" / "cuda_shim"
TORCH_HEADERS = Path(torch.__file__).parent / "include"
ARCHITECTURES = ("80", "90", "100")  # of setup.py
NAMES = {
    torch.float16: "half",
    torch.bfloat16: "bfloat16",
    torch.float32: "float",
    torch.float64: "double",
}


def build(source: Path, directory: Path) -> ctypes.CDLL:
    """Compiles `source` for the CPU with every check there is, and loads it."""
    compiler = os.environ.get("CXX", "g++")
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    # Each library keeps its own variables, as if it were the only one.
    flags = [compiler, "-std=c++17", "-fPIC", "-fno-gnu-unique", "-U_FORTIFY_SOURCE", *warnings]
    flags += [f"-I{SHIM}", f"-I{ROOT / 'csrc'}", f"-isystem{TORCH_HEADERS}"]
    # Accesses of a kernel are reported to runtime.cpp, which stands in for libtsan.
    checks = ["-fsanitize=thread,undefined", "-fno-sanitize-recover"]
    # Multiplications and additions fuse on a GPU.
    flags += ["-march=native", "-ffp-contract=fast"]
    kernel, runtime = directory / f"{source.stem}.o", directory / "runtime.o"
    library = directory / f"{source.stem}.so"
    for command in (
        [*flags, "-O1", *checks, "-c", str(source), "-o", str(kernel)],
        [*flags, "-O2", "-c", str(SHIM / "runtime.cpp"), "-o", str(runtime)],
        [
            compiler,
            "-shared",
            "-fsanitize=undefined",
            str(kernel),
            str(runtime),
            "-o",
            str(library),
        ],
    ):
        subprocess.run(command, check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.shim_error.restype = ctypes.c_char_p
    return loaded


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def assert_success(library: ctypes.CDLL, status: int) -> None:
    assert status == 0, f"cudaError {status}: {library.shim_error().decode()}"


class Resources(NamedTuple):
    kernel: str  # its mangled name
    registers: int
    shared: int  # bytes
    stack: int
    spills: int


def resources(source: Path, directory: Path) -> list[Resources]:
    """What ptxas says of every kernel of a .cu file, for every architecture."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        message = "nvcc was not found on PATH"
        if os.environ.get("FUSED_SO_CUDA") == "1":
            pytest.fail(f"FUSED_SO_CUDA=1, but {message}")
        pytest.skip(message)
    codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    flags = ["-O3", "-std=c++17", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"]
    flags += ["-Xptxas=-v", f"-I{ROOT / 'csrc'}", f"-I{TORCH_HEADERS}", "-c"]
    files = [str(source), "-o", str(directory / f"{source.stem}.o")]
    compiled = subprocess.run([nvcc, *flags, *codes, *files], capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers([^\n]*)",
        compiled.stderr,
        re.DOTALL,
    )
    result = []
    for kernel, stack, stores, loads, registers, rest in found:
        shared = re.search(r"(\d+) bytes smem", rest)
        spills = int(stores) + int(loads)
        bytes_shared = int(shared[1]) if shared else 0
        result.append(Resources(kernel, int(registers), bytes_shared, int(stack), spills))
    return result
