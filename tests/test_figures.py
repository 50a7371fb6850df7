"""The paper's other figures: derivatives against finite differences, the lemmas of §4.2 against the
exact optimum, and each figure's command."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import ROOT

import common
import eval_passn


def measure(*arguments):
    eval_passn.main([*map(str, arguments)])


def curves(path):
    """The curves of each panel of a figure, in order: [[points, ...], ...]."""
    return [list(panel["curves"].values()) for panel in json.loads(path.read_text())]


# Figures 5 and 13


def test_the_derivative_along_a_step_is_that_of_finite_differences(cross_entropy_run, tokenizer):
    model = common.load_model(str(cross_entropy_run[0] / "epoch-0.86"), tokenizer).eval()
    rows = common.load_problems(str(ROOT / "examples/arithmetic"), "test")[:48]
    examples, _ = common.encode(rows, tokenizer, model.config, "direct")
    n, batch, test = 256, examples[:8], examples[8:]
    test_gradient = eval_passn.gradient(model, test, n, tokens=100)
    found = eval_passn.along_step(test_gradient, model, batch, tokens=64)
    step = [-g for g in eval_passn.gradient(model, batch, 1, tokens=10_000)]

    def test_loss(eta):
        with torch.no_grad():
            for p, g in zip(model.parameters(), step, strict=True):
                p += eta * g
            log_p = common.log_probs(model, test)
            for p, g in zip(model.parameters(), step, strict=True):
                p -= eta * g
        return common.dco_loss(log_p.double(), n).sum().item()

    eta = 1e-3 / math.sqrt(sum((g**2).sum().item() for g in step))
    assert found == pytest.approx((test_loss(eta) - test_loss(-eta)) / (2 * eta), rel=0.01)
    assert abs(found) > 1  # there is something to compare


def test_figure_5_is_about_unseen_problems_of_each_level(cross_entropy_run, tokenizer, tmp_path):
    early, late = cross_entropy_run[0] / "epoch-0.11", cross_entropy_run[0] / "epoch-0.86"
    measure("--figure", 5, early, late, "--out", tmp_path)
    (of_early,), (of_late,) = curves(tmp_path / "figure-5.json")
    for points in (of_early, of_late):
        assert [level for level, *_ in points] == [1, 2, 3, 4, 5]
        assert all(low <= mean <= high for _, mean, low, high in points)
    assert all(mean < 0 for _, mean, *_ in of_early)  # early, all data help
    # The late checkpoint's level 1 once more, from the gradient of single examples.
    seen = set(json.loads((late / "dco.json").read_text())["seen_ids"])
    rows = common.load_problems(str(ROOT / "examples/arithmetic"), "train")
    unseen = [row for row in rows if row["id"] not in seen]
    counts = np.bincount([row["level"] for row in unseen])[1:]
    size = counts.min() // 4
    easy = [row for row in unseen if row["level"] == 1][: counts[0] // size * size]
    model = common.load_model(str(late), tokenizer)
    train, _ = common.encode(easy, tokenizer, model.config, "direct")
    rows = common.load_problems(str(ROOT / "examples/arithmetic"), "test")
    test, _ = common.encode(rows, tokenizer, model.config, "direct")
    test_gradient = eval_passn.gradient(model, test, 256, 2048)
    found = [eval_passn.along_step(test_gradient, model, [one], 2048) for one in train]
    assert of_late[0][1] == pytest.approx(np.mean(found), rel=1e-2)


def test_figure_13_has_quartiles_of_p_and_f_by_level(cross_entropy_run, tokenizer, tmp_path):
    checkpoint = cross_entropy_run[0] / "epoch-0.86"
    measure("--figure", 13, checkpoint, "--out", tmp_path)
    (confidence,), (factor,) = curves(tmp_path / "figure-13.json")
    seen = set(json.loads((checkpoint / "dco.json").read_text())["seen_ids"])
    rows = common.load_problems(str(ROOT / "examples/arithmetic"), "train")
    model = common.load_model(str(checkpoint), tokenizer)
    for i, level in enumerate(range(1, 6)):
        unseen = [row for row in rows if row["level"] == level and row["id"] not in seen]
        examples, _ = common.encode(unseen, tokenizer, model.config, "direct")
        log_p = common.score(common.make_accelerator(), model, examples, 256)
        for points, values in ((confidence, log_p.exp()), (factor, common.dco_factor(log_p, 256))):
            expected = np.quantile(values.numpy(), [0.5, 0.25, 0.75])
            assert points[i] == pytest.approx([level, *expected], rel=1e-3, abs=1e-9)


# Lemmas 4.1 to 4.3 and A.1


def optimum(p, n):
    """The policy q with the largest coverage Σ p_i (1 - (1-q_i)^n) for accuracies p: water-filling.
    Where q_i > 0, p_i (1-q_i)^(n-1) is the same, e^-w."""
    log_p = np.log(np.asarray(p, dtype=float))

    def policy(w):
        return np.maximum(0, -np.expm1((-w - log_p) / (n - 1)))

    low, high = -log_p.max(), -log_p.min() + 60 * (n - 1)  # all q_i at 0, all near 1
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if policy(middle).sum() < 1 else (low, middle)
    return policy(high)


def coverage(p, policy, n):
    return sum(p_i * (1 - (1 - q) ** n) for p_i, q in zip(p, policy, strict=True))


@pytest.mark.parametrize("n", [2, 16, 256, 4096])
def test_water_filling_is_the_optimum_and_well_calibrated(n):
    rng = np.random.default_rng(n)
    for size in (2, 3, 7):
        p = np.sort(rng.dirichlet(np.ones(size)))[::-1]
        best = optimum(p, n)
        assert best.sum() == pytest.approx(1, abs=1e-9)
        assert (np.diff(best) <= 1e-12).all()  # Lemma A.1: a likelier answer has no less confidence
        for _ in range(200):  # no other policy covers more, near or far
            other = rng.dirichlet(np.ones(size))
            for policy in (other, 0.99 * best + 0.01 * other):
                assert coverage(p, policy, n) <= coverage(p, best, n) + 1e-12


def test_coverage_of_one_problem_is_monotonic_and_of_two_is_not():
    p = np.linspace(0, 1, 101)  # Lemma 4.1: pass@N of one problem rises with its pass@N'
    for n in (1, 4, 64):
        values = common.exact_pass_at_n(np.log(np.maximum(p, 1e-300)), n)
        assert (np.diff(values) >= 0).all()
    confident, hedging = [0.0, -math.inf], [math.log(0.1)] * 2  # §4.2: p = (1, 0) and (.1, .1)
    assert common.exact_pass_at_n(confident, 1).mean() == pytest.approx(0.5)
    assert common.exact_pass_at_n(hedging, 1).mean() == pytest.approx(0.1)
    assert common.exact_pass_at_n(confident, 64).mean() == pytest.approx(0.5)
    assert common.exact_pass_at_n(hedging, 64).mean() > 0.99


@pytest.mark.parametrize("n", [1.5, 2, 16, 4096])
def test_the_upper_bound_holds_for_two_answers(n):
    rng = np.random.default_rng(0)
    for _ in range(50):
        p1, epsilon = rng.uniform(0.5, 0.95), rng.uniform(0, 0.04)
        bound = eval_passn.upper_bound(n, p1, epsilon, 2)
        assert optimum([p1, 1 - p1 - epsilon], n)[0] <= bound + 1e-9
    for k in (3, 5):  # p_2 = ... = p_k and nothing else: equality
        p = [0.5] + [0.5 / (k - 1)] * (k - 1)
        bound = eval_passn.upper_bound(n, 0.5, 0, k)
        assert optimum(p, n)[0] == pytest.approx(bound, abs=1e-9)


def test_the_upper_bound_is_false_in_general():
    p, n = [0.5275, 0.4716, 0.0008], 10
    assert 0 < 1 - sum(p) < 1  # the lemma's ε
    bound = eval_passn.upper_bound(n, p[0], 1 - sum(p), k=3)
    assert optimum(p, n)[0] - bound == pytest.approx(0.131, abs=1e-3)


@pytest.mark.parametrize("n", [1.5, 2, 16, 4096])
def test_the_lower_bound_holds_for_few_answers(n):
    rng = np.random.default_rng(1)
    tried = 0
    for _ in range(400):
        p = np.sort(rng.dirichlet(np.ones(rng.integers(2, 6))))[::-1]
        if len(p) <= math.ceil((1 - p[0]) / p[1]) + 1 and p[0] - p[1] > 1e-3:
            tried += 1
            assert optimum(p, n)[0] >= eval_passn.lower_bound(n, p[0], p[1]) - 1e-9
    assert tried > 20


def test_the_lower_bound_is_false_for_many_answers():
    p = [0.5, 0.3] + [0.01] * 20  # s = 2: more than three answers
    assert optimum(p, 4096)[0] < eval_passn.lower_bound(4096, p[0], p[1]) - 0.1


# Figures 2b, 4, 11 and 12


def test_figure_11_shows_bounds_that_fall_from_1(tmp_path):
    measure("--figure", 11, "--out", tmp_path)
    ((upper, lower),) = curves(tmp_path / "figure-11.json")
    for points in (upper, lower):
        values = [y for _, y in points]
        assert values[0] == pytest.approx(1, abs=1e-6) and (np.diff(values) <= 1e-12).all()
    assert all(u >= low - 1e-12 for (_, u), (_, low) in zip(upper, lower, strict=True))


def test_figure_2b_is_the_factor(tmp_path):
    measure("--figure", "2b", "--ns", "1,16,256", "--out", tmp_path)
    (of_n,) = curves(tmp_path / "figure-2b.json")
    for n, points in zip((1, 16, 256), of_n, strict=True):
        for p, factor in points[:-1:20]:
            expected = n * (1 - p) ** (n - 1) * p / (1 - (1 - p) ** n)
            assert factor == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_figure_4_is_what_a_run_discarded(tmp_path):
    lines = [{"step": k, "candidates": 40 + k, "accepted": 32} for k in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    measure("--figure", 4, tmp_path)
    assert curves(tmp_path / "figure-4.json") == [[[[1, 9], [2, 10], [3, 11]]]]
    assert (tmp_path / "figure-4.png").read_bytes().startswith(b"\x89PNG")


def test_figure_12_ranks_the_likeliest_answers(cross_entropy_run, tokenizer, one_grader, tmp_path):
    checkpoint, data = cross_entropy_run[0] / "epoch-2", tmp_path / "data.jsonl"
    lines = (ROOT / "examples/arithmetic/test.jsonl").read_text().splitlines()[:8]
    data.write_text("\n".join(lines) + "\n")
    measure("--figure", 12, checkpoint, "--data", data, "--out", tmp_path)
    (result,) = json.loads((tmp_path / "passn-data.json").read_text())["checkpoints"]
    model = common.load_model(str(checkpoint), tokenizer)
    rows = common.load_problems(data, "test")
    for row, answers in zip(rows, result["ranked"], strict=True):
        found = [row | {"answer": answer} for answer in answers if answer is not None]
        assert len(answers) == 16 and len({one["answer"] for one in found}) == len(found) > 8
        examples, _ = common.encode(found, tokenizer, model.config, "direct")
        log_p = common.log_probs(model, examples).detach().numpy()
        assert (np.diff(log_p) <= 1e-4).all()  # the likeliest first
    for rank, estimate in result["ranks"].items():
        answers = [ranked[int(rank) - 1] for ranked in result["ranked"]]
        right = [row["answer"] == one for row, one in zip(rows, answers, strict=True)]
        assert estimate["pass"] == pytest.approx(100 * np.mean(right))
    assert (tmp_path / "figure-12-data.png").is_file()
