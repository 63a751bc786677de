"""The optimizers."""

from fused_so.optim.acp import ACP
from fused_so.optim.cgd import CGD
from fused_so.optim.ekfac import EKFAC
from fused_so.optim.kfac import KFAC
from fused_so.optim.natural_gradient import NaturalGradient
from fused_so.optim.nnn import NNN
from fused_so.optim.preconditioner import Preconditioner
from fused_so.optim.tonga import TONGA
from fused_so.optim.ubp import UBP

__all__ = [
    "ACP",
    "CGD",
    "EKFAC",
    "KFAC",
    "NNN",
    "TONGA",
    "UBP",
    "NaturalGradient",
    "Preconditioner",
]
