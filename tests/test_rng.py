"""Random numbers by key: permutations are permutations, uniform numbers are uniform and uncorrelated."""

import itertools

import numpy as np
import pytest

from lm import rng


@pytest.mark.parametrize('size', [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097])
def test_permuted_is_a_permutation(size):
    assert sorted(rng.permuted(range(size), size, 7, size)) == list(range(size))


def test_permuted_differs_by_each_part_of_its_key_and_moves_most_elements():
    orders = [rng.permuted(range(500), 500, *key) for key in ((0, 1), (1, 0), (0, 2), (2, 1), (0, 1, 0))]
    for one, other in itertools.combinations(orders, 2):
        assert np.mean(one == other) < 0.02
    assert np.mean(orders[0] == np.arange(500)) < 0.02


def test_permuted_gives_single_elements_of_a_huge_range():
    size = 10**12
    permuted = rng.permuted([0, 1, size - 1], size, 3)
    assert len(set(permuted)) == 3 and all(0 <= index < size for index in permuted)
    assert rng.permuted([1], size, 3)[0] == permuted[1]


def test_uniform_is_uniform_in_0_to_1():
    numbers = rng.uniform(5, np.arange(100_000))
    assert numbers.min() >= 0 and numbers.max() < 1
    shares = np.histogram(numbers, 20, (0, 1))[0] / len(numbers)
    assert np.abs(shares - 0.05).max() < 0.004  # six standard deviations


def test_uniform_is_uncorrelated_along_and_across_keys():
    numbers = rng.uniform(5, np.arange(300)[:, None], np.arange(300))
    others = rng.uniform(6, np.arange(300)[:, None], np.arange(300))
    pairs = [
        (numbers[1:], numbers[:-1]),
        (numbers[:, 1:], numbers[:, :-1]),
        (numbers, numbers.T),
        (numbers, others),
    ]
    for one, other in pairs:
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.02
    assert not np.array_equal(rng.uniform(1, 2, np.arange(9)), rng.uniform(2, 1, np.arange(9)))


def test_the_numbers_are_those_of_the_runs_that_exist():
    """Other numbers would give other batches: a run of an earlier version could not go on with its rows."""
    assert int(rng.random_bits(1, 2, 3)) == 15020427595393229491
    assert rng.permuted(range(8), 8, 0, 5).tolist() == [0, 1, 5, 3, 6, 2, 4, 7]
    assert rng.uniform(3, 0, 5).item() == 0.7514387369155884
