"""Documents from files (.txt, .jsonl, .jsonl.gz, .jsonl.zst, .json, .parquet) and from the Hugging Face hub.

What is wrong with a single record is handed on in its place, as a UserError that names the file and the line:
whether it stops the preparation or is skipped and counted is for the writer to say. A file that cannot be read
to its end always stops it.
"""

import glob
import gzip
import io
import json
import zlib
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow
import pyarrow.parquet

from lm.configurator import UserError
from prepare.writer import Source, sha256_of


def files(patterns, field, separator='', document=None):
    """
    The Source of comma-separated files, folders or globs, in that order, those of one folder or glob sorted.

    `field` names the text of a record; or `document(record, where)` makes a document of a whole record. A .txt is
    one document, or several with a `separator` between them. Reading streams, except for .txt without a separator
    and .json (a list is parsed at once). Raises UserError for what cannot be read.
    """
    paths = expand(patterns, [ending for ending in READERS if not document or ending != '.txt'])
    make, fields = (document, None) if document else (partial(text_of, field), [field])
    before = [signature(path) for path in paths]
    inputs = {str(path): hash_of(path) for path in paths}  # before anything is written
    place = [0, 0]  # file, records of it that were read

    def documents(start=(0, 0)):
        first, done = start
        for number in range(first, len(paths)):
            read = READERS[ending_of(paths[number])]
            for record, made, amount in read(paths[number], done, make, fields, separator):
                place[:] = number, record
                yield made, amount
            done = 0
            if signature(paths[number]) != before[number]:
                raise UserError(
                    f'{paths[number]} changed while it was being read; let it rest, and prepare again '
                    'with --overwrite.'
                )

    return Source(
        patterns, documents, inputs, sum(path.stat().st_size for path in paths), position=lambda: list(place)
    )


def first_of(source, count):
    """The Source of the first `count` documents of another."""
    place = {}

    def documents(start=None):
        place['taken'] = start['taken'] if start else 0
        inner = source.documents(*([start['rest']] if start else []))
        for document in islice(inner, count - place['taken']):
            place['taken'] += 1
            yield document

    def position():
        return {**place, 'rest': source.position()}

    return replace(source, documents=documents, position=position if source.position else None)


def expand(patterns, endings):
    paths = []
    for pattern in filter(None, map(str.strip, patterns.split(','))):
        pattern = str(Path(pattern).expanduser())
        matches = [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))
        if not matches:
            raise UserError(f'No file matches {pattern} in {Path.cwd()}; check the path.')
        for path in map(Path, matches):
            paths += files_in(path, endings) if path.is_dir() else [path]
    if not paths:
        raise UserError(
            'There is nothing to read: give --input=FILE, several with commas between them, '
            'a folder, or a glob.'
        )
    for path in paths:
        if ending_of(path) not in endings:
            raise UserError(f'{path} ends in none of {", ".join(endings)}; convert or rename it.')
    return list(dict.fromkeys(paths))


def files_in(folder, endings):
    """The files below `folder` that can be read, sorted; others (a README) are not meant."""
    found = sorted(path for path in folder.rglob('*') if path.is_file() and ending_of(path) in endings)
    if not found:
        raise UserError(f'The folder {folder} holds no file that ends in {", ".join(endings)}; name another.')
    return found


def ending_of(path):
    ending = path.suffix.lower()
    return Path(path.stem).suffix.lower() + ending if ending in ('.gz', '.zst') else ending


def signature(path):
    state = path.stat()
    return state.st_size, state.st_mtime_ns


def hash_of(path):
    try:
        digest = sha256_of(path)
    except OSError as error:
        raise UserError(f'{path} cannot be read ({error.strerror}); check it, or leave it out.') from error
    if path.stat().st_size == 0:
        raise UserError(f'{path} is empty; fill it, or leave it out.')
    return digest


# ---------------------------------------------------------------------------- one reader per ending
# Each yields, after the first `done` records, (number of a record, its document or what is wrong with it, how many
# bytes of the file it took). `make(record, where)` gives the document; `fields` are those that it needs, None for all.


def read_txt(path, done, make, fields, separator):
    for number, content in enumerate(split_file(path, separator) if separator else [path.read_bytes()], 1):
        if number > done:
            where = f'{path}, document {number}' if separator else path
            yield (
                number,
                attempt(decode, content.strip() if separator else content, where),
                len(content) + len(separator),
            )


def split_file(path, separator):
    """The contents between separators, a megabyte of the file at a time."""
    rest, separator = b'', separator.encode()
    with open(path, 'rb') as file:
        while chunk := file.read(2**20):
            *whole, rest = (rest + chunk).split(separator)
            yield from whole
    yield rest


def read_jsonl(path, done, make, fields, separator):
    before = 0
    with open(path, 'rb') as raw, damage_named(path), decompressed(path, raw) as file:
        for number, line in enumerate(file, 1):
            if number > done and not line.isspace():
                here = raw.tell()
                yield number, attempt(from_line, make, line, f'{path}, line {number}'), here - before
                before = here


def decompressed(path, raw):
    if ending_of(path).endswith('.gz'):
        return gzip.GzipFile(fileobj=raw)
    if ending_of(path).endswith('.zst'):
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw), 'zstd'), 2**16)
    return raw


def read_json(path, done, make, fields, separator):
    content = path.read_bytes()
    rows = parse(decode(content, path), path)
    if not isinstance(rows, list):
        raise UserError(
            f'{path} holds {kind_of(rows)}, not a list of records; '
            'make it one, or write one record per line and name the file .jsonl.'
        )
    for number, row in enumerate(rows, 1):
        if number > done:
            yield number, attempt(make, row, f'{path}, record {number}'), len(content) / len(rows)


def read_parquet(path, done, make, fields, separator):
    number = 0
    with damage_named(path), pyarrow.parquet.ParquetFile(path, buffer_size=2**20) as file:
        for field in fields or ():
            if field not in file.schema_arrow.names:
                raise missing(field, file.schema_arrow.names, path)
        size = path.stat().st_size / max(file.metadata.num_rows, 1)
        for group in range(file.num_row_groups):
            if number + file.metadata.row_group(group).num_rows <= done:
                number += file.metadata.row_group(group).num_rows
                continue
            for batch in file.iter_batches(batch_size=100, row_groups=[group], columns=fields):
                for values in zip(*map(values_of, batch.columns)):
                    number += 1
                    if number > done:
                        record = dict(zip(batch.schema.names, values))
                        yield number, attempt(from_values, make, record, f'{path}, row {number}'), size


def values_of(column):
    """Text as bytes, which are decoded one by one, so that an invalid one is a matter of its row."""
    kind = column.type.value_type if pyarrow.types.is_dictionary(column.type) else column.type
    is_text = pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
    return (column.cast(kind).cast(pyarrow.large_binary()) if is_text else column).to_pylist()


READERS = {
    '.txt': read_txt,
    '.jsonl': read_jsonl,
    '.jsonl.gz': read_jsonl,
    '.jsonl.zst': read_jsonl,
    '.json': read_json,
    '.parquet': read_parquet,
}


@contextmanager
def damage_named(path):
    try:
        yield
    except (pyarrow.ArrowException, OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(
            f'{path} cannot be read to its end ({first_line(error)}); fetch it again, or leave it out.'
        ) from error


# ---------------------------------------------------------------------------- what can be wrong with a record


def attempt(make, *given):
    """The result, or the UserError in its place."""
    try:
        return make(*given)
    except UserError as error:
        return error


def from_line(make, line, where):
    return make(parse(decode(line, where), where), where)


def from_values(make, record, where):
    return make(
        {name: decode(value, where) if isinstance(value, bytes) else value for name, value in record.items()},
        where,
    )


def decode(content, where):
    try:
        return content.decode('utf-8')
    except UnicodeDecodeError as error:
        raise UserError(
            f'{where}: byte {error.start} (0x{content[error.start]:02x}) is not valid UTF-8; '
            'convert the file to UTF-8, for example with iconv.'
        ) from error


def parse(text, where):
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        what, place = (error.msg, error.pos) if isinstance(error, ValueError) else ('nested too deeply', 0)
        raise UserError(
            f'{where}: not valid JSON ({what}) at {text[place : place + 30]!r}; repair it, or leave it out.'
        ) from error


def text_of(field, row, where):
    if not isinstance(row, dict):
        raise UserError(f'{where}: {kind_of(row)} instead of a record; write {{"{field}": "..."}}.')
    if field not in row:
        raise missing(field, row, where)
    text = row[field]
    if not isinstance(text, str):
        raise UserError(
            f'{where}: the field {field!r} holds {kind_of(text)}, not text; '
            'repair it, or name another field with --field.'
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a character pair
        raise UserError(
            f'{where}: {text[error.start]!r} in the field {field!r} is half a character and has '
            'no UTF-8 form; repair it, or leave it out.'
        ) from error
    return text


def missing(field, names, where):
    return UserError(
        f'{where}: there is no field {field!r}, only {", ".join(map(repr, names)) or "none"}; '
        'name the one that holds the text with --field.'
    )


def kind_of(value):
    return 'null' if value is None else f'a {type(value).__name__} ({str(value)[:30]})'


# ---------------------------------------------------------------------------- the hub


def hub(path, subset=None, field='text', document=None):
    """
    The Source of the training split of a data set on the Hugging Face hub, streamed, at its newest revision.

    `field` and `document` are as in `files`. A restart goes on within the file where it was. Raises UserError for
    what the hub refuses.
    """
    import datasets  # it takes seconds, and files need it not
    from huggingface_hub import HfApi

    with refusals_named(path):
        revision = HfApi().dataset_info(path).sha
    reading, make = {'rows': 0, 'stream': None}, document or partial(text_of, field)

    def documents(start=None):
        with refusals_named(path):
            stream = datasets.load_dataset(path, subset, split='train', streaming=True, revision=revision)
            if start:
                stream.load_state_dict(start['state'])
            reading.update(stream=stream, rows=start['rows'] if start else 0)
            for row in stream:
                reading['rows'] += 1
                yield attempt(make, row, f'{path}, row {reading["rows"]}'), 1

    def position():
        return {'rows': reading['rows'], 'state': reading['stream'].state_dict()}

    name = f'{path}/{subset}' if subset else path
    return Source(
        f'https://huggingface.co/datasets/{name}', documents, {name: revision}, None, ' documents', position
    )


@contextmanager
def refusals_named(path):
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of many kinds, from four libraries
        raise UserError(
            f'The data set {path} could not be read from the hub ({first_line(error)}); correct the '
            'name, try again, or fetch its files elsewhere and give their folder instead.'
        ) from error


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]
