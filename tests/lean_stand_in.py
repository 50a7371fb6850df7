"""A scripted stand-in for Lean, for tests of what drives Lean through the real lean_dojo: only Lean itself is missing.

Run as `python lean_stand_in.py lean ... FILE`, it speaks the protocol of lean_dojo's Lean4Repl.lean for the theorem of
THEOREMS whose proof FILE leaves to `lean_dojo_repl`. lean_repository.py writes all that lean_dojo needs to get here.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

DONE = "no goals"
PIDS = "LEAN_STAND_IN_PIDS"  # a file: every process started here appends "PID THEOREM"
TRIES = "LEAN_STAND_IN_TRIES"  # a folder: a file in it for everything that fails the first time only


def say(text):
    print(text, end="", flush=True)


def reply(sid=None, state=None, error=None):
    say("REPL> " + json.dumps({"tacticState": state, "sid": sid, "error": error}, ensure_ascii=False) + "\n")


def fatal(message):
    """What an error outside the tactics makes of Lean: it gives up this theorem, elaborates the rest, and is gone."""
    say(f"Standin.lean:6:2: error: [fatal] {message}\n")
    sys.exit(1)


# Outcomes of a tactic: a str is the next state; a function of the state and the tactic returns one of these, raises
# ValueError for Lean's error, or returns None if it has said all there is to say.
def hang(state, tactic):
    for name in (signal.SIGHUP, signal.SIGTERM):  # Lean busy in a loop may hear of neither
        signal.signal(name, signal.SIG_IGN)
    while True:
        signal.pause()


def die(state, tactic):
    say('REPL> {"tacticState": "⊢ Fal')
    os._exit(1)


def out_of_memory(state, tactic):
    """The kill falls between two tactics: the first is answered, and 0.3 s are enough to read it."""
    signal.signal(signal.SIGALRM, lambda *_: os._exit(137))
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    return state


def fail(message):
    def outcome(state, tactic):
        raise ValueError(message)

    return outcome


def after(seconds, outcome):
    return lambda state, tactic: (time.sleep(seconds), outcome)[1]


def first(mishap, then, name):
    """The mishap once per TRIES folder, whichever process tries; from then on the other outcome."""

    def outcome(state, tactic):
        try:
            (Path(os.environ[TRIES]) / name).touch(exist_ok=False)
            return mishap
        except FileExistsError:
            return then

    return outcome


EVERYWHERE = {  # tactics, by their first word, of every state of every theorem
    "skip": lambda state, tactic: state,
    "grow": lambda state, tactic: f"h : True\n{state}",  # a new state at every turn: a search without an end
    "sleep": lambda state, tactic: (time.sleep(float(tactic.split()[1])), state)[1],
    "hang": hang,
    "die": die,
    "out_of_memory": out_of_memory,
    "out_of_memory_at_once": lambda state, tactic: os._exit(137),
    "garbage": lambda state, tactic: say("REPL> Segmentation fault\n"),
    "noise": lambda state, tactic: say("PANIC\n"),  # and no reply
    "trace": lambda state, tactic: (say("a message\n"), state)[1],
    "turnstiles": "⊢ one goal ⊢ or two",
}
SORRY = fail("proof contains `sorry`")  # Lean4Repl says so at the end of a proof, not at the tactic that had it
AND = "p : Prop\nh : p\n⊢ p ∧ True"
LEFT, RIGHT = "case left\np : Prop\nh : p\n⊢ p", "case right\np : Prop\nh : p\n⊢ True"
SWAP = "p q : Prop\nh : p ∧ q\n⊢ q ∧ p"
SWAP_LEFT, SWAP_RIGHT = "case left\np q : Prop\nh : p ∧ q\n⊢ q", "case right\np q : Prop\nh : p ∧ q\n⊢ p"
PARTS = "p q : Prop\nhp : p\nhq : q\n⊢ q ∧ p"
THEOREMS = {  # state → tactic → outcome; the first state is the theorem's own
    "one_step": {"⊢ 2 + 2 = 4": {"norm_num": DONE, "rfl": DONE, "simp": fail("simp made no progress")}},
    "two_steps": {
        SWAP: {"obtain ⟨hp, hq⟩ := h": PARTS, "constructor": SWAP_LEFT + "\n\n" + SWAP_RIGHT},
        PARTS: {"exact ⟨hq, hp⟩": DONE},
        SWAP_LEFT + "\n\n" + SWAP_RIGHT: {"exact h.2": SWAP_RIGHT},
        SWAP_RIGHT: {"exact h.1": DONE},
    },
    "three_steps": {
        AND: {"constructor": LEFT + "\n\n" + RIGHT, "apply And.symm": "p : Prop\nh : p\n⊢ True ∧ p"},
        "p : Prop\nh : p\n⊢ True ∧ p": {"apply And.symm": AND},  # a way round in a circle
        LEFT + "\n\n" + RIGHT: {"exact h": RIGHT, "swap": RIGHT + "\n\n" + LEFT},
        RIGHT + "\n\n" + LEFT: {"trivial": LEFT},
        LEFT: {"exact h": DONE},
        RIGHT: {"trivial": DONE},
    },
    "unprovable": {"⊢ False": {"exfalso": "⊢ False", "trivial": fail("The goal is not provable by trivial")}},
    "native": {"⊢ 7919 = 7919": {"native_decide": DONE}},
    "sorry_inside": {
        "⊢ 1 < 2": {"have h : 1 < 2 := by sorry": "h : 1 < 2\n⊢ 1 < 2"},
        "h : 1 < 2\n⊢ 1 < 2": {"exact h": SORRY},
    },
    "slow": {"⊢ 2 ^ 10 = 1024": {"norm_num": after(0.5, DONE), "decide": after(2, DONE)}},
    "hanging": {"⊢ 1 = 1": {"simp": hang, "rfl": DONE}},
    "hanging_only": {"⊢ 1 = 1": {"simp": hang, "rfl": hang}},
    "dying": {"⊢ 1 = 1": {"simp": die, "rfl": DONE}},
    "memory": {"⊢ 1 = 1": {"simp": lambda state, tactic: os._exit(137), "skip": out_of_memory, "rfl": DONE}},
    "flaky_death": {"⊢ 1 = 1": {"rfl": first(die, DONE, "flaky_death")}},
    "flaky_hang": {"⊢ 1 = 1": {"rfl": first(hang, DONE, "flaky_hang")}},
}
STARTS = {  # what comes before the first state, which is "⊢ True" of one step
    "start_eof": lambda state, tactic: os._exit(0),
    "start_fatal": lambda state, tactic: fatal("not_a_theorem"),
    "start_death": die,
    "start_hang": hang,
    "start_garbage": lambda state, tactic: say("REPL> Segmentation fault\n"),
    "start_error": fail("the header"),
    "start_solved": DONE,
    "start_slow": after(1, "⊢ True"),
    "start_flaky": first(die, "⊢ True", "start_flaky"),
    "start_flaky_hang": first(hang, "⊢ True", "start_flaky_hang"),
}
THEOREMS |= {name: {"⊢ True": {"trivial": DONE}} for name in STARTS}
PROOFS = {  # proofs in the source file, with their traces; the others' are not traced
    "one_step": ["norm_num"],
    "two_steps": ["obtain ⟨hp, hq⟩ := h", "exact ⟨hq, hp⟩"],
    "three_steps": ["constructor", "exact h", "trivial"],
}


def settle(outcome, state, tactic, sid):
    """Reply with what the outcome comes to; the new state, if there is one."""
    try:
        while callable(outcome):
            outcome = outcome(state, tactic)
        if outcome is not None:
            reply(sid, outcome)
        return outcome
    except ValueError as error:
        reply(error=str(error))


def lean(file):
    name = Path(file).read_text().split("lean_dojo_repl")[0].split("theorem ")[-1].split()[0]
    with open(os.environ[PIDS], "a") as pids:
        pids.write(f"{os.getpid()} {name}\n")
    opening = next(iter(THEOREMS[name]))
    states = [settle(STARTS.get(name, opening), opening, "", 0)]
    for line in sys.stdin:
        try:
            request = json.loads(line)
        except ValueError:
            fatal("failed to parse JSON")
        if request["sid"] >= len(states):
            fatal(f"unknown tsid: {request['sid']}")
        state, tactic = states[request["sid"]], request["cmd"]
        outcome = THEOREMS[name].get(state, {}).get(tactic) or EVERYWHERE.get(tactic.split(" ")[0])
        outcome = outcome or (SORRY if "sorry" in tactic else fail("<stdin>:1:1: unknown tactic"))
        state = settle(outcome, state, tactic, len(states))
        states += [] if state is None else [state]
    fatal("failed to parse JSON")  # Lean takes the end of its input for an empty line


if __name__ == "__main__":
    lean(sys.argv[-1])  # lean --threads=1 --memory=32768 FILE
