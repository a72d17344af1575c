"""fsdp=True on two gloo ranks: the run of one process, and states for any number of ranks."""

import csv
import itertools
import os
import pickle
import runpy
import shutil
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from conftest import (
    largest_file,
    letter_tokenizer,
    random_model,
    several_scripts,
    signals_kept,
    write_checkpoint,
    write_folder,
)
from helpers import DeadError
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

import hf
from lm import checkpoints, sharded
from lm.configurator import ROOT, UserError

pytestmark = pytest.mark.filterwarnings('ignore:torch.distributed is disabled')
COMMON = (
    '--device=cpu --no_wandb --log_every=1 --eval_every=5 --schedule=constant --learning_rate=0.0003 '
    '--warmup_steps=0 --block_size=16'
).split()
SHAPE = dict(n_layer=2, n_head=2, n_embd=32, block_size=16)
GPT2 = '--norm=layer --position=learned --mlp=gelu --bias=True --qk_norm=False --logit_softcap=0'.split()
TRAIN = ['train.py', '--dtype=float32', '--dataset=PLACE/letters', *(f'--{k}={v}' for k, v in SHAPE.items())]
TUNE = [
    'finetune.py',
    '--num_samples=1',
    '--sample_tokens=4',
    '--dataset=PLACE/answers',
    '--init_from=PLACE/base',
]
CASES = {
    'ar': [
        *TRAIN,
        *GPT2,
        *'--optimizer=muon --ema_decay=0.9 --n_layer=3 --gradient_accumulation_steps=2'.split(),
        *'--sample_every=3 --sample_tokens=4 --eval_every=1 --dataset=PLACE/rare'.split(),  # val/loss rises
    ],
    'nf4': [
        *TUNE,
        '--architecture=diffusion',
        *'--dtype=float32 --use_peft --peft_lora_r=4 --load_in_4bit'.split(),
    ],
    'converted': [*TRAIN, '--architecture=diffusion', '--init_from=PLACE/base', '--gradient_checkpointing'],
    'sdd': [*TUNE, '--dtype=float32', '--architecture=sdd', '--p_belief=((0,1),)'],
}
AGAIN = ['ar', 'nf4']  # resumed on two ranks, the others on one
WEIGHTS = ['model_state_dict', 'ema_state_dict', 'adapter_state_dict']


def script(name, *arguments):
    """Runs a script in this process; returns its variables."""
    with pytest.MonkeyPatch.context() as patch, signals_kept():
        patch.setattr(sys, 'argv', [name, *COMMON, *map(str, arguments)])
        return runpy.run_path(str(ROOT / name), run_name='__main__')


def run_rank(rank, ports, commands, barrier):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1')
    with several_scripts():
        for port, command in zip(ports, commands):
            barrier.wait()  # the files of the run before are written
            os.environ['MASTER_PORT'] = str(port)
            model = script(*command)['raw_model']
            parts, whole = zip(*((p.to_local().numel(), p.numel()) for p in model.parameters()))
            assert sum(parts) < 0.6 * sum(whole)


def run_on_two_ranks(*commands):
    barrier = torch.multiprocessing.get_context('spawn').Barrier(2)
    torch.multiprocessing.spawn(run_rank, (free_ports(len(commands)), commands, barrier), nprocs=2)


def free_ports(count):
    sockets = [socket.create_server(('127.0.0.1', 0)) for _ in range(count)]
    ports = [server.getsockname()[1] for server in sockets]
    for server in sockets:
        server.close()
    return ports


def load(folder):
    return torch.load(folder / 'ckpt.pt', weights_only=True)


def losses(folder):
    """{step: train/loss} and the last val/loss."""
    with open(folder / 'metrics.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    train = {int(row['step']): float(row['train/loss']) for row in rows if row['train/loss']}
    return train, float(rows[-1]['val/loss'])


def test_two_ranks_are_one_process_and_their_state_resumes_on_one(tmp_path):
    tokenizer = letter_tokenizer()
    ids = dict(vocab_size=tokenizer.vocab_size, mask_id=tokenizer.mask_id, ignore_id=tokenizer.ignore_id)
    (tmp_path / 'base').mkdir()
    write_checkpoint(tmp_path / 'base' / 'ckpt.pt', random_model('ar', 0.1, **ids, **SHAPE), tokenizer)
    val = ['the cat sees a dog in its tree and sings']  # one batch: none for rank 1
    write_folder(tmp_path / 'letters', val=val)
    write_folder(tmp_path / 'rare', val=['zz qqq xx jjjj vv zqx'])
    write_folder(tmp_path / 'answers', val=val, train_on='aeiou')

    commands = {
        case: [word.replace('PLACE', str(tmp_path)) for word in words] for case, words in CASES.items()
    }
    ranks = []
    for case, command in commands.items():
        settings, out = (
            [*command, '--batch_size=2', '--fsdp', '--save_every=3'],
            f'--out_dir={tmp_path}/{case}-',
        )
        ranks.append([*settings, out + 'two', f'--max_steps={5 if case in AGAIN else 3}'])
        copy = f'--resume_from={tmp_path}/{case}-two/checkpoints/checkpoint-3'
        ranks += [[*settings, out + 'again', copy, '--max_steps=5']] if case in AGAIN else []
    half = [*commands['ar'], '--batch_size=2', '--fsdp', '--dtype=bfloat16', f'--out_dir={tmp_path}/half']
    run_on_two_ranks(*ranks, [*half, '--max_steps=3'])
    assert load(tmp_path / 'half')['global_step'] == 3  # with samples

    for case, command in commands.items():
        one, two = tmp_path / f'{case}-one', tmp_path / f'{case}-two'
        command = [*command, '--batch_size=4', '--max_steps=5']
        script(*command, f'--out_dir={one}')
        checkpoints.load(two / 'best.pt')
        if case not in AGAIN:
            assert [path.name for path in (two / 'sharded').iterdir()] == ['step-3']
            script(*command, '--fsdp', '--resume_from=auto', f'--out_dir={two}')
        found, expected = load(two), load(one)
        assert found['global_step'] == 5
        for key in expected.keys() & WEIGHTS:
            atol = 2e-5 if case == 'ar' else 1e-6  # Muon makes much of small directions
            torch.testing.assert_close(found[key], expected[key], atol=atol, rtol=0)
            if case in AGAIN:
                again = load(tmp_path / f'{case}-again')[key]
                assert all(torch.equal(again[name], x) for name, x in found[key].items())
        for values, wanted in zip(losses(two), losses(one), strict=True):
            assert values == pytest.approx(wanted, abs=1e-5)
    assert {'ema_state_dict'} < load(tmp_path / 'ar-two').keys()
    assert (
        load(tmp_path / 'ar-two')['best_step'] < 4
    )  # no save of the average gathered the root anew after step 4
    paths = (tmp_path / f'nf4-{run}/adapter/adapter_model.safetensors' for run in ('one', 'two'))
    tensors = map(safetensors.torch.load_file, paths)
    torch.testing.assert_close(*tensors, atol=1e-6, rtol=0)


@pytest.mark.parametrize('architecture', ['ar', 'diffusion', 'sdd'])
def test_a_model_made_in_parts_starts_as_a_whole_one(architecture):
    shape = dict(SHAPE, vocab_size=30, mask_id=28, ignore_id=29)
    torch.manual_seed(3)
    whole = checkpoints.make_model(architecture, **shape).state_dict()
    parts = []
    for rank in range(3):  # of which the last has no row of some
        torch.manual_seed(3)
        with sharded.DrawnInParts(SimpleNamespace(rank=rank, world_size=3)):
            model = checkpoints.make_model(architecture, **shape)
        assert all(x.is_meta for x in model.parameters() if x.dim() == 2)
        parts.append({name: x.part if x.is_meta else x for name, x in model.named_parameters()})
    for name, expected in whole.items():
        found = [part[name] for part in parts]
        assert torch.equal(torch.cat(found) if expected.dim() == 2 else found[0], expected), name


def stop_after_a_step(out):
    """Sends this process the signal to stop as soon as a run has logged a step."""
    path = out / 'metrics.csv'
    while not (path.exists() and path.read_text().count('\n') > 2):
        time.sleep(0.01)
    os.kill(os.getpid(), 15)


def test_a_stopped_run_is_consolidated(tmp_path):
    write_folder(tmp_path / 'letters')
    command, out = [word.replace('PLACE', str(tmp_path)) for word in TRAIN], tmp_path / 'run'
    command += ['--fsdp', '--ema_decay=0.9', f'--out_dir={out}']
    threading.Thread(target=stop_after_a_step, args=(out,), daemon=True).start()
    left = script(*command, '--max_steps=10000')
    with pytest.raises(UserError, match='weights of .* are sharded in .*consolidate'):
        checkpoints.load(out)
    hf.main(['consolidate', str(out)])
    held = checkpoints.load(out)
    for key, weights in (('model', left['raw_model'].state_dict()), ('ema', left['ema'].ema)):
        assert all(torch.equal(held[f'{key}_state_dict'][name], x) for name, x in weights.items())

    steps = load(out)['global_step'] + 1
    script(*command, f'--max_steps={steps}', '--resume_from=auto')
    assert load(out)['global_step'] == steps and 'model_state_dict' in load(out)
    (out / 'sharded').rename(tmp_path / 'elsewhere')
    with pytest.raises(UserError, match=f'ckpt.pt needs .*step-{steps}, which is not there'):
        script(*command, f'--max_steps={steps + 1}', '--resume_from=auto')


def dies(*_, **__):
    raise DeadError


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope='module')
def stopped(tmp_path_factory):
    """A folder with data and a run that has three steps, sharded on one rank, and no weights in its ckpt.pt."""
    path = tmp_path_factory.mktemp('stopped')
    write_folder(path / 'letters')
    command = [word.replace('PLACE', str(path)) for word in TRAIN]
    script(*command, '--fsdp', f'--out_dir={path}/run', '--max_steps=3')
    state = load(path / 'run')
    del state['model_state_dict']
    torch.save(state, path / 'run/ckpt.pt')
    return path


@pytest.mark.faults
@pytest.mark.parametrize('how', ['a call', 'a dotted name', 'a pickle for a tensor', 'cut'])
def test_a_sharded_state_runs_no_code_that_its_files_hold(stopped, tmp_path, how):
    out, made = shutil.copytree(stopped / 'run', tmp_path / 'run'), tmp_path / 'made'
    path = out / 'sharded/step-3/.metadata'
    found = pickle.loads(path.read_bytes())
    if how == 'a pickle for a tensor':  # DCP unpickles what the metadata call bytes
        found.state_dict_metadata = dict.fromkeys(found.state_dict_metadata, BytesStorageMetadata())
        torch.save(Evil(made), out / 'sharded/step-3/__0_0.distcp')
        for part in found.storage_data.values():
            part.offset, part.length = 0, (out / 'sharded/step-3/__0_0.distcp').stat().st_size
    found.planner_data = Evil(made) if how == 'a call' else None
    content = pickle.dumps(found)
    if how == 'a dotted name':
        content = b'\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x08os.mkdir\x93.'
    path.write_bytes(content[:99] if how == 'cut' else content)
    for call in (
        lambda: hf.main(['consolidate', str(out)]),
        lambda: script('train.py', '--fsdp', f'--resume_from={out}', '--max_steps=4'),
    ):
        with pytest.raises(
            UserError, match='sharded/step-3 is damaged .*; the state before it is kept'
        ) as error:
            call()
        assert '\n' not in str(error.value) and not made.exists()


@pytest.mark.faults
def test_a_sharded_state_that_a_full_disk_cuts_leaves_the_one_before(stopped, tmp_path):
    out = shutil.copytree(stopped / 'run', tmp_path / 'run')
    before = (out / 'ckpt.pt').read_bytes()
    with (
        pytest.raises(UserError, match='sharded/step-4 could not be written .*too large'),
        largest_file(9000),
    ):
        script('train.py', '--fsdp', f'--resume_from={out}', '--max_steps=5', '--save_every=4')
    assert (out / 'ckpt.pt').read_bytes() == before
    assert [path.name for path in (out / 'sharded').iterdir()] == ['step-3']
    script('train.py', '--fsdp', f'--resume_from={out}', '--max_steps=5')
    assert load(out)['global_step'] == 5 and 'model_state_dict' in load(out)


@pytest.fixture
def copied(stopped, tmp_path):
    """A sharded run of four steps with a copy of each second one, and the words that go on from the first copy."""
    out, command = tmp_path / 'run', [word.replace('PLACE', str(stopped)) for word in TRAIN]
    script(*command, '--fsdp', f'--out_dir={out}', '--max_steps=4', '--eval_every=2', '--save_every=2')
    return out, ['train.py', '--fsdp', f'--resume_from={out}/checkpoints/checkpoint-2']


def test_a_sharded_run_that_went_back_begins_there_though_killed_at_once(copied):
    out, words = copied
    with pytest.MonkeyPatch.context() as patch, pytest.raises(DeadError):
        patch.setattr('lm.optim.learning_rate_at', dies)
        script(*words, '--max_steps=6')
    assert load(out)['global_step'] == 2
    script('train.py', '--fsdp', f'--out_dir={out}', '--resume_from=auto', '--max_steps=6')
    with open(out / 'metrics.csv', newline='') as file:
        assert [int(row['step']) for row in csv.DictReader(file)] == [0, *range(1, 7)]


@pytest.mark.parametrize('copy, saves', [(2, 1), (2, 2), (4, 1)])
def test_a_save_that_is_cut_after_going_back_damages_no_state(copied, monkeypatch, copy, saves):
    def cut(state, checkpoint_id):
        if next(calls) < saves:
            return save(state, checkpoint_id=checkpoint_id)
        checkpoint_id.mkdir(exist_ok=True)
        (checkpoint_id / '__0_0.distcp').write_bytes(b'half')
        raise DeadError

    (out, words), calls, save = copied, itertools.count(1), torch.distributed.checkpoint.save
    words[2] = f'--resume_from={out}/checkpoints/checkpoint-{copy}'
    with pytest.MonkeyPatch.context() as patch, pytest.raises(DeadError):
        patch.setattr('torch.distributed.checkpoint.save', cut)
        script(*words, '--max_steps=6')
    for place in [out, *(out / 'checkpoints').iterdir()]:
        script('train.py', '--fsdp', f'--resume_from={place}', '--max_steps=6', f'--out_dir={place}-more')


def test_a_sharded_copy_that_is_at_its_end_can_be_made_longer(copied):
    out, words = copied
    script(*words, '--max_steps=2')
    script('train.py', '--fsdp', f'--out_dir={out}', '--resume_from=auto', '--max_steps=3')
    assert load(out)['global_step'] == 3


def test_a_sharded_run_that_goes_on_elsewhere_has_a_checkpoint_at_once(copied, tmp_path):
    out, _ = copied
    with pytest.MonkeyPatch.context() as patch, pytest.raises(DeadError):
        patch.setattr('lm.optim.learning_rate_at', dies)
        script('train.py', '--fsdp', f'--resume_from={out}', f'--out_dir={tmp_path}/other', '--max_steps=6')
    script('train.py', '--fsdp', f'--out_dir={tmp_path}/other', '--resume_from=auto', '--max_steps=6')
    assert load(tmp_path / 'other')['global_step'] == 6 and load(out)['global_step'] == 4


def test_a_run_that_is_being_written_is_not_consolidated(stopped, monkeypatch):
    read = []
    monkeypatch.setattr('lm.checkpoints.load', lambda *_, **__: read.append(1))
    code = 'import pathlib, sys, time; from lm.files import lock; held = lock(pathlib.Path(sys.argv[1]))\n'
    code += 'print("locked", flush=True); time.sleep(60)'
    with subprocess.Popen(
        [sys.executable, '-c', code, stopped / 'run'], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == 'locked\n'
        with pytest.raises(UserError, match='Another process writes'):
            hf.main(['consolidate', f'{stopped}/run'])
        process.kill()
    assert not read


def test_what_does_not_go_with_fsdp_is_refused():
    with pytest.raises(UserError, match='fsdp does not go with dtype=float16'):
        script('train.py', '--fsdp', '--dtype=float16')
