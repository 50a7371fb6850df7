"""train_cot_dcoa.py: its gradient, its estimate of p and what that costs, which problems a step has, what it writes."""

import json
import math

import mpmath
import pytest
import torch
from conftest import ROOT, run_script
from injected import TINY, Injected, spell, sums, use_plain_sgd, write
from safetensors.torch import load_file
from test_refill import Trainer, steps_by_definition

import common
import train_cot_dcoa

FLAGS = ["--model", TINY, "--engine", "transformers", "--eval-problems", "0", "--max-new-tokens", "24"]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def factor(n, p):
    """Eq. 4 as it stands."""
    return 1.0 if p == 0 else n * (1 - p) ** (n - 1) * p / (1 - (1 - p) ** n)


def drawing(rows, tokenizer, right):
    """right(id, step) of n samples end in the right answer, the others in a wrong one, in none, or not at all."""

    def draw(i, step, n):
        k = right(i, step)
        wrong = [spell(tokenizer, "1=\\boxed{-1}"), spell(tokenizer, "1=1"), spell(tokenizer, "\\boxed{", end=False)]
        return [spell(tokenizer, f"0=\\boxed{{{rows[i]['answer']}}}")] * k + [wrong[j % 3] for j in range(n - k)]

    return draw


@pytest.fixture
def with_samples(monkeypatch, tmp_path, tokenizer, one_grader):
    """-> a function that runs the script on `rows` with right(id, step) of the samples right; gives --out, Injected."""

    def run(rows, right, *flags, test=()):
        data = write(tmp_path / "data", rows, test)
        sampler = Injected(data, "cot", tokenizer, drawing(rows, tokenizer, right))
        monkeypatch.setattr(common, "spawn_engines", sampler)
        out = tmp_path / "run"
        train_cot_dcoa.main([*FLAGS, "--data", str(data), "--out", str(out), "--overwrite", *map(str, flags)])
        return out, sampler

    return run


# The gradient


@pytest.mark.parametrize("nll", ["sum", "mean"])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_a_step_goes_along_the_mean_of_factor_times_gradient(
    nll, micro_batch_size, with_samples, monkeypatch, tokenizer
):
    """Written out: 1/B Σ F(N', p̂) ∇(-log p̂(c, y|x)), for p̂ of 2/8, 5/8 and none."""
    use_plain_sgd(monkeypatch)
    rows, right = sums(3), {0: 2, 1: 5, 2: 0}
    flags = ["--n-prime", 4, "--n-mc", 8, "--batch-size", 3, "--micro-batch-size", micro_batch_size, "--nll", nll]
    flags += ["--lr", 0.01, "--warmup-steps", 0, "--clip", 1e9, "--epochs", 1]
    out, _ = with_samples(rows, lambda i, step: right[i], *flags)
    (metrics,) = read(out / "metrics.jsonl")
    assert sorted(metrics["ids"]) == [0, 1, 2]

    model, _ = common.load_model(TINY, tokenizer, seed=0)
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    loss = 0
    for i, row in enumerate(rows):
        prompt = tokenizer(row["problem"] + "\n").input_ids
        trace = tokenizer(row["solution"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        log_probs = model(torch.tensor([prompt + trace])).logits[0].log_softmax(-1)
        nlls = -log_probs[len(prompt) - 1 : -1].gather(-1, torch.tensor(trace)[:, None])
        loss = loss + factor(4, right[i] / 8) * (nlls.sum() if nll == "sum" else nlls.mean()) / 3
    loss.backward()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    trained = load_file(out / "epoch-1/model.safetensors")
    for name, weight in model.named_parameters():
        torch.testing.assert_close(trained[name], start[name] - 0.01 * weight.grad, atol=1e-5, rtol=0)
        moved = (start[name] - trained[name]) / 0.01  # 1e-5 of a weight alone could be a step that is nearly nothing
        torch.testing.assert_close(moved, weight.grad, atol=3e-4, rtol=1e-3)


# The estimate


def test_the_factor_of_many_samples_is_that_of_p(grader, tokenizer):
    """From a categorical over answers with two ways to write the right one, through counting and grading."""
    n_mc, texts = 100_000, ["\\boxed{6}", "2+4=\\boxed{6}", "\\boxed{7}", "\\boxed{8}", "6"]
    for p in (0.004, 0.02, 0.1):
        shares = torch.tensor([p / 4, 3 * p / 4, 0.3, 0.2, 0.5 - p], dtype=torch.float64)
        generator = torch.Generator().manual_seed(round(1000 * p))
        drawn = torch.multinomial(shares, n_mc, replacement=True, generator=generator).tolist()
        spelled = [spell(tokenizer, text) for text in texts]
        answers = common.count_answers([common.Completion(spelled[i], None) for i in drawn], tokenizer, "cot")
        assert set(answers) == {"6", "7", "8", None} and answers.total() == n_mc
        p_hat = torch.tensor(grader.count_right(["6"], [answers]), dtype=torch.float64) / n_mc
        found, error = common.dco_factor(p_hat.log(), 64).item(), math.sqrt(p * (1 - p) / n_mc)
        slope = (factor(64, p * 1.001) - factor(64, p * 0.999)) / (0.002 * p)
        assert abs(p_hat.item() - p) < 4 * error
        assert abs(found - factor(64, p)) < 4 * abs(slope) * error + 1e-3 * error
        assert 4 * abs(slope) * error < 0.1, "the error bar would allow anything"


@pytest.mark.parametrize("p", [0.001, 0.02, 0.1, 0.5])
def test_plug_in_bias_is_the_exact_expectation_less_the_truth(p):
    mpmath.mp.dps = 40
    exact, n = mpmath.mpf(p), 64

    def f(q):
        return mpmath.mpf(1) if q == 0 else n * (1 - q) ** (n - 1) * q / (1 - (1 - q) ** n)

    expected = sum(
        mpmath.binomial(n, k) * exact**k * (1 - exact) ** (n - k) * f(mpmath.mpf(k) / n) for k in range(n + 1)
    )
    found = train_cot_dcoa.plug_in_bias(torch.tensor([p, p], dtype=torch.float64), n, n)
    assert found.tolist() == pytest.approx([float(expected - f(exact))] * 2, abs=1e-9)


def test_plug_in_bias_of_a_certain_estimate_is_nothing_and_shrinks_with_the_samples():
    ends = train_cot_dcoa.plug_in_bias(torch.tensor([0.0, 1.0], dtype=torch.float64), 64, 64)
    assert ends.tolist() == pytest.approx([0, 0], abs=1e-12)
    p = torch.tensor([0.02], dtype=torch.float64)
    truth = common.dco_factor(p.log(), 64)
    assert truth.item() == pytest.approx(0.494, abs=5e-4)
    for n_mc, told, digits in ((64, 0.573, 5e-4), (256, 0.515, 5e-4), (1024, 0.4995, 5e-4)):
        assert (truth + train_cot_dcoa.plug_in_bias(p, 64, n_mc)).item() == pytest.approx(told, abs=digits), n_mc


# Which problems are in which step


def test_seven_of_64_right_are_dropped_and_six_are_kept(with_samples):
    """F(64, 6/64) = 0.012 and F(64, 7/64) = 0.005, and the threshold of the paper lies between them."""
    assert factor(64, 6 / 64) > 0.01 > factor(64, 7 / 64)
    flags = ["--n-prime", 64, "--n-mc", 64, "--batch-size", 4, "--epochs", 1, "--factor-threshold", 0.01]
    out, sampler = with_samples(sums(4), lambda i, step: [6, 7, 0, 64][i], *flags)
    (metrics,) = read(out / "metrics.jsonl")
    assert sorted(metrics["ids"]) == [0, 2] and metrics["candidates"] == 4 and metrics["discarded"] == 2
    assert [event[2] for event in sampler.events if event[0] == "generate"] == [64]


def drifting(n_mc):
    """Counts that change from step to step, so that a stale or a remembered estimate would show."""
    return lambda i, step: (0, 1, n_mc // 2, n_mc)[common.seed_of(i, step) % 4]


def test_a_step_is_the_first_accepted_of_the_stream_under_its_own_weights(with_samples):
    rows, n_mc, right = sums(150), 8, drifting(8)
    flags = ["--n-prime", 64, "--n-mc", n_mc, "--batch-size", 16, "--epochs", 3, "--lr", 1e-3, "--seed", 4]
    out, sampler = with_samples(rows, right, *flags)
    steps = read(out / "metrics.jsonl")

    def accepts(i, step):
        return factor(64, right(i, step) / n_mc) >= 0.01

    expected = steps_by_definition(150, 16, accepts, 4, 3)
    assert [(one["epoch"], one["ids"], one["candidates"]) for one in steps] == [
        (epoch, ids, len(looked_at)) for epoch, ids, looked_at in expected
    ]
    for step, (one, (_, ids, looked_at)) in enumerate(zip(steps, expected, strict=True)):
        p = torch.tensor([right(i, step) / n_mc for i in looked_at], dtype=torch.float64)
        assert one["accepted"] == len(ids) and one["discarded"] == len(looked_at) - len(ids)
        assert one["mean_p"] == pytest.approx(p.mean().item())
        assert one["mean_p_error"] == pytest.approx((p * (1 - p) / (n_mc - 1)).sum().sqrt().item() / len(p))
        assert one["plug_in_bias"] == pytest.approx(train_cot_dcoa.plug_in_bias(p, 64.0, n_mc).mean().item())
        assert one["mean_factor"] == pytest.approx(sum(factor(64, q) for q in p.tolist()) / len(p))
        assert all(one[f"seconds_{phase}"] > 0 for phase in ("sampling", "grading", "training", "sync"))
    # The engine got new weights once a step, and what went back to the stream was sampled anew, with another seed.
    assert sum(event == ("update",) for event in sampler.events) == len(steps)
    seeds = sampler.seeds()
    assert all(len(of_one) == 1 for of_one in seeds.values())
    assert len(set.union(*seeds.values())) == len(seeds)
    assert len(seeds) > sum(one["candidates"] for one in steps)


def test_cross_entropy_never_samples_for_training(with_samples):
    rows, test = sums(40), sums(45)[40:]
    flags = ["--n-prime", 1, "--batch-size", 16, "--epochs", 2, "--eval-n", 2]
    out, sampler = with_samples(rows, lambda i, step: 1, *flags, "--eval-problems", 5, test=test)
    steps = read(out / "metrics.jsonl")
    assert [(one["sampling_calls"], one["accepted"]) for one in steps] == [(0, 16)] * 4 + [(0, 8)]  # 8 carried over
    assert all(one["seconds_sampling"] == one["seconds_sync"] == 0 and "mean_p" not in one for one in steps)
    # It samples for each epoch's evaluation alone, with the weights of that epoch.
    assert [event[0] for event in sampler.events] == ["update", "generate"] * 2 + ["shut down"]
    assert all(event[2] == 2 for event in sampler.events if event[0] == "generate")

    out, sampler = with_samples(rows, lambda i, step: 1, *flags, "--eval-problems", 0, test=test)
    assert sampler.events == [] and len(read(out / "epochs.jsonl")) == 2  # there is no engine at all


def test_unfiltered_steps_do_not_sample(with_samples):
    flags = ["--n-prime", 64, "--n-mc", 8, "--batch-size", 8, "--epochs", 1, "--unfiltered-steps", 2]
    out, _ = with_samples(sums(120), drifting(8), *flags)
    steps = read(out / "metrics.jsonl")
    assert [one["sampling_calls"] > 0 for one in steps[:4]] == [False, False, True, True]
    assert ["mean_p" in one for one in steps[:4]] == [False, False, True, True]
    assert all(one["discarded"] == 0 for one in steps[:2])


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2, 0.05])
def test_nearly_every_step_is_sampled_in_one_call(share):
    """An engine is fast when it has much to do: rounds as small as the scoring by forwards has would cost more."""
    steps, size = 60, round(128 * 62 / share)
    accepts = (torch.rand(size, generator=torch.Generator().manual_seed(1)) < share).tolist()
    trainer, calls, surplus = Trainer(lambda i, step: accepts[i]), [], 0

    def score(ids):
        nonlocal surplus
        calls[-1] += 1
        surplus += len(ids)
        return trainer.values(ids)

    refill = common.Refill(size, 128, lambda values: values > 0.5, 0, 1, 4, backward_cost=None)
    refill.start_epoch(last=True)
    before = None
    for _ in range(steps):
        calls.append(0)
        start, done = refill.position, refill.next_step(score, trainer.train, None)
        surplus -= done.candidates
        assert start == (before or 0) and refill.position == start + done.candidates  # the surplus comes again
        assert done.ids == [i for i in refill.order[start : refill.position] if accepts[i]]
        before = refill.position
    one_call = sum(count == 1 for count in calls[2:]) / len(calls[2:])
    assert one_call >= 0.85, calls
    assert 0 < surplus < 0.5 * refill.position, "the price of one call is what it samples in vain"


# The script as a user runs it


def test_what_a_run_writes(tmp_path):
    rows = sums(30)
    for row in rows[:3]:
        row["solution"] = " "
    del rows[3]["solution"]
    data, out = write(tmp_path / "data", rows, sums(34)[30:]), tmp_path / "run"
    flags = ["--data", data, "--batch-size", 8, "--n-mc", 4, "--max-new-tokens", 16, "--max-steps", 2, "--epochs", 2]
    flags += ["--engine", "transformers", "--eval-problems", 3, "--eval-n", 16]
    done = run_script("train_cot_dcoa.py", "--model", "examples/tiny_llama", *flags, "--out", out)
    assert "26 to train on (dropped: {'without a solution': 4}), 3 to test (dropped: none)" in done.stdout
    assert "DCOa with N' = 64" in done.stdout and f"python eval_passn.py {out}/step-2 --n 256" in done.stdout
    steps = read(out / "metrics.jsonl")
    assert [one["step"] for one in steps] == [1, 2]
    needed = "candidates discarded mean_p mean_p_error plug_in_bias mean_factor mean_ce loss lr grad_norm seconds"
    needed += " clipped_share tokens_per_second seconds_sampling seconds_grading seconds_training seconds_sync"
    assert all(name in one for one in steps for name in needed.split())
    assert all(one["sampling_calls"] >= 1 and set(one["ids"]) <= set(range(4, 30)) for one in steps)
    (epoch,) = read(out / "epochs.jsonl")
    assert {"pass@1", "pass@16", "mode_confidence"} <= set(epoch) and "pass@64" not in epoch
    record = json.loads((out / "step-2/dco.json").read_text())
    assert record["template"] == "cot" and record["max_new_tokens"] == 16 and record["n_prime"] == 64
    assert record["data"] == str(data) and record["step"] == 2 and common.is_example(str(out / "step-2"))
    assert json.loads((out / "args.json").read_text())["n_mc"] == 4


def test_two_processes_take_the_same_steps(tmp_path):
    """Cross-entropy on traces; 40 examples, batches of 16 and micro-batches of 3 divide nothing."""
    data = write(tmp_path / "data", sums(40))
    flags = ["--data", data, "--n-prime", 1, "--batch-size", 16, "--micro-batch-size", 3, "--epochs", 2, "--clip", 0.5]
    flags = [str(flag) for flag in [*FLAGS, *flags, "--warmup-steps", 2]]
    train_cot_dcoa.main([*flags, "--out", str(tmp_path / "one")])
    done = run_script("train_cot_dcoa.py", *flags, "--out", tmp_path / "two", processes=2)
    assert "from 2 processes" in done.stdout
    one, two = (read(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [step["ids"] for step in one] == [step["ids"] for step in two] and len(one) == 5
    for mine, other in zip(one, two, strict=True):
        for name in ("loss", "mean_ce", "grad_norm"):
            assert mine[name] == pytest.approx(other[name], rel=1e-3), name
    weights, others = (load_file(tmp_path / name / "epoch-2/model.safetensors") for name in ("one", "two"))
    assert max((weights[name] - others[name]).abs().max().item() for name in weights) < 1e-5


# What it refuses


def refused(capsys, told, *flags):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train_cot_dcoa.main([str(flag) for flag in flags])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("error:") == 1 and told in error, error


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--n-prime", "0.5"], "--n-prime must be a number from 1 up"),
        (["--n-prime", "nan"], "--n-prime must be a number from 1 up"),
        (["--factor-threshold", "1"], "--factor-threshold is a value of F"),
        (["--n-mc", "0"], "--n-mc must be positive"),
        (["--batch-size", "0"], "--batch-size must be positive"),
        (["--micro-batch-size", "-1"], "--micro-batch-size must be positive"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be positive"),
        (["--eval-n", "0"], "--eval-n must be positive"),
        (["--eval-problems", "-1"], "--eval-problems must be 0 or more"),
        (["--unfiltered-steps", "-1"], "--unfiltered-steps and"),
        (["--gpu-memory", "0"], "--gpu-memory must be positive"),
        (["--gpu-memory", "1"], "--gpu-memory under 1"),
        (["--gpus-per-engine", "0"], "--gpus-per-engine must be positive"),
        (["--lr", "nan"], "--lr must be positive"),
        (["--betas", "0.9", "1"], "--betas must lie in [0, 1)"),
        (["--weight-decay", "-1"], "--weight-decay be 0 or more"),
        (["--template", "direct"], "--template: invalid choice: 'direct'"),
        (["--engine", "magic"], "--engine: invalid choice: 'magic'"),
        (["--zero", "1"], "--zero: invalid choice"),
    ],
)
def test_bad_flags(flags, told, capsys, tmp_path):
    refused(capsys, told, *flags, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_prompt_that_leaves_no_room_for_the_completion_is_refused(capsys, tmp_path):
    told = "the longest prompt and --max-new-tokens make 2050 tokens"
    data = write(tmp_path / "data", sums(3), [{"problem": "1" * 15, "answer": "1"}])  # 1 + 15 + a line's end
    flags = ["--model", TINY, "--data", data, "--engine", "transformers", "--out", tmp_path / "run"]
    refused(capsys, told, *flags, "--max-new-tokens", 2050 - 17)
    assert not (tmp_path / "run").exists()


def test_data_without_any_solution_is_refused(capsys, tmp_path):
    rows = [{"problem": row["problem"], "answer": row["answer"]} for row in sums(3)]
    flags = ["--data", write(tmp_path / "data", rows), "--out", tmp_path / "run"]
    refused(capsys, "no problem is left; dropped: {'without a solution': 3}", *FLAGS, *flags)
    assert not (tmp_path / "run").exists()


def test_vllm_that_is_not_there_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "find_spec", lambda name: None)
    refused(capsys, "--engine vllm: vLLM is not installed", "--engine", "vllm", "--out", tmp_path / "run")


def test_help_does_not_wait_for_torch():
    code = "import sys, {0}\ntry: {0}.main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    for script in ("train_cot_dcoa", "train_grpo"):
        done = run_script("-c", code.format(script), cwd=ROOT)
        assert done.stdout.endswith("False\n") and "(paper: 128)" in done.stdout
