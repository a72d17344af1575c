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
import torch

from lm.configurator import ROOT, UserError, require
from lm.tokenizer import build

PATTERNS = {'fn_c': (1, 0, 1, 0, 1, 0, 1, 0), 'fn_d': (0, 0, 1, 1, 1, 1, 1, 1)}
RULE_30 = np.array([0, 1, 1, 1, 1, 0, 0, 0])  # the next cell, by 4 · left + 2 · centre + right
VERSION = 1  # changes when the same key gives other rows, so that old caches are left alone


# ---------------------------------------------------------------------------- the functions


def parity(x):
    return x.sum(1) % 2


def contains(x, pattern):
    if x.shape[1] < len(pattern):
        return np.zeros(len(x), int)
    windows = np.lib.stride_tricks.sliding_window_view(x, len(pattern), axis=1)  # (N, L - 7, 8)
    return (windows == pattern).all(2).any(1)


def chosen_positions(length, count):
    """Return the positions whose parity fn_e (3) and fn_f (10) ask for: the start of one fixed permutation per length."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(42))[:count].numpy()


def parity_of_chosen(x, count):
    return parity(x[:, chosen_positions(x.shape[1], count)])


def balanced_brackets(x):
    """Label Dyck-2: pairs of bits are 00=( 01=) 10=[ 11=], all opened ones closed in the right order."""
    kind, closes = x[:, ::2], x[:, 1::2].astype(bool)  # (N, L / 2)
    rows = np.arange(len(x))
    stack, depth = np.zeros((len(x), kind.shape[1] + 1), x.dtype), np.zeros(len(x), int)
    right = np.ones(len(x), bool)
    for i in range(kind.shape[1]):
        closing = closes[:, i]
        right &= ~closing | (depth > 0) & (stack[rows, np.maximum(depth - 1, 0)] == kind[:, i])
        stack[rows, depth] = np.where(closing, stack[rows, depth], kind[:, i])
        depth = np.maximum(depth + np.where(closing, -1, 1), 0)
    return right & (depth == 0)


def prime(x):
    return np.array([sympy.isprime(int(text(row))) for row in x], int)


def parity_of_next_cells(x):
    """Label the parity after one step of the cellular automaton Rule 30, zeros beyond both ends."""
    padded = np.pad(x, ((0, 0), (1, 1)))
    return parity(RULE_30[4 * padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]])


def parity_of_sha256(x):
    digests = (hashlib.sha256(text(row).encode()).digest() for row in x)
    return np.array([int.from_bytes(digest).bit_count() % 2 for digest in digests], int)


def text(row):
    return ''.join(map(str, row.tolist()))


TASKS = {  # id: name, what labels rows (N, L) of digits
    'fn_a': ('parity_all', parity),
    'fn_b': ('parity_first_half', lambda x: parity(x[:, : x.shape[1] // 2])),
    'fn_c': ('patternmatch1', lambda x: contains(x, PATTERNS['fn_c'])),
    'fn_d': ('patternmatch2', lambda x: contains(x, PATTERNS['fn_d'])),
    'fn_e': ('parity_rand_3', lambda x: parity_of_chosen(x, 3)),
    'fn_f': ('parity_rand_10', lambda x: parity_of_chosen(x, 10)),
    'fn_g': ('palindrome', lambda x: (x == x[:, ::-1]).all(1)),
    'fn_h': ('dyck2', balanced_brackets),
    'fn_i': ('prime_decimal', prime),
    'fn_j': ('automata_parity', parity_of_next_cells),
    'fn_k': ('prime_decimal_tf_check', prime),
    'fn_l': ('sha256_parity', parity_of_sha256),
}
DECIMAL = ('fn_i', 'fn_k')
SHORTEST = {'fn_b': 2, 'fn_c': 8, 'fn_d': 8, 'fn_h': 4, 'fn_i': 2, 'fn_k': 2}  # rows; 1 for the others


def label(task, x):
    """Return 0 or 1 (N,) for rows x (N, L) of digits."""
    return np.asarray(TASKS[task][1](x)).astype(np.int64)


# ---------------------------------------------------------------------------- rows of a class


def draw_bits(draw, n, length):
    return draw.integers(0, 2, (n, length), np.uint8)


def draw_with_pattern(draw, n, length, pattern):
    x = draw_bits(draw, n, length)
    start = draw.integers(0, length - len(pattern) + 1, n)
    positions = start[:, None] + np.arange(len(pattern))
    np.put_along_axis(x, positions, np.array(pattern, np.uint8)[None], axis=1)
    return x


def draw_palindromes(draw, n, length):
    x = draw_bits(draw, n, length)
    x[:, length - length // 2 :] = x[:, : length // 2][:, ::-1]
    return x


def draw_brackets(draw, n, length):
    """Draw random walks: where both are possible, a bracket opens or closes with the same chance."""
    pairs, rows = length // 2, np.arange(n)
    x = np.zeros((n, length), np.uint8)
    stack, depth = np.zeros((n, pairs + 1), np.uint8), np.zeros(n, int)
    for i in range(pairs):
        opens = (depth == 0) | (depth < pairs - i) & (draw.random(n) < 0.5)
        kind = np.where(opens, draw.integers(0, 2, n), stack[rows, np.maximum(depth - 1, 0)]).astype(np.uint8)
        stack[rows, depth] = np.where(opens, kind, stack[rows, depth])
        depth += np.where(opens, 1, -1)
        x[:, 2 * i], x[:, 2 * i + 1] = kind, ~opens
    return x


def flip(draw, x, most, length):
    """Flip 1 to `most` of the first `length` bits of each row."""
    order = draw.random((len(x), length)).argsort(1)
    flipped = order < draw.integers(1, most + 1, len(x))[:, None]
    x[:, :length] ^= flipped.astype(np.uint8)
    return x


def draw_number(draw, digits):
    """Draw a number of exactly so many decimal digits, a Python int."""
    return int(text(np.concatenate([draw.integers(1, 10, 1), draw.integers(0, 10, digits - 1)])))


def draw_numbers(draw, n, length, is_prime):
    """Draw the next primes after random numbers, or products of two numbers of half the digits."""
    found = []
    for _ in range(n):
        if is_prime:
            number = sympy.nextprime(draw_number(draw, length))
        else:
            number = draw_number(draw, length // 2) * draw_number(draw, length - length // 2)
        if len(str(number)) == length:
            found.append([int(digit) for digit in str(number)])
    return np.array(found, np.uint8).reshape(-1, length)


def draw_class(task, wanted, draw, n, length, near_misses):
    """Draw at most n rows of class `wanted`, 0 or 1; rows of a rare class are made, others drawn until they fit.

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
    """Return the different rows of x in the order in which they first come."""
    _, first = np.unique(x, axis=0, return_index=True)
    return x[np.sort(first)]


def rows_of_class(task, wanted, count, draw, length, compat):
    """Return `count` different rows of a class, or in `compat` as many as there are if they are fewer."""
    x, idle = np.zeros((0, length), np.uint8), 0
    while len(x) < count and idle < 50:
        before = len(x)
        x = distinct(np.concatenate([x, draw_class(task, wanted, draw, max(1024, count), length, compat)]))
        idle = 0 if len(x) > before else idle + 1
    repeats = ', or --compat, which repeats rows within a set' if task in ('fn_g', 'fn_h') else ''
    require(
        len(x) >= count or compat,
        f'{task} at sequence_length={length} needs {count} different rows with label {wanted}, but only {len(x)} '
        f'were found; choose smaller sets or longer sequences{repeats}.',
    )
    return x[:count]


# ---------------------------------------------------------------------------- balanced sets


def check(task, length, sizes):
    """Raise UserError where the sets cannot be made. sizes: {'train': rows, 'val': rows, 'test': rows}"""
    names = ', '.join(f'{key} ({name})' for key, (name, _) in TASKS.items())
    require(task in TASKS, f'target_func is {task!r}; choose {names}.')
    shortest, name = SHORTEST.get(task, 1), TASKS[task][0]
    require(length >= shortest, f'sequence_length is {length}; {task} ({name}) needs at least {shortest}.')
    require(
        task != 'fn_h' or length % 4 == 0,
        f'sequence_length is {length}; fn_h ({name}) needs a multiple of 4: two bits per bracket, as many closed.',
    )
    for key, size in sizes.items():
        require(
            size >= 0 and size % 2 == 0, f'{key}_set_size is {size}; it has to be even, half of each class.'
        )
    total, base = sum(sizes.values()), len(digits_of(task))
    require(
        total <= base**length,
        f'The sets ask for {total:,} different rows, but there are {base}^{length} = {base**length:,} of '
        f'sequence_length={length}; choose smaller sets or longer sequences.',
    )


def key_of(task, length, train, test, seed, compat=False):
    """Return the name of a pool of rows. train: with the validation rows, which come out of the same pool."""
    return f'{task}|L={length}|train={train}|test={test}|base_seed={seed}' + ('|compat' if compat else '')


def derived_seed(key):
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], 'big') & 0x7FFFFFFF


def make_splits(task, length, sizes, seed, compat):
    """Return {'train', 'val', 'test': (rows, labels)} with as many rows of each class, and none in two sets."""
    draw, count = np.random.default_rng(seed), sum(sizes.values()) // 2
    parts = {name: [] for name in sizes}
    for wanted in (0, 1):
        x = rows_of_class(task, wanted, count, draw, length, compat)
        x = x[draw.permutation(len(x))]
        start = 0
        for name, size in sizes.items():  # the test set comes last: what is missing repeats there
            part = x[start : start + size // 2]
            missing = size // 2 - len(part)
            require(
                not missing or name == 'test' and len(part),
                f'{task} at sequence_length={length} has only {len(x)} rows with label {wanted}; the {name} set needs '
                'some of its own: choose smaller sets.',
            )
            if missing:
                part = np.concatenate([part, part[draw.integers(0, len(part), missing)]])
            parts[name].append(part)
            start += size // 2
    return {
        name: (np.concatenate(both), np.repeat([0, 1], [len(part) for part in both]))
        for name, both in parts.items()
    }


def splits(task, length, train, test, val=0, seed=42, compat=False, cache=None):
    """Return {'train', 'val', 'test': (rows (N, L) uint8, labels (N,))}: balanced, no row of one set in another.

    compat: fn_g and fn_h as published at L = 20, where there are fewer positives than asked for: rows repeat
    within the test set, and negatives of fn_g are one bit from a palindrome. cache: a folder, data/tasks by
    default; what is there already for the same key is read.
    """
    sizes = {'train': train, 'val': val, 'test': test}
    check(task, length, sizes)
    key = key_of(task, length, train + val, test, seed, compat)
    seed = derived_seed(key)
    folder = Path(cache or ROOT / 'data' / 'tasks', f'seed_{seed}', hashlib.md5(key.encode()).hexdigest())
    path = folder / (f'rows-{VERSION}-val{val}.npz' if val else f'rows-{VERSION}.npz')
    try:
        with np.load(path) as saved:
            return {name: (saved[f'{name}_set'], saved[f'{name}_label']) for name in sizes}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):  # none yet, or damaged: made (again)
        parts = make_splits(task, length, sizes, seed, compat)
    arrays = {f'{name}_set': rows for name, (rows, _) in parts.items()}
    arrays |= {f'{name}_label': labels for name, (_, labels) in parts.items()}
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f'{os.getpid()}.tmp.npz'  # a sweep's runs may make the same rows at once
    np.savez_compressed(beside, **arrays)
    os.replace(beside, path)
    return parts


# ---------------------------------------------------------------------------- one token per digit


def digits_of(task):
    return '0123456789' if task in DECIMAL else '01'


def digit_tokenizer(task):
    """Return a Tokenizer of ids 0 and 1, or 0 to 9; <|endoftext|>, 2 or 10, starts a row."""
    return build('char', digits_of(task))


def digit_ids(tokenizer, task):
    """Return the ids of the task's digits in any tokenizer, each encoded alone: it would group a text of digits."""
    ids = [tokenizer.encode(digit) for digit in digits_of(task)]
    if any(len(one) != 1 for one in ids):
        raise UserError('This tokenizer has no token for each digit; start from another checkpoint.')
    return np.array(ids)[:, 0]
