"""Runs that are killed, stopped or out of disk space, and what --resume makes of them."""

import itertools
import multiprocessing
import os
import pkgutil
import resource
import shutil
import signal
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_runs import FLAGS, TIMES, assert_same_run, read_lines, refused, train

import common
import train_direct
from common import zero_config

FORK = multiprocessing.get_context("forkserver")  # its processes have imported everything
FORK.set_forkserver_preload(["train_direct", "transformers.models.llama.modeling_llama"])


def split_all_weights(*arguments):
    """In place of common.zero_config. DeepSpeed keeps small weights whole on every process; with
    this, ZeRO-3 splits all of them."""
    settings = zero_config(*arguments)
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return settings


def child(flags, log, environment, strike):
    os.environ.update(environment)
    common.zero_config = split_all_weights
    with open(log, "a") as file:
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
def run(small_data):
    """A function that makes a run in processes of its own and returns what they print."""

    def run(out, *more, code=0, strike=None, processes=1):
        """code: with which all have to end. strike: arguments of `patch` for the last process."""
        flags = [*FLAGS, "--save-every", 4, "--data", small_data, "--out", out, "--resume", *more]
        log, started, world = out.parent / "log", [], {"DS_ACCELERATOR": "cpu"}
        log.unlink(missing_ok=True)
        if processes > 1:
            with socket.create_server(("127.0.0.1", 0)) as free:
                world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
            world["WORLD_SIZE"] = str(processes)
        for i in range(processes):
            ranks = {"RANK": str(i), "LOCAL_RANK": str(i)} if processes > 1 else {}
            inputs = flags, log, world | ranks, strike if i == processes - 1 else None
            started.append(FORK.Process(target=child, args=inputs, daemon=True))
            started[-1].start()
        for process in started:
            process.join(600)
        assert {process.exitcode for process in started} == {code}, log.read_text()[-4000:]
        return log.read_text()

    return run


def states(out):
    return sorted(int(path.name[5:]) for path in out.glob("state/step-*[0-9]"))


def contents(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder): path.read_bytes() for path in files}


def assert_whole(out, reference):
    """A folder that has its final name is complete."""
    (finished,) = reference.glob("state/step-*")
    for step in states(out):
        assert contents(out / f"state/step-{step}").keys() == contents(finished).keys()
        torch.load(out / f"state/step-{step}/optimizer.bin")
    for checkpoint in out.glob("epoch-*[0-9]"):
        assert contents(checkpoint) == contents(reference / checkpoint.name)


def assert_ends_with_the_same_bytes(run, out, reference):
    run(out)
    assert_whole(out, reference)
    assert len(list(out.glob("epoch-*"))) == 4 and not [*out.rglob("*.partial")]
    for name in ("metrics.jsonl", "epochs.jsonl"):
        lines, expected = read_lines(out / name), read_lines(reference / name)
        for line, field in itertools.product(lines + expected, TIMES):
            line.pop(field, None)
        assert lines == expected


# ---- Killed --------------------------------------------------------------------------------------
KILLS = [  # the call before which a run is killed; each run resumes the one before
    ("common.score", 2),  # within a step
    ("common.backward", 3),
    ("torch.save", 2),  # a state half written
    ("os.fsync", 1),  # a state written, but not to the disk
    ("pathlib.Path.rename", 2),  # the first one is of args.json
    ("shutil.rmtree", 6),  # two states
    ("transformers.PreTrainedModel.save_pretrained", 1),
    ("transformers.PreTrainedTokenizerBase.save_pretrained", 1),  # half a checkpoint
    ("common.evaluate_exactly", 1),
    ("torch.save", 5),
]


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(run, reference, tmp_path):
    out, last = tmp_path / "run", []
    for target, count in KILLS:
        run(out, code=-signal.SIGKILL, strike=(target, count, send, signal.SIGKILL))
        assert_whole(out, reference)
        last.append(max(states(out), default=0))
    assert last == sorted(last) and last[-1] > 4
    assert_ends_with_the_same_bytes(run, out, reference)


def test_a_folder_has_its_name_while_all_of_it_is_on_the_disk(small_data, tmp_path, monkeypatch):
    """It gets the name after fsync, and an old state loses it before it is removed."""
    on_disk, not_on_disk, removed, rename, rmtree = set(), {}, [], Path.rename, shutil.rmtree

    def watched_rename(old, new):
        if new.suffix != ".partial":
            not_on_disk[new.name] = {str(old / name) for name in contents(old)} - on_disk
        return rename(old, new)

    def watched_rmtree(path, *args, **settings):
        removed.extend([path.name] if path.is_dir() else [])
        rmtree(path, *args, **settings)

    monkeypatch.setattr(os, "fsync", lambda file: on_disk.add(os.readlink(f"/proc/self/fd/{file}")))
    monkeypatch.setattr(Path, "rename", watched_rename)
    monkeypatch.setattr(shutil, "rmtree", watched_rmtree)
    train("--epochs", 1, "--save-every", 2, "--data", small_data, "--out", tmp_path / "run")
    assert {"step-2", "step-4", "epoch-1"} <= not_on_disk.keys()
    assert not any(not_on_disk.values())
    assert {"step-2.partial", "step-4.partial"} <= set(removed)
    assert all(name.endswith(".partial") for name in removed)


# ---- Stopped -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "signals, target, count, code, state, step",
    [
        ([signal.SIGTERM], "common.Refill.next_step", 6, 143, 6, 6),  # before a step
        ([signal.SIGINT], "common.log_probs", 11, 130, 9, 9),  # within one
        ([signal.SIGTERM], "common.score", 10, 143, 15, 15),  # which scores: it begins anew
        ([signal.SIGTERM], "common.evaluate_exactly", 2, 143, 18, 18),
        ([signal.SIGTERM, signal.SIGTERM], "common.Refill.next_step", 6, 143, 6, 6),  # twice
    ],
)
def test_a_signal_ends_a_run_with_a_state_and_a_second_one_changes_nothing(
    signals, target, count, code, state, step, run, reference, tmp_path
):
    out = tmp_path / "run"
    log = run(out, code=code, strike=(target, count, send, *signals))
    assert states(out) == [state] and len(read_lines(out / "metrics.jsonl")) == step
    assert "Traceback" not in log
    assert_ends_with_the_same_bytes(run, out, reference)


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_two_processes_make_the_run_of_one_and_a_signal_to_one_of_them_ends_both(
    zero, run, reference, tmp_path
):
    out, strike = tmp_path / "run", ("common.Refill.next_step", 6, send, signal.SIGTERM)
    flags = ["--zero", zero, "--micro-batch-tokens", 128]
    run(out, *flags, processes=2, strike=strike, code=143)
    assert states(out) == [6] and len(read_lines(out / "metrics.jsonl")) == 6
    run(out, *flags, processes=2)
    assert_same_run(out, reference)


# ---- Full disk -----------------------------------------------------------------------------------
def limit_files(size):
    """A file that would grow beyond this many bytes cannot be written."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


@pytest.mark.parametrize(
    "target, count, size, folder, state",
    [
        ("common.Run.save_state", 2, 300_000, "state/step-8", 4),  # not even the weights
        ("common.Run.save_state", 2, 900_000, "state/step-8", 4),  # not the optimizer's state
        ("common.Run.save_checkpoint", 1, 300_000, "epoch-1", 10),
        ("common.Run.log", 6, 2_000, "", 4),
    ],
)
def test_what_cannot_be_written_costs_nothing_but_time(
    target, count, size, folder, state, run, reference, tmp_path
):
    out = tmp_path / "run"
    log = run(out, code=2, strike=(target, count, limit_files, size))
    message, *_ = log.partition("error: ")[2].splitlines()
    assert str(out / folder) in message and str(out / f"state/step-{state}") in message
    assert states(out) == [state] and "Traceback" not in log
    assert_ends_with_the_same_bytes(run, out, reference)


def test_whichever_process_cannot_write_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    run = SimpleNamespace(last_state=lambda: tmp_path / "state/step-4")
    error = refused(capsys, common.Run.fail_to_write, run, tmp_path, OSError("disk full"))
    assert "disk full" in error and "step-4" in error


# ---- What --resume and --overwrite take ----------------------------------------------------------
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
def test_another_run_in_out_is_left_alone(flags, word, reference, small_data, capsys, monkeypatch):
    before = contents(reference)
    monkeypatch.setenv("WORLD_SIZE", "2" if "processes" in word else "1")
    same = [*FLAGS, "--data", str(small_data), "--out", str(reference)]
    assert word in refused(capsys, train_direct.main, [*same, *flags])
    assert contents(reference) == before


def test_checkpoints_whose_state_is_missing_are_left_alone(reference, small_data, tmp_path, capsys):
    out = shutil.copytree(reference, tmp_path / "run")
    same = [*FLAGS, "--data", str(small_data), "--out", str(out)]
    shutil.rmtree(out / "state")
    assert "state is missing" in refused(capsys, train_direct.main, [*same, "--resume"])
    (out / "args.json").unlink()
    for flags in (same, [*same, "--resume"]):
        assert "holds a run" in refused(capsys, train_direct.main, flags)
    assert len(list(out.glob("epoch-*"))) == 4


def test_a_run_may_go_further_and_use_less_memory(small_data, reference, tmp_path, capsys):
    flags = [*FLAGS, "--data", small_data, "--out", tmp_path / "run", "--save-every", 5]
    train(*flags, "--max-steps", 7)
    train(*flags, "--resume", "--max-steps", 14, "--micro-batch-tokens", 64)
    assert "step 14" in refused(capsys, train, *flags, "--resume", "--max-steps", 13)
    train(*flags, "--resume")
    train(*flags, "--resume")  # what is complete
    for name in ("step-7", "step-14"):
        shutil.rmtree(tmp_path / "run" / name)
    assert_same_run(tmp_path / "run", reference)


def test_overwrite_replaces_the_run_and_nothing_else(small_data, tmp_path):
    out = tmp_path / "run"
    for flags in (["--max-steps", 2], ["--max-steps", 1, "--overwrite"]):
        train(*flags, "--save-every", 2, "--data", small_data, "--out", out)
        (out / "notes.txt").touch()
    names = {path.parts[0] for path in contents(out)}
    assert names == {"notes.txt", "step-1", "state", "args.json", "metrics.jsonl", "epochs.jsonl"}
    assert states(out) == [1]
    assert len(read_lines(out / "metrics.jsonl")) == 1
