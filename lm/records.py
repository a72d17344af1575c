"""Records of .jsonl (.gz, .zst), .json and .parquet files, read one at a time.

What is wrong with a single record is handed on in its place, as a UserError that names the file and the line:
whether it stops the caller is for the caller to say. A file that cannot be read to its end always raises.
"""

import gzip
import io
import json
import zlib
from contextlib import contextmanager
from pathlib import Path

import pyarrow
import pyarrow.parquet

from lm.configurator import UserError, require


def read_records(path, columns=None):
    """Yield (where it stands, its JSON value or a UserError, bytes of the file it took) for each record.

    `columns`: those of a parquet file to read, where it has them; None: all. A .json, which holds a list, is
    parsed at once; all others stream.
    """
    return READERS[suffix_of(path)](path, columns)


def read_jsonl(path, columns):
    before = 0
    with open(path, 'rb') as raw, damage_named(path), decompressed(path, raw) as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                where, now = f'{path}, line {number}', raw.tell()
                yield where, attempt(parse_json, line, where), now - before
                before = now


def read_json(path, columns):
    content = path.read_bytes()
    rows = parse_json(content, path)
    require(
        isinstance(rows, list),
        f'{path} holds {kind_of(rows)}, not a list of records; make it one, or write one record per line and '
        'name the file .jsonl.',
    )
    for number, row in enumerate(rows, 1):
        yield f'{path}, record {number}', row, len(content) / len(rows)


def read_parquet(path, columns):
    number = 0
    with damage_named(path), pyarrow.parquet.ParquetFile(path, buffer_size=2**20) as file:
        has_all = set(columns or ()) <= set(file.schema_arrow.names)
        size = path.stat().st_size / max(file.metadata.num_rows, 1)
        for batch in file.iter_batches(batch_size=100, columns=columns if has_all else None):
            for row in batch.to_pylist():
                number += 1
                yield f'{path}, row {number}', row, size


READERS = {
    '.jsonl': read_jsonl,
    '.jsonl.gz': read_jsonl,
    '.jsonl.zst': read_jsonl,
    '.json': read_json,
    '.parquet': read_parquet,
}


def suffix_of(path):
    """Return the suffix by which a file is read, in lower case: '.jsonl', '.jsonl.gz'."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() + suffix if suffix in ('.gz', '.zst') else suffix


def decompressed(path, raw):
    if path.suffix.lower() == '.gz':
        return gzip.GzipFile(fileobj=raw)
    if path.suffix.lower() == '.zst':
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), 'zstd'), 2**16)
    return raw


@contextmanager
def damage_named(path):
    try:
        yield
    except (pyarrow.ArrowException, OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(
            f'{path} cannot be read to its end ({first_line(error)}); fetch it again, or leave it out.'
        ) from error


# ---------------------------------------------------------------------------- what can be wrong with a record


def attempt(function, *given):
    """Return the result, or the UserError in its place."""
    try:
        return function(*given)
    except UserError as error:
        return error


def decode(content, where):
    try:
        return content.decode('utf-8')
    except UnicodeDecodeError as error:
        raise UserError(
            f'{where}: byte {error.start} (0x{content[error.start]:02x}) is not valid UTF-8; '
            'convert the file to UTF-8, for example with iconv.'
        ) from error


def parse_json(content, where):
    text = decode(content, where)
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        what, start = (error.msg, error.pos) if isinstance(error, ValueError) else ('nested too deeply', 0)
        raise UserError(
            f'{where}: not valid JSON ({what}) at {text[start : start + 30]!r}; repair it, or leave it out.'
        ) from error


def kind_of(value):
    return 'null' if value is None else f'a {type(value).__name__} ({str(value)[:30]})'


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]
