"""python tests/scripted_prove.py [prove.py's arguments]: prove.py with a model that is a table, for
which a checkpoint names the chance of each tactic in each state."""

import json
import os
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import ray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import prove


class ScriptedSampler:
    """In place of prove.TacticSampler. What it draws depends on the keys of the requests alone."""

    def __init__(self, args, checkpoint, times):
        self.chances = json.loads((Path(checkpoint) / "model.safetensors").read_text())
        self.seed, self.sampler = common.seed_of(args.seed, checkpoint, times), self

    def sample(self, requests):
        time.sleep(float(os.environ.get("SCRIPTED_PAUSE", 0)))
        answers = []
        for text, n, key in requests:
            table = self.chances.get(text) or self.chances["else"]
            weights = np.array(list(table.values()), dtype=float)
            rng = np.random.default_rng(common.seed_of(self.seed, key))
            drawn = rng.multinomial(n, weights / weights.sum()).tolist()
            tactics = [None if tactic == "no end" else tactic for tactic in table]
            answers.append((+Counter(dict(zip(tactics, drawn, strict=True))), 0.0))
        return answers

    def shut_down(self):
        pass


def make_checkpoint(folder, chances, **record):
    """chances: {state, or "else": {tactic: weight}}; "no end" is a tactic that no EOS closes."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text(json.dumps(chances))
    (folder / "dco.json").write_text(json.dumps({"template": "lean", "n_prime": 1.0} | record))
    return folder


if __name__ == "__main__":
    ray.cloudpickle.register_pickle_by_value(prove)  # workers import no torch, as in prove.py
    prove.TacticSampler = ScriptedSampler
    prove.main(sys.argv[1:])
