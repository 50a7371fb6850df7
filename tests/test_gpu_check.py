"""tests/gpu_check.py on a CPU: the checks pass, each can fail, and none outlives its time. Not run
here, for their time: cot, grpo, lean, zero and bench; vllm has made-up engines."""

import copy
import json
import shutil
import sys
from types import SimpleNamespace

import gpu_check
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

import common

pytestmark = pytest.mark.slow
ON_CPU = ["--model", gpu_check.TINY, "--data", gpu_check.ARITHMETIC, "--device", "cpu"]
STUDY = ["--study-runs", "1:3e-3", "64:3e-3", "--study-epochs", "1"]


def check(monkeypatch, out, *flags):
    """Run gpu_check.main and return {check: outcome}."""
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *ON_CPU, "--out", str(out), *flags])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(gpu_check.signal, "signal", lambda *_: None)  # the tests' handlers stay
    gpu_check.main()
    path = out / "results.json"
    return json.loads(path.read_text()) if path.exists() else {}


def parse(out, *flags):
    return gpu_check.parse_args([*ON_CPU, "--out", str(out), *flags])


def fails(function, *arguments):
    with pytest.raises(AssertionError) as failed:
        function(*arguments)
    return str(failed.value)


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """Returns (--out, outcomes) of two checks in processes of their own."""
    out = tmp_path_factory.mktemp("check") / "out"
    with pytest.MonkeyPatch.context() as patch:
        return out, check(patch, out, "--only", "direct", "logits")


def test_checks_pass_on_a_cpu(checked):
    out, outcomes = checked
    assert {name: outcome["status"] for name, outcome in outcomes.items()} == {
        "direct": "ok",
        "logits": "ok",
    }
    numbers = outcomes["direct"]["numbers"]
    assert abs(numbers["found"] - numbers["expected"]) < numbers["allowed"]
    assert "train_direct.py" in (out / "direct/log.txt").read_text()


def test_a_broken_model_fails_what_needs_it_and_nothing_else(monkeypatch, tmp_path):
    broken = shutil.copytree(gpu_check.TINY, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    flags = ["--model", str(broken), "--only", "direct", "loss"]
    outcomes = check(monkeypatch, tmp_path / "out", *flags)
    assert outcomes["direct"]["status"] == "failed" and "header" in outcomes["direct"]["reason"]
    assert outcomes["loss"]["status"] == "ok"


# ---- A check that hangs or dies
HANGS = """import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(os.getpid(), child.pid, flush=True)
time.sleep(600)"""


def test_a_check_that_hangs_is_ended_with_what_it_started(monkeypatch, tmp_path):
    (tmp_path / "hangs.py").write_text(HANGS)
    monkeypatch.setattr(gpu_check, "__file__", str(tmp_path / "hangs.py"))
    outcome = gpu_check.run_check(parse(tmp_path, "--minutes", "0.1"), "loss")
    assert outcome["status"] == "failed" and "0.1 minutes" in outcome["reason"]
    pids = [int(pid) for pid in (tmp_path / "loss/log.txt").read_text().split()]
    running = [pid for pid in pids if psutil.pid_exists(pid)]
    assert len(pids) == 2
    assert all(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE for pid in running)


def test_a_check_that_dies_leaves_its_last_words(monkeypatch, tmp_path):
    dies = "import os\nprint('RuntimeError: the card is gone', flush=True)\nos.kill(os.getpid(), 9)"
    (tmp_path / "dies.py").write_text(dies)
    monkeypatch.setattr(gpu_check, "__file__", str(tmp_path / "dies.py"))
    outcome = gpu_check.run_check(parse(tmp_path), "loss")
    assert outcome["status"] == "failed" and "the card is gone" in outcome["reason"]


# ---- The study
def test_the_study_trains_side_by_side_and_is_not_repeated(monkeypatch, tmp_path):
    outcome = check(monkeypatch, tmp_path, "--only", "study", *STUDY, "--minutes", "20")["study"]
    assert outcome["status"] == "ok", (tmp_path / "study/n1-lr3e-3/log.txt").read_text()[-2000:]
    for run in ("n1-lr3e-3", "n64-lr3e-3"):
        (epoch,) = gpu_check.read_lines(tmp_path / "study" / run / "epochs.jsonl")
        row = f"| {run} | 1 | {100 * epoch['pass@1']:.1f} |"
        assert row in (tmp_path / "study.md").read_text()
    for png in ("study-epochs.png", "study/passn-arithmetic.png"):
        assert (tmp_path / png).read_bytes().startswith(b"\x89PNG")
    args = parse(tmp_path, *STUDY)
    gpu_check.start_study(args)
    assert not any(map(gpu_check.process_of, gpu_check.folders(args)))


def test_the_study_stops_with_a_state_and_goes_on(monkeypatch, tmp_path):
    flags = ["--study-runs", "1:3e-3", "--study-epochs", "100"]
    check(monkeypatch, tmp_path, "--study", "start", *flags)
    (folder,) = gpu_check.folders(args := parse(tmp_path, *flags, "--minutes", "0.01"))
    process = gpu_check.process_of(folder)
    while not gpu_check.read_lines(folder / "metrics.jsonl"):
        assert process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    gpu_check.make_study(args)
    assert gpu_check.process_of(folder) is None and list(folder.glob("state/step-*"))
    gpu_check.start_study(args)
    process = gpu_check.process_of(folder)
    while "resuming from" not in (folder / "log.txt").read_text():
        assert process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    process.kill()
    process.wait()


# ---- Each check can fail
def test_a_wrong_log_p_on_the_device_is_found(monkeypatch, tmp_path):
    right = common.log_probs

    def wrong(model, examples):  # the reference is in float64
        return right(model, examples) * (1 if model.dtype == torch.float64 else 1.001)

    assert gpu_check.check_loss(parse(tmp_path), tmp_path)
    monkeypatch.setattr(common, "log_probs", wrong)
    assert "float32, N' = 1" in fails(gpu_check.check_loss, parse(tmp_path), tmp_path)


def leak(log_p, examples):
    return log_p + 1e-3 * (len(examples) > 1)


def break_gradient(log_p, examples):
    log_p.register_hook(lambda gradient: gradient * (torch.nan if len(examples) > 1 else 1))
    return log_p


@pytest.mark.parametrize("fault, named", [(leak, "off by"), (break_gradient, "off by inf")])
def test_packing_that_matters_is_found(fault, named, monkeypatch, tmp_path):
    right = common.log_probs
    assert gpu_check.check_packing(parse(tmp_path), tmp_path)
    monkeypatch.setattr(
        common, "log_probs", lambda m, examples: fault(right(m, examples), examples)
    )
    assert named in fails(gpu_check.check_packing, parse(tmp_path), tmp_path)


def change_metric(name, value):
    def change(run):
        first, second = gpu_check.read_lines(run / "metrics.jsonl")
        lines = [json.dumps(step) + "\n" for step in (first | {name: value}, second)]
        (run / "metrics.jsonl").write_text("".join(lines))

    return change


def move_weights(run):
    path = run / "step-2/model.safetensors"
    weights = {name: weight + 1e-3 for name, weight in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "change, named",
    [
        (change_metric("loss", 3.0), "float32 forward"),
        (change_metric("loss", float("nan")), "nan"),
        (change_metric("grad_norm", 0.0), "grad_norm"),
        (change_metric("engine_to_trainer", 1.2), "engine_to_trainer"),
        (move_weights, "weights moved"),
    ],
)
def test_wrong_steps_are_found(change, named, checked, tmp_path):
    rows = common.load_problems(checked[0] / "direct", "train")
    run = shutil.copytree(checked[0] / "direct/run", tmp_path / "run")
    inputs = parse(tmp_path), run, gpu_check.TINY, rows, "direct", 64
    assert gpu_check.inspect(*inputs)["found"] > 1
    change(run)
    assert named in fails(gpu_check.inspect, *inputs)


class Engines(common.TransformersSampler):
    """In place of vLLM's: samples with a copy of the model."""

    stale, grows = False, False

    def __init__(self, args, accelerator, checkpoint, tokenizer, max_length, model):
        super().__init__(accelerator, copy.deepcopy(model), tokenizer)
        self.kept = []

    def update_weights(self, model):
        if self.grows:
            self.kept.append(torch.ones(1 << 25))  # 128 MiB
        if not self.stale:
            self.model.load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    "faults, named",
    [({}, ""), ({"stale": True}, "log p per token"), ({"grows": True}, "memory grew")],
    ids=["none", "stale weights", "memory that grows"],
)
def test_engines_that_are_stale_or_grow_are_found(faults, named, monkeypatch, tmp_path):
    for name, value in faults.items():
        monkeypatch.setattr(Engines, name, value)
    monkeypatch.setattr(common, "VLLMEngines", Engines)
    if named:
        assert named in fails(gpu_check.check_vllm, parse(tmp_path), tmp_path, 12)
    else:
        numbers = gpu_check.check_vllm(parse(tmp_path), tmp_path, 12)
        assert numbers["of stale weights"] > 10 * numbers["error of log p"]


def test_gpus_and_arguments_are_asked_for_first(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *ON_CPU[:4], "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    assert ended.value.code == 2 and "GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu_check.parse_args(["--model", "x"])
    assert not (tmp_path / "out").exists()


def test_scripts_take_the_flags_of_the_checks(monkeypatch, tmp_path):
    """Each script's parser, without running it."""
    from train_cot_dcoa import parse_args as cot
    from train_direct import parse_args as direct
    from train_grpo import parse_args as grpo
    from train_lean_step import parse_args as lean

    parsers, seen = {"train_direct.py": direct, "train_cot_dcoa.py": cot}, []
    parsers |= {"train_grpo.py": grpo, "train_lean_step.py": lean}

    def start(*arguments):
        script = next(i for i, one in enumerate(arguments) if str(one).endswith(".py"))
        args = parsers[arguments[script].name]([*map(str, arguments[script + 1 :])])
        seen.append((arguments[script].name, args.max_steps))

    monkeypatch.setattr(gpu_check, "start", start)
    monkeypatch.setattr(gpu_check, "inspect", lambda *_, **__: {})
    for name in ("direct", "cot", "grpo", "lean", "zero"):
        (tmp_path / name).mkdir()
        gpu_check.CHECKS[name](SimpleNamespace(**vars(parse(tmp_path))), tmp_path / name)
    assert len(seen) == 7 and {script for script, _ in seen} == set(parsers)
