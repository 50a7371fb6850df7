"""An environment for prove.py's --dojo that gets into trouble as Python can. A state is a number of
steps to go, as its text says; `step` takes one. A theorem starts with the number in its name."""

import os
import time
from collections import namedtuple

TacticState = namedtuple("TacticState", "pp left")
ProofFinished = namedtuple("ProofFinished", "")
LeanError = namedtuple("LeanError", "error")


class Dojo:
    def __init__(self, theorem, timeout):
        self.name, self.noted = theorem["full_name"], False

    def __enter__(self):
        return self, self.state(int(self.name.split("_")[1]))

    def __exit__(self, *_):
        pass

    def state(self, left):
        return TacticState(f"{left} to go", left) if left else ProofFinished()

    def run_tac(self, state, tactic):
        if tactic == "die":
            os._exit(1)
        if tactic == "hang":
            time.sleep(1000)
        if tactic == "raise":
            raise RuntimeError("no such luck")
        if tactic == "half_a_pair":
            return TacticState("\ud83d", 1)
        self.noted |= tactic == "note"
        if tactic == "step":
            return self.state(state.left - 1)
        return ProofFinished() if tactic == "if_noted" and self.noted else LeanError(tactic)
