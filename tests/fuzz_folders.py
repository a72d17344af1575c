"""Damage Hugging Face folders in hundreds of ways; each has to be read, or refused in a sentence.

python tests/fuzz_folders.py [--count=400] [--seed=0]
"""

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

from conftest import hf_model, letter_tokenizer, random_model, write_checkpoint, write_llama_tokenizer

import hf
from lm import checkpoints, lora, prompts
from lm.configurator import UserError, user_errors
from lm.tokenizer import CHARACTERS, Tokenizer
from sampling import generate

SECONDS = 20  # that a case may take
VALUES = [
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3.5,
    10**9,
    10**30,
    1e-30,
    '',
    '2',
    'x' * 5000,
    '\ud800',
    [],
    [1],
    [None],
]
VALUES += [
    {},
    {'a': 1},
    [[]],
    {'content': 3},
    'llama3',
    'linear',
    float('nan'),
    float('inf'),
    [300, -5],
    ['z'],
]


def make_folders(place):
    """Write a folder of each kind of files."""
    for name in ('gpt2', 'opt', 'llama', 'llama-3.2', 'qwen3', 'adapter'):
        folder = place / name
        model = hf_model('llama' if name == 'adapter' else name, folder, vocab_size=300)
        if name == 'opt':  # the older pair of tokenizer files
            vocab = {character: byte for byte, character in CHARACTERS.items()} | {'th': 256, '</s>': 257}
            (folder / 'vocab.json').write_text(json.dumps(vocab))
            (folder / 'merges.txt').write_text('#version: 0.2\nt h\n')
            (folder / 'tokenizer_config.json').write_text('{"eos_token": "</s>", "add_bos_token": true}')
        else:
            write_llama_tokenizer(folder, 'tokenizer.json' if name == 'llama' else 'tokenizer_config.json')
            (folder / 'generation_config.json').write_text('{"eos_token_id": [257, 5]}')
        if name == 'llama-3.2':  # shards
            (folder / 'model.safetensors').unlink()
            model.save_pretrained(folder, max_shard_size='40kB')
    tokenizer = letter_tokenizer()
    special = dict(vocab_size=tokenizer.vocab_size, mask_id=tokenizer.mask_id, ignore_id=tokenizer.ignore_id)
    model = random_model('sdd', 0.3, n_layer=1, n_head=2, n_embd=16, block_size=16, **special)
    write_checkpoint(place / 'native.pt', model, tokenizer)
    hf.export(place / 'native.pt', place / 'native')
    (place / 'native.pt').unlink()
    model = checkpoints.load_model(checkpoints.load(place / 'adapter'), 'cpu')
    lora.add_lora(model, 2, 4)
    lora.save_adapter(model, place / 'adapter' / 'adapter', 'base', prompt_format=prompts.DEFAULT)


def spots(value, path=()):
    """Yield the path of keys to each value within a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(items)[:40]:
        yield from spots(inner, (*path, key))


def edit_json(path, draw):
    """Change, remove or add a value somewhere in a JSON file; return in words what."""
    content = json.loads(path.read_text())
    *above, key = draw.choice([spot for spot in spots(content) if spot] or [('new',)])
    inside = content
    for step in above:
        inside = inside[step]
    if draw.random() < 0.2:
        del inside[key]
        done = 'removed'
    else:
        inside[key] = draw.choice(VALUES)
        done = f'set to {str(inside[key])[:30]!r}'
    path.write_text(json.dumps(content))
    return f'{path.name}: {".".join(map(str, [*above, key]))} {done}'


def edit_safetensors(path, draw):
    """Change something in the header of a safetensors file, and keep its length right."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], 'little')
    header = path.with_suffix('.header.json')
    header.write_bytes(data[8 : 8 + size])
    done = edit_json(header, draw)
    new = header.read_bytes()
    header.unlink()
    path.write_bytes(len(new).to_bytes(8, 'little') + new + data[8 + size :])
    return done


def damage(folder, draw):
    """Damage one file of a folder in some way; return in words how."""
    path = draw.choice(sorted(path for path in folder.rglob('*') if path.is_file()))
    data, kind = path.read_bytes(), draw.random()
    if kind < 0.5 and path.suffix == '.json':
        return edit_json(path, draw)
    if kind < 0.4 and path.suffix == '.safetensors':
        return edit_safetensors(path, draw)
    if kind < 0.6:
        path.write_bytes(data[: draw.randrange(len(data))])
        return f'{path.name} cut off'
    if kind < 0.75:
        noise = bytearray(data)
        for _ in range(draw.choice((1, 3, 50))):
            noise[draw.randrange(len(noise))] = draw.randrange(256)
        path.write_bytes(noise)
        return f'{path.name} with other bytes'
    path.unlink()
    if kind < 0.8:
        return f'{path.name} removed'
    if kind < 0.85:
        path.mkdir()
        return f'{path.name} is a folder'
    if kind < 0.9:
        path.symlink_to(path.name)
        return f'{path.name} is a link to itself'
    content = draw.choice(
        [b'', b'null', b'[]', b'{}', b'7', b'"x"', b'{"a":', b'\xff\xfe\x00', b'[' * 100_000]
    )
    path.write_bytes(content)
    return f'{path.name} holds {content[:10]!r}'


def use(folder, out):
    """Do with a folder what users do."""
    hf.main(['import', str(folder), f'--out={out}/ckpt.pt'])
    state = checkpoints.load(out / 'ckpt.pt')
    model, tokenizer = checkpoints.load_model(state, 'cpu'), Tokenizer(state['tokenizer'])
    start = [state['start_token'], *tokenizer.encode('the')]
    with user_errors():
        rows = generate(model, [start], 3, stop_tokens=prompts.stop_tokens(state, tokenizer))
    tokenizer.decode(rows[0])
    hf.main(['export', f'{out}/ckpt.pt', f'--out={out}/exported'])
    if (folder / 'adapter').is_dir():
        hf.main(['merge', f'{folder}/adapter', f'--base={out}/ckpt.pt', f'--out={out}/merged.pt'])


def outcome(folder, out):
    """Return 'read', 'refused' or a traceback, and the message."""
    signal.alarm(SECONDS)
    try:
        use(folder, out)
        return 'read', ''
    except UserError as error:
        return ('refused' if str(error).endswith('.') and '\n' not in str(error) else 'no sentence'), str(
            error
        )
    except (Exception, TooLong):
        return 'traceback', traceback.format_exc()
    finally:
        signal.alarm(0)


class TooLong(BaseException):
    """Passes every handler of errors, so that a hang is seen."""


def too_long(*_):
    raise TooLong(f'more than {SECONDS} seconds')


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--count', type=int, default=400)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    signal.signal(signal.SIGALRM, too_long)
    draw, found = random.Random(args.seed), Counter()
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        make_folders(place / 'good')
        names = sorted(path.name for path in (place / 'good').iterdir())
        for name in names:
            (place / 'out').mkdir()
            assert outcome(place / 'good' / name, place / 'out') == ('read', ''), name
            shutil.rmtree(place / 'out')
        for number in range(args.count):
            folder, out = place / 'bad', place / 'out'
            shutil.copytree(place / 'good' / names[number % len(names)], folder)
            out.mkdir()
            what = damage(folder, draw)
            kind, message = outcome(folder, out)
            found[kind] += 1
            if kind not in ('read', 'refused'):
                print(f'--- {number} {names[number % len(names)]}: {what}\n{message}', file=sys.stderr)
            shutil.rmtree(folder)
            shutil.rmtree(out)
    print(', '.join(f'{count} {kind}' for kind, count in sorted(found.items())))
    sys.exit(bool(found.keys() - {'read', 'refused'}))


if __name__ == '__main__':
    main()
