"""Preparations that are killed, cut off by a full disk or started again end as if nothing had happened."""

import gzip
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
from conftest import config_of, contents, make_texts, write_jsonl

from lm.configurator import UserError
from prepare import writer

# ---------------------------------------------------------------------------- unfinished folders


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(writer, 'SHARD', 4000)
    monkeypatch.setattr(writer, 'BATCH', 1000)


@pytest.fixture
def command(tmp_path):
    """Several files of several kinds, blank documents and a broken line among them."""
    texts = make_texts(160)
    write_jsonl(tmp_path / 'a.jsonl', texts[:90] + [''] + texts[90:100]).open('a').write('{"text": \n')
    packed = gzip.compress(write_jsonl(tmp_path / 'c', texts[100:]).read_bytes())
    (tmp_path / 'c.jsonl.gz').write_bytes(packed)
    return [
        'text.py',
        f'--input={tmp_path}/a.jsonl,{tmp_path}/c.jsonl.gz',
        '--vocab_size=280',
        '--on_error=skip',
    ]


def start(function, *arguments, **settings):
    child = multiprocessing.get_context('fork').Process(target=function, args=arguments, kwargs=settings)
    child.start()
    return child


def die_at(event):
    """Makes this process end, as if killed, before the `event`-th change of a file's or folder's state."""
    left = [event]

    def counted(change):
        def wrapper(*given, **settings):
            left[0] -= 1
            if left[0] < 0:
                os._exit(77)
            return change(*given, **settings)

        return wrapper

    for owner, name in (
        (os, 'fsync'),
        (os, 'replace'),
        (Path, 'rename'),
        (Path, 'unlink'),
        (shutil, 'rmtree'),
    ):
        setattr(owner, name, counted(getattr(owner, name)))


@pytest.mark.parametrize('before, step', [('nothing', 5), ('another folder', 7)])
def test_killed_between_any_changes_the_same_command_ends_the_same(
    prepare, command, tmp_path, small_shards, before, step
):
    expected = contents(prepare(*command, output_dir=tmp_path / 'whole' / 'x'))
    again = [*command, *['--overwrite'] * (before != 'nothing')]
    other = prepare(
        'text.py', command[1], '--on_error=skip', '--tokenizer=bytes', output_dir=tmp_path / 'other' / 'x'
    )

    for event in range(0, 1000, step):
        target = tmp_path / str(event) / 'x'
        if before != 'nothing':
            shutil.copytree(other, target)

        def die(event=event, target=target):
            die_at(event)
            prepare(*again, output_dir=target)

        child = start(die)
        child.join()
        assert child.exitcode in (0, 77)
        prepare(*again, output_dir=target)
        assert contents(target) == expected, event
        assert list(target.parent.iterdir()) == [target], event
        if child.exitcode == 0:
            break
    assert 1000 > event > 20


def test_a_restart_repeats_no_finished_shard(prepare, tmp_path, small_shards, capsys):
    path = write_jsonl(tmp_path / 'a.jsonl', make_texts(160))
    path.open('a').write('broken\n')
    words = ['text.py', f'--input={path}', '--tokenizer=bytes']
    expected = contents(prepare(*words, '--on_error=skip', output_dir=tmp_path / 'whole' / 'out'))
    for _ in range(2):  # the second time the same command goes on, and meets the same line
        with pytest.raises(UserError, match='line 161: not valid JSON'):
            prepare(*words)
        said = capsys.readouterr().err
        journal = json.loads((tmp_path / '.out.partial' / '.work' / 'journal.json').read_text())
        assert (
            f'{journal["state"]["source"]["documents"]:,} documents, is kept in' in said
        )  # not those read since
    tokens = tmp_path / '.out.partial' / 'train_tokens.bin'
    tokens.write_bytes(b'\x01\x02' + tokens.read_bytes()[2:] + b'written after the last finished shard')
    capsys.readouterr()
    found = contents(prepare(*words, '--on_error=skip', '--num_workers=2'))
    assert 'going on where an unfinished preparation stopped, 1' in capsys.readouterr().out
    assert found['train_tokens.bin'][:2] == b'\x01\x02'  # was not written anew
    assert found['train_tokens.bin'][2:] == expected['train_tokens.bin'][2:]
    assert {name: found[name] for name in ('train_index.bin', 'val_index.bin', 'val_tokens.bin')} == {
        name: expected[name] for name in ('train_index.bin', 'val_index.bin', 'val_tokens.bin')
    }


@pytest.mark.parametrize('words', ['input is not the same.*a.jsonl', 'val_fraction was 0.1 and is 0.3'])
def test_another_input_or_setting_between_restarts_is_refused(prepare, tmp_path, small_shards, words):
    path = write_jsonl(tmp_path / 'a.jsonl', make_texts(80))
    path.open('a').write('broken\n')
    with pytest.raises(UserError, match='line 81: not valid JSON'):
        prepare('text.py', f'--input={path}', '--tokenizer=bytes')
    if 'input' in words:
        path.write_text(path.read_text().replace('every', 'no'))
    again = [f'--input={path}', '--tokenizer=bytes', f'--val_fraction={0.3 if "val" in words else 0.1}']
    with pytest.raises(
        UserError, match=f'unfinished preparation of .* was begun otherwise: .*{words}.*--overwrite'
    ):
        prepare('text.py', *again)
    assert (tmp_path / '.out.partial' / '.work' / 'journal.json').exists()
    assert config_of(prepare('text.py', *again, '--on_error=skip', '--overwrite'))['skipped'] == 1


def test_a_killed_run_leaves_no_worker_and_nothing_that_looks_finished(prepare, tmp_path, small_shards):
    path = write_jsonl(tmp_path / 'corpus.jsonl', make_texts(4000))
    words = ['text.py', f'--input={path}', '--tokenizer=bytes', '--num_workers=2']
    target, journal, kills, draw = (
        tmp_path / 'x',
        tmp_path / '.x.partial' / '.work' / 'journal.json',
        0,
        random.Random(0),
    )
    child = start(prepare, *words, output_dir=target)
    wait_until(journal.exists)
    with pytest.raises(UserError, match='Another process is preparing'):
        prepare(*words, output_dir=target)
    while kills < 2:
        workers = Path(f'/proc/{child.pid}/task/{child.pid}/children')
        workers = [Path('/proc', pid) for pid in workers.read_text().split()] if workers.exists() else []
        child.kill()
        child.join()
        kills += child.exitcode == -signal.SIGKILL
        assert not target.exists() or child.exitcode == 0
        wait_until(lambda workers=workers: not any(map(is_running, workers)))
        child = start(prepare, *words, output_dir=target)
        child.join(draw.uniform(0, 0.5))
    child.join()
    expected = contents(prepare(*words, output_dir=tmp_path / 'whole' / 'x'))
    assert contents(target) == expected and list(tmp_path.glob('.*')) == []


def wait_until(condition, seconds=20):
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.02)


def is_running(process):
    try:
        return 'State:\tZ' not in (process / 'status').read_text()
    except OSError:
        return False


def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(prepare, tmp_path):
    """A limit on the size of files stands for the disk: writing fails in the same way, in the same place."""
    path = write_jsonl(tmp_path / 'corpus.jsonl', make_texts(2000))

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        with pytest.raises(UserError, match='could not be written .*make room'):
            prepare('text.py', f'--input={path}', '--tokenizer=bytes')

    child = start(limited)
    child.join()
    assert child.exitcode == 0 and list(tmp_path.iterdir()) == [path]
