"""train_direct.py on the tiny model, in one process: its steps, what it writes and refuses."""

import json
import math

import accelerate
import pytest
import torch
import transformers
from safetensors.torch import load_file
from small_runs import FLAGS, ROOT, assert_same_run, read_lines, refused, train, write_rows

import common
import train_direct

# ---- Steps


@pytest.mark.parametrize("way", [1.0, -1.0], ids=["score always", "straight always"])
@pytest.mark.parametrize("tokens", [64, 512, 8192])
def test_same_run_for_each_token_budget_and_way_of_refilling(
    tokens, way, small_data, reference, tmp_path, monkeypatch
):
    refill, log_probs, most = common.Refill, common.log_probs, []

    def forced(**settings):
        return refill(**settings | {"straight_above": way})

    def watched(model, examples, *more, **settings):
        most.append(sum(map(len, examples)))
        return log_probs(model, examples, *more, **settings)

    monkeypatch.setattr(common, "Refill", forced)
    monkeypatch.setattr(common, "log_probs", watched)
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")  # by `accelerate launch`
    flags = ["--micro-batch-tokens", tokens, "--data", small_data, "--out", tmp_path / "run"]
    train(*FLAGS, *flags)
    assert tokens / 2 < max(most) <= tokens or tokens == 8192
    assert_same_run(tmp_path / "run", reference)


def plain_log_prob(model, tokenizer, row):
    """log p of one answer, EOS included, with nothing of common.py."""
    prompt = tokenizer(row["problem"] + "\n").input_ids
    answer = tokenizer(row["answer"], add_special_tokens=False).input_ids
    answer.append(tokenizer.eos_token_id)
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.double().log_softmax(-1)[range(len(answer)), answer].sum(), len(answer)


@pytest.mark.parametrize("nll", ["sum", "mean"])
def test_a_step_is_adamw_on_the_plain_gradient_of_its_first_accepted_candidates(
    nll, small_data, tmp_path, monkeypatch
):
    """Eq. 4 as it stands, one example after the other, at the weights before each step; and
    torch's AdamW with these gradients."""
    before, gradients, clip = [], [], accelerate.Accelerator.clip_grad_norm_

    def watched(accelerator, parameters, norm):
        parameters = list(parameters)
        before.append([p.detach().clone() for p in parameters])
        gradients.append([p.grad.clone() for p in parameters])
        return clip(accelerator, parameters, norm)

    monkeypatch.setattr(accelerate.Accelerator, "clip_grad_norm_", watched)
    flags = ["--n-prime", 256, "--factor-threshold", 0.95, "--nll", nll, "--warmup-steps", 9]
    flags += ["--batch-size", 24, "--clip", 0.5, "--max-steps", 15]
    train(*flags, "--data", small_data, "--out", tmp_path / "run")

    rows, steps = read_lines(small_data / "train.jsonl"), read_lines(tmp_path / "run/metrics.jsonl")
    tokenizer = transformers.AutoTokenizer.from_pretrained("examples/tiny_llama")
    model = common.load_model("examples/tiny_llama", tokenizer, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    epoch, clipped = 0, 0
    for step, weights_before, gradient in zip(steps, before, gradients, strict=True):
        for p, weight in zip(model.parameters(), weights_before, strict=True):
            torch.testing.assert_close(p.data, weight, rtol=0, atol=1e-6)
            p.data.copy_(weight)
        if step["epoch"] != epoch:
            epoch, position = step["epoch"], 0
            generator = torch.Generator().manual_seed(common.seed_of(0, "epoch", epoch))
            order = torch.randperm(len(rows), generator=generator).tolist()
        optimizer.zero_grad()
        accepted, start, losses = [], position, []
        while len(accepted) < 24 and position < len(order):
            i = order[position]
            log_p, length = plain_log_prob(model, tokenizer, rows[i])
            p = log_p.exp().item()
            hit = -math.expm1(256 * math.log1p(-p))  # 1 - (1-p)^256
            factor = 256 * (1 - p) ** 255 * p / hit
            if factor >= 0.95:
                accepted.append(i)
                losses.append(-math.log(hit))
                (-factor * log_p / 24 / (length if nll == "mean" else 1)).backward()
            position += 1
        assert step["ids"] == accepted and step["candidates"] == position - start
        assert step["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        for p, found in zip(model.parameters(), gradient, strict=True):
            scale = p.grad.abs().max().item()
            torch.testing.assert_close(found, p.grad, rtol=1e-4, atol=1e-5 * scale)
            p.grad.copy_(found)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item()
        clipped += norm > 0.5
        assert step["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert step["clipped_share"] == clipped / step["step"]
        assert step["lr"] == pytest.approx(3e-3 * min(1, step["step"] / 9))
        optimizer.param_groups[0]["lr"] = step["lr"]
        optimizer.step()
    assert any(step["candidates"] > step["accepted"] for step in steps)
    assert any(step["accepted"] < 24 for step in steps) and clipped > 0


def test_cross_entropy_uses_every_example_and_never_scores(small_data, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "score", None)
    rows = read_lines(small_data / "train.jsonl")
    data, out = write_rows(tmp_path / "data", train=rows[:100]), tmp_path / "run"
    train("--n-prime", 1, "--epochs", 2, "--data", data, "--out", out)
    steps = read_lines(out / "metrics.jsonl")
    assert [step["accepted"] for step in steps] == [32, 32, 32, 4] * 2
    for epoch in (1, 2):
        used = [i for step in steps if step["epoch"] == epoch for i in step["ids"]]
        assert sorted(used) == list(range(100))
    assert all(step["mean_factor"] == 1 for step in steps)


def test_dco_keeps_the_coverage_that_cross_entropy_loses(small_data, tmp_path):
    """The paper's finding: confidence grows, and pass@4096 falls, with cross-entropy only."""
    rows = read_lines(small_data / "train.jsonl")
    test = read_lines(ROOT / "examples/arithmetic/test.jsonl")[:100]
    data, epochs = write_rows(tmp_path / "data", train=rows, test=test), {}
    for n in (1, 256):
        train("--n-prime", n, "--epochs", 20, "--data", data, "--out", tmp_path / f"n{n}")
        epochs[n] = read_lines(tmp_path / f"n{n}/epochs.jsonl")
    ce, dco = epochs[1][-1], epochs[256][-1]
    assert ce["pass@4096"] < max(epoch["pass@4096"] for epoch in epochs[1]) - 0.15
    assert dco["pass@4096"] > ce["pass@4096"] + 0.15 and dco["pass@256"] > ce["pass@256"] + 0.15
    assert ce["pass@1"] > dco["pass@1"] + 0.005
    assert ce["greedy_confidence"] > 2 * dco["greedy_confidence"]


# ---- Output


def test_metrics_and_checkpoints_within_the_first_epoch(cross_entropy_run):
    out, printed = cross_entropy_run
    assert "laptop" in printed and "1,500 train" in printed and "500 test" in printed
    assert json.loads((out / "args.json").read_text())["n_prime"] == 1
    steps = read_lines(out / "metrics.jsonl")
    assert [step["step"] for step in steps] == list(range(1, 95))
    fields = "step epoch loss accepted candidates mean_factor mean_p mean_ce lr grad_norm seconds"
    assert {*fields.split(), "tokens_per_second"} <= steps[0].keys()
    names = {path.name for path in out.glob("epoch-*")}
    assert names == {"epoch-0.11", "epoch-0.86", "epoch-1", "epoch-2"}
    for share in (0.11, 0.86):
        record = json.loads((out / f"epoch-{share}/dco.json").read_text())
        seen = [i for step in steps[: record["step"]] for i in step["ids"]]
        assert record["seen_ids"] == seen and 0 <= len(seen) - share * 1500 < 32


def test_a_checkpoint_opens_in_plain_transformers_and_samples_from_the_model_itself(
    tokenizer, small_data, tmp_path
):
    """Whatever dropout and sampling settings the pretrained folder has."""
    sizes = {"vocab_size": 118, "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}
    config = transformers.GPT2Config(**sizes, embd_pdrop=0.3, resid_pdrop=0.3)
    pretrained = transformers.AutoModelForCausalLM.from_config(config)
    pretrained.generation_config.update(do_sample=True, top_k=1, temperature=0.1)
    pretrained.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    flags = ["--model", tmp_path / "gpt2", "--data", small_data, "--prompt", "{x} {problem}:"]
    train(*flags, "--n-prime", 16, "--max-steps", 2, "--out", tmp_path / "run")
    checkpoint = tmp_path / "run/step-2"
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    settings = model.generation_config
    assert settings.top_k == 0 and {settings.temperature, settings.top_p} <= {None, 1.0}
    assert settings.eos_token_id == tokenizer.eos_token_id
    assert model.config.embd_pdrop == model.config.resid_pdrop == 0
    loaded = transformers.AutoTokenizer.from_pretrained(checkpoint)
    assert loaded("1+1=").input_ids == tokenizer("1+1=").input_ids
    assert not torch.equal(model.lm_head.weight, pretrained.lm_head.weight)
    stored = load_file(checkpoint / "model.safetensors")
    assert "lm_head.weight" not in stored, "a tied head is stored once"
    assert json.loads((checkpoint / "dco.json").read_text()) == dict(
        template="direct", prompt="{x} {problem}:", data=str(small_data), max_new_tokens=6,
        n_prime=16, step=2, epoch=1,
    )  # fmt: skip


# ---- Arguments


def test_presets_and_what_overrides_them(monkeypatch):
    laptop, paper = train_direct.parse_args([]), train_direct.parse_args(["--preset", "paper"])
    assert (laptop.preset, laptop.lr, laptop.nll) == ("laptop", 3e-3, "sum")
    assert (paper.lr, paper.warmup_steps, paper.batch_size, paper.epochs) == (2e-5, 20, 64, 4)
    assert (paper.factor_threshold, paper.clip, paper.nll) == (0.3, 1.0, "sum")
    assert tuple(paper.betas) == (0.9, 0.999) and paper.weight_decay == 0
    other = train_direct.parse_args(["--preset", "paper", "--lr", "0.5", "--model", "x/y"])
    assert (other.lr, other.model, other.data) == (0.5, "x/y", paper.data)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert train_direct.parse_args([]) == paper


@pytest.mark.parametrize(
    "flags",
    [
        *("--n-prime 0.99", "--n-prime nan", "--factor-threshold 1", "--checkpoint-at 1"),
        *("--batch-size 0", "--lr -1", "--prompt x", "--zero 2"),
        *("--model ./no/folder", "--model examples/arithmetic", "--data no/folder"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_written(flags, tmp_path, capsys):
    """The message names the flag or its value."""
    out = tmp_path / "run"
    message = refused(capsys, train_direct.main, [*flags.split(), "--out", str(out)])
    assert any(part in message for part in flags.split())
    assert not any(out.glob("*"))


@pytest.mark.parametrize("n", ["1", "64"])
def test_a_run_that_diverges_ends_with_a_plain_message(n, small_data, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--n-prime", n, "--lr", "1e6", "--warmup-steps", "0", "--checkpoint-at", "0.05"]
    flags += ["--data", str(small_data), "--out", str(out)]
    assert "diverged" in refused(capsys, train_direct.main, flags)
    assert (out / "epoch-0.05/model.safetensors").exists(), "a checkpoint made before stays"
    steps = read_lines(out / "metrics.jsonl")
    assert all(math.isfinite(step["grad_norm"]) for step in steps)
