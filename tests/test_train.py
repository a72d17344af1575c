"""Check what a run of train.py leaves and logs, what it refuses, and from where it runs."""

import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys

import pytest
import torch
import wandb
from conftest import largest_file, write_folder
from helpers import CPU, GPT2, TRAIN, fill_in, fingerprints, load, losses, metrics, run, same, train

from lm.configurator import ROOT, UserError
from lm.folder import open_dataset, version_of


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    """A folder with prepared data, letters/, and a run on it that is at its end, run/."""
    path = tmp_path_factory.mktemp('train')
    write_folder(path / 'letters')
    train(f'--dataset={path}/letters', f'--out_dir={path}/run', '--ema_decay=0.5')
    return path


# ---------------------------------------------------------------------------- what a run leaves


def test_the_checkpoint_has_all_that_other_scripts_need(place):
    checkpoint = load(place / 'run')
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
    assert checkpoint['tokenizer'] == (place / 'letters/tokenizer.json').read_text()
    assert not same(checkpoint['ema_state_dict'], checkpoint['model_state_dict'])


def test_the_run_folder_has_its_files_and_they_agree(place):
    out = place / 'run'
    files = 'config.json ckpt.pt best.pt logs.log metrics.csv eval_results.json'
    assert {path.name for path in out.iterdir()} == set(files.split())
    rows, results = metrics(out), json.loads((out / 'eval_results.json').read_text())
    assert [row['step'] for row in rows] == list('0123456')
    evaluated = {int(row['step']): float(row['val/loss']) for row in rows if row['val/loss']}
    assert set(evaluated) == {0, 3, 6} and results['val/loss'] == evaluated[6]
    assert results['best_val_loss'] == min(evaluated.values()) == load(out)['best_val_loss']
    assert load(out, 'best.pt')['global_step'] == results['best_step']
    assert json.loads((out / 'config.json').read_text()) == json.loads(json.dumps(load(out)['train_config']))
    assert 'step 6/6: loss' in (out / 'logs.log').read_text()


def test_val_loss_is_that_of_the_average_and_bpb_counts_bytes(place, tmp_path):
    average = load(place / 'run')['ema_state_dict']
    torch.save({**load(place / 'run'), 'model_state_dict': average}, tmp_path / 'average.pt')
    settings = [f'--dataset={place}/letters', f'--out_dir={tmp_path}/run', '--max_steps=1']
    train(*settings, f'--init_from={tmp_path}/average.pt')
    first, last = metrics(tmp_path / 'run')[0], metrics(place / 'run')[-1]
    assert first['val/loss'] == last['val/loss']
    sizes = json.loads((place / 'letters/config.json').read_text())['splits']['val']
    loss = float(first['val/loss'])
    assert math.isclose(float(first['val/bpb']), loss / math.log(2) * sizes['tokens'] / sizes['bytes'])
    assert math.isclose(float(first['val/perplexity']), math.exp(loss))


def test_init_from_starts_a_new_run_with_the_weights(place, tmp_path):
    settings = [f'--dataset={place}/letters', f'--init_from={place}/run/ckpt.pt', '--learning_rate=0']
    train(*settings, f'--out_dir={tmp_path}/run', '--max_steps=1')
    started, given = load(tmp_path / 'run'), load(place / 'run')
    assert started['global_step'] == 1
    assert same(started['model_state_dict'], given['ema_state_dict'])  # the average, as everywhere else


# ---------------------------------------------------------------------------- training


@pytest.mark.slow
@pytest.mark.parametrize(
    'words',
    [
        ['--architecture=ar', '--optimizer=muon'],
        ['--architecture=diffusion'],
        ['--architecture=sdd', '--mode=documents'],
    ],
    ids=' '.join,
)
def test_the_model_learns(place, tmp_path, words):
    settings = [f'--dataset={place}/letters', '--max_steps=100', '--eval_every=100', '--log_every=100']
    variables = train(*settings, *words, '--learning_rate=0.03', f'--out_dir={tmp_path}/run')
    first, last = losses(tmp_path / 'run')
    assert last < first - 0.5
    if 'documents' not in words[-1]:  # padding is paid for by the text
        assert abs(first - math.log(28)) < 0.3  # at first every letter is as likely
    dtype = torch.bfloat16 if 'bfloat16' in words[-1] else torch.float32
    assert {p.dtype for p in variables['raw_model'].parameters()} == {dtype}


@pytest.mark.parametrize('architecture', ['ar', 'sdd'])
def test_evaluation_never_changes_training(place, tmp_path, architecture):
    settings = [f'--dataset={place}/letters', f'--architecture={architecture}', '--dropout=0.2']
    train(*settings, f'--out_dir={tmp_path}/all')
    more = ['--eval_tokens=64', '--eval_every=2', '--sample_every=2', '--sample_tokens=4']
    train(*settings, *more, f'--out_dir={tmp_path}/some')
    one, other = tmp_path / 'all', tmp_path / 'some'
    assert same(load(one)['model_state_dict'], load(other)['model_state_dict'])
    assert [row['train/loss'] for row in metrics(one)] == [row['train/loss'] for row in metrics(other)]


def test_sdd_logs_its_candidates_its_loss_without_them_and_what_it_finds_of_the_padding(place, tmp_path):
    settings = ['--architecture=sdd', '--mode=documents', '--block_size=128', '--max_steps=8']
    settings += ['--k_schedule=(1, 3)', '--k_warmup_steps=8', '--p_belief=((0.0, 1.0),)']
    train(f'--dataset={place}/letters', *settings, f'--out_dir={tmp_path}/run')
    rows = metrics(tmp_path / 'run')
    assert [row['train/k'] for row in rows[1:]] == ['1'] * 4 + ['3'] * 4
    for row in rows[1:]:
        assert 0 <= float(row['train/ignore_acc']) <= 1 >= float(row['train/ignore_precision'])
    evaluated = [(float(row['val/loss']), float(row['val/loss_k0'])) for row in rows if row['val/loss']]
    assert len(evaluated) == 4 and evaluated[0][0] != evaluated[0][1]
    assert all(abs(loss - loss_k0) < 1 for loss, loss_k0 in evaluated)
    assert load(tmp_path / 'run')['model_config']['k'] == 3  # the most that it was trained on


def test_a_tenth_of_the_steps_is_annealed_after_ar_and_none_from_scratch(place, tmp_path):
    settings = [f'--dataset={place}/letters', '--max_steps=20', '--eval_every=20']
    diffusion = [*settings, '--architecture=diffusion']
    started = train(*diffusion, f'--init_from={place}/run/best.pt', f'--out_dir={tmp_path}/started')
    assert started['anneal_steps'] == 2 and started['raw_model'].attn_mask is None  # at the end
    assert train(*diffusion, f'--out_dir={tmp_path}/scratch')['anneal_steps'] == 0
    with pytest.raises(UserError, match='anneal_steps is 3, but the attention of this model does not change'):
        train(*settings, '--anneal_steps=3', f'--out_dir={tmp_path}/no')
    assert not (tmp_path / 'no').exists()


def test_samples_are_shown_at_evaluations(place, tmp_path, capsys):
    settings = [f'--dataset={place}/letters', '--sample_every=3', '--num_samples=1']
    train(*settings, f'--out_dir={tmp_path}/run')
    assert re.findall('a sample at step (.)', capsys.readouterr().out) == ['0', '3', '6']
    train(*settings, '--eval_every=2', f'--out_dir={tmp_path}/between')
    assert re.findall('a sample at step (.)', capsys.readouterr().out) == ['0', '4', '6']


def test_epochs_can_be_given_instead_of_steps(place, tmp_path):
    settings = [word for word in TRAIN if 'max_steps' not in word]
    out = tmp_path / 'run'
    variables = run(
        'train.py', *settings, f'--dataset={place}/letters', f'--out_dir={out}', '--num_epochs=0.1'
    )
    steps = math.ceil(0.1 * variables['batches'].rows.num_rows / 4)
    assert variables['step'] == load(out)['train_config']['max_steps'] == steps


def test_the_block_size_is_what_the_data_were_prepared_for_unless_given(place, tmp_path):
    folder = shutil.copytree(place / 'letters', tmp_path / 'letters')
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**config, 'max_seq_len': 24}))
    settings = [word for word in TRAIN if 'block_size' not in word] + [f'--dataset={folder}', '--max_steps=1']
    assert run('train.py', *settings, f'--out_dir={tmp_path}/1')['block_size'] == 24
    assert run('train.py', *settings, f'--out_dir={tmp_path}/2', '--block_size=16')['block_size'] == 16
    run('train.py', *settings, f'--out_dir={tmp_path}/long', '--block_size=32')
    tuned = run('train.py', *settings, f'--init_from={tmp_path}/long', f'--out_dir={tmp_path}/3')
    assert tuned['block_size'] == 24
    resumed = run('train.py', f'--resume_from={tmp_path}/2', '--max_steps=2')
    assert resumed['block_size'] == resumed['config']['block_size'] == 16


@pytest.mark.parametrize('mode', ['packed', 'documents'])
def test_a_step_without_a_token_in_the_loss_has_no_loss(make_folder, tmp_path, mode):
    out = tmp_path / 'run'
    train(f'--dataset={make_folder(train_on="q")}', f'--mode={mode}', f'--out_dir={out}')
    assert {row['train/loss'] for row in metrics(out)[1:]} == {'0.0'}


def test_padding_is_no_token_per_second(place, tmp_path):
    words = [f'--dataset={place}/letters', '--mode=documents', '--max_steps=1']
    rates = []
    for block_size in (32, 256):  # of the same texts, more of the longer rows is padding
        variables = train(*words, f'--block_size={block_size}', f'--out_dir={tmp_path}/{block_size}')
        rows, folder = variables['batches'], variables['folder']
        rates.append(variables['speed'].tokens * rows.rows.num_rows / rows.rows_per_step)
        assert rates[-1] == pytest.approx(len(folder.tokens['train']))


def test_a_loss_that_is_not_finite_stops_the_run_and_the_checkpoint_before_it_is_kept(place, tmp_path):
    settings = [*GPT2, '--learning_rate=1e30', '--warmup_steps=0', '--max_steps=9']
    with pytest.raises(UserError, match=r'The loss is nan at step \d; .*learning_rate than 1e\+30'):
        train(f'--dataset={place}/letters', f'--out_dir={tmp_path}/run', *settings)
    assert all(weight.isfinite().all() for weight in load(tmp_path / 'run')['model_state_dict'].values())


@pytest.mark.faults
def test_weights_that_are_not_finite_replace_no_checkpoint_and_the_run_is_not_done(place, tmp_path, capsys):
    settings = [f'--dataset={place}/letters', '--warmup_steps=0', '--schedule=constant', '--max_steps=1']
    with pytest.raises(
        UserError, match=r'\S+ is not finite after step 1; the last checkpoint is kept; try a lower'
    ):
        train(*settings, *GPT2, '--learning_rate=1e39', f'--out_dir={tmp_path}/run')
    checkpoint = load(tmp_path / 'run')
    assert checkpoint['global_step'] == 0 and 'done' not in capsys.readouterr().out
    assert all(weight.isfinite().all() for weight in checkpoint['model_state_dict'].values())


@pytest.mark.faults
def test_a_full_disk_ends_a_run_in_one_sentence_and_the_state_before_goes_on(place, tmp_path):
    settings = [f'--dataset={place}/letters', f'--out_dir={tmp_path}/run', '--ema_decay=0.5']
    train(*settings, '--max_steps=3')
    size = (tmp_path / 'run/ckpt.pt').stat().st_size
    with pytest.raises(UserError, match='ckpt.pt could not be written .*what was there before still is'):
        with largest_file(size - 9000):
            train(*settings, '--resume_from=auto')
    assert not list((tmp_path / 'run').glob('*.tmp')) and load(tmp_path / 'run')['global_step'] == 3
    train(*settings, '--resume_from=auto')
    assert load(tmp_path / 'run')['global_step'] == 6


def test_the_hubs_token_is_written_nowhere(place, tmp_path):
    out = tmp_path / 'run'
    train(f'--dataset={place}/letters', f'--out_dir={out}', '--token=hf_secret', '--max_steps=2')
    files = [path for path in out.rglob('*') if path.is_file()]
    assert files and not [path for path in files if b'hf_secret' in path.read_bytes()]


# ---------------------------------------------------------------------------- from where it runs


@pytest.mark.slow
def test_a_copy_under_another_name_runs_from_another_folder_and_a_mistake_is_one_line(place, tmp_path):
    """The copy lies in a folder that is as the repository's root: its own files are links."""
    root, elsewhere = tmp_path / 'copy', tmp_path / 'elsewhere'
    for folder in (root, elsewhere):
        folder.mkdir()
    for name in ('lm', 'model.py', 'sampling.py', 'config'):
        (root / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / 'train.py', root / 'my_train.py')
    command = [sys.executable, '../copy/my_train.py', *TRAIN, f'--dataset={place}/letters']
    command += ['--max_steps=2', '--out_dir=run']
    environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}

    def start(*words):
        options = dict(cwd=elsewhere, env=environment, text=True, stderr=subprocess.STDOUT)
        return subprocess.Popen([*command, *words], stdout=subprocess.PIPE, **options)

    first = start('--learning_rat=1')
    second = start('config/stories.py', *command[2:])
    output = first.communicate()[0]
    assert first.returncode == 1 and len(output.splitlines()) == 1
    assert output.startswith("error: Unknown key 'learning_rat'")
    output = second.communicate()[0]
    assert second.returncode == 0, output
    assert load(elsewhere / 'run')['global_step'] == 2


@pytest.mark.faults
def test_save_steps_alone_leave_a_copy_each_and_a_limit_without_them_is_reported(place, tmp_path, capsys):
    train(f'--dataset={place}/letters', '--save_steps=2', f'--out_dir={tmp_path}/run')
    copies = sorted(path.name for path in (tmp_path / 'run/checkpoints').iterdir())
    assert copies == ['checkpoint-2', 'checkpoint-4', 'checkpoint-6']
    train(f'--dataset={place}/letters', '--save_total_limit=2', '--max_steps=1', f'--out_dir={tmp_path}/b')
    assert 'note: save_total_limit=2 has no effect without save_every.' in capsys.readouterr().out


# ---------------------------------------------------------------------------- bad input

BAD_SETTINGS = {
    '--learning_rat=1': "'learning_rat'.*nearest is 'learning_rate'",
    '--batch_size=many': '--batch_size=many gives str where int is wanted',
    '--dataset=nowhere': "no prepared data at 'nowhere'.*python prepare/",
    '--block_size=5000': 'tokens, a row 5001; choose a smaller block_size',
    '--architecture=rnn': "architecture is 'rnn'; choose ar or diffusion",
    '--model_size=huge': "model_size is 'huge'; choose tiny",
    '--schedule=steps': "schedule is 'steps'; choose cosine or linear",
    '--optimizer=sgd': "optimizer is 'sgd'; choose adamw or muon",
    '--mode=lines': "mode is 'lines'; choose 'packed' or 'documents'",
    '--dtype=int8': "dtype is 'int8'; choose auto",
    '--device=cuda:99': 'cuda:99.*--device=cpu|no GPU 99',
    '--init_from=nowhere.pt': 'no checkpoint at nowhere.pt; correct the path',
    '--resume_from=nowhere': 'no checkpoint at nowhere; correct the path',
    '--resume_from=auto': '--out_dir=PATH',
    '--n_head=5': 'n_embd=16 is no even multiple of n_head=5',
    '--dropout=1.0': 'dropout is 1.0',
    '--beta1=1.5': 'beta1 is 1.5; it must be at least 0 and below 1',
    '--ema_decay=1': 'ema_decay is 1.0; it must be at least 0 and below 1',
    '--p_belief=0.5': r'p_belief is \(0.5,\)',
    '--mask_ratio=(0.8,0.2)': r'mask_ratio is \(0.8, 0.2\)',
    '--mask_ratio=0.5': r'mask_ratio is \(0.5,\)',
    "--p_belief=((0.5,'x'),)": r'p_belief is \(\(0.5',
    '--noisy_every=0': 'noisy_every is 0',
    '--architecture=diffusion --block_length=(4,6)': 'Blocks of 6 do not fill .*; choose block_size=12',
    '--k_schedule=()': 'k_schedule is',
    '--max_steps=0': 'max_steps is 0, num_epochs 0.0: nothing to do; give one',
    **{
        f'--{key}={value}': f'{key} is {value}; it must be at least 1'
        for key, value in (
            ('batch_size', 0),
            ('gradient_accumulation_steps', -2),
            ('eval_every', 0),
            ('log_every', -1),
        )
    },
    **{
        f'--{key}=-1': f'{key} is -1.*; it must be at least 0'
        for key in 'learning_rate weight_decay grad_clip eval_tokens save_every warmup_steps k_warmup_steps'.split()
    },
}


@pytest.mark.parametrize('setting', BAD_SETTINGS)
def test_a_bad_setting_is_refused_before_anything_is_written(place, tmp_path, monkeypatch, setting):
    monkeypatch.setattr('lm.run_folder.ROOT', tmp_path)
    with pytest.raises(UserError, match=BAD_SETTINGS[setting]) as error:
        train(f'--dataset={place}/letters', *re.split(' (?=--)', setting))
    assert '\n' not in str(error.value) and list(tmp_path.iterdir()) == []


@pytest.mark.faults
def test_a_run_does_not_overwrite_what_it_starts_from(place, tmp_path):
    shutil.copytree(place / 'run', tmp_path / 'run')
    with pytest.raises(UserError, match='holds what the run starts from'):
        train(
            f'--dataset={place}/letters',
            f'--init_from={tmp_path}/run',
            f'--out_dir={tmp_path}/run',
            '--overwrite',
        )
    assert (tmp_path / 'run/ckpt.pt').exists()


@pytest.mark.faults
def test_settings_without_effect_are_reported(place, tmp_path, capsys):
    words = '--decay_ratio=0.3 --run_suffix=x --decay_embedding=False --num_samples=1 --revision=main'.split()
    words += ['--changed_data', '--wandb_run_name=x']
    train(f'--dataset={place}/letters', f'--out_dir={tmp_path}/run', '--max_steps=1', *words)
    said = capsys.readouterr().out
    without = [f'without {name}' for name in ('muon', 'sample_every', 'init_from', 'resume_from')]
    for note in ('schedule=cosine', 'beside out_dir', 'beside no_wandb', *without):
        assert f'has no effect with {note}' in said or f'has no effect {note}' in said, note


@pytest.mark.faults
def test_a_size_that_the_start_does_not_have_is_refused(place):
    words = [*CPU, f'--dataset={place}/letters', f'--init_from={place}/run', '--model_size=xl']
    with pytest.raises(UserError, match='run has n_layer=1, not 24; leave it out'):
        run('train.py', *words)


BAD_STARTS = {  # the arguments, what the error says
    'a folder that holds a run': (['--out_dir=PLACE/run'], 'PLACE/run already holds a run; .*--overwrite'),
    'weights of another shape': (
        ['--init_from=PLACE/run', '--n_layer=3'],
        'run has n_layer=1, not 3; leave it out',
    ),
    'weights of another vocabulary': (
        ['--init_from=PLACE/run', '--dataset=DATA/abc'],
        r'run has another vocabulary \(30 tokens\) than DATA/abc \(6\)',
    ),
    'validation data that are too short': (
        ['--out_dir=PLACE/run', '--overwrite', '--dataset=DATA/short'],
        'DATA/short has 2 val tokens, a row 17',
    ),
    'an out_dir that is a file': (['--out_dir=DATA/cut.pt'], 'cut.pt could not be written'),
    'an out_dir below a file': (['--out_dir=DATA/cut.pt/run'], 'cut.pt/run could not be written'),
    'an out_dir that nobody can write': (['--out_dir=/proc/run'], '/proc/run could not be written'),
    'a relative dataset of another folder': (['--dataset=letters'], "'letters' in .*or at .*data/letters"),
    'a checkpoint cut in half': (['--init_from=DATA/cut.pt'], 'cut.pt is damaged .*; take another one'),
    'a file of another kind': (['--init_from=PLACE/letters/config.json'], 'config.json is damaged or no'),
}


@pytest.mark.parametrize('case', BAD_STARTS)
def test_a_start_that_cannot_be_is_refused_and_no_run_is_changed(place, tmp_path, case):
    shutil.copy(place / 'run/ckpt.pt', tmp_path / 'cut.pt')
    os.truncate(tmp_path / 'cut.pt', (tmp_path / 'cut.pt').stat().st_size // 2)
    write_folder(tmp_path / 'abc', letters='abc', train=['abc' * 20], val=['abc' * 20])
    write_folder(tmp_path / 'short', val=['a'])
    names = dict(PLACE=place, DATA=tmp_path)
    words, expected = BAD_STARTS[case]
    before = fingerprints(place), fingerprints(tmp_path)
    with pytest.raises(UserError, match=fill_in(expected, **names)) as error:
        train(f'--dataset={place}/letters', *(fill_in(word, **names) for word in words))
    assert '\n' not in str(error.value)
    assert before == (fingerprints(place), fingerprints(tmp_path))


# ---------------------------------------------------------------------------- W&B


def read_wandb(path):
    """Yield the protobuf records of a .wandb file: LevelDB's log format, blocks of 32 KB."""
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


@pytest.mark.slow
def test_wandb_has_the_names_and_values_of_metrics_csv(place, tmp_path, monkeypatch):
    monkeypatch.setenv('WANDB_MODE', 'offline')
    monkeypatch.setenv('WANDB_SILENT', 'true')
    monkeypatch.setenv('WANDB_CACHE_DIR', str(tmp_path))
    out = tmp_path / 'a-run'
    train(f'--dataset={place}/letters', f'--out_dir={out}', '--no_wandb=False')
    wandb.teardown()  # the file is written by a process of its own, which ends here
    (file,) = out.glob('wandb/offline-run-*/*.wandb')
    records = list(read_wandb(file))
    (started,) = (record.run for record in records if record.WhichOneof('record_type') == 'run')
    assert (started.project, started.display_name) == ('diffusion-lm', 'a-run')
    assert started.run_id == load(out)['wandb_run_id']
    assert {'architecture', 'n_layer', 'learning_rate'} <= {item.key for item in started.config.update}
    rows = [record.history.item for record in records if record.WhichOneof('record_type') == 'history']
    history = [{(i.nested_key or [i.key])[0]: json.loads(i.value_json) for i in row} for row in rows]
    names = 'loss accuracy perplexity lr tokens_per_sec grad_norm mfu epoch'
    expected = {f'train/{name}' for name in names.split()}
    expected |= {f'val/{name}' for name in 'loss accuracy perplexity bpb'.split()}
    assert set().union(*history) >= expected
    for logged, row in zip(history, metrics(out), strict=True):
        assert logged['_step'] == int(row.pop('step'))
        values = {name: float(cell) for name, cell in row.items() if cell}
        assert {name: logged[name] for name in values} == pytest.approx(values)


def test_a_failure_of_wandb_does_not_stop_training(place, tmp_path, monkeypatch, capsys):
    def fail(**settings):
        raise wandb.errors.CommError('no service today')

    monkeypatch.setattr(wandb, 'init', fail)
    monkeypatch.setenv('WANDB_MODE', 'offline')
    train(f'--dataset={place}/letters', f'--out_dir={tmp_path}/run', '--no_wandb=False')
    assert 'W&B failed (CommError: no service today); the run goes on without it.' in capsys.readouterr().out
    assert load(tmp_path / 'run')['global_step'] == 6


# ---------------------------------------------------------------------------- what made a run


def test_a_log_says_which_command_commit_and_data_made_the_run(place):
    command, origin, summary = (place / 'run/logs.log').read_text().splitlines()[:3]
    assert command.startswith('$ python train.py ') and command.endswith('--ema_decay=0.5')
    assert re.match(r'commit \S+, torch 2\S+, \d+ of \d+ cores of ', origin)
    assert summary.endswith(version_of(open_dataset(place / 'letters')))
