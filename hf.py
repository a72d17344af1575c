"""Hugging Face checkpoints in and out, adapters merged into their base, models sent to the hub.

    python hf.py import FOLDER_OR_HUB_ID --out=ckpt.pt
    python hf.py export ckpt.pt --out=FOLDER
    python hf.py merge ADAPTER_FOLDER --base=ckpt.pt --out=merged.pt
    python hf.py push RUN_FOLDER --hub_model_id=owner/name --dry_run
    python hf.py consolidate RUN_FOLDER     # of a run with fsdp=True that was stopped

The families that it knows are in lm/families.py; others export as 'diffusion-lm', for these scripts only.
"""

import argparse
import json
import re
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
from huggingface_hub import HfApi, ModelCardData, save_torch_state_dict

from lm import checkpoints, families, files, lora, pretrained, prompts, runtime, sharded
from lm.configurator import UserError, require
from lm.tokenizer import IGNORE, MASK, Tokenizer, end_in
from model import ARCHITECTURES, ModelConfig

SHARD_BYTES = 5 * 10**9  # of an exported file, at most


def import_model(source, out, token=None, revision=None):
    """Write a Hugging Face folder or hub id as a ckpt.pt; return in words what it is."""
    checkpoint = pretrained.load(source, token, revision)
    checkpoints.save(out, checkpoint)
    c, size = ModelConfig(**checkpoint['model_config']), num_parameters(checkpoint)
    shape = f'{c.n_layer} layers × {c.n_embd}, rows of up to {c.block_size}, {c.vocab_size} tokens'
    return f'{checkpoint["architecture"]}, {size:,} parameters, {shape}'


def num_parameters(checkpoint):
    return sum(tensor.numel() for tensor in checkpoint['model_state_dict'].values())


def export(source, out):
    """Write a ckpt.pt, or the best weights of a run folder, to the folder `out`, complete or not; return who reads it."""
    source = best_of(source)
    checkpoint = checkpoints.load(source, mmap=True)
    architecture, config = checkpoint['architecture'], ModelConfig(**checkpoint['model_config'])
    weights = checkpoints.weights_of(checkpoint)
    family, c = families.family_of(architecture, config)
    c = c or {'model_type': families.NATIVE, 'architecture': architecture, 'model_config': vars(config)}
    rows, size = config.padded_vocab_size, config.vocab_size
    if family:  # the vocabulary as it came, without padding and without our tokens where they are last
        added = 2 if {config.mask_id, config.ignore_id} == {size - 2, size - 1} else 0
        rows = c['vocab_size'] = config.pretrained_rows or size - added

    folder = out.with_name(out.name + '.tmp')
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        with files.writing(out):
            save_torch_state_dict(in_family(weights, family, rows), folder, max_shard_size=SHARD_BYTES)
    except UserError:
        shutil.rmtree(folder)  # half of it would keep the disk full
        raise
    c.update(start_token=checkpoint.get('start_token'), prompt_format=checkpoint.get('prompt_format'))
    if checkpoint['tokenizer'] is not None:
        c.update(write_tokenizer(checkpoint, folder, rows if family else None))
    c['torch_dtype'] = str(next(iter(weights.values())).dtype).removeprefix('torch.')
    files.write_json(folder / 'config.json', c)
    shutil.rmtree(out, ignore_errors=True)  # with --overwrite
    folder.rename(out)

    readers = f'for these scripts ({families.NATIVE!r}, {architecture}); transformers cannot read it'
    if family:
        left_out = f', without the {size - rows} that were added ({MASK}, {IGNORE})' if size > rows else ''
        readers = f'of the family {family!r}, for transformers; {rows} tokens{left_out}'
    return f'{source}, {readers}.'


def best_of(source):
    """Return the best.pt of a run folder that has one; any other source as it is."""
    return Path(source, 'best.pt') if Path(source, 'best.pt').is_file() else source


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
    text = tokenizer.to_json()
    text = text if rows is None else without_own_tokens(text, rows, added)
    files.save_atomically(folder / 'tokenizer.json', lambda file: file.write(text.encode()))
    start, end = tokenizer.start_id, tokenizer.endoftext_id
    settings = {**came_with.get('tokenizer_config', {}), 'tokenizer_class': 'PreTrainedTokenizerFast'}
    settings |= {'bos_token': name_of(start), 'eos_token': name_of(end)}
    ends = [token for token in prompts.stop_tokens(checkpoint, tokenizer) if rows is None or token < rows]
    ids = {'bos_token_id': start, 'eos_token_id': ends if len(ends) > 1 else end}
    if form := checkpoint.get('prompt_format'):
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
    if end_in(tokenizer['post_processor']) is not None:
        own = tokenizer['post_processor']['processors'][:-1]
        several = {'type': 'Sequence', 'processors': own}
        tokenizer['post_processor'] = several if len(own) > 1 else own[0] if own else None
    return json.dumps(tokenizer, ensure_ascii=False)


def merge_adapter(source, base, out, token=None, revision=None):
    """Write a checkpoint with an adapter merged into its weights; return in words what it is."""
    checkpoint = checkpoints.load(base, token, revision)
    config = lora.read_config(source)
    if architecture := config.get('architecture'):
        checkpoint = checkpoints.convert(checkpoint, base, architecture)
    model = checkpoints.load_model(checkpoint, 'cpu')
    lora.load_adapter(model, source)
    lora.merge(model)
    kept = {key: value for key, value in checkpoint.items() if not key.endswith('_state_dict')}
    kept['prompt_format'] = config.get('prompt_format') or checkpoint.get('prompt_format')
    checkpoints.save(out, {**kept, 'model_state_dict': model.state_dict()})
    return f'{base} with {source} merged in float32.'


def push(source, hub_model_id, token=None, private=False, dry_run=False):
    """Send a ckpt.pt, or the best weights of a run folder, to the hub with a model card, as one commit;
    the model is made where there is none, and nothing is deleted. dry_run: show what would be sent."""
    check_name(hub_model_id)
    path = Path(best_of(source))
    card = model_card(checkpoints.load(path, mmap=True), hub_model_id)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix='push-') as parent:
        folder = Path(parent) / 'model'
        description = export(path, folder)
        (folder / 'README.md').write_text(card, encoding='utf-8')
        if dry_run:
            sent = [f'{file.stat().st_size:>15,}  {file.name}' for file in sorted(folder.iterdir())]
            print(f'{hub_model_id} would get {description}', *sent, card, sep='\n')
            return
        with hub(token, f'{hub_model_id} got nothing') as api:
            api.create_repo(hub_model_id, private=private, exist_ok=True)
            message = f'The model of {path.name}'
            api.upload_folder(repo_id=hub_model_id, folder_path=folder, commit_message=message)
        print(f'{hub_model_id} on the hub: {description}')


def check_hub(hub_model_id, token=None):
    """Raise a UserError where a run that is to end with an upload could not, before it trains."""
    check_name(hub_model_id)
    with hub(token, 'The run is to end on the hub, which does not know you') as api:
        api.whoami()


def check_name(hub_model_id):
    is_name = re.fullmatch(r'[\w.-]+/[\w.-]+', hub_model_id or '')
    require(is_name, f'hub_model_id is {hub_model_id!r}; give a name as --hub_model_id=owner/name.')


@contextmanager
def hub(token, failure):
    """Yield an HfApi; all the ways in which a network and a service fail become a UserError."""
    remedy = 'log in with `hf auth login`, and send a finished run by `python hf.py push`'
    with files.as_sentence(failure, remedy):
        yield HfApi(token=token or None)


# Names of the machine and its accounts; paths are left out as well.
NOT_ON_THE_CARD = 'out_dir resume_from wandb_project wandb_run_name no_wandb hub_model_id push_to_hub'.split()


def model_card(checkpoint, name):
    """Return the README.md of a model on the hub: what it is, how it was made, how good it is."""
    settings, architecture = checkpoint['train_config'], ARCHITECTURES[checkpoint['architecture']]
    family, _ = families.family_of(architecture, ModelConfig(**checkpoint['model_config']))
    base, data = settings.get('init_from') or '', settings.get('dataset')
    on_the_hub = '/' in base and checkpoints.is_pretrained(base) and not Path(base).exists()
    library = 'transformers' if family else families.NATIVE
    tags = [families.NATIVE, checkpoint['architecture']]
    head = ModelCardData(library_name=library, tags=tags, base_model=base if on_the_hub else None)
    size, loss = num_parameters(checkpoint), checkpoint.get('best_val_loss')
    trained = f', trained on {Path(data).name}' if data else ''
    quality = ''
    if loss is not None:
        quality = f'Best val/loss: {loss:.4f} nats per token, {runtime.describe_loss(architecture)}.'
    shown = {k: v for k, v in settings.items() if k not in NOT_ON_THE_CARD and '/' not in str(v)}
    rows = [f'{key} = {value!r}' for key, value in shown.items() if value not in ('', None)]
    title = f'---\n{head.to_yaml()}\n---\n\n# {name.split("/")[1]}'
    kind = f'A language model ({architecture.description}) of {size:,} parameters{trained}.'
    usage, table = f'    python sample.py --checkpoint={name}', '\n'.join(['```', *rows, '```'])
    return '\n\n'.join([title, kind, usage, quality, table]) + '\n'


COMMANDS = {  # function, its source, options
    'import': (import_model, 'a folder or hub id', 'out overwrite token revision'),
    'export': (export, 'a ckpt.pt, or a run folder: its best.pt', 'out overwrite'),
    'merge': (merge_adapter, 'an adapter folder', 'base out overwrite token revision'),
    'push': (push, 'a ckpt.pt, or a run folder: its best.pt', 'hub_model_id token private dry_run'),
    'consolidate': (sharded.consolidate, 'the folder of a stopped run with fsdp=True', ''),
}
OPTIONS = {
    'out': dict(type=Path, required=True, help='what to write'),
    'overwrite': dict(action='store_true', help='replace what is there'),
    'base': dict(required=True, help='what the adapter was trained on'),
    'token': dict(help='of the hub; without it, what `hf auth login` keeps'),
    'revision': dict(help='a branch, tag or commit of the hub'),
    'hub_model_id': dict(required=True, help='owner/name'),
    'private': dict(action='store_true', help='where the model is new there'),
    'dry_run': dict(action='store_true', help='show what would be sent, and send nothing'),
}


def main(words=None):
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    commands = parser.add_subparsers(dest='command', required=True)
    for name, (_, source, options) in COMMANDS.items():
        command = commands.add_parser(name)
        command.add_argument('source', help=source)
        for option in options.split():
            command.add_argument(f'--{option}', **OPTIONS[option])
    args = vars(parser.parse_args(words))
    name, out = args.pop('command'), args.get('out')
    if out:
        missing = not out.absolute().parent.is_dir()
        require(not missing, f'--out={out} lies in a folder that does not exist; make it, or choose another.')
        kind, file = ('exported model', out / 'config.json') if name == 'export' else ('checkpoint', out)
        require(file.is_file() or not out.exists(), f'{out} is there and no {kind}; choose another --out.')
        overwrite = args.pop('overwrite')
        require(overwrite or not out.exists(), f'{out} is already there; replace it with --overwrite.')
    if result := COMMANDS[name][0](**args):
        print(f'{out}: {result}')


if __name__ == '__main__':
    main()
