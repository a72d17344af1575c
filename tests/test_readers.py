"""Documents come from every kind of file and from the hub, whole and in order; bad ones are named."""

import gzip
import json
import sys
from types import SimpleNamespace

import datasets
import httpx
import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import requests
from conftest import config_of, make_texts, texts_of, write_jsonl

from lm import records
from lm.configurator import UserError
from prepare import readers, writer

BYTES = ['--tokenizer=bytes', '--val_fraction=0.1']


def write_parquet(path, texts, rows_per_group=7):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({'text': texts, 'id': [str(i) for i in range(len(texts))]})
    pyarrow.parquet.write_table(table, path, row_group_size=rows_per_group)


def write_zst(path, content):
    with pyarrow.output_stream(path, compression='zstd') as file:
        file.write(content)


# ---------------------------------------------------------------------------- files


def test_every_ending_gives_the_same_documents_from_any_one_on(tmp_path):
    texts = make_texts(30)
    content = write_jsonl(tmp_path / 'a.jsonl', texts).read_bytes()
    half = content.index(b'\n', len(content) // 2) + 1
    (tmp_path / 'b.jsonl.gz').write_bytes(gzip.compress(content[:half]) + gzip.compress(content[half:]))
    for name, part in (('1', content[:half]), ('2', content[half:])):
        write_zst(tmp_path / name, part)
    frames = (tmp_path / '1').read_bytes() + (tmp_path / '2').read_bytes()
    (tmp_path / 'c.jsonl.zst').write_bytes(frames)
    write_parquet(tmp_path / 'd.parquet', texts)
    (tmp_path / 'e.json').write_text(json.dumps([{'text': text} for text in texts]))
    (tmp_path / 'f.txt').write_text('\n<|endoftext|>\n'.join(texts))
    for path in sorted(tmp_path.glob('*.*')):
        source = readers.files(str(path), 'text', separator='<|endoftext|>')
        for done in (0, 8, 29):
            found = list(source.documents(done))
            assert [text.strip() for text, _ in found] == [text.strip() for text in texts[done:]], path
        amounts = [amount for _, amount in source.documents()]
        assert sum(amounts) == pytest.approx(path.stat().st_size, rel=0.1), path


def test_files_folders_and_globs_are_read_in_order(tmp_path):
    texts = make_texts(60)
    (tmp_path / 'deep').mkdir()
    write_jsonl(tmp_path / 'deep' / 'a.jsonl', texts[:20])
    write_parquet(tmp_path / 'deep' / 'er' / 'b.parquet', texts[20:40])
    (tmp_path / 'deep' / 'README.md').write_text('not meant')
    for number, text in enumerate(texts[40:]):
        (tmp_path / f'{number:02}.txt').write_text(text)
    source = readers.files(f'{tmp_path}/deep, {tmp_path}/0*.txt,{tmp_path}/1*.txt', 'text')
    assert [text for text, _ in source.documents()] == texts


def test_a_folder_is_read_through_its_links_and_each_file_once(tmp_path, monkeypatch, capsys):
    texts = make_texts(3)
    (tmp_path / 'corpus').mkdir()
    (tmp_path / 'disk').mkdir()
    write_jsonl(tmp_path / 'corpus' / 'a.jsonl', texts[:2])
    write_jsonl(tmp_path / 'disk' / 'b.jsonl', texts[2:])
    (tmp_path / 'corpus' / 'empty.txt').touch()
    (tmp_path / 'corpus' / 'part').symlink_to(tmp_path / 'disk')
    (tmp_path / 'disk' / 'back').symlink_to(tmp_path / 'corpus')
    (tmp_path / 'disk' / 'again').symlink_to(tmp_path / 'corpus')
    monkeypatch.chdir(tmp_path)
    source = readers.files(f'{tmp_path}/corpus/a.jsonl, corpus, disk/b.jsonl', 'text')
    assert [text for text, _ in source.documents()] == texts
    again = readers.files(
        'disk/b.jsonl, corpus/a.jsonl, corpus', 'text'
    )  # in the order in which they come first
    assert [text for text, _ in again.documents()] == [texts[2], *texts[:2]]
    assert 'empty.txt is empty; it is left out' in capsys.readouterr().out


def test_a_file_cut_short_always_raises(tmp_path):
    texts = make_texts(3000)
    content = write_jsonl(tmp_path / 'a', texts).read_bytes()
    (tmp_path / 'a.jsonl.gz').write_bytes(gzip.compress(content))
    write_zst(tmp_path / 'a.jsonl.zst', content)
    write_parquet(tmp_path / 'a.parquet', texts)
    for name in ('a.jsonl.gz', 'a.jsonl.zst', 'a.parquet'):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) * 2 // 3])
        with pytest.raises(UserError, match=f'{name} cannot be read to its end .*fetch it again') as error:
            list(readers.files(str(tmp_path / name), 'text').documents())
        assert '\n' not in str(error.value)


BROKEN = {  # line: what is said of it
    b'{"text": \n': 'not valid JSON',
    b'{"text": "\xff"}\n': "not valid JSON .'utf-8' codec can't decode byte 0xff in position 10",
    b'{"body": "x"}\n': "there is no field 'text', only 'body'",
    b'{"text": null}\n': "the field 'text' holds null, not text",
    b'[1]\n': r'a list \(\[1\]\) instead of a record',
    b'{"text": "\\ud800"}\n': 'half a character',
    b'[' * 9999 + b'\n': 'not valid JSON .(maximum recursion depth exceeded|Expecting value)',
}


def test_a_broken_record_is_an_error_in_its_place(tmp_path):
    texts = make_texts(3)
    path = write_jsonl(tmp_path / 'a.jsonl', texts)
    path.write_bytes(b''.join(BROKEN) + path.read_bytes())
    found = [text for text, _ in readers.files(str(path), 'text').documents()]
    assert found[len(BROKEN) :] == texts
    for number, (error, words) in enumerate(zip(found, BROKEN.values()), 1):
        with pytest.raises(UserError, match=rf'a\.jsonl, line {number}: .*{words}'):
            raise error


def test_broken_records_stop_or_are_skipped_and_counted(prepare, tmp_path, capsys):
    texts = make_texts(40)
    path = write_jsonl(tmp_path / 'a.jsonl', texts)
    path.write_bytes(b''.join(BROKEN) + b'{"text": ""}\n' + path.read_bytes())
    with pytest.raises(UserError, match='a.jsonl, line 1: not valid JSON'):
        prepare('text.py', f'--input={path}', *BYTES)
    folder = prepare('text.py', f'--input={path}', *BYTES, '--on_error=skip')
    assert sorted(texts_of(folder)) == sorted(texts)
    assert (config_of(folder)['skipped'], config_of(folder)['blank']) == (7, 1)
    said = capsys.readouterr()
    assert [said.err.count(f'a.jsonl, line {number}: ') for number in range(1, 9)] == [1] * 7 + [0]
    assert 'left out: 1 blank documents, 7 that could not be read' in said.out
    prepare('text.py', f'--input={path}', *BYTES, '--on_error=skip')  # reused, and said again
    assert '7 that could not be read' in capsys.readouterr().out


BAD_INPUT = {
    'a.jsonl: no-such': ('{"text": "x"}', ['--input=no-such*.txt'], 'No file matches no-such'),
    'a.txt: empty': ('', [], r'a\.txt is empty'),
    'a.txt: blank': (' \n', [], r'There is no text in .*a\.txt'),
    'a.csv': ('text', [], r'a\.csv ends in none of \.txt, \.jsonl'),
    'a.txt: utf-8': (
        b'abc\xff',
        [],
        r"a\.txt, document 1: no valid UTF-8 .* can't decode byte 0xff in position 3",
    ),
    'a.json: no list': ('{"text": "x"}', [], r'a\.json holds a dict .*not a list'),
    'a.json: field': ('[{"body": "x"}]', ['--field=title'], r"record 1: there is no field 'title', only 'bo"),
    'a.parquet': ('PAR2', [], r'a\.parquet cannot be read to its end'),
    'a.jsonl: all broken': (
        '{"content": "x"}\n' * 5,
        ['--on_error=skip'],
        "no text in .* 5 records were skipped: .*line 1: there is no field 'text'",
    ),
}


@pytest.mark.parametrize('case', BAD_INPUT)
def test_bad_input_is_one_sentence_and_writes_nothing(prepare, tmp_path, case):
    content, arguments, message = BAD_INPUT[case]
    path = tmp_path / case.split(':')[0]
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=message) as error:
        prepare('text.py', f'--input={path}', *arguments)
    assert '\n' not in str(error.value)
    assert list(tmp_path.iterdir()) == [path]


def test_parquet_without_the_field_names_those_it_has(prepare, tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({'body': ['x'], 'title': ['y']}), tmp_path / 'a.parquet')
    with pytest.raises(UserError, match=r"a\.parquet, row 1: there is no field 'text', only 'body', 'title'"):
        prepare('text.py', f'--input={tmp_path / "a.parquet"}')


# ---------------------------------------------------------------------------- what files of others may hold


def records_of(path, **options):
    return [record for record, _ in records.read_records(path, lambda record, where: record, **options)]


@pytest.mark.faults
def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    for name, content in (('a.txt', 'one'), ('a.jsonl', '{"text": "one"}'), ('a.json', '[{"text": "one"}]')):
        (tmp_path / name).write_text(content, encoding='utf-8-sig')
        assert [text for text, _ in readers.files(str(tmp_path / name), 'text').documents()] == ['one']
    (tmp_path / 'a.csv').write_text('text,label\none,1\n', encoding='utf-8-sig')
    assert records_of(tmp_path / 'a.csv') == [{'text': 'one', 'label': '1'}]


@pytest.mark.faults
def test_json_lines_are_read_under_the_name_json_too(tmp_path):
    path = tmp_path / 'a.json'
    path.write_text('{"text": "one"}\n{"text": "two"}\n{"text": \n')
    one, two, broken = [text for text, _ in readers.files(str(path), 'text').documents()]
    assert (one, two) == ('one', 'two') and 'a.json, line 3: not valid JSON' in str(broken)


@pytest.mark.faults
def test_a_row_of_a_parquet_that_is_no_utf8_is_skipped_alone(tmp_path):
    path, offsets = tmp_path / 'a.parquet', np.array([0, 1, 2, 3], np.int32).tobytes()
    buffers = [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(b'a\xffb')]
    texts = pyarrow.Array.from_buffers(pyarrow.string(), 3, buffers)
    pyarrow.parquet.write_table(pyarrow.table({'text': texts}), path)
    one, broken, two = [text for text, _ in readers.files(str(path), 'text').documents()]
    assert (one, two) == ('a', 'b') and "row 2: 'utf-8' codec can't decode" in str(broken)


@pytest.mark.faults
def test_tables_keep_long_cells_and_name_a_quote_that_nothing_closes(tmp_path):
    path = tmp_path / 'a.csv'
    path.write_text(f'text,label\n"{"x" * 200_000}\ny",1\n')
    (row,) = records_of(path)
    assert len(row['text']) == 200_002
    path.write_text('label,text\n0,fine\n1,"open\n0,lost\n')
    row, error = records_of(path)
    assert row['text'] == 'fine' and 'row 2: a quote opens that nothing closes' in str(error)


@pytest.mark.faults
@pytest.mark.parametrize('fraction, texts', [(0.004, 30), (0.999, 30), (0.999, 1)])
def test_an_empty_split_is_told_what_fills_it(prepare, tmp_path, fraction, texts):
    words = [f'--input={write_jsonl(tmp_path / "a.jsonl", make_texts(texts))}', '--tokenizer=bytes']
    with pytest.raises(UserError, match=f'split is empty at val_fraction={fraction}') as error:
        prepare('text.py', *words, f'--val_fraction={float(fraction)}')
    assert 'give a val_fraction nearer to 0.5, or more text' in str(error.value)
    prepare('text.py', *words, '--val_fraction=0.5')


@pytest.mark.faults
def test_what_data_say_cannot_steer_the_terminal(prepare, tmp_path, capsys):
    path = write_jsonl(tmp_path / 'a.jsonl', make_texts(40))
    lines = [json.dumps(line) for line in ('\x1b[2J\x9b31m\rhidden', {'text': ['\x1b[2J']}, '\x07')]
    path.write_text(path.read_text() + '\n'.join(lines))
    with pytest.raises(UserError) as error:
        prepare('text.py', f'--input={path}', *BYTES)
    sys.excepthook(UserError, error.value, None)
    prepare('text.py', f'--input={path}', *BYTES, '--on_error=skip')
    said = capsys.readouterr()
    assert not set('\x1b\x9b\x07') & set(said.out + said.err) and said.err.count('\\x1b[2J\\x9b') == 2


# ---------------------------------------------------------------------------- the hub


@pytest.fixture
def hub(monkeypatch):
    """Stands for the hub: sets what `load_dataset` gives; returns what was asked for."""

    def serve(load):
        info = type('Info', (), {'sha': 'abc', 'siblings': None})
        asked = []

        def load_dataset(path, name, split, streaming, revision):
            assert (split, streaming, revision) == ('train', True, 'abc')
            asked.append((path, name))
            return load()

        monkeypatch.setattr(huggingface_hub.HfApi, 'dataset_info', lambda api, name: info)
        monkeypatch.setattr(datasets, 'load_dataset', load_dataset)
        return asked

    return serve


def test_of_a_data_set_that_is_a_script_the_copy_of_the_hub_is_read(monkeypatch, capsys):
    def dataset_info(api, name, revision='main'):
        parquet = [f'{part}/partial-train/0000.parquet' for part in ('large', 'plain_text')]
        files = {'main': ['openwebtext.py'], 'refs/convert/parquet': parquet}
        siblings = [type('File', (), {'rfilename': file}) for file in files[revision]]
        return type('Info', (), {'sha': f'of {revision}', 'siblings': siblings})

    monkeypatch.setattr(huggingface_hub.HfApi, 'dataset_info', dataset_info)
    where = records.on_the_hub('some/openwebtext', 'plain_text')
    assert where == dict(path='some/openwebtext', revision='of refs/convert/parquet', data_dir='plain_text')
    assert 'in parquet, of which the hub has a part, is read' in capsys.readouterr().out
    with pytest.raises(
        UserError, match='several parts, large, plain_text; name one, as some/openwebtext:large'
    ):
        records.on_the_hub('some/openwebtext')
    assert records.on_the_hub('some/data', 'part') == dict(path='some/data', revision='of main', name='part')


def test_a_stream_goes_on_from_its_state(hub, tmp_path):
    texts, load = make_texts(40), datasets.load_dataset
    for number in range(3):
        write_parquet(tmp_path / f'{number}.parquet', texts[number::3])
    hub(lambda: load('parquet', data_dir=str(tmp_path), split='train', streaming=True))
    source = readers.hub('some/data')
    whole = [text for text, _ in source.documents()]
    assert sorted(whole) == sorted(texts)
    for done in (1, 13, 20, 39):
        reading = source.documents()
        begun = [next(reading)[0] for _ in range(done)]
        state = json.loads(json.dumps(source.state()))
        assert begun + [text for text, _ in source.documents(done, state)] == whole


def test_the_bar_of_a_stream_knows_how_many_documents_are_left(hub):
    stream = datasets.Dataset.from_list([{'text': 'a'}] * 3).to_iterable_dataset()
    stream.info.splits = {'train': datasets.SplitInfo(num_examples=3)}
    hub(lambda: stream)
    source = readers.hub('some/data')
    next(source.documents())
    assert source.total == 3


ON_THE_HUB = {  # script and setting: what is asked for
    'tinystories.py': ('roneneldan/TinyStories', None),
    'openwebtext.py': ('Skylion007/openwebtext', None),
    'text.py --hub=HuggingFaceFW/fineweb:sample-10BT': ('HuggingFaceFW/fineweb', 'sample-10BT'),
}


@pytest.mark.parametrize('words', ON_THE_HUB)
def test_each_source_on_the_hub_gives_what_its_files_give(prepare, hub, tmp_path, words):
    script, *setting = words.split()
    texts = make_texts(40)
    rows = [{'text': text} for text in texts]
    asked = hub(lambda: datasets.Dataset.from_list(rows).to_iterable_dataset())
    from_hub = prepare(script, *setting, *BYTES)
    assert set(asked) == {ON_THE_HUB[words]} and list(config_of(from_hub)['inputs'].values()) == ['abc']
    path = write_jsonl(tmp_path / 'a.jsonl', texts)
    from_files = prepare(script, *BYTES, f'--input={path}', output_dir=tmp_path / 'files')
    assert config_of(from_hub)['sha256'] == config_of(from_files)['sha256']


@pytest.mark.parametrize(
    'failure',
    [
        OSError('Connection broken: IncompleteRead'),
        requests.exceptions.ChunkedEncodingError('IncompleteRead'),
        httpx.ReadTimeout('The read operation timed out'),
    ],
    ids=lambda failure: type(failure).__name__,
)
def test_a_hub_that_fails_is_one_sentence_and_the_same_command_goes_on(prepare, hub, failure):
    texts, is_down = make_texts(40), [True]

    def rows():
        for number, text in enumerate(texts):
            if number == 20 and is_down[0]:
                raise failure
            yield {'text': text}

    class Stream(list):
        info = datasets.DatasetInfo()
        state_dict, __iter__ = (lambda self: {}), (lambda self: rows())

    hub(Stream)
    with pytest.raises(UserError, match=r'openwebtext could not be read from the hub \(.+\); .*try again'):
        prepare('openwebtext.py', *BYTES)
    is_down[0] = False
    assert sorted(texts_of(prepare('openwebtext.py', *BYTES))) == sorted(texts)


@pytest.mark.faults
def test_a_stream_goes_on_with_what_was_written_at_the_revision_that_it_was_begun_with(
    prepare, hub, tmp_path, monkeypatch, capsys
):
    texts, is_down = make_texts(40), [True]

    class Stream(SimpleNamespace):
        info = datasets.DatasetInfo()
        state_dict, load_state_dict = (
            (lambda self: {'at': self.at}),
            (lambda self, state: vars(self).update(state)),
        )

        def __iter__(self):
            while self.at < len(texts):
                if self.at == 30 and is_down[0]:
                    raise OSError('Connection broken')
                self.at += 1
                yield {'text': texts[self.at - 1]}

    hub(lambda: Stream(at=0))  # which gives no other revision than abc
    monkeypatch.setattr(writer, 'SHARD', 2000)
    with pytest.raises(UserError, match='could not be read from the hub'):
        prepare('openwebtext.py', *BYTES)
    is_down[0] = False
    newer = type('Info', (), {'sha': 'def', 'siblings': None})
    monkeypatch.setattr(huggingface_hub.HfApi, 'dataset_info', lambda api, name: newer)
    path = tmp_path / '.out.partial' / 'train_tokens.bin'
    written = path.read_bytes()
    path.write_bytes(written[:100])
    with pytest.raises(
        UserError, match='train_tokens.bin has 100 bytes of .* that were written; put it back'
    ):
        prepare('openwebtext.py', *BYTES)
    path.write_bytes(written)
    for _ in range(2):  # it goes on, and it is finished
        folder = prepare('openwebtext.py', *BYTES)
        assert 'openwebtext has changed since; ' in capsys.readouterr().out
        assert sorted(texts_of(folder)) == sorted(texts) and [*config_of(folder)['inputs'].values()] == [
            'abc'
        ]


def test_a_hub_that_cannot_be_reached_is_one_sentence(prepare, monkeypatch):
    def offline(*_):
        raise ConnectionError('no network')

    monkeypatch.setattr(huggingface_hub.HfApi, 'dataset_info', offline)
    with pytest.raises(
        UserError, match='openwebtext could not be read from the hub .*give files of your own'
    ):
        prepare('openwebtext.py')
