"""Labelled texts by language and task, out of a database of data sets: files here, or sets on the hub.

    {'pol': {'sentiment': {
        'dataset': 'allegro',                # a folder with a file per split (here or under data/), or a hub id
        'config': None,                      # the hub's name for a part of it, where it has parts
        'columns': None,                     # the names of the columns of files without a header line
        'train_features': ['text'],          # one or more text columns
        'eval_feature': 'label',             # the column of the label, or of the answers
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
import pyarrow.parquet
import tokenizers

from lm import data
from lm.classification import Examples
from lm.configurator import ROOT, UserError
from prepare.readers import decode, parse
from prepare.tokenizer import KINDS, build

REQUIRED = ('dataset', 'train_features', 'eval_feature', 'splits', 'classes')


class Labelled(NamedTuple):
    texts: list  # of tuples of texts, one per feature
    labels: np.ndarray  # (N,) int64, from 0


# ---------------------------------------------------------------------------- the database


def load_database(path):
    """The dict of a .json file, or LANGUAGES of a .py file; relative to here or to the repository."""
    found = next((base / path for base in (Path.cwd(), ROOT) if (base / path).is_file()), None)
    if found is None:
        raise UserError(f'There is no language database at {path}; correct --language_database.')
    try:
        database = (
            json.loads(found.read_text(encoding='utf-8'))
            if found.suffix == '.json'
            else runpy.run_path(str(found))['LANGUAGES']
        )
    except (OSError, ValueError, KeyError, SyntaxError, NameError, TypeError) as error:
        raise UserError(
            f'{path} is no language database ({type(error).__name__}: {error}); it has to be JSON, or '
            'Python that sets LANGUAGES.'
        ) from error
    if not isinstance(database, dict):
        raise UserError(f'{path} holds a {type(database).__name__}, not a dict of languages.')
    return database


def find_entry(database, language, task):
    """What the database says about `language`, or language:name, and `task`."""
    language, _, name = language.partition(':')
    if language not in database:
        raise UserError(f'The language {language!r} is not in the database; it has {", ".join(database)}.')
    if task not in database[language]:
        raise UserError(
            f'{language!r} has no task {task!r} in the database; it has {", ".join(database[language])}.'
        )
    entry = database[language][task]
    if 'dataset' not in entry:  # several, by their names
        if not name and len(entry) > 1:
            raise UserError(
                f'{language!r} has several data sets for {task!r}; choose one, as in '
                f'{language}:{next(iter(entry))} ({", ".join(entry)}).'
            )
        if name and name not in entry:
            raise UserError(f'{language!r} has no data set {name!r} for {task!r}; it has {", ".join(entry)}.')
        entry = entry[name or next(iter(entry))]
    missing = [key for key in REQUIRED if key not in entry]
    if missing:
        raise UserError(f'The entry of {language!r}, {task!r} lacks {", ".join(missing)}.')
    if len(entry['splits']) not in (2, 3):
        raise UserError(
            f'The entry of {language!r}, {task!r} has the splits {entry["splits"]}; name two, train and '
            'test, or three, train, val and test.'
        )
    return entry


def split_of(entry, part):
    """The entry's name of its 'train', 'val' or 'test' split; None if it has no val."""
    return dict(
        zip(('train', 'test') if len(entry['splits']) == 2 else ('train', 'val', 'test'), entry['splits'])
    ).get(part)


def num_classes_of(entry):
    return entry['classes'] if isinstance(entry['classes'], int) else len(entry['classes'])


# ---------------------------------------------------------------------------- rows


def read(entry, split, model_type='normal'):
    """The Labelled rows of a split. model_type='ipa' reads the column {feature}-phoneme for each feature."""
    phoneme = '-phoneme' if model_type == 'ipa' else ''
    features = [feature + phoneme for feature in entry['train_features']]
    gold = entry['eval_feature']
    texts, labels = [], []
    for number, row in enumerate(records(entry, split), 1):
        where = f'{entry["dataset"]}, {split}, row {number}'
        for name in (*features, gold):
            if row.get(name) is None:
                raise UserError(
                    f'{where}: there is no {name!r}, only {", ".join(map(repr, row))}; correct the '
                    "database's train_features, eval_feature or columns."
                )
        texts.append(tuple(str(row[feature]) for feature in features))
        labels.append(class_of(row[gold], entry['classes'], where))
    if not texts:
        raise UserError(f'{entry["dataset"]}, {split}: there are no rows.')
    return Labelled(texts, np.array(labels, np.int64))


def class_of(value, classes, where):
    """The class from 0: a number, or the name of one."""
    if isinstance(classes, (list, tuple)) and value in classes:
        return list(classes).index(value)
    count = classes if isinstance(classes, int) else len(classes)
    try:
        number = int(value) if float(value) == int(float(value)) else -1
    except (ValueError, TypeError):
        number = -1
    if not 0 <= number < count:
        raise UserError(
            f'{where}: the label {value!r} is none of the {count} classes ({classes}); correct the data, '
            "or the database's classes."
        )
    return number


def records(entry, split):
    """Dicts of a split: from a file of a local folder, or from the hub."""
    name = str(entry['dataset'])
    for folder in (Path(name).expanduser(), ROOT / name, ROOT / 'data' / name):
        if folder.is_dir():
            for ending, reader in READERS.items():
                if (folder / (split + ending)).is_file():
                    return reader(folder / (split + ending), entry.get('columns'))
            raise UserError(
                f'{folder} has no file for the split {split!r}; it should be one of '
                + ', '.join(split + ending for ending in READERS)
                + '.'
            )
    if name.startswith(('.', '/', '~')) or name.count('/') > 1:
        raise UserError(f'There is no folder {name}; correct the dataset in the database.')
    return from_hub(name, entry.get('config'), split)


def from_hub(name, config, split):
    import datasets  # takes a second to import

    try:
        return datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the hub, the network and the set's own files fail in many ways
        reason = (str(error).splitlines() or [''])[0]
        raise UserError(
            f'{name!r} is no folder here or under data/, and the hub did not give its split {split!r} '
            f'({type(error).__name__}: {reason}); put a file per split into data/{name}/, or correct the '
            'database.'
        ) from error


def read_table(path, columns):
    file = io.StringIO(decode(path.read_bytes(), path).lstrip('\ufeff'), newline=None)
    if path.suffix == '.tsv':  # quotation marks in it are text
        lines = [line.rstrip('\n').split('\t') for line in file if line.strip()]
    else:
        lines = [line for line in csv.reader(file) if line]
    names = columns or (lines.pop(0) if lines else [])
    for number, cells in enumerate(lines, 1):
        if len(cells) != len(names):
            raise UserError(
                f'{path}, row {number}: {len(cells)} columns where there should be {len(names)} '
                f'({", ".join(names)}); repair it, or correct columns in the database.'
            )
        yield dict(zip(names, cells))


def read_jsonl(path, columns):
    for number, line in enumerate(decode(path.read_bytes(), path).split('\n'), 1):
        if line.strip():
            yield a_record(parse(line, f'{path}, line {number}'), f'{path}, line {number}')


def read_json(path, columns):
    rows = parse(decode(path.read_bytes(), path), path)
    if not isinstance(rows, list):
        raise UserError(
            f'{path} holds a {type(rows).__name__}, not a list of records; write one record per line as .jsonl.'
        )
    return (a_record(row, f'{path}, record {number}') for number, row in enumerate(rows, 1))


def a_record(row, where):
    if not isinstance(row, dict):
        raise UserError(f'{where}: {str(row)[:30]} is no record; write {{"text": "...", "label": 0}}.')
    return row


def read_parquet(path, columns):
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise UserError(f'{path} is no readable parquet file ({str(error).splitlines()[0]}).') from error


READERS = {
    '.tsv': read_table,
    '.csv': read_table,
    '.jsonl': read_jsonl,
    '.json': read_json,
    '.parquet': read_parquet,
}


def read_sets(database, task, train_langs, eval_langs, model_type):
    """{'train', perhaps 'val', each language of eval_langs: [(entry, Labelled)]}, and the number of classes.

    The training languages' rows come together; validation rows are theirs too, so that no test chooses weights.
    """
    train, test = (
        {
            language: find_entry(database, language, task)
            for language in filter(None, map(str.strip, (langs or train_langs).split(',')))
        }
        for langs in (train_langs, eval_langs)
    )
    counts = {language: num_classes_of(entry) for language, entry in {**train, **test}.items()}
    if not train or len(set(counts.values())) > 1:
        raise UserError(
            f'The data sets of one run need the same number of classes, but these are {counts}; '
            'choose other languages.'
        )
    wanted = {
        'train': [(entry, 'train') for entry in train.values()],
        'val': [(entry, 'val') for entry in train.values() if split_of(entry, 'val')],
        **{language: [(entry, 'test')] for language, entry in test.items()},
    }
    return {
        name: [(entry, read(entry, split_of(entry, part), model_type)) for entry, part in parts]
        for name, parts in wanted.items()
        if parts
    }, counts.popitem()[1]


# ---------------------------------------------------------------------------- tokens


def encode_sets(sets, tokenizer, start_token, block_size):
    """{name: Examples} of `read_sets`, and {name: how many were too long, in words}.

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
        if not rows:
            raise UserError(
                f'All rows of {name} are longer than block_size={block_size}; choose a larger one.'
            )
        examples[name] = Examples(rows, np.array(labels, np.int64))
        notes[name] = f'{too_long} too long for {block_size} tokens' if too_long else ''
    return examples, notes


def make_tokenizer(tokenizer, sets, vocab_size):
    """The tokenizer of a model from scratch; char and bpe learn theirs from the training texts."""
    if tokenizer in KINDS:
        return build(
            tokenizer,
            (text for _, labelled in sets['train'] for texts in labelled.texts for text in texts),
            vocab_size,
        )
    return load_tokenizer(tokenizer)


def load_tokenizer(path):
    """A tokenizer.json or prepared folder; or `PREFIX` of PREFIX-vocab.json and PREFIX-merges.txt."""
    if Path(f'{path}-vocab.json').is_file() and Path(f'{path}-merges.txt').is_file():
        bpe = tokenizers.ByteLevelBPETokenizer(
            f'{path}-vocab.json', f'{path}-merges.txt', add_prefix_space=True
        )
        return data.Tokenizer(bpe.to_str(), path)
    return build('gpt2') if path == 'gpt2' else data.Tokenizer.load(path)
