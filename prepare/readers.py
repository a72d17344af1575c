"""Documents from files: .txt, .jsonl, .json and .parquet."""
import glob
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet

from configurator import UserError
from prepare.writer import Source, sha256_of


def files(patterns, field, document=None):
    """
    The Source of comma-separated files or globs, in that order, those of one glob sorted.

    `field` names the text of a record; or `document(record, where)` makes a document of a whole record. Reading
    streams, except for .txt (a file is one document) and .json (a list is parsed at once). Raises UserError for
    what cannot be read, naming the file and the line or row.
    """
    paths = expand(patterns)
    endings = [ending for ending in READERS if document is None or ending != '.txt']
    for path in paths:
        if path.suffix.lower() not in endings:
            raise UserError(f'{path} ends in none of {", ".join(endings)}; convert or rename it.')
    inputs = {str(path): hash_of(path) for path in paths}     # before anything is written
    columns = None if document else [field]

    def text(row, where):
        return text_of(row, field, where)

    def documents():
        for path in paths:
            yield from READERS[path.suffix.lower()](path, document or text, columns)
    return Source(patterns, documents, inputs, sum(path.stat().st_size for path in paths))


def expand(patterns):
    paths = []
    for pattern in filter(None, map(str.strip, patterns.split(','))):
        pattern = str(Path(pattern).expanduser())
        matches = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise UserError(f'No file matches {pattern} in {Path.cwd()}; check the path.')
        paths += map(Path, matches)
    if not paths:
        raise UserError('There is nothing to read: give --input=FILE, several with commas between them, '
                        'or a glob.')
    return list(dict.fromkeys(paths))


def hash_of(path):
    if path.is_dir():
        raise UserError(f'{path} is a folder; name the files in it, as in --input="{path}/*.txt".')
    try:
        digest = sha256_of(path)
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror}); check it, or leave it out.') from error
    if path.stat().st_size == 0:
        raise UserError(f'{path} is empty; fill it, or leave it out.')
    return digest


# ---------------------------------------------------------------------------- one reader per ending
# Each yields (a document, how many bytes of the file it took); `document(record, where)` makes one, and
# `columns` are the fields that it needs, None for all.

def read_txt(path, document, columns):
    content = path.read_bytes()
    yield decode(content, path), len(content)


def read_jsonl(path, document, columns):
    with open(path, 'rb') as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                where = f'{path}, line {number}'
                yield document(parse(decode(line, where), where), where), len(line)


def read_json(path, document, columns):
    content = path.read_bytes()
    rows = parse(decode(content, path), path)
    if not isinstance(rows, list):
        raise UserError(f'{path} holds {kind_of(rows)}, not a list of records; '
                        'make it one, or write one record per line and name the file .jsonl.')
    for number, row in enumerate(rows, 1):
        yield document(row, f'{path}, record {number}'), len(content) / len(rows)


def read_parquet(path, document, columns):
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for field in columns or ():
                if field not in file.schema_arrow.names:
                    raise missing(field, file.schema_arrow.names, path)
            number, size = 0, path.stat().st_size / max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(batch_size=1000, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield document(row, f'{path}, row {number}'), size
    except pyarrow.ArrowException as error:
        raise UserError(f'{path} is no readable parquet file ({str(error).splitlines()[0]}); '
                        'fetch it again, or leave it out.') from error


READERS = {'.txt': read_txt, '.jsonl': read_jsonl, '.json': read_json, '.parquet': read_parquet}


# ---------------------------------------------------------------------------- what can be wrong with a record

def decode(content, where):
    try:
        return content.decode('utf-8')
    except UnicodeDecodeError as error:
        raise UserError(f'{where}: byte {error.start} (0x{content[error.start]:02x}) is not valid UTF-8; '
                        'convert the file to UTF-8, for example with iconv.') from error


def parse(text, where):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f'{where}: not valid JSON ({error.msg}) at {text[error.pos:error.pos + 30]!r}; '
                        'repair it, or leave it out.') from error


def text_of(row, field, where):
    if not isinstance(row, dict):
        raise UserError(f'{where}: {kind_of(row)} instead of a record; write {{"{field}": "..."}}.')
    if field not in row:
        raise missing(field, row, where)
    text = row[field]
    if not isinstance(text, str):
        raise UserError(f'{where}: the field {field!r} holds {kind_of(text)}, not text; '
                        'repair it, or name another field with --field.')
    try:
        text.encode()
    except UnicodeEncodeError as error:     # JSON can spell half of a character pair
        raise UserError(f'{where}: {text[error.start]!r} in the field {field!r} is half a character and has '
                        'no UTF-8 form; repair it, or leave it out.') from error
    return text


def missing(field, names, where):
    return UserError(f'{where}: there is no field {field!r}, only {", ".join(map(repr, names)) or "none"}; '
                     'name the one that holds the text with --field.')


def kind_of(value):
    return 'null' if value is None else f'a {type(value).__name__} ({str(value)[:30]})'
