"""pass@N against brute force, both kinds of error, and samples against exact probabilities."""

import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import torch

import common
import eval_passn


def test_pass_at_n_is_the_share_of_subsets_with_a_right_sample():
    for n in range(1, 9):
        for c in range(n + 1):
            samples = [i < c for i in range(n)]
            for k in range(1, n + 1):
                subsets = list(combinations(samples, k))
                expected = sum(any(subset) for subset in subsets) / len(subsets)
                assert common.pass_at_n(n, c, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n, k", [(4096, 256), (4096, 4096), (100_000, 4096), (65_536, 60_000)])
def test_pass_at_n_is_exact_for_many_samples(n, k):
    for c in (0, 1, 2, 17, n // 1000, n // 2, n - 1, n):
        expected = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
        estimate = float(common.pass_at_n(n, c, k))
        assert estimate == pytest.approx(float(expected), rel=1e-9, abs=1e-15)


def test_pass_at_n_refuses_more_than_was_sampled():
    with pytest.raises(ValueError, match="from 64 samples"):
        common.pass_at_n(64, 3, 65)


def test_exact_coverage_is_the_closed_form():
    log_p = torch.tensor([-math.inf, -50.0, -9.0, -1.0, 0.0], dtype=torch.float64)
    for n in (1, 16, 256, 4096):
        expected = -np.expm1(n * np.log1p(-np.exp(log_p.numpy()[:-1])))
        np.testing.assert_allclose(common.exact_pass_at_n(log_p, n), [*expected, 1.0], rtol=1e-12)


def test_the_interval_over_problems_covers_at_its_level():
    hits, generator = 0, np.random.default_rng(0)
    for _ in range(400):
        interval = common.mean_and_interval(generator.binomial(1, 0.3, size=200), resamples=400)
        hits += interval["low"] <= 0.3 <= interval["high"]
    assert 0.91 <= hits / 400 <= 0.98


@pytest.mark.parametrize("n, k, points", [(64, 64, 1.13), (64, 16, 0.59), (1024, 64, 0.24)])
def test_sampling_error_is_the_spread_over_new_samples(n, k, points):
    """With the problems fixed: by how much drawing all samples again moves mean pass@k."""
    generator = np.random.default_rng(0)
    p = generator.beta(0.3, 3, size=500)
    means = [100 * common.pass_at_n(n, generator.binomial(n, p), k).mean() for _ in range(1000)]
    assert np.std(means) == pytest.approx(points, rel=0.1)
    errors = [eval_passn.sampling_error(n, generator.binomial(n, p), k) for _ in range(5)]
    assert errors == pytest.approx([np.std(means)] * 5, rel=0.1)
