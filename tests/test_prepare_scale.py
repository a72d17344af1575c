"""What the prepare scripts promise at scale: every format, the hub, restarts after any kill, bad input."""

import gzip
import json
import multiprocessing
import os
import random
import resource
import shutil
import time
from pathlib import Path

import datasets
import httpx
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
import requests
from test_prepare import SHARED, config_of, contents, make_texts, run, texts_of, write_jsonl

from lm.configurator import UserError
from prepare import readers, writer

SOURCES = {
    'tinystories.py': ('roneneldan/TinyStories', None),
    'openwebtext.py': ('Skylion007/openwebtext', None),
    'fineweb.py': ('HuggingFaceFW/fineweb', 'sample-10BT'),
}
SMALL = ['--tokenizer=bytes', '--val_fraction=0.1']


def write_parquet(path, texts, rows_per_group=7, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({**columns, 'text': texts, 'id': [str(i) for i in range(len(texts))]})
    pyarrow.parquet.write_table(table, path, row_group_size=rows_per_group)


def write_zst(path, content):
    with pyarrow.output_stream(path, compression='zstd') as file:
        file.write(content)


# ---------------------------------------------------------------------------- sources and formats


@pytest.mark.parametrize('script', SOURCES)
def test_each_source_streams_from_the_hub_as_from_its_files(run, tmp_path, monkeypatch, script):
    """The hub's place is taken by a folder of the same layout, read through the same `datasets`."""
    texts, hub, (path, subset) = make_texts(40), tmp_path / 'hub', SOURCES[script]
    for number in range(3):
        write_parquet(hub / 'data' / f'train-{number:05}-of-00003.parquet', texts[number::3])
    (hub / 'README.md').write_text(
        '---\nconfigs:\n- config_name: '
        + (subset or 'default')
        + '\n  data_files:\n  - split: train\n    path: data/train-*\n---\n'
    )
    load = datasets.load_dataset

    def load_local(given, *names, **settings):
        assert (given, names[0], settings.pop('revision')) == (path, subset, 'abc')
        return load(str(hub), *names, **settings)

    monkeypatch.setattr(datasets, 'load_dataset', load_local)
    monkeypatch.setattr(
        huggingface_hub.HfApi, 'dataset_info', lambda self, name: type('Info', (), {'sha': 'abc'})
    )
    from_hub = run(script, *SMALL)
    from_files = run(script, *SMALL, f'--input={hub / "data"}', output_dir=tmp_path / 'files')
    assert config_of(from_hub)['sha256'] == config_of(from_files)['sha256']
    assert list(config_of(from_hub)['inputs'].values()) == ['abc']
    assert sorted(texts_of(from_hub, 'train') + texts_of(from_hub, 'val')) == sorted(texts)

    source = readers.hub(path, subset)
    whole = [text for text, _ in source.documents()]
    for done in (1, 13, 20, 39):  # a position goes on with the next document
        reading = source.documents()
        begun = [next(reading)[0] for _ in range(done)]
        position = json.loads(json.dumps(source.position()))
        assert begun + [text for text, _ in source.documents(position)] == whole


def test_a_hub_that_cannot_be_reached_is_one_sentence(run, monkeypatch):
    def offline(*_):
        raise ConnectionError('no network')

    monkeypatch.setattr(huggingface_hub.HfApi, 'dataset_info', offline)
    with pytest.raises(UserError, match='openwebtext could not be read from the hub .*give their folder'):
        run('openwebtext.py')


@pytest.mark.parametrize(
    'failure',
    [
        OSError('Connection broken: IncompleteRead'),
        requests.exceptions.ChunkedEncodingError('IncompleteRead'),
        httpx.ReadTimeout('The read operation timed out'),
        huggingface_hub.errors.HfHubHTTPError(
            '429 Too Many Requests',
            response=httpx.Response(429, request=httpx.Request('GET', 'https://huggingface.co')),
        ),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_a_hub_that_fails_in_the_middle_is_one_sentence_and_the_same_command_goes_on(
    run, monkeypatch, failure
):
    texts, is_down = make_texts(40), [True]

    class Stream(datasets.IterableDataset):
        def __init__(self, done=0):
            self.done = done

        def load_state_dict(self, state):
            self.done = state

        def state_dict(self):
            return self.done

        def __iter__(self):
            for text in texts[self.done :]:
                if self.done == 20 and is_down[0]:
                    raise failure
                self.done += 1
                yield {'text': text}

    monkeypatch.setattr(
        huggingface_hub.HfApi, 'dataset_info', lambda api, name: type('Info', (), {'sha': 'abc'})
    )
    monkeypatch.setattr(datasets, 'load_dataset', lambda *_, **__: Stream())
    with pytest.raises(UserError, match=r'openwebtext could not be read from the hub \(.+\); .*try again'):
        run('openwebtext.py', *SMALL)
    is_down[0] = False
    folder = run('openwebtext.py', *SMALL)
    assert sorted(texts_of(folder, 'train') + texts_of(folder, 'val')) == sorted(texts)


@pytest.mark.parametrize('done', [0, 1, 7, 8, 29])
def test_every_ending_gives_the_same_documents_from_any_place_on(tmp_path, done):
    texts = make_texts(30)
    write_jsonl(tmp_path / 'a.jsonl', texts)
    content = (tmp_path / 'a.jsonl').read_bytes()
    half = content.index(b'\n', len(content) // 2) + 1
    (tmp_path / 'b.jsonl.gz').write_bytes(gzip.compress(content[:half]) + gzip.compress(content[half:]))
    for name, part in (('1', content[:half]), ('2', content[half:])):
        write_zst(tmp_path / name, part)
    (tmp_path / 'c.jsonl.zst').write_bytes(
        (tmp_path / '1').read_bytes() + (tmp_path / '2').read_bytes()
    )  # frames
    write_parquet(tmp_path / 'd.parquet', texts)
    (tmp_path / 'e.json').write_text(json.dumps([{'text': text} for text in texts]))
    (tmp_path / 'f.txt').write_text('\n<|endoftext|>\n'.join(texts))
    for path in sorted(tmp_path.glob('*.*')):
        source = readers.files(str(path), 'text', separator='<|endoftext|>')
        found = list(source.documents((0, done)))
        assert [text.strip() for text, _ in found] == [text.strip() for text in texts[done:]], path
        assert done or sum(amount for _, amount in found) == pytest.approx(path.stat().st_size, rel=0.1), path
        assert source.position() == [0, 30]


def test_a_folder_gives_all_its_files_in_order(run, tmp_path):
    texts = make_texts(60)
    (tmp_path / 'in' / 'deep').mkdir(parents=True)
    write_jsonl(tmp_path / 'in' / 'a.jsonl', texts[:20])
    write_parquet(tmp_path / 'in' / 'b.parquet', texts[20:40])
    write_zst(tmp_path / 'in' / 'deep' / 'c.jsonl.zst', write_jsonl(tmp_path / 'c', texts[40:]).read_bytes())
    (tmp_path / 'in' / 'README.md').write_text('not meant')
    folder = run('text.py', f'--input={tmp_path / "in"}', *SMALL)
    assert [text for text in texts if text in (train := texts_of(folder, 'train'))] == train
    assert len(train) + len(texts_of(folder, 'val')) == 60


def test_stories_in_a_txt_are_documents_of_their_own(run, tmp_path):
    texts = [text.strip() for text in make_texts(50)]
    (tmp_path / 'a.txt').write_text('\n<|endoftext|>\n'.join(texts) + '\n<|endoftext|>\n')
    folder = run('tinystories.py', f'--input={tmp_path / "a.txt"}', *SMALL)
    assert sorted(texts_of(folder, 'train') + texts_of(folder, 'val')) == sorted(texts)


def test_max_seq_len_is_recorded_and_cuts_nothing(run, tmp_path):
    texts = [' '.join(make_texts(20, seed)) for seed in range(30)]
    corpus = write_jsonl(tmp_path / 'a.jsonl', texts)
    folder = run('openwebtext.py', f'--input={corpus}', *SMALL, '--max_seq_len=16')
    assert config_of(folder)['max_seq_len'] == 16
    assert sorted(texts_of(folder, 'train') + texts_of(folder, 'val')) == sorted(texts)
    assert 'max_seq_len' not in config_of(run('text.py', f'--input={corpus}', output_dir=tmp_path / 'none'))


@pytest.mark.skipif(not SHARED.is_dir(), reason=f'there is no {SHARED}')
@pytest.mark.parametrize('name', ['web', pytest.param('books', marks=pytest.mark.slow)])
def test_real_text_comes_through_whole(run, tmp_path, name):
    texts = [json.loads(line)['text'] for line in open(SHARED / f'{name}.jsonl', encoding='utf-8')]
    folder = run(
        'openwebtext.py',
        f'--input={SHARED / name}.jsonl',
        '--val_fraction=0.1',
        '--vocab_size=2000',
        '--tokenizer_sample_mb=1',
        '--num_workers=2',
    )
    assert sorted(texts_of(folder, 'train') + texts_of(folder, 'val')) == sorted(texts)


# ---------------------------------------------------------------------------- restart


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(writer, 'SHARD', 4000)
    monkeypatch.setattr(writer, 'BATCH', 1000)


@pytest.fixture
def inputs(tmp_path):
    """Several files of several kinds, blank documents and broken lines among them."""
    texts = make_texts(160)
    write_jsonl(tmp_path / 'a.jsonl', texts[:50] + [''] + texts[50:60]).open('a').write('{"text": \n')
    write_parquet(tmp_path / 'b.parquet', texts[60:110])
    (tmp_path / 'c.jsonl.gz').write_bytes(
        gzip.compress(write_jsonl(tmp_path / 'c', texts[110:]).read_bytes())
    )
    return [f'--input={tmp_path}/a.jsonl,{tmp_path}/b.parquet,{tmp_path}/c.jsonl.gz', '--on_error=skip']


def in_a_fork(function):
    """The exit status of a child process that calls `function`."""
    child = multiprocessing.get_context('fork').Process(target=function)
    child.start()
    child.join()
    return child.exitcode


def dying_at(event):
    """Makes this process end, as if killed, before the `event`-th change of a file's or folder's state."""
    left = [event]

    def counted(owner, name):
        change = getattr(owner, name)

        def wrapper(*given, **settings):
            left[0] -= 1
            if left[0] < 0:
                os._exit(77)
            return change(*given, **settings)

        setattr(owner, name, wrapper)

    for owner, name in (
        (os, 'fsync'),
        (os, 'replace'),
        (Path, 'rename'),
        (Path, 'unlink'),
        (writer.Split, 'append'),
        (Path, 'write_text'),
    ):
        counted(owner, name)


@pytest.mark.slow
@pytest.mark.parametrize('before, step', [('nothing', 2), ('another folder', 7)])
def test_killed_between_any_changes_the_same_command_ends_the_same(
    run, inputs, tmp_path, small_shards, before, step
):
    expected = contents(run('text.py', *inputs, *SMALL, '--name=x', output_dir=tmp_path / 'whole' / 'x'))
    again = [*inputs, *SMALL, *['--overwrite'] * (before != 'nothing')]
    for event in range(0, 1000, step):
        target = tmp_path / str(event) / 'x'
        if before != 'nothing':
            run('text.py', *inputs, '--tokenizer=bytes', '--val_fraction=0.2', output_dir=target)

        def die():
            dying_at(event)
            run('text.py', *again, output_dir=target)

        status = in_a_fork(die)
        assert status in (0, 77)
        run('text.py', *again, output_dir=target)
        assert contents(target) == expected, event
        assert list(target.parent.iterdir()) == [target], event
        if status == 0:
            break
    assert 1000 > event > 20


def test_a_restart_repeats_no_finished_shard(run, inputs, tmp_path, small_shards, monkeypatch, capsys):
    expected = contents(run('text.py', *inputs, *SMALL, '--name=x', output_dir=tmp_path / 'whole' / 'x'))
    append, appended = writer.Split.append, []

    def failing(split, batch):
        appended.append(len(batch.ends))
        if len(appended) == 9:
            raise OSError(28, 'No space left on device')
        append(split, batch)

    monkeypatch.setattr(writer.Split, 'append', failing)
    with pytest.raises(
        UserError, match='No space left on device.*make room.*documents, is kept in .*goes on from'
    ):
        run('text.py', *inputs, *SMALL, output_dir=tmp_path / 'x')
    done = json.loads((tmp_path / '.x.partial' / 'journal.json').read_text())['state']['splits']
    done = done['train']['documents'] + done['val']['documents']
    monkeypatch.setattr(
        writer.Split, 'append', lambda split, batch: (appended.append(len(batch.ends)), append(split, batch))
    )
    appended.clear()
    run('text.py', *inputs, *SMALL, '--num_workers=2', output_dir=tmp_path / 'x')
    assert f'{done:,} documents in' in capsys.readouterr().out and done > 30
    assert sum(appended) == 160 - done
    assert contents(tmp_path / 'x') == expected


@pytest.mark.parametrize(
    'change, words',
    [
        (
            lambda path: path.write_text(path.read_text().replace('every', 'no')),
            'input is not the same.*a.jsonl',
        ),
        (lambda path: None, 'val_fraction was 0.1 and is 0.3'),
    ],
)
def test_another_input_or_setting_between_restarts_is_refused(run, tmp_path, small_shards, change, words):
    path = write_jsonl(tmp_path / 'a.jsonl', make_texts(80))
    path.open('a').write('broken\n')
    for _ in range(2):  # the second time the same command goes on, and meets the same line
        with pytest.raises(UserError, match='line 81: not valid JSON.*documents, is kept'):
            run('text.py', f'--input={path}', *SMALL)
    change(path)
    again = [f'--input={path}', '--tokenizer=bytes', f'--val_fraction={0.3 if "val" in words else 0.1}']
    with pytest.raises(
        UserError, match=f'unfinished preparation of .* was begun otherwise: .*{words}.*--overwrite'
    ):
        run('text.py', *again)
    assert (tmp_path / '.out.partial' / 'journal.json').exists()
    assert config_of(run('text.py', *again, '--on_error=skip', '--overwrite'))['skipped'] == 1


def test_a_file_that_changes_while_it_is_read_is_an_error(run, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / 'a.jsonl', make_texts(80))
    split = writer.Corpus.split
    monkeypatch.setattr(
        writer.Corpus, 'split', lambda *given: (path.write_text(path.read_text() + ' '), split(*given))[1]
    )
    with pytest.raises(UserError, match='a.jsonl changed while it was being read'):
        run('text.py', f'--input={path}', *SMALL)


@pytest.mark.slow
def test_kills_at_random_moments_change_no_byte(run, tmp_path, monkeypatch, capfd):
    corpus = write_jsonl(tmp_path / 'corpus.jsonl', make_texts(6000))
    monkeypatch.setattr(writer, 'SHARD', 15_000)
    monkeypatch.setattr(writer, 'BATCH', 4000)
    append = writer.Split.append
    monkeypatch.setattr(writer.Split, 'append', lambda *given: (append(*given), time.sleep(0.005)))

    def start(target):
        child = multiprocessing.get_context('fork').Process(
            target=run,
            kwargs={'output_dir': target},
            args=(
                'text.py',
                f'--input={corpus}',
                '--vocab_size=300',
                '--num_workers=2',
                '--tokenizer_sample_mb=1',
            ),
        )
        child.start()
        return child

    began, whole = time.time(), start(tmp_path / 'whole' / 'x')
    whole.join()
    seconds, draw, kills, target = time.time() - began, random.Random(time.time_ns()), 0, tmp_path / 'x'
    expected, shards = contents(tmp_path / 'whole' / 'x'), []
    while kills < 12:
        child = start(target)
        child.join(draw.uniform(0, seconds / 3))
        child.kill()
        child.join()
        kills += child.exitcode == -9
        if target.exists():  # it was complete before: once more from the start
            start(target).join()
            assert contents(target) == expected
            shutil.rmtree(target)
        elif (journal := tmp_path / '.x.partial' / 'journal.json').exists():
            splits = json.loads(journal.read_text())['state']['splits']
            shards.append(splits['train']['documents'] + splits['val']['documents'])
    start(target).join()
    assert contents(target) == expected and list(tmp_path.glob('.*')) == []
    assert len(set(shards)) > 1  # some runs went on where another had been killed
    print(f'{kills} kills; documents that were done after them: {shards}')


# ---------------------------------------------------------------------------- bad input


def test_broken_records_stop_or_are_skipped_and_counted(run, tmp_path, capsys):
    texts = make_texts(40)
    path = write_jsonl(tmp_path / 'a.jsonl', texts)
    broken = [
        b'{"text": "cut\n',
        b'{"text": "\xff"}\n',
        b'{"body": "x"}\n',
        b'{"text": null}\n',
        b'[1]\n',
        b'{"text": "\\ud800"}\n',
        b'[' * 9999 + b'\n',
    ]
    for line in broken:
        path.write_bytes(write_jsonl(tmp_path / 'good', texts).read_bytes() + line)
        with pytest.raises(UserError, match=r'a\.jsonl, line 41: '):
            run('text.py', f'--input={path}', *SMALL)
    path.write_bytes(
        b''.join(broken) + b'{"text": ""}\n' + write_jsonl(tmp_path / 'good', texts).read_bytes()
    )
    folder = run('text.py', f'--input={path}', *SMALL, '--on_error=skip')
    assert sorted(texts_of(folder, 'train') + texts_of(folder, 'val')) == sorted(texts)
    assert (config_of(folder)['skipped'], config_of(folder)['blank']) == (7, 1)
    said = capsys.readouterr()
    assert [f'a.jsonl, line {number}: ' in said.err for number in range(1, 9)] == [True] * 7 + [False]
    assert '1 blank documents left out, 7 that could not be read left out' in said.out
    run('text.py', f'--input={path}', *SMALL, '--on_error=skip')  # reused, and said again
    assert '7 that could not be read' in capsys.readouterr().out


def test_invalid_utf8_in_parquet_is_a_matter_of_its_row(run, tmp_path):
    texts = make_texts(20)
    column = pyarrow.array([text.encode() for text in texts] + [b'\xff'], pyarrow.binary()).view(
        pyarrow.string()
    )
    write_parquet(tmp_path / 'a.parquet', column)
    with pytest.raises(UserError, match=r'a\.parquet, row 21: byte 0 \(0xff\) is not valid UTF-8'):
        run('text.py', f'--input={tmp_path / "a.parquet"}', *SMALL)
    folder = run('text.py', f'--input={tmp_path / "a.parquet"}', *SMALL, '--on_error=skip')
    assert sorted(texts_of(folder, 'train') + texts_of(folder, 'val')) == sorted(texts)


@pytest.mark.parametrize('name', ['a.jsonl.gz', 'a.jsonl.zst', 'a.parquet'])
def test_a_file_cut_short_stops_even_where_records_are_skipped(run, tmp_path, name):
    texts = make_texts(3000)
    content = write_jsonl(tmp_path / 'a', texts).read_bytes()
    if name.endswith('gz'):
        (tmp_path / name).write_bytes(gzip.compress(content))
    elif name.endswith('zst'):
        write_zst(tmp_path / name, content)
    else:
        write_parquet(tmp_path / name, texts)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) * 2 // 3])
    with pytest.raises(UserError, match=f'{name} cannot be read to its end .*fetch it again') as error:
        run('text.py', f'--input={tmp_path / name}', *SMALL, '--on_error=skip')
    assert '\n' not in str(error.value)


def test_nothing_but_broken_records_says_why(run, tmp_path):
    path = tmp_path / 'a.jsonl'
    path.write_text('{"content": "x"}\n' * 5)
    with pytest.raises(
        UserError, match="no text in .* 5 that were skipped: .*line 5: there is no field 'text'"
    ):
        run('openwebtext.py', f'--input={path}', '--on_error=skip')


@pytest.mark.slow
@pytest.mark.parametrize('word', ['some words ', 'no-space-at-all'])
def test_a_document_of_50_mb_is_one_document_like_any_other(run, tmp_path, word):
    long = word * (50_000_000 // len(word))
    corpus = write_jsonl(tmp_path / 'a.jsonl', [*make_texts(40), long])
    folder = run('text.py', f'--input={corpus}', '--tokenizer=bytes', '--num_workers=2')
    assert (
        config_of(folder)['splits']['train']['documents'] + config_of(folder)['splits']['val']['documents']
        == 41
    )
    assert long in texts_of(folder, 'train') + texts_of(folder, 'val')


def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(run, tmp_path):
    """A limit on the size of files stands for the disk: writing fails in the same way, in the same place."""
    corpus = write_jsonl(tmp_path / 'corpus.jsonl', make_texts(20_000))

    def limited():
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        with pytest.raises(UserError, match='could not be written .*make room'):
            run('text.py', f'--input={corpus}', *SMALL)

    assert in_a_fork(limited) == 0
    assert list(tmp_path.iterdir()) == [corpus]


@pytest.mark.parametrize(
    'script, arguments, words',
    [
        ('fineweb.py', ['--subset=sample-9BT'], 'subset.*sample-10BT'),
        (
            'openwebtext.py',
            ['--max_seq_len=-1', '--input=x.txt'],
            'No file matches|max_seq_len=-1 is negative',
        ),
        ('openwebtext.py', ['--on_error=ignore', '--input=.'], 'on_error=ignore is neither|holds no file'),
    ],
)
def test_mistakes_in_settings_are_one_sentence(run, tmp_path, monkeypatch, script, arguments, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        run(script, *arguments)
