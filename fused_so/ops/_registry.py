"""The one place where an op's schema, fake and implementations meet the dispatcher."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable

import torch

from fused_so import _extension

_LIBRARY = torch.library.Library("fused_so", "DEF")


def define(
    schema: str, *, stem: str, reference: Callable, fake: Callable, triton: bool = True
) -> Callable:
    """Registers the op of `schema`, implemented by `reference` wherever no kernel is.

    The compiled libraries register their own kernels for CPU and CUDA; ops with a file in
    `triton_kernels` get that one for CUDA, unless `triton` says that it has none for this schema.
    Returns the op as a callable.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema)
    torch.library.register_fake(f"fused_so::{name}", fake, lib=_LIBRARY)
    _LIBRARY.impl(name, _fallback(name, reference), "CompositeExplicitAutograd")

    triton_module = f"fused_so.triton_kernels.{stem}"
    if (
        triton
        and _extension.backend() == "auto"
        and _extension.has_triton()
        and importlib.util.find_spec(triton_module)
    ):
        _LIBRARY.impl(name, _launch_triton(triton_module, name), "CUDA")
    return getattr(torch.ops.fused_so, name).default


def _fallback(name: str, reference: Callable) -> Callable:
    @functools.wraps(reference)
    def run(*args, **kwargs):
        if _extension.backend() == "auto":
            _log_fallback_once(name, _device_type(args))
        return reference(*args, **kwargs)

    return run


@functools.cache
def _log_fallback_once(name: str, device: str) -> None:
    _extension.logger.warning(
        "fused_so: no kernel of %s for device %r is installed; the PyTorch reference runs instead",
        name,
        device,
    )


def _device_type(args: tuple) -> str:
    first = args[0][0] if isinstance(args[0], list | tuple) else args[0]
    return first.device.type


def _launch_triton(module: str, name: str) -> Callable:
    def run(*args, **kwargs):
        return getattr(importlib.import_module(module), name)(*args, **kwargs)

    return run
