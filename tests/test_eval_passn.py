"""eval_passn.py as a user runs it: its table, its files, its figures, samples that are not drawn twice."""

import json
import math
import shutil

import pytest
from conftest import ROOT, run_script

import common
import eval_passn


@pytest.fixture(scope="module")
def evaluated(cross_entropy_run, tmp_path_factory):
    run, _ = cross_entropy_run
    out = tmp_path_factory.mktemp("evaluated")
    checkpoints = [run / "epoch-1", run / "epoch-2"]
    arguments = ["--n", 64, "--ns", "1,16,64", "--engine", "vllm", "--out", out]  # the other tests: transformers
    return run, out, run_script("eval_passn.py", *checkpoints, *arguments)


def report(out):
    return json.loads((out / "passn-arithmetic.json").read_text())


def test_table_has_a_row_a_checkpoint_a_column_an_n_and_the_best_in_bold(evaluated):
    run, _, done = evaluated
    tables = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert tables[0] == "| checkpoint | pass@1 | pass@16 | pass@64 |" and tables[0] == tables[8]  # 4 to 7: its errors
    assert [line.split(" | ")[0] for line in tables[2:4]] == [f"| {run}/epoch-1", f"| {run}/epoch-2"]
    for lines in (tables[2:4], tables[10:12]):  # exact, sampled
        for i in range(1, 4):
            cells = [line.strip("| ").split(" | ")[i] for line in lines]
            best = max(float(cell.strip("*")) for cell in cells)
            assert all((float(cell.strip("*")) == best) == cell.startswith("**") for cell in cells)


def test_exact_summary_of_training_is_what_evaluation_finds(evaluated):
    run, out, _ = evaluated
    epochs = [json.loads(line) for line in (run / "epochs.jsonl").read_text().splitlines()]
    for epoch, result in zip(epochs, report(out)["checkpoints"], strict=True):
        for n in (1, 16):
            assert result["exact"][str(n)]["pass"] == pytest.approx(epoch[f"pass@{n}"], abs=1e-6)
        assert result["greedy"]["confidence"] == pytest.approx(epoch["greedy_confidence"], abs=1e-5)


def test_report_holds_intervals_both_errors_and_every_problem(evaluated):
    _, out, _ = evaluated
    written = report(out)
    assert written["problems"] == 500 and written["ns"] == [1, 16, 64] and written["arguments"]["seed"] == "0"
    for result in written["checkpoints"]:
        for kind in ("exact", "sampled"):
            for n in ("1", "2", "4", "8", "16", "32", "64"):
                assert result[kind][n]["low"] < result[kind][n]["pass"] < result[kind][n]["high"]
        assert 0 < result["sampled"]["16"]["sampling_error"] < 0.02
        assert len(result["per_problem"]) == 500
        for problem in result["per_problem"]:
            assert problem["right"] <= 64 and 0 < math.exp(problem["log_p"]) < 1
            assert 0 < problem["greedy_confidence"] <= 1 and 0 < problem["mode_confidence"] <= 1
        # The two estimates agree: the whole test set's count of right samples against n times its mean p. A right
        # answer in another form ("07") would only add to the former.
        expected = sum(64 * math.exp(problem["log_p"]) for problem in result["per_problem"])
        found = sum(problem["right"] for problem in result["per_problem"])
        assert abs(found - expected) < 4 * expected**0.5
        # And so do the shares: the mode's confidence over 64 samples is the greedy one, biased upwards by the maximum.
        assert result["greedy"]["confidence"] < result["mode"]["confidence"] < result["greedy"]["confidence"] + 0.2


def test_right_wrong_and_confidence_are_those_of_the_samples(evaluated, tokenizer):
    """Recomputed from the weights and from the file of samples; samples without an answer count in the denominator."""
    run, out, _ = evaluated
    rows = common.load_problems("examples/arithmetic", "test")
    model, _ = common.load_model(str(run / "epoch-2"), tokenizer)
    examples, _ = common.encode(rows, tokenizer, "direct", 2048)
    greedy = common.generate(model, tokenizer, [example.prompt_ids for example in examples], 1, 6, seed=None)
    samples = [
        {json.loads(line)["id"]: json.loads(line) for line in path.read_text().splitlines()}
        for path in out.glob("samples-arithmetic-*")
    ]
    result = report(out)["checkpoints"][1]
    matching = [
        counts
        for counts in samples
        if all(p["unanswered"] == counts[p["id"]]["unanswered"] for p in result["per_problem"])
        and all(p["distinct"] == len(counts[p["id"]]["answers"]) for p in result["per_problem"])
    ]
    (counts,) = matching
    assert sum(entry["unanswered"] for entry in counts.values()) > 0
    for row, (ids,), problem in zip(rows, greedy, result["per_problem"], strict=True):
        answer = common.read_answer(ids, tokenizer, "direct")
        assert problem["greedy"] == answer
        if answer is None or answer.isdigit():
            assert problem["greedy_right"] == (answer is not None and row["answer"] == str(int(answer)))
        assert problem["mode_confidence"] == max(counts[row["id"]]["answers"].values(), default=0) / 64
    assert result["greedy"]["accuracy"] == sum(p["greedy_right"] for p in result["per_problem"]) / 500


def test_a_problem_that_is_too_long_counts_as_unsolved(evaluated, tmp_path):
    run, _, _ = evaluated
    rows = common.load_problems("examples/arithmetic", "test")[:3]
    lines = [{"problem": r["problem"], "answer": r["answer"]} for r in rows] + [{"problem": "1" * 2100, "answer": "2"}]
    (tmp_path / "four.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["--data", str(tmp_path / "four.jsonl"), "--n", "16", "--out", str(tmp_path)]
    arguments += ["--engine", "transformers"]
    eval_passn.main([str(run / "epoch-2"), *arguments])
    written = json.loads((tmp_path / "passn-four.json").read_text())
    (result,) = written["checkpoints"]
    assert written["ns"] == [1, 16] and result["too_long"] == 1
    p = [math.exp(problem["log_p"]) for problem in result["per_problem"][:3]]
    assert result["exact"]["16"]["pass"] == pytest.approx(sum(1 - (1 - x) ** 16 for x in p) / 4)
    assert result["sampled"]["1"]["pass"] == pytest.approx(sum(q["right"] for q in result["per_problem"]) / 64)
    assert result["per_problem"][3]["right"] == 0 and result["per_problem"][3]["log_p"] is None


def test_figures_are_drawn(evaluated):
    _, out, done = evaluated
    for name in ("passn-arithmetic.png", "passn-arithmetic-sampled.png", "confidence-arithmetic.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG") and (out / name).stat().st_size > 20_000
        assert str(out / name) in done.stdout


def test_sampling_goes_on_where_it_stopped(evaluated, tmp_path, monkeypatch):
    """A file of samples whose end was lost: only what is missing is drawn, and the whole is what it was."""
    run, _, _ = evaluated
    arguments = [str(run / "epoch-2"), "--n", "16", "--ns", "1,16", "--out", str(tmp_path)]
    arguments += ["--engine", "transformers", "--batch-size", "64"]
    eval_passn.main(arguments)
    first = report(tmp_path)["checkpoints"]
    (path,) = tmp_path.glob("samples-arithmetic-*.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 500
    path.write_bytes(b"".join(lines[:400]) + lines[400][:20])  # killed in the middle of a line
    drawn = []
    generate = common.generate

    def counted(model, tokenizer, prompts, n, *more, **settings):
        drawn.extend(prompts if n > 1 else [])
        return generate(model, tokenizer, prompts, n, *more, **settings)

    monkeypatch.setattr(common, "generate", counted)
    eval_passn.main(arguments)
    assert len(drawn) == 100
    assert len({json.loads(line)["id"] for line in path.read_bytes().splitlines()}) == 500
    assert report(tmp_path)["checkpoints"] == first  # problems 400 to 500 are the same groups, with the same seeds
    drawn.clear()
    eval_passn.main(arguments)
    assert drawn == []
    eval_passn.main([*arguments, "--seed", "1"])  # other settings: other samples
    assert len(drawn) == 500


def test_two_processes_split_the_problems_and_find_the_same(evaluated, tmp_path):
    run, _, _ = evaluated
    arguments = [run / "epoch-2", "--n", 16, "--ns", "1,16", "--engine", "transformers", "--batch-size", 64]
    run_script("eval_passn.py", *arguments, "--out", tmp_path / "one")
    run_script("eval_passn.py", *arguments, "--out", tmp_path / "two", processes=2)
    (path,) = (tmp_path / "two").glob("samples-arithmetic-*.jsonl")
    assert len(path.read_bytes().splitlines()) == 500
    (one,), (two,) = (report(tmp_path / name)["checkpoints"] for name in ("one", "two"))
    assert one["sampled"] == two["sampled"]
    for n in ("1", "16"):
        assert one["exact"][n]["pass"] == pytest.approx(two["exact"][n]["pass"], abs=1e-6)


def test_samples_beyond_a_batch_come_in_chunks_that_differ(evaluated, tmp_path):
    run, _, _ = evaluated
    eval_passn.main(
        [
            str(run / "epoch-2"),
            "--n",
            "96",
            "--ns",
            "1",
            "--batch-size",
            "32",
            "--out",
            str(tmp_path),
            "--engine",
            "transformers",
        ]
    )
    (path,) = tmp_path.glob("samples-*.jsonl")
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(sum(entry["answers"].values()) + entry["unanswered"] == 96 for entry in entries)
    # Three equal chunks would give counts that are all multiples of three.
    assert sum(any(count % 3 for count in entry["answers"].values()) for entry in entries) > 450


@pytest.mark.parametrize("template", ["cot", "r1"])
def test_solutions_are_sampled_and_their_answers_extracted(template, tmp_path):
    """A checkpoint of another template: no exact coverage; the answer is in the last box, or between its tags."""
    flags = ["--template", template, "--n-prime", 1, "--max-steps", 60 if template == "cot" else 10]
    run_script("train_direct.py", *flags, "--out", tmp_path / "run")
    checkpoint = tmp_path / f"run/step-{flags[-1]}"
    record = json.loads((checkpoint / "dco.json").read_text())
    assert record["template"] == template and record["max_new_tokens"] > 100
    data = tmp_path / "few.jsonl"
    rows = common.load_problems("examples/arithmetic", "test")[:12]
    data.write_text("".join(json.dumps({"problem": r["problem"], "answer": r["answer"]}) + "\n" for r in rows))
    arguments = ["--data", data, "--n", 32, "--ns", "1,16", "--engine", "transformers", "--out", tmp_path]
    done = run_script("eval_passn.py", checkpoint, *arguments)
    (result,) = json.loads((tmp_path / "passn-few.json").read_text())["checkpoints"]
    assert "exact" not in result and "exact" not in done.stdout
    assert result["per_problem"][0].keys() >= {"right", "mode", "mode_confidence", "mode_right", "unanswered"}
    (path,) = tmp_path.glob("samples-few-*")
    found = [answer for line in path.read_text().splitlines() for answer in json.loads(line)["answers"]]
    assert len(path.read_text().splitlines()) == 12 and not any("boxed" in answer for answer in found)
    assert found or template == "r1"  # whose format is not learnt in ten steps


def test_samples_of_one_data_set_are_not_taken_for_anothers(evaluated, tmp_path):
    """Two files of one name, and a name with characters that a pattern would interpret."""
    run, _, _ = evaluated
    rows = common.load_problems("examples/arithmetic", "test")
    rights = []
    for name, part in (("a", rows[:40]), ("b", rows[40:80])):
        data = tmp_path / name / "few[1].jsonl"
        data.parent.mkdir()
        data.write_text("".join(json.dumps({"problem": r["problem"], "answer": r["answer"]}) + "\n" for r in part))
        arguments = ["--n", "256", "--ns", "1", "--engine", "transformers", "--out", str(tmp_path)]
        eval_passn.main([str(run / "epoch-2"), "--data", str(data), *arguments])
        (result,) = json.loads((tmp_path / "passn-few[1].json").read_text())["checkpoints"]
        expected = sum(256 * math.exp(problem["log_p"]) for problem in result["per_problem"])
        rights.append(sum(problem["right"] for problem in result["per_problem"]))
        assert abs(rights[-1] - expected) < 5 * expected**0.5
    assert len(list(tmp_path.glob("samples-*"))) == 2 and min(rights) > 50


def test_evaluation_from_another_folder_finds_the_data(evaluated, tmp_path):
    run, _, _ = evaluated
    done = run_script(ROOT / "eval_passn.py", run / "epoch-2", "--out", "here", cwd=tmp_path)
    assert "500 problems" in done.stdout and (tmp_path / "here/passn-arithmetic.json").is_file()


def test_checkpoints_trained_on_different_data_need_to_be_told_which(evaluated, tmp_path, capsys):
    run, _, _ = evaluated
    other = tmp_path / "epoch-2"
    shutil.copytree(run / "epoch-2", other)
    for data, told in (("/elsewhere", "trained on different data"), (str(tmp_path / "train.jsonl"), "different data")):
        (other / "dco.json").write_text(json.dumps({"template": "direct", "data": data}))
        with pytest.raises(SystemExit):
            eval_passn.main([str(run / "epoch-2"), str(other), "--out", str(tmp_path / "out")])
        assert told in capsys.readouterr().err
    (tmp_path / "train.jsonl").write_text('{"problem": "1+1=", "answer": "2"}\n')
    with pytest.raises(SystemExit):
        eval_passn.main([str(other), "--out", str(tmp_path / "out")])
    assert "which has no test split: give --data" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--template", "cot"], "can only be estimated from samples: give --n"),
        (["--ns", "1,many"], "--ns takes whole numbers"),
        (["--ns", "0,1"], "--ns takes numbers from 1 up"),
        (["--n", "64", "--ns", "65"], "pass@65 cannot be estimated from 64 samples: raise --n, or lower --ns"),
        (["examples/arithmetic.partial"], "was not written to its end"),
        (["--temperature", "0"], "--temperature must be positive"),
        (["./no/such/folder"], "there is no such folder"),
        (["--data", "./nothing/here"], "is not a folder"),
        (["examples/tiny_llama"], "examples/tiny_llama holds no weights"),
        (["--split", "validation"], "validation.jsonl does not exist"),
    ],
)
def test_bad_arguments(arguments, told, cross_entropy_run, capsys, tmp_path):
    run, _ = cross_entropy_run
    with pytest.raises(SystemExit) as stop:
        eval_passn.main([str(run / "epoch-2"), *arguments, "--out", str(tmp_path / "out")])
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("usage:")]
    assert stop.value.code == 2 and len(lines) == 1 and told in lines[0], lines
    assert not (tmp_path / "out").exists()
