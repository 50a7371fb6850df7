"""pass@N against brute force, its intervals, and samples against exact probabilities."""

import math
from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import torch
from conftest import ROOT

import common
import eval_passn


def test_pass_at_n_against_all_subsets():
    for n in range(1, 9):
        for c in range(n + 1):
            samples = [i < c for i in range(n)]
            for k in range(1, n + 1):
                subsets = list(combinations(samples, k))
                expected = sum(any(subset) for subset in subsets) / len(subsets)
                assert common.pass_at_n(n, c, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    "n, k", [(4096, 1), (4096, 256), (4096, 4096), (100_000, 4096), (100_000, 1), (65_536, 60_000)]
)
def test_pass_at_n_is_exact_for_many_samples(n, k):
    for c in (0, 1, 2, 17, n // 1000, n // 2, n - 1, n):
        expected = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
        assert float(common.pass_at_n(n, c, k)) == pytest.approx(float(expected), rel=1e-9, abs=1e-15)


def test_pass_at_n_refuses_more_than_was_sampled():
    with pytest.raises(ValueError, match="pass@65 cannot be estimated from 64 samples"):
        common.pass_at_n(64, 3, 65)


def test_pass_at_n_is_unbiased():
    p, n, k = 0.03, 64, 16
    c = np.random.default_rng(0).binomial(n, p, size=200_000)
    estimates = common.pass_at_n(n, c, k)
    assert abs(estimates.mean() - (1 - (1 - p) ** k)) < 4 * estimates.std() / len(c) ** 0.5


def test_exact_coverage_is_the_closed_form():
    log_p = torch.tensor([-math.inf, -50.0, -9.0, -1.0, 0.0], dtype=torch.float64)
    for n in (1, 16, 256, 4096):
        expected = -np.expm1(n * np.log1p(-np.exp(log_p.numpy()[:-1])))
        np.testing.assert_allclose(common.exact_pass_at_n(log_p, n), [*expected, 1.0], rtol=1e-12)


def test_bootstrap_interval_covers_at_its_level():
    generator = np.random.default_rng(0)
    hits = 0
    for i in range(400):
        values = generator.binomial(1, 0.3, size=200)
        low, high = common.bootstrap_interval(values, resamples=400, seed=i)
        hits += low <= 0.3 <= high
    assert 0.91 <= hits / 400 <= 0.98


def test_sampling_error_is_the_spread_over_new_samples():
    """With the problems fixed: drawing the samples again moves mean pass@k by that much."""
    generator = np.random.default_rng(0)
    p = generator.uniform(0.02, 0.3, size=50)
    n, k = 256, 8
    means = [common.pass_at_n(n, generator.binomial(n, p), k).mean() for _ in range(2000)]
    estimate = eval_passn.sampling_error(n, generator.binomial(n, p), k)
    assert estimate == pytest.approx(np.std(means), rel=0.15)


@pytest.fixture(scope="module")
def flat_model(cross_entropy_run, tokenizer):
    """The embedded model after two epochs of cross-entropy, its logits halved: it knows a little and has a heavy tail,
    so that cutting the tail shows: 9 % of its probability lies beyond the 50 likeliest tokens (as trained, 0.15 %)."""
    out, _ = cross_entropy_run
    model, scratch = common.load_model(str(out / "epoch-2"), tokenizer)
    assert not scratch
    model.lm_head.weight.data *= 0.5
    return model.eval()


def z_score(model, tokenizer, problems=40, n=1024):
    """Σ(c_i - n p_i) / sqrt(Σ n p_i (1-p_i)) of samples against exact p, by exact match of the token ids."""
    rows = [row for row in common.load_problems(str(ROOT / "examples/arithmetic"), "test") if len(row["answer"]) == 1]
    examples, _ = common.encode(rows[:problems], tokenizer, "direct", 2048)
    with torch.no_grad():
        p = common.completion_log_probs(model, common.collate(examples, 0)).double().exp()
    counts = []
    for i, example in enumerate(examples):
        (samples,) = common.generate(model, tokenizer, [example.prompt_ids], n, 3, seed=common.seed_of("test", i))
        counts.append(samples.count(example.completion_ids))
    assert sum(counts) > 1000  # enough to tell
    return ((torch.tensor(counts) - n * p).sum() / (n * p * (1 - p)).sum().sqrt()).item()


def test_samples_agree_with_exact_probabilities(flat_model, tokenizer):
    assert abs(z_score(flat_model, tokenizer)) < 4


def test_that_check_would_notice_top_k_50(flat_model, tokenizer, monkeypatch):
    neutral = common.neutral_generation_config
    monkeypatch.setattr(common, "neutral_generation_config", lambda t, **s: neutral(t, **s | {"top_k": 50}))
    assert abs(z_score(flat_model, tokenizer)) > 4
