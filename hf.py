"""Hugging Face checkpoints in and out, adapters merged into their base, models sent to the hub.

    python hf.py import FOLDER_OR_HUB_ID --out=ckpt.pt
    python hf.py export ckpt.pt --out=FOLDER
    python hf.py merge ADAPTER_FOLDER --base=ckpt.pt --out=merged.pt
    python hf.py push RUN_FOLDER --hub_model_id=owner/name --dry_run
    python hf.py consolidate RUN_FOLDER     # of a run with fsdp=True that was stopped

The families that it knows are in lm/families.py. Every other model exports as the family 'diffusion-lm', which only
these scripts read.
"""

import argparse
import json
import re
import shutil
import tempfile
from pathlib import Path

import safetensors.torch
import torch
from huggingface_hub import HfApi, ModelCardData, split_torch_state_dict_into_shards

from lm import checkpoints, families, files, lora, pretrained, sharded
from lm.configurator import UserError, no_remote_code, require
from lm.tokenizer import IGNORE, MASK, Tokenizer, end_in
from model import ARCHITECTURES, ModelConfig

SHARD_BYTES = 5 * 10**9  # of an exported file, at most

# ---------------------------------------------------------------------------- import, export, merge


def import_model(source, out, token=None, revision=None):
    """Write a Hugging Face folder or hub id as a ckpt.pt; return in words what it is."""
    checkpoint = pretrained.load(source, token, revision)
    checkpoints.save(out, checkpoint)
    config = ModelConfig(**checkpoint['model_config'])
    added = max(0, config.vocab_size - (config.pretrained_rows or config.vocab_size))
    tokens = f'{config.vocab_size} tokens' + (f', {added} of them added here' if added else '')
    size = f'{num_parameters(checkpoint):,} parameters, {config.n_layer} layers × {config.n_embd}'
    return f'{checkpoint["architecture"]}, {size}, rows of up to {config.block_size}, {tokens}'


def num_parameters(checkpoint):
    return sum(tensor.numel() for tensor in checkpoint['model_state_dict'].values())


def export(source, out):
    """Write a ckpt.pt or run folder to the folder `out`, complete or not at all; return who reads it."""
    checkpoint = checkpoints.load(source, mmap=True)
    architecture, config = checkpoint['architecture'], ModelConfig(**checkpoint['model_config'])
    weights = checkpoint.get('ema_state_dict') or checkpoint['model_state_dict']
    odd = pretrained.shapes_of(ARCHITECTURES[architecture], config).keys() ^ weights.keys()
    odd = ', '.join(sorted(odd)[:3])
    require(not odd, f'{source} holds other weights than those of its model ({odd}); merge its adapter.')
    family, c = families.family_of(architecture, config)
    c = c or {'model_type': families.NATIVE, 'architecture': architecture, 'model_config': vars(config)}
    rows = config.padded_vocab_size
    if family:  # the vocabulary as it came, without padding and without our tokens where they are last
        last = {config.vocab_size - 2, config.vocab_size - 1}
        ours = 2 if {config.mask_id, config.ignore_id} == last else 0
        rows = c['vocab_size'] = config.pretrained_rows or config.vocab_size - ours

    folder = out.with_name(out.name + '.tmp')
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_weights(weights, folder, family, rows)
    c.update(write_tokenizer(checkpoint, folder, rows if family else None))
    c['torch_dtype'] = str(next(iter(weights.values())).dtype).removeprefix('torch.')
    files.write_json(folder / 'config.json', c)
    shutil.rmtree(out, ignore_errors=True)  # with --overwrite
    folder.rename(out)

    if not family:
        kind = f'of our own family {families.NATIVE!r} (architecture={architecture})'
        return f'{kind}, which transformers cannot read; these scripts read it as a checkpoint.'
    added = config.vocab_size - rows
    left_out = f', without the {added} that were added ({MASK}, {IGNORE})' if added > 0 else ''
    return f'of the family {family!r}, for transformers; {rows} tokens{left_out}.'


def write_weights(weights, folder, family, rows):
    """Write the weights as safetensors in the names and layout of a family, with an index if needed."""
    parts = {}  # name there: our tensors, three of them where q, k and v are one
    for name, tensor in weights.items():
        hf_name, _, transposed = families.hf_name(name, family)
        tensor = tensor[:rows] if name in ('embedding.weight', 'unembedding.weight') else tensor
        parts.setdefault(hf_name, []).append(tensor.T if transposed else tensor)
    tensors = {name: torch.cat(some, -1) if len(some) > 1 else some[0] for name, some in parts.items()}

    on_meta = {name: tensor.to('meta') for name, tensor in tensors.items()}
    plan = split_torch_state_dict_into_shards(on_meta, max_shard_size=SHARD_BYTES)
    for file, names in plan.filename_to_tensors.items():  # copies are made for one file at a time
        part = {name: tensors[name].contiguous() for name in names}
        safetensors.torch.save_file(part, folder / file, metadata={'format': 'pt'})
    if plan.is_sharded:
        index = {'metadata': plan.metadata, 'weight_map': plan.tensor_to_filename}
        files.write_json(folder / 'model.safetensors.index.json', index)


def write_tokenizer(checkpoint, folder, rows):
    """Write the tokenizer and where a text begins and ends; return keys of config.json that say it.

    rows: of a family's vocabulary, which <|mask|> and <|ignore|> are no part of; None: they stay.
    """
    start = checkpoint.get('start_token')
    keys = {'start_token': start, 'prompt_format': checkpoint.get('prompt_format')}
    if checkpoint['tokenizer'] is None:
        return keys

    tokenizer = Tokenizer(checkpoint['tokenizer'])
    end, text = tokenizer.endoftext_id, tokenizer.to_json()
    start = end if start is None or tokenizer.decode([start]) else start  # has to be a special token
    text = text if rows is None else without_own_tokens(text, rows)
    (folder / 'tokenizer.json').write_text(text, encoding='utf-8')
    names = {'bos_token': tokenizer.name_of(start), 'eos_token': tokenizer.name_of(end)}
    ids = {'bos_token_id': start, 'eos_token_id': end}
    files.write_json(
        folder / 'tokenizer_config.json', {'tokenizer_class': 'PreTrainedTokenizerFast', **names}
    )
    files.write_json(folder / 'generation_config.json', ids)
    return {**keys, **ids}


def without_own_tokens(text, rows):
    """Return a tokenizer.json as it came: without the tokens and the template that we added."""
    tokenizer = json.loads(text)
    tokens = [token for token in tokenizer['added_tokens'] if token['id'] < rows]
    tokenizer['added_tokens'] = [token for token in tokens if token['content'] not in (MASK, IGNORE)]
    if end_in(tokenizer['post_processor']) is not None:
        own = tokenizer['post_processor']['processors'][:-1]
        tokenizer['post_processor'] = own[0] if own else None
    return json.dumps(tokenizer, ensure_ascii=False)


@torch.no_grad()
def merge_adapter(source, base, out, token=None, revision=None):
    """Write a checkpoint with an adapter merged into its weights; return in words how exact it is."""
    checkpoint = checkpoints.load(base, token, revision)
    if architecture := lora.read_config(source).get('architecture'):
        checkpoint = checkpoints.convert(checkpoint, base, architecture)
    model = checkpoints.load_model(checkpoint, 'cpu')
    lora.load_adapter(model, source)

    shape = 4, min(64, model.config.block_size)
    tokens = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    before = model.logits(tokens)
    lora.merge(model)
    difference = (model.logits(tokens) - before)[before.isfinite()].abs().max().item()
    kept = {key: value for key, value in checkpoint.items() if not key.endswith('_state_dict')}
    checkpoints.save(out, {**kept, 'model_state_dict': model.state_dict()})
    return f'{base} with {source} merged in float32; its logits differ by {difference:.1e} at most.'


# ---------------------------------------------------------------------------- push


def push(source, hub_model_id, token=None, private=False, dry_run=False):
    """Send a ckpt.pt, or the best weights of a run folder, to the hub with a model card.

    It is one commit to the model, which is made where it does not exist; nothing is deleted there. dry_run: only show
    what would be sent.
    """
    check_name(hub_model_id)
    source = Path(source)
    path = source / 'best.pt' if (source / 'best.pt').is_file() else source
    place = source if source.is_dir() else source.parent
    with tempfile.TemporaryDirectory(dir=place, prefix='push-') as parent:
        folder = Path(parent) / 'model'
        description = export(path, folder)
        card = model_card(checkpoints.load(path, mmap=True), hub_model_id)
        (folder / 'README.md').write_text(card, encoding='utf-8')
        if dry_run:
            sent = [f'{file.stat().st_size:>15,}  {file.name}' for file in sorted(folder.iterdir())]
            print(f'{hub_model_id} would get {path}, {description}', *sent, card, sep='\n')
            return

        def upload(hub):
            hub.create_repo(hub_model_id, private=private, exist_ok=True)
            message = f'The model of {path.name}'
            hub.upload_folder(repo_id=hub_model_id, folder_path=folder, commit_message=message)

        ask_hub(upload, token, f'{hub_model_id} got nothing')
        print(f'{hub_model_id} on the hub: {path}, {description}')


def check_hub(hub_model_id, token=None):
    """Raise a UserError where a run that is to end with an upload could not, before it trains."""
    check_name(hub_model_id)
    ask_hub(lambda hub: hub.whoami(), token, 'The run is to end on the hub, which does not know you')


def check_name(hub_model_id):
    is_name = re.fullmatch(r'[\w.-]+/[\w.-]+', hub_model_id or '')
    require(is_name, f'hub_model_id is {hub_model_id!r}; give a name as --hub_model_id=owner/name.')


def ask_hub(request, token, failure):
    """Call request(HfApi); all the ways in which a network and a service fail become a UserError."""
    try:
        request(HfApi(token=token or None))
    except Exception as error:  # the client's, the network's and httpx' own errors have no common class
        raise UserError(
            f'{failure} ({pretrained.first_line(error)}). Log in with `hf auth login`, see that the hub can '
            'be reached, and send a finished run by: python hf.py push RUN --hub_model_id=owner/name'
        ) from error


BOUNDS = {'exact': '', 'upper': ' (an upper bound)', 'none': ' (no bound)'}
# Settings that say nothing about the model, or name files and folders of the machine that made it.
NOT_ON_THE_CARD = (
    'out_dir run_suffix overwrite resume_from save_every save_total_limit no_wandb wandb_project '
    'wandb_run_name log_every num_samples sample_tokens sample_every push_to_hub hub_model_id '
    'trust_remote_code device compile'
).split()


def model_card(checkpoint, name):
    """Return the README.md of a model on the hub: what it is, how it was made, how good it is."""
    settings, architecture = checkpoint['train_config'], ARCHITECTURES[checkpoint['architecture']]
    family, _ = families.family_of(architecture, ModelConfig(**checkpoint['model_config']))
    base, data = settings.get('init_from') or 'scratch', settings.get('dataset')
    head = ModelCardData(
        library_name='transformers' if family else families.NATIVE,
        pipeline_tag='text-generation',
        tags=[families.NATIVE, checkpoint['architecture']],
        base_model=base if on_the_hub(base) else None,
    )
    origin = 'trained from random weights' if base == 'scratch' else f'tuned from {public(base)}'
    origin += f' on {public(data)}' if data else ''
    size = f'{num_parameters(checkpoint):,} parameters'
    parts = [
        f'---\n{head.to_yaml()}\n---\n\n# {name.split("/")[1]}',
        f'A language model ({architecture.description}) of {size}, {origin}.',
        f"Read it with `AutoModelForCausalLM.from_pretrained('{name}')` of transformers."
        if family
        else f'Sample from it with `python sample.py --checkpoint={name}`; transformers cannot read it.',
    ]
    if checkpoint.get('prompt_format'):
        parts.append(f'A prompt (`--chat`) is written as\n\n```\n{checkpoint["prompt_format"]}\n```')
    if checkpoint.get('best_val_loss') is not None:
        loss = f'{checkpoint["best_val_loss"]:.4f} nats per token{BOUNDS[architecture.bound]}'
        parts.append(f'It has {loss} on held-out examples, at step {checkpoint["best_step"]}.')
    shown = {key: value for key, value in settings.items() if key not in NOT_ON_THE_CARD}
    rows = [f'{key} = {public(value)!r}' for key, value in shown.items() if value not in ('', None)]
    if rows:
        parts.append('\n'.join(['Settings:\n\n```', *rows, '```']))
    return '\n\n'.join(parts) + '\n'


def on_the_hub(base):
    return '/' in base and checkpoints.is_pretrained(base) and not Path(base).exists()


def public(value):
    """Return a setting as everybody may read it: of a path only its name."""
    return Path(value).name if isinstance(value, str) and '/' in value and not on_the_hub(value) else value


# ---------------------------------------------------------------------------- the command line

COMMANDS = {  # function, its source, options
    'import': (import_model, 'a folder or hub id', 'out overwrite token revision trust_remote_code'),
    'export': (export, 'a ckpt.pt or run folder', 'out overwrite'),
    'merge': (merge_adapter, 'an adapter folder', 'base out overwrite token revision trust_remote_code'),
    'push': (push, 'a ckpt.pt, or a run folder: its best.pt', 'hub_model_id token private dry_run'),
    'consolidate': (sharded.consolidate, 'the folder of a stopped run with fsdp=True', ''),
}
OPTIONS = {
    'out': dict(type=Path, required=True, help='what to write'),
    'overwrite': dict(action='store_true', help='replace what is there'),
    'base': dict(required=True, help='what the adapter was trained on'),
    'token': dict(help='of the hub; without it, what `hf auth login` keeps'),
    'revision': dict(help='a branch, tag or commit of the hub'),
    'trust_remote_code': dict(nargs='?', const='True', default='False', help='refused'),
    'hub_model_id': dict(required=True, help='owner/name'),
    'private': dict(action='store_true', help='where the model is new there'),
    'dry_run': dict(action='store_true', help='show what would be sent, and send nothing'),
}


def main(words=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest='command', required=True)
    for name, (_, source, options) in COMMANDS.items():
        command = commands.add_parser(name)
        command.add_argument('source', help=source)
        for option in options.split():
            command.add_argument(f'--{option}', **OPTIONS[option])

    args = vars(parser.parse_args(words))
    name = args.pop('command')
    no_remote_code(args.pop('trust_remote_code', 'False').lower() != 'false')
    if 'out' in args:
        check_output(args['out'], args.pop('overwrite'), name == 'export')
    result = COMMANDS[name][0](**args)
    if result:
        print(f'{args["out"]}: {result}')


def check_output(out, overwrite, is_folder):
    """Raise a UserError where something stands in the way of what is to be written."""
    parent = out.absolute().parent.is_dir()
    require(parent, f'--out={out} lies in a folder that does not exist; make it, or choose another path.')
    free = is_folder or not out.is_dir()
    require(free, f'--out={out} is a folder; give the path of the ckpt.pt to write.')
    free = not is_folder or not out.exists() or (out / 'config.json').is_file()
    require(free, f'{out} is there and no exported model; choose another --out.')
    free = overwrite or not out.exists()
    require(free, f'{out} is already there; replace it with --overwrite, or choose another --out.')


if __name__ == '__main__':
    main()
