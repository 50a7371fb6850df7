"""What README.md says can be done, can be done."""

import re
import shlex
from importlib import import_module

import pytest
import torch
from conftest import ROOT

import common

README = (ROOT / "README.md").read_text()
SCRIPTS = (
    "train_direct.py",
    "train_cot_dcoa.py",
    "train_grpo.py",
    "train_lean_step.py",
    "eval_passn.py",
    "prove.py",
)


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def copied():
    """The first Python block, run as it stands: the weight alone."""
    namespace = {}
    exec(blocks("python")[0], namespace)
    return namespace


def test_the_copied_factor_is_ours(copied):
    log_p = torch.tensor([-1e4, -746.0, -41.0, -39.0, -20.0, -3.0, -0.7, -0.1, -1e-6], dtype=torch.float64)
    for n in (1, 2, 64, 4096):
        torch.testing.assert_close(copied["dco_factor"](log_p, n), common.dco_factor(log_p, n), rtol=1e-9, atol=1e-300)
    assert len(blocks("python")[0].strip().splitlines()) <= 10
    certain = copied["dco_factor"](torch.tensor([0.0, float("-inf")]), 64)
    assert certain[0] < 1e-12 and certain[1] == 1


def test_trainer_block_runs_as_it_stands(copied, tiny_model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples, _ = common.encode(
        common.load_problems(str(ROOT / "examples/arithmetic"), "train"), tokenizer, "direct", 99
    )
    dataset = [
        {
            "input_ids": e.prompt_ids + e.completion_ids,
            "labels": [-100] * len(e.prompt_ids) + e.completion_ids,
            "attention_mask": [1] * len(e),
        }
        for e in examples[:200]
    ]
    from transformers import DataCollatorForSeq2Seq

    collator = DataCollatorForSeq2Seq(tokenizer)
    namespace = copied | {"model": tiny_model, "dataset": dataset, "collator": collator}
    exec(blocks("python")[1], namespace)
    assert namespace["trainer"].state.global_step == 20

    # With N' = 1 it is the model's own loss; with N' = 64 its gradient is that of F-weighted cross-entropy.
    batch = collator(dataset[:8]).to(tiny_model.device)
    outputs = tiny_model(**batch)
    own = namespace["dco_loss_func"](1)(outputs, batch["labels"])
    assert own.item() == pytest.approx(outputs.loss.item(), rel=1e-5)
    tokens = (batch["labels"] != -100).sum()
    assert namespace["dco_loss_func"](1)(outputs, batch["labels"], tokens * 2).item() == pytest.approx(own.item() / 2)
    log_p = common.completion_log_probs(tiny_model, common.collate(examples[:8], 0, tiny_model.device))
    expected = common.dco_loss(log_p, 64).sum() / tokens
    gradients = []
    for loss in (namespace["dco_loss_func"](64)(outputs, batch["labels"]), expected):
        tiny_model.zero_grad()
        loss.backward()
        gradients.append(tiny_model.lm_head.weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


def commands():
    text = "\n".join(blocks("bash")).replace("\\\n", " ")
    return re.findall(r"(?:python|accelerate launch[^\n]*?) ((?:train_\w+|eval_passn|prove)\.py[^\n&;]*)", text)


def test_every_command_is_one_that_its_script_takes():
    found = commands()
    assert len(found) >= 7
    for command in found:
        script, *arguments = shlex.split(command.replace("$n", "64"), comments=True)
        import_module(script.removesuffix(".py")).parse_arguments(arguments)


def test_flags_and_files_that_are_named_exist():
    sources = {name: (ROOT / name).read_text() for name in SCRIPTS}
    rows = README.split("## Flags and where they come from")[1]
    for flag in re.findall(r"`(?:eval_passn.py |prove.py )?(--[\w-]+)`", rows):
        assert any(f'"{flag}"' in source for source in sources.values()), flag
    for name in re.findall(r"^\| `([\w./]+)`", README, re.MULTILINE):
        if "--" not in name:
            assert (ROOT / name).exists(), name
    for name in re.findall(r"→ (.*)$", README, re.MULTILINE):
        for function in re.findall(r"`(\w+)`", name.split(" in `")[0]):
            assert hasattr(common, function) or any(f"def {function}(" in s for s in sources.values()), function


def test_install_lines_are_the_same_everywhere():
    wanted = re.findall(r"^#   (pip install .*)$", (ROOT / "requirements-cpu.txt").read_text(), re.MULTILINE)
    assert len(wanted) == 3
    assert re.findall(r"^(pip install .*?) &&$", README, re.MULTILINE) == wanted * 2
    assert "nvidia" not in (ROOT / "requirements-cpu.txt").read_text()


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci/run").read_text()
    assert "<!-- the test command -->" in README and "<!-- the test command -->" in script
    assert README.split("<!-- the test command -->\n")[1].startswith("```bash\n")
