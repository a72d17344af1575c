"""Records of .jsonl (.gz, .zst), .json and .parquet files, read one at a time.

A record that cannot be read is handed on as a UserError in its place, which names the file and the line, so that
the caller may skip it. A file that cannot be read to its end always raises.
"""

import io
import json
from contextlib import contextmanager
from functools import partial
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


def read_jsonl(path, compression=None):
    with open(path, 'rb', buffering=0) as raw:
        stream = pyarrow.input_stream(raw, compression=compression) if compression else raw
        before = 0
        for number, line in enumerate(io.BufferedReader(stream, 2**16), 1):
            if not line.isspace():
                yield line, f'line {number}', raw.tell() - before
                before = raw.tell()


def read_json(path):
    content = path.read_bytes()
    rows = parse_json(content, path)
    is_list = isinstance(rows, list)
    require(is_list, f'{path} holds {kind_of(rows)}, not a list of records; write one per line as .jsonl.')
    for number, row in enumerate(rows, 1):
        yield row, f'record {number}', len(content) / len(rows)


def read_parquet(path):
    with pyarrow.parquet.ParquetFile(path, buffer_size=2**20) as file:
        size = path.stat().st_size / max(file.metadata.num_rows, 1)
        rows = chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(batch_size=100))
        for number, row in enumerate(rows, 1):
            yield row, f'row {number}', size


READERS = {
    '.jsonl': read_jsonl,
    '.jsonl.gz': partial(read_jsonl, compression='gzip'),
    '.jsonl.zst': partial(read_jsonl, compression='zstd'),
    '.json': read_json,
    '.parquet': read_parquet,
}


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
        problem = f'{path} cannot be read to its end ({first_line(error)})'
        raise UserError(f'{problem}; fetch it again, or leave it out.') from error


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
        if not isinstance(record, dict):
            raise UserError(f'{where}: {kind_of(record)} instead of a record; write {{"field": "...", ...}}.')
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
