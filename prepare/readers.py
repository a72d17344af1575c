"""Documents from files (.txt, .jsonl, .jsonl.gz, .jsonl.zst, .json, .parquet) and the Hugging Face hub."""

import glob
import hashlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path

from tqdm import tqdm

from lm.configurator import UserError, note, printable, require
from lm.files import as_sentence, sha256_of
from lm.records import READERS, attempt, on_the_hub, read_records, refusals_named, suffix_of, text_of


@dataclass
class Source:
    """Where documents come from."""

    name: str
    documents: Callable  # (done=0, state=None) -> iterable of (text or UserError, amount), from `done` on
    inputs: dict  # name -> sha256 of what the documents are read from or made by
    total: float  # amount of the whole source, in `unit`s; None where nobody knows
    unit: str = 'B'
    state: Callable = lambda: None  # () -> JSON that spares `documents` to read what is done once more
    limit: int = None  # of documents, where only the first are wanted
    where: dict = None  # of the hub: what `load_dataset` takes, its revision with it
    examples: object = None  # prepare.examples.Examples, where documents are records and no plain text


def files(patterns, field, separator='', document=None):
    """Return the Source of comma-separated files, folders or globs, in that order, each of them sorted.

    `field` names the text of a record; or `document(record, where)` makes a document of it. A .txt is one document,
    or several with a `separator` between them.
    """
    make = document or partial(text_of, field)
    paths = expand(patterns, [*READERS] if document else ['.txt', *READERS])
    inputs = {}
    for path in paths:  # before anything is written
        require(path.stat().st_size, f'{path} is empty; fill it, or leave it out.')
        with as_sentence(f'{path} cannot be read', 'fetch it again, or leave it out'):
            inputs[str(path)] = sha256_of(path)

    def read(path):
        return read_txt(path, separator) if suffix_of(path) == '.txt' else read_records(path, make)

    def documents(done=0, state=None):
        return islice(chain.from_iterable(map(read, paths)), done, None)

    return Source(patterns, documents, inputs, sum(path.stat().st_size for path in paths))


def hub(path, subset=None, field='text', document=None):
    """Return the Source of the training split of a data set on the hub, streamed, at its newest revision; the
    rest is as in `files`. A restart goes on within the file where it was."""
    import datasets  # it takes seconds, and files do not need it

    with refusals_named(path):
        where = on_the_hub(path, subset)
    make = document or partial(text_of, field)

    def documents(done=0, state=None):
        with refusals_named(path):
            stream = datasets.load_dataset(**where, split='train', streaming=True)
            source.state = stream.state_dict
            if state:
                stream.load_state_dict(state)
            known = (stream.info.splits or {}).get('train')
            source.total = source.limit or (known and known.num_examples) or None
            for number, row in enumerate(stream, done + 1):
                yield attempt(make, row, f'{path}, row {number}'), 1

    name = f'{path}/{subset}' if subset else path
    url, inputs = f'https://huggingface.co/datasets/{name}', {name: where['revision']}
    source = Source(url, documents, inputs, None, ' documents', where=where)
    return source


class Corpus:
    """The documents of a source, each with its split by a hash of the text; blank ones are left out and
    counted. A single document gives its last `val_fraction` of characters, as in nanoGPT."""

    def __init__(self, source, val_fraction, on_error):
        self.source, self.val_fraction, self.on_error = source, val_fraction, on_error
        self.warnings = []
        first = list(islice(self.texts(), 2))
        skipped = f' {self.read["skipped"]} records were skipped: {self.warnings[0]}' if self.warnings else ''
        require(first, f'There is no text in {source.name}; give files that hold some.{skipped}')
        self.is_single = len(first) == 1 and not source.examples
        self.opening = '\n' if '\n' in first[0] else first[0][0]  # how a sample of a single document begins

    def texts(self, read=None):
        """Yield the texts, from the start or from where `self.read` stood; it is counted up on the way."""
        self.read = dict(read or {'documents': 0, 'amount': 0, 'blank': 0, 'skipped': 0, 'state': None})
        unread = self.read.setdefault('unread', {})  # fields of records: of how many
        done, limit = self.read['documents'], self.source.limit
        for text, amount in islice(self.source.documents(done, self.read['state']), limit and limit - done):
            self.read['documents'] += 1
            self.read['amount'] += amount
            if isinstance(text, UserError):
                self.skip(text)
            elif not text or text.isspace():
                self.read['blank'] += 1
            else:
                unread.update((name, unread.get(name, 0) + 1) for name in getattr(text, 'unread', ()))
                yield text

    def skip(self, error):
        if self.on_error != 'skip':
            remedy = ' --on_error=skip leaves it out.' if self.on_error else ''
            raise UserError(f'{error}{remedy}') from error
        self.read['skipped'] += 1
        if len(self.warnings) < 10 and str(error) not in self.warnings:  # the source is read several times
            self.warnings.append(str(error))
            tqdm.write(printable(f'skipped: {error}'), file=sys.stderr)

    def parts(self, text):
        """Return [(split, text)] of a document."""
        if self.is_single:
            cut = int(len(text) * (1 - self.val_fraction))
            return [('train', text[:cut]), ('val', text[cut:])]
        if part := getattr(text, 'part', None):
            return [(part, text)]
        position = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], 'big') / 2**64
        return [('val' if position < self.val_fraction else 'train', text)]

    def texts_of(self, split):
        return (part for text in self.texts() for name, part in self.parts(text) if name == split)

    def sample(self, megabytes):
        """Yield the training texts that come first."""
        room = megabytes * 1e6
        for text in map(self.as_text, self.texts_of('train')):
            yield text[: int(room)]
            room -= len(text.encode())
            if room <= 0:
                return

    def as_text(self, document):
        return self.source.examples.text(document) if self.source.examples else document


def expand(patterns, suffixes):
    """Return the paths, each once, that comma-separated files, globs or folders of files with `suffixes` stand for."""
    found, endings = {}, ', '.join(suffixes)
    for pattern in filter(None, map(str.strip, patterns.split(','))):
        path = Path(pattern).expanduser()
        matches = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
        require(matches, f'No file matches {path} in {Path.cwd()}; check the path.')
        for match in matches:
            for path in sorted(files_below(match, suffixes)) if match.is_dir() else [match]:
                require(suffix_of(path) in suffixes, f'{path} ends in none of {endings}; convert it.')
                found.setdefault(path.resolve(), path)  # by its first name, in its first place
    require(found, f'There is nothing to read: give files, folders or globs, between commas, of {endings}.')
    return [*found.values()]


def files_below(folder, suffixes):
    """Yield the files of a folder, and of those that its links lead to, but for empty ones."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        for path in (Path(place, name) for name in names):
            if path.is_file() and suffix_of(path) in suffixes:
                if path.stat().st_size:
                    yield path
                else:
                    note(f'{path} is empty; it is left out.')


def read_txt(path, separator):
    """Yield (text or UserError, bytes) of the documents of a .txt."""
    contents = map(bytes.strip, split_file(path, separator.encode())) if separator else [path.read_bytes()]
    for number, content in enumerate(contents, 1):
        try:
            text = content.decode('utf-8-sig' if number == 1 else 'utf-8')
        except UnicodeDecodeError as error:
            text = UserError(f'{path}, document {number}: no valid UTF-8 ({error}); convert it as by iconv.')
        yield text, len(content) + len(separator)


def split_file(path, separator):
    """Yield the contents between separators, reading a megabyte of the file at a time."""
    rest = b''
    with open(path, 'rb') as file:
        while chunk := file.read(2**20):
            *whole, rest = (rest + chunk).split(separator)
            yield from whole
    yield rest
