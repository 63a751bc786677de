"""Finds and loads the compiled libraries, and says which implementation an op will use."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os

import torch

logger = logging.getLogger("fused_so")


def backend() -> str:
    """The value of FUSED_SO_BACKEND: "auto" (the fastest there is) or "reference" (the oracle)."""
    chosen = os.environ.get("FUSED_SO_BACKEND", "auto") or "auto"
    if chosen not in ("auto", "reference"):
        raise ValueError(f"FUSED_SO_BACKEND must be 'auto' or 'reference', got {chosen!r}")
    return chosen


def autotune() -> bool:
    """Whether FUSED_SO_AUTOTUNE is "1": the Triton kernels search for their fastest tiles."""
    chosen = os.environ.get("FUSED_SO_AUTOTUNE", "0") or "0"
    if chosen not in ("0", "1"):
        raise ValueError(f"FUSED_SO_AUTOTUNE must be '0' or '1', got {chosen!r}")
    return chosen == "1"


# Read once: an op that is called thousands of times a second does not ask the environment.
AUTOTUNE = autotune()


def load_libraries() -> tuple[str, ...]:
    """Imports the compiled libraries that this torch can use and returns their names.

    A library that was never built is simply absent: its ops run on the references. One that is
    there and does not load is an error, because falling back would hide a broken installation.
    """
    if backend() == "reference":
        return ()
    wanted = ["_C"] + (["_C_cuda"] if torch.version.cuda else [])
    present = [name for name in wanted if importlib.util.find_spec(f"fused_so.{name}")]
    for name in present:
        try:
            importlib.import_module(f"fused_so.{name}")
        except ImportError as error:
            raise ImportError(
                f"fused_so.{name} was built but does not load with torch {torch.__version__}: "
                f"{error}. Rebuild it with `pip install -e .`, or set FUSED_SO_BACKEND=reference."
            ) from error
    return tuple(present)


def has_triton() -> bool:
    """Whether Triton can be imported; it is not imported here."""
    return importlib.util.find_spec("triton") is not None
