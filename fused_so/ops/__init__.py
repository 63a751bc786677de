"""The ops: validated, dispatched to the kernel of the device at hand."""

from fused_so.ops.apply_update import apply_update_
from fused_so.ops.centered_grad import centered_grad, row_scales
from fused_so.ops.covariance import covariance, covariance_
from fused_so.ops.damped_inverse import damped_inverse
from fused_so.ops.grad_gram import grad_gram
from fused_so.ops.jacobian_backprop import jacobian_backprop
from fused_so.ops.precondition import inner_products, precondition

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
