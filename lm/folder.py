"""Prepared folders: their settings, tokenizer and memory maps, and mixes of several."""

import hashlib
import json
import mmap
import os
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np

from lm.configurator import ROOT, UserError, require
from lm.files import checksum, lock, sha256_of
from lm.tokenizer import Tokenizer, settings_of


class Folder:
    """A prepared folder, by its path or its name under data/: `config`, `tokenizer`, and memory maps per split."""

    train_on_prompt = False  # of instructions: whether the loss is on all of an example, as finetune.py says

    def __init__(self, dataset):
        self.path = find_folder(dataset)
        try:
            self.config = json.loads((self.path / 'config.json').read_text(encoding='utf-8'))
            keys = 'dtype vocab_size name start_token prompt_format'.split()
            dtype, vocab_size, *_ = (self.config[key] for key in keys)
            dtype = np.dtype(dtype)
            sizes, units = self.config['splits'], ('tokens', 'documents', 'bytes')
            self.splits = {split: {unit: sizes[split][unit] for unit in units} for split in ('train', 'val')}
            self.fingerprint = dict(self.config.get('sha256') or {})  # {file: hash} when it was prepared
        except (ValueError, KeyError, TypeError) as error:
            problem = f'{self.path}/config.json is damaged ({error!r})'
            raise UserError(f'{problem}; move the folder away, and prepare it again.') from error
        self.tokenizer = Tokenizer.load(self.path)
        size = self.tokenizer.vocab_size
        fits = f'tokenizer.json has {size} tokens, config.json says {vocab_size}'
        require(size == vocab_size, f'{self.path}: {fits}; prepare the folder again.')
        self.tokens, self.index, self.masks = {}, {}, {}
        for split, sizes in self.splits.items():
            self.tokens[split] = self.open(f'{split}_tokens.bin', dtype, sizes['tokens'])
            self.index[split] = self.open(f'{split}_index.bin', np.dtype('uint64'), sizes['documents'] + 1)
            masks = f'{split}_masks.bin'
            exists = masks in self.fingerprint or (self.path / masks).exists()
            self.masks[split] = self.open(masks, np.dtype('uint8'), sizes['tokens']) if exists else None

    def open(self, name, dtype, length):
        """Map the file `name` into memory, which has to hold `length` numbers."""
        path = self.path / name
        size, expected = path.stat().st_size if path.exists() else 0, length * dtype.itemsize
        remedy = 'prepare the folder again with --overwrite'
        require(size == expected, f'{path} has {size:,} bytes, config.json says {expected:,}; {remedy}.')
        return np.memmap(path, dtype, mode='r') if length else np.zeros(0, dtype)

    def limit(self, size):
        """Leave out all training tokens but the first `size`."""
        tokens, index = self.tokens['train'], self.index['train']
        problem = f'unique_tokens is {size:,}; {self.path} has {len(tokens):,} for training'
        require(0 < size <= len(tokens), f'{problem}.')
        self.tokens['train'] = np.asarray(tokens[:size])
        self.index['train'] = np.append(index[index < size], index.dtype.type(size))
        if self.masks['train'] is not None:
            self.masks['train'] = np.asarray(self.masks['train'][:size])

    def release(self):
        """Give back the pages that were read: else the process would seem to grow to the size of its data."""
        for array in (*self.tokens.values(), *self.index.values(), *self.masks.values()):
            if isinstance(array, np.memmap) and hasattr(mmap, 'MADV_DONTNEED'):
                array.base.madvise(mmap.MADV_DONTNEED)

    def counted_tokens_per_byte(self, split):
        """Compute tokens, <|endoftext|> included unless it is the padding, per UTF-8 byte of text where the loss is;
        None for no text."""
        sizes, padding = self.splits[split], self.tokenizer.ignore_id
        if self.masks[split] is None:
            ends = sizes['documents'] if padding == self.tokenizer.endoftext_id else 0
            return (sizes['tokens'] - ends) / max(1, sizes['bytes'])
        counted = self.tokens[split][(self.masks[split] == 1) | self.train_on_prompt]
        counted = counted[counted != padding]
        text = self.tokenizer.decode(counted)
        return len(counted) / len(text.encode()) if text else None


def version_of(folder):
    """Return eight digits that other data, or the same by another tokenizer, would not have."""
    return checksum(folder.fingerprint)[:8]


def prepared(source, field, max_seq_len, tokenizer):
    """Return a prepared folder as it is; of files or of a data set of the hub, the one that prepare/instruct.py makes.

    tokenizer: returns what `--tokenizer` takes.
    """
    near, below = Path(source), ROOT / 'data' / source
    is_hub_id = source.count('/') == 1 and not near.parent.is_dir() and not below.parent.is_dir()
    if near.is_dir() or below.is_dir() or not (near.is_file() or is_hub_id):
        return source
    settings = dict(source=source, field=field, max_seq_len=max_seq_len, tokenizer=tokenizer())
    words = [f'--{key}={value}' for key, value in settings.items() if value]
    base = Path(settings['tokenizer'] or os.devnull)  # trained again, it is another one
    files = [base] if base.is_file() else sorted(base.glob('*'))
    times = [(path.name, path.stat().st_mtime_ns) for path in files]
    content = repr(['rows of 1024', *words, times, sha256_of(near) if near.is_file() else ''])
    version = hashlib.sha256(content.encode()).hexdigest()[:8]
    target = ROOT / 'data' / f'{near.stem.partition(":")[0]}-{version}'
    finished = target / 'config.json'
    while os.environ.get('LOCAL_RANK', '0') != '0' and not finished.is_file():
        time.sleep(1)  # a machine's first rank prepares; where that fails, torchrun ends all
    if not finished.is_file():
        script = [sys.executable, ROOT / 'prepare' / 'instruct.py', f'--output_dir={target}', *words]
        with lock(target.parent, f'.{target.name}.lock', wait=True):  # of a sweep's runs the first prepares
            done = finished.is_file() or subprocess.run(script).returncode == 0
        remedy = f'do it by prepare/instruct.py --source={source} with what it asks for, and give that folder'
        require(done, f'{source} could not be prepared, as said above; {remedy}.')
    return str(target)


def is_of(folder, source):
    """Say whether the prepared folder at a path was made of this file, or of this data set of the hub."""
    path = Path(folder) if Path(folder).is_dir() else ROOT / 'data' / folder
    made_of = settings_of(path, 'config.json').get('source') or ''
    return made_of.removeprefix('https://huggingface.co/datasets/') in (source, source.replace(':', '/'))


def find_folder(dataset):
    is_mix = ',' in str(dataset) and not os.path.exists(dataset)
    require(not is_mix, f'{dataset!r} mixes folders, which is for train.py; name one of them with --dataset.')
    for path in (Path(dataset), ROOT / 'data' / dataset):
        if (path / 'config.json').is_file():
            return path
        lost = any(path.glob('*_tokens.bin'))
        require(not lost, f'{path} has no config.json: move it away, and prepare it again.')
    remedy = 'make it first, for example with: python prepare/stories.py'
    places = f'{dataset!r} in {Path.cwd()} or at {ROOT / "data" / dataset}'
    raise UserError(f'There is no prepared data at {places}; {remedy}')


class Mix:
    """Several folders of one tokenizer, NAME:WEIGHT,NAME:WEIGHT: rows are drawn in proportion to these weights."""

    def __init__(self, dataset):
        names, weights = zip(*(parse_weight(part.strip(), dataset) for part in dataset.split(',')))
        self.path, self.folders = dataset, [Folder(name) for name in names]
        self.weights = [weight / sum(weights) for weight in weights]
        unique = len({folder.path.resolve() for folder in self.folders}) == len(names)
        require(unique, f'dataset={dataset} names a folder twice; give it once, with the sum of its weights.')
        first = self.folders[0]
        self.tokenizer, self.fingerprint = first.tokenizer, {}
        for number, folder in enumerate(self.folders, 1):
            same = folder.tokenizer.to_json() == first.tokenizer.to_json()
            remedy = f'prepare the second with --tokenizer={first.path}'
            sizes = f'{first.tokenizer.vocab_size} and {folder.tokenizer.vocab_size} tokens'
            require(same, f'{first.path}, {folder.path} have different tokenizers, of {sizes}; {remedy}.')
            hashes = folder.fingerprint.items()
            self.fingerprint |= {f'{number}-{folder.path.name}/{file}': x for file, x in hashes}
        configs = [folder.config for folder in self.folders]
        self.config = {
            'name': '+'.join(config['name'] for config in configs),
            'start_token': first.config['start_token'],
            'prompt_format': next(filter(None, (config['prompt_format'] for config in configs)), None),
            'max_seq_len': max(config.get('max_seq_len') or 0 for config in configs),
        }

    def release(self):
        for folder in self.folders:
            folder.release()


def parse_weight(part, dataset):
    """Split NAME:WEIGHT into the name and a Fraction."""
    name, _, number = part.rpartition(':')
    try:
        weight = Fraction(number)
    except (ValueError, ZeroDivisionError):
        weight = 0
    remedy = 'write NAME:WEIGHT,NAME:WEIGHT, as in openwebtext:0.7,tinystories:0.3'
    require(name and weight > 0, f'{part!r} in dataset={dataset} has no weight above 0; {remedy}.')
    return name, weight


def open_dataset(dataset, unique_tokens=0):
    """Open the Folder of a name or path, with its first unique_tokens training tokens, 0 all of them; or the Mix of
    several with their weights."""
    is_folder = any(map(os.path.exists, (dataset, ROOT / 'data' / dataset)))  # of a name of any length
    is_mix = not is_folder and {':', ','} & set(str(dataset))
    require(not (is_mix and unique_tokens), f'unique_tokens={unique_tokens} is of one folder, not of a mix.')
    folder = Mix(dataset) if is_mix else Folder(dataset)
    if unique_tokens:
        folder.limit(unique_tokens)
    return folder
