"""VLLMEngines: a real vLLM engine with a trainer's weights, and what happens when it is killed."""

import itertools
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec

import psutil
import pytest
import torch
from conftest import ROOT
from small_runs import TINY_LLAMA, read_lines
from test_sampling import said, z_of_chi_squared

import common


@pytest.fixture(scope="module")
def prompts(tokenizer):
    rows = common.load_problems("examples/arithmetic", "train")[:6]
    return [tokenizer(row["problem"] + "\n").input_ids for row in rows]


def model_of(seed, tokenizer, noise=0.0, tied=False):
    model = common.load_model(TINY_LLAMA, tokenizer, seed=seed)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += noise * torch.randn(weight.shape, generator=generator)
    return model.eval()


# vLLM with the trainer's weights


def test_after_an_update_the_engine_says_what_the_trainer_says(engines, tokenizer, prompts):
    """Later updates meet an engine that has keys and values of earlier weights; a tied head."""
    heard, long = [], (prompts[0] * 99)[:220]  # blocks of 128 tokens are kept
    for seed, noise, tied in ((0, 0.0, False), (1, 0.05, False), (1, 0.06, False), (2, 0.05, True)):
        model = model_of(seed, tokenizer, noise, tied)
        engines.update_weights(model)
        heard.append(said(engines.generate([*prompts, long], 1, 24)))
        sampler = common.TransformersSampler(engines.accelerator, model, tokenizer)
        assert heard[-1] == said(sampler.generate([*prompts, long], 1, 24))
    for one, other in itertools.pairwise(heard):
        assert sum(a != b for a, b in zip(one, other, strict=True)) >= 4, "stale ones would show"


def test_log_probabilities_are_the_trainers(engines, tokenizer, prompts):
    model = model_of(2, tokenizer, noise=0.03)
    engines.update_weights(model)
    found = engines.generate(prompts, 8, 20, range(6))
    for prompt, completions in zip(prompts, found, strict=True):
        examples = [common.Example(0, prompt, one.token_ids) for one in completions]
        with torch.no_grad():
            expected = common.log_probs(model, examples)
        assert [one.log_prob for one in completions] == pytest.approx(expected.tolist(), abs=1e-3)
        assert all(len(one.token_ids) == 20 or one.token_ids[-1] == 2 for one in completions)
        assert all(2 not in one.token_ids[:-1] for one in completions)


def test_samples_have_the_frequencies_of_p(engines, tokenizer, prompts):
    """The first token's: top-k, a nucleus or a temperature would show at once."""
    model, n = model_of(0, tokenizer), 8192
    engines.update_weights(model)
    (found,) = said(engines.generate(prompts[:1], n, 1, [7]))
    with torch.no_grad():
        p = model(torch.tensor(prompts[:1])).logits[0, -1].double().softmax(-1)
    expected = {(token,): chance for token, chance in enumerate(p.tolist())}
    assert len(found) == n and abs(z_of_chi_squared(Counter(found), expected)) < 5


def test_seeds_decide_what_is_drawn_and_nothing_is_drawn_twice(engines, tokenizer, prompts):
    """Twelve tokens of an untrained model: two samples agree once in 10^15 or so."""
    engines.update_weights(model_of(0, tokenizer))
    three = [prompts[0], prompts[1], prompts[0]]
    one, few, other = said(engines.generate(three, [600, 3, 600], 12, [5, 6, 5000]))
    assert [len(one), len(few), len(other)] == [600, 3, 600]  # in requests of 256, 256 and 88
    assert one == said(engines.generate(prompts[:1], 600, 12, [5]))[0]
    full = [ids for ids in one + other if len(ids) == 12]
    assert len(full) > 1000 and len(set(full)) == len(full)
    # Sample i is the first one of that seed plus i: why the seeds of two requests lie 256 apart.
    apart = said(engines.generate(prompts[:1] * 300, 1, 12, range(5, 305)))
    assert [[ids] for ids in one[:300]] == apart


def test_an_error_tells_what_was_waited_for_and_the_end_of_the_log(engines, prompts, monkeypatch):
    with pytest.raises(RuntimeError, match=r"trying.*no_such_method") as error:
        engines._ask("trying", "call_workers", "no_such_method")
    assert "engine-0.log" in str(error.value)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match=r"sampling.*timed out"):
        patch.setattr(engines, "limit_minutes", 1e-4)
        engines.generate(prompts, 64, 100, range(6))
    assert len(engines.generate(prompts, 1, 4)) == 6  # it lives on


# The hand-over, without a GPU


@pytest.mark.parametrize("chunk_bytes", [1, 60_000, 1 << 30])
def test_all_weights_are_sent_once_a_tied_head_included(chunk_bytes, tokenizer):
    model = model_of(0, tokenizer, tied=True)
    chunks = list(common.weight_chunks(model, torch.bfloat16, chunk_bytes))
    assert (len(chunks) > 2) == (chunk_bytes < 1 << 30)
    sent = dict(itertools.chain(*chunks))
    assert sum(len(chunk) for chunk in chunks) == len(sent)
    expected = {name: weight.bfloat16() for name, weight in model.state_dict().items()}
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= sent.keys()
    torch.testing.assert_close(sent, expected, rtol=0, atol=0)


# Two processes under ZeRO-3, until their engine is killed


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_two_processes_under_zero3_until_their_engine_is_killed(warm_start, tmp_path):
    """After updates from split weights, a tied head among them, the engine's log-probabilities are
    the trainer's. When it dies, the run ends with its last log lines and leaves no process."""
    checkpoint, data = warm_start
    flags = ["--model", checkpoint, "--data", data, "--engine", "vllm", "--zero", "3"]
    flags += ["--batch-size", "6", "--max-new-tokens", "40", "--epochs", "1000", "--lr", "0.005"]
    flags += ["--eval-problems", "0", "--warmup-steps", "0", "--out", tmp_path / "run"]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "train_grpo.py"]
    command = [sys.executable, *launcher, *map(str, flags)]
    metrics, log = tmp_path / "run/metrics.jsonl", tmp_path / "stderr"
    with log.open("w") as file:
        run = psutil.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=file)
    while not metrics.exists() or len(read_lines(metrics)) < 4:
        assert run.poll() is None, log.read_text()[-3000:]
        time.sleep(0.2)
    processes = run.children(recursive=True)
    (engine,) = [one for one in processes if one.name().startswith("ray::Engine")]
    engine.kill()
    _, alive = psutil.wait_procs([run, *processes], timeout=600)
    for process in alive:
        process.kill()
    assert run.returncode == 1 and not alive
    ratios = [step["engine_to_trainer"] for step in read_lines(metrics)]
    assert ratios == [pytest.approx(1, abs=1e-4)] * len(ratios)
    told = log.read_text().partition(f"--- the end of {tmp_path}/run/engine-0.log")[2]
    last_words = (tmp_path / "run/engine-0.log").read_text(errors="replace").splitlines()[-1]
    assert last_words and last_words[:300] in told
