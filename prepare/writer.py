"""
The one writer of prepared folders: documents in, flat token ids out, ready to be memory-mapped.

    source = files('books.jsonl', field='text')     # or any other Source
    write(source, config)                           # config: the settings of the script

The documents stream past once to teach the tokenizer, where it learns, and once to be encoded: the main
process reads, worker processes encode, and results are written in the order of the source, so that memory
stays flat and the number of workers decides nothing. A killed run leaves nothing that looks finished, and the
same command goes on after its last finished shard (prepare/folders.py).
"""

import hashlib
import json
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lm import data
from lm.configurator import ROOT, UserError
from lm.files import checksum, sha256_of
from prepare import tokenizer as tokenizers
from prepare.folders import FORMAT, HELPERS, finished_folder, replacing, shown, sizes_of, sync

BATCH = 2**18  # characters that one worker encodes at a time
SHARD = 2**26  # characters after which a killed run can go on
NOT_CONTENT = (
    'name',
    'output_dir',
    'input',
    'source',
    'num_workers',
    'overwrite',
    'on_error',
)  # decide no token


@dataclass
class Source:
    """Where documents come from."""

    name: str
    documents: (
        Callable  # (start=...) -> a fresh iterable of (text or UserError, amount of the source that it took)
    )
    inputs: dict  # name -> sha256 of what the documents are read from or made by
    total: float  # amount of the whole source, in `unit`s; None where nobody knows
    unit: str = 'B'
    position: Callable = (
        None  # () -> the `start`, as JSON, that goes on after the last document; None: no restart
    )
    examples: object = None  # prepare.examples.Examples, where documents are records and no plain text


def write(source, config, log_prob=None):
    """
    Prepare `source` and return the content of the folder's config.json.

    `config` holds the settings of a prepare script: name, output_dir, tokenizer, vocab_size,
    tokenizer_sample_mb, val_fraction, num_workers, overwrite, and any of its own. All that decide the content
    are recorded, and a finished folder is reused only if they and the inputs are the same. Where it has
    on_error='skip', documents that cannot be read are left out and counted. `log_prob(text)`, in nats, is
    given where the true distribution of the documents is known: then the floor of the validation loss is
    recorded too. Raises UserError for every mistake of the user's; a folder that was there is then as it was.
    """
    started = time.time()
    check_settings(config)
    target = target_folder(config)
    arguments = content_arguments(config)
    finished = finished_folder(target, arguments, source.inputs, config['overwrite'])
    if finished:
        print(f'{shown(target)} is prepared already, with the same settings from the same input.')
        report(target, finished)
        return finished
    with replacing(target, arguments, source.inputs, config['overwrite']) as (folder, journal):
        corpus = Corpus(source, config['val_fraction'], config.get('on_error', 'stop'))
        if journal.state:
            tokenizer = data.Tokenizer.load(folder)
        else:
            tokenizer = build_tokenizer(corpus, config)
            (folder / 'tokenizer.json').write_text(tokenizer.to_json(), encoding='utf-8')
            sync(folder / 'tokenizer.json')
        splits = encode_corpus(corpus, folder, tokenizer, config, log_prob, journal)
        check_splits(splits, corpus, journal)
        finished = describe(target, source, arguments, tokenizer, splits, corpus)
        if log_prob:
            finished['floor'] = floor(splits['val'])
        if source.examples:
            finished['examples'] = source.examples.describe(splits.values())
        finished['sha256'] = {
            path.name: sha256_of(path)
            for path in sorted(folder.iterdir())
            if path.name not in (*HELPERS, 'config.json')
        }
        finished['checksum'] = checksum(finished)
        (folder / 'config.json').write_text(json.dumps(finished, indent=2, allow_nan=False) + '\n')
    report(target, finished, f'{time.time() - started:.0f} s')
    return finished


# ---------------------------------------------------------------------------- settings


def target_folder(config):
    name, output_dir = config['name'], config['output_dir']
    if output_dir:
        return Path(output_dir).expanduser().resolve()
    if not name or Path(name).name != name or name.startswith('.'):
        raise UserError(
            f'--name={name or ""} does not name a folder under data/; give a plain name, '
            'as in --name=books, or a path with --output_dir.'
        )
    return ROOT / 'data' / name


def check_settings(config):
    kind, vocab_size, smallest = config['tokenizer'], config['vocab_size'], 256 + len(data.SPECIAL_TOKENS)
    if config['num_workers'] < 0:
        raise UserError(f'--num_workers={config["num_workers"]} is negative; give 0 for one per core.')
    if not 0 < config['val_fraction'] < 1:
        raise UserError(f'--val_fraction={config["val_fraction"]} is not between 0 and 1; 0.1 is usual.')
    if config['tokenizer_sample_mb'] <= 0:
        raise UserError(
            f'--tokenizer_sample_mb={config["tokenizer_sample_mb"]} leaves nothing to train a '
            'tokenizer on; give the megabytes of text that it may see.'
        )
    if config.get('on_error', 'stop') not in ('stop', 'skip'):
        raise UserError(
            f'--on_error={config["on_error"]} is neither stop nor skip; skip leaves out, and counts, '
            'what cannot be read.'
        )
    if config.get('max_seq_len', 0) < 0:
        raise UserError(
            f'--max_seq_len={config["max_seq_len"]} is negative; give the tokens of a training row, '
            'or 0 for none in particular.'
        )
    if kind == 'bpe' and vocab_size < smallest:
        raise UserError(
            f'--vocab_size={vocab_size} is too small; the bytes and the special tokens alone take {smallest}.'
        )
    if kind != 'bpe' and 'vocab_size' in getattr(config, 'given', ()):  # a plain dict knows no `given`
        raise UserError(
            f'--vocab_size={vocab_size} has no effect with --tokenizer={kind}, whose size is '
            'what it is; leave it out, or train a tokenizer with --tokenizer=bpe.'
        )


def content_arguments(config):
    """The settings that decide the content of the files, as config.json records them."""
    arguments = {key: value for key, value in config.items() if key not in NOT_CONTENT}
    kind = config['tokenizer']
    if not arguments.get('max_seq_len'):
        arguments.pop('max_seq_len', None)
    if kind != 'bpe':
        del arguments['vocab_size'], arguments['tokenizer_sample_mb']
    if kind not in tokenizers.KINDS:  # by content, because a path may come to hold something else
        json_text = tokenizers.build(kind).to_json()
        arguments['tokenizer'] = f'sha256:{hashlib.sha256(json_text.encode()).hexdigest()}'
    return arguments


# ---------------------------------------------------------------------------- documents and their splits


class Corpus:
    """
    The documents of a source, each with its split; blank ones are left out and counted.

    A hash of the text decides the split, so that other documents, workers or orders never move one. A source
    that is one document gives its last `val_fraction` of characters, as nanoGPT does.
    """

    def __init__(self, source, val_fraction, on_error='stop'):
        self.source, self.val_fraction, self.on_error = source, val_fraction, on_error
        self.wrong = None  # what was skipped last
        first = list(islice(self.texts(), 2))
        if not first:
            raise UserError(
                f'There is no text in {source.name}; give files that hold some.'
                + f' The last of {self.skipped} that were skipped: {self.wrong}' * bool(self.skipped)
            )
        self.single = len(first) == 1 and not source.examples
        self.opening = '\n' if '\n' in first[0] else first[0][0]  # a fresh sample of a single document

    def texts(self, state=None, tell=None):
        """Yields texts, from the start or from `state` on; `tell(error)` hears of what is skipped."""
        state = state or {'amount': 0, 'blank': 0, 'skipped': 0, 'least_hash': 1.0}
        self.amount, self.blank, self.skipped = (state[key] for key in ('amount', 'blank', 'skipped'))
        self.least_hash = state['least_hash']  # a val_fraction above it takes a document
        start = [state['position']] if 'position' in state else []
        for text, amount in self.source.documents(*start):
            self.amount += amount
            if isinstance(text, UserError):
                self.skip(text, tell)
            elif not text or text.isspace():
                self.blank += 1
            else:
                yield text

    def skip(self, error, tell):
        if self.on_error == 'stop':
            raise error
        self.skipped += 1
        self.wrong = error
        if tell:
            tell(error)

    def state(self):
        """All that texts() needs to go on after the last document; None where the source cannot."""
        if self.single or not self.source.position:
            return None
        return {
            'amount': self.amount,
            'blank': self.blank,
            'skipped': self.skipped,
            'least_hash': self.least_hash,
            'position': self.source.position(),
        }

    def split(self, texts):
        """Yields [(split, text)] for each of `texts`."""
        for text in texts:
            if self.single:
                cut = int(len(text) * (1 - self.val_fraction))
                yield [('train', text[:cut]), ('val', text[cut:])]
            else:
                position = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], 'big') / 2**64
                self.least_hash = min(self.least_hash, position)
                yield [('val' if position < self.val_fraction else 'train', text)]

    def sample(self, megabytes):
        """The training texts, as many as come first."""
        room = megabytes * 1e6
        for split, text in chain.from_iterable(self.split(self.texts())):
            if split == 'train':
                text = self.as_text(text)
                yield text[: int(room)]
                room -= len(text.encode())
                if room <= 0:
                    return

    def as_text(self, document):
        return self.source.examples.text(document) if self.source.examples else document


def build_tokenizer(corpus, config):
    if config['tokenizer'] == 'char':
        return tokenizers.build('char', map(corpus.as_text, corpus.texts()))
    sample = corpus.sample(config['tokenizer_sample_mb'])
    return tokenizers.build(config['tokenizer'], sample, config['vocab_size'])


def check_splits(splits, corpus, journal):
    """An empty split is an error, with the fraction that would do."""
    count, fraction = sum(split.documents for split in splits.values()), corpus.val_fraction
    if all(split.tokens for split in splits.values()):
        return
    journal.state = None  # with these settings there is nothing to go on with
    if corpus.source.examples and not count:
        raise UserError(corpus.source.examples.nothing_left(splits.values()))
    if corpus.single:
        raise UserError(
            f'The only document is too short to be split at --val_fraction={fraction}; give more text.'
        )
    if not splits['train'].tokens:
        raise UserError(
            f'All {count} documents fell into the validation split at --val_fraction={fraction}; '
            'give a smaller one, or more documents.'
        )
    enough = math.floor(corpus.least_hash * 1000 + 1) / 1000
    raise UserError(
        f'None of the {count} documents fell into the validation split at '
        f'--val_fraction={fraction}; --val_fraction={enough} takes the first.'
    )


# ---------------------------------------------------------------------------- encoding


@dataclass
class Batch:
    """Pieces of documents of one split on their way to a worker, and their tokens on the way back."""

    split: str
    texts: list = field(default_factory=list)
    last: list = field(default_factory=list)  # whether the piece is the last of its document
    length: int = 0  # characters
    bytes: int = 0  # of UTF-8
    amount: float = 0  # of the source
    nats: float = 0  # -log p of the documents, where it is known
    tokens: np.ndarray = None  # of all pieces, document ends included
    ends: np.ndarray = None  # where in `tokens` documents end
    masks: np.ndarray = None  # of examples: 1 where the model is trained on a token
    fates: Counter = field(default_factory=Counter)  # of examples: how many were cut, how many left out


@dataclass
class Mark:
    """A place where a killed run can go on, once all before it is on the disk."""

    corpus: dict


class Split:
    """The growing files of one split; `counts`, of an unfinished folder, say where they go on."""

    def __init__(self, folder, name, width, has_masks, counts):
        counts = counts or {'tokens': 0, 'documents': 0, 'bytes': 0, 'nats': 0, 'fates': {}}
        self.tokens, self.documents, self.bytes, self.nats = (
            counts[key] for key in ('tokens', 'documents', 'bytes', 'nats')
        )
        self.fates = Counter(counts['fates'])
        self.files = {
            kind: reopen(folder / f'{name}_{kind}.bin', size)
            for kind, size in sizes_of(counts, width, has_masks).items()
        }

    def append(self, batch):
        self.files['tokens'].write(batch.tokens.tobytes())
        self.files['index'].write((self.tokens + batch.ends).astype(np.uint64).tobytes())
        if 'masks' in self.files:
            self.files['masks'].write(batch.masks.tobytes())
        self.fates += batch.fates
        self.tokens += len(batch.tokens)
        self.documents += len(batch.ends)
        self.bytes += batch.bytes
        self.nats += batch.nats

    def counts(self):
        return {
            'tokens': self.tokens,
            'documents': self.documents,
            'bytes': self.bytes,
            'nats': self.nats,
            'fates': self.fates,
        }

    def sync(self):
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())

    def close(self):
        for file in self.files.values():
            file.close()


def reopen(path, size):
    """The file at `path`, cut to `size` bytes, to be written from there on; a new one begins with `size` zeros."""
    file = open(path, 'r+b' if path.exists() else 'wb')
    file.truncate(size)
    file.seek(size)
    return file


def encode_corpus(corpus, folder, tokenizer, config, log_prob, journal):
    """Write the files of tokens, index and, of examples, masks; the Split of each name."""
    document_end = [] if corpus.single else [tokenizer.endoftext_id]
    num_workers = config['num_workers'] or os.cpu_count()
    state, dtype, examples = journal.state or {}, token_dtype(tokenizer), corpus.source.examples
    splits = {
        name: Split(folder, name, dtype.itemsize, bool(examples), state.get('splits', {}).get(name))
        for name in ('train', 'val')
    }
    setup = config['tokenizer'], tokenizer.to_json(), dtype, document_end, examples
    in_pieces = config['tokenizer'] in tokenizers.KINDS and not examples
    cut = tokenizers.pieces if in_pieces else lambda text: [text]
    bar = tqdm(
        total=corpus.source.total,
        initial=state.get('corpus', {}).get('amount', 0),
        unit=corpus.source.unit,
        unit_scale=True,
        disable=None,
    )  # shown on a terminal only
    with bar, ProcessPoolExecutor(num_workers, initializer=start_worker, initargs=setup) as pool:
        try:
            coming = batches(corpus, cut, log_prob, state.get('corpus'))
            for batch in in_order(pool, encode, coming, window=4 * num_workers):
                if isinstance(batch, Mark):
                    for split in splits.values():
                        split.sync()
                    journal.write(
                        {
                            'corpus': batch.corpus,
                            'width': dtype.itemsize,
                            'has_masks': bool(examples),
                            'splits': {name: split.counts() for name, split in splits.items()},
                        }
                    )
                else:
                    splits[batch.split].append(batch)
                    bar.update(batch.amount)
        except BrokenProcessPool as error:
            raise UserError(
                f'A worker process was killed, as when memory runs out; give fewer than '
                f'--num_workers={num_workers}.'
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
            for split in splits.values():
                split.close()
    return splits


def batches(corpus, cut, log_prob, state):
    """The corpus in Batches, each of one split, in an order that depends on nothing but the corpus.

    After each SHARD all that waits is sent on, and a Mark says how far the corpus was read.
    """

    def tell(error):
        if corpus.skipped <= 10:
            tqdm.write(
                f'skipped: {error}' + ' (and so on, silently)' * (corpus.skipped == 10), file=sys.stderr
            )

    waiting, amount, shard = (
        {name: Batch(name) for name in ('train', 'val')},
        (state or {}).get('amount', 0),
        0,
    )
    for parts in corpus.split(corpus.texts(state, tell)):
        for split, text in parts:
            waiting[split].amount, amount = waiting[split].amount + corpus.amount - amount, corpus.amount
            if log_prob and split == 'val':
                waiting[split].nats -= log_prob(text)
            pieces = list(cut(text))
            for number, piece in enumerate(pieces, 1):
                batch = waiting[split]
                batch.texts.append(piece)
                batch.last.append(number == len(pieces))
                batch.length += len(piece)
                if batch.length >= BATCH:
                    yield batch
                    waiting[split] = Batch(split)
            shard += len(text)
        if shard >= SHARD and (state := corpus.state()):
            yield from (batch for batch in waiting.values() if batch.texts)
            yield Mark(state)
            waiting, shard = {name: Batch(name) for name in waiting}, 0
    yield from (batch for batch in waiting.values() if batch.texts)


def in_order(pool, function, items, window):
    """pool.map that reads at most `window` items ahead, so that memory stays flat; a Mark keeps its place."""
    pending, items, failure = deque(), iter(items), None
    while True:
        try:
            item = next(items)
        except StopIteration:
            break
        except UserError as error:  # all that came before it is finished first
            failure = error
            break
        if isinstance(item, Mark):
            pending.append(Future())
            pending[-1].set_result(item)
        else:
            pending.append(pool.submit(function, item))
        if len(pending) >= window:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
    if failure:
        raise failure


def start_worker(kind, tokenizer_json, dtype, document_end, examples):
    """Load the tokenizer, once per process."""
    global worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process answers Ctrl-C
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # the processes are the parallelism
    tokenizer = data.Tokenizer(tokenizer_json)
    encode_batch = tokenizers.fast_gpt2(tokenizer) if kind == 'gpt2' else tokenizer.encode_batch
    worker = (
        partial(encode_examples, examples, tokenizer, dtype)
        if examples
        else partial(encode_texts, encode_batch, dtype, document_end)
    )


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)  # killed parents shut no pool down


def encode(batch):
    """In a worker: the batch with tokens instead of texts."""
    worker(batch)
    batch.texts = batch.last = None
    return batch


def encode_texts(encode_batch, dtype, document_end, batch):
    parts = []
    for row, last in zip(encode_batch(batch.texts), batch.last):
        parts += [np.asarray(row, dtype), np.asarray(document_end * last, dtype)]
    batch.tokens = np.concatenate(parts)
    lengths = np.array([len(part) for part in parts], np.int64).reshape(-1, 2).sum(1)
    batch.ends = lengths.cumsum()[np.array(batch.last)]
    batch.bytes = sum(len(text.encode()) for text in batch.texts)


def encode_examples(examples, tokenizer, dtype, batch):
    rows, masks = [], []
    for document in batch.texts:
        ids, trained, fate = examples.encode(tokenizer, document)
        batch.fates[fate] += 1
        if ids:
            rows.append(ids)
            masks.append(trained)
            batch.bytes += len(examples.text(document).encode())
    batch.tokens = np.fromiter(chain.from_iterable(rows), dtype)
    batch.masks = np.fromiter(chain.from_iterable(masks), np.uint8)
    batch.ends = np.cumsum([len(row) for row in rows], dtype=np.int64)


# ---------------------------------------------------------------------------- config.json and the last word


def token_dtype(tokenizer):
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


def describe(target, source, arguments, tokenizer, splits, corpus):
    ids = tokenizer.endoftext_id, tokenizer.mask_id, tokenizer.ignore_id
    opening = tokenizer.encode(corpus.opening) if corpus.single else ids[:1]
    return {
        'format': FORMAT,
        'name': target.name,
        'source': source.name,
        'arguments': arguments,
        'inputs': source.inputs,
        'vocab_size': tokenizer.vocab_size,
        'dtype': token_dtype(tokenizer).name,
        'special_ids': dict(zip(data.SPECIAL_TOKENS, ids)),
        'splits': {
            name: {'tokens': split.tokens, 'documents': split.documents, 'bytes': split.bytes}
            for name, split in splits.items()
        },
        'blank': corpus.blank,
        'skipped': corpus.skipped,
        **({'max_seq_len': arguments['max_seq_len']} if 'max_seq_len' in arguments else {}),
        'prompt_format': None,
        'start_token': opening[0] if len(opening) == 1 else ids[0],
        **(source.examples.settings if source.examples else {}),
    }


def floor(split):
    """What no model can beat on this split but by chance: the true distribution's own loss."""
    return {
        'nats_per_token': split.nats / split.tokens,
        'nats_per_byte': split.nats / split.bytes,
        'bits_per_byte': split.nats / split.bytes / math.log(2),
        'nats_per_story': split.nats / split.documents,
    }


def report(target, finished, remarks=''):
    train, val = finished['splits']['train'], finished['splits']['val']
    tokens, blank, skipped = train['tokens'] + val['tokens'], finished.get('blank'), finished.get('skipped')
    remarks = ', '.join(
        filter(
            None,
            [
                f'{blank} blank documents left out' * bool(blank),
                f'{skipped} that could not be read left out' * bool(skipped),
                remarks,
            ],
        )
    )
    print(
        f'{shown(target)}: {train["documents"]:,} + {val["documents"]:,} documents, '
        f'{train["tokens"]:,} + {val["tokens"]:,} tokens (training + validation), '
        f'{(train["bytes"] + val["bytes"]) / tokens:.2f} bytes per token, '
        f'vocabulary {finished["vocab_size"]:,}' + f', {remarks}' * bool(remarks)
    )
    dataset = target.name if target == ROOT / 'data' / target.name else target
    script = 'finetune.py --init_from=CHECKPOINT' if 'examples' in finished else 'train.py'
    print(f'next: python {script} --dataset={dataset}')
