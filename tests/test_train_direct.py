"""train_direct.py on the tiny model, in one process: its steps, what it writes and refuses."""

import json
import math

import accelerate
import pytest
import torch
import transformers
from safetensors.torch import load_file
from small_runs import (
    FLAGS,
    assert_same_run,
    plain_log_probs,
    read_lines,
    refused,
    train,
)

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
            prompt_ids = tokenizer(rows[i]["problem"] + "\n").input_ids
            answer_ids = tokenizer(rows[i]["answer"], add_special_tokens=False).input_ids
            answer_ids.append(tokenizer.eos_token_id)
            log_p = plain_log_probs(model, prompt_ids, answer_ids).double().sum()
            p = log_p.exp().item()
            hit = -math.expm1(256 * math.log1p(-p))  # 1 - (1-p)^256
            factor = 256 * (1 - p) ** 255 * p / hit
            if factor >= 0.95:
                accepted.append(i)
                losses.append(-math.log(hit))
                (-factor * log_p / 24 / (len(answer_ids) if nll == "mean" else 1)).backward()
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


# ---- Output


def test_metrics_and_checkpoints_within_the_first_epoch(cross_entropy_run):
    out, printed = cross_entropy_run
    assert "laptop" in printed and "1,500 train" in printed and "500 test" in printed
    assert json.loads((out / "args.json").read_text())["n_prime"] == 1
    steps = read_lines(out / "metrics.jsonl")
    assert [step["step"] for step in steps] == list(range(1, 95))
    fields = "step epoch loss accepted candidates mean_factor mean_p mean_ce lr grad_norm seconds"
    assert {*fields.split(), "tokens_per_second"} <= steps[0].keys()
    assert len(list(out.glob("epoch-*"))) == 4
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
    assert transformers.AutoTokenizer.from_pretrained(checkpoint)("1+1=").input_ids
    assert not torch.equal(model.lm_head.weight, pretrained.lm_head.weight)
    stored = load_file(checkpoint / "model.safetensors")
    assert "lm_head.weight" not in stored, "a tied head is stored once"
    assert json.loads((checkpoint / "dco.json").read_text()) == dict(
        template="direct", prompt="{x} {problem}:", data=str(small_data), max_new_tokens=6,
        n_prime=16, step=2, epoch=1,
    )  # fmt: skip


@pytest.mark.parametrize("n", ["1", "64"])
def test_a_run_that_diverges_ends_with_a_plain_message(n, small_data, tmp_path, capsys):
    out = tmp_path / "run"
    flags = ["--n-prime", n, "--lr", "1e6", "--warmup-steps", "0", "--checkpoint-at", "0.05"]
    flags += ["--data", str(small_data), "--out", str(out)]
    assert "diverged" in refused(capsys, train_direct.main, flags)
    assert (out / "epoch-0.05/model.safetensors").exists(), "a checkpoint made before stays"
    steps = read_lines(out / "metrics.jsonl")
    assert all(math.isfinite(step["grad_norm"]) for step in steps)
