"""Samples that a test makes up, in place of an engine's, for training scripts that run in the test's process."""

import json

import torch
from conftest import ROOT

import common

TINY = str(ROOT / "examples/tiny_llama")


def sums(count):
    """Rows of different problems with short solutions."""
    rows = []
    for i in range(count):
        a, b = 10 + i % 80, i // 80
        rows.append({"problem": f"{a}+{b}=", "answer": str(a + b), "solution": f"{a}+{b}=\\boxed{{{a + b}}}"})
    return rows


def write(folder, train, test=()):
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (("train", train), ("test", test)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def spell(tokenizer, text, end=True):
    """The completion that says this, closed or as if the limit had cut it."""
    return tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] * end


class Injected:
    """Stands in for `common.spawn_engines` and for what it returns. draw(id, step, n) -> n lists of token ids; step
    counts the weights received. events: ("generate", ids, n, seeds, step) and ("update",), in their order."""

    def __init__(self, data, template, tokenizer, draw):
        rows = common.load_problems(str(data), "train") + common.load_problems(str(data), "test", False)
        examples, _ = common.encode([row | {"solution": "-"} for row in rows], tokenizer, template, 2048)
        # A test problem has the number of a training problem as well; no test here needs to tell them apart.
        self.id_of = {tuple(example.prompt_ids): example.id for example in reversed(examples)}
        self.draw, self.step, self.events = draw, 0, []

    def __call__(self, args, accelerator, tokenizer, longest, model):
        return self

    def generate(self, prompts, n, max_new_tokens, seeds=None, temperature=1.0):
        ids = [self.id_of[tuple(prompt)] for prompt in prompts]
        self.events.append(("generate", ids, n, seeds, self.step))
        return [[common.Completion(one, None) for one in self.draw(i, self.step, n)] for i in ids]

    def update_weights(self, model):
        self.step += 1
        self.events.append(("update",))

    def seeds(self):
        """{(id, step): the seeds that it was sampled with}."""
        found = {}
        for _, ids, _, seeds, step in (event for event in self.events if event[0] == "generate"):
            for i, seed in zip(ids, seeds, strict=True):
                found.setdefault((i, step), set()).add(seed)
        return found

    def shut_down(self):
        self.events.append(("shut down",))


def use_plain_sgd(monkeypatch):
    """AdamW hides the scale of a gradient, so a wrong factor would not show; plain descent hides nothing."""

    class Descent(torch.optim.SGD):
        def __init__(self, parameters, lr, betas, weight_decay):
            super().__init__(parameters, lr)

    monkeypatch.setattr(torch.optim, "AdamW", Descent)
