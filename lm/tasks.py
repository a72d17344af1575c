"""Twelve functions of a row of digits that a model can learn to compute, and balanced sets of examples.

    rows, labels = splits('fn_a', length=50, train=200, test=10000)['train']

fn_a to fn_j and fn_l read bits, fn_i and fn_k decimal digits; each answers 0 or 1. Some are learnt from a few
hundred examples (a pattern), some never are (the parity of fifty bits).
"""

import hashlib
import os
import zipfile
from pathlib import Path

import numpy as np
import sympy
import tokenizers
import torch

from lm.configurator import ROOT, UserError
from lm.data import Tokenizer

PATTERNS = {'fn_c': '10101010', 'fn_d': '00111111'}
RULE_30 = np.array([0, 1, 1, 1, 1, 0, 0, 0])  # the next cell, by 4 · left + 2 · centre + right
GENERATION = 1  # changes when the same key gives other rows: old caches are left alone


# ---------------------------------------------------------------------------- the functions


def parity(x):
    return x.sum(1) % 2


def parity_of_first_half(x):
    return parity(x[:, : x.shape[1] // 2])


def contains(pattern):
    bits = np.array([int(bit) for bit in pattern])

    def label(x):
        if x.shape[1] < len(bits):
            return np.zeros(len(x), int)
        windows = np.lib.stride_tricks.sliding_window_view(x, len(bits), axis=1)  # (N, L - 7, 8)
        return (windows == bits).all(2).any(1)

    return label


def chosen_places(length, count):
    """The places whose parity fn_e (3) and fn_f (10) ask for: the start of one fixed permutation per length."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(42))[:count].numpy()


def parity_of_chosen(count):
    return lambda x: parity(x[:, chosen_places(x.shape[1], count)])


def palindrome(x):
    return (x == x[:, ::-1]).all(1)


def balanced_brackets(x):
    """Dyck-2: pairs of bits are 00=( 01=) 10=[ 11=], all opened ones closed in the right order."""
    kind, closes = x[:, ::2], x[:, 1::2].astype(bool)  # (N, L / 2)
    rows = np.arange(len(x))
    stack, depth = np.zeros((len(x), kind.shape[1] + 1), x.dtype), np.zeros(len(x), int)
    right = np.ones(len(x), bool)
    for place in range(kind.shape[1]):
        closing = closes[:, place]
        right &= ~closing | (depth > 0) & (stack[rows, np.maximum(depth - 1, 0)] == kind[:, place])
        stack[rows, depth] = np.where(closing, stack[rows, depth], kind[:, place])
        depth = np.maximum(depth + np.where(closing, -1, 1), 0)
    return right & (depth == 0)


def prime(x):
    return np.array([sympy.isprime(int(text(row))) for row in x], int)


def parity_of_next_cells(x):
    """The parity after one step of the cellular automaton Rule 30, zeros beyond both ends."""
    padded = np.pad(x, ((0, 0), (1, 1)))
    return parity(RULE_30[4 * padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]])


def parity_of_sha256(x):
    return np.array(
        [int.from_bytes(hashlib.sha256(text(row).encode()).digest()).bit_count() % 2 for row in x], int
    )


def text(row):
    return ''.join(map(str, row.tolist()))


TASKS = {  # id: name, what labels rows (N, L) of digits
    'fn_a': ('parity_all', parity),
    'fn_b': ('parity_first_half', parity_of_first_half),
    'fn_c': ('patternmatch1', contains(PATTERNS['fn_c'])),
    'fn_d': ('patternmatch2', contains(PATTERNS['fn_d'])),
    'fn_e': ('parity_rand_3', parity_of_chosen(3)),
    'fn_f': ('parity_rand_10', parity_of_chosen(10)),
    'fn_g': ('palindrome', palindrome),
    'fn_h': ('dyck2', balanced_brackets),
    'fn_i': ('prime_decimal', prime),
    'fn_j': ('automata_parity', parity_of_next_cells),
    'fn_k': ('prime_decimal_tf_check', prime),
    'fn_l': ('sha256_parity', parity_of_sha256),
}
DECIMAL = ('fn_i', 'fn_k')


def label(task, x):
    """0 or 1 (N,) for rows x (N, L) of digits."""
    return np.asarray(TASKS[task][1](x)).astype(np.int64)


# ---------------------------------------------------------------------------- rows of a class


def draw_bits(draw, n, length):
    return draw.integers(0, 2, (n, length), np.uint8)


def draw_with_pattern(draw, n, length, pattern):
    x = draw_bits(draw, n, length)
    start = draw.integers(0, length - len(pattern) + 1, n)
    places = start[:, None] + np.arange(len(pattern))
    np.put_along_axis(x, places, np.array([int(bit) for bit in pattern], np.uint8)[None], axis=1)
    return x


def draw_palindromes(draw, n, length):
    x = draw_bits(draw, n, length)
    x[:, length - length // 2 :] = x[:, : length // 2][:, ::-1]
    return x


def draw_brackets(draw, n, length):
    """Random walks: at each place a bracket opens or closes with the same chance, where both are possible."""
    pairs = length // 2
    x, rows = np.zeros((n, length), np.uint8), np.arange(n)
    stack, depth = np.zeros((n, pairs + 1), np.uint8), np.zeros(n, int)
    for place in range(pairs):
        opens = (depth == 0) | (depth < pairs - place) & (draw.random(n) < 0.5)
        kind = np.where(opens, draw.integers(0, 2, n), stack[rows, np.maximum(depth - 1, 0)]).astype(np.uint8)
        stack[rows, depth] = np.where(opens, kind, stack[rows, depth])
        depth += np.where(opens, 1, -1)
        x[:, 2 * place], x[:, 2 * place + 1] = kind, ~opens
    return x


def flip(draw, x, most, places):
    """Rows with 1 to `most` bits flipped among their first `places`."""
    order = draw.random((len(x), places)).argsort(1)
    flipped = order < draw.integers(1, most + 1, len(x))[:, None]
    x[:, :places] ^= flipped.astype(np.uint8)
    return x


def draw_number(draw, digits):
    """A number of exactly so many decimal digits, as a Python int."""
    return int(text(np.concatenate([draw.integers(1, 10, 1), draw.integers(0, 10, digits - 1)])))


def draw_numbers(draw, n, length, is_prime):
    """The next prime after a random number, or the product of two numbers of half the digits."""
    found = []
    for _ in range(n):
        number = (
            int(sympy.nextprime(draw_number(draw, length)))
            if is_prime
            else draw_number(draw, length // 2) * draw_number(draw, length - length // 2)
        )
        if len(str(number)) == length:
            found.append([int(digit) for digit in str(number)])
    return np.array(found, np.uint8).reshape(-1, length)


def draw_class(task, wanted, draw, n, length, near_misses):
    """At most n rows of class `wanted`, 0 or 1: what the class is rare in is made, the rest is drawn until it fits.

    near_misses: negatives of fn_g are palindromes with one bit flipped; those of fn_h always have some flipped.
    """
    if task in DECIMAL:
        x = draw_numbers(draw, min(n, 256), length, wanted)
        x = x[np.isin(x[:, -1], (1, 3, 7, 9))] if task == 'fn_k' else x
    elif task in PATTERNS and wanted:
        x = draw_with_pattern(draw, n, length, PATTERNS[task])
    elif task == 'fn_g' and (wanted or near_misses):
        x = draw_palindromes(draw, n, length)
        x = x if wanted else flip(draw, x, 1, length // 2)
    elif task == 'fn_h':
        x = draw_brackets(draw, n, length)
        x = x if wanted else flip(draw, x, min(5, length), length)
    else:
        x = draw_bits(draw, n, length)
    return x[label(task, x) == wanted]


def distinct(x):
    """The different rows of x in the order in which they first come."""
    packed = np.ascontiguousarray(np.packbits(x, axis=1) if x.max(initial=0) < 2 else x)
    _, first = np.unique(packed.view(f'V{packed.shape[1]}'), return_index=True)
    return x[np.sort(first)]


def rows_of_class(task, wanted, count, draw, length, compat):
    """`count` different rows of a class, or in `compat` as many as there are if they are fewer."""
    x, stale = np.zeros((0, length), np.uint8), 0
    while len(x) < count and stale < 50:
        before = len(x)
        x = distinct(np.concatenate([x, draw_class(task, wanted, draw, max(1024, count), length, compat)]))
        stale = 0 if len(x) > before else stale + 1
    if len(x) < count and not compat:
        remedy = (
            ' or, as published, --compat, which repeats rows within a set' if task in ('fn_g', 'fn_h') else ''
        )
        raise UserError(
            f'{task} ({TASKS[task][0]}) at sequence_length={length} needs {count} different rows with '
            f'label {wanted}, but only {len(x)} were found; choose smaller sets, longer sequences{remedy}.'
        )
    return x[:count]


# ---------------------------------------------------------------------------- balanced sets


def check(task, length, sizes):
    """A UserError where the sets cannot be made. sizes: {'train': rows, 'val': rows, 'test': rows}"""
    if task not in TASKS:
        raise UserError(
            f'target_func is {task!r}; choose '
            + ', '.join(f'{key} ({name})' for key, (name, _) in TASKS.items())
            + '.'
        )
    least = {'fn_b': 2, 'fn_c': 8, 'fn_d': 8, 'fn_h': 4, 'fn_i': 2, 'fn_k': 2}.get(task, 1)
    if length < least:
        raise UserError(f'sequence_length is {length}; {task} ({TASKS[task][0]}) needs at least {least}.')
    if task == 'fn_h' and length % 4:
        raise UserError(
            f'sequence_length is {length}; fn_h (dyck2) needs a multiple of 4: two bits per bracket, and '
            'as many closing as opening ones.'
        )
    for name, size in sizes.items():
        if size < 0 or size % 2:
            raise UserError(f'{name}_set_size is {size}; it has to be even, half of each class.')
    total, base = sum(sizes.values()), 10 if task in DECIMAL else 2
    if total > base**length:
        raise UserError(
            f'The sets ask for {total:,} different rows, but there are {base}^{length} = '
            f'{base**length:,} of sequence_length={length}; choose smaller sets or longer sequences.'
        )


def key_of(task, length, train, test, seed, compat=False):
    """What names a pool of rows. train: with the validation rows, which come out of the same pool."""
    return f'{task}|L={length}|train={train}|test={test}|base_seed={seed}' + ('|compat' if compat else '')


def derived_seed(key):
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], 'big') & 0x7FFFFFFF


def make_splits(task, length, sizes, seed, compat):
    """{'train', 'val', 'test': (rows, labels)} with as many rows of each class, and none in two sets."""
    draw = np.random.default_rng(seed)
    parts = {name: [] for name in sizes}
    count = sum(sizes.values()) // 2
    for wanted in (0, 1):
        x = rows_of_class(task, wanted, count, draw, length, compat)
        x = x[draw.permutation(len(x))]
        start = 0
        for name, size in sizes.items():  # the test set comes last: what is missing repeats there
            part = x[start : start + size // 2]
            if len(part) < size // 2:
                if name != 'test' or not len(part):
                    raise UserError(
                        f'{task} at sequence_length={length} has only {len(x)} rows with label {wanted}; '
                        f'the {name} set needs some of its own: choose smaller sets.'
                    )
                part = np.concatenate([part, part[draw.integers(0, len(part), size // 2 - len(part))]])
            parts[name].append(part)
            start += size // 2
    return {
        name: (np.concatenate(both), np.repeat([0, 1], [len(part) for part in both]))
        for name, both in parts.items()
    }


def splits(task, length, train, test, val=0, seed=42, compat=False, cache=None):
    """{'train', 'val', 'test': (rows (N, L) uint8, labels (N,))}: balanced, no row of one set in another.

    compat: fn_g and fn_h as published at L = 20, where there are fewer positives than asked for: rows repeat
    within the test set, and negatives of fn_g are one bit from a palindrome. cache: a folder, data/tasks by
    default; what is there already for the same key is read.
    """
    sizes = {'train': train, 'val': val, 'test': test}
    check(task, length, sizes)
    key = key_of(task, length, train + val, test, seed, compat)
    folder = (
        Path(cache or ROOT / 'data' / 'tasks')
        / f'seed_{derived_seed(key)}'
        / hashlib.md5(key.encode()).hexdigest()
    )
    path = folder / (f'rows-{GENERATION}.npz' if not val else f'rows-{GENERATION}-val{val}.npz')
    try:
        with np.load(path) as saved:
            return {name: (saved[f'{name}_set'], saved[f'{name}_label']) for name in sizes}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # none yet, or damaged: made (again)
        parts = make_splits(task, length, sizes, derived_seed(key), compat)
    folder.mkdir(parents=True, exist_ok=True)
    beside = (
        folder / f'{os.getpid()}.tmp.npz'
    )  # of this process: a sweep's runs may make the same rows at once
    np.savez_compressed(
        beside,
        **{
            f'{name}_{what}': array
            for name, pair in parts.items()
            for what, array in zip(('set', 'label'), pair)
        },
    )
    os.replace(beside, path)
    return parts


# ---------------------------------------------------------------------------- one token per digit


def digits_of(task):
    return '0123456789' if task in DECIMAL else '01'


def digit_tokenizer(task):
    """Ids 0 and 1, or 0 to 9, are the digits; <|endoftext|>, 2 or 10, starts a row: a vocabulary of 3 or 11."""
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({digit: int(digit) for digit in digits_of(task)})
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r'[\s\S]'), 'isolated')
    tokenizer.decoder = tokenizers.decoders.Fuse()
    return Tokenizer(tokenizer.to_str())


def digit_ids(tokenizer, task):
    """The ids of the task's digits in any tokenizer, looked up one by one: a text of digits would be cut in groups."""
    ids = [tokenizer.encode(digit) for digit in digits_of(task)]
    if any(len(one) != 1 for one in ids):
        raise UserError(
            'This tokenizer has no token for each single digit, so a row would not keep its length; '
            'start from another checkpoint, or from scratch.'
        )
    return np.array(ids)[:, 0]
