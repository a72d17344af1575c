"""Records of .jsonl (.gz, .zst), .json, .parquet, .csv and .tsv files, read one at a time.

A record that cannot be read is handed on as a UserError in its place, which names the file and the line, so that the
caller may skip it.
"""

import csv
import io
import json
import reprlib
from itertools import chain

import pyarrow
import pyarrow.parquet

from lm.configurator import UserError, note, require
from lm.files import as_sentence

TABLES = {'.tsv': dict(delimiter='\t', quoting=csv.QUOTE_NONE), '.csv': {}}
END = '\0end of the table\0'  # a row of its own, unless a quote is open
csv.field_size_limit(2**31 - 1)  # a cell may hold a long text


def read_records(path, make, columns=None):
    """Yield (make(record, where) or a UserError, bytes of the file that it took) for each record, a dict.

    A .json, which holds a list, is parsed at once; all others stream. columns: names for a table without a header
    line. Raises UserError for a file that is damaged.
    """
    suffix = suffix_of(path)
    with damage_named(path):
        rows = read_table(path, columns) if suffix in TABLES else READERS[suffix](path)
        for row, where, size in rows:
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
    try:
        rows = parse_json(content, path)
    except UserError:
        first = attempt(lambda record, where: record, content.partition(b'\n')[0], path)
        if isinstance(first, UserError):
            raise
        return (yield from read_jsonl(path))  # JSON lines by another name
    require(isinstance(rows, list), f'{path} holds {kind_of(rows)}, not a list of records; write a list.')
    for number, row in enumerate(rows, 1):
        yield row, f'record {number}', len(content) / len(rows)


def read_parquet(path):
    with pyarrow.parquet.ParquetFile(path, buffer_size=2**20) as file:
        size = path.stat().st_size / max(file.metadata.num_rows, 1)
        rows = chain.from_iterable(map(rows_of, file.iter_batches(batch_size=100)))
        for number, row in enumerate(rows, 1):
            yield row, f'row {number}', size


def rows_of(batch):
    """Return the rows of a batch; in place of one that Python cannot hold, such as no UTF-8, the error."""
    try:
        return batch.to_pylist()
    except (ValueError, ArithmeticError, LookupError, pyarrow.ArrowException) as error:
        rows = (rows_of(batch.slice(i, 1)) for i in range(len(batch)))
        return [error] if len(batch) == 1 else chain.from_iterable(rows)


def read_table(path, columns):
    with open(path, encoding='utf-8-sig') as file:  # only line breaks end a row
        rows = csv.reader(chain(file, [END]), **TABLES[suffix_of(path)])
        columns = columns or next(rows)
        for number, cells in enumerate(filter(None, rows), 1):
            if cells == [END]:
                return
            row = dict(zip(columns, cells))
            if cells[-1].endswith(END):
                row = ValueError('a quote opens that nothing closes')
            elif len(cells) != len(columns):
                row = ValueError(
                    f'it has {len(cells)} cells, not the {len(columns)} columns {columns!s:.200}'
                )
            yield row, f'row {number}', sum(map(len, cells))


READERS = dict.fromkeys(['.jsonl', '.jsonl.gz', '.jsonl.zst'], read_jsonl)
READERS |= {'.json': read_json, '.parquet': read_parquet}


def suffix_of(path):
    """Return the suffix by which a file is read, in lower case: '.jsonl', '.jsonl.gz'."""
    name = path.name.lower()
    return next((suffix for suffix in READERS if name.endswith(suffix)), path.suffix.lower())


def damage_named(path):
    """Return a context in which the errors of a file that is damaged are UserErrors."""
    kinds = UnicodeDecodeError, pyarrow.ArrowException, OSError, csv.Error
    return as_sentence(f'{path} cannot be read to its end', 'fetch it again, or convert it to UTF-8', kinds)


def refusals_named(path):
    """Return a context in which the hub's errors, of many kinds and from four libraries, are UserErrors."""
    problem = f'The data set {path} could not be read from the hub'
    return as_sentence(problem, 'correct the name, try again, or give files of your own')


def on_the_hub(path, subset=None):
    """Return what `load_dataset` takes for a data set of the hub and its subset, at its newest revision; of one that is
    a script, which `datasets` does not run any more, the hub's own copy in parquet."""
    from huggingface_hub import HfApi

    info, part = HfApi().dataset_info(path), {'name': subset}
    if f'{path.split("/")[-1]}.py' in [file.rfilename for file in info.siblings or ()]:
        info, part = HfApi().dataset_info(path, revision='refs/convert/parquet'), {'data_dir': subset}
        names = [file.rfilename for file in info.siblings or () if file.rfilename.endswith('.parquet')]
        subsets = sorted({name.split('/')[0] for name in names})
        problem = f'{path} has several parts, {", ".join(subsets)}'
        remedy = f'name one, as {path}:{(subsets or [""])[0]} or, in a database, as its config'
        require(subset or len(subsets) < 2, f'{problem}; {remedy}.')
        is_part = any('/partial-' in name for name in names)
        note(f'{path} is a script; its copy in parquet{", of which the hub has a part," * is_part} is read.')
    return {'path': path, 'revision': info.sha, **part}


def attempt(make, row, where):
    """Return make(record, where) of a line of JSON or a parsed record, or the UserError in its place."""
    try:
        require(not isinstance(row, Exception), f'{where}: {row}; repair it, or leave it out.')
        record = parse_json(row, where) if isinstance(row, bytes) else row
        require(isinstance(record, dict), f'{where}: {kind_of(record)} instead of a record; repair it.')
        return make(record, where)
    except UserError as error:
        return error


def parse_json(content, where):
    with as_sentence(f'{where}: not valid JSON', 'repair it, or leave it out'):
        return json.loads(content)  # no UTF-8, no JSON, or nested too deeply


def value_of(field, record, where):
    """Return a field of a record; raise UserError, which names `where`, if there is none."""
    known = ', '.join(map(repr, record))[:300] or 'none'
    require(field in record, f'{where}: there is no field {field!r}, only {known}; name another.')
    return record[field]


def text_of(field, record, where):
    """Return the text in a field of a record; raise UserError, which names `where`, if it has none."""
    text = value_of(field, record, where)
    problem = f'{where}: the field {field!r} holds {kind_of(text)}, not text'
    require(isinstance(text, str), f'{problem}; repair it, or name another.')
    with as_sentence(f'{where}: half a character in {field!r}', 'leave it out'):
        text.encode()  # JSON can spell half of a character pair
    return text


def kind_of(value):
    shown = value if isinstance(value, str) else reprlib.repr(value)  # which does not follow any depth
    return 'null' if value is None else f'a {type(value).__name__} ({shown[:30]})'
