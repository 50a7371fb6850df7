"""The embedded theorem proving: the environment and its theorems; the embedded files."""

import json
import random
import shutil
from itertools import islice

import pytest
from conftest import ROOT, run_script

from examples.propositional import generate
from examples.propositional.environment import (
    Dojo,
    LeanError,
    ProofFinished,
    ProofGivenUp,
    TacticState,
)

FOLDER = ROOT / "examples/propositional"
ROWS = {
    split: json.loads((FOLDER / f"{split}.json").read_text()) for split in ("train", "val", "test")
}
EVERY = [row for rows in ROWS.values() for row in rows]


def start(statement):
    return Dojo({"full_name": "t", "statement": f"theorem t {statement}"}).__enter__()


def walk(statement, *tactics):
    """Return the result of the last tactic."""
    dojo, state = start(statement)
    for tactic in tactics:
        state = dojo.run_tac(state, tactic)
    return state


# ---- The environment -----------------------------------------------------------------------------
GOAL = "(A B C : Prop) (h1 : A ∧ B) (h2 : C → A → B) (h3 : C) (h4 : A) (h5 : C → B) : B"
WRONG = [
    *("", "simp", "left sorry", "obtain ⟨h6, h7 := h1", "exact h9", "exact", "exact sorry h3"),
    *("have h6 := sorry", "exact h1", "exact A", "exact h5 h1", "cases h3", "exact h3 h1"),
    *("intro h6", "apply h1", "exact h5 h3\nexact h5 h3", "have h2 := h1", "have A := h1"),
    *("obtain ⟨h6, h6⟩ := h1", "obtain h6 | h7 := h1", "left", "obtain ⟨h6, h7⟩ := h5"),
    *("constructor", "exact h5 h3)", "exact " + "(" * 100_000 + "h1", "exact h5(h3)"),
    *("exact (h5)h3", "exact (h2 h3)(h4)", "exact h5\th3", "exact h5\u00a0h3"),
]


def test_errors_leave_the_state_as_it_was():
    dojo, state = start(GOAL)
    for tactic in WRONG:
        assert isinstance(dojo.run_tac(state, tactic), LeanError), tactic
    for tactic in ("exact h5 h3", "exact (h2 h3) (h4)", "exact(h5 h3)", "exact h5\nh3"):
        assert isinstance(dojo.run_tac(state, tactic), ProofFinished), tactic


def test_sorry_closes_its_goal_only_and_proves_nothing():
    for tactic in ("sorry", "exact sorry", "exact (sorry)", "exact h2 (sorry) h4"):
        assert walk(GOAL, tactic) == ProofGivenUp()
    statement = "(A B : Prop) (h1 : A) (h2 : B) : A ∧ B"
    assert walk(statement, "constructor", "sorry").pp.endswith("h2 : B\n⊢ B")
    assert walk(statement, "constructor", "sorry", "exact h2") == ProofGivenUp()
    assert isinstance(walk(statement, "constructor", "exact h1", "exact h2"), ProofFinished)


def test_any_earlier_state_can_be_continued_from():
    dojo, state = start("(A B : Prop) (h1 : A) : B ∨ A")
    wrong, right = dojo.run_tac(state, "constructor"), dojo.run_tac(state, "right")
    assert dojo.run_tac(state, "left") == wrong  # `constructor` takes the first one
    assert isinstance(dojo.run_tac(wrong, "exact h1"), LeanError)
    assert isinstance(dojo.run_tac(right, "exact h1"), ProofFinished)


# ---- It proves nothing that does not hold --------------------------------------------------------


def is_provable(goal):
    """Decided by a method of its own, not by the environment's tactics."""
    hypotheses = frozenset(map(generate.plain, goal.hypotheses.values()))
    return generate.provable(hypotheses, generate.plain(goal.target))


def goal_of(statement):
    dojo, state = start(statement)
    return dojo.goals[state.id][0]


def random_tactic(rng, goal):
    """One that makes sense, or any that could be one."""
    if rng.random() < 0.3 and (sensible := generate.tactics(goal)):
        return rng.choice(sensible)
    (old, a, b), new = rng.choices([*goal.hypotheses], k=3), f"h{rng.randint(1, 12)}"
    term = rng.choice([old, f"({old})", f"{old} {a}", f"{old} ({a} {b})"])
    forms = [f"exact {term}", f"apply {term}", f"have {new} := {term}", f"cases {term}"]
    forms += [f"obtain ⟨{new}, {new}1⟩ := {term}", f"obtain {new} | {new} := {term}"]
    forms += ["constructor", "left", "right", "exfalso", "assumption", f"intro {new} {new}2"]
    return rng.choice(forms)


def test_soundness():
    """Step by step: no tactic makes a goal provable that was not."""
    rng, taken, lost = random.Random(0), 0, 0
    for _ in range(1000):
        atoms, hypotheses, target = generate.random_sequent(rng)
        named = "".join(f" (h{i} : {generate.show(f)})" for i, f in enumerate(hypotheses, start=1))
        dojo, state = start(f"({' '.join(atoms)} : Prop){named} : {generate.show(target)}")
        for _ in range(40):
            first, *others = dojo.goals[state.id]
            state = dojo.run_tac(state, random_tactic(rng, first))
            if isinstance(state, LeanError):
                state = TacticState("", len(dojo.goals) - 1)  # the state before
                continue
            after = dojo.goals[-1]
            new = after[: len(after) - len(others)]
            assert after[len(new) :] == others
            assert is_provable(first) or not all(map(is_provable, new))
            taken, lost = taken + 1, lost + (is_provable(first) and not all(map(is_provable, new)))
            if not after:
                break
    assert taken > 2000 and lost > 80, (taken, lost)


# ---- The theorems and the embedded files ---------------------------------------------------------
def test_traces_replay():
    for row in EVERY:
        assert is_provable(goal_of(row["statement"].split(" ", 2)[2]))
        dojo, state = Dojo(row).__enter__()
        for step in row["traced_tactics"]:
            assert state.pp == step["state_before"]
            state = dojo.run_tac(state, step["tactic"])
            assert getattr(state, "pp", "no goals") == step["state_after"]
        assert isinstance(state, ProofFinished if row["traced_tactics"] else TacticState)


def test_theorems_are_what_the_generator_makes():
    rows = generate.rows_of("test", seed=0, taken=set())  # the split that is made first
    assert list(islice(rows, 25)) == ROWS["test"][:25]


@pytest.mark.parametrize("name", ["arithmetic", "tiny_llama", "tiny_prover"])
def test_generators_make_the_committed_files_byte_for_byte(name, tmp_path):
    folder = ROOT / "examples" / name
    run_script(shutil.copy(folder / "generate.py", tmp_path))  # it writes beside itself
    for path in folder.glob("*.json*"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
