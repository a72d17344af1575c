"""Adapters of low rank on frozen linear layers (LoRA), read and written in PEFT's format."""

import math
import zlib
from pathlib import Path

import safetensors.torch
import torch
import torch.nn as nn
import torch.nn.functional as F

from lm import families, files, pretrained
from lm.configurator import require
from lm.quantize import linear_layers
from model import architecture_name


class LoRALinear(nn.Module):
    """A frozen linear layer W and a trained one of low rank: y = W x + s B A x, s = alpha / rank
    (LoRA, Hu et al. 2021). B starts at zero, so the layer starts as W.
    """

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__()
        self.base, self.rank, self.alpha, self.scale = base, rank, alpha, alpha / rank
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.dropout = nn.Dropout(dropout)
        self.train(base.training)

    def forward(self, x):
        if isinstance(self.base, nn.Linear):  # a quantized one computes in any type
            x = x.to(self.base.weight.dtype)
        y, x = self.base(x), self.dropout(x)
        update = F.linear(self.scale * F.linear(x.to(self.lora_A.dtype), self.lora_A), self.lora_B)
        return y + update.to(y.dtype)

    def merged(self):
        """Return the layer as a plain one; the sum is made in float32."""
        low_rank = self.lora_B.float() @ self.lora_A.float()
        weight = self.base.weight.detach().float() + self.scale * low_rank  # (out, in)
        layer = nn.Linear(self.base.in_features, self.base.out_features, bias=False, device='meta')
        layer.weight, layer.bias = nn.Parameter(weight.to(self.base.weight.dtype)), self.base.bias
        return layer


class TrainedRows(nn.Module):
    """A frozen embedding or head (V, C) with rows that are trained."""

    def __init__(self, table, ids):
        super().__init__()
        self.table, device = table, 'cpu' if table.weight.is_meta else table.weight.device
        self.register_buffer('ids', torch.tensor(ids, device=device), persistent=False)
        self.rows = nn.Parameter(table.weight.detach()[ids].clone())

    @property
    def weight(self):
        return self.table.weight.index_copy(0, self.ids, self.rows.to(self.table.weight.dtype))

    def forward(self, tokens):
        return F.embedding(tokens, self.weight)


def add_lora(model, rank, alpha, dropout=0.0, targets=()):
    """Put adapters on the blocks' linear layers, or on those with names in `targets` (ours or a family's, q
    or q_proj; 'all-linear' is all of them), and freeze all the rest."""
    targets, known = set(targets) - {'all-linear'}, set()
    for name, layer in linear_layers(model):
        module = name.split('.', 2)[2]  # of blocks.3.attention.q: attention.q
        names = {n.split('.')[-1] for n in (module, *families.NAMES.get(module, ())) if n}
        known |= names
        if not targets or names & targets:
            model.set_submodule(name, LoRALinear(layer, rank, alpha, dropout))
    unknown, known = ', '.join(sorted(targets - known)), ', '.join(sorted(known))
    require(not unknown, f'No layer of the model is called {unknown}; choose of {known}, all-linear.')
    freeze_the_rest(model)


def adapted_layers(model):
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoRALinear)]


def trained_tables(model):
    return {name: table for name, table in model.named_children() if isinstance(table, TrainedRows)}


def trained_weights(model):
    """Return {name: weight} of the adapters and of what train_new_embeddings() trains."""
    new = model.new_weights(model.config) if trained_tables(model) else {}
    weights = dict(model.named_parameters())
    return {name: x for name, x in weights.items() if name in new or name.split('.')[-1] in PEFT_NAMES}


def freeze_the_rest(model):
    model.requires_grad_(False)
    for weight in trained_weights(model).values():
        weight.requires_grad_(True)


def train_new_embeddings(model):
    """Train, beside the adapters, what a converted model has not learned as what it was before: the rows of
    <|mask|> and <|ignore|>, and the weights that only its architecture has."""
    ids = [i for i in (model.config.mask_id, model.config.ignore_id) if i is not None]
    for name in ('embedding', 'unembedding'):
        if (table := getattr(model, name)) is not None:
            setattr(model, name, TrainedRows(table, ids))
    freeze_the_rest(model)


def round_frozen(model):
    """Keep frozen matrices in bfloat16, as autocast would for each matmul; a tied embedding stays as it is."""
    tables = [model.embedding, model.unembedding] if isinstance(model.unembedding, nn.Linear) else []
    for weight in nn.ModuleList([model.blocks, *tables]).parameters():
        weight.data = weight.data if weight.requires_grad or weight.dim() < 2 else weight.data.bfloat16()
    if model.embedding.weight.dtype == torch.bfloat16:  # the residual stream stays in float32
        model.embedding.register_forward_hook(lambda module, args, x: x.float())


@torch.no_grad()
def merge(model):
    """Add the adapters to the weights and remove them; quantized layers become plain ones."""
    for name, layer in adapted_layers(model):
        model.set_submodule(name, layer.merged())
    for name, table in trained_tables(model).items():
        table.table.weight = nn.Parameter(table.weight, requires_grad=False)  # others may have the tensor
        setattr(model, name, table.table)


PREFIX = 'base_model.model.'  # of names in PEFT's files
PEFT_NAMES = {name: f'{name}.weight' for name in ('lora_A', 'lora_B')}  # by the last part of our names
PEFT_NAMES['rows'] = 'token_adapter.trainable_tokens_delta'
SUPPORTED = dict(peft_type=['LORA'], bias=['none'], use_dora=[False])
SUPPORTED['init_lora_weights'] = [True, False, 'gaussian']
# Other keys of adapter_config.json that are read, say nothing of the weights, or what the tensors say as well; any
# further one (of PiSSA, activated LoRA, ...) has to be empty.
READ = 'r lora_alpha lora_dropout use_rslora base_model_name_or_path prompt_format start_token'.split()
READ += 'revision target_modules exclude_modules layers_to_transform layers_pattern modules_to_save'.split()
READ += 'trainable_token_indices task_type inference_mode peft_version auto_mapping fan_in_fan_out'.split()
READ += 'megatron_core qalora_group_size'.split()
BLOCKS = ['block_length', 'ar_weight']  # keys of ours, where they are not those of a model of whole rows
READ += [*BLOCKS, 'base_checksum', 'block_size']


def base_checksum(model):
    """Return a number by which an adapter knows its base, of a row of each linear layer; None: quantized."""
    checksum = 0
    for _, layer in linear_layers(model):
        if not isinstance(layer, nn.Linear):
            return None
        row = layer.weight[0].detach().cpu().bfloat16()  # as a base in bfloat16 has it
        checksum = zlib.crc32(row.view(torch.int16).numpy(), checksum)
    return checksum


def peft_name(name, family):
    """Return the name of a trained weight in PEFT's files, and which third of that tensor it is, or None."""
    hf_name, qkv_index, _ = families.hf_name(name, family)
    module, _, kind = hf_name.rpartition('.')
    return f'{module}.{PEFT_NAMES.get(kind, kind)}', None if kind == 'lora_A' else qkv_index


def save_adapter(model, folder, base_name, weights=None, **asked):
    """Write adapter_model.safetensors and adapter_config.json for PEFT; base_name: what they are for.

    weights: the trained ones, where the model has only parts of them; asked: keys of ours, prompt_format and
    start_token of its answers and the block_size of its rows, which go into its base, and base_checksum. Layers
    have the names of the model's family; our own without one and for gpt2, where q, k, v are one.
    """
    folder, tables, (_, layer) = Path(folder), trained_tables(model), adapted_layers(model)[0]
    family, _ = families.family_of(type(model), model.config)
    family = None if family == 'gpt2' else family
    weights = weights or trained_weights(model)
    tensors = {PREFIX + peft_name(name, family)[0]: x.detach() for name, x in weights.items()}
    targets = {name.split('.')[-3] for name in tensors if name.endswith('lora_A.weight')}
    config = dict(peft_type='LORA', task_type='CAUSAL_LM' if model.causal else None)
    config.update(base_model_name_or_path=str(base_name), r=layer.rank, lora_alpha=layer.alpha)
    config.update(lora_dropout=layer.dropout.p, target_modules=sorted(targets), bias='none')
    config.update(use_dora=False, use_rslora=False, inference_mode=True)
    config.update({key: value for key, value in asked.items() if value is not None})
    if model.config.has_two_streams:
        config.update({key: getattr(model.config, key) for key in BLOCKS})
    if tables:
        new = [name.removesuffix('.weight') for name in model.new_weights(model.config)]
        ids = {name: table.ids.tolist() for name, table in tables.items()}
        config.update(trainable_token_indices=ids, modules_to_save=new or None)
        config['architecture'] = architecture_name(model)  # a key of ours, by which a base is converted
    data = safetensors.torch.save(tensors, metadata={'format': 'pt'})
    files.save_atomically(folder / 'adapter_model.safetensors', lambda file: file.write(data))
    files.write_json(folder / 'adapter_config.json', config)


def load_adapter(model, folder):
    """Put the adapter of a folder in PEFT's format on the model, to be used, trained on or merged."""
    with files.as_sentence(f'{folder} cannot be read as an adapter', 'save it again'):
        config = read_config(folder)
        path = Path(folder) / 'adapter_model.safetensors'
        supported = {**SUPPORTED, 'architecture': [architecture_name(model)]}
        remedy = 'merge it into its base with PEFT'
        for key in config.keys() - READ:
            value, known = config[key], supported.get(key, families.ABSENT)
            require(value in known, f'{folder} has {key}={value!r}; only {known[0]!r} is known; {remedy}.')
        tensors = pretrained.read_tensors(path if path.is_file() else path.with_suffix('.bin'))
        tensors = pretrained.current_names({name.removeprefix(PREFIX): x for name, x in tensors.items()})
        family, _ = families.family_of(type(model), model.config)
        family = None if any(name.startswith('blocks.') for name in tensors) else family
        base, checksum = config.get('base_model_name_or_path'), config.get('base_checksum')
        remedy = f'give its base as it was then, {base!r}, or take base_checksum out of adapter_config.json'
        fits = checksum is None or base_checksum(model) in (None, checksum)
        require(fits, f'{folder} was trained on other weights than these; {remedy}.')
        rank, dropout = config['r'], config.get('lora_dropout', 0.0)
        alpha = config['lora_alpha'] * (math.sqrt(rank) if config.get('use_rslora') else 1)
        for name, layer in linear_layers(model):
            if peft_name(f'{name}.lora_A', family)[0] in tensors:
                model.set_submodule(name, LoRALinear(layer, rank, alpha, dropout))
        freeze_the_rest(model)
        if 'architecture' in config:
            train_new_embeddings(model)
        odd = copy_tensors(tensors, model, family)
    require(not odd, f'The adapter {folder} does not fit ({odd}); give the base that it is for, {base!r}.')


@torch.no_grad()
def copy_tensors(tensors, model, family):
    """Copy {name in PEFT's files: tensor} into the adapters; return in words what does not fit, or ''."""
    weights = [(*peft_name(name, family), weight) for name, weight in trained_weights(model).items()]
    odd = tensors.keys() ^ {name for name, _, _ in weights}
    for name, qkv_index, weight in weights:
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
