"""An environment for prove.py's --dojo that needs no Lean and gets into all trouble that one written in Python can.

A state is a number of steps to go, as its text says; `step` takes one. A theorem starts with the number in its name.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass
class TacticState:
    pp: str
    left: int


class ProofFinished:
    pass


@dataclass
class LeanError:
    error: str


class Dojo:
    def __init__(self, theorem, timeout):
        self.theorem, self.noted = theorem, False

    def __enter__(self):
        if self.theorem["full_name"] == "unwilling":
            raise OSError("this theorem is not for me")
        return self, self.state(int(self.theorem["full_name"].split("_")[1]))

    def __exit__(self, *_):
        pass

    def state(self, left):
        return TacticState(f"{left} to go", left) if left else ProofFinished()

    def run_tac(self, state, tactic):
        word, _, file = tactic.partition(" ")
        if word == "die" or (word == "die_once" and not Path(file).exists()):
            file and Path(file).touch()
            os._exit(1)
        if word == "hang" or (word == "hang_once" and not Path(file).exists()):
            file and Path(file).touch()
            time.sleep(1000)
        if word == "note":
            self.noted = True
        if word == "if_noted" and self.noted:
            return ProofFinished()
        if word == "raise":
            raise RuntimeError("no such luck")
        if word in ("no_text", "half_a_pair"):
            return TacticState(None if word == "no_text" else "\ud83d", 1)
        if word in ("step", "die_once", "hang_once"):
            return self.state(state.left - 1)
        return LeanError(f"no such tactic: {tactic}")
