"""Refill against the definition of a step, written out as plainly as it is stated, and what it costs."""

import math
from collections import Counter

import pytest
import torch

import common


def steps_by_definition(size, batch_size, accepts, seed, epochs):
    """The first `batch_size` accepted candidates of the stream, again and again; accepts(example, step) -> bool.

    -> [(epoch, accepted ids, all candidates looked at)], and the epochs that made no step."""
    steps, leftovers = [], []
    for epoch in range(1, epochs + 1):
        generator = torch.Generator().manual_seed(common.seed_of(seed, "epoch", epoch))
        order = leftovers + [i for i in torch.randperm(size, generator=generator).tolist() if i not in leftovers]
        accepted, looked_at = [], []
        for candidate in order:
            looked_at.append(candidate)
            if accepts(candidate, len(steps)):
                accepted.append(candidate)
            if len(accepted) == batch_size:
                steps.append((epoch, accepted, looked_at))
                accepted, looked_at = [], []
        leftovers = accepted
    if leftovers:
        steps.append((epochs, leftovers, looked_at))
    return steps


class Trainer:
    """A model in which a candidate's acceptance changes with every step, and which keeps account of its work."""

    def __init__(self, accepts, processes=1, k=3):
        self.accepts, self.processes, self.k = accepts, processes, k
        self.step, self.cost, self.gradient, self.scored, self.calls, self.discarded = 0, 0, {}, 0, [], 0

    def values(self, ids):
        return torch.tensor([float(self.accepts(i, self.step)) for i in ids])

    def score(self, ids):
        self.scored += len(ids)
        self.cost += math.ceil(len(ids) / self.processes) * self.processes
        return self.values(ids)

    def train(self, ids, room, count, chosen):
        values = self.values(ids)
        used = [i for i, value in zip(ids, values, strict=True) if chosen or value > 0.5][:room]
        for i in used:
            self.gradient[i] = self.gradient.get(i, 0) + 1 / count
        work = math.ceil(len(ids) / self.processes) * self.processes
        self.cost += work * (self.k if used else 1)
        self.calls.append((len(used), room))
        return values

    def discard(self):
        self.gradient, self.calls, self.discarded = {}, [], self.discarded + 1


def accept(values):
    return values > 0.5


def run(refill, trainer, epochs):
    """-> what `steps_by_definition` gives, checking each step's gradient on the way."""
    steps = []
    for epoch in range(1, epochs + 1):
        refill.start_epoch(last=epoch == epochs)
        while True:
            start = refill.position
            done = refill.next_step(trainer.score, trainer.train, trainer.discard)
            if done is None:
                assert trainer.gradient == {}, "an epoch that ended without a step left gradients behind"
                break
            assert trainer.gradient == {i: pytest.approx(1 / len(done.ids)) for i in done.ids}
            assert trainer.calls[-1][0] == trainer.calls[-1][1], "the last call of a step fills its room"
            assert all(used < room for used, room in trainer.calls[:-1]), "and no other call does"
            steps.append((epoch, done.ids, refill.order[start : start + done.candidates]))
            assert done.values.tolist() == [trainer.accepts(i, trainer.step) for i in steps[-1][2]]
            trainer.gradient, trainer.calls = {}, []
            trainer.step += 1
        assert refill.position == len(refill.order)
    return steps


def drifting(share):
    """Accepts about `share` of the examples, others at every step."""
    return lambda example, step: common.seed_of(example, step // 3) % 1000 < 1000 * share


@pytest.mark.parametrize("share", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("processes, micro_batch_size", [(1, 8), (2, 4), (3, 5)])
def test_tokens_bound_what_is_computed_at_once_and_nothing_else(share, processes, micro_batch_size):
    size, batch_size, tokens = 150, 16, 60
    lengths = [(1 + common.seed_of("prompt", i) % 30, 1 + common.seed_of("completion", i) % 20) for i in range(size)]
    seen = {"score": [], "train": []}

    class Watched(Trainer):
        def score(self, ids):
            seen["score"].append(ids)
            return super().score(ids)

        def train(self, ids, *how, **more):
            seen["train"].append(ids)
            return super().train(ids, *how, **more)

    how = (size, batch_size, accept, 3, processes, micro_batch_size, 3, lengths, tokens)
    assert run(common.Refill(*how), Watched(drifting(share), processes), 4) == steps_by_definition(
        size, batch_size, drifting(share), 3, 4
    )
    bounded = 0
    for kind, bound in (("score", 4 * tokens), ("train", tokens)):
        for ids in seen[kind]:
            shares = [ids[process::processes] for process in range(processes)]
            padded = [
                len(share) * (max(lengths[i][0] for i in ids) + max(lengths[i][1] for i in ids)) for share in shares
            ]
            assert max(padded) <= bound or len(ids) <= processes
            bounded += len(ids) < processes * micro_batch_size
    assert bounded > 0 and seen["train"]


def of_many_lengths(size):
    """Prompts as long as MATH's, whose longest in eight is three times the mean; answers of a few tokens."""
    uniform = torch.rand(size, generator=torch.Generator().manual_seed(1)).clamp(0.001, 0.999)
    return [(round(70 * math.exp(0.8 * z)), 3 + i % 5) for i, z in enumerate(torch.special.ndtri(uniform).tolist())]


# backward_cost that forces or leaves the choice
WAYS = {"sampled": None, "scored first": math.inf, "straight": 1.0000001, "the cheaper": 3}


@pytest.mark.parametrize("share", [1.0, 0.9, 0.6, 0.2, 0.03, 0.0])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("processes, micro_batch_size", [(1, 1), (1, 4), (1, 64), (2, 4), (3, 5), (8, 2)])
@pytest.mark.parametrize("sorted_by_length", [False, True])
def test_steps_are_those_of_the_definition(share, way, processes, micro_batch_size, sorted_by_length):
    size, batch_size, seed, epochs = 150, 16, 3, 4
    expected = steps_by_definition(size, batch_size, drifting(share), seed, epochs)
    lengths = of_many_lengths(size) if sorted_by_length else None
    refill = common.Refill(size, batch_size, accept, seed, processes, micro_batch_size, WAYS[way], lengths, 1 << 20)
    trainer = Trainer(drifting(share), processes)
    assert run(refill, trainer, epochs) == expected
    if share == 1.0:
        # 150 = 9 x 16 + 6: six leftovers lead the next epoch, and the last epoch ends on a short step.
        used = [i for _, ids, _ in expected for i in ids]
        assert len(expected[-1][1]) == 6
        assert max(used.count(i) for i in range(size)) <= epochs
    if share == 0.0:
        assert expected == []  # epochs without a step are legal


def test_each_example_is_used_at_most_once_an_epoch_and_leftovers_lead_the_next():
    def even(example, step):
        return example % 2 == 0

    steps = run(common.Refill(40, 8, accept, 0, micro_batch_size=4), Trainer(even), 2)
    # 20 even examples: two steps of 8, 4 left over; these and the 16 others: two steps of 8 and a short one of 4.
    assert [(epoch, len(ids)) for epoch, ids, _ in steps] == [(1, 8), (1, 8), (2, 8), (2, 8), (2, 4)]
    first = [i for epoch, ids, _ in steps for i in ids if epoch == 1]
    second = [i for epoch, ids, _ in steps for i in ids if epoch == 2]
    leftovers = second[:4]
    assert sorted(first + leftovers) == sorted(second) == list(range(0, 40, 2))


def test_a_sudden_fall_of_the_accept_rate_discards_what_cannot_be_used():
    """A step begun straight that the epoch cannot fill: its gradient is thrown away, and computed anew as a mean over
    the examples that there are, or for the next epoch's first step."""
    rare = drifting(0.15)

    def accepts(example, step):
        return step < 6 or rare(example, step)

    refill = common.Refill(320, 32, accept, 0, micro_batch_size=8)
    trainer = Trainer(accepts)
    steps = run(refill, trainer, 1)
    assert trainer.discarded == 1 and 0 < len(steps[-1][1]) < 32
    trainer = Trainer(accepts)
    assert run(common.Refill(320, 32, accept, 0, micro_batch_size=8), trainer, 3) == steps_by_definition(
        320, 32, accepts, 0, 3
    )
    assert trainer.discarded == 1


def test_cross_entropy_is_never_scored():
    trainer = Trainer(lambda example, step: True)
    refill = common.Refill(150, 16, None, 0, micro_batch_size=4)
    steps = run(refill, trainer, 3)
    assert steps == steps_by_definition(150, 16, lambda example, step: True, 0, 3)
    assert trainer.scored == 0 and trainer.cost == 3 * (144 + 144 + 150)  # forward and backward of what is used


@pytest.mark.parametrize("k", [3, 4])
@pytest.mark.parametrize("processes, micro_batch_size", [(1, 8), (1, 32), (2, 8), (8, 8)])
@pytest.mark.parametrize("share", [1.0, 0.97, 0.9, 0.8, 0.75, 0.7, 0.67, 0.6, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02])
def test_cost_is_within_5_percent_of_the_cheaper_way(share, processes, micro_batch_size, k):
    steps, batch_size = 60, 64
    size = int(1.3 * steps * batch_size / share)
    accepts = torch.rand(size, generator=torch.Generator().manual_seed(0)) < share
    refill = common.Refill(size, batch_size, accept, 1, processes, micro_batch_size, k)
    trainer = Trainer(lambda example, step: bool(accepts[example]), processes, k)
    refill.start_epoch(last=True)
    refill.next_step(trainer.score, trainer.train, trainer.discard)  # learns the accept rate
    trainer.cost, cheaper = 0, 0
    # A process can't do a part of an example: the cheaper way, too, works in whole rounds of one example each.
    whole = {1: lambda n: n, 2: lambda n: n, 8: lambda n: math.ceil(n / 8) * 8}[processes]
    for _ in range(steps - 1):
        done = refill.next_step(trainer.score, trainer.train, trainer.discard)
        cheaper += min(whole(done.candidates) + k * len(done.ids), k * whole(done.candidates))
    assert trainer.cost <= 1.05 * cheaper, f"{trainer.cost / cheaper:.3f}"


@pytest.mark.parametrize("size, batch_size", [(320, 64), (640, 64), (200, 32), (1500, 32), (1000, 64)])
@pytest.mark.parametrize("share", [1.0, 0.97, 0.95, 0.8, 0.7, 0.5, 0.1])
def test_cost_of_whole_epochs(share, size, batch_size):
    """Over the ends of the epochs as well, where candidates that fill no step are scored and no more."""
    accepts = torch.rand(size, generator=torch.Generator().manual_seed(0)) < share
    refill = common.Refill(size, batch_size, accept, 1, micro_batch_size=8)
    trainer, cheaper = Trainer(lambda example, step: bool(accepts[example])), 0
    for epoch in range(8):
        refill.start_epoch(last=epoch == 7)
        while True:
            start = refill.position
            done = refill.next_step(trainer.score, trainer.train, trainer.discard)
            if done is None:
                cheaper += refill.position - start
                break
            cheaper += min(done.candidates + 3 * len(done.ids), 3 * done.candidates)
    assert trainer.cost <= 1.05 * cheaper, f"{trainer.cost / cheaper:.3f}"


def test_first_steps_of_a_confident_model_are_not_trained_straight():
    """Nothing is known of the accept rate at first: one round in the dearer way, not a whole step."""
    accepts = torch.rand(8000, generator=torch.Generator().manual_seed(0)) < 0.05
    refill = common.Refill(8000, 64, accept, 1, 1, 16)
    trainer = Trainer(lambda example, step: bool(accepts[example]))
    refill.start_epoch(last=True)
    done = refill.next_step(trainer.score, trainer.train, trainer.discard)
    assert trainer.cost <= 1.1 * (done.candidates + 3 * 64)


@pytest.mark.parametrize(
    "way, share", [("straight", 1.0), ("straight", 0.9), ("scored first", 0.3), ("the cheaper", 0.6)]
)
def test_like_lengths_are_computed_together(way, share):
    """Of what is computed, padding is less than half as much as in pieces of the same size in stream order."""
    size, padded, tokens, naive = 2000, Counter(), Counter(), Counter()
    lengths = of_many_lengths(size)

    def tokens_of(ids):
        return len(ids) * (max(lengths[i][0] for i in ids) + max(lengths[i][1] for i in ids))

    class Watched(Trainer):
        def watch(self, kind, ids):
            padded[kind] += tokens_of(ids)
            tokens[kind] += sum(map(sum, (lengths[i] for i in ids)))

        def score(self, ids):
            self.watch("score", ids)
            return super().score(ids)

        def train(self, ids, *how, **more):
            self.watch("train", ids)
            return super().train(ids, *how, **more)

    refill = common.Refill(size, 64, accept, 3, 1, 8, WAYS[way], lengths, 1 << 20)
    trainer = Watched(drifting(share))
    assert run(refill, trainer, 2) == steps_by_definition(size, 64, drifting(share), 3, 2)
    for kind, count in (("score", 32), ("train", 8)):
        naive[kind] = sum(tokens_of(range(i, i + count)) for i in range(0, size - count, count))
        naive[kind] /= sum(map(sum, lengths[: size - count]))
        if padded[kind]:
            assert padded[kind] / tokens[kind] - 1 < 0.5 * (naive[kind] - 1), (kind, padded, tokens, naive)
    assert naive["train"] > 2 and padded["train" if way == "straight" else "score"] > 0
