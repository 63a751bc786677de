"""The compiled libraries: their ABI, and what the package does without them or with broken ones."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import fused_so

ROOT = Path(__file__).parents[1]
PACKAGE = Path(fused_so.__file__).parent
COMPILER = os.environ.get("CXX", "g++")

# (1) The ABI audit.

# Everything of torch that may be used: the C functions of its stable shim.
STABLE_SHIM = re.compile(r"(aoti_torch|torch)_[a-z0-9_]+")
# What a library needs from Python is in the limited API of 3.10.
LIMITED_API = {"PyModule_Create2"}
# libc, libm, libgcc and libstdc++ version their symbols; the C++ runtime may also be had from
# torch's own libraries, which export parts of libstdc++ without a version.
SYSTEM_VERSION = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_")
CXX_RUNTIME = re.compile(r"_Z(N?K?S[tosi]|NK?St|T[ISV]St|T[ISV]N10__cxxabiv1|d[al]Pv|n[aw]m)")
TORCH_CXX = re.compile(r"(?<![a-z])(2at|3c10|5torch|5caffe2)(?=[0-9A-Z])")
# Weak, in the start files of every library.
START_FILES = {"__gmon_start__", "__cxa_finalize"}
START_FILES |= {"_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}


def undefined_symbols(library: Path) -> list[str]:
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", "--with-symbol-versions", str(library)],
        check=True,
        capture_output=True,
        text=True,
    )
    return [line.split()[-1] for line in listing.stdout.splitlines()]


def is_stable(symbol: str) -> bool:
    name = symbol.split("@")[0]
    if TORCH_CXX.search(name):
        return False
    return bool(
        name in LIMITED_API | START_FILES
        or STABLE_SHIM.fullmatch(name)
        or SYSTEM_VERSION.search(symbol)
        or CXX_RUNTIME.match(name)
    )


def unstable_symbols(library: Path) -> list[str]:
    return [symbol for symbol in undefined_symbols(library) if not is_stable(symbol)]


def built_libraries() -> list[Path]:
    return sorted(PACKAGE.glob("_C*.abi3.so"))


def needed(library: Path) -> set[str]:
    listing = subprocess.run(
        ["readelf", "-d", str(library)], check=True, capture_output=True, text=True
    )
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", listing.stdout))


def test_the_libraries_are_built():
    names = [library.name for library in built_libraries()]
    assert "_C.abi3.so" in names, "run `pip install -e .` first"
    if os.environ.get("FUSED_SO_CUDA") == "1":
        assert "_C_cuda.abi3.so" in names


@pytest.mark.parametrize("library", built_libraries(), ids=lambda library: library.name)
def test_only_stable_symbols_are_used(library):
    assert unstable_symbols(library) == []
    assert any(s.startswith("aoti_torch_") for s in undefined_symbols(library))


@pytest.mark.parametrize("library", built_libraries(), ids=lambda library: library.name)
def test_only_torch_and_the_system_are_needed(library):
    system = {"libc.so.6", "libm.so.6", "libgcc_s.so.1", "libstdc++.so.6", "libpthread.so.0"}
    system |= {"ld-linux-x86-64.so.2", "libdl.so.2", "librt.so.1"}
    torch_cpu = {"libtorch.so", "libtorch_cpu.so", "libc10.so"}
    if library.name.startswith("_C_cuda"):
        # The stream's symbol lives there, and only this entry lets the loader find it.
        assert "libtorch_cuda.so" in needed(library)
        torch_cpu |= {"libtorch_cuda.so"}
    assert needed(library) <= system | torch_cpu


# What TORCH_TARGET_VERSION does not hide although the headers of older versions lack it: with
# these a source does not compile with torch 2.11.
NEWER_NAMES = ("STABLE_TORCH_ERROR_CODE_CHECK",)


@pytest.mark.parametrize("name", NEWER_NAMES)
def test_no_name_is_used_that_older_headers_lack(name):
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert len(sources) > 20
    assert [path.name for path in sources if name in path.read_text()] == []


def test_the_audit_names_an_unstable_symbol(tmp_path):
    source = tmp_path / "bad.cpp"
    source.write_text(
        """
        #include <vector>
        namespace at { struct Tensor { void* impl; }; int ordinary(const Tensor&); }
        namespace c10 { void warn(const std::vector<at::Tensor>&); }
        extern "C" int _PyObject_Private(int);
        extern "C" int aoti_torch_get_dim(void*, long*);
        int f() {
          long dim;
          c10::warn({});
          return at::ordinary(at::Tensor{}) + _PyObject_Private(1) + aoti_torch_get_dim(0, &dim);
        }
        """
    )
    library = tmp_path / "bad.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    assert sorted(unstable_symbols(library)) == [
        "_PyObject_Private",
        "_ZN2at8ordinaryERKNS_6TensorE",
        "_ZN3c104warnERKSt6vectorIN2at6TensorESaIS2_EE",
    ]


def test_the_audit_fails_torchs_own_python_library():
    library = Path(torch.__file__).parent / "lib" / "libtorch_python.so"
    assert any("c10" in symbol for symbol in unstable_symbols(library))


# (2) Missing and broken libraries.

# Of an editable install, the finder would offer the libraries of the source tree.
PROBE = """
import logging, sys
sys.path.insert(0, sys.argv[1])
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
logging.basicConfig(stream=sys.stdout, format="LOG %(message)s")
import torch, fused_so
print("LOADED", fused_so.LOADED_LIBRARIES)
for _ in range(2):
    inverse, info = fused_so.ops.damped_inverse(4 * torch.eye(3), 0.0)
print("DIAGONAL", inverse.diagonal().tolist(), info.item())
"""


def import_copy(tmp_path: Path, *, library: bytes | None = None, **environment: str):
    """Imports a copy of the package's Python files, with `library` as its _C.abi3.so."""
    copy = tmp_path / "fused_so"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    # The version comes from the metadata of the installed package.
    info = tmp_path / "fused_so-0.dist-info"
    info.mkdir()
    installed = version("fused_so")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: fused_so\nVersion: {installed}\n")
    if library is not None:
        (copy / "_C.abi3.so").write_bytes(library)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FUSED_SO_")}
    run = subprocess.run(
        [sys.executable, "-c", PROBE, str(tmp_path)],
        env=clean | environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    if run.returncode == 0:
        assert "DIAGONAL [0.25, 0.25, 0.25] 0" in run.stdout
    return run


def test_without_the_library_the_references_run_and_say_so_once(tmp_path):
    run = import_copy(tmp_path)
    assert run.returncode == 0, run.stderr
    assert "LOADED ()" in run.stdout
    logged = [line for line in run.stdout.splitlines() if line.startswith("LOG")]
    assert len(logged) == 1
    assert "damped_inverse" in logged[0]
    assert "reference" in logged[0]


def test_a_broken_library_is_an_import_error_with_its_cause(tmp_path):
    run = import_copy(tmp_path, library=b"not a library")
    assert run.returncode != 0
    message = run.stderr.splitlines()[-1]
    assert message.startswith("ImportError: fused_so._C was built but does not load with torch")
    assert torch.__version__ in message
    assert "file too short" in message or "invalid ELF header" in message
    assert "pip install" in message


def test_a_library_with_an_unknown_symbol_is_an_import_error_naming_it(tmp_path):
    source = tmp_path / "stub.cpp"
    source.write_text('extern "C" int nobody_has_this(); int f = nobody_has_this();')
    library = tmp_path / "stub.so"
    subprocess.run([COMPILER, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    run = import_copy(tmp_path, library=library.read_bytes())
    assert run.returncode != 0
    assert "ImportError: fused_so._C was built but does not load" in run.stderr
    assert "nobody_has_this" in run.stderr


def test_the_reference_backend_loads_and_logs_nothing(tmp_path):
    run = import_copy(tmp_path, library=b"not a library", FUSED_SO_BACKEND="reference")
    assert run.returncode == 0, run.stderr
    assert "LOADED ()" in run.stdout
    assert "LOG" not in run.stdout


def test_an_unknown_backend_is_an_error(tmp_path):
    run = import_copy(tmp_path, FUSED_SO_BACKEND="fastest")
    assert run.returncode != 0
    message = "ValueError: FUSED_SO_BACKEND must be 'auto' or 'reference', got 'fastest'"
    assert message in run.stderr


# (3) setup.py.


def run_setup(**environment: str):
    clean = {k: v for k, v in os.environ.items() if k not in ("FUSED_SO_CUDA", "CUDA_HOME")}
    return subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env=clean | environment,
        capture_output=True,
        text=True,
    )


def test_setup_wants_nvcc_when_told_to(tmp_path):
    run = run_setup(FUSED_SO_CUDA="1", PATH=str(tmp_path))
    assert run.returncode != 0
    assert "FUSED_SO_CUDA=1, but nvcc was not found on PATH or under CUDA_HOME" in run.stderr


def test_setup_does_without_nvcc_otherwise(tmp_path):
    run = run_setup(FUSED_SO_CUDA="auto", PATH=str(tmp_path))
    assert run.returncode == 0, run.stderr


def test_setup_refuses_an_unknown_choice():
    run = run_setup(FUSED_SO_CUDA="maybe")
    assert run.returncode != 0
    assert "FUSED_SO_CUDA must be auto, 0 or 1, got 'maybe'" in run.stderr


def test_setup_refuses_an_unknown_choice_of_sanitizers():
    run = run_setup(FUSED_SO_SANITIZE="yes", FUSED_SO_CUDA="0")
    assert run.returncode != 0
    assert "FUSED_SO_SANITIZE must be 0 or 1, got 'yes'" in run.stderr
