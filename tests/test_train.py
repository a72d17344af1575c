"""What train.py promises, seen from outside: runs of the script on tiny folders, without network."""

import csv
import hashlib
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import wandb
from conftest import LETTERS, several_scripts, signals_kept, write_folder

from lm import optim, runtime
from lm.configurator import UserError

ROOT = Path(__file__).resolve().parent.parent
TINY = (
    '--n_layer=2 --n_head=2 --n_embd=32 --block_size=16 --batch_size=4 --max_steps=6 --eval_every=3 '
    '--log_every=1 --device=cpu --dtype=float32 --no_wandb'
).split()
GPT2 = '--norm=layer --position=learned --mlp=gelu --bias=True --qk_norm=False --logit_softcap=0'.split()
CASES = {
    'ar': ['--architecture=ar', '--gradient_accumulation_steps=2', '--optimizer=muon'],
    'diffusion': ['--architecture=diffusion', '--ema_decay=0.9', '--dropout=0.1'],
    'sdd': ['--architecture=sdd', '--mode=documents', '--k_warmup_steps=90', '--p_belief=((0.1, 0.8),)'],
}
TIMES = ('train/tokens_per_sec', 'train/mfu')


def train(*arguments, tiny=TINY):
    """Runs the script in this process; returns its variables."""
    with pytest.MonkeyPatch.context() as patch, signals_kept():
        patch.setattr(sys, 'argv', ['train.py', *tiny, *map(str, arguments)])
        return runpy.run_path(str(ROOT / 'train.py'), run_name='__main__')


def start(*arguments, ranks=1):
    """Runs the script in processes of its own."""
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}']
    command = [sys.executable, *(torchrun if ranks > 1 else []), ROOT / 'train.py', *TINY, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for_step(out, step, process):
    """Returns when metrics.csv has a row of `step` or a later one."""
    path = out / 'metrics.csv'
    while process.poll() is None:
        steps = [row.split(',')[0] for row in path.read_text().split('\n')[1:-1]] if path.exists() else []
        if steps and int(steps[-1]) >= step:
            return
        time.sleep(0.002)


def metrics(out):
    """The rows of metrics.csv as [{name: text}], without what depends on the time it took."""
    with open(out / 'metrics.csv', newline='') as file:
        rows = list(csv.DictReader(file))
    return [{name: cell for name, cell in row.items() if name not in TIMES} for row in rows]


def load(out, name='ckpt.pt'):
    return torch.load(out / name, weights_only=True)


def same(one, other):
    """Whether two states are equal to the bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def assert_same_run(out, reference):
    one, other = load(out), load(reference)
    for part in ('model_state_dict', 'ema_state_dict', 'optimizer_state_dict', 'best_val_loss'):
        assert (part in one) == (part in other)
        assert part not in one or same(one[part], other[part]), part
    steps = {row['step'] for row in metrics(reference)}
    assert [row for row in metrics(out) if row['step'] in steps] == metrics(reference)
    assert json.loads((out / 'eval_results.json').read_text()) == json.loads(
        (reference / 'eval_results.json').read_text()
    )


def contents(path):
    return {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in path.rglob('*') if file.is_file()}


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """A folder with prepared data, letters/, and a run on it that is at its end, run/."""
    path = tmp_path_factory.mktemp('finished')
    write_folder(path / 'letters')
    train(f'--dataset={path}/letters', f'--out_dir={path}/run', '--ema_decay=0.5')
    return path


@pytest.fixture
def run(finished, tmp_path):
    """A copy of that run."""
    return shutil.copytree(finished / 'run', tmp_path / 'run')


# ---------------------------------------------------------------------------- resume


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES)
def test_resume_after_sigkill_at_random_moments_is_bit_identical(make_folder, tmp_path, case):
    steps, draw = 180, random.Random(case)
    settings = [
        f'--dataset={make_folder()}',
        f'--max_steps={steps}',
        '--eval_every=40',
        '--save_every=7',
        '--log_every=3',
        '--save_total_limit=2',
        *CASES[case],
    ]
    reference = start(*settings, f'--out_dir={tmp_path}/reference')
    out = tmp_path / 'run'
    for moment in (draw.randrange(20), draw.randrange(20, 70), draw.randrange(70, 110)):
        process = start(*settings, f'--out_dir={out}', '--resume_from=auto')
        wait_for_step(out, moment, process)
        time.sleep(draw.uniform(0, 0.02))
        process.kill()
        assert process.wait() == -signal.SIGKILL, process.stdout.read()
        assert not (out / 'ckpt.pt').exists() or load(out)['global_step'] < steps
    last = start(*settings, f'--out_dir={out}', '--resume_from=auto')
    assert last.wait() == 0 and reference.wait() == 0, last.stdout.read()
    assert_same_run(out, tmp_path / 'reference')
    assert len(metrics(out)) == len(metrics(tmp_path / 'reference'))


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_at_the_next_step_and_the_run_goes_on_bit_identical(
    make_folder, tmp_path, monkeypatch, capfd, case, number
):
    settings = [f'--dataset={make_folder()}', '--max_steps=12', '--eval_every=6', *CASES[case]]
    train(*settings, f'--out_dir={tmp_path}/reference')
    rate = optim.learning_rate_at

    def rate_and_signal(step, *rest):
        if step in (3, 7):
            os.kill(os.getpid(), number)
        return rate(step, *rest)

    for stopped_at in (4, 8):
        with monkeypatch.context() as patch:
            patch.setattr(optim, 'learning_rate_at', rate_and_signal)
            patch.setattr(os, '_exit', lambda status: pytest.fail('that is for a second signal only'))
            train(*settings, f'--out_dir={tmp_path}/run', '--resume_from=auto')  # no SystemExit: status 0
        assert load(tmp_path / 'run')['global_step'] == stopped_at
        assert f'stopped at step {stopped_at} of 12; continue with --resume_from' in capfd.readouterr().out
    train(f'--resume_from={tmp_path}/run', tiny=[])  # the checkpoint knows the settings
    assert_same_run(tmp_path / 'run', tmp_path / 'reference')


def test_a_run_killed_before_or_at_its_first_checkpoint_has_each_row_once(make_folder, tmp_path, monkeypatch):
    settings = [f'--dataset={make_folder()}', f'--out_dir={tmp_path}/run', '--resume_from=auto']
    write_row = runtime.Logger.write_row
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runtime.Logger, 'metrics', lambda log, *_: interrupt(write_row(log, [0])))
        train(*settings)
    assert not (tmp_path / 'run/ckpt.pt').exists() and len(metrics(tmp_path / 'run')) == 1
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(optim, 'learning_rate_at', interrupt)
        train(*settings)
    assert load(tmp_path / 'run')['global_step'] == 0
    train(*settings)
    assert [row['step'] for row in metrics(tmp_path / 'run')] == list('0123456')


def interrupt(*_):
    raise KeyboardInterrupt


def test_a_finished_run_says_so_and_changes_nothing(run, capsys):
    before = contents(run)
    with pytest.raises(SystemExit) as stop:
        train(f'--out_dir={run}', '--resume_from=auto')
    assert stop.value.code == 0 and contents(run) == before
    assert re.search('step 6 of 6: the run is finished.*--max_steps', capsys.readouterr().out)


def test_changed_settings_are_honoured_and_reported(run, capsys):
    settings = train(
        f'--resume_from={run}',
        '--max_steps=8',
        '--learning_rate=0.5',
        '--weight_decay=0.3',
        '--beta2=0.9',
        '--schedule=constant',
    )
    group = settings['optimizers']['adamw'].param_groups[0]
    assert (group['lr'], group['weight_decay'], group['betas']) == (0.5, 0.3, (0.9, 0.9))
    output = capsys.readouterr().out
    for change in (
        'learning_rate=0.5, which was 0.001',
        'weight_decay=0.3, which was 0.1',
        "schedule='constant', which was 'cosine'",
        'max_steps=8, which was 6',
    ):
        assert f'resumed with {change}' in output
    assert [row['train/lr'] for row in metrics(run)][-2:] == ['0.5', '0.5']


def test_a_copy_under_checkpoints_goes_on_in_its_run(make_folder, tmp_path):
    settings = [f'--dataset={make_folder()}', '--save_every=2', '--save_total_limit=2', '--ema_decay=0.5']
    train(*settings, f'--out_dir={tmp_path}/run')
    shutil.copytree(tmp_path / 'run', tmp_path / 'reference')
    kept = tmp_path / 'run/checkpoints'
    assert sorted(path.name for path in kept.iterdir()) == ['checkpoint-4', 'checkpoint-6']
    train(*settings, f'--resume_from={kept}/checkpoint-4')
    assert_same_run(tmp_path / 'run', tmp_path / 'reference')
    assert len(metrics(tmp_path / 'run')) == 7


def test_float16_can_be_turned_on_in_the_middle_of_a_run(run, monkeypatch):
    monkeypatch.setattr(runtime, 'measure_peak_flops', lambda *_: 1e9)  # takes seconds in float16 on a CPU
    assert train(f'--resume_from={run}', '--max_steps=8', '--dtype=float16')['scaler'].is_enabled()
    assert load(run)['scaler_state_dict']['scale'] > 0


# ---------------------------------------------------------------------------- ranks and micro-steps


def first_gradients(*arguments):
    """{name: gradient} of a run's first step, as its loop is about to clip them, and its loss."""
    gradients = []

    def record(parameters, limit):
        gradients.extend(p.grad.clone() for p in parameters)
        return torch.zeros(())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, 'clip_grad_norm_', record)
        variables = train('--max_steps=1', '--eval_batches=1', *arguments)
    return torch.cat([gradient.flatten() for gradient in gradients]), variables['loss']


def normalisation_cases(folder, out, ranks):
    """Eight rows a step, however they are divided; with GPT-2's switches no weight is zero at first."""
    for architecture in ('ar', 'diffusion', 'sdd'):
        for accumulation in (1, 2, 4):
            yield [
                f'--dataset={folder}',
                '--mode=documents',
                f'--out_dir={out}',
                '--overwrite',
                *GPT2,
                '--p_belief=((0,1),)',
                f'--architecture={architecture}',
                f'--batch_size={8 // (accumulation * ranks)}',
                f'--gradient_accumulation_steps={accumulation}',
            ]


def run_rank(rank, ports, folder, path):
    """What each of two processes does: every case, whose gradients rank 0 saves."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', MASTER_ADDR='127.0.0.1')
    results = []
    with several_scripts():
        for port, case in zip(ports, normalisation_cases(folder, path / 'ranks', 2)):
            os.environ['MASTER_PORT'] = str(port)
            results.append(first_gradients(*case))
        if rank == 0:
            torch.save(results, path / 'gradients.pt')


def free_ports(count):
    sockets = [socket.create_server(('127.0.0.1', 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.mark.slow
def test_gradients_are_the_same_for_any_number_of_micro_steps_and_ranks(tmp_path):
    """On documents of very different length, so that a mean of means would be something else."""
    texts = [LETTERS * (n % 4) * (6 if n % 3 == 0 else 1) for n in range(40)]
    folder = write_folder(tmp_path / 'letters', train=texts)
    one = [first_gradients(*case) for case in normalisation_cases(folder, tmp_path / 'run', 1)]
    torch.multiprocessing.spawn(run_rank, (free_ports(9), folder, tmp_path), nprocs=2)
    two = torch.load(tmp_path / 'gradients.pt', weights_only=True)
    for i in (0, 3, 6):
        reference = one[i]
        assert reference[0].norm() > 0.1
        for gradients, loss in one[i : i + 3] + two[i : i + 3]:
            assert (gradients - reference[0]).abs().max() < 1e-6
            assert math.isclose(loss, reference[1], rel_tol=1e-6)


@pytest.mark.slow
def test_two_ranks_see_the_rows_of_one_and_stop_together(make_folder, tmp_path):
    """The validation split is one batch, so that the second rank has none of it."""
    folder = make_folder(val=['the cat sees a dog in its tree and sings'])
    settings = [f'--dataset={folder}', '--max_steps=250', '--eval_every=100', '--learning_rate=0.0003']
    out, reference = tmp_path / 'run', tmp_path / 'reference'
    process = start(*settings, f'--out_dir={out}', ranks=2)
    wait_for_step(out, 5, process)
    process.terminate()
    output = process.communicate()[0]
    stopped_at = load(out)['global_step']
    assert 5 <= stopped_at < 250 and f'stopped at step {stopped_at} of 250' in output, output
    resumed = start(*settings, f'--out_dir={out}', '--resume_from=auto', ranks=2)
    train(*settings, '--batch_size=8', f'--out_dir={reference}')
    assert resumed.wait() == 0, resumed.stdout.read()
    for row, expected in zip(metrics(out), metrics(reference), strict=True):
        assert row['step'] == expected['step'] and row['train/epoch'] == expected['train/epoch']
        for name in ('train/loss', 'val/loss'):
            tolerance = 1e-6 if row['step'] in '01' else 1e-3
            assert row[name] == expected[name] or abs(float(row[name]) - float(expected[name])) < tolerance


# ---------------------------------------------------------------------------- what a run leaves


def test_the_checkpoint_has_all_that_other_scripts_need(finished):
    checkpoint = load(finished / 'run')
    assert set(checkpoint) >= {
        'architecture',
        'global_step',
        'model_state_dict',
        'model_config',
        'optimizer_state_dict',
        'scaler_state_dict',
        'train_config',
        'best_val_loss',
        'seed',
        'ema_state_dict',
        'tokenizer',
        'prompt_format',
        'wandb_run_id',
        'format',
    }
    assert checkpoint['global_step'] == 6 and checkpoint['train_config']['max_steps'] == 6
    assert checkpoint['tokenizer'] == (finished / 'letters/tokenizer.json').read_text()
    assert not same(checkpoint['ema_state_dict'], checkpoint['model_state_dict'])


def test_the_run_folder_has_its_files_and_they_agree(finished):
    out = finished / 'run'
    assert {path.name for path in out.iterdir()} == {
        'config.json',
        'ckpt.pt',
        'best.pt',
        'logs.log',
        'metrics.csv',
        'eval_results.json',
    }
    rows, results = metrics(out), json.loads((out / 'eval_results.json').read_text())
    assert [row['step'] for row in rows] == list('0123456')
    losses = {int(row['step']): float(row['val/loss']) for row in rows if row['val/loss']}
    assert set(losses) == {0, 3, 6} and results['val/loss'] == losses[6]
    assert results['best_val_loss'] == min(losses.values()) == load(out)['best_val_loss']
    assert load(out, 'best.pt')['global_step'] == results['best_step']
    assert json.loads((out / 'config.json').read_text()) == json.loads(json.dumps(load(out)['train_config']))
    assert 'step 6/6: loss' in (out / 'logs.log').read_text()


def test_val_loss_is_that_of_the_average_and_bpb_counts_bytes(finished, tmp_path):
    settings = [f'--dataset={finished}/letters', f'--out_dir={tmp_path}/run', '--max_steps=1']
    average = load(finished / 'run')['ema_state_dict']
    torch.save({**load(finished / 'run'), 'model_state_dict': average}, tmp_path / 'average.pt')
    train(*settings, f'--init_from={tmp_path}/average.pt')
    first, last = metrics(tmp_path / 'run')[0], metrics(finished / 'run')[-1]
    assert first['val/loss'] == last['val/loss']
    sizes = json.loads((finished / 'letters/config.json').read_text())['splits']['val']
    nats = float(first['val/loss'])
    assert math.isclose(float(first['val/bpb']), nats / math.log(2) * sizes['tokens'] / sizes['bytes'])
    assert math.isclose(float(first['val/perplexity']), math.exp(nats))


def test_init_from_starts_a_new_run_with_the_weights(finished, tmp_path, monkeypatch):
    out = tmp_path / 'run'
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(optim, 'learning_rate_at', interrupt)
        train(f'--dataset={finished}/letters', f'--init_from={finished}/run/ckpt.pt', f'--out_dir={out}')
    started, given = load(out), load(finished / 'run')
    assert started['global_step'] == 0
    assert same(started['model_state_dict'], given['ema_state_dict'])  # the average, as everywhere else
    assert not started['optimizer_state_dict']['adamw']['state']


@pytest.mark.slow
def test_the_model_learns(make_folder, tmp_path):
    for architecture in ('ar', 'diffusion', 'sdd'):
        train(
            f'--dataset={make_folder(architecture)}',
            f'--architecture={architecture}',
            '--max_steps=60',
            '--eval_every=60',
            '--learning_rate=0.01',
            f'--out_dir={tmp_path}/run-{architecture}',
        )
        first, last = (
            float(row['val/loss']) for row in metrics(tmp_path / f'run-{architecture}') if row['val/loss']
        )
        assert abs(first - math.log(28)) < 0.3 and last < first - 0.5  # at first every letter is as likely


@pytest.mark.parametrize('architecture', ['ar', 'diffusion', 'sdd'])
def test_evaluation_never_changes_training(make_folder, tmp_path, architecture):
    settings = [f'--dataset={make_folder()}', f'--architecture={architecture}', '--dropout=0.2']
    train(*settings, f'--out_dir={tmp_path}/all')
    train(
        *settings,
        f'--out_dir={tmp_path}/some',
        '--eval_batches=1',
        '--eval_every=2',
        '--sample_every=2',
        '--sample_tokens=4',
    )
    assert same(load(tmp_path / 'all')['model_state_dict'], load(tmp_path / 'some')['model_state_dict'])
    assert [row['train/loss'] for row in metrics(tmp_path / 'all')] == [
        row['train/loss'] for row in metrics(tmp_path / 'some')
    ]


def test_sdd_logs_what_it_believes_and_finds_of_the_filler(make_folder, tmp_path):
    train(
        f'--dataset={make_folder()}',
        '--architecture=sdd',
        '--mode=documents',
        '--block_size=128',
        '--max_steps=8',
        '--k_schedule=(1, 3)',
        '--k_warmup_steps=8',
        '--p_belief=((0.0, 1.0),)',
        f'--out_dir={tmp_path}/run',
    )
    rows = metrics(tmp_path / 'run')
    assert [row['train/k'] for row in rows[1:]] == ['1'] * 4 + ['3'] * 4
    for row in rows:
        assert row['step'] == '0' or 0 <= float(row['train/ignore_acc']) <= 1 >= float(
            row['train/ignore_precision']
        )
        assert not row['val/loss'] or abs(float(row['val/loss_k0']) - float(row['val/loss'])) < 1
    looks = [row for row in rows if row['val/loss']]
    assert looks and any(row['val/loss_k0'] != row['val/loss'] for row in looks)
    assert load(tmp_path / 'run')['model_config']['k'] == 3  # the most that it was trained on


@pytest.mark.parametrize(
    'setting, said',
    [
        ('--k_schedule=()', 'k_schedule is .*; give'),
        ('--k_schedule=(0, 2)', 'k_schedule is .*; give'),
        ('--p_belief=0.5', 'p_belief=0.5 gives float'),
        ('--p_belief=((0.5, 1.5),)', 'p_belief is'),
        ('--p_belief=((0.5, 0.1), (0.2, 0.3))', 'p_belief is'),
    ],
)
def test_a_wrong_plan_for_beliefs_is_one_sentence(setting, said, make_folder, tmp_path):
    with pytest.raises(UserError, match=said):
        train(f'--dataset={make_folder()}', '--architecture=sdd', setting, f'--out_dir={tmp_path}/run')
    assert not (tmp_path / 'run').exists()


def test_samples_are_shown_at_evaluations(make_folder, tmp_path, capsys):
    train(f'--dataset={make_folder()}', f'--out_dir={tmp_path}/run', '--sample_every=3', '--num_samples=1')
    assert re.findall('a sample at step (.)', capsys.readouterr().out) == ['0', '3', '6']


def test_epochs_can_be_given_instead_of_steps(make_folder, tmp_path):
    variables = train(
        f'--dataset={make_folder()}',
        f'--out_dir={tmp_path}/run',
        '--num_epochs=0.1',
        tiny=[setting for setting in TINY if 'max_steps' not in setting],
    )
    steps = math.ceil(0.1 * variables['batches'].rows.num_rows / 4)
    assert variables['step'] == load(tmp_path / 'run')['train_config']['max_steps'] == steps


def test_a_step_without_a_trained_token_has_no_loss(make_folder, tmp_path):
    for mode in ('packed', 'documents'):
        out = tmp_path / f'run-{mode}'
        train(f'--dataset={make_folder(mode, train_on="q")}', f'--mode={mode}', f'--out_dir={out}')
        assert {row['train/loss'] for row in metrics(out)[1:]} == {'0.0'}


def test_a_loss_that_is_not_finite_stops_the_run_and_the_checkpoint_before_it_is_kept(make_folder, tmp_path):
    with pytest.raises(UserError, match=r'The loss is nan at step \d; .*learning_rate than 1e\+30'):
        train(
            f'--dataset={make_folder()}',
            f'--out_dir={tmp_path}/run',
            '--learning_rate=1e30',
            '--warmup_steps=0',
            '--max_steps=9',
            *GPT2,
        )
    assert all(weight.isfinite().all() for weight in load(tmp_path / 'run')['model_state_dict'].values())


# ---------------------------------------------------------------------------- bad input

BAD_SETTINGS = {
    '--learning_rat=1': "'learning_rat'.*nearest is 'learning_rate'",
    '--batch_size=many': '--batch_size=many gives str where int is wanted',
    '--dataset=nowhere': "no prepared data at 'nowhere'.*python prepare/",
    '--block_size=5000': 'fewer than one row of 5001; choose a smaller block_size',
    '--architecture=rnn': "architecture is 'rnn'; choose ar or diffusion",
    '--model_size=huge': "model_size is 'huge'; choose tiny",
    '--schedule=steps': "schedule is 'steps'; choose cosine or linear",
    '--optimizer=sgd': "optimizer is 'sgd'; choose adamw or muon",
    '--mode=lines': "mode is 'lines'; choose 'packed' or 'documents'",
    '--dtype=int8': "dtype is 'int8'; choose auto",
    '--device=cuda:99': 'cuda:99.*--device=cpu|GPU number 99',
    '--init_from=nowhere.pt': 'no checkpoint at nowhere.pt; correct the path',
    '--resume_from=nowhere': 'no checkpoint at nowhere; correct the path',
    '--resume_from=auto': '--out_dir=PATH',
    '--n_head=5': 'n_embd=32 over n_head=5',
    '--dropout=1.0': 'dropout is 1.0',
    '--beta1=1.5': 'beta1 is 1.5; it must be at least 0 and below 1',
    '--ema_decay=1': 'ema_decay is 1.0; it must be at least 0 and below 1',
    **{
        f'--{key}={value}': f'{key} is {value}; it must be at least 1'
        for value in (0, -2)
        for key in ('batch_size', 'gradient_accumulation_steps', 'max_steps', 'eval_every', 'log_every')
    },
    **{
        f'--{key}=-1': f'{key} is -1.*; it must be at least 0'
        for key in (
            'learning_rate',
            'weight_decay',
            'grad_clip',
            'eval_batches',
            'save_every',
            'warmup_steps',
        )
    },
}


@pytest.mark.parametrize('setting', BAD_SETTINGS)
def test_a_bad_setting_is_refused_before_anything_is_written(finished, tmp_path, monkeypatch, setting):
    monkeypatch.setattr('lm.checkpoints.ROOT', tmp_path)
    with pytest.raises(UserError, match=BAD_SETTINGS[setting]) as error:
        train(f'--dataset={finished}/letters', setting)
    assert '\n' not in str(error.value) and list(tmp_path.iterdir()) == []


BAD_RESUMES = {  # the arguments, what the error says
    'a folder that holds a run': (['--out_dir=RUN'], 'RUN already holds a run; .*--overwrite'),
    'another architecture': (
        ['--resume_from=RUN', '--architecture=diffusion'],
        "RUN/ckpt.pt has architecture='ar', so it cannot go on with 'diffusion'; leave",
    ),
    'another shape': (['--resume_from=RUN', '--n_layer=3'], 'n_layer=2, so it cannot go on with 3; leave'),
    'another seed': (['--resume_from=RUN', '--seed=5'], 'seed=0, so it cannot go on with 5'),
    'other rows per step': (
        ['--resume_from=RUN', '--batch_size=8'],
        '4 rows per step, not 8; choose batch_size',
    ),
    'weights alone': (
        ['--resume_from=RUN/best.pt'],
        'best.pt holds weights without.*--init_from=RUN/best.pt',
    ),
    'the folder of another run': (
        ['--resume_from=OTHER', '--max_steps=9', '--out_dir=RUN'],
        'RUN already holds a run',
    ),
    'weights of another shape': (
        ['--init_from=RUN', '--n_layer=3'],
        'RUN has n_layer=2, not 3; leave --n_layer',
    ),
    'weights of another vocabulary': (
        ['--init_from=RUN', '--dataset=DATA/abc'],
        r'RUN .*another vocabulary \(30 tokens\) than that of DATA/abc \(6\)',
    ),
    'resumed with another vocabulary': (
        ['--resume_from=RUN', '--max_steps=9', '--dataset=DATA/abc'],
        r'RUN/ckpt.pt .*another vocabulary \(30 tokens\)',
    ),
    'validation data that is too short': (
        ['--out_dir=RUN', '--overwrite', '--dataset=DATA/short'],
        'val split of DATA/short has 2 tokens, fewer than one row of 17',
    ),
    'a checkpoint cut in half': (['--resume_from=CUT'], 'CUT/ckpt.pt is damaged .*; take another one'),
    'an empty checkpoint': (['--resume_from=EMPTY'], 'EMPTY/ckpt.pt is damaged .*; take another one'),
    'weights from a file of another kind': (
        ['--init_from=DATA/letters/config.json'],
        'config.json is damaged or no checkpoint',
    ),
}


@pytest.mark.parametrize('case', BAD_RESUMES)
def test_a_bad_resume_is_refused_and_no_run_is_changed(finished, run, tmp_path, case):
    other, cut, empty = (shutil.copytree(run, tmp_path / name) for name in ('other', 'cut', 'empty'))
    os.truncate(cut / 'ckpt.pt', (cut / 'ckpt.pt').stat().st_size // 2)
    os.truncate(empty / 'ckpt.pt', 0)
    write_folder(tmp_path / 'abc', letters='abc', train=['abc' * 20], val=['abc' * 20])
    write_folder(tmp_path / 'short', val=['a'])
    shutil.copytree(finished / 'letters', tmp_path / 'letters')
    names = {'RUN': run, 'OTHER': other, 'CUT': cut, 'EMPTY': empty, 'DATA': tmp_path}

    def filled(text):
        return re.sub('|'.join(names), lambda name: str(names[name[0]]), text)

    before = contents(tmp_path)
    arguments, expected = BAD_RESUMES[case]
    dataset = [] if '--resume_from' in arguments[0] else [f'--dataset={tmp_path}/letters']
    with pytest.raises(UserError, match=filled(expected)) as error:
        train(*dataset, *map(filled, arguments))
    assert '\n' not in str(error.value) and contents(tmp_path) == before


@pytest.mark.slow
def test_a_mistake_ends_with_one_line_and_status_1(run, finished, tmp_path):
    (tmp_path / 'half').mkdir()
    shutil.copy(finished / 'letters/train_tokens.bin', tmp_path / 'half')
    os.truncate(run / 'ckpt.pt', 9999)
    mistakes = {
        '--learning_rat=1': "'learning_rat'",
        f'--dataset={tmp_path}/half': 'half has no config.json',
        f'--resume_from={run}': 'ckpt.pt is damaged',
    }
    for process, expected in zip([start(mistake) for mistake in mistakes], mistakes.values()):
        output = process.communicate()[0]
        assert process.returncode == 1 and expected in output
        assert output.startswith('error: ') and len(output.splitlines()) == 1


# ---------------------------------------------------------------------------- W&B


def read_wandb(path):
    """The protobuf records of a .wandb file: LevelDB's log format, blocks of 32 KB."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, position, record = path.read_bytes(), 7, b''  # after the file's header
    while position + 7 <= len(content):
        if position % 32768 > 32768 - 7:  # a block's end that has no room for a header
            position += -position % 32768
        _, length, kind = struct.unpack_from('<IHB', content, position)
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(record)
            record = b''


def test_wandb_has_the_names_and_values_of_metrics_csv(make_folder, tmp_path, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    monkeypatch.setenv('WANDB_CACHE_DIR', str(tmp_path))
    out = tmp_path / 'a-run'
    train(f'--dataset={make_folder()}', f'--out_dir={out}', '--no_wandb=False')
    wandb.teardown()  # the file is written by a process of its own, which ends here
    (file,) = out.glob('wandb/offline-run-*/*.wandb')
    records = list(read_wandb(file))
    (started,) = (record.run for record in records if record.WhichOneof('record_type') == 'run')
    assert (started.project, started.display_name) == ('diffusion-lm', 'a-run')
    assert started.run_id == load(out)['wandb_run_id']
    assert {'architecture', 'n_layer', 'learning_rate'} <= {item.key for item in started.config.update}
    rows = [record.history.item for record in records if record.WhichOneof('record_type') == 'history']
    history = [{(i.nested_key or [i.key])[0]: json.loads(i.value_json) for i in row} for row in rows]
    assert set().union(*history) >= {
        'train/loss',
        'train/accuracy',
        'train/perplexity',
        'train/lr',
        'train/tokens_per_sec',
        'train/grad_norm',
        'train/mfu',
        'train/epoch',
        'val/loss',
        'val/accuracy',
        'val/perplexity',
        'val/bpb',
    }
    for logged, row in zip(history, metrics(out), strict=True):
        assert logged['_step'] == int(row.pop('step'))
        values = {name: float(cell) for name, cell in row.items() if cell}
        assert {name: logged[name] for name in values} == pytest.approx(values)


def test_a_failure_of_wandb_does_not_stop_training(make_folder, tmp_path, monkeypatch, capsys):
    def fail(**settings):
        raise wandb.errors.CommError('no service today')

    monkeypatch.setattr(wandb, 'init', fail)
    monkeypatch.setenv('WANDB_MODE', 'offline')
    train(f'--dataset={make_folder()}', f'--out_dir={tmp_path}/run', '--no_wandb=False')
    assert 'W&B failed (CommError: no service today); the run goes on without it.' in capsys.readouterr().out
    assert load(tmp_path / 'run')['global_step'] == 6
