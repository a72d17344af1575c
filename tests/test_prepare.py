"""Check what a prepared folder holds, and that a preparation is repeated or refused."""

import hashlib
import json
import math
import random
import shlex
import subprocess
import sys
import urllib.error
import urllib.request

import pytest
import tiktoken
from conftest import (
    ROOT,
    SHARED,
    TIKTOKEN_CACHE,
    config_of,
    contents,
    documents_of,
    make_texts,
    texts_of,
    write_jsonl,
    write_llama_tokenizer,
)
from tokenizers import Tokenizer as Inner
from tokenizers import models, pre_tokenizers, trainers

from lm import data
from lm import tokenizer as tokenizers
from lm.configurator import UserError
from lm.folder import Folder
from lm.tokenizer import CHARACTERS, ENDOFTEXT, IGNORE, MASK, Tokenizer, byte_level
from prepare import grammar, writer

NASTY = "Äh… naïve  \r\n\t“日本語”\u200d👩‍🚀\x00 1234567 don't  \n\n\n stop!! <|endoftext|> <|mask|>   \n"


@pytest.fixture
def corpus(tmp_path):
    return write_jsonl(tmp_path / 'corpus.jsonl', make_texts(60))


# ---------------------------------------------------------------------------- what a folder holds


def test_as_many_processes_encode_as_the_job_has_cores(prepare, corpus, monkeypatch):
    """On a node of a cluster a job may use some of the cores."""
    started = []

    class Pool(writer.ProcessPoolExecutor):
        def __init__(self, num_workers, **settings):
            started.append(num_workers)
            super().__init__(1, **settings)

    monkeypatch.setattr(writer.os, 'sched_getaffinity', lambda pid: {3, 5, 6}, raising=False)
    monkeypatch.setattr(writer, 'ProcessPoolExecutor', Pool)
    prepare('text.py', f'--input={corpus}', '--tokenizer=bytes', '--num_workers=0')
    assert started == [3]


@pytest.mark.parametrize('kind', ['char', 'bytes', 'bpe'])
def test_folder_holds_every_document_and_an_honest_config(prepare, tmp_path, kind):
    texts = make_texts(40) + [NASTY * 3]
    path = write_jsonl(tmp_path / 'a.jsonl', texts)
    size = ['--vocab_size=300'] if kind == 'bpe' else []
    folder = prepare('text.py', f'--input={path}', f'--tokenizer={kind}', *size, '--max_seq_len=16')
    config, size = config_of(folder), config_of(folder)['vocab_size']
    assert config['special_ids'] == {ENDOFTEXT: size - 3, MASK: size - 2, IGNORE: size - 1}
    assert config['start_token'] == size - 3 and config['dtype'] == 'uint16' and config['max_seq_len'] == 16
    assert kind != 'bpe' or size == 300
    for split, counts in config['splits'].items():
        documents, decoded = documents_of(folder, split), texts_of(folder, split)
        assert all(ids[-1] == size - 3 and max(ids[:-1]) < size - 3 for ids in documents)
        assert {unit: (type(count), count) for unit, count in counts.items()} == {
            'tokens': (int, sum(map(len, documents))),
            'documents': (int, len(documents)),
            'bytes': (int, sum(len(text.encode()) for text in decoded)),
        }
        assert decoded == [text for text in texts if text in decoded]  # in the order of the input
    assert sorted(texts_of(folder)) == sorted(texts)
    files = contents(folder)
    del files['config.json']
    assert config['sha256'] == {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    assert sorted(files) == [
        'tokenizer.json',
        'train_index.bin',
        'train_tokens.bin',
        'val_index.bin',
        'val_tokens.bin',
    ]


def test_single_document_is_split_as_in_nanogpt(prepare, tmp_path):
    text = ''.join(make_texts(30))
    (tmp_path / 'play.txt').write_text(text)
    folder = prepare('shakespeare.py', f'--input={tmp_path / "play.txt"}')
    ids = {character: i for i, character in enumerate(sorted(set(text)))}  # nanoGPT's stoi
    cut = int(len(text) * 0.9)
    assert documents_of(folder, 'train') == [[ids[character] for character in text[:cut]]]
    assert documents_of(folder, 'val') == [[ids[character] for character in text[cut:]]]
    assert config_of(folder)['start_token'] == ids['\n']
    assert {type(count) for split in config_of(folder)['splits'].values() for count in split.values()} == {
        int
    }


@pytest.mark.skipif(not (SHARED / 'shakespeare.txt').exists(), reason=f'there is no {SHARED}/shakespeare.txt')
def test_shakespeare_has_nanogpts_counts(prepare):
    splits = config_of(prepare('shakespeare.py', f'--input={SHARED / "shakespeare.txt"}'))['splits']
    assert (splits['train']['tokens'], splits['val']['tokens']) == (1003854, 111540)


def test_many_workers_write_the_same_bytes(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, 'BATCH', 2000)
    monkeypatch.setattr(writer, 'SHARD', 9000)
    path = write_jsonl(tmp_path / 'corpus.jsonl', make_texts(400))
    one, two = (
        prepare(
            'text.py',
            f'--input={path}',
            '--vocab_size=400',
            f'--num_workers={n}',
            output_dir=tmp_path / n / 'x',
        )
        for n in '12'
    )
    assert contents(one) == contents(two)


def test_other_documents_and_orders_move_none_between_splits(prepare, tmp_path):
    texts = make_texts(80)
    shuffled = random.Random(1).sample(texts + make_texts(40, seed=1), 120)
    first, second = (
        prepare(
            'text.py',
            f'--input={write_jsonl(tmp_path / name, given)}',
            '--tokenizer=bytes',
            output_dir=folder,
        )
        for name, given, folder in (('a.jsonl', texts, tmp_path / 'a'), ('b.jsonl', shuffled, tmp_path / 'b'))
    )
    for split in ('train', 'val'):
        assert set(texts_of(first, split)) == set(texts_of(second, split)) & set(texts)


def test_long_documents_cross_workers_whole(prepare, tmp_path, monkeypatch):
    texts = [''.join(make_texts(200, seed)) for seed in range(12)] + ['no-space-at-all' * 3000]
    for module, name, value in (
        (writer, 'BATCH', 3000),
        (tokenizers, 'PIECE', 500),
        (tokenizers, 'LONGEST', 4000),
    ):
        monkeypatch.setattr(module, name, value)
    path = write_jsonl(tmp_path / 'a.jsonl', texts)
    folder = prepare(
        'text.py', f'--input={path}', '--tokenizer=bytes', '--val_fraction=0.3', '--num_workers=2'
    )
    assert sorted(texts_of(folder)) == sorted(texts)


@pytest.mark.skipif(not TIKTOKEN_CACHE.is_dir(), reason=f'the GPT-2 vocabulary is not in {TIKTOKEN_CACHE}')
def test_gpt2_tokens_are_tiktokens(prepare, tmp_path, monkeypatch):
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(TIKTOKEN_CACHE))
    texts = [*make_texts(30), NASTY]
    path = write_jsonl(tmp_path / 'a.jsonl', texts)
    folder = prepare('text.py', f'--input={path}', '--tokenizer=gpt2')
    expected = [ids + [50256] for ids in tiktoken.get_encoding('gpt2').encode_ordinary_batch(texts)]
    assert sorted(documents_of(folder, 'train') + documents_of(folder, 'val')) == sorted(expected)


def test_a_tokenizer_that_cannot_spell_the_text_is_reported(prepare, tmp_path, capsys):
    words = {'[UNK]': 0} | {letter: number for number, letter in enumerate('abcdefghij', 1)}
    inner = Inner(models.BPE(words, [], unk_token='[UNK]'))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(['</s>'])
    inner.save(str(tmp_path / 'tokenizer.json'))
    (tmp_path / 'tokenizer_config.json').write_text('{"eos_token": "</s>"}')
    path = write_jsonl(
        tmp_path / 'corpus.jsonl', ['xyz 日本 ' + 'abcdefghij'[i % 10] * i for i in range(1, 60)]
    )
    prepare('text.py', f'--input={path}', f'--tokenizer={tmp_path}', '--val_fraction=0.5')
    assert "'xyz日本" in (said := capsys.readouterr().out) and 'what it leaves out or changes is not' in said


def test_a_prepared_folder_lends_its_tokenizer(prepare, corpus, tmp_path):
    first = prepare('text.py', f'--input={corpus}', '--vocab_size=300', output_dir=tmp_path / 'first')
    second = prepare('text.py', f'--input={corpus}', f'--tokenizer={first}', output_dir=tmp_path / 'second')
    assert config_of(first)['sha256'] == config_of(second)['sha256']


@pytest.mark.faults
@pytest.mark.parametrize('says', ['tokenizer.json', 'tokenizer_config.json'])
def test_rows_of_text_begin_as_the_tokenizers_model_was_pretrained(says, prepare, corpus, tmp_path):
    (tmp_path / 'model').mkdir()
    write_llama_tokenizer(tmp_path / 'model', says)
    for tokenizer, output in (('model', 'out'), ('out', 'again')):  # a prepared folder lends its own
        words = [f'--input={corpus}', f'--tokenizer={tmp_path / tokenizer}']
        path = prepare('text.py', *words, output_dir=tmp_path / output)
        folder = Folder(path)
        assert folder.config['start_token'] == folder.tokenizer.start_id == 256
        documents = data.DocumentRows(folder, 'train', 500, False)  # each in one row
        for rows in (documents, data.PackedRows(folder, 'train', 16, 15, training=True)):
            read = [rows.read(row, (0,))[0] for row in range(4)]
            assert all(row[0] == 256 and 256 not in row[1:] and len(row) == rows.row_length for row in read)
    (tmp_path / 'one.txt').write_text('A single text,\nof two lines. ' * 40)
    words = [f'--input={tmp_path}/one.txt', f'--tokenizer={tmp_path}/model']
    single = Folder(prepare('text.py', *words, output_dir=tmp_path / 'single'))
    assert single.config['start_token'] == 256
    inner = Folder(tmp_path / 'out').tokenizer.to_json()
    assert Tokenizer(inner).start_id == (256 if says == 'tokenizer.json' else 257)
    assert Tokenizer(inner, start=256).start_id == 256 and Tokenizer(inner, start=65).start_id != 65


def test_a_large_vocabulary_takes_uint32(prepare, corpus, tmp_path):
    alphabet = {character: byte for byte, character in tokenizers.CHARACTERS.items()}
    large = byte_level(alphabet | {f'token {i}': i for i in range(256, 70000)}, [])
    large.save(str(tmp_path / 'tokenizer.json'))
    folder = prepare('text.py', f'--input={corpus}', f'--tokenizer={tmp_path / "tokenizer.json"}')
    assert config_of(folder)['dtype'] == 'uint32' and config_of(folder)['vocab_size'] == 70003
    assert documents_of(folder, 'train')[0][-1] == 70000


def test_stories_in_a_txt_are_documents_of_their_own(prepare, tmp_path):
    texts = [text.strip() for text in make_texts(50)]
    (tmp_path / 'a.txt').write_text('\n<|endoftext|>\n'.join(texts) + '\n<|endoftext|>\n')
    folder = prepare(
        'tinystories.py', f'--input={tmp_path / "a.txt"}', '--tokenizer=bytes', '--val_fraction=0.1'
    )
    assert sorted(texts_of(folder)) == sorted(texts)


@pytest.mark.skipif(not SHARED.is_dir(), reason=f'there is no {SHARED}')
def test_real_text_comes_through_whole(prepare):
    path = SHARED / 'web.jsonl'
    texts = [json.loads(line)['text'] for line in open(path, encoding='utf-8')]
    folder = prepare('openwebtext.py', f'--input={path}', '--val_fraction=0.1', '--vocab_size=2000')
    assert sorted(texts_of(folder)) == sorted(texts)


def test_stories_record_the_loss_that_no_model_can_beat(prepare, capsys):
    folder = prepare('stories.py', '--num_stories=300', '--seed=3')
    config, stories = config_of(folder), texts_of(folder, 'val')
    assert sorted(texts_of(folder)) == sorted(grammar.stories(300, 3))
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


def test_one_story_has_no_other_to_be_validated_on(prepare, tmp_path):
    with pytest.raises(UserError, match='num_stories is 1; it must be at least 2'):
        prepare('stories.py', '--num_stories=1')
    assert not list(tmp_path.iterdir())


def test_the_command_to_run_next_is_one_that_a_shell_takes(prepare, corpus, tmp_path, capsys):
    folder = prepare('text.py', f'--input={corpus}', '--name=other', output_dir=tmp_path / 'my data')
    output = capsys.readouterr().out
    assert "note: name='other' has no effect beside output_dir." in output
    command = next(line for line in output.splitlines() if line.startswith('next: '))
    assert shlex.split(command)[1:] == ['python', 'train.py', f'--dataset={folder}']


def test_a_link_under_data_is_followed_and_stays(prepare, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(writer, 'ROOT', tmp_path / 'here')
    (tmp_path / 'here' / 'data').mkdir(parents=True)
    (tmp_path / 'disk').mkdir()
    link = tmp_path / 'here' / 'data' / 'my words'
    link.symlink_to(tmp_path / 'disk' / 'words')  # which is not there yet
    for more in ([], ['--overwrite', '--val_fraction=0.2']):
        prepare(
            'text.py', f'--input={corpus}', '--tokenizer=bytes', '--output_dir=', '--name=my words', *more
        )
        assert link.is_symlink() and config_of(tmp_path / 'disk' / 'words')['splits']['val']['tokens']
    assert "next: python train.py --dataset='my words'" in capsys.readouterr().out


def test_a_field_of_txt_files_is_reported_and_not_recorded(prepare, tmp_path, capsys):
    (tmp_path / 'a.txt').write_text('\n'.join(make_texts(30)))
    prepare('text.py', f'--input={tmp_path}/a.txt', '--tokenizer=char', '--field=content')
    assert "note: field='content' has no effect on .txt files" in capsys.readouterr().out
    folder = prepare('text.py', f'--input={tmp_path}/a.txt', '--tokenizer=char')
    assert (
        'is prepared already' in capsys.readouterr().out and config_of(folder)['arguments']['field'] == 'text'
    )
    folder = prepare('shakespeare.py', f'--input={tmp_path}/a.txt', output_dir=tmp_path / 'plays')
    assert 'field' not in config_of(folder)['arguments']  # it has none


@pytest.mark.parametrize('kind', ['bpe', 'bytes', 'digits'])
def test_a_tokenizer_given_by_path_encodes_a_long_document_in_pieces(prepare, tmp_path, monkeypatch, kind):
    text = ' '.join(make_texts(400))
    (tmp_path / 'a.txt').write_text(text)
    inner = byte_level({character: byte for byte, character in CHARACTERS.items()}, [])
    if kind == 'digits':  # as SmolLM2's
        parts = [pre_tokenizers.Digits(individual_digits=True), inner.pre_tokenizer]
        inner.pre_tokenizer = pre_tokenizers.Sequence(parts)
    if kind == 'bpe':
        inner.train_from_iterator(
            [text], trainers.BpeTrainer(vocab_size=400, initial_alphabet=[*CHARACTERS.values()])
        )
    inner.save(str(tmp_path / 'tokenizer.json'))
    monkeypatch.setattr(tokenizers, 'PIECE', 1000)
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.takes_pieces and len([*tokenizers.pieces(text)]) > 9
    whole = tokenizer.encode(text)
    assert [i for piece in tokenizers.pieces(text) for i in tokenizer.encode(piece)] == whole
    folder = prepare('text.py', f'--input={tmp_path}/a.txt', f'--tokenizer={tmp_path}/tokenizer.json')
    found = Folder(folder).tokens
    cut = int(len(text) * 0.9)
    assert [*found['train']] == tokenizer.encode(text[:cut])
    assert [*found['val']] == tokenizer.encode(text[cut:])


# ---------------------------------------------------------------------------- finished folders


def test_finished_folder_is_reused_refused_or_replaced(prepare, corpus, tmp_path, capsys):
    folder = prepare('text.py', f'--input={corpus}', '--tokenizer=bytes')
    before, changed = contents(folder), (folder / 'config.json').stat().st_mtime_ns
    copy = tmp_path / 'copy.jsonl'
    copy.write_bytes(corpus.read_bytes())
    prepare('text.py', f'--input={copy}', '--tokenizer=bytes', '--num_workers=2')  # the same by another name
    assert 'prepared already' in capsys.readouterr().out
    assert (folder / 'config.json').stat().st_mtime_ns == changed
    with pytest.raises(UserError, match='val_fraction was 0.1 and is 0.2.*--overwrite'):
        prepare('text.py', f'--input={corpus}', '--tokenizer=bytes', '--val_fraction=0.2')
    write_jsonl(copy, make_texts(61))
    with pytest.raises(UserError, match='the input is not the same.*copy.jsonl'):
        prepare('text.py', f'--input={copy}', '--tokenizer=bytes')
    assert contents(folder) == before
    (folder / 'notes.txt').write_text('mine')
    (folder / 'work').mkdir()  # of the user
    prepare('text.py', f'--input={corpus}', '--tokenizer=bytes')
    prepare('text.py', f'--input={copy}', '--tokenizer=bytes', '--overwrite')
    assert (folder / 'work').is_dir()
    assert config_of(folder)['inputs'].keys() == {str(copy)} and (folder / 'notes.txt').read_text() == 'mine'
    assert not [path for path in tmp_path.iterdir() if path.name.startswith('.')]


def test_failed_replacement_leaves_the_old_folder(prepare, corpus, tmp_path):
    folder = prepare('text.py', f'--input={corpus}', '--tokenizer=bytes')
    before = contents(folder)
    corpus.write_text('{"text": "fine"}\n{"text": "fine too"}\nnot json\n')
    with pytest.raises(UserError, match='line 3'):
        prepare('text.py', f'--input={corpus}', '--tokenizer=bytes', '--overwrite')
    assert contents(folder) == before and sorted(tmp_path.iterdir()) == [corpus, folder]


def test_damaged_folder_is_not_reused(prepare, corpus):
    folder = prepare('text.py', f'--input={corpus}')
    (folder / 'val_tokens.bin').write_bytes(b'xx')
    with pytest.raises(UserError, match='val_tokens.bin has 2 bytes, config.json says .*--overwrite'):
        prepare('text.py', f'--input={corpus}')
    prepare('text.py', f'--input={corpus}', '--overwrite')


def test_foreign_folder_is_never_replaced(prepare, corpus, tmp_path):
    foreign = tmp_path / 'out'
    foreign.mkdir()
    (foreign / 'config.json').write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match='was not prepared here'):
        prepare('text.py', f'--input={corpus}', '--overwrite')
    assert list(contents(foreign)) == ['config.json']


def test_other_seeds_and_rules_are_not_reused(prepare):
    folder = prepare('stories.py', '--num_stories=100')
    with pytest.raises(UserError, match='seed was 0 and is 1'):
        prepare('stories.py', '--num_stories=100', '--seed=1')
    config = config_of(folder)
    config['inputs'] = {'prepare/grammar.py': 'other rules'}
    (folder / 'config.json').write_text(json.dumps(config))
    with pytest.raises(UserError, match='the input is not the same'):
        prepare('stories.py', '--num_stories=100')


# ---------------------------------------------------------------------------- settings

BAD_SETTINGS = {
    '--val_fraction=0': 'val_fraction is 0, so nothing could be evaluated',
    '--output_dir= --name=a,b': 'name=a,b does not name',
    '--output_dir= --name=*': r'name=\* does not name',
    '--val_fraction=1.5': r'val_fraction is 1\.5; it must be',
    '--val_fraction=0.001': r'The val split is empty at val_fraction=0\.001',
    '--val_fraction=0.999': r'The train split is empty at val_fraction=0\.999',
    '--vocab_size=10': r'vocab_size is 10; it must be at least 259',
    '--tokenizer=char --vocab_size=99': r'vocab_size=99 has no effect with tokenizer=char',
    '--tokenizer=gpt9': r'tokenizer=gpt9 is none of char, bytes, gpt2, bpe',
    '--output_dir= --name=a/b': r'name=a/b does not name',
    '--output_dir=': r'name= does not name',
    '--max_seq_len=-1': 'max_seq_len is -1',
    '--on_error=ignore': "on_error is 'ignore'; choose stop or skip",
    '--tokenizer_sample_mb=0': 'tokenizer_sample_mb is 0',
    '--num_workers=-1': 'num_workers is -1',
}


@pytest.mark.parametrize('words', BAD_SETTINGS)
def test_a_mistake_in_the_settings_is_one_sentence_and_writes_nothing(prepare, tmp_path, words):
    path = write_jsonl(tmp_path / 'a.jsonl', ['x', 'y'])
    with pytest.raises(UserError, match=BAD_SETTINGS[words]) as error:
        prepare('text.py', f'--input={path}', *words.split())
    assert '\n' not in str(error.value)
    assert list(tmp_path.iterdir()) == [path]


def test_an_error_has_no_traceback_and_exit_status_1(tmp_path):
    (tmp_path / 'a.txt').write_bytes(b'\xff')
    command = [sys.executable, ROOT / 'prepare' / 'text.py', '--input=a.txt', '--output_dir=out']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ''
    assert len(done.stderr.splitlines()) == 1 and 'no valid UTF-8' in done.stderr


def test_no_network_is_one_sentence(prepare, monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError('no network')

    monkeypatch.setattr(urllib.request, 'urlopen', offline)
    with pytest.raises(UserError, match='--input=FILE'):
        prepare('shakespeare.py')
