"""What the prepare scripts promise. Small texts made here, no network, nothing written to data/."""

import hashlib
import json
import math
import os
import random
import runpy
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiktoken
from requests import ConnectionError

ROOT = Path(__file__).resolve().parent.parent
from lm.configurator import UserError
from lm.data import ENDOFTEXT, IGNORE, MASK, Tokenizer
from prepare import tokenizer as tokenizers
from prepare import writer

SHARED = ROOT.parent / 'shared' / 'data'
CACHE = Path(os.environ.get('TIKTOKEN_CACHE_DIR', SHARED / 'tiktoken_cache'))
NASTY = "Äh… naïve  \r\n\t“日本語”\u200d👩‍🚀\x00 1234567 don't  \n\n\n stop!! <|endoftext|> <|mask|>   \n"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a script in this process; returns the folder that it wrote."""

    def run(script, *arguments, output_dir=tmp_path / 'out'):
        argv = [script, f'--output_dir={output_dir}', '--num_workers=1', *arguments]
        monkeypatch.setattr(sys, 'argv', argv)
        runpy.run_path(str(ROOT / 'prepare' / script), run_name='__main__')
        return output_dir

    return run


def write_jsonl(path, texts):
    path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    return path


def make_texts(count, seed=0):
    words = 'the cat sat on a mat while every dog in Zürich was singing loudly and nobody cared'.split()
    draw = random.Random(seed)
    return [' '.join(draw.choices(words, k=draw.randint(3, 30))) + f' {i}.\n' for i in range(count)]


@pytest.fixture
def corpus(tmp_path):
    return write_jsonl(tmp_path / 'corpus.jsonl', make_texts(60))


def config_of(folder):
    return json.loads((folder / 'config.json').read_text())


def documents_of(folder, split):
    """Token ids of each document."""
    tokens = np.fromfile(folder / f'{split}_tokens.bin', config_of(folder)['dtype'])
    index = np.fromfile(folder / f'{split}_index.bin', np.uint64).astype(int)
    assert index[0] == 0 and index[-1] == len(tokens)
    return [tokens[start:end].tolist() for start, end in zip(index, index[1:])]


def texts_of(folder, split):
    tokenizer = Tokenizer.load(folder)
    return [tokenizer.decode(ids) for ids in documents_of(folder, split)]


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------------------- what a folder holds


@pytest.mark.parametrize('kind', ['char', 'bytes', 'bpe'])
def test_folder_holds_every_document_and_an_honest_config(run, tmp_path, kind):
    texts = make_texts(40) + [NASTY * 3]
    folder = run(
        'text.py',
        f'--input={write_jsonl(tmp_path / "a.jsonl", texts)}',
        f'--tokenizer={kind}',
        *['--vocab_size=300'] * (kind == 'bpe'),
    )
    config, written = config_of(folder), []
    size = config['vocab_size']
    assert config['special_ids'] == {ENDOFTEXT: size - 3, MASK: size - 2, IGNORE: size - 1}
    assert config['start_token'] == size - 3 and config['dtype'] == 'uint16'
    assert kind != 'bpe' or size == 300
    for split, counts in config['splits'].items():
        documents, decoded = documents_of(folder, split), texts_of(folder, split)
        assert all(ids[-1] == size - 3 and max(ids[:-1]) < size - 3 for ids in documents)
        assert counts == {
            'tokens': sum(map(len, documents)),
            'documents': len(documents),
            'bytes': sum(len(text.encode()) for text in decoded),
        }
        assert decoded == [text for text in texts if text in decoded]  # in the order of the input
        written += decoded
    assert sorted(written) == sorted(texts)
    assert config['sha256'] == {
        name: hashlib.sha256(content).hexdigest()
        for name, content in contents(folder).items()
        if name != 'config.json'
    }
    assert contents(folder).keys() == {
        'config.json',
        'tokenizer.json',
        'train_index.bin',
        'train_tokens.bin',
        'val_index.bin',
        'val_tokens.bin',
    }


def test_single_document_is_split_as_in_nanogpt(run, tmp_path):
    text = ''.join(make_texts(30))
    (tmp_path / 'play.txt').write_text(text)
    folder = run('shakespeare.py', f'--input={tmp_path / "play.txt"}')
    ids = {character: i for i, character in enumerate(sorted(set(text)))}  # nanoGPT's stoi
    cut = int(len(text) * 0.9)
    assert documents_of(folder, 'train') == [[ids[character] for character in text[:cut]]]
    assert documents_of(folder, 'val') == [[ids[character] for character in text[cut:]]]
    assert config_of(folder)['start_token'] == ids['\n']


@pytest.mark.skipif(not (SHARED / 'shakespeare.txt').exists(), reason=f'there is no {SHARED}/shakespeare.txt')
def test_shakespeare_has_nanogpts_counts(run):
    splits = config_of(run('shakespeare.py', f'--input={SHARED / "shakespeare.txt"}'))['splits']
    assert (splits['train']['tokens'], splits['val']['tokens']) == (1003854, 111540)


def test_many_workers_write_the_same_bytes(run, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, 'BATCH', 2000)  # characters: many batches
    corpus = write_jsonl(tmp_path / 'corpus.jsonl', make_texts(400))
    one, two = (
        run(
            'text.py',
            f'--input={corpus}',
            '--vocab_size=400',
            f'--num_workers={number}',
            '--name=x',
            output_dir=tmp_path / str(number) / 'x',
        )
        for number in (1, 2)
    )
    assert contents(one) == contents(two)


def test_other_documents_and_orders_move_none_between_splits(run, tmp_path):
    texts = make_texts(80)
    shuffled = random.Random(1).sample(texts + make_texts(40, seed=1), 120)
    first, second = (
        run(
            'text.py',
            f'--input={write_jsonl(tmp_path / f"{number}.jsonl", given)}',
            '--tokenizer=bytes',
            output_dir=tmp_path / str(number),
        )
        for number, given in enumerate((texts, shuffled))
    )
    for split in ('train', 'val'):
        assert set(texts_of(first, split)) == set(texts_of(second, split)) & set(texts)


def test_every_format_gives_the_same_tokens(run, tmp_path):
    texts = make_texts(30)
    write_jsonl(tmp_path / 'a.jsonl', texts)
    (tmp_path / 'a.json').write_text(json.dumps([{'text': text} for text in texts]))
    pyarrow.parquet.write_table(pyarrow.table({'text': texts}), tmp_path / 'a.parquet')
    for number, text in enumerate(texts):
        (tmp_path / f'{number:02}.txt').write_text(text)
    given = ('a.jsonl', 'a.json', 'a.parquet', f'0*.txt,{tmp_path}/1*.txt, {tmp_path}/2*.txt')
    folders = [
        run(
            'text.py',
            f'--input={tmp_path}/{files}',
            '--tokenizer=bytes',
            output_dir=tmp_path / f'out{number}',
        )
        for number, files in enumerate(given)
    ]
    hashes = [config_of(folder)['sha256'] for folder in folders]
    assert all(each == hashes[0] for each in hashes)


def test_blank_documents_are_left_out_and_counted(run, tmp_path, capsys):
    folder = run('text.py', f'--input={write_jsonl(tmp_path / "a.jsonl", ["", *make_texts(40), " "])}')
    assert '2 blank documents left out' in capsys.readouterr().out
    assert sum(split['documents'] for split in config_of(folder)['splits'].values()) == 40


# ---------------------------------------------------------------------------- tokenizers


@pytest.mark.parametrize('kind', ['char', 'bytes', 'bpe'])
def test_decoding_restores_the_text(kind):
    tokenizer = tokenizers.build(kind, [NASTY, *make_texts(50)], 400)
    assert tokenizer.decode(tokenizer.encode(NASTY)) == NASTY
    reloaded = Tokenizer(tokenizer.to_json())
    assert reloaded.encode(NASTY) == tokenizer.encode(NASTY)
    assert not {tokenizer.endoftext_id, tokenizer.mask_id} & set(reloaded.encode(NASTY))
    if kind == 'bytes':
        assert tokenizer.encode(NASTY) == list(NASTY.encode())


@pytest.mark.parametrize('kind', ['char', 'bytes', 'bpe'])
def test_pieces_give_the_ids_of_the_whole(kind):
    texts = [NASTY * 20, ''.join(make_texts(30)), 'no-space-at-all' * 20, ' \n ' * 100]
    tokenizer = tokenizers.build(kind, texts, 400)
    for text in texts:
        for size in (1, 7, 64):
            pieces = list(tokenizers.pieces(text, size))
            assert ''.join(pieces) == text
            assert sum(tokenizer.encode_batch(pieces), []) == tokenizer.encode(text)


def test_long_documents_cross_workers_whole(run, tmp_path, monkeypatch):
    texts = [''.join(make_texts(200, seed)) for seed in range(12)]
    corpus = write_jsonl(tmp_path / 'a.jsonl', texts)
    monkeypatch.setattr(writer, 'BATCH', 3000)
    monkeypatch.setattr(tokenizers.pieces, '__defaults__', (500,))
    folder = run('text.py', f'--input={corpus}', '--tokenizer=bytes', '--val_fraction=0.3', '--num_workers=2')
    assert sorted(texts_of(folder, 'train') + texts_of(folder, 'val')) == sorted(texts)


@pytest.mark.slow
@pytest.mark.skipif(not CACHE.is_dir(), reason=f'the GPT-2 vocabulary is not in {CACHE}')
def test_gpt2_ids_are_tiktokens(run, tmp_path, monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(CACHE))
    texts = make_texts(30) + [NASTY, 'a' + ' ' * 500_000 + 'b']
    if (SHARED / 'web.jsonl').exists():
        texts += [json.loads(line)['text'] for line in open(SHARED / 'web.jsonl', encoding='utf-8')]
    folder = run('text.py', f'--input={write_jsonl(tmp_path / "a.jsonl", texts)}', '--tokenizer=gpt2')
    assert list(config_of(folder)['special_ids'].values()) == [50256, 50257, 50258]
    assert config_of(folder)['vocab_size'] == 50259
    expected = tiktoken.get_encoding('gpt2').encode_ordinary_batch(texts)  # it bears half a million spaces
    assert Tokenizer.load(folder).encode_batch(texts) == expected
    written = documents_of(folder, 'train') + documents_of(folder, 'val')
    assert sorted(written) == sorted(ids + [50256] for ids in expected)


def test_gpt2_without_its_vocabulary_says_what_to_do(run, corpus, monkeypatch, tmp_path):
    def offline(name):
        raise ConnectionError('no network')

    monkeypatch.setattr(tiktoken, 'get_encoding', offline)
    with pytest.raises(UserError, match='TIKTOKEN_CACHE_DIR'):
        run('text.py', f'--input={corpus}', '--tokenizer=gpt2')
    assert list(tmp_path.iterdir()) == [corpus]


def test_a_prepared_folder_lends_its_tokenizer(run, corpus, tmp_path):
    first = run('text.py', f'--input={corpus}', '--vocab_size=300', output_dir=tmp_path / 'first')
    second = run('text.py', f'--input={corpus}', f'--tokenizer={first}', output_dir=tmp_path / 'second')
    assert config_of(first)['sha256'] == config_of(second)['sha256']


def test_a_large_vocabulary_takes_uint32(run, corpus, tmp_path):
    large = tokenizers.byte_level(
        {
            **{character: byte for byte, character in tokenizers.CHARACTERS.items()},
            **{f'token {i}': i for i in range(256, 70000)},
        },
        [],
    )
    large.save(str(tmp_path / 'tokenizer.json'))
    folder = run('text.py', f'--input={corpus}', f'--tokenizer={tmp_path / "tokenizer.json"}')
    assert config_of(folder)['dtype'] == 'uint32' and config_of(folder)['vocab_size'] == 70003
    assert documents_of(folder, 'train')[0][-1] == 70000


# ---------------------------------------------------------------------------- finished and unfinished folders


def test_finished_folder_is_reused_refused_or_replaced(run, corpus, tmp_path, capsys):
    folder = run('text.py', f'--input={corpus}', '--tokenizer=bytes')
    before, changed = contents(folder), (folder / 'config.json').stat().st_mtime_ns
    copy = tmp_path / 'copy.jsonl'
    copy.write_bytes(corpus.read_bytes())
    run('text.py', f'--input={copy}', '--tokenizer=bytes', '--num_workers=2')  # the same by another name
    assert 'prepared already' in capsys.readouterr().out
    assert (folder / 'config.json').stat().st_mtime_ns == changed
    with pytest.raises(UserError, match='val_fraction was 0.1 and is 0.2.*--overwrite'):
        run('text.py', f'--input={corpus}', '--tokenizer=bytes', '--val_fraction=0.2')
    write_jsonl(copy, make_texts(61))
    with pytest.raises(UserError, match='the input is not the same.*copy.jsonl'):
        run('text.py', f'--input={copy}', '--tokenizer=bytes')
    assert contents(folder) == before
    run('text.py', f'--input={copy}', '--tokenizer=bytes', '--overwrite')
    assert config_of(folder)['inputs'].keys() == {str(copy)}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith('.')]


def test_failed_replacement_leaves_the_old_folder(run, corpus, tmp_path):
    folder = run('text.py', f'--input={corpus}', '--tokenizer=bytes')
    before = contents(folder)
    corpus.write_text('{"text": "fine"}\n{"text": "fine too"}\nnot json\n')
    with pytest.raises(UserError, match='line 3'):
        run('text.py', f'--input={corpus}', '--tokenizer=bytes', '--overwrite')
    assert contents(folder) == before and sorted(tmp_path.iterdir()) == [corpus, folder]


def test_a_replacement_killed_half_way_is_undone(run, corpus, tmp_path, capsys):
    folder = run('text.py', f'--input={corpus}', '--tokenizer=bytes')
    folder.rename(tmp_path / '.out.old')  # it had made room, and the new one had not taken it
    run('text.py', f'--input={corpus}', '--tokenizer=bytes')
    assert 'prepared already' in capsys.readouterr().out


def test_damaged_folder_is_not_reused(run, corpus):
    folder = run('text.py', f'--input={corpus}')
    (folder / 'val_tokens.bin').write_bytes(b'xx')
    with pytest.raises(UserError, match='val_tokens.bin is damaged'):
        run('text.py', f'--input={corpus}')


def test_foreign_folder_is_never_replaced(run, corpus, tmp_path):
    foreign = tmp_path / 'out'
    foreign.mkdir()
    (foreign / 'config.json').write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match='no folder that was prepared here'):
        run('text.py', f'--input={corpus}', '--overwrite')
    assert list(contents(foreign)) == ['config.json']


@pytest.mark.slow
def test_killed_run_leaves_nothing_that_looks_finished(run, tmp_path):
    corpus = write_jsonl(tmp_path / 'corpus.jsonl', make_texts(200) * 50)
    target, partial = tmp_path / 'out', tmp_path / '.out.partial'
    slow = (
        'import runpy, sys, time; sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv.pop(0))\n'
        'from prepare import writer\n'
        'append = writer.Split.append\n'
        'writer.Split.append = lambda *given: (append(*given), time.sleep(60))\n'
        'runpy.run_path(sys.argv[0], run_name="__main__")'
    )
    arguments = [f'--input={corpus}', '--tokenizer=bytes']
    process = subprocess.Popen(
        [
            sys.executable,
            '-c',
            slow,
            str(ROOT),
            str(ROOT / 'prepare' / 'text.py'),
            f'--output_dir={target}',
            '--num_workers=2',
            *arguments,
        ]
    )
    wait_until(lambda: (partial / 'train_tokens.bin').exists())
    with pytest.raises(UserError, match='Another process'):
        run('text.py', *arguments)
    workers = Path(f'/proc/{process.pid}/task/{process.pid}/children')
    wait_until(lambda: not workers.exists() or len(workers.read_text().split()) == 2)
    workers = [Path('/proc', pid) for pid in workers.read_text().split()] if workers.exists() else []
    process.kill()
    process.wait()
    assert not target.exists()
    run('text.py', *arguments)
    assert config_of(target)['splits']['train']['documents'] > 0 and not partial.exists()
    wait_until(lambda: not any(is_running(worker) for worker in workers))  # no orphans


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


def test_reading_stays_a_few_batches_ahead():
    """Memory is flat because no more than a window of batches is ever on its way."""

    class Pool:
        def submit(self, function, item):
            return type('Future', (), {'result': lambda self: function(item)})()

    read = []
    items = (read.append(i) or i for i in range(50))
    results = writer.in_order(Pool(), lambda item: item * 10, items, window=4)
    for count, result in enumerate(results):
        assert result == count * 10 and len(read) <= count + 4
    assert count == 49


# ---------------------------------------------------------------------------- bad input: one sentence each

BAD_INPUT = {
    'a.jsonl: no-such': ('{"text": "x"}', ['--input=no-such*.txt'], 'No file matches no-such'),
    'a.txt: empty': ('', [], r'a\.txt is empty'),
    'a.txt: blank': (' \n', [], r'There is no text in .*a\.txt'),
    'a.csv': ('text', [], r'a\.csv ends in none of \.txt, \.jsonl'),
    'a.txt: utf-8': (b'abc\xff', [], r'a\.txt: byte 3 \(0xff\) is not valid UTF-8'),
    'a.jsonl: utf-8': (b'{"text": "x"}\n{"text": "\xff"}', [], r'line 2: byte 10 \(0xff\)'),
    'a.jsonl: json': ('{"text": "x"}\n{"text": \n', [], r'line 2: not valid JSON'),
    'a.jsonl: field': ('{"text": "x"}\n{"body": "x"}\n', [], r"line 2: there is no field 'text', only 'body"),
    'a.jsonl: null': ('{"text": null}\n', [], r"line 1: the field 'text' holds null, not text"),
    'a.jsonl: list': ('[1]\n', [], r'line 1: a list \(\[1\]\) instead of a record'),
    'a.jsonl: surrogate': ('{"text": "\\ud800"}\n', [], r'line 1: .*half a character'),
    'a.json: no list': ('{"text": "x"}', [], r'a\.json holds a dict .*not a list'),
    'a.json: field': ('[{"body": "x"}]', ['--field=title'], r"record 1: there is no field 'title', only 'bo"),
    'a.parquet': ('PAR2', [], r'a\.parquet cannot be read to its end'),
    'a.txt: short': ('x', [], r'too short to be split'),
    'a.jsonl: no val': (
        '{"text": "x"}\n{"text": "y"}',
        ['--val_fraction=0.001'],
        r'None of the 2 documents .*--val_fraction=0\.\d+ takes the first',
    ),
    'a.jsonl: no train': ('{"text": "x"}\n{"text": "y"}', ['--val_fraction=0.999'], r'All 2 documents'),
    'a.txt: fraction': ('x', ['--val_fraction=1.5'], r'--val_fraction=1\.5 is not between'),
    'a.txt: vocab': ('x', ['--vocab_size=10'], r'--vocab_size=10 is too small.*259'),
    'a.txt: fixed vocab': ('x', ['--tokenizer=char', '--vocab_size=99'], r'--vocab_size=99 has no effect'),
    'a.txt: tokenizer': ('x', ['--tokenizer=gpt9'], r'--tokenizer=gpt9 is none of char, bytes, gpt2, bpe'),
    'a.txt: name': ('x', ['--output_dir=', '--name=a/b'], r'--name=a/b does not name'),
    'a.txt: no name': ('x', ['--output_dir='], r'--name= does not name'),
}


@pytest.mark.parametrize('case', BAD_INPUT)
def test_bad_input_is_one_sentence_and_writes_nothing(run, tmp_path, case):
    content, arguments, message = BAD_INPUT[case]
    path = tmp_path / case.split(':')[0]
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=message) as error:
        run('text.py', f'--input={path}', *arguments)
    assert '\n' not in str(error.value)
    assert list(tmp_path.iterdir()) == [path]


def test_parquet_without_the_field_names_those_it_has(run, tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({'body': ['x'], 'title': ['y']}), tmp_path / 'a.parquet')
    with pytest.raises(UserError, match=r"a\.parquet: there is no field 'text', only 'body', 'title'"):
        run('text.py', f'--input={tmp_path / "a.parquet"}')


def test_an_error_has_no_traceback_and_exit_status_1(tmp_path):
    (tmp_path / 'a.txt').write_bytes(b'\xff')
    done = subprocess.run(
        [sys.executable, ROOT / 'prepare' / 'text.py', '--input=a.txt', '--output_dir=out'],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stdout == ''
    assert len(done.stderr.splitlines()) == 1 and 'is not valid UTF-8' in done.stderr


def test_shakespeare_without_network_says_what_to_do(run, monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError('no network')

    monkeypatch.setattr(urllib.request, 'urlopen', offline)
    with pytest.raises(UserError, match='--input=FILE'):
        run('shakespeare.py')


# ---------------------------------------------------------------------------- stories


def test_stories_record_their_exact_floor(run, capsys):
    from prepare import grammar

    folder = run('stories.py', '--num_stories=300', '--seed=3')
    config, stories = config_of(folder), texts_of(folder, 'val')
    assert sorted(stories + texts_of(folder, 'train')) == sorted(grammar.stories(300, 3))
    nats, val = -sum(map(grammar.log_prob, stories)), config['splits']['val']
    assert config['floor'] == pytest.approx(
        {
            'nats_per_token': nats / val['tokens'],
            'nats_per_byte': nats / val['bytes'],
            'bits_per_byte': nats / val['bytes'] / math.log(2),
            'nats_per_story': nats / len(stories),
        }
    )
    assert f'{config["floor"]["nats_per_token"]:.4f} nats per token' in capsys.readouterr().out


def test_other_seeds_and_rules_are_not_reused(run):
    folder = run('stories.py', '--num_stories=100')
    with pytest.raises(UserError, match='seed was 0 and is 1'):
        run('stories.py', '--num_stories=100', '--seed=1')
    config = config_of(folder)
    config['inputs'] = {'prepare/grammar.py': 'other rules'}
    (folder / 'config.json').write_text(json.dumps(config))
    with pytest.raises(UserError, match='the input is not the same'):
        run('stories.py', '--num_stories=100')
