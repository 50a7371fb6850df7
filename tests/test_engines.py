"""VLLMEngines: a real vLLM engine with a trainer's weights, and what happens when it is killed."""

import itertools
import os
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import ROOT
from small_runs import TINY_LLAMA, read_lines, refused
from test_sampling import said, z_of_chi_squared

import common


@pytest.fixture(scope="module")
def accelerator():
    return common.make_accelerator()


@pytest.fixture(scope="module")
def prompts(tokenizer):
    rows, config = (
        common.load_problems("examples/arithmetic", "train"),
        common.load_config(TINY_LLAMA),
    )
    examples, _ = common.encode(rows[:6], tokenizer, config, "cot")
    return [example.prompt_ids for example in examples]


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


def test_after_an_update_the_engine_says_what_the_trainer_says(
    engines, accelerator, tokenizer, prompts
):
    """Later updates meet an engine that has keys and values of earlier weights; a tied head."""
    heard, long = [], (prompts[0] * 99)[:220]  # blocks of 128 tokens are kept
    for seed, noise, tied in ((0, 0.0, False), (1, 0.05, False), (1, 0.06, False), (2, 0.05, True)):
        model = model_of(seed, tokenizer, noise, tied)
        engines.update_weights(model)
        heard.append(said(engines.generate([*prompts, long], 1, 24)))
        sampler = common.TransformersSampler(accelerator, model, tokenizer)
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
    together = engines.generate(
        [prompts[0], prompts[1], prompts[0]], [600, 3, 600], 12, [5, 6, 5000]
    )
    one, few, other = said(together)
    assert [len(one), len(few), len(other)] == [600, 3, 600]  # in requests of 256, 256 and 88
    assert one == said(engines.generate(prompts[:1], 600, 12, [5]))[0]
    full = [ids for ids in one + other if len(ids) == 12]
    assert len(full) > 1000 and len(set(full)) == len(full)
    # Sample i is the first one of that seed plus i: why the seeds of two requests lie 256 apart.
    apart = said(engines.generate(prompts[:1] * 300, 1, 12, range(5, 305)))
    assert [[ids] for ids in one[:300]] == apart


def test_an_error_tells_what_was_waited_for_and_the_end_of_the_log(engines, prompts, monkeypatch):
    with pytest.raises(
        RuntimeError, match=r"an engine failed while trying.*no_such_method"
    ) as error:
        engines._ask("trying", "call_workers", "no_such_method")
    assert "the end of" in str(error.value) and "engine-0.log" in str(error.value)
    monkeypatch.setattr(engines, "limit_minutes", 1e-4)
    with pytest.raises(RuntimeError, match=r"an engine failed while sampling.*timed out"):
        engines.generate(prompts, 64, 100, range(6))
    monkeypatch.undo()
    assert len(engines.generate(prompts, 1, 4)) == 6  # it lives on


# The hand-over, without a GPU


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("chunk_bytes", [1, 60_000, 1 << 30])
def test_all_weights_are_sent_once_a_tied_head_included(tied, chunk_bytes, accelerator, tokenizer):
    model = model_of(0, tokenizer, tied=tied)
    chunks = list(common.weight_chunks(model, torch.bfloat16, chunk_bytes))
    assert (len(chunks) > 2) == (chunk_bytes < 1 << 30)
    sent = dict(itertools.chain(*chunks))
    assert sum(len(chunk) for chunk in chunks) == len(sent)
    expected = {name: weight.bfloat16() for name, weight in model.state_dict().items()}
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(sent)
    torch.testing.assert_close(sent, expected, rtol=0, atol=0)
    pointers = {copy.data_ptr() for copy in sent.values()}
    assert len(pointers) == len(sent), "each copy has a storage of its own"


def test_on_gpus_each_engine_is_told_the_handles_of_all_processes(
    accelerator, tokenizer, monkeypatch
):
    """What vLLM's workers are called with, with a second process made up."""
    engines, calls = common.VLLMEngines.__new__(common.VLLMEngines), []
    engines.accelerator, engines.cuda, engines.dtype = accelerator, True, torch.bfloat16
    engines._ask = lambda doing, method, *inputs: calls.append(inputs)
    for name in ("synchronize", "ipc_collect"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-a")
    )
    monkeypatch.setattr(common, "reduce_tensor", lambda weight: (None, list(weight.shape)))

    def gather(mine):
        return mine + [[{"GPU-b": one["GPU-a"]} for one in mine[0]]]

    monkeypatch.setattr(common.accelerate.utils, "gather_object", gather)
    model = model_of(0, tokenizer)
    engines.update_weights(model)
    assert calls[0] == ("start_weight_update",) and calls[-1] == ("finish_weight_update",)
    ((method, info),) = calls[1:-1]
    shapes = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    assert method == "update_weights" and info["names"] == list(shapes)
    assert info["shapes"] == list(shapes.values())
    assert info["dtype_names"] == ["bfloat16"] * len(shapes)
    assert info["ipc_handles"] == [{"GPU-a": shape, "GPU-b": shape} for shape in shapes.values()]


def test_gpus_that_do_not_divide_into_engines_are_refused(tokenizer, capsys):
    accelerator = SimpleNamespace(device=torch.device("cuda"), num_processes=3)
    args = SimpleNamespace(out=ROOT, gpu_memory=0.3, gpus_per_engine=2)
    message = refused(
        capsys, common.VLLMEngines, args, accelerator, TINY_LLAMA, tokenizer, 256, "model"
    )
    assert "--gpus-per-engine 2 does not divide the 3 GPUs" in message


def test_without_vllm_a_checkpoint_is_sampled_by_transformers(accelerator, tokenizer, monkeypatch):
    monkeypatch.setattr(common, "find_spec", lambda name: None)
    args = SimpleNamespace(engine="auto")
    sampler = common.make_sampler(args, accelerator, TINY_LLAMA, tokenizer, 256)
    expected = common.TransformersSampler(accelerator, model_of(0, tokenizer), tokenizer)
    assert isinstance(sampler, common.TransformersSampler)
    assert said(sampler.generate([[5, 6]], 3, 5, [1])) == said(
        expected.generate([[5, 6]], 3, 5, [1])
    )


# Two processes under ZeRO-3, until their engine is killed


def family(mark):
    """The processes that have this mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TEST_RUN") == mark and process.status() != "zombie":
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_until(condition, seconds):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.2)
    return condition()


def test_two_processes_under_zero3_until_their_engine_is_killed(warm_start, tmp_path):
    """After updates from split weights, a tied head among them, the engine's log-probabilities are
    the trainer's. When it dies, the run ends with its last log lines and leaves no process."""
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    checkpoint, data = warm_start
    flags = ["--model", checkpoint, "--data", data, "--engine", "vllm", "--zero", "3"]
    flags += ["--batch-size", "6", "--max-new-tokens", "40", "--epochs", "1000", "--lr", "0.005"]
    flags += ["--eval-problems", "0", "--warmup-steps", "0", "--out", tmp_path / "run"]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "train_grpo.py"]
    mark, metrics = str(tmp_path), tmp_path / "run/metrics.jsonl"
    run = subprocess.Popen(
        [sys.executable, *launcher, *map(str, flags)],
        cwd=ROOT,
        env=os.environ | {"TEST_RUN": mark},
        stdout=subprocess.DEVNULL,
        stderr=(tmp_path / "stderr").open("w"),
    )

    def stepped():
        return run.poll() is not None or (metrics.exists() and len(read_lines(metrics)) >= 4)

    try:
        wait_until(stepped, 300)
        assert run.poll() is None, (tmp_path / "stderr").read_text()[-3000:]
        (engine,) = [one for one in family(mark) if one.name().startswith("ray::Engine")]
        engine.kill()
        assert run.wait(120) == 1
        assert wait_until(lambda: not family(mark), 120)
    finally:
        run.kill()
        for process in family(mark):
            process.kill()
    steps = read_lines(metrics)
    assert [step["engine_to_trainer"] for step in steps] == [pytest.approx(1, abs=1e-4)] * len(
        steps
    )
    stderr = (tmp_path / "stderr").read_text()
    assert "an engine failed while" in stderr
    told = stderr.partition(f"--- the end of {tmp_path}/run/engine-0.log")[2]
    last_words = (tmp_path / "run/engine-0.log").read_text(errors="replace").splitlines()[-1]
    assert last_words and last_words[:300] in told
