"""The optimizers."""

from fused_so.optim.acp import ACP
from fused_so.optim.cgd import CGD
from fused_so.optim.ubp import UBP

__all__ = ["ACP", "CGD", "UBP"]
