"""Linear layers of few bits per weight: frozen, int8 and NF4, to train adapters on; 16 bits and int8 to write with."""

import warnings
from functools import cache, partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from lm.configurator import require
from lm.kernels import ONEDNN, has_bfloat16

NF4 = torch.tensor([  # quantiles of the normal distribution, one of them 0 (Dettmers et al. 2023, QLoRA)
    -1.0, -0.6961929, -0.52507305, -0.3949175, -0.28444135, -0.18477343, -0.09104999, 0.0,
    0.07958033, 0.16093017, 0.24611229, 0.33791518, 0.4407098, 0.56261694, 0.7229567, 1.0,
])  # fmt: skip
BLOCK = 64  # weights that share a scale


@torch.no_grad()
def quantize(model, bits):
    """Replace the blocks' linear layers by frozen ones of 8 or 4 bits; embedding, head and norms stay."""
    for name, layer in linear_layers(model):
        frozen = QuantizedLinear(layer, bits).requires_grad_(False)
        model.set_submodule(name, frozen.train(layer.training))


def linear_layers(model):
    """Return [(name, layer)] of the linear layers of the blocks, quantized or not."""
    kinds = nn.Linear, QuantizedLinear
    return [(n, m) for n, m in model.named_modules() if n.startswith('blocks.') and isinstance(m, kinds)]


@cache
def levels(device):
    """Return the 16 numbers of NF4 on a device: a GPU would wait for a copy at each product."""
    return NF4.to(device)


class QuantizedLinear(nn.Module):
    """A frozen linear layer whose weight is stored in 8 or 4 bits and dequantized for each matmul.

    8 bits: int8 with a scale per row. 4 bits: NF4 with a scale for each 64 weights, 4.25 bits in all. Scales are
    bfloat16, stored as int16, so that model.to(float16) does not round them.
    """

    def __init__(self, linear, bits):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.bits, self.bias = bits, linear.bias
        rows = linear.weight.detach().float()
        if bits == 4:
            rows = F.pad(rows.flatten(), (0, -rows.numel() % BLOCK)).view(-1, BLOCK)
        scale = rows.abs().amax(1, keepdim=True) / (127 if bits == 8 else 1)
        scale = scale.clamp(min=1e-30).bfloat16()
        if bits == 8:
            codes = (rows / scale).round().clamp(-127, 127).to(torch.int8)
        else:
            midpoints = ((NF4[1:] + NF4[:-1]) / 2).to(rows.device)
            codes = torch.bucketize(rows / scale, midpoints).to(torch.uint8)  # of the nearest
            codes = codes[:, ::2] << 4 | codes[:, 1::2]  # two in a byte
        self.register_buffer('codes', codes)
        self.register_buffer('scale', scale.view(torch.int16))

    def _load_from_state_dict(self, state, prefix, *args):
        if (name := f'{prefix}codes') in state:  # a sharded model sees them as floats
            state[name] = state[name].view(self.codes.dtype)
        super()._load_from_state_dict(state, prefix, *args)

    @property
    def weight(self):
        """The weight (out, in) in float32."""
        scale = self.scale.view(torch.bfloat16).float()
        if self.bits == 8:
            return self.codes.view(torch.int8) * scale
        codes = self.codes.view(torch.uint8)
        codes = torch.stack([codes >> 4, codes & 15], -1).flatten(1)  # (N, 64)
        weight = (levels(scale.device)[codes.int()] * scale).flatten()
        return weight[: self.out_features * self.in_features].view(self.out_features, -1)

    def forward(self, x):
        y = FrozenMatmul.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)


@torch.no_grad()
def pack(model, weights, device):
    """Keep blocks and head of a model that only writes in 16 bits or int8, before it goes to its device."""
    kinds = ('float32', 'bfloat16', 'float16', 'int8')
    require(weights in kinds, f'weights is {weights!r}; choose {" or ".join(kinds)}.')
    if weights == 'float32':
        return
    model.num_parameters = partial(int, model.num_parameters())  # what packs them makes no parameters
    if device.type != 'cpu':
        return quantize(model, bits=8) if weights == 'int8' else model.to(getattr(torch, weights))
    has_fbgemm = 'fbgemm' in torch.backends.quantized.supported_engines
    can = ONEDNN and has_bfloat16(device) if weights == 'bfloat16' else has_fbgemm
    require(can, f'This CPU does not compute with weights in {weights}; take another of {", ".join(kinds)}.')
    for name, layer in linear_layers(model):
        model.set_submodule(name, PackedLinear(layer.weight, layer.bias, weights))
    head = PackedLinear(model.head_weight(), None, weights)
    model.project = lambda hidden, weight: head(hidden)


class PackedLinear(nn.Module):
    """A linear layer of a CPU, whose weight oneDNN has as bfloat16, FBGEMM as float16 or int8; from and to float32.

    bfloat16: of inputs and outputs too. int8: with a scale per row of the weight, and per token, of 7 bits, as input.
    """

    def __init__(self, weight, bias, kind):
        super().__init__()
        weight = weight.detach()
        self.kind, self.bias, ops = kind, None if bias is None else bias.detach(), torch.ops.quantized
        if kind == 'int8':
            scale = (weight.abs().amax(1).clamp(min=1e-30) / 127).double()
            zeros = torch.zeros(len(weight), dtype=torch.long)
            with warnings.catch_warnings():  # it goes with a later PyTorch than requirements.txt allows
                warnings.simplefilter('ignore')
                codes = torch.quantize_per_channel(weight, scale, zeros, 0, torch.qint8)
            self.packed = ops.linear_prepack(codes, None)
        elif kind == 'float16':
            self.packed = ops.linear_prepack_fp16(weight, None)
        else:
            self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16(), None)

    def forward(self, x):
        x = x.float()  # also under autocast
        if self.kind == 'bfloat16':
            y = ONEDNN(x.bfloat16(), self.packed, None, 'none', [], '').float()
        elif self.kind == 'float16':
            y = torch.ops.quantized.linear_dynamic_fp16(x, self.packed)
        elif x.numel() == x.size(-1):
            y = torch.ops.quantized.linear_dynamic(x, self.packed, True)
        else:  # FBGEMM has one scale for all tokens: of each the largest channel becomes 1
            scale = x.abs().amax(-1, keepdim=True).clamp(min=1e-30)
            y = torch.ops.quantized.linear_dynamic(x / scale, self.packed, True) * scale
        return y if self.bias is None else y + self.bias


class FrozenMatmul(torch.autograd.Function):
    """x Wᵀ of a quantized layer; W is dequantized again in the backward pass rather than saved for it."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer, ctx.dtype = layer, x.dtype
        return F.linear(x, layer.weight.to(x.dtype))

    @staticmethod
    def backward(ctx, gradient):
        return (gradient @ ctx.layer.weight.to(gradient.dtype)).to(ctx.dtype), None
