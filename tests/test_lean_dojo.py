"""What prove.py relies on in lean_dojo 4.20.0: the real one, with a stand-in for Lean itself.

Where a test shows a weakness of lean_dojo, its docstring says so: a version that fails it may be
the better one.
"""

import os
import signal
from pathlib import Path

import pytest
from lean_stand_in import running


@pytest.fixture(scope="module")
def dojo(lean):
    return pytest.importorskip("lean_dojo")


@pytest.fixture
def enter(dojo, lean):
    """Enter the environment of a theorem. What is still open in the end is closed."""
    opened = []

    def enter(name, timeout=20):
        record = lean[name]
        repository = dojo.LeanGitRepo(record["url"], record["commit"])
        theorem = dojo.Theorem(repository, Path(record["file_path"]), name)
        opened.append(dojo.Dojo(theorem, timeout=timeout))
        return opened[-1].__enter__()

    yield enter
    for one in opened:
        if hasattr(one, "proc"):
            one.__exit__(None, None, None)
    assert running(os.environ, wait=20) == []


def test_proofs_errors_and_every_earlier_state(dojo, enter):
    one, first = enter("two_steps")
    split = one.run_tac(first, "constructor")
    parts = one.run_tac(first, "obtain ⟨hp, hq⟩ := h")
    assert [goal.conclusion for goal in split.goals] == ["q", "p"] and parts.pp.endswith("⊢ q ∧ p")
    assert one.run_tac(parts, "no such thing") == dojo.LeanError("unknown tactic")
    right = one.run_tac(split, "exact h.2")
    assert isinstance(one.run_tac(right, "exact h.1"), dojo.ProofFinished)
    assert isinstance(one.run_tac(parts, "exact ⟨hq, hp⟩"), dojo.ProofFinished)


def test_sorry_is_told_when_the_proof_ends(dojo, enter):
    one, state = enter("sorry_inside")
    taken = one.run_tac(state, "have h : 1 < 2 := by sorry")
    assert isinstance(taken, dojo.TacticState)
    assert one.run_tac(taken, "exact h") == dojo.ProofGivenUp()


def test_native_decide_is_as_good_as_any_tactic(dojo, enter):
    """A weakness: it trusts the compiler."""
    one, state = enter("native")
    assert isinstance(one.run_tac(state, "native_decide"), dojo.ProofFinished)


def test_after_a_timeout_replies_are_out_of_step(dojo, enter):
    """A weakness: the late reply is taken for the next tactic's."""
    one, state = enter("one_step")
    one.proc.timeout = 0.1
    with pytest.raises(dojo.DojoTacticTimeoutError):
        one.run_tac(state, "sleep")
    one.proc.timeout = 20
    assert isinstance(one.run_tac(state, "no such thing"), dojo.TacticState)


@pytest.mark.parametrize("tactic", ["die", "exceed_memory"])
def test_a_death_is_an_end_of_file(dojo, enter, tactic):
    """Also the one over Lean's memory limit, after its message."""
    one, state = enter("one_step")
    with pytest.raises(dojo.DojoCrashError, match="Unexpected EOF"):
        one.run_tac(state, tactic)


def test_a_state_that_lean_dojo_cannot_read(dojo, enter):
    """A weakness: it is a plain AssertionError."""
    one, state = enter("one_step")
    with pytest.raises(AssertionError):
        one.run_tac(state, "turnstiles")


def test_the_terminal_between_the_two(dojo, enter):
    """A weakness: it cuts requests at 4,095 bytes, and a DEL takes a character away."""
    one, state = enter("one_step")
    assert isinstance(one.run_tac(state, "rfx\x7fl"), dojo.ProofFinished)
    assert isinstance(one.run_tac(state, "skip " + "-" * 4000), dojo.TacticState)
    with pytest.raises(dojo.DojoCrashError, match="Unexpected EOF"):
        one.run_tac(state, "skip " + "-" * 4100)


@pytest.mark.parametrize("end", ["the terminal is closed", "lake is killed"])
def test_lean_ends_with_its_terminal(dojo, enter, end):
    """Which is closed when the process that holds it dies, so that no kill leaves Lean behind."""
    one, state = enter("hanging")
    one.proc.timeout = 0.1
    with pytest.raises(dojo.DojoTacticTimeoutError):  # it does not listen to SIGTERM either
        one.run_tac(state, "simp")
    (left,) = running(os.environ, "hanging")
    os.kill(left, signal.SIGTERM)
    assert running(os.environ, "hanging", wait=0.3) == [left]
    if end == "lake is killed":
        os.kill(one.proc.pid, signal.SIGKILL)
    else:
        os.kill(one.proc.pid, signal.SIGSTOP)  # its death would close the terminal, too
        os.close(one.proc.child_fd)
    assert running(os.environ, "hanging", wait=20) == []
    os.kill(one.proc.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "name, error",
    [
        ("start_eof", "DojoInitError"),
        ("start_hang", "DojoInitError"),
        ("start_garbage", "JSONDecodeError"),
        ("start_solved", "AssertionError"),
        ("start_flaky", "DojoInitError"),
        ("nowhere", "DojoInitError"),
    ],
)
def test_failures_at_the_start(enter, lean, name, error, monkeypatch, tmp_path):
    monkeypatch.setenv("LEAN_STAND_IN_TRIES", str(tmp_path))
    monkeypatch.setitem(lean, "nowhere", lean["one_step"])
    with pytest.raises(Exception) as failure:
        enter(name, timeout=1 if name == "start_hang" else 20)
    assert failure.typename == error
