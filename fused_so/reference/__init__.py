"""The oracles: every op in plain PyTorch, for any floating dtype, under the same name."""

from fused_so.reference.apply_update import apply_update_
from fused_so.reference.centered_grad import centered_grad, row_scales
from fused_so.reference.covariance import covariance, covariance_
from fused_so.reference.damped_inverse import damped_inverse
from fused_so.reference.grad_gram import grad_gram
from fused_so.reference.jacobian_backprop import jacobian_backprop
from fused_so.reference.precondition import inner_products, precondition

__all__ = [
    "apply_update_",
    "centered_grad",
    "covariance",
    "covariance_",
    "damped_inverse",
    "grad_gram",
    "inner_products",
    "jacobian_backprop",
    "precondition",
    "row_scales",
]
