"""The log of a run: console, logs.log, metrics.csv and W&B say the same."""

import csv
import os
import runpy
import sys
import threading

import pytest

from lm.log import METRICS, Logger

LINE = {'train/loss': 2.5, 'train/lr': 0.1, 'train/tokens_per_sec': 1e6}


def rows_of(folder):
    with open(folder / 'metrics.csv', newline='') as file:
        return [{name: cell for name, cell in row.items() if cell} for row in csv.DictReader(file)]


@pytest.mark.parametrize('is_main', [True, False])
def test_console_log_and_csv_agree_and_other_ranks_are_silent(tmp_path, capsys, is_main):
    log = Logger(tmp_path, is_main, -1)
    log.print('hello')
    log.progress(5, 10, LINE, seconds_per_step=2.0)
    log.metrics(5, {'val/loss': 2.5, 'train/lr': 0.1})
    log.close()
    lines = 'hello\nstep 5/10: loss 2.5000, lr 1.00e-01, 1,000,000 tokens/s, 0:00:10 left\n'
    assert capsys.readouterr().out == (lines if is_main else '')
    if not is_main:
        assert list(tmp_path.iterdir()) == []
        return
    assert (tmp_path / 'logs.log').read_text() == lines
    assert (tmp_path / 'metrics.csv').read_text().splitlines()[0] == ','.join(['step', *METRICS])
    assert rows_of(tmp_path) == [{'step': '5', 'train/lr': '0.1', 'val/loss': '2.5'}]


@pytest.mark.faults
def test_what_is_logged_cannot_steer_the_terminal(tmp_path, capsys):
    log = Logger(tmp_path, True, -1)
    log.print('one\x1b[2J\ttwo\nthree\r\nfour\rfive')
    log.close()
    for said in (capsys.readouterr().out, (tmp_path / 'logs.log').read_bytes().decode()):
        assert said == 'one\\x1b[2J\ttwo\nthree\r\nfour\\rfive\n'


def test_hours_that_are_left_are_told_as_such(tmp_path, capsys):
    log = Logger(tmp_path, True, -1)
    log.progress(0, 2, LINE, seconds_per_step=3723)
    log.close()
    assert capsys.readouterr().out.endswith('tokens/s, 2:04:06 left\n')


def test_a_new_metric_gets_a_column_and_rows_before_it_an_empty_cell(tmp_path):
    log = Logger(tmp_path, True, -1)
    log.metrics(0, {'val/loss': 3.0})
    log.metrics(1, {'val/loss': 2.0, 'val/entropy': 0.5})
    log.close()
    log = Logger(tmp_path, True, 1)  # a resumed run knows the column
    log.metrics(2, {'val/entropy': 0.25, 'val/z': 1.0})
    log.close()
    assert rows_of(tmp_path) == [
        {'step': '0', 'val/loss': '3.0'},
        {'step': '1', 'val/loss': '2.0', 'val/entropy': '0.5'},
        {'step': '2', 'val/entropy': '0.25', 'val/z': '1.0'},
    ]
    header, *lines = (tmp_path / 'metrics.csv').read_text().splitlines()
    assert header.endswith('val/loss_without_padding,val/entropy,val/z')
    assert {line.count(',') for line in lines} == {header.count(',')}


@pytest.mark.parametrize('last', ['0,\n5,3.5\n10,3.2\n15,3.1\n20,3.', '0,\n5,3.5\n10,3.2\n15,'])
def test_rows_that_come_again_and_one_that_was_cut_are_dropped_when_a_run_resumes(tmp_path, last):
    (tmp_path / 'metrics.csv').write_text('step,train/loss\n' + last)
    log = Logger(tmp_path, True, 10)
    log.metrics(15, {'train/loss': 3.0})
    log.close()
    assert (tmp_path / 'metrics.csv').read_text() == 'step,train/loss\n0,\n5,3.5\n10,3.2\n15,3.0\n'


@pytest.mark.faults
def test_what_is_no_row_of_metrics_is_dropped_when_a_run_resumes(tmp_path):
    rows = b'step,train/loss\n0,\n# a note\nfive,3.5\n\xff\xfe,\n\n10,3.2\n'
    (tmp_path / 'metrics.csv').write_bytes(rows)
    Logger(tmp_path, True, 10).close()
    assert (tmp_path / 'metrics.csv').read_text() == 'step,train/loss\n0,\n10,3.2\n'


@pytest.mark.faults
def test_a_log_on_a_full_disk_is_reported_once_and_stops_nothing(tmp_path, capsys):
    (tmp_path / 'logs.log').symlink_to('/dev/full')
    log = Logger(tmp_path, True, -1)
    for step in (0, 1):
        log.print('hello')
        log.metrics(step, {'val/loss': 1.0})
    log.close()
    said = capsys.readouterr()
    assert said.out == 'hello\nhello\n' and len(rows_of(tmp_path)) == 2
    assert said.err.count(f'warning: the log in {tmp_path} misses lines (') == 1


def test_a_run_killed_while_it_made_its_metrics_file_makes_it_anew(tmp_path):
    (tmp_path / 'metrics.csv').touch()
    log = Logger(tmp_path, True, -1)
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
    log = Logger(tmp_path, True, -1)
    log.start_wandb(project='p', name='n', id=None, config={})
    for step in (0, 1):
        log.metrics(step, {'val/loss': 1.0})
    log.close()
    assert log.wandb_run_id == run_id  # what a resumed run asks for
    assert capsys.readouterr().out.count('the service is gone); the run goes on without it') == 1
    assert len(rows_of(tmp_path)) == 2


@pytest.mark.faults
@pytest.mark.parametrize('call', ['init', 'log', 'finish'])
def test_a_service_of_wandb_that_hangs_stops_neither_training_nor_the_exit(
    tmp_path, monkeypatch, capsys, call
):
    gone, exits, service = threading.Event(), [], BrokenWandb(99)
    setattr(service, call, lambda *_, **__: gone.wait())
    monkeypatch.setitem(sys.modules, 'wandb', service)
    monkeypatch.setattr('lm.log.PATIENCE', 0.05)
    monkeypatch.setattr(os, '_exit', exits.append)
    log = Logger(tmp_path, True, -1)
    log.start_wandb(project='p', name='n', id=None, config={})
    for step in (0, 1):
        log.metrics(step, {'val/loss': 1.0})
    log.close()
    gone.set()
    assert capsys.readouterr().out.count('no answer in 0.05 seconds); the run goes on without it') == 1
    assert len(rows_of(tmp_path)) == 2 and exits == [0]


def test_a_machine_without_wandb_trains_as_well(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'wandb', None)  # its import fails
    log = Logger(tmp_path, True, -1)
    log.start_wandb(project='p', name='n', id=None, config={})
    log.close()
    assert 'the run goes on without it' in capsys.readouterr().out


@pytest.mark.faults
@pytest.mark.parametrize('words', [['--token=secret'], ['--token', 'secret']])
def test_a_token_is_in_no_record_of_the_command_line(tmp_path, monkeypatch, words):
    path = str(tmp_path / 'script.py')
    lines = ['from lm.configurator import configure', "token = ''", 'a = 1', 'config = configure(globals())']
    (tmp_path / 'script.py').write_text('\n'.join(lines))
    monkeypatch.setattr(sys, 'argv', [path, '--a=2', *words, '--a=3'])
    variables = runpy.run_path(path)
    assert variables['token'] == 'secret' and dict(variables['config']) == {'a': 3}
    assert sys.argv == [path, '--a=2', '--a=3']
