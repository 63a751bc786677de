"""The optimizers."""

from fused_so.optim.acp import ACP
from fused_so.optim.cgd import CGD
from fused_so.optim.natural_gradient import NaturalGradient
from fused_so.optim.tonga import TONGA

__all__ = ["ACP", "CGD", "TONGA", "NaturalGradient"]
