"""train_grpo.py: its gradient, its rewards, the balance of its batches, and a run from a checkpoint."""

import json
from importlib.util import find_spec

import pytest
import torch
from conftest import run_script
from injected import TINY, Injected, spell, sums, use_plain_sgd, write
from safetensors.torch import load_file
from test_refill import steps_by_definition

import common
import eval_passn
import train_cot_dcoa
import train_grpo
from train_grpo import grpo_loss

FLAGS = ["--model", TINY, "--template", "r1-short", "--engine", "transformers", "--eval-problems", "0"]
FLAGS += ["--max-new-tokens", "64", "--epochs", "1", "--warmup-steps", "0", "--clip", "1e9"]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# The loss


@pytest.fixture
def rollouts(tokenizer):
    """Of one problem, with rewards."""
    prompt = tokenizer("User: 1+2=\nAssistant: <think>").input_ids
    texts = [" 3 </think> <answer> 3 </answer>", " 1+2=4", " </think> <answer> 5 </answer>", " 3", "7=7=7=7"]
    examples = [common.Example(0, prompt, spell(tokenizer, text, end=i != 1)) for i, text in enumerate(texts)]
    return examples, torch.tensor([1.0, 0, 0, 1, 0])


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def assert_same(one, other):
    for name in one:
        torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=1e-4, msg=name)


def token_log_probs(model, example):
    """log π of each token of a roll-out that is computed alone, without any padding."""
    logits = model(torch.tensor([example.prompt_ids + example.completion_ids])).logits[0]
    chosen = logits[len(example.prompt_ids) - 1 : -1].log_softmax(-1)
    return chosen.gather(-1, torch.tensor(example.completion_ids)[:, None]).squeeze(-1)


def test_gradient_is_that_of_the_equation(tiny_model, rollouts):
    """As -Σ A ∇ log π, and as the equation's ratios π / stop_grad(π), token by token."""
    examples, rewards = rollouts
    advantages = rewards - rewards.mean()
    log_probs = common.completion_log_probs(tiny_model, common.collate(examples, 0))
    found = gradients(tiny_model, grpo_loss(log_probs, advantages))
    assert max(gradient.abs().max().item() for gradient in found.values()) > 0.1
    alone = [token_log_probs(tiny_model, example) for example in examples]
    assert_same(found, gradients(tiny_model, -sum(a * x.sum() for a, x in zip(advantages, alone, strict=True))))
    alone = [token_log_probs(tiny_model, example).exp() for example in examples]
    ratios = [pi / pi.detach() for pi in alone]
    assert all(torch.equal(ratio, torch.ones_like(ratio)) for ratio in ratios)
    assert_same(found, gradients(tiny_model, -sum(a * x.sum() for a, x in zip(advantages, ratios, strict=True))))


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_a_group_that_is_all_right_or_all_wrong_has_no_gradient(reward, tiny_model, rollouts):
    examples, rewards = rollouts
    rewards = torch.full_like(rewards, reward)
    log_probs = common.completion_log_probs(tiny_model, common.collate(examples, 0))
    found = gradients(tiny_model, grpo_loss(log_probs, rewards - rewards.mean()))
    assert all(gradient.abs().max() == 0 for gradient in found.values())


def test_padding_changes_nothing(tiny_model, rollouts):
    """A short roll-out beside a longer one with a longer prompt, whose own advantage is nil."""
    (short, *_), _ = rollouts
    other = common.Example(1, [*short.prompt_ids, *short.prompt_ids[1:]], short.completion_ids * 3)
    both = common.completion_log_probs(tiny_model, common.collate([short, other], 0))
    beside = gradients(tiny_model, grpo_loss(both, torch.tensor([0.7, 0.0])))
    one = common.completion_log_probs(tiny_model, common.collate([short], 0))
    assert_same(beside, gradients(tiny_model, grpo_loss(one, torch.tensor([0.7]))))


# The script on injected roll-outs


def right_one(row, way=0):
    return (" 1=1", " so", "")[way % 3] + f" </think> <answer> {row['answer']} </answer>"


def drawing(rows, tokenizer, right):
    """right(id, step) of n roll-outs are right, in several lengths; the others wrong in the ways there are."""
    wrong = [" </think> <answer> -1 </answer>", " 1+1=2, 2+2=4 so </think> <answer> 0", "2"]

    def draw(i, step, n):
        k = right(i, step)
        texts = [right_one(rows[i], j) for j in range(k)] + [wrong[j % 3] for j in range(n - k)]
        # The last way is cut by the limit.
        return [spell(tokenizer, text, end=text != "2") for text in texts]

    return draw


@pytest.fixture
def with_rollouts(monkeypatch, tmp_path, tokenizer, one_grader):
    """-> a function that runs the script on `rows`, drawing by `draw`; gives --out and the Injected."""

    def run(rows, draw, *flags):
        data = write(tmp_path / "data", rows)
        sampler = Injected(data, "r1-short", tokenizer, draw)
        monkeypatch.setattr(common, "spawn_engines", sampler)
        out = tmp_path / "run"
        train_grpo.main([*FLAGS, "--data", str(data), "--out", str(out), "--overwrite", *map(str, flags)])
        return out, sampler

    return run


@pytest.mark.parametrize(
    "tokens_per_micro_batch, checkpointing", [(1, False), (150, False), (150, True), (8192, False)]
)
def test_a_step_is_the_equation_written_out(
    tokens_per_micro_batch, checkpointing, with_rollouts, monkeypatch, tokenizer
):
    """The mean over problems of -1/N' Σ_i A_i Σ_t log π, from the metrics' ids and the injected roll-outs."""
    use_plain_sgd(monkeypatch)
    rows, right = sums(5), [2, 0, 1, 4, 3]  # of 4: problems 1 and 3 are replaced
    draw = drawing(rows, tokenizer, lambda i, step: right[i])
    flags = ["--rollouts", 4, "--batch-size", 3, "--lr", 0.01, "--tokens-per-micro-batch", tokens_per_micro_batch]
    out, _ = with_rollouts(rows, draw, *flags, *["--gradient-checkpointing"] * checkpointing)
    (metrics,) = read(out / "metrics.jsonl")
    assert sorted(metrics["ids"]) == [0, 2, 4]

    model, _ = common.load_model(TINY, tokenizer, seed=0)
    start = {name: weight.clone() for name, weight in model.state_dict().items()}
    loss, tokens, log_pi = 0, 0, 0
    for i in metrics["ids"]:
        prompt = tokenizer(f"User: {rows[i]['problem']}\nAssistant: <think>").input_ids
        for j, completion in enumerate(draw(i, 0, 4)):
            advantage = (j < right[i]) - right[i] / 4
            log_probs = token_log_probs(model, common.Example(i, prompt, completion))
            loss = loss - advantage * log_probs.sum() / 4 / 3
            tokens, log_pi = tokens + len(completion), log_pi + log_probs.sum().item()
    found = gradients(model, loss)
    trained = load_file(out / "epoch-1/model.safetensors")
    for name, gradient in found.items():
        torch.testing.assert_close(trained[name], start[name] - 0.01 * gradient, atol=1e-5, rtol=0)
    largest = max(gradient.abs().max().item() for gradient in found.values())
    assert 0.01 * largest > 1e-3, "the step has to be larger than what the comparison lets pass"
    norm = sum((gradient**2).sum().item() for gradient in found.values()) ** 0.5
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert metrics["mean_length"] == tokens / 12 and metrics["entropy"] == pytest.approx(-log_pi / tokens, rel=1e-5)
    assert metrics["engine_to_trainer"] is None  # there is no engine that would have said


def test_problems_are_drawn_fairly_and_unbalanced_groups_are_replaced(with_rollouts, tokenizer):
    rows, n = sums(90), 4

    def right(i, step):
        return (0, 1, 3, 4)[common.seed_of(i, step) % 4]

    flags = ["--rollouts", n, "--batch-size", 8, "--epochs", 3, "--lr", 1e-4, "--seed", 2]
    out, sampler = with_rollouts(rows, drawing(rows, tokenizer, right), *flags)
    steps = read(out / "metrics.jsonl")
    expected = steps_by_definition(90, 8, lambda i, step: 0 < right(i, step) < n, 2, 3)
    assert [(one["epoch"], one["ids"], one["candidates"]) for one in steps] == [
        (epoch, ids, len(looked_at)) for epoch, ids, looked_at in expected
    ]
    for epoch in (1, 2, 3):
        drawn = [i for one, _, looked_at in expected for i in looked_at if one == epoch]  # the used and the replaced
        assert len(drawn) == len(set(drawn)) > 45
    for step, (one, (_, ids, looked_at)) in enumerate(zip(steps, expected, strict=True)):
        counts = [right(i, step) for i in looked_at]
        assert all(0 < right(i, step) < n for i in ids)
        assert (one["all_wrong"], one["all_right"]) == (counts.count(0), counts.count(n))
        assert one["all_wrong"] + one["all_right"] == len(looked_at) - len(ids)
        assert one["reward"] == pytest.approx(sum(counts) / len(counts) / n)  # over the replaced ones as well
    # New weights once a step; what a step did not need is sampled anew, with other seeds.
    assert sum(event == ("update",) for event in sampler.events) == len(steps)
    seeds = sampler.seeds()
    assert all(len(of_one) == 1 for of_one in seeds.values())
    assert len(set.union(*seeds.values())) == len(seeds) > sum(one["candidates"] for one in steps)


def test_only_the_right_answer_in_exactly_the_format_is_rewarded(with_rollouts, tokenizer):
    rows = [{"problem": "1+5=", "answer": "6"}]
    texts = {
        " 1+5=6 </think> <answer> 6 </answer>": (1, 1),  # reward, format
        " 6 </think> so <answer>6</answer> ": (1, 1),
        " </think> <answer> \\frac{12}{2} </answer>": (1, 1),  # math-verify's verdict, not that of a string
        " </think> <answer> 7 </answer>": (0, 1),
        " 6 <answer> 6 </answer>": (0, 0),
        " </think> <answer> 6 </answer> <answer> 6 </answer>": (0, 0),
        " </think> </think> <answer> 6 </answer>": (0, 0),
        " <answer> 6 </answer> </think>": (0, 0),
        " </think> <answer> </answer>": (0, 0),
        " </think> \\boxed{6}": (0, 0),
    }
    rollouts = [spell(tokenizer, text) for text in texts]
    rollouts.append(spell(tokenizer, " 1+5=6 </think> <answer> 6 </answer>", end=False))  # cut by the limit
    rollouts.append([])
    flags = ["--rollouts", len(rollouts), "--batch-size", 1]
    out, _ = with_rollouts(rows, lambda i, step, n: rollouts, *flags)
    (metrics,) = read(out / "metrics.jsonl")
    rewards, formats = zip(*texts.values(), strict=True)
    assert metrics["reward"] == pytest.approx(sum(rewards) / len(rollouts)) and sum(rewards) == 3
    assert metrics["format_rate"] == pytest.approx(sum(formats) / len(rollouts)) and sum(formats) == 4


class Contrary:
    """A judge unlike any other: whatever is not the right answer is right."""

    made = 0

    def __init__(self, *arguments, **more):
        type(self).made += 1

    def grade(self, pairs):
        return [prediction is not None and gold != prediction for gold, prediction in pairs]

    def count_right(self, golds, answers):
        return [
            sum(counts[answer] for answer in counts if self.grade([(gold, answer)])[0])
            for gold, counts in zip(golds, answers, strict=True)
        ]

    def close(self):
        pass


def test_rewards_estimates_and_evaluation_have_one_judge(monkeypatch, tmp_path, tokenizer):
    """common.Grader: put another in its place, and the reward, p̂ and pass@N are all what that one says."""
    monkeypatch.setattr(common, "Grader", Contrary)
    rows = sums(2)
    data = write(tmp_path / "data", rows, rows)

    def r1(i, step, n):
        return [spell(tokenizer, right_one(rows[i]))] * 3 + [spell(tokenizer, " </think> <answer> -1 </answer>")]

    def cot(i, step, n):
        return [spell(tokenizer, rows[i]["solution"])] * 3 + [spell(tokenizer, "\\boxed{-1}")]

    flags = [*FLAGS[:2], *FLAGS[4:], "--data", str(data), "--batch-size", "2"]
    monkeypatch.setattr(common, "spawn_engines", Injected(data, "r1-short", tokenizer, r1))
    out = str(tmp_path / "grpo")
    train_grpo.main([*flags, "--template", "r1-short", "--rollouts", "4", "--out", out])
    assert read(tmp_path / "grpo/metrics.jsonl")[0]["reward"] == 0.25
    monkeypatch.setattr(common, "spawn_engines", Injected(data, "cot", tokenizer, cot))
    out = str(tmp_path / "cot")
    train_cot_dcoa.main([*flags, "--n-mc", "4", "--n-prime", "2", "--out", out])
    assert read(tmp_path / "cot/metrics.jsonl")[0]["mean_p"] == 0.25

    def greedy(model, tokenizer, prompts, n, max_new_tokens, seed, temperature=1.0):
        return [[spell(tokenizer, "\\boxed{-1}")] * n for _ in prompts]

    monkeypatch.setattr(common, "generate", greedy)
    flags = ["--n", "4", "--ns", "1,4", "--engine", "transformers", "--data", str(data), "--out", str(tmp_path / "e")]
    eval_passn.main([str(tmp_path / "cot/epoch-1"), *flags])
    report = json.loads((tmp_path / "e/passn-data.json").read_text())
    assert [problem["right"] for problem in report["checkpoints"][0]["per_problem"]] == [4, 4]
    assert Contrary.made == 3


# The script as a user runs it


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """A checkpoint that has learnt the format, from the embedded model by cross-entropy on a few easy problems."""
    folder = tmp_path_factory.mktemp("warm")
    rows = [
        {"problem": f"{a}+{b}=", "answer": str(a + b), "solution": f"{a}+{b}={a + b}"}
        for a in range(1, 7)
        for b in range(1, 7)
    ]
    data = write(folder / "data", rows, rows[:4])
    flags = ["--model", "examples/tiny_llama", "--data", data, "--template", "r1-short", "--n-prime", 1, "--lr", 0.01]
    flags += ["--warmup-steps", 10, "--batch-size", 36, "--micro-batch-size", 36, "--nll", "mean", "--epochs", 60]
    # One checkpoint is enough: an epoch is a step here, so the data is written often instead.
    write(folder / "often", rows * 60)
    flags[3], flags[-1] = folder / "often", 1
    run_script("train_cot_dcoa.py", *flags, "--eval-problems", 0, "--engine", "transformers", "--out", folder / "run")
    return folder / "run/epoch-1", data


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_a_run_from_a_checkpoint_that_knows_the_format(engine, warm, tmp_path):
    if engine == "vllm" and find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    checkpoint, data = warm
    out = tmp_path / "run"
    flags = ["--data", data, "--engine", engine, "--batch-size", 4, "--rollouts", 8, "--max-new-tokens", 40]
    flags += ["--epochs", 1, "--max-steps", 3, "--eval-problems", 4, "--eval-n", 16, "--show-every", 1, "--lr", 0.01]
    done = run_script("train_grpo.py", "--model", checkpoint, *flags, "--out", out)
    assert "template r1-short" in done.stdout and "(the settings of the embedded experiment" in done.stdout
    assert "a right roll-out" in done.stdout + done.stderr and "a wrong roll-out" in done.stdout + done.stderr
    steps = read(out / "metrics.jsonl")
    assert 2 <= len(steps) <= 3
    for one in steps:
        assert 0 < one["reward"] < 1 and one["reward"] <= one["format_rate"] <= 1
        assert one["accepted"] <= 4 and one["candidates"] == one["accepted"] + one["all_wrong"] + one["all_right"]
        assert one["entropy"] > 0 and 0 < one["mean_length"] <= 40 and one["grad_norm"] > 0
        if engine == "vllm":  # also after the first step, whose weights the engine has to have got by then
            assert one["engine_to_trainer"] == pytest.approx(1, abs=1e-3)
        else:
            assert one["engine_to_trainer"] is None
    (summary,) = read(out / "epochs.jsonl")
    assert {"pass@1", "pass@16", "mode_confidence"} <= set(summary)
    (last,) = [*out.glob("epoch-1"), *out.glob(f"step-{len(steps)}")]
    record = json.loads((last / "dco.json").read_text())
    assert record["template"] == "r1-short" and record["max_new_tokens"] == 40 and record["step"] == len(steps)
    assert common.is_example(str(last)) and not common.is_example(str(data))
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, last))
    assert max((after[name] - before[name]).abs().max().item() for name in after) > 1e-3
    assert (out / "engine-0.log").is_file() == (engine == "vllm")


def test_an_epoch_without_any_mixed_group_ends_without_a_step_and_says_so(tmp_path):
    """From scratch nothing is ever right."""
    flags = [*FLAGS, "--data", write(tmp_path / "data", sums(20)), "--max-new-tokens", 8, "--batch-size", 4]
    done = run_script("train_grpo.py", *flags, "--out", tmp_path / "run")
    assert "epoch 1/1: 0 steps on 0 of 20 candidates, 20 rejected" in done.stdout + done.stderr
    (summary,) = read(tmp_path / "run/epochs.jsonl")
    assert (summary["steps"], summary["used"], summary["candidates"]) == (0, 0, 20)
    assert not (tmp_path / "run/metrics.jsonl").exists()
    assert (tmp_path / "run/epoch-1/model.safetensors").is_file()


# What it refuses


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--rollouts", "1"], "--rollouts must be 2 or more"),
        (["--batch-size", "0"], "--batch-size must be positive"),
        (["--tokens-per-micro-batch", "0"], "--tokens-per-micro-batch must be positive"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be positive"),
        (["--max-steps", "0"], "--max-steps must be positive"),
        (["--show-every", "0"], "--show-every must be positive"),
        (["--eval-n", "0"], "--eval-n must be positive"),
        (["--eval-problems", "-1"], "--eval-problems must be 0 or more"),
        (["--gpu-memory", "1.5"], "--gpu-memory under 1"),
        (["--gpus-per-engine", "0"], "--gpus-per-engine must be positive"),
        (["--lr", "nan"], "--lr must be positive"),
        (["--clip", "0"], "--clip must be positive"),
        (["--betas", "-0.1", "0.9"], "--betas must lie in [0, 1)"),
        (["--weight-decay", "-1"], "--weight-decay be 0 or more"),
        (["--template", "direct"], "--template: invalid choice: 'direct'"),
        (["--engine", "magic"], "--engine: invalid choice: 'magic'"),
        (["--zero", "1"], "--zero: invalid choice"),
        ([*FLAGS, "--max-new-tokens", "2048"], "the longest prompt and --max-new-tokens make"),
    ],
)
def test_bad_flags(flags, told, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        train_grpo.main([*flags, "--out", str(tmp_path / "run")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("error:") == 1 and told in error, error
    assert not (tmp_path / "run").exists()
