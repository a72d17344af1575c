"""Operations that are written out because they are faster so, each equal to PyTorch's plain way. Imports torch only."""
import torch
import torch.nn as nn
import torch.nn.functional as F

# oneDNN's matrix product, which PyTorch was built with on most processors but does not use for float32.
MULTIPLY = getattr(torch.ops.mkldnn, '_linear_pointwise', None) if torch.backends.mkldnn.is_available() else None
LEAST_PRODUCTS = 1 << 20  # below, the ten microseconds of a call outweigh what is won

# What a block computes with many operations per number that comes out.
COSTLY = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default,
          torch.ops.aten._scaled_dot_product_flash_attention.default,
          torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
          torch.ops.aten._scaled_dot_product_efficient_attention.default,
          torch.ops.aten._scaled_dot_product_cudnn_attention.default] + [MULTIPLY.default] * (MULTIPLY is not None)


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


def is_for_onednn(x, weight):
    return (MULTIPLY and x.is_cpu and x.dtype == weight.dtype == torch.float32 and x.dim() > 1
            and x.numel() * weight.size(0) >= LEAST_PRODUCTS and not torch.compiler.is_compiling())


def linear(x, weight, bias=None):
    """x Wᵀ + b for x (..., in), weight (out, in) and bias (out,): F.linear, but for float32 on a CPU."""
    if is_for_onednn(x, weight) and not torch.is_autocast_enabled('cpu'):
        return OneDNNLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):

    def forward(self, x):
        return linear(x, self.weight, self.bias)


def product(a, b):
    """a bᵀ for matrices (n, in) and (m, in), in their own precision and without a gradient."""
    return MULTIPLY(a, b, None, 'none', [], '') if is_for_onednn(a, b) else a @ b.t()


class HeadLoss(torch.autograd.Function):
    """Nats (N,) of targets (N,) over `shares` (N,) from states (N, C), for who sums them; and the likeliest tokens.

    Logits live for `rows` positions at a time, and while they do, their gradient is worked out as well, for a sum of
    which each term counts alike: so they are made once, where recomputing in the backward pass would make them twice.
    `weight`: (V, C); `never`: (V,), added to the logits; `cap`: the soft-cap, 0 for none; `dtype`: of the products.
    A share of infinity is that of a position which does not count.
    """

    @staticmethod
    def forward(ctx, hidden, weight, never, targets, shares, cap, rows, dtype):
        table, needs_hidden, needs_weight = weight.to(dtype), *ctx.needs_input_grad[:2]
        of_hidden = torch.empty_like(hidden) if needs_hidden else None
        of_weight = torch.zeros_like(weight) if needs_weight else None
        nats, guess = [], []
        for i in range(0, max(1, len(targets)), rows):
            part = slice(i, i + rows)
            states, chosen = hidden[part].to(dtype), targets[part].unsqueeze(1)
            capped = product(states, table).float()  # (n, V)
            if cap:
                capped = capped.div_(cap).tanh_().mul_(cap)
            logits = capped + never
            guess.append(logits.argmax(-1))
            total = logits.logsumexp(-1, keepdim=True)
            nats.append((total - logits.gather(1, chosen)).squeeze(1))
            gradient = logits.sub_(total).exp_()  # softmax, less 1 at the target
            gradient.scatter_add_(1, chosen, torch.full_like(total, -1.0)).div_(shares[part].unsqueeze(1))
            if cap:  # d/dx of c tanh(x / c) is 1 - tanh²
                gradient.mul_(capped.div_(cap).square_().neg_().add_(1))
            gradient = gradient.to(dtype)
            if needs_hidden:
                of_hidden[part] = product(gradient, table.t())
            if needs_weight:
                of_weight += product(gradient.t(), states.t())
        guess = torch.cat(guess)
        ctx.save_for_backward(of_hidden, of_weight, shares)
        ctx.mark_non_differentiable(guess)
        return torch.cat(nats) / shares, guess

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient, _):
        of_hidden, of_weight, shares = ctx.saved_tensors
        scale = gradient[:1].sum()  # there may be none
        torch._assert_async(((gradient == scale) | shares.isinf()).all(), 'the nats of a summed loss were not summed '
                            'with equal weights; leave summed=True out of losses(), which gives them exact gradients')
        return (None if of_hidden is None else of_hidden * scale, None if of_weight is None else of_weight * scale,
                *[None] * 6)
