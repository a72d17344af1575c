"""Labelled texts come out of a database of files or hub sets, and become rows of tokens."""

import csv
import datetime
import json

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
from conftest import letter_tokenizer

from lm import languages
from lm.configurator import UserError
from lm.tokenizer import Tokenizer

ENTRY = {
    'train_features': ['a', 'b'],
    'eval_feature': 'label',
    'splits': ['train', 'test'],
    'classes': ['neg', 'pos'],
}
ROWS = [
    {'a': f'text {i}', 'a-phoneme': f'p{i}', 'b': 'more', 'b-phoneme': 'pm', 'label': ('neg', 'pos')[i % 2]}
    for i in range(6)
]


def write_rows(path):
    path.parent.mkdir(exist_ok=True)
    if path.suffix == '.jsonl':
        path.write_text('\n'.join(map(json.dumps, ROWS)))
    elif path.suffix == '.json':
        path.write_text(json.dumps(ROWS))
    elif path.suffix == '.parquet':
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        with open(path, 'w', newline='') as file:
            writer = csv.DictWriter(file, ROWS[0], delimiter='\t' if path.suffix == '.tsv' else ',')
            writer.writeheader()
            writer.writerows(ROWS)
    return path


PLAIN = [
    suffix for suffix in languages.SUFFIXES if not suffix.startswith('.jsonl.')
]  # compressed: test_readers.py


@pytest.mark.parametrize('suffix', PLAIN)
def test_each_file_format_reads_the_same(tmp_path, suffix):
    write_rows(tmp_path / 'set' / f'test{suffix}')
    entry = {**ENTRY, 'dataset': str(tmp_path / 'set')}
    got = languages.read_split(entry, 'test')
    assert got == [((f'text {i}', 'more'), i % 2) for i in range(6)]
    assert languages.read_split(entry, 'test', 'ipa')[2] == (('p2', 'pm'), 0)


@pytest.mark.parametrize('newline', ['\n', '\r\n', '\r'])
def test_only_a_line_break_ends_a_row_not_what_unicode_calls_one(tmp_path, newline):
    texts = ['one\u2028two', 'three\x85four\x0b', ' "five']
    entry = {'dataset': str(tmp_path), 'train_features': ['text'], 'eval_feature': 'label', 'classes': 3}
    for ending, tab, names in (('tsv', '\t', ['text', 'label']), ('csv', ',', None)):
        rows = [] if names else ['text,label']
        rows += [f'{text}{tab}{i}' for i, text in enumerate(texts)]
        (tmp_path / f'{ending}-test.{ending}').write_bytes(newline.join([*rows, '']).encode())
        got = languages.read_split({**entry, 'columns': names}, f'{ending}-test')
        assert got == [((text,), i) for i, text in enumerate(texts)]


def test_a_json_database_may_hold_several_sets_of_a_task(tmp_path):
    entry = {**ENTRY, 'dataset': 'x'}
    (tmp_path / 'db.json').write_text(
        json.dumps({'rus': {'task': {'one': entry, 'two': {**entry, 'dataset': 'y'}}}})
    )
    database = languages.load_database(str(tmp_path / 'db.json'))
    assert languages.find_entry(database, 'rus:two', 'task')['dataset'] == 'y'
    with pytest.raises(UserError, match='choose one of rus:one, rus:two'):
        languages.find_entry(database, 'rus', 'task')
    with pytest.raises(UserError, match="none named 'one'; leave :one out"):
        languages.find_entry({'rus': {'task': entry}}, 'rus:one', 'task')


def test_training_languages_are_joined_and_each_test_set_stands_alone(tmp_path, capsys):
    entries = {}
    for language, splits in (('rus', ['train', 'test']), ('pol', ['train', 'dev', 'test'])):
        for split in splits:
            write_rows(tmp_path / language / f'{split}.jsonl')
        entries[language] = {'task': {**ENTRY, 'dataset': str(tmp_path / language), 'splits': splits}}
    sets, num_classes, names = languages.read_sets(entries, 'task', 'rus, pol', 'pol', 'normal')
    assert (
        'note: rus has no val split: the best weights are chosen by the rows of the others'
        in capsys.readouterr().out
    )
    assert names == [*map(str, ENTRY['classes'])]
    assert {name: len(parts) for name, parts in sets.items()} == {'train': 2, 'val': 1, 'pol': 1}
    assert num_classes == 2
    entries['pol']['task']['classes'] = 3
    with pytest.raises(UserError, match="same number of classes, but these are {'rus': 2, 'pol': 3}"):
        languages.read_sets(entries, 'task', 'rus,pol', '', 'normal')


def test_classes_are_joined_by_their_names_whatever_their_order(tmp_path):
    entries = {}
    for language, classes in {'eng': ['no', 'yes'], 'pol': ['YES', 'NO'], 'ukr': ['tak', 'ni']}.items():
        rows = '\n'.join(json.dumps({'a': name, 'b': 'x', 'label': name}) for name in classes)
        (tmp_path / language).mkdir()
        for split in ('train', 'test'):
            (tmp_path / language / f'{split}.jsonl').write_text(rows)
        entry = {
            **ENTRY,
            'dataset': str(tmp_path / language),
            'classes': classes,
            'splits': ['train', 'test'],
        }
        entries[language] = {'task': entry}
    sets, *_ = languages.read_sets(entries, 'task', 'eng,pol', 'pol', 'normal')
    for _, rows in (*sets['train'], *sets['pol']):
        assert {texts[0].lower(): number for texts, number in rows} == {'no': 0, 'yes': 1}
    with pytest.raises(UserError, match='other names in {.ukr.: .*; name them as no, yes, or say how many'):
        languages.read_sets(entries, 'task', 'eng', 'ukr', 'normal')


def test_the_hub_is_asked_for_what_is_no_folder(monkeypatch):
    def load_dataset(path, name, split, revision=None):
        if revision is None and path == 'some/script':
            raise RuntimeError('Dataset scripts are no longer supported, but found script.py')
        return ROWS

    info = type('Info', (), {'sha': 'abc', 'siblings': None})
    monkeypatch.setattr(datasets, 'load_dataset', load_dataset)  # which has a cache
    assert len(languages.read_split({**ENTRY, 'dataset': 'some/set'}, 'test')) == 6
    monkeypatch.setattr(huggingface_hub.HfApi, 'dataset_info', lambda api, name: info)
    assert len(languages.read_split({**ENTRY, 'dataset': 'some/script'}, 'test')) == 6

    def fail(*_, **__):
        raise ConnectionError('no network\nat all')

    monkeypatch.setattr(datasets, 'load_dataset', fail)
    with pytest.raises(UserError, match='some/set, which is no folder .* from the hub .no network.; correct'):
        languages.read_split({**ENTRY, 'dataset': 'some/set'}, 'test')


BAD_ROWS = {
    'test.tsv': ('a\tb\tlabel\nx\ty\n', 'row 1: it has 2 cells, not the 3 columns'),
    'test.jsonl': ('{"a": "x", "label": "neg"}', "row 1: there is no field 'b', only 'a', 'label'"),
    'test.json': ('[7]', 'record 1: a int .7. instead of a record'),
    'test.csv': ('a,b,label\nx,y,good\n', "row 1: the label 'good' is none of the 2 classes"),
    'other.csv': ('', "has no file for the split 'test'"),
    'test.parquet': ('', 'cannot be read to its end'),
}


@pytest.mark.parametrize('name', BAD_ROWS)
def test_bad_rows_are_refused_with_their_place(tmp_path, name):
    content, message = BAD_ROWS[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        languages.read_split({**ENTRY, 'dataset': str(tmp_path)}, 'test')


NO_TEXT = [None, float('nan'), 7, True, 1.5, datetime.date(2020, 1, 2), b'x', ['x']]


@pytest.mark.faults
@pytest.mark.parametrize('value', NO_TEXT, ids=str)
def test_what_is_no_text_is_never_read_as_one(tmp_path, value):
    table = pyarrow.table({'a': ['x', 'y'], 'b': [value, value], 'label': [0, 1]})
    pyarrow.parquet.write_table(table, tmp_path / 'test.parquet')
    with pytest.raises(UserError, match="row 1: the field 'b' holds .*, not text"):
        languages.read_split({**ENTRY, 'dataset': str(tmp_path)}, 'test')


LABELS = [  # classes, labels that are read, labels that are none
    (['neg', 'pos'], {'pos': 1, 0: 0, '1.0': 1, 1.0: 1}, [*NO_TEXT, 'nan', -1, 2, 'True', 10**400, '1_0']),
    (2, {'1': 1, True: 1, 'False': 0, 0.0: 0}, [None, float('nan'), 0.5, 'inf', datetime.date(2020, 1, 2)]),
    (['1', '2', '3'], {'2': 1, 3: 2, 1.0: 0, '2.0': 1}, [0, '0', None, float('nan')]),
    ([1, 2, 3], {'2': 1, 3: 2, 1.0: 0}, [0, True, 4]),
    (['None', 'nan'], {'None': 0, 'nan': 1}, [None, float('nan')]),
]


@pytest.mark.faults
@pytest.mark.parametrize('names, read, refused', LABELS, ids=str)
def test_a_label_is_a_class_by_name_or_number_and_nothing_else(names, read, refused):
    classes = languages.classes_of({'classes': names})
    assert {label: languages.class_of(label, classes, 'here') for label in read} == read
    for label in refused:
        with pytest.raises(UserError, match='here: the label .* is none of the [23] classes'):
            languages.class_of(label, classes, 'here')


def test_texts_that_are_too_long_are_cut_or_left_out():
    tokenizer = letter_tokenizer()
    labelled = [(('abc', 'de'), 1), (('a', 'b'), 0)]
    for filter_length, lengths in ((False, [5, 4]), (True, [4])):
        sets = {'test': [({'filter_length': filter_length}, labelled)]}
        examples, notes = languages.encode_sets(sets, tokenizer, tokenizer.endoftext_id, block_size=5)
        assert [len(row) for row in examples['test'].rows] == lengths
        assert notes == {'test': '1 too long for 5 tokens'}
    end = tokenizer.endoftext_id
    assert examples['test'].rows[0].tolist() == [end, 0, end, 1] and examples['test'].labels.tolist() == [0]


def test_a_long_text_leaves_room_for_the_one_behind_it():
    tokenizer = letter_tokenizer()
    for texts, kept in (
        (('a' * 30, 'bc'), 'aaaaabc'),
        (('ab', 'c' * 30), 'abccccc'),
        (('a' * 9, 'b' * 9), 'aaabbbb'),
    ):
        sets = {'test': [({}, [(texts, 0)])]}
        examples, _ = languages.encode_sets(sets, tokenizer, tokenizer.endoftext_id, block_size=9)
        assert tokenizer.decode(examples['test'].rows[0]) == kept


def test_the_shipped_database_is_complete():
    database = languages.load_database('config/languages.json')
    known = {'config', 'columns', 'task_type', 'filter_length', *languages.REQUIRED}
    for language, entries in database.items():
        for task in entries:
            entry = languages.find_entry(database, language, task)
            assert len({*languages.classes_of(entry).values()}) >= 2 and set(entry) <= known
    assert {'eng', 'spa', 'rus', 'pol'} == set(database)


def test_a_tokenizer_of_vocab_and_merges_is_read_with_its_space(tmp_path):
    bpe = tokenizers.ByteLevelBPETokenizer(add_prefix_space=True)
    bpe.train_from_iterator(['low lower lowest'] * 9, vocab_size=270)
    bpe.save_model(str(tmp_path), 'eng')
    loaded = languages.load_tokenizer(str(tmp_path / 'eng'))
    assert isinstance(loaded, Tokenizer) and loaded.encode('low') == bpe.encode('low').ids


def test_gpt2_is_a_tokenizer_by_name(monkeypatch):  # of a ckpt.pt of nanoGPT's
    monkeypatch.setattr(languages, 'build', lambda kind: f'the one of {kind}')
    assert languages.load_tokenizer('gpt2') == 'the one of gpt2'
