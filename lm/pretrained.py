"""Pretrained models as checkpoints: of a Hugging Face folder, of the hub, or a ckpt.pt of nanoGPT."""

import json
import re
import zipfile
from pathlib import Path

import safetensors.torch
import torch

from lm import families, prompts
from lm.configurator import UserError, require, user_errors
from lm.files import as_sentence
from lm.tokenizer import SPECIAL_TOKENS, Tokenizer, build, known_id, pretrained_token, settings_of
from model import ARCHITECTURES, Autoregressive, ModelConfig, architecture_name

CAUSAL_LM = architecture_name(Autoregressive)
RENAMED = dict(believed='belief_proj', widen='project_in', narrow='project_out')  # since earlier versions
BUFFERS = re.compile(r'(.*\.)?(attn\.(bias|masked_bias)|rotary_emb\.inv_freq)')  # in old files, no weights


def current_names(state_dict):
    """Return a state dict with the names of today for tensors that had others in earlier versions."""
    renamed = {name: '.'.join(RENAMED.get(part, part) for part in name.split('.')) for name in state_dict}
    return {renamed[name]: tensor for name, tensor in state_dict.items()}


def current_config(fields):
    """Return the fields of a ModelConfig of an earlier version as today's has them."""
    fields = {'embedding_shortcuts': 0, 'neighbours': 0, **fields}  # from before there were any
    return {key: value for key, value in fields.items() if key != 'selective_checkpointing'}


def load(path, token=None, revision=None):
    """Return the checkpoint of a Hugging Face folder or hub id; its tensors stay on disk until used."""
    folder = Path(path) if Path(path).is_dir() else download(path, token, revision)
    with as_sentence(f'{folder} cannot be read as a model'):
        c, tensors = read_json(folder / 'config.json'), open_tensors(folder)
        has_tokenizer = any((folder / name).is_file() for name in ('tokenizer.json', 'merges.txt'))
        tokenizer = Tokenizer.load(folder) if has_tokenizer else None
        if c.get('model_type') == families.NATIVE:
            name, fields, family = c['architecture'], current_config(c['model_config']), None
            tensors = current_names(tensors)
        else:
            fields, family = families.config_from_hf(c, folder), c['model_type']
            name = families.FAMILIES[family][0]
        told = c.get('start_token', None if tokenizer else c.get('bos_token_id'))
        form = c.get('prompt_format') or prompts.template_of(folder)
        is_told = isinstance(told, int) and 0 <= told < fields['vocab_size']
        start = told if is_told else tokenizer.start_id if tokenizer else 0
        checkpoint = as_checkpoint(name, fields, family, tensors, folder, tokenizer, start, form)
        rows_of = c.get('trained_here')  # of an export: the settings by which evaluate.py chooses its rows
        checkpoint['train_config'] = rows_of if isinstance(rows_of, dict) else {}
        return {**checkpoint, 'came_with': around(folder, c, tokenizer) if tokenizer else None}


def from_nanogpt(saved, path, tokenizer=None):
    """Return what a ckpt.pt of nanoGPT holds as a checkpoint of ours; tokenizer: its own, None: GPT-2's."""
    with as_sentence(f"{path} is no whole ckpt.pt of nanoGPT's", 'correct the path'):
        args, tensors = saved['model_args'], gpt2_layout(saved['model'])
        c = {key: args[key] for key in ('n_layer', 'n_head', 'n_embd', 'vocab_size')}
        c |= {'model_type': 'gpt2', 'activation_function': 'gelu', 'n_positions': args['block_size']}
        fields = {**families.config_from_hf(c, path), 'bias': args['bias']}
    tokenizer = tokenizer or build('gpt2')
    rows, size = fields['pretrained_rows'], tokenizer.vocab_size
    fits = rows >= size - len(SPECIAL_TOKENS)
    require(fits, f'{path} has {rows} tokens, the tokenizer {size}; give its own --tokenizer.')
    return as_checkpoint(CAUSAL_LM, fields, 'gpt2', tensors, path, tokenizer, tokenizer.start_id)


def gpt2_layout(state_dict):
    """Return a state dict of nanoGPT as transformers has it, with linear layers that are (in, out)."""
    linear = re.compile(r'.*\.c_(attn|proj|fc)\.weight')
    tensors = {name.removeprefix('_orig_mod.'): tensor for name, tensor in state_dict.items()}
    return {name: tensor.T if linear.fullmatch(name) else tensor for name, tensor in tensors.items()}


def as_checkpoint(architecture, fields, family, tensors, source, tokenizer, start, prompt_format=None):
    """Return the checkpoint of a model of ModelConfig's `fields`; source: of the tensors, for messages."""
    require(architecture in ARCHITECTURES, f'{source} has {architecture=}; add it to model.py.')
    if family and tokenizer:
        fields = {**fields, 'mask_id': tokenizer.mask_id, 'vocab_size': tokenizer.vocab_size}
        if architecture != CAUSAL_LM or tokenizer.ignore_id != tokenizer.endoftext_id:  # which it predicts
            fields['ignore_id'] = tokenizer.ignore_id
    with user_errors():
        config = ModelConfig(**fields)
    state_dict = load_state_dict(tensors, family, ARCHITECTURES[architecture], config, source)
    checkpoint = dict(architecture=architecture, global_step=0, model_config=vars(config), train_config={})
    checkpoint.update(model_state_dict=state_dict, tokenizer=tokenizer and tokenizer.to_json())
    return {**checkpoint, 'start_token': start, 'prompt_format': prompt_format}


def load_state_dict(tensors, family, architecture, config, source):
    """Return our state dict for the tensors {name: tensor} of a family (None: in our own names).

    Rows added to the vocabulary are the mean of the others. UserError: a tensor is missing or does not fit.
    """
    tensors = {without_prefix(name): tensor for name, tensor in tensors.items()}
    names = (families.hf_name(f'{x}.weight', family)[0] for x in ('embedding', 'unembedding'))
    table, head = map(without_prefix, names)
    own = tensors.pop(head, None) if config.tied else None  # in place of the embedding, or a copy of it
    is_copy = own is None or torch.equal(tensors.setdefault(table, own), own)
    require(is_copy, f'{source} has a head of its own; set tie_word_embeddings to false in its config.json.')
    state_dict, faults, used = {}, [], set()
    with torch.device('meta'):  # names and shapes alone
        expected = architecture(config).state_dict()
    for name, weight in expected.items():
        hf_name, qkv_index, transposed = families.hf_name(name, family)
        used.add(without_prefix(hf_name))
        found = tensors.get(without_prefix(hf_name))
        if found is None:
            faults.append(f'missing: {hf_name}')
            continue
        tensor = found if qkv_index is None else found.chunk(3, -1)[qkv_index]
        tensor = tensor.T if transposed else tensor
        is_table = name in ('embedding.weight', 'unembedding.weight')
        if is_table and len(tensor) == config.pretrained_rows < config.padded_vocab_size:
            mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
            tensor = torch.cat([tensor, mean.expand(config.padded_vocab_size - len(tensor), -1)])
        if tensor.shape != weight.shape:
            faults.append(f'of another shape: {hf_name} {tuple(found.shape)}')
        state_dict[name] = tensor

    faults += [f'left over: {name}' for name in tensors if name not in used and not BUFFERS.fullmatch(name)]
    listed = '; '.join(faults[:3])
    require(not faults, f'The weights of {source} do not fit its config ({listed}); download it again.')
    return state_dict


def without_prefix(name):
    """Return a tensor's name without what old files, and models without a head, leave out."""
    return re.sub(r'^(transformer|model)\.', '', name)


def open_tensors(folder):
    """Return {name: tensor} of a folder; its files are mapped into memory and read when they are used."""
    for file in ('model.safetensors', 'pytorch_model.bin'):
        index, names = folder / f'{file}.index.json', {file}
        if index.is_file() and not (folder / file).is_file():  # or it is of an earlier model
            names = set(read_json(index).get('weight_map', {}).values())
        if index.is_file() or (folder / file).is_file():
            outside = [name for name in names if Path(name).name != name]
            require(not outside, f'{index} leads out of its folder, to {outside}; download it again.')
            parts = [read_tensors(folder / name) for name in sorted(names)]
            return {name: tensor for part in parts for name, tensor in part.items()}
    raise UserError(f'{folder} holds no weights, model.safetensors or pytorch_model.bin; download it again.')


def read_tensors(path):
    """Return {name: tensor} of a .safetensors or .bin file, without running code that it may hold."""
    with as_sentence(f'{path} cannot be read as weights'):
        if path.suffix == '.safetensors':
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location='cpu', weights_only=True, mmap=zipfile.is_zipfile(path))


def read_json(path):
    """Return the object that a JSON file holds."""
    with as_sentence(f'{path} cannot be read', 'download the folder again'):
        return dict(json.loads(path.read_text(encoding='utf-8')))


def around(folder, c, tokenizer):
    """Return what a folder with the config.json `c` says of texts beside its model, which an export says again."""
    settings = settings_of(folder, 'tokenizer_config.json')
    kept = {'add_bos_token': settings['add_bos_token']} if 'add_bos_token' in settings else {}
    ends, several = settings_of(folder, 'generation_config.json').get('eos_token_id'), c.get('eos_token_id')
    if ends is None and isinstance(several, list):  # a single one in config.json is often what no one set
        ends = several
    ends = [token for token in (ends if isinstance(ends, list) else [ends]) if isinstance(token, int)]
    known = lambda kind: known_id(tokenizer.inner, pretrained_token(folder, kind))
    kept = dict(end_tokens=ends, added_tokens=tokenizer.added, tokenizer_config=kept)
    kept.update(bos_token=known('bos'), pad_token=known('pad'))
    return {**kept, 'trained_here': bool(c.get('trained_here', c.get('model_type') == families.NATIVE))}


def is_ours(checkpoint):
    """Say whether a checkpoint was trained here, if it went through a folder of Hugging Face's or not."""
    came_with = checkpoint.get('came_with')
    return bool(not came_with or came_with.get('trained_here') or checkpoint.get('train_config'))


def download(name, token=None, revision=None):
    """Return the local folder of a model of the hub; .bin files only where it has no safetensors."""
    from huggingface_hub import snapshot_download  # slow to import

    options = dict(token=token or None, revision=revision or None)
    problem = f'There is no checkpoint at {name}, and the hub gives no model by that name'
    with as_sentence(problem, 'correct it, try again, or give a --token for a private model'):
        patterns = ['*.json', '*.jinja', 'merges.txt', 'model*.safetensors']
        folder = Path(snapshot_download(name, allow_patterns=patterns, **options))
        if not any(folder.glob('model*.safetensors')):
            snapshot_download(name, allow_patterns=['pytorch_model*.bin'], **options)
        return folder
