"""Adapters of low rank on frozen linear layers (LoRA, DoRA).

    add_lora(model, rank=16, alpha=32)    # only the adapters are trained from here on
    save_adapter(model, 'out/run/adapter', 'base.pt')

They are read and written in PEFT's format.
"""

import math
from pathlib import Path

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F

from lm import families, files, pretrained
from lm.configurator import require
from lm.quantize import linear_layers
from model import architecture_name

# ---------------------------------------------------------------------------- layers


class LoRALinear(nn.Module):
    """A frozen linear layer W and a trained one of low rank: y = W x + s B A x, s = alpha / rank
    (LoRA, Hu et al. 2021). B starts at zero, so the layer starts as W.

    With a magnitude m per output (DoRA, Liu et al. 2024) the sum gives only the direction of each row of the weight,
    and m its length: y = m / |W + s B A| (W + s B A) x, where the length |...| is a constant to the gradient.
    """

    def __init__(self, base, rank, alpha, dropout=0.0, dora=False):
        super().__init__()
        self.base, self.rank, self.alpha, self.scale = base, rank, alpha, alpha / rank
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.magnitude = nn.Parameter(base.weight.detach().float().norm(dim=1)) if dora else None
        self.dropout = nn.Dropout(dropout)

    def forward(self, x):
        if isinstance(self.base, nn.Linear):  # a quantized one computes in any type
            x = x.to(self.base.weight.dtype)
        y, dropping = self.base(x), self.training and self.dropout.p > 0
        x = self.dropout(x)
        update = F.linear(self.scale * F.linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B)
        if self.magnitude is None:
            return y + update.to(y.dtype)

        with torch.no_grad():
            length = self.direction().norm(dim=1)
        ratio, plain = self.magnitude / length, self.base(x) if dropping else y
        plain = plain if self.base.bias is None else plain - self.base.bias.to(plain.dtype)
        return y + ((ratio - 1) * plain + ratio * update).to(y.dtype)

    def direction(self):
        """Return W + s B A (out, in), in float32."""
        low_rank = self.lora_B.float() @ self.lora_A.float()
        return self.base.weight.detach().float() + self.scale * low_rank

    def merged(self):
        """Return the layer as a plain one; the sum is made in float32."""
        weight, bias = self.direction(), self.base.bias
        if self.magnitude is not None:
            weight = weight * (self.magnitude / weight.norm(dim=1))[:, None]
        dtype, device = self.base.weight.dtype, weight.device
        layer = nn.Linear(*weight.shape[::-1], bias=bias is not None, device=device, dtype=dtype)
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)
        return layer


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


# ---------------------------------------------------------------------------- on a model


def add_lora(model, rank, alpha, dropout=0.0, targets=(), dora=False):
    """Put adapters on the blocks' linear layers and freeze all the rest.

    targets: names of layers, ours or a family's (q or q_proj); none or 'all-linear': all of them.
    """
    require(rank >= 1, f'The rank is {rank}; it has to be at least 1.')
    require(0 <= dropout < 1, f'The dropout is {dropout}; it has to be at least 0 and below 1.')
    targets, known = set(targets) - {'all-linear'}, set()
    for name, layer in linear_layers(model):
        module = name.split('.', 2)[2]  # of blocks.3.attention.q: attention.q
        names = {n.split('.')[-1] for n in (module, *families.NAMES.get(module, ())) if n}
        known |= names
        if not targets or names & targets:
            model.set_submodule(name, LoRALinear(layer, rank, alpha, dropout, dora))
    unknown, known = ', '.join(sorted(targets - known)), ', '.join(sorted(known))
    require(not unknown, f'No layer of the model is called {unknown}; choose of {known}, all-linear.')
    freeze_the_rest(model)


def adapted_layers(model):
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoRALinear)]


def trained_tables(model):
    return {name: table for name, table in model.named_children() if isinstance(table, TrainedRows)}


def freeze_the_rest(model):
    """Freeze all but the adapters and the new embeddings."""
    model.requires_grad_(False)
    for _, weight, _ in trained_weights(model, family=None):
        weight.requires_grad_(True)


def train_new_embeddings(model):
    """Train, beside the adapters, what a converted model has not learned as what it was before.

    These are the rows of <|mask|> and <|ignore|>, and the weights that only its architecture has.
    """
    ids = [i for i in (model.config.mask_id, model.config.ignore_id) if i is not None]
    for name in ('embedding', 'unembedding'):
        if (table := getattr(model, name)) is not None:
            setattr(model, name, TrainedRows(table, ids))
    freeze_the_rest(model)


@torch.no_grad()
def untrained(model, ids):
    """Return those of the token ids whose embeddings look like padding, which nothing ever trained.

    They are as near to the mean of the model's padding rows as these are themselves (Land and Bartolo 2024). A model
    without padding rows of its own has none.
    """
    config, rows = model.config, model.embedding.weight.float()
    padding = rows[config.vocab_size : config.pretrained_rows or 0]
    if not len(padding):
        return []
    center, typical = padding.mean(0), rows[: config.vocab_size].norm(dim=1).median()
    spread = (padding - center).norm(dim=1).max() + 0.01 * typical
    return [i for i in ids if (rows[i] - center).norm() <= 2 * spread]


@torch.no_grad()
def merge(model):
    """Write the adapters into the weights and remove them; quantized layers become plain ones."""
    for name, layer in adapted_layers(model):
        model.set_submodule(name, layer.merged())
    for name, table in trained_tables(model).items():
        table.table.weight.copy_(table.weight)
        setattr(model, name, table.table)


# ---------------------------------------------------------------------------- PEFT's files

PREFIX = 'base_model.model.'  # of names in them
SUPPORTED = dict(peft_type='LORA', bias='none', lora_bias=False, rank_pattern={}, alpha_pattern={})


def trained_weights(model, family):
    """Return [(name in PEFT's files, weight, qkv_index)] of adapters and new embeddings."""
    found, tables = [], trained_tables(model)
    for name, layer in adapted_layers(model):
        name, qkv_index = layer_in(family, name)
        found.append((f'{name}.lora_A.weight', layer.lora_A, None))
        found.append((f'{name}.lora_B.weight', layer.lora_B, qkv_index))
        if layer.magnitude is not None:
            found.append((f'{name}.lora_magnitude_vector', layer.magnitude, qkv_index))
    for name, table in tables.items():
        found.append((f'{name}.token_adapter.trainable_tokens_delta', table.rows, None))
    for name in model.new_weights(model.config) if tables else ():
        found.append((name, model.get_parameter(name), None))
    return found


def layer_in(family, name):
    """Return a linear layer's name in a family, and its index where q, k and v are one layer there."""
    found, qkv_index, _ = families.hf_name(f'{name}.weight', family)
    return found.removesuffix('.weight'), qkv_index


def save_adapter(model, folder, base_name):
    """Write adapter_model.safetensors and adapter_config.json for PEFT; base_name: what they are for.

    Layers have the names of the model's family; our own where it has none and for gpt2, whose q, k and v are one
    layer. Where the base was converted, a key that PEFT ignores says to what.
    """
    folder, tables = Path(folder), trained_tables(model)
    family, _ = families.family_of(type(model), model.config)
    family = None if family == 'gpt2' else family
    layers = {layer_in(family, name)[0]: layer for name, layer in adapted_layers(model)}
    layer = next(iter(layers.values()))
    config = {
        'peft_type': 'LORA',
        'task_type': 'CAUSAL_LM' if model.causal else None,
        'base_model_name_or_path': str(base_name),
        'r': layer.rank,
        'lora_alpha': layer.alpha,
        'lora_dropout': layer.dropout.p,
        'target_modules': sorted({name.split('.')[-1] for name in layers}),
        'bias': 'none',
        'use_dora': layer.magnitude is not None,
        'use_rslora': False,
        'inference_mode': True,
    }
    if tables:
        new = [name.removesuffix('.weight') for name in model.new_weights(model.config)]
        config['trainable_token_indices'] = {name: table.ids.tolist() for name, table in tables.items()}
        config['modules_to_save'] = new or None
        config['architecture'] = architecture_name(model)

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {PREFIX + name: weight.detach() for name, weight, _ in trained_weights(model, family)}
    data = safetensors.torch.save(tensors, metadata={'format': 'pt'})
    files.save_atomically(folder / 'adapter_model.safetensors', lambda file: file.write(data))
    files.write_json(folder / 'adapter_config.json', config)


def load_adapter(model, folder):
    """Put the adapter of a folder in PEFT's format on the model, to be used, trained on or merged."""
    config, tensors = read_config(folder), read_tensors(folder)
    require(not adapted_layers(model), f'The model has an adapter already; merge it before {folder}.')
    for key, known in {**SUPPORTED, 'architecture': architecture_name(model)}.items():
        value, remedy = config.get(key) or known, 'merge it into its base with PEFT'
        require(value == known, f'{folder} has {key}={value!r}; only {known!r} is known here; {remedy}.')

    family, _ = families.family_of(type(model), model.config)
    family = None if any(name.startswith('blocks.') for name in tensors) else family
    rank, dropout, dora = config['r'], config.get('lora_dropout', 0.0), config.get('use_dora', False)
    alpha = config['lora_alpha'] * (math.sqrt(rank) if config.get('use_rslora') else 1)
    for name, layer in linear_layers(model):
        if f'{layer_in(family, name)[0]}.lora_A.weight' in tensors:
            model.set_submodule(name, LoRALinear(layer, rank, alpha, dropout, dora))
    freeze_the_rest(model)
    if 'architecture' in config:
        train_new_embeddings(model)
    odd = copy_tensors(tensors, trained_weights(model, family))
    base = config.get('base_model_name_or_path')
    require(not odd, f'The adapter {folder} does not fit ({odd}); give the base that it is for, {base!r}.')


@torch.no_grad()
def copy_tensors(tensors, weights):
    """Copy {name: tensor} into what trained_weights() returns; return in words what does not fit, or ''."""
    odd = tensors.keys() ^ {name for name, _, _ in weights}
    for name, weight, qkv_index in weights:
        tensor = tensors.get(name, weight)
        tensor = tensor if qkv_index is None else tensor.chunk(3)[qkv_index]
        if tensor.shape == weight.shape:
            weight.copy_(tensor)
        else:
            odd.add(f'{name} {tuple(tensor.shape)}, which is {tuple(weight.shape)} here')
    return '; '.join(sorted(odd)[:3])


def read_config(folder):
    """Return the adapter_config.json of an adapter's folder."""
    path = Path(folder) / 'adapter_config.json'
    require(path.is_file(), f'There is no adapter in {folder}: {path.name} is missing; correct the path.')
    return pretrained.read_json(path)


def read_tensors(folder):
    """Return {name without PEFT's prefix: tensor} of an adapter's folder."""
    path = Path(folder) / 'adapter_model.safetensors'
    tensors = pretrained.read_tensors(path if path.is_file() else path.with_suffix('.bin'))
    return pretrained.current_names({name.removeprefix(PREFIX): x for name, x in tensors.items()})
