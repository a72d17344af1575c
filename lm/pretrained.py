"""Pretrained models from a Hugging Face folder, or from the hub, as checkpoints of ours."""

import json
import sys
from pathlib import Path

import safetensors
import torch

from lm import families
from lm.configurator import UserError
from lm.tokenizer import Tokenizer, pretrained_token
from model import ARCHITECTURES, ModelConfig

# ---------------------------------------------------------------------------- a folder's tensors


def read_json(path):
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise UserError(f'{path} cannot be read ({error}); download the folder again.') from error


def weight_files(folder):
    """The files of a folder that hold its weights, safetensors before .bin."""
    for single, index in (
        ('model.safetensors', 'model.safetensors.index.json'),
        ('pytorch_model.bin', 'pytorch_model.bin.index.json'),
    ):
        if (folder / index).is_file():
            names = sorted(set(read_json(folder / index).get('weight_map', {}).values()))
            missing = [name for name in names if not (folder / name).is_file()]
            if missing:
                raise UserError(
                    f'{folder} lacks {", ".join(missing)}, which its {index} lists; download it again.'
                )
            return [folder / name for name in names]
        if (folder / single).is_file():
            return [folder / single]
    raise UserError(
        f'{folder} holds no weights: neither model.safetensors nor pytorch_model.bin, nor an index of '
        'several; give a folder that save_pretrained wrote.'
    )


def open_tensors(folder):
    """{name: tensor}; the files are mapped into memory, so that only what is looked at is read, piece by piece."""
    tensors = {}
    for path in weight_files(folder):
        try:
            if path.suffix == '.safetensors':
                file = safetensors.safe_open(path, 'pt')
                tensors.update({name: file.get_tensor(name) for name in file.keys()})
            else:
                tensors.update(load_bin(path))
        except Exception as error:  # damaged bytes make both libraries fail in a dozen ways
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f'{path} is damaged or holds more than weights ({reason}); download it again.'
            ) from error
    return tensors


def load_bin(path):
    """The tensors of a .bin file by name; weights_only, because pickles run code."""
    try:
        return torch.load(path, map_location='cpu', weights_only=True, mmap=True)
    except RuntimeError:  # the format before PyTorch 1.6 cannot be mapped
        return torch.load(path, map_location='cpu', weights_only=True)


def our_tensors(folder, family, config):
    """The state dict of our model from a family's folder: complete, and nothing left over."""
    tensors = {families.bare(name): tensor for name, tensor in open_tensors(folder).items()}
    with torch.device('meta'):
        expected = ARCHITECTURES['ar'](ModelConfig(**config)).state_dict()
    shapes = {name: tensor.shape for name, tensor in expected.items()}
    places = {name: families.their_name(name, family) for name in shapes}
    wanted = {families.bare(theirs): theirs for theirs, _, _ in places.values()}
    known = (
        {*wanted, 'lm_head.weight'} if config['tied'] else set(wanted)
    )  # a tied head is a copy of the embedding
    left_over = [name for name in tensors if name not in known and not families.BUFFERS.fullmatch(name)]
    complain(folder, missing=[wanted[name] for name in wanted if name not in tensors], left_over=left_over)
    state, misshapen = {}, []
    for name, (theirs, third, transposed) in places.items():
        tensor = tensors[families.bare(theirs)]
        tensor = tensor if third is None else tensor.chunk(3, -1)[third]
        tensor = tensor.T if transposed else tensor
        if name in ('embedding.weight', 'unembedding.weight') and len(tensor) == config['pretrained_rows']:
            tensor = with_rows(tensor, shapes[name][0])
        if tensor.shape != shapes[name]:
            misshapen.append(f'{theirs} {tuple(tensors[families.bare(theirs)].shape)}')
        state[name] = tensor
    complain(folder, of_another_shape=misshapen)
    return state


def complain(folder, **faults):
    """A UserError that lists tensors by what is wrong with them; nothing where all lists are empty."""
    parts = [
        f'{what.replace("_", " ")}: {", ".join(sorted(names))}' for what, names in faults.items() if names
    ]
    if parts:
        raise UserError(
            f'The weights of {folder} do not fit its config.json ({"; ".join(parts)}); nothing was '
            'imported. Download it again, or correct config.json.'
        )


def with_rows(tensor, rows):
    """The embedding or head with rows added, each the mean of those that there are."""
    if len(tensor) >= rows:
        return tensor
    mean = tensor.float().mean(0, keepdim=True).to(tensor.dtype)
    return torch.cat([tensor, mean.expand(rows - len(tensor), -1)])


# ---------------------------------------------------------------------------- in


def load(path, token=None, revision=None):
    """The checkpoint of a Hugging Face folder or hub id; its tensors lie in the folder's files until they are used."""
    folder = Path(path) if Path(path).is_dir() else download(path, token, revision)
    c = read_json(folder / 'config.json')
    if c.get('model_type') == families.NATIVE:
        return load_native(folder, c)
    if 'model_type' not in c:
        raise UserError(
            f'{folder}/config.json names no model_type, so this is no model; give a folder that '
            'save_pretrained wrote.'
        )
    config, tokenizer = families.switches(c, folder), read_tokenizer(folder)
    config['vocab_size'] = config['pretrained_rows'] if tokenizer is None else tokenizer.vocab_size
    if tokenizer is not None:
        config.update(mask_id=tokenizer.mask_id, ignore_id=tokenizer.ignore_id)
    config = vars(checked_config(config))
    if config['block_size'] < c.get('max_position_embeddings', 0):
        print(
            f'{folder}: attention sees {config["block_size"]} tokens back (sliding_window), so block_size is that; '
            'within it the model is the same.',
            file=sys.stderr,
        )
    return {
        'architecture': 'ar',
        'global_step': 0,
        'model_config': config,
        'train_config': {},
        'model_state_dict': our_tensors(folder, c['model_type'], config),
        'tokenizer': None if tokenizer is None else tokenizer.to_json(),
        'start_token': c['start_token'] if 'start_token' in c else start_of(folder, tokenizer),
        'prompt_format': c.get('prompt_format'),
    }


def checked_config(config):
    try:
        return ModelConfig(**config)
    except ValueError as error:
        raise UserError(str(error)) from error


def load_native(folder, c):
    missing = {'architecture', 'model_config', 'start_token', 'prompt_format'} - set(c)
    if missing:
        raise UserError(f'{folder}/config.json lacks {", ".join(sorted(missing))}; export the model again.')
    tensors, tokenizer = open_tensors(folder), read_tokenizer(folder)
    if c['architecture'] not in ARCHITECTURES:
        raise UserError(
            f'{folder}/config.json has the architecture {c["architecture"]!r}; this version knows '
            f'{", ".join(ARCHITECTURES)}.'
        )
    with torch.device('meta'):
        expected = ARCHITECTURES[c['architecture']](checked_config(c['model_config'])).state_dict()
    complain(folder, missing=set(expected) - set(tensors), left_over=set(tensors) - set(expected))
    complain(
        folder, of_another_shape=[name for name in expected if expected[name].shape != tensors[name].shape]
    )
    return {
        'architecture': c['architecture'],
        'global_step': 0,
        'model_config': c['model_config'],
        'train_config': {},
        'model_state_dict': tensors,
        'tokenizer': tokenizer and tokenizer.to_json(),
        'start_token': c['start_token'],
        'prompt_format': c['prompt_format'],
    }


def read_tokenizer(folder):
    """A folder's Tokenizer; None, with a warning, where it has none."""
    if not any((folder / name).is_file() for name in ('tokenizer.json', 'merges.txt')):
        print(
            f'warning: {folder} has no tokenizer.json, so the model comes without one and can neither read nor '
            'write text.',
            file=sys.stderr,
        )
        return None
    return Tokenizer.load(folder)


def start_of(folder, tokenizer):
    """The id that stands before a text: what the tokenizer itself puts there, or <|endoftext|>."""
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
    """The local folder of a model of the hub."""
    from huggingface_hub import snapshot_download  # comes with datasets; slow to import

    try:

        def get(*patterns):
            return Path(
                snapshot_download(
                    name, token=token or None, revision=revision or None, allow_patterns=list(patterns)
                )
            )

        folder = get('*.json', 'merges.txt', 'model*.safetensors')
        if not any(folder.glob('model*.safetensors')):
            get('pytorch_model*.bin')
        return folder
    except Exception as error:  # the client's, the network's and httpx' own errors have no common class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f'There is no checkpoint at {name}, and the Hugging Face hub gives no model by that name '
            f'({reason}); correct the path or name, try again, or give a --token for a private '
            'model.'
        ) from error
