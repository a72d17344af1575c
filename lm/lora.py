"""Tuning with few trained weights: adapters on frozen linear layers, and frozen linear layers in 8 or 4 bits.

    lora.quantize(model, bits=4)                        # optional; embedding, head and norms stay as they are
    lora.add_lora(model, rank=16, alpha=32)             # only the adapters are trained from here on
    lora.save_adapter(model, 'out/run/adapter', 'base.pt')

Adapters are saved and read in the layout of PEFT, in the names of the model's family (families.py).
"""

import math
import re
from pathlib import Path

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F

from lm import families, files, pretrained
from lm.configurator import UserError
from model import ARCHITECTURES

TARGETS = ('q', 'k', 'v', 'out', 'up', 'gate', 'down')  # the linear layers of a block
THEIR_TARGETS = {
    'q_proj': 'q',
    'k_proj': 'k',
    'v_proj': 'v',
    'o_proj': 'out',
    'out_proj': 'out',
    'up_proj': 'up',
    'gate_proj': 'gate',
    'down_proj': 'down',
    'fc1': 'up',
    'fc2': 'down',
    'c_fc': 'up',
}
PREFIX = 'base_model.model.'  # of PEFT's names


# ---------------------------------------------------------------------------- adapters


class Adapted(nn.Module):
    """A frozen linear layer W with a trained one of low rank beside it: y = W x + s B A x, s = alpha / rank
    (LoRA, Hu et al. 2021). B starts at zero, so the layer starts as W.

    With a magnitude m per output (DoRA, Liu et al. 2024) the sum only gives the direction of each row of the
    weight, and m its length: y = m / |W + s B A| (W + s B A) x, the length of a row being a constant to the gradient.
    """

    def __init__(self, base, rank, alpha, dropout=0.0, dora=False):
        super().__init__()
        self.base, self.rank, self.alpha, self.scale = base, rank, alpha, alpha / rank
        device = next(iter([*base.parameters(), *base.buffers()])).device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.magnitude = nn.Parameter(weight_of(base).norm(dim=1)) if dora else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        x = x.to(base_dtype(self.base, x))
        y, dropping = self.base(x), self.training and self.dropout.p > 0
        x = self.dropout(x)
        update = F.linear(self.scale * F.linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B)
        if self.magnitude is None:
            return y + update.to(y.dtype)
        with torch.no_grad():
            length = self.merged_direction().norm(dim=1)
        ratio, plain = self.magnitude / length, self.base(x) if dropping else y
        plain = plain if self.base.bias is None else plain - self.base.bias.to(plain.dtype)
        return y + ((ratio - 1) * plain + ratio * update).to(y.dtype)

    def merged_direction(self):
        """W + s B A (out, in), in float32."""
        return weight_of(self.base) + self.scale * (self.lora_B.float() @ self.lora_A.float())

    def merged_weight(self):
        weight = self.merged_direction()
        return weight if self.magnitude is None else weight * (self.magnitude / weight.norm(dim=1))[:, None]


def weight_of(layer):
    """The weight (out, in) of a frozen layer, in float32."""
    return layer.weight.detach().float() if isinstance(layer, nn.Linear) else layer.dequantized(torch.float32)


def base_dtype(layer, x):
    return layer.weight.dtype if isinstance(layer, nn.Linear) else x.dtype


def linear_layers(model):
    """[(name, layer)] of the linear layers of the blocks."""
    return [
        (name, layer)
        for name, layer in model.named_modules()
        if name.startswith('blocks.') and isinstance(layer, (nn.Linear, Quantized))
    ]


def adapted_layers(model):
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, Adapted)]


def replace(model, name, layer):
    parent, _, child = name.rpartition('.')
    setattr(model.get_submodule(parent), child, layer)


def freeze_all_but_adapters(model):
    for weight in model.parameters():
        weight.requires_grad_(False)
    for _, layer in adapted_layers(model):
        for weight in (layer.lora_A, layer.lora_B, layer.magnitude):
            if weight is not None:
                weight.requires_grad_(True)


def add_lora(model, rank, alpha, dropout=0.0, targets=TARGETS, dora=False):
    """Puts adapters on the blocks' linear layers of these names, ours or the family's, and freezes all the rest."""
    if rank < 1 or not 0 <= dropout < 1:
        raise UserError(
            f'The rank is {rank} and the dropout {dropout}; the rank has to be at least 1, the dropout at '
            'least 0 and below 1.'
        )
    names = {ours for target in targets for ours in our_targets(target)}
    for name, layer in linear_layers(model):
        if name.rpartition('.')[2] in names:
            replace(model, name, Adapted(layer, rank, alpha, dropout, dora))
    if not adapted_layers(model):
        raise UserError(
            f'No layer of the model is called {" or ".join(targets)}; choose targets of {", ".join(TARGETS)}.'
        )
    freeze_all_but_adapters(model)


class TrainedRows(nn.Module):
    """A frozen embedding or head (V, C) with rows that are trained."""

    def __init__(self, table, ids):
        super().__init__()
        self.table, device = table, table.weight.device
        self.register_buffer('ids', torch.tensor(ids, device=device), persistent=False)
        self.rows = nn.Parameter(table.weight.detach()[ids].clone())

    @property
    def weight(self):
        return self.table.weight.index_copy(0, self.ids, self.rows.to(self.table.weight.dtype))

    def forward(self, tokens):
        return F.embedding(tokens, self.weight)


def free_new_parts(model):
    """Trains, beside its adapters, what a model that was `ar` has only since it is another architecture: the rows
    of <|mask|> and <|ignore|> and, for `sdd`, the matrix of beliefs."""
    for name in ('embedding', 'unembedding'):
        if (table := getattr(model, name)) is not None:
            setattr(model, name, TrainedRows(table, own_tokens(model)))
    if model.believes:
        model.believed.weight.requires_grad_(True)


def own_tokens(model):
    return [i for i in (model.config.mask_id, model.config.ignore_id) if i is not None]


@torch.no_grad()
def untrained(model, ids):
    """Those of the token ids whose rows of the embedding look like its padding, which nothing ever trained (Land and
    Bartolo 2024): they are as near to its mean as it is itself. None where a model has no padding of its own."""
    config, rows = model.config, model.embedding.weight.float()
    padding = rows[config.vocab_size : config.pretrained_rows or 0]
    if not len(padding) or not ids:
        return []
    spread = (padding - padding.mean(0)).norm(dim=1).max() + 0.01 * rows[: config.vocab_size].norm(
        dim=1
    ).median()
    near = (rows[ids] - padding.mean(0)).norm(dim=1) <= 2 * spread
    return [i for i, is_near in zip(ids, near.tolist()) if is_near]


def architecture_of(model):
    return next(name for name, kind in ARCHITECTURES.items() if type(model) is kind)


def trained_tables(model):
    return [(name, table) for name, table in model.named_children() if isinstance(table, TrainedRows)]


def new_parts(model):
    """{PEFT's name: weight} of what `free_new_parts` has freed; nothing where it has not."""
    parts = {
        f'{name}.token_adapter.trainable_tokens_delta': table.rows for name, table in trained_tables(model)
    }
    return {**parts, 'believed.weight': model.believed.weight} if parts and model.believes else parts


def our_targets(target):
    several = {'all-linear': TARGETS, 'c_attn': ('q', 'k', 'v'), 'c_proj': ('out', 'down')}
    names = several.get(target, (THEIR_TARGETS.get(target, target),))
    if not set(names) <= set(TARGETS):
        raise UserError(
            f'{target!r} is no layer that can have an adapter; choose targets of {", ".join(TARGETS)}, '
            f'or {", ".join([*several, *THEIR_TARGETS])}.'
        )
    return names


@torch.no_grad()
def merge(model):
    """Writes the adapters into the weights, in float32, and removes them; 8- and 4-bit layers become plain ones."""
    for name, layer in adapted_layers(model):
        base = layer.base
        merged = nn.Linear(
            base.in_features,
            base.out_features,
            bias=base.bias is not None,
            device=layer.lora_A.device,
            dtype=base_dtype(base, layer.lora_A),
        )
        merged.weight.copy_(layer.merged_weight())
        if base.bias is not None:
            merged.bias.copy_(base.bias)
        replace(model, name, merged)
    for name, table in trained_tables(model):
        table.table.weight.copy_(table.weight)
        setattr(model, name, table.table)


# ---------------------------------------------------------------------------- PEFT's files


def places(model):
    """{our layer's name: (its name in the model's family, the third of it or None)}, without a family ours; which."""
    family, _ = families.family_of('ar' if model.causal else None, model.config)
    found = {}
    for name, layer in linear_layers(model) + adapted_layers(model):
        name = name.removesuffix('.base')
        theirs, third, _ = (
            families.their_name(name + '.weight', family) if family else (name + '.weight', None, False)
        )
        found[name] = theirs.removesuffix('.weight'), third
    return found, family


def adapter_state(model):
    """The adapters as PEFT names them: {name: tensor}."""
    return {
        **{name: tensor for _, tensors in adapters(model).values() for name, tensor in tensors.items()},
        **{PREFIX + name: weight.detach() for name, weight in new_parts(model).items()},
    }


def adapters(model):
    """{a family's layer: ((rank, alpha), {PEFT's name: tensor})}. Where the family keeps several of our layers as
    one, their adapters are one of their ranks' sum, with zeros where one does not reach another's outputs."""
    where, together = places(model)[0], {}
    for name, layer in adapted_layers(model):
        together.setdefault(where[name][0], []).append((name, layer))
    found = {}
    for theirs, layers in together.items():
        third, first = where[layers[0][0]][1], layers[0][1]
        a, b, magnitude = first.lora_A, first.lora_B, first.magnitude
        if third is not None:
            siblings = [name for name in where if where[name][0] == theirs]
            a, b, magnitude = fused([model.get_submodule(name) for name in siblings])
        tensors = {'lora_A.weight': a, 'lora_B.weight': b, 'lora_magnitude_vector': magnitude}
        n = len(layers)
        found[theirs] = (
            (n * first.rank, n * first.alpha),
            {
                f'{PREFIX}{theirs}.{name}': tensor.detach().contiguous()
                for name, tensor in tensors.items()
                if tensor is not None
            },
        )
    return found


def fused(layers):
    """A (ranks, in), B (outs, ranks) and the magnitudes (outs,) of adjacent layers, with or without an adapter."""
    adapted = [layer for layer in layers if isinstance(layer, Adapted)]
    a = torch.cat([layer.lora_A for layer in adapted])
    b = torch.block_diag(
        *[
            layer.lora_B if isinstance(layer, Adapted) else a.new_zeros(layer.out_features, 0)
            for layer in layers
        ]
    )
    if adapted[0].magnitude is None:
        return a, b, None
    return (
        a,
        b,
        torch.cat(
            [
                layer.magnitude if isinstance(layer, Adapted) else weight_of(layer).norm(dim=1)
                for layer in layers
            ]
        ),
    )


def save_adapter(model, folder, base_name):
    """Writes adapter_model.safetensors and adapter_config.json, which PEFT reads; base_name: what they belong on.

    Where the base was converted, the config also has a word of ours, `architecture`, which PEFT passes over: what
    the base has to be turned into first.
    """
    folder, found, (_, family) = Path(folder), adapters(model), places(model)
    folder.mkdir(parents=True, exist_ok=True)
    (rank, alpha), _ = next(iter(found.values()))
    first = adapted_layers(model)[0][1]
    tails = {
        theirs: '.'.join(theirs.split('.')[-2:]) if theirs.endswith('c_proj') else theirs.split('.')[-1]
        for theirs in found
    }
    config = {
        'peft_type': 'LORA',
        'task_type': 'CAUSAL_LM' if model.causal else None,
        'base_model_name_or_path': str(base_name),
        'r': rank,
        'lora_alpha': alpha,
        'lora_dropout': first.dropout.p,
        'target_modules': sorted(set(tails.values())),
        'bias': 'none',
        'use_dora': first.magnitude is not None,
        'use_rslora': False,
        'fan_in_fan_out': family == 'gpt2',
        'inference_mode': True,
        'rank_pattern': {theirs: r for theirs, ((r, _), _) in found.items() if r != rank},
        'alpha_pattern': {theirs: a for theirs, ((_, a), _) in found.items() if a != alpha},
    }
    if parts := new_parts(model):
        tables = [name.partition('.')[0] for name in parts if 'token_adapter' in name]
        config.update(
            trainable_token_indices=dict.fromkeys(tables, own_tokens(model)),
            modules_to_save=['believed'] if model.believes else None,
            architecture=architecture_of(model),
        )
    files.save_atomically(
        folder / 'adapter_model.safetensors',
        lambda file: file.write(safetensors.torch.save(adapter_state(model), metadata={'format': 'pt'})),
    )
    files.write_json(folder / 'adapter_config.json', config)


def load_adapter(model, folder):
    """Puts the adapters of a folder in PEFT's layout on the model, ready to be used, trained on or merged."""
    folder, config = Path(folder), read_config(folder)
    if adapted_layers(model):
        raise UserError(
            f'The model has an adapter already, so {folder} cannot be put on it; merge the first one.'
        )
    converted = 'architecture' in config
    for key, wanted in (
        ('peft_type', 'LORA'),
        ('bias', 'none'),
        ('lora_bias', False),
        ('architecture', architecture_of(model)),
        ('modules_to_save', ['believed'] if converted and model.believes else None),
    ):
        if config.get(key, wanted) != wanted:
            raise UserError(f'The adapter {folder} has {key}={config[key]!r}; only {wanted!r} is known here.')
    tensors = {
        re.sub(r'^base_model\.model\.|\.weight$', '', name): tensor
        for name, tensor in read_tensors(folder).items()
    }
    layers, used = dict(linear_layers(model)), set()
    for name, (theirs, third) in places(model)[0].items():
        if f'{theirs}.lora_A' in tensors:
            used.update(
                {f'{theirs}.{part}' for part in ('lora_A', 'lora_B', 'lora_magnitude_vector')} & set(tensors)
            )
            replace(model, name, read_layer(layers[name], tensors, theirs, third, config, folder))
    freeze_all_but_adapters(model)
    if converted:
        free_new_parts(model)
        used.update(read_new_parts(model, tensors))
    if not used or used != set(tensors):
        left_over = ', '.join(sorted(set(tensors) - used)[:5]) or 'it'
        raise UserError(
            f'The adapter {folder} belongs on another base, {config.get("base_model_name_or_path")!r}: '
            f'this model has no place for {left_over}; give the base that it was made for.'
        )


def read_config(folder):
    """The adapter_config.json of an adapter's folder."""
    if not (Path(folder) / 'adapter_config.json').is_file():
        raise UserError(
            f'There is no adapter in {folder}: adapter_config.json is missing; give the folder that '
            'save_adapter or PEFT wrote.'
        )
    return pretrained.read_json(Path(folder) / 'adapter_config.json')


@torch.no_grad()
def read_new_parts(model, tensors):
    """Fills what is trained beside the adapters; returns the names of the tensors that it took."""
    found = {name.removesuffix('.weight'): weight for name, weight in new_parts(model).items()}
    names = {
        name for name, weight in found.items() if name in tensors and tensors[name].shape == weight.shape
    }
    for name in names:
        found[name].copy_(tensors[name])
    return names


def read_tensors(folder):
    path = folder / 'adapter_model.safetensors'
    try:
        if path.is_file():
            return safetensors.torch.load_file(path)
        return pretrained.load_bin(folder / 'adapter_model.bin')
    except Exception as error:  # damaged bytes make both libraries fail in a dozen ways
        raise UserError(
            f'The weights of the adapter {folder} cannot be read ({error}); save it again.'
        ) from error


def read_layer(layer, tensors, theirs, third, config, folder):
    """An adapted layer with the tensors that an adapter has for the layer `theirs`, or for a third of it."""
    a, b, magnitude = (
        tensors.get(f'{theirs}.{part}') for part in ('lora_A', 'lora_B', 'lora_magnitude_vector')
    )
    rank = len(a)
    alpha = next(
        (
            alpha
            for pattern, alpha in (config.get('alpha_pattern') or {}).items()
            if re.match(rf'(.*\.)?({pattern})$', theirs)
        ),
        config['lora_alpha'],
    )
    alpha = alpha * math.sqrt(rank) if config.get('use_rslora') else alpha
    adapted = Adapted(layer, rank, alpha, config.get('lora_dropout', 0.0), magnitude is not None)
    if third is not None:
        b, magnitude = (x if x is None else x.chunk(3)[third] for x in (b, magnitude))
    with torch.no_grad():
        for name, tensor in (('lora_A', a), ('lora_B', b), ('magnitude', magnitude)):
            weight = getattr(adapted, name)
            if weight is not None and tensor.shape != weight.shape:
                raise UserError(
                    f'The adapter {folder} belongs on another base: {theirs} has {name} of the shape '
                    f'{tuple(tensor.shape)} where this model needs {tuple(weight.shape)}; give the base '
                    'that it was made for.'
                )
            if weight is not None:
                weight.copy_(tensor)
    return adapted


# ---------------------------------------------------------------------------- frozen layers in few bits


def normal_float():
    """The 16 values of NF4: quantiles of the normal distribution, one of them 0 (Dettmers et al. 2023, QLoRA)."""
    end = 0.9677083  # midway between the quantiles 1 - 1/30 and 1 - 1/32, as in bitsandbytes
    above, below = (
        torch.special.ndtri(torch.linspace(end, 0.5, n, dtype=torch.float64)[:-1]) for n in (9, 8)
    )
    values = torch.cat([above, torch.zeros(1, dtype=torch.float64), -below]).sort().values
    return (values / values.max()).float()


NF4 = normal_float()
BLOCK, GROUP = 64, 256  # weights that share a scale; scales that share theirs


class Quantized(nn.Module):
    """A frozen linear layer whose weight is kept in 8 or 4 bits and made whole for each product.

    8: a byte per weight and a scale per row. 4: NF4 in blocks of 64 with a scale each, which is itself a byte in
    groups of 256: 4.13 bits per weight in all. Scales are kept as int32, so that model.to(bfloat16) leaves them.
    """

    def __init__(self, linear, bits):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.bits, self.bias = bits, linear.bias
        weight = linear.weight.detach().float()
        if bits == 8:
            codes, scale = to_int8(weight)
        else:
            blocks = padded(weight.flatten(), BLOCK).view(-1, BLOCK)
            largest = blocks.abs().amax(1, keepdim=True)
            middles = ((NF4[1:] + NF4[:-1]) / 2).to(weight.device)
            codes = torch.bucketize(blocks / largest.clamp(min=1e-30), middles).to(torch.uint8)
            codes = codes[:, ::2] << 4 | codes[:, 1::2]  # two in a byte
            mean = largest.mean().view(1, 1)
            scales, scale = to_int8(padded((largest - mean).flatten(), GROUP).view(-1, GROUP))
            self.register_buffer('scales', scales)
            scale = torch.cat([scale, mean])
        self.register_buffer('codes', codes)
        self.register_buffer('scale', scale.view(torch.int32))

    def dequantized(self, dtype):
        """The weight (out, in)."""
        scale = self.scale.view(torch.float32)
        if self.bits == 8:
            return (self.codes * scale).to(dtype)
        largest = (self.scales * scale[:-1] + scale[-1:]).flatten()[: len(self.codes)]
        codes = torch.stack([self.codes >> 4, self.codes & 15], -1).flatten(1)  # (N, 64)
        weight = NF4.to(scale.device)[codes.int()] * largest[:, None]
        return weight.flatten()[: self.out_features * self.in_features].view(self.out_features, -1).to(dtype)

    def forward(self, x):
        y = FrozenProduct.apply(x, self)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class FrozenProduct(torch.autograd.Function):
    """x Wᵀ of a quantized layer; the whole W is not kept for the backward pass but made again."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer, ctx.dtype = layer, x.dtype
        return F.linear(x, layer.dequantized(x.dtype))

    @staticmethod
    def backward(ctx, gradient):
        return (gradient @ ctx.layer.dequantized(gradient.dtype)).to(ctx.dtype), None


def to_int8(rows):
    """Codes (N, D) and a scale per row (N, 1), both for rows (N, D)."""
    scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    return (rows / scale).round().to(torch.int8), scale


def padded(x, size):
    return F.pad(x, (0, -len(x) % size))


@torch.no_grad()
def quantize(model, bits):
    """Replaces the blocks' linear layers by frozen ones of 8 or 4 bits; the rest stays as it is."""
    if bits not in (8, 4):
        raise UserError(f'bits is {bits}; choose 8 or 4.')
    for name, layer in linear_layers(model):
        if isinstance(layer, nn.Linear):
            replace(model, name, Quantized(layer, bits).requires_grad_(False))
