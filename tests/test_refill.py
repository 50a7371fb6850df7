"""Refill against the definition of a step, restated plainly, and what it costs."""

import math
import random

import pytest
import torch

import common


def steps_by_definition(size, batch_size, accepts, seed, epochs):
    """Go through each epoch's permutation: batch_size accepted make a step, the epoch's rest one
    more. accepts(example, step) -> bool. Returns [(accepted, candidates seen)]."""
    steps = []
    for epoch in range(1, epochs + 1):
        generator = torch.Generator().manual_seed(common.seed_of(seed, "epoch", epoch))
        accepted, seen = [], []
        for candidate in torch.randperm(size, generator=generator).tolist():
            seen.append(candidate)
            if accepts(candidate, len(steps)):
                accepted.append(candidate)
            if len(accepted) == batch_size:
                steps.append((accepted, seen))
                accepted, seen = [], []
        if accepted:
            steps.append((accepted, seen))
    return steps


class Trainer:
    """Stands for a model: which examples it accepts changes with every step. Counts its work in
    forwards of one example; a backward costs k - 1 of them."""

    def __init__(self, accepts, processes=1, k=3):
        self.accepts, self.processes, self.k = accepts, processes, k
        self.step, self.cost = 0, 0
        self.weights, self.ended = {}, 0  # of this step

    def values(self, ids):
        return torch.tensor([float(self.accepts(i, self.step)) for i in ids])

    def computed(self, ids):
        """Every process computes as many."""
        return math.ceil(len(ids) / self.processes) * self.processes

    def score(self, ids):
        self.cost += self.computed(ids)
        return self.values(ids)

    def forward(self, ids):
        self.cost += self.computed(ids)

        def backward(weights, last):
            assert not self.ended, "a backward after the last one"
            self.ended += last
            self.cost += (self.k - 1) * self.computed(ids)
            for i, weight in zip(ids, weights.tolist(), strict=True):
                self.weights[i] = self.weights.get(i, 0) + weight

        return self.values(ids), backward


def length(example):
    return 20 + example * 7919 % 101


def make_refill(size, batch_size, processes=1, tokens=560, straight_above=2 / 3, seed=3):
    def accept(values):
        return values > 0.5

    def rounds(ids):
        return common.make_rounds(ids, length, processes, tokens)

    return common.Refill(size, batch_size, accept, rounds, seed, straight_above, processes)


def run(refill, trainer, epochs):
    """Return what `steps_by_definition` does, checking the gradient of each step on the way."""
    steps = []
    for _ in range(epochs):
        refill.start_epoch()
        while step := refill.next_step(trainer.score, trainer.forward):
            assert trainer.ended == 1, "`last` is said exactly once in a step"
            used = {i: weight for i, weight in trainer.weights.items() if weight}
            assert used == dict.fromkeys(step.ids, pytest.approx(1 / refill.batch_size))
            assert step.values.tolist() == [trainer.accepts(i, trainer.step) for i in step.seen]
            steps.append((step.ids, step.seen))
            trainer.step, trainer.weights, trainer.ended = trainer.step + 1, {}, 0
        assert not any(trainer.weights.values()) and not trainer.ended, "nothing is left behind"
        assert refill.position == refill.size
    return steps


def drifting(share):
    """Accept about this share of the examples, others every third step."""
    return lambda example, step: common.seed_of(example, step // 3) % 1000 < 1000 * share


WAYS = {"score always": 1.0, "straight always": -1.0, "the cheaper one": 2 / 3}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("share", [1.0, 0.97, 0.7, 0.2, 0.03, 0.0])
def test_a_step_is_the_first_accepted_candidates_of_the_stream(way, share):
    """Whatever the processes and token budgets; with data smaller than a batch one short step an
    epoch, and none where nothing is accepted."""
    for size, batch_size in ((150, 16), (40, 8), (33, 50), (64, 16), (5, 1)):
        expected = steps_by_definition(size, batch_size, drifting(share), seed=3, epochs=4)
        for processes, tokens in ((1, 1), (2, 256), (1, 700), (3, 500), (8, 4000)):
            refill = make_refill(size, batch_size, processes, tokens, WAYS[way])
            trainer = Trainer(drifting(share), processes)
            if share == 1 and WAYS[way] < 1:
                trainer.score = None  # cross-entropy never scores
            assert run(refill, trainer, epochs=4) == expected
            assert refill.epoch == 4


@pytest.mark.parametrize("share", [1.0, 0.97, 0.9, 0.8, 0.75, 0.7, 0.67, 0.6, 0.5, 0.2, 0.05, 0.02])
def test_a_step_costs_at_most_five_percent_more_than_the_cheaper_way(share):
    """Counted in forwards: scoring all candidates and training on the accepted, or training on
    all candidates. k: 3, or 4 with gradient checkpointing."""
    steps = 40
    for k in (3, 4):
        for batch_size, processes in ((64, 1), (64, 8), (32, 1), (128, 8)):
            size = int(1.3 * steps * batch_size / share)
            rng = random.Random(0)
            accepted = [rng.random() < share for _ in range(size)]
            trainer = Trainer(lambda example, step, hits=accepted: hits[example], processes, k)
            refill = make_refill(size, batch_size, processes, straight_above=(k - 1) / k)
            refill.start_epoch()
            refill.next_step(trainer.score, trainer.forward)  # it estimates the accept rate
            trainer.cost = cheaper = 0
            for _ in range(steps - 1):
                trainer.ended = 0
                step = refill.next_step(trainer.score, trainer.forward)
                seen = trainer.computed(step.seen)
                cheaper += min(seen + k * len(step.ids), k * seen)
            assert trainer.cost <= 1.05 * cheaper, (k, batch_size, processes)
