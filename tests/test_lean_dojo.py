"""What prove.py relies on in lean_dojo 4.20.0, and its weaknesses: a version that fails one of
these tests may be the better one. More of it, with the stand-in for Lean, is in test_prove.py.
"""

import os
import signal
from pathlib import Path

import pytest
from lean_stand_in import running


@pytest.fixture
def enter(lean):
    """Enter the environment of a theorem, which is closed in the end."""
    stand_in_dojo = pytest.importorskip("stand_in_dojo")
    opened = []

    def enter(name):
        theorem = stand_in_dojo.Theorem(None, Path("Standin.lean"), name)
        opened.append(stand_in_dojo.Dojo(theorem, timeout=60))
        return opened[-1].__enter__()

    yield enter
    for one in opened:
        one.__exit__(None, None, None)


def test_after_a_timeout_replies_are_out_of_step(enter):
    """The late reply is taken for the next tactic's."""
    one, state = enter("one_step")
    one.proc.timeout = 0.1
    with pytest.raises(Exception) as error:
        one.run_tac(state, "sleep")
    one.proc.timeout = 60
    assert error.typename == "DojoTacticTimeoutError"
    assert type(one.run_tac(state, "no such thing")).__name__ == "TacticState"


def test_the_terminal_cuts_long_lines_and_a_delete_takes_a_character_away(enter):
    one, state = enter("one_step")
    assert type(one.run_tac(state, "rfx\x7fl")).__name__ == "ProofFinished"
    assert type(one.run_tac(state, "skip " + "-" * 4000)).__name__ == "TacticState"
    with pytest.raises(Exception, match="Unexpected EOF"):
        one.run_tac(state, "skip " + "-" * 4100)


@pytest.mark.parametrize("end", ["the terminal is closed", "lake is killed"])
def test_lean_ends_with_its_terminal(enter, end):
    """Which is closed when the process that holds it dies, so that no kill leaves Lean behind."""
    one, _ = enter("hanging")
    if end == "lake is killed":
        os.kill(one.proc.pid, signal.SIGKILL)
    else:
        os.kill(one.proc.pid, signal.SIGSTOP)  # its death would close the terminal, too
        os.close(one.proc.child_fd)
    assert running(os.environ, "hanging", wait=60) == []
    os.kill(one.proc.pid, signal.SIGKILL)
