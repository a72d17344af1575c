"""Random numbers by key: pure functions of (purpose, seed, step, row, ...), so that there is no state to save."""

import numpy as np

PERMUTE, MOVE, LEVEL, NOISE, BELIEF, ANNEAL, PADDING, BLOCKS = range(8)  # purposes: the first part of a key


def random_bits(*key):
    """Compute 64 random bits for each element of the broadcast integer arrays `key`, by their values alone:
    the finaliser of splitmix64 (Steele et al. 2014) chained over the key."""
    bits = np.uint64(0)
    with np.errstate(over='ignore'):  # arithmetic modulo 2**64 is the point
        for part in key:
            bits = (bits ^ np.asarray(part).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            bits = bits ^ (bits >> np.uint64(31))
    return bits


def torch_seed(*key):
    """Compute a seed for a torch generator."""
    return int(random_bits(*key)) >> 1


def uniform(*key):
    """Draw uniform float32 numbers in [0, 1), of the shape that the key's parts broadcast to."""
    return (random_bits(*key) >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)


def permuted(index, size, *key):
    """Map each `index` through a random permutation of range(size), named by `key`, without an array of that
    size: a four-round Feistel network over the next even power of two, walked until it lands below `size`."""
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
