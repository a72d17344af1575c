"""The one writer of prepared folders: documents in, flat token ids out, ready to be memory-mapped.

    source = files('books.jsonl', field='text')     # or any other Source
    write(source, config)                           # config: the settings of the script

The documents are read once to train the tokenizer, if it is trained, and once to be encoded: the main process
reads, worker processes encode, and results are written in the order of the source, so that memory stays flat and
the number of workers changes nothing. After each shard of the source a killed run can go on (prepare/folders.py).
"""

import hashlib
import math
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lm.configurator import ROOT, UserError, check_choice, check_range, require
from lm.files import checksum, save_atomically, sha256_of, write_json
from lm.tokenizer import KINDS, SPECIAL_TOKENS, Tokenizer, build, fast_gpt2, pieces
from prepare.folders import FORMAT, finished_folder, shown, unfinished_folder
from prepare.readers import Corpus

BATCH = 2**18  # characters that a worker encodes at once
SHARD = 2**22  # characters per worker after which a killed run can go on
SPLITS = ('train', 'val')
# Settings that decide no token:
NOT_CONTENT = ('name', 'output_dir', 'input', 'source', 'num_workers', 'overwrite', 'on_error')


def write(source, config, log_prob=None):
    """Prepare `source` and return the content of the folder's config.json.

    `config` holds the settings of a prepare script. All that decide the content are recorded, and a finished
    folder is reused only if they and the inputs are the same. `log_prob(text)`, in nats, is given where the true
    distribution of the documents is known: then the loss that no model can beat is recorded too. Raises UserError
    for every mistake of the user's; a folder that was there is then as it was.
    """
    started = time.time()
    check_settings(config)
    target = target_folder(config)
    command = {'format': FORMAT, 'arguments': content_arguments(config), 'inputs': source.inputs}
    finished = finished_folder(target, command, config['overwrite'])
    if finished:
        print(f'{shown(target)} is prepared already, with the same settings from the same input.')
        report(target, finished)
        return finished

    with unfinished_folder(target, command, config['overwrite']) as journal:
        corpus = Corpus(source, config['val_fraction'], config.get('on_error', 'stop'))
        if journal.state:
            tokenizer = Tokenizer.load(journal.folder)
        else:
            tokenizer = make_tokenizer(corpus, config)
            json_text = tokenizer.to_json().encode()
            save_atomically(journal.folder / 'tokenizer.json', lambda file: file.write(json_text))
        counts = encode_corpus(corpus, tokenizer, config, journal)
        if not (counts['train']['tokens'] and counts['val']['tokens']):
            journal.state = None  # with these settings there is nothing to go on with
        outcomes = source.examples.report(counts['train'] + counts['val']) if source.examples else None
        for split in SPLITS:
            problem = f'The {split} split is empty at val_fraction={config["val_fraction"]}'
            require(counts[split]['tokens'], f'{problem}; give another fraction, or more text.')

        finished = describe(target, source, command['arguments'], tokenizer, counts, corpus)
        if log_prob:
            finished['floor'] = floor(counts['val'], -sum(map(log_prob, corpus.texts_of('val'))))
        if outcomes:
            finished['examples'] = outcomes
        paths = sorted([*journal.folder.glob('*.bin'), journal.folder / 'tokenizer.json'])
        finished['sha256'] = {path.name: sha256_of(path) for path in paths}
        finished['checksum'] = checksum(finished)
        write_json(journal.folder / 'config.json', finished)
    report(target, finished, f', {time.time() - started:.0f} s')
    return finished


# ---------------------------------------------------------------------------- settings


def check_settings(config):
    kind, vocab_size, smallest = config['tokenizer'], config['vocab_size'], 256 + len(SPECIAL_TOKENS)
    check_range(config, 0, math.inf, *{'num_workers', 'max_seq_len'} & set(config))
    check_range(config, 0, 1, 'val_fraction')
    check_range(config, 0.001, math.inf, 'tokenizer_sample_mb')
    if 'on_error' in config:
        check_choice(config, 'on_error', ('stop', 'skip'))
    if kind == 'bpe':
        check_range(config, smallest, math.inf, 'vocab_size')  # the bytes and the special tokens
    elif 'vocab_size' in config.given:
        raise UserError(f'vocab_size={vocab_size} has no effect with tokenizer={kind}; leave it out.')


def target_folder(config):
    name, output_dir = config['name'], config['output_dir']
    if output_dir:
        return Path(output_dir).expanduser().resolve()
    is_plain = name and Path(name).name == name and not name.startswith('.')
    require(is_plain, f'name={name} does not name a folder under data/; give a plain name, or output_dir.')
    return ROOT / 'data' / name


def content_arguments(config):
    """Return the settings that decide the content of the files, as config.json records them."""
    arguments = {key: value for key, value in config.items() if key not in NOT_CONTENT}
    if not arguments.get('max_seq_len'):
        arguments.pop('max_seq_len', None)
    if config['tokenizer'] != 'bpe':
        del arguments['vocab_size'], arguments['tokenizer_sample_mb']
    if config['tokenizer'] not in KINDS:  # by content, because a path may come to hold something else
        json_text = load_tokenizer(config['tokenizer']).to_json()
        arguments['tokenizer'] = f'sha256:{hashlib.sha256(json_text.encode()).hexdigest()}'
    return arguments


def make_tokenizer(corpus, config):
    kind = config['tokenizer']
    if kind not in KINDS:
        return load_tokenizer(kind)
    if kind == 'bpe':
        return build(kind, corpus.sample(config['tokenizer_sample_mb']), config['vocab_size'])
    return build(kind, map(corpus.as_text, corpus.texts()))


def load_tokenizer(path):
    """Load the Tokenizer of a tokenizer.json, of a folder that holds one, or of a checkpoint."""
    kinds = ', '.join(KINDS)
    require(
        Path(path).exists(),
        f'tokenizer={path} is none of {kinds}, nor the path of a tokenizer.json, of its folder or of a checkpoint.',
    )
    if is_checkpoint(path):
        from lm import checkpoints  # imports torch, which takes seconds

        return Tokenizer(checkpoints.load(path, mmap=True)['tokenizer'])
    return Tokenizer.load(path)


def is_checkpoint(path):
    return Path(path).suffix == '.pt' or (Path(path) / 'ckpt.pt').is_file()


# ---------------------------------------------------------------------------- encoding


def encode_corpus(corpus, tokenizer, config, journal):
    """Write the files of tokens, index and, of examples, masks; return the counts of each split."""
    source, num_workers = corpus.source, config['num_workers'] or os.cpu_count()
    state = journal.state or {'source': None, 'counts': {'train': {}, 'val': {}}, 'sizes': {}}
    counts, sizes = {split: Counter(state['counts'][split]) for split in SPLITS}, dict(state['sizes'])
    for split in SPLITS:
        for kind in ('tokens', 'index', 'masks') if source.examples else ('tokens', 'index'):
            path = journal.folder / f'{split}_{kind}.bin'
            path.touch()
            # What was written after the last finished shard goes; a new index holds the start of document 0.
            os.truncate(path, sizes.get(path.name, 8 if kind == 'index' else 0))

    in_pieces = config['tokenizer'] in KINDS and not source.examples
    setup = config['tokenizer'], tokenizer.to_json(), not corpus.is_single, source.examples
    bar = tqdm(total=source.total, unit=source.unit, unit_scale=True, disable=None)  # on a terminal only
    with bar, ProcessPoolExecutor(num_workers, initializer=start_worker, initargs=setup) as pool:
        try:
            texts = corpus.texts(state['source'])
            for first in texts:
                shard, arrays = one_shard(chain([first], texts), num_workers * SHARD), defaultdict(list)
                for encoded in pool.map(encode, batches(corpus, shard, in_pieces)):
                    for split, found, added in encoded:
                        found['index'] += np.uint64(counts[split]['tokens'])
                        counts[split].update(added)
                        for kind, array in found.items():
                            arrays[f'{split}_{kind}.bin'].append(array)
                sizes |= {name: append(journal.folder / name, parts) for name, parts in arrays.items()}
                read = {**corpus.read, 'state': source.state()}
                journal.save({'source': read, 'counts': counts, 'sizes': sizes})
                bar.update(corpus.read['amount'] - bar.n)
        except BrokenProcessPool as error:
            raise UserError(
                f'A worker process was killed, as when memory runs out; give fewer than num_workers={num_workers}.'
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)
    return counts


def append(path, arrays):
    """Append arrays to a file, force it onto the disk and return its size in bytes."""
    with open(path, 'ab') as file:
        for array in arrays:
            file.write(array)
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def one_shard(texts, room):
    """Yield texts until there are `room` characters; nothing is read beyond them."""
    for text in texts:
        yield text
        room -= len(text)
        if room <= 0:
            return


def batches(corpus, texts, in_pieces):
    """Yield lists of (split, text, is_last), of about BATCH characters; `in_pieces`: long texts are cut."""
    batch, size = [], 0
    for split, text in chain.from_iterable(map(corpus.parts, texts)):
        *others, last = pieces(text) if in_pieces else [text]
        for piece in [*((split, other, False) for other in others), (split, last, True)]:
            batch.append(piece)
            size += len(piece[1])
            if size >= BATCH:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


# ---------------------------------------------------------------------------- in a worker process


def start_worker(*setup):
    """Load the tokenizer, once per process."""
    global encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process answers Ctrl-C
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # the processes are the parallelism
    encoder = Encoder(*setup)


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)  # a killed parent does not shut its pool down


def encode(batch):
    """Return [(split, {'tokens', 'index', 'masks': array}, counts)] of a batch of (split, text, is_last)."""
    parts = {split: [piece[1:] for piece in batch if piece[0] == split] for split in SPLITS}
    return [(split, *encoder.encode(part)) for split, part in parts.items() if part]


class Encoder:
    """Encode texts with one tokenizer; `with_end`: each document ends with <|endoftext|>."""

    def __init__(self, kind, tokenizer_json, with_end, examples):
        self.tokenizer, self.examples = Tokenizer(tokenizer_json), examples
        self.encode_batch = fast_gpt2(self.tokenizer) if kind == 'gpt2' else self.tokenizer.encode_batch
        self.dtype = token_dtype(self.tokenizer)
        self.end = np.array([self.tokenizer.endoftext_id] if with_end else [], self.dtype)

    def encode(self, batch):
        """Return {'tokens', 'index', 'masks': array}, and the counts of tokens, documents, bytes and outcomes."""
        tokens, index, masks, counts = [self.end[:0]], [], [], Counter()
        for ids, loss_mask, text, is_last in self.rows_of(batch, counts):
            tokens.append(ids)
            masks += loss_mask
            counts.update(tokens=len(ids), documents=int(is_last), bytes=len(text.encode()))
            index += [counts['tokens']] * is_last
        arrays = {'tokens': np.concatenate(tokens), 'index': np.array(index, np.uint64)}
        return arrays | ({'masks': np.array(masks, np.uint8)} if self.examples else {}), counts

    def rows_of(self, batch, counts):
        """Yield (ids, loss mask, text, is_last)."""
        if self.examples:
            for document, _ in batch:
                ids, loss_mask, outcome = self.examples.encode(self.tokenizer, document)
                counts[outcome] += 1
                if ids:
                    yield np.array(ids, self.dtype), loss_mask, self.examples.text(document), True
            return
        for ids, (text, is_last) in zip(self.encode_batch([text for text, _ in batch]), batch):
            ids = np.asarray(ids, self.dtype)
            yield np.append(ids, self.end) if is_last else ids, [], text, is_last


# ---------------------------------------------------------------------------- config.json and what is printed


def token_dtype(tokenizer):
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


def describe(target, source, arguments, tokenizer, counts, corpus):
    """Return config.json but for what follows from the files."""
    ids = tokenizer.endoftext_id, tokenizer.mask_id, tokenizer.ignore_id
    units = 'tokens', 'documents', 'bytes'
    opening = tokenizer.encode(corpus.opening) if corpus.is_single else ids[:1]
    config = {
        'format': FORMAT,
        'name': target.name,
        'source': source.name,
        'arguments': arguments,
        'inputs': source.inputs,
        'vocab_size': tokenizer.vocab_size,
        'dtype': token_dtype(tokenizer).name,
        'special_ids': dict(zip(SPECIAL_TOKENS, ids)),
        'splits': {split: {unit: count[unit] for unit in units} for split, count in counts.items()},
        'blank': corpus.read['blank'],
        'skipped': corpus.read['skipped'],
    }
    if 'max_seq_len' in arguments:
        config['max_seq_len'] = arguments['max_seq_len']
    config |= {'prompt_format': None, 'start_token': opening[0] if len(opening) == 1 else ids[0]}
    return config | (source.examples.settings if source.examples else {})


def floor(counts, nats):
    """Return what no model can beat on a split but by chance: the true distribution's own loss."""
    return {
        'nats_per_token': nats / counts['tokens'],
        'nats_per_byte': nats / counts['bytes'],
        'bits_per_byte': nats / counts['bytes'] / math.log(2),
        'nats_per_story': nats / counts['documents'],
    }


def report(target, finished, remark=''):
    """Print what the folder holds, and the command that comes next."""
    train, val = finished['splits']['train'], finished['splits']['val']
    blank, skipped = finished.get('blank'), finished.get('skipped')
    print(
        f'{shown(target)}: {train["documents"]:,} + {val["documents"]:,} documents, '
        f'{train["tokens"]:,} + {val["tokens"]:,} tokens (training + validation), '
        f'{(train["bytes"] + val["bytes"]) / (train["tokens"] + val["tokens"]):.2f} bytes per token, '
        f'vocabulary {finished["vocab_size"]:,}'
        + (f', {blank} blank documents left out' if blank else '')
        + (f', {skipped} that could not be read left out' if skipped else '')
        + remark
    )
    dataset = target.name if target == ROOT / 'data' / target.name else target
    script = 'finetune.py --init_from=CHECKPOINT' if 'examples' in finished else 'train.py'
    print(f'next: python {script} --dataset={dataset}')
