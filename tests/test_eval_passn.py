"""eval_passn.py as a user runs it: tables, report, paired differences, samples kept and resumed."""

import contextlib
import io
import json
import math
import os
import shutil

import numpy as np
import pytest
from conftest import ROOT, run_script

import common
import eval_passn

SAMPLED = ["--n", "64", "--ns", "1,16,64", "--engine", "transformers"]


def evaluate(*arguments, out):
    """Run eval_passn.py; return the results in its report."""
    eval_passn.main([*map(str, arguments), "--out", str(out)])
    (path,) = out.glob("passn-*.json")
    return json.loads(path.read_text())["checkpoints"]


def tables(printed):
    """{title: {row: cells}} of all Markdown tables."""
    found = {}
    for line in printed.splitlines():
        name, *cells = line.strip("| ").split(" | ")
        if line.startswith("| ") and cells[0].startswith("pass@"):
            rows = found[name] = {}
        elif line.startswith("| "):
            rows[name] = cells
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """100 of the test problems."""
    path = tmp_path_factory.mktemp("data") / "some.jsonl"
    lines = (ROOT / "examples/arithmetic/test.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:100]))
    return path


@pytest.fixture
def checkpoint(cross_entropy_run, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(cross_entropy_run[0] / "epoch-2", tmp_path / "copy/epoch-2")


@pytest.fixture(scope="module")
def evaluated(cross_entropy_run, data, grader, tmp_path_factory):
    """Two epochs, exactly and from samples: (--out, checkpoints, results, what was printed)."""
    out = tmp_path_factory.mktemp("evaluated")
    checkpoints = [cross_entropy_run[0] / name for name in ("epoch-1", "epoch-2")]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as text:
        patch.setattr(common, "Grader", lambda *arguments: grader)
        results = evaluate(*checkpoints, "--data", data, *SAMPLED, out=out)
    return out, checkpoints, results, text.getvalue()


def test_exact_coverage_is_that_of_training(cross_entropy_run, one_grader, tmp_path, capsys):
    """On the data of the checkpoint's record; the first table has a row of numbers each."""
    run = cross_entropy_run[0]
    checkpoints = [run / "epoch-1", run / "epoch-2"]
    results = evaluate(*checkpoints, out=tmp_path)
    summaries = [json.loads(line) for line in (run / "epochs.jsonl").read_text().splitlines()]
    (_, table), *_ = tables(capsys.readouterr().out).items()
    assert list(table) == list(map(str, checkpoints))
    for summary, result, cells in zip(summaries, results, table.values(), strict=True):
        for n, cell in zip((1, 16, 256, 4096), cells, strict=True):
            assert float(cell) == pytest.approx(100 * summary[f"pass@{n}"], abs=0.051)
        confidence = np.mean(result["confidence"])
        assert confidence == pytest.approx(summary["greedy_confidence"], abs=1e-5)


def test_exact_and_sampled_coverage_agree(evaluated):
    for result in evaluated[2]:
        expected = 64 * np.exp(result["log_p"]).sum()
        # A right answer in another form, such as 07, would only add to those found.
        assert abs(sum(result["right"]) - expected) < 4 * expected**0.5
        for n in ("1", "2", "4", "8", "16", "32", "64"):
            exact, sampled = result["exact"][n], result["sampled"][n]
            for estimate in (exact, sampled):
                assert estimate["low"] < estimate["pass"] < estimate["high"]
            assert abs(exact["pass"] - sampled["pass"]) < 5 * sampled["error"]


def test_every_table_has_a_row_for_every_checkpoint_and_figures_are_drawn(evaluated):
    out, checkpoints, results, printed = evaluated
    exact, intervals, differences, sampled, errors, _ = tables(printed).values()
    for table in (exact, intervals, differences, sampled, errors):
        assert list(table) == list(map(str, checkpoints))
    for result in results:
        cells = errors[result["checkpoint"]]
        estimate = result["sampled"]["16"]
        expected = f"{estimate['low']:.1f} to {estimate['high']:.1f}"
        assert cells[1] == f"{expected}, samples ± {estimate['error']:.2f}"
    for name in ("passn-some.png", "passn-sampled-some.png", "confidence-some.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG") and str(out / name) in printed


def test_differences_are_paired_by_problem(evaluated):
    first, second = evaluated[2]
    one, two = (1 - (1 - np.exp(result["log_p"])) ** 16 for result in (first, second))
    difference = second["exact"]["16"]
    assert difference["pass_difference"] == pytest.approx(100 * (two - one).mean())
    width = difference["high_difference"] - difference["low_difference"]
    error = 100 * (two - one).std() / len(one) ** 0.5
    assert width == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert width < 0.7 * (difference["high"] - difference["low"])  # what pairing gains
    cells = tables(evaluated[3])[f"less {evaluated[1][0]}, paired, exact"][str(evaluated[1][1])]
    assert cells[1].startswith(f"{100 * (two - one).mean():+.1f} [")


def test_each_temperature_has_a_row(checkpoint, data, tokenizer, one_grader, tmp_path, capsys):
    results = evaluate(checkpoint, "--data", data, "--temperature", "1,0.5", out=tmp_path)
    printed = capsys.readouterr().out
    rows = [str(checkpoint), f"{checkpoint}, T = 0.5"]
    assert all(list(table) == rows for table in tables(printed).values())
    model = common.load_model(str(checkpoint), tokenizer)
    problems = common.load_problems(data, "test")[:20]
    examples, _ = common.encode(problems, tokenizer, model.config, "direct")
    for result, temperature in zip(results, (1, 0.5), strict=True):
        log_p = common.log_probs(model, examples, temperature).tolist()
        assert result["log_p"][:20] == pytest.approx(log_p, abs=1e-4)
    assert np.mean(results[1]["confidence"]) > np.mean(results[0]["confidence"]) + 0.1


def test_confidence_is_the_share_of_all_answers_equal_to_the_most_frequent(grader):
    samples = [
        {"7": 4, "0.5": 3, r"\frac{1}{2}": 2, None: 1},
        {None: 10},
        {},  # too long for the model
    ]
    result = {"template": "cot", "n": 10, "samples": samples}
    args = eval_passn.parse_args(["checkpoint", "--n", "10", "--ns", "1,10", "--figure", "12"])
    result |= {"checkpoint": "runs/cot/epoch-1", "temperature": 1.0}
    reported = np.array([True] * 3)
    result = eval_passn.grade(result, [r"\frac12", "3", "4"], grader, reported, args)
    eval_passn.compare([result], reported)
    assert result["answer"] == ["0.5", None, None] and result["confidence"] == [0.5, 0, 0]
    assert result["answer_right"] == [True, False, False] and result["right"] == [5, 0, 0]
    assert result["sampled"][1]["pass"] == pytest.approx(100 * 5 / 30)
    ranks = [result["ranks"][rank]["pass"] for rank in (1, 2, 3, 4)]
    assert ranks == pytest.approx([0, 100 / 3, 100 / 3, 0])


def test_a_sampled_power_is_not_computed_for_each_other_answer(grader):
    before = grader.timeouts
    answers = {"47652962^769883260001640800": 2} | {str(i): 1 for i in range(20)}
    assert common.most_frequent_answer(answers, grader) == ("47652962^769883260001640800", 2)
    assert common.most_frequent_answer({r"\sqrt{8}": 2, r"2\sqrt{2}": 2, "3": 3}, grader)[1] == 4
    assert grader.timeouts == before


def test_a_problem_that_is_too_long_is_unsolved(checkpoint, one_grader, tmp_path, capsys):
    lines = (ROOT / "examples/arithmetic/test.jsonl").read_text().splitlines()[:3]
    lines.insert(1, json.dumps({"problem": "1" * 2100, "answer": "2"}))
    (tmp_path / "four.jsonl").write_text("\n".join(lines) + "\n")
    flags = ["--data", tmp_path / "four.jsonl", *SAMPLED]
    (result,) = evaluate(checkpoint, *flags, out=tmp_path)
    printed = capsys.readouterr().out
    assert "too long" in printed and "too narrow" in printed
    p = np.exp(result["log_p"])
    assert p[1] == 0 and result["right"][1] == 0 and result["answer"][1] is None
    expected = 100 * np.mean(1 - (1 - p) ** 16)
    assert result["exact"]["16"]["pass"] == pytest.approx(expected)
    assert result["sampled"]["1"]["pass"] == pytest.approx(100 * sum(result["right"]) / 4 / 64)


@pytest.mark.parametrize("kind", ["share", "file"])
def test_each_epoch_is_chosen_on_problems_that_are_not_reported(
    kind, cross_entropy_run, data, one_grader, tmp_path, capsys
):
    run, share = cross_entropy_run[0], tmp_path / "others.jsonl"
    lines = (ROOT / "examples/arithmetic/test.jsonl").read_text().splitlines(keepends=True)
    share.write_text("".join(lines[100:140]))
    runs = [run] if kind == "share" else [f"{run}/epoch-1/", f"{run}/epoch-2/"]
    flags = [*runs, "--data", data, "--validate", 0.4 if kind == "share" else share]
    epochs = evaluate(*flags, "--ns", "1,16,256,4096", out=tmp_path / "out")
    (chosen,) = json.loads((tmp_path / "out/passn-some.json").read_text())["validated"]
    assert (tmp_path / "out/epochs-some.png").is_file()
    table = tables(capsys.readouterr().out)
    assert [epoch["checkpoint"] for epoch in epochs] == [f"{run}/epoch-1", f"{run}/epoch-2"]
    log_p = np.array([epoch["log_p"] for epoch in epochs])  # [epochs, problems]
    problems = log_p.shape[1]
    assert problems == (100 if kind == "share" else 140)
    if kind == "share":
        reported = np.random.default_rng(0).permutation(problems) >= 40
    else:
        reported = np.arange(problems) < 100
    for i, n in enumerate((1, 16, 256, 4096)):
        values = 100 * (1 - (1 - np.exp(log_p)) ** n)
        best = int(values[:, ~reported].mean(1).argmax())
        expected = values[best, reported].mean()
        assert chosen["exact"][str(n)]["epoch"] == f"epoch-{best + 1}"
        assert chosen["exact"][str(n)]["pass"] == pytest.approx(expected)
        first, last = table["pass@N in percent, exact"].values()
        assert first[i] == f"{expected:.1f}" and last[i] == f"{values[1, reported].mean():.1f}"
        gain = epochs[1]["exact"][str(n)]["pass_difference"]  # paired, of the last epoch
        assert gain == pytest.approx((values[1] - values[best])[reported].mean(), abs=1e-9)


@pytest.fixture
def calls(monkeypatch):
    """(prompts, n, max_new_tokens) of each call that samples; the first `calls.limit` succeed."""

    class Calls(list):
        limit = math.inf

    calls, generate = Calls(), common.TransformersSampler.generate

    def counted(sampler, prompts, n, max_new_tokens, seeds=None, temperature=1.0):
        if seeds is not None:
            if len(calls) >= calls.limit:
                raise KeyboardInterrupt
            calls.append((prompts, n, max_new_tokens))
        return generate(sampler, prompts, n, max_new_tokens, seeds, temperature)

    monkeypatch.setattr(common.TransformersSampler, "generate", counted)
    return calls


def test_an_interrupted_evaluation_goes_on(checkpoint, data, one_grader, calls, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join(data.read_text().splitlines(keepends=True)[:40]))
    flags = ["--data", few, "--n", "512", "--ns", "1", "--engine", "transformers"]
    whole = evaluate(checkpoint, *flags, out=tmp_path / "whole")
    assert [len(prompts) for prompts, *_ in calls] == [16, 16, 8]
    calls.clear()
    calls.limit = 1
    with pytest.raises(KeyboardInterrupt):
        evaluate(checkpoint, *flags, out=tmp_path / "parts")
    calls.clear()
    calls.limit = math.inf
    assert evaluate(checkpoint, *flags, out=tmp_path / "parts") == whole
    assert [len(prompts) for prompts, *_ in calls] == [16, 8]
    calls.clear()
    assert evaluate(checkpoint, *flags, out=tmp_path / "parts") == whole and calls == []
    # Other settings and other weights are other samples.
    evaluate(checkpoint, *flags, "--seed", 1, out=tmp_path / "parts")
    assert len(calls) == 3
    os.utime(checkpoint / "model.safetensors")  # as after another training
    evaluate(checkpoint, *flags, out=tmp_path / "parts")
    assert len(calls) == 6


def test_flags_override_the_record(checkpoint, data, tokenizer, one_grader, calls, tmp_path):
    record = {"template": "cot", "prompt": "{problem}{problem}\n", "max_new_tokens": 7}
    (checkpoint / "dco.json").write_text(json.dumps(record | {"data": str(data.parent)}))
    shutil.copy(data, data.parent / "test.jsonl")
    problem = common.load_problems(data, "test")[0]["problem"]
    flags = ["--n", "4", "--ns", "1", "--engine", "transformers"]
    (result,) = evaluate(checkpoint, *flags, out=tmp_path)
    prompts, _, max_new_tokens = calls[0]
    assert prompts[0] == tokenizer(2 * problem + "\n").input_ids and max_new_tokens == 7
    assert result["template"] == "cot" and "exact" not in result and len(result["right"]) == 100
    calls.clear()
    flags += ["--template", "direct", "--prompt", "{problem}", "--max-new-tokens", "3"]
    (result,) = evaluate(checkpoint, *flags, out=tmp_path / "out")
    prompts, _, max_new_tokens = calls[0]
    assert prompts[0] == tokenizer(problem).input_ids and max_new_tokens == 3
    assert result["template"] == "direct" and len(result["log_p"]) == 100


def test_grading_timeouts_are_reported(checkpoint, data, one_grader, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(one_grader, "timeouts", 3, raising=False)
    evaluate(checkpoint, "--data", data, out=tmp_path)
    assert "too long to grade, counted wrong: 3" in capsys.readouterr().out
    assert json.loads((tmp_path / "passn-some.json").read_text())["grading_timeouts"] == 3


def test_two_processes_find_what_one_finds(cross_entropy_run, data, one_grader, tmp_path):
    flags = [cross_entropy_run[0] / "epoch-2", "--data", data, *SAMPLED]
    (one,) = evaluate(*flags, out=tmp_path / "one")
    run_script("eval_passn.py", *flags, "--out", tmp_path / "two", processes=2)
    (two,) = json.loads((tmp_path / "two/passn-some.json").read_text())["checkpoints"]
    assert one["log_p"] == pytest.approx(two["log_p"], abs=1e-4)
    assert one["right"] == two["right"] and one["sampled"] == two["sampled"]


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--template", "cot"], "--n"),
        (["--ns", "1,many"], "--ns"),
        (["--ns", "0,1"], "--ns"),
        (["--n", "64", "--ns", "65"], "pass@65"),
        (["--temperature", "0"], "--temperature"),
        (["--prompt", "no place for it"], "{problem}"),
        (["./no/such/folder"], "--data"),
        (["--data", "./nothing/here"], "./nothing/here"),
        (["examples/tiny_llama"], "no weights"),
        (["--validate", "1.5"], "--validate"),
        (["--validate", "0.9999"], "--validate leaves"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(arguments, told, checkpoint, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        eval_passn.main([str(checkpoint), *arguments, "--out", str(tmp_path)])
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "error: " in error and told in error


def test_other_data_is_asked_for_where_the_record_does_not_say_it(checkpoint, data, capsys):
    for record in ({}, {"data": str(data)}):  # a single file has no test split
        (checkpoint / "dco.json").write_text(json.dumps(record))
        with pytest.raises(SystemExit):
            eval_passn.main([str(checkpoint)])
        assert "--data" in capsys.readouterr().err
