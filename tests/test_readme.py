"""The commands and the code of README.md run."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from conftest import ROOT, write_rows

import common

README = (ROOT / "README.md").read_text()
SCRIPTS = ("train_direct", "train_cot_dcoa", "train_grpo", "train_lean_step", "eval_passn", "prove")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def copied(tiny_model, tokenizer, tmp_path, monkeypatch):
    """The namespace in which the first Python block was run, with a model and a tokenizer."""
    monkeypatch.chdir(tmp_path)
    namespace = {"model": tiny_model, "tokenizer": tokenizer}
    exec(blocks("python")[0], namespace)
    return namespace


@pytest.fixture
def examples(tokenizer, tiny_model):
    rows = common.load_problems(ROOT / "examples/arithmetic", "train")
    return common.encode(rows[:200], tokenizer, tiny_model.config, "direct")[0]


def padded(examples, tokenizer):
    rows = [
        {
            "input_ids": example.prompt_ids + example.completion_ids,
            "labels": [-100] * len(example.prompt_ids) + example.completion_ids,
        }
        for example in examples
    ]
    return transformers.DataCollatorForSeq2Seq(tokenizer), rows


def test_the_copied_factor_equals_ours(copied):
    values = [-1e4, -746.0, -41.0, -39.0, -20.0, -3.0, -0.7, -0.1, -1e-6]
    log_p = torch.tensor(values, dtype=torch.float64)
    for n in (1, 2, 64, 4096):
        ours = common.dco_factor(log_p, n)
        torch.testing.assert_close(copied["dco_factor"](log_p, n), ours, rtol=1e-9, atol=1e-300)
    certain = copied["dco_factor"](torch.tensor([0.0, float("-inf")]), 64)
    assert certain[0] < 1e-12 and certain[1] == 1


def test_the_copied_loss_has_the_gradient_of_dco(copied, tiny_model, tokenizer, examples):
    collator, rows = padded(examples[:8], tokenizer)
    batch = collator(rows)
    outputs = tiny_model(**batch)
    loss = copied["dco_loss_func"](1)(outputs, batch["labels"])
    assert loss.item() == pytest.approx(outputs.loss.item(), rel=1e-5)
    tokens = (batch["labels"] != -100).sum()
    expected = common.dco_loss(common.log_probs(tiny_model, examples[:8]), 64).sum() / tokens
    gradients = []
    for loss in (copied["dco_loss_func"](64)(outputs, batch["labels"]), expected):
        tiny_model.zero_grad()
        loss.backward()
        gradients.append(tiny_model.lm_head.weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


def test_the_trainer_block_trains(copied, tokenizer, examples):
    copied["collator"], copied["dataset"] = padded(examples, tokenizer)
    exec(blocks("python")[1], copied)
    assert copied["trainer"].state.global_step == 20


def test_the_trl_block_trains_on_answers_alone(copied, tiny_model):
    rows = common.load_problems(ROOT / "examples/arithmetic", "train")[:200]
    copied["pairs"] = datasets.Dataset.from_list(
        [{"prompt": row["problem"] + "\n", "completion": row["answer"]} for row in rows]
    )
    before = tiny_model.lm_head.weight.detach().clone()
    seen = []
    loss_func = copied["dco_loss_func"]

    def watched(n_prime):
        def watched_loss(outputs, labels, *rest):
            seen.append((n_prime, (labels != -100).sum(-1)))
            return loss_func(n_prime)(outputs, labels, *rest)

        return watched_loss

    copied["dco_loss_func"] = watched
    exec(blocks("python")[2], copied)
    assert not torch.equal(before, tiny_model.lm_head.weight)
    assert len(seen) == 20 and all(n == 64 and count.min() >= 2 for n, count in seen)
    assert max(count.max() for _, count in seen) <= 12  # an answer and EOS


def test_every_command_is_one_that_its_script_takes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/lean-neff1/epoch-1").mkdir(parents=True)  # what prove.py looks for
    write_rows(Path("runs/t3"), validation=[])  # --validate
    text = README + (ROOT / "RESULTS.md").read_text()
    fenced = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    inline = [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", prose)]
    lines = "\n".join([*fenced, *inline]).replace("\\\n", " ")
    script = r"((?:train_\w+|eval_passn|prove)\.py[^\n&;]*)"
    found = re.findall(rf"(?:python|accelerate launch[^\n]*?) {script}", lines)
    assert len(found) >= 40
    for command in found:
        name, *arguments = shlex.split(re.sub(r"\$(n|seed)\b", "64", command), comments=True)
        import_module(name.removesuffix(".py")).parse_args(arguments)


def test_flags_files_and_functions_that_are_named_exist():
    sources = {name: (ROOT / f"{name}.py").read_text() for name in SCRIPTS}
    rows = README.split("## Files and flags")[1]
    table = "\n".join(line.split("|")[1] for line in rows.splitlines() if line.startswith("| `"))
    for flag in re.findall(r"--[\w-]+", table):
        assert any(f'"{flag}"' in source for source in sources.values()), flag
    for name in re.findall(r"`(?!-)([\w./]+)`", table):
        assert (ROOT / name).exists(), name
    everything = "\n".join([*sources.values(), (ROOT / "common.py").read_text()])
    for name in re.findall(r"→ (.*)$", README, re.MULTILINE):
        for function in re.findall(r"`(\w+)`", name):
            assert re.search(rf"(def|class) {function}\b", everything), function


def test_ci_runs_the_readmes_test_command():
    assert "<!-- the test command -->" in (ROOT / ".ci/run").read_text()
    assert README.split("<!-- the test command -->\n")[1].startswith("```bash\n")
    assert "nvidia" not in (ROOT / "requirements-cpu.txt").read_text()
