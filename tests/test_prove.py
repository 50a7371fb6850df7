"""The proof search: its estimates and costs, what Lean may do to it, and prove.py as a whole."""

import argparse
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
import scripted_prove
from conftest import ROOT
from lean_stand_in import running
from small_runs import refused

import common
import prove
import train_lean_step
from examples.minif2f import generate
from examples.propositional.environment import Dojo, ProofFinished

# ---- The search of one theorem, in a tree that is known ------------------------------------------
TREE = {  # state: {tactic: (its chance, what it leads to)}
    "r": {"a": (0.4, "s1"), "b": (0.3, "ERROR"), "c": (0.3, "s2")},
    "s1": {"d": (0.05, "DONE"), "e": (0.5, "s2"), "f": (0.45, "ERROR")},
    "s2": {"g": (0.02, "DONE"), "h": (0.3, "s2"), "i": (0.68, "ERROR")},  # h changes nothing
}
SLOW = {"d": 10.0, "g": 10.0}  # seconds: a proof takes time


class KnownTree:
    """In place of `prove.Lean`."""

    def __init__(self, tree=TREE, seconds=None, false=()):
        self.tree, self.seconds, self.false = tree, seconds or {}, false
        self.events, self.calls, self.replayed = Counter(), [], []

    def state(self, path):
        state = "r"
        for tactic in path:
            state = self.tree[state][tactic][1]
        return state

    def do(self, method, theorem, items):
        return [getattr(self, method)(*item) for item in items]

    def enter(self):
        return "open", "r", 0.0

    def apply(self, path, tactic):
        self.calls.append((path, tactic))
        state = self.state((*path, tactic))
        kind = {"DONE": "proved", "ERROR": "error"}.get(state, "open")
        return kind, state, self.seconds.get(tactic, 1.0)

    def replay(self, path):
        self.replayed.append(path)
        kind = "error" if path[-1] in self.false else "proved"
        return kind, [self.state(path[:i]) for i in range(len(path))], 1.0


def drawing(seed, tree=TREE):
    """`sample` of a search, by the tree's chances."""

    def sample(requests):
        answers = []
        for text, n, key in requests:
            rng, table = np.random.default_rng([seed, *key]), tree[text]
            drawn = rng.multinomial(n, [chance for chance, _ in table.values()]).tolist()
            answers.append((+Counter(dict(zip(table, drawn, strict=True))), 0.0))
        return answers

    return sample


def saying(*rounds):
    """`sample` that gives what it is told: in each round, the tactics of each request."""
    rounds = iter(rounds)
    return lambda requests: [(Counter(one), 0.0) for one in next(rounds)]


def toy(name, **more):
    place = {"url": "toy", "commit": "0", "file_path": "Toy", "full_name": name}
    return place | {"traced_tactics": []} | more


def search(lean, sample, asked, i=0, **settings):
    defaults = {"passes": asked, "time_limit": 1e9, "block": 256, "max_steps": 50}
    args = argparse.Namespace(**defaults | {"tactic_timeout": 30.0} | settings)
    return prove.Search(toy("toy_1", id=i), asked, args, lean, sample).run()


def chance(state="r", steps=50):
    """Of a pass to end in a proof, from the tree."""
    if state in ("DONE", "ERROR") or steps == 0:
        return float(state == "DONE")
    return sum(p * chance(after, steps - 1) for p, after in TREE[state].values())


def z_of(values, truth):
    return (np.mean(values) - truth) / (np.std(values, ddof=1) / math.sqrt(len(values)))


@pytest.mark.parametrize("max_steps", [50, 2])
def test_successes_are_those_of_independent_passes(max_steps):
    q, n, searches = chance(steps=max_steps), 256, 300
    settings = {"max_steps": max_steps, "block": 64}
    results = [search(KnownTree(), drawing(2), n, i, **settings) for i in range(searches)]
    assert all(result["status"] == "done" for result in results)
    counts = np.array([result["successes"] for result in results])
    assert abs(z_of(counts, n * q)) < 4
    # The variance of a binomial, whose own estimate has a relative error of √(2/searches).
    assert abs(counts.var(ddof=1) / (n * q * (1 - q)) - 1) < 4 * math.sqrt(2 / searches)
    for k in (1, 16):
        for estimate in (prove.paper, prove.unbiased):
            assert abs(z_of([estimate(one, k) for one in results], 1 - (1 - q) ** k)) < 4


def test_passes_share_the_calls_of_a_path_and_of_nothing_else():
    """Two paths lead to the same text, s2; its tactics are called on each."""
    lean = KnownTree()
    sample = saying([["a", "a", "c"]], [["e", "e"], ["h"]], [["g", "i"], ["g"]])
    result = search(lean, sample, 3)
    assert lean.calls == [
        *[((), "a"), ((), "c"), (("a",), "e"), (("c",), "h")],
        *[(("a", "e"), "g"), (("a", "e"), "i"), (("c", "h"), "g")],
    ]
    assert (result["tactic_calls"], result["steps"], result["successes"]) == (7, 9, 2)


@pytest.mark.parametrize("limit", [20.0, 6.0])  # of a few blocks; of less than most blocks take
def test_a_time_limit_biases_the_plain_average_but_not_the_estimate(limit):
    q, n, plain, found = chance(), 8, [], {1: [], 8: []}
    for i in range(2000):
        lean = KnownTree(seconds=SLOW)
        result = search(lean, drawing(5), 32 * n, i, block=n, time_limit=limit)
        right, passes = (sum(b[k] for b in result["blocks"]) for k in ("successes", "passes"))
        plain.append(right / passes)
        for k in found:
            found[k].append(prove.unbiased(result, k))
    assert limit < 20 or z_of(plain, q) > 10
    for k in found:
        assert abs(z_of(found[k], 1 - (1 - q) ** k)) < 4, k


def test_the_papers_estimate_counts_what_had_ended_in_time():
    """4 passes, of which one proves in the third second and two in the fourth."""
    tree = {"r": {"a": (0, "s"), "b": (0, "DONE"), "c": (0, "ERROR")}, "s": {"d": (0, "DONE")}}
    sample = saying([["c", "a", "a", "b"]], [["d", "d"]])
    result = search(KnownTree(tree), sample, 8, block=4, time_limit=3.5)
    assert result["status"] == "timed out"
    assert (result["successes"], result["in_time"], result["unfinished"]) == (3, 1, 6)
    assert result["blocks"] == [{"passes": 4, "clock": 4.0, "successes": 3, "own": 4.0}]
    assert prove.paper(result, 1) == pytest.approx(1 / 8) and prove.unbiased(result, 5) == 1
    assert prove.unbiased(result, 1) == pytest.approx(3 / 4)


def test_a_block_far_over_the_limit_is_given_up_and_the_limit_grows_with_the_passes():
    tree = {"r": {"a": (0, "r"), "b": (0, "DONE")}}
    sample = saying([["a", "a", "a", "b"]], *[[["a"] * 3]] * 9)
    result = search(KnownTree(tree), sample, 8, block=4, time_limit=2.0, tactic_timeout=0.1)
    assert result["status"] == "block given up" and result["seconds"]["lean"] == 4.0
    assert result["blocks"] == [] and prove.unbiased(result, 1) == 0 == prove.paper(result, 1)
    assert search(KnownTree(), drawing(6), 64, passes=16, time_limit=5.0)["limit"] == 20.0


@pytest.mark.parametrize("max_steps, successes", [(1, 0), (2, 0), (3, 8), (4, 8)])
def test_a_proof_may_have_as_many_steps_as_there_are(max_steps, successes):
    tree = {"r": {"a": (1.0, "s")}, "s": {"a": (1.0, "t")}, "t": {"a": (1.0, "DONE")}}
    result = search(KnownTree(tree), drawing(0, tree), 8, max_steps=max_steps)
    assert result["successes"] == successes and result["steps"] == 8 * min(3, max_steps)
    states = [(step["state_before"], step["state_after"]) for step in result["proof"]]
    assert states == ([("r", "s"), ("s", "t"), ("t", "no goals")] if successes else [])


REFUSED = ["sorry", "exact (sorry : False)", "exact sorryAx _ true", "all_goals admit", "admit"]
REFUSED += ["native_decide", "decide + native", "decide (config := { native := true })"]
REFUSED += ["exact Lean.ofReduceBool _ _ rfl", "exact rf\x7fl", "exact " + "𝔸" * 1000, None]
TRIED = ["decide", "exact admitted", "exact h_sorry_not", "exact " + "x" * 3900, "exact h\x03"]


def test_what_is_no_proof_or_no_line_is_not_even_tried():
    lean = KnownTree()
    result = search(lean, saying([[*REFUSED, "b"]]), len(REFUSED) + 1)
    assert lean.calls == [((), "b")] and result["steps"] == 1 and result["unfinished"] == 0
    assert not any(map(prove.is_refused, TRIED))
    cited = {"exact foo_1 h": True, "exact?": True, "exact foo_12 h": False}
    for tactic, is_refused in cited.items():  # theorems whose own proof is sorry
        assert prove.is_refused(tactic, ["foo_1", "bar"]) == is_refused
        assert not prove.is_refused(tactic)


def test_a_proof_counts_only_if_its_own_path_proves_it_once_more():
    lean = KnownTree(false=["d"])  # whose replay fails
    result = search(lean, drawing(7), 4096)
    q = 0.5 * chance("s2")  # by c, or a and e
    assert abs(result["successes"] - 4096 * q) < 4 * math.sqrt(4096 * q)
    assert result["unreplayable"] == sum(path[-1] == "d" for path in lean.replayed) == 1
    assert [step["tactic"] for step in result["proof"]] == ["c", "g"]  # a short one
    assert len(set(lean.replayed)) == len(lean.replayed) > 2


# ---- The tables ----------------------------------------------------------------------------------
@pytest.mark.parametrize("models", [["A", "B"], ["A"]])
def test_the_ensemble_its_baseline_and_paired_differences(models, tmp_path, capsys):
    baseline = f"A ({len(models)} x the passes)"
    asked = dict.fromkeys(models, 64) | {baseline: 64 * len(models)}
    counts = {"A": [3, 0, 64, 1], "B": [0, 0, 1, 20], baseline: [3, 1, 0, 60]}
    names = ("tactic_calls", "steps", "unfinished", "unreplayable", "timeouts", "crashes", "proof")
    runs = {}
    for label in asked:
        same = dict.fromkeys(names, 0) | {"id": 0, "status": "done", "asked": asked[label]}
        runs[label] = [same | {"successes": c, "in_time": c} for c in counts[label]]
    args = argparse.Namespace(ns=[1, 16, 64], passes=64, ensemble=True, baseline="A")
    args.model, args.out = models, tmp_path
    prove.report(args, runs, [])
    saved = json.loads((tmp_path / "prove.json").read_text())
    for n in args.ns:
        rates = {}
        for label, size in asked.items():
            k = n * size // 64
            ways = [math.comb(size - c, k) / math.comb(size, k) for c in counts[label]]
            rates[label] = 1 - np.array(ways)
        rates["ensemble"] = 1 - np.prod([1 - rates[one] for one in models], axis=0)
        for label, values in rates.items():
            assert saved["paper"][label][str(n)]["pass"] == pytest.approx(values.mean())
        for one, two in ((models[-1], "A"), ("ensemble", "A"), ("ensemble", baseline)):
            if one == two:
                continue
            row = saved["differences"][f"{one} less {two}"][str(n)]
            expected = common.mean_and_interval(rates[one] - rates[two])
            assert row == pytest.approx(expected, abs=1e-12)
    assert f"| {baseline} less A | " in capsys.readouterr().out
    assert (tmp_path / "success.png").exists()


# ---- Lean's worker and the real lean_dojo, with a stand-in for Lean ------------------------------
@pytest.fixture
def worker(lean, monkeypatch):
    monkeypatch.setenv("TACTIC_MEMORY_LIMIT", "8g")
    handler = signal.getsignal(signal.SIGHUP)
    worker = prove.LeanWorker("stand_in_dojo:Dojo", 2.0, 300.0, 1)
    signal.signal(signal.SIGHUP, handler)
    yield worker
    worker.leave()
    assert running(os.environ, wait=100) == []


def kinds(outcomes):
    return [kind for kind, *_ in outcomes]


def replay(one, theorem, paths):
    return one.do("replay", theorem, [(path,) for path in paths])


def test_branches_replays_and_the_next_theorem(worker, lean):
    theorem, split, parts = lean["two_steps"], ("constructor",), ("obtain ⟨hp, hq⟩ := h",)
    calls = [((), split[0]), ((), parts[0]), ((), "simp"), (split, "exact h.2")]
    calls += [(parts, "exact ⟨hq, hp⟩"), ((*split, "exact h.2"), "exact h.1")]
    outcomes = worker.do("apply", theorem, calls)
    assert kinds(outcomes) == ["open", "open", "error", "open", "proved", "proved"]
    paths = [(*split, "exact h.2", "exact h.1"), (*parts, "exact ⟨hq, hp⟩")]
    found = replay(worker, theorem, [*paths, split, (*split, "simp"), ("simp", "exact h.1")])
    assert kinds(found) == ["proved", "proved", "open", "error", "error"]
    assert found[1][1] == ["p q : Prop\nh : p ∧ q\n⊢ q ∧ p", outcomes[1][1]]
    assert kinds(worker.do("apply", lean["one_step"], [((), "rfl")])) == ["proved"]
    assert running(os.environ, "two_steps", wait=100) == []


def test_a_proof_that_needs_what_the_search_left_behind_is_no_proof(monkeypatch):
    monkeypatch.setenv("TACTIC_MEMORY_LIMIT", "8g")
    worker = prove.LeanWorker("toy_dojo:Dojo", 9.0, 9.0, 1)
    worker.events = Counter()
    result = search(worker, saying([["note", "if_noted", "step"]]), 3)
    assert (result["successes"], result["unreplayable"]) == (1, 1)


def test_a_sorry_proves_nothing(worker, lean):
    assert kinds(replay(worker, lean["one_step"], [("sorry",)])) == ["error"]  # were it tried


def test_a_request_ends_after_a_while(worker, lean, monkeypatch):
    """Else the worker would seem to hang. The clock goes on by 1 s with each look at it."""
    calls = [((), f"skip {i}") for i in range(9)]
    with monkeypatch.context() as patch:
        patch.setattr(prove.time, "monotonic", itertools.count().__next__)
        outcomes = worker.do("apply", lean["one_step"], calls)
    assert 1 <= len(outcomes) < len(calls) and set(kinds(outcomes)) == {"open"}


# ---- Through Ray ---------------------------------------------------------------------------------
@pytest.fixture
def lean_of(ray_session):
    """A function that returns a `prove.Lean` of an environment."""
    actor = ray_session.remote(prove.LeanWorker).options(num_cpus=0)
    return lambda dojo: prove.Lean(ray_session, actor, (dojo, 2.0, 300.0, 1), patience=600.0)


def test_what_breaks_is_tried_once_more(lean_of, lean):
    one = lean_of("stand_in_dojo:Dojo")
    calls = [((), "rfl"), ((), "simp"), ((), "die"), (("skip",), "rfl"), ((), "skip")]
    outcomes = one.do("apply", lean["hanging"], calls)
    assert kinds(outcomes) == ["proved", "timeout", "crash", "proved", "open"]
    assert (one.events["timeout"], one.events["crash"]) == (2, 2)
    assert outcomes[1][2] >= 4  # both tries, of 2 s each, are the theorem's time
    for name in ("flaky_death", "flaky_hang"):
        assert kinds(one.do("apply", lean[name], [((), "skip"), ((), "rfl")]))[1] == "proved"
    assert kinds(one.do("enter", lean["start_solved"], [()])) == ["crash"]


def test_a_worker_that_dies_or_hangs_is_replaced(lean_of):
    lean = lean_of("toy_dojo:Dojo")
    calls = [((), "step"), (("step",), "step"), ((), "die")]
    calls += [(("step", "step"), "step"), ((), "raise"), ((), "half_a_pair"), ((), "nothing")]
    found = kinds(lean.do("apply", toy("toy_3"), calls))
    assert found == ["open", "open", "crash", "proved", "crash", "crash", "error"]
    lean.patience = 3.0
    assert kinds(lean.do("apply", toy("toy_3"), [((), "hang")])) == ["timeout"]
    lean.patience = 600.0
    ((kind, states, _),) = replay(lean, toy("toy_3"), [("step",) * 3])
    assert (kind, states) == ("proved", ["3 to go", "2 to go", "1 to go"])


def test_a_killed_worker_leaves_no_lean_behind(ray_session, lean):
    """Lean is busy and does not listen to SIGTERM; all was started under nohup."""
    actor = ray_session.remote(prove.LeanWorker).options(num_cpus=0)
    worker = actor.remote("stand_in_dojo:Dojo", 6000.0, 6000.0, 1)
    pid = ray_session.get(worker.__ray_call__.remote(lambda self: os.getpid()))
    ray_session.get(worker.do.remote("enter", lean["hanging"], [()]))
    worker.do.remote("apply", lean["hanging"], [((), "simp")])
    time.sleep(3)
    (left,) = running(os.environ, "hanging")
    os.kill(left, signal.SIGTERM)
    assert running(os.environ, "hanging", wait=0.3) == [left]
    os.kill(pid, signal.SIGKILL)
    assert running(os.environ, "hanging", wait=300) == []


def test_an_ensemble_on_the_embedded_theorems(ray_session, tmp_path):
    """With models that were trained a little. Proofs are proofs of the states that they name."""
    theorems = json.loads((ROOT / "examples/propositional/train.json").read_text())
    short = [one for one in theorems if 1 <= len(one["traced_tactics"]) <= 2]
    (tmp_path / "train.json").write_text(json.dumps(short))
    (tmp_path / "short.json").write_text(json.dumps(short[:5]))
    one, four = (str(tmp_path / f"lean-neff{n}/epoch-1") for n in (1, 4))
    for n in ("1", "4"):
        flags = ["--preset", "laptop", "--data", f"{tmp_path}/train.json", "--lr", "0.003"]
        flags += ["--out", f"{tmp_path}/lean-neff{n}", "--epochs", "1", "--n-eff", n]
        train_lean_step.main(flags)
    flags = ["--preset", "laptop", "--model", four, one, "--ensemble", "--baseline", one]
    flags += ["--theorems", f"{tmp_path}/short.json", "--out", f"{tmp_path}/out", "--passes", "64"]
    prove.main([*flags, "--max-steps", "6", "--workers", "2"])
    files = [prove.read_results(path) for path in tmp_path.glob("out/*.jsonl")]
    assert sorted(results[0]["asked"] for results in files) == [64, 64, 128]
    results = list(itertools.chain(*files))
    assert any(0 < result["successes"] < 64 for result in results)
    for result in results:
        dojo, state = Dojo(short[result["id"]]).__enter__()
        for step in result["proof"]:
            assert state.pp == step["state_before"]
            state = dojo.run_tac(state, step["tactic"])
        assert isinstance(state, ProofFinished) or not result["proof"]


# ---- prove.py as a whole; the model is a table of tactics ----------------------------------------
CHANCES = {
    "⊢ 2 + 2 = 4": {"norm_num": 1, "rfl": 1, "simp": 5, "no end": 1, "decide +native": 1},
    "p q : Prop\nh : p ∧ q\n⊢ q ∧ p": {"obtain ⟨hp, hq⟩ := h": 1, "constructor": 1, "skip": 1},
    "p q : Prop\nhp : p\nhq : q\n⊢ q ∧ p": {"exact ⟨hq, hp⟩": 1, "simp": 3},
    "⊢ False": {"exfalso": 1, "trivial": 2},
    "⊢ 1 = 1": {"rfl": 1, "die": 1},
    "else": {"simp": 1},
}
NAMES = ["one_step", "two_steps", "unprovable", "dying", "start_solved"]
PROVABLE = {"one_step", "two_steps", "dying"}


@pytest.fixture(scope="module")
def scripted(lean, tmp_path_factory):
    """Flags of a run with one worker; what is drawn depends on --seed alone."""
    folder = tmp_path_factory.mktemp("scripted")
    checkpoint = scripted_prove.make_checkpoint(folder / "model", CHANCES)
    (folder / "theorems.json").write_text(json.dumps([lean[name] for name in NAMES]))
    flags = ["--preset", "laptop", "--model", checkpoint, "--theorems", folder / "theorems.json"]
    flags += ["--dojo", "stand_in_dojo:Dojo", "--passes", 64, "--block", 16, "--max-steps", 4]
    return list(map(str, [*flags, "--workers", 1, "--tactic-timeout", 60]))


def result_lines(out):
    (path,) = out.glob("*.jsonl")
    return prove.read_results(path)


@pytest.fixture(scope="module")
def in_process(ray_session):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prove, "TacticSampler", scripted_prove.ScriptedSampler)
        yield


@pytest.fixture(scope="module")
def whole_run(in_process, scripted, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    prove.main([*scripted, "--out", str(out)])
    return out


def test_each_theorem_gets_what_its_tactics_bring(whole_run):
    lines = {line["full_name"]: line for line in result_lines(whole_run)}
    assert {name for name, line in lines.items() if line["successes"]} == PROVABLE
    assert lines["dying"]["crashes"] == 2
    assert lines["start_solved"]["status"].startswith("not started: AssertionError")
    q = 2 / 9  # of one_step, at once
    assert abs(lines["one_step"]["successes"] - 64 * q) < 4 * math.sqrt(64 * q * (1 - q))
    steps = train_lean_step.load_steps([whole_run / "proofs.json"])
    assert len({step["proof"] for step in steps}) == len(PROVABLE)
    assert ("⊢ 1 = 1", "rfl") in [(step["problem"], step["answer"]) for step in steps]


def test_a_finished_run_is_reported_again_and_other_settings_are_refused(
    whole_run, scripted, in_process, monkeypatch, capsys
):
    again = []
    monkeypatch.setattr(prove, "prove_all", lambda *inputs: again.extend(inputs[3]))
    prove.main([*scripted, "--out", str(whole_run), "--workers", "2"])
    assert [theorem["full_name"] for theorem in again] == ["start_solved"]
    for name, value in (("passes", "32"), ("seed", "1"), ("dojo", "toy_dojo:Dojo")):
        flags = [*scripted, "--out", str(whole_run), f"--{name}", value]
        assert "another" in refused(capsys, prove.main, flags)


def test_kill_9_loses_and_doubles_no_theorem(
    whole_run, scripted, ray_session, in_process, tmp_path
):
    """Nothing of a Lean process is left, and the same command goes on where a kill left it."""
    address = ray_session.get_runtime_context().gcs_address
    variables = os.environ | {"RAY_ADDRESS": address, "SCRIPTED_PAUSE": "0.1"}
    command = [sys.executable, "tests/scripted_prove.py", *scripted, "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, env=variables, stderr=subprocess.PIPE)
    while not running(os.environ, "unprovable"):  # the third theorem of five
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert running(os.environ, wait=300) == []
    with open(next(tmp_path.glob("*.jsonl")), "a") as file:
        file.write('\n{"id": 3, "full_na')  # as a kill in the middle of a write leaves it
    prove.main([*scripted, "--out", str(tmp_path)])
    by_the_clock = ("seconds", "blocks")
    found, expected = (
        [{k: v for k, v in line.items() if k not in by_the_clock} for line in result_lines(out)]
        for out in (tmp_path, whole_run)
    )
    assert found == expected


# ---- What is refused before anything starts ------------------------------------------------------
def test_what_is_missing_is_named(scripted, lean, tmp_path, monkeypatch, capsys):
    def message(*flags):
        flags = [*scripted, "--out", tmp_path / "out", *flags]
        return refused(capsys, prove.main, [*map(str, flags)])

    def theorems(**more):
        (tmp_path / "theorems.json").write_text(json.dumps([lean["one_step"] | more]))
        return "--dojo", "lean_dojo:Dojo", "--theorems", tmp_path / "theorems.json"

    assert "--passes" in message("--passes", 0)
    assert "none.json" in message("--theorems", tmp_path / "none.json")
    solved = theorems(traced_tactics=[{"tactic": "trivial"}])
    assert "no theorem" in message(*solved, "--only-untraced")
    wrong = scripted_prove.make_checkpoint(tmp_path / "direct", {}, template="direct")
    for model in (wrong, ROOT / "examples/tiny_prover"):
        assert str(model) in message("--model", model)
    assert "not traced" in message(*theorems(commit="f" * 40))
    assert "GITHUB_ACCESS_TOKEN" in message(*theorems(url="https://github.com/a/b"))
    monkeypatch.setenv("PATH", "")
    assert "git" in message(*theorems())
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "without accelerate launch" in message()
    assert not (tmp_path / "out").exists()


def test_each_checkpoint_has_a_file_of_its_own(tmp_path):
    names = ["runs/lean_a/epoch-1", "runs/lean-a/epoch-1", "runs/lean/a/epoch-1"]
    args = argparse.Namespace(out=tmp_path)
    assert len({*prove.start_out(args, {name: (name, 1) for name in names}).values()}) == 3


def test_minif2f_is_read_from_leandojos_cache(tmp_path, monkeypatch):
    folder = tmp_path / f"yangky11-miniF2F-lean4-be17324{'0' * 33}/miniF2F-lean4/MiniF2F"
    folder.mkdir(parents=True)
    (folder / "Test.lean").write_text(
        "theorem amc12_1 (x : ℝ)\n  (h : x = 1) : x = 1 := by\n  sorry\n\n"
        "-- theorem of_a_comment : False\n  theorem imo_3{x : ℕ} : x = x := sorry\n"
    )
    (folder / "Valid.lean").write_text("theorem valid_1[Group G] : True := by\n  sorry\n")
    monkeypatch.setenv("CACHE_DIR", str(tmp_path))
    generate.main(tmp_path)
    rows = json.loads((tmp_path / "test.json").read_text())
    assert [row["full_name"] for row in rows] == ["amc12_1", "imo_3"] == rows[0]["unproved"]
    assert rows[0]["commit"] == f"be17324{'0' * 33}" and rows[0]["url"] == generate.URL
