"""Labelled texts by language and task, out of a database of data sets: files here, or sets on the hub.

    {'pol': {'sentiment': {
        'dataset': 'allegro',                # a folder with a file per split (here or under data/), or a hub id
        'config': None,                      # the hub's name for a part of it, where it has parts
        'columns': None,                     # the names of the columns of files without a header line
        'train_features': ['text'],          # one or more text columns
        'eval_feature': 'label',             # the column of the label
        'splits': ['train', 'val', 'test'],  # or ['train', 'test']
        'task_type': 'classification',
        'classes': ['negative', 'positive'],  # names, where the labels are names; or just how many
        'filter_length': False}}}            # True: rows that are too long are left out instead of cut

A task may also hold several such entries by name, {'sentiment': {'allegro': {...}, 'reviews': {...}}}: then
pol:allegro chooses one.
"""

import csv
import io
import json
import runpy
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers

from lm.classification import Examples
from lm.configurator import ROOT, UserError, require
from lm.records import READERS, decode, first_line, kind_of, read_records
from lm.tokenizer import KINDS, Tokenizer, build

REQUIRED = ('dataset', 'train_features', 'eval_feature', 'splits', 'classes')
SUFFIXES = ('.tsv', '.csv', *READERS)


class Labelled(NamedTuple):
    texts: list  # of tuples of texts, one per feature
    labels: np.ndarray  # (N,) int64, from 0


# ---------------------------------------------------------------------------- the database


def load_database(path):
    """Return the dict of a .json file, or LANGUAGES of a .py file; relative to here or to the repository."""
    found = next((base / path for base in (Path.cwd(), ROOT) if (base / path).is_file()), None)
    require(found, f'There is no language database at {path}; correct --language_database.')
    try:
        if found.suffix == '.json':
            return dict(json.loads(found.read_text(encoding='utf-8')))
        return dict(runpy.run_path(str(found))['LANGUAGES'])
    except (OSError, ValueError, KeyError, SyntaxError, NameError, TypeError) as error:
        problem = f'{path} is no language database ({type(error).__name__}: {error})'
        raise UserError(f'{problem}; write a dict as JSON, or as LANGUAGES in Python.') from error


def find_entry(database, language, task):
    """Return the entry of `language`, or language:name, and `task`."""
    language, _, name = language.partition(':')
    known = ', '.join(database)
    require(language in database, f'The language {language!r} is not in the database; it has {known}.')
    known = ', '.join(database[language])
    require(task in database[language], f'{language!r} has no task {task!r} in the database; it has {known}.')

    entry, where = database[language][task], f'{language!r}, {task!r} of the database'
    if 'dataset' not in entry:  # several, by their names
        name = name or (next(iter(entry)) if len(entry) == 1 else None)
        names = ', '.join(f'{language}:{each}' for each in entry)
        require(name in entry, f'{where} has several data sets; choose one of {names}.')
        entry = entry[name]
    missing = ', '.join(key for key in REQUIRED if key not in entry)
    require(not missing, f'{where} lacks {missing}.')
    require(
        len(entry['splits']) in (2, 3), f'{where} has not 2 or 3 splits: name train, perhaps val, and test.'
    )
    return entry


def split_of(entry, part):
    """Return the entry's name of its 'train', 'val' or 'test' split; None if it has no val."""
    first, *val, last = entry['splits']
    return {'train': first, 'val': val[0] if val else None, 'test': last}[part]


def num_classes_of(entry):
    return entry['classes'] if isinstance(entry['classes'], int) else len(entry['classes'])


# ---------------------------------------------------------------------------- rows


def read_split(entry, split, model_type='normal'):
    """Return the Labelled rows of a split. model_type='ipa' reads the column {feature}-phoneme for each feature."""
    phoneme = '-phoneme' if model_type == 'ipa' else ''
    features, label = [feature + phoneme for feature in entry['train_features']], entry['eval_feature']
    texts, labels = [], []
    for number, row in enumerate(rows_of(entry, split), 1):
        where = f'{entry["dataset"]}, {split}, row {number}'
        missing = [name for name in (*features, label) if row.get(name) is None]
        if missing:
            known = ', '.join(map(repr, row))
            raise UserError(f'{where}: there is no {missing[0]!r}, only {known}; correct the database.')
        texts.append(tuple(str(row[feature]) for feature in features))
        labels.append(class_of(row[label], entry, where))
    require(texts, f'{entry["dataset"]}, {split}: there are no rows.')
    return Labelled(texts, np.array(labels, np.int64))


def class_of(value, entry, where):
    """Return the class from 0 of a label: a number, or the name of a class."""
    names = [] if isinstance(entry['classes'], int) else list(entry['classes'])
    if value in names:
        return names.index(value)
    try:
        number = float(value)
    except (ValueError, TypeError):
        number = -1
    count = num_classes_of(entry)
    if number not in range(count):
        problem = f'{where}: the label {value!r} is none of the {count} classes ({entry["classes"]})'
        raise UserError(f'{problem}; correct the data or the database.')
    return int(number)


def rows_of(entry, split):
    """Return the rows of a split as dicts: from a file of a local folder, or from the hub."""
    name = str(entry['dataset'])
    for folder in (Path(name).expanduser(), ROOT / name, ROOT / 'data' / name):
        if folder.is_dir():
            paths = [folder / (split + suffix) for suffix in SUFFIXES]
            path = next((path for path in paths if path.is_file()), None)
            require(path, f'{folder} has no file for the split {split!r}, such as {", ".join(SUFFIXES)}.')
            is_table = path.suffix in ('.tsv', '.csv')
            return rows_of_table(path, entry.get('columns')) if is_table else rows_of_records(path)
    is_path = name.startswith(('.', '/', '~')) or name.count('/') > 1
    require(not is_path, f'There is no folder {name}; correct the dataset in the database.')
    return rows_of_hub(name, entry.get('config'), split)


def rows_of_table(path, columns):
    file = io.StringIO(decode(path.read_bytes(), path).lstrip('\ufeff'), newline=None)
    if path.suffix == '.tsv':  # quotation marks in it are text
        lines = [line.rstrip('\n').split('\t') for line in file if line.strip()]
    else:
        lines = [line for line in csv.reader(file) if line]
    names = columns or (lines.pop(0) if lines else [])
    for number, cells in enumerate(lines, 1):
        if len(cells) != len(names):
            problem = f'{path}, row {number}: {len(cells)} columns where there should be {len(names)}'
            raise UserError(f'{problem} ({", ".join(names)}); repair it, or correct columns in the database.')
        yield dict(zip(names, cells))


def rows_of_records(path):
    for row, _ in read_records(path, as_row):
        if isinstance(row, UserError):
            raise row
        yield row


def as_row(record, where):
    if not isinstance(record, dict):
        raise UserError(f'{where}: {kind_of(record)} is no record; write {{"text": "...", "label": 0}}.')
    return record


def rows_of_hub(name, config, split):
    import datasets  # takes a second to import

    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the hub, the network and the set's own files fail in many ways
        problem = f'the hub did not give its split {split!r} ({type(error).__name__}: {first_line(error)})'
        raise UserError(
            f'{name!r} is no folder here or under data/, and {problem}; put a file per split into data/{name}/, or '
            'correct the database.'
        ) from error


def read_sets(database, task, train_langs, eval_langs, model_type):
    """Return {'train', perhaps 'val', each language of eval_langs: [(entry, Labelled)]}, and the number of classes.

    The rows of all training languages are joined; validation rows are theirs too: the test set never selects a
    checkpoint.
    """

    def entries_of(languages):
        names = filter(None, map(str.strip, languages.split(',')))
        return {name: find_entry(database, name, task) for name in names}

    train, test = entries_of(train_langs), entries_of(eval_langs or train_langs)
    counts = {language: num_classes_of(entry) for language, entry in {**train, **test}.items()}
    require(
        train and len(set(counts.values())) == 1,
        f'The data sets of a run need the same number of classes, but these are {counts}; choose other languages.',
    )

    def read(entries, part):
        return [(entry, read_split(entry, split_of(entry, part), model_type)) for entry in entries]

    sets = {'train': read(train.values(), 'train')}
    if with_val := [entry for entry in train.values() if split_of(entry, 'val')]:
        sets['val'] = read(with_val, 'val')
    sets.update((language, read([entry], 'test')) for language, entry in test.items())
    return sets, counts.popitem()[1]


# ---------------------------------------------------------------------------- tokens


def encode_sets(sets, tokenizer, start_token, block_size):
    """Return {name: Examples} of `read_sets`, and {name: how many were too long, in words}.

    A row is the start token and its features with <|endoftext|> between them. One that is too long loses its
    end, or is left out where the database says filter_length.
    """
    examples, notes = {}, {}
    for name, parts in sets.items():
        rows, labels, too_long = [], [], 0
        for entry, labelled in parts:
            features = [tokenizer.encode_batch(list(texts)) for texts in zip(*labelled.texts)]
            for label, ids in zip(labelled.labels, zip(*features)):
                row = [start_token, *ids[0]]
                for more in ids[1:]:
                    row += [tokenizer.endoftext_id, *more]
                too_long += len(row) > block_size
                if len(row) <= block_size or not entry.get('filter_length'):
                    rows.append(np.array(row[:block_size]))
                    labels.append(label)
        require(rows, f'All rows of {name} are longer than block_size={block_size}; choose a larger one.')
        examples[name] = Examples(rows, np.array(labels, np.int64))
        notes[name] = f'{too_long} too long for {block_size} tokens' if too_long else ''
    return examples, notes


def make_tokenizer(tokenizer, sets, vocab_size):
    """Return the tokenizer of a model from scratch; char and bpe learn theirs from the training texts."""
    if tokenizer not in KINDS:
        return load_tokenizer(tokenizer)
    texts = (text for _, labelled in sets['train'] for texts in labelled.texts for text in texts)
    return build(tokenizer, texts, vocab_size)


def load_tokenizer(path):
    """Load a tokenizer.json or prepared folder; or `PREFIX` of PREFIX-vocab.json and PREFIX-merges.txt."""
    pair = f'{path}-vocab.json', f'{path}-merges.txt'
    if all(Path(name).is_file() for name in pair):
        return Tokenizer(tokenizers.ByteLevelBPETokenizer(*pair, add_prefix_space=True).to_str(), path)
    return build('gpt2') if path == 'gpt2' else Tokenizer.load(path)
