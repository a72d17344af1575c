"""The process, its metrics and its log."""

import csv
import math
import os
import signal
import sys

import pytest
import torch
from conftest import random_model, signals_kept

from lm import runtime
from lm.configurator import UserError
from lm.data import Batch

SHAPE = dict(vocab_size=30, block_size=16, n_layer=2, n_head=2, n_embd=16, mask_id=28, ignore_id=29)
CPU = torch.device('cpu')


# ---------------------------------------------------------------------------- device and precision


@pytest.mark.parametrize(
    'call, expected',
    [
        (lambda: runtime.pick_device('gpu'), "device is 'gpu'; choose auto, cpu, cuda"),
        (lambda: runtime.pick_device('meta'), "device is 'meta', but PyTorch finds none .*--device=cpu"),
        (lambda: runtime.pick_dtype('int8', CPU), "dtype is 'int8'; choose auto, bfloat16"),
    ],
)
def test_a_name_that_cannot_be_is_refused(call, expected):
    with pytest.raises(UserError, match=expected):
        call()


def test_auto_is_a_device_and_a_precision_that_it_has(monkeypatch):
    assert runtime.pick_device('auto').type in ('cpu', 'cuda', 'mps')
    for has_bfloat16, expected in ((True, 'bfloat16'), (False, 'float32')):
        monkeypatch.setattr(runtime, 'has_bfloat16', lambda device: has_bfloat16)
        assert runtime.pick_dtype('auto', CPU) == expected
    assert runtime.pick_dtype('auto', torch.device('cuda')) == 'float16'  # an older GPU


def test_autocast_computes_in_the_precision_that_was_picked():
    for name, dtype in (('float32', torch.float32), ('bfloat16', torch.bfloat16)):
        dist = runtime.Runtime('cpu', name)
        with dist.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype
        assert not dist.scaler().is_enabled()
    assert runtime.Runtime('cpu', 'float16').scaler().is_enabled()


def test_dropout_is_seeded_by_each_part_of_its_key():
    def draw(*key):
        runtime.seed_dropout(*key)
        return torch.rand(4).tolist()

    keys = [(0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (1, 0, 0, 0), (0, 0, 0, 0)]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)
    assert draw(*keys[0]) == draw(*keys[0])


# ---------------------------------------------------------------------------- speed and memory


def test_operations_per_token_are_those_of_the_matmuls():
    model = random_model('ar', 0.1, **SHAPE)
    layers, head = 2 * 12 * 16**2, 64 * 16
    assert runtime.flops_per_token(model) == 6 * (layers + head) + 12 * 2 * 16 * 16
    untied = random_model('ar', 0.1, **SHAPE, tied=False, position='learned')
    assert runtime.flops_per_token(untied) == runtime.flops_per_token(model)  # tables cost nothing


def test_the_peak_is_that_of_a_matmul():
    assert 1e8 < runtime.measure_peak_flops(CPU, 'float32') < 1e15


@pytest.mark.parametrize('kind, share', [('weights', 3), ('gradients', 2), ('optimizer', 2)])
def test_the_memory_estimate_knows_weights_in_bfloat16(kind, share):
    dist, estimates = runtime.Runtime('cpu', 'bfloat16'), []
    for dtype in (torch.float32, torch.bfloat16):
        model = random_model('ar', 0.1, **{**SHAPE, 'n_embd': 64}).to(dtype)
        estimates.append(runtime.memory_estimate(model, 4, 16, dist)[kind])
    assert estimates[0] == pytest.approx(share * estimates[1], rel=0.05)  # autocast copies float32 weights


# ---------------------------------------------------------------------------- metrics


def test_means_are_over_the_counted_tokens_and_accuracy_over_the_predicted():
    sums = {'loss': 20.0, 'count': 10.0, 'correct': 3.0, 'predicted': 4.0}
    assert runtime.means('train', sums) == {
        'train/loss': 2.0,
        'train/perplexity': math.exp(2.0),
        'train/accuracy': 0.75,
    }
    assert runtime.means('val', {'loss': 0.0, 'count': 0.0})['val/loss'] == 0.0  # a step without loss
    assert runtime.means('val', {'loss': 1e9, 'count': 1.0})['val/perplexity'] < math.inf


def test_recall_and_precision_of_padding_are_of_training_and_the_loss_of_text_of_evaluation():
    sums = dict(loss=20.0, count=10.0, ignore_correct=2.0, ignore_targets=8.0, ignore_guesses=4.0)
    sums['text_loss'] = 5.0
    train, val = runtime.means('train', sums), runtime.means('val', sums)
    assert (train['train/ignore_acc'], train['train/ignore_precision']) == (0.25, 0.5)
    assert val['val/text_loss'] == 0.5 and not {'val/ignore_acc', 'train/text_loss'} & {*train, *val}
    without = runtime.means('val', {**sums, 'ignore_targets': 0.0})
    assert set(without) == {'val/loss', 'val/perplexity'}


def test_a_metric_of_ones_own_is_a_mean_over_the_counted_tokens_under_its_name():
    values = runtime.means('train', {'loss': 20.0, 'count': 10.0, 'entropy': 5.0})
    assert values['train/entropy'] == 0.5
    sums = {}
    for _ in range(2):
        runtime.add(sums, torch.tensor(1.0), torch.tensor(2), {'entropy': torch.tensor(3.0)})
    assert sums == {'loss': 2.0, 'count': 4.0, 'entropy': 6.0}


@pytest.mark.parametrize('architecture', ['ar', 'sdd'])
def test_evaluation_sums_over_batches_of_any_size(architecture):
    model = random_model(architecture, 0.4, **SHAPE).train()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 28, (5, 16), generator=generator)
    noise = torch.rand(5, 17, generator=generator)
    dist = runtime.Runtime('cpu', 'float32')
    parts = [Batch(tokens[i], None, noise[i]) for i in (slice(0, 1), slice(1, 5))]
    split, whole = (
        runtime.evaluate(model, batches, dist, 2.0) for batches in (parts, [Batch(tokens, None, noise)])
    )
    assert split == pytest.approx(whole, rel=1e-5) and model.training
    assert split['val/bpb'] == pytest.approx(split['val/loss'] / math.log(2) * 2)
    assert ('val/loss_k0' in split) == model.has_beliefs
    assert split.get('val/loss_k0') != split['val/loss']


def test_a_loss_that_is_not_finite_is_an_error_that_says_what_to_do():
    runtime.check_finite(1.0, 3, 0.1)
    for loss in (math.nan, math.inf):
        with pytest.raises(UserError, match=f'The loss is {loss} at step 3.*lower learning_rate than 0.1'):
            runtime.check_finite(loss, 3, 0.1)


# ---------------------------------------------------------------------------- signals


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_the_first_signal_is_noted_and_the_second_ends_the_process(monkeypatch, number):
    exits = []
    monkeypatch.setattr(os, '_exit', exits.append)
    with signals_kept():
        stop = runtime.StopSignal()
        assert not stop.received
        os.kill(os.getpid(), number)
        assert stop.received == number.name and exits == []
        os.kill(os.getpid(), number)
        assert exits == [128 + number]


# ---------------------------------------------------------------------------- the log

LINE = {'train/loss': 2.5, 'train/lr': 0.1, 'train/tokens_per_sec': 1e6}


def rows_of(folder):
    with open(folder / 'metrics.csv', newline='') as file:
        return [{name: cell for name, cell in row.items() if cell} for row in csv.DictReader(file)]


@pytest.mark.parametrize('is_main', [True, False])
def test_console_log_and_csv_agree_and_other_ranks_are_silent(tmp_path, capsys, is_main):
    log = runtime.Logger(tmp_path, is_main, -1)
    log.print('hello')
    log.progress(5, 10, LINE, seconds_per_step=2.0)
    log.metrics(5, {'val/loss': 2.5, 'train/lr': 0.1})
    log.close()
    lines = 'hello\nstep 5/10: loss 2.5000, lr 1.00e-01, 1,000,000 tokens/s, 0:10 left\n'
    assert capsys.readouterr().out == (lines if is_main else '')
    if not is_main:
        assert list(tmp_path.iterdir()) == []
        return
    assert (tmp_path / 'logs.log').read_text() == lines
    assert (tmp_path / 'metrics.csv').read_text().splitlines()[0] == ','.join(['step', *runtime.METRICS])
    assert rows_of(tmp_path) == [{'step': '5', 'train/lr': '0.1', 'val/loss': '2.5'}]


def test_hours_that_are_left_are_told_as_such(tmp_path, capsys):
    log = runtime.Logger(tmp_path, True, -1)
    log.progress(0, 2, LINE, seconds_per_step=3723, rate='7 rows/s')
    log.close()
    assert capsys.readouterr().out.endswith('7 rows/s, 2:04:06 left\n')


def test_a_new_metric_gets_a_column_and_rows_before_it_an_empty_cell(tmp_path):
    log = runtime.Logger(tmp_path, True, -1)
    log.metrics(0, {'val/loss': 3.0})
    log.metrics(1, {'val/loss': 2.0, 'val/entropy': 0.5})
    log.close()
    log = runtime.Logger(tmp_path, True, 1)  # a resumed run knows the column
    log.metrics(2, {'val/entropy': 0.25, 'val/z': 1.0})
    log.close()
    assert rows_of(tmp_path) == [
        {'step': '0', 'val/loss': '3.0'},
        {'step': '1', 'val/loss': '2.0', 'val/entropy': '0.5'},
        {'step': '2', 'val/entropy': '0.25', 'val/z': '1.0'},
    ]
    header, *lines = (tmp_path / 'metrics.csv').read_text().splitlines()
    assert header.endswith('val/text_loss,val/entropy,val/z')
    assert {line.count(',') for line in lines} == {header.count(',')}


@pytest.mark.parametrize('last', ['0,\n5,3.5\n10,3.2\n15,3.1\n20,3.', '0,\n5,3.5\n10,3.2\n15,'])
def test_rows_that_come_again_and_one_that_was_cut_are_dropped_when_a_run_resumes(tmp_path, last):
    (tmp_path / 'metrics.csv').write_text('step,train/loss\n' + last)
    log = runtime.Logger(tmp_path, True, 10)
    log.metrics(15, {'train/loss': 3.0})
    log.close()
    assert (tmp_path / 'metrics.csv').read_text() == 'step,train/loss\n0,\n5,3.5\n10,3.2\n15,3.0\n'


def test_a_run_killed_while_it_made_its_metrics_file_makes_it_anew(tmp_path):
    (tmp_path / 'metrics.csv').touch()
    log = runtime.Logger(tmp_path, True, -1)
    log.metrics(0, {'val/loss': 3.0})
    log.close()
    assert rows_of(tmp_path) == [{'step': '0', 'val/loss': '3.0'}]


class BrokenWandb:
    """A W&B that fails from its n-th call on."""

    id = 'abc'

    def __init__(self, works):
        self.works = works

    def call(self, *args, **kwargs):
        self.works -= 1
        if self.works < 0:
            raise ConnectionError('the service is gone')
        return self

    login = init = log = finish = call


@pytest.mark.parametrize('works, run_id', [(0, None), (1, None), (2, 'abc'), (3, 'abc'), (4, 'abc')])
def test_a_failure_of_wandb_is_reported_once_and_stops_nothing(tmp_path, monkeypatch, capsys, works, run_id):
    monkeypatch.setitem(sys.modules, 'wandb', BrokenWandb(works))
    monkeypatch.delenv('WANDB_MODE', raising=False)
    log = runtime.Logger(tmp_path, True, -1)
    log.start_wandb(project='p', name='n', id=None, config={})
    for step in (0, 1):
        log.metrics(step, {'val/loss': 1.0})
    log.close()
    assert log.wandb_run_id == run_id  # what a resumed run asks for
    assert capsys.readouterr().out.count('the service is gone); the run goes on without it') == 1
    assert len(rows_of(tmp_path)) == 2


def test_a_machine_without_wandb_trains_as_well(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'wandb', None)  # its import fails
    log = runtime.Logger(tmp_path, True, -1)
    log.start_wandb(project='p', name='n', id=None, config={})
    log.close()
    assert 'the run goes on without it' in capsys.readouterr().out


# ---------------------------------------------------------------------------- settings


def test_settings_that_do_not_go_together_are_refused():
    config = dict(optimizer='muon', dtype='auto', fsdp=True)
    with pytest.raises(UserError, match='fsdp does not go with optimizer=muon; leave one of them out'):
        runtime.check_settings(config)
    for changes, name in (
        ({'dtype': 'float32'}, 'dtype=float32'),
        ({'dtype': 'float16'}, 'dtype=float16'),
        ({'optimizer': 'muon'}, 'optimizer=muon'),
        ({'ema_decay': 0.9}, 'ema_decay'),
        ({'use_peft': True}, 'use_peft'),
    ):
        config = dict(optimizer='adamw', dtype='auto', master_weights='bfloat16', save_total_limit=1)
        with pytest.raises(UserError, match=f'master_weights=bfloat16 does not go with {name}'):
            runtime.check_settings({**config, **changes})
