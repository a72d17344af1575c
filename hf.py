"""Hugging Face checkpoints in and out, adapters merged into their base.

    python hf.py import FOLDER_OR_HUB_ID --out=ckpt.pt
    python hf.py export ckpt.pt --out=FOLDER
    python hf.py merge ADAPTER_FOLDER --base=ckpt.pt --out=merged.pt
    python hf.py consolidate RUN_FOLDER     # of a run with fsdp=True that was stopped

The families that it knows are in lm/families.py; others export as 'diffusion-lm', for these scripts only.
`hf upload owner/name FOLDER` sends an exported folder to the hub.
"""

import argparse
import json
import shutil
from contextlib import ExitStack
from os.path import expanduser
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict

from lm import chat, checkpoints, families, files, lora, pretrained, prompts, sharded
from lm.configurator import require
from lm.tokenizer import IGNORE, MASK, Tokenizer, is_record, recorded_in
from model import ARCHITECTURES, ModelConfig

SHARD_BYTES = 5 * 10**9  # of an exported file, at most
READ_WITH_A_MODEL = '*.json *.jinja *.safetensors *.bin *.model merges.txt'  # wrong beside another one


def import_model(source, out, token=None, revision=None):
    """Write a Hugging Face folder or hub id as a ckpt.pt; return in words what it is."""
    ours = Path(source).exists() and not checkpoints.is_pretrained(source)
    require(not ours, f'{source} is no Hugging Face folder; use it as it is, or export a checkpoint of ours.')
    checkpoint = pretrained.load(source, token, revision)
    checkpoints.save(out, checkpoint)
    c = ModelConfig(**checkpoint['model_config'])
    size = sum(tensor.numel() for tensor in checkpoint['model_state_dict'].values())
    shape = f'{c.n_layer} layers × {c.n_embd}, rows of up to {c.block_size}, {c.vocab_size} tokens'
    return f'{checkpoint["architecture"]}, {size:,} parameters, {shape}'


def export(source, out):
    """Write a ckpt.pt, or the best weights of a run, to the folder `out`, complete or not; return who reads it."""
    source = Path(source, 'best.pt') if Path(source, 'best.pt').is_file() else source
    checkpoint = checkpoints.load(source, mmap=True)
    architecture, config = checkpoint['architecture'], ModelConfig(**checkpoint['model_config'])
    weights = checkpoints.weights_of(checkpoint)
    family, c = families.family_of(architecture, config)
    c = c or {'model_type': families.NATIVE, 'architecture': architecture, 'model_config': vars(config)}
    rows, size = config.padded_vocab_size, config.vocab_size
    if family:  # the vocabulary as it came, without padding and without our tokens where they are last
        added = 2 if {config.mask_id, config.ignore_id} == {size - 2, size - 1} else 0
        rows = c['vocab_size'] = config.pretrained_rows or size - added

    c.update(start_token=checkpoint.get('start_token'), prompt_format=checkpoint.get('prompt_format'))
    settings = checkpoint.get('train_config', {})  # by which evaluate.py chooses its rows
    rows_of = {key: settings[key] for key in ('block_size', 'mode') if settings.get(key)}
    c['trained_here'] = rows_of or pretrained.is_ours(checkpoint)
    c['torch_dtype'] = str(next(iter(weights.values())).dtype).removeprefix('torch.')

    folder = out.with_name(f'.{out.name}.partial')
    shutil.rmtree(folder, ignore_errors=True)
    with files.writing(out), ExitStack() as on_failure:
        on_failure.callback(shutil.rmtree, folder, ignore_errors=True)  # half of it would keep the disk full
        folder.mkdir()
        save_torch_state_dict(in_family(weights, family, rows), folder, max_shard_size=SHARD_BYTES)
        if checkpoint['tokenizer'] is not None:
            c.update(write_tokenizer(checkpoint, folder, rows if family else None))
        files.write_json(folder / 'config.json', c)
        for path in folder.glob('*.safetensors'):
            shutil.copymode(folder / 'config.json', path)  # safetensors keeps others from reading
        on_failure.pop_all()
    files.keep_others(out, folder, READ_WITH_A_MODEL)
    shutil.rmtree(out, ignore_errors=True)  # with --overwrite
    folder.rename(out)

    readers = f'for these scripts ({families.NATIVE!r}, {architecture}); transformers cannot read it'
    if family:
        left_out = f', without the {size - rows} that were added ({MASK}, {IGNORE})' * (size > rows)
        reader = 'transformers' if ARCHITECTURES[architecture].causal else 'the code of its authors'
        readers = f'of the family {family!r}, for {reader}; {rows} tokens{left_out}'
    lost = '; the head of the classifier is not in it' * ('head_state_dict' in checkpoint)
    return f'{source}, {readers}{lost}.'


def in_family(weights, family, rows):
    """Return a state dict in the names and layout of a family, with that many rows of the vocabulary."""
    parts = {}  # name there: our tensors, three of them where q, k and v are one
    for name, tensor in weights.items():
        hf_name, _, transposed = families.hf_name(name, family)
        tensor = tensor[:rows] if name in ('embedding.weight', 'unembedding.weight') else tensor
        if tensor.nbytes < tensor.untyped_storage().nbytes():  # a view, which save_torch_state_dict refuses
            tensor = tensor.clone()
        parts.setdefault(hf_name, []).append(tensor.T if transposed else tensor)
    return {name: torch.cat(some, -1) if len(some) > 1 else some[0] for name, some in parts.items()}


def write_tokenizer(checkpoint, folder, rows):
    """Write the tokenizer, of a family its first `rows` tokens, without <|mask|> and <|ignore|>, else (None)
    all, and which tokens begin and end a text; return the ids of these for config.json."""
    tokenizer = Tokenizer(checkpoint['tokenizer'], start=checkpoint.get('start_token'))
    came_with, name_of = checkpoint.get('came_with') or {}, tokenizer.inner.id_to_token
    added = {MASK, IGNORE}.intersection(came_with.get('added_tokens', (MASK, IGNORE)))
    text = tokenizer.to_json() if rows is None else without_own_tokens(tokenizer.to_json(), rows, added)
    files.save_atomically(folder / 'tokenizer.json', lambda file: file.write(text.encode()))
    start, end, form = tokenizer.start_id, tokenizer.endoftext_id, checkpoint.get('prompt_format')
    if came_with.get('bos_token') is not None and (not form or chat.is_chat_template(form)):
        start = came_with['bos_token']  # a format of ours begins with what it was trained with
    settings = {**came_with.get('tokenizer_config', {}), 'tokenizer_class': 'PreTrainedTokenizerFast'}
    settings |= {'bos_token': name_of(start), 'eos_token': name_of(end)}
    ends = [token for token in prompts.stop_tokens(checkpoint, tokenizer) if rows is None or token < rows]
    ids = {'bos_token_id': start, 'eos_token_id': ends if len(ends) > 1 else end}
    if tokenizer.ignore_id == end:  # of a released diffusion model
        ids['mask_token_id'], settings['mask_token'] = tokenizer.mask_id, name_of(tokenizer.mask_id)
    if form:
        settings['chat_template'] = prompts.chat_template(form, tokenizer)
    if (pad := came_with.get('pad_token')) is not None:
        ids['pad_token_id'], settings['pad_token'] = pad, name_of(pad)
    files.write_json(folder / 'tokenizer_config.json', settings)
    files.write_json(folder / 'generation_config.json', ids)
    return ids


def without_own_tokens(text, rows, added):
    """Return a tokenizer.json as it came: without the tokens `added` and the template that we added."""
    tokenizer = json.loads(text)
    tokens = [token for token in tokenizer['added_tokens'] if token['id'] < rows]
    tokenizer['added_tokens'] = [token for token in tokens if token['content'] not in added]
    if recorded_in(tokenizer['post_processor']):
        own = [part for part in tokenizer['post_processor']['processors'] if not is_record(part)]
        several = {'type': 'Sequence', 'processors': own}
        tokenizer['post_processor'] = several if len(own) > 1 else own[0] if own else None
    return json.dumps(tokenizer, ensure_ascii=False)


def merge_adapter(source, base, out, token=None, revision=None):
    """Write a checkpoint with an adapter merged into its weights; return in words what it is."""
    checkpoint = checkpoints.load(base, token, revision)
    config, path = lora.read_config(source), Path(base).resolve()
    has_it = 'adapter_state_dict' in checkpoint and Path(source).resolve().parent in (path, path.parent)
    remedy = f'export it, or give the base {config.get("base_model_name_or_path")}'
    require(not has_it, f'{base} has {source} merged in already; {remedy}.')
    blocks = {key: config[key] for key in lora.BLOCKS if key in config}
    architecture = config.get('architecture', checkpoint['architecture'])
    checkpoint = checkpoints.convert(checkpoint, base, architecture, **blocks)
    model = checkpoints.load_model(checkpoint, 'cpu')
    lora.load_adapter(model, source)
    lora.merge(model)
    kept = {key: value for key, value in checkpoint.items() if not key.endswith('_state_dict')}
    kept['prompt_format'] = config.get('prompt_format') or checkpoint.get('prompt_format')
    kept['start_token'] = config.get('start_token', checkpoint['start_token'])
    rows_of = {'block_size': config['block_size']} if 'block_size' in config else {}
    kept['train_config'] = {**checkpoint.get('train_config', {}), **rows_of}
    checkpoints.save(out, {**kept, 'model_state_dict': model.state_dict()})
    return f'{base} with {source} merged in float32.'


COMMANDS = {  # function, its source, options
    'import': (import_model, 'a folder or hub id', 'out overwrite token revision'),
    'export': (export, 'a ckpt.pt, or a run folder: its best.pt', 'out overwrite'),
    'merge': (merge_adapter, 'an adapter folder', 'base out overwrite token revision'),
    'consolidate': (sharded.consolidate, 'the folder of a stopped run with fsdp=True', ''),
}
OPTIONS = {  # of a link what it leads to
    'out': dict(type=lambda text: Path(expanduser(text)).resolve(), required=True, help='what to write'),
    'overwrite': dict(action='store_true', help='replace what is there'),
    'base': dict(type=expanduser, required=True, help='what the adapter was trained on'),
    'token': dict(help='of the hub; without it, what `hf auth login` keeps'),
    'revision': dict(help='a branch, tag or commit of the hub'),
}


def main(words=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest='command', required=True)
    for name, (_, source, options) in COMMANDS.items():
        command = commands.add_parser(name)
        command.add_argument('source', type=expanduser, help=source)
        for option in options.split():
            command.add_argument(f'--{option}', **OPTIONS[option])
    args = vars(parser.parse_args(words))
    name, out, overwrite = args.pop('command'), args.get('out'), args.pop('overwrite', False)
    if out:
        files.require_folder(out)
    if out and out.exists():
        kind = 'exported model' if name == 'export' else 'checkpoint'
        is_of_kind = checkpoints.is_pretrained(out) if name == 'export' else out.is_file()
        require(is_of_kind, f'{out} is there and no {kind}; choose another --out.')
        require(overwrite, f'{out} is already there; replace it with --overwrite.')
    if result := COMMANDS[name][0](**args):
        print(f'{out}: {result}')


if __name__ == '__main__':
    main()
