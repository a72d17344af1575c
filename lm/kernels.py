"""float32 linear layers by oneDNN, which on some processors is twice as fast as what PyTorch takes."""

import torch
import torch.nn.functional as F

import model

# oneDNN's matrix product, which PyTorch was built with on most processors but does not use for float32.
MULTIPLY = (
    getattr(torch.ops.mkldnn, '_linear_pointwise', None) if torch.backends.mkldnn.is_available() else None
)
LEAST_PRODUCTS = 1 << 20  # below, the ten microseconds of a call outweigh what is won


class OneDNNLinear(torch.autograd.Function):
    """x Wᵀ + b in float32 on a CPU, with the two products of the backward pass, by oneDNN.

    PyTorch calls MKL for these, which on AMD's processors stops at AVX2: on a Zen 5 it reaches 110 GFLOP/s per core
    where oneDNN reaches 245. On Intel's the two are as fast.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return MULTIPLY(x, weight, bias, 'none', [], '')

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        flat = gradient.flatten(0, -2)  # (N, out)
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = MULTIPLY(gradient, weight.t(), None, 'none', [], '')
        if ctx.needs_input_grad[1]:
            of_weight = MULTIPLY(flat.t(), x.flatten(0, -2).t(), None, 'none', [], '')
        if ctx.needs_input_grad[2]:
            of_bias = flat.sum(0)
        return of_x, of_weight, of_bias


def linear(x, weight, bias=None):
    """x Wᵀ + b for x (..., in), weight (out, in) and bias (out,): F.linear, but for float32 on a CPU."""
    if (
        MULTIPLY
        and x.is_cpu
        and x.dtype == weight.dtype == torch.float32
        and x.dim() > 1
        and x.numel() * weight.size(0) >= LEAST_PRODUCTS
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled('cpu')
    ):
        return OneDNNLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def install():
    """Lets the models of this process use `linear`."""
    model.linear = linear
    if MULTIPLY and MULTIPLY.default not in model.COSTLY:
        model.COSTLY.append(MULTIPLY.default)
