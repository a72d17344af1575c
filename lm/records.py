"""Records of .jsonl (.gz, .zst), .json and .parquet files, read one at a time.

A record that cannot be read is handed on as a UserError in its place, which names the file and the line, so that
the caller may skip it. A file that cannot be read to its end always raises.
"""

import io
import json
from contextlib import contextmanager
from pathlib import Path

import pyarrow
import pyarrow.parquet

from lm.configurator import UserError, require


def read_records(path, make):
    """Yield (make(record, where) or a UserError, bytes of the file that it took) for each record, a JSON value.

    A .json, which holds a list, is parsed at once; all others stream.
    """
    return READERS[suffix_of(path)](path, make)


def read_jsonl(path, make):
    before = 0
    with open(path, 'rb') as raw, damage_named(path):
        for number, line in enumerate(decompressed(path, raw), 1):
            if not line.isspace():
                where, now = f'{path}, line {number}', raw.tell()
                yield attempt(from_json, make, line, where), now - before
                before = now


def read_json(path, make):
    content = path.read_bytes()
    rows = parse_json(content, path)
    is_list = isinstance(rows, list)
    require(is_list, f'{path} holds {kind_of(rows)}, not a list of records; write one per line as .jsonl.')
    for number, row in enumerate(rows, 1):
        yield attempt(make, row, f'{path}, record {number}'), len(content) / len(rows)


def read_parquet(path, make):
    with damage_named(path), pyarrow.parquet.ParquetFile(path, buffer_size=2**20) as file:
        size = path.stat().st_size / max(file.metadata.num_rows, 1)
        rows = (row for batch in file.iter_batches(batch_size=100) for row in batch.to_pylist())
        for number, row in enumerate(rows, 1):
            yield attempt(make, row, f'{path}, row {number}'), size


READERS = {
    '.jsonl': read_jsonl,
    '.jsonl.gz': read_jsonl,
    '.jsonl.zst': read_jsonl,
    '.json': read_json,
    '.parquet': read_parquet,
}
COMPRESSION = {'.gz': 'gzip', '.zst': 'zstd'}


def suffix_of(path):
    """Return the suffix by which a file is read, in lower case: '.jsonl', '.jsonl.gz'."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() + suffix if suffix in COMPRESSION else suffix


def decompressed(path, raw):
    compression = COMPRESSION.get(path.suffix.lower())
    if not compression:
        return raw
    return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), compression), 2**16)


@contextmanager
def damage_named(path):
    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        problem = f'{path} cannot be read to its end ({first_line(error)})'
        raise UserError(f'{problem}; fetch it again, or leave it out.') from error


# ---------------------------------------------------------------------------- what can be wrong with a record


def attempt(function, *given):
    """Return the result, or the UserError in its place."""
    try:
        return function(*given)
    except UserError as error:
        return error


def from_json(make, line, where):
    return make(parse_json(line, where), where)


def parse_json(content, where):
    text = decode(content, where)
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        what, start = (error.msg, error.pos) if isinstance(error, ValueError) else ('nested too deeply', 0)
        problem = f'{where}: not valid JSON ({what}) at {text[start : start + 30]!r}'
        raise UserError(f'{problem}; repair it, or leave it out.') from error


def decode(content, where):
    try:
        return content.decode('utf-8')
    except UnicodeDecodeError as error:
        problem = f'{where}: byte {error.start} (0x{content[error.start]:02x}) is not valid UTF-8'
        raise UserError(f'{problem}; convert the file to UTF-8, for example with iconv.') from error


def kind_of(value):
    return 'null' if value is None else f'a {type(value).__name__} ({str(value)[:30]})'


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]
