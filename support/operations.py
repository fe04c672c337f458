"""RMSNorm and the MLP's gated product, with backward passes that keep less than autograd's.

What takes no matrix product is computed again in backward. tests/test_model.py compares both with
the plain formulas.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from asft import at_least_fp32


def rms_norm(x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """weight * (x / sqrt(mean(x^2) + eps)). The bracket is computed in at least fp32 and cast back
    to x's dtype before it is scaled."""
    return _RMSNorm.apply(x_TD, weight_D, eps)


def gated_product(gate_TF: Tensor, up_TF: Tensor, weight_DF: Tensor) -> Tensor:
    """(silu(gate) * up) @ weight.T, (T, D)."""
    return _GatedProduct.apply(gate_TF, up_TF, weight_DF)


class _RMSNorm(torch.autograd.Function):
    """RMSNorm that keeps its input and one number per token for backward. Autograd would also keep
    the normed input, and for half types an fp32 copy of the input.

    With n = x / rms(x), whose gradient is g = grad * weight, that of x is
    (g - n mean(g n)) / rms(x).
    """

    @staticmethod
    def forward(ctx, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x = at_least_fp32(x_TD)
        scale_T1 = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x_TD, weight_D, scale_T1)
        return weight_D * (x * scale_T1).to(x_TD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD: Tensor):
        x_TD, weight_D, scale_T1 = ctx.saved_tensors
        normed_TD = at_least_fp32(x_TD) * scale_T1
        # The weight in fp32: the product of two half types would be rounded.
        grad_normed_TD = grad_TD * at_least_fp32(weight_D)
        # Does not share grad_TD * normed_TD with grad_weight_D: torch.compile would store a product
        # that is summed over two axes, in fp32.
        mean_T1 = (grad_normed_TD * normed_TD).mean(-1, keepdim=True)
        grad_x_TD = (grad_normed_TD - normed_TD * mean_T1) * scale_T1
        grad_weight_D = (grad_TD * normed_TD).sum(0)
        return grad_x_TD.to(x_TD.dtype), grad_weight_D.to(weight_D.dtype), None


class _GatedProduct(torch.autograd.Function):
    """(silu(gate) * up) @ weight.T. Keeps gate and up; backward computes silu(gate) and the product
    with up again. Autograd would keep all four. What is made here is changed in place: no copies.
    """

    @staticmethod
    def forward(ctx, gate_TF: Tensor, up_TF: Tensor, weight_DF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_TF, up_TF, weight_DF)
        return F.linear(F.silu(gate_TF).mul_(up_TF), weight_DF)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_TD: Tensor):
        gate_TF, up_TF, weight_DF = ctx.saved_tensors
        silu_TF = F.silu(gate_TF)
        grad_weight_DF = grad_TD.T @ (silu_TF * up_TF)
        grad_TF = grad_TD @ weight_DF
        grad_up_TF = silu_TF.mul_(grad_TF)
        grad_gate_TF = torch.ops.aten.silu_backward(grad_TF.mul_(up_TF), gate_TF)
        return grad_gate_TF, grad_up_TF, grad_weight_DF
