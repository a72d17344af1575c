"""Prepared folders: their tokenizer, their memory maps, their batches."""
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tokenizers
import torch

from configurator import UserError

ROOT = Path(__file__).resolve().parent

ENDOFTEXT = '<|endoftext|>'  # ends each document
MASK = '<|mask|>'            # a position that a diffusion model has to fill
IGNORE = '<|ignore|>'        # filler that a bidirectional model predicts and that decodes to nothing
SPECIAL_TOKENS = (ENDOFTEXT, MASK, IGNORE)


# ---------------------------------------------------------------------------- tokenizer

class Tokenizer:
    """Text to token ids and back; the text of a `tokenizer.json` is its whole state.

    The special tokens that the text lacks are appended to its vocabulary. Text that merely
    contains the name of a special token is never encoded as that token.
    """

    def __init__(self, json_text, name='The tokenizer'):
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json_text)
        except Exception as error:  # the library raises nothing narrower
            raise UserError(f'{name} could not be read ({error}); '
                            'give a tokenizer.json in the format of the tokenizers library.') from error
        self._tokenizer.add_special_tokens(
            [token for token in SPECIAL_TOKENS if self._tokenizer.token_to_id(token) is None])
        self._tokenizer.encode_special_tokens = True  # not part of the JSON text: set at every load
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        self.endoftext_id, self.mask_id, self.ignore_id = map(self._tokenizer.token_to_id, SPECIAL_TOKENS)
        # A character vocabulary is the only one that cannot spell every text.
        is_char = isinstance(self._tokenizer.model, tokenizers.models.WordLevel)
        self._characters = set(self._tokenizer.get_vocab(with_added_tokens=False)) if is_char else None

    @classmethod
    def load(cls, path):
        """From a `tokenizer.json` or a folder that holds one."""
        path = Path(path)
        path = path / 'tokenizer.json' if path.is_dir() else path
        if not path.is_file():
            raise UserError(f'There is no tokenizer at {path}; give a tokenizer.json or a prepared folder.')
        return cls(path.read_text(encoding='utf-8', errors='surrogateescape'), path)  # no UTF-8: refused there

    def to_json(self):
        return self._tokenizer.to_str()

    def encode(self, text):
        """Token ids of `text`, with nothing added before or after it."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        if self._characters is not None:
            unknown = sorted(set().union(*texts) - self._characters)
            if unknown:
                raise UserError(f'The character {unknown[0]!r} is not in the vocabulary of this character '
                                'tokenizer; leave it out, or prepare the data with --tokenizer=bytes or bpe.')
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    @property
    def joins_spaces(self):
        """Whether a word's token begins with the space before it."""
        return self._characters is None and len(self.encode(' a')) == 1

    def decode(self, ids):
        """The text of `ids`; special tokens decode to nothing."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)


# ---------------------------------------------------------------------------- prepared folder

class Folder:
    """A prepared folder, checked and opened: `config`, `tokenizer`, and memory maps per split.

    `dataset` is a path, or a name under the repository's data/.
    """

    def __init__(self, dataset):
        self.path = find_folder(dataset)
        try:
            self.config = json.loads((self.path / 'config.json').read_text(encoding='utf-8'))
            dtype, vocab_size, *_ = (self.config[key] for key in (
                'dtype', 'vocab_size', 'name', 'start_token', 'prompt_format'))
            dtype = np.dtype(dtype)
            self.splits = {split: {unit: self.config['splits'][split][unit]
                                   for unit in ('tokens', 'documents', 'bytes')} for split in ('train', 'val')}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f'{self.path}/config.json is damaged ({error!r}); prepare the folder again.') from error
        self.tokenizer = Tokenizer.load(self.path)
        if self.tokenizer.vocab_size != vocab_size:
            raise UserError(f'{self.path}: tokenizer.json has {self.tokenizer.vocab_size} tokens, config.json says '
                            f'{vocab_size}; prepare the folder again.')
        self.tokens = {split: self.open(f'{split}_tokens.bin', dtype, sizes['tokens'])
                       for split, sizes in self.splits.items()}
        self.index = {split: self.open(f'{split}_index.bin', np.dtype('uint64'), sizes['documents'] + 1)
                      for split, sizes in self.splits.items()}
        self.masks = {split: self.open(f'{split}_masks.bin', np.dtype('uint8'), sizes['tokens'])
                      if (self.path / f'{split}_masks.bin').exists() else None
                      for split, sizes in self.splits.items()}

    def open(self, name, dtype, length):
        """A memory map of the file `name`, which has to hold `length` numbers."""
        path = self.path / name
        size, expected = path.stat().st_size if path.exists() else 0, length * dtype.itemsize
        if size != expected:
            raise UserError(f'{path} has {size:,} bytes where config.json promises {expected:,}; '
                            'the folder is incomplete: prepare it again with --overwrite.')
        return np.memmap(path, dtype, mode='r') if length else np.zeros(0, dtype)

    @property
    def fingerprint(self):
        """What tells this training split from another, recorded when it was prepared."""
        return self.config.get('sha256', {}).get('train_tokens.bin')

    def tokens_per_byte(self, split):
        """Stored tokens, <|endoftext|> included, per UTF-8 byte of text: nats per token to nats per byte."""
        return self.splits[split]['tokens'] / max(1, self.splits[split]['bytes'])


def find_folder(dataset):
    for path in (Path(dataset), ROOT / 'data' / dataset):
        if (path / 'config.json').is_file():
            return path
        if path.is_dir() and any(path.glob('*_tokens.bin')):
            raise UserError(f'{path} has no config.json, so its preparation did not finish; prepare it again.')
    raise UserError(f'There is no prepared data at {dataset!r} or {ROOT / "data" / dataset}; make it first, '
                    'for example with: python prepare/stories.py')


# ---------------------------------------------------------------------------- numbers from keys

def random_bits(*key):
    """64 random bits for each element of the broadcast integer arrays `key`, by their values alone.

    A counter-based generator: splitmix64's finaliser (Steele et al. 2014) chained over the key.
    """
    bits = np.uint64(0)
    with np.errstate(over='ignore'):  # arithmetic modulo 2**64 is the point
        for part in key:
            bits = (bits ^ np.asarray(part).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            bits = bits ^ (bits >> np.uint64(31))
    return bits


def uniform(*key):
    """Uniform float32 numbers in [0, 1), of the shape that the key's parts broadcast to."""
    return (random_bits(*key) >> np.uint64(40)).astype(np.float32) * np.float32(2 ** -24)


def permuted(index, size, *key):
    """Where a random permutation of range(size), named by `key`, sends each `index`; no array of that size.

    A four-round Feistel network over the next even power of two, walked until it lands below `size`.
    """
    index = np.array(index, dtype=np.uint64)
    half = np.uint64(max(1, (max(1, size - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    outside = np.ones(index.shape, dtype=bool)
    while outside.any():
        left, right = index[outside] >> half, index[outside] & low
        for turn in range(4):
            left, right = right, left ^ (random_bits(*key, turn, right) & low)
        index[outside] = left << half | right
        outside = index >= np.uint64(size)
    return index.astype(np.int64)


# ---------------------------------------------------------------------------- rows

class PackedRows:
    """Windows of the token stream, `row_length` tokens each, every `stride` tokens.

    Training leaves one window out and moves the others by a random start, another one in each epoch, so that
    their borders are not always the same. Evaluation covers the split: its last window ends where the split
    ends, and what it shares with the window before is context.
    """

    def __init__(self, folder, split, row_length, stride, training):
        self.tokens, self.index, self.masks = folder.tokens[split], folder.index[split], folder.masks[split]
        self.row_length, self.stride, self.training = row_length, stride, training
        spare = len(self.tokens) - row_length
        if spare < 0:
            raise UserError(f'The {split} split of {folder.path} has {len(self.tokens):,} tokens, fewer than one '
                            f'row of {row_length}; choose a smaller block_size or prepare more data.')
        self.num_rows = max(1, spare // stride) if training else 1 + -(-spare // stride)
        self.spare = spare - (self.num_rows - 1) * stride  # how far training windows can move

    def read(self, row, key):
        """Tokens (row_length,) of a row, and where the model is trained on them (None: everywhere)."""
        start = int(row) * self.stride
        if self.training:
            start += int(random_bits(*key) % np.uint64(self.spare + 1))
        moved_back = max(0, start + self.row_length - len(self.tokens))
        part = slice(start - moved_back, start - moved_back + self.row_length)
        trained = None if self.masks is None else self.masks[part].copy()
        if moved_back:
            trained = np.ones(self.row_length, np.uint8) if trained is None else trained
            trained[:moved_back + self.row_length - self.stride] = 0
        return self.tokens[part], trained

    def documents(self, row):
        """Numbers (row_length,) of the documents that an evaluation row's tokens belong to."""
        start = min(int(row) * self.stride, len(self.tokens) - self.row_length)
        places = np.arange(start, start + self.row_length, dtype=self.index.dtype)
        return np.searchsorted(self.index, places, side='right') - 1


class DocumentRows:
    """One document per row: <|endoftext|> as context, its tokens, its end, then <|ignore|> to the row's end.

    A document that is too long continues in the next row, after the token before. A bidirectional model is
    trained on the filler (it has to say where the text ends); for `ar` the filler lies outside the loss.
    """

    def __init__(self, folder, split, row_length, train_on_filler):
        self.tokens, self.index, self.masks = folder.tokens[split], folder.index[split], folder.masks[split]
        self.row_length, self.train_on_filler = row_length, train_on_filler
        self.tokenizer = folder.tokenizer
        lengths = np.diff(self.index).astype(np.int64)
        self.first_row = np.concatenate([[0], np.cumsum(-(-lengths // (row_length - 1)))])
        self.num_rows = int(self.first_row[-1])
        if self.num_rows == 0:
            raise UserError(f'The {split} split of {folder.path} holds no document; prepare more data.')

    def read(self, row, key=None):
        document = np.searchsorted(self.first_row, row, side='right') - 1
        start = int(self.index[document]) + int(row - self.first_row[document]) * (self.row_length - 1)
        end = min(start + self.row_length - 1, int(self.index[document + 1]))
        tokens = np.full(self.row_length, self.tokenizer.ignore_id, dtype=np.int64)
        tokens[0] = self.tokens[start - 1] if start > 0 else self.tokenizer.endoftext_id
        tokens[1:1 + end - start] = self.tokens[start:end]
        trained = np.full(self.row_length, self.train_on_filler, dtype=np.uint8)
        trained[1:1 + end - start] = 1 if self.masks is None else self.masks[start:end]
        return tokens, trained

    def documents(self, row):
        """Numbers (row_length,) of the document that a row belongs to, once per token."""
        return np.full(self.row_length, np.searchsorted(self.first_row, row, side='right') - 1)


def make_rows(folder, split, architecture, block_size, mode, training):
    """Rows for an architecture: `ar` reads one token more, so that it predicts block_size tokens."""
    row_length = block_size + (architecture == 'ar')
    if mode == 'packed':
        return PackedRows(folder, split, row_length, block_size, training)
    if mode == 'documents':
        return DocumentRows(folder, split, row_length, train_on_filler=architecture != 'ar')
    raise UserError(f"mode is {mode!r}; choose 'packed' or 'documents'.")


# ---------------------------------------------------------------------------- batches

PERMUTE, MOVE, LEVEL, NOISE = range(4)  # what a random number is for: the first part of its key


class Batches:
    """Batches of training rows as a pure function of the step, so that there is no state to save.

    Row r of global step s, and its noise, depend on (seed, s, r) only, r counted over all ranks and
    micro-steps. Every row comes once per epoch.
    """

    def __init__(self, folder, architecture, block_size, batch_size, gradient_accumulation_steps=1, seed=0,
                 mode='packed', rank=0, world_size=1, device='cpu'):
        self.rows = make_rows(folder, 'train', architecture, block_size, mode, training=True)
        self.ignore_id = folder.tokenizer.ignore_id
        self.needs_noise = architecture != 'ar'
        self.batch_size, self.micro_steps, self.seed = batch_size, gradient_accumulation_steps, seed
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self.rows_per_step = batch_size * gradient_accumulation_steps * world_size
        self.worker, self.coming = ThreadPoolExecutor(1), {}

    def epoch(self, step):
        """Passes over the data that `step` steps make."""
        return step * self.rows_per_step / self.rows.num_rows

    def get(self, step):
        """This rank's micro-batches of a global step, and how many tokens of all ranks' rows carry the loss.

        A micro-batch is tokens (B, row_length), loss_mask (B, row_length) or None, noise (B, 1 + row_length)
        or None, on the device. The next step's are read while the caller computes.
        """
        batch = self.coming.pop(step, None) or self.worker.submit(self.read, step)
        self.coming = {step + 1: self.worker.submit(self.read, step + 1)}
        micro_batches, count = batch.result()
        return [to_device(micro_batch, self.device) for micro_batch in micro_batches], count

    def read(self, step):
        places = np.arange(self.rows_per_step).reshape(self.micro_steps, self.world_size, -1)
        mine = places[:, self.rank]  # (micro_steps, batch_size)
        rows = {place: self.row(step * self.rows_per_step + place) for place in mine.flat}
        if any(trained is not None for _, trained in rows.values()):  # what others train on is part of the count
            everyone = (rows.get(place) or self.row(step * self.rows_per_step + place) for place in places.flat)
            count = max(1, sum(map(self.count, everyone)))
        else:
            count = places.size * (self.rows.row_length - 1)
        return [self.micro_batch(step, part, [rows[place] for place in part]) for part in mine], count

    def row(self, number):
        epoch, place = divmod(int(number), self.rows.num_rows)
        row = permuted([place], self.rows.num_rows, PERMUTE, self.seed, epoch)[0]
        return self.rows.read(row, (MOVE, self.seed, epoch))

    def count(self, row):
        """Tokens of a row that the loss is divided by: trained, not its first, not filler."""
        tokens, trained = row
        return int(np.count_nonzero(trained[1:] * (tokens[1:] != self.ignore_id)))

    def micro_batch(self, step, places, rows):
        noise = None
        if self.needs_noise:
            noise = row_noise(places, self.rows_per_step, self.rows.row_length, (self.seed, step))
        return stack(rows, noise, pin=self.device.type == 'cuda')


def evaluation_batches(folder, split, architecture, block_size, batch_size, mode='packed', num_batches=0,
                       rank=0, world_size=1, device='cpu'):
    """This rank's share of a split's rows, with noise of their own: the same rows for any number of ranks.

    num_batches: so many batches of rows, spread over the split; 0: the whole split.
    """
    rows = make_rows(folder, split, architecture, block_size, mode, training=False)
    size = min(rows.num_rows, num_batches * batch_size) if num_batches else rows.num_rows
    chosen = np.arange(size) * rows.num_rows // size
    for start in range(rank * batch_size, size, world_size * batch_size):
        places = np.arange(start, min(start + batch_size, size))
        noise = row_noise(places, size, rows.row_length, ()) if architecture != 'ar' else None
        yield to_device(stack([rows.read(row, ()) for row in chosen[places]], noise, pin=False), device)


def row_noise(places, num_places, row_length, key):
    """Uniform numbers (B, 1 + row_length): a level per row, then one number per token.

    Levels are stratified: the rows of a step have one in each interval of width 1/num_places, in random order.
    key: (seed, step), or () in evaluation.
    """
    strata = permuted(places, num_places, LEVEL, *key).astype(np.float64)
    levels = (strata + uniform(NOISE, *key, places, row_length)) / num_places
    tokens = uniform(NOISE, *key, places[:, None], np.arange(row_length))
    return np.concatenate([levels[:, None], tokens], axis=1).astype(np.float32)


def stack(rows, noise, pin):
    """Rows of (tokens, trained or None) as tensors: tokens, loss_mask or None, noise or None."""
    tokens = torch.from_numpy(np.stack([tokens for tokens, _ in rows]).astype(np.int64))
    loss_mask = None
    if any(trained is not None for _, trained in rows):
        everywhere = np.ones(tokens.size(1), np.uint8)
        loss_mask = torch.from_numpy(np.stack([everywhere if trained is None else trained for _, trained in rows]))
    batch = tokens, loss_mask, None if noise is None else torch.from_numpy(noise)
    return tuple(x.pin_memory() if pin and x is not None else x for x in batch)


def to_device(batch, device):
    return tuple(None if x is None else x.to(device, non_blocking=True) for x in batch)
