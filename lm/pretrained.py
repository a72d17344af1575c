"""Pretrained models as checkpoints: of a Hugging Face folder, of the hub, or a ckpt.pt of nanoGPT."""

import contextlib
import json
import re
import sys
from pathlib import Path

import safetensors.torch
import torch

from lm import families
from lm.configurator import UserError, require, user_errors
from lm.tokenizer import SPECIAL_TOKENS, Tokenizer, pretrained_token
from model import ARCHITECTURES, Autoregressive, ModelConfig, architecture_name

RENAMED = {  # names of tensors in files of earlier versions
    'believed.weight': 'belief_proj.weight',
    'widen.weight': 'project_in.weight',
    'narrow.weight': 'project_out.weight',
}
BUFFERS = re.compile(r'(.*\.)?(attn\.(bias|masked_bias)|rotary_emb\.inv_freq)')  # in old files, no weights


def current_names(state_dict):
    """Return a state dict with the names of today for tensors that had others in earlier versions."""
    return {RENAMED.get(name, name): tensor for name, tensor in state_dict.items()}


# ---------------------------------------------------------------------------- checkpoints


def load(path, token=None, revision=None):
    """Return the checkpoint of a Hugging Face folder or hub id; its tensors stay on disk until used."""
    folder = Path(path) if Path(path).is_dir() else download(path, token, revision)
    c, tokenizer = read_json(folder / 'config.json'), read_tokenizer(folder)
    require('model_type' in c, f'{folder}/config.json names no model_type; give a folder of save_pretrained.')
    if c['model_type'] != families.NATIVE:
        start = c['start_token'] if 'start_token' in c else start_token(folder, tokenizer)
        tensors = open_tensors(folder)
        return causal_lm(c, tensors, folder, tokenizer, start, c.get('prompt_format'))

    missing = ', '.join(sorted({'architecture', 'model_config', 'start_token', 'prompt_format'} - set(c)))
    require(not missing, f'{folder}/config.json lacks {missing}; export the model again.')
    name, known = c['architecture'], ', '.join(ARCHITECTURES)
    require(name in ARCHITECTURES, f'{folder} is of the architecture {name!r}; known here are {known}.')
    tensors, texts = current_names(open_tensors(folder)), (tokenizer, c['start_token'], c['prompt_format'])
    return as_checkpoint(name, None, c['model_config'], tensors, folder, *texts)


def load_nanogpt(path, tokenizer):
    """Return a ckpt.pt of nanoGPT as a checkpoint of ours; tokenizer: what it was trained with.

    Rows of the vocabulary that it lacks start at the mean of the others.
    """
    try:
        saved = torch.load(path, map_location='cpu', weights_only=True)
        args, tensors = saved['model_args'], gpt2_layout(saved['model'])
        shape = {key: args[key] for key in ('n_layer', 'n_head', 'n_embd', 'vocab_size')}
        c = {'model_type': 'gpt2', 'activation_function': 'gelu', **shape}
        c['n_positions'], bias = args['block_size'], args['bias']
    except Exception as error:  # damaged bytes make it fail in a dozen ways
        raise UserError(
            f"{path} is no ckpt.pt of nanoGPT's ({type(error).__name__}: {first_line(error)[:80]}); "
            'correct the path, or leave --tokenizer out, which our own checkpoints hold.'
        ) from error
    rows, size = c['vocab_size'], tokenizer.vocab_size
    fits = rows >= size - len(SPECIAL_TOKENS)
    require(fits, f'{path} has {rows} tokens, the tokenizer {size}; give its own as --tokenizer.')
    return causal_lm(c, tensors, path, tokenizer, tokenizer.endoftext_id, bias=bias)


def gpt2_layout(state_dict):
    """Return a state dict of nanoGPT as transformers has it, with linear layers that are (in, out)."""
    linear = re.compile(r'.*\.c_(attn|proj|fc)\.weight')
    return {
        name.removeprefix('_orig_mod.'): tensor.T if linear.fullmatch(name) else tensor
        for name, tensor in state_dict.items()
    }


def causal_lm(c, tensors, source, tokenizer, start, prompt_format=None, **changes):
    """Return the checkpoint of a model with a family's config.json `c` and tensors {name: tensor}.

    source: where it comes from, for messages; changes: fields of ModelConfig that `c` cannot say.
    """
    fields = {**families.config_from_hf(c, source), **changes}
    fields['vocab_size'] = fields['pretrained_rows']
    if tokenizer is not None:
        fields['vocab_size'] = tokenizer.vocab_size
        fields.update(mask_id=tokenizer.mask_id, ignore_id=tokenizer.ignore_id)
    if fields['block_size'] < c.get('max_position_embeddings', 0):
        print(f'{source}: block_size is {fields["block_size"]}, its sliding_window.', file=sys.stderr)
    architecture, family = architecture_name(Autoregressive), c['model_type']
    return as_checkpoint(architecture, family, fields, tensors, source, tokenizer, start, prompt_format)


def as_checkpoint(architecture, family, fields, tensors, source, tokenizer, start, prompt_format):
    with user_errors():
        config = ModelConfig(**fields)
    state_dict = load_state_dict(tensors, family, ARCHITECTURES[architecture], config, source)
    return {
        'architecture': architecture,
        'global_step': 0,
        'model_config': vars(config),
        'train_config': {},
        'model_state_dict': state_dict,
        'tokenizer': None if tokenizer is None else tokenizer.to_json(),
        'start_token': start,
        'prompt_format': prompt_format,
    }


# ---------------------------------------------------------------------------- state dicts


def load_state_dict(tensors, family, architecture, config, source):
    """Return our state dict for the tensors {name: tensor} of a family (None: in our own names).

    Rows added to the vocabulary become the mean of the others. UserError: a tensor is missing, left over or of another
    shape; `source` says where they come from.
    """
    tensors = {without_prefix(name): tensor for name, tensor in tensors.items()}
    state_dict, missing, misshapen = {}, [], []
    used = {'lm_head.weight'} if config.tied else set()  # a copy of the embedding
    for name, shape in shapes_of(architecture, config).items():
        hf_name, qkv_index, transposed = families.hf_name(name, family)
        used.add(without_prefix(hf_name))
        tensor = found = tensors.get(without_prefix(hf_name))
        if found is None:
            missing.append(hf_name)
            continue
        tensor = tensor if qkv_index is None else tensor.chunk(3, -1)[qkv_index]
        tensor = tensor.T if transposed else tensor
        if name in ('embedding.weight', 'unembedding.weight') and len(tensor) == config.pretrained_rows:
            tensor = with_rows(tensor, config.padded_vocab_size)
        if tensor.shape != shape:
            misshapen.append(f'{hf_name} {tuple(found.shape)}')
        state_dict[name] = tensor

    left_over = [name for name in tensors if name not in used and not BUFFERS.fullmatch(name)]
    faults = {'missing': missing, 'left over': left_over, 'of another shape': misshapen}
    listed = '; '.join(f'{fault}: {", ".join(sorted(names))}' for fault, names in faults.items() if names)
    require(not listed, f'The weights of {source} do not fit its config ({listed}); download it again.')
    return state_dict


def shapes_of(architecture, config):
    """Return {name: shape} of the state dict of a model class, without making a model."""
    with torch.device('meta'):
        return {name: tensor.shape for name, tensor in architecture(config).state_dict().items()}


def with_rows(tensor, rows):
    """Return an embedding or head (V, C) with rows added, each the mean of those that there are."""
    if len(tensor) >= rows:
        return tensor
    mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(rows - len(tensor), -1)])


def without_prefix(name):
    """Return a tensor's name without what old files, and models without a head, leave out."""
    return re.sub(r'^(transformer|model)\.', '', name)


# ---------------------------------------------------------------------------- files of a folder


def open_tensors(folder):
    """Return {name: tensor} of a folder; its files are mapped into memory and read when they are used."""
    for name in ('model.safetensors', 'pytorch_model.bin'):
        index = folder / f'{name}.index.json'
        names = [name]
        if index.is_file():
            names = sorted(set(read_json(index).get('weight_map', {}).values()))
            missing = ', '.join(part for part in names if not (folder / part).is_file())
            require(not missing, f'{folder} lacks {missing}, which its index lists; download it again.')
        if names and (folder / names[0]).is_file():
            parts = [read_tensors(folder / part) for part in names]
            return {name: tensor for part in parts for name, tensor in part.items()}
    raise UserError(f'{folder} holds no weights, model.safetensors or pytorch_model.bin; download it again.')


def read_tensors(path):
    """Return {name: tensor} of a .safetensors or .bin file, without running code that it may hold."""
    try:
        if path.suffix == '.safetensors':
            return safetensors.torch.load_file(path)
        with contextlib.suppress(RuntimeError):  # the format before PyTorch 1.6 cannot be mapped
            return torch.load(path, map_location='cpu', weights_only=True, mmap=True)
        return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # damaged bytes make both libraries fail in a dozen ways
        raise UserError(
            f'{path} is damaged or holds more than weights ({first_line(error)}); download it again.'
        ) from error


def read_json(path):
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise UserError(f'{path} cannot be read ({error}); download the folder again.') from error


def read_tokenizer(folder):
    """Return a folder's Tokenizer; None, with a warning, where it has none."""
    if any((folder / name).is_file() for name in ('tokenizer.json', 'merges.txt')):
        return Tokenizer.load(folder)
    print(f'warning: {folder} has no tokenizer.json, so the model has no text.', file=sys.stderr)


def start_token(folder, tokenizer):
    """Return the id before a text: what the tokenizer itself puts there, or <|endoftext|>."""
    first = pretrained_token(folder, 'bos')
    if tokenizer is None:
        return first if isinstance(first, int) else 0
    if tokenizer.own_start:
        return tokenizer.own_start[0]
    settings = folder / 'tokenizer_config.json'
    if settings.is_file() and read_json(settings).get('add_bos_token') and isinstance(first, str):
        return tokenizer.id_of(first)
    return tokenizer.endoftext_id


def download(name, token=None, revision=None):
    """Return the local folder of a model of the hub; .bin files only where it has no safetensors."""
    from huggingface_hub import snapshot_download  # slow to import

    options = dict(token=token or None, revision=revision or None)
    try:
        patterns = ['*.json', 'merges.txt', 'model*.safetensors']
        folder = Path(snapshot_download(name, allow_patterns=patterns, **options))
        if not any(folder.glob('model*.safetensors')):
            snapshot_download(name, allow_patterns=['pytorch_model*.bin'], **options)
        return folder
    except Exception as error:  # the client's, the network's and httpx' own errors have no common class
        raise UserError(
            f'There is no checkpoint at {name}, and the Hugging Face hub gives no model by that name '
            f'({first_line(error)}); correct it, try again, or give a --token for a private model.'
        ) from error


def first_line(error):
    """Return the first line of an error's message, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
