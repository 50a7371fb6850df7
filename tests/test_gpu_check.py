"""tests/gpu_check.py on a CPU: what its commands do and print. bench has tests of its own."""

import json
import sys

import gpu_check
import pytest

pytestmark = pytest.mark.slow


@pytest.fixture
def check(monkeypatch, tmp_path):
    """Run gpu_check.main and return {check: outcome}."""

    def check(*flags):
        flags = ["--out", str(tmp_path), "--device", "cpu", "--minutes", "60", *flags]
        data = ["--model", gpu_check.TINY, "--data", gpu_check.ARITHMETIC]
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", *data, *flags])
        gpu_check.main()
        return json.loads((tmp_path / "results.json").read_text())

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)  # the tests' handlers stay
    return check


def test_checks_pass_on_a_cpu(check, capsys):
    names = ["direct", "cot", "grpo", "lean", "loss", "packing", "logits", "zero", "vllm"]
    outcomes = check("--only", *names)
    printed = capsys.readouterr().out
    for name in names:
        assert outcomes[name]["status"] == "ok" and f"{name}: ok: " in printed, printed


def test_the_study_trains_and_shows_its_table(check, tmp_path, capsys):
    flags = ["--study-runs", "1:3e-3", "64:3e-3", "--study-epochs", "1"]
    outcome = check("--only", "study", *flags)["study"]
    assert outcome["status"] == "ok", (tmp_path / "study/n1-lr3e-3/log.txt").read_text()[-2000:]
    check("--study", "table", *flags)
    printed = capsys.readouterr().out
    for run in ("n1-lr3e-3", "n64-lr3e-3"):
        (epoch,) = gpu_check.read_lines(tmp_path / "study" / run / "epochs.jsonl")
        assert f"| {run} | 1 | {100 * epoch['pass@1']:.1f} |" in printed
    for png in ("study-epochs.png", "study/passn-arithmetic.png"):
        assert (tmp_path / png).read_bytes().startswith(b"\x89PNG")
