"""tests/gpu_check.py on a CPU: every check is listed with its outcome, each can fail, and none takes others with it.

Not run here, for their time: grpo, lean, zero-*, vllm, bench, study-passn;
what they rest on has tests of its own, and what vllm and zero-* conclude is tried on made-up engines and runs."""

import copy
import json
import re
import shlex
import shutil
from types import SimpleNamespace

import gpu_check
import gpu_checks
import pytest
import torch
from conftest import ROOT, run_script
from gpu_checks import ARITHMETIC, TINY
from injected import write
from safetensors.torch import load_file, save_file

import common

STUDY = ["study-n1", "study-n64", "study-figures", "study-passn"]
NAMES = [*gpu_check.NAMES, *STUDY]
LEFT_OUT = ["grpo", "lean", "zero", "vllm", "bench", "study-passn"]


def check(out, data, *flags, model=TINY, code=0):
    """-> ({name: its outcome}, what was printed)"""
    how = ["--model", model, "--data", data, "--device", "cpu", "--out", out, "--engine", "transformers"]
    study = ["--study-n-primes", 1, 64, "--study-epochs", 1]
    printed = run_script("tests/gpu_check.py", *how, *study, *flags, code=code).stdout
    listed = json.loads((out / "results.json").read_text())["checks"]
    assert [one["name"] for one in listed] == NAMES, "each exactly once, in order"
    assert all(one["reason"] and one["seconds"] >= 0 and one["name"] in one["command"] for one in listed)
    table = [line for line in (out / "report.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert [line.split(" | ")[0].strip("| ") for line in table[: len(NAMES)]] == NAMES
    assert (out / "summary.png").read_bytes().startswith(b"\x89PNG")
    return {one["name"]: one for one in listed}, printed


def by_status(outcomes, status):
    return [name for name in outcomes if outcomes[name]["status"] == status]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The embedded problems, of which every fourth has no solution."""
    rows = [json.loads(line) for line in (ROOT / "examples/arithmetic/train.jsonl").read_text().splitlines()]
    train = [row | {"solution": None} if i % 4 == 0 else row for i, row in enumerate(rows)]
    test = [json.loads(line) for line in (ROOT / "examples/arithmetic/test.jsonl").read_text().splitlines()]
    return write(tmp_path_factory.mktemp("check") / "data", train, test)


@pytest.fixture(scope="module")
def checked(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("check") / "out"
    return out, *check(out, data, "--skip", *LEFT_OUT)


def test_what_was_asked_for_is_ok_and_the_rest_says_why_not(checked):
    out, outcomes, printed = checked
    left_out = [name for name in NAMES if name in LEFT_OUT or name.split("-")[0] in LEFT_OUT]
    assert by_status(outcomes, "skipped") == left_out
    assert by_status(outcomes, "ok") == [name for name in NAMES if name not in left_out]
    for name in NAMES:
        assert f"| {name} | {outcomes[name]['status']} |" in printed
        assert ("--skip" in outcomes[name]["reason"]) == (name in left_out)
        assert (out / name / "log.txt").exists() == (name not in left_out)
        assert not outcomes[name].get("left_behind")
        again = gpu_check.parse_arguments(shlex.split(outcomes[name]["command"])[2:])
        assert again.only == [name] and again.names == NAMES and again.overwrite
        assert (again.study_epochs, again.engine, again.out) == (1, "transformers", out)
    assert outcomes["cot"]["numbers"]["off"] < outcomes["cot"]["numbers"]["allowed"]
    assert "48 rows without a solution dropped out" in outcomes["cot"]["reason"]
    assert 0 < outcomes["logits"]["numbers"]["bytes"] < outcomes["logits"]["numbers"]["bytes_with_all_logits"]
    for n in (1, 64):
        (epoch,) = outcomes[f"study-n{n}"]["numbers"]["epochs"]
        assert f"| {n} | 1 | {100 * epoch['pass@1']:.1f} |" in (out / "report.md").read_text()
    assert (out / "study-epochs.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_command_makes_only_what_is_not_ok_yet(checked, data, tmp_path):
    out = shutil.copytree(checked[0], tmp_path / "out")
    results = json.loads((out / "results.json").read_text())
    next(one for one in results["checks"] if one["name"] == "loss")["status"] = "failed"
    (out / "results.json").write_text(json.dumps(results))
    outcomes, printed = check(out, data, "--skip", *LEFT_OUT)
    assert outcomes["loss"]["status"] == "ok" and "loss … ok" in printed
    assert printed.count(" … ") == 1 and printed.count("from before: ok") == len(by_status(outcomes, "ok")) - 1
    for name in set(NAMES) - {"loss"}:
        assert outcomes[name] | {"command": ""} == checked[1][name] | {"command": ""}
    told = run_script(
        "tests/gpu_check.py", "--model", TINY, "--data", ARITHMETIC, "--device", "cpu", "--out", out, code=2
    )
    assert "results.json is of --data" in told.stderr and "--overwrite" in told.stderr


def test_without_time_all_is_listed_and_nothing_begun(data, tmp_path):
    outcomes, _ = check(tmp_path / "out", data, "--minutes", 0.1)
    assert by_status(outcomes, "skipped") == NAMES
    assert all("no time" in one["reason"] and "of 0.1 minutes" in one["reason"] for one in outcomes.values())
    assert not list((tmp_path / "out").glob("*/log.txt"))


def test_a_broken_model_fails_what_needs_it_and_nothing_else(data, tmp_path):
    broken = shutil.copytree(TINY, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    only = ["--only", "direct", "loss"]
    outcomes, _ = check(tmp_path / "out", data, *only, model=broken, code=1)
    assert by_status(outcomes, "failed") == ["direct"] and by_status(outcomes, "ok") == ["loss"]
    assert "exit code 2" in outcomes["direct"]["reason"] and "cannot be loaded" in outcomes["direct"]["reason"]
    assert any("cannot be loaded" in line for line in outcomes["direct"]["tail"])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model", TINY, "--data", ARITHMETIC], "no CUDA GPU"),
        (["--model", "nowhere", "--data", ARITHMETIC, "--device", "cpu"], "--model nowhere: there is no such folder"),
        (["--model", TINY, "--data", TINY, "--device", "cpu"], "needs test.jsonl"),
        (["--model", TINY, "--data", ARITHMETIC, "--only", "studio"], "--only studio: the checks are direct, cot"),
        (["--model", TINY], "give --model FOLDER and --data FOLDER"),
    ],
)
def test_what_cannot_be_is_refused_first(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        gpu_check.main([*flags, "--out", str(tmp_path / "out")])
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_versions_that_are_too_old_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_check, "version", lambda name: {"torch": "2.10.0+cu128"}.get(name, "5.19.0"))
    with pytest.raises(SystemExit):
        gpu_check.main(["--model", TINY, "--data", ARITHMETIC, "--device", "cpu", "--out", str(tmp_path / "out")])
    assert "torch 2.10.0+cu128 is installed, and 2.11 or newer is needed" in capsys.readouterr().err


# A check that hangs, dies, or runs out of time


def arguments(*flags):
    return gpu_check.parse_arguments(["--model", TINY, "--data", ARITHMETIC, "--device", "cpu", *map(str, flags)])


def instead(monkeypatch, tmp_path, code):
    """Let this be what a check's process does."""
    (tmp_path / "instead.py").write_text(code)
    monkeypatch.setattr(gpu_check, "__file__", str(tmp_path / "instead.py"))
    monkeypatch.setattr(gpu_check, "GRACE", 1)
    monkeypatch.setattr(gpu_check, "STUDY_GRACE", 1)


HANGS = """import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
far = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("waiting", flush=True)
time.sleep(600)"""


@pytest.mark.parametrize(
    "name, minutes, status", [("loss", 0.2, "failed"), ("loss", 20, "skipped"), ("study-n64", 0.1, "skipped")]
)
def test_what_hangs_is_ended_with_all_that_it_started(name, minutes, status, monkeypatch, tmp_path):
    """In its quarter of the time it has failed; where less was left, and in the study, the time was what failed."""
    instead(monkeypatch, tmp_path, HANGS)
    outcome = gpu_check.run_check(arguments("--out", tmp_path, "--minutes", minutes), name, 3, [])
    assert outcome["status"] == status and "3 s" in outcome["reason"] and outcome["left_behind"] == 2
    assert outcome["seconds"] < 60 and (tmp_path / name / "log.txt").read_text() == "waiting\n"


def test_what_dies_says_with_what_last_words(monkeypatch, tmp_path):
    instead(
        monkeypatch, tmp_path, "import os\nprint('RuntimeError: the card is gone', flush=True)\nos.kill(os.getpid(), 9)"
    )
    outcome = gpu_check.run_check(arguments("--out", tmp_path), "loss", 60, [])
    assert outcome["status"] == "failed" and outcome["reason"] == "exit code -9: RuntimeError: the card is gone"


def test_a_run_of_the_study_that_would_not_fit_is_not_begun(tmp_path):
    args = arguments("--out", tmp_path, "--minutes", 20, "--study-epochs", 4)
    direct = {"direct": {"status": "ok", "numbers": {"seconds_a_candidate": 0.01}}}
    # 4 epochs of 12,000 examples: 480 s and what it takes to begin; of 1,200 s, 120 are for the figures.
    assert gpu_check.room_for(args, "study-n16", direct, 616, 12000) == (496, "")
    seconds, why = gpu_check.room_for(args, "study-n16", direct, 614, 12000)
    assert seconds == 0 and why.startswith("no time: 4 epochs of about 120 s") and "494 s are left" in why
    measured = direct | {"study-n1": {"status": "ok", "numbers": {"epochs": [{"seconds": 200.0}, {"seconds": 180.0}]}}}
    assert "4 epochs of about 200 s" in gpu_check.room_for(args, "study-n16", measured, 616, 12000)[1]
    run = tmp_path / "study-n16/run"
    run.mkdir(parents=True)
    (run / "epochs.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n')  # the other two are left
    assert gpu_check.room_for(args, "study-n16", measured, 616, 12000) == (496, "")
    assert gpu_check.room_for(args, "vllm", measured, 616, 12000) == (300, "")
    assert gpu_check.room_for(args, "vllm", measured, 14, 12000)[0] == 0


# Each check can fail

ON_CPU = SimpleNamespace(device="cpu", model=TINY, data=ARITHMETIC)


def fails(call, *inputs, **more):
    with pytest.raises(AssertionError) as failed:
        call(*inputs, **more)
    return str(failed.value)


def without_end(model, batch, right=common.completion_log_probs):
    """The last token of each completion, which ends it, is not counted."""
    mask = batch["completion_mask"]
    return right(
        model, batch | {"completion_mask": mask & mask.roll(-1, 1) & (torch.arange(mask.shape[1]) < mask.shape[1] - 1)}
    )


@pytest.mark.parametrize(
    "name, wrong, message",
    [
        ("completion_log_probs", without_end, "loss"),
        ("dco_factor", lambda log_p, n: torch.ones_like(log_p), "kind 64, float32: 1 - cosine"),
        ("dco_loss", lambda log_p, n: -log_p, "kind 64, float32: loss"),
        ("dco_factor", lambda log_p, n, right=common.dco_factor: 1.01 * right(log_p, n), "float32: norm"),
    ],
)
def test_a_wrong_loss_is_found(name, wrong, message, monkeypatch, tmp_path):
    monkeypatch.setattr(common, name, wrong)
    assert message in fails(gpu_checks.check_loss, ON_CPU, {}, tmp_path)


def test_a_loss_that_keeps_all_logits_is_found(monkeypatch, tmp_path):
    def of_all(model, batch):
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        width = batch["completion_ids"].shape[1]
        log_p = logits.float().log_softmax(-1)[:, -width - 1 : -1]
        return log_p.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1).sum(-1)

    monkeypatch.setattr(common, "completion_log_probs", of_all)
    assert "bytes, and with all logits" in fails(gpu_checks.check_logits, ON_CPU, {}, tmp_path)


@pytest.mark.parametrize("wrong, message", [("attention_mask", "log p is off"), ("gradient", "are not finite")])
def test_padding_that_matters_is_found(wrong, message, monkeypatch, tmp_path):
    collate, log_probs = common.collate, common.completion_log_probs

    def padded_alike(*inputs):
        return (batch := collate(*inputs)) | {wrong: torch.ones_like(batch[wrong])}

    def with_nan(model, batch):  # as cuDNN's attention: nothing is seen before the gradient
        found = log_probs(model, batch)
        found.register_hook(lambda gradient: torch.full_like(gradient, torch.nan))
        return found

    replaced = ("collate", padded_alike) if wrong == "attention_mask" else ("completion_log_probs", with_nan)
    monkeypatch.setattr(common, *replaced)
    assert message in fails(gpu_checks.check_padding, ON_CPU, {}, tmp_path)


@pytest.fixture
def run(checked, tmp_path):
    """The two steps of train_direct.py, to be spoilt."""
    return shutil.copytree(checked[0] / "direct/run", tmp_path / "run")


def spoil(run, field, value, step=0):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[step][field] = value(lines[step][field])
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def spoil_weights(path, change):
    weights = load_file(path)
    save_file({name: change(weight) for name, weight in weights.items()}, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda run: spoil(run, "loss", lambda loss: 1.001 * loss), "by a plain float32 forward"),
        (lambda run: spoil(run, "loss", lambda _: float("nan"), 1), "the loss of step 2 is nan"),
        (lambda run: spoil(run, "grad_norm", lambda _: 0.0), "the gradient's norm in step 1 is 0.0"),
        (lambda run: spoil(run, "ids", lambda ids: ids[:-1]), "by a plain float32 forward"),
        (lambda run: spoil_weights(run / "step-2/model.safetensors", lambda w: w + 1e-5), "is not the trained one"),
        (lambda run: spoil_weights(run / "state/step-2/model.safetensors", lambda w: w + 1e-3), "the weights moved"),
    ],
)
def test_wrong_steps_are_found(wrong, message, run, checked):
    rows = common.load_problems(str(checked[0] / "small-data"), "train")
    how = (lambda i: (rows[i]["problem"] + "\n", rows[i]["answer"]), lambda log_p: gpu_checks.plain_dco(64, log_p))
    steps, _ = gpu_checks.inspect(ON_CPU, run, TINY, {}, *how)
    assert [len(step["ids"]) for step in steps] == [16, 16]
    wrong(run)
    assert message in fails(gpu_checks.inspect, ON_CPU, run, TINY, {}, *how)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda run: None, None),
        (lambda run: spoil(run, "loss", lambda loss: 1.01 * loss, 1), "loss of plain steps and ZeRO's"),
        (lambda run: spoil(run, "grad_norm", lambda norm: norm / 2), "grad_norm of plain steps and ZeRO's"),
        (lambda run: spoil(run, "ids", lambda ids: ids[::-1]), "other examples"),
        (lambda run: spoil_weights(run / "step-2/model.safetensors", lambda w: w + 1e-4), "the updates have cosine"),
    ],
)
def test_a_zero_run_that_differs_is_found(wrong, message, run, checked, monkeypatch, tmp_path):
    told = json.loads((run / "args.json").read_text()) | {"zero": 2}
    (run / "args.json").write_text(json.dumps(told))
    runs = {"plain": shutil.copytree(checked[0] / "direct/run", tmp_path / "plain"), "zero": run}
    monkeypatch.setattr(gpu_checks, "two_steps", lambda *flags, run, **more: runs[run])
    monkeypatch.setattr(gpu_checks, "find_spec", lambda name: True)
    wrong(run)
    args = SimpleNamespace(**vars(ON_CPU), out=tmp_path)
    if message is None:
        assert "cosine is 1.0000" in gpu_checks.check_zero(2, args, {}, tmp_path)
    else:
        assert message in fails(gpu_checks.check_zero, 2, args, {}, tmp_path)


@pytest.mark.parametrize("stale", [False, True])
def test_an_engine_with_old_weights_is_found(stale, monkeypatch, tmp_path):
    class Pretended:
        def __init__(self, accelerator, checkpoint, tokenizer, model, **more):
            self.model = copy.deepcopy(model)
            self.live = common.LiveModel(accelerator, self.model, tokenizer)
            self.generate = self.live.generate

        def update_weights(self, model):
            if not stale:
                self.model.load_state_dict(model.state_dict())

        def shut_down(self):
            pass

    monkeypatch.setattr(common, "VLLMEngines", Pretended)
    monkeypatch.setattr(gpu_checks, "find_spec", lambda name: True)
    if stale:
        assert "greedy tokens, updated weights" in fails(gpu_checks.check_vllm, ON_CPU, {}, tmp_path)
    else:
        assert "after an update" in gpu_checks.check_vllm(ON_CPU, numbers := {}, tmp_path)
        assert numbers["updated"]["beyond"] == 0 and numbers["stale_beyond"] > 100


def test_a_study_without_an_epoch_is_skipped(tmp_path):
    for call in (gpu_checks.study_figures, gpu_checks.study_passn):
        with pytest.raises(gpu_checks.Skipped, match="no epoch of the study is done"):
            call(arguments("--out", tmp_path), {}, tmp_path)


def test_what_is_not_installed_is_skipped(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu_checks, "find_spec", lambda name: None)
    for call in (gpu_checks.check_vllm, lambda *how: gpu_checks.check_zero(2, *how)):
        with pytest.raises(gpu_checks.Skipped, match="is not installed"):
            call(ON_CPU, {}, tmp_path)


def test_the_names_are_those_of_the_checks():
    args = arguments("--study-n-primes", 1, 64)
    assert list(gpu_checks.checks(args)) == args.names == NAMES


def test_the_readmes_commands_are_taken():
    found = re.findall(r"^python tests/gpu_check.py (.*?)(?:  #.*)?$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(found) == 3
    for command in found:
        gpu_check.parse_arguments(shlex.split(command))
