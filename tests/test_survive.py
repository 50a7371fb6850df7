"""Runs that are killed, stopped or out of disk space, and what --resume makes of them."""

import gc
import itertools
import multiprocessing
import os
import pkgutil
import random
import resource
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
from small_runs import FLAGS, TIMES, TINY_LLAMA, assert_same_run, read_lines, refused, train

import common
import train_direct

# ---- Runs in processes of their own. A server that has imported everything forks them.


def serve(connection):
    """Fork the processes of a run for each list of requests; send their ids and exit codes."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.runtime.zero import stage3  # noqa: F401

    common.load_model(TINY_LLAMA, common.load_tokenizer(TINY_LLAMA))  # imports its architecture
    gc.freeze()
    fork = multiprocessing.get_context("fork")
    while True:
        requests = connection.recv()
        processes = [fork.Process(target=train_in_child, args=request) for request in requests]
        for process in processes:
            process.start()
        connection.send([process.pid for process in processes])
        for process in processes:
            process.join()
        connection.send([process.exitcode for process in processes])


def train_in_child(flags, log, environment, strike):
    os.environ.update(environment)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if strike:
        patch(*strike)
    train(*flags)


def patch(target, count, action, *arguments):
    """Call action(*arguments) before the count-th call of a function, named with its module."""
    real, calls = pkgutil.resolve_name(target), itertools.count(1)

    def patched(*inputs, **settings):
        if next(calls) == count:
            action(*arguments)
        return real(*inputs, **settings)

    pytest.MonkeyPatch().setattr(target, patched)


def send(*signals):
    for number in signals:
        os.kill(os.getpid(), number)


@pytest.fixture(scope="session")
def server():
    connection, other = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=[other])
    process.start()
    yield connection
    process.kill()


@pytest.fixture(scope="session")
def start(server, small_data, tmp_path_factory):
    """A function that starts a run and returns (process ids, function that waits for its end)."""
    logs = tmp_path_factory.mktemp("logs")

    def start(out, *more, processes=1, strike=None, struck=0):
        flags = [*FLAGS, "--save-every", 4, "--data", small_data, "--out", out, "--resume", *more]
        environment, requests = {}, []
        if processes > 1:
            with socket.create_server(("127.0.0.1", 0)) as free:
                environment["MASTER_PORT"] = str(free.getsockname()[1])
            environment |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(processes)}
        for rank in range(processes):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {}
            fault = strike if rank == struck else None
            requests.append((flags, logs / str(rank), environment | place, fault))
        server.send(requests)

        def wait(code):
            assert server.poll(300), "the run hangs"
            codes, log = server.recv(), (logs / "0").read_text()
            assert codes == [code] * processes, f"{codes}\n{log[-4000:]}"
            return log

        return server.recv(), wait

    return start


@pytest.fixture(scope="session")
def undisturbed(start, tmp_path_factory):
    out = tmp_path_factory.mktemp("survive") / "undisturbed"
    start(out)[1](0)
    return out


def states(out):
    return sorted(int(path.name[5:]) for path in out.glob("state/step-*[0-9]"))


def lines(path):
    return path.read_text().count("\n") if path.exists() else 0


def files(folder):
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def assert_whole(out, reference):
    """What has its final name is complete."""
    for folder in out.glob("state/step-*[0-9]"):
        (finished,) = reference.glob("state/step-*")
        assert files(folder) == files(finished)
        torch.load(folder / "optimizer.bin")
    for folder in out.glob("epoch-*[0-9]"):
        for path in files(reference / folder.name):
            assert (folder / path).read_bytes() == (reference / folder.name / path).read_bytes()


def assert_same_bytes(out, reference):
    assert {path.name for path in out.glob("epoch-*")} == {f"epoch-{i}" for i in range(1, 5)}
    assert_whole(out, reference)
    for name in ("metrics.jsonl", "epochs.jsonl"):
        mine, others = (
            [{k: v for k, v in line.items() if k not in TIMES} for line in read_lines(run / name)]
            for run in (out, reference)
        )
        assert mine == others
    assert not [*out.rglob("*.partial")]


# ---- Killed


def test_a_run_killed_at_random_instants_ends_with_the_same_bytes(start, undisturbed, tmp_path):
    rng, out = random.Random(0), tmp_path / "run"
    for _ in range(4):
        wanted = max(states(out), default=0) + rng.randint(1, 5)
        (pid,), wait = start(out)
        until = time.monotonic() + 100
        while lines(out / "metrics.jsonl") < wanted and time.monotonic() < until:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        wait(-signal.SIGKILL)
        assert_whole(out, undisturbed)
    assert states(out)
    start(out)[1](0)
    assert_same_bytes(out, undisturbed)


KILLS = [  # the call before which a run is killed; each run resumes the one before
    ("torch.save", 2),  # a state half written
    ("os.fsync", 1),  # a state written, but not to the disk
    ("pathlib.Path.rename", 4),
    ("shutil.rmtree", 3),
    ("transformers.PreTrainedModel.save_pretrained", 1),
    ("os.fsync", 12),
    ("common.evaluate_exactly", 1),
    ("common.Run.log", 5),
    ("torch.save", 5),
    ("common.Run.save_state", 2),
]


def test_what_is_killed_while_it_writes_leaves_whole_files(start, undisturbed, tmp_path):
    out, last = tmp_path / "run", []
    for target, count in KILLS:
        start(out, strike=(target, count, send, signal.SIGKILL))[1](-signal.SIGKILL)
        assert_whole(out, undisturbed)
        last += states(out)[-1:]
    assert last == sorted(last) and len(set(last)) > 3
    start(out)[1](0)
    assert_same_bytes(out, undisturbed)


# ---- Stopped


@pytest.mark.parametrize(
    "number, target, count, step",
    [
        (signal.SIGTERM, "common.Refill.next_step", 6, 6),  # before a step
        (signal.SIGINT, "common.log_probs", 12, 9),  # within one
        (signal.SIGTERM, "common.score", 10, 13),  # which scores: it begins anew
        (signal.SIGTERM, "common.evaluate_exactly", 2, 18),
    ],
)
def test_a_signal_ends_a_run_with_a_state(
    number, target, count, step, start, undisturbed, tmp_path
):
    out = tmp_path / "run"
    log = start(out, strike=(target, count, send, number))[1](128 + number)
    assert states(out) == [step] and lines(out / "metrics.jsonl") == step
    assert "stopped" in log and "Traceback" not in log
    start(out)[1](0)
    assert_same_bytes(out, undisturbed)


def test_a_second_signal_ends_a_run_at_once(start, undisturbed, tmp_path):
    out, twice = tmp_path / "run", (signal.SIGTERM, signal.SIGTERM)
    start(out, strike=("common.Refill.next_step", 6, send, *twice))[1](-signal.SIGTERM)
    assert states(out) == [4] and lines(out / "metrics.jsonl") == 5
    start(out)[1](0)
    assert_same_bytes(out, undisturbed)


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_signal_to_one_of_two_processes_ends_both_with_a_state(zero, start, reference, tmp_path):
    out, strike = tmp_path / "run", ("common.Refill.next_step", 6, send, signal.SIGTERM)
    pair = {"processes": 2, "struck": 1}
    start(out, "--zero", zero, strike=strike, **pair)[1](128 + signal.SIGTERM)
    assert states(out) == [6] and lines(out / "metrics.jsonl") == 6
    start(out, "--zero", zero, **pair)[1](0)
    assert_same_run(out, reference)


# ---- Full disk


@pytest.fixture
def disk(tmp_path):
    """A disk of 30 MiB where root can mount one, else a folder."""
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=30M", "tests", tmp_path / "disk"]
    subprocess.run(mount, capture_output=True)
    yield tmp_path / "disk"
    subprocess.run(["umount", "--lazy", tmp_path / "disk"], capture_output=True)


def fill(disk, free):
    """Leave so many bytes free, or let no file grow beyond them."""
    if not os.path.ismount(disk):
        resource.setrlimit(resource.RLIMIT_FSIZE, (free, resource.RLIM_INFINITY))
        return
    usage = shutil.disk_usage(disk)
    with open(disk / "filler", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, usage.free - free)


@pytest.mark.parametrize(
    "target, count, free, folder, state",
    [
        ("common.Run.save_state", 2, 300_000, "state/step-8", 4),  # not even the weights
        ("common.Run.save_state", 2, 900_000, "state/step-8", 4),  # not the optimizer's state
        ("common.Run.save_checkpoint", 1, 300_000, "epoch-1", 8),
    ],
)
def test_a_full_disk_costs_nothing_but_time(
    target, count, free, folder, state, start, undisturbed, disk
):
    out = disk / "run"
    log = start(out, strike=(target, count, fill, disk, free))[1](2)
    message, *_ = log.partition("error: ")[2].splitlines()
    assert str(out / folder) in message and str(out / f"state/step-{state}") in message
    assert states(out) == [state] and "Traceback" not in log
    (disk / "filler").unlink(missing_ok=True)
    start(out)[1](0)
    assert_same_bytes(out, undisturbed)


def test_files_reach_the_disk_before_they_get_their_final_name(tmp_path, monkeypatch):
    calls, rename = [], Path.rename
    (tmp_path / "new").mkdir()
    for name in ("a", "b"):
        (tmp_path / "new" / name).write_text(name)
    monkeypatch.setattr(
        os, "fsync", lambda file: calls.append(os.readlink(f"/proc/self/fd/{file}"))
    )
    monkeypatch.setattr(Path, "rename", lambda *paths: (calls.append("rename"), rename(*paths)))
    common.rename_whole(tmp_path / "new", tmp_path / "final")
    assert sorted(calls[:2]) == [str(tmp_path / "new" / name) for name in ("a", "b")]
    assert calls[2:] == ["rename"] and (tmp_path / "final/b").read_text() == "b"


# ---- What --resume and --overwrite take


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--resume", "--lr", "0.01"], "--resume: lr"),
        (["--resume", "--seed", "1"], "--resume: seed"),
        (["--resume", "--n-prime", "65"], "--resume: n_prime"),
        (["--resume", "--data", "examples/arithmetic"], "--resume: data"),
        (["--resume"], "--resume: processes"),
        (["--resume"], "the data has changed"),
        ([], "--overwrite"),
    ],
)
def test_another_run_in_out_is_left_alone(
    flags, word, undisturbed, small_data, tmp_path, capsys, monkeypatch
):
    data = shutil.copytree(small_data, tmp_path / "data")
    before = {path: (undisturbed / path).read_bytes() for path in files(undisturbed)}
    if "processes" in word:
        monkeypatch.setenv("WORLD_SIZE", "2")
    if "data has changed" in word:
        rows = (small_data / "train.jsonl").read_text()
        small_data.joinpath("train.jsonl").write_text(rows.partition("\n")[2])
    same = [*FLAGS, "--data", str(small_data), "--out", str(undisturbed)]
    assert word in refused(capsys, train_direct.main, [*same, *flags])
    assert before == {path: (undisturbed / path).read_bytes() for path in files(undisturbed)}
    shutil.copytree(data, small_data, dirs_exist_ok=True)


def test_a_run_may_go_further_and_use_less_memory(small_data, reference, tmp_path):
    flags = [*FLAGS, "--data", small_data, "--out", tmp_path / "run", "--save-every", 5]
    train(*flags, "--max-steps", 7)
    train(*flags, "--resume", "--max-steps", 14, "--micro-batch-tokens", 64)
    train(*flags, "--resume")
    for name in ("step-7", "step-14"):
        shutil.rmtree(tmp_path / "run" / name)
    assert_same_run(tmp_path / "run", reference)
    train(*flags, "--resume")  # of a run that is complete
    assert_same_run(tmp_path / "run", reference)


def test_overwrite_replaces_the_run_and_nothing_else(small_data, tmp_path):
    out = tmp_path / "run"
    flags = ["--data", small_data, "--out", out]
    train(*flags, "--max-steps", 2, "--save-every", 1)
    (out / "notes.txt").write_text("mine")
    train(*flags, "--max-steps", 1, "--overwrite")
    names = {path.name for path in out.iterdir()} - {"args.json", "metrics.jsonl", "epochs.jsonl"}
    assert names == {"notes.txt", "step-1", "state"} and states(out) == []
    assert lines(out / "metrics.jsonl") == lines(out / "epochs.jsonl") == 1
