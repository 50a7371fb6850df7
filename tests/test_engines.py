"""The samplers: a real vLLM engine with a trainer's weights, what ends it, and sampling from the model itself."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections import Counter
from contextlib import suppress
from importlib.util import find_spec
from itertools import pairwise
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import ROOT, run_script
from injected import TINY, write
from safetensors.torch import load_file

import common


@pytest.fixture(scope="module")
def accelerator():
    return common.make_accelerator()


@pytest.fixture(scope="module")
def prompts(tokenizer):
    examples, _ = common.encode(common.load_problems("examples/arithmetic", "train")[:6], tokenizer, "cot", 999)
    return [example.prompt_ids for example in examples]


def model_of(seed, tokenizer, noise=0.0):
    model, _ = common.load_model(TINY, tokenizer, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight += noise * torch.randn(weight.shape, generator=generator)
    return model.eval()


def said(found):
    return [[one.token_ids for one in completions] for completions in found]


# vLLM with the trainer's weights


def test_after_an_update_the_engine_says_what_the_trainer_says(engines, accelerator, tokenizer, prompts):
    """Two updates, so that the second meets an engine that has sampled, and has keys and values of the first's."""
    heard = []
    for model in (model_of(0, tokenizer), model_of(1, tokenizer, noise=0.05), model_of(1, tokenizer, noise=0.06)):
        engines.update_weights(model)
        heard.append(said(engines.generate(prompts, 1, 24)))
        assert heard[-1] == said(common.LiveModel(accelerator, model, tokenizer).generate(prompts, 1, 24))
        assert heard[-1] == common.generate(model, tokenizer, prompts, 1, 24, None)
    for one, other in pairwise(heard):
        assert sum(a != b for a, b in zip(one, other, strict=True)) >= 4, "stale weights would not show"


def test_log_probabilities_are_the_trainers(engines, tokenizer, prompts):
    model = model_of(2, tokenizer, noise=0.03)
    engines.update_weights(model)
    found = engines.generate(prompts, 8, 20, [256 * i for i in range(len(prompts))])
    for prompt, completions in zip(prompts, found, strict=True):
        batch = common.collate([common.Example(0, prompt, one.token_ids) for one in completions], 0)
        with torch.no_grad():
            expected = common.completion_log_probs(model, batch)
        assert [one.log_prob for one in completions] == pytest.approx(expected.tolist(), abs=1e-3)
        assert all(len(one.token_ids) == 20 or one.token_ids[-1] == 2 for one in completions)
        assert all(2 not in one.token_ids[:-1] for one in completions)


@pytest.mark.parametrize("tied", [False, True])
def test_all_weights_are_sent_a_tied_head_included(tied, accelerator, tokenizer):
    """An engine keeps a head of its own even where the configuration ties it, and would go on with the old one."""
    config = common.load_config(TINY)
    config.tie_word_embeddings = tied
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(config)
    assert ("lm_head.weight" in dict(model.named_parameters())) != tied
    engines = common.VLLMEngines.__new__(common.VLLMEngines)
    engines.accelerator, engines.cuda, engines._meet = accelerator, False, lambda handles: None
    engines._connect(model)
    sent = [(name, tuple(shape)) for chunk in engines.layout for name, shape, _, _ in chunk]
    assert sent == [(name, tuple(weight.shape)) for name, weight in model.state_dict().items()]
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= {name for name, _ in sent}


def test_weights_that_do_not_fit_the_buffer_at_once_go_in_chunks_that_overlap_nowhere(accelerator, monkeypatch):
    weights = {"a": (1 << 26, 3), "b": (1 << 26, 1), "c": (1 << 26, 2), "d": (1 << 28, 1), "e": (5,)}
    engines = common.VLLMEngines.__new__(common.VLLMEngines)
    engines.accelerator, engines.cuda, engines._meet = accelerator, False, lambda handles: None
    model = SimpleNamespace(state_dict=lambda keep_vars: {n: torch.empty(s, device="meta") for n, s in weights.items()})
    monkeypatch.setattr(accelerator, "unwrap_model", lambda model: model)
    engines._connect(model)  # the buffer of 1 GiB is never touched, so it takes no memory
    assert [[name for name, *_ in chunk] for chunk in engines.layout] == [["a", "b"], ["c"], ["d"], ["e"]]
    for chunk in engines.layout:
        end = 0
        for name, shape, first, last in chunk:
            assert (first, last, shape) == (end, end + torch.Size(shape).numel(), weights[name])
            end = last
        assert end <= len(engines.buffer) == 1 << 28


def test_samples_have_the_frequencies_of_p(engines, tokenizer, prompts):
    """The first token's, over all of the vocabulary: top-k, a temperature or a nucleus would show at once."""
    model, n = model_of(0, tokenizer), 8192
    engines.update_weights(model)
    (found,) = engines.generate(prompts[:1], n, 1, [7])
    drawn = Counter(one.token_ids[0] for one in found)
    with torch.no_grad():
        p = model(torch.tensor(prompts[:1])).logits[0, -1].double().softmax(-1)
    assert p.max() < 0.2 and len(p) == 118
    cells, pooled = [], [0, 0.0]
    for token, expected in enumerate((n * p).tolist()):
        if expected >= 5:
            cells.append((drawn[token], expected))
        else:
            pooled = [pooled[0] + drawn[token], pooled[1] + expected]
    cells += [tuple(pooled)] if pooled[1] else []
    assert len(cells) > 80 and sum(count for count, _ in cells) == n
    chi2 = torch.tensor(sum((count - expected) ** 2 / expected for count, expected in cells), dtype=torch.float64)
    p_value = torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2, dtype=torch.float64), chi2 / 2).item()
    assert 0.001 < p_value < 0.9999, (chi2, len(cells))  # above: more even than chance allows


def repetitions(completions, length):
    """How many of the completions that reached `length` are there twice, and how many those are."""
    full = [tuple(one.token_ids) for one in completions if len(one.token_ids) == length]
    return len(full) - len(set(full)), len(full)


def test_seeds_decide_what_is_drawn_and_nothing_is_drawn_twice(engines, tokenizer, prompts):
    """Twelve tokens of an untrained model: two samples agree once in 10^15 or so, unless they share a seed."""
    engines.update_weights(model_of(0, tokenizer))
    one, again, other = (said(engines.generate(prompts[:1], 600, 12, [seed]))[0] for seed in (5, 5, 5000))
    assert len(one) == len(other) == 600  # in pieces of 256, 256 and 88
    assert one == again and one != other
    (many,) = engines.generate(prompts[:1], 1024, 12, [123456])
    together = [common.Completion(ids, None) for ids in one + other] + many
    repeated, full = repetitions(together, 12)
    assert len(many) == 1024 and full > 1500 and repeated == 0


def test_sample_i_of_a_seed_is_the_first_of_that_seed_plus_i(engines, tokenizer, prompts):
    """Why the seeds of two pieces lie 256 apart, and why `seed_of` has to be far from its neighbours."""
    engines.update_weights(model_of(0, tokenizer))
    together = said(engines.generate(prompts[:1], 300, 12, [1000]))[0]
    apart = said(engines.generate(prompts[:1] * 300, 1, 12, list(range(1000, 1300))))
    assert [[one] for one in together] == apart


def test_waiting_has_a_limit_and_says_what_it_waited_for(engines, monkeypatch, prompts):
    import ray

    monkeypatch.setattr(engines, "patience_minutes", 1e-4)
    with pytest.raises(RuntimeError, match=r"no answer of the engines within 0\.0001 minutes while sampling") as error:
        engines.generate(prompts, 64, 100, list(range(6)))
    assert "--- the end of" in str(error.value) and "engine-0.log" in str(error.value)
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match=r"an engine failed while being asked.*no_such_method"):
        engines._wait([engines.engines[0].ask.remote("no_such_method")], "being asked")
    assert ray.get(engines.engines[0].ask.remote("gpu")) == [None]  # neither has ended it


def test_two_processes_with_split_weights_and_a_tied_head(tmp_path, tokenizer):
    """ZeRO-3: the main process has no weight whole, and both processes have to be given all completions."""
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    config = common.load_config(TINY)
    config.tie_word_embeddings = True
    config.save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    run_script("tests/engines_on_two.py", tmp_path / "tied", tmp_path, processes=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and first["split"]
    assert first["stale"] == first["before"] != first["engine"]  # without an update the engine says the old
    assert first["engine"] == first["live"]
    assert first["log_probs"] == pytest.approx(first["trainers"], abs=1e-3)
    assert [len(found) for found in first["live_sampled"]] == [6] * 6
    assert len({tuple(one) for found in first["live_sampled"] for one in found}) > 30


def test_an_error_while_weights_arrive_is_told_at_once(engines, tokenizer):
    """The engine lives on, so that its connection has to be closed, or the trainer would wait for an hour."""
    model = model_of(0, tokenizer)
    layout = engines.layout
    engines.layout = [[("no.such.weight", (8,), 0, 8)]]
    engines.buffer[:8] = 0
    model.state_dict = lambda keep_vars: {"no.such.weight": torch.zeros(8)}
    try:
        with pytest.raises(RuntimeError, match="an engine failed while taking over weights"):
            engines.update_weights(model)
    finally:
        engines.layout = layout
        engines._connect(model_of(0, tokenizer))  # a new connection, over which the next tests go on


# What ends a run ends its engines


def begin(out, flags):
    """Start tests/announcing.py on train_grpo.py, as a terminal would."""
    out.mkdir(exist_ok=True)
    mark = uuid.uuid4().hex
    process = subprocess.Popen(
        [sys.executable, "tests/announcing.py", *map(str, flags), "--out", str(out / "run")],
        cwd=ROOT,
        env={**os.environ, "DCO_TEST_RUN": mark},
        stdout=(out / "stdout").open("w"),
        stderr=(out / "stderr").open("w"),
        start_new_session=True,  # a process group of its own, as a terminal gives one
        # Of a shell's background job, Ctrl-C would be ignored, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    process.mark, process.out, process.family = mark, out, set()
    return process


def family(process):
    """All that a run has started, by descent and by the variable in their environment."""
    return set(psutil.Process(process.pid).children(recursive=True)) | family_by_mark(process.mark)


def family_by_mark(mark):
    found = set()
    for other in psutil.process_iter():
        try:
            found |= {other} if other.environ().get("DCO_TEST_RUN") == mark else set()
        except psutil.Error:
            continue
    return found


def left(processes, seconds=20):
    """Which of them live on after a while."""
    until = time.monotonic() + seconds
    while True:
        alive = []
        for process in processes:
            try:
                alive += [process] if process.is_running() and process.status() != psutil.STATUS_ZOMBIE else []
            except psutil.NoSuchProcess:
                continue
        if not alive or time.monotonic() > until:
            return alive
        time.sleep(0.2)


@pytest.fixture(scope="module")
def runs_in_the_middle_of_sampling(tmp_path_factory):
    """Runs of train_grpo.py, side by side to save time, whose engines have minutes of sampling to do."""
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    folder, runs = tmp_path_factory.mktemp("ended"), {}
    flags = [
        "--engine",
        "vllm",
        "--template",
        "r1-short",
        "--rollouts",
        "256",
        "--max-new-tokens",
        "1900",
        "--eval-problems",
        "0",
        "--grace",
        "1",
    ]
    try:
        for how in ("killed engine", "Ctrl-C", "SIGTERM", "SIGKILL"):
            runs[how] = begin(folder / how.replace(" ", "-"), flags)
        for process in runs.values():
            until = time.monotonic() + 150
            while "waiting: sampling" not in (process.out / "stdout").read_text():
                assert process.poll() is None and time.monotonic() < until, (process.out / "stderr").read_text()[-3000:]
                time.sleep(0.2)
            process.family = family(process)
        yield runs
    finally:
        for process in runs.values():
            if process.poll() is None:
                process.family |= family(process)
                process.kill()
                process.wait()
            for one in left(process.family, 0):
                one.kill()


@pytest.mark.parametrize("how", ["killed engine", "Ctrl-C", "SIGTERM", "SIGKILL"])
def test_what_ends_a_run_ends_its_engines(how, runs_in_the_middle_of_sampling):
    process = runs_in_the_middle_of_sampling[how]
    called = {}
    for one in process.family:
        with suppress(psutil.NoSuchProcess):  # some of Ray's come and go
            called[one] = " ".join(one.cmdline())
    assert all(any(name in line for line in called.values()) for name in ("raylet", "gcs_server", "ray::Engine"))
    if how == "killed engine":
        (engine,) = [one for one, line in called.items() if "ray::Engine" in line]
        engine.kill()
    elif how == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
    elif how == "SIGTERM":
        process.terminate()
    else:
        process.kill()
    code, name = process.wait(60), {"Ctrl-C": "SIGINT"}.get(how, how)
    stderr = (process.out / "stderr").read_text()
    assert code == {"killed engine": 1, "Ctrl-C": 130, "SIGTERM": 143, "SIGKILL": -9}[how], stderr[-3000:]
    if how in ("Ctrl-C", "SIGTERM"):
        told = f"stopped by {name}: step 1 took more than --grace and was abandoned; no state was written so far"
        assert stderr.count(told) == 1
    if how == "killed engine":
        assert stderr.count("no state was written so far. The same command with --resume goes on from there") == 1
        assert "an engine failed while sampling" in stderr
        after = stderr.partition(f"--- the end of {process.out}/run/engine-0.log")[2].splitlines()
        last_words = (process.out / "run/engine-0.log").read_text(errors="replace").splitlines()[-1]
        assert last_words and last_words[:300] in after
    if how == "SIGKILL":  # Ray's agents look once a minute whether their raylet lives: see below
        process.family = {one for one in called if "Agent" not in called[one]}
    assert left(process.family) == []


# A run with engines goes on


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    """-> flags of a short run of train_grpo.py, from a checkpoint that has learnt the format."""
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    folder = tmp_path_factory.mktemp("warm")
    rows = [
        {"problem": f"{a}+{b}=", "answer": str(a + b), "solution": f"{a}+{b}={a + b}"}
        for a in range(9)
        for b in range(9)
    ]
    often, data = write(folder / "often", rows * 30), write(folder / "data", rows)
    flags = ["--model", TINY, "--data", often, "--template", "r1-short", "--n-prime", 1, "--lr", 0.01, "--epochs", 1]
    flags += ["--warmup-steps", 10, "--batch-size", 36, "--micro-batch-size", 36, "--nll", "mean", "--eval-problems", 0]
    run_script("train_cot_dcoa.py", *flags, "--engine", "transformers", "--out", folder / "run")
    flags = ["--model", folder / "run/epoch-1", "--data", data, "--engine", "vllm", "--batch-size", 4, "--rollouts", 8]
    flags += ["--max-new-tokens", 40, "--epochs", 9, "--max-steps", 8, "--eval-problems", 0, "--lr", 0.001]
    return [*flags, "--grace", 60, "--save-every", 2]


def steps_of(process):
    path = process.out / "run/metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def reach(process, step):
    """Wait until it samples for the step after this one."""
    until = time.monotonic() + 150
    while steps_of(process) < step or not (process.out / "stdout").read_text().endswith("waiting: sampling\n"):
        assert process.poll() is None and time.monotonic() < until, (process.out / "stderr").read_text()[-3000:]
        time.sleep(0.02)
    process.family = family(process)


def exact(run):
    """metrics.jsonl without times and without what only the engine's own floats enter."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: line[name] for name in line if "second" not in name and name != "engine_to_trainer"} for line in lines
    ]


@pytest.fixture(scope="module")
def interrupted(warm, tmp_path_factory):
    """One run that is let through; and one that gets Ctrl-C in its third step, goes on, loses its engine, goes on."""
    folder = tmp_path_factory.mktemp("goes-on")
    whole, broken = folder / "whole", folder / "broken"
    processes, found = [begin(whole, warm), begin(broken, warm)], {"whole": whole / "run", "broken": broken / "run"}
    try:
        reach(processes[1], 2)
        os.killpg(processes[1].pid, signal.SIGINT)
        code = processes[1].wait(90)
        found["Ctrl-C"] = code, (broken / "stderr").read_text(), left(processes[1].family), exact(broken / "run")
        assert processes[0].wait(150) == 0, (whole / "stderr").read_text()[-3000:]

        processes.append(begin(broken, [*warm, "--resume"]))
        reach(processes[2], 5)
        (engine,) = [one for one in processes[2].family if "ray::Engine" in " ".join(one.cmdline())]
        engine.kill()
        code = processes[2].wait(90)
        found["killed"] = code, (broken / "stderr").read_text(), left(processes[2].family), exact(broken / "run")
        found["states"] = [path.name for path in (broken / "run/state").iterdir()]

        processes.append(begin(broken, [*warm, "--resume"]))
        assert processes[3].wait(150) == 0, (broken / "stderr").read_text()[-3000:]
        found["resumed"] = (broken / "stdout").read_text()
        yield found
    finally:
        for process in processes:
            if process.poll() is None:
                process.family |= family(process)
                process.kill()
                process.wait()
            for one in left(process.family, 0):
                one.kill()


def test_ctrl_c_lets_the_step_end_which_its_engine_and_graders_survive(interrupted):
    code, stderr, alive, steps = interrupted["Ctrl-C"]
    assert code == 130, stderr[-3000:]
    (step,) = re.findall(r"stopped by SIGINT after step (\d+); the last state is \S+/state/step-(\d+)\.", stderr)
    assert step[0] == step[1] == str(len(steps)) and 3 <= len(steps) < 8
    assert alive == [] and "Traceback" not in stderr


def test_a_killed_engine_leaves_a_state_to_go_on_from(interrupted):
    code, stderr, alive, steps = interrupted["killed"]
    assert code == 1 and alive == [] and "an engine failed while sampling" in stderr
    last = max(int(name.removeprefix("step-")) for name in interrupted["states"] if name.startswith("step-"))
    assert f"the last state is {interrupted['broken']}/state/step-{last}. The same command" in stderr
    assert 0 <= len(steps) - last < 2 and len(steps) < 8
    assert f"resuming from {interrupted['broken']}/state/step-{last}\n" in interrupted["resumed"]


def test_a_run_that_was_ended_twice_is_the_run_that_was_not(interrupted):
    """Its engines had to have the state's weights before they sampled for the first time."""
    whole, broken = interrupted["whole"], interrupted["broken"]
    assert exact(broken) == exact(whole) and len(exact(whole)) == 8
    one, other = (load_file(run / "step-8/model.safetensors") for run in (whole, broken))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_nothing_is_left_of_a_run_that_was_killed(runs_in_the_middle_of_sampling):
    process = runs_in_the_middle_of_sampling["SIGKILL"]
    assert process.wait(60) == -9 and left(family_by_mark(process.mark), 90) == []


# Sampling from the model itself


def test_live_model_without_seeds_is_greedy(accelerator, tokenizer, prompts):
    model = model_of(0, tokenizer)
    found = said(common.LiveModel(accelerator, model, tokenizer).generate(prompts, 1, 12))
    for prompt, (ids,) in zip(prompts, found, strict=True):
        expected = []
        while len(expected) < 12 and 2 not in expected:  # one token at a time, without a cache
            with torch.no_grad():
                expected.append(model(torch.tensor([prompt + expected])).logits[0, -1].argmax().item())
        assert ids == expected


def test_live_model_draws_more_than_fit_at_once_none_of_them_twice(accelerator, tokenizer, prompts):
    live = common.LiveModel(accelerator, model_of(0, tokenizer), tokenizer, sequences=5)
    found = live.generate(prompts, 13, 12, [1000 * i for i in range(len(prompts))])
    assert [len(completions) for completions in found] == [13] * len(prompts)
    repeated, full = repetitions([one for completions in found for one in completions], 12)
    assert repeated == 0 and full > 50
    assert said(found) == said(live.generate(prompts, 13, 12, [1000 * i for i in range(len(prompts))]))
    assert said(found) != said(live.generate(prompts, 13, 12, [1000 * i + 500 for i in range(len(prompts))]))


@pytest.mark.parametrize("training", [True, False])
def test_live_model_leaves_the_trainer_as_it_was(training, accelerator, tokenizer, prompts):
    model = model_of(0, tokenizer).train(training)
    torch.manual_seed(3)
    before, weights = torch.get_rng_state(), {name: w.clone() for name, w in model.state_dict().items()}
    for seeds in ([1] * len(prompts), None):
        common.LiveModel(accelerator, model, tokenizer).generate(prompts, 1, 4, seeds)
    assert model.training is training and torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(weights[name], w) for name, w in model.state_dict().items())


def test_engines_in_a_cluster_that_was_there_before_and_stays(tmp_path):
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    settings = os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": f"127.0.0.1:{port}"}
    start = ["start", "--head", "--block", "--port", port, "--num-cpus", 2, "--include-dashboard", "false"]
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    quiet = {"env": settings, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    cluster = subprocess.Popen([*ray, *map(str, start)], start_new_session=True, **quiet)
    try:
        until = time.monotonic() + 60
        while subprocess.run([*ray, "health-check", "--address", settings["RAY_ADDRESS"]], **quiet).returncode:
            assert cluster.poll() is None and time.monotonic() < until
        flags = ["--n-mc", 4, "--max-steps", 2, "--eval-problems", 0, "--engine", "vllm", "--out", tmp_path / "run"]
        run_script("train_cot_dcoa.py", *flags, RAY_ADDRESS=settings["RAY_ADDRESS"], RAY_AUTH_MODE="disabled")
        steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
        assert [step["sampling_calls"] > 0 for step in steps] == [True, True]
        inside = psutil.Process(cluster.pid).children(recursive=True)
        called = [" ".join(one.cmdline()) for one in inside if one.is_running()]
        assert cluster.poll() is None and any("raylet" in line for line in called), (
            "the cluster is not the run's to end"
        )
        assert not any("ray::Engine" in line for line in called)
    finally:
        everything = psutil.Process(cluster.pid).children(recursive=True)
        cluster.terminate()
        cluster.wait(30)
        for one in left(everything, 5):
            one.kill()


def test_engines_that_went_with_ray_are_not_ended_by_starting_it_again():
    """One that failed to start is ended at exit, when others may have taken Ray down: ray.kill would wait for a new."""
    asked = []
    gone = common.VLLMEngines.__new__(common.VLLMEngines)
    gone.engines = ["one"]
    gone.ray = SimpleNamespace(is_initialized=lambda: False, kill=asked.append, shutdown=lambda: asked.append("down"))
    gone.shut_down()
    assert asked == [] and gone.engines == []
    gone.engines, gone.ray.is_initialized = ["one"], lambda: True
    gone.shut_down()
    gone.shut_down()
    assert asked == ["one", "down"]
