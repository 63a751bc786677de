"""Builds the compiled libraries; everything else about the package is in pyproject.toml.

FUSED_SO_CUDA=auto|0|1 (default auto) says whether csrc/cuda is compiled: auto compiles it when
nvcc is found, 1 makes a missing nvcc an error. No GPU and no CUDA build of torch is needed.

FUSED_SO_SANITIZE=0|1 (default 0): 1 compiles with AddressSanitizer and UndefinedBehaviorSanitizer,
for tests/test_sanitizers.py. Such libraries load only where LD_PRELOAD names gcc's libasan.so.
"""

import os
import shutil
import subprocess
from glob import glob
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, include_paths

# The oldest torch whose stable ABI the libraries use: 2.10.
FLAGS = ["-O3", "-std=c++17", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
CSRC = Path(__file__).parent.absolute() / "csrc"
CUDA_ARCHITECTURES = ("80", "90", "100")
# Not -O3, so that a report names the line; no vptr, which needs the types of libtorch.
SANITIZED = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
SANITIZED += ["-O1", "-g1", "-fno-omit-frame-pointer"]


def chosen(name, default, choices):
    value = os.environ.get(name, default)
    if value not in choices:
        raise SystemExit(
            f"{name} must be {', '.join(choices[:-1])} or {choices[-1]}, got {value!r}"
        )
    return value


def find_nvcc():
    wanted = chosen("FUSED_SO_CUDA", "auto", ("auto", "0", "1"))
    home = os.environ.get("CUDA_HOME", "")
    nvcc = None if wanted == "0" else shutil.which(f"{home}/bin/nvcc") or shutil.which("nvcc")
    if wanted == "1" and nvcc is None:
        raise SystemExit("FUSED_SO_CUDA=1, but nvcc was not found on PATH or under CUDA_HOME")
    return nvcc


def extension(name, sources, link=(), **options):
    sanitized = SANITIZED if chosen("FUSED_SO_SANITIZE", "0", ("0", "1")) == "1" else []
    hidden = ["-fvisibility=hidden", "-fno-math-errno"]
    return CppExtension(
        f"fused_so.{name}",
        ["csrc/module.cpp", *sources],
        include_dirs=[str(CSRC)],
        extra_compile_args=[*FLAGS, "-g0", *hidden, *sanitized],
        extra_link_args=[*link, *sanitized],
        py_limited_api=True,
        **options,
    )


class BuildLibraries(BuildExtension):
    """Compiles csrc/cuda with nvcc first: torch's own CUDAExtension wants a CUDA torch for that."""

    def build_extension(self, ext):
        if ext.name.endswith("_C_cuda"):
            build = Path(self.build_temp).absolute() / "cuda"
            build.mkdir(parents=True, exist_ok=True)
            ext.extra_objects = [self.compile_cuda(source, build) for source in CUDA_SOURCES]
            ext.library_dirs = [self.stub_torch_cuda(build), cuda_library_dir(), *ext.library_dirs]
        super().build_extension(ext)

    @staticmethod
    def compile_cuda(source, build):
        target = build / f"{Path(source).stem}.o"
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in CUDA_ARCHITECTURES]
        codes.append("-gencode=arch=compute_{0},code=compute_{0}".format(CUDA_ARCHITECTURES[-1]))
        includes = [f"-I{path}" for path in [str(CSRC), *include_paths()]]
        host = ["-Xcompiler=-fPIC,-fvisibility=hidden", "-DUSE_CUDA", "--threads=0"]
        subprocess.check_call([NVCC, *FLAGS, *host, *codes, *includes, "-c", source, "-o", target])
        return str(target)

    @staticmethod
    def stub_torch_cuda(build):
        # The stream symbol lives in libtorch_cuda.so, which a CPU wheel lacks; an empty library
        # of that name makes it a NEEDED entry, so that a library built here finds it later.
        stub = build / "libtorch_cuda.so"
        compiler = os.environ.get("CC", "gcc")
        soname = "-Wl,-soname,libtorch_cuda.so"
        subprocess.check_call([compiler, "-shared", soname, "-xc", os.devnull, "-o", str(stub)])
        return str(build)


def cuda_library_dir():
    dry_run = subprocess.run(
        [NVCC, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
    )
    top = next(line for line in dry_run.stderr.splitlines() if line.startswith("#$ TOP="))
    return os.path.join(top.removeprefix("#$ TOP="), "lib64")


NVCC = find_nvcc()
CUDA_SOURCES = sorted(glob("csrc/cuda/*.cu"))
extensions = [extension("_C", sorted(glob("csrc/cpu/*.cpp")))]
if NVCC:
    cuda = ["cudart_static", "rt", "pthread", "dl"]
    keep = ["-Wl,--no-as-needed,-ltorch_cuda"]  # after the flag: only then is it kept
    extensions.append(extension("_C_cuda", [], libraries=cuda, link=keep))

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": BuildLibraries},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
