"""The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer.

A copy of the project is built with both, and those tests of every op that go through the edges of
its kernel's loops (`EDGES`) run again in it, with the widest vectors of this machine. What a thread
keeps between calls counts as its own only as far as a call has asked for it
(csrc/common/scratch.h).
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

from tests.ops import budget

ROOT = Path(__file__).parents[1]
COMPILER = shlex.split(os.environ.get("CXX", "g++"))
# Their names: of sizes around tiles and blocks, of no entries, of strides and lists.
EDGES = "tiles or beyond or rows or empty or lower or batch or mixed or strides or centering"


def runtime(name: str) -> str:
    """Where the compiler has a library of its own; else no absolute path."""
    if shutil.which(COMPILER[0]) is None:
        return ""
    command = [*COMPILER, f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


pytestmark = pytest.mark.skipif(
    not Path(runtime("libasan.so")).is_absolute(),
    reason=f"{COMPILER[0]} comes without AddressSanitizer",
)


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory) -> Path:
    """A copy of the project whose library is built with the sanitizers."""
    copy = tmp_path_factory.mktemp("sanitized")
    skipped = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "fused_so", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=skipped)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = os.environ | {"FUSED_SO_CUDA": "0", "FUSED_SO_SANITIZE": "1"}
    built = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-4000:] + built.stderr[-4000:]
    return copy


def run_in(copy: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    ours = ("FUSED_SO_", "PYTEST_")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    environment = {
        **inherited,
        "PYTHONPATH": str(copy),
        # First; and before torch its libstdc++, where it looks for what throws.
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libstdc++.so')}",
        # Python and torch keep much until the process ends.
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        **environment,
    }
    command = (sys.executable, *command)
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)


def test_the_library_that_is_loaded_is_the_one_with_sanitizers(sanitized):
    library = sanitized / "fused_so" / "_C.abi3.so"
    listing = ["nm", "-D", "--undefined-only", str(library)]
    symbols = subprocess.run(listing, check=True, capture_output=True, text=True).stdout
    assert "__asan_report_store" in symbols
    assert "__ubsan_handle" in symbols
    run = run_in(sanitized, "-c", "import fused_so._C as library; print(library.__file__)")
    assert run.stdout.strip() == str(library), run.stderr[-4000:]


OVERRUN = """
#include "common/scratch.h"
int main(int argc, char**) {
  fused_so::Scratch scratch;
  scratch.get<float>(100);
  volatile float* asked = scratch.get<float>(10);
  for (int i = 0; i < 9 + argc; ++i) asked[i] = 1;
}
"""


def test_memory_that_an_earlier_call_asked_for_is_out_of_bounds(tmp_path):
    source, program = tmp_path / "overrun.cpp", tmp_path / "overrun"
    source.write_text(OVERRUN)
    includes = [f"-I{path}" for path in (ROOT / "csrc", *include_paths())]
    command = [*COMPILER, "-std=c++17", "-fsanitize=address", *includes, str(source)]
    subprocess.run([*command, "-o", str(program)], check=True)
    assert subprocess.run([program], capture_output=True).returncode == 0
    beyond = subprocess.run([program, "one more"], capture_output=True, text=True)
    assert beyond.returncode != 0
    assert "use-after-poison" in beyond.stderr


@pytest.mark.skipif("FUSED_SO_CPU" in os.environ, reason="an instruction set is already chosen")
def test_no_kernel_leaves_its_memory_or_the_language(sanitized):
    # The sanitizers do not see what a matrix unit reads.
    widest = [variant for variant in budget.variants() if variant != "amx"][-1]
    run = run_in(
        sanitized,
        # Without capturing, which would keep a report to itself.
        *("-m", "pytest", "-x", "-s", "-p", "no:cacheprovider", "tests/ops"),
        *("-k", EDGES),
        FUSED_SO_CPU=widest,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
