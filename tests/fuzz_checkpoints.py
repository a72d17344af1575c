"""Edit and damage checkpoints at random, give them to the scripts, and count what ends in a traceback.

python tests/fuzz_checkpoints.py --count=240
"""

import contextlib
import copy
import io
import random
import resource
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import torch
from conftest import write_folder
from helpers import CPU, TRAIN, run, write_base, write_examples

import hf
from lm.configurator import UserError, configure

count = 240  # mutated checkpoints
seed = 0
config = configure(globals())

ODD = [None, '', 'seven', -1, 0, 3, 1e30, float('nan'), True, [], {}, {'a': 1}, torch.ones(3), 10**7]
SAMPLE = '--num_samples=1 --max_new_tokens=4 --device=cpu'.split()
CLASSIFY = [*CPU, *'--target_func=fn_a --sequence_length=10 --train_set_size=20 --test_set_size=20'.split()]
CLASSIFY += ['--max_steps=1', '--batch_size=4', '--overwrite']
TUNE = [*CPU, '--max_steps=1', '--batch_size=2', '--num_samples=0', '--overwrite']


def consumers(place, path):
    """Return {name: call} of what reads a checkpoint at `path`, a run of train.py or of classify.py."""
    if path.parent.name == 'classified':
        resume = [f'--resume_from={path}', '--max_steps=3', '--no_wandb']
        return {'classify resume': lambda: run('classify.py', *resume)}
    new = f'--out_dir={place}/new'
    tune = [*TUNE, f'--dataset={place}/examples', f'--init_from={path}', new]
    train = [*TRAIN, f'--dataset={place}/letters', f'--init_from={path}', new, '--overwrite', '--max_steps=1']
    return {
        'train resume': lambda: run('train.py', f'--resume_from={path}', '--max_steps=5', '--no_wandb'),
        'sample': lambda: run('sample.py', f'--checkpoint={path}', *SAMPLE),
        'train start': lambda: run('train.py', *train),
        'finetune': lambda: run('finetune.py', *tune),
        'classify': lambda: run('classify.py', *CLASSIFY, f'--init_from={path}', new),
        'evaluate': lambda: run(
            'evaluate.py', f'--checkpoint={path}', '--device=cpu', '--num_samples=2', '--max_tokens=200'
        ),
        'export': lambda: hf.main(['export', str(path), f'--out={place}/exported', '--overwrite']),
    }


def edit(draw, value, depth=0):
    """Change one thing somewhere in nested dicts and lists, in place; return in words what."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = draw.choice(keys)
    inner = value[key]
    if isinstance(inner, (dict, list)) and inner and draw.random() < 0.8:
        return f'{key}.{edit(draw, inner, depth + 1)}'
    if isinstance(inner, torch.Tensor) and draw.random() < 0.6:
        changes = [inner.int(), inner.flatten()[:-1], inner.double(), inner[None], inner * float('nan')]
        value[key] = draw.choice(changes)
        return f'{key} {value[key].dtype} {tuple(value[key].shape)}'
    if isinstance(value, dict) and draw.random() < 0.3:
        del value[key]
        return f'{key} deleted'
    value[key] = draw.choice(ODD)
    return f'{key} = {value[key]!r:.30}'


def damage(draw, path):
    """Change bytes of a file; return in words what."""
    content = bytearray(path.read_bytes())
    at, kind = draw.randrange(len(content)), draw.choice(['flip', 'cut', 'zeros', 'more'])
    if kind == 'flip':
        content[at] ^= 1 << draw.randrange(8)
    elif kind == 'cut':
        del content[at:]
    elif kind == 'zeros':
        content[at : at + 64] = bytes(len(content[at : at + 64]))
    else:
        content[at:at] = draw.randbytes(7)
    path.write_bytes(content)
    return f'{kind} at {at} of {len(content)}'


def make_runs(place):
    """Write data, runs to mutate and return their checkpoints."""
    write_folder(place / 'letters')
    write_examples(place / 'examples')
    for architecture, more in (('ar', []), ('sdd', ['--ema_decay=0.5', '--optimizer=muon'])):
        words = [
            *TRAIN,
            f'--dataset={place}/letters',
            f'--architecture={architecture}',
            '--max_steps=3',
            *more,
        ]
        run('train.py', *words, f'--out_dir={place}/{architecture}')
    write_base(place / 'base', 'diffusion')
    shape = '--n_layer=1 --n_head=2 --n_embd=16'.split()
    run('classify.py', *CLASSIFY, *shape, f'--out_dir={place}/classified')
    paths = [place / name / 'ckpt.pt' for name in ('ar', 'sdd', 'base', 'classified')]
    return {path: path.read_bytes() for path in paths}


def outcome(call):
    """Return 'works', 'refused' or the traceback of a call; what it prints is dropped."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            call()
    except (UserError, SystemExit) as end:
        return 'refused' if '\n' not in str(end) else f'an error of several lines: {end}'
    except BaseException:
        return traceback.format_exc(limit=-4)
    return 'works'


def main():
    resource.setrlimit(
        resource.RLIMIT_AS, (12 << 30, -1)
    )  # an edited size is no reason to take the machine down
    draw, outcomes = random.Random(seed), Counter()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        with contextlib.redirect_stdout(io.StringIO()):
            checkpoints = make_runs(place)
        for number in range(count):
            path, content = draw.choice(list(checkpoints.items()))
            path.write_bytes(content)
            if draw.random() < 0.25:
                what = damage(draw, path)
            else:
                state = copy.deepcopy(torch.load(path, weights_only=True))
                what = edit(draw, state)
                torch.save(state, path)
            mutated = path.read_bytes()
            calls = consumers(place, path)
            first, *others = calls
            names = [first, *draw.sample(others, k=min(2, len(others)))]
            for name in names:
                path.write_bytes(mutated)
                ended = outcome(calls[name])
                outcomes[ended if ended in ('works', 'refused') else 'traceback'] += 1
                if ended not in ('works', 'refused'):
                    print(f'{number}: {path.parent.name}, {what}; {name}\n{ended}', flush=True)
    print(f'{count} checkpoints: {dict(outcomes)}')
    return outcomes['traceback']


if __name__ == '__main__':
    sys.exit(bool(main()))
