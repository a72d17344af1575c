"""The operations that the models are made of, each in the way that is fastest where it runs. Torch only.

What is here beside PyTorch's own was measured; docs/LOG.md has the figures and commands.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F

# oneDNN's matmul, which PyTorch was built with on most processors but does not use for float32. It gains where there is
# AVX-512, which MKL leaves unused on AMD's processors; on Intel's MKL is 5 to 20 % faster, and with the few rows of
# decoding twice as fast. Without AVX-512 the two are equal, and PyTorch's own is taken.
HAS_ONEDNN = torch.backends.mkldnn.is_available()
ONEDNN = getattr(torch.ops.mkldnn, '_linear_pointwise', None) if HAS_ONEDNN else None
CPU = getattr(torch.cpu, 'get_capabilities', dict)()  # unknown to older PyTorch
LEAVES_AVX512 = 'AVX512' in torch.backends.cpu.get_cpu_capability() and 'Intel' not in CPU.get('cpu_name', '')
MIN_ONEDNN_SIZE = 1 << 20 if LEAVES_AVX512 else math.inf  # products; for fewer a call costs more


@cache
def has_bfloat16(device):
    """Say whether a device multiplies in bfloat16; one that does not emulates it, a hundred times slower on a CPU."""
    if device.type == 'cuda':
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == 'cpu' and bool(CPU.get('avx512_bf16') or CPU.get('amx_bf16'))


def linear(x, weight, bias=None):
    """Compute x Wᵀ + b for x (..., in), weight (out, in), bias (out,): F.linear, but for float32 on a CPU."""
    if ONEDNN and x.is_cpu and not torch.compiler.is_compiling():
        is_float32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled('cpu')
        if is_float32 and x.dim() > 1 and x.numel() * weight.size(0) >= MIN_ONEDNN_SIZE:
            return OneDNNLinear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class OneDNNLinear(torch.autograd.Function):
    """Computes x Wᵀ + b in float32 by oneDNN, with the two matmuls of the backward pass."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return ONEDNN(x, weight, bias, 'none', [], '')

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        flat, needed = grad.flatten(0, -2), ctx.needs_input_grad  # (N, out)
        x_grad = ONEDNN(grad, weight.t(), None, 'none', [], '') if needed[0] else None
        weight_grad = ONEDNN(flat.t(), x.flatten(0, -2).t(), None, 'none', [], '') if needed[1] else None
        return x_grad, weight_grad, flat.sum(0) if needed[2] else None


def attend(q, k, v, mask, is_causal, dropout):
    """Compute softmax(q kᵀ / √D) v: q (B, H, T, D), k and v (B, H or fewer, S, D), mask (B, 1, T, S) or None."""
    if q.is_cpu and q.dtype == torch.bfloat16:  # in which PyTorch's kernel takes 0.6 to 2.4 times as long
        with torch.autocast('cpu', enabled=False):
            return attend(q.float(), k.float(), v.float(), mask, is_causal, dropout).bfloat16()
    grouped = q.size(1) != k.size(1)
    if grouped and not q.is_cpu and (mask is not None or q.dtype == torch.float32):
        # PyTorch's kernels for these would keep all scores.
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal, enable_gqa=grouped)


class WeightedSum(torch.autograd.Function):
    """Computes Σ wᵢ nllᵢ as a scalar; the gradient of each chunk is taken while its logits exist.

    Logits of all positions at once would be (N, V); computing them anew in the backward pass would take the head's
    matmul once more. `chunk_nll` is differentiated by autograd: changing it changes the gradient.
    """

    @staticmethod
    def forward(ctx, hidden, head_weight, weights, targets, chunk_nll, rows):
        """hidden: (N, C); head_weight: (V, C); weights, targets: (N,); rows: positions per chunk."""
        kind = hidden.device.type
        is_half = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
        head_weight = head_weight.detach().requires_grad_(ctx.needs_input_grad[1])
        hidden_grad = torch.zeros_like(hidden)
        shape = head_weight.shape if head_weight.requires_grad else ()
        head_grad = torch.zeros(shape, device=hidden.device)  # in float32, whatever the weight is in
        nlls, preds = [], []
        for h, w, y, h_grad in zip(*(x.split(rows) for x in (hidden, weights, targets, hidden_grad))):
            with torch.enable_grad():
                h = h.detach().requires_grad_()
                nll, pred = chunk_nll(h, y, head_weight)
                inputs = [h, head_weight] if head_weight.requires_grad else [h]
                # In float16 sums over a chunk would overflow, for which the scale of the loss comes too late.
                scale = (2**12 / w.sum()).clamp(max=1.0) if is_half else None
                total = (nll * w).sum()
                grads = torch.autograd.grad(total * scale if is_half else total, inputs)
                grads = [x / scale for x in grads] if is_half else grads
            h_grad.copy_(grads[0])
            if len(grads) > 1:
                head_grad += grads[1]
            nlls.append(nll.detach())
            preds.append(pred)
        nll, pred = torch.cat(nlls), torch.cat(preds)
        ctx.save_for_backward(hidden_grad, head_grad, nll)
        ctx.mark_non_differentiable(nll, pred)
        return (nll * weights).sum(), nll, pred

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, *_):
        return *(grad * saved for saved in ctx.saved_tensors), None, None, None


def take(x, index):
    """Select positions of x (B, T, ...), numbered through the batch; index (N,), None: all."""
    x = x.flatten(0, 1)
    return x if index is None else x.index_select(0, index)


def put(x, index, like, fill):
    """Undo `take` for x (N,): values at their positions (B, T) of `like`, `fill` at the others."""
    if index is not None:
        x = torch.full((like.numel(),), fill, dtype=x.dtype, device=x.device).index_copy(0, index, x)
    return x.view_as(like)
