"""What a result was measured on."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

_CPU_NUMBERS = {"cpu family": "family", "model": "model"}


def environment() -> dict[str, Any]:
    """The machine, the software and the moment, as far as they can be known."""
    fused_so = sys.modules.get("fused_so")
    # Results do not change what is measured, and programs that go on where they were leave some.
    changes = _git("status", "--porcelain", "--", ":/", ":(top,exclude)bench/results")
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "fused_so": getattr(fused_so, "__version__", None),
        # A copy of the files alone, without git, is told what it is a copy of.
        "commit": os.environ.get("FUSED_SO_COMMIT") or _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    parts = (line.partition(":") for line in lines)
    # Of the first core; a virtual machine's name may be that of many generations.
    first = {name.strip(): value.strip() for name, _, value in reversed(list(parts))}
    numbers = [f"{name} {first[key]}" for key, name in _CPU_NUMBERS.items() if key in first]
    name = first.get("model name") or platform.processor() or platform.machine()
    return f"{name} ({', '.join(numbers)})" if numbers else name


def _git(*arguments: str) -> str | None:
    command = ["git", "--no-optional-locks", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
