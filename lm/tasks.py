"""Twelve functions of a row of digits that a model can learn to compute, and balanced sets of examples.

    rows, labels = splits('fn_a', length=50, train=200, test=10000)['train']

fn_a to fn_j and fn_l read bits, fn_i and fn_k decimal digits; each answers 0 or 1. Some are learnt from a few
hundred examples (a pattern), some never are (the parity of fifty bits).
"""

import hashlib

import numpy as np
import sympy
import torch

from lm.configurator import UserError, note, require

PATTERNS = {'fn_c': (1, 0, 1, 0, 1, 0, 1, 0), 'fn_d': (0, 0, 1, 1, 1, 1, 1, 1)}


def parity(x):
    return x.sum(1) % 2


def contains(x, pattern):
    windows = np.lib.stride_tricks.sliding_window_view(x, len(pattern), axis=1)  # (N, L - 7, 8)
    return (windows == pattern).all(2).any(1)


def chosen_positions(length, count):
    """Return the first positions of a fixed permutation, whose parity fn_e (3) and fn_f (10) ask for."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(42))[:count].numpy()


def balanced_brackets(x):
    """Label Dyck-2: pairs of bits are 00=( 01=) 10=[ 11=], all opened ones closed in the right order."""
    rows = [''.join(row) for row in np.array(list('()[]'))[2 * x[:, ::2] + x[:, 1::2]]]
    for _ in range(x.shape[1] // 4):  # each time at least one pair is cancelled
        rows = [row.replace('()', '').replace('[]', '') for row in rows]
    return [row == '' for row in rows]


def parity_of_next_cells(x):
    """Label the parity after one step of the cellular automaton Rule 30, zeros beyond both ends."""
    padded = np.pad(x, ((0, 0), (1, 1)))
    return parity(padded[:, :-2] ^ (padded[:, 1:-1] | padded[:, 2:]))


def parity_of_sha256(x):
    digests = (hashlib.sha256(text.encode()).digest() for text in texts_of(x))
    return [int.from_bytes(digest).bit_count() % 2 for digest in digests]


def texts_of(x):
    return [''.join(map(str, row)) for row in x.tolist()]


TASKS = {  # id: name, what labels rows (N, L) of digits, the shortest row
    'fn_a': ('parity_all', parity, 1),
    'fn_b': ('parity_first_half', lambda x: parity(x[:, : x.shape[1] // 2]), 2),
    'fn_c': ('patternmatch1', lambda x: contains(x, PATTERNS['fn_c']), 8),
    'fn_d': ('patternmatch2', lambda x: contains(x, PATTERNS['fn_d']), 8),
    'fn_e': ('parity_rand_3', lambda x: parity(x[:, chosen_positions(x.shape[1], 3)]), 1),
    'fn_f': ('parity_rand_10', lambda x: parity(x[:, chosen_positions(x.shape[1], 10)]), 1),
    'fn_g': ('palindrome', lambda x: (x == x[:, ::-1]).all(1), 1),
    'fn_h': ('dyck2', balanced_brackets, 4),
    'fn_i': ('prime_decimal', lambda x: [*map(sympy.isprime, map(int, texts_of(x)))], 2),
    'fn_j': ('automata_parity', parity_of_next_cells, 1),
    'fn_k': ('prime_decimal_tf_check', lambda x: [*map(sympy.isprime, map(int, texts_of(x)))], 2),
    'fn_l': ('sha256_parity', parity_of_sha256, 1),
}
DECIMAL = ('fn_i', 'fn_k')
RARE = {'fn_g': 2**10, 'fn_h': 42 * 2**5}  # positives of 20 digits


def label(task, x):
    """Return 0 or 1 (N,) for rows x (N, L) of digits."""
    return np.asarray(TASKS[task][1](x)).astype(np.int64)


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
    x[:, :length] ^= order < draw.integers(1, most + 1, len(x))[:, None]


def draw_number(draw, digits):
    """Draw a number of exactly so many decimal digits, a Python int."""
    return int(''.join(map(str, [*draw.integers(1, 10, 1), *draw.integers(0, 10, digits - 1)])))


def draw_numbers(draw, n, length, is_prime):
    """Draw the next primes after random numbers, or products of two numbers of half the digits."""
    found = []
    for _ in range(n):
        if is_prime:
            number = sympy.nextprime(draw_number(draw, length))
        else:
            number = draw_number(draw, length // 2) * draw_number(draw, length - length // 2)
        found += [list(map(int, str(number)))] if len(str(number)) == length else []
    return np.array(found, np.uint8).reshape(-1, length)


def draw_class(task, wanted, draw, n, length, near_misses):
    """Draw at most n rows of class `wanted`, 0 or 1; rows of a rare class are made, others drawn until they fit.

    near_misses: negatives of fn_g are palindromes with one bit flipped; those of fn_h always have some flipped.
    """
    if task in DECIMAL:
        x = draw_numbers(draw, min(n, 256), length, wanted)
        x = x[np.isin(x[:, -1], (1, 3, 7, 9))] if task == 'fn_k' else x
    elif task == 'fn_h':
        x = draw_brackets(draw, n, length)
        if not wanted:
            flip(draw, x, min(5, length), length)
    else:
        x = draw.integers(0, 2, (n, length), np.uint8)

    if task in PATTERNS and wanted:
        start = draw.integers(0, length - 7, n)
        x[np.arange(n)[:, None], start[:, None] + np.arange(8)] = PATTERNS[task]
    if task == 'fn_g' and (wanted or near_misses):
        x[:, length - length // 2 :] = x[:, : length // 2][:, ::-1]
        if not wanted:
            flip(draw, x, 1, length // 2)
    return x[label(task, x) == wanted]


def rows_of_class(task, wanted, count, draw, length, compat):
    """Return `count` different rows of a class, or as many as there are if they are fewer."""
    x, idle = np.zeros((0, length), np.uint8), 0
    while len(x) < count and idle < 50:
        before = len(x)
        x = np.concatenate([x, draw_class(task, wanted, draw, max(1024, count), length, compat)])
        _, first = np.unique(x, axis=0, return_index=True)
        x = x[np.sort(first)]  # in the order in which they first came
        idle = 0 if len(x) > before else idle + 1
    return x[:count]


def check(task, length, sizes):
    """Raise UserError where the sets cannot be made. sizes: {'train': rows, 'val': rows, 'test': rows}"""
    names = ', '.join(f'{key} ({name})' for key, (name, *_) in TASKS.items())
    require(task in TASKS, f'target_func is {task!r}; choose {names}.')
    shortest = TASKS[task][2]
    require(length >= shortest, f'sequence_length is {length}; {task} needs at least {shortest}.')
    is_whole = task != 'fn_h' or length % 4 == 0  # two bits per bracket, as many closed as opened
    require(is_whole, f'sequence_length is {length}; {task} needs a multiple of 4.')
    for key, size in sizes.items():
        fits = size in range(0 if key == 'val' else 2, 2**62, 2)
        require(fits, f'{key}_set_size is {size}; it must be even, half of each class.')
    total, base = sum(sizes.values()), len(digits_of(task))
    if total > base**length:
        problem = f'The sets ask for {total:,} rows, and there are only {base}^{length} = {base**length:,}'
        raise UserError(f'{problem}; choose smaller sets or a longer sequence_length.')


def derived_seed(task, length, train, test, seed, compat=False):
    """Return the seed of a pool of rows. train: with the validation rows, which come out of the same pool."""
    key = f'{task}|L={length}|train={train}|test={test}|base_seed={seed}' + '|compat' * bool(compat)
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], 'big') & 0x7FFFFFFF


def splits(task, length, train, test, val=0, seed=42, compat=False):
    """Return {'train', 'val', 'test': (rows (N, L) uint8, labels (N,))}: balanced, no row of one set in another.

    compat: fn_g and fn_h as published at L = 20, where there are fewer positives than asked for: rows repeat
    within the test set, and negatives of fn_g are one bit from a palindrome. None: so where there are fewer.
    """
    sizes = {'train': train, 'val': val, 'test': test}
    check(task, length, sizes)
    if compat and task not in RARE:
        note(f'compat is for {" and ".join(RARE)}; of {task} it only draws other rows.')
    if compat is None and length == 20 and sum(sizes.values()) // 2 > RARE.get(task, 2**62):
        compat = True
        note(f'{task} has {RARE[task]} positives of 20 digits: rows of the test set repeat.')
    draw = np.random.default_rng(derived_seed(task, length, train + val, test, seed, compat))
    parts, count = {name: [] for name in sizes}, sum(sizes.values()) // 2
    for wanted in (0, 1):
        x = rows_of_class(task, wanted, count, draw, length, compat)
        problem = f'{task} has only {len(x)} rows of sequence_length={length} with label {wanted}'
        x = x[draw.permutation(len(x))]
        for name, size in sizes.items():  # the test set comes last: what is missing repeats there
            part, x = x[: size // 2], x[size // 2 :]
            if missing := size // 2 - len(part):
                repeats = compat and task in RARE and name == 'test' and len(part)
                remedy = 'choose smaller sets or longer sequences' + ', or --compat' * (task in RARE)
                require(repeats, f'{problem}; {remedy}.')
                part = np.concatenate([part, part[draw.integers(0, len(part), missing)]])
            parts[name].append(part)
    return {name: (np.concatenate(both), np.repeat([0, 1], sizes[name] // 2)) for name, both in parts.items()}


def digits_of(task):
    return '0123456789' if task in DECIMAL else '01'


def digit_ids(tokenizer, task):
    """Return the ids of the task's digits in any tokenizer, each encoded alone: it would group a text of digits."""
    for encode in (tokenizer.encode, tokenizer.encode_behind):  # some put a mark before the first word
        ids = [encode(digit) for digit in digits_of(task)]
        if all(len(one) == 1 for one in ids):
            return np.array(ids)[:, 0]
    raise UserError('This tokenizer has no token for each digit; start from another checkpoint.')
