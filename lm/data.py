"""Prepared folders: their tokenizer, their memory maps, their batches."""

import json
import mmap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from lm import mixing, prompts
from lm.configurator import ROOT, UserError
from lm.rng import BELIEF, FILLER, LEVEL, MOVE, NOISE, OPEN, PERMUTE, permuted, random_bits, uniform
from lm.tokenizer import ENDOFTEXT, IGNORE, MASK, SPECIAL_TOKENS, Tokenizer, end_in, pretrained_token  # noqa: F401, for all to whom a tokenizer is a part of the data
from model import positions_of

# ---------------------------------------------------------------------------- prepared folder


class Folder:
    """A prepared folder, checked and opened: `config`, `tokenizer`, and memory maps per split.

    `dataset` is a path, or a name under the repository's data/.
    """

    def __init__(self, dataset):
        self.path = find_folder(dataset)
        try:
            self.config = json.loads((self.path / 'config.json').read_text(encoding='utf-8'))
            dtype, vocab_size, *_ = (
                self.config[key] for key in ('dtype', 'vocab_size', 'name', 'start_token', 'prompt_format')
            )
            dtype = np.dtype(dtype)
            self.splits = {
                split: {unit: self.config['splits'][split][unit] for unit in ('tokens', 'documents', 'bytes')}
                for split in ('train', 'val')
            }
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'{self.path}/config.json is damaged ({error!r}); prepare the folder again.'
            ) from error
        self.tokenizer = Tokenizer.load(self.path)
        if self.tokenizer.vocab_size != vocab_size:
            raise UserError(
                f'{self.path}: tokenizer.json has {self.tokenizer.vocab_size} tokens, config.json says '
                f'{vocab_size}; prepare the folder again.'
            )
        self.tokens = {
            split: self.open(f'{split}_tokens.bin', dtype, sizes['tokens'])
            for split, sizes in self.splits.items()
        }
        self.index = {
            split: self.open(f'{split}_index.bin', np.dtype('uint64'), sizes['documents'] + 1)
            for split, sizes in self.splits.items()
        }
        self.masks = {
            split: self.open(f'{split}_masks.bin', np.dtype('uint8'), sizes['tokens'])
            if (self.path / f'{split}_masks.bin').exists()
            else None
            for split, sizes in self.splits.items()
        }

    def open(self, name, dtype, length):
        """A memory map of the file `name`, which has to hold `length` numbers."""
        path = self.path / name
        size, expected = path.stat().st_size if path.exists() else 0, length * dtype.itemsize
        if size != expected:
            raise UserError(
                f'{path} has {size:,} bytes where config.json promises {expected:,}; '
                'the folder is incomplete: prepare it again with --overwrite.'
            )
        return np.memmap(path, dtype, mode='r') if length else np.zeros(0, dtype)

    def release(self):
        """Give back the pages that were read: else the process would seem to grow to the size of its data."""
        for array in (*self.tokens.values(), *self.index.values(), *self.masks.values()):
            if isinstance(array, np.memmap) and hasattr(mmap, 'MADV_DONTNEED'):
                array.base.madvise(mmap.MADV_DONTNEED)

    @property
    def fingerprint(self):
        """What tells this training split from another, recorded when it was prepared."""
        return self.config.get('sha256', {}).get('train_tokens.bin')

    def tokens_per_byte(self, split):
        """Stored tokens, <|endoftext|> included, per UTF-8 byte of text: nats per token to nats per byte."""
        return self.splits[split]['tokens'] / max(1, self.splits[split]['bytes'])

    def counted_tokens_per_byte(self, split):
        """The same of what the loss is about: of instruction data its answers. None if they have no text."""
        if self.masks[split] is None:
            return self.tokens_per_byte(split)
        counted = self.tokens[split][self.masks[split] == 1]
        text = self.tokenizer.decode(counted)
        return len(counted) / len(text.encode()) if text else None


def open_dataset(dataset):
    """The Folder of a name or path, or the Mix of several with their weights."""
    is_folder = any(path.exists() for path in (Path(dataset), ROOT / 'data' / dataset))
    if is_folder or not {':', ','} & set(str(dataset)):
        return Folder(dataset)
    names, weights = mixing.parse(dataset)
    return mixing.Mix(dataset, [Folder(name) for name in names], weights)


def find_folder(dataset):
    if ',' in str(dataset) and not Path(dataset).exists():
        raise UserError(f'{dataset!r} mixes folders, which is for train.py; name one of them with --dataset.')
    for path in (Path(dataset), ROOT / 'data' / dataset):
        if (path / 'config.json').is_file():
            return path
        if path.is_dir() and any(path.glob('*_tokens.bin')):
            raise UserError(
                f'{path} has no config.json, so its preparation did not finish; prepare it again.'
            )
    raise UserError(
        f'There is no prepared data at {dataset!r} or {ROOT / "data" / dataset}; make it first, '
        'for example with: python prepare/stories.py'
    )


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
        self.masked = self.masks is not None  # in training: whether read() says where
        spare = len(self.tokens) - row_length
        if spare < 0:
            raise UserError(
                f'The {split} split of {folder.path} has {len(self.tokens):,} tokens, fewer than one '
                f'row of {row_length}; choose a smaller block_size or prepare more data.'
            )
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
            trained[: moved_back + self.row_length - self.stride] = 0
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
    Memory holds one number per BLOCK of documents, not one per document.
    """

    BLOCK = 1024
    masked = True

    def __init__(self, folder, split, row_length, train_on_filler):
        self.tokens, self.index, self.masks = folder.tokens[split], folder.index[split], folder.masks[split]
        self.row_length, self.train_on_filler = row_length, train_on_filler
        self.tokenizer = folder.tokenizer
        self.start_token = (
            folder.tokenizer.endoftext_id if self.masks is None else folder.config['start_token']
        )
        counts = [self.rows_of(start).sum() for start in range(0, len(self.index) - 1, self.BLOCK)]
        self.first_row = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])  # of each block
        self.num_rows = int(self.first_row[-1])
        if self.num_rows == 0:
            raise UserError(f'The {split} split of {folder.path} holds no document; prepare more data.')

    def rows_of(self, start):
        """How many rows each document takes, of the block that begins with document `start`."""
        lengths = np.diff(self.index[start : start + self.BLOCK + 1]).astype(np.int64)
        return -(-lengths // (self.row_length - 1))

    def find(self, row):
        """The document that a row belongs to, and which of its rows it is."""
        block = int(np.searchsorted(self.first_row, row, side='right')) - 1
        ends = np.cumsum(self.rows_of(block * self.BLOCK))
        row = int(row - self.first_row[block])
        number = int(np.searchsorted(ends, row, side='right'))
        return block * self.BLOCK + number, row - (int(ends[number - 1]) if number else 0)

    def read(self, row, key=None):
        document, part = self.find(row)
        start = int(self.index[document]) + part * (self.row_length - 1)
        end = min(start + self.row_length - 1, int(self.index[document + 1]))
        tokens = np.full(self.row_length, self.tokenizer.ignore_id, dtype=np.int64)
        tokens[0] = self.tokens[start - 1] if start > self.index[document] else self.start_token
        tokens[1 : 1 + end - start] = self.tokens[start:end]
        trained = np.full(self.row_length, self.train_on_filler, dtype=np.uint8)
        trained[1 : 1 + end - start] = 1 if self.masks is None else self.masks[start:end]
        return tokens, trained

    def documents(self, row):
        """Numbers (row_length,) of the document that a row belongs to, once per token."""
        return np.full(self.row_length, self.find(row)[0])


class ExampleRows:
    """Instruction examples, one per row or, packed, as many as fit: a start token, the prompt, the answer.

    Of an example that is too long the prompt is cut on the left; one whose answer does not fit is left out.
    For a bidirectional model <|ignore|> follows the answer, and it is trained on that too, so that it can tell
    where an answer ends in whatever room it is given: u² of what the row has left, u uniform by the example.
    """

    masked = True

    def __init__(self, folder, split, row_length, causal, packed):
        self.folder, self.split, self.row_length, self.causal = folder, split, row_length, causal
        index, masks = folder.index[split].astype(np.int64), folder.masks[split]
        if masks is None:
            raise UserError(
                f'{folder.path} has no {split}_masks.bin, which says where the answers are; prepare it '
                'with prepare/instruct.py.'
            )
        fitted = [self.fitted(start, end) for start, end in zip(index, index[1:])]
        kept = [number for number, example in enumerate(fitted) if example]
        lengths = np.array([1 + len(fitted[number][0]) for number in kept], np.int64)
        if not kept:
            raise UserError(
                f'The {split} split of {folder.path} has no answer of at most {row_length - 2} tokens, so '
                'there is nothing to train on; choose a larger block_size, or prepare it anew.'
            )
        self.starts, self.ends = index[:-1][kept], index[1:][kept]
        self.dropped, self.cut = len(fitted) - len(kept), int((lengths <= self.ends - self.starts).sum())
        self.num_tokens, self.num_trained = int(lengths.sum()), sum(sum(fitted[number][1]) for number in kept)
        filler = 0 if causal else (row_length + 1 - lengths) * uniform(FILLER, np.array(kept)) ** 2
        self.sizes = lengths + np.asarray(filler).astype(np.int64)
        self.members = best_fit(self.sizes, row_length) if packed else [[i] for i in range(len(kept))]
        self.num_rows = len(self.members)
        self.isolated = packed or not causal  # whether rows have what must not be seen

    def fitted(self, start, end):
        ids, trained = (
            array[self.split][start:end].tolist() for array in (self.folder.tokens, self.folder.masks)
        )
        return prompts.fit(ids, trained, self.row_length - 1) if 1 in trained else None

    def read(self, row, key=None):
        """Tokens (T,), where they are trained (T,), and which example each belongs to (T,), or None."""
        tokens, trained, documents = [], [], []
        for number, member in enumerate(self.members[int(row)]):
            ids, mask = self.fitted(self.starts[member], self.ends[member])
            filler = int(self.sizes[member]) - 1 - len(ids)
            tokens += [self.folder.config['start_token'], *ids] + [self.folder.tokenizer.ignore_id] * filler
            trained += [0, *mask] + [int(not self.causal)] * filler
            documents += [number] * (len(tokens) - len(documents))
        return np.array(tokens), np.array(trained, np.uint8), np.array(documents) if self.isolated else None


def best_fit(sizes, room):
    """Lists of the items that share a row of `room`: the largest first, each into the fullest row that it fits."""
    rows, by_space, spaces = [], {}, 0  # rows that have so much space; bit s of `spaces`: by_space[s] has one
    for item in np.argsort(-sizes, kind='stable').tolist():
        size = int(sizes[item])
        fitting = spaces >> size
        if fitting:
            space = size + (fitting & -fitting).bit_length() - 1
            row = by_space[space].pop()
            spaces ^= 0 if by_space[space] else 1 << space
        else:
            space, row = room, len(rows)
            rows.append([])
        rows[row].append(item)
        by_space.setdefault(space - size, []).append(row)
        spaces |= 1 << space - size
    return rows


def make_rows(folder, split, architecture, block_size, mode, training):
    """Rows for an architecture: `ar` reads one token more, so that it predicts block_size tokens."""
    if isinstance(folder, mixing.Mix):
        parts = [make_rows(part, split, architecture, block_size, mode, training) for part in folder.folders]
        return mixing.MixedRows(parts, folder.weights, training)
    row_length = block_size + (architecture == 'ar')
    if mode == 'packed':
        return PackedRows(folder, split, row_length, block_size, training)
    if mode == 'documents':
        return DocumentRows(folder, split, row_length, train_on_filler=architecture != 'ar')
    if mode in ('examples', 'packed examples'):
        return ExampleRows(folder, split, row_length, architecture == 'ar', packed=mode == 'packed examples')
    raise UserError(f"mode is {mode!r}; choose 'packed' or 'documents'.")


# ---------------------------------------------------------------------------- batches

# Passes that a step's beliefs come from: each further one with probability P_DEEPER, up to MAX_DEPTH. With
# probability P_STALE the first of them sees up to MAX_STALE more of a row masked.
P_DEEPER, MAX_DEPTH, P_STALE, MAX_STALE = 0.7, 4, 0.75, 0.3


class Batches:
    """Batches of training rows as a pure function of the step, so that there is no state to save.

    Row r of global step s, and its noise, depend on (seed, s, r) only, r counted over all ranks and
    micro-steps. Every row comes once per epoch. In a Mix, each folder has epochs of its own, and the epoch of the
    whole is as many rows as its folders have together.

    predicted: a model's method of that name; batches then say which positions need logits, so that the device need
    not be asked and waited for. padded: to one of few lengths, by default wherever that is not the CPU.
    """

    def __init__(
        self,
        folder,
        architecture,
        block_size,
        batch_size,
        gradient_accumulation_steps=1,
        seed=0,
        mode='packed',
        rank=0,
        world_size=1,
        device='cpu',
        predicted=None,
        padded=None,
    ):
        self.rows = make_rows(folder, 'train', architecture, block_size, mode, training=True)
        self.folder, self.ignore_id = folder, folder.tokenizer.ignore_id
        self.needs_noise = architecture != 'ar'
        self.batch_size, self.micro_steps, self.seed = batch_size, gradient_accumulation_steps, seed
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self.predicted, self.padded = predicted, self.device.type != 'cpu' if padded is None else padded
        self.rows_per_step = batch_size * gradient_accumulation_steps * world_size
        self.worker, self.coming = ThreadPoolExecutor(1), {}

    def epoch(self, step):
        """Passes over the data that `step` steps make."""
        return step * self.rows_per_step / self.rows.num_rows

    def epochs_in_words(self, step):
        """The passes that `step` steps make over the data, and over each folder of a mix."""
        words = f'{self.epoch(step):.2f} epochs'
        if isinstance(self.folder, mixing.Mix):
            counts = zip(self.folder.folders, self.rows.parts, self.rows.counts(step * self.rows_per_step))
            each = (f'{folder.config["name"]} {count / rows.num_rows:.2f}' for folder, rows, count in counts)
            words += f' ({", ".join(each)})'
        return words

    def get(self, step):
        """This rank's micro-batches of a global step, and how many tokens of all ranks' rows carry the loss.

        A micro-batch is tokens (B, row_length), loss_mask (B, row_length) or None, noise (B, 1 + row_length)
        or None, on the device, and where rows hold examples that must not see each other documents (B, row_length);
        with `predicted`, always documents or None, and index (N,) or None.
        The next step's are read while the caller computes.
        """
        batch = self.coming.pop(step, None) or self.worker.submit(self.read, step)
        self.coming = {step + 1: self.worker.submit(self.read, step + 1)}
        micro_batches, count = batch.result()
        return [to_device(micro_batch, self.device) for micro_batch in micro_batches], count

    def read(self, step):
        places = np.arange(self.rows_per_step).reshape(self.micro_steps, self.world_size, -1)
        mine = places[:, self.rank]  # (micro_steps, batch_size)
        # What others train on is part of the count.
        rows = self.read_rows(step, (places if self.rows.masked else mine).ravel().tolist())
        if self.rows.masked:
            count = max(1, sum(map(self.count, rows.values())))
        else:
            count = places.size * (self.rows.row_length - 1)
        self.folder.release()
        return [self.micro_batch(step, part, [rows[place] for place in part]) for part in mine], count

    def read_rows(self, step, places):
        """{place: row} for places of a step; the rows of an epoch are found at once, in a tenth of the time."""
        groups = {}  # of an epoch of a folder: the places, and their numbers in the epoch
        for place in places:
            number, part, rows = step * self.rows_per_step + place, (), self.rows
            if isinstance(rows, mixing.MixedRows):
                *part, number = rows.place(number)
                rows = rows.parts[part[0]]
            epoch, number = divmod(number, rows.num_rows)
            groups.setdefault((rows, epoch, *part), []).append((place, number))
        found = {}
        for (rows, *key), members in groups.items():
            numbers = permuted([number for _, number in members], rows.num_rows, PERMUTE, self.seed, *key)
            for (place, _), number in zip(members, numbers):
                found[place] = rows.read(number, (MOVE, self.seed, *key))
        return found

    def count(self, row):
        """Tokens of a row that the loss is divided by: trained, not its first, not filler."""
        tokens, trained, *_ = row
        if trained is None:
            return len(tokens) - 1
        return int(np.count_nonzero(trained[1:] * (tokens[1:] != self.ignore_id)))

    def micro_batch(self, step, places, rows):
        noise = None
        if self.needs_noise:
            noise = row_noise(places, self.rows_per_step, self.rows.row_length, (self.seed, step))
        pin = self.device.type == 'cuda'
        batch = stack(rows, noise, pin)
        if self.predicted is None:
            return batch
        where = self.predicted(*batch[:3])
        index = None if where is None else positions_of(where, spare(where) if self.padded else 0)
        return *(*batch, None)[:4], index.pin_memory() if pin and where is not None else index


def check_belief_plan(p_belief, k_schedule):
    """A UserError unless `draw_belief` can follow these."""
    if not k_schedule or not all(type(k) is int and k >= 1 for k in k_schedule):
        raise UserError(
            f'k_schedule is {k_schedule}; give numbers of candidates, each at least 1, as (1, 2, 4, 8).'
        )
    pairs = all(
        isinstance(pair, (tuple, list)) and len(pair) == 2 and all(0 <= x <= 1 for x in pair)
        for pair in p_belief
    )
    if not pairs or [share for share, _ in p_belief] != sorted(share for share, _ in p_belief):
        raise UserError(
            f'p_belief is {p_belief}; give (share of the steps, probability from there on), both from 0 to '
            '1 and in the order of the shares, as ((0.5, 0.5),).'
        )


def draw_belief(step, max_steps, seed, p_belief, k_schedule, k_warmup_steps):
    """How a step of `sdd` comes to its beliefs, the same on all ranks: k, depth and stale of `SDD.states`.

    p_belief: ((share of the steps, probability that a step from there on has beliefs), ...). k is drawn from
    k_schedule; or, over the first k_warmup_steps, goes through it in equal parts and stays at its last.
    Sampling passes beliefs on from step to step, so training has to see what became of them: a model that was
    trained on fresh ones only takes its own second thoughts for news and grows too sure.
    """
    believes, which, deeper, aged, age = (float(uniform(BELIEF, seed, step, i)) for i in range(5))
    p = max((pair for pair in p_belief if pair[0] <= step / max_steps), default=(0, 0))[1]
    if believes >= p:
        return {'k': 0}
    place = min(step / k_warmup_steps, 1 - 1e-9) if k_warmup_steps else which
    depth = next((d for d in range(1, MAX_DEPTH) if deeper >= P_DEEPER**d), MAX_DEPTH)
    return {
        'k': k_schedule[int(place * len(k_schedule))],
        'depth': depth,
        'stale': MAX_STALE * age if aged < P_STALE else 0.0,
    }


def evaluation_batches(
    folder,
    split,
    architecture,
    block_size,
    batch_size,
    mode='packed',
    num_batches=0,
    rank=0,
    world_size=1,
    device='cpu',
    even=False,
):
    """This rank's share of a split's rows, with noise of their own: the same rows for any number of ranks.

    num_batches: so many batches of rows, spread over the split; 0: the whole split. even: each rank gets as many
    batches, if need be one in which nothing is trained, as ranks have to whose forward passes wait for each other.
    """
    rows = make_rows(folder, split, architecture, block_size, mode, training=False)
    size = min(rows.num_rows, num_batches * batch_size) if num_batches else rows.num_rows
    chosen = np.arange(size) * rows.num_rows // size
    for start in range(0, size, world_size * batch_size):
        places = np.arange(start, min(start + world_size * batch_size, size))[rank * batch_size :][
            :batch_size
        ]
        if len(places):
            read = [rows.read(row, ()) for row in chosen[places]]
        elif even:
            places = np.zeros(1, np.int64)
            tokens, _, *documents = rows.read(0, ())
            read = [(tokens, np.zeros(len(tokens), np.uint8), *documents)]
        else:
            return
        noise = row_noise(places, size, rows.row_length, ()) if architecture != 'ar' else None
        yield to_device(stack(read, noise, pin=False), device)
        folder.release()


def row_noise(places, num_places, row_length, key):
    """Uniform numbers (B, 1 + row_length): a level per row, then one number per token.

    Levels are stratified: the rows of a step have one in each interval of width 1/num_places, in random order.
    key: (seed, step), or () in evaluation.
    """
    strata = permuted(places, num_places, LEVEL, *key).astype(np.float64)
    levels = (strata + uniform(NOISE, *key, places, row_length)) / num_places
    tokens = uniform(NOISE, *key, places[:, None], np.arange(row_length))
    return np.concatenate([levels[:, None], tokens], axis=1).astype(np.float32)


def opening(step, anneal_steps, length, seed, device='cpu'):
    """What each position sees at a step on the way from causal to full attention: a mask (T, T), or None for all.

    Each position ahead is seen with a probability that grows by 1 / anneal_steps per step (Gong et al. 2025,
    DiffuLLaMA). It depends on (seed, step) only, so that all ranks and rows share it.
    """
    if step >= anneal_steps:
        return None
    generator = torch.Generator().manual_seed(int(random_bits(OPEN, seed, step)) >> 1)
    ahead = torch.rand(length, length, generator=generator) < step / anneal_steps
    return (ahead | torch.ones(length, length, dtype=torch.bool).tril()).to(device)


def spare(where):
    """How many positions beyond those of the mask `where` bring their number to an odd sixteenth of all: the half that
    diffusion hides on average is then not near a border, and a model sees one length, rarely another."""
    count, size = int(where.sum()), where.numel()
    return max(0, min(size, -(-size * (-(-16 * count // size) | 1) // 16)) - count)


def stack(rows, noise, pin):
    """Rows of (tokens, trained or None) as tensors: tokens, loss_mask or None, noise or None.

    Rows that are shorter are filled up with what is not trained. Where they say which document each token
    belongs to, that comes fourth, and what was filled up is a document of its own.
    """
    tokens, trained, documents = zip(*[(*row, None)[:3] for row in rows])
    length = max(map(len, tokens))

    def tensor(arrays, value, dtype):
        filled = np.full((len(arrays), length), value, dtype)
        for row, array in zip(filled, arrays):
            row[: len(array)] = array
        return torch.from_numpy(filled)

    loss_mask = None
    if any(part is not None for part in trained):
        loss_mask = tensor([np.ones(length) if part is None else part for part in trained], 0, np.uint8)
    batch = (
        tensor(tokens, 0, np.int64),
        loss_mask,
        None if noise is None else torch.from_numpy(np.ascontiguousarray(noise[:, : 1 + length])),
    )
    if documents[0] is not None:
        batch += (tensor(documents, -1, np.int64),)
    return tuple(x.pin_memory() if pin and x is not None else x for x in batch)


def to_device(batch, device):
    return tuple(None if x is None else x.to(device, non_blocking=True) for x in batch)
