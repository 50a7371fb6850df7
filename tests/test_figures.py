"""The paper's other figures: derivatives against finite differences, the lemmas of §4.2 against the
exact optimum, and each figure's command."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from conftest import ROOT

import common
import eval_passn
from examples import by_level


def measure(*arguments):
    eval_passn.main([*map(str, arguments)])


def curves(path):
    """The curves of each panel of a figure, in order: [[points, ...], ...]."""
    return [list(panel["curves"].values()) for panel in json.loads(path.read_text())]


# ---- Figures 5 and 13 ----------------------------------------------------------------------------
def test_the_derivative_along_a_step_is_that_of_finite_differences(cross_entropy_run, tokenizer):
    model = common.load_model(str(cross_entropy_run[0] / "epoch-0.86"), tokenizer).eval()
    rows = common.load_problems(str(ROOT / "examples/arithmetic"), "test")[:48]
    examples, _ = common.encode(rows, tokenizer, model.config, "direct")
    n, batch, test = 256, examples[:8], examples[8:]
    test_gradient = by_level.gradient(model, test, n, tokens=100)
    found = by_level.along_step(test_gradient, model, batch, tokens=64)
    step = [-g for g in by_level.gradient(model, batch, 1, tokens=10_000)]
    eta = 1e-3 / math.sqrt(sum((g**2).sum().item() for g in step))

    def test_loss_after(sign):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p, g in zip(moved.parameters(), step, strict=True):
                p += sign * eta * g
            return common.dco_loss(common.log_probs(moved, test).double(), n).sum().item()

    assert found == pytest.approx((test_loss_after(1) - test_loss_after(-1)) / (2 * eta), rel=0.01)
    assert abs(found) > 1  # there is something to compare


def test_figure_5_has_the_mean_derivative_of_each_level(cross_entropy_run, tmp_path):
    early, late = cross_entropy_run[0] / "epoch-0.11", cross_entropy_run[0] / "epoch-0.86"
    by_level.main([str(early), str(late), "--out", str(tmp_path)])
    (of_early,), (of_late,) = curves(tmp_path / "figure-5.json")
    for points in (of_early, of_late):
        assert [level for level, *_ in points] == [1, 2, 3, 4, 5]
        assert all(low < mean < high for _, mean, low, high in points)
    assert all(mean < 0 for _, mean, *_ in of_early)  # early, all data help
    assert (tmp_path / "figure-5.png").read_bytes().startswith(b"\x89PNG")


def test_figure_5_needs_a_checkpoint_within_an_epoch(cross_entropy_run, capsys, tmp_path):
    with pytest.raises(SystemExit):
        by_level.main([str(cross_entropy_run[0] / "epoch-2"), "--out", str(tmp_path)])
    assert "--checkpoint-at" in capsys.readouterr().err


def test_figure_13_has_quartiles_of_p_and_f_on_unseen_data(cross_entropy_run, tokenizer, tmp_path):
    checkpoint = cross_entropy_run[0] / "epoch-0.86"
    by_level.main([str(checkpoint), "--out", str(tmp_path)])
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


# ---- Lemmas 4.2, 4.3 and A.1 ---------------------------------------------------------------------
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


def test_water_filling_is_the_optimum_and_well_calibrated():
    rng, n = np.random.default_rng(0), 16
    p = np.sort(rng.dirichlet(np.ones(7)))[::-1]
    best = optimum(p, n)
    assert best.sum() == pytest.approx(1, abs=1e-9)
    assert (np.diff(best) <= 1e-12).all()  # Lemma A.1: a likelier answer has no less confidence
    for other in rng.dirichlet(np.ones(7), size=200):  # no other policy covers more
        policy = 0.99 * best + 0.01 * other
        assert p @ (1 - (1 - policy) ** n) <= p @ (1 - (1 - best) ** n) + 1e-12


@pytest.mark.parametrize("n", [1.5, 2, 16, 4096])
def test_the_bounds_hold_for_few_answers(n):
    rng = np.random.default_rng(0)
    for _ in range(50):
        p1, epsilon = rng.uniform(0.5, 0.95), rng.uniform(0, 0.04)
        p2 = 1 - p1 - epsilon
        largest = optimum([p1, p2], n)[0]
        lower, upper = eval_passn.lower_bound(n, p1, p2), eval_passn.upper_bound(n, p1, epsilon, 2)
        assert lower - 1e-9 <= largest <= upper + 1e-9
    p = [0.5] + [0.125] * 4  # p_2 = ... = p_k and nothing else: equality
    assert optimum(p, n)[0] == pytest.approx(eval_passn.upper_bound(n, 0.5, 0, 5), abs=1e-9)


def test_both_bounds_are_false_in_general():
    p = [0.5275, 0.4716, 0.0008]
    bound = eval_passn.upper_bound(10, p[0], 1 - sum(p), k=3)
    assert optimum(p, 10)[0] - bound == pytest.approx(0.131, abs=1e-3)
    p = [0.5, 0.3] + [0.01] * 20  # s = 2: more than three answers
    assert optimum(p, 4096)[0] < eval_passn.lower_bound(4096, p[0], p[1]) - 0.1


# ---- Figures 2b, 4, 11 and 12 --------------------------------------------------------------------
def test_figure_11_shows_bounds_that_fall_from_1(tmp_path):
    measure("--figure", 11, "--out", tmp_path)
    ((upper, lower),) = np.array(curves(tmp_path / "figure-11.json"))[..., 1]
    assert upper[0] == lower[0] == pytest.approx(1, abs=1e-6)
    assert (np.diff([upper, lower]) <= 1e-12).all() and (upper >= lower - 1e-12).all()


def test_figure_2b_is_the_factor(tmp_path):
    measure("--figure", "2b", "--ns", "1,16,256", "--out", tmp_path)
    (of_n,) = curves(tmp_path / "figure-2b.json")
    for n, points in zip((1, 16, 256), of_n, strict=True):
        p, found = np.array(points[:-1]).T
        expected = n * (1 - p) ** (n - 1) * p / (1 - (1 - p) ** n)
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-12)


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
    model, rows = common.load_model(checkpoint, tokenizer), common.load_problems(data, "test")
    for row, answers in zip(rows, result["ranked"], strict=True):
        found = [row | {"answer": answer} for answer in answers if answer is not None]
        assert len(answers) == 16 and len({one["answer"] for one in found}) == len(found) > 8
        examples, _ = common.encode(found, tokenizer, model.config, "direct")
        log_p = common.log_probs(model, examples).detach().numpy()
        assert (np.diff(log_p) <= 1e-4).all()  # the likeliest first
    assert (tmp_path / "figure-12-data.png").is_file()
