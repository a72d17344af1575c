"""The twelve functions against other definitions of them, balance, leaks, seeds."""

import hashlib
import itertools

import numpy as np
import pytest
import sympy
import tokenizers

from lm import tasks
from lm.configurator import UserError
from lm.tokenizer import Tokenizer, build

# The positions of fn_e (the first 3) and fn_f, by length, as published.
POSITIONS = {
    20: [2, 14, 18, 15, 1, 10, 0, 4, 6, 11],
    25: [17, 12, 2, 0, 22, 20, 21, 6, 8, 18],
    30: [12, 0, 6, 25, 8, 15, 10, 18, 16, 23],
    50: [42, 17, 30, 34, 20, 25, 0, 8, 36, 18],
    100: [42, 96, 62, 98, 46, 95, 60, 24, 78, 16],
    40: [22, 9, 32],
}


def brackets_match(v):
    """The same language as fn_h with a stack of what is open."""
    opened = []
    for kind, closes in zip(v[::2], v[1::2]):
        if closes == '0':
            opened.append(kind)
        elif not opened or opened.pop() != kind:
            return False
    return not opened


def next_cells(v):
    windows = zip('0' + v[:-1], v, v[1:] + '0')
    return ''.join(f'{30:08b}'[7 - int(l + c + r, 2)] for l, c, r in windows)  # Rule 30 by its table


def definition(task, v):
    """0 or 1 for a string of digits, by other means than those under test."""
    return int(
        {
            'fn_a': lambda: v.count('1') % 2,
            'fn_b': lambda: v[: len(v) // 2].count('1') % 2,
            'fn_c': lambda: '10101010' in v,
            'fn_d': lambda: '00111111' in v,
            'fn_e': lambda: [v[i] for i in POSITIONS[len(v)][:3]].count('1') % 2,
            'fn_f': lambda: [v[i] for i in POSITIONS[len(v)]].count('1') % 2,
            'fn_g': lambda: v == ''.join(reversed(v)),
            'fn_h': lambda: brackets_match(v),
            'fn_i': lambda: list(sympy.factorint(int(v)).values()) == [1],
            'fn_j': lambda: next_cells(v).count('1') % 2,
            'fn_k': lambda: list(sympy.factorint(int(v)).values()) == [1],
            'fn_l': lambda: bin(int(hashlib.sha256(v.encode()).hexdigest(), 16)).count('1') % 2,
        }[task]()
    )


def strings(rows):
    return [''.join(map(str, row)) for row in rows.tolist()]


@pytest.mark.parametrize('task', tasks.TASKS)
def test_a_task_labels_as_defined_is_balanced_and_leaks_nothing(task):
    length = 12 if task in tasks.DECIMAL else 20
    parts = tasks.splits(task, length, train=60, val=20, test=100)
    seen = set()
    for name, size in (('train', 60), ('val', 20), ('test', 100)):
        rows, labels = parts[name]
        texts = strings(rows)
        assert rows.shape == (size, length) and labels.sum() == size // 2
        assert [definition(task, text) for text in texts] == labels.tolist()
        assert len(set(texts)) == size and not seen & set(texts)
        seen |= set(texts)


@pytest.mark.parametrize('task', ['fn_a', 'fn_b', 'fn_c', 'fn_d', 'fn_g', 'fn_h', 'fn_j', 'fn_l'])
def test_a_task_agrees_with_its_definition_on_every_short_row(task):
    rows = np.array(list(itertools.product((0, 1), repeat=12)), np.uint8)
    assert tasks.label(task, rows).tolist() == [definition(task, text) for text in strings(rows)]


@pytest.mark.parametrize('length', POSITIONS)
def test_the_positions_of_the_random_parities_are_the_published_ones(length):
    assert tasks.chosen_positions(length, 3).tolist() == POSITIONS[length][:3]
    assert tasks.chosen_positions(length, 10).tolist()[: len(POSITIONS[length])] == POSITIONS[length]


def test_composites_of_fn_k_end_like_primes_and_numbers_have_no_leading_zero():
    rows, labels = tasks.splits('fn_k', 10, train=60, test=60)['train']
    assert set(rows[:, -1].tolist()) <= {1, 3, 7, 9} and (rows[:, 0] > 0).all() and labels.sum() == 30


def test_the_derived_seed_is_the_published_one():
    assert tasks.derived_seed('fn_a', 50, 200, 10000, 42) == 106437611


def test_the_same_seed_gives_the_same_rows_and_another_seed_others():
    first, again, other = (tasks.splits('fn_a', 20, train=10, test=20, seed=seed) for seed in (7, 7, 8))
    assert all(np.array_equal(first[name][i], again[name][i]) for name in first for i in (0, 1))
    assert not np.array_equal(first['test'][0], other['test'][0])


def test_every_row_that_exists_can_be_asked_for():
    parts = tasks.splits('fn_a', 10, train=24, test=1000)
    assert len({text for rows, _ in parts.values() for text in strings(rows)}) == 1024


def test_compat_repeats_rare_rows_within_the_test_set_only():
    parts = tasks.splits('fn_g', 20, train=200, test=4000, compat=True)
    (train, _), (test, labels) = parts['train'], parts['test']
    assert not set(strings(train)) & set(strings(test)) and labels.sum() == 2000
    assert len(set(strings(test[labels == 1]))) == 1024 - 100
    assert (
        (test[labels == 0][:, :10] != test[labels == 0][:, :9:-1]).sum(1) == 1
    ).all()  # one bit from a palindrome


@pytest.mark.parametrize(
    'settings, part',
    [
        (dict(task='fn_z'), "'fn_z'; choose fn_a (parity_all)"),
        (dict(train=9), 'train_set_size is 9'),
        (dict(test=7), 'test_set_size is 7'),
        (dict(length=5), '2^5 = 32'),
        (dict(task='fn_h', length=22), 'multiple of 4'),
        (dict(task='fn_c', length=7), 'at least 8'),
        (dict(task='fn_g', length=8), 'has only 16 rows'),
    ],
)
def test_a_mistake_is_named(settings, part):
    with pytest.raises(UserError) as error:
        tasks.splits(**{**dict(task='fn_a', length=20, train=20, test=80), **settings})
    assert part in str(error.value)


@pytest.mark.faults
def test_more_rows_than_a_number_can_be_printed_of_are_enough():
    tasks.check('fn_a', 15_000, {'train': 20, 'test': 80})


def test_compat_of_tasks_that_were_not_published_so_is_reported(capsys):
    tasks.splits('fn_a', 20, 20, 80, compat=True)
    assert 'note: compat is for fn_g and fn_h; of fn_a it only draws other rows' in capsys.readouterr().out
    for compat in (False, True):
        with pytest.raises(UserError, match='choose smaller sets or longer sequences.$'):
            tasks.splits('fn_c', 12, 100, 100, compat=compat)


def test_digits_of_a_tokenizer_that_marks_the_first_word_are_single_tokens():
    vocabulary = {token: i for i, token in enumerate(['<unk>', '▁', *'0123456789'])}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token='<unk>'))
    marks = [tokenizers.normalizers.Prepend('▁'), tokenizers.normalizers.Replace(' ', '▁')]
    inner.normalizer = tokenizers.normalizers.Sequence(marks)
    assert tasks.digit_ids(Tokenizer(inner.to_str()), 'fn_i').tolist() == [*range(2, 12)]


def test_each_digit_is_one_token_and_the_start_is_another():
    for task, base in (('fn_a', 2), ('fn_i', 10)):
        tokenizer = build('char', tasks.digits_of(task))
        assert tasks.digit_ids(tokenizer, task).tolist() == list(range(base))
        assert (tokenizer.endoftext_id, tokenizer.mask_id) == (base, base + 1)


@pytest.mark.faults
@pytest.mark.parametrize('task', ['fn_g', 'fn_h', 'fn_a', 'fn_d', 'fn_c'])
def test_the_published_cells_of_twenty_digits_can_be_made(task, capsys):
    rows, labels = tasks.splits(task, 20, train=200, test=10000, compat=None)['test']
    assert len(rows) == 10000 and labels.sum() == 5000
    assert ('rows of the test set repeat' in capsys.readouterr().out) == (task in ('fn_g', 'fn_h'))
