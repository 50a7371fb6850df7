"""Samples that a test makes up, for training scripts that run in the test's process."""

import torch

import common


def sums(count):
    """Rows of different problems with short solutions."""
    rows = []
    for i in range(count):
        a, b = 10 + i % 80, i // 80
        rows.append({"problem": f"{a}+{b}=", "answer": str(a + b)})
        rows[-1]["solution"] = f"{a}+{b}=\\boxed{{{a + b}}}"
    return rows


def spell(tokenizer, text, end=True):
    """The completion that says this, closed or as if the limit had cut it."""
    return tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id] * end


class Injected:
    """Stands in for common.make_sampler and for the sampler. draw(id, step, n) returns n lists of
    token ids; step counts the weights received. events: ("generate", ids, n, seeds, step) and
    ("update",), in their order."""

    def __init__(self, data, template, tokenizer, draw):
        rows = common.load_problems(str(data), "train")
        rows += common.load_problems(str(data), "test", required=False)
        self.id_of = {}
        for row in rows:
            prompt = common.fill(common.TEMPLATES[template].prompt, row)
            self.id_of.setdefault(tuple(tokenizer(prompt).input_ids), row["id"])
        self.draw, self.step, self.events = draw, 0, []

    def __call__(self, args, accelerator, checkpoint, tokenizer, max_length, model=None):
        return self

    def generate(self, prompts, n, max_new_tokens, seeds=None, temperature=1.0):
        ids = [self.id_of[tuple(prompt)] for prompt in prompts]
        self.events.append(("generate", ids, n, seeds, self.step))
        return [[common.Completion(one, -1.0) for one in self.draw(i, self.step, n)] for i in ids]

    def update_weights(self, model):
        self.step += 1
        self.events.append(("update",))

    def assert_sampled_afresh(self, steps):
        """New weights once a step; what a step did not use is sampled anew, with another seed."""
        assert self.events.count(("update",)) == len(steps)
        seeds = {}
        for _, ids, _, seeds_of_ids, step in (event for event in self.events if len(event) > 1):
            for i, seed in zip(ids, seeds_of_ids, strict=True):
                seeds.setdefault((i, step), set()).add(seed)
        assert all(len(of_one) == 1 for of_one in seeds.values())
        assert len(set.union(*seeds.values())) == len(seeds)
        assert len(seeds) > sum(step["candidates"] for step in steps)


def use_plain_sgd(monkeypatch):
    """AdamW hides the scale of a gradient, so a wrong factor would not show."""

    class Descent(torch.optim.SGD):
        def __init__(self, parameters, lr, betas, weight_decay):
            super().__init__(parameters, lr)

    monkeypatch.setattr(torch.optim, "AdamW", Descent)
