"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

A copy of the project is built with both, and the tests of every op run again in it, with every
instruction set of this machine. What memory a thread keeps between calls counts as its own only as
far as the call has asked for it (csrc/common/scratch.h).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops import budget

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX", "g++")


def runtime(name: str) -> str:
    """The path of a library of the compiler's."""
    command = [COMPILER, f"-print-file-name={name}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> Path:
    """A copy of the project whose library is built with the sanitizers."""
    copy = tmp_path_factory.mktemp("sanitized")
    skipped = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "fused_so", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=skipped)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    build(copy)
    return copy


def build(copy: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = os.environ | {"FUSED_SO_CUDA": "0", "FUSED_SO_SANITIZE": "1"}
    built = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-4000:] + built.stderr[-4000:]


def run_in(copy: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {
        "PYTHONPATH": str(copy),
        "LD_PRELOAD": runtime("libasan.so"),
        # Python and torch keep much until the process ends.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        **environment,
    }
    return subprocess.run(
        [sys.executable, *command],
        cwd=copy,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.skipif("FUSED_SO_CPU" in os.environ, reason="an instruction set is already chosen")
@pytest.mark.parametrize("variant", budget.variants())
def test_no_kernel_leaves_its_memory_or_the_language(sanitized, variant):
    run = run_in(
        sanitized,
        # Without capturing, which would keep a report to itself.
        *("-m", "pytest", "-x", "-s", "-p", "no:cacheprovider", "tests/ops"),
        *("-k", budget.KERNEL_CASES),
        FUSED_SO_CPU=variant,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
