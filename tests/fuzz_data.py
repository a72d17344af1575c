"""Feed mutated data files to prepare/text.py, prepare/instruct.py and classify.py: each is read or refused.

$ python tests/fuzz_data.py            # 300 files, two minutes
$ python tests/fuzz_data.py 5000 7     # so many, by another seed
"""

import contextlib
import copy
import csv
import datetime
import decimal
import gzip
import io
import json
import random
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from helpers import run

from lm import languages
from lm.configurator import UserError, printable

TEXTS = [f'{number} birds sing in "Zürich", and {number + 1} sleep.\n' for number in range(12)]
MESSAGES = [{'role': 'user', 'content': 'Say it.'}, {'role': 'assistant', 'content': 'It.'}]
PAIRS = [{'from': 'human', 'value': 'Say it.'}, {'from': 'gpt', 'value': 'It.'}]
EXAMPLES = [
    {'instruction': 'Add.', 'input': '1 2', 'output': '3', 'system': 'Be kind.', 'history': [['a', 'b']]},
    {'prompt': 'Add.', 'completion': '3'},
    {'prompt': MESSAGES[:1], 'completion': MESSAGES[1:]},
    {'messages': MESSAGES, 'tools': [{'name': 'f'}]},
    {'conversations': PAIRS},
]
NASTY = [
    None,
    True,
    0,
    -1,
    1e400,
    float('nan'),
    10**400,
    '',
    ' ',
    '\ud800',
    '\x00',
    '\x1b[2J\x9b1m\r',
    '\ufeff',
    '\u2028',
]
NASTY += [
    [],
    {},
    [None],
    {'': None},
    [[1]],
    'x' * 140_000,
    '"',
    "'",
    '\t',
    '<|endoftext|>',
    '1_0',
    [MESSAGES] * 2,
]
COLUMNS = [  # that Python cannot hold, or that are no text
    pyarrow.array([2**60] * 4, pyarrow.timestamp('ms')),
    pyarrow.array([1] * 4, pyarrow.timestamp('ns', 'Mars/Phobos')),
    pyarrow.array([1] * 4, pyarrow.timestamp('ns')),
    pyarrow.array([2**31 - 1] * 4, pyarrow.date32()),
    pyarrow.array([2**62] * 4, pyarrow.duration('s')),
    pyarrow.array([decimal.Decimal('1.5')] * 4),
    pyarrow.array([datetime.date(2020, 1, 1)] * 4),
    pyarrow.array([b'\xff'] * 4),
    pyarrow.array([None] * 4),
    pyarrow.array([float('nan')] * 4),
    pyarrow.array([[1], [], None, [2]]),
    pyarrow.array(['a', 'b', 'a', 'b']).dictionary_encode(),
    pyarrow.array([[('a', 1)]] * 4, pyarrow.map_(pyarrow.string(), pyarrow.int8())),
    pyarrow.Array.from_buffers(
        pyarrow.string(),
        4,
        [None, pyarrow.py_buffer(np.arange(5, dtype=np.int32)), pyarrow.py_buffer(b'a\xffb\xc3')],
    ),
]
SUFFIXES = {
    'text': ['txt', 'jsonl', 'json', 'jsonl.gz', 'jsonl.zst', 'parquet'],
    'instruct': ['jsonl', 'json', 'jsonl.gz', 'jsonl.zst', 'parquet'],
    'classify': ['jsonl', 'json', 'jsonl.gz', 'jsonl.zst', 'parquet', 'csv', 'tsv'],
}


def records_for(target, draw):
    if target == 'instruct':
        return copy.deepcopy(EXAMPLES * 2)
    return [{'text': text, 'label': ('neg', 'pos')[number % 2]} for number, text in enumerate(TEXTS)]


def mutate_values(value, draw):
    """Replace a few values, keys or items within records by nasty ones."""
    if draw.random() < 0.1:
        return draw.choice(NASTY)
    if isinstance(value, dict):
        for key in [*value]:
            if draw.random() < 0.3:
                value[key] = mutate_values(value[key], draw)
            if draw.random() < 0.05:
                value[str(draw.choice(NASTY))[:40]] = value.pop(key)
    elif isinstance(value, list) and value:
        spot = draw.randrange(len(value))
        value[spot] = mutate_values(value[spot], draw)
    return value


def mutate_bytes(content, draw):
    """Damage a file as disks, editors and other programs do."""
    spot, other = (draw.randrange(len(content) + 1) for _ in range(2))
    return draw.choice(
        [
            lambda: content[:spot],
            lambda: content[spot:],
            lambda: content[:spot] + bytes([draw.randrange(256)]) + content[spot + 1 :],
            lambda: (
                content[:spot]
                + draw.choice([b'\xff', b'\0', b'"', b'\n', b'\r', b'\x1b[2J'])
                + content[spot:]
            ),
            lambda: content[: min(spot, other)] + content[max(spot, other) :],
            lambda: content[:spot] + content[other : other + 50] + content[spot:],
            lambda: content + content,
            lambda: b'\xef\xbb\xbf' + content,
            lambda: content.decode(errors='replace').encode('utf-16'),
            lambda: content.replace(b'\n', draw.choice([b'\r\n', b'\r', b'', b'\n\n'])),
            lambda: b'[' * 100_000 + content,
            lambda: content[:spot] + b'9' * 5000 + content[spot:],
            lambda: draw.randbytes(200),
            lambda: b'',
        ]
    )()


def parquet_of(records, draw):
    columns = {name: [record.get(name) for record in records] for record in records for name in record}
    names, arrays = [*columns], []
    for column in columns.values():
        try:
            arrays.append(pyarrow.array(column))
        except (pyarrow.ArrowException, OverflowError, UnicodeError):  # values of several types
            arrays.append(pyarrow.array([str(value).encode(errors='replace').decode() for value in column]))
    if draw.random() < 0.6:
        arrays = [array.slice(0, 4) for array in arrays]
        arrays[draw.randrange(len(arrays))] = draw.choice(COLUMNS)
    arrays = [array.slice(0, min(map(len, arrays))) for array in arrays]
    names = [name.encode(errors='replace').decode() for name in names]
    sink = io.BytesIO()
    table = pyarrow.Table.from_arrays(arrays, names)
    with contextlib.suppress(pyarrow.ArrowException):  # a type that parquet has not
        pyarrow.parquet.write_table(table, sink, store_schema=draw.random() < 0.5, row_group_size=3)
    return sink.getvalue()


def file_of(target, suffix, draw):
    """Return the content of a file, mutated in its values, its bytes, or both."""
    records, how = records_for(target, draw), draw.choice(['values', 'bytes', 'both'])
    if how != 'bytes':
        for record in records:
            for name in record:
                record[name] = mutate_values(record[name], draw) if draw.random() < 0.3 else record[name]
        records = [
            draw.choice(NASTY) if draw.random() < 0.05 and suffix[0] == 'j' else record for record in records
        ]
    damage = mutate_bytes if how != 'values' else lambda content, draw: content
    if suffix == 'parquet':
        return damage(parquet_of(records, draw), draw)
    if suffix == 'txt':
        return damage(''.join(TEXTS).encode(), draw)
    if suffix in ('csv', 'tsv'):
        file = io.StringIO()
        writer = csv.writer(file, delimiter=',' if suffix == 'csv' else '\t')
        writer.writerows([records[0].keys(), *(record.values() for record in records)])
        return damage(file.getvalue().encode(errors='surrogatepass'), draw)
    if suffix == 'json' and draw.random() < 0.7:
        return damage(json.dumps(records, indent=draw.choice([None, 1])).encode(), draw)
    content = '\n'.join(map(json.dumps, records)).encode()
    inside = draw.random() < 0.5
    content = damage(content, draw) if inside or suffix in ('json', 'jsonl') else content
    if suffix.endswith('gz'):
        content = gzip.compress(content)
    if suffix.endswith('zst'):
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, 'zstd') as file:
            file.write(content)
        content = sink.getvalue().to_pybytes()
    return content if inside or suffix in ('json', 'jsonl') else damage(content, draw)


def read(target, path, number, draw):
    """Do with a file what a user would."""
    out, skip = path.parent / 'out', draw.choice(['stop', 'skip', 'skip'])
    words = [
        f'--output_dir={out}',
        '--tokenizer=bytes',
        '--val_fraction=0.5',
        '--num_workers=1',
        f'--on_error={skip}',
    ]
    if target == 'text':
        return run('prepare/text.py', f'--input={path}', *words)
    if target == 'instruct':
        field = ['--field=instruction'] * (draw.random() < 0.2)
        return run('prepare/instruct.py', f'--source={path}', '--max_seq_len=32', *field, *words)
    entry = {'dataset': str(path.parent), 'train_features': ['text'], 'eval_feature': 'label'}
    entry |= {'splits': ['train', 'train'], 'classes': ['neg', 'pos']}
    database = {'eng': {'sentiment': entry}}
    if number % 20:
        sets, *_ = languages.read_sets(database, 'sentiment', 'eng', '', 'normal')
        tokenizer = languages.make_tokenizer('bytes', sets, 0)
        return languages.encode_sets(sets, tokenizer, tokenizer.endoftext_id, 64)
    (path.parent / 'db.json').write_text(json.dumps(database))
    words = f'--task=sentiment --language_database={path.parent}/db.json --tokenizer=bytes --block_size=64 --no_wandb'
    shape = '--n_layer=1 --n_head=1 --n_embd=8 --max_steps=1 --device=cpu'
    return run('classify.py', *words.split(), *shape.split(), f'--out_dir={out}')


def outcome_of(target, path, number, draw):
    """Return how it ended, and what was said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            read(target, path, number, draw)
            outcome = 'read'
        except UserError as error:
            outcome = 'refused'
            sys.excepthook(UserError, error, None)
            said.write('' if len(str(error)) < 2000 else '\x1b the sentence is too long')
        except BaseException:  # whatever it is, it is a fault
            outcome = 'traceback'
            traceback.print_exc(file=said)
    text = said.getvalue()
    return 'escape sequence' if outcome != 'traceback' and printable(text) != text else outcome, text


def main(count=300, seed=0):
    counts = {}
    signal.signal(signal.SIGALRM, lambda *_: sys.exit('it hangs'))
    for number in range(count):
        draw = random.Random(f'{seed}/{number}')
        target = ('text', 'instruct', 'classify')[number % 3]
        suffix = draw.choice(SUFFIXES[target])
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f'train.{suffix}'
            path.write_bytes(file_of(target, suffix, draw))
            signal.alarm(60)
            outcome, text = outcome_of(target, path, number, draw)
            signal.alarm(0)
        counts[target, outcome] = counts.get((target, outcome), 0) + 1
        if outcome not in ('read', 'refused'):
            print(f'--- {seed}/{number}: {target}, {suffix}: {outcome}', printable(text[-3000:]), sep='\n')
    for (target, outcome), times in sorted(counts.items()):
        print(f'{target:10} {outcome:16} {times}')
    faults = sum(times for (_, outcome), times in counts.items() if outcome not in ('read', 'refused'))
    print(f'{count} files, {faults} faults')
    return min(faults, 1)


if __name__ == '__main__':
    sys.exit(main(*map(int, sys.argv[1:])))
