"""tests/gpu_check.py on a CPU: what its commands do and print. cot, grpo, lean and zero are only
parsed, for their time; vllm has made-up engines."""

import copy
import json
import shutil
import sys

import gpu_check
import pytest

import common
import train_cot_dcoa
import train_direct
import train_grpo
import train_lean_step

pytestmark = pytest.mark.slow
ON_CPU = ["--model", gpu_check.TINY, "--data", gpu_check.ARITHMETIC, "--device", "cpu"]


@pytest.fixture
def check(monkeypatch, tmp_path):
    """Run gpu_check.main and return {check: outcome}."""

    def check(*flags):
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", *ON_CPU, "--out", str(tmp_path), *flags])
        gpu_check.main()
        path = tmp_path / "results.json"
        return json.loads(path.read_text()) if path.exists() else {}

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)  # the tests' handlers stay
    return check


@pytest.fixture
def args(tmp_path):
    return gpu_check.parse_args([*ON_CPU, "--out", str(tmp_path)])


def test_checks_pass_on_a_cpu(check, capsys):
    names = ["direct", "loss", "packing", "logits"]
    outcomes = check("--only", *names, "--minutes", "60")
    printed = capsys.readouterr().out
    for name in names:
        assert outcomes[name]["status"] == "ok" and f"{name}: ok: " in printed, printed
    numbers = outcomes["direct"]["numbers"]
    assert abs(numbers["found"] - numbers["expected"]) < numbers["allowed"]


def test_a_broken_model_fails_what_needs_it_and_nothing_else(check, tmp_path):
    broken = shutil.copytree(gpu_check.TINY, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    outcomes = check("--model", str(broken), "--only", "direct", "loss")
    assert outcomes["direct"]["status"] == "failed" and "header" in outcomes["direct"]["reason"]
    assert outcomes["loss"]["status"] == "ok"


def test_the_study_trains_and_shows_its_table(check, tmp_path, capsys):
    flags = ["--study-runs", "1:3e-3", "64:3e-3", "--study-epochs", "1", "--minutes", "60"]
    outcome = check("--only", "study", *flags)["study"]
    assert outcome["status"] == "ok", (tmp_path / "study/n1-lr3e-3/log.txt").read_text()[-2000:]
    check("--study", "table", *flags)
    printed = capsys.readouterr().out
    for run in ("n1-lr3e-3", "n64-lr3e-3"):
        (epoch,) = gpu_check.read_lines(tmp_path / "study" / run / "epochs.jsonl")
        assert f"| {run} | 1 | {100 * epoch['pass@1']:.1f} |" in printed
    for png in ("study-epochs.png", "study/passn-arithmetic.png"):
        assert (tmp_path / png).read_bytes().startswith(b"\x89PNG")


class Engines(common.TransformersSampler):
    """In place of vLLM's: samples with a copy of the model."""

    stale = False

    def __init__(self, args, accelerator, checkpoint, tokenizer, max_length, model):
        super().__init__(accelerator, copy.deepcopy(model), tokenizer)

    def update_weights(self, model):
        if not self.stale:
            self.model.load_state_dict(model.state_dict())


def test_stale_engines_are_found(args, monkeypatch, tmp_path):
    monkeypatch.setattr(common, "VLLMEngines", Engines)
    numbers = gpu_check.check_vllm(args, tmp_path, 12)
    assert numbers["of stale weights"] > 10 * numbers["error of log p"]
    monkeypatch.setattr(Engines, "stale", True)
    with pytest.raises(AssertionError, match="log p per token"):
        gpu_check.check_vllm(args, tmp_path, 12)


def test_scripts_take_the_flags_of_the_checks(args, monkeypatch, tmp_path):
    scripts = (train_direct, train_cot_dcoa, train_grpo, train_lean_step)
    parsers, seen = {f"{script.__name__}.py": script.parse_args for script in scripts}, []

    def start(*arguments):
        place = next(i for i, one in enumerate(arguments) if str(one).endswith(".py"))
        parsers[arguments[place].name]([*map(str, arguments[place + 1 :])])
        seen.append(arguments[place].name)

    monkeypatch.setattr(gpu_check, "start", start)
    monkeypatch.setattr(gpu_check, "inspect", lambda *_, **__: {})
    for name in ("direct", "cot", "grpo", "lean", "zero"):
        (tmp_path / name).mkdir()
        gpu_check.CHECKS[name](args, tmp_path / name)
    assert len(seen) == 7 and set(seen) == set(parsers)
