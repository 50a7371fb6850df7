"""train_direct.py as a user runs it: what it learns, which examples it uses, what it writes and what it refuses."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import forced_way
import pytest
import torch
from conftest import ROOT, run_script
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import common
import train_direct

WRITTEN = ["args.json", "metrics.jsonl", "epochs.jsonl"]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def weights(checkpoint):
    return load_file(checkpoint / "model.safetensors")


def largest_difference(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


# What it shows


@pytest.fixture(scope="module")
def three_runs(tmp_path_factory):
    """The embedded experiment on 600 problems, all from one fixed draw: cross-entropy, N' = 64 and N' = 256."""
    folder = tmp_path_factory.mktemp("ordering")
    run_script("examples/arithmetic/generate.py", "--train-per-level", 120, "--seed", 5, "--out", folder / "data")
    for n in (1, 64, 256):
        run_script("train_direct.py", "--n-prime", n, "--data", folder / "data", "--out", folder / f"direct-n{n}")
    return {n: read(folder / f"direct-n{n}" / "epochs.jsonl") for n in (1, 64, 256)}


def test_the_papers_finding(three_runs):
    """Cross-entropy's pass@1 rises while its pass@256 and pass@4096 fall; DCO repairs them; the curves cross."""
    ce, last = three_runs[1], {n: epochs[-1] for n, epochs in three_runs.items()}
    assert len(ce) == 24
    assert last[1]["pass@1"] >= ce[0]["pass@1"] + 0.03
    for n in (256, 4096):
        best = max(epoch[f"pass@{n}"] for epoch in ce)
        assert last[1][f"pass@{n}"] <= best - 0.15, n
        assert max(last[64][f"pass@{n}"], last[256][f"pass@{n}"]) >= last[1][f"pass@{n}"] + 0.15, n
    assert last[1]["pass@1"] >= max(last[64]["pass@1"], last[256]["pass@1"]) + 0.02
    assert last[1]["greedy_confidence"] >= 2 * max(last[64]["greedy_confidence"], last[256]["greedy_confidence"])


# Which examples are in which step


COMMON_FLAGS = ["--n-prime", "64", "--max-steps", "60", "--micro-batch-size", "32"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "run"
    train_direct.main([*COMMON_FLAGS, "--out", str(out)])
    assert sum(step["accepted"] for step in read(out / "metrics.jsonl")[40:]) < sum(
        step["candidates"] for step in read(out / "metrics.jsonl")[40:]
    ), "the comparison wants rejected examples"
    return out


def assert_same_run(out, one_process):
    for mine, theirs in zip(read(out / "metrics.jsonl"), read(one_process / "metrics.jsonl"), strict=True):
        for name in ("step", "epoch", "accepted", "candidates", "ids"):
            assert mine[name] == theirs[name], (mine["step"], name)
        for name in ("loss", "mean_factor", "mean_p", "mean_ce", "grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), (mine["step"], name)
    assert largest_difference(out / "step-60", one_process / "step-60") < 1e-5
    for mine, theirs in zip(read(out / "epochs.jsonl"), read(one_process / "epochs.jsonl"), strict=True):
        for name in ("steps", "used", "candidates", "carried_over", "pass@1", "pass@4096", "greedy_confidence"):
            assert mine[name] == pytest.approx(theirs[name], abs=1e-4), name


@pytest.mark.parametrize("way", ["scoring", "straight"])
@pytest.mark.parametrize("micro_batch_size", [32, 8, 5])
def test_same_steps_whatever_the_micro_batch_and_the_way(way, micro_batch_size, one_process, tmp_path):
    with forced_way.Forced(way):
        train_direct.main([*COMMON_FLAGS, "--micro-batch-size", str(micro_batch_size), "--out", str(tmp_path / "run")])
    assert_same_run(tmp_path / "run", one_process)


def test_same_steps_where_memory_has_room_for_few_tokens(one_process, tmp_path, monkeypatch):
    computed, real = [], common.collate

    def watched(examples, *how):
        batch = real(examples, *how)
        computed.extend([batch["input_ids"].numel()] if torch.is_grad_enabled() else [])
        return batch

    decided = {"zero": 0, "tokens_that_fit": 60}
    monkeypatch.setattr(common, "plan_memory", lambda args, *how, **more: vars(args).update(decided))
    monkeypatch.setattr(common, "collate", watched)
    train_direct.main([*COMMON_FLAGS, "--out", str(tmp_path / "run")])
    assert 30 < max(computed) <= 60
    assert_same_run(tmp_path / "run", one_process)


@pytest.mark.parametrize("way, zero", [("scoring", 0), ("straight", 0), ("auto", 0), ("auto", 2), ("auto", 3)])
def test_same_steps_and_weights_with_two_processes(way, zero, one_process, tmp_path):
    arguments = [*COMMON_FLAGS, "--micro-batch-size", 5, "--zero", zero, "--out", tmp_path / "run"]
    done = run_script("tests/forced_way.py", way, *arguments, processes=2)
    assert "from 2 processes" in done.stdout and done.stdout.count("no CUDA") == 1
    assert_same_run(tmp_path / "run", one_process)


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    run_script("examples/arithmetic/generate.py", "--train-per-level", 40, "--test-per-level", 4, "--out", folder)
    return folder


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_discarded_gradients_leave_no_trace(zero, small_data, tmp_path):
    """200 examples are six steps of 32 and eight: each epoch begins a step that it cannot fill, in the last one's case
    anew as a short step."""
    flags = ["--n-prime", "64", "--epochs", "3", "--data", str(small_data), "--micro-batch-size", "4", "--lr", "0.01"]
    train_direct.main([*flags, "--out", str(tmp_path / "one")])
    run_script("tests/forced_way.py", "reckless", *flags, "--zero", zero, "--out", tmp_path / "two", processes=2)
    one, two = (read(tmp_path / name / "metrics.jsonl") for name in ("one", "two"))
    assert [step["ids"] for step in one] == [step["ids"] for step in two] and one[-1]["accepted"] < 32
    assert largest_difference(tmp_path / "one/epoch-3", tmp_path / "two/epoch-3") < 1e-5


@pytest.mark.parametrize("zero", [2, 3])
def test_discarded_gradients_leave_no_trace_in_bf16(zero):
    """What ZeRO-2 and 3 do on GPUs, where gradients are added up elsewhere: a step after a discarded gradient has the
    norm that it has without."""
    done = run_script("tests/discard_in_bf16.py", zero, processes=2)
    clean, after_discard = map(float, re.search(rf"^stage {zero}: (\S+) (\S+)$", done.stdout, re.MULTILINE).groups())
    assert clean > 1 and after_discard == pytest.approx(clean, rel=1e-3)


def test_zero_3_goes_on_from_pretrained_weights_as_one_process_does(cross_entropy_run, tmp_path):
    """Here the weights are split as they are read."""
    run, _ = cross_entropy_run
    flags = ["--model", str(run / "epoch-1"), "--max-steps", "6", "--batch-size", "16", "--data", "examples/arithmetic"]
    train_direct.main([*flags, "--out", str(tmp_path / "one")])
    run_script("train_direct.py", *flags, "--zero", 3, "--out", tmp_path / "two", processes=2)
    assert largest_difference(tmp_path / "one/step-6", tmp_path / "two/step-6") < 1e-5


def test_dropout_is_off_in_training_and_measuring(tmp_path, tokenizer):
    """A model whose configuration has dropout: both ways find the same p, and so the same steps."""
    from transformers import GPT2Config

    sizes = {"vocab_size": len(tokenizer), "n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2}
    GPT2Config(**sizes, embd_pdrop=0.3, resid_pdrop=0.3).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    flags = ["--model", str(tmp_path / "gpt2"), "--lr", "0.01", "--max-steps", "30", "--n-prime", "16", "--nll", "mean"]
    for way in ("scoring", "straight"):
        with forced_way.Forced(way):
            train_direct.main([*flags, "--out", str(tmp_path / way)])
    # Dropout would change p, and with it the accepted examples, from one forward to the next.
    steps = [[step["ids"] for step in read(tmp_path / way / "metrics.jsonl")] for way in ("scoring", "straight")]
    assert steps[0] == steps[1]
    assert largest_difference(tmp_path / "scoring/step-30", tmp_path / "straight/step-30") < 1e-3
    config = json.loads((tmp_path / "scoring/step-30/config.json").read_text())
    assert config["embd_pdrop"] == config["resid_pdrop"] == 0


def test_weights_that_are_not_safetensors_are_refused_not_ignored(capsys, tmp_path, tokenizer):
    model, _ = common.load_model("examples/tiny_llama", tokenizer)
    model.config.save_pretrained(tmp_path / "old")
    tokenizer.save_pretrained(tmp_path / "old")
    torch.save(model.state_dict(), tmp_path / "old/pytorch_model.bin")
    refused(["--model", tmp_path / "old"], capsys, "holds pytorch_model.bin but no *.safetensors", tmp_path / "run")
    (tmp_path / "old/pytorch_model.bin").rename(tmp_path / "old/model.safetensors")
    refused(["--model", tmp_path / "old"], capsys, f"{tmp_path}/old cannot be loaded", tmp_path / "run")


def test_cross_entropy_with_two_processes_and_a_short_last_step(cross_entropy_run, tmp_path):
    """1500 examples, batches of 32, micro-batches of 5 and 2 processes: nothing divides anything."""
    out, _ = cross_entropy_run
    arguments = ["--n-prime", 1, "--epochs", 2, "--micro-batch-size", 5, "--out", tmp_path / "run"]
    run_script("train_direct.py", *arguments, processes=2)
    assert largest_difference(tmp_path / "run/epoch-2", out / "epoch-2") < 1e-5
    assert read(tmp_path / "run/metrics.jsonl")[-1]["accepted"] == 1500 - 46 * 32


def test_a_step_is_the_first_accepted_candidates_under_its_own_weights(tmp_path, tokenizer):
    """Taken from the saved weights, one example at a time, with no use of Refill."""
    out = tmp_path / "run"
    train_direct.main(["--n-prime", "64", "--epochs", "1", "--checkpoint-at", "0.8", "--out", str(out)])
    record = json.loads((out / "epoch-0.8/dco.json").read_text())
    model, _ = common.load_model(str(out / "epoch-0.8"), tokenizer)
    examples, _ = common.encode(common.load_problems("examples/arithmetic", "train"), tokenizer, "direct", 2048)
    generator = torch.Generator().manual_seed(common.seed_of(0, "epoch", 1))
    order = torch.randperm(1500, generator=generator).tolist()
    assert record["seen_ids"] == order[: len(record["seen_ids"])] and 0.8 <= len(record["seen_ids"]) / 1500 < 0.83
    accepted, rejected = [], 0
    for i in order[len(record["seen_ids"]) :]:
        with torch.no_grad():
            log_p = common.completion_log_probs(model, common.collate([examples[i]], 0))
        p = log_p.double().exp().item()
        factor = 64 * (1 - p) ** 63 * p / (1 - (1 - p) ** 64)  # Eq. 4 as it stands
        accepted += [i] if factor >= 0.3 else []
        rejected += factor < 0.3
        if len(accepted) == 32:
            break
    following = read(out / "metrics.jsonl")[record["step"]]
    assert following["ids"] == accepted and following["candidates"] == 32 + rejected and rejected > 0


def test_the_update_is_adamw_on_the_mean_gradient_of_eq_3(tmp_path, tokenizer):
    """Two steps of the script against Eq. 3 by autograd and torch's AdamW, written out."""
    flags = ["--nll", "sum", "--clip", "0.5", "--warmup-steps", "4", "--factor-threshold", "0", "--n-prime", "16"]
    train_direct.main([*flags, "--max-steps", "2", "--micro-batch-size", "7", "--out", str(tmp_path / "run")])
    model, _ = common.load_model("examples/tiny_llama", tokenizer, seed=0)
    examples, _ = common.encode(common.load_problems("examples/arithmetic", "train"), tokenizer, "direct", 2048)
    optimizer, clipped = torch.optim.AdamW(model.parameters(), 0, (0.9, 0.98), weight_decay=0.01), 0
    for step, metrics in enumerate(read(tmp_path / "run/metrics.jsonl"), start=1):
        log_p = common.completion_log_probs(model, common.collate([examples[i] for i in metrics["ids"]], 0)).double()
        loss = -(1 - (1 - log_p.exp()) ** 16).log().mean()
        loss.backward()
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert metrics["lr"] == pytest.approx(3e-3 * step / 4)
        clipped += norm.item() > 0.5
        assert metrics["clipped_share"] == clipped / step
        optimizer.param_groups[0]["lr"] = metrics["lr"]
        optimizer.step()
        optimizer.zero_grad()
    trained = weights(tmp_path / "run/step-2")
    for name, tensor in model.state_dict().items():
        difference = (trained[name] - tensor).abs()  # AdamW's first steps are a sign where a gradient is all rounding
        assert difference.mean() < 1e-6 and (difference > 2e-5).sum() <= 8, name


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path):
    flags = ["--n-prime", "1", "--max-steps", "8"]
    train_direct.main([*flags, "--out", str(tmp_path / "plain")])
    train_direct.main([*flags, "--gradient-checkpointing", "--out", str(tmp_path / "checkpointed")])
    assert largest_difference(tmp_path / "plain/step-8", tmp_path / "checkpointed/step-8") < 1e-6


# What it writes


def test_files_and_banner(cross_entropy_run):
    out, done = cross_entropy_run
    assert all((out / name).is_file() for name in WRITTEN)
    assert sorted(p.name for p in out.glob("epoch-*")) == ["epoch-0.11", "epoch-0.86", "epoch-1", "epoch-2"]
    for told in (
        "no CUDA: taking --model examples/tiny_llama",
        "130,112 parameters",
        "1,500 to train on",
        "500 to test",
    ):
        assert told in done.stdout
    for told in (
        "cross-entropy",
        "32 accepted examples each, from 1 process x micro-batches of 32",
        "embedded experiment",
    ):
        assert told in done.stdout
    assert done.stdout.count("\nepoch ") + done.stderr.count("\nepoch ") >= 1
    args = json.loads((out / "args.json").read_text())
    assert args["n_prime"] == 1 and args["lr"] == 3e-3 and args["seed"] == 0
    steps = read(out / "metrics.jsonl")
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    needed = "step epoch loss accepted candidates mean_factor mean_p mean_ce lr grad_norm seconds tokens_per_second"
    assert all(name in step for step in steps for name in needed.split())
    assert all(step["mean_factor"] == 1 and step["accepted"] == step["candidates"] for step in steps)
    assert steps[0]["lr"] == pytest.approx(3e-3 / 50) and steps[60]["lr"] == 3e-3
    seen = json.loads((out / "epoch-0.11/dco.json").read_text())["seen_ids"]
    assert 0.11 <= len(seen) / 1500 < 0.11 + 32 / 1500 and len(set(seen)) == len(seen)
    assert sorted(seen) == sorted(i for step in steps[: len(seen) // 32] for i in step["ids"])


def test_checkpoints_are_ordinary_hugging_face_folders(cross_entropy_run):
    from transformers import AutoTokenizer

    out, _ = cross_entropy_run
    model = AutoModelForCausalLM.from_pretrained(out / "epoch-2")
    tokenizer = AutoTokenizer.from_pretrained(out / "epoch-2")
    assert tokenizer("1+1=").input_ids[0] == tokenizer.bos_token_id
    config = model.generation_config
    assert (config.temperature, config.top_k, config.top_p, config.eos_token_id) == (1.0, 0, 1.0, 2)
    record = json.loads((out / "epoch-2/dco.json").read_text())
    assert record["template"] == "direct" and record["max_new_tokens"] >= 5
    assert record["data"] == str(ROOT / "examples/arithmetic")


@pytest.mark.parametrize("precision, dtype", [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_a_checkpoint_says_of_itself_what_dtype_it_holds(precision, dtype, tmp_path, tiny_model, tokenizer):
    """On a GPU float32 weights are saved as bf16; who loads them without a dtype is not to get float32 again."""
    own = SimpleNamespace(get_state_dict=lambda model: model.state_dict(), unwrap_model=lambda model: model)
    own.mixed_precision, own.is_main_process, own.wait_for_everyone = precision, True, lambda: None
    common.save_checkpoint(own, tiny_model, tokenizer, tmp_path / "saved", {})
    assert {weight.dtype for weight in load_file(tmp_path / "saved/model.safetensors").values()} == {dtype}
    loaded, config = (kind.from_pretrained(tmp_path / "saved") for kind in (AutoModelForCausalLM, AutoConfig))
    assert loaded.dtype == dtype and config.architectures == ["LlamaForCausalLM"]


def test_summary_is_the_exact_coverage_of_the_checkpoint(cross_entropy_run, tokenizer):
    out, _ = cross_entropy_run
    model, _ = common.load_model(str(out / "epoch-2"), tokenizer)
    examples, _ = common.encode(common.load_problems("examples/arithmetic", "test"), tokenizer, "direct", 2048)
    with torch.no_grad():
        p = common.completion_log_probs(model.eval(), common.collate(examples, 0)).double().exp()
    summary = read(out / "epochs.jsonl")[1]
    for n in (1, 16, 256, 4096):
        assert summary[f"pass@{n}"] == pytest.approx((1 - (1 - p) ** n).mean().item(), abs=1e-6)
    assert 0 < summary["greedy_confidence"] < 1


def test_accelerate_launch(tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "train_direct.py", "--n-prime", "64"]
    done = subprocess.run(
        [*command, "--max-steps", "2", "--out", tmp_path / "run"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "DCO with N' = 64, F >= 0.3" in done.stdout and (tmp_path / "run/step-2/model.safetensors").is_file()


def test_help_does_not_wait_for_torch():
    code = (
        "import sys, train_direct\ntry: train_direct.main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n") and "(paper: 2e-5)" in done.stdout and "Eq. 3, 4" in done.stdout


# What it refuses


def refused(arguments, capsys, told, out):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train_direct.main([*map(str, arguments), "--out", str(out)])
    assert stop.value.code == 2
    bar_and_usage = ("candidate", "usage:")
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.strip() and not any(word in line for word in bar_and_usage)]
    assert len(lines) == 1 and "error:" in lines[0] and told in lines[0], error


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--n-prime", "0"], "--n-prime must be a number from 1 up, not 0.0"),
        (["--n-prime", "0.99"], "--n-prime must be a number from 1 up"),
        (["--n-prime", "nan"], "--n-prime must be a number from 1 up"),
        (["--n-prime", "inf"], "--n-prime must be a number from 1 up"),
        (["--n-prime", "many"], "--n-prime: invalid float value: 'many'"),
        (["--factor-threshold", "-0.1"], "must lie in [0, 1), not -0.1"),
        (["--factor-threshold", "1"], "must lie in [0, 1), not 1.0"),
        (["--batch-size", "0"], "--batch-size must be positive"),
        (["--lr", "-1"], "--lr must be positive"),
        (["--checkpoint-at", "1"], "shares of the first epoch"),
        (["--betas", "0.9", "1.5"], "--betas must lie in [0, 1)"),
        (["--weight-decay", "-1"], "--weight-decay be 0 or more"),
        (["--model", "./no/such/folder"], "./no/such/folder: there is no such folder"),
        (["--model", "examples/arithmetic"], "the folder has no config.json"),
        (["--model", "meta-llama/Meta-Llama-3-8B"], "run `hf auth login`; if this machine is offline, give a folder"),
        (["--data", "no/such/folder"], "--data no/such/folder is not a folder"),
    ],
)
def test_bad_arguments(arguments, told, capsys, tmp_path):
    refused(arguments, capsys, told, tmp_path / "run")
    assert not (tmp_path / "run").exists()


GOOD = {"problem": "1+1=", "answer": "2"}


@pytest.mark.parametrize(
    "lines, told",
    [
        (['{"problem": "1+1="'], "train.jsonl:1: not JSON"),
        ([json.dumps(GOOD), '{"problem": "1+1=", "answer": ""}'], "train.jsonl:2: field 'answer' is missing or empty"),
        ([json.dumps({"problem": "1" * 2100, "answer": "2"})] * 3, "no problem is left; dropped: {'too long': 3}"),
        ([json.dumps(GOOD | {"problem": "1 + 1 = ½"})], "no token for '½'"),
        (['{"problem": "\\ud83d", "answer": "2"}'], "train.jsonl:1: the text is not valid Unicode"),
    ],
)
def test_bad_data(lines, told, capsys, tmp_path):
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    refused(["--data", tmp_path], capsys, told, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_problem_that_is_too_long_is_dropped_and_counted(capsys, tmp_path):
    rows = [GOOD | {"problem": f"{i}+1="} for i in range(40)] + [{"problem": "1" * 2100, "answer": "2"}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train_direct.main(["--data", str(tmp_path), "--epochs", "1", "--n-prime", "1", "--out", str(tmp_path / "run")])
    assert "40 to train on (dropped: {'too long': 1})" in capsys.readouterr().out
    assert [len(step["ids"]) for step in read(tmp_path / "run/metrics.jsonl")] == [32, 8]
    assert 40 not in read(tmp_path / "run/metrics.jsonl")[0]["ids"]


def test_out_that_holds_a_run_is_refused_unless_overwritten(capsys, tmp_path):
    out = tmp_path / "run"
    train_direct.main(["--max-steps", "1", "--out", str(out)])
    (out / "notes.txt").write_text("mine")
    before = (out / "metrics.jsonl").read_text()
    refused(
        ["--max-steps", "2"],
        capsys,
        "holds a run already (args.json): choose another folder, --resume or --overwrite",
        out,
    )
    assert (out / "metrics.jsonl").read_text() == before
    train_direct.main(["--max-steps", "2", "--out", str(out), "--overwrite"])
    assert len(read(out / "metrics.jsonl")) == 2 and not (out / "step-1").exists()
    assert (out / "notes.txt").read_text() == "mine"  # what is not the run's is not touched


def test_what_looks_like_a_run_is_not_touched_without_overwrite_and_what_is_not_one_never(capsys, tmp_path):
    out = tmp_path / "run"
    (out / "step-notes").mkdir(parents=True)
    (out / "step-notes/mine.txt").write_text("mine")
    refused(["--max-steps", "1"], capsys, "holds a run already (step-notes)", out)
    refused(["--max-steps", "1", "--overwrite"], capsys, "step-notes is no checkpoint", out)
    assert (out / "step-notes/mine.txt").read_text() == "mine" and len(list(out.iterdir())) == 1
    refused([], capsys, "is a file", out / "step-notes/mine.txt")
    refused([], capsys, "nothing can be written to", out / "step-notes/mine.txt/run")


def test_a_loss_that_becomes_nan_stops_the_run_and_keeps_the_last_checkpoint(capsys, tmp_path):
    out = tmp_path / "run"
    for n_prime in ("1", "64"):
        arguments = ["--n-prime", n_prime, "--lr", "1e30", "--checkpoint-at", "0.02", "--overwrite"]  # NaN at step 2
        refused(arguments, capsys, f"stopped. Last checkpoint: {out}/epoch-0.02", out)
        assert len(read(out / "metrics.jsonl")) == 1 and (out / "epoch-0.02/model.safetensors").is_file()


def test_a_tracker_that_is_not_installed_is_refused_and_one_that_is_gets_the_metrics(capsys, tmp_path):
    arguments = ["--max-steps", "2", "--report-to", "tensorboard"]
    if find_spec("tensorboard") is None:
        refused(
            arguments, capsys, "tensorboard is asked for but not installed: pip install tensorboard", tmp_path / "run"
        )
    else:
        train_direct.main([*arguments, "--out", str(tmp_path / "run")])
        assert list((tmp_path / "run").rglob("events.out.tfevents*"))
