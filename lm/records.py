"""Records of .jsonl (.gz, .zst), .json and .parquet files, read one at a time.

A record that cannot be read is handed on as a UserError in its place, which names the file and the line, so that the
caller may skip it.
"""

import io
import json
from contextlib import contextmanager
from itertools import chain

import pyarrow
import pyarrow.parquet

from lm.configurator import UserError, require


def read_records(path, make):
    """Yield (make(record, where) or a UserError, bytes of the file that it took) for each record, a dict.

    A .json, which holds a list, is parsed at once; all others stream.
    """
    with damage_named(path):
        for row, where, size in READERS[suffix_of(path)](path):
            yield attempt(make, row, f'{path}, {where}'), size


def read_jsonl(path):
    compression = {'.gz': 'gzip', '.zst': 'zstd'}.get(path.suffix.lower())
    with open(path, 'rb', buffering=0) as raw:
        stream, before = pyarrow.input_stream(raw, compression=compression) if compression else raw, 0
        for number, line in enumerate(io.BufferedReader(stream, 2**16), 1):
            if not line.isspace():
                yield line, f'line {number}', raw.tell() - before
                before = raw.tell()


def read_json(path):
    content = path.read_bytes()
    rows = parse_json(content, path)
    problem = f'{path} holds {kind_of(rows)}, not a list of records'
    require(isinstance(rows, list), f'{problem}; write one per line as .jsonl.')
    for number, row in enumerate(rows, 1):
        yield row, f'record {number}', len(content) / len(rows)


def read_parquet(path):
    with pyarrow.parquet.ParquetFile(path, buffer_size=2**20) as file:
        size = path.stat().st_size / max(file.metadata.num_rows, 1)
        rows = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(batch_size=100))
        for number, row in enumerate(rows, 1):
            yield row, f'row {number}', size


READERS = dict.fromkeys(['.jsonl', '.jsonl.gz', '.jsonl.zst'], read_jsonl)
READERS |= {'.json': read_json, '.parquet': read_parquet}


def suffix_of(path):
    """Return the suffix by which a file is read, in lower case: '.jsonl', '.jsonl.gz'."""
    name = path.name.lower()
    return next((suffix for suffix in READERS if name.endswith(suffix)), path.suffix.lower())


@contextmanager
def damage_named(path):
    """Turn the errors of a file that is damaged into UserErrors."""
    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path} cannot be read to its end ({first_line(error)}); fetch it again.') from error


@contextmanager
def refusals_named(path):
    """Turn the errors of the hub into UserErrors."""
    try:
        yield
    except Exception as error:  # of many kinds, from four libraries
        problem = f'The data set {path} could not be read from the hub ({first_line(error)})'
        raise UserError(f'{problem}; correct the name, try again, or give files of your own.') from error


def attempt(make, row, where):
    """Return make(record, where) of a line of JSON or a parsed record, or the UserError in its place."""
    try:
        record = parse_json(row, where) if isinstance(row, bytes) else row
        problem = f'{where}: {kind_of(record)} instead of a record'
        require(isinstance(record, dict), f'{problem}; write {{"field": "...", ...}}.')
        return make(record, where)
    except UserError as error:
        return error


def parse_json(content, where):
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or nested too deeply
        raise UserError(f'{where}: not valid JSON ({error}); repair it, or leave it out.') from error


def kind_of(value):
    return 'null' if value is None else f'a {type(value).__name__} ({str(value)[:30]})'


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]
