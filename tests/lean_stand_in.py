"""A scripted stand-in for Lean. Run as `python lean_stand_in.py lean ... FILE`, it speaks the
protocol of lean_dojo's Lean4Repl.lean for the theorem of THEOREMS that FILE names."""

import json
import os
import signal
import sys
import time
from pathlib import Path

DONE = "no goals"
# A folder with pids, a file to which every process appends "PID THEOREM", and a file for everything
# that fails only once.
FOLDER = "LEAN_STAND_IN"


# ---- Lean -----------------------------------------------------------------------------------
def say(text):
    print(text, end="", flush=True)


def reply(sid=None, state=None, error=None):
    text = json.dumps({"tacticState": state, "sid": sid, "error": error}, ensure_ascii=False)
    say(f"REPL> {text}\n")


# A tactic's outcome: the next state, or a function of the state that returns it, raises ValueError
# for Lean's error, or returns None if it has said all there is to say.
def hang(state):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True:
        signal.pause()


def die(state):
    say('REPL> {"tacticState": "⊢ Fal')
    os._exit(1)


def fail(message):
    def outcome(state):
        raise ValueError(message)

    return outcome


def once(mishap, then, name):
    """The mishap once, whichever process tries; from then on the other outcome."""

    def outcome(state):
        try:
            (Path(os.environ[FOLDER]) / name).touch(exist_ok=False)
            return mishap
        except FileExistsError:
            return then

    return outcome


EVERYWHERE = {  # tactics of every state
    "skip": lambda state: state,
    "hang": hang,
    "die": die,
}
SORRY = fail("proof contains `sorry`")  # said at the end of a proof, not at the tactic
SWAP, PARTS = "p q : Prop\nh : p ∧ q\n⊢ q ∧ p", "p q : Prop\nhp : p\nhq : q\n⊢ q ∧ p"
RIGHT = "case right\np q : Prop\nh : p ∧ q\n⊢ p"
BOTH = f"case left\np q : Prop\nh : p ∧ q\n⊢ q\n\n{RIGHT}"
ONE = "⊢ 1 = 1"
THEOREMS = {  # state: {tactic: outcome}; the first state is the theorem's own
    "one_step": {"⊢ 2 + 2 = 4": {"norm_num": DONE, "rfl": DONE}},
    "two_steps": {
        SWAP: {"obtain ⟨hp, hq⟩ := h": PARTS, "constructor": BOTH},
        PARTS: {"exact ⟨hq, hp⟩": DONE},
        BOTH: {"exact h.2": RIGHT},
        RIGHT: {"exact h.1": DONE},
    },
    "unprovable": {"⊢ False": {"exfalso": "⊢ False"}},
    "hanging": {ONE: {"simp": hang, "rfl": DONE}},
    "dying": {ONE: {"simp": die, "rfl": DONE}},
    "flaky_death": {ONE: {"rfl": once(die, DONE, "flaky_death")}},
    "flaky_hang": {ONE: {"rfl": once(hang, DONE, "flaky_hang")}},
    "start_solved": {ONE: {}},
}


def settle(outcome, state, sid):
    """Reply with the outcome; return the new state, if there is one."""
    try:
        while callable(outcome):
            outcome = outcome(state)
    except ValueError as error:
        return reply(error=str(error))
    if outcome is not None:
        reply(sid, outcome)
    return outcome


def lean(file):
    name = Path(file).read_text()
    with open(f"{os.environ[FOLDER]}/pids", "a") as pids:
        pids.write(f"{os.getpid()} {name}\n")
    first = DONE if name == "start_solved" else next(iter(THEOREMS[name]))
    states = [settle(first, first, 0)]
    for line in sys.stdin:
        request = json.loads(line)  # a line that the terminal has cut ends the process
        state, tactic = states[request["sid"]], request["cmd"]
        outcome = THEOREMS[name].get(state, {}).get(tactic) or EVERYWHERE.get(tactic.split(" ")[0])
        outcome = outcome or (SORRY if "sorry" in tactic else fail("unknown tactic"))
        state = settle(outcome, state, len(states))
        states += [] if state is None else [state]


# ---- Its folder and processes ---------------------------------------------------------------
LAKE = """#!/bin/sh
shift
{python} -E -S -X utf8 {stand_in} "$@"
exit $?
"""


def make_folder(folder):
    """Write what lean_dojo looks for. Returns (variables of the environment, {name: theorem})."""
    lake = folder / "bin/lake"
    lake.parent.mkdir()
    lake.write_text(LAKE.format(python=sys.executable, stand_in=__file__))
    lake.chmod(0o755)
    for name in ("pids", "Lean4Repl.lean"):
        (folder / name).touch()
    variables = {
        "PATH": f"{lake.parent}{os.pathsep}{os.environ['PATH']}",
        "GITHUB_ACCESS_TOKEN": "",  # with one, importing lean_dojo asks GitHub for its user
        FOLDER: str(folder),
    }
    place = {"url": "stand-in", "commit": "0", "file_path": "Standin.lean"}
    return variables, {name: place | {"full_name": name} for name in THEOREMS}


def running(variables, theorem=None, wait=0.0):
    """Process ids of the stand-ins that still run after up to `wait` seconds, of one or all."""
    end = time.monotonic() + wait
    while True:
        lines = Path(variables[FOLDER], "pids").read_text().splitlines()
        started = [line.split() for line in lines]
        found = [int(pid) for pid, name in started if theorem in (None, name) and is_alive(pid)]
        if not found or time.monotonic() >= end:
            return found
        time.sleep(0.02)


def is_alive(pid):
    try:
        return "lean_stand_in" in Path(f"/proc/{pid}/cmdline").read_text()  # empty for a zombie
    except (FileNotFoundError, ProcessLookupError):
        return False


if __name__ == "__main__":
    lean(sys.argv[-1])  # lean --threads=1 --memory=32768 FILE
