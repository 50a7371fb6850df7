"""train_lean_step.py: steps of proofs, and whole proofs, against sums written out by hand."""

import json
import math

import pytest
import torch
from conftest import ROOT, run_script
from safetensors.torch import load_file
from small_runs import read_lines, refused, write_rows

import common
import train_direct
import train_lean_step

TINY = ["--model", "examples/tiny_llama", "--preset", "laptop"]


def write_theorems(path, proofs):
    """proofs: lists of (state, tactic)."""
    theorems = []
    for i, proof in enumerate(proofs):
        steps = [{"state_before": state, "tactic": tactic} for state, tactic in proof]
        theorems.append({"full_name": f"t{i}", "traced_tactics": steps})
    path.write_text(json.dumps(theorems))
    return path


def proofs(count):
    """Of one to four steps, in the tiny model's characters."""
    return [
        [(f"{10 + i}+{k}=", str(10 + i + k)[-1 - k % 2 :]) for k in range(1 + i % 4)]
        for i in range(count)
    ]


def train(out, *flags):
    train_lean_step.main([*TINY, *map(str, flags), "--out", str(out)])
    return read_lines(out / "metrics.jsonl")


def largest_difference(one, other):
    one, other = (load_file(checkpoint / "model.safetensors") for checkpoint in (one, other))
    return max((one[name] - other[name]).abs().max().item() for name in one)


# ---- Steps ---------------------------------------------------------------------------------------
def test_a_step_is_an_example_as_any_other(tmp_path, monkeypatch):
    """The same batches and weights as train_direct.py on the same rows, of which F drops some."""
    rows = read_lines(ROOT / "examples/arithmetic/train.jsonl")[:400]
    write_rows(tmp_path, train=rows)
    write_theorems(tmp_path / "train.json", [[(row["problem"], row["answer"])] for row in rows])
    monkeypatch.setitem(common.TEMPLATES, "lean", common.TEMPLATES["direct"])
    flags = [*TINY, "--data", str(tmp_path), "--epochs", "4", "--max-steps", "40", "--lr", "0.005"]
    flags += ["--batch-size", "24", "--micro-batch-tokens", "128", "--nll", "mean"]
    flags += ["--betas", "0.9", "0.98", "--weight-decay", "0.01", "--warmup-steps", "10"]
    train_direct.main([*flags, "--n-prime", "16", "--out", str(tmp_path / "direct")])
    train_lean_step.main([*flags, "--n-eff", "16", "--out", str(tmp_path / "lean")])
    mine, theirs = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("lean", "direct"))
    assert sum(step["candidates"] - step["accepted"] for step in theirs) > 10
    for name in ("ids", "candidates", "accepted", "loss", "mean_factor", "grad_norm", "lr"):
        assert [step[name] for step in mine] == [step[name] for step in theirs], name
    assert largest_difference(tmp_path / "lean/step-40", tmp_path / "direct/step-40") == 0


# ---- Whole proofs --------------------------------------------------------------------------------
PROOF = ["--level", "proof", "--n-prime", 2e5, "--batch-size", 12, "--lr", 0.003, "--clip", 0.5]
PROOF += ["--warmup-steps", 4, "--betas", 0.9, 0.95, "--max-steps", 8, "--epochs", 3]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_theorems(tmp_path_factory.mktemp("proofs") / "train.json", proofs(80))


@pytest.fixture(scope="module")
def proof_run(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("proof") / "run"
    return out, train(out, *PROOF, "--data", data, "--micro-batch-tokens", 64)


def test_whole_proofs_by_hand(data, proof_run, tokenizer, tiny_model):
    """F of the product of a proof's p, the first 12 of the stream with F >= 0.3, Σ F Σ NLL."""
    model, rows = tiny_model, train_lean_step.load_steps([data])
    examples, _ = common.encode(rows, tokenizer, model.config, "lean")
    by_proof = {}
    for row, example in zip(rows, examples, strict=True):
        by_proof.setdefault(row["proof"], []).append(example)
    generator = torch.Generator().manual_seed(common.seed_of(0, "epoch", 1))
    stream = [list(by_proof.values())[i] for i in torch.randperm(80, generator=generator)]
    optimizer, n, rejected = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95)), 2e5, 0
    optimizer.param_groups[0]["weight_decay"] = 0
    for step, metrics in enumerate(proof_run[1][:3], start=1):
        used, losses, objective = [], [], 0.0
        while len(used) < 12:
            proof = stream.pop(0)
            log_p = sum(common.log_probs(model, [one])[0] for one in proof).double()
            p = log_p.exp().item()
            missed = n * math.log1p(-p)  # log (1 - p)^n
            factor = n * p * math.exp(missed - math.log1p(-p)) / -math.expm1(missed)
            if factor < 0.3:
                rejected += 1
                continue
            used.append(proof[0].id)
            losses.append(-math.log(-math.expm1(missed)))
            objective = objective - factor * log_p / 12
        assert metrics["ids"] == used and metrics["accepted"] == 12
        assert metrics["loss"] == pytest.approx(sum(losses) / 12, rel=1e-4)
        objective.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
        optimizer.param_groups[0]["lr"] = 0.003 * step / 4
        optimizer.step()
        optimizer.zero_grad()
    assert rejected > 0


def assert_same_run(out, steps, proof_run):
    for mine, theirs in zip(steps, proof_run[1], strict=True):
        assert mine["ids"] == theirs["ids"] and mine["candidates"] == theirs["candidates"]
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    assert largest_difference(out / "step-8", proof_run[0] / "step-8") < 2e-4


def test_whole_proofs_whatever_the_micro_batch_and_processes(data, proof_run, tmp_path):
    steps = train(tmp_path / "run", *PROOF, "--data", data, "--micro-batch-tokens", 8192)
    assert_same_run(tmp_path / "run", steps, proof_run)
    flags = [*TINY, *PROOF, "--data", data, "--micro-batch-tokens", 40, "--zero", 2]
    run_script("train_lean_step.py", *flags, "--out", tmp_path / "two", processes=2)
    assert_same_run(tmp_path / "two", read_lines(tmp_path / "two/metrics.jsonl"), proof_run)


def test_a_proof_that_lost_a_step_is_dropped_whole(tmp_path, capsys):
    long = [("1+1=", "2"), ("1" * 90 + "=", "1"), ("2+2=", "4")]
    data = write_theorems(tmp_path / "train.json", [*proofs(4), long])
    flags = ["--data", data, "--epochs", 1, "--factor-threshold", 0, "--max-length", 60]
    for level, expected in ((["--n-eff", 4], 12), (["--level", "proof", "--n-prime", 4], 4)):
        (step,) = train(tmp_path / level[0], *flags, *level)
        assert step["accepted"] == expected and "{'too long': 1}" in capsys.readouterr().out


# ---- Data and arguments --------------------------------------------------------------------------
def test_extra_proofs_validation_and_what_a_checkpoint_says(tmp_path):
    write_theorems(tmp_path / "train.json", proofs(8))
    write_theorems(tmp_path / "val.json", proofs(2))
    extra = [write_theorems(tmp_path / f"{i}.json", [[("7+7=", "14")]]) for i in range(2)]
    flags = ["--data", tmp_path, "--extra", *extra, "--n-eff", 1, "--epochs", 1]
    steps = train(tmp_path / "run", *flags, "--max-length", 99)
    assert sorted(i for step in steps for i in step["ids"]) == list(range(22))
    record = json.loads((tmp_path / "run/epoch-1/dco.json").read_text())
    assert (record["template"], record["n_prime"], record["max_length"]) == ("lean", 1, 99)
    (summary,) = read_lines(tmp_path / "run/epochs.jsonl")
    assert 0 < summary["pass@1"] < summary["pass@64"] < 1


@pytest.mark.parametrize("name", ["none.json", "bad.json", "empty.json"])
def test_data_without_proofs_are_refused(name, tmp_path, capsys):
    (tmp_path / "bad.json").write_text('[{"full_name": "a", "traced_tactics": [{"tactic": "2"}]}]')
    write_theorems(tmp_path / "empty.json", [[]])
    flags = [*TINY, "--data", str(tmp_path / name), "--out", str(tmp_path / "run")]
    assert name in refused(capsys, train_lean_step.main, flags)
