"""The proof search: what it estimates, what it costs, what Lean may do to it, and prove.py from start to table."""

import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, run_script
from lean_repository import RECORDS, running
from lean_stand_in import TRIES

import common
import prove

# The search of one theorem, with no Lean and no model: a tree that is known, and the chance of each branch.

TREE = {  # state -> {tactic: (its chance, what it leads to: a state, DONE, ERROR)}
    "r": {"a": (0.4, "s1"), "b": (0.3, "ERROR"), "c": (0.3, "s2")},
    "s1": {"d": (0.05, "DONE"), "e": (0.5, "s2"), "f": (0.45, "ERROR")},
    "s2": {"g": (0.02, "DONE"), "h": (0.3, "s2"), "i": (0.68, "ERROR")},  # h leaves the state as it was
}
SLOW = {"d": 10.0, "g": 10.0}  # seconds: a proof takes time


class KnownTree:
    """In place of `prove.Lean`. tree: as TREE; a function of a path gives states that no table holds."""

    def __init__(self, tree=TREE, seconds=None, first="r", false=()):
        self.tree, self.first, self.seconds, self.false = tree, first, seconds or {}, false
        self.events, self.calls, self.replayed = Counter(), [], []

    def state(self, path):
        state = self.first
        for tactic in path:
            state = self.tree[state][tactic][1]
        return state

    def do(self, method, theorem, items):
        return getattr(self, method)(items)

    def first_state(self, items):
        return [("open", self.first, 0.0)]

    def apply(self, calls):
        self.calls += calls
        found = [self.state((*path, tactic)) for path, tactic in calls]
        kinds = [{"DONE": "proved", "ERROR": "error"}.get(state, "open") for state in found]
        return [
            (kind, state, self.seconds.get(tactic, 1.0))
            for kind, state, (_, tactic) in zip(kinds, found, calls, strict=True)
        ]

    def replay(self, items):
        paths = [path for (path,) in items]
        self.replayed += paths
        return [
            ("error" if path[-1] in self.false else "proved", [self.state(path[:i]) for i in range(len(path))], 1.0)
            for path in paths
        ]


def drawing(seed, tree=TREE, drawn=None):
    """`sample` of prove_theorem, by the tree's chances. drawn: a set that gets (path, tactic) of each sample."""

    def sample(theorem, block, walkers):
        rng, found = np.random.default_rng([seed, theorem["id"], block, *(p.number for p in walkers)]), []
        for place, n in walkers.items():
            tactics, chances = zip(*((t, chance) for t, (chance, _) in tree[place.text].items()), strict=True)
            picks = rng.choice(len(tactics), size=n, p=chances)
            found.append(([tactics[i] for i in picks], 0.0))
            if drawn is not None:
                drawn.update((place.path, tactics[i]) for i in picks)
        return found

    return sample


def saying(*rounds):
    """`sample` that gives what it is told: for each round {path: tactics of the passes there}."""
    rounds = iter(rounds)

    def sample(theorem, block, walkers):
        told = next(rounds)
        assert {place.path: n for place, n in walkers.items()} == {path: len(told[path]) for path in told}
        return [(told[place.path], 0.0) for place in walkers]

    return sample


def search(lean, sample, asked, i=0, **settings):
    defaults = {"passes": asked, "time_limit": 1e9, "block": 256, "max_steps": 50, "merge": "path"}
    defaults["tactic_timeout"] = 30.0
    args = argparse.Namespace(**defaults | {"stop_at_first": False} | settings)
    args.block = min(args.block, asked)
    return prove.prove_theorem({"id": i, **toy("toy_1")}, asked, args, lean, sample)


def chance(state="r", steps=50, tree=TREE):
    """Of a pass to end in a proof, from the tree."""
    if state in ("DONE", "ERROR") or steps == 0:
        return float(state == "DONE")
    return sum(p * chance(after, steps - 1, tree) for p, after in tree[state].values() if p)


def walk(rng, max_steps=50):
    """One pass, taken alone."""
    state = "r"
    for _ in range(max_steps):
        draw = rng.random()
        for p, after in TREE[state].values():
            state_after, draw = after, draw - p
            if draw < 0:
                break
        state = state_after
        if state in ("DONE", "ERROR"):
            break
    return state == "DONE"


def z_of(values, truth):
    values = np.asarray(values, dtype=float)
    return (values.mean() - truth) / (values.std(ddof=1) / math.sqrt(len(values)))


@pytest.fixture(scope="module")
def one_by_one():
    """Successes of 300 x 256 passes that share nothing."""
    rng = np.random.default_rng(1)
    return np.array([sum(walk(rng) for _ in range(256)) for _ in range(300)])


@pytest.mark.parametrize("merge, max_steps", [("path", 50), ("text", 50), ("path", 2)])
def test_successes_are_those_of_independent_passes(merge, max_steps, one_by_one):
    q, n, searches = chance(steps=max_steps), 256, 300
    settings = {"merge": merge, "max_steps": max_steps, "block": 64}
    results = [search(KnownTree(), drawing(2), n, i, **settings) for i in range(searches)]
    assert all(r["passes"] == n == r["asked"] and r["status"] == "done" and not r["unreplayable"] for r in results)
    counts = np.array([r["successes"] for r in results])
    alike = [counts, one_by_one] if max_steps == 50 else [counts]
    for found in alike:
        assert abs(z_of(found, n * q)) < 4
        # the variance of a binomial, whose own estimate has a relative error of √(2/searches)
        assert abs(found.var(ddof=1) / (n * q * (1 - q)) - 1) < 4 * math.sqrt(2 / searches)
    if len(alike) == 2:
        spread = math.sqrt((counts.var() + one_by_one.var()) / searches)
        assert abs(counts.mean() - one_by_one.mean()) < 4 * spread
    for k in (1, 16):
        for estimate in (prove.paper_pass_at_n, prove.unbiased_pass_at_n):
            found, bounds = zip(*(estimate(r, k) for r in results), strict=True)
            assert abs(z_of(found, 1 - (1 - q) ** k)) < 4 and not any(bounds)


def uniform(branching, depth):
    """{state: {tactic: (chance, state)}} of a tree in which every path is a state of its own, as deep as asked."""

    class Uniform(dict):
        def __missing__(self, state):
            ends = len(state) == depth - 1
            return {chr(65 + i): (1 / branching, "ERROR" if ends else state + chr(65 + i)) for i in range(branching)}

    return Uniform()


@pytest.mark.parametrize("branching, share", [(4, 2), (8, 19), (16, 42), (32, 55)])
def test_calls_are_the_distinct_paths(branching, share):
    """And what sharing saves, at 4 steps and 4,096 passes: much for a narrow tree, little for a wide one."""
    tree, passes, drawn = uniform(branching, 4), 4096, set()
    lean = KnownTree(tree, first="")
    result = search(lean, drawing(3, tree, drawn), passes)
    assert len(lean.calls) == len(set(lean.calls)) == result["tactic_calls"] and set(lean.calls) == drawn
    assert result["steps"] == 4 * passes
    found = 100 * result["tactic_calls"] / result["steps"]
    widths = [branching**k for k in range(1, 5)]
    expected = 100 * sum(w * (1 - (1 - 1 / w) ** passes) for w in widths) / (4 * passes)
    assert round(expected) == share and found == pytest.approx(expected, abs=0.7)
    # under --merge text nothing more is merged here, as no two states have one text
    assert search(KnownTree(tree, first=""), drawing(3, tree), passes, merge="text")["tactic_calls"] == len(drawn)


def test_equal_texts_are_asked_once_where_that_is_wanted():
    lean, drawn = KnownTree(), set()
    result = search(lean, drawing(4, drawn=drawn), 4096, merge="text")
    texts = {(lean.state(path), tactic) for path, tactic in drawn}
    assert {(lean.state(path), tactic) for path, tactic in lean.calls} == texts and len(lean.calls) == len(texts) == 9
    assert all(lean.state(path) in ("s1", "s2") for path in (p[:-1] for p in lean.replayed))
    assert result["proofs"] == len(set(lean.replayed)) == len(lean.replayed) > 2  # each path is replayed as its own


# The time limit


@pytest.mark.parametrize("limit", [20.0, 6.0])  # of a few blocks; of less than most blocks take
def test_a_time_limit_biases_the_plain_average_but_not_the_estimate(limit):
    q, n, searches = chance(), 8, 2000
    found, average = {1: [], n: []}, []
    for i in range(searches):
        result = search(KnownTree(seconds=SLOW), drawing(5), 32 * n, i, block=n, time_limit=limit)
        for k in found:
            value, bound = prove.unbiased_pass_at_n(result, k)
            assert not bound
            found[k].append(value)
        passes, right = (sum(block[name] for block in result["blocks"]) for name in ("passes", "successes"))
        average.append(right / passes)
    assert limit < 20 or z_of(average, q) > 10
    for k in found:
        assert abs(z_of(found[k], 1 - (1 - q) ** k)) < 4, k


def test_the_papers_rule_counts_what_had_ended_in_time():
    """A block of 4 passes of which one proves in the third second and two in the fourth; the limit lies between."""
    tree = {"r": {"a": (0, "s"), "b": (0, "DONE"), "c": (0, "ERROR")}, "s": {"d": (0, "DONE")}}
    sample = saying({(): ["c", "a", "a", "b"]}, {("a",): ["d", "d"]})
    result = search(KnownTree(tree), sample, 8, block=4, time_limit=3.5)
    assert (result["status"], result["asked"], result["passes"]) == ("timed out", 8, 4)
    assert (result["successes"], result["in_time"], result["limit"]) == (3, 1, 3.5)
    assert result["blocks"] == [{"passes": 4, "clock": 4.0, "successes": 3, "own": 4.0}]
    assert prove.paper_pass_at_n(result, 1) == (pytest.approx(1 / 8), False)
    assert prove.paper_pass_at_n(result, 8) == (pytest.approx(1), False)
    assert prove.unbiased_pass_at_n(result, 1) == (pytest.approx(3 / 4), False)  # of the only block that there is
    assert prove.unbiased_pass_at_n(result, 4) == (pytest.approx(1), False)
    assert prove.unbiased_pass_at_n(result, 5) == (1.0, True)  # a lower bound: 5 passes were never made
    none = result | {"blocks": [result["blocks"][0] | {"successes": 0}]}
    assert prove.unbiased_pass_at_n(none, 5) == (0.0, True)


def test_of_the_blocks_before_the_last_whichever_that_was():
    """Two blocks, 4 s in common, 3 s and 5 s their own; both may have been the last one if the limit is 10 s, only the
    longer one if it is 8 s."""
    blocks = [
        {"passes": 4, "successes": 1, "own": 3.0, "clock": 7.0},
        {"passes": 4, "successes": 2, "own": 5.0, "clock": 12.0},
    ]
    result = {"status": "timed out", "blocks": blocks}
    assert prove.unbiased_pass_at_n(result | {"limit": 10.0}, 1)[0] == pytest.approx((2 / 4 + 1 / 4) / 2)
    assert prove.unbiased_pass_at_n(result | {"limit": 8.0}, 1)[0] == pytest.approx(1 / 4)
    assert prove.unbiased_pass_at_n(result | {"limit": 13.0}, 1)[0] == pytest.approx(3 / 8)  # it was never reached


def test_a_limit_grows_with_the_passes():
    assert search(KnownTree(), drawing(6), 64, passes=16, time_limit=5.0)["limit"] == 20.0


@pytest.mark.parametrize("timeout, left_at", [(0.1, 4.0), (0.2, 6.0)])
def test_a_block_is_left_at_twice_the_limit_and_20_timeouts_and_does_not_count(timeout, left_at):
    tree = {"r": {"a": (0, "r"), "b": (0, "DONE")}}
    rounds = [{("a",) * k: ["a"] * 3 + ["b"] * (k == 0)} for k in range(6)]
    result = search(KnownTree(tree), saying(*rounds), 8, block=4, time_limit=2.0, tactic_timeout=timeout)
    assert result["status"] == "block left unfinished" and result["lean_seconds"] == left_at
    assert result["blocks"] == [] and (result["passes"], result["successes"]) == (1, 1)
    assert prove.unbiased_pass_at_n(result, 1) == (0.0, True)
    assert result["in_time"] == 0 and prove.paper_pass_at_n(result, 1) == (0.0, False)


def test_a_theorem_that_does_not_start_has_no_passes_and_stays():
    class Closed(KnownTree):
        def first_state(self, items):
            self.events["timeout"] += 2
            return [("timeout", "DojoInitError: why", 3.0)]

    result = search(Closed(), None, 8)
    assert (result["status"], result["message"], result["timeouts"]) == ("not started", "DojoInitError: why", 2)
    assert (result["passes"], result["asked"], result["successes"], result["start_seconds"]) == (0, 8, 0, 3.0)
    for k in (1, 8):
        assert prove.paper_pass_at_n(result, k) == (0.0, False) == prove.unbiased_pass_at_n(result, k)


# What a pass is


@pytest.mark.parametrize("merge, calls", [("path", 5), ("text", 1)])
def test_a_tactic_that_changes_nothing_costs_a_step_and_steps_are_limited(merge, calls):
    tree = {"r": {"a": (1.0, "r")}}
    result = search(KnownTree(tree), drawing(0, tree), 16, max_steps=5, merge=merge)
    assert (result["steps"], result["tactic_calls"], result["passes"]) == (80, calls, 16)
    assert result["kinds"] == {"open": 5} and result["status"] == "done" and result["successes"] == 0


@pytest.mark.parametrize("max_steps, successes", [(1, 0), (2, 0), (3, 8), (4, 8)])
def test_a_proof_may_have_as_many_steps_as_there_are(max_steps, successes):
    tree = {"r": {"a": (1.0, "s")}, "s": {"a": (1.0, "t")}, "t": {"a": (1.0, "DONE")}}
    result = search(KnownTree(tree), drawing(0, tree), 8, max_steps=max_steps)
    assert result["successes"] == successes and result["steps"] == 8 * min(3, max_steps)
    assert result["proof"] == (["a"] * 3 if successes else None)
    assert result["states"] == (["r", "s", "t"] if successes else None)


REFUSED = [
    "sorry",
    "exact (sorry : False)",
    "simp; sorry",
    "exact sorryAx _ true",
    "admit",
    "all_goals admit",
    "native_decide",
    "decide +native",
    "decide + native",
    "decide (config := { native := true })",
    "exact Lean.ofReduceBool _ _ rfl",
    "exact rf\x7fl",
    "exact " + "x" * 4000,
    "exact " + "𝔸" * 1000,
]
TRIED = ["decide", "exact admitted", "simp [nativeness]", "exact h_sorry_not", "exact " + "x" * 3900, "exact h\x03"]


@pytest.mark.parametrize("tactic", REFUSED)
def test_what_is_no_proof_or_no_line_is_not_even_tried(tactic):
    lean = KnownTree()
    result = search(lean, saying({(): [tactic, tactic, "b"]}), 3)
    assert [tactic for _, tactic in lean.calls] == ["b"]
    assert (result["passes"], result["successes"], result["steps"], result["tactic_calls"]) == (3, 0, 1, 1)
    assert result["kinds"] == {"refused": 1, "error": 1}


@pytest.mark.parametrize("tactic", TRIED)
def test_what_only_looks_like_it_is_tried(tactic):
    lean = KnownTree({"r": {tactic: (1.0, "DONE")}})
    assert search(lean, saying({(): [tactic]}), 1)["successes"] == 1


def test_to_cite_a_theorem_that_is_not_proved_is_no_proof():
    for tactic, refused in (("exact foo_1 h", True), ("exact?", True), ("exact foo_12 h", False), ("exact h", False)):
        assert prove.is_refused(tactic, ["foo_1", "bar"]) == refused
        assert not prove.is_refused(tactic)


def test_a_tactic_without_an_end_is_not_tried():
    lean = KnownTree()
    result = search(lean, saying({(): [None, None, "b"]}), 3)
    assert [tactic for _, tactic in lean.calls] == ["b"] and result["kinds"] == {"no end": 1, "error": 1}
    assert (result["passes"], result["steps"]) == (3, 1)


def test_a_proof_counts_only_if_its_own_path_proves_it_once_more():
    q = chance()
    lean = KnownTree(false=["d"])  # whose replay fails
    result = search(lean, drawing(7), 4096)
    only_g = 0.3 * chance("s2") + 0.4 * 0.5 * chance("s2")
    assert abs(result["successes"] - 4096 * only_g) < 4 * math.sqrt(4096 * only_g) and only_g < q / 1.3
    assert result["unreplayable"] == sum(path[-1] == "d" for path in lean.replayed) == 1
    assert result["proofs"] == len(lean.replayed) - 1 and len(set(lean.replayed)) == len(lean.replayed)
    assert result["proof"] == ["c", "g"] and result["states"] == ["r", "s2"]  # a short one
    assert sum(block["successes"] for block in result["blocks"]) == result["successes"] == result["in_time"]


def test_stopping_at_the_first_proof_goes_on_after_a_false_one():
    tree = {"r": {"a": (0, "DONE"), "b": (0, "DONE"), "c": (0, "ERROR"), "d": (0, "DONE")}}
    rounds = [{(): ["c", "a"]}, {(): ["a", "c"]}, {(): ["b", "c"]}, {(): ["d", "d"]}]
    lean = KnownTree(tree, false=["a"])
    result = search(lean, saying(*rounds), 8, block=2, stop_at_first=True)
    assert result["status"] == "stopped at a proof" and lean.replayed == [("a",), ("b",)]
    assert (result["successes"], result["proof"], result["unreplayable"]) == (1, ["b"], 1)
    lean = KnownTree(tree, false=["a", "b", "d"])
    result = search(lean, saying(*rounds), 8, block=2, stop_at_first=True)
    assert (result["status"], result["successes"], result["unreplayable"], result["passes"]) == ("done", 0, 3, 8)


def test_branching_is_that_of_the_states_that_many_passes_saw():
    result = search(KnownTree(), drawing(8), 4096)
    lean = KnownTree()
    assert result["wide_states"] >= 3
    # a and c are valid in r; d, e in s1; g, h in s2: the mean is 2 where all have been drawn
    assert result["valid_tactics"] == pytest.approx(2 * result["wide_states"], abs=3)
    assert lean.calls == []


# The tables


def result_of(i, asked, successes, **more):
    block = {"passes": asked, "successes": successes, "own": 1.0, "clock": 1.0}
    counts = dict.fromkeys(("steps", "tactic_calls", "wide_states", "valid_tactics", "unreplayable"), 8)
    counts |= {"timeouts": 0, "crashes": 0, "proof": None, "status": "done", "limit": 9.0, "message": ""}
    counts |= {"id": i, "full_name": f"t{i}", "file_path": "f", "passes": asked, "successes": successes}
    return counts | {"asked": asked, "in_time": successes, "blocks": [block]} | more


def test_the_ensemble_and_its_baseline(tmp_path, capsys):
    a, b = [(64, 3), (64, 0), (64, 64), (64, 1)], [(64, 0), (64, 0), (64, 1), (64, 20)]
    baseline = [(128, 3), (128, 1), (128, 0), (128, 100)]
    runs = [
        (name, times, [result_of(i, n, c) for i, (n, c) in enumerate(counts)])
        for name, times, counts in (("A", 1, a), ("B", 1, b), ("A", 2, baseline))
    ]
    args = argparse.Namespace(ns=[1, 16, 64], passes=64, stop_at_first=False, ensemble=[], out=tmp_path, save_proofs=0)
    args.baseline = "A"
    prove.report(args, runs, [{"id": i} for i in range(4)])
    found = json.loads((tmp_path / "prove.json").read_text())["paper"]

    def by_hand(counts, n):
        return np.array([1 - math.comb(size - c, n) / math.comb(size, n) for size, c in counts])

    for n in (1, 16, 64):
        each = [by_hand(a, n), by_hand(b, n)]
        expected = {"A": each[0], "B": each[1], "A (2 x the passes)": by_hand(baseline, 2 * n)}
        expected["ensemble of 2"] = 1 - (1 - each[0]) * (1 - each[1])
        assert list(found) == list(expected)
        for label, values in expected.items():
            row = found[label][str(n)]
            assert row["pass"] == pytest.approx(values.mean(), abs=1e-12) and row["low"] <= row["pass"] <= row["high"]
            assert not row["lower_bound"]
    told = capsys.readouterr().out
    assert "| model | pass@1 | pass@16 | pass@64 |" in told and "and without the bias" not in told
    assert f"| ensemble of 2 | {100 * found['ensemble of 2']['1']['pass']:.1f} [" in told
    assert (tmp_path / "success.png").stat().st_size > 10_000


# Lean's worker and the real lean_dojo, with a stand-in for Lean


@pytest.fixture(scope="module")
def records(lean):
    return {record["full_name"]: record for record in json.loads(Path(lean[RECORDS]).read_text())}


@pytest.fixture
def here(monkeypatch):
    """An environment variable set by a worker in this process is gone after the test."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("DCO_LEAN_WORKER", "")
    monkeypatch.setenv("TACTIC_MEMORY_LIMIT", "8g")


@pytest.fixture
def worker(lean, here):
    worker = prove.LeanWorker("lean_dojo:Dojo", 1.0, 10.0, 1)
    yield worker
    worker.leave()
    worker.watch.stdin.close()


class Local:
    """In place of a Ray actor: the worker is an object of this process."""

    def __init__(self, worker):
        self.worker = worker

    def remote(self, *settings):
        return self

    def __getattr__(self, name):
        return argparse.Namespace(remote=lambda *inputs: getattr(self.worker, name)(*inputs))


@pytest.fixture
def local_lean(worker, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "get", lambda answer, timeout: answer)
    return prove.Lean(Local(worker), (), 1.0)


def kinds(outcomes):
    return [kind for kind, *_ in outcomes]


def start(one, theorem):
    """Of a worker, or of what stands before one."""
    ((kind, text, _),) = one.do("first_state", theorem, [()])
    return kind, text


def apply(one, theorem, calls):
    return one.do("apply", theorem, calls)


def replay(one, theorem, paths):
    return one.do("replay", theorem, [(path,) for path in paths])


def test_branches_and_errors_of_a_theorem(worker, records, lean):
    assert start(worker, records["two_steps"]) == ("open", "p q : Prop\nh : p ∧ q\n⊢ q ∧ p")
    split, parts = ("constructor",), ("obtain ⟨hp, hq⟩ := h",)
    calls = [((), split[0]), ((), parts[0]), ((), "simp"), (split, "exact h.2"), (parts, "exact ⟨hq, hp⟩")]
    calls += [((*split, "exact h.2"), "exact h.1"), (split, "exact h.1")]
    outcomes = apply(worker, records["two_steps"], calls)
    assert kinds(outcomes) == ["open", "open", "error", "open", "proved", "proved", "error"]
    assert outcomes[1][1] == "p q : Prop\nhp : p\nhq : q\n⊢ q ∧ p"
    assert "unknown tactic" in outcomes[2][1] and all(0 <= seconds < 10 for *_, seconds in outcomes)
    assert len(running(lean, "two_steps")) == 1
    proofs = [(*split, "exact h.2", "exact h.1"), (*parts, "exact ⟨hq, hp⟩")]
    found = replay(worker, records["two_steps"], [*proofs, split, (*split, "simp"), ("simp", "exact h.1")])
    assert kinds(found) == ["proved", "proved", "open", "error", "error"]
    assert found[1][1] == [outcomes[1][1].replace("hp : p\nhq : q", "h : p ∧ q"), outcomes[1][1]]
    assert running(lean, "two_steps", wait=2) == []


def test_a_worker_goes_from_theorem_to_theorem_and_leaves_nothing(worker, records, lean):
    for name, tactic in (("one_step", "rfl"), ("unprovable", "exfalso"), ("one_step", "norm_num")):
        kind = "open" if name == "unprovable" else "proved"
        assert kinds(apply(worker, records[name], [((), tactic)])) == [kind]
        assert [len(running(lean, one, wait=2 * (one != name))) for one in ("one_step", "unprovable")] == [
            one == name for one in ("one_step", "unprovable")
        ]
    worker.leave()
    assert running(lean, "one_step", wait=2) == []


def test_a_proof_that_needs_what_a_search_has_left_behind_is_no_proof(here):
    """Its tactic works only where another one was tried before, and a replay begins in an environment that is new."""
    worker = prove.LeanWorker("tests.toy_dojo:Dojo", 9.0, 9.0, 1)
    worker.events = Counter()
    result = search(worker, saying({(): ["note", "if_noted", "step"]}), 3)
    worker.watch.stdin.close()
    assert result["kinds"] == {"error": 1, "proved": 2}
    assert (result["successes"], result["proof"], result["unreplayable"]) == (1, ["step"], 1)


@pytest.mark.parametrize("name, path", [("one_step", ["sorry"]), ("sorry_inside", ["have h : 1 < 2 := by sorry"])])
def test_a_sorry_proves_nothing(worker, records, name, path):
    """Were it tried: prove.py refuses to."""
    path = path if name == "one_step" else [*path, "exact h"]
    assert apply(worker, records[name], [(tuple(path[:-1]), path[-1])])[0][0] == "given up"
    assert kinds(replay(worker, records[name], [tuple(path)])) == ["given up"]


BROKEN = [
    ("one_step", "hang", "timeout", "DojoTacticTimeoutError"),
    ("one_step", "noise", "timeout", "DojoTacticTimeoutError"),
    ("one_step", "die", "crash", "Unexpected EOF"),
    ("one_step", "out_of_memory_at_once", "crash", "Unexpected EOF"),
    ("one_step", "garbage", "crash", "Invalid JSON"),
    ("one_step", "turnstiles", "crash", "AssertionError"),
]


@pytest.mark.parametrize("name, tactic, kind, told", BROKEN)
def test_what_breaks_an_environment_ends_it_and_the_next_one_goes_on(worker, records, lean, name, tactic, kind, told):
    """Also from a state that only the lost one had: its path is taken once more."""
    path = ("skip", "trace")
    calls = [((), "skip"), (("skip",), "trace"), (path, tactic), (path, "rfl")]
    outcomes = apply(worker, records[name], calls)
    assert kinds(outcomes) == ["open", "open", kind] and told in outcomes[2][1]  # and the last one waits
    assert running(lean, name, wait=2) == [] and worker.manager is None
    assert kinds(apply(worker, records[name], calls[3:])) == ["proved"]
    assert len(running(lean, name)) == 1


def test_memory_that_runs_out_between_two_tactics(worker, records):
    assert kinds(apply(worker, records["memory"], [((), "skip")])) == ["open"]
    while worker.dojo.proc.isalive():
        time.sleep(0.02)
    (outcome,) = apply(worker, records["memory"], [((), "rfl"), ((), "simp")])
    assert outcome[0] == "crash" and "OOM" in outcome[1]
    assert kinds(apply(worker, records["memory"], [((), "rfl")])) == ["proved"]


def test_a_request_ends_after_a_while_and_the_rest_is_asked_again(worker, local_lean, records):
    calls = [((), f"sleep 0.8{i}") for i in range(4)]
    assert 1 <= len(apply(worker, records["one_step"], calls)) <= 3  # two time limits of 1 s
    assert kinds(apply(local_lean, records["one_step"], calls)) == ["open"] * 4 and not +local_lean.events


def test_what_breaks_is_tried_once_more_alone_and_then_known(local_lean, records, monkeypatch):
    asked, real = [], local_lean.worker.worker.do
    monkeypatch.setattr(local_lean.worker.worker, "do", lambda *inputs: asked.append(inputs[2]) or real(*inputs))
    calls = [((), "rfl"), ((), "simp"), ((), "die"), (("skip",), "rfl"), ((), "skip")]
    outcomes = apply(local_lean, records["hanging"], calls)
    assert kinds(outcomes) == ["proved", "timeout", "crash", "proved", "open"]
    assert asked == [calls, calls[1:2], calls[2:], calls[2:3], calls[3:]]
    assert +local_lean.events == {"timeout": 2, "crash": 2}
    assert 2 <= outcomes[1][2] < 10  # both tries, of 1 s each, are the theorem's time


def test_flaky_theorems_are_proved(local_lean, records, monkeypatch, tmp_path):
    monkeypatch.setenv(TRIES, str(tmp_path))
    for name, event in (("flaky_death", "crash"), ("flaky_hang", "timeout")):
        local_lean.events.clear()
        assert start(local_lean, records[name])[0] == "open"
        assert kinds(apply(local_lean, records[name], [((), "skip"), ((), "rfl")])) == ["open", "proved"]
        assert +local_lean.events == {event: 1}
    local_lean.events.clear()
    assert start(local_lean, records["start_flaky"]) == ("open", "⊢ True") and +local_lean.events == {"crash": 1}
    (tmp_path / "flaky_death").unlink()
    found = replay(local_lean, records["flaky_death"], [("skip", "rfl"), ("simp",)])
    assert kinds(found) == ["proved", "error"] and found[0][1] == ["⊢ 1 = 1"] * 2


@pytest.mark.parametrize(
    "name, event",
    [(f"start_{name}", "crash") for name in ("eof", "fatal", "death", "garbage", "error", "solved")]
    + [("start_hang", "timeout"), ("nowhere", "crash")],
)
def test_theorems_that_do_not_start(local_lean, worker, records, lean, name, event):
    worker.start_timeout = 1.0 if name == "start_hang" else 10.0
    theorem = records.get(name) or records["one_step"] | {"full_name": name}
    kind, why = start(local_lean, theorem)
    assert kind == event and "Error" in why
    assert +local_lean.events == {event: 2} and running(lean, name, wait=2) == []


# Through Ray


@pytest.fixture(scope="module")
def ray_here():
    """Ray in this process: that of the engines of other tests, if they run, else one for this file."""
    ray = pytest.importorskip("ray")
    before = ray.is_initialized()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signal, "signal", lambda *_: None)  # SIGTERM stays pytest's
        common.start_ray()
    yield ray
    if not before:
        ray.shutdown()


@pytest.fixture
def cluster(ray_here):
    """A Ray that is there already, as on several nodes, and quicker than one of its own."""
    return {"RAY_ADDRESS": ray_here.get_runtime_context().gcs_address}


@pytest.fixture
def actor(ray_here):
    return ray_here.remote(prove.LeanWorker).options(num_cpus=0)


def toy(name):
    return {"url": "toy", "commit": "0", "file_path": "Toy", "full_name": name}


def test_a_worker_that_dies_or_hangs_is_replaced(ray_here, actor, tmp_path):
    lean, theorem = prove.Lean(actor, ("tests.toy_dojo:Dojo", 1.0, 1.0, 1), patience=30.0), toy("toy_3")
    assert start(lean, theorem) == ("open", "3 to go")
    calls = [((), "step"), ((), f"die_once {tmp_path}/died"), (("step",), "step"), ((), "die")]
    calls += [(("step", "step"), "step"), ((), "raise"), ((), "nothing")]
    outcomes = apply(lean, theorem, calls)
    assert kinds(outcomes) == ["open", "open", "open", "crash", "proved", "crash", "error"]
    assert "worker died" in outcomes[3][1] and "no such luck" in outcomes[5][1] and lean.events["crash"] >= 5
    lean.patience = 2.0
    (hung,) = apply(lean, theorem, [((), "hang")])
    assert hung[:2] == ("timeout", "no answer of the environment in 2 s") and 4 <= hung[2] < 8
    lean.patience = 30.0
    ((kind, states, _),) = replay(lean, theorem, [("step",) * 3])
    assert (kind, states) == ("proved", ["3 to go", "2 to go", "1 to go"])
    assert start(lean, toy("unwilling")) == ("crash", "OSError: this theorem is not for me")
    ray_here.kill(lean.worker)


def test_a_tactic_that_kills_its_worker_does_so_twice_wherever_it_stands(ray_here, actor):
    """Which of a request's tactics it was is not known at first: the others may not be tried again with it."""
    lean = prove.Lean(actor, ("tests.toy_dojo:Dojo", 1.0, 1.0, 1), patience=30.0)
    outcomes = apply(lean, toy("toy_3"), [*(((), f"no {i}") for i in range(9)), ((), "die"), ((), "step")])
    assert kinds(outcomes) == ["error"] * 9 + ["crash", "open"]
    assert lean.events["crash"] == 3, "once with the others, and twice alone"
    ray_here.kill(lean.worker)


@pytest.mark.parametrize("text", ["no_text", "half_a_pair"])
def test_a_state_that_is_no_text_is_a_crash(text, ray_here, actor):
    lean = prove.Lean(actor, ("tests.toy_dojo:Dojo", 1.0, 1.0, 1), patience=30.0)
    outcomes = apply(lean, toy("toy_3"), [((), text), ((), "step")])
    assert kinds(outcomes) == ["crash", "open"]
    ray_here.kill(lean.worker)


def test_ray_is_not_started_anew_by_a_thread_that_is_late():
    late = "import common; ray = common.start_ray(); ray.shutdown()\ntry: ray.put(0)\n"
    late += "except Exception as error: print(type(error).__name__, ray.is_initialized())"
    done = subprocess.run([sys.executable, "-c", late], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip().endswith(" False"), done.stderr[-2000:]


def test_a_killed_worker_leaves_no_lean_behind(ray_here, lean, records):
    """Lean hangs and does not hear of SIGHUP or SIGTERM."""
    where = {"env_vars": {**lean, "PYTHONPATH": str(ROOT)}}
    worker = (
        ray_here.remote(prove.LeanWorker).options(num_cpus=0, runtime_env=where).remote("lean_dojo:Dojo", 60.0, 30.0, 1)
    )
    assert kinds(ray_here.get(worker.do.remote("first_state", records["hanging_only"], [()]), timeout=60)) == ["open"]
    pid = ray_here.get(worker.__ray_call__.remote(lambda self: os.getpid()))
    answer = worker.do.remote("apply", records["hanging_only"], [((), "simp")])
    time.sleep(0.5)
    (left,) = running(lean, "hanging_only")
    os.kill(left, signal.SIGTERM)
    assert running(lean, "hanging_only", wait=0.2) == [left]
    os.kill(pid, signal.SIGKILL)
    assert running(lean, "hanging_only", wait=10) == []
    with pytest.raises(ray_here.exceptions.RayError):
        ray_here.get(answer, timeout=20)


def test_workers_share_the_memory_of_their_node(ray_here, lean, records):
    import psutil

    where = {"env_vars": {**lean, "PYTHONPATH": str(ROOT)}}
    actor = ray_here.remote(prove.LeanWorker).options(num_cpus=0, runtime_env=where)
    for workers in (1, 3):
        worker = actor.remote("lean_dojo:Dojo", 9.0, 30.0, workers)
        assert kinds(ray_here.get(worker.do.remote("first_state", records["slow"], [()]), timeout=60)) == ["open"]
        (pid,) = running(lean, "slow")
        share = psutil.virtual_memory().total // workers >> 30  # GiB, of which Lean is told MiB
        assert f"--memory={1024 * share}" in psutil.Process(pid).cmdline()
        ray_here.get(worker.leave.remote(), timeout=30)
        ray_here.kill(worker)


# prove.py from start to table; the model is a table of tactics


def start_script(*arguments, **environment):
    """prove.py with a scripted model, in the background and in a process group of its own."""
    command = [sys.executable, "tests/scripted_prove.py", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Where the tests run as a shell's background job, Ctrl-C is ignored, and so it would be in the script.
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **environment}, start_new_session=True, **pipes)


def finish(process, code=0):
    out, err = process.communicate(timeout=200)
    assert process.returncode == code, f"exit {process.returncode}, not {code}\n{out}\n{err[-4000:]}"
    return out, err


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def deterministic(line):
    """What does not hang on a clock."""
    free = ("start_seconds", "lean_seconds", "sampling_seconds", "replay_seconds", "blocks")
    return {name: value for name, value in line.items() if name not in free}


CHANCES = {
    "⊢ 2 + 2 = 4": {"norm_num": 1, "rfl": 1, "simp": 5, "no end": 1, "decide +native": 1},
    "p q : Prop\nh : p ∧ q\n⊢ q ∧ p": {"obtain ⟨hp, hq⟩ := h": 1, "constructor": 1, "skip": 1, "simp": 5},
    "p q : Prop\nhp : p\nhq : q\n⊢ q ∧ p": {"exact ⟨hq, hp⟩": 1, "simp": 3},
    "case left\np q : Prop\nh : p ∧ q\n⊢ q\n\ncase right\np q : Prop\nh : p ∧ q\n⊢ p": {"exact h.2": 1, "simp": 3},
    "case right\np q : Prop\nh : p ∧ q\n⊢ p": {"exact h.1": 1, "simp": 1},
    "⊢ False": {"exfalso": 1, "trivial": 2},
    "⊢ 7919 = 7919": {"native_decide": 1},
    "⊢ 1 < 2": {"have h : 1 < 2 := by sorry": 1, "skip": 1},
    "h : 1 < 2\n⊢ 1 < 2": {"exact h": 1},
    "⊢ 1 = 1": {"rfl": 1, "simp": 1, "skip": 1},
    "⊢ True": {"trivial": 1, "simp": 3},
    "else": {"simp": 1},
}
HERE = ["one_step", "two_steps", "unprovable", "native", "hanging", "dying", "memory", "flaky_death", "start_eof"]
HERE += ["start_flaky", "start_solved"]
PROVABLE = {"one_step", "two_steps", "hanging", "dying", "memory", "flaky_death", "start_flaky"}


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    from scripted_prove import make_checkpoint

    return make_checkpoint(tmp_path_factory.mktemp("scripted") / "model" / "epoch-1", CHANCES)


def write_theorems(path, records, names):
    path.write_text(json.dumps([records[name] for name in names], ensure_ascii=False))
    return path


@pytest.fixture(scope="module")
def whole_run(lean, records, scripted, tmp_path_factory):
    """Everything that a theorem may meet, with two workers at once."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "tries").mkdir()
    theorems = write_theorems(folder / "theorems.json", records, HERE)
    flags = ["--model", scripted, "--theorems", theorems, "--passes", 64, "--block", 16, "--workers", 2]
    flags += ["--tactic-timeout", 1, "--start-timeout", 30, "--engine", "transformers", "--out", folder / "out"]
    flags += ["--max-steps", 4, "--save-proofs", folder / "proofs.jsonl", "--dojo", "lean_dojo:Dojo"]
    process = start_script(*flags, **{TRIES: str(folder / "tries")})
    return folder, *finish(process), flags


def test_each_theorem_gets_what_its_tactics_bring(whole_run, lean):
    folder, out, err, _ = whole_run
    lines = {line["full_name"]: line for line in read(folder / "out/model-epoch-1.jsonl")}
    assert lines.keys() == set(HERE) and {name for name, line in lines.items() if line["successes"]} == PROVABLE
    assert all(line["asked"] == 64 for line in lines.values())
    for name in ("start_eof", "start_solved"):
        assert lines[name]["status"] == "not started" and lines[name]["passes"] == 0
        assert f"{name} (Standin.lean) did not start: " in out
    assert all(line["status"] == "done" and line["passes"] == 64 for line in lines.values() if line["passes"])
    counted = {name: (line["timeouts"], line["crashes"]) for name, line in lines.items()}
    assert counted["hanging"][0] >= 2 and counted["hanging"][1] == 0 and counted["dying"][1] >= 2
    assert counted["memory"][1] >= 2 and counted["flaky_death"] == (0, 1) and counted["start_flaky"] == (0, 1)
    assert counted["one_step"] == counted["two_steps"] == counted["native"] == (0, 0)
    assert lines["native"]["kinds"] == {"refused": 1} and lines["one_step"]["kinds"]["no end"] == 1
    # a binomial draw each: one_step 2/9 at once
    assert abs(lines["one_step"]["successes"] - 64 * 2 / 9) < 4 * math.sqrt(64 * 2 / 9 * 7 / 9)
    assert lines["one_step"]["tactic_calls"] == 3 and lines["two_steps"]["proofs"] >= 2
    assert "%|" in err or "theorem" in err  # a progress bar
    assert running(lean, wait=5) == []


def test_the_tables_are_what_the_lines_say(whole_run):
    folder, out, *_ = whole_run
    lines = read(folder / "out/model-epoch-1.jsonl")
    found = json.loads((folder / "out/prove.json").read_text())
    assert found["theorems"] == len(HERE)
    (row,) = found["paper"].values()
    for n in (1, 2, 16, 64):
        rates = [1 - math.comb(64 - line["in_time"], n) / math.comb(64, n) for line in lines]
        assert row[str(n)]["pass"] == pytest.approx(np.mean(rates), abs=1e-12)
    cells = [f"{100 * row[str(n)][name]:.1f}" for n in (16, 64) for name in ("pass", "low", "high")]
    assert f"| {cells[0]} [{cells[1]}, {cells[2]}] | {cells[3]} [{cells[4]}, {cells[5]}] |" in out
    assert f"| {len(PROVABLE)} |" in out  # proved
    totals = [sum(line[name] for line in lines) for name in ("timeouts", "crashes", "unreplayable")]
    assert out.count("| " + " | ".join(map(str, totals)) + " |") == 1
    assert (folder / "out/success.png").stat().st_size > 10_000
    assert f"{len(HERE)} theorems, 64 passes each" in out and "lean_dojo:Dojo, sampling by transformers" in out


def test_proofs_are_training_data(whole_run, records):
    from train_lean_step import load_steps

    folder = whole_run[0]
    lines = {line["full_name"]: line for line in read(folder / "out/model-epoch-1.jsonl")}
    theorems = {theorem["full_name"]: theorem for theorem in common.load_theorems(folder / "proofs.jsonl")}
    assert [*theorems] == [name for name in HERE if name in PROVABLE], "not in the order in which they ended"
    for name, theorem in theorems.items():
        steps = theorem["traced_tactics"]
        assert [step["tactic"] for step in steps] == lines[name]["proof"]
        assert all(step["annotated_tactic"] == [step["tactic"], []] for step in steps)
        assert [step["state_after"] for step in steps] == [*(s["state_before"] for s in steps[1:]), "no goals"]
        assert theorem["start"] == records[name]["start"] and theorem["url"] == records[name]["url"]
    two = theorems["two_steps"]["traced_tactics"]
    assert [step["tactic"] for step in two] == ["obtain ⟨hp, hq⟩ := h", "exact ⟨hq, hp⟩"]
    assert two == records["two_steps"]["traced_tactics"]
    steps = load_steps(folder / "proofs.jsonl", 100)
    assert [step["id"] for step in steps] == list(range(100, 100 + len(steps)))
    assert len({step["proof"] for step in steps}) == len(PROVABLE)
    assert ("⊢ 2 + 2 = 4", lines["one_step"]["proof"][0]) in [(step["problem"], step["answer"]) for step in steps]


def test_a_finished_run_is_only_reported_again_and_other_settings_are_refused(whole_run, capsys, here):
    import scripted_prove

    folder, _, _, flags = whole_run
    path = folder / "out/model-epoch-1.jsonl"
    original = path.read_text()
    failed = {line["id"] for line in map(json.loads, original.splitlines()) if line["status"] == "not started"}
    with pytest.MonkeyPatch.context() as patch:  # what did not start is tried again, and nothing else
        patch.setattr(common, "load_tokenizer", lambda checkpoint: scripted_prove.Bytes())
        patch.setattr(prove, "report", lambda *_: None)
        again = []
        patch.setattr(prove, "prove_all", lambda *inputs: again.extend(theorem["id"] for theorem in inputs[5]))
        prove.main([*map(str, flags)])
        assert failed and {*again} == failed
    path.write_text(original.replace('"status": "not started"', '"status": "done"'))
    before = path.read_bytes()
    (folder / "out/success.png").unlink()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "load_tokenizer", lambda checkpoint: scripted_prove.Bytes())
        patch.setattr(common, "start_ray", None)  # nothing is left to do
        prove.main([*map(str, flags), "--ns", "1,8"])
        assert "| pass@1 | pass@8 |" in capsys.readouterr().out and (folder / "out/success.png").exists()
        assert (folder / "out/model-epoch-1.jsonl").read_bytes() == before
        other = [("--passes", 32, "passes: 64"), ("--seed", 1, "seed: 0"), ("--merge", "text", "merge: path")]
        other += [("--block", 8, "block: 16"), ("--tactic-timeout", 9, "tactic_timeout: 1.0")]
        other += [("--max-theorems", 3, "theorems: another"), ("--dojo", "tests.toy_dojo:Dojo", "dojo: lean_dojo:Dojo")]
        for flag, value, told in other:
            with pytest.raises(SystemExit) as stop:
                prove.main([*map(str, flags), flag, str(value)])
            error = capsys.readouterr().err
            assert stop.value.code == 2 and f"holds results of other settings ({told})" in error, error
    assert (folder / "out/model-epoch-1.jsonl").read_bytes() == before
    path.write_text(original)


def test_theorems_that_do_not_start_are_tried_again_and_stop_nothing(tmp_path, scripted):
    """35 that never start come first: the first run takes the environment for broken, the second knows better."""
    theorems = [toy("unwilling") | {"file_path": f"{i}", "traced_tactics": []} for i in range(35)]
    theorems += [toy("toy_1") | {"file_path": f"{i}", "traced_tactics": []} for i in range(35, 40)]
    (tmp_path / "theorems.json").write_text(json.dumps(theorems))
    flags = ["--model", scripted, "--theorems", tmp_path / "theorems.json", "--passes", 4, "--workers", 2]
    flags += ["--engine", "transformers", "--dojo", "tests.toy_dojo:Dojo", "--out", tmp_path / "out"]
    path, found = tmp_path / "out/model-epoch-1.jsonl", []
    for code in (1, 0, 0):
        _, err = finish(start_script(*flags), code)
        assert ("theorems did not start: OSError: this theorem is not for me" in err) == (code == 1)
        lines = read(path)
        assert len({line["id"] for line in lines}) == len(lines)
        found.append(Counter(line["status"] for line in lines))
    assert 20 <= found[0]["not started"] < 35 and found[0]["done"] == 0
    assert found[1] == found[2] == {"not started": 35, "done": 5}


def test_broken_settings_are_named(tmp_path, scripted, capsys, monkeypatch):
    theorems = tmp_path / "theorems.json"
    theorems.write_text(json.dumps([toy("toy_1") | {"traced_tactics": []}]))
    (tmp_path / "out").mkdir()
    (tmp_path / "out/settings.json").write_text("{")
    monkeypatch.setattr(common, "load_tokenizer", lambda checkpoint: None)
    with pytest.raises(SystemExit):
        flags = ["--model", scripted, "--theorems", theorems, "--dojo", "tests.toy_dojo:Dojo"]
        prove.main([*map(str, flags), "--engine", "transformers", "--out", str(tmp_path / "out")])
    assert "settings.json is broken" in capsys.readouterr().err


def toy_flags(out, *names):
    theorems = write_theorems(out.parent / "toys.json", {name: toy(name) for name in names}, names)
    return ["--theorems", theorems, "--dojo", "tests.toy_dojo:Dojo", "--engine", "transformers", "--out", out]


def test_two_at_once_do_not_write_into_one_folder(scripted, here, tmp_path, capsys):
    """A run of this process, which holds the lock until it ends, and one of another."""
    import scripted_prove

    flags = ["--model", scripted, *toy_flags(tmp_path / "out", "toy_1")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "load_tokenizer", lambda checkpoint: scripted_prove.Bytes())
        for name in ("prove_all", "report"):
            patch.setattr(prove, name, lambda *_: None)
        prove.main([*map(str, flags)])
    _, err = finish(start_script(*flags), code=2)
    assert f"error: --out {tmp_path}/out: another prove.py is writing there" in err


def test_models_of_an_ensemble_draw_independently(cluster, tmp_path):
    """A sampler sees no difference between the three but that of the seeds, which come from the weights: two have the
    same, wherever they lie."""
    from scripted_prove import make_checkpoint

    chances, names = {"1 to go": {"step": 1, "skip": 1}}, ["toy_1"] * 6
    tables = {"one": chances, "other": chances | {"never": {"seen": 1}}, "copy": chances}
    models = [make_checkpoint(tmp_path / name / "epoch-1", table) for name, table in tables.items()]
    finish(start_script("--ensemble", *models, *toy_flags(tmp_path / "out", *names), "--workers", 1, **cluster))
    one, other, copy = (
        {line["id"]: line["successes"] for line in read(tmp_path / f"out/{name}-epoch-1.jsonl")} for name in tables
    )
    assert all(1800 < successes < 2300 for successes in [*one.values(), *other.values()])
    assert one == copy != other and len(one) == len(other) == 6 and len({*one.values()}) > 1


# Runs that are disturbed

SLOW_CHANCES = {
    "⊢ 2 + 2 = 4": {"skip": 2, "sleep 0.01": 1, "rfl": 1, "simp": 2},
    "p q : Prop\nh : p ∧ q\n⊢ q ∧ p": CHANCES["p q : Prop\nh : p ∧ q\n⊢ q ∧ p"],
    **{state: chances for state, chances in CHANCES.items() if "h : p ∧ q\n⊢ p" in state or "hp : p" in state},
    "else": {"simp": 1, "exfalso": 1},
}
DISTURBED = ["one_step", "two_steps", "unprovable"] * 2


@pytest.fixture(scope="module")
def disturbed(lean, records, tmp_path_factory):
    """-> flags of a run of some seconds with one worker and no time limit in reach; what it finds undisturbed."""
    from scripted_prove import PAUSE, make_checkpoint

    folder = tmp_path_factory.mktemp("disturbed")
    model = make_checkpoint(folder / "model" / "epoch-1", SLOW_CHANCES)
    theorems = write_theorems(folder / "theorems.json", records, DISTURBED)
    flags = ["--model", model, "--theorems", theorems, "--passes", 64, "--block", 16, "--workers", 1]
    flags += ["--max-steps", 8, "--tactic-timeout", 20, "--engine", "transformers", "--dojo", "lean_dojo:Dojo"]
    finish(start_script(*flags, "--out", folder / "whole"))
    whole = read(folder / "whole/model-epoch-1.jsonl")
    assert [line["full_name"] for line in whole] == DISTURBED and sum(line["successes"] for line in whole) > 20
    return flags, whole, {PAUSE: "0.05"}


def wait_until(condition, process, seconds=90):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.02)
    return found


def lines_in(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def descendants(pid):
    import psutil

    found = []
    for one in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "agent" not in " ".join(one.cmdline()).lower():  # Ray's own agents leave when they notice
                found.append(one)
    return found


def gone(processes, seconds=15):
    import psutil

    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return [p for p in alive if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_a_lean_that_is_killed_is_replaced_and_nothing_is_lost(disturbed, lean, tmp_path):
    flags, whole, pause = disturbed
    process = start_script(*flags, "--out", tmp_path / "out", **pause)
    path, killed = tmp_path / "out/model-epoch-1.jsonl", 0
    while process.poll() is None and killed < 3:
        wait_until(lambda least=2 * killed: lines_in(path) >= least, process)
        (pid,) = wait_until(lambda: running(lean), process)[:1]
        os.kill(pid, signal.SIGKILL)
        killed += 1
    finish(process)
    found = read(path)
    assert sum(line["crashes"] for line in found) >= 2
    for mine, theirs in zip(found, whole, strict=True):
        assert deterministic(mine) | {"crashes": 0} == deterministic(theirs), mine["full_name"]
    assert running(lean, wait=5) == []


def called(word):
    """Processes that have the word in their command: "LeanWorker", or "kill_when_left" for who clears up after one."""
    import psutil

    return {p for p in psutil.process_iter(["cmdline"]) if word in " ".join(p.info["cmdline"] or [])}


def no_watcher_but(before):
    """They end once all that they clear up after has ended."""
    until = time.monotonic() + 20
    while called("kill_when_left") - before and time.monotonic() < until:
        time.sleep(0.2)
    return called("kill_when_left") <= before


def test_a_killed_run_goes_on_where_it_was(disturbed, lean, tmp_path):
    flags, whole, pause = disturbed
    path, before = tmp_path / "out/model-epoch-1.jsonl", called("kill_when_left")
    process = start_script(*flags, "--out", tmp_path / "out", **pause)
    wait_until(lambda: lines_in(path) >= 2, process)
    below = called("LeanWorker") & set(descendants(process.pid))  # Ray's own processes take their time
    assert len(below) == 1 and len(called("kill_when_left") - before) == 1
    process.kill()
    process.communicate()
    assert running(lean, wait=15) == [] and gone(list(below)) == [] and no_watcher_but(before)
    done = lines_in(path)
    with open(path, "a") as file:
        file.write('{"id": 8, "full_na')  # as a kill in the middle of a write leaves it
    finish(start_script(*flags, "--out", tmp_path / "out"))
    found = read(path)
    assert 2 <= done < len(found) == len(DISTURBED) == len({line["id"] for line in found})
    assert [deterministic(line) for line in found] == [deterministic(line) for line in whole]


def test_an_interrupted_run_leaves_no_process(disturbed, lean, tmp_path):
    flags, _, pause = disturbed
    signals = {signal.SIGINT: (130, 1, -2), signal.SIGTERM: (143,)}
    started = {number: start_script(*flags, "--out", tmp_path / number.name, **pause) for number in signals}
    below, before = {}, called("kill_when_left")
    for number, process in started.items():
        wait_until(lambda name=number.name: lines_in(tmp_path / name / "model-epoch-1.jsonl"), process)
        below[number] = descendants(process.pid)
        assert called("LeanWorker") & set(below[number])
        process.send_signal(number)
    for number, process in started.items():
        process.communicate(timeout=60)
        assert process.returncode in signals[number]
        assert gone(below[number]) == []
    assert running(lean, wait=10) == [] and no_watcher_but(before)


# On the embedded theorems, with a model that was trained a little


@pytest.fixture(scope="module")
def little_prover(tmp_path_factory):
    """Two checkpoints of one short run, and theorems of a step or two from its training set."""
    import train_lean_step

    folder = tmp_path_factory.mktemp("little")
    found = json.loads((ROOT / "examples/propositional/train.json").read_text())
    short = [theorem for theorem in found if 1 <= len(theorem["traced_tactics"]) <= 2]
    (folder / "train.json").write_text(json.dumps(short))
    (folder / "short.json").write_text(json.dumps(short[:5] + [found[-1]]))  # the last ones have no proof
    assert not found[-1]["traced_tactics"]
    flags = ["--model", "examples/tiny_prover", "--data", str(folder), "--n-eff", "1", "--max-steps", "110"]
    flags += ["--batch-size", "16", "--micro-batch-size", "16", "--lr", "0.003", "--warmup-steps", "10"]
    train_lean_step.main([*flags, "--checkpoint-at", "0.9", "--epochs", "9", "--out", str(folder / "lean-neff1")])
    return folder, folder / "lean-neff1/epoch-1", folder / "lean-neff1/step-110"


def test_an_ensemble_and_its_baseline_on_the_embedded_theorems(little_prover, cluster, tmp_path):
    folder, a, b = little_prover
    flags = ["--theorems", folder / "short.json", "--dojo", "examples.propositional.environment:Dojo"]
    flags += ["--passes", 64, "--max-steps", 6, "--workers", 2, "--out", tmp_path / "out"]
    done = run_script("prove.py", "--ensemble", a, b, "--baseline", a, *flags, **cluster)
    assert "sampling by transformers, blocks of 64" in done.stdout  # of EXAMPLE_SETTINGS, as the base is an example
    lines = {path.stem: read(path) for path in (tmp_path / "out").glob("*.jsonl")}
    names = ["lean-neff1-epoch-1", "lean-neff1-step-110", "lean-neff1-epoch-1-x2"]
    assert lines.keys() == set(names) and all(sorted(r["id"] for r in found) == [*range(6)] for found in lines.values())
    assert [lines[name][0]["asked"] for name in names] == [64, 64, 128]
    proved = [sum(line["successes"] > 0 for line in lines[name]) for name in names]
    assert all(proved) and not any(line["unreplayable"] for found in lines.values() for line in found)

    def by_hand(name, n):
        found = sorted(lines[name], key=lambda line: line["id"])
        return np.array([1 - math.comb(r["asked"] - r["in_time"], n) / math.comb(r["asked"], n) for r in found])

    rows = json.loads((tmp_path / "out/prove.json").read_text())["paper"]
    assert list(rows) == [str(a), str(b), f"{a} (2 x the passes)", "ensemble of 2"]
    for n in (16, 64):
        each = [by_hand(names[0], n), by_hand(names[1], n), by_hand(names[2], 2 * n)]
        each.append(1 - (1 - each[0]) * (1 - each[1]))
        for row, values in zip(rows.values(), each, strict=True):
            assert row[str(n)]["pass"] == pytest.approx(values.mean(), abs=1e-12)
    table = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert table[0] == "| model | pass@16 | pass@64 |" and table[5].startswith("| ensemble of 2 | ")
    assert (tmp_path / "out/success.png").stat().st_size > 10_000
    # proofs are proofs, and what each of their states is called is what the model was asked about
    from examples.propositional.environment import Dojo, ProofFinished

    theorems = json.loads((folder / "short.json").read_text())
    for line in lines[names[1]]:
        if line["proof"]:
            with Dojo(theorems[line["id"]]) as (dojo, state):
                for tactic, text in zip(line["proof"], line["states"], strict=True):
                    assert state.pp == text
                    state = dojo.run_tac(state, tactic)
                assert isinstance(state, ProofFinished)


def test_vllm_samples_the_same_tactics(little_prover, cluster, here, tmp_path):
    """Against a search in this process with the model itself: two draws of one binomial a theorem."""
    if find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    folder, _, checkpoint = little_prover
    flags = ["--theorems", folder / "short.json", "--dojo", "examples.propositional.environment:Dojo", "--workers", 2]
    flags += ["--passes", 256, "--block", 128, "--max-steps", 6, "--max-theorems", 3, "--out", tmp_path / "out"]
    run_script("prove.py", "--model", checkpoint, *flags, "--engine", "vllm", **cluster)
    found = {line["id"]: line for line in read(tmp_path / "out/lean-neff1-step-110.jsonl")}

    tokenizer = common.load_tokenizer(str(checkpoint))
    model, _ = common.load_model(str(checkpoint), tokenizer)
    live = common.LiveModel(common.make_accelerator(), model.eval(), tokenizer)
    tokens = common.read_record(str(checkpoint))["max_new_tokens"]
    one = prove.LeanWorker("examples.propositional.environment:Dojo", 9.0, 9.0, 1)
    one.events = Counter()

    def sample(theorem, block, walkers):
        prompts = [tokenizer(f"{place.text}\n---\n").input_ids for place in walkers]
        drawn = live.generate(prompts, [*walkers.values()], tokens, [100 * block + place.number for place in walkers])
        return [([common.read_answer(c.token_ids, tokenizer, "lean") for c in group], 0.0) for group in drawn]

    right = []
    for i, theorem in enumerate(json.loads((folder / "short.json").read_text())[:3]):
        how = {"passes": 256, "time_limit": 1e9, "tactic_timeout": 30, "block": 128, "max_steps": 6, "merge": "path"}
        args = argparse.Namespace(**how, stop_at_first=False)
        other = prove.prove_theorem(theorem | {"id": i}, 256, args, one, sample)
        assert other["status"] == found[i]["status"] == "done" and other["passes"] == found[i]["passes"] == 256
        x, y = other["successes"], found[i]["successes"]
        q = (x + y) / 512
        assert abs(x - y) <= 4.5 * math.sqrt(2 * 256 * max(q * (1 - q), 1 / 256)), theorem["full_name"]
        right.append(y)
    one.watch.stdin.close()
    assert any(0 < y < 256 for y in right)


# What is proved, and what is refused before anything is started


def refused(arguments, capsys, *told):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        prove.main([*map(str, arguments)])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and all(one in error for one in told) and "Traceback" not in error, error


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["--passes", "0"], "--passes must be positive, not 0"),
        (["--time-limit", "-1"], "--time-limit must be positive, not -1.0"),
        (["--time-limit", "nan"], "--time-limit must be positive"),
        (["--tactic-timeout", "inf"], "--tactic-timeout must be positive"),
        (["--ns", "16,32", "--passes", "16"], "--ns must lie between 1 and --passes (16)"),
        (["--ns", "0,1"], "--ns must lie between 1 and"),
        (["--ns", "a"], "--ns takes whole numbers separated by commas, not 'a'"),
        (["--merge", "state"], "invalid choice: 'state'"),
        (["--model", "a", "--ensemble", "b"], "give either --model or --ensemble"),
        (["--theorems", "a", "--minif2f", "test"], "give either --theorems or --minif2f"),
        (["--minif2f", "train"], "invalid choice: 'train'"),
        (["--dojo", "lean_dojo"], "--dojo takes MODULE:CLASS, lean_dojo:Dojo for instance, not lean_dojo"),
    ],
)
def test_bad_arguments(arguments, told, capsys):
    refused(arguments, capsys, told)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty folder to start from."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "path", sys.path[:])
    return tmp_path / "elsewhere"


def test_models_that_are_missing_or_wrong(elsewhere, capsys, scripted):
    from scripted_prove import make_checkpoint

    refused([], capsys, "there are no models runs/lean-neff*/epoch-*", "python train_lean_step.py --n-eff $n")
    refused(["--ensemble"], capsys, "there are no models runs/lean-neff*/epoch-*")
    refused(["--model", "nowhere/x/y"], capsys, "nowhere/x/y: there is no such folder")
    refused(["--model", ROOT / "examples/tiny_llama"], capsys, "holds no weights", "train_lean_step.py wrote")
    refused(["--model", scripted, "--baseline", ROOT / "examples/tiny_llama"], capsys, "tiny_llama holds no weights")
    refused(["--ensemble", scripted, f"{scripted}/."], capsys, "a model is given twice")
    other = make_checkpoint(elsewhere / "direct/epoch-1", {}, template="direct")
    refused(["--model", other], capsys, "was not trained on proof states")
    (other / "dco.json").write_text('{"template": "lean", ')
    refused(["--model", other], capsys, f"error: {other}/dco.json: not a JSON object (", "copy the checkpoint anew")
    for name in ("lean-neff8/epoch-2", "lean-neff8/epoch-10", "lean-neff16/epoch-1", "lean-neff1/epoch-3"):
        make_checkpoint(elsewhere / "runs" / name, {})
    make_checkpoint(elsewhere / "runs/lean-neff-old/epoch-9", {})
    (elsewhere / "runs/lean-neff4/epoch-1.partial").mkdir(parents=True)
    last = ["runs/lean-neff1/epoch-3", "runs/lean-neff8/epoch-10", "runs/lean-neff16/epoch-1"]
    refused([], capsys, f"there are several models ({', '.join(last)}): choose by --model")
    assert prove.choose_models(prove.parse_arguments(["--ensemble"])) == last


def test_theorems_and_their_environment(elsewhere, capsys, scripted, records, monkeypatch):
    model = ["--model", scripted]
    args = prove.parse_arguments([])
    theorems = prove.choose_theorems(args)
    assert f"taking --theorems {ROOT}/examples/propositional/test.json" in capsys.readouterr().out
    assert args.dojo == "examples.propositional.environment:Dojo" and len(theorems) == 250
    refused(
        [*model, "--theorems", "none.json"], capsys, "none.json does not exist; LeanDojo Benchmark 4 is at https://"
    )
    Path("list.json").write_text(json.dumps([*records.values()]))
    args = prove.parse_arguments(["--theorems", "list.json", "--only-untraced", "--max-theorems", "3"])
    found = prove.choose_theorems(args)
    assert args.dojo == "lean_dojo:Dojo"
    untraced = [name for name, record in records.items() if not record["traced_tactics"]]
    assert [theorem["full_name"] for theorem in found] == untraced[:3] and 0 < len(untraced) < len(records)
    assert [theorem["id"] for theorem in found] == [[*records].index(name) for name in untraced[:3]]
    Path("traced.json").write_text(json.dumps([records["one_step"]]))
    refused(
        [*model, "--theorems", "traced.json", "--only-untraced"], capsys, "there is no theorem without a trace in it"
    )
    Path("bad.json").write_text(json.dumps([{"url": "u"}]))
    refused([*model, "--theorems", "bad.json"], capsys, "bad.json, theorem 1: field 'commit' is missing")
    Path("default").mkdir()
    Path("leandojo_benchmark_4/random").mkdir(parents=True)
    Path("leandojo_benchmark_4/random/test.json").write_text(json.dumps([records["slow"]]))
    (theorem,) = prove.choose_theorems(args := prove.parse_arguments([]))
    assert theorem["full_name"] == "slow" and args.dojo == "lean_dojo:Dojo"


def test_what_lean_needs_is_asked_for_before_anything_starts(elsewhere, capsys, scripted, records, lean, monkeypatch):
    Path("list.json").write_text(json.dumps([records["one_step"]]))
    far = records["one_step"] | {"url": "https://github.com/a/b"}
    Path("far.json").write_text(json.dumps([far]))
    near = ["--model", scripted, "--theorems", "list.json", "--engine", "transformers"]
    refused([*near, "--dojo", "no_such_module:Dojo"], capsys, "no_such_module cannot be imported: is it here?")
    refused([*near, "--dojo", "no_such_package.module:Dojo"], capsys, "no_such_package.module cannot be imported")
    refused([*near, "--dojo", "json.no.such:Dojo"], capsys, "json.no.such cannot be imported")
    refused([*near, "--dojo", "prove.inner:Dojo"], capsys, "prove.inner cannot be imported")
    with monkeypatch.context() as patch:
        patch.setenv("GITHUB_ACCESS_TOKEN", "")
        told = "GITHUB_ACCESS_TOKEN is not set", "https://github.com/settings/tokens, and export it"
        refused([*near, "--theorems", "far.json"], capsys, *told)
        patch.setenv("GITHUB_ACCESS_TOKEN", "t")
        import requests

        asked = []

        def get(*inputs, **more):
            asked.append((inputs, more))
            raise requests.ConnectionError("no route")

        patch.setattr(requests, "get", get)
        refused([*near, "--theorems", "far.json"], capsys, "GitHub, which LeanDojo asks", "no route")
        ((address,), more) = asked[0]
        assert "api.github.com" in address and more["headers"]["Authorization"] == "Bearer t" and more["timeout"] < 60
    with monkeypatch.context() as patch:
        patch.setenv("PATH", os.path.dirname(shutil.which("git")) if not shutil.which("lake", path="/usr/bin") else "")
        refused(near, capsys, "no git or no lake on PATH", "https://lean-lang.org/install")
    with monkeypatch.context() as patch:
        patch.setattr(prove, "find_spec", lambda name: None if name == "lean_dojo" else find_spec(name))
        refused(near, capsys, "lean_dojo cannot be imported: pip install lean-dojo==4.20.0")
    assert not Path("runs").exists()


def test_minif2f_by_its_names_in_leandojos_cache(elsewhere, capsys, scripted, monkeypatch):
    model = ["--model", scripted]
    monkeypatch.setenv("CACHE_DIR", str(elsewhere / "cache"))
    told = (
        "MiniF2F is not in LeanDojo's cache",
        "trace(LeanGitRepo('https://github.com/yangky11/miniF2F-lean4', 'be17324",
    )
    refused([*model, "--minif2f", "test"], capsys, *told)
    commit = "be17324" + "0" * 33
    folder = elsewhere / f"cache/yangky11-miniF2F-lean4-{commit}/miniF2F-lean4/MiniF2F"
    folder.mkdir(parents=True)
    (folder / "Test.lean").write_text(
        "import Mathlib\n\ntheorem amc12_1 (x : ℝ)\n  (h : x = 1) : x = 1 := by\n  sorry\n\n"
        "theorem mathd_2 : 1 + 1 = 2 := by sorry\n\n-- theorem of_a_comment : False\n"
        "  theorem imo_3{x : ℕ} : x = x := sorry\n"
    )
    (folder / "Valid.lean").write_text("theorem valid_1[Group G] : True := by\n  sorry\n")
    args = prove.parse_arguments(["--minif2f", "both"])
    found = prove.choose_theorems(args)
    assert [theorem["full_name"] for theorem in found] == ["amc12_1", "mathd_2", "imo_3", "valid_1"]
    assert {theorem["commit"] for theorem in found} == {commit} and args.dojo == "lean_dojo:Dojo"
    assert [theorem["file_path"] for theorem in found] == ["MiniF2F/Test.lean"] * 3 + ["MiniF2F/Valid.lean"]
    assert len(prove.choose_theorems(prove.parse_arguments(["--minif2f", "valid"]))) == 1
    assert str(prove.parse_arguments(["--minif2f", "test"]).theorems) == "None"


def test_a_repository_that_is_not_traced_is_refused(lean, worker, records, monkeypatch):
    """On the node of the worker, whose cache it is."""
    place = (records["one_step"]["url"], records["one_step"]["commit"])
    assert worker.not_cached([place]) == []
    told = worker.not_cached([place, (place[0], "f" * 40), ("https://github.com/a/mathlib4", "0" * 40)])
    assert len(told) == 2 and all(f"is not in {lean['CACHE_DIR']} of " in line for line in told)
    assert told[1].startswith("https://github.com/a/mathlib4 at 000")


def test_what_a_worker_misses_ends_the_run(ray_here, here, lean, records, scripted, tmp_path, capsys, monkeypatch):
    """What the lines say of it is seen above; on a node of a cluster, Lean itself may be missing."""
    monkeypatch.setattr(common, "load_tokenizer", lambda checkpoint: None)
    flags = ["--model", scripted, *toy_flags(tmp_path / "out", "toy_1"), "--workers", 1]
    theorem = {"lost": records["one_step"] | {"commit": "f" * 40}}
    lost = ["--theorems", write_theorems(tmp_path / "lost.json", theorem, theorem), "--dojo", "lean_dojo:Dojo"]
    refused([*flags, *lost, "--out", tmp_path / "lost"], capsys, "error: Lean or a repository is missing:\n", " of ")
    told = "error: --dojo tests.toy_dojo:Nobody: a worker cannot import it: AttributeError: "
    refused([*flags, "--dojo", "tests.toy_dojo:Nobody"], capsys, told)


def test_two_checkpoints_of_one_name_are_refused(elsewhere, capsys, records):
    from scripted_prove import make_checkpoint

    Path("list.json").write_text(json.dumps([records["one_step"]]))
    a, b = (make_checkpoint(elsewhere / name / "lean/epoch-1", {}) for name in "ab")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "load_tokenizer", lambda checkpoint: None)
        refused(
            ["--ensemble", a, b, "--theorems", "list.json"], capsys, "two checkpoints have the same last two folders"
        )


def test_a_broken_line_of_the_results_is_named(scripted, here, capsys, tmp_path):
    """But for the last one, which a kill may have cut short."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out/model-epoch-1.jsonl").write_text('{"id": 0}\n{"id": 1, \n{"id": 2}\n{"id": 3, ')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "load_tokenizer", lambda checkpoint: None)
        told = f"error: {tmp_path}/out/model-epoch-1.jsonl:2: not JSON", "each line must be one object"
        refused(["--model", scripted, *toy_flags(tmp_path / "out", "toy_1")], capsys, *told)


def test_the_papers_settings():
    args = prove.parse_arguments([])
    assert (args.passes, args.max_steps, args.time_limit, args.ns) == (4096, 50, 5000, [16, 64, 256, 1024, 4096])
    assert (args.tactic_timeout, args.block, args.merge) == (30, 256, "path")
    assert prove.parse_arguments(["--passes", "1024"]).time_limit == 1250
    assert prove.parse_arguments(["--passes", "10"]).ns == [10]
    assert prove.parse_arguments(["--passes", "100", "--stop-at-first"]).ns == [100]


def test_help_does_not_wait_for_torch():
    code = "import sys, prove\ntry: prove.main(['--help'])\nexcept SystemExit: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n") and "(paper: 4096; 1024 to iterate)" in done.stdout
