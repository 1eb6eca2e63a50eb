"""Seeds are integers of 64 bits: neighbours differ, and those below 2^53 give what they have always given."""

import hashlib

import numpy as np
import pytest
import torch

from mmdit import keyed

PURPOSES = ("sampling noise", "noise", "time", "weights", "dropout", "shapes train", "split 0001.jpg", "word vector")


def before(seed, purpose, *key):
    """The first version, which gave NumPy a list of Python integers."""
    digest = int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")
    mask = (1 << 64) - 1
    counter = [0, *(k & mask for k in key), *[0] * (3 - len(key))]
    return np.random.Generator(np.random.Philox(key=[seed & mask, digest], counter=counter))


@pytest.mark.parametrize("seed", (0, 1, 42, 2**31, 2**32 + 7, 2**53 - 1))
def test_seeds_below_2_to_53_draw_what_they_always_drew(seed):
    for purpose in PURPOSES:
        assert (keyed.generator(seed, purpose, 3, 5).random(8) == before(seed, purpose, 3, 5).random(8)).all()


def test_neighbours_differ_over_all_64_bits():
    drawn = np.random.default_rng(0)
    seeds = [2**53, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64 - 2, *map(int, drawn.integers(0, 2**63, 200))]
    seeds += [-1, -2, -1024, -(2**63), *map(int, -drawn.integers(1, 2**62, 50))]
    for purpose in PURPOSES:
        for seed in seeds:
            one, other = (keyed.generator(s, purpose, 0).random(4) for s in (seed, seed + 1))
            assert not (one == other).all(), (seed, purpose)


def test_integers_of_libraries_are_integers():
    want = keyed.generator(7, "noise").random(2)
    for seed in (np.int64(7), np.uint8(7), torch.tensor(7)):
        assert (keyed.generator(seed, "noise").random(2) == want).all()


@pytest.mark.parametrize("seed", (None, [1, 2], 1.0, "1", True, float("nan")))
def test_what_is_no_integer_is_refused(seed):
    with pytest.raises(TypeError, match="expected an integer"):
        keyed.generator(seed, "noise")


@pytest.mark.parametrize("seed", (2**64, -(2**63) - 1))
def test_more_than_64_bits_are_refused(seed):
    with pytest.raises(ValueError, match="64 bits"):
        keyed.generator(seed, "noise")
