"""tests/bench.py measures what it says: both sides do the same work, and what goes wrong is told. No timing is judged
here, and nothing but ratios of counted things."""

import argparse
import json

import bench
import pytest
from conftest import run_script

import train_lean_step

QUICK = ("startup", "logits-memory", "sft", "dco-accept", "dco-over-ce", "grpo", "proof-search")


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Both sides of most rows once. The rows themselves stop where the sides differ: in the loss of the first step, in
    what is accepted, in the environment's calls."""
    path = tmp_path_factory.mktemp("bench") / "bench.json"
    done = run_script("tests/bench.py", *QUICK, "--quick", "--out", path)
    return json.loads(path.read_text()), done.stdout


def results_of(report, row):
    return [result for result in report[0]["results"] if result["row"] == row]


def test_every_row_has_both_sides_and_a_line_in_the_table(report):
    found, told = report
    assert {result["row"] for result in found["results"]} == set(QUICK)
    for result in found["results"]:
        assert not {"failed", "skipped"} & result.keys(), result
        assert 0 < result["low"] <= result["high"] and result["ours"] > 0 and result["theirs"] > 0
        assert f"| {result['row']}: {result['what']} | " in told
    assert found["machine"]["trl"] in told and "cores of" in told


def test_the_same_first_loss_as_trl(report):
    for result in results_of(report, "sft"):
        assert result["first_loss"]["theirs"] > 1, "a loss a token of a model from scratch"
    assert len(results_of(report, "sft")) == 4


def test_accept_rates_are_those_asked_for(report):
    rates = [float(result["what"].removeprefix("accept rate ")) for result in results_of(report, "dco-accept")]
    for rate, asked in zip(rates, (1.0, 0.9, 0.5, 0.2, 0.05), strict=True):
        assert abs(rate - asked) < 0.08


def test_roll_outs_are_as_long_on_both_sides(report):
    (result,) = results_of(report, "grpo")
    ours, theirs = (result["mean_lengths"][side] for side in ("ours", "theirs"))
    assert abs(ours / theirs - 1) < 0.25


def test_memory_of_the_logits(report):
    (result,) = results_of(report, "logits-memory")
    assert result["ratio"] > 10
    assert result["theirs"] > 8 * 210 * 128_256 * 4 / 2**20, "one float of each logit at least"


def test_calls_of_the_environment(report):
    calls = [result for result in results_of(report, "proof-search") if result["unit"] == "calls"]
    assert [result["what"].partition(",")[0] for result in calls] == ["N_eff 1 (CE)", "N_eff 8"]
    assert all(result["ours"] < result["theirs"] for result in calls)


def test_cross_entropy_asks_for_a_twentieth_of_the_calls_of_single_walks(tmp_path, monkeypatch):
    """4,096 passes each of 20 embedded theorems. In place of the README's prover, of 28 epochs, it is one of 4 at twice
    the rate: less sure of its tactics, it asks for more. `merged` stops where calls are not the distinct paths."""
    for name in ("DCO_LEAN_WORKER", "TACTIC_MEMORY_LIMIT"):  # which a worker in this process sets
        monkeypatch.setenv(name, "")
    flags = ["--model", "examples/tiny_prover", "--n-eff", "1", "--epochs", "4", "--lr", "0.002", "--batch-size", "32"]
    train_lean_step.main([*flags, "--eval-steps", "0", "--out", str(tmp_path / "run")])
    search = bench.Search(str(tmp_path / "run/epoch-4"))
    results = [search.merged(theorem, 4096)[0] for theorem in bench.theorems(20)]
    search.close()
    assert len(results) == 20 and all(result["passes"] == 4096 for result in results)
    assert 0 < sum(result["tactic_calls"] for result in results) <= 0.05 * sum(result["steps"] for result in results)


def test_ratios_of_costs_and_of_rates():
    cost = bench.compared("x", ([2.0, 1.0, 4.0], [4.0, 6.0, 4.0]), "s", 2.0, "other")
    assert (cost["ratio"], cost["low"], cost["high"], cost["reached"]) == (2.0, 1.0, 6.0, True)
    rate = bench.compared("x", ([2.0], [1.0]), "examples/s", 2.5, "other", more_is_better=True)
    assert (rate["ratio"], rate["reached"]) == (2.0, False)
    assert "2.5x: NO" in bench.markdown([rate | {"row": "r"}])


def test_sides_take_turns():
    order = []
    sides = bench.in_turn(lambda: order.append("a") or 1.0, lambda: order.append("b") or 2.0, 3)
    assert order == ["a", "b"] * 3 and sides == ([1.0] * 3, [2.0] * 3)


@pytest.mark.parametrize(
    "arguments, told",
    [(["nothing"], "nothing is no row; there are sft"), (["--device", "cuda", "startup"], "torch finds no GPU")],
)
def test_refused(arguments, told, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(arguments)
    assert told in capsys.readouterr().err + str(stop.value)


def test_a_row_that_fails_or_is_skipped_leaves_the_others(monkeypatch, tmp_path, capsys):
    def broken(args):
        raise ValueError("it broke")

    def missing(args):
        raise bench.Skipped("TRL is not installed")

    def fine(args):
        yield bench.compared("x", ([1.0], [2.0]), "s", None, "other")

    monkeypatch.setattr(bench, "ROWS", {"broken": broken, "missing": missing, "fine": fine})
    monkeypatch.setattr(bench, "TEMPORARY", tmp_path / "temporary")
    with pytest.raises(SystemExit) as stop:
        bench.main(["--out", str(tmp_path / "out.json")])
    assert stop.value.code == 1
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [result["row"] for result in results] == ["broken", "missing", "fine"]
    told = capsys.readouterr()
    assert "broken: failed: ValueError: it broke" in told.out and "missing: skipped: TRL is not installed" in told.out
    assert "Traceback" in told.err and "| fine: x |" in told.out


def test_peak_memory_is_of_what_it_says(tmp_path):
    """Bytes kept grow with the distinct answers only."""
    args = argparse.Namespace(quick=True)
    peak, kept = bench.eval_memory(args)
    assert set(peak["series"]) == {256, 1024} and min(peak["series"].values()) > 50
    assert kept["series"][1024] < 4 * kept["series"][256]
