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
import time
from pathlib import Path

import pytest
import torch
from small_runs import FLAGS, TIMES, TINY_LLAMA, assert_same_run, read_lines, refused, train

import common
import train_direct


def serve(connection):
    """Fork the processes of a run for each list of requests. They begin to train at once, since
    this process has imported everything. Sends their ids, then their exit codes."""
    os.setpgrp()  # the test ends all of this group
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.runtime.zero import stage3  # noqa: F401

    common.load_model(TINY_LLAMA, common.load_tokenizer(TINY_LLAMA))  # imports its architecture
    gc.freeze()
    fork = multiprocessing.get_context("fork")
    while True:
        processes = [fork.Process(target=child, args=one) for one in connection.recv()]
        for process in processes:
            process.start()
        connection.send([process.pid for process in processes])
        for process in processes:
            process.join()
        connection.send([process.exitcode for process in processes])


def child(flags, log, environment, strike):
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
def start(small_data, tmp_path_factory):
    """A function that starts a run and returns (process ids, function that waits for its end)."""
    connection, other = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=[other])
    server.start()
    logs = tmp_path_factory.mktemp("logs")

    def wait(*codes):
        assert connection.poll(300), "the run hangs"
        found, log = connection.recv(), (logs / "0").read_text()
        assert found == list(codes), f"{found}\n{log[-4000:]}"
        return log

    def start(out, *more, strike=None, processes=1):
        """strike: arguments of `patch` for the last process."""
        flags = [*FLAGS, "--save-every", 4, "--data", small_data, "--out", out, "--resume", *more]
        requests = [(flags, logs / "0", {}, strike)]
        if processes == 2:
            with socket.create_server(("127.0.0.1", 0)) as free:
                world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
            ranks = [world | {"WORLD_SIZE": "2", "RANK": i, "LOCAL_RANK": i} for i in ("0", "1")]
            requests = [(flags, logs / "0", ranks[0], None), (flags, logs / "1", ranks[1], strike)]
        connection.send(requests)
        return connection.recv(), wait

    yield start
    os.killpg(server.pid, signal.SIGKILL)


@pytest.fixture(scope="session")
def undisturbed(start, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    start(out)[1](0)
    return out


def states(out):
    return sorted(int(path.name[5:]) for path in out.glob("state/step-*[0-9]"))


def count_lines(path):
    return path.read_text().count("\n") if path.exists() else 0


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in files}


def assert_whole(out, undisturbed):
    """What has its final name is complete."""
    (finished,) = undisturbed.glob("state/step-*")
    for step in states(out):
        assert contents(out / f"state/step-{step}").keys() == contents(finished).keys()
        torch.load(out / f"state/step-{step}/optimizer.bin")
    for checkpoint in out.glob("epoch-*[0-9]"):
        assert contents(checkpoint) == contents(undisturbed / checkpoint.name)


def assert_ends_with_the_same_bytes(start, out, undisturbed):
    start(out)[1](0)
    assert_whole(out, undisturbed)
    assert len(list(out.glob("epoch-*"))) == 4 and not [*out.rglob("*.partial")]
    for name in ("metrics.jsonl", "epochs.jsonl"):
        lines, expected = read_lines(out / name), read_lines(undisturbed / name)
        for line, field in itertools.product(lines + expected, TIMES):
            line.pop(field, None)
        assert lines == expected


# ---- Killed


def test_a_run_killed_at_random_instants_ends_with_the_same_bytes(start, undisturbed, tmp_path):
    rng, out = random.Random(0), tmp_path / "run"
    for _ in range(4):
        wanted = max(states(out), default=0) + rng.randint(1, 5)
        (pid,), wait = start(out)
        until = time.monotonic() + 100
        while count_lines(out / "metrics.jsonl") < wanted and time.monotonic() < until:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        wait(-signal.SIGKILL)
        assert_whole(out, undisturbed)
    assert states(out)
    assert_ends_with_the_same_bytes(start, out, undisturbed)


KILLS = [  # the call before which a run is killed; each run resumes the one before
    ("torch.save", 2),  # a state half written
    ("os.fsync", 1),  # a state written, but not to the disk
    ("pathlib.Path.rename", 2),  # the first one is of args.json
    ("shutil.rmtree", 6),  # two states
    ("transformers.PreTrainedModel.save_pretrained", 1),
    ("transformers.PreTrainedTokenizerBase.save_pretrained", 1),  # half a checkpoint
    ("common.evaluate_exactly", 1),
    ("torch.save", 5),
]


def test_what_is_killed_while_it_writes_leaves_whole_files(start, undisturbed, tmp_path):
    out, last = tmp_path / "run", []
    for target, count in KILLS:
        start(out, strike=(target, count, send, signal.SIGKILL))[1](-signal.SIGKILL)
        assert_whole(out, undisturbed)
        last.append(max(states(out), default=0))
    assert last == sorted(last) and last[-1] > 4
    assert_ends_with_the_same_bytes(start, out, undisturbed)


def test_files_reach_the_disk_before_they_get_their_final_name(small_data, tmp_path, monkeypatch):
    on_disk, renamed, rename = set(), {}, Path.rename

    def watched(old, new):
        if new.suffix != ".partial":  # which is no final name
            renamed[new.name] = {str(old / name) for name in contents(old)} - on_disk
        return rename(old, new)

    monkeypatch.setattr(os, "fsync", lambda file: on_disk.add(os.readlink(f"/proc/self/fd/{file}")))
    monkeypatch.setattr(Path, "rename", watched)
    train("--epochs", 1, "--save-every", 2, "--data", small_data, "--out", tmp_path / "run")
    assert {"step-2", "step-4", "epoch-1"} <= renamed.keys() and not any(renamed.values())


def test_an_old_state_loses_its_name_before_it_is_removed(small_data, tmp_path, monkeypatch):
    removed, rmtree = [], shutil.rmtree

    def watched(path, *args, **settings):
        if path.is_dir() and path.parent.name == "state":
            removed.append(path.name)
        rmtree(path, *args, **settings)

    monkeypatch.setattr(shutil, "rmtree", watched)
    train("--epochs", 1, "--save-every", 2, "--data", small_data, "--out", tmp_path / "run")
    assert {"step-2.partial", "step-4.partial"} <= set(removed)
    assert all(name.endswith(".partial") for name in removed)


# ---- Stopped


@pytest.mark.parametrize(
    "signals, target, count, code, state, step",
    [
        ([signal.SIGTERM], "common.Refill.next_step", 6, 143, 6, 6),  # before a step
        ([signal.SIGINT], "common.log_probs", 12, 130, 9, 9),  # within one
        ([signal.SIGTERM], "common.score", 10, 143, 15, 15),  # which scores: it begins anew
        ([signal.SIGTERM], "common.evaluate_exactly", 2, 143, 18, 18),
        ([signal.SIGTERM, signal.SIGTERM], "common.Refill.next_step", 6, -15, 4, 5),  # at once
    ],
)
def test_a_signal_ends_a_run_with_a_state_and_a_second_one_at_once(
    signals, target, count, code, state, step, start, undisturbed, tmp_path
):
    out = tmp_path / "run"
    log = start(out, strike=(target, count, send, *signals))[1](code)
    assert states(out) == [state] and count_lines(out / "metrics.jsonl") == step
    assert "Traceback" not in log
    assert_ends_with_the_same_bytes(start, out, undisturbed)


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_signal_to_one_of_two_processes_ends_both_with_a_state(zero, start, reference, tmp_path):
    out, strike = tmp_path / "run", ("common.Refill.next_step", 6, send, signal.SIGTERM)
    start(out, "--zero", zero, processes=2, strike=strike)[1](143, 143)
    assert states(out) == [6] and count_lines(out / "metrics.jsonl") == 6
    start(out, "--zero", zero, processes=2)[1](0, 0)
    assert_same_run(out, reference)


# ---- Full disk


def limit_files(size):
    """A file that would grow beyond this many bytes cannot be written."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.parametrize(
    "target, count, size, folder, state",
    [
        ("common.Run.save_state", 2, 300_000, "state/step-8", 4),  # not even the weights
        ("common.Run.save_state", 2, 900_000, "state/step-8", 4),  # not the optimizer's state
        ("common.Run.save_checkpoint", 1, 300_000, "epoch-1", 8),
        ("common.Run.log", 6, 2_000, "", 4),
    ],
)
def test_what_cannot_be_written_costs_nothing_but_time(
    target, count, size, folder, state, start, undisturbed, tmp_path
):
    out = tmp_path / "run"
    log = start(out, strike=(target, count, limit_files, size))[1](2)
    message, *_ = log.partition("error: ")[2].splitlines()
    assert str(out / folder) in message and str(out / f"state/step-{state}") in message
    assert states(out) == [state] and "Traceback" not in log
    assert_ends_with_the_same_bytes(start, out, undisturbed)


# ---- What --resume and --overwrite take


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--resume", "--lr", "0.01"], "--resume: lr"),
        (["--resume", "--seed", "1"], "--resume: seed"),
        (["--resume", "--data", "examples/arithmetic"], "--resume: data"),
        (["--resume"], "--resume: processes"),
        ([], "--overwrite"),
    ],
)
def test_another_run_in_out_is_left_alone(
    flags, word, undisturbed, small_data, capsys, monkeypatch
):
    before = contents(undisturbed)
    monkeypatch.setenv("WORLD_SIZE", "2" if "processes" in word else "1")
    same = [*FLAGS, "--data", str(small_data), "--out", str(undisturbed)]
    assert word in refused(capsys, train_direct.main, [*same, *flags])
    assert contents(undisturbed) == before


def test_a_run_may_go_further_and_use_less_memory(small_data, reference, tmp_path):
    flags = [*FLAGS, "--data", small_data, "--out", tmp_path / "run", "--save-every", 5]
    train(*flags, "--max-steps", 7)
    train(*flags, "--resume", "--max-steps", 14, "--micro-batch-tokens", 64)
    for _ in range(2):  # the second one resumes what is complete
        train(*flags, "--resume")
        shutil.rmtree(tmp_path / "run/step-7", ignore_errors=True)
        shutil.rmtree(tmp_path / "run/step-14", ignore_errors=True)
        assert_same_run(tmp_path / "run", reference)


def test_overwrite_replaces_the_run_and_nothing_else(small_data, tmp_path):
    out = tmp_path / "run"
    for flags in (["--max-steps", 2], ["--max-steps", 1, "--overwrite"]):
        train(*flags, "--save-every", 2, "--data", small_data, "--out", out)
        (out / "notes.txt").touch()
    names = {path.parts[0] for path in contents(out)}
    assert names == {"notes.txt", "step-1", "args.json", "metrics.jsonl", "epochs.jsonl"}
    assert count_lines(out / "metrics.jsonl") == 1
