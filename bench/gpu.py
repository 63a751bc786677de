"""`python -m bench.gpu --out DIR`: everything that takes a GPU, in one command.

Builds in place with the torch that is there, runs the GPU tests, looks for bad memory accesses and
races, and times every op and every optimizer's step. Each part is a process of its own with a
limit in seconds: one that fails, hangs or takes the GPU down is reported, and the rest goes on.
DIR/gpu.json is written as results come in, DIR/gpu.txt at the end. With --autotune it also searches
for the fastest tiles of the Triton kernels, and reports what that gains, in the same time.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import gpu_report
from bench.environment import environment

ROOT = Path(__file__).parents[1]
CUDA = "/usr/local/cuda/bin"
SECONDS = 450.0  # what is left of eight minutes is for starting, stopping and writing
# Their shares of the time: some have more sizes, and more kernels to compile.
OPS = {
    "covariance_": 35,
    "damped_inverse": 20,
    "centered_grad": 20,
    "precondition": 20,
    "grad_gram": 20,
    "jacobian_backprop": 20,
    "apply_update_": 10,
}
TRITON_OPS = tuple(op for op in OPS if op not in ("damped_inverse", "apply_update_"))


@dataclass
class Part:
    """A command, its share of the time, and what it left.

    The command appends JSON lines to the file named by its variable FUSED_SO_ROWS."""

    name: str
    command: list[str]
    share: float
    missing: str | None = None  # why it cannot run here
    environment: dict[str, str] = field(default_factory=dict)
    status: str = "not run"
    seconds: float = 0.0
    limit: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)
    output: str = ""

    @property
    def passed(self) -> bool:
        return self.status in ("passed", "missing")


def parts(autotune: bool = False) -> list[Part]:
    """In order of importance. Time that one leaves over is shared among those after it."""
    python = sys.executable
    module = [python, "-m"]
    pytest = [*module, "pytest", "-p", "bench.gpu_pytest", "-p", "no:cacheprovider"]
    # Many small compilations: one process would not get through them in its time.
    workers = ["-n", "6"] if importlib.util.find_spec("xdist") else []
    ignored = ["--ignore=tests/triton_kernels/test_compile.py"]
    check = [*module, "bench.gpu_memory_check"]
    sanitizer = shutil.which("compute-sanitizer") or f"{CUDA}/compute-sanitizer"
    absent = None if Path(sanitizer).exists() else "compute-sanitizer is not installed"
    checked = [sanitizer, "--error-exitcode=9", "--target-processes=all"]
    return [
        Part(
            "build",
            [python, "setup.py", "build_ext", "--inplace"],
            share=60,
            environment={
                "FUSED_SO_CUDA": "1",
                "MAX_JOBS": "8",
                # Where nvcc is, if it is not on the PATH.
                "PATH": f"{os.environ.get('PATH', '')}:{CUDA}",
            },
        ),
        Part("tests on the GPU", [*pytest, *workers, "tests/gpu"], share=80),
        *(Part(f"time {op}", [*module, "bench.gpu_ops", op], share) for op, share in OPS.items()),
        Part("time steps", [*module, "bench.gpu_steps"], share=60),
        Part("memcheck", [*checked, "--tool=memcheck", *check], share=30, missing=absent),
        Part("racecheck", [*checked, "--tool=racecheck", *check], share=30, missing=absent),
        Part("Triton tests", [*pytest, *workers, "tests/triton_kernels", *ignored], share=80),
        *(
            Part(f"tune {op}", [*module, "bench.gpu_ops", op, "--tuned"], share=25)
            for op in TRITON_OPS
            if autotune
        ),
    ]


def what_is_missing() -> str | None:
    """Why nothing here can be run, in one line."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA GPU"
    return None


def run_part(part: Part, limit: float, on_rows: Callable[[], None], poll: float = 1.0) -> None:
    """Runs the command for at most `limit` seconds; calls on_rows whenever it has left more."""
    part.limit = limit
    if part.missing:
        part.status = "missing"
        return
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        rows, output = Path(scratch) / "rows.jsonl", Path(scratch) / "output"
        rows.touch()
        variables = {
            **os.environ,
            "FUSED_SO_ROWS": str(rows),
            "FUSED_SO_SECONDS": str(limit),
            "PYTHONUNBUFFERED": "1",
            **part.environment,
        }
        with output.open("wb") as stream:
            try:
                process = subprocess.Popen(
                    part.command,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    env=variables,
                    cwd=ROOT,
                    start_new_session=True,
                )
            except OSError as error:
                part.status, part.output = "failed", str(error)
                return
            try:
                while True:
                    left = limit - (time.monotonic() - start)
                    if _wait(process, min(poll, max(left, 0))):
                        part.status = "passed" if process.returncode == 0 else "failed"
                        break
                    if _read_rows(part, rows):
                        on_rows()
                    if left <= 0:
                        part.status = "over time"
                        break
            finally:
                # What it has started too, and also when this process is interrupted.
                _kill_group(process)
        _read_rows(part, rows)
        part.seconds = time.monotonic() - start
        part.output = output.read_text(errors="replace")[-6000:]


def _wait(process: subprocess.Popen, seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _kill_group(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read_rows(part: Part, file: Path) -> bool:
    """Whether there are more of them; a line that is still being written waits."""
    text = file.read_text()
    lines = text[: text.rfind("\n") + 1].splitlines()
    more = len(lines) > len(part.rows)
    part.rows = [json.loads(line) for line in lines]
    return more


def run_all(
    todo: Sequence[Part],
    machine: dict[str, Any],
    out: Path,
    seconds: float = SECONDS,
    say: Callable[[str], None] = print,
) -> int:
    """Runs the parts and writes DIR/gpu.json and DIR/gpu.txt. 0 if all passed, else 1."""
    end = time.monotonic() + seconds
    gpu_report.write_json(out, machine, todo)
    for i, part in enumerate(todo):
        limit = share_of(end - time.monotonic(), todo[i:])
        run_part(part, limit, lambda: gpu_report.write_json(out, machine, todo))
        gpu_report.write_json(out, machine, todo)
        say(f"{part.name}: {part.status}, {part.seconds:.0f} of {part.limit:.0f} s")
        if part.missing:
            say(f"  {part.missing}")
        if not part.passed:
            say("\n".join(f"  {line}" for line in part.output.splitlines()[-15:]))
    text = gpu_report.table(machine, todo)
    gpu_report.write(out / "gpu.txt", text + "\n")
    say(text)
    return 0 if all(part.passed for part in todo) else 1


def share_of(seconds: float, todo: Sequence[Part]) -> float:
    """The first part's share of the seconds that are left for all of `todo`."""
    able = [part for part in todo if not part.missing]
    total = sum(part.share for part in able)
    return max(0.0, seconds) * todo[0].share / total if total and not todo[0].missing else 0.0


def gpu_environment() -> dict[str, Any]:
    """The machine with its GPU and driver, and what was found there."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
        driver = found.stdout.split("\n")[0].strip()
    except (OSError, subprocess.SubprocessError):
        driver = None
    properties = torch.cuda.get_device_properties(0)
    triton = importlib.util.find_spec("triton") and importlib.import_module("triton").__version__
    return {
        **environment(),
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "driver": driver,
        "cuda": torch.version.cuda,
        "triton": triton,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="where the results are written")
    parser.add_argument("--autotune", action="store_true", help="also search for the fastest tiles")
    chosen = parser.parse_args(arguments)
    out = chosen.out
    missing = what_is_missing()
    if missing:
        print(f"bench.gpu needs a CUDA GPU: {missing}")
        return 2
    out.mkdir(parents=True, exist_ok=True)
    return run_all(parts(chosen.autotune), gpu_environment(), out)


if __name__ == "__main__":
    sys.exit(main())
