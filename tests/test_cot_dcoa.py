"""train_cot_dcoa.py: its gradient, which problems are in which step, and what it never samples."""

import json
import os
import signal

import pytest
import torch
from conftest import run_script
from injected import Injected, spell, sums, use_plain_sgd
from safetensors.torch import load_file
from small_runs import TINY_LLAMA, plain_log_probs, read_lines, write_rows
from test_refill import steps_by_definition

import common
import train_cot_dcoa

TIMES = ("seconds", "tokens_per_second", "sampling_calls")
FLAGS = ["--model", TINY_LLAMA, "--eval-problems", "0", "--max-new-tokens", "24", "--epochs", "1"]


def factor(n, p):
    """Eq. 4 as it stands."""
    return 1.0 if p == 0 else n * (1 - p) ** (n - 1) * p / (1 - (1 - p) ** n)


def drawing(rows, tokenizer, right):
    """right(id, step) of n samples end in the right answer; the others in a wrong one, in none, or
    not at all."""

    def draw(i, step, n):
        k = right(i, step)
        wrong = ["1=\\boxed{-1}", "1=1", f"\\boxed{{{rows[i]['answer']}}}"]
        wrong = [spell(tokenizer, text, end=j < 2) for j, text in enumerate(wrong)]
        answer = spell(tokenizer, f"0=\\boxed{{{rows[i]['answer']}}}")
        return [answer] * k + [wrong[j % 3] for j in range(n - k)]

    return draw


@pytest.fixture
def with_samples(monkeypatch, tmp_path, tokenizer, one_grader):
    """Run the script on `rows`, with right(id, step) of the samples right."""

    def run(rows, right, *flags, test=(), step=0):
        data, out = write_rows(tmp_path / "data", train=rows, test=test), tmp_path / "run"
        sampler = Injected(data, "cot", tokenizer, drawing(rows, tokenizer, right))
        sampler.step = step
        monkeypatch.setattr(common, "make_sampler", sampler)
        flags = [*FLAGS, "--data", data, "--out", out, "--overwrite", *flags]
        train_cot_dcoa.main([str(flag) for flag in flags])
        return out, sampler

    return run


def drifting(n_mc):
    """Numbers of right samples that change from step to step, so that a stale one would show."""
    return lambda i, step: (0, 1, n_mc // 2, n_mc)[common.seed_of(i, step) % 4]


# The gradient


@pytest.mark.parametrize("nll, more", [("sum", []), ("mean", []), ("sum", ["--filter-only"])])
@pytest.mark.parametrize("tokens", [20, 512])
def test_a_step_goes_along_the_mean_of_factor_times_gradient(
    nll, more, tokens, with_samples, monkeypatch, tokenizer
):
    """Written out: 1/B Σ F(N', p̂) ∇(-log p̂(c, y|x)), for p̂ of 2/8, 5/8, none and all of 8, of
    which the last is replaced; with --filter-only, F is 1 for those that are left."""
    use_plain_sgd(monkeypatch)
    rows, right = sums(4), [2, 5, 0, 8]
    flags = ["--n-prime", 4, "--n-mc", 8, "--batch-size", 4, "--micro-batch-tokens", tokens]
    flags += ["--nll", nll, "--lr", 0.01, "--warmup-steps", 0, "--clip", 1e9, *more]
    out, _ = with_samples(rows, lambda i, step: right[i], *flags)
    (metrics,) = read_lines(out / "metrics.jsonl")
    assert sorted(metrics["ids"]) == [0, 1, 2] and metrics["candidates"] == 4

    model = common.load_model(TINY_LLAMA, tokenizer)
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    loss, told = 0, 0
    for i, row in enumerate(rows[:3]):
        prompt = tokenizer(row["problem"] + "\n").input_ids
        trace = spell(tokenizer, row["solution"])
        nlls = -plain_log_probs(model, prompt, trace)
        weight = 1.0 if more else factor(4, right[i] / 8)
        loss = loss + weight * (nlls.sum() if nll == "sum" else nlls.mean()) / 4
        told += weight * nlls.sum().item() / 3
    loss.backward()
    assert metrics["loss"] == pytest.approx(told, rel=1e-5)
    trained = load_file(out / "epoch-1/model.safetensors")
    for name, weight in model.named_parameters():
        moved = (start[name] - trained[name]) / 0.01
        torch.testing.assert_close(moved, weight.grad, atol=3e-4, rtol=1e-3)
    assert max(weight.grad.abs().max() for weight in model.parameters()) > 0.01


# Which problems are in which step


def test_seven_of_64_right_are_replaced_and_six_are_kept(with_samples):
    """F(64, 6/64) = 0.012 and F(64, 7/64) = 0.005: the paper's threshold lies between them."""
    flags = ["--n-prime", 64, "--n-mc", 64, "--batch-size", 4]
    out, sampler = with_samples(sums(4), lambda i, step: [6, 7, 0, 64][i], *flags)
    (metrics,) = read_lines(out / "metrics.jsonl")
    assert sorted(metrics["ids"]) == [0, 2] and metrics["candidates"] == 4
    assert metrics["never_right"] == 1 and metrics["mean_p"] == pytest.approx(77 / 256)
    assert [event[2] for event in sampler.events if event[0] == "generate"] == [64]


def test_a_step_is_the_first_accepted_of_the_stream_under_its_own_weights(with_samples):
    rows, n_mc, right = sums(150), 8, drifting(8)
    flags = ["--n-mc", n_mc, "--batch-size", 16, "--epochs", 3, "--lr", 1e-3, "--seed", 4]
    out, sampler = with_samples(rows, right, *flags)
    steps = read_lines(out / "metrics.jsonl")

    def accepts(i, step):
        return factor(64, right(i, step) / n_mc) >= 0.01

    expected = steps_by_definition(150, 16, accepts, seed=4, epochs=3)
    found = [(step["ids"], step["candidates"]) for step in steps]
    assert found == [(ids, len(seen)) for ids, seen in expected]
    for number, (step, (_, seen)) in enumerate(zip(steps, expected, strict=True)):
        p = [right(i, number) / n_mc for i in seen]
        assert step["mean_p"] == pytest.approx(sum(p) / len(p))
        assert step["mean_factor"] == pytest.approx(sum(factor(64, q) for q in p) / len(p))
    sampler.assert_sampled_afresh(steps)
    # Few calls: a sampler is fastest if asked for many at once.
    assert sum(step["sampling_calls"] for step in steps[2:]) <= 1.5 * len(steps[2:])


def test_cross_entropy_never_samples_for_training(with_samples):
    rows, test = sums(40), sums(5)
    flags = ["--n-prime", 1, "--batch-size", 16, "--epochs", 2]
    evaluate = ["--eval-problems", 5, "--eval-n", 2]
    out, sampler = with_samples(rows, lambda i, step: 1, *flags, *evaluate, test=test)
    steps = read_lines(out / "metrics.jsonl")
    assert [step["accepted"] for step in steps] == [16, 16, 8] * 2
    assert all(step["sampling_calls"] == 0 and "mean_p" not in step for step in steps)
    record = json.loads((out / "epoch-2/dco.json").read_text())
    assert (record["template"], record["max_new_tokens"], record["n_prime"]) == ("cot", 24, 1)
    # Each epoch's evaluation samples, with the weights of that epoch.
    assert [event[0] for event in sampler.events] == ["update", "generate"] * 2
    assert all(epoch["pass@1"] == 0.5 for epoch in read_lines(out / "epochs.jsonl"))


def test_unfiltered_steps_do_not_sample(with_samples):
    flags = ["--n-mc", 8, "--batch-size", 8, "--unfiltered-steps", 2]
    out, sampler = with_samples(sums(120), drifting(8), *flags)
    steps = read_lines(out / "metrics.jsonl")
    assert [step["sampling_calls"] > 0 for step in steps[:4]] == [False, False, True, True]
    assert all(step["candidates"] == 8 and "mean_p" not in step for step in steps[:2])
    assert sampler.events[0] == ("update",), "the weights of step 2 go over before it samples"


# The script as a user runs it


def without_times(lines):
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines]


def test_sigterm_while_sampling_leaves_a_state_and_the_run_goes_on_the_same(
    with_samples, monkeypatch, tmp_path
):
    flags = ["--n-mc", 8, "--batch-size", 8, "--epochs", 2, "--save-every", 1000]
    out, _ = with_samples(sums(150), drifting(8), *flags)
    expected = without_times(read_lines(out / "metrics.jsonl"))
    weights, generate = load_file(out / "epoch-2/model.safetensors"), Injected.generate

    def stopped(self, *inputs):
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return generate(self, *inputs)

    with monkeypatch.context() as patch:
        patch.setattr(Injected, "generate", stopped)
        with pytest.raises(SystemExit) as stop:
            with_samples(sums(150), drifting(8), *flags)
    done = len(read_lines(out / "metrics.jsonl"))
    assert stop.value.code == 143 and 3 <= done <= 4 < len(expected)
    assert [path.name for path in out.glob("state/*")] == [f"step-{done}"]
    with_samples(sums(150), drifting(8), *flags, "--resume", step=done)
    assert without_times(read_lines(out / "metrics.jsonl")) == expected
    found = load_file(out / "epoch-2/model.safetensors")
    torch.testing.assert_close(found, weights, rtol=0, atol=0)


def test_two_processes_take_the_same_steps(warm_start, tmp_path, one_grader):
    """Sampled by the model itself; batches of 7 and few tokens divide nothing."""
    checkpoint, data = warm_start
    flags = ["--model", checkpoint, "--data", data, "--template", "r1-short", "--n-mc", 4]
    flags += ["--n-prime", 2, "--batch-size", 7, "--micro-batch-tokens", 64, "--max-steps", 4]
    flags += ["--epochs", 1, "--max-new-tokens", 40, "--eval-problems", 0]
    flags += ["--engine", "transformers"]
    train_cot_dcoa.main([str(flag) for flag in [*flags, "--out", tmp_path / "one"]])
    run_script("train_cot_dcoa.py", *flags, "--out", tmp_path / "two", processes=2)
    one, two = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [step["ids"] for step in one] == [step["ids"] for step in two]
    assert any(0 < step["mean_p"] < 1 for step in one)
    for mine, other in zip(one, two, strict=True):
        for name in ("loss", "mean_ce", "mean_p", "grad_norm"):
            assert mine[name] == pytest.approx(other[name], rel=1e-3), name
