"""Every op has one stem, in every room of the house, and no room holds anything else."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from fused_so import ops, reference

ROOT = Path(__file__).parent.parent
GPU_HOME = {
    "apply_update": "cuda",
    "centered_grad": "triton",
    "covariance": "triton",
    "damped_inverse": "cuda",
    "grad_gram": "triton",
    "jacobian_backprop": "triton",
    "precondition": "triton",
}


def stems(folder: str, pattern: str) -> set[str]:
    """The stems of the files in a room; files with a leading underscore are shared helpers."""
    names = (re.fullmatch(pattern, path.name) for path in (ROOT / folder).iterdir())
    return {name[1] for name in names if name and not name[1].startswith("_")}


@pytest.mark.parametrize(
    ("folder", "pattern"),
    [
        ("fused_so/ops", r"(.*)\.py"),
        ("fused_so/reference", r"(.*)\.py"),
        ("csrc/cpu", r"((?!microkernel).*)\.cpp"),
        ("tests/ops", r"test_(.*)\.py"),
        ("bench", r"bench_((?!steps).*)\.py"),
    ],
)
def test_room_holds_every_op_and_no_other(folder, pattern):
    assert stems(folder, pattern) == set(GPU_HOME)


@pytest.mark.parametrize(
    ("home", "folder", "pattern"),
    [
        ("triton", "fused_so/triton_kernels", r"(.*)\.py"),
        ("cuda", "csrc/cuda", r"(.*)\.cu"),
    ],
)
def test_gpu_room_holds_its_ops(home, folder, pattern):
    at_home = {op for op, where in GPU_HOME.items() if where == home}
    assert stems(folder, pattern) == at_home


def test_every_triton_kernel_has_its_test():
    kernels = stems("fused_so/triton_kernels", r"(.*)\.py")
    assert kernels <= stems("tests/triton_kernels", r"test_(.*)\.py")


def test_every_cuda_kernel_runs_on_the_cpu():
    assert stems("csrc/cuda", r"(.*)\.cu") <= stems("tests/cuda_shim", r"(.*)\.cpp")


@pytest.mark.parametrize("name", ops.__all__)
def test_reference_has_the_name_and_arguments_of_the_op(name):
    public, oracle = (
        inspect.signature(getattr(room, name)).parameters.values() for room in (ops, reference)
    )
    assert [(p.name, p.kind) for p in public] == [(p.name, p.kind) for p in oracle]
    assert ops.__all__ == reference.__all__


@pytest.mark.parametrize("name", ops.__all__)
def test_docstring_says_what_is_raised_and_where_the_equation_is_from(name):
    doc = inspect.getdoc(getattr(ops, name))
    for heading in ("Args:", "Raises:", "Source:"):
        assert heading in doc


def test_optimizers_hold_no_kernel_code_and_no_device_branches():
    for path in (ROOT / "fused_so" / "optim").glob("*.py"):
        text = path.read_text()
        for word in ("triton", "torch.ops.", "is_cuda", "is_available"):
            assert word not in text, f"{path.name} mentions {word}"
        # The one place that knows of devices is the one that waits for none.
        assert ("cuda" in text) == (path.name == "readback.py"), path.name
