"""The one writer of prepared folders: documents in, flat token ids out, ready to be memory-mapped.

The main process reads, worker processes encode, and results are written in the order of the source, so that memory
stays flat and the number of workers changes nothing. After each shard a killed run can go on (prepare/folders.py).
"""

import hashlib
import math
import multiprocessing
import os
import shlex
import signal
import threading
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from itertools import product
from pathlib import Path
from unicodedata import normalize

import numpy as np
from tqdm import tqdm

from lm import prompts
from lm.configurator import ROOT, UserError, check_choice, check_range, note, printable, report_idle, require
from lm.files import checksum, save_atomically, sha256_of, write_json
from lm.tokenizer import KINDS, SPECIAL_TOKENS, Tokenizer, build, fast_gpt2, pieces, settings_of
from prepare.examples import OUTCOMES
from prepare.folders import FORMAT, WORK, finished_folder, shown, unfinished_folder
from prepare.readers import Corpus

BATCH = 2**18  # characters that a worker encodes at once
SHARD = 2**22  # characters per worker after which a killed run can go on
SPLITS, UNITS = ('train', 'val'), ('tokens', 'documents', 'bytes')
NOT_CONTENT = 'name output_dir input source num_workers overwrite on_error'.split()


def write(source, config, log_prob=None):
    """Prepare `source` with the settings of a prepare script; return what the folder's config.json holds. Where the
    documents' true `log_prob(text)`, in nats, is known, the loss that no model can beat is recorded too."""
    check_settings(config)
    if 'field' in config and all(name.lower().endswith('.txt') for name in source.inputs):
        report_idle(config, 'on .txt files', 'field')
        config['field'] = 'text'  # as where none is given
    target = target_folder(config)
    if source.where and not config['overwrite']:
        stay_at_revision(source, target)
    given, *_ = model_at(config['tokenizer'])
    command = {'format': FORMAT, 'arguments': content_arguments(config, given), 'inputs': source.inputs}
    if finished := finished_folder(target, command, config['overwrite']):
        print(f'{shown(target)} is prepared already, with the same settings from the same input.')
        report(target, finished, config)
        return finished

    with unfinished_folder(target, command, config['overwrite']) as journal:
        corpus = Corpus(source, config['val_fraction'], config.get('on_error'))
        path = journal.folder / 'tokenizer.json'
        if not journal.state:
            if given:
                with suppress(UserError):  # a character vocabulary says itself what it lacks, of each example
                    check_spelling(given, ''.join(corpus.sample(0.1)))
            made = given or make_tokenizer(corpus, config)
            save_atomically(path, lambda file: file.write(made.to_json().encode()))
        tokenizer = given or Tokenizer(path.read_text(encoding='utf-8'), path)
        counts = encode_corpus(corpus, tokenizer, config, journal)
        finished = describe(target, command, tokenizer, counts, corpus)
        if empty := [split for split in SPLITS if not counts[split]['tokens']]:
            journal.state = None  # with these settings there is nothing to go on with
            found = finished.get('examples') or finished['splits']
            problem = f'The {empty[0]} split is empty at val_fraction={config["val_fraction"]} of {found}'
            raise UserError(f'{problem}; give a val_fraction nearer to 0.5, or more text.')
        if log_prob:
            nats, val = -sum(map(log_prob, corpus.texts_of('val'))), counts['val']
            floor = {f'nats_per_{unit}': nats / val[f'{unit}s'] for unit in ('token', 'byte')}
            floor['bits_per_byte'] = floor['nats_per_byte'] / math.log(2)
            finished['floor'] = {**floor, 'nats_per_story': nats / val['documents']}
        paths = sorted([*journal.folder.glob('*.bin'), path])
        finished['sha256'] = {path.name: sha256_of(path) for path in paths}
        finished['checksum'] = checksum(finished)
        write_json(journal.folder / 'config.json', finished)
    report(target, finished, config)
    return finished


def check_settings(config):
    kind = config['tokenizer']
    check_range(config, 0, math.inf, *{'num_workers', 'max_seq_len'} & set(config))
    check_range(config, 0, 1, 'val_fraction')
    require(config['val_fraction'], 'val_fraction is 0, so nothing could be evaluated; give a share above 0.')
    check_range(config, 0.001, math.inf, 'tokenizer_sample_mb')
    if 'on_error' in config:
        check_choice(config, 'on_error', ('stop', 'skip'))
    if kind == 'bpe':
        check_range(config, 256 + len(SPECIAL_TOKENS), math.inf, 'vocab_size')
    for key in config.given & {'vocab_size', 'tokenizer_sample_mb'} if kind != 'bpe' else ():
        raise UserError(f'{key}={config[key]} has no effect with tokenizer={kind}; leave it out.')


def stay_at_revision(source, target):
    """Read a data set of the hub at the revision that the folder was begun with, though there is a newer one."""
    partial = target.with_name(f'.{target.name}.partial') / WORK
    begun = (settings_of(partial, 'journal.json') or settings_of(target, 'config.json')).get('inputs', {})
    if begun.keys() == source.inputs.keys() and begun != source.inputs:
        source.inputs, [source.where['revision']] = begun, begun.values()
        note(f'{source.name} has changed since; --overwrite takes what is new into {shown(target)}.')


def check_spelling(tokenizer, text):
    """Report where a tokenizer loses or changes more of a text than its spaces."""
    both = text, tokenizer.decode(tokenizer.encode(text))
    told, found = (normalize('NFC', ''.join(x.split())) for x in both)
    if told != found:
        i = len(os.path.commonprefix([told, found]))
        problem = f'This tokenizer makes {found[i : i + 20]!r} of {told[i : i + 20]!r}'
        note(f'{problem}: what it leaves out or changes is not learned, and bits per byte are too low.')


def target_folder(config):
    name = config['name']
    if config['output_dir']:
        report_idle(config, 'beside output_dir', 'name')
        return Path(config['output_dir']).expanduser().resolve()
    is_plain = name and Path(name).name == name and name[0] != '.' and not set(name) & set('*?[]:,')
    require(is_plain, f'name={name} does not name a folder under data/; give a plain name, or output_dir.')
    return (ROOT / 'data' / name).resolve()  # where a link leads to


def content_arguments(config, given):
    """Return the settings that decide the content of the files, as config.json records them; given: the Tokenizer of a
    path."""
    omitted = {*NOT_CONTENT, *(key for key in ('max_seq_len', 'hub') if not config.get(key))}
    omitted |= set() if config['tokenizer'] == 'bpe' else {'vocab_size', 'tokenizer_sample_mb'}
    arguments = {key: value for key, value in config.items() if key not in omitted}
    if given:  # by content, because a path may come to hold something else
        arguments['tokenizer'] = 'sha256:' + hashlib.sha256(given.to_json().encode()).hexdigest()
        if given.start_id != given.endoftext_id:  # what stands before a text
            arguments['start_token'] = given.start_id
    return arguments


def make_tokenizer(corpus, config):
    kind, texts = config['tokenizer'], map(corpus.as_text, corpus.texts())
    texts = corpus.sample(config['tokenizer_sample_mb']) if kind == 'bpe' else texts
    return build(kind, texts, config['vocab_size'])


def model_at(path):
    """Return the Tokenizer, the block size and the prompt format of a checkpoint, a folder or a tokenizer.json; None
    for what it does not have, and of KINDS."""
    if path in KINDS:
        return None, None, None
    require(Path(path).exists(), f'tokenizer={path} is none of {", ".join(KINDS)}, nor a path; correct it.')
    if Path(path).suffix == '.pt' or (Path(path) / 'ckpt.pt').is_file():
        from lm import checkpoints  # imports torch, which takes seconds

        checkpoint = checkpoints.load(path, mmap=True)
        tokenizer = Tokenizer(checkpoint['tokenizer'], path, start=checkpoint.get('start_token'))
        return tokenizer, checkpoint['model_config']['block_size'], checkpoint.get('prompt_format')
    c, block_size = settings_of(Path(path), 'config.json'), None
    if 'model_type' in c:
        from lm import families  # imports torch too

        with suppress(UserError):  # where only its tokenizer can be used
            block_size = (c.get('model_config') or families.config_from_hf(c, path))['block_size']
    return Tokenizer.load(path), block_size, prompts.template_of(Path(path))


def encode_corpus(corpus, tokenizer, config, journal):
    """Write the files of tokens, index and, of examples, masks; return the counts of each split."""
    has_affinity = hasattr(os, 'sched_getaffinity')  # Linux; a Slurm job may use some cores of its node
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
    source, num_workers = corpus.source, config['num_workers'] or cores
    state = journal.state or {'source': None, 'counts': {}, 'sizes': {}}
    counts, sizes = {split: Counter(state['counts'].get(split)) for split in SPLITS}, dict(state['sizes'])
    kinds = ('tokens', 'index', 'masks') if source.examples else ('tokens', 'index')
    for split, kind in product(SPLITS, kinds):
        path = journal.folder / f'{split}_{kind}.bin'
        path.touch()
        size, written = path.stat().st_size, sizes.get(path.name, 0)
        problem = f'{path} has {size:,} bytes of {written:,} that were written'
        require(size >= written, f'{problem}; put it back, or begin anew with --overwrite.')
        # What was written after the last finished shard goes; an index begins with the start of document 0.
        os.truncate(path, max(written, 8 if kind == 'index' else 0))

    in_pieces = tokenizer.takes_pieces and not source.examples
    texts = corpus.texts(state['source'])
    setup = config['tokenizer'], tokenizer.to_json(), tokenizer.start_id, corpus.is_single, source.examples
    bar = tqdm(total=source.total, unit=source.unit, unit_scale=True, disable=None)  # on a terminal only
    with bar, ProcessPoolExecutor(num_workers, initializer=start_worker, initargs=setup) as pool:
        try:
            while encoded := list(pool.map(encode, one_shard(corpus, texts, num_workers * SHARD, in_pieces))):
                arrays = defaultdict(list)
                for split, found, added in encoded:
                    found['index'] += np.uint64(counts[split]['tokens'])
                    counts[split].update(added)
                    for kind in kinds:
                        arrays[f'{split}_{kind}.bin'].append(found[kind])
                sizes |= {name: append(journal.folder / name, parts) for name, parts in arrays.items()}
                read = {**corpus.read, 'state': source.state()}  # a copy: reading goes on
                journal.save({'source': read, 'counts': counts, 'sizes': sizes})
                bar.update(corpus.read['amount'] - bar.n)
        except BrokenProcessPool as error:
            problem = f'One of num_workers={num_workers} was killed, as when memory runs out'
            raise UserError(f'{problem}; give fewer, or split long documents.') from error
        finally:
            pool.shutdown(cancel_futures=True)
    return counts


def append(path, arrays):
    """Append arrays to a file, force it onto the disk and return its size in bytes."""
    with open(path, 'ab') as file:
        file.writelines(arrays)
        file.flush()
        os.fsync(file.fileno())
        return file.tell()


def one_shard(corpus, texts, room, in_pieces):
    """Yield (split, [(text, is_last)]) of about BATCH characters, until `room` characters are read."""
    batches, sizes = defaultdict(list), Counter()
    for text in texts:
        for split, part in corpus.parts(text):
            left = len(part)
            for piece in pieces(part) if in_pieces else [part]:
                left -= len(piece)
                batches[split].append((piece, left == 0))
                sizes[split] += len(piece)
                if sizes[split] >= BATCH:
                    yield split, batches.pop(split)
                    del sizes[split]
        room -= len(text)
        if room <= 0:
            break
    yield from batches.items()


def start_worker(*setup):
    global encoder  # one per process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process answers Ctrl-C
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ['TOKENIZERS_PARALLELISM'] = 'false'  # the processes are the parallelism
    encoder = Encoder(*setup)


def end_with_parent():
    multiprocessing.parent_process().join()
    os._exit(1)  # a killed parent does not shut its pool down


def encode(batch):
    split, texts = batch
    return split, *encoder.encode(texts)


class Encoder:
    """Encode texts with one tokenizer; a document ends with <|endoftext|>, unless it is the only one."""

    def __init__(self, kind, tokenizer_json, start_id, is_single, examples):
        self.tokenizer, self.examples = Tokenizer(tokenizer_json, start=start_id), examples
        self.encode_batch = fast_gpt2(self.tokenizer) if kind == 'gpt2' else self.tokenizer.encode_batch
        self.dtype = token_dtype(self.tokenizer)
        self.end = np.array([] if is_single else [self.tokenizer.endoftext_id], self.dtype)

    def encode(self, batch):
        """Return {'tokens', 'index', 'masks': array}, and the counts of tokens, documents, bytes and outcomes."""
        tokens, index, masks, counts = [self.end[:0]], [], [], Counter()
        parts = self.examples_of(batch, counts) if self.examples else self.texts_of(batch)
        for ids, loss_mask, text, is_last in parts:
            tokens.append(ids)
            masks += loss_mask
            counts.update(tokens=len(ids), documents=int(is_last), bytes=len(text.encode()))
            index += [counts['tokens']] * is_last
        tokens = np.concatenate(tokens, dtype=self.dtype, casting='unsafe')
        return dict(tokens=tokens, index=np.array(index, np.uint64), masks=np.array(masks, np.uint8)), counts

    def texts_of(self, batch):
        """Yield (ids, loss mask, text, is_last) of each piece of a text."""
        for ids, (text, is_last) in zip(self.encode_batch([text for text, _ in batch]), batch):
            yield np.append(ids, self.end) if is_last else ids, [], text, is_last

    def examples_of(self, batch, counts):
        """Yield the same of each part of an example that is kept; the outcomes are counted."""
        for document, _ in batch:
            parts, outcome = self.examples.encode(self.tokenizer, document)
            counts[outcome] += 1
            for ids, loss_mask in parts:
                yield ids, loss_mask, self.tokenizer.decode(ids), True


def token_dtype(tokenizer):
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


def describe(target, command, tokenizer, counts, corpus):
    """Return config.json but for what follows from the files."""
    ids, start = (tokenizer.endoftext_id, tokenizer.mask_id, tokenizer.ignore_id), tokenizer.start_id
    opening = tokenizer.encode(corpus.opening) if corpus.is_single and start == ids[0] else [start]
    config = {'format': FORMAT, 'name': target.name, 'source': corpus.source.name, **command}
    config |= {'vocab_size': tokenizer.vocab_size, 'dtype': token_dtype(tokenizer).name}
    config['special_ids'] = dict(zip(SPECIAL_TOKENS, ids))
    config['splits'] = {split: {unit: count[unit] for unit in UNITS} for split, count in counts.items()}
    config |= {key: corpus.read[key] for key in ('blank', 'skipped', 'unread')}
    config |= {key: value for key, value in command['arguments'].items() if key == 'max_seq_len'}
    config |= {'prompt_format': None, 'start_token': opening[0] if len(opening) == 1 else start}
    if examples := corpus.source.examples:
        outcomes, start = counts['train'] + counts['val'], prompts.start_of(examples.form, tokenizer, start)
        config |= {'prompt_format': examples.form, 'start_token': start}
        config['examples'] = {name: outcomes[name] for name in OUTCOMES}
    return config


def report(target, finished, config):
    """Print what the folder holds, and the command that comes next."""
    train, val = finished['splits']['train'], finished['splits']['val']
    sizes = ', '.join(f'{train[unit]:,} + {val[unit]:,} {unit}' for unit in UNITS)
    print(f'{shown(target)}: {sizes} (training + validation), vocabulary {finished["vocab_size"]:,}')
    print(f'left out: {finished["blank"]:,} blank documents, {finished["skipped"]:,} that could not be read')
    script = 'train.py'
    if 'examples' in finished:
        print('examples:', ', '.join(f'{count:,} {name}' for name, count in finished['examples'].items()))
        script = 'finetune.py --init_from=CHECKPOINT'
        unread = Counter(finished.get('unread')).most_common(20)
        fields = ', '.join(f'{printable(name)} ({count:,})' for name, count in unread)
        print('fields that were not read:', fields or 'none')
    dataset = str(target) if config['output_dir'] else config['name']
    print(f'next: python {script} --dataset={shlex.quote(dataset)}')
