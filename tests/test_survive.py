"""What ends a training run before its time, and what --resume makes of it: the run that nothing had ended."""

import json
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import accelerate.utils.other
import psutil
import pytest
import struck
import torch
from conftest import ROOT
from injected import write
from safetensors.torch import load_file
from test_engines import left
from test_train_lean_step import proofs

import common
import train_direct

TOLD = "The same command with --resume goes on from there"


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


class Server:
    """Starts runs by forking a process that has imported everything: they take no longer than their training does."""

    def __init__(self):
        reading, writing = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "tests/struck.py"],
            cwd=ROOT,
            env={**os.environ, "ANSWERS": str(writing), "DS_ACCELERATOR": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            pass_fds=[writing],
            text=True,
        )
        os.close(writing)
        self.answers = os.fdopen(reading)

    def ask(self, what):
        print(json.dumps(what), file=self.process.stdin, flush=True)
        return json.loads(self.answers.readline())

    def start(self, *arguments, processes=1, strike=None, rank=0):
        return Run(self, [str(argument) for argument in arguments], processes, strike, rank)


class Run:
    def __init__(self, server, arguments, processes, strike, rank):
        self.server, self.out = server, Path(arguments[arguments.index("--out") + 1])
        self.out.parent.mkdir(exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix="said-", dir=self.out.parent))
        environment = {"STRIKE": strike, "STRIKE_RANK": str(rank)} if strike else {}
        if processes > 1:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self.pids = []
        for i in range(processes):
            if processes > 1:
                environment |= {"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(processes)}
            asked = {"arguments": arguments, "environment": environment, "folder": str(self.folder)}
            self.pids.append(server.ask(asked))

    def codes(self):
        ended = self.server.ask(None)
        return [ended.get(str(pid)) for pid in self.pids]

    def wait(self, *codes, seconds=90):
        """Until all have ended, with these exit codes."""
        until = time.monotonic() + seconds
        while None in (found := self.codes()):
            assert time.monotonic() < until, f"{found} after {seconds} seconds\n{self.stderr[-4000:]}"
            time.sleep(0.02)
        self.ended = time.monotonic()
        assert tuple(found) == codes, f"{found}, not {codes}\n{self.stdout}\n{self.stderr[-4000:]}"
        return self

    def kill(self):
        for pid in self.pids:
            psutil.Process(pid).kill()

    @property
    def stdout(self):
        return (self.folder / "stdout").read_text()

    @property
    def stderr(self):
        return (self.folder / "stderr").read_text()

    @property
    def began_at(self):
        """The step that it was resumed after; 0 for a run from the beginning."""
        found = re.search(r"^resuming from .*/step-(\d+)$", self.stdout, re.MULTILINE)
        return int(found[1]) if found else 0

    @property
    def left(self):
        """Its processes that live on: each run has a session of its own."""
        return left([one for one in psutil.process_iter() if session(one) in self.pids])


def session(process):
    with suppress(ProcessLookupError):
        return os.getsid(process.pid)


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    for child in psutil.Process(server.process.pid).children(recursive=True):
        child.kill()
    server.process.kill()
    server.process.wait()


def states(out):
    return sorted(int(path.parent.name[5:]) for path in out.glob("state/step-*[0-9]/place.json"))


def last_step(out):
    """Of the whole lines, while the run may be writing."""
    path = out / "metrics.jsonl"
    lines = path.read_text().rpartition("\n")[0].splitlines() if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else 0


def without_times(path):
    return [
        {name: line[name] for name in line if not re.match("seconds|tokens_per_second", name)} for line in read(path)
    ]


def assert_same_run(out, reference, close=None):
    """The same checkpoints and metrics, to the last bit; close: or as close as that."""
    weights = [path.relative_to(reference) for path in reference.glob("*/model.safetensors")]
    assert weights and sorted(weights) == sorted(path.relative_to(out) for path in out.glob("*/model.safetensors"))
    for path in weights:
        assert (out / path).with_name("dco.json").read_text() == (reference / path).with_name("dco.json").read_text()
        if close is None:
            assert (out / path).read_bytes() == (reference / path).read_bytes(), path
        mine, theirs = load_file(out / path), load_file(reference / path)
        torch.testing.assert_close(mine, theirs, atol=close or 0, rtol=0)
    for name in ("metrics.jsonl", "epochs.jsonl"):
        mine, theirs = without_times(out / name), without_times(reference / name)
        assert len(mine) == len(theirs) > 0
        if close is None:
            assert mine == theirs
            continue
        for one, other in zip(mine, theirs, strict=True):
            assert one == {field: pytest.approx(other[field], rel=close, abs=close) for field in other}
    assert not [*out.rglob("*.partial")] and len(states(out)) == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("survive")


@pytest.fixture(scope="module")
def sums(folder):
    """The first problems of the embedded data."""
    of_split = {split: read(ROOT / f"examples/arithmetic/{split}.jsonl") for split in ("train", "test")}
    return write(folder / "sums", of_split["train"][:300], of_split["test"][:16])


@pytest.fixture(scope="module")
def direct(sums):
    """A run of one process: up to 9 steps an epoch, a few examples are carried over to the next one."""
    flags = ["--n-prime", 64, "--factor-threshold", 0.8, "--epochs", 5, "--checkpoint-at", 0.5]
    return ["train_direct", *flags, "--save-every", 4, "--data", sums]


@pytest.fixture(scope="module")
def reference(server, direct, folder):
    run = server.start(*direct, "--out", folder / "reference").wait(0)
    assert not run.began_at and TOLD not in run.stderr
    assert any(line["carried_over"] for line in read(run.out / "epochs.jsonl"))
    assert {path.name for path in run.out.glob("epoch-*")} == {f"epoch-{i}" for i in (0.5, 1, 2, 3, 4, 5)}
    shares = [step["accepted"] / step["candidates"] for step in read(run.out / "metrics.jsonl")]
    assert min(shares) < 2 / 3 < max(shares), "both ways of computing"
    return run.out


def resume(server, arguments, out, **more):
    """To the end. -> the run."""
    processes = more.get("processes", 1)
    run = server.start(*arguments, "--out", out, "--resume", **more).wait(*[0] * processes)
    assert TOLD not in run.stderr
    return run


def killed_at_random(server, arguments, out, kills, seed, steps=(3, 6)):
    """Each time after some more steps, and then at any instant within the next two or three."""
    chance = random.Random(seed)
    for i in range(kills):
        before, kept = last_step(out), states(out)
        run = server.start(*arguments, "--out", out, "--resume")
        wanted, until = before + chance.randint(*steps), time.monotonic() + 60
        while last_step(out) < wanted:
            assert run.codes() == [None] and time.monotonic() < until, run.stderr
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))
        family = [one for one in psutil.process_iter() if session(one) == run.pids[0]]
        run.kill()
        run.wait(-signal.SIGKILL)
        assert run.began_at == (kept[-1] if kept else 0) and last_step(out) >= wanted
        assert left(family) == []
        yield i, family
    assert states(out)


# One process, killed


# Where a run is killed, and at the how manieth passage; each time it is resumed, and gets somewhat further.
KILLS = {
    "before args.json": 1,
    "after args.json": 1,
    "step": 3,
    "first file of a state": 1,
    "half a line of metrics": 6,
    "metrics being cut": 1,
    "metrics cut but not epochs": 1,
    "weights of a checkpoint": 1,
    "pickle of a state": 1,
    "half of the older state removed": 1,
    "before a checkpoint": 1,
    "before a checkpoint's renaming": 1,
    "after a checkpoint's renaming": 1,
    "evaluation": 1,
    "half a line of epochs": 1,
    "after a line of epochs": 1,
    "after a step": 2,
    "before a state": 2,
    "before a state's renaming": 1,
    "after a state's renaming": 1,
    "after a line of metrics": 3,
    "end": 1,
}


def test_a_run_killed_at_each_point_in_turn_ends_as_one_that_went_through(server, direct, reference, folder, launched):
    assert KILLS.keys() == struck.POINTS.keys()
    out, began = folder / "each-point", []
    for point, count in KILLS.items():
        kept = states(out)
        run = server.start(*direct, "--out", out, "--resume", strike=f"kill, {point}, {count}").wait(-signal.SIGKILL)
        assert f"struck by kill: {point}" in run.stderr
        assert run.began_at == (kept[-1] if kept else 0)
        began.append(run.began_at)
    assert began == sorted(began) and len(set(began)) > 5
    assert resume(server, direct, out).began_at == last_step(reference)
    assert_same_run(out, reference)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_killed_at_random_ends_as_one_that_went_through(seed, server, direct, reference, folder):
    out = folder / f"random-{seed}"
    for _ in killed_at_random(server, direct, out, 6, seed, steps=(1, 4)):
        pass
    assert resume(server, direct, out).began_at >= 4
    assert_same_run(out, reference)


@pytest.mark.parametrize("level", [["--n-eff", 8], ["--level", "proof", "--n-prime", 200000]], ids=["step", "proof"])
def test_steps_and_proofs_go_on_as_if_nothing_had_been(level, server, folder):
    data = folder / "proofs"
    data.mkdir(exist_ok=True)
    for split, count in (("train", 60), ("val", 8)):
        (data / f"{split}.json").write_text(json.dumps(proofs(count)))
    arguments = ["train_lean_step", "--model", "examples/tiny_llama", *level, "--data", data, "--epochs", 3]
    arguments += ["--batch-size", 8, "--save-every", 3]
    one, out = folder / f"{level[1]}-one", folder / f"{level[1]}-killed"
    beside = server.start(*arguments, "--out", one)
    for _ in killed_at_random(server, arguments, out, 2, 0):
        pass
    server.start(*arguments, "--out", out, "--resume", strike="kill, pickle of a state, 2").wait(-signal.SIGKILL)
    assert resume(server, arguments, out).began_at >= 3
    beside.wait(0)
    assert_same_run(out, one)


def test_a_tied_head_goes_on_as_if_nothing_had_been_and_is_not_warned_of(sums, server, folder):
    model = shutil.copytree(ROOT / "examples/tiny_llama", folder / "tied-llama")
    config = json.loads((model / "config.json").read_text()) | {"tie_word_embeddings": True}
    (model / "config.json").write_text(json.dumps(config))
    arguments = ["train_direct", "--model", model, "--batch-size", 16, "--n-prime", 64, "--epochs", 1]
    arguments += ["--data", sums, "--save-every", 4]
    one = server.start(*arguments, "--out", folder / "tied-one").wait(0)
    assert "lm_head.weight" not in load_file(one.out / "epoch-1/model.safetensors")
    assert "shared tensor" not in one.stderr
    out = folder / "tied-killed"
    server.start(*arguments, "--out", out, strike="kill, after a state's renaming, 2").wait(-signal.SIGKILL)
    assert resume(server, arguments, out).began_at == 8
    assert_same_run(out, one.out)


@pytest.fixture(scope="module")
def coins(server, folder):
    """-> data whose answers nobody can know, so that some samples are right; a model that has learned to guess."""
    chance = random.Random(0)
    rows = [{"problem": f"{10 + i % 80}+{i // 80}=", "answer": str(chance.randrange(2))} for i in range(200)]
    rows = [row | {"solution": f"\\boxed{{{row['answer']}}}"} for row in rows]
    model = folder / "guesses"
    flags = ["--template", "cot", "--n-prime", 1, "--epochs", 6, "--data", write(folder / "many", rows, rows[:4])]
    server.start("train_direct", *flags, "--out", model).wait(0)
    return write(folder / "coins", rows[:60], rows[:4]), model / "epoch-6"


@pytest.mark.parametrize(
    "script, flags, stop, code",
    [
        ("train_cot_dcoa", ["--n-mc", 8, "--n-prime", 8], "SIGTERM", 128 + signal.SIGTERM),
        ("train_grpo", ["--rollouts", 4], "Ctrl-C", 128 + signal.SIGINT),
    ],
)
def test_runs_that_sample_and_grade_go_on_as_if_nothing_had_been(script, flags, stop, code, coins, server, folder):
    data, model = coins
    arguments = [script, *flags, "--data", data, "--model", model, "--engine", "transformers", "--max-new-tokens", 12]
    arguments += ["--eval-problems", 2, "--eval-n", 4, "--batch-size", 4, "--epochs", 2, "--save-every", 3]
    arguments += ["--lr", 1e-4]
    one, out = folder / f"{script}-one", folder / f"{script}-killed"
    beside = server.start(*arguments, "--out", one)
    for _, family in killed_at_random(server, arguments, out, 1, 1):
        assert len(family) > 2, "the grading processes"
    stopped = server.start(*arguments, "--out", out, "--resume", strike=f"{stop}, step, 2").wait(code)
    assert stopped.began_at >= 3 and stopped.stderr.count(TOLD) == 1 and stopped.left == []
    assert "Traceback" not in stopped.stderr
    assert resume(server, arguments, out).left == []
    assert beside.wait(0).left == []
    assert_same_run(out, one)
    steps = read(one / "metrics.jsonl")
    assert sum(step["candidates"] for step in steps) > sum(step["accepted"] for step in steps)


# One process, signals


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_lets_the_step_end_and_saves(name, server, direct, reference, folder):
    out = folder / name
    run = server.start(*direct, "--out", out, strike=f"{name}, step, 6").wait(128 + signal.Signals[name])
    assert f"stopped by {name} after step 6; the last state is {out}/state/step-6. {TOLD}" in run.stderr
    assert run.stderr.count(TOLD) == 1 and "Traceback" not in run.stderr
    assert last_step(out) == 6 and states(out) == [6]
    assert resume(server, direct, out).began_at == 6
    assert_same_run(out, reference)


@pytest.fixture(scope="module")
def long_steps(server, direct, folder):
    """Runs that are told to stop in a step or an evaluation that does not end; side by side, since they wait."""
    runs = {}
    for what, grace, strike in (
        ("evaluation", 60, "SIGTERM and a slow step, evaluation, 1"),
        ("slow", 1, "SIGTERM and a slow step, step, 6"),
        ("stuck", 1, "SIGTERM and a stuck step, step, 6"),
    ):
        runs[what] = server.start(*direct, "--grace", grace, "--out", folder / what, strike=strike)
    for run in runs.values():
        run.wait(128 + signal.SIGTERM)
    return runs


@pytest.mark.parametrize("what, seconds", [("evaluation", 20), ("slow", 20), ("stuck", 30)])
def test_a_signal_does_not_wait_for_a_step_that_takes_too_long(what, seconds, long_steps, server, direct, reference):
    run = long_steps[what]
    assert took(run.stderr, run.ended) < seconds and run.left == []
    assert run.stderr.count(TOLD) == 1 and "abandoned" in run.stderr
    assert ("took more than --grace" in run.stderr) == (what != "evaluation")
    (kept,) = states(run.out)
    assert kept == (read(reference / "epochs.jsonl")[0]["step"] if what == "evaluation" else 4)
    assert f"the last state is {run.out}/state/step-{kept}." in run.stderr
    assert resume(server, direct, run.out).began_at == kept
    assert_same_run(run.out, reference)


def took(stderr, ended):
    """Seconds from the strike to the end."""
    return ended - float(re.search(r"struck by .*, at ([\d.]+)", stderr)[1])


# Full disks


def assert_full_disk_is_told(run, folder):
    (told,) = (line for line in run.stderr.splitlines() if TOLD in line)
    assert f"{folder} cannot be written" in told and "the disk has" in told
    assert "Traceback" not in run.stderr and run.left == [] and not [*run.out.rglob("*.partial")]


@pytest.mark.parametrize("what, point", [("state/step-8", "before a state, 2"), ("epoch-1", "before a checkpoint, 2")])
def test_files_that_may_not_grow_cost_nothing_but_time(what, point, server, direct, reference, folder):
    out = folder / f"full-{Path(what).name}"
    run = server.start(*direct, "--out", out, strike=f"full, {point}").wait(1)
    assert_full_disk_is_told(run, out / what)
    (kept,) = states(out)
    assert kept == (4 if "state" in what else read(reference / "epochs.jsonl")[0]["step"])
    assert resume(server, direct, out).began_at == kept
    assert_same_run(out, reference)


def size(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def disk(folder):
    """-> (where it is, a function that sets its size)."""
    if os.geteuid():
        pytest.skip("only root can mount a small disk")
    place = folder / "disk"
    place.mkdir()

    def mount(size, remount=False):
        options = ["-o", f"{'remount,' * remount}size={size}"]
        return subprocess.run(["mount", "-t", "tmpfs", *options, "survive", place], capture_output=True, text=True)

    if (done := mount(1 << 20)).returncode:
        pytest.skip(f"this machine mounts no disks: {done.stderr.strip()}")
    yield place, lambda size: mount(size, remount=True).check_returncode()
    subprocess.run(["umount", "--lazy", place], check=True)
    place.rmdir()


@pytest.mark.parametrize("what", ["state", "checkpoint"])
def test_a_full_disk_costs_nothing_but_time(what, disk, server, direct, reference):
    """It has room for a state and epoch-0.5, and for half of what comes next: another state, or epoch-1."""
    place, set_size = disk
    state, checkpoint = size(reference / "state"), size(reference / "epoch-1")
    set_size(int(state + checkpoint + (state if what == "state" else checkpoint) / 2))
    out, save_every = place / "run", 4 if what == "state" else 1000
    run = server.start(*direct, "--save-every", save_every, "--out", out).wait(1)
    assert_full_disk_is_told(run, out / ("state/step-8" if what == "state" else "epoch-1"))
    (kept,) = states(out)
    set_size(100 << 20)
    assert resume(server, direct, out).began_at == kept > 0
    assert_same_run(out, reference)


# Two processes

PAIRS = {"DDP": [], "ZeRO-2": ["--zero", 2], "ZeRO-3": ["--zero", 3], "offloaded": ["--zero", 3, "--offload"]}


@pytest.fixture(scope="module")
def paired(sums):
    arguments = ["train_direct", "--n-prime", 64, "--epochs", 2, "--max-steps", 14, "--save-every", 4, "--data", sums]
    return {name: [*arguments, "--micro-batch-size", 8, *flags] for name, flags in PAIRS.items()}


@pytest.fixture(scope="module")
def pair(paired, server, folder):
    """-> a function: a run that goes through, by its name."""
    found = {}

    def run(name):
        if name not in found:
            found[name] = folder / f"{name}-one"
            server.start(*paired[name], "--out", found[name], processes=2).wait(0, 0)
        return found[name]

    return run


def assert_goes_on(server, paired, pair, name, out, kept):
    assert resume(server, paired[name], out, processes=2).began_at == kept
    assert_same_run(out, pair(name), close=1e-6)


@pytest.mark.parametrize("name", PAIRS)
def test_two_processes_go_on_as_if_nothing_had_been(name, server, paired, pair, folder):
    out = folder / f"{name}-killed"
    run = server.start(*paired[name], "--out", out, processes=2)
    while not states(out):
        assert run.codes() == [None, None], run.stderr
        time.sleep(0.002)
    time.sleep(random.Random(0).uniform(0, 0.1))
    run.kill()
    run.wait(-signal.SIGKILL, -signal.SIGKILL)
    assert_goes_on(server, paired, pair, name, out, states(out)[-1])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_of_two_stops_both_after_the_same_step(rank, server, paired, pair, folder):
    out, code = folder / f"signal-to-{rank}", 128 + signal.SIGTERM
    run = server.start(*paired["DDP"], "--out", out, processes=2, strike="SIGTERM, step, 6", rank=rank).wait(code, code)
    assert f"stopped by SIGTERM after step 6; the last state is {out}/state/step-6. {TOLD}" in run.stderr
    assert run.stderr.count(TOLD) == 1 and last_step(out) == 6 and run.left == []
    assert_goes_on(server, paired, pair, "DDP", out, 6)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_disk_that_is_full_for_one_of_two_ends_both(rank, server, paired, pair, folder):
    """With ZeRO, each writes a part of the state."""
    out = folder / f"full-for-{rank}"
    run = server.start(*paired["ZeRO-2"], "--out", out, processes=2, strike="full, before a state, 2", rank=rank)
    run.wait(1, 1)
    assert_full_disk_is_told(run, out / "state/step-8")
    assert_goes_on(server, paired, pair, "ZeRO-2", out, 4)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_of_two_that_dies_while_both_write_a_state_ends_the_other(rank, server, paired, pair, folder):
    out, codes = folder / f"killed-{rank}", (-signal.SIGKILL, 1) if rank == 0 else (1, -signal.SIGKILL)
    strike = f"kill, pickle of a state, {5 if rank == 0 else 3}"
    run = server.start(*paired["ZeRO-2"], "--out", out, processes=2, strike=strike, rank=rank).wait(*codes)
    (told,) = (line for line in run.stderr.splitlines() if TOLD in line)
    assert "a process of the group has died" in told and f"the last state is {out}/state/step-4." in told
    assert last_step(out) == 8 and run.left == [] and not [*out.rglob("*.partial")]
    assert_goes_on(server, paired, pair, "ZeRO-2", out, 4)


@pytest.fixture(scope="module")
def launched(paired, folder):
    """{(what happens to it, name of the pair): the future of a run by torchrun}. They mostly wait: torchrun gives a
    stopped process half a minute."""
    mark = uuid.uuid4().hex

    def launch(what, name, patience):
        out = folder / f"launched-{name}-{what}"
        out.mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--", "tests/struck.py"]
        process = subprocess.Popen(
            [*command, *map(str, paired[name]), "--patience", str(patience), "--out", str(out / "run")],
            cwd=ROOT,
            env={**os.environ, "MARK": f"{mark}-{name}-{what}", "STRIKE": f"{what}, step, 6", "STRIKE_RANK": "1"},
            stdout=subprocess.DEVNULL,
            stderr=(out / "stderr").open("w"),
        )
        code, ended = process.wait(150), time.monotonic()
        alive = left([one for one in psutil.process_iter() if marked(one, f"{mark}-{name}-{what}")])
        return SimpleNamespace(code=code, ended=ended, left=alive, out=out / "run", stderr=(out / "stderr").read_text())

    kinds = [(what, name) for what in ("stop", "kill") for name in ("DDP", "ZeRO-2")]
    kinds.append(("SIGTERM to the launcher", "DDP"))
    with ThreadPoolExecutor(3) as pool:
        # As long as the processes take to meet while others start, and no longer.
        yield {kind: pool.submit(launch, *kind, 0.2 if "stop" in kind else 10) for kind in kinds}
        pool.shutdown(wait=False, cancel_futures=True)
        for process in psutil.process_iter():
            if marked(process, mark):
                process.kill()


def marked(process, mark):
    with suppress(psutil.Error):
        return process.environ().get("MARK", "").startswith(mark)


@pytest.mark.parametrize("name", ["DDP", "ZeRO-2"])
@pytest.mark.parametrize("what", ["kill", "stop"])
def test_one_of_two_that_dies_or_hangs_ends_the_run(what, name, launched, server, paired, pair):
    run = launched[what, name].result(200)
    assert run.code not in (0, None) and run.left == []
    assert took(run.stderr, run.ended) < 70
    (told,) = (line for line in run.stderr.splitlines() if TOLD in line)
    assert "a process of the group has died" in told and f"the last state is {run.out}/state/step-4." in told
    assert states(run.out) == [4]
    assert_goes_on(server, paired, pair, name, run.out, 4)


def test_a_signal_to_torchrun_saves(launched, server, paired, pair):
    run = launched["SIGTERM to the launcher", "DDP"].result(200)
    assert run.code not in (0, None) and run.left == []
    assert f"stopped by SIGTERM after step 6; the last state is {run.out}/state/step-6. {TOLD}" in run.stderr
    assert run.stderr.count(TOLD) == 1 and last_step(run.out) == 6
    assert_goes_on(server, paired, pair, "DDP", run.out, 6)


# What may change, and what not


@pytest.fixture(scope="module")
def begun(server, direct, folder):
    """A run of six steps, on data of its own."""
    data = shutil.copytree(direct[direct.index("--data") + 1], folder / "own")
    arguments = [data if argument == direct[direct.index("--data") + 1] else argument for argument in direct]
    return arguments, server.start(*arguments, "--max-steps", 6, "--out", folder / "begun").wait(0).out


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--lr", 0.01], "--lr was 0.003"),
        (["--seed", 1], "--seed was 0"),
        (["--zero", 2], "--zero was 0"),
        (["--data", "examples/arithmetic"], "--data was|a digest of the examples in --data was"),
        ("processes", "the number of processes was 1, .* and is 2 now"),
        ("examples", "a digest of the examples in --data was"),
        (["--overwrite"], "--overwrite begins anew and --resume goes on"),
    ],
)
def test_another_run_is_not_gone_on_with(flags, named, begun, capsys, monkeypatch):
    arguments, out = begun
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    data = Path(arguments[arguments.index("--data") + 1]) / "train.jsonl"
    rows = data.read_text()
    try:
        if flags == "examples":
            data.write_text(rows.replace(read(data)[7]["problem"], "1+1="))
        if flags == "processes":
            monkeypatch.setenv("WORLD_SIZE", "2")
        flags = flags if isinstance(flags, list) else []
        with pytest.raises(SystemExit) as ended:
            train_direct.main([str(one) for one in (*arguments[1:], "--out", out, "--resume", *flags)])
    finally:
        data.write_text(rows)
    (error,) = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and re.match(f"error: (--resume: )?({named})", error), error
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_how_far_and_how_much_at_once_may_change(begun, server, reference, folder):
    arguments, out = begun
    out = shutil.copytree(out, folder / "further")
    assert resume(server, [*arguments, "--max-steps", 12], out).began_at == 6
    assert without_times(out / "metrics.jsonl") == without_times(reference / "metrics.jsonl")[:12]
    assert resume(server, [*arguments, "--micro-batch-size", 5, "--save-every", 7], out).began_at == 12
    found, expected = (without_times(run / "metrics.jsonl") for run in (out, reference))
    for mine, theirs in zip(found, expected, strict=True):
        assert mine == {field: pytest.approx(theirs[field], rel=1e-3, abs=1e-5) for field in theirs}


def test_a_finished_run_stays_as_it_is(server, direct, reference, folder):
    out = shutil.copytree(reference, folder / "finished")
    assert resume(server, direct, out).began_at == last_step(reference)
    assert_same_run(out, reference)


# What is read


class Harm:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["one", "ZeRO-2", "offloaded"])
def test_states_hold_tensors_and_numbers(name, reference, pair):
    """And three classes of DeepSpeed's: what else would be in a pickle is not loaded, as the next test shows."""
    allowed = {"deepspeed.runtime.fp16.loss_scaler.LossScaler", "deepspeed.runtime.zero.config.ZeroStageEnum"}
    allowed = set() if name == "one" else allowed | {"deepspeed.utils.tensor_fragment.fragment_address"}
    pickles = 0
    with torch.serialization.safe_globals(accelerate.utils.other.TORCH_SAFE_GLOBALS):
        for path in (reference if name == "one" else pair(name)).glob("state/*/**/*"):
            if path.is_dir() or path.name in ("latest", "zero_to_fp32.py", "zero_to_torch.py"):
                continue  # a name, and tools of DeepSpeed's that nothing here runs
            if path.suffix in (".bin", ".pkl", ".pt"):
                assert set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) <= allowed, path
                pickles += 1
            else:
                assert path.suffix in (".safetensors", ".json")
                load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text())
    assert pickles >= 2


@pytest.mark.parametrize(
    "name, pattern, code",
    [
        ("one", "optimizer.bin", 1),
        ("one", "random_states_0.pkl", 0),  # which accelerate does without
        ("ZeRO-2", "**/*model_states.pt", 1),
        ("ZeRO-2", "**/*rank_1*optim_states.pt", 1),
    ],
)
def test_no_code_is_run_that_a_state_holds(name, pattern, code, server, direct, reference, paired, pair, folder):
    processes = 1 if name == "one" else 2
    out = shutil.copytree(reference if name == "one" else pair(name), folder / f"harm-{pattern.strip('*/')}")
    pickle.loads(pickle.dumps(Harm(folder / "made")))
    (folder / "made").unlink()
    (path,) = next(out.glob("state/step-*")).glob(pattern)
    torch.save(Harm(folder / "made"), path)
    arguments = direct if name == "one" else paired[name]
    run = server.start(*arguments, "--out", out, "--resume", processes=processes).wait(*[code] * processes)
    assert not (folder / "made").exists()
    assert code == 0 or "weights_only" in run.stderr or "Weights only" in run.stderr


def test_no_script_runs_code_of_others():
    scripts = [*ROOT.glob("*.py"), *ROOT.glob("*/*.py"), *ROOT.glob("examples/*/*.py")]
    assert Path(common.__file__) in scripts
    for path in scripts:
        found = re.search(r"trust_remote_code\W{1,4}True|weights_only\W{1,4}False", path.read_text())
        assert not found, (path, found)
