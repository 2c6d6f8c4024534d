"""The order in which samples are read: a keyed permutation, computed position by position.

A Feistel network over the smallest even number of bits that holds n, walked until the result is
below n (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002). Nothing of size n is ever
stored, a resume starts at any position at once, and the order is defined here rather than by a numpy
version (numpy does not promise that `Generator.permutation` keeps its stream).

Shapes: B positions asked for.
"""

import numpy as np

_ROUNDS = 8
_MASK = (1 << 64) - 1


def permute(positions_B: np.ndarray, num_samples: int, *, seed: int, epoch: int) -> np.ndarray:
    """Where each position of an epoch's order points, int64 [B].

    Over positions 0..num_samples-1 this is a permutation, fixed by (seed, epoch, num_samples) alone.

    Args:
        positions_B: integers in [0, num_samples).
        num_samples: 1 .. 2**62.
    """
    assert 1 <= num_samples <= 1 << 62, num_samples
    half_bits = max(2, ((num_samples - 1).bit_length() + 1) // 2)
    keys = _round_keys(seed, epoch)
    values = positions_B.astype(np.uint64)
    assert values.size == 0 or values.max() < num_samples
    values = _feistel(values, half_bits, keys)
    while (outside := values >= num_samples).any():
        values[outside] = _feistel(values[outside], half_bits, keys)
    return values.astype(np.int64)


def _feistel(values: np.ndarray, half_bits: int, keys: list[np.uint64]) -> np.ndarray:
    shift = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << shift) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _round_keys(seed: int, epoch: int) -> list[np.uint64]:
    state = np.array([seed & _MASK], dtype=np.uint64)
    state = _mix(state + np.uint64(0x9E3779B97F4A7C15)) ^ np.uint64(epoch & _MASK)
    keys = []
    for _ in range(_ROUNDS):
        state = _mix(state + np.uint64(0x9E3779B97F4A7C15))
        keys.append(state[0])
    return keys
