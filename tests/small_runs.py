"""Runs of train_direct.py on a few hundred of the embedded problems, and how to compare them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train_direct

ROOT = Path(__file__).resolve().parent.parent
TINY_LLAMA = str(ROOT / "examples/tiny_llama")
SIZES = {"train": 300, "test": 16}
# In batches of 32: steps with and without rejected examples, and short last steps.
FLAGS = ["--n-prime", "64", "--factor-threshold", "0.8", "--epochs", "4"]
TIMES = ("seconds", "tokens_per_second")


def train(*flags):
    train_direct.main([str(flag) for flag in flags])


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def plain_log_probs(model, prompt_ids, completion_ids):
    """log p of each token of a completion, with nothing of common.py."""
    ids = torch.tensor([[*prompt_ids, *completion_ids]])
    log_p = model(ids, use_cache=False).logits[0, len(prompt_ids) - 1 : -1].log_softmax(-1)
    return log_p.gather(-1, torch.tensor(completion_ids)[:, None])[:, 0]


def write_rows(folder, **splits):
    """Write a data folder: one file of JSON lines for each split."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text)
    return folder


def refused(capsys, function, *arguments):
    """Call a function that must end with exit code 2. Returns its message, one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        function(*arguments)
    assert stop.value.code == 2
    _, error, message = capsys.readouterr().err.rpartition("error: ")
    assert error and message.count("\n") == 1, message
    return message


def assert_same_run(out, reference, tolerance=1e-4):
    """The same examples in the same steps, and the same numbers and weights up to rounding."""
    for name in ("metrics.jsonl", "epochs.jsonl"):
        lines, expected = read_lines(out / name), read_lines(reference / name)
        assert len(lines) == len(expected) > 0
        for line, other in zip(lines, expected, strict=True):
            assert line.keys() == other.keys()
            for field in line.keys() - set(TIMES):
                close = pytest.approx(other[field], rel=tolerance, abs=1e-6)
                whole = isinstance(other[field], int | list)
                assert line[field] == (other[field] if whole else close), (line["step"], field)
    checkpoints = [path.relative_to(reference) for path in reference.glob("*/model.safetensors")]
    assert len(checkpoints) == len(list(out.glob("*/model.safetensors"))) > 0
    for path in checkpoints:
        mine, others = load_file(out / path), load_file(reference / path)
        torch.testing.assert_close(mine, others, rtol=0, atol=tolerance)


@pytest.fixture(scope="session")
def small_data(tmp_path_factory):
    """The first problems of the embedded data."""
    rows = {split: read_lines(ROOT / f"examples/arithmetic/{split}.jsonl") for split in SIZES}
    small = {split: rows[split][:size] for split, size in SIZES.items()}
    return write_rows(tmp_path_factory.mktemp("small"), **small)


@pytest.fixture(scope="session")
def reference(small_data, tmp_path_factory):
    """A run of one process."""
    out = tmp_path_factory.mktemp("reference") / "run"
    train(*FLAGS, "--save-every", 4, "--data", small_data, "--out", out)
    steps = read_lines(out / "metrics.jsonl")
    shares = [step["accepted"] / step["candidates"] for step in steps]
    assert min(shares) < 2 / 3 < max(shares), "both ways of refilling"
    assert any(step["accepted"] < 32 for step in steps), "short last steps"
    return out
