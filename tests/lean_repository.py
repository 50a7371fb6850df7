"""The Lean repository of the theorems in lean_stand_in.py, as lean_dojo finds one that it has traced before."""

import json
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from lean_stand_in import PIDS, PROOFS, THEOREMS, TRIES

RECORDS = "LEAN_STAND_IN_THEOREMS"  # a file: the theorems, in the format of LeanDojo Benchmark 4
LAKE = """#!/bin/sh
# `lake env lean ...` runs Lean as its child and passes its exit code on: who kills lake alone leaves Lean behind
shift
{python} -E -S -X utf8 {stand_in} "$@"
exit $?
"""


def make_repository(folder):
    """Write everything into the folder; the environment in which lean_dojo opens the theorems, here or anywhere.

    Where it goes, by name: lake in bin/, the git repository in standin/, LeanDojo's cache in cache/.
    """
    folder = Path(folder).resolve()  # lean_dojo resolves links in one of two paths that it compares
    repository, cache, lake = folder / "standin", folder / "cache", folder / "bin" / "lake"
    for new in (repository, lake.parent, folder / "tries"):
        new.mkdir(parents=True)
    lake.write_text(LAKE.format(python=sys.executable, stand_in=Path(__file__).with_name("lean_stand_in.py")))
    lake.chmod(0o755)
    (folder / "pids").touch()

    source = Source()
    records = [source.add_theorem(name) for name in THEOREMS]
    (repository / "lean-toolchain").write_text("leanprover/lean4:v4.20.0\n")
    (repository / "Standin.lean").write_text(source.text)
    git = ["git", "-C", repository, "-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "Theorems"]):
        subprocess.run([*git, *command], check=True)
    commit = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    where = {"url": str(repository), "commit": commit, "file_path": "Standin.lean"}
    (folder / "theorems.json").write_text(json.dumps([where | record for record in records], ensure_ascii=False))

    # lean_dojo copies a local repository into its cache at first use; two processes that do so at once end in an error
    shutil.copytree(repository, cache / "repos" / f"gitpython-standin-{commit}" / "standin")
    traced = cache / f"gitpython-standin-{commit}" / "standin"
    shutil.copytree(repository, traced)
    shutil.copy(Path(find_spec("lean_dojo").origin).parent / "interaction" / "Lean4Repl.lean", traced)
    trace = traced / ".lake" / "build" / "ir"
    trace.mkdir(parents=True)
    (trace / "Standin.dep_paths").touch()
    syntax = {"commandASTs": source.commands, "tactics": source.tactics, "premises": []}
    (trace / "Standin.ast.json").write_text(json.dumps(syntax, ensure_ascii=False))
    return {
        "PATH": f"{lake.parent}{os.pathsep}{os.environ['PATH']}",
        "CACHE_DIR": str(cache),
        "DISABLE_REMOTE_CACHE": "1",
        "GITHUB_ACCESS_TOKEN": "",  # with one, importing lean_dojo asks GitHub for its user
        PIDS: str(folder / "pids"),
        TRIES: str(folder / "tries"),
        RECORDS: str(folder / "theorems.json"),
    }


def running(environment, theorem=None, wait=0.0):
    """The stand-ins of this environment (of one theorem only, if named) that still run, by their process ids.

    With `wait`, those that run on after so many seconds: a kill is over a little before the process is.
    """
    end = time.monotonic() + wait
    while True:
        started = [line.split() for line in Path(environment[PIDS]).read_text().splitlines()]
        found = [int(pid) for pid, name in started if theorem in (None, name) and is_stand_in(pid)]
        if not found or time.monotonic() >= end:
            return found
        time.sleep(0.02)


def is_stand_in(pid):
    try:
        return "lean_stand_in.py" in Path(f"/proc/{pid}/cmdline").read_text()  # empty for a zombie
    except (FileNotFoundError, ProcessLookupError):
        return False


def node(kind, *children):
    return {"node": {"kind": kind, "info": "none", "args": list(children)}}


class Source:
    """Standin.lean as it grows, with its syntax and tactics as lean_dojo's ExtractData.lean writes them down."""

    def __init__(self):
        self.text, self.commands, self.tactics = "", [node("Lean.Parser.Module.header")], []

    def leaf(self, token, trailing=" ", kind="atom"):
        start = len(self.text.encode())
        place = {"leading": "", "pos": start, "trailing": trailing, "endPos": start + len(token.encode())}
        self.text += token + trailing
        more = {"rawVal": token, "preresolved": []} if kind == "ident" else {}
        return {kind: {"info": {"original": place}, "val": token, **more}}

    def add_theorem(self, name):
        """`theorem NAME : True := by ...`; its record, without the repository."""
        proof, line = PROOFS.get(name, ["trivial"]), self.text.count("\n") + 1
        theorem = [
            self.leaf("theorem"),
            node("Lean.Parser.Command.declId", self.leaf(name, kind="ident")),
            node("Lean.Parser.Command.declSig", node("Lean.Parser.Term.typeSpec", self.leaf(":"), self.leaf("True"))),
        ]
        value, by = self.leaf(":="), self.leaf("by", "\n  ")
        steps = []
        for count, tactic in enumerate(proof, 1):
            steps += [node("null")] if steps else []  # stands for the line's end between two
            leaf = self.leaf(tactic, "\n  " if count < len(proof) else "\n\n")
            steps.append(node("Lean.Parser.Tactic.standIn", leaf))
        sequence = node("Lean.Parser.Tactic.tacticSeq1Indented", node("null", *steps))
        proved = node("Lean.Parser.Term.byTactic", by, node("Lean.Parser.Tactic.tacticSeq", sequence))
        theorem.append(node("Lean.Parser.Command.declValSimple", value, proved))
        modifiers = node("Lean.Parser.Command.declModifiers")
        declaration = node("Lean.Parser.Command.theorem", *theorem)
        self.commands.append(node("Lean.Parser.Command.declaration", modifiers, declaration))
        end = [line + len(proof), len(f"  {proof[-1]}") + 1]
        traced = self.trace(name, steps[::2]) if name in PROOFS else []
        return {"full_name": name, "start": [line, 1], "end": end, "traced_tactics": traced}

    def trace(self, name, steps):
        traced, state = [], next(iter(THEOREMS[name]))
        for step in steps:
            leaf = step["node"]["args"][0]["atom"]
            tactic, place = leaf["val"], leaf["info"]["original"]
            before, state = state, THEOREMS[name][state][tactic]
            states = {"state_before": before, "state_after": state}
            traced.append({"tactic": tactic, "annotated_tactic": [tactic, []], **states})
            positions = {"pos": place["pos"], "endPos": place["endPos"]}
            self.tactics.append({**positions, "stateBefore": before, "stateAfter": state})
        return traced
