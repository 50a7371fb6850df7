"""prove.py with a model that is a table: checkpoints name the chance of each tactic in each state.

    python tests/scripted_prove.py [prove.py's arguments]

All else is prove.py's own: the search, Ray, Lean's worker, the files. What is drawn depends on the seeds of prove.py
alone, so that two runs with the same settings draw the same.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common
import prove

PAUSE = "SCRIPTED_PAUSE"  # seconds that each request takes, for tests that want to be in the middle of a run
EOS = 256


class Bytes:
    """A tokenizer of bytes, with all that prove.py asks of one."""

    eos_token_id = EOS

    def __call__(self, text):
        return type("Encoding", (), {"input_ids": list(text.encode())})

    def decode(self, ids, **_):
        return bytes(one for one in ids if one != EOS).decode()


class Table(torch.nn.Module):
    def __init__(self, chances):
        super().__init__()
        self.chances = chances


class Sampler:
    """In place of common.LiveModel."""

    def __init__(self, accelerator, model, tokenizer, *_):
        self.chances, self.prompt = model.chances, common.TEMPLATES["lean"].prompt

    def generate(self, prompts, counts, max_new_tokens, seeds):
        time.sleep(float(os.environ.get(PAUSE, 0)))
        found = []
        for ids, n, seed in zip(prompts, counts, seeds, strict=True):
            state = bytes(ids).decode().removesuffix(self.prompt.partition("{problem}")[2])
            table = self.chances.get(state) or self.chances["else"]
            weights = np.array(list(table.values()), dtype=float)
            drawn = np.random.default_rng(seed).multinomial(n, weights / weights.sum())
            ends = [list(tactic.encode()) + [EOS] * (tactic != "no end") for tactic in table]
            found.append([common.Completion(end, None) for end, m in zip(ends, drawn, strict=True) for _ in range(m)])
        return found

    def shut_down(self):
        pass


def make_checkpoint(folder: Path, chances: dict, **record) -> Path:
    """chances: {state, or "else": {tactic: weight}}; the tactic "no end" is one that no EOS closes."""
    folder.mkdir(parents=True)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "max_position_embeddings": 8192}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_text(json.dumps(chances))
    record = {"template": "lean", "max_new_tokens": 200, "max_length": 8192, "base": "none"} | record
    (folder / "dco.json").write_text(json.dumps(record))
    return folder


def load_model(checkpoint, tokenizer, dtype):
    return Table(json.loads((Path(checkpoint) / "model.safetensors").read_text())), False


def main(argv):
    common.load_tokenizer = lambda checkpoint: Bytes()
    common.load_model, common.LiveModel = load_model, Sampler
    prove.main(argv)


if __name__ == "__main__":
    main(sys.argv[1:])
