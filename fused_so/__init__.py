"""Fused second-order optimizers for PyTorch, and the kernels under them."""

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version

from fused_so import _extension, likelihoods, ops, reference, solvers
from fused_so.likelihoods import Bernoulli, Categorical, Gaussian
from fused_so.optim import (
    ACP,
    CGD,
    EKFAC,
    KFAC,
    NNN,
    TONGA,
    UBP,
    NaturalGradient,
    Preconditioner,
)

try:
    __version__ = _version("fused_so")
except _PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

LOADED_LIBRARIES = _extension.load_libraries()
"""The compiled libraries in use: "_C" (CPU), "_C_cuda"; empty when the references run."""

__all__ = [
    "ACP",
    "CGD",
    "EKFAC",
    "KFAC",
    "LOADED_LIBRARIES",
    "NNN",
    "TONGA",
    "UBP",
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "NaturalGradient",
    "Preconditioner",
    "__version__",
    "likelihoods",
    "ops",
    "reference",
    "solvers",
]
