"""Runs of train.py that are interrupted, resumed or divided among ranks."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import LETTERS, random_texts, write_folder
from helpers import (
    FIRST_STEP,
    GPT2,
    TRAIN,
    DeadError,
    assert_same_run,
    dies_at_call,
    fill_in,
    fingerprints,
    finish,
    first_gradient,
    load,
    metrics,
    run,
    start,
    start_ranks,
    train,
    wait_for_step,
)

import sampling
from lm import checkpoints
from lm.configurator import ROOT, UserError


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with data, letters/ and others/, and a finished run on it, run/."""
    path = tmp_path_factory.mktemp('resume')
    write_folder(path / 'letters')
    write_folder(path / 'others', train=random_texts(60, 90, seed=3))
    train(f'--dataset={path}/letters', f'--out_dir={path}/run', '--ema_decay=0.5')
    return path


@pytest.fixture
def copied(place, tmp_path):
    """A copy of that run."""
    return shutil.copytree(place / 'run', tmp_path / 'run')


# ---------------------------------------------------------------------------- interrupted runs

CASES = {
    'ar': ['--dataset=PLACE/letters', '--gradient_accumulation_steps=2', '--optimizer=muon'],
    'average': ['--dataset=PLACE/letters', '--architecture=diffusion', '--ema_decay=0.9', '--dropout=0.1'],
    'mix': [
        '--dataset=PLACE/letters:0.7,PLACE/others:0.3',
        '--architecture=sdd',
        '--mode=documents',
        '--k_warmup_steps=60',
        '--p_belief=((0.1, 0.8),)',
    ],
    'converted': [
        '--dataset=PLACE/letters',
        '--architecture=diffusion',
        '--init_from=PLACE/run',
        '--anneal_steps=70',
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES)
def test_a_run_killed_and_stopped_at_random_moments_goes_on_bit_identical(place, tmp_path, case):
    steps, draw, out = 100, random.Random(case), tmp_path / 'run'
    settings = [fill_in(word, PLACE=place) for word in CASES[case]]
    settings += [f'--max_steps={steps}', '--eval_every=40', '--save_every=7', '--log_every=3']
    settings += ['--save_total_limit=1']
    reference = start('train.py', *TRAIN, *settings, f'--out_dir={tmp_path}/reference')
    arguments = ['train.py', *TRAIN, *settings, f'--out_dir={out}', '--resume_from=auto']

    process = start(*arguments)
    wait_for_step(out, draw.randrange(30), process)
    time.sleep(draw.uniform(0, 0.02))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL

    process = start(*arguments, log=tmp_path / 'log')
    wait_for_step(out, draw.randrange(40, 60), process)
    os.kill(process.pid, draw.choice([signal.SIGTERM, signal.SIGUSR1]))
    finish(process)
    stopped_at = load(out)['global_step']
    assert 40 <= stopped_at < steps
    said = f'stopped at step {stopped_at} of {steps}; continue with --resume_from={out}'
    assert said in (tmp_path / 'log').read_text()

    run('train.py', f'--resume_from={out}')  # the checkpoint knows the settings
    finish(reference)
    assert_same_run(out, tmp_path / 'reference')


@pytest.mark.parametrize('before', ['its first checkpoint', 'its first row'])
def test_a_run_killed_before_its_first_checkpoint_has_each_row_once(place, copied, before):
    for name in ('ckpt.pt', 'best.pt', 'eval_results.json'):
        (copied / name).unlink()
    lines = (copied / 'metrics.csv').read_text().splitlines(keepends=True)
    (copied / 'metrics.csv').write_text(''.join(lines[: 2 if 'checkpoint' in before else 0]))
    train(f'--dataset={place}/letters', f'--out_dir={copied}', '--resume_from=auto', '--ema_decay=0.5')
    assert_same_run(copied, place / 'run')
    assert len(metrics(copied)) == 7


def test_a_finished_run_says_so_and_changes_nothing(copied, capsys):
    before = fingerprints(copied)
    with pytest.raises(SystemExit) as stop:
        train(f'--out_dir={copied}', '--resume_from=auto')
    assert stop.value.code == 0 and fingerprints(copied) == before
    assert re.search('finished at step 6 of 6.*--max_steps', capsys.readouterr().out)


def test_changed_settings_are_honoured_and_reported(copied, capsys):
    changes = {'max_steps': 8, 'learning_rate': 0.5, 'weight_decay': 0.3, 'beta2': 0.9}
    words = [f'--{key}={value}' for key, value in changes.items()]
    variables = run('train.py', f'--resume_from={copied}', *words, '--schedule=constant')
    group = variables['opt'].parts['adamw'].param_groups[0]
    assert (group['lr'], group['weight_decay'], group['betas']) == (0.5, 0.3, (0.9, 0.9))
    output = capsys.readouterr().out
    for change in (
        'learning_rate=0.5, which was 0.001',
        'weight_decay=0.3, which was 0.1',
        "schedule='constant', which was 'cosine'",
        'max_steps=8, which was 6',
    ):
        assert f'resumed with {change}' in output
    assert [row['train/lr'] for row in metrics(copied)][-2:] == ['0.5', '0.5']


def test_settings_that_a_script_lacks_are_named_when_it_continues_a_run(copied, capsys):
    state = load(copied)
    state['train_config']['grad_noise'] = 0.5  # of a copy of the script
    torch.save(state, copied / 'ckpt.pt')
    with pytest.raises(SystemExit):
        run('train.py', f'--resume_from={copied}')
    assert 'note: grad_noise=0.5, of the run of' in capsys.readouterr().out


@pytest.mark.faults
def test_the_best_of_another_evaluation_is_not_the_best_of_this_one(copied, place, monkeypatch):
    checkpoint = load(copied)
    torch.save({**checkpoint, 'best_val_loss': 0.1, 'best_step': 3}, copied / 'ckpt.pt')
    same_data = f'--dataset={place}/../{place.name}/letters'  # by another path
    run('train.py', f'--resume_from={copied}', '--max_steps=9', same_data)
    assert load(copied)['best_val_loss'] == 0.1
    monkeypatch.chdir(copied.parent)
    run('train.py', f'--resume_from={copied.name}', '--max_steps=12', '--eval_tokens=60')
    assert 1 < load(copied)['best_val_loss'] < 9 and load(copied)['best_step'] == 12


@pytest.mark.faults
def test_a_loose_copy_of_a_checkpoint_needs_a_folder_and_touches_nothing_beside_it(copied, tmp_path):
    loose = tmp_path / 'mine' / 'backup.pt'
    loose.parent.mkdir()
    shutil.copy(copied / 'ckpt.pt', loose)
    (loose.parent / 'config.json').write_text('mine')
    with pytest.raises(UserError, match='backup.pt stands in no run folder; add --out_dir=PATH'):
        run('train.py', f'--resume_from={loose}', '--max_steps=9')
    run('train.py', f'--resume_from={loose}', '--max_steps=9', f'--out_dir={tmp_path}/new')
    assert load(tmp_path / 'new')['global_step'] == 9
    assert sorted(path.name for path in loose.parent.iterdir()) == ['backup.pt', 'config.json']


@pytest.mark.faults
def test_only_what_a_run_itself_had_begun_to_write_is_cleared(copied):
    own = [copied / name for name in ('ckpt.pt.host.12.tmp', 'checkpoints/checkpoint-4/ckpt.pt.host.12.tmp')]
    others = [copied / name for name in ('other/ckpt.pt.host.12.tmp', 'data.12.tmp')]
    for path in own + others:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    run('train.py', f'--resume_from={copied}', '--max_steps=9')
    assert [path.exists() for path in own + others] == [False, False, True, True]


@pytest.mark.faults
@pytest.mark.parametrize('elsewhere', [False, True])
def test_a_run_that_another_process_continued_meanwhile_is_refused(copied, tmp_path, monkeypatch, elsewhere):
    def continue_run(*arguments):
        monkeypatch.undo()
        run('train.py', f'--resume_from={copied}', '--max_steps=9')
        return checkpoints.continue_run(*arguments)

    monkeypatch.setattr(checkpoints, 'continue_run', continue_run)
    if elsewhere:  # which is its own matter
        run('train.py', f'--resume_from={copied}', '--max_steps=12', f'--out_dir={tmp_path}/fork')
        assert load(tmp_path / 'fork')['global_step'] == 12
    else:
        with pytest.raises(UserError, match=f'Another process wrote {copied} meanwhile; start again'):
            run('train.py', f'--resume_from={copied}', '--max_steps=12')
    assert load(copied)['global_step'] == 9 and metrics(copied)[-1]['step'] == '9'


@pytest.mark.faults
def test_what_has_no_effect_is_reported_on_resume_and_none_is_as_it_comes(copied, capsys):
    run('train.py', f'--resume_from={copied}', '--max_steps=9', '--decay_ratio=0.5', '--n_kv_head=None')
    assert 'note: decay_ratio=0.5 has no effect with schedule=' in capsys.readouterr().out
    assert load(copied)['global_step'] == 9


@pytest.mark.faults
@pytest.mark.parametrize('elsewhere', [False, True])
def test_a_resume_without_wandb_keeps_the_id_of_its_run(copied, tmp_path, elsewhere):
    torch.save({**load(copied), 'wandb_run_id': 'abc'}, copied / 'ckpt.pt')
    more = [f'--out_dir={tmp_path}/elsewhere'] if elsewhere else []
    run('train.py', f'--resume_from={copied}', '--max_steps=9', *more)
    ids = [load(path)['wandb_run_id'] for path in [copied, tmp_path / 'elsewhere'][: 1 + elsewhere]]
    assert ids == ['abc', None][: 1 + elsewhere]


@pytest.mark.faults
def test_a_run_that_goes_on_elsewhere_has_a_best_of_its_own(copied, tmp_path):
    torch.save({**load(copied), 'best_val_loss': 0.1, 'best_step': 3}, copied / 'ckpt.pt')
    run('train.py', f'--resume_from={copied}', '--max_steps=9', f'--out_dir={tmp_path}/elsewhere')
    best = checkpoints.load(tmp_path / 'elsewhere/best.pt')
    assert best['global_step'] == load(tmp_path / 'elsewhere')['best_step'] == 9


def test_a_copy_under_checkpoints_goes_on_in_its_run(place, tmp_path):
    settings = [f'--dataset={place}/letters', '--save_every=2', '--save_total_limit=2', '--ema_decay=0.5']
    train(*settings, f'--out_dir={tmp_path}/run')
    shutil.copytree(tmp_path / 'run', tmp_path / 'reference')
    kept = tmp_path / 'run/checkpoints'
    assert sorted(path.name for path in kept.iterdir()) == ['checkpoint-4', 'checkpoint-6']
    train(*settings, f'--resume_from={kept}/checkpoint-4')
    assert_same_run(tmp_path / 'run', tmp_path / 'reference')
    assert len(metrics(tmp_path / 'run')) == 7


@pytest.mark.faults
def test_the_best_weights_of_a_run_stay_until_they_are_beaten_where_a_copy_goes_on(place, tmp_path):
    out, settings = tmp_path / 'run', ['--save_every=2', '--eval_every=2']
    train(f'--dataset={place}/letters', *settings, f'--out_dir={out}')
    before, best = (out / 'best.pt').read_bytes(), load(out, 'best.pt')['best_val_loss']
    train(*settings, f'--resume_from={out}/checkpoints/checkpoint-2', '--learning_rate=1e-9')
    assert (out / 'best.pt').read_bytes() == before
    assert (load(out)['best_step'], load(out)['best_val_loss']) == (6, best)


@pytest.mark.faults
def test_a_run_that_dies_in_an_evaluation_loses_no_step(place, tmp_path, monkeypatch):
    settings = [f'--dataset={place}/letters', f'--out_dir={tmp_path}/run', '--ema_decay=0.5']
    for evaluations, step in ((1, 0), (2, 3), (2, 6)):
        with monkeypatch.context() as patch, pytest.raises(DeadError):
            patch.setattr(sampling, 'generate', dies_at_call(sampling.generate, evaluations))
            train(*settings, '--resume_from=auto', '--sample_every=3')
        assert load(tmp_path / 'run')['global_step'] == step
    train(*settings, '--resume_from=auto')
    assert_same_run(tmp_path / 'run', place / 'run')
    assert len(metrics(tmp_path / 'run')) == 7


@pytest.mark.faults
def test_a_copy_that_a_kill_prevented_is_made_up_and_a_run_that_went_back_begins_there(place, tmp_path):
    out, settings = tmp_path / 'run', ['--save_every=2', '--save_total_limit=3']
    train(f'--dataset={place}/letters', *settings, f'--out_dir={out}')
    shutil.rmtree(out / 'checkpoints/checkpoint-6')
    train('--resume_from=auto', *settings, f'--out_dir={out}', '--max_steps=7')
    steps = {path.name for path in (out / 'checkpoints').iterdir()}
    assert steps == {'checkpoint-2', 'checkpoint-4', 'checkpoint-6'}
    with pytest.raises(UserError, match='loss is nan|not finite'):
        run(
            'train.py',
            f'--resume_from={out}/checkpoints/checkpoint-2',
            '--learning_rate=1e39',
            '--max_steps=9',
        )
    assert load(out)['global_step'] == 2  # not the one of step 7 beside metrics of step 2
    assert {path.name for path in (out / 'checkpoints').iterdir()} == {'checkpoint-2'}


@pytest.mark.faults
def test_a_reader_that_ends_lets_the_run_save(place, tmp_path):
    out, pipe = tmp_path / 'run', tmp_path / 'pipe'
    os.mkfifo(pipe)
    settings = [f'--dataset={place}/letters', f'--out_dir={out}', '--max_steps=100000', '--eval_every=100000']
    process = start('train.py', *TRAIN, *settings, log=pipe)
    with open(pipe) as reader:  # as `| head -2`
        lines = [reader.readline(), reader.readline()]
    finish(process)
    assert all(lines) and 0 < load(out)['global_step'] < 100000
    assert f'continue with --resume_from={out}' in (out / 'logs.log').read_text()


@pytest.mark.faults
def test_a_run_folder_that_another_process_writes_is_refused_until_that_is_killed(place, tmp_path, capsys):
    out, steps = tmp_path / 'run', ['--max_steps=100000', '--eval_every=100000']
    settings = [f'--dataset={place}/letters', f'--out_dir={out}', *steps]
    process = start('train.py', *TRAIN, *settings)
    wait_for_step(out, 3, process)
    for words in (['--resume_from=auto'], ['--overwrite']):
        with pytest.raises(UserError, match=f'Another process writes {out}; let it end'):
            train(*settings, *words)
    assert process.is_alive()
    process.kill()
    process.join()
    train(*settings, '--resume_from=auto', '--max_steps=5', '--overwrite')
    assert load(out)['global_step'] == 5
    assert f'overwrite=True has no effect where the run of {out}/ckpt.pt goes on' in capsys.readouterr().out


def test_float16_can_be_turned_on_in_the_middle_of_a_run(copied):
    variables = run('train.py', f'--resume_from={copied}', '--max_steps=8', '--dtype=float16')
    assert variables['scaler'].is_enabled() and load(copied)['scaler_state_dict']['scale'] > 0


# ---------------------------------------------------------------------------- ranks and micro-steps


def division(architecture, micro_steps, ranks):
    """Eight rows a step, however they are divided; with GPT-2's switches no weight is zero at first."""
    return [
        *TRAIN,
        *FIRST_STEP,
        *GPT2,
        '--mode=documents',
        '--p_belief=((0,1),)',
        f'--architecture={architecture}',
        f'--batch_size={8 // (micro_steps * ranks)}',
        f'--gradient_accumulation_steps={micro_steps}',
    ]


@pytest.mark.slow
@pytest.mark.parametrize('architecture', ['ar', 'diffusion', 'sdd'])
def test_the_gradient_is_the_same_for_any_number_of_micro_steps_and_ranks(tmp_path, architecture):
    """On documents of very different length, so that a mean of means would be something else."""
    texts = [LETTERS * (n % 4) * (6 if n % 3 == 0 else 1) for n in range(40)]
    folder, out = write_folder(tmp_path / 'letters', train=texts), tmp_path / 'run'
    data_and_out = [f'--dataset={folder}', f'--out_dir={out}']
    run('train.py', *division(architecture, 1, 1), *data_and_out)
    expected, loss = first_gradient(out)
    assert expected.norm() > 0.1
    for micro_steps, ranks in ((4, 1), (1, 2), (2, 2)):
        finish(
            *start_ranks('train.py', *division(architecture, micro_steps, ranks), *data_and_out, ranks=ranks)
        )
        gradient, same_loss = first_gradient(out)
        assert (gradient - expected).abs().max() < 1e-6
        assert same_loss == pytest.approx(loss, rel=1e-6)


@pytest.mark.slow
def test_two_ranks_of_torchrun_see_the_rows_of_one_and_stop_together(tmp_path):
    """The validation split is one batch, so that the second rank has none of it."""
    folder = write_folder(tmp_path / 'letters', val=['the cat sees a dog in its tree and sings'])
    out, reference, steps = tmp_path / 'run', tmp_path / 'reference', 150
    settings = [*TRAIN, f'--dataset={folder}', f'--max_steps={steps}', '--eval_every=60']
    settings += ['--learning_rate=0.0003']
    torchrun = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2']
    command = [*torchrun, ROOT / 'train.py', *settings, f'--out_dir={out}']
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    path = out / 'metrics.csv'
    while process.poll() is None and not (path.exists() and path.read_text().count('\n') > 6):
        time.sleep(0.002)
    process.terminate()
    output = process.communicate()[0]
    stopped_at = load(out)['global_step']
    assert 5 <= stopped_at < steps and f'stopped at step {stopped_at} of {steps}' in output, output
    resumed = start_ranks('train.py', *settings, f'--out_dir={out}', '--resume_from=auto')
    run('train.py', *settings, '--batch_size=8', f'--out_dir={reference}')
    finish(*resumed)
    rows = [row for row in metrics(out) if row['step'] != str(stopped_at)]
    expected_rows = [row for row in metrics(reference) if row['step'] != str(stopped_at)]
    for row, expected in zip(rows, expected_rows, strict=True):
        assert row['step'] == expected['step'] and row['train/epoch'] == expected['train/epoch']
        for name in ('train/loss', 'val/loss'):
            tolerance = 1e-6 if row['step'] in '01' else 1e-3
            assert row[name] == expected[name] or abs(float(row[name]) - float(expected[name])) < tolerance


# ---------------------------------------------------------------------------- what cannot go on

RESUME = ['--resume_from=RUN', '--max_steps=9']
BAD_RESUMES = {
    'another shape': ([*RESUME, '--n_layer=3'], 'RUN.* has n_layer=1, not 3'),
    'another start': ([*RESUME, '--init_from=PLACE/run'], "has init_from='', not 'PLACE/run'; leave"),
    'another seed': ([*RESUME, '--seed=1'], 'has seed=0, not 1; leave --seed out'),
    'other rows per step': ([*RESUME, '--batch_size=8'], '4 rows per step, not 8.*keep the product'),
    'weights alone': (
        ['--resume_from=RUN/best.pt'],
        'best.pt holds weights without.*--init_from=RUN/best.pt',
    ),
    'the folder of another run': ([*RESUME, '--out_dir=PLACE/run'], 'PLACE/run already holds a run'),
    'another vocabulary': (
        [*RESUME, '--dataset=DATA/abc'],
        r'RUN/ckpt.pt has another vocabulary \(30 tokens\) than DATA/abc \(6\)',
    ),
    'data that were prepared anew': (
        [*RESUME, '--dataset=PLACE/letters'],
        'val_index.bin, val_tokens.bin changed since the run of RUN.*go on all the same with --changed_data',
    ),
    'data prepared anew since an earlier version': (
        [*RESUME],
        'train_tokens.bin changed since the run of RUN',
    ),
}


@pytest.mark.faults
@pytest.mark.parametrize('words', [['--changed_data'], ['--dataset=PLACE/others']], ids=str)
def test_other_data_are_taken_on_purpose_and_the_log_says_so(place, copied, words):
    state = load(copied)
    torch.save({**state, 'data': {**state['data'], 'train_tokens.bin': 'before'}}, copied / 'ckpt.pt')
    run(
        'train.py',
        f'--resume_from={copied}',
        '--max_steps=8',
        *(fill_in(word, PLACE=place) for word in words),
    )
    said = re.search(
        "resumed with train_tokens.bin='(.*)', which was 'before'", (copied / 'logs.log').read_text()
    )
    assert load(copied)['data']['train_tokens.bin'] == said[1]
    assert load(copied)['train_config']['max_steps'] == 8


@pytest.mark.parametrize('case', BAD_RESUMES)
def test_a_run_that_cannot_go_on_is_refused_and_left_as_it_is(place, copied, tmp_path, case):
    write_folder(tmp_path / 'abc', letters='abc', train=['abc' * 20], val=['abc' * 20])
    if case.startswith('data'):
        state = load(copied)
        data = {**state['data'], 'val_tokens.bin': 'another', 'val_index.bin': 'another'}
        data = data if 'version' not in case else 'the hash of other data'
        torch.save({**state, 'data': data}, copied / 'ckpt.pt')
    names = dict(RUN=copied, DATA=tmp_path, PLACE=place)
    before = fingerprints(tmp_path), fingerprints(place)
    words, expected = BAD_RESUMES[case]
    with pytest.raises(UserError, match=fill_in(expected, **names)) as error:
        run('train.py', *(fill_in(word, **names) for word in words))
    assert '\n' not in str(error.value)
    assert before == (fingerprints(tmp_path), fingerprints(place))


def test_annealing_is_fixed_for_a_run(place, tmp_path):
    words = [fill_in(word, PLACE=place) for word in CASES['converted']]
    train(*words, '--max_steps=2', f'--out_dir={tmp_path}/run')
    state = load(tmp_path / 'run')
    assert state['model_config']['shift'] and state['train_config']['anneal_steps'] == 70
    assert json.loads((tmp_path / 'run/config.json').read_text())['anneal_steps'] == 70
    with pytest.raises(UserError, match='anneal_steps=70, not 2'):
        run('train.py', f'--resume_from={tmp_path}/run', '--max_steps=9', '--anneal_steps=2')
    run('train.py', f'--resume_from={tmp_path}/run', '--max_steps=3')
    assert load(tmp_path / 'run')['train_config']['init_from'] == f'{place}/run'


def test_a_rank_that_hangs_ends_the_others_with_a_sentence_in_the_time_that_is_set(place, tmp_path):
    out, log = tmp_path / 'run', tmp_path / 'log'
    settings = f'--dataset={place}/letters', '--max_steps=100000', f'--out_dir={out}'
    waiting, hung = start_ranks('train.py', *TRAIN, *settings, log=log, RANK_TIMEOUT='4')
    wait_for_step(out, 2, waiting)
    os.kill(hung.pid, signal.SIGSTOP)
    waiting.join(30)
    hung.kill()
    assert waiting.exitcode == 1
    assert 'error: rank 0 has lost another one, which ended or hung for 4 s' in log.read_text()
