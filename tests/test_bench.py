"""tests/bench.py: both sides of a row do the same work, and its table says what happened. Times are
never judged."""

import json
from statistics import mean, median

import bench
import pytest
import torch

import common

pytestmark = pytest.mark.slow
QUICK = ["sft", "packed", "dco-accept", "micro-batch", "grpo", "grading", "proof-search"]


def run(*arguments):
    """Run bench.main in this process and return its exit code."""
    with pytest.raises(SystemExit) as ended:
        bench.main([*map(str, arguments)])
    return ended.value.code


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{row: its results}, from one turn of each side. The rows stop where the sides differ: in the
    loss of the first step, in what is accepted, in the environment's calls."""
    path, found = tmp_path_factory.mktemp("bench") / "bench.json", {}
    assert run(*QUICK, "--quick", "--out", path) == 0
    for result in json.loads(path.read_text())["results"]:
        found.setdefault(result["row"], []).append(result)
    return found


def test_every_row_measures_both_sides(results):
    assert list(results) == QUICK
    for row, found in results.items():
        for result in found:
            assert not {"failed", "skipped"} & result.keys(), result
            if row == "micro-batch":
                assert min(result["series"].values()) > 0
            else:
                assert min(result[name] for name in ("ours", "theirs", "low", "high")) > 0


def test_packed_and_padded_steps_have_one_loss(results):
    as_they_come, by_length = results["packed"]
    assert "as they come" in as_they_come["against"] and "sorted" in by_length["against"]
    for result in (as_they_come, by_length):
        ours, theirs = result["first_loss"]
        assert ours == pytest.approx(theirs, rel=1e-4) and ours > 1


def test_accept_rates_are_those_asked_for(results):
    rates = [float(result["what"].split()[-1]) for result in results["dco-accept"]]
    assert rates == pytest.approx([1.0, 0.9, 0.5, 0.2, 0.05], abs=0.1)


def test_roll_outs_are_as_long_on_both_sides(results):
    ours, theirs = results["grpo"][0]["mean_lengths"]
    assert ours == pytest.approx(theirs, rel=0.25)


def test_merged_passes_call_the_environment_less_often(results):
    assert len(results["proof-search"]) == 2
    assert all(result["ours"] < result["theirs"] for result in results["proof-search"])


def test_lengths_are_spread_like_those_of_math():
    rows = [row | {"id": 0, "source": "x"} for row in bench.math_lengths(bench.TINY, 512)]
    config, tokenizer = common.load_config(bench.TINY), common.load_tokenizer(bench.TINY)
    config.max_position_embeddings = 4096
    lengths = [len(example) for example in common.encode(rows, tokenizer, config, "direct")[0]]
    assert 90 < mean(lengths) < 110 and 65 < median(lengths) < 80 and 2040 < max(lengths) < 2060


def test_the_padded_reference_is_right(tiny_model):
    examples = [common.Example(0, [1, 5, 6], [7, 2]), common.Example(1, [1], [9, 8, 7, 2])]
    expected = common.log_probs(tiny_model, examples)
    assert torch.allclose(bench.padded_log_probs(tiny_model, examples), expected, rtol=1e-5)


def test_ratios_of_costs_and_of_rates():
    cost = bench.compare("x", ([2.0, 1.0, 4.0], [4.0, 6.0, 4.0]), "s", "other")
    assert (cost["ratio"], cost["low"], cost["high"]) == (2.0, 1.0, 6.0)
    rate = bench.compare("x", ([2.0], [1.0]), "examples/s", "other", higher_is_better=True)
    assert rate["ratio"] == 2.0


def test_sides_take_turns():
    order = []
    sides = bench.take_turns(3, lambda: order.append("a") or 1, lambda: order.append("b") or 2)
    assert order == ["a", "b"] * 3 and sides == [[1] * 3, [2] * 3]


@pytest.mark.parametrize("arguments, named", [(["tea"], "tea"), (["--device", "cuda"], "GPU")])
def test_what_cannot_be_measured_is_refused(arguments, named, capsys):
    assert run(*arguments) == 2 and named in capsys.readouterr().err


def test_a_row_that_fails_or_is_skipped_leaves_the_others(monkeypatch, tmp_path, capsys):
    def broken(args):
        raise ValueError("it broke")

    def missing(args):
        bench.need("a_package_that_nobody_has")

    def fine(args):
        yield bench.compare("x", ([1.0], [2.0]), "s", "other")

    monkeypatch.setattr(bench, "ROWS", {"broken": broken, "missing": missing, "fine": fine})
    assert run("--out", tmp_path / "out.json") == 1
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [result["row"] for result in results] == ["broken", "missing", "fine"]
    printed = capsys.readouterr().out
    assert "failed: ValueError: it broke" in printed and "skipped" in printed
    assert "| fine: x | 1 s | 2 s, other | **2x** |" in printed
