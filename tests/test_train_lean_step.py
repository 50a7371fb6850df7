"""train_lean_step.py: steps of proofs, and whole proofs, against sums written out by hand."""

import json
import math
import re

import pytest
import torch
from conftest import ROOT, run_script
from safetensors.torch import load_file

import common
import train_direct
import train_lean_step

TINY = ["--model", "examples/tiny_llama"]


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def largest_difference(one, other):
    one, other = (load_file(checkpoint / "model.safetensors") for checkpoint in (one, other))
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def theorem(name, steps):
    traced = [{"tactic": tactic, "state_before": state, "state_after": "no goals"} for state, tactic in steps]
    for step in traced:
        step["annotated_tactic"] = [step["tactic"], []]
    return {"url": "u", "commit": "c", "file_path": "f", "full_name": name, "traced_tactics": traced}


def proofs(count):
    """Of one to four steps, in the tiny model's letters; the fifth step of all has a long state."""
    found = []
    for i in range(count):
        steps = [(f"{10 + i}+{k}=", str(10 + i + k)[-1 - k % 2 :]) for k in range(1 + i % 4)]
        found.append(theorem(f"t{i}", steps))
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("proofs")
    (folder / "train.json").write_text(json.dumps(proofs(80)))
    (folder / "val.json").write_text(json.dumps(proofs(8)))
    return folder


def train(out, *flags):
    train_lean_step.main([*TINY, *map(str, flags), "--out", str(out)])
    return out


# Steps


def test_as_train_direct_on_the_same_rows(tmp_path, monkeypatch):
    """The template aside, a step is an example like any other: the same batches and the same weights."""
    rows = read(ROOT / "examples/arithmetic/train.jsonl")[:400]
    lines = [row | {"state": row["problem"], "tactic": row["answer"]} for row in rows]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setitem(common.TEMPLATES, "lean", common.TEMPLATES["direct"])
    flags = [*TINY, "--data", str(tmp_path / "train.jsonl"), "--epochs", "4", "--max-steps", "45", "--lr", "0.005"]
    flags += ["--warmup-steps", "10", "--batch-size", "24", "--micro-batch-size", "8", "--nll", "mean"]
    flags += ["--betas", "0.9", "0.98", "--weight-decay", "0.01"]
    train_direct.main([*flags, "--n-prime", "16", "--out", str(tmp_path / "direct")])
    train_lean_step.main([*flags, "--n-eff", "16", "--out", str(tmp_path / "lean")])
    one, two = (read(tmp_path / name / "metrics.jsonl") for name in ("direct", "lean"))
    assert len(one) == 45 and sum(step["candidates"] - step["accepted"] for step in one) > 20
    for mine, theirs in zip(two, one, strict=True):
        for name in ("ids", "candidates", "accepted", "loss", "mean_factor", "mean_p", "grad_norm", "lr", "epoch"):
            assert mine[name] == theirs[name], (mine["step"], name)
    assert largest_difference(tmp_path / "lean/step-45", tmp_path / "direct/step-45") == 0


def test_shared_blocks_are_train_directs_word_for_word():
    """What main() does, less what is about whole proofs, other data and other words."""
    direct, lean = (
        [line.strip() for line in (ROOT / name).read_text().partition("def main(")[2].splitlines() if line.strip()]
        for name in ("train_direct.py", "train_lean_step.py")
    )
    found = sum(line in set(lean) for line in direct)
    assert found / len(direct) >= 0.82, f"{found} of {len(direct)}"


def test_cross_entropy_never_scores(data, tmp_path, monkeypatch):
    scored, real = [], common.completion_log_probs

    def watched(model, batch):
        scored.append(not torch.is_grad_enabled())
        return real(model, batch)

    monkeypatch.setattr(common, "completion_log_probs", watched)
    for i, flags in enumerate((["--n-eff", 1], ["--level", "proof", "--n-prime", 1])):
        scored.clear()
        (tmp_path / f"data-{i}").mkdir()
        (tmp_path / f"data-{i}/train.json").write_text((data / "train.json").read_text())  # and no val.json
        train(tmp_path / f"run-{i}", *flags, "--data", tmp_path / f"data-{i}", "--epochs", 1, "--batch-size", 16)
        steps = read(tmp_path / f"run-{i}/metrics.jsonl")
        assert scored and not any(scored)
        assert all(step["accepted"] == step["candidates"] and step["mean_factor"] == 1 for step in steps)
        assert sum(step["accepted"] for step in steps) == (200, 80)[i]
        assert 2 < steps[0]["mean_ce"] < 40 and steps[0]["loss"] == pytest.approx(steps[0]["mean_ce"], rel=1e-5)


# Whole proofs

PROOF = ["--level", "proof", "--n-prime", "200000", "--batch-size", "12", "--lr", "0.003", "--nll", "sum"]
PROOF += ["--warmup-steps", "4", "--clip", "0.5", "--betas", "0.9", "0.95", "--weight-decay", "0"]


def order_of(size, epoch=1, seed=0):
    generator = torch.Generator().manual_seed(common.seed_of(seed, "epoch", epoch))
    return torch.randperm(size, generator=generator).tolist()


def factor_of(log_p, n):
    """Eq. 4, with 1 - (1-p)^N written so that a small p keeps its digits."""
    p = log_p.double().exp().item()
    return n * (1 - p) ** (n - 1) * p / -math.expm1(n * math.log1p(-p))


@pytest.fixture(scope="module")
def proof_run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("proof") / "run"
    return train(out, *PROOF, "--data", data, "--max-steps", 8, "--epochs", 3, "--micro-batch-size", 8)


def test_three_steps_on_whole_proofs_by_hand(data, tmp_path, tokenizer):
    """F of the product of a proof's steps, first in the stream whose F is at least 0.3; Σ NLL; the mean over proofs."""
    run = train(tmp_path / "run", *PROOF, "--data", data, "--max-steps", 3, "--micro-batch-size", 5)
    model, _ = common.load_model("examples/tiny_llama", tokenizer, seed=0)
    rows = train_lean_step.load_steps(data / "train.json")
    examples, _ = common.encode(rows, tokenizer, "lean", 2048)
    by_proof = {}
    for row, example in zip(rows, examples, strict=True):
        by_proof.setdefault(row["proof"], []).append(example)
    stream = [list(by_proof.values())[i] for i in order_of(80)]
    optimizer = torch.optim.AdamW(model.parameters(), 0, (0.9, 0.95), weight_decay=0)
    rejected = 0
    for step, metrics in enumerate(read(run / "metrics.jsonl"), start=1):
        used, losses, objective = [], [], 0.0
        looked_at = 0
        while len(used) < 12:
            steps = stream.pop(0)
            looked_at += 1
            log_p = sum(common.completion_log_probs(model, common.collate([one], 0))[0] for one in steps).double()
            factor = factor_of(log_p.detach(), 200000)
            if factor >= 0.3:
                used.append(steps[0].id)
                losses.append(-torch.log(-torch.expm1(200000 * torch.log1p(-log_p.detach().double().exp()))).item())
                objective = objective + factor * -log_p / 12
        rejected += looked_at - 12
        assert metrics["ids"] == used and metrics["candidates"] == looked_at and metrics["accepted"] == 12
        assert metrics["loss"] == pytest.approx(sum(losses) / 12, rel=1e-4)
        objective.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        optimizer.param_groups[0]["lr"] = 0.003 * step / 4
        optimizer.step()
        optimizer.zero_grad()
    assert rejected > 0
    trained = load_file(run / "step-3/model.safetensors")
    for name, tensor in model.state_dict().items():
        difference = (trained[name] - tensor).abs()  # AdamW's first steps are a sign where a gradient is all rounding
        assert difference.mean() < 1e-6 and (difference > 5e-5).sum() <= 8, name


def assert_same_run(out, proof_run):
    for mine, theirs in zip(read(out / "metrics.jsonl"), read(proof_run / "metrics.jsonl"), strict=True):
        for name in ("epoch", "accepted", "candidates", "ids"):
            assert mine[name] == theirs[name], (mine["step"], name)
        for name in ("loss", "mean_factor", "mean_ce", "grad_norm"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), (mine["step"], name)
    assert largest_difference(out / "step-8", proof_run / "step-8") < 1e-5


@pytest.mark.parametrize("micro_batch_size", [1, 5, 64])
def test_whole_proofs_whatever_the_micro_batch(micro_batch_size, data, proof_run, tmp_path):
    flags = ["--data", data, "--max-steps", 8, "--epochs", 3, "--micro-batch-size", micro_batch_size]
    assert_same_run(train(tmp_path / "run", *PROOF, *flags), proof_run)


def test_whole_proofs_with_two_processes(data, proof_run, tmp_path):
    flags = [*TINY, *PROOF, "--data", data, "--max-steps", 8, "--epochs", 3, "--micro-batch-size", 3, "--zero", 2]
    done = run_script("train_lean_step.py", *flags, "--out", tmp_path / "run", processes=2)
    assert "from 2 processes" in done.stdout and "12 accepted proofs each" in done.stdout
    assert_same_run(tmp_path / "run", proof_run)


def test_refill_replaces_proofs_and_an_epoch_sees_each_once(data, proof_run):
    steps = read(proof_run / "metrics.jsonl")
    assert any(step["candidates"] > step["accepted"] for step in steps)
    first = [i for step in steps if step["epoch"] == 1 for i in step["ids"]]
    assert len(set(first)) == len(first)
    starts = {row["id"] for row in train_lean_step.load_steps(data / "train.json") if row["problem"].endswith("+0=")}
    assert starts >= set(first)  # a proof is known by its first step
    assert all(step["accepted"] == 12 for step in steps)


def test_a_proof_that_lost_a_step_is_dropped_whole(capsys, tmp_path):
    found = [*proofs(12), theorem("long", [("1+1=", "2"), ("1" * 300 + "=", "1"), ("2+2=", "4")])]
    (tmp_path / "train.json").write_text(json.dumps(found))
    flags = ["--data", tmp_path, "--epochs", 1, "--batch-size", 4, "--factor-threshold", 0]
    for level, told in (
        (["--n-eff", 4], r"32 steps to train on \(dropped: \{'too long': 1\}\)"),
        (
            ["--level", "proof", "--n-prime", 4],
            r"12 proofs to train on \(dropped: \{'too long': 1, 'proofs that lost a step': 1\}\)",
        ),
    ):
        out = train(tmp_path / level[0] / "run", *flags, *level, "--max-length", 60)
        assert re.search(told, capsys.readouterr().out)
        ids = sorted(i for step in read(out / "metrics.jsonl") for i in step["ids"])
        assert len(ids) == (32 if len(level) == 2 else 12) and 31 not in ids
        assert (30 in ids) == (32 in ids) == (len(level) == 2)


# Data


def test_extra_proofs_and_what_a_checkpoint_says(capsys, data, tmp_path):
    found = [theorem(f"x{i}", [("7+7=", "14")]) for i in (1, 2)]
    (tmp_path / "found.jsonl").write_text("".join(json.dumps(one) + "\n" for one in found))
    (tmp_path / "more.jsonl").write_text(json.dumps({"state": "1+1=", "tactic": "2"}) + "\n")
    extra = ["--extra", tmp_path / "found.jsonl", tmp_path / "more.jsonl"]
    out = train(tmp_path / "run", "--data", data, *extra, "--n-eff", 1, "--epochs", 1, "--batch-size", 50)
    told = capsys.readouterr().out
    assert (
        "203 steps to train on (dropped: none), in proofs of 2.4 steps on average, median 2; 20 steps to test" in told
    )
    assert "cross-entropy, NLL" in told and "50 accepted steps each, from 1 process" in told
    steps = read(out / "metrics.jsonl")
    assert sorted(i for step in steps for i in step["ids"]) == list(range(203))
    record = json.loads((out / "epoch-1/dco.json").read_text())
    assert (record["template"], record["n_prime"], record["base"]) == ("lean", 1.0, "examples/tiny_llama")
    assert record["data"] == str(data) and record["step"] == 5 and record["max_new_tokens"] >= 3
    (summary,) = read(out / "epochs.jsonl")
    assert 0 < summary["pass@1"] < summary["pass@64"] < 1 and 0 < summary["greedy_confidence"] < 1


def test_lines_of_state_and_tactic_with_their_proof(tmp_path):
    lines = [{"state": "1+1=", "tactic": "2", "proof": "a"}, {"state": "2+1=", "tactic": "3", "proof": "a"}]
    lines += [{"state": "3+1=", "tactic": "4", "proof": "b"}, {"state": "5+1=", "tactic": "6"}]
    path = tmp_path / "steps.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = train_lean_step.load_steps(path, 7)
    assert [(row["id"], row["problem"], row["answer"]) for row in rows] == [
        (7, "1+1=", "2"), (8, "2+1=", "3"), (9, "3+1=", "4"), (10, "5+1=", "6")
    ]  # fmt: skip
    assert len({row["proof"] for row in rows}) == 3 and rows[0]["proof"] == rows[1]["proof"]
    assert rows[2]["source"] == f"{path}:3"
    out = train(tmp_path / "run", "--data", path, "--level", "proof", "--n-prime", 2, "--epochs", 1, "--batch-size", 2)
    assert sorted(i for step in read(out / "metrics.jsonl") for i in step["ids"]) == [0, 2, 3]


def refused(arguments, capsys, told, out):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train_lean_step.main([*map(str, arguments), "--out", str(out)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and told in error and "Traceback" not in error, error
    assert not out.exists()


@pytest.mark.parametrize(
    "name, text, told",
    [
        ("train.jsonl", '{"state": "1+1="', "train.jsonl:1: not JSON"),
        ("train.jsonl", '{"state": "1+1=", "tactic": "2"}\n{"state": "1"}', "train.jsonl:2: field 'tactic' is missing"),
        ("train.jsonl", '{"state": " ", "tactic": "2"}', "train.jsonl:1: field 'state' is missing or empty"),
        ("train.jsonl", '{"state": 1, "tactic": "2"}', "train.jsonl:1: field 'state' is missing or empty"),
        ("train.jsonl", '{"state": "1", "tactic": "2", "proof": ["a"]}', "train.jsonl:1: field 'proof' must be a text"),
        ("train.json", '{"full_name": "a"}', "train.json, theorem 1: field 'url' is missing"),
        ("train.json", "[", "train.json: not a JSON list of theorems"),
        ("train.json", json.dumps([theorem("a", []) | {"traced_tactics": [{"tactic": "2"}]}]), "1: field 'traced_"),
        ("train.json", json.dumps([theorem("a", []) | {"traced_tactics": None}]), "theorem 1: field 'traced_tactics'"),
        ("train.json", json.dumps([theorem("a", [("1+1=", "")])]), "theorem 1: field 'tactic' is missing or empty"),
        ("train.json", json.dumps([theorem("a", [])]), "no step is left; dropped: {}"),
        ("train.json", json.dumps([theorem("a", [("1" * 2100, "2")])]), "no step is left; dropped: {'too long': 1}"),
        ("train.json", json.dumps([theorem("a", [("1 ½ 1", "2")])]), "no token for '½'"),
        ("none", "", "train.json does not exist; LeanDojo Benchmark 4 is at https://zenodo.org/"),
    ],
)
def test_bad_data(name, text, told, capsys, tmp_path):
    (tmp_path / name).write_text(text)
    data = tmp_path if name == "none" else tmp_path / name
    refused([*TINY, "--data", data], capsys, told, tmp_path / "run")


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--level", "proof"], "--level proof and --n-prime (paper: 4096) go together"),
        (["--n-prime", "64"], "--level proof and --n-prime (paper: 4096) go together"),
        (["--n-eff", "0.5"], "must be numbers from 1 up, not 0.5"),
        (["--level", "proof", "--n-prime", "nan"], "must be numbers from 1 up"),
        (["--factor-threshold", "1"], "must lie in [0, 1)"),
        (["--lr", "0"], "--lr must be positive"),
        (["--extra", "no/such.jsonl"], "no/such.jsonl does not exist"),
    ],
)
def test_bad_arguments(arguments, told, capsys, data, tmp_path):
    refused([*TINY, "--data", data, *arguments], capsys, told, tmp_path / "run")


@pytest.mark.parametrize(
    "arguments, out",
    [
        ([], "runs/lean-neff8"),
        (["--n-eff", "32"], "runs/lean-neff32"),
        (["--n-eff", "1.5"], "runs/lean-neff1.5"),
        (["--level", "proof", "--n-prime", "4096"], "runs/lean-proof-n4096"),
    ],
)
def test_default_folders_and_the_papers_settings(arguments, out):
    args = train_lean_step.parse_arguments(arguments)
    assert str(args.out) == out
    assert (args.lr, args.batch_size, args.epochs, args.warmup_steps) == (1e-5, 64, 3, 20)
    assert (args.factor_threshold, args.nll, args.max_length) == (0.3, "sum", 2048)


def test_the_embedded_prover_is_what_it_trains_without_a_gpu(tmp_path):
    done = run_script("train_lean_step.py", "--n-eff", 4, "--max-steps", 2, "--out", tmp_path / "run")
    assert "no CUDA: taking --model examples/tiny_prover and --data examples/propositional" in done.stdout
    assert "DCO with N_eff = 4, F >= 0.3" in done.stdout and "the settings of the embedded experiment" in done.stdout
    assert f"python prove.py --model {tmp_path}/run/step-2" in done.stdout
    args = json.loads((tmp_path / "run/args.json").read_text())
    assert args["n_prime"] == 4 and args["lr"] == train_lean_step.EXAMPLE_SETTINGS["lr"]
    assert [step["accepted"] for step in read(tmp_path / "run/metrics.jsonl")] == [args["batch_size"]] * 2
