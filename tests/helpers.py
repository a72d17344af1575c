"""Share between test files: runs of the scripts, in this process or in others, and what they leave behind."""

import csv
import hashlib
import json
import multiprocessing
import os
import runpy
import socket
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import letter_tokenizer, random_model, signals_kept, write_checkpoint, write_small_checkpoint

from lm import prompts, runtime
from lm.configurator import ROOT, UserError
from lm.folder import Folder
from model import ARCHITECTURES

TINY = '--n_layer=1 --n_head=2 --n_embd=16 --batch_size=4'.split()
CPU = '--device=cpu --dtype=float32 --no_wandb'.split()
TRAIN = [*TINY, *CPU, *'--block_size=16 --max_steps=6 --eval_every=3 --log_every=1'.split()]
TUNE = [
    *CPU,
    *'--batch_size=4 --max_steps=6 --eval_every=3 --log_every=1'.split(),
    *'--learning_rate=0.01 --num_samples=0'.split(),
]
GPT2 = '--norm=layer --position=learned --mlp=gelu --bias=True --qk_norm=False --logit_softcap=0'.split()
GPT2_SWITCHES = dict(
    norm='layer', position='learned', mlp='gelu', bias=True, qk_norm=False, logit_softcap=0.0
)
TIMES = ('train/tokens_per_sec', 'train/mfu')  # metrics that depend on the time that a step takes


# ---------------------------------------------------------------------------- runs of the scripts


def run(script, *arguments):
    """Run a script, a name in the root or a path, in this process; returns its variables."""
    with pytest.MonkeyPatch.context() as patch, signals_kept():
        patch.setattr(sys, 'argv', [script, *map(str, arguments)])
        patch.setattr(runtime, 'measure_peak_flops', lambda device, dtype: 1e9)  # takes 0.2 s each time
        return runpy.run_path(str(ROOT / script), run_name='__main__')


def evaluate(*arguments):
    """Run evaluate.py in this process; returns its variables."""
    return run('evaluate.py', '--device=cpu', '--num_samples=6', *arguments)


def train(*arguments):
    return run('train.py', *TRAIN, *arguments)


def tune(*arguments):
    return run('finetune.py', *TUNE, *arguments)


class DeadError(Exception):
    """Stands for a SIGKILL in a run within this process: nothing in the scripts catches it."""


def dies_at_call(function, number):
    """Return the function, but that it raises DeadError at its n-th call."""
    calls = iter(range(1, number))

    def call(*args, **settings):
        if next(calls, None) is None:
            raise DeadError
        return function(*args, **settings)

    return call


# Processes are forked from a server that has imported once what takes seconds.
SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload(['helpers', 'torch._dynamo'])


def start(script, *arguments, log=os.devnull, **environment):
    """Start a script in a process of its own; what it prints goes to the file `log`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('PYTHONPATH', os.pathsep.join(sys.path))  # where the server finds this file
        forkserver.ensure_running()
    process = SERVER.Process(target=run_in_process, args=(script, arguments, log, environment))
    process.start()
    return process


def run_in_process(script, arguments, log, environment):
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    try:
        run(script, *arguments)
    except (UserError, RuntimeError):
        sys.excepthook(*sys.exc_info())  # as at the end of a process of its own
        sys.exit(1)


def start_ranks(script, *arguments, ranks=2, log=os.devnull, **environment):
    """Start a script in as many processes as torchrun would; returns them. log: of rank 0."""
    with socket.create_server(('127.0.0.1', 0)) as free:
        port = str(free.getsockname()[1])
    place = environment | dict(WORLD_SIZE=str(ranks), MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    logs = [log] + [os.devnull] * (ranks - 1)
    ranked = [dict(RANK=str(rank), LOCAL_RANK=str(rank)) for rank in range(ranks)]
    return [start(script, *arguments, log=log, **rank, **place) for log, rank in zip(logs, ranked)]


def finish(*processes):
    """Wait for processes, which have to end with status 0."""
    for process in processes:
        process.join(120)
        assert process.exitcode == 0


def wait_for_step(out, step, process):
    """Return when the run's metrics.csv has a row of `step` or a later one, or its process has ended."""
    path = out / 'metrics.csv'
    while process.is_alive():
        lines = path.read_text().split('\n')[1:-1] if path.exists() else []
        if lines and int(lines[-1].split(',')[0]) >= step:
            return
        time.sleep(0.002)


# ---------------------------------------------------------------------------- what runs leave


def metrics(out):
    """Return the rows of metrics.csv as [{name: text}], without what depends on the time it took."""
    with open(out / 'metrics.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    return [{name: cell for name, cell in row.items() if name not in TIMES} for row in rows]


def losses(out):
    """Return the val/loss of each evaluation."""
    return [float(row['val/loss']) for row in metrics(out) if row['val/loss']]


def load(out, name='ckpt.pt'):
    return torch.load(out / name, weights_only=True)


def same(one, other):
    """Say whether two states are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def assert_same_run(out, reference):
    """A run that was interrupted has left what one that was not has; it may have more rows of metrics."""
    one, other = load(out), load(reference)
    for part in ('model_state_dict', 'ema_state_dict', 'optimizer_state_dict', 'best_val_loss', 'best_step'):
        assert (part in one) == (part in other)
        assert part not in one or same(one[part], other[part]), part
    steps = {row['step'] for row in metrics(reference)}
    assert [row for row in metrics(out) if row['step'] in steps] == metrics(reference)
    results = [json.loads((folder / 'eval_results.json').read_text()) for folder in (out, reference)]
    assert results[0] == results[1]


def first_gradient(out):
    """Return the gradient of a run's only step, one vector, and its loss.

    With --beta1=0 it is AdamW's first moment; it must not be clipped.
    """
    parameters = load(out)['optimizer_state_dict']['adamw']['state'].values()
    gradient = torch.cat([state['exp_avg'].flatten() for state in parameters])
    return gradient, float(metrics(out)[-1]['train/loss'])


FIRST_STEP = '--max_steps=1 --eval_tokens=64 --beta1=0 --grad_clip=0 --overwrite'.split()


def fingerprints(path):
    """Return the hash of each file in a folder."""
    return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.rglob('*') if file.is_file()}


# ---------------------------------------------------------------------------- instruction examples

ASCII = [chr(i) for i in range(32, 127)] + ['\n']
FORM = 'Ask {instruction}\n{#input}On {input}\n{/input}Say {output}'


def turns(count):
    """Yield examples with answers of very different length."""
    for i in range(count):
        yield f'say {i}', 'please' * (i % 2), 'so ' * (i % 7) + 'it is' * (i % 3) + '!'


def write_examples(folder, train=60, val=12, form=FORM, examples=turns):
    """Write a folder as prepare/instruct.py leaves it."""
    tokenizer, splits = letter_tokenizer(ASCII), {}
    folder.mkdir()
    for split, count in (('train', train), ('val', val)):
        encoded = [prompts.encode(tokenizer, form, [turn]) for turn in examples(count)]
        tokens = np.array(sum((ids for ids, _ in encoded), []), np.uint16)
        masks = np.array(sum((mask for _, mask in encoded), []), np.uint8)
        index = np.cumsum([0] + [len(ids) for ids, _ in encoded]).astype(np.uint64)
        for name, array in (('tokens', tokens), ('masks', masks), ('index', index)):
            array.tofile(folder / f'{split}_{name}.bin')
        splits[split] = {'tokens': len(tokens), 'documents': count, 'bytes': len(tokens)}
    (folder / 'tokenizer.json').write_text(tokenizer.to_json())
    config = {
        'format': 1,
        'name': folder.name,
        'vocab_size': tokenizer.vocab_size,
        'dtype': 'uint16',
        'splits': splits,
        'start_token': tokenizer.endoftext_id,
        'prompt_format': form,
    }
    (folder / 'config.json').write_text(json.dumps(config))
    return folder


def special_ids(tokenizer):
    """Return what of a ModelConfig depends on the tokenizer."""
    return dict(vocab_size=tokenizer.vocab_size, mask_id=tokenizer.mask_id, ignore_id=tokenizer.ignore_id)


def write_base(path, architecture, **shape):
    """Write a run folder with a checkpoint of random weights, as train.py leaves it."""
    tokenizer = letter_tokenizer(ASCII)
    base = dict(n_layer=2, n_head=2, n_embd=16, block_size=64, **special_ids(tokenizer))
    model = random_model(architecture, 0.1, **{**base, **shape})
    path.mkdir()
    write_checkpoint(path / 'ckpt.pt', model, tokenizer, start_token=tokenizer.endoftext_id)
    return path


def write_tuning(path):
    """Write examples/, base models ar/, diffusion/ and sdd/, and a finished run of ar, run/, to a folder; return it."""
    write_examples(path / 'examples')
    for architecture in ARCHITECTURES:
        write_base(path / architecture, architecture)
    tune(*tuning(path), f'--out_dir={path}/run')
    return path


def tuning(place, base='ar', *more):
    """Return the words for finetune.py on what `write_tuning` wrote."""
    return [f'--dataset={place}/examples', f'--init_from={place}/{base}', *more]


def write_run(path, folder, architecture, mode='packed', **shape):
    """Write a run folder with a model of random weights for a prepared folder."""
    folder = Folder(folder)
    train_config = {'dataset': str(folder.path), 'mode': mode}
    start_token = folder.config['start_token']
    write_small_checkpoint(
        path / 'ckpt.pt',
        architecture,
        folder.tokenizer,
        train_config=train_config,
        start_token=start_token,
        shape=shape,
    )
    return path


def fill_in(text, **names):
    """Replace each name within a text by its value."""
    for name, value in names.items():
        text = text.replace(name, str(value))
    return text


def copy_script(name, folder):
    """Write a copy of a script to a folder and return its path."""
    path = Path(folder) / name
    path.write_bytes((ROOT / name).read_bytes())
    return path
