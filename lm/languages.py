"""Labelled texts by language and task, out of a database of data sets: files here, or sets on the hub.

config/languages.json is one; docs/guide.md says under Classification what an entry of it holds.
"""

import json
import re
import reprlib
import runpy
from itertools import islice
from pathlib import Path

import numpy as np
import tokenizers

from lm.classification import Examples
from lm.configurator import ROOT, UserError, find, note, require
from lm.files import as_sentence
from lm.records import READERS, TABLES, on_the_hub, read_records, refusals_named, text_of, value_of
from lm.tokenizer import KINDS, Tokenizer, build

REQUIRED = ('dataset', 'train_features', 'eval_feature', 'splits', 'classes')
SUFFIXES = (*TABLES, *READERS)


def load_database(path):
    """Return the dict of a .json file, or LANGUAGES of a .py file; relative to here or to the repository."""
    found = find('language database', path)
    with as_sentence(f'{path} is no language database', 'write a dict as JSON, or as LANGUAGES in Python'):
        if found.suffix == '.json':
            return dict(json.loads(found.read_bytes()))
        return dict(runpy.run_path(str(found))['LANGUAGES'])


def find_entry(database, language, task):
    """Return the entry of `language`, or language:name, and `task`."""
    language, _, name = language.partition(':')
    require(language in database, f'{language!r} is not in the database; it has {", ".join(database)}.')
    tasks = database[language]
    require(task in tasks, f'The database has no task {task!r} of {language!r}, only {", ".join(tasks)}.')

    entry, where = tasks[task], f'{language!r}, {task!r} of the database'
    if 'dataset' not in entry:  # several, by their names
        names = ', '.join(f'{language}:{each}' for each in entry)
        require(name in entry, f'{where} has data sets by name; choose one of {names}.')
        entry = entry[name]
    else:
        require(not name, f'{where} has one data set, none named {name!r}; leave :{name} out.')
    for key in REQUIRED:
        require(key in entry, f'{where} lacks {key}.')
    require(len(entry['splits']) in (2, 3), f'{where}: splits has to name train, perhaps val, and test.')
    return entry


def read_split(entry, split, model_type='normal'):
    """Return [(texts, one per feature, class from 0)] of a split; 'ipa' reads the column {feature}-phoneme for each."""
    phoneme = '-phoneme' if model_type == 'ipa' else ''
    features, label = [feature + phoneme for feature in entry['train_features']], entry['eval_feature']
    classes, rows = classes_of(entry), []
    for number, row in enumerate(rows_of(entry, split), 1):
        if isinstance(row, UserError):
            raise row
        where = f'{entry["dataset"]}, {split}, row {number}'
        texts = tuple(text_of(feature, row, where) for feature in features)
        rows.append((texts, class_of(value_of(label, row, where), classes, where)))
    require(rows, f'{entry["dataset"]}, {split}: there are no rows.')
    return rows


def classes_of(entry):
    """Return {label as a text: class from 0}: names, and numbers unless names are numbers, as of stars from 1 to 5."""
    if isinstance(entry['classes'], int):
        count, named = entry['classes'], ['False', 'True'] * (entry['classes'] == 2)
    else:
        count, named = len(entry['classes']), [*map(str, entry['classes'])]
    numbers = [] if any(map(str.isdecimal, named)) else map(str, range(count))
    return {label: number for labels in (numbers, named) for number, label in enumerate(labels)}


def class_of(value, classes, where):
    """Return the class of a label by `classes_of`; tables may write a number as 1.0."""
    if isinstance(value, (str, int, float)) and value == value:  # no null, no nan, no date
        number = re.sub(r'^\s*0{0,9}([0-9]{1,9})(\.0{0,9})?\s*$', r'\1', str(value))
        for label in filter(classes.__contains__, (str(value), number)):
            return classes[label]
    problem = f'{where}: the label {reprlib.repr(value)} is none of the {len({*classes.values()})} classes'
    raise UserError(f'{problem} ({", ".join(islice(classes, 20))}); correct the data or the database.')


def rows_of(entry, split):
    """Return the rows of a split as dicts (or UserErrors): from a file of a local folder, or from the hub."""
    name = str(entry['dataset'])
    folder = next(filter(Path.is_dir, (Path(name).expanduser(), ROOT / name, ROOT / 'data' / name)), None)
    if not folder:
        import datasets  # takes a second to import

        with refusals_named(f'{name}, which is no folder here or under data/,'):
            try:  # its cache needs no network
                return datasets.load_dataset(name, entry.get('config'), split=split)
            except (RuntimeError, ValueError) as error:
                if 'script' not in str(error):
                    raise
                return datasets.load_dataset(**on_the_hub(name, entry.get('config')), split=split)
    path = next(filter(Path.is_file, (folder / (split + suffix) for suffix in SUFFIXES)), None)
    require(path, f'{folder} has no file for the split {split!r}, such as {", ".join(SUFFIXES)}.')
    rows = read_records(path, lambda record, where: record, entry.get('columns'))
    return (row for row, _ in rows)


def names_of(entry):
    """Return the names of the classes in lower case, in their order; [] where there is just a number of them."""
    return [] if isinstance(entry['classes'], int) else [str(name).casefold() for name in entry['classes']]


def read_sets(database, task, train_langs, eval_langs, model_type):
    """Return {'train', perhaps 'val', each language of eval_langs: [(entry, rows)]}, the number of classes, and
    their names, in the order of the first set that names them. The val rows are of the training languages: a test set
    never selects a checkpoint."""

    def entries_of(languages):
        names = filter(None, map(str.strip, languages.split(',')))
        return {name: find_entry(database, name, task) for name in names}

    train, test = entries_of(train_langs), entries_of(eval_langs or train_langs)
    counts = {language: len({*classes_of(entry).values()}) for language, entry in {**train, **test}.items()}
    problem = f'The data sets of a run need the same number of classes, but these are {counts}'
    require(train and test and len(set(counts.values())) == 1, f'{problem}; choose other languages.')
    names = {language: names_of(entry) for language, entry in {**train, **test}.items()}
    order = next(filter(None, names.values()), [])
    others = {language: own for language, own in names.items() if own and {*own} != {*order}}
    remedy = f'name them as {", ".join(order)}, or say how many there are'
    require(not others, f'The classes have other names in {others}; {remedy}.')

    without = [language for language, entry in train.items() if len(entry['splits']) == 2]
    if 0 < len(without) < len(train):
        note(f'{", ".join(without)} has no val split: the best weights are chosen by the rows of the others.')
    splits = [('train', entry, entry['splits'][0]) for entry in train.values()]
    splits += [('val', entry, split) for entry in train.values() for split in entry['splits'][1:-1]]
    splits += [(language, entry, entry['splits'][-1]) for language, entry in test.items()]
    sets = {name: [] for name, _, _ in splits}
    for name, entry, split in splits:
        rows, own = read_split(entry, split, model_type), names_of(entry)
        rows = [(texts, order.index(own[number]) if own else number) for texts, number in rows]
        sets[name].append((entry, rows))
    return sets, counts.popitem()[1], order


def encode_sets(sets, tokenizer, start_token, block_size):
    """Return {name: Examples} of `read_sets`: rows of the start token and the features with <|endoftext|>
    between them; and {name: how many were too long, in words}: the longest of their texts lose their ends, or they are
    left out as filter_length says."""
    examples, notes = {}, {}
    for name, parts in sets.items():
        rows, labels, too_long = [], [], 0
        for entry, labelled in parts:
            texts, classes = zip(*labelled)
            features = [tokenizer.encode_batch(column) for column in zip(*texts)]
            for label, parts in zip(classes, zip(*features)):
                is_long = len(parts) + sum(map(len, parts)) > block_size  # with what stands before each
                too_long += is_long
                if not (is_long and entry.get('filter_length')):
                    first, *others = cut_longest(parts, block_size - len(parts))
                    row = sum(([tokenizer.endoftext_id, *ids] for ids in others), [start_token, *first])
                    rows.append(np.array(row[:block_size]))
                    labels.append(label)
        require(rows, f'All rows of {name} are longer than block_size={block_size}; choose a larger one.')
        examples[name] = Examples(rows, np.array(labels, np.int64))
        notes[name] = f'{too_long} too long for {block_size} tokens' if too_long else ''
    return examples, notes


def cut_longest(parts, room):
    """Cut texts, lists of token ids, to `room` tokens in all, the longest first: each keeps what it can."""
    sizes = [*map(len, parts)]
    while sum(sizes) > max(0, room):
        sizes[sizes.index(max(sizes))] -= 1
    return [part[:size] for part, size in zip(parts, sizes)]


def make_tokenizer(tokenizer, sets, vocab_size):
    """Return the tokenizer of a model from scratch; char and bpe learn theirs from the training texts."""
    texts = (text for _, rows in sets['train'] for features, _ in rows for text in features)
    return build(tokenizer, texts, vocab_size) if tokenizer in KINDS else load_tokenizer(tokenizer)


def load_tokenizer(path):
    """Load a tokenizer.json or prepared folder; gpt2; or `PREFIX` of PREFIX-vocab.json, PREFIX-merges.txt."""
    pair = f'{path}-vocab.json', f'{path}-merges.txt'
    if all(Path(name).is_file() for name in pair):
        return Tokenizer(tokenizers.ByteLevelBPETokenizer(*pair, add_prefix_space=True).to_str(), path)
    return build('gpt2') if path == 'gpt2' else Tokenizer.load(path)
