"""
The one writer of prepared folders: documents in, flat token ids out, ready to be memory-mapped.

    source = files('books.jsonl', field='text')     # or any other Source
    write(source, config)                           # config: the settings of the script

The documents stream past once to teach the tokenizer, where it learns, and once to be encoded: the main
process reads, worker processes encode, and results are written in the order of the source, so that memory
stays flat and the number of workers decides nothing. Everything is written to a hidden folder beside the
target, which takes the target's name when it is complete; a killed run leaves nothing that looks finished.
"""
import contextlib
import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
from configurator import UserError
from prepare import tokenizer as tokenizers

FORMAT = 1
BATCH = 2**18                               # characters that one worker encodes at a time
NOT_CONTENT = ('name', 'output_dir', 'input', 'source', 'num_workers', 'overwrite')   # settings that decide no token


@dataclass
class Source:
    """Where documents come from."""
    name: str
    documents: Callable     # () -> a fresh iterable of (text, amount of the source that it took)
    inputs: dict            # name -> sha256 of what the documents are read from or made by
    total: float            # amount of the whole source, in `unit`s
    unit: str = 'B'
    examples: object = None     # prepare.examples.Examples, where documents are records and no plain text


def write(source, config, log_prob=None):
    """
    Prepare `source` and return the content of the folder's config.json.

    `config` holds the settings of a prepare script: name, output_dir, tokenizer, vocab_size,
    tokenizer_sample_mb, val_fraction, num_workers, overwrite, and any of its own. All that decide the content
    are recorded, and a finished folder is reused only if they and the inputs are the same. `log_prob(text)`,
    in nats, is given where the true distribution of the documents is known: then the floor of the validation
    loss is recorded too. Raises UserError for every mistake of the user's; a folder that was there is then as
    it was.
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
    with replacing(target) as folder:
        corpus = Corpus(source, config['val_fraction'])
        tokenizer = build_tokenizer(corpus, config)
        (folder / 'tokenizer.json').write_text(tokenizer.to_json(), encoding='utf-8')
        splits = encode_corpus(corpus, folder, tokenizer, config, log_prob)
        check_splits(splits, corpus)
        finished = describe(target, source, arguments, tokenizer, splits, corpus)
        if log_prob:
            finished['floor'] = floor(splits['val'])
        if source.examples:
            finished['examples'] = source.examples.describe(splits.values())
        finished['sha256'] = {path.name: sha256_of(path)
                              for path in sorted(folder.iterdir()) if path.name != 'lock'}
        (folder / 'config.json').write_text(json.dumps(finished, indent=2, allow_nan=False) + '\n')
    remarks = [f'{corpus.blank} blank documents left out'] * bool(corpus.blank)
    report(target, finished, ', '.join([*remarks, f'{time.time() - started:.0f} s']))
    return finished


# ---------------------------------------------------------------------------- settings and finished folders

def target_folder(config):
    name, output_dir = config['name'], config['output_dir']
    if output_dir:
        return Path(output_dir).expanduser().resolve()
    if not name or Path(name).name != name or name.startswith('.'):
        raise UserError(f'--name={name or ""} does not name a folder under data/; give a plain name, '
                        'as in --name=books, or a path with --output_dir.')
    return data.ROOT / 'data' / name


def check_settings(config):
    kind, vocab_size, smallest = config['tokenizer'], config['vocab_size'], 256 + len(data.SPECIAL_TOKENS)
    if config['num_workers'] < 0:
        raise UserError(f'--num_workers={config["num_workers"]} is negative; give 0 for one per core.')
    if not 0 < config['val_fraction'] < 1:
        raise UserError(f'--val_fraction={config["val_fraction"]} is not between 0 and 1; 0.1 is usual.')
    if config['tokenizer_sample_mb'] <= 0:
        raise UserError(f'--tokenizer_sample_mb={config["tokenizer_sample_mb"]} leaves nothing to train a '
                        'tokenizer on; give the megabytes of text that it may see.')
    if kind == 'bpe' and vocab_size < smallest:
        raise UserError(f'--vocab_size={vocab_size} is too small; the bytes and the special tokens alone '
                        f'take {smallest}.')
    if kind != 'bpe' and 'vocab_size' in getattr(config, 'given', ()):      # a plain dict knows no `given`
        raise UserError(f'--vocab_size={vocab_size} has no effect with --tokenizer={kind}, whose size is '
                        'what it is; leave it out, or train a tokenizer with --tokenizer=bpe.')


def content_arguments(config):
    """The settings that decide the content of the files, as config.json records them."""
    arguments = {key: value for key, value in config.items() if key not in NOT_CONTENT}
    kind = config['tokenizer']
    if kind != 'bpe':
        del arguments['vocab_size'], arguments['tokenizer_sample_mb']
    if kind not in tokenizers.KINDS:    # by content, because a path may come to hold something else
        json_text = tokenizers.build(kind).to_json()
        arguments['tokenizer'] = f'sha256:{hashlib.sha256(json_text.encode()).hexdigest()}'
    return arguments


def finished_folder(target, arguments, inputs, overwrite):
    """The recorded config of a finished folder that fits; None where one is to be written."""
    restore(target)
    if not target.exists() or target.is_dir() and not any(target.iterdir()):
        return None
    try:
        recorded = json.loads((target / 'config.json').read_text(encoding='utf-8'))
        sizes = {}
        for split, count in recorded['splits'].items():
            sizes[f'{split}_tokens.bin'] = count['tokens'] * np.dtype(recorded['dtype']).itemsize
            sizes[f'{split}_index.bin'] = (count['documents'] + 1) * 8
            if 'examples' in recorded:
                sizes[f'{split}_masks.bin'] = count['tokens']
        differing = differences(recorded, arguments, inputs)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:     # whatever else lies there
        raise UserError(f'{target} exists and is no folder that was prepared here; move it away, '
                        'or choose another --name or --output_dir.') from error
    if overwrite:
        return None
    if differing:
        raise UserError(f'{shown(target)} was prepared otherwise: {"; ".join(differing)}. '
                        'Replace it with --overwrite, or choose another --name.')
    for name, size in sizes.items():
        if not (target / name).is_file() or (target / name).stat().st_size != size:
            raise UserError(f'{target / name} is damaged: it should have {size} bytes. '
                            'Prepare the folder again with --overwrite.')
    return recorded


def differences(recorded, arguments, inputs):
    """What distinguishes the command from the recorded one, in words; inputs are compared by content."""
    before, now = recorded['arguments'], json.loads(json.dumps(arguments))
    words = [f'{key} was {before.get(key)} and is {now.get(key)}'
             for key in now | before if before.get(key) != now.get(key)]
    if recorded['format'] != FORMAT:
        words.append(f'format was {recorded["format"]} and is {FORMAT}')
    if list(recorded['inputs'].values()) != list(inputs.values()):
        gone = [name for name, digest in recorded['inputs'].items() if digest not in inputs.values()]
        new = [name for name, digest in inputs.items() if digest not in recorded['inputs'].values()]
        words.append('the input is not the same' + f' (before: {", ".join(gone)})' * bool(gone)
                     + f' (now: {", ".join(new)})' * bool(new))
    return words


@contextlib.contextmanager
def replacing(target):
    """
    A hidden folder beside `target` that takes its place if the block succeeds and vanishes if it fails.

    What is left of a killed run is cleared away by the next. The lock keeps two runs apart; it is a record
    lock, which ends with this process and is not inherited by the workers.
    """
    folder, old = beside(target, 'partial'), beside(target, 'old')
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / 'lock', 'w') as lock:
            lock_or_refuse(lock, target)
            try:
                for leftover in folder.iterdir():
                    if leftover.name != 'lock':
                        leftover.unlink()
                yield folder
                for path in (*folder.iterdir(), folder):
                    sync(path)
                shutil.rmtree(old, ignore_errors=True)
                if target.exists():
                    target.rename(old)
                folder.rename(target)
                (target / 'lock').unlink()
                shutil.rmtree(old, ignore_errors=True)
                sync(target.parent)
            except BaseException:   # a keyboard interrupt too
                shutil.rmtree(folder, ignore_errors=True)
                restore(target)
                raise
    except OSError as error:
        raise UserError(f'{target} could not be written ({error}); make room, check the permissions, '
                        'or choose another --output_dir.') from error


def beside(target, state):
    return target.with_name(f'.{target.name}.{state}')


def restore(target):
    """Undo half of a replacement: the old folder had made room, the new one had not taken it."""
    old = beside(target, 'old')
    if old.exists() and not target.exists():
        old.rename(target)


def lock_or_refuse(lock, target):
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(f'Another process is preparing {target}; wait for it, '
                        'or choose another --name.') from error


def sync(path):
    """Force a file or folder onto the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path):
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


# ---------------------------------------------------------------------------- documents and their splits

class Corpus:
    """
    The documents of a source, each with its split; blank ones are left out and counted.

    A hash of the text decides the split, so that other documents, workers or orders never move one. A source
    that is one document gives its last `val_fraction` of characters, as nanoGPT does.
    """

    def __init__(self, source, val_fraction):
        self.source, self.val_fraction = source, val_fraction
        first = [text for text, _ in islice(self.texts(), 2)]
        if not first:
            raise UserError(f'There is no text in {source.name}; give files that hold some.')
        self.single = len(first) == 1 and not source.examples
        self.opening = '\n' if '\n' in first[0] else first[0][0]     # a fresh sample of a single document
        self.least_hash = 1.0                                       # a val_fraction above it takes a document

    def texts(self):
        """Yields (text, amount of the source that it took)."""
        self.blank = 0
        for text, amount in self.source.documents():
            if not text or text.isspace():
                self.blank += 1
            else:
                yield text, amount

    def __iter__(self):
        """Yields (split, text, amount of the source that it took)."""
        for text, amount in self.texts():
            if self.single:
                cut = int(len(text) * (1 - self.val_fraction))
                yield 'train', text[:cut], amount
                yield 'val', text[cut:], 0
            else:
                position = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], 'big') / 2**64
                self.least_hash = min(self.least_hash, position)
                yield 'val' if position < self.val_fraction else 'train', text, amount

    def sample(self, megabytes):
        """The training texts, as many as come first."""
        room = megabytes * 1e6
        for split, text, _ in self:
            if split == 'train':
                text = self.source.examples.text(text) if self.source.examples else text
                yield text[:int(room)]
                room -= len(text.encode())
                if room <= 0:
                    return


def build_tokenizer(corpus, config):
    if config['tokenizer'] == 'char':
        as_text = corpus.source.examples.text if corpus.source.examples else str
        return tokenizers.build('char', (as_text(text) for text, _ in corpus.texts()))
    sample = corpus.sample(config['tokenizer_sample_mb'])
    return tokenizers.build(config['tokenizer'], sample, config['vocab_size'])


def check_splits(splits, corpus):
    """An empty split is an error, with the fraction that would do."""
    count, fraction = sum(split.documents for split in splits.values()), corpus.val_fraction
    if all(split.tokens for split in splits.values()):
        return
    if corpus.source.examples and not count:
        raise UserError(corpus.source.examples.nothing_left(splits.values()))
    if corpus.single:
        raise UserError(f'The only document is too short to be split at --val_fraction={fraction}; '
                        'give more text.')
    if not splits['train'].tokens:
        raise UserError(f'All {count} documents fell into the validation split at --val_fraction={fraction}; '
                        'give a smaller one, or more documents.')
    enough = math.floor(corpus.least_hash * 1000 + 1) / 1000
    raise UserError(f'None of the {count} documents fell into the validation split at '
                    f'--val_fraction={fraction}; --val_fraction={enough} takes the first.')


# ---------------------------------------------------------------------------- encoding

@dataclass
class Batch:
    """Pieces of documents of one split on their way to a worker, and their tokens on the way back."""
    split: str
    texts: list = field(default_factory=list)
    last: list = field(default_factory=list)    # whether the piece is the last of its document
    length: int = 0                             # characters
    bytes: int = 0                              # of UTF-8
    amount: float = 0                           # of the source
    nats: float = 0                             # -log p of the documents, where it is known
    tokens: np.ndarray = None                   # of all pieces, document ends included
    ends: np.ndarray = None                     # where in `tokens` documents end
    masks: np.ndarray = None                    # of examples: 1 where the model is trained on a token
    fates: Counter = field(default_factory=Counter)     # of examples: how many were cut, how many left out


class Split:
    """The two growing files of one split."""

    def __init__(self, folder, name, has_masks):
        self.tokens = self.documents = self.bytes = self.nats = 0
        self.token_file = open(folder / f'{name}_tokens.bin', 'wb')
        self.index_file = open(folder / f'{name}_index.bin', 'wb')
        self.index_file.write(np.uint64(0).tobytes())
        self.mask_file = open(folder / f'{name}_masks.bin', 'wb') if has_masks else None
        self.fates = Counter()

    def append(self, batch):
        self.token_file.write(batch.tokens.tobytes())
        self.index_file.write((self.tokens + batch.ends).astype(np.uint64).tobytes())
        if self.mask_file:
            self.mask_file.write(batch.masks.tobytes())
        self.fates += batch.fates
        self.tokens += len(batch.tokens)
        self.documents += len(batch.ends)
        self.bytes += batch.bytes
        self.nats += batch.nats

    def close(self):
        for file in filter(None, (self.token_file, self.index_file, self.mask_file)):
            file.close()


def encode_corpus(corpus, folder, tokenizer, config, log_prob):
    """Write the token and index files; the Split of each name."""
    document_end = [] if corpus.single else [tokenizer.endoftext_id]
    num_workers = config['num_workers'] or os.cpu_count()
    examples = corpus.source.examples
    splits = {name: Split(folder, name, bool(examples)) for name in ('train', 'val')}
    setup = config['tokenizer'], tokenizer.to_json(), token_dtype(tokenizer), document_end, examples
    in_pieces = config['tokenizer'] in tokenizers.KINDS and not examples
    cut = tokenizers.pieces if in_pieces else lambda text: [text]
    bar = tqdm(total=corpus.source.total, unit=corpus.source.unit, unit_scale=True,
               disable=None)    # shown on a terminal only
    with bar, ProcessPoolExecutor(num_workers, initializer=start_worker, initargs=setup) as pool:
        try:
            for batch in in_order(pool, encode, batches(corpus, cut, log_prob), window=3 * num_workers):
                splits[batch.split].append(batch)
                bar.update(batch.amount)
        except BrokenProcessPool as error:
            raise UserError(f'A worker process was killed, as when memory runs out; give fewer than '
                            f'--num_workers={num_workers}.') from error
        finally:
            for split in splits.values():
                split.close()
    return splits


def batches(corpus, cut, log_prob):
    """The corpus in Batches, each of one split, in an order that depends on nothing but the corpus."""
    waiting = {name: Batch(name) for name in ('train', 'val')}
    for split, text, amount in corpus:
        waiting[split].amount += amount
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
    yield from (batch for batch in waiting.values() if batch.texts)


def in_order(pool, function, items, window):
    """pool.map that reads at most `window` items ahead, so that memory stays flat."""
    pending = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) >= window:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def start_worker(kind, tokenizer_json, dtype, document_end, examples):
    """Load the tokenizer, once per process."""
    global worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)                        # the main process answers Ctrl-C
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'                      # the processes are the parallelism
    tokenizer = data.Tokenizer(tokenizer_json)
    encode_batch = tokenizers.fast_gpt2(tokenizer) if kind == 'gpt2' else tokenizer.encode_batch
    worker = (partial(encode_examples, examples, tokenizer, dtype) if examples else
              partial(encode_texts, encode_batch, dtype, document_end))


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)     # killed parents shut no pool down


def encode(batch):
    """In a worker: the batch with tokens instead of texts."""
    worker(batch)
    batch.texts = batch.last = None
    return batch


def encode_texts(encode_batch, dtype, document_end, batch):
    rows = encode_batch(batch.texts)
    for row, last in zip(rows, batch.last):
        row.extend(document_end * last)
    lengths = np.array([len(row) for row in rows], np.int64)
    batch.tokens = np.fromiter(chain.from_iterable(rows), dtype, lengths.sum())
    batch.ends = lengths.cumsum()[np.array(batch.last)]
    batch.bytes = sum(len(text.encode()) for text in batch.texts)


def encode_examples(examples, tokenizer, dtype, batch):
    rows, masks = [], []
    for record in batch.texts:
        ids, trained, fate = examples.encode(tokenizer, record)
        batch.fates[fate] += 1
        if ids:
            rows.append(ids)
            masks.append(trained)
            batch.bytes += len(examples.text(record).encode())
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
        'format': FORMAT, 'name': target.name, 'source': source.name, 'arguments': arguments,
        'inputs': source.inputs, 'vocab_size': tokenizer.vocab_size, 'dtype': token_dtype(tokenizer).name,
        'special_ids': dict(zip(data.SPECIAL_TOKENS, ids)),
        'splits': {name: {'tokens': split.tokens, 'documents': split.documents, 'bytes': split.bytes}
                   for name, split in splits.items()},
        'prompt_format': None, 'start_token': opening[0] if len(opening) == 1 else ids[0],
        **(source.examples.settings if source.examples else {})}


def floor(split):
    """What no model can beat on this split but by chance: the true distribution's own loss."""
    return {'nats_per_token': split.nats / split.tokens,
            'nats_per_byte': split.nats / split.bytes,
            'bits_per_byte': split.nats / split.bytes / math.log(2),
            'nats_per_story': split.nats / split.documents}


def shown(target):
    return target.relative_to(data.ROOT) if target.is_relative_to(data.ROOT) else target


def report(target, finished, remarks=''):
    train, val = finished['splits']['train'], finished['splits']['val']
    tokens = train['tokens'] + val['tokens']
    print(f'{shown(target)}: {train["documents"]:,} + {val["documents"]:,} documents, '
          f'{train["tokens"]:,} + {val["tokens"]:,} tokens (training + validation), '
          f'{(train["bytes"] + val["bytes"]) / tokens:.2f} bytes per token, '
          f'vocabulary {finished["vocab_size"]:,}' + f', {remarks}' * bool(remarks))
    dataset = target.name if target == data.ROOT / 'data' / target.name else target
    script = 'finetune.py --init_from=CHECKPOINT' if 'examples' in finished else 'train.py'
    print(f'next: python {script} --dataset={dataset}')
