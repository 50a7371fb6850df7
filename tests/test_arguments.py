"""Arguments that the training scripts refuse, and their presets."""

import pytest
import torch
from small_runs import refused

import train_cot_dcoa
import train_direct
import train_grpo
import train_lean_step

TOO_LONG = "--max-new-tokens 2048 --model examples/tiny_llama"
REFUSED = [
    *((train_direct, flags) for flags in ("--n-prime 0.99", "--n-prime nan", "--checkpoint-at 1")),
    *((train_direct, flags) for flags in ("--batch-size 0", "--lr -1", "--prompt x", "--zero 2")),
    *((train_direct, flags) for flags in ("--model ./no/folder", "--model examples/arithmetic")),
    *((train_direct, flags) for flags in ("--factor-threshold 1", "--data no/folder")),
    *((train_cot_dcoa, flags) for flags in ("--n-mc 0", "--save-every 0", TOO_LONG)),
    *((train_grpo, flags) for flags in ("--rollouts 1", "--pass-k 9", "--save-every 0", TOO_LONG)),
    *((train_lean_step, flags) for flags in ("--level proof", "--n-eff 0.5", "--data none.json")),
]


@pytest.mark.parametrize("script, flags", REFUSED)
def test_bad_arguments_are_refused_before_anything_is_written(script, flags, tmp_path, capsys):
    """The message names the flag or its value."""
    out = tmp_path / "run"
    message = refused(capsys, script.main, [*flags.split(), "--out", str(out)])
    assert any(part in message for part in flags.split())
    assert not any(out.glob("*"))


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
