"""Training on many processes and two nodes: the same steps and weights however the work is split, and what is said and
refused beforehand about memory and disk."""

import json
import re
import shutil
import subprocess
import sys
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, free_port, run_script
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

import common
import train_direct

LR, WARMUP, CLIP = 1e-3, 4, 6.5  # some steps are clipped, and a wrong factor shows in those that are not
ROWS, BATCH = 61, 8  # nothing divides anything


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def untimed(path):
    return [{name: line[name] for name in line if "second" not in name} for line in read(path)]


def weights(run):
    return load_file(run / "epoch-2/model.safetensors")


def assert_close(one, other, tolerance=1e-5):
    assert one.keys() == other.keys()
    for name in one:
        assert (one[name] - other[name]).abs().max().item() <= tolerance, name


# Gradients are those of the plain mean over the accepted examples


@pytest.fixture(scope="module")
def base(cross_entropy_run, tmp_path_factory):
    """-> (flags, rows): a model that is sure of some of the problems, so that N' = 64 rejects them."""
    data = tmp_path_factory.mktemp("scale") / "data"
    data.mkdir()
    lines = (ROOT / "examples/arithmetic/train.jsonl").read_text().splitlines()[:ROWS]
    (data / "train.jsonl").write_text("\n".join(lines) + "\n")
    flags = ["--model", cross_entropy_run[0] / "epoch-2", "--data", data, "--batch-size", BATCH, "--epochs", 2]
    flags += ["--lr", LR, "--warmup-steps", WARMUP, "--clip", CLIP, "--nll", "sum"]
    return list(map(str, flags)), [json.loads(line) for line in lines]


# Of each: N', processes, ZeRO's stage, examples that a process computes at once.
HOW = [(n, processes, zero, 3 + zero) for n in (1, 64) for processes in (1, 2) for zero in (0, 2, 3)]
HOW.append((64, 2, "3 --offload", 5))


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    outs, asked = {}, []
    for n, processes, zero, at_once in HOW:
        out = folder / f"{n}-{processes}-{zero}".replace(" ", "")
        flags = ["--n-prime", n, "--zero", *str(zero).split(), "--micro-batch-size", at_once, "--out", out]
        asked.append([processes, [*base[0], *map(str, flags)]])
        outs[n, processes, zero] = out
    run_script("tests/forked.py", json.dumps(asked))
    return outs


@pytest.fixture(scope="module")
def references(base, runs):
    """{(N', dtype): the weights after the steps of the one-process run}: an example at a time, unpadded, in torch."""
    flags, rows = base
    found = {}
    for n, dtype in product((1, 64), (torch.float32, torch.float64)):
        model = AutoModelForCausalLM.from_pretrained(flags[1]).to(dtype)
        tokenizer = AutoTokenizer.from_pretrained(flags[1])
        optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
        clipped = 0
        for step, metrics in enumerate(read(runs[n, 1, 0] / "metrics.jsonl"), start=1):
            total = 0.0
            for row in (rows[i] for i in metrics["ids"]):
                prompt = tokenizer(row["problem"] + "\n").input_ids
                answer = tokenizer(row["answer"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
                logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].double()
                p = logits.log_softmax(-1)[range(len(answer)), answer].sum().exp()
                loss = -(1 - (1 - p) ** n).log() / len(metrics["ids"])
                loss.backward()
                total += loss.item()
            assert metrics["loss"] == pytest.approx(total, rel=1e-4)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item()
            assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
            clipped += norm > CLIP
            optimizer.param_groups[0]["lr"] = LR * min(1, step / WARMUP)
            optimizer.step()
            optimizer.zero_grad()
        assert 0 < clipped < step and step > 5
        found[n, dtype] = model.state_dict()
    return found


@pytest.mark.parametrize("n, processes, zero", [how[:3] for how in HOW])
def test_weights_are_those_of_the_plain_mean_gradient(n, processes, zero, runs, references, base):
    steps, plain = (read(runs[n, *how] / "metrics.jsonl") for how in ((processes, zero), (1, 0)))
    assert [step["ids"] for step in steps] == [step["ids"] for step in plain]
    for name in ("loss", "grad_norm"):
        assert [step[name] for step in steps] == pytest.approx([step[name] for step in plain], rel=1e-4)
    rejected = sum(step["candidates"] - step["accepted"] for step in steps)
    assert rejected > 10 if n > 1 else rejected == 0
    assert 0 < steps[-1]["accepted"] < BATCH and (n > 1 or steps[-1]["accepted"] == ROWS % BATCH)
    lengths = [{len(base[1][i]["problem"]) for i in step["ids"]} for step in steps]
    assert all(len(of_step) > 1 for of_step in lengths)
    single, double = (references[n, dtype] for dtype in (torch.float32, torch.float64))
    # AdamW divides a gradient by its own size: where it is all rounding, float32 does not say which way a weight goes.
    undetermined = {name: (single[name] - double[name]).abs() > 1e-6 for name in double}
    assert sum(mask.sum().item() for mask in undetermined.values()) < 50  # of 130,112
    trained = weights(runs[n, processes, zero])
    assert_close({name: torch.where(undetermined[name], double[name], trained[name]) for name in trained}, double)


# Two nodes, as two launches on this machine


def launch(node, port, *arguments, processes=1):
    where = ["--nnodes", 2, "--node_rank", node, "--master_addr", "127.0.0.1", "--master_port", port]
    command = ["-m", "torch.distributed.run", *where, "--nproc_per_node", processes, "--", "train_direct.py"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *map(str, command), *map(str, arguments)], cwd=ROOT, **pipes)


def finish(nodes, code=0):
    try:
        told = [node.communicate(timeout=120) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    for node, (stdout, stderr) in zip(nodes, told, strict=True):
        assert (node.returncode == 0) == (code == 0), f"{stdout}\n{stderr[-4000:]}"
    return told


def test_two_nodes_make_the_run_of_two_processes_and_go_on_with_it(base, runs, tmp_path):
    flags = [*base[0], "--n-prime", 64, "--micro-batch-size", 3, "--out", tmp_path / "run"]
    for more in (["--max-steps", 3], ["--resume"]):
        port = free_port()
        for stdout, _ in finish([launch(node, port, *flags, *more) for node in (0, 1)]):
            assert "from 2 processes" in stdout and ("resuming from" in stdout) == (more == ["--resume"])
    assert untimed(tmp_path / "run/metrics.jsonl") == untimed(runs[64, 2, 0] / "metrics.jsonl")
    assert untimed(tmp_path / "run/epochs.jsonl") == untimed(runs[64, 2, 0] / "epochs.jsonl")
    assert_close(weights(tmp_path / "run"), weights(runs[64, 2, 0]), tolerance=0)
    assert_close(weights(tmp_path / "run"), weights(runs[64, 1, 0]))
    args = json.loads((tmp_path / "run/args.json").read_text())
    assert args["processes"] == 2 and args["max_steps"] == 3  # as they were when the run began


def test_two_nodes_of_two_processes_with_split_weights(base, runs, tmp_path):
    port, flags = free_port(), [*base[0], "--n-prime", 64, "--micro-batch-size", 1, "--zero", 3, "--out", tmp_path]
    finish([launch(node, port, *flags, processes=2) for node in (0, 1)])
    steps, plain = (read(out / "metrics.jsonl") for out in (tmp_path, runs[64, 1, 0]))
    assert [(step["step"], step["ids"]) for step in steps] == [(step["step"], step["ids"]) for step in plain]
    assert_close(weights(tmp_path), weights(runs[64, 1, 0]))


def test_an_out_that_the_second_node_does_not_see_ends_both(base, tmp_path):
    port = free_port()
    nodes = [launch(node, port, *base[0], "--out", tmp_path / f"{node}") for node in (0, 1)]
    for _, stderr in finish(nodes, code=1):
        assert "error: not all processes see the --out of the main process: name the same on all nodes" in stderr
    assert not (tmp_path / "1").exists() and not (tmp_path / "0/metrics.jsonl").exists()


# Checkpoints of split weights


def test_split_weights_are_gathered_one_after_the_other_into_the_main_process(base, tmp_path):
    out = tmp_path / "run"
    run_script("tests/gathering.py", out, *base[0], "--n-prime", 1, "--zero", 3, "--max-steps", 3, processes=2)
    found = [json.loads((tmp_path / f"run-{rank}.json").read_text()) for rank in (0, 1)]
    shares = [torch.load(tmp_path / f"run-{rank}.pt") for rank in (0, 1)]
    model = AutoModelForCausalLM.from_pretrained(out / "step-3")
    trained, untrained = model.state_dict(), AutoModelForCausalLM.from_pretrained(base[0][1]).state_dict()
    assert found[0]["given"] == sorted(trained) and found[1]["given"] == []
    for held in found:
        assert held["before"] == held["after"] == [] and max(map(len, held["whole"])) == 1
        gathered = [name.removeprefix("module.") for whole in held["whole"] for name in whole]
        assert sorted(gathered) == sorted(trained)
    for name, weight in trained.items():
        halves = [share["module." + name] for share in shares]
        assert halves[0].numel() == halves[1].numel() == weight.numel() / 2
        assert torch.equal(torch.cat(halves).view(weight.shape), weight)
        assert not torch.equal(weight, untrained[name])


# What is said beforehand: --dry-run


SHAPES = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
UNITS = {"MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def count_parameters(name):
    h, i, layers, heads = SHAPES[name].values()
    return 2 * 128256 * h + layers * (2 * h * h + 2 * h * (8 * h // heads) + 3 * h * i + 2 * h) + h


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Folders of Llama-3's shapes, without weights."""
    folder = tmp_path_factory.mktemp("shapes")
    for name, shape in SHAPES.items():
        config = LlamaConfig(**shape, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192)
        config.save_pretrained(folder / name)
        for file in (ROOT / "examples/tiny_llama").glob("*token*"):
            shutil.copy(file, folder / name)
    return folder


@pytest.fixture
def dry_run(shapes, tmp_path, capsys, monkeypatch):
    """-> a function: (exit code, what was printed, the sizes in it by name)."""

    def run(shape, *flags, free=2**60):
        monkeypatch.setattr(common.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        for way in ("from_pretrained", "from_config"):  # only ever without storage
            made = getattr(AutoModelForCausalLM, way)

            def watched(*arguments, made=made, **settings):
                model = made(*arguments, **settings)
                assert all(p.is_meta or isinstance(p, FakeTensor) for p in model.parameters())
                return model

            monkeypatch.setattr(AutoModelForCausalLM, way, watched)
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            train_direct.main(["--model", str(shapes / shape), "--out", str(tmp_path / "out/run"), *map(str, flags)])
        assert not (tmp_path / "out").exists()
        printed = "".join(capsys.readouterr())
        found = re.findall(r"([a-z][a-z ]*?) ([\d.]+) ([MGT]iB)", printed)
        return (
            end.value.code,
            printed,
            {name.split("  ")[-1].strip(): float(size) * UNITS[unit] for name, size, unit in found},
        )

    return run


@pytest.mark.parametrize(
    "shape, machine, flags, code, zero",
    [
        ("8B", "8x80", [], 0, 2),
        ("8B", "1x80", ["--zero", 0], 1, 0),
        ("70B", "8x80", [], 1, 3),
        ("70B", "8x141", ["--gradient-checkpointing"], 1, 3),
        ("70B", "8x141", ["--gradient-checkpointing", "--offload"], 0, 3),
        ("70B", "16x141", [], 0, 3),
    ],
)
def test_a_dry_run_says_what_fits_and_why(shape, machine, flags, code, zero, dry_run):
    ended, printed, sizes = dry_run(shape, "--dry-run", machine, *flags)
    n, gpus = count_parameters(shape), int(machine.partition("x")[0])
    assert ended == code, printed
    assert f"ZeRO-{zero}" in printed and ("DOES NOT FIT" in printed) == (code == 1)
    offload, split = "--offload" in flags, gpus if zero else 1
    expected = {"weights": n * (2 if zero else 4) / (gpus if zero == 3 else 1)}
    if offload:
        expected["and"] = 16 * n / gpus
    else:
        expected |= {"gradients": 4 * n / split, "optimizer states": (12 if zero else 8) * n / split}
    expected |= {"two states of": (14 if zero else 12) * n, "checkpoints of": 2 * n}
    for name, size in expected.items():
        assert sizes[name] == pytest.approx(size, rel=0.02), name  # they have one decimal
    assert ("gradients" in sizes) == ("optimizer states" in sizes) == (not offload)
    of_gpu = ("weights", "gradients", "optimizer states", "buffers", "activations", "logits")
    assert sizes["about"] == pytest.approx(sum(sizes.get(name, 0) for name in of_gpu), rel=0.02)
    count, disk = re.search(r"(\d+) checkpoints of [^:]*: ([\d.]+ .iB)", printed).groups()
    disk = float(disk[:-4]) * UNITS[disk[-3:]]
    assert disk == pytest.approx(2 * sizes["two states of"] + int(count) * sizes["checkpoints of"], rel=0.03)


def test_a_dry_run_fails_for_the_disk_too(dry_run):
    code, printed, _ = dry_run("8B", "--dry-run", "8x80", free=2**36)
    assert code == 1 and "DOES NOT FIT" not in printed and "NOT ENOUGH" in printed


def test_a_dry_run_of_what_it_does_not_understand_is_refused(dry_run):
    code, printed, _ = dry_run("8B", "--dry-run", "8by80")
    assert code == 2 and "error: --dry-run takes GPUS x GB, as in 8x80, or nothing; not 8by80" in printed


def test_activations_that_cannot_be_counted_are_unknown_and_no_more(dry_run, monkeypatch):
    def fail(*arguments):
        raise NotImplementedError("no such kernel")

    monkeypatch.setattr(common, "bytes_of_activations", fail)
    code, printed, sizes = dry_run("8B", "--dry-run", "8x80")
    assert code == 0 and "activations unknown (no such kernel)" in printed and "activations" not in sizes


def kept(config, tokens, checkpointing):
    """The bytes that autograd really keeps of a sequence after a forward."""
    model, found = AutoModelForCausalLM.from_config(config).train(), {}
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor):
        found[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.arange(tokens)[None]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(ids, torch.ones_like(ids), position_ids=ids, use_cache=False, logits_to_keep=1).logits
        loss = logits.logsumexp(-1).sum()
    assert loss.requires_grad
    return sum(tensor.untyped_storage().nbytes() for key, tensor in found.items() if key not in own)


@pytest.mark.parametrize("layers", [2, 5])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen2Config])
def test_activations_are_what_autograd_keeps(kind, tied, layers):
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = kind(vocab_size=118, num_hidden_layers=layers, tie_word_embeddings=tied, **sizes)
    plain, checkpointed = (kept(config, 96, checkpointing) for checkpointing in (False, True))
    assert common.bytes_of_activations(config, torch.float32, 96, False) == pytest.approx(plain, rel=0.15)
    # On the way back, one layer is computed once more and kept as a whole.
    peak = checkpointed + (plain - checkpointed) / layers
    assert common.bytes_of_activations(config, torch.float32, 96, True) == pytest.approx(peak, rel=0.15)
    assert config.num_hidden_layers == layers
