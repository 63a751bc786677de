"""Krylov solvers for symmetric systems that are known by their products with a vector."""

from fused_so.solvers._system import Solution
from fused_so.solvers.cg import cg
from fused_so.solvers.minres_qlp import minres_qlp

__all__ = ["Solution", "cg", "minres_qlp"]
