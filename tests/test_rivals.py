"""examples/rivals.py: gradients against closed forms, and that they reach the training."""

import json

import pytest
import torch
from conftest import ROOT

import common
from examples import rivals


def gradient(objective, strength):
    """Of the sum over tokens, by the logits: (gradient, π, one-hot targets), each [K, V]."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([0, 3, 6, 2, 2])
    value = rivals.token_log_probs(logits, targets, objective, strength)
    torch.testing.assert_close(value, common.token_log_probs(logits, targets))
    value.sum().backward()
    target = torch.nn.functional.one_hot(targets, 7).double()
    return logits.grad, logits.detach(), target


def test_label_smoothing_is_torchs():
    found, logits, target = gradient(rivals.smoothing, 0.2)
    logits.requires_grad_()
    loss = torch.nn.functional.cross_entropy(
        logits, target.argmax(-1), label_smoothing=0.2, reduction="sum"
    )
    loss.backward()
    torch.testing.assert_close(found, -logits.grad)


def test_the_entropy_bonus_has_the_gradient_of_the_entropy():
    found, logits, target = gradient(rivals.entropy, 0.3)
    pi = logits.softmax(-1)
    h = torch.distributions.Categorical(logits=logits).entropy()[:, None]
    torch.testing.assert_close(found, target - pi - 0.3 * pi * (pi.log() + h))


def test_gem_moves_mass_to_the_target_from_the_sharpened_distribution():
    found, logits, target = gradient(rivals.gem, 0.7)
    torch.testing.assert_close(found, target - (logits / 0.7).softmax(-1))


@pytest.mark.parametrize("rival, strength", [("focal", 2), ("smoothing", 0.2)])
def test_a_rival_trains_with_its_own_weight(rival, strength, tmp_path, monkeypatch):
    for name in ("dco_factor", "token_log_probs"):
        monkeypatch.setattr(common, name, getattr(common, name))  # put back afterwards
    flags = ["--data", str(ROOT / "examples/arithmetic"), "--max-steps", "40"]
    out = ["--out", str(tmp_path / "run")]
    rivals.main(["--rival", rival, "--strength", str(strength), *flags, *out])
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert len(steps) == 40 and all(step["accepted"] == step["candidates"] for step in steps)
    if rival == "focal":  # mean (1 - p)^2 is at least (1 - mean p)^2
        last = steps[-1]
        assert (1 - last["mean_p"]) ** 2 <= last["mean_factor"] < 1 - last["mean_p"]
    else:
        assert all(step["mean_factor"] == 1 for step in steps)
        assert steps[-1]["mean_ce"] < steps[0]["mean_ce"]
