"""What the real lean_dojo makes of everything that Lean may do, with a stand-in for Lean: what a prover has to expect.

Where a test pins a weakness of lean_dojo 4.20.0, its text says so: a version that fails it may be the better one.
"""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
from lean_repository import RECORDS, running
from lean_stand_in import THEOREMS, TRIES


@pytest.fixture(scope="module")
def records(lean):
    return {record["full_name"]: record for record in json.loads(Path(lean[RECORDS]).read_text())}


@pytest.fixture(scope="module")
def dojo(lean):
    import lean_dojo

    return lean_dojo


@pytest.fixture
def make(dojo, records):
    """Make a Dojo for a theorem by its name, before it is entered."""
    from lean_dojo.interaction.dojo import kill_descendants

    made = []

    def make(name, timeout=10, file_path="Standin.lean"):
        record = records["one_step"]
        repository = dojo.LeanGitRepo(record["url"], record["commit"])
        made.append(dojo.Dojo(dojo.Theorem(repository, file_path, name), timeout=timeout))
        return made[-1]

    yield make
    for one in made:  # a Dojo that fails while it is entered leaves Lean running and its file where it is
        if hasattr(one, "proc"):
            kill_descendants(one.proc.pid)
        if hasattr(one, "modified_file"):
            one.modified_file.close()


@pytest.fixture
def prove(lean, make):
    """Enter a Dojo; when it is left, nothing of it runs any more and its file is gone."""

    @contextmanager
    def prove(name, timeout=10):
        with make(name) as (one, state):
            one.proc.timeout = timeout  # only now: a short one would make the start a matter of this machine's load
            yield one, state
        assert running(lean, name, wait=2) == []
        assert not Path(one.modified_file.name).exists()

    return prove


def wait_for_the_end(one):
    while one.proc.isalive():
        time.sleep(0.02)


def test_the_records_are_what_lean_dojo_reads_from_its_trace(dojo, records):
    from lean_dojo.data_extraction.traced_data import TracedFile

    assert list(records) == list(THEOREMS)
    record = records["one_step"]
    repository = dojo.LeanGitRepo(record["url"], record["commit"])
    folder = dojo.get_traced_repo_path(repository)
    traced = TracedFile.from_traced_file(folder, Path(".lake/build/ir/Standin.ast.json"), repository)
    for name, record in records.items():
        theorem = traced.get_traced_theorem(dojo.Theorem(repository, record["file_path"], name))
        assert [list(theorem.start), list(theorem.end)] == [record["start"], record["end"]]
        assert theorem.get_theorem_statement() == f"theorem {name} : True :="
        steps = [(step.tactic, step.state_before, step.state_after) for step in theorem.get_traced_tactics()]
        assert steps == [
            (step["tactic"], step["state_before"], step["state_after"]) for step in record["traced_tactics"]
        ]


@pytest.mark.parametrize("name", ["one_step", "two_steps", "three_steps"])
def test_a_proof_by_its_record(dojo, records, prove, name):
    steps = records[name]["traced_tactics"]
    with prove(name) as (one, state):
        for step in steps:
            assert isinstance(state, dojo.TacticState) and state.pp == step["state_before"]
            assert not one.is_successful
            state = one.run_tac(state, step["tactic"])
        assert state == dojo.ProofFinished(len(steps)) and one.is_successful
        with pytest.raises(RuntimeError, match="invalid state"):
            one.run_tac(state, "trivial")


def test_every_state_can_be_gone_on_from_at_any_time(dojo, prove):
    with prove("two_steps") as (one, first):
        split = one.run_tac(first, "constructor")
        assert split.num_goals == 2 and [goal.conclusion for goal in split.goals] == ["q", "p"]
        parts = one.run_tac(first, "obtain ⟨hp, hq⟩ := h")
        assert (first.id, split.id, parts.id) == (0, 1, 2)
        right = one.run_tac(split, "exact h.2")
        assert isinstance(one.run_tac(right, "exact h.1"), dojo.ProofFinished)
        assert isinstance(one.run_tac(parts, "exact ⟨hq, hp⟩"), dojo.ProofFinished)  # after a proof was found, too


def test_an_error_leaves_the_state_as_it_was(dojo, prove):
    with prove("one_step") as (one, state):
        assert one.run_tac(state, "simp") == dojo.LeanError("simp made no progress")
        assert one.run_tac(state, "no such thing") == dojo.LeanError("<stdin>:1:1: unknown tactic")
        assert one.run_tac(state, "rfl") == dojo.ProofFinished(1)


def test_sorry_is_told_when_the_proof_is_over(dojo, prove):
    with prove("sorry_inside") as (one, state):
        assert one.run_tac(state, "sorry") == dojo.ProofGivenUp()
        taken = one.run_tac(state, "have h : 1 < 2 := by sorry")
        assert isinstance(taken, dojo.TacticState)
        assert one.run_tac(taken, "exact h") == dojo.ProofGivenUp()
        assert not one.is_successful


def test_native_decide_is_as_good_as_any_tactic(dojo, prove):
    with prove("native") as (one, state):
        assert isinstance(one.run_tac(state, "native_decide"), dojo.ProofFinished)


def test_states_are_equal_by_their_text(prove):
    with prove("three_steps") as (one, first):
        same = one.run_tac(first, "skip")
        around = one.run_tac(one.run_tac(same, "apply And.symm"), "apply And.symm")
        assert first == same == around and len({first, same, around}) == 1
        assert (first.id, same.id, around.id) == (0, 1, 3)
    with prove("unprovable") as (one, state):
        assert one.run_tac(state, "exfalso") == state
        grown = one.run_tac(state, "grow")
        assert grown != state and one.run_tac(grown, "grow") != grown


def test_a_message_comes_with_the_state(prove):
    with prove("one_step") as (one, state):
        assert (state.message, one.run_tac(state, "skip").message) == (None, "")
        assert one.run_tac(state, "trace").message == "a message"


def test_slow_tactics_have_the_time_that_they_are_given(dojo, prove):
    with prove("slow") as (one, state):
        begin = time.monotonic()
        assert isinstance(one.run_tac(state, "norm_num"), dojo.ProofFinished)
        assert time.monotonic() - begin >= 0.5


@pytest.mark.parametrize("theorem, tactic", [("hanging", "simp"), ("one_step", "hang"), ("one_step", "noise")])
def test_a_hanging_tactic_is_timed_out_and_ended(dojo, lean, prove, theorem, tactic):
    with prove(theorem, timeout=0.5) as (one, state):
        with pytest.raises(dojo.DojoTacticTimeoutError):
            one.run_tac(state, tactic)
        assert one.has_timedout and not one.is_crashed
        (left,) = running(lean, theorem)  # until the Dojo is left
        if tactic != "noise":
            os.kill(left, signal.SIGHUP)
            os.kill(left, signal.SIGTERM)
            assert running(lean, theorem, wait=0.2) == [left]


def test_after_a_timeout_the_replies_are_out_of_step(dojo, prove):
    """A weakness: the late reply is taken for the next tactic's, so that here an error counts as a proof."""
    with prove("slow", timeout=1) as (one, state):
        with pytest.raises(dojo.DojoTacticTimeoutError):
            one.run_tac(state, "decide")
        time.sleep(1.2)
        assert isinstance(one.run_tac(state, "no such thing"), dojo.ProofFinished)


def test_death_in_a_reply(dojo, prove):
    with prove("dying") as (one, state):
        with pytest.raises(dojo.DojoCrashError, match="Unexpected EOF"):
            one.run_tac(state, "simp")
        with pytest.raises(dojo.DojoCrashError, match="Unexpected exit code: 1"):
            one.run_tac(state, "rfl")
        assert not one.is_crashed  # which lean_dojo never sets


def test_out_of_memory_is_known_only_between_tactics(dojo, prove):
    """A weakness: at the tactic that needs the memory, it is an end like any other."""
    with prove("memory") as (one, state):
        state = one.run_tac(state, "skip")
        wait_for_the_end(one)
        with pytest.raises(dojo.DojoCrashError, match="OOM") as error:
            one.run_tac(state, "rfl")
        assert error.value.is_out_of_memory
    with prove("memory") as (one, state):
        with pytest.raises(dojo.DojoCrashError, match="Unexpected EOF") as error:
            one.run_tac(state, "simp")
        assert not error.value.is_out_of_memory
        with pytest.raises(dojo.DojoCrashError, match="OOM"):
            one.run_tac(state, "rfl")


def test_garbage(dojo, prove):
    with prove("one_step") as (one, state):
        with pytest.raises(dojo.DojoCrashError, match="Invalid JSON: Segmentation fault"):
            one.run_tac(state, "garbage")
        assert isinstance(one.run_tac(state, "rfl"), dojo.ProofFinished)


def test_an_unknown_state_ends_lean(dojo, prove):
    with prove("one_step") as (one, _), pytest.raises(dojo.DojoCrashError, match="Unexpected EOF"):
        one.run_tac(dojo.TacticState("⊢ 2 + 2 = 4", 7), "rfl")


def test_a_goal_that_lean_dojo_cannot_read(dojo, prove):
    """A weakness: it is a plain AssertionError, while Lean is well and goes on."""
    with prove("one_step") as (one, state):
        with pytest.raises(AssertionError):
            one.run_tac(state, "turnstiles")
        assert isinstance(one.run_tac(state, "rfl"), dojo.ProofFinished)


def test_a_tactic_longer_than_a_terminal_line_ends_lean(dojo, prove):
    """A weakness: the terminal between the two cuts the request at 4095 bytes, and Lean cannot read the rest."""
    with prove("one_step") as (one, state):
        assert isinstance(one.run_tac(state, "skip " + "-" * 4000), dojo.TacticState)
        with pytest.raises(dojo.DojoCrashError, match="Unexpected EOF"):
            one.run_tac(state, "skip " + "-" * 4100)


def test_terminal_characters_in_a_tactic(dojo, prove):
    """A weakness: a DEL reaches the terminal as it is and takes the character before it away."""
    with prove("one_step") as (one, state):
        assert isinstance(one.run_tac(state, "rfx\x7fl"), dojo.ProofFinished)
        assert isinstance(one.run_tac(state, "rfl\x03"), dojo.LeanError)  # JSON has an escape for this one
        with pytest.raises(UnicodeEncodeError):
            one.run_tac(state, "\ud800")


def test_lake_killed_leaves_lean_behind(dojo, lean, make):
    """A weakness: what lean_dojo ends is the process it started and its children, and here it has lost them."""
    with make("hanging", timeout=1) as (one, state):
        with pytest.raises(dojo.DojoTacticTimeoutError):
            one.run_tac(state, "simp")
        os.kill(one.proc.pid, signal.SIGKILL)
        wait_for_the_end(one)
        with pytest.raises(AssertionError):  # an exit code is not what it left
            one.run_tac(state, "rfl")
    (left,) = running(lean, "hanging", wait=0.5)
    os.kill(left, signal.SIGKILL)
    assert running(lean, "hanging", wait=2) == []


@pytest.mark.parametrize(
    "name, error, message",
    [
        ("start_eof", "DojoInitError", "Unexpected EOF"),
        ("start_fatal", "DojoInitError", "Unexpected EOF"),
        ("start_death", "DojoInitError", "Unexpected EOF"),
        ("start_hang", "DojoInitError", "Timeout during initialization"),
        ("start_garbage", "JSONDecodeError", None),
        ("start_error", "AssertionError", None),
        ("start_solved", "AssertionError", None),
    ],
)
def test_failures_at_the_start(lean, make, name, error, message):
    one = make(name, timeout=1 if name == "start_hang" else 10)
    with pytest.raises(Exception, match=message) as failure:
        one.__enter__()
    assert failure.typename == error
    # A weakness: `with` does not leave what it could not enter, so that Lean and the file stay
    assert Path(one.modified_file.name).exists()
    ended = message == "Unexpected EOF"
    assert len(running(lean, name, wait=5 if ended else 0.3)) == (not ended)


def test_a_slow_start(dojo, prove, make):
    with prove("start_slow") as (one, state):
        assert isinstance(one.run_tac(state, "trivial"), dojo.ProofFinished)
    with pytest.raises(dojo.DojoInitError, match="Timeout"):
        make("start_slow", timeout=0.5).__enter__()


def test_theorems_that_are_not_there(dojo, make):
    with pytest.raises(dojo.DojoInitError, match="Failed to locate the theorem"):
        make("nowhere").__enter__()
    with pytest.raises(dojo.DojoInitError, match=r"Cannot find the \*.ast.json file"):
        make("one_step", file_path="Nowhere.lean").__enter__()


def test_flaky_theorems_fail_once(dojo, lean, prove, make, monkeypatch, tmp_path):
    monkeypatch.setenv(TRIES, str(tmp_path))
    with prove("flaky_death") as (one, state), pytest.raises(dojo.DojoCrashError):
        one.run_tac(state, "rfl")
    with prove("flaky_hang", timeout=0.5) as (one, state), pytest.raises(dojo.DojoTacticTimeoutError):
        one.run_tac(state, "rfl")
    for name in ("start_flaky", "start_flaky_hang"):
        with pytest.raises(dojo.DojoInitError):
            make(name, timeout=1).__enter__()
    for name in ("flaky_death", "flaky_hang", "start_flaky", "start_flaky_hang"):
        left = running(lean, name)  # of a start that failed
        with make(name) as (one, state):
            assert isinstance(one.run_tac(state, "trivial" if "start" in name else "rfl"), dojo.ProofFinished)
        assert running(lean, name, wait=2) == left


ELSEWHERE = """
import json, os, sys
from lean_dojo import Dojo, LeanGitRepo, Theorem
for record in json.load(open(os.environ["LEAN_STAND_IN_THEOREMS"])):
    if record["full_name"] == sys.argv[1]:
        theorem = Theorem(LeanGitRepo(record["url"], record["commit"]), record["file_path"], record["full_name"])
        with Dojo(theorem) as (dojo, state):
            for step in record["traced_tactics"]:
                state = dojo.run_tac(state, step["tactic"])
            print(state)
"""


def test_the_environment_is_all_that_another_process_needs(lean):
    """Two at once, far from here and with an empty home, as a worker on another machine may be."""
    environment = {**lean, "HOME": "/nonexistent"}
    command = [sys.executable, "-c", ELSEWHERE]
    started = [
        subprocess.Popen([*command, name], cwd="/", env=environment, stdout=subprocess.PIPE, text=True)
        for name in ("three_steps", "three_steps", "two_steps")
    ]
    for process in started:
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0 and output.startswith("ProofFinished"), output
