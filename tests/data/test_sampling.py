"""Chance: a function of seed and sample id alone, exact where it draws, uniform where it numbers."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from scipy import stats

from dede_ray.data.sampling import by_halves, draw_by_class, keyed_generator, keyed_uniform, sample_keys

IDS = [f"train-00000.tar/{i:04d}" for i in range(40)]


def test_draws_are_exact_and_proportional_even_where_classes_are_tiny():
    labels = [0] * 70 + [1] * 29 + [2]
    for num in (0, 1, 50, 99, 100):
        drawn = draw_by_class(labels, num, seed=0)
        assert len(drawn) == num
        share = Counter(labels[i] for i in drawn)
        assert abs(share[0] - 0.7 * num) <= 1.5
    assert draw_by_class(labels, 50, seed=0) == draw_by_class(labels, 50, seed=0) != draw_by_class(labels, 50, seed=1)


def test_a_samples_own_numbers_depend_on_its_name_and_the_seed_alone():
    def numbers(seed, name):
        return keyed_generator(seed, name).integers(0, 2**31, 4).tolist()

    assert numbers(0, "a") == numbers(0, "a")
    assert len({tuple(numbers(seed, name)) for seed in range(3) for name in ("a", "b", "aa", "")}) == 12


def splitmix64(key: int, count: int) -> list[float]:
    """Steele, Lea & Flood (OOPSLA 2014) with big integers: the state grows by the golden gamma, then is mixed."""
    numbers, state, mask = [], key % 2**64, 2**64 - 1
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        numbers.append(((z ^ (z >> 31)) >> 11) / 2**53)
    return numbers


def test_keyed_numbers_are_those_of_splitmix64():
    keys_B = torch.cat([sample_keys(IDS, seed=0), torch.tensor([0, -1, 2**63 - 1, -(2**63)])])
    expected = [splitmix64(key, 50) for key in keys_B.tolist()]
    assert keyed_uniform(keys_B, 50).tolist() == expected


def test_keyed_numbers_are_uniform_along_and_across_keys():
    uniform = keyed_uniform(sample_keys([str(i) for i in range(3000)], seed=0), 30).numpy()
    assert stats.kstest(uniform[:, 0], "uniform").pvalue > 1e-4  # the first number of many keys
    assert stats.kstest(uniform.ravel(), "uniform").pvalue > 1e-4
    assert abs(np.corrcoef(uniform[:, 0], uniform[:, 1])[0, 1]) < 0.08


def test_samples_are_halved_by_their_keys():
    ids = [f"train-00000.tar/{i:06d}" for i in range(2000)]
    half = by_halves(ids, 0)
    assert 900 < half.sum() < 1100
    order = np.random.default_rng(10).permutation(2000)
    np.testing.assert_array_equal(by_halves([ids[i] for i in order], 0), half[order])
    assert 800 < (by_halves(ids, 1) != half).sum() < 1200
    assert by_halves(["copy"] * 9, 0).std() == 0
    assert by_halves([], 0).size == 0
