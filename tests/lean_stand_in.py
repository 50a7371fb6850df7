"""A scripted stand-in for Lean, and the repository in which the real lean_dojo finds it.

Run as `python lean_stand_in.py lean ... FILE`, it speaks the protocol of lean_dojo's
Lean4Repl.lean for the theorem of THEOREMS whose proof FILE leaves to `lean_dojo_repl`.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

DONE = "no goals"
PIDS = "LEAN_STAND_IN_PIDS"  # a file: every process started here appends "PID THEOREM"
TRIES = "LEAN_STAND_IN_TRIES"  # a folder: a file in it for everything that fails only once


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


def exceed_memory(state):
    """What Lean 4.35 does over its memory limit."""
    say("excessive memory consumption detected at 'interpreter' (potential solution: increase")
    say(" memory consumption threshold)\n")
    os._exit(1)


def fail(message):
    def outcome(state):
        raise ValueError(message)

    return outcome


def once(mishap, then, name):
    """The mishap once per TRIES folder, whichever process tries; from then on the other outcome."""

    def outcome(state):
        try:
            (Path(os.environ[TRIES]) / name).touch(exist_ok=False)
            return mishap
        except FileExistsError:
            return then

    return outcome


EVERYWHERE = {  # tactics of every state
    "skip": lambda state: state,
    "sleep": lambda state: (time.sleep(0.8), state)[1],
    "hang": hang,
    "die": die,
    "exceed_memory": exceed_memory,
    "garbage": lambda state: say("REPL> Segmentation fault\n"),
    "noise": lambda state: say("PANIC\n"),  # and no reply
    "turnstiles": "⊢ one goal ⊢ or two",  # which lean_dojo cannot read
}
SORRY = fail("proof contains `sorry`")  # said at the end of a proof, not at the tactic
SWAP, PARTS = "p q : Prop\nh : p ∧ q\n⊢ q ∧ p", "p q : Prop\nhp : p\nhq : q\n⊢ q ∧ p"
RIGHT = "case right\np q : Prop\nh : p ∧ q\n⊢ p"
BOTH = f"case left\np q : Prop\nh : p ∧ q\n⊢ q\n\n{RIGHT}"
THEOREMS = {  # state: {tactic: outcome}; the first state is the theorem's own
    "one_step": {"⊢ 2 + 2 = 4": {"norm_num": DONE, "rfl": DONE}},
    "two_steps": {
        SWAP: {"obtain ⟨hp, hq⟩ := h": PARTS, "constructor": BOTH},
        PARTS: {"exact ⟨hq, hp⟩": DONE},
        BOTH: {"exact h.2": RIGHT},
        RIGHT: {"exact h.1": DONE},
    },
    "unprovable": {"⊢ False": {"exfalso": "⊢ False"}},
    "native": {"⊢ 7919 = 7919": {"native_decide": DONE}},
    "sorry_inside": {
        "⊢ 1 < 2": {"have h : 1 < 2 := by sorry": "h : 1 < 2\n⊢ 1 < 2"},
        "h : 1 < 2\n⊢ 1 < 2": {"exact h": SORRY},
    },
    "hanging": {"⊢ 1 = 1": {"simp": hang, "rfl": DONE}},
    "dying": {"⊢ 1 = 1": {"simp": die, "skip": exceed_memory, "rfl": DONE}},
    "flaky_death": {"⊢ 1 = 1": {"rfl": once(die, DONE, "flaky_death")}},
    "flaky_hang": {"⊢ 1 = 1": {"rfl": once(hang, DONE, "flaky_hang")}},
}
STARTS = {  # what comes before the first state, which is "⊢ True" of one step
    "start_eof": lambda state: os._exit(0),
    "start_hang": hang,
    "start_garbage": lambda state: say("REPL> Segmentation fault\n"),
    "start_solved": DONE,
    "start_flaky": once(die, "⊢ True", "start_flaky"),
}
THEOREMS |= {name: {"⊢ True": {"trivial": DONE}} for name in STARTS}


def settle(outcome, state, sid):
    """Reply with the outcome; return the new state, if there is one."""
    try:
        while callable(outcome):
            outcome = outcome(state)
        if outcome is not None:
            reply(sid, outcome)
        return outcome
    except ValueError as error:
        reply(error=str(error))


def lean(file):
    before = Path(file).read_text().split("lean_dojo_repl")[0]
    name = before.split("theorem ")[-1].split()[0]
    with open(os.environ[PIDS], "a") as pids:
        pids.write(f"{os.getpid()} {name}\n")
    first = next(iter(THEOREMS[name]))
    states = [settle(STARTS.get(name, first), first, 0)]
    for line in sys.stdin:
        request = json.loads(line)  # a line that the terminal has cut ends the process
        state, tactic = states[request["sid"]], request["cmd"]
        outcome = THEOREMS[name].get(state, {}).get(tactic) or EVERYWHERE.get(tactic.split(" ")[0])
        outcome = outcome or (SORRY if "sorry" in tactic else fail("unknown tactic"))
        state = settle(outcome, state, len(states))
        states += [] if state is None else [state]


# ---- The repository -------------------------------------------------------------------------
LAKE = """#!/bin/sh
# `lake env lean ...` runs Lean as its child: who kills lake alone leaves Lean behind
shift
{python} -E -S -X utf8 {stand_in} "$@"
exit $?
"""


def make_repository(folder):
    """Write all that lean_dojo needs to open the theorems: lake, a git repository, and its traced
    copy. Returns (variables of the environment, {name: record of the theorem})."""
    folder = Path(folder).resolve()  # lean_dojo resolves links in one of two paths it compares
    repository, cache, lake = folder / "standin", folder / "cache", folder / "bin" / "lake"
    for new in (repository, lake.parent, folder / "tries"):
        new.mkdir(parents=True)
    lake.write_text(LAKE.format(python=sys.executable, stand_in=__file__))
    lake.chmod(0o755)
    (folder / "pids").touch()
    text, commands = "", [node("Lean.Parser.Module.header")]
    for name in THEOREMS:
        text, command = add_theorem(text, name)
        commands.append(command)
    (repository / "lean-toolchain").write_text("leanprover/lean4:v4.20.0\n")
    (repository / "Standin.lean").write_text(text)
    git = ["git", "-C", repository, "-c", "user.name=A", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "Theorems", "--no-gpg-sign"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True).strip()

    # lean_dojo copies a repository at its first use; two processes that do so at once collide.
    traced = cache / f"gitpython-standin-{commit}" / "standin"
    for copy in (cache / "repos" / f"gitpython-standin-{commit}" / "standin", traced):
        shutil.copytree(repository, copy)
    from importlib.util import find_spec

    lean_dojo = Path(find_spec("lean_dojo").origin).parent
    shutil.copy(lean_dojo / "interaction" / "Lean4Repl.lean", traced)
    trace = traced / ".lake" / "build" / "ir"
    trace.mkdir(parents=True)
    (trace / "Standin.dep_paths").touch()
    syntax = {"commandASTs": commands, "tactics": [], "premises": []}
    (trace / "Standin.ast.json").write_text(json.dumps(syntax))
    place = {"url": str(repository), "commit": commit, "file_path": "Standin.lean"}
    variables = {
        "PATH": f"{lake.parent}{os.pathsep}{os.environ['PATH']}",
        "CACHE_DIR": str(cache),
        "DISABLE_REMOTE_CACHE": "1",
        "GITHUB_ACCESS_TOKEN": "",  # with one, importing lean_dojo asks GitHub for its user
        PIDS: str(folder / "pids"),
        TRIES: str(folder / "tries"),
    }
    return variables, {name: place | {"full_name": name} for name in THEOREMS}


def node(kind, *children):
    return {"node": {"kind": kind, "info": "none", "args": list(children)}}


def add_theorem(text, name):
    """`theorem NAME : True := by trivial` and its syntax as lean_dojo's ExtractData.lean writes."""
    leaves = {}
    for token in ("theorem", name, ":", "True", ":=", "by", "trivial"):
        start, trailing = len(text.encode()), "\n\n" if token == "trivial" else " "
        place = {"leading": "", "pos": start, "trailing": trailing}
        place["endPos"] = start + len(token)
        kind, more = (
            ("ident", {"rawVal": token, "preresolved": []}) if token == name else ("atom", {})
        )
        leaves[token] = {kind: {"info": {"original": place}, "val": token, **more}}
        text += token + trailing
    tactic = node("null", node("Lean.Parser.Tactic.standIn", leaves["trivial"]))
    tactics = node("Lean.Parser.Tactic.tacticSeq1Indented", tactic)
    proof = node(
        "Lean.Parser.Term.byTactic", leaves["by"], node("Lean.Parser.Tactic.tacticSeq", tactics)
    )
    statement = node("Lean.Parser.Term.typeSpec", leaves[":"], leaves["True"])
    theorem = node(
        "Lean.Parser.Command.theorem",
        leaves["theorem"],
        node("Lean.Parser.Command.declId", leaves[name]),
        node("Lean.Parser.Command.declSig", statement),
        node("Lean.Parser.Command.declValSimple", leaves[":="], proof),
    )
    modifiers = node("Lean.Parser.Command.declModifiers")
    return text, node("Lean.Parser.Command.declaration", modifiers, theorem)


def running(variables, theorem=None, wait=0.0):
    """Process ids of the stand-ins that still run (after up to `wait` seconds), of one theorem or
    of all."""
    end = time.monotonic() + wait
    while True:
        started = [line.split() for line in Path(variables[PIDS]).read_text().splitlines()]
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
