"""The paper's other figures: the derivative of Figure 5 against finite differences, the lemmas against the exact
optimum, ranks and levels by hand, and each figure's command."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

import common
import eval_passn
import train_direct


@pytest.fixture(scope="module")
def first_epoch(tmp_path_factory):
    out = tmp_path_factory.mktemp("first") / "run"
    train_direct.main(["--n-prime", "1", "--epochs", "1", "--checkpoint-at", "0.11", "0.86", "--out", str(out)])
    return out


def measure(*arguments):
    eval_passn.main([*map(str, arguments)])


# Figure 5


def test_the_derivative_along_a_step_is_that_of_finite_differences(first_epoch):
    tokenizer, accelerator = common.load_tokenizer(str(first_epoch / "epoch-0.86")), common.make_accelerator()
    model, _ = common.load_model(str(first_epoch / "epoch-0.86"), tokenizer)
    of = {
        split: common.encode(common.load_problems("examples/arithmetic", split)[:40], tokenizer, "direct", 999)[0]
        for split in ("train", "test")
    }
    n, batch = 256, of["train"][:8]
    found = eval_passn.along_step(
        eval_passn.gradient(model, of["test"], tokenizer, accelerator, n), model, batch, tokenizer, accelerator
    )
    step = [-g for g in eval_passn.gradient(model, batch, tokenizer, accelerator, 1)]

    def test_loss(eta):
        with torch.no_grad():
            for p, g in zip(model.parameters(), step, strict=True):
                p += eta * g
            log_p = common.log_probs_of(model, of["test"], accelerator, common.pad_token_id(tokenizer), 64)
            for p, g in zip(model.parameters(), step, strict=True):
                p -= eta * g
        return common.dco_loss(log_p.double(), n).sum().item()

    length = math.sqrt(sum((g**2).sum().item() for g in step))
    eta = 1e-3 / length
    assert found == pytest.approx((test_loss(eta) - test_loss(-eta)) / (2 * eta), rel=0.01)
    assert abs(found) > 1  # there is something to compare


def test_figure_5_sees_unseen_problems_only_and_levels_apart(first_epoch, tmp_path):
    checkpoints = [first_epoch / "epoch-0.11", first_epoch / "epoch-0.86"]
    seen = set(common.read_record(str(checkpoints[1]))["seen_ids"])
    rows = common.load_problems("examples/arithmetic", "train")
    ((_, _, _, _, levels, test),) = eval_passn.of_first_epoch(SimpleNamespace(checkpoints=[checkpoints[1]], data=None))
    assert sum(map(len, levels.values())) == len(rows) - len(seen) and len(test) == 500
    for level, examples in levels.items():
        assert all(example.id not in seen and rows[example.id]["level"] == level for example in examples)
    measure("--figure", 5, *checkpoints, "--out", tmp_path)
    early, late = json.loads((tmp_path / "figure-5.json").read_text())
    for panel in (early, late):
        (points,) = panel["curves"].values()
        assert [level for level, *_ in points] == [1, 2, 3, 4, 5]
        assert all(low <= mean <= high for _, mean, low, high in points)
    assert all(mean < 0 for _, mean, *_ in next(iter(early["curves"].values())))  # early, all data help


def test_a_checkpoint_that_does_not_say_what_it_has_seen_is_refused(first_epoch, capsys):
    with pytest.raises(SystemExit):
        measure("--figure", 5, first_epoch / "epoch-1")
    assert "train with --checkpoint-at" in capsys.readouterr().err


# Lemmas 4.1 to 4.3 and A.1


def optimum(p, n):
    """The policy that maximises coverage Σ p_i (1 - (1-p̂_i)^n) for accuracies p: by water-filling, in logarithms.

    p_i (1-p̂_i)^(n-1) is the same, e^-w, wherever p̂_i > 0: p̂_i = max(0, 1 - e^((-w - log p_i) / (n-1)))."""
    log_p = np.log(np.asarray(p, dtype=float))

    def policy(w):
        return np.maximum(0, -np.expm1((-w - log_p) / (n - 1)))

    low, high = -log_p.max(), -log_p.min() + 60 * (n - 1)  # from no confidence at all to all answers near 1
    for _ in range(300):
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
        assert (np.diff(best) <= 1e-12).all()  # Lemma A.1: a likelier answer never gets less confidence
        for _ in range(200):  # no nearby policy and no other one covers more
            other = rng.dirichlet(np.ones(size))
            mixed = 0.99 * best + 0.01 * other
            assert coverage(p, other, n) <= coverage(p, best, n) + 1e-12
            assert coverage(p, mixed, n) <= coverage(p, best, n) + 1e-12


def test_coverage_of_one_problem_is_monotonic_and_of_two_is_not():
    p = np.linspace(0, 1, 101)  # Lemma 4.1: pass@N of one problem rises with its pass@N'
    for n in (1, 4, 64):
        assert (np.diff(common.exact_pass_at_n(np.log(np.maximum(p, 1e-300)), n)) >= 0).all()
    confident, hedging = [0.0, -math.inf], [math.log(0.1)] * 2  # §4.2: p = (1, 0) and p = (.1, .1)
    passes = {n: [common.exact_pass_at_n(model, n).mean() for model in (confident, hedging)] for n in (1, 7, 64)}
    assert passes[1] == pytest.approx([0.5, 0.1])
    assert passes[64][0] == pytest.approx(0.5) and passes[64][1] > 0.99 and passes[7][1] > 0.5


@pytest.mark.parametrize("n", [1.5, 2, 4, 16, 256, 4096])
def test_the_upper_bound_where_it_holds(n):
    rng = np.random.default_rng(0)
    for _ in range(50):  # two answers that matter, k = 2
        p1, epsilon = rng.uniform(0.5, 0.95), rng.uniform(0, 0.04)
        p = [p1, 1 - p1 - epsilon]
        if p[0] >= p[1] > 0:
            assert optimum(p, n)[0] <= eval_passn.upper_bound(n, p1, epsilon, 2) + 1e-9
    for k in (3, 5):  # p_2 = ... = p_k, all the rest 0: equality
        p1 = 0.5
        p = [p1] + [(1 - p1) / (k - 1)] * (k - 1)
        assert optimum(p, n)[0] == pytest.approx(eval_passn.upper_bound(n, p1, 0, k), abs=1e-9)


def test_the_upper_bound_is_false_in_general():
    p = [0.3986, 0.3339, 0.2675]
    assert optimum(p, 2)[0] == pytest.approx(0.457, abs=1e-3)
    assert eval_passn.upper_bound(2, p[0], 0, 3) == pytest.approx(0.452, abs=1e-3)


@pytest.mark.parametrize("n", [1.5, 2, 4, 16, 256, 4096])
def test_the_lower_bound_where_it_holds(n):
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


def test_the_bounds_of_figure_11_fall_from_1(tmp_path):
    measure("--figure", 11, "--out", tmp_path)
    ((panel),) = json.loads((tmp_path / "figure-11.json").read_text())
    for points in panel["curves"].values():
        values = [y for _, y, *_ in points]
        assert values[0] == pytest.approx(1, abs=1e-6) and all(np.diff(values) <= 1e-12)
    upper, lower = ([y for _, y, *_ in points] for points in panel["curves"].values())
    assert all(u >= low - 1e-12 for u, low in zip(upper, lower, strict=True))


# Figures 2b, 4, 6, 12, 13 and the errors of Table 3


def test_figure_2b_is_the_factor(tmp_path):
    measure("--figure", "2b", "--ns", "1,16,256", "--out", tmp_path)
    ((panel),) = json.loads((tmp_path / "figure-2b.json").read_text())
    assert list(panel["curves"]) == ["N = 1", "N = 16", "N = 256"]
    for n, points in zip((1, 16, 256), panel["curves"].values(), strict=True):
        for p, factor, *_ in points[:-1:20]:
            assert factor == pytest.approx(n * (1 - p) ** (n - 1) * p / (1 - (1 - p) ** n), rel=1e-6, abs=1e-12)


def test_figure_4_is_what_the_run_discarded(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    lines = [{"step": k, "candidates": 40 + k, "accepted": 32} for k in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    measure("--figure", 4, run)
    ((panel),) = json.loads((run / "figure-4.json").read_text())
    assert list(panel["curves"].values()) == [[[1, 9, None, None], [2, 10, None, None], [3, 11, None, None]]]
    with pytest.raises(SystemExit):
        measure("--figure", 4, tmp_path)
    assert "takes the folders of runs" in capsys.readouterr().err


def test_beam_search_ranks_the_likeliest_completions(first_epoch, tmp_path, monkeypatch):
    checkpoint, data = first_epoch / "epoch-1", tmp_path / "data"
    data.mkdir()
    test = (ROOT / "examples/arithmetic/test.jsonl").read_text().splitlines()[:12]
    (data / "test.jsonl").write_text("\n".join(test) + "\n")
    measure("--figure", 12, checkpoint, "--data", data, "--out", tmp_path)
    report = json.loads((tmp_path / "passn-data.json").read_text())
    (result,) = report["checkpoints"]
    tokenizer, accelerator = common.load_tokenizer(str(checkpoint)), common.make_accelerator()
    model, _ = common.load_model(str(checkpoint), tokenizer)
    golds = [json.loads(line)["answer"] for line in test]
    for problem, gold in zip(result["per_problem"], golds, strict=True):
        answers = problem["ranked"]
        assert len(answers) == 16 and answers[0] is not None
        found = [answer for answer in answers if answer is not None]
        assert len(set(found)) == len(found)  # no completion twice
        rows = [{"id": i, "source": "-", "problem": json.loads(test[problem["id"]])["problem"], "answer": answer}
                for i, answer in enumerate(found)]  # fmt: skip
        examples, _ = common.encode(rows, tokenizer, "direct", 999)
        log_p = common.log_probs_of(model, examples, accelerator, common.pad_token_id(tokenizer), 64)
        assert (log_p.diff() <= 1e-4).all()  # the likeliest first
        assert problem["ranked_right"] == [answer == gold for answer in answers]
    for rank, entry in enumerate(result["ranks"]):
        assert entry["pass"] == pytest.approx(np.mean([p["ranked_right"][rank] for p in result["per_problem"]]))
    assert {"figure-12-data.png", "figure-12-data.pdf"} <= {path.name for path in tmp_path.iterdir()}


def test_figure_13_has_quartiles_of_confidence_and_factor_by_level(first_epoch, tmp_path):
    checkpoint = first_epoch / "epoch-0.86"
    measure("--figure", 13, checkpoint, "--out", tmp_path)
    confidence, factor = json.loads((tmp_path / "figure-13.json").read_text())
    ((label, model, tokenizer, accelerator, levels, _),) = eval_passn.of_first_epoch(
        SimpleNamespace(checkpoints=[checkpoint], data=None)
    )
    assert confidence["title"] == factor["title"] == label
    for i, (level, unseen) in enumerate(levels.items()):
        log_p = common.log_probs_of(model, unseen, accelerator, common.pad_token_id(tokenizer), 7).double()
        for panel, values in ((confidence, log_p.exp()), (factor, common.dco_factor(log_p, 256))):
            (points,) = panel["curves"].values()
            low, median, high = np.quantile(values.numpy(), [0.25, 0.5, 0.75])
            assert points[i] == pytest.approx([level, median, low, high], rel=1e-3, abs=1e-9)


def test_both_errors_are_in_the_second_table_and_one_curve_can_be_highlighted(first_epoch, tmp_path, capsys):
    checkpoints = [first_epoch / "epoch-0.86", first_epoch / "epoch-1"]
    flags = ["--n", 16, "--ns", "1,16", "--engine", "transformers", "--highlight", checkpoints[1], "--out", tmp_path]
    measure(*checkpoints, *flags)
    shown = capsys.readouterr().out
    report = json.loads((tmp_path / "passn-arithmetic.json").read_text())
    one = report["checkpoints"][0]["sampled"]["16"]
    cell = f"{100 * one['low']:.1f}-{100 * one['high']:.1f}, samples ± {100 * one['sampling_error']:.2f}"
    assert cell in shown
    for name in ("passn-arithmetic", "passn-arithmetic-sampled", "confidence-arithmetic"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000 and (tmp_path / f"{name}.pdf").stat().st_size > 5000
    with pytest.raises(SystemExit):
        measure(checkpoints[0], "--highlight", checkpoints[1])
    assert "is not one of the checkpoints" in capsys.readouterr().err
