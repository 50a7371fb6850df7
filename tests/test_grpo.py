"""train_grpo.py: its advantages, its gradient, its rewards, and the balance of its batches."""

import itertools

import pytest
import torch
from injected import Injected, spell, sums, use_plain_sgd
from safetensors.torch import load_file
from small_runs import TINY_LLAMA, plain_log_probs, read_lines, refused, write_rows
from test_refill import steps_by_definition

import common
import train_grpo

FLAGS = ["--model", TINY_LLAMA, "--eval-problems", "0", "--max-new-tokens", "64"]
FLAGS += ["--epochs", "1", "--warmup-steps", "0", "--clip", "1e9"]


# The advantages


def expected_step(logits, rewards, n, k):
    """E[Σ_i A_i/n ∇log π(o_i)] over all groups of n draws from a categorical, by enumeration."""
    p = logits.softmax(-1)
    total = torch.zeros_like(logits)
    for drawn in itertools.product(range(len(p)), repeat=n):
        drawn = list(drawn)
        shares = train_grpo.advantages(rewards[drawn], k) / n
        scores = torch.eye(len(p), dtype=p.dtype)[drawn] - p  # ∇ log π of each
        total += p[drawn].prod() * (shares[:, None] * scores).sum(0)
    return total


@pytest.mark.parametrize("n, k", [(4, 1), (2, 2), (4, 2), (4, 3), (4, 4), (5, 2)])
def test_the_expected_step_is_the_gradient_of_p_or_of_the_coverage(n, k):
    """K (1-p)^(K-1) ∇p, by enumeration and by autograd of 1 - (1-p)^K; GRPO's is (1 - 1/n) ∇p."""
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.float64)
    logits = torch.tensor([0.3, 1.0, -0.7, 0.1], dtype=torch.float64, requires_grad=True)
    p = (logits.softmax(-1) * rewards).sum()
    (gradient,) = torch.autograd.grad(1 - (1 - p) ** k, logits)
    found = expected_step(logits.detach(), rewards, n, k)
    torch.testing.assert_close(found, gradient * (1 - 1 / n if k == 1 else 1), atol=1e-12, rtol=0)


# The script on injected roll-outs


def drawing(rows, tokenizer, right):
    """right(id, step) of n roll-outs are right, in several lengths; the others are wrong in the
    ways there are, the last of which is cut by the limit."""

    def draw(i, step, n):
        k, answer = right(i, step), f" </think> <answer> {rows[i]['answer']} </answer>"
        texts = [(" 1=1", " so", "")[j % 3] + answer for j in range(k)]
        wrong = (" </think> <answer> -1 </answer>", f" 1+1=2 {answer} <answer>", f" {answer}")
        texts += [wrong[j % 3] for j in range(n - k)]
        return [spell(tokenizer, text, end=text != wrong[2]) for text in texts]

    return draw


@pytest.fixture
def with_rollouts(monkeypatch, tmp_path, tokenizer, one_grader):
    """Run the script on `rows`, drawing by `draw`."""

    def run_on(rows, draw, *flags):
        data, out = write_rows(tmp_path / "data", train=rows), tmp_path / "run"
        sampler = Injected(data, "r1-short", tokenizer, draw)
        monkeypatch.setattr(common, "make_sampler", sampler)
        flags = [*FLAGS, "--data", data, "--out", out, "--overwrite", *flags]
        train_grpo.main([str(flag) for flag in flags])
        return out, sampler

    return run_on


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("more", [["1"], ["150", "--gradient-checkpointing"], ["8192"]])
def test_a_step_is_the_equation_written_out(k, more, with_rollouts, monkeypatch, tokenizer):
    """The mean over problems of -1/n Σ_i A_i Σ_t log π, and the metrics of the same roll-outs."""
    use_plain_sgd(monkeypatch)
    rows, right, n = sums(5), [2, 0, 1, 4, 3], 4  # problems 1 and 3 are replaced
    draw = drawing(rows, tokenizer, lambda i, step: right[i])
    flags = ["--rollouts", n, "--pass-k", k, "--batch-size", 3, "--lr", 0.01]
    out, _ = with_rollouts(rows, draw, *flags, "--micro-batch-tokens", *more)
    (metrics,) = read_lines(out / "metrics.jsonl")
    assert sorted(metrics["ids"]) == [0, 2, 4] and metrics["candidates"] == 5
    assert (metrics["all_wrong"], metrics["reward"]) == (1, 0.5)

    model = common.load_model(TINY_LLAMA, tokenizer)
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    loss, tokens, log_pi = 0, [], 0
    for i in metrics["ids"]:
        prompt = tokenizer(f"User: {rows[i]['problem']}\nAssistant: <think>").input_ids
        c = right[i]
        for j, completion in enumerate(draw(i, 0, n)):
            advantage = (j < c) - c / n if k == 1 else (j < c) * 2 * (n - c) / (n - 1)
            chosen = plain_log_probs(model, prompt, completion).sum()
            loss = loss - advantage * chosen / n / 3
            if advantage:
                tokens, log_pi = [*tokens, len(completion)], log_pi + chosen.item()
    loss.backward()
    trained = load_file(out / "epoch-1/model.safetensors")
    for name, weight in model.named_parameters():
        moved = (start[name] - trained[name]) / 0.01
        torch.testing.assert_close(moved, weight.grad, atol=3e-4, rtol=1e-3)
    norm = sum((weight.grad**2).sum().item() for weight in model.parameters()) ** 0.5
    assert norm > 0.1 and metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics["mean_length"] == pytest.approx(sum(tokens) / len(tokens))
    assert metrics["entropy"] == pytest.approx(-log_pi / sum(tokens), rel=1e-5)
    assert metrics["engine_to_trainer"] == pytest.approx(-len(tokens) / log_pi, rel=1e-5)


@pytest.mark.parametrize("k", [1, 3])
def test_unbalanced_groups_are_replaced_by_the_next_of_the_stream(k, with_rollouts, tokenizer):
    rows, n = sums(90), 4

    def right(i, step):
        return (0, 1, 3, 4)[common.seed_of(i, step) % 4]

    def accepts(i, step):
        return 0 < right(i, step) < (n if k == 1 else 3)

    flags = ["--rollouts", n, "--pass-k", k, "--batch-size", 8, "--epochs", 2, "--lr", 1e-4]
    out, sampler = with_rollouts(rows, drawing(rows, tokenizer, right), *flags, "--seed", 2)
    steps = read_lines(out / "metrics.jsonl")
    expected = steps_by_definition(90, 8, accepts, seed=2, epochs=2)
    found = [(step["ids"], step["candidates"]) for step in steps]
    assert found == [(ids, len(seen)) for ids, seen in expected] and len(found) > 4
    for number, (step, (_, seen)) in enumerate(zip(steps, expected, strict=True)):
        counts = [right(i, number) for i in seen]
        assert step["all_wrong"] == counts.count(0)
        assert step["reward"] == pytest.approx(sum(counts) / len(counts) / n)
    sampler.assert_sampled_afresh(steps)


# The script as a user runs it


def test_a_run_from_a_checkpoint_that_knows_the_format(warm_start, tmp_path, one_grader):
    (checkpoint, data), out = warm_start, tmp_path / "run"
    flags = ["--model", checkpoint, "--data", data, "--engine", "transformers", "--batch-size", 4]
    flags += ["--max-new-tokens", 40, "--max-steps", 3, "--eval-problems", 4, "--eval-n", 16]
    train_grpo.main([str(flag) for flag in [*flags, "--lr", 0.01, "--out", out]])
    steps = read_lines(out / "metrics.jsonl")
    assert len(steps) == 3
    for step in steps:
        assert 0 < step["reward"] <= step["format_rate"] <= 1 and step["grad_norm"] > 0
        assert step["engine_to_trainer"] == pytest.approx(1, abs=1e-3)
    (summary,) = read_lines(out / "epochs.jsonl")
    assert {"pass@1", "pass@16", "mode_confidence"} <= set(summary)
    before, after = (load_file(f / "model.safetensors") for f in (checkpoint, out / "step-3"))
    assert max((after[name] - before[name]).abs().max().item() for name in after) > 1e-3


def test_an_epoch_without_a_balanced_group_ends_with_the_remedy(with_rollouts, tokenizer, capsys):
    draw = drawing(sums(20), tokenizer, lambda i, step: 0)
    message = refused(capsys, with_rollouts, sums(20), draw, "--batch-size", 4)
    assert "train_cot_dcoa.py" in message


def test_a_later_epoch_without_a_balanced_group_is_legal(with_rollouts, tokenizer):
    draw = drawing(sums(20), tokenizer, lambda i, step: 2 if step == 0 else 0)
    out, _ = with_rollouts(sums(20), draw, "--batch-size", 4, "--rollouts", 4, "--epochs", 2)
    assert [epoch["step"] for epoch in read_lines(out / "epochs.jsonl")] == [1, 1]
