"""The optimizers."""

from fused_so.optim.acp import ACP
from fused_so.optim.cgd import CGD

__all__ = ["ACP", "CGD"]
