"""Hugging Face checkpoints in and out, and adapters merged into their base.

    python hf.py import FOLDER_OR_HUB_ID --out=ckpt.pt
    python hf.py export ckpt.pt --out=FOLDER
    python hf.py merge ADAPTER_FOLDER --base=ckpt.pt --out=merged.pt
    python hf.py push RUN_FOLDER --hub_model_id=owner/name --dry_run
    python hf.py consolidate RUN_FOLDER     # of a run with fsdp=True that was stopped

The families that it knows are in families.py. Every other model of ours exports as the family 'diffusion-lm',
which only these scripts read. How a folder becomes a checkpoint is in pretrained.py.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

import safetensors.torch
import torch

from lm import checkpoints, data, families, files, hub, lora, pretrained
from lm.configurator import UserError, no_remote_code
from model import ModelConfig

SHARD_BYTES = 5 * 10**9  # of an exported file, at most


# ---------------------------------------------------------------------------- out


def export(checkpoint, folder, family, c):
    """Writes a checkpoint as a folder: as `family` with config.json `c`, or natively where that is None."""
    config = ModelConfig(**checkpoint['model_config'])
    weights = checkpoint.get('ema_state_dict') or checkpoint['model_state_dict']
    rows = config.padded_vocab_size if family is None else kept_rows(config)
    folder.mkdir(parents=True)
    if family is None:
        c = {
            'model_type': families.NATIVE,
            'architecture': checkpoint['architecture'],
            'model_config': vars(config),
        }
        plan = {name: [name] for name in weights}
    else:
        c = {**c, 'architectures': [families.CLASSES[family]], 'vocab_size': rows}
        plan = {}
        for name in weights:
            plan.setdefault(families.their_name(name, family)[0], []).append(name)
    write_tokenizer(checkpoint, folder, c, None if family is None else rows)
    shards = share_out(plan, weights)
    names = [
        f'model-{i:05}-of-{len(shards):05}.safetensors' if len(shards) > 1 else 'model.safetensors'
        for i in range(1, 1 + len(shards))
    ]
    for file, part in zip(names, shards):  # what has to be copied is in memory for one shard at a time
        safetensors.torch.save_file(
            {
                theirs: joined([weights[name] for name in ours], ours, family, rows)
                for theirs, ours in part.items()
            },
            folder / file,
            metadata={'format': 'pt'},
        )
    if len(shards) > 1:
        total = sum(size_of(weights, ours) for ours in plan.values())
        places = {theirs: file for file, part in zip(names, shards) for theirs in part}
        files.write_json(
            folder / 'model.safetensors.index.json', {'metadata': {'total_size': total}, 'weight_map': places}
        )
    dtype = next(iter(weights.values())).dtype
    files.write_json(folder / 'config.json', {**c, 'torch_dtype': str(dtype).removeprefix('torch.')})
    return rows


def kept_rows(config):
    """Rows of the vocabulary as it came: without <|mask|> and <|ignore|>, where they are its last, and padding."""
    if config.pretrained_rows:
        return config.pretrained_rows
    added = {config.mask_id, config.ignore_id} == {config.vocab_size - 2, config.vocab_size - 1}
    return config.vocab_size - 2 * added


def joined(tensors, names, family, rows):
    """What a family keeps under one name, of our tensors; the vocabulary cut to its rows."""
    transposed = family is not None and families.their_name(names[0], family)[2]
    tensor = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
    tensor = tensor[:rows] if names[0] in ('embedding.weight', 'unembedding.weight') else tensor
    return (tensor.T if transposed else tensor).contiguous()


def size_of(weights, names):
    return sum(weights[name].numel() * weights[name].element_size() for name in names)


def share_out(plan, weights):
    """The plan in parts of at most SHARD_BYTES, one tensor at least in each."""
    shards, size = [{}], 0
    for theirs, ours in plan.items():
        if shards[-1] and size + size_of(weights, ours) > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][theirs] = ours
        size += size_of(weights, ours)
    return shards


def write_tokenizer(checkpoint, folder, c, rows):
    """tokenizer.json and what tells transformers where a text begins and ends; `c` gets the ids. rows: of a
    family's vocabulary, which <|mask|> and <|ignore|> are no part of; None: they stay."""
    start = checkpoint.get('start_token')
    c.update(start_token=start, prompt_format=checkpoint.get('prompt_format'))
    if checkpoint['tokenizer'] is None:
        return
    tokenizer = data.Tokenizer(checkpoint['tokenizer'])
    end = tokenizer.endoftext_id
    start = (
        end if start is None or tokenizer.decode([start]) else start
    )  # bos_token has to be a special token
    names = {kind: tokenizer.name_of(i) for kind, i in (('bos_token', start), ('eos_token', end))}
    text = tokenizer.to_json() if rows is None else without_own_tokens(tokenizer.to_json(), rows)
    (folder / 'tokenizer.json').write_text(text, encoding='utf-8')
    files.write_json(
        folder / 'tokenizer_config.json', {'tokenizer_class': 'PreTrainedTokenizerFast', **names}
    )
    c.update(bos_token_id=start, eos_token_id=end)
    files.write_json(folder / 'generation_config.json', {'bos_token_id': start, 'eos_token_id': end})


def without_own_tokens(text, rows):
    """A tokenizer.json as it came: without the tokens and the template that data.Tokenizer added."""
    tokenizer = json.loads(text)
    tokenizer['added_tokens'] = [
        token
        for token in tokenizer['added_tokens']
        if token['id'] < rows and token['content'] not in (data.MASK, data.IGNORE)
    ]
    if data.end_in(tokenizer['post_processor']) is not None:
        own = tokenizer['post_processor']['processors'][:-1]
        tokenizer['post_processor'] = own[0] if own else None
    return json.dumps(tokenizer, ensure_ascii=False)


# ---------------------------------------------------------------------------- commands


def import_command(source, out, token=None, revision=None):
    checkpoint = pretrained.load(source, token, revision)
    checkpoints.save(out, checkpoint)
    config = checkpoint['model_config']
    count = sum(tensor.numel() for tensor in checkpoint['model_state_dict'].values())
    print(
        f'{out}: {checkpoint["architecture"]}, {count:,} parameters, {config["n_layer"]} layers × '
        f'{config["n_embd"]}, {config["vocab_size"]} tokens, rows of up to {config["block_size"]}'
    )
    added = config['vocab_size'] - (config['pretrained_rows'] or config['vocab_size'])
    if added > 0:
        print(
            f'{added} tokens were added to the vocabulary ({data.MASK}, {data.IGNORE}), with the mean of the '
            'embedding; export leaves them out again.'
        )


def export_command(source, out):
    beside = out.with_name(out.name + '.tmp')
    shutil.rmtree(beside, ignore_errors=True)
    said = export_checkpoint(source, beside)
    if out.exists():  # with --overwrite
        shutil.rmtree(out)
    os.replace(beside, out)
    print(f'{out}: {said}')


def export_checkpoint(source, folder):
    """Writes a ckpt.pt or run folder into a new folder, and returns in words who can read it."""
    checkpoint = checkpoints.load(source, mmap=True)
    config = ModelConfig(**checkpoint['model_config'])
    family, c = families.family_of(checkpoint['architecture'], config)
    with torch.device('meta'):
        expected = set(checkpoints.make_model(checkpoint['architecture'], **vars(config)).state_dict())
    if expected != set(checkpoint['model_state_dict']):
        odd = ', '.join(sorted(expected ^ set(checkpoint['model_state_dict']))[:3])
        raise UserError(
            f'{source} does not hold the plain weights of its model ({odd}, ...); merge its adapter first: '
            'python hf.py merge.'
        )
    rows = export(checkpoint, folder, family, c)
    if family is None:
        return (
            f'of our own family {families.NATIVE!r} (architecture={checkpoint["architecture"]}), which '
            'transformers cannot read; `python hf.py import`, and --init_from and --checkpoint of these scripts, '
            'can.'
        )
    left_out = config.vocab_size - rows
    return f'of the family {family!r}, for transformers and what reads its files; {rows} tokens' + (
        f', without the {left_out} that were added ({data.MASK}, {data.IGNORE}).' if left_out > 0 else '.'
    )


def push(source, hub_model_id, token=None, private=False, dry_run=False):
    """Sends a ckpt.pt, or the best weights of a run folder, to the hub as a folder with a model card.

    dry_run: only shows what would be sent.
    """
    hub.check_name(hub_model_id)
    source = Path(source)
    path = source / 'best.pt' if (source / 'best.pt').is_file() else source
    with tempfile.TemporaryDirectory(
        dir=source if source.is_dir() else source.parent, prefix='push-'
    ) as place:
        folder = Path(place) / 'model'
        said = export_checkpoint(path, folder)
        card = hub.model_card(checkpoints.load(path, mmap=True), hub_model_id)
        (folder / 'README.md').write_text(card, encoding='utf-8')
        if dry_run:
            print(f'{hub_model_id} would get {path}, {said}')
            hub.show(folder)
        else:
            hub.send(folder, hub_model_id, f'The model of {path.name}', token, private)
            print(f'{hub_model_id} on the hub: {path}, {said}')


@torch.no_grad()
def merge_command(adapter, base, out, token=None, revision=None):
    checkpoint = checkpoints.load(base, token, revision)
    if architecture := lora.read_config(adapter).get('architecture'):
        checkpoint = checkpoints.as_start(checkpoint, base, architecture)
    model = checkpoints.load_model(checkpoint, 'cpu')
    tokens = torch.randint(
        0,
        model.config.vocab_size,
        (4, min(64, model.config.block_size)),
        generator=torch.Generator().manual_seed(0),
    )
    lora.load_adapter(model, adapter)
    before = model.logits(tokens)
    lora.merge(model)
    difference = (model.logits(tokens) - before)[before.isfinite()].abs().max().item()
    kept = {key: value for key, value in checkpoint.items() if not key.endswith('_state_dict')}
    checkpoints.save(out, {**kept, 'model_state_dict': model.state_dict()})
    print(
        f'{out}: {base} with {adapter} in its weights, in float32; its logits differ from those with the adapter '
        f'beside them by {difference:.1e} at most.'
    )


def main(words=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest='command', required=True)
    for name, source in (
        ('import', 'a Hugging Face folder or hub id'),
        ('export', 'a ckpt.pt or run folder'),
        ('merge', "a folder with an adapter in PEFT's format"),
    ):
        command = commands.add_parser(name)
        command.add_argument('source', help=source)
        command.add_argument('--out', type=Path, required=True, help='what to write')
        command.add_argument('--overwrite', action='store_true', help='replace what is there')
        if name != 'export':
            command.add_argument('--token', help='of the hub, for private models')
            command.add_argument('--revision', help='a branch, tag or commit of the hub')
            command.add_argument('--trust_remote_code', nargs='?', const='True', default='False')
        if name == 'merge':
            command.add_argument('--base', required=True, help='what the adapter was trained on')
    command = commands.add_parser('push')
    command.add_argument('source', help='a run folder, whose best weights are sent, or a ckpt.pt')
    command.add_argument('--hub_model_id', required=True, help='owner/name')
    command.add_argument('--token', help='of the hub; without it, what `hf auth login` keeps')
    command.add_argument('--private', action='store_true', help='where the model is new there')
    command.add_argument('--dry_run', action='store_true', help='show what would be sent, and send nothing')
    commands.add_parser('consolidate').add_argument(
        'source', help='the run folder of a stopped run with fsdp=True'
    )
    args = parser.parse_args(words)
    if args.command == 'consolidate':
        from lm import sharded  # slow to import

        sharded.consolidate(args.source)
        return
    if args.command == 'push':
        push(args.source, args.hub_model_id, args.token, args.private, args.dry_run)
        return
    no_remote_code(getattr(args, 'trust_remote_code', 'False').lower() != 'false')
    make_way(args.out, args.overwrite, folder=args.command == 'export')
    if args.command == 'import':
        import_command(args.source, args.out, args.token, args.revision)
    elif args.command == 'export':
        export_command(args.source, args.out)
    else:
        merge_command(args.source, args.base, args.out, args.token, args.revision)


def make_way(out, overwrite, folder):
    """A UserError where something is in the way of what is to be written, or its folder does not exist."""
    if not out.absolute().parent.is_dir():
        raise UserError(f'--out={out} lies in a folder that does not exist; make it, or choose another path.')
    if out.is_dir() and not folder:
        raise UserError(f'--out={out} is a folder; give the path of the ckpt.pt to write.')
    if folder and out.exists() and not (out / 'config.json').is_file():
        raise UserError(f'{out} is there and no exported model; choose another --out.')
    if out.exists() and not overwrite:
        raise UserError(f'{out} is already there; replace it with --overwrite, or choose another --out.')


if __name__ == '__main__':
    main()
