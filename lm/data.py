"""Rows of prepared folders and batches of them, pure functions of (seed, step): there is no state to save.

Resuming repeats nothing and skips nothing, and other numbers of ranks or micro-steps see the same rows.
"""

from bisect import bisect_left, insort
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from lm import chat, prompts
from lm.configurator import note, require
from lm.folder import Mix
from lm.rng import LEVEL, MOVE, NOISE, PADDING, PERMUTE, permuted, random_bits, uniform


class PackedRows:
    """Windows of the token stream, `row_length` tokens each, every `stride` tokens.

    Training leaves one window out and moves the others by a random start, another one in each epoch, so that their
    borders are not always the same. Evaluation covers the split: its last window ends where the split ends, and what
    it shares with the window before is context. Where texts begin with a token of their own, such as <s>, which a
    pretrained model expects first, that is the context of each row.
    """

    def __init__(self, folder, split, row_length, stride, training):
        self.tokens, self.index, self.masks = folder.tokens[split], folder.index[split], folder.masks[split]
        self.row_length, self.stride, self.training = row_length, stride, training
        self.has_loss_mask = self.masks is not None  # in training
        if training and self.has_loss_mask and chat.is_chat_template(folder.config['prompt_format']):
            note(f'a stream leaves out how the conversations of {folder.path} begin; take --mode=documents.')
        start, tokenizer = folder.config['start_token'], folder.tokenizer
        is_own = start != tokenizer.endoftext_id and start in tokenizer.special_ids.values()
        self.start_token = start if is_own else None
        room = len(self.tokens) - row_length
        size, remedy = len(self.tokens), 'choose a smaller block_size or prepare more data'
        require(room >= 0, f'{folder.path} has {size:,} {split} tokens, a row {row_length}; {remedy}.')
        self.num_rows = max(1, room // stride) if training else 1 + -(-room // stride)
        self.text_per_row = row_length  # tokens without padding
        self.max_move = room - (self.num_rows - 1) * stride

    def read(self, row, key):
        """Read tokens (row_length,) and their loss mask (row_length,), None for all ones."""
        start = int(row) * self.stride
        if self.training:
            start += int(random_bits(*key) % np.uint64(self.max_move + 1))
        overlap = max(0, start + self.row_length - len(self.tokens))
        part = slice(start - overlap, start - overlap + self.row_length)
        loss_mask = None if self.masks is None else self.masks[part].copy()
        if overlap:
            loss_mask = np.ones(self.row_length, np.uint8) if loss_mask is None else loss_mask
            loss_mask[: overlap + self.row_length - self.stride] = 0
        tokens = self.tokens[part]
        if self.start_token is not None:
            tokens = np.append(np.array([self.start_token], tokens.dtype), tokens[1:])
        return tokens, loss_mask

    def documents(self, row):
        """Return which document each token (row_length,) of an evaluation row belongs to."""
        start = min(int(row) * self.stride, len(self.tokens) - self.row_length)
        positions = np.arange(start, start + self.row_length, dtype=self.index.dtype)
        return np.searchsorted(self.index, positions, side='right') - 1


class DocumentRows:
    """One document per row: the start token as context, its tokens, its end, then <|ignore|> as padding.

    A document that is too long continues in the next row, after the token before. A bidirectional model is trained on
    the padding (it has to say where the text ends); for `ar` the padding lies outside the loss.
    """

    has_loss_mask = True

    def __init__(self, folder, split, row_length, train_on_padding):
        self.tokens, self.index, self.masks = folder.tokens[split], folder.index[split], folder.masks[split]
        self.row_length, self.train_on_padding = row_length, train_on_padding
        self.ignore_id, self.start_token = folder.tokenizer.ignore_id, folder.config['start_token']
        if self.masks is not None and train_on_padding:
            answers_end = 1 + np.flatnonzero(np.diff(np.asarray(self.masks, np.int8)) < 0)
            problem = f'{folder.path} has texts that go on after an answer, which gives the answer away'
            require(np.isin(answers_end, self.index).all(), f'{problem}; train it by finetune.py.')
        rows = -(-np.diff(self.index).astype(np.int64) // (row_length - 1))  # of each document
        self.row_index = np.append(0, np.cumsum(rows))  # first row of each document, plus the end
        self.num_rows = int(self.row_index[-1])
        require(self.num_rows, f'The {split} split of {folder.path} holds no document; prepare more data.')
        self.text_per_row = len(self.tokens) / self.num_rows

    def find(self, row):
        """Return the document that a row belongs to, and which of its rows it is."""
        document = int(np.searchsorted(self.row_index, row, side='right')) - 1
        return document, int(row - self.row_index[document])

    def read(self, row, key=None):
        document, part = self.find(row)
        start = int(self.index[document]) + part * (self.row_length - 1)
        end = min(start + self.row_length - 1, int(self.index[document + 1]))
        tokens = np.full(self.row_length, self.ignore_id, dtype=np.int64)
        tokens[0] = self.tokens[start - 1] if start > self.index[document] else self.start_token
        tokens[1 : 1 + end - start] = self.tokens[start:end]
        loss_mask = np.full(self.row_length, self.train_on_padding, dtype=np.uint8)
        loss_mask[1 : 1 + end - start] = 1 if self.masks is None else self.masks[start:end]
        return tokens, loss_mask

    def documents(self, row):
        return np.full(self.row_length, self.find(row)[0])


class ExampleRows:
    """Instruction examples, one per row or, packed, as many as fit: a start token, the prompt, the answer.

    Of an example that is too long the prompt is truncated on the left; one whose answer does not fit is dropped.
    by_answer: each answer of a conversation is an example of its own, which ends with it; None: for a bidirectional
    model, which would see what comes later. <|ignore|> follows, and it is trained on that too, so that it can tell
    where an answer ends in whatever room it is given: u² of what the row has left, u uniform by the example. In
    evaluation it is given the whole row, because a room that depends on the answer would tell its length.
    """

    has_loss_mask = True

    def __init__(self, folder, split, row_length, train_on_padding, packed, training=True, by_answer=None):
        self.folder, self.split, self.row_length = folder, split, row_length
        self.train_on_padding = train_on_padding
        self.by_answer = train_on_padding and not folder.train_on_prompt if by_answer is None else by_answer
        self.index = folder.index[split].astype(np.int64)
        masks = f'{split}_masks.bin, which says where the answers are'
        require(folder.masks[split] is not None, f'{folder.path} has no {masks}; use prepare/instruct.py.')
        spans = []  # an example that is all answer, a plain text, becomes several
        for start, end in zip(self.index, self.index[1:]):
            windows = prompts.windows(folder.masks[split][start:end], row_length - 1, self.by_answer)
            spans += [(start + first, start + last) for first, last in windows]
        fitted = [self.fit(*span) for span in spans]
        kept = [number for number, example in enumerate(fitted) if example]
        short = f'answer of at most {row_length - 2} tokens'
        require(kept, f'The {split} split of {folder.path} has no {short}; choose a larger block_size.')
        lengths = np.array([1 + len(fitted[number][0]) for number in kept], np.int64)
        self.starts, self.ends = np.array(spans, np.int64)[kept].T
        self.dropped, self.cut = len(fitted) - len(kept), int((lengths <= self.ends - self.starts).sum())
        self.num_tokens, self.num_trained = int(lengths.sum()), sum(sum(fitted[number][1]) for number in kept)
        room = row_length - lengths
        if training:
            room = ((room + 1) * uniform(PADDING, np.array(kept)) ** 2).astype(np.int64)
        self.sizes = lengths + room * train_on_padding
        self.members = best_fit(self.sizes, row_length) if packed else [[i] for i in range(len(kept))]
        self.num_rows = len(self.members)
        self.text_per_row = self.num_tokens / self.num_rows
        self.has_doc_ids = packed or train_on_padding  # whether some tokens must not be attended to

    def fit(self, start, end):
        ids, mask = (x[self.split][start:end].tolist() for x in (self.folder.tokens, self.folder.masks))
        mask = prompts.last_answer(mask) if self.by_answer else mask
        found = prompts.fit(ids, mask, self.row_length - 1) if 1 in mask else None
        return (found[0], [1] * len(found[0])) if found and self.folder.train_on_prompt else found

    def read(self, row, key=None):
        """Read tokens (T,), their loss mask (T,), and which example each belongs to (T,), or None."""
        tokens, loss_mask, doc_ids = [], [], []
        for number, member in enumerate(self.members[int(row)]):
            ids, mask = self.fit(self.starts[member], self.ends[member])
            num_pad = int(self.sizes[member]) - 1 - len(ids)
            tokens += [self.folder.config['start_token'], *ids] + [self.folder.tokenizer.ignore_id] * num_pad
            loss_mask += [0, *mask] + [int(self.train_on_padding)] * num_pad
            doc_ids += [number] * (len(tokens) - len(doc_ids))
        doc_ids = np.array(doc_ids) if self.has_doc_ids else None
        return np.array(tokens), np.array(loss_mask, np.uint8), doc_ids

    def documents(self, row):
        start = self.starts[self.members[int(row)][0]]
        return np.full(self.row_length, np.searchsorted(self.index, start, side='right') - 1)


def best_fit(sizes, room):
    """Pack items into rows of `room`: the largest first, each into the fullest row that it fits; lists of items."""
    rows, unfilled = [], []  # sorted (space that is left, -turn, row): of equal spaces the one filled last
    for turn, item in enumerate(np.argsort(-sizes, kind='stable').tolist()):
        size = int(sizes[item])
        fitting = bisect_left(unfilled, (size,))
        if fitting == len(unfilled):
            rows.append([])
            space, row = room, len(rows) - 1
        else:
            space, _, row = unfilled.pop(fitting)
        rows[row].append(item)
        insort(unfilled, (space - size, -turn, row))
    return rows


class MixedRows:
    """The rows of several folders, dealt out evenly: among any first n, of each as many as its weight says.

    Which folder a row belongs to, and how many of that folder come before, is exact and needs no state: the first
    folder has floor(n * weight) of n rows, and the others share the rest among them in the same way.
    """

    def __init__(self, parts, weights, training):
        self.parts, self.row_length = parts, parts[0].row_length
        self.has_loss_mask = any(part.has_loss_mask for part in parts)
        self.shares = [weight / sum(weights[i:]) for i, weight in enumerate(weights)]  # of what is left
        self.text_per_row = sum(float(weight) * part.text_per_row for part, weight in zip(parts, weights))
        if training:
            self.num_rows = sum(part.num_rows for part in parts)
        else:  # as many as there are in these proportions, none of them twice
            self.num_rows = int(min(part.num_rows / weight for part, weight in zip(parts, weights)))
            while any(count > part.num_rows for count, part in zip(self.counts(self.num_rows), parts)):
                self.num_rows -= 1
            self.take(self.num_rows)

    def take(self, num_rows):
        """Evaluate only so many rows, in the same proportions."""
        self.num_rows, self.taken = num_rows, self.counts(num_rows)

    def counts(self, num_rows):
        """Count how many of the first rows are of each part."""
        counts = []
        for share in self.shares:
            counts.append(num_rows * share.numerator // share.denominator)
            num_rows -= counts[-1]
        return counts

    def find(self, row):
        """Return the part that a row is of, and how many rows of that part come before it."""
        before, after = self.counts(row), self.counts(row + 1)
        return next((part, count) for part, count in enumerate(before) if after[part] > count)

    def read(self, row, key=None):
        """Read an evaluation row; those of a part are spread over its split."""
        part, count = self.find(int(row))
        rows = self.parts[part]
        return rows.read(count * rows.num_rows // self.taken[part], ())


def num_evaluated(rows, max_tokens, most):
    """Say how many rows hold max_tokens tokens of text, of which a full one has `most`; 0: all rows."""
    if not max_tokens:
        return rows.num_rows
    return min(rows.num_rows, max(1, int(max_tokens / min(most, rows.text_per_row))))


def make_rows(folder, split, architecture, block_size, mode, training):
    """Make the rows of a split for an architecture, a class of model.py."""
    if isinstance(folder, Mix):
        parts = [make_rows(part, split, architecture, block_size, mode, training) for part in folder.folders]
        return MixedRows(parts, folder.weights, training)
    row_length, padding = block_size + architecture.extra_tokens, architecture.trains_on_padding
    fits = padding or folder.tokenizer.ignore_id != folder.tokenizer.endoftext_id
    require(fits, f'The tokenizer of {folder.path} pads with its end; take --architecture=diffusion or sdd.')
    if mode == 'packed':
        return PackedRows(folder, split, row_length, block_size, training)
    if mode == 'documents':
        return DocumentRows(folder, split, row_length, padding)
    require(mode in ('examples', 'packed examples'), f"mode is {mode!r}; choose 'packed' or 'documents'.")
    return ExampleRows(folder, split, row_length, padding, mode == 'packed examples', training)


# ---------------------------------------------------------------------------- batches

LOCAL = SimpleNamespace(rank=0, world_size=1, device=torch.device('cpu'))  # in place of a runtime.Runtime


class Batch(NamedTuple):
    """The arguments of a model's forward."""

    tokens: torch.Tensor  # (B, T)
    loss_mask: torch.Tensor = None  # (B, T)
    noise: torch.Tensor = None  # (B, 1 + T) uniform numbers
    doc_ids: torch.Tensor = None  # (B, T): examples that do not attend to each other

    def to(self, device):
        # Only CUDA reads after the copy; a Mac with torch before 2.13 may read before it.
        in_order = torch.device(device).type == 'cuda'
        return Batch(*(None if x is None else x.to(device, non_blocking=in_order) for x in self))

    def pin_memory(self):
        return Batch(*(None if x is None else x.pin_memory() for x in self))


class Batches:
    """Batches of training rows as a pure function of the step.

    Row r of global step s, and its noise, depend on (seed, s, r) only, r counted over all ranks and micro-steps. Every
    row comes once per epoch; each folder of a Mix has epochs of its own.
    """

    def __init__(
        self, folder, architecture, block_size, batch_size, micro_steps=1, seed=0, mode='packed', dist=LOCAL
    ):
        self.rows = make_rows(folder, 'train', architecture, block_size, mode, training=True)
        self.folder, self.ignore_id = folder, folder.tokenizer.ignore_id
        self.needs_noise, self.micro_steps, self.seed = architecture.needs_noise, micro_steps, seed
        self.dist = dist
        self.rows_per_step = batch_size * micro_steps * dist.world_size
        self.thread, self.prefetched = ThreadPoolExecutor(1), {}

    def epoch(self, step):
        """Compute how many passes over the data `step` steps make."""
        return step * self.rows_per_step / self.rows.num_rows

    def describe_epochs(self, step):
        """Say how many passes `step` steps make over the data, and over each folder of a mix."""
        text = f'{self.epoch(step):.2f} epochs'
        if isinstance(self.folder, Mix):
            counts = zip(self.folder.folders, self.rows.parts, self.rows.counts(step * self.rows_per_step))
            each = (f'{folder.config["name"]} {count / rows.num_rows:.2f}' for folder, rows, count in counts)
            text += f' ({", ".join(each)})'
        return text

    def get(self, step):
        """Return this rank's micro-batches of a global step, and the count of tokens in the loss on all
        ranks; those of the next step are read while the caller computes."""
        batch = self.prefetched.pop(step, None) or self.thread.submit(self.read, step)
        self.prefetched = {step + 1: self.thread.submit(self.read, step + 1)}
        micro_batches, count = batch.result()
        return [micro_batch.to(self.dist.device) for micro_batch in micro_batches], count

    def read(self, step):
        numbers = np.arange(self.rows_per_step).reshape(self.micro_steps, self.dist.world_size, -1)
        mine = numbers[:, self.dist.rank]  # (micro_steps, batch_size)
        # The count is over the rows of all ranks, so where it depends on them they are all read.
        depends = self.rows.has_loss_mask or self.ignore_id == self.folder.tokenizer.endoftext_id
        rows = self.read_rows(step, (numbers if depends else mine).ravel().tolist())
        if depends:
            count = max(1, sum(count_tokens(row, self.ignore_id) for row in rows.values()))
        else:
            count = numbers.size * (self.rows.row_length - 1)
        self.folder.release()
        return [self.micro_batch(step, part, [rows[number] for number in part]) for part in mine], count

    def read_rows(self, step, numbers):
        """Read {number: row} for rows of a step; those of an epoch are permuted at once, in a tenth of the time."""
        groups = {}  # of an epoch of a folder: [(number, its position in the epoch)]
        for number in numbers:
            position, part, rows = step * self.rows_per_step + number, (), self.rows
            if isinstance(rows, MixedRows):
                *part, position = rows.find(position)
                rows = rows.parts[part[0]]
            epoch, position = divmod(position, rows.num_rows)
            groups.setdefault((rows, epoch, *part), []).append((number, position))
        found = {}
        for (rows, *key), members in groups.items():
            indices = permuted([position for _, position in members], rows.num_rows, PERMUTE, self.seed, *key)
            for (number, _), row in zip(members, indices):
                found[number] = rows.read(row, (MOVE, self.seed, *key))
        return found

    def micro_batch(self, step, numbers, rows):
        noise = None
        if self.needs_noise:
            noise = row_noise(numbers, self.rows_per_step, self.rows.row_length, (self.seed, step))
        batch = collate(rows, noise)
        return batch.pin_memory() if self.dist.device.type == 'cuda' else batch


class EvaluationBatches:
    """Batches of a split's rows, this rank's share, with noise of their own: the same rows for any number of ranks.

    max_tokens: of rows spread over the split, whatever the batch size; 0: the whole split. Each rank gets as many
    batches, if need be one without loss: sharded forward passes wait for each other, and all ranks have the same
    metrics.
    """

    def __init__(self, folder, split, architecture, block_size, batch_size, mode, max_tokens=0, dist=LOCAL):
        self.rows = make_rows(folder, split, architecture, block_size, mode, training=False)
        self.folder, self.batch_size, self.dist = folder, batch_size, dist
        self.needs_noise = architecture.needs_noise
        self.size = num_evaluated(self.rows, max_tokens, block_size)
        folders = folder.folders if isinstance(folder, Mix) else [folder]
        if isinstance(folder, Mix):  # every n-th row of a mix could be of one folder alone
            self.rows.take(self.size)
        self.tokens_per_byte = np.array([one.counted_tokens_per_byte(split) for one in folders], float)
        self.counts = np.zeros(len(folders))

    @property
    def num_bytes(self):
        """The bytes of text, nan if unknown, that the counted tokens of the last iteration stand for."""
        return float((self.counts / self.tokens_per_byte).sum())

    def __iter__(self):
        self.counts[:] = 0
        chosen = np.arange(self.size) * self.rows.num_rows // self.size
        for start in range(0, self.size, self.dist.world_size * self.batch_size):
            first = start + self.dist.rank * self.batch_size
            numbers = np.arange(first, min(first + self.batch_size, self.size))
            batch = [self.rows.read(row, ()) for row in chosen[numbers]]
            for row, read in zip(chosen[numbers], batch):
                part = self.rows.find(int(row))[0] if isinstance(self.folder, Mix) else 0
                self.counts[part] += count_tokens(read, self.folder.tokenizer.ignore_id)
            if not batch:
                numbers, (tokens, _, *doc_ids) = np.zeros(1, np.int64), self.rows.read(0, ())
                batch = [(tokens, np.zeros(len(tokens), np.uint8), *doc_ids)]
            noise = row_noise(numbers, self.size, self.rows.row_length, ()) if self.needs_noise else None
            yield collate(batch, noise).to(self.dist.device)
            self.folder.release()


def count_tokens(row, ignore_id):
    """Count the tokens of a row that the loss is divided by: in the loss, not its first, not padding."""
    tokens, loss_mask, *_ = row
    is_text = tokens[1:] != ignore_id
    return int(np.count_nonzero(is_text if loss_mask is None else loss_mask[1:] * is_text))


def row_noise(numbers, num_rows, row_length, key):
    """Draw uniform numbers (B, 1 + row_length): per row a mask ratio, of which a step has one in each
    interval of width 1/num_rows, in random order, then one per token. key: (seed, step), or () in
    evaluation."""
    strata = permuted(numbers, num_rows, LEVEL, *key).astype(np.float64)
    ratios = (strata + uniform(NOISE, *key, numbers, row_length)) / num_rows
    tokens = uniform(NOISE, *key, numbers[:, None], np.arange(row_length))
    return np.concatenate([ratios[:, None], tokens], axis=1).astype(np.float32)


def collate(rows, noise):
    """Make a Batch of rows (tokens, loss mask or None, doc_ids or None), padded to the longest outside the
    loss and, where rows have doc_ids, as a document of its own."""
    tokens, loss_masks, doc_ids = zip(*[(*row, None)[:3] for row in rows])
    length = max(map(len, tokens))

    def padded(arrays, value, dtype):
        tensors = [torch.from_numpy(np.asarray(array, dtype)) for array in arrays]
        return pad_sequence(tensors, batch_first=True, padding_value=value)

    loss_mask = None
    if any(mask is not None for mask in loss_masks):
        loss_mask = padded([np.ones(length) if mask is None else mask for mask in loss_masks], 0, np.uint8)
    noise = None if noise is None else torch.from_numpy(np.ascontiguousarray(noise[:, : 1 + length]))
    doc_ids = None if doc_ids[0] is None else padded(doc_ids, -1, np.int64)
    return Batch(padded(tokens, 0, np.int64), loss_mask, noise, doc_ids)
